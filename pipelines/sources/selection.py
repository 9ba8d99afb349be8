"""Leave out files that a directory or glob holds by accident: hidden and private files, and the files of runs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from ovis_model.wording import count_nouns
from pipelines.sources.kinds import IMAGE_SUFFIXES
from pipelines.storage import store
from pipelines.storage.store import FileInfo

GLOB_CHARACTERS = frozenset("*?[")
_SYSTEM_NAMES = frozenset({"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"})
_SUSPECT = re.compile(r"(?:^|/)(?:[._]|@eadir|\$recycle\.bin|thumbs\.db|desktop\.ini)", re.IGNORECASE)
_RUN_FILE = re.compile(r"(.*/)(?:data|manifest|exchange)/rows-\d{12}[^/]*\.parquet", re.DOTALL)
_RUN_FIELDS = frozenset({"fingerprint", "model", "num_rows"})
_WRITTEN_BY_RUNS = re.compile(r"(?:(?:data|manifest|exchange)/.*|run\.json|driver\.json|report\.html)", re.DOTALL)
_MAX_MARKER_BYTES = 16 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """The directory below which INPUT lists files, with "/", and the names that a glob has below it."""

    root: str
    patterns: tuple[str, ...] = ()

    @classmethod
    def from_uri(cls, uri: str) -> Scope:
        """Split a glob at its first component with a wildcard; a directory is all root."""
        parts = store.normalize(uri).rstrip("/").split("/")
        first = next((i for i, part in enumerate(parts) if GLOB_CHARACTERS & set(part)), len(parts))
        return cls("/".join(parts[:first]) + "/", tuple(parts[first:]))

    def is_hidden(self, uri: str) -> bool:
        """Return whether a component below the root is hidden or private, and the glob does not name it."""
        name = uri[len(self.root) :]
        if not _SUSPECT.search(name):
            return False
        is_image = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        parts = name.split("/")
        named = self._find_named(len(parts))
        return any(_is_hidden_name(part, is_image=is_image) for i, part in enumerate(parts) if i not in named)

    def _find_named(self, num_parts: int) -> set[int]:
        """Return the places of the components that the glob spells out, at least their first character."""
        any_depth = self.patterns.index("**") if "**" in self.patterns else len(self.patterns)
        # Patterns before `**` count from the left, those after it from the right.
        places = {i if i < any_depth else i - len(self.patterns) + num_parts: p for i, p in enumerate(self.patterns)}
        return {place for place, pattern in places.items() if not pattern.startswith(("*", "?"))}


def is_hidden_path(name: str) -> bool:
    """Return whether a component of a tar member's name is hidden."""
    return _SUSPECT.search(name) is not None and any(_is_hidden_name(part, is_image=True) for part in name.split("/"))


def _is_hidden_name(part: str, *, is_image: bool) -> bool:
    """Return whether a name is hidden; the `_` of Spark and Delta does not apply to images or to `_column=value`."""
    if part.startswith("."):
        return part not in (".", "..")
    return part.lower() in _SYSTEM_NAMES or (part.startswith("_") and not is_image and "=" not in part)


def select_files(uri: str, infos: list[FileInfo], output: str | None, *, is_glob: bool = False) -> list[FileInfo]:
    """Return the files that are neither hidden nor from a run, in order; log how many are left out.

    `output` is the OUTPUT of this run. Other runs are recognized by their run.json, in directories and `**` globs.
    """
    scope = Scope.from_uri(uri) if is_glob else Scope(store.normalize(uri).rstrip("/") + "/")
    finds_runs = not is_glob or "**" in scope.patterns
    runs = _find_runs(scope.root, infos) if finds_runs else []
    kept, hidden, from_runs = [], [], []
    own = _locate_output(scope.root, output)
    run_places = tuple({*runs, *([own] if own and own != scope.root else [])})
    for info in infos:
        if info.uri.startswith(run_places) or (own == scope.root and _is_written_by_run(info.uri, own)):
            from_runs.append(info)
        elif scope.is_hidden(info.uri):
            hidden.append(info)
        else:
            kept.append(info)
    _log_left_out(uri, scope.root, hidden, from_runs)
    return kept


def _is_written_by_run(uri: str, place: str) -> bool:
    return _WRITTEN_BY_RUNS.fullmatch(uri, len(place)) is not None


def _find_runs(root: str, infos: Iterable[FileInfo]) -> list[str]:
    """Return the directories below `root`, with "/", that hold a run."""
    matches = (_RUN_FILE.fullmatch(info.uri) for info in infos if "/rows-" in info.uri)
    places = {match[1] for match in matches if match}
    return sorted(
        place for place in places if len(place) > len(root) and read_marker(place, "run.json").keys() >= _RUN_FIELDS
    )


def _locate_output(root: str, output: str | None) -> str | None:
    """Return OUTPUT with "/" if it is `root` or below it; links are resolved."""
    if output is None:
        return None
    place = store.resolve_links(output).rstrip("/") + "/"
    real_root = store.resolve_links(root).rstrip("/") + "/"
    return root + place[len(real_root) :] if place.startswith(real_root) else None


def _log_left_out(uri: str, root: str, hidden: list[FileInfo], from_runs: list[FileInfo]) -> None:
    kinds = (("hidden or private", hidden), ("of runs", from_runs))
    parts = [
        f"{len(infos)} {kind}, such as {store.redact(infos[0].uri[len(root) :])}" for kind, infos in kinds if infos
    ]
    if parts:
        number = count_nouns(len(hidden) + len(from_runs), "file")
        logger.warning("%s: left out %s (%s)", store.redact(uri), number, "; ".join(parts))


def read_marker(uri: str, name: str) -> dict[str, object]:
    """Return the JSON object in a marker file; {} if the file is missing or holds something else."""
    marker = store.join(uri, name)
    if store.find_file(marker) is None:
        return {}
    try:
        values = json.loads(store.read_bytes(marker, 0, _MAX_MARKER_BYTES))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
