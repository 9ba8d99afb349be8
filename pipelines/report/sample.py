"""Choose the rows that a page shows: some at random, some of each doubtful kind, and the same every time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.monitoring.error_reasons import normalize_reason
from pipelines.report.answers import Answers, to_mask

Group = Literal["random", "unsure", "flagged", "wrong", "errors"]

_MAX_STRATA = 64  # kinds per group; all further kinds count as one
_SEED = 0x9E3779B97F4A7C15
_MAX_CHARACTERS = 20_000  # per text in memory until the page is written

Json = dict[str, Any]


@dataclass
class PickedRow:
    """A row of the page: its number, its columns, its derived values, and the groups it was picked for."""

    row: int
    values: Json
    confidence: Mapping[str, float]
    flags: list[str]
    truth: Mapping[str, str | None]
    wrong: list[str]
    groups: tuple[Group, ...] = ()


def make_picked(name: str, row: int, times_s: Sequence[float]) -> PickedRow:
    """Return a row of which only the media are shown: its id, number, and the times of its frames in seconds."""
    return PickedRow(row, {"id": name, "error": "", "frame_timestamps_s": list(times_s)}, {}, [], {}, [])


class ContactSheet:
    """Picks at most `size` rows to show from all rows, which may be offered in any order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._share = max(1, size // 6)  # rows per group of doubtful rows; the rest is random
        self._random = _Lowest(size)
        self._strata: dict[Group, dict[str, _Lowest]] = {"wrong": {}, "unsure": {}, "flagged": {}, "errors": {}}

    def offer(self, answers: Answers) -> None:
        """Offer a batch of rows to all groups."""
        make = cache(partial(_pick, answers))  # builds each row once, even if several groups keep it
        order = hash_row_numbers(answers.rows)
        everything = np.arange(len(answers.rows))
        self._random.offer(everything, np.zeros(len(order)), order, make)
        for group, kind, places, scores in _find_doubtful(answers):
            self._get_stratum(group, kind).offer(places, scores, order[places], make)

    def list_rows(self) -> list[PickedRow]:
        """Return the picked rows by row number, each with its groups."""
        groups: defaultdict[int, list[Group]] = defaultdict(list)
        found: dict[int, PickedRow] = {}
        for group, strata in self._strata.items():
            for picked in _take_in_turns([strata[kind].rows for kind in sorted(strata)], self._share):
                found[picked.row] = picked
                groups[picked.row].append(group)
        for picked in self._random.rows:
            if len(found) >= self._size and picked.row not in found:
                break
            found[picked.row] = picked
            groups[picked.row].append("random")
        for row, picked in found.items():
            picked.groups = tuple(groups[row])
        return [found[row] for row in sorted(found)]

    def _get_stratum(self, group: Group, kind: str) -> _Lowest:
        strata = self._strata[group]
        key = kind if kind in strata or len(strata) < _MAX_STRATA else "others"
        return strata.setdefault(key, _Lowest(self._share))


Doubtful = tuple[Group, str, NDArray[np.int64], NDArray[np.float64]]


def _find_doubtful(answers: Answers) -> Iterator[Doubtful]:
    """Yield groups of doubtful rows: group, kind, places of the rows in the batch, scores (lowest shown first)."""
    for name, confidence in answers.confidence.items():
        places = np.flatnonzero(~np.isnan(confidence) & answers.is_ok)
        yield "unsure", name, places, confidence[places]
    for name, is_wrong in answers.is_wrong.items():
        places = np.flatnonzero(is_wrong)
        yield "wrong", name, places, -np.nan_to_num(answers.confidence[name][places])
    flags, parents = answers.flags.flatten(), np.asarray(pc.list_parent_indices(answers.flags))
    for flag in flags.unique().drop_null().to_pylist():
        places = np.unique(parents[to_mask(pc.equal(flags, flag))])
        yield "flagged", flag, places, np.zeros(len(places))
    for kind, places in _group_by_reason(answers).items():
        yield "errors", kind, places, np.zeros(len(places))


def _group_by_reason(answers: Answers) -> dict[str, NDArray[np.int64]]:
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for place, stage, error in zip(np.flatnonzero(~answers.is_ok).tolist(), *answers.list_failures(), strict=True):
        kinds[normalize_reason(stage, error)].append(place)
    return {kind: np.array(places) for kind, places in kinds.items()}


def _pick(answers: Answers, place: int) -> PickedRow:
    (values,) = answers.batch.slice(place, 1).to_pylist()
    return PickedRow(
        row=int(answers.rows[place]),
        values={name: v[:_MAX_CHARACTERS] if isinstance(v, str) else v for name, v in values.items()},
        confidence={name: float(values[place]) for name, values in answers.confidence.items()},
        flags=answers.flags[place].as_py() or [],
        truth={name: values[place].as_py() for name, values in answers.truth_texts.items()},
        wrong=[name for name, is_wrong in answers.is_wrong.items() if is_wrong[place]],
    )


class _Lowest:
    """Keeps the `size` offered rows with the lowest (score, order), sorted."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores, self._order = np.empty(0), np.empty(0)
        self.rows: list[PickedRow] = []

    def offer(
        self,
        places: NDArray[np.int64],
        scores: NDArray[np.float64],
        order: NDArray[np.float64],
        make: Callable[[int], PickedRow],
    ) -> None:
        """Offer the rows at `places` of a batch; `make` builds only those that are kept."""
        kept = len(self.rows)
        scores, order = np.concatenate((self._scores, scores)), np.concatenate((self._order, order))
        lowest = np.lexsort((order, scores))[: self._size]
        self._scores, self._order = scores[lowest], order[lowest]
        self.rows = [self.rows[i] if i < kept else make(int(places[i - kept])) for i in lowest.tolist()]


def hash_row_numbers(rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hash row numbers to float64[N] in [0, 1), so that the same rows are picked however the files are divided.

    Uses the finalizer of SplitMix64 (Steele et al. 2014, Fast Splittable Pseudorandom Number Generators).
    """
    mixed = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(_SEED)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    fractions: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    return fractions


def _take_in_turns(strata: list[list[PickedRow]], count: int) -> list[PickedRow]:
    """Take the first row of each stratum, then the second of each and so on, up to `count` distinct rows."""
    in_turns = filter(None, chain.from_iterable(zip_longest(*strata)))
    return list({picked.row: picked for picked in in_turns}.values())[:count]
