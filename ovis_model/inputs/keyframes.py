"""Select frames of a video among candidates: uniform, top-k by relevance, or MDP3.

Knows embeddings, not images, encoders or models. MDP3 (arXiv:2501.02885, ICCV 2025; `plugin/mdp3.py` of AIDC-AI/Ovis)
scores a set S of frames by relevance and by diversity. It splits the candidates into consecutive segments:

    F(S) = weight * sum of ln r_i over S + ln det K_S     r_i: kernel of query and frame i; K: kernel of frames

Within a segment it picks frames greedily, given the last frame picked before the segment. Dynamic programming
distributes the k picks over the segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Method = Literal["uniform", "top-k", "mdp3"]
Score = Literal["upstream", "conditional"]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

ALPHAS = (2.0, 1.0, 0.5, 0.25, 0.125)
"""Widths a of the Gaussians whose sum is the kernel: exp(-d^2 / 2a)."""
RELEVANCE_WEIGHT = 10.0  # 2 / lambda, with the paper's lambda of 0.2

_MIN_RELEVANCE = 1e-30
_MIN_VARIANCE = 1e-12  # contribution to the determinant of a frame that equals one already picked
_UNIT_TOLERANCE = 1e-4  # embeddings this close to unit length differ from it by rounding only
_SAME_DISTANCE = 1e-12  # squared; float32 cannot distinguish embeddings that are closer


class Selection(NamedTuple):
    """Selected frames: `indices` int64[k], ascending; `scores` float64[k + 1], the best total for 0 to k frames."""

    indices: Indices
    scores: Floats


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Parameters of MDP3.

    segment_size: candidates per segment; 0 or less means one segment, as in the plugin.
    score: "upstream" counts the frame that a segment is conditioned on again in each segment, as the published code
        does. This favours picks in many segments, and the kernel must be a sum. "conditional" counts it once: the
        paper's conditional gain, for a kernel of any scale.
    condition_size: number of earlier picks that a segment is conditioned on.
    mean_kernel: use the mean of the Gaussians instead of their sum.
    """

    segment_size: int = 32
    score: Score = "upstream"
    condition_size: int = 1
    relevance_weight: float = RELEVANCE_WEIGHT
    alphas: Sequence[float] = ALPHAS
    mean_kernel: bool = False

    def __post_init__(self) -> None:
        if self.score not in ("upstream", "conditional"):
            raise ValueError(f"score={self.score!r} must be 'upstream' or 'conditional'")
        if self.condition_size < 0:
            raise ValueError(f"condition_size={self.condition_size} must be 0 or more")
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError(f"alphas={self.alphas} must be positive widths")

    def apply_kernel(self, squared_distances: Floats) -> Floats:
        """Map squared distances of embeddings to similarities, float64 of the same shape."""
        total = _sum_gaussians(squared_distances, tuple(sorted(self.alphas, reverse=True)))
        return total / len(self.alphas) if self.mean_kernel else total

    @cached_property
    def peak(self) -> float:
        """The kernel of two equal embeddings."""
        return float(self.apply_kernel(np.zeros(1))[0])


@dataclass(frozen=True)
class _Candidates:
    """All candidates: unit embeddings float64[N, d], weighted log-relevance float64[N], and the rules."""

    embeddings: Floats
    weighted: Floats
    rules: Rules


def select_frames(
    frames: ArrayLike,
    query: ArrayLike | None,
    k: int,
    *,
    method: Method = "mdp3",
    relevance: ArrayLike | None = None,
    **rules: Any,
) -> Indices:
    """Return the indices int64[k] of the selected frames, ascending and distinct; all frames if there are at most `k`.

    frames: float[N, d], embeddings of the candidates in temporal order.
    query: float[d], embedding of the text that the frames should match; None selects by diversity alone.
    relevance: float[N], > 0, a score per frame that replaces `query`; only ratios of scores matter.
    method: "mdp3", with the fields of `Rules` as `rules`; "top-k", the k most relevant that are not next to each other;
        or "uniform".

    Embeddings are scaled to unit length, and everything is computed in float64. A copy of a picked frame adds nothing:
    MDP3 prefers different frames while there are any, then spreads the remaining picks over time. Raise ValueError for
    k below 1, for embeddings that are not finite, and for top-k without query and relevance.
    """
    count = len(np.asarray(frames))
    _check(count, k, method)
    if k >= count:
        _normalize_embeddings(frames, "frame")
        return np.arange(count)
    if method == "uniform":
        return select_uniform(count, k)
    if method == "mdp3":
        return select_mdp3(frames, query, k, relevance=relevance, rules=Rules(**rules)).indices
    known = _compute_log_relevance(_normalize_embeddings(frames, "frame"), query, relevance, Rules(**rules))
    if known is None:
        raise ValueError("top-k needs a query or relevance scores; give one, or use mdp3 or uniform")
    return _select_apart(known, k)


def _select_apart(relevance: Floats, k: int) -> Indices:
    """Return the `k` most relevant frames, int64[k], at least an eighth of their even distance apart.

    Frames next to each other show the same moment.
    """
    distance = max(1, len(relevance) // (8 * k))
    is_free, picks = np.ones(len(relevance), bool), []
    for _ in range(k):
        pick = int(np.argmax(np.where(is_free, relevance, -np.inf)))
        picks.append(pick)
        is_free[max(0, pick - distance + 1) : pick + distance] = False
    return np.sort(np.array(picks))


def select_uniform(count: int, k: int) -> Indices:
    """Return the middle of each of `k` equal parts of `count` frames, int64[min(k, count)] (the model card's rule)."""
    if k >= count:
        return np.arange(count)
    part = count / k
    return np.array([min(count - 1, int((part * i + part * (i + 1)) / 2)) for i in range(k)])


def select_mdp3(
    frames: ArrayLike,
    query: ArrayLike | None,
    k: int,
    *,
    relevance: ArrayLike | None = None,
    rules: Rules | None = None,
) -> Selection:
    """Select frames with MDP3 and return their scores too; arguments as in `select_frames`, with 1 <= k < N."""
    rules = rules or Rules()
    embeddings = _normalize_embeddings(frames, "frame")
    _check(len(embeddings), k, "mdp3")
    log_relevance = _compute_log_relevance(embeddings, query, relevance, rules)
    weighted = np.zeros(len(embeddings)) if log_relevance is None else rules.relevance_weight * log_relevance
    candidates = _Candidates(embeddings, weighted, rules)
    size = rules.segment_size if rules.segment_size > 0 else len(embeddings)
    scores = np.array([0.0] + [-math.inf] * k)
    traces: list[list[int]] = [[] for _ in range(k + 1)]
    for start in range(0, len(embeddings), size):
        segment = np.arange(start, min(start + size, len(embeddings)))
        scores, traces = _add_segment(candidates, segment, scores, traces)
    return Selection(_spread_repeats(embeddings, np.array(traces[k])), scores)


def _check(count: int, k: int, method: str) -> None:
    if k < 1:
        raise ValueError(f"cannot select k={k} frames; k must be at least 1")
    if count == 0:
        raise ValueError("got no frames to select from; give at least 1")
    if method not in ("uniform", "top-k", "mdp3"):
        raise ValueError(f"method={method!r} must be 'uniform', 'top-k' or 'mdp3'")


def _normalize_embeddings(values: ArrayLike, what: str) -> Floats:
    """Scale to unit length, float64[N, d]; zeros and what is unit up to rounding stay unchanged."""
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{what} embeddings must have two dimensions, not shape {rows.shape}")
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    if not np.isfinite(lengths).all():
        raise ValueError(f"the embedding of {what} {int(np.argmin(np.isfinite(lengths)))} is not finite")
    far = (np.abs(lengths - 1) > _UNIT_TOLERANCE) & (lengths > 0)
    return rows / np.where(far, lengths, 1.0)[:, None] if far.any() else rows


def _compute_log_relevance(
    embeddings: Floats, query: ArrayLike | None, relevance: ArrayLike | None, rules: Rules
) -> Floats | None:
    """Return the log-relevance float64[N] of the frames, or None without query and relevance."""
    if relevance is not None:
        given = np.asarray(relevance, np.float64)
        if given.shape != (len(embeddings),) or not np.isfinite(given).all():
            raise ValueError(f"relevance must hold one finite number for each of the {len(embeddings)} frames")
    elif query is not None:
        target = _normalize_embeddings(np.asarray(query, np.float64).reshape(1, -1), "query")
        given = rules.apply_kernel(_compute_squared_distances(target, embeddings)[0])
    else:
        return None
    logarithms: Floats = np.log(np.maximum(given, _MIN_RELEVANCE))
    return logarithms


def _compute_squared_distances(a: Floats, b: Floats) -> Floats:
    """Return float64[A, B]. One matrix product avoids an array of shape [A, B, d]."""
    distances: Floats = a @ b.T
    distances *= -2
    distances += np.einsum("nd,nd->n", a, a)[:, None]
    distances += np.einsum("nd,nd->n", b, b)
    return np.maximum(distances, 0, out=distances)


def _sum_gaussians(squared_distances: Floats, alphas: tuple[float, ...]) -> Floats:
    """Add the Gaussians of `alphas`, from wide to narrow.

    A Gaussian of half the width is the square of the one before, which saves the expensive exp.
    """
    gaussian = np.exp(squared_distances / (-2 * alphas[0]))
    total = gaussian.copy()
    for wider, alpha in pairwise(alphas):
        if alpha * 2 == wider:
            gaussian *= gaussian
        else:
            gaussian = np.exp(squared_distances / (-2 * alpha))
        total += gaussian
    return total


def _add_segment(
    candidates: _Candidates, segment: Indices, scores: Floats, traces: list[list[int]]
) -> tuple[Floats, list[list[int]]]:
    """Do one step of the dynamic programming: return the best scores and picks of 0 to k frames including `segment`."""
    k = len(scores) - 1
    starts = [s for s in range(k + 1) if scores[s] > -math.inf]
    given = [tuple(traces[s][max(0, s - candidates.rules.condition_size) :]) for s in starts]
    distinct = list(dict.fromkeys(given))
    max_picks = min(k - starts[0], len(segment))
    gains, picks = _pick_greedily(candidates, segment, distinct, max_picks)
    totals = np.full((len(starts), k + 1), -math.inf)  # [start, frames in the end]
    for row, (start, condition) in enumerate(zip(starts, given, strict=True)):
        stop = min(k, start + max_picks)
        totals[row, start : stop + 1] = scores[start] + gains[distinct.index(condition), : stop + 1 - start]
    best = np.argmax(totals, axis=0)  # ties: the fewest frames before the segment
    new_traces = [
        traces[start] + sorted(picks[distinct.index(condition), : j - start].tolist()) if j >= start else []
        for j, start, condition in ((j, starts[b], given[b]) for j, b in enumerate(best.tolist()))
    ]
    return totals.max(axis=0), new_traces


def _pick_greedily(
    candidates: _Candidates, segment: Indices, conditions: list[tuple[int, ...]], max_picks: int
) -> tuple[Floats, Indices]:
    """Pick frames of one segment greedily for all C `conditions` (frames picked before it) at once.

    Return gains float64[C, max_picks + 1] for 0 to `max_picks` picks, and the picks int64[C, max_picks] in order. The
    determinant is updated by incremental Cholesky: `variances` holds the factor that each candidate would add.
    """
    own = candidates.embeddings[segment]
    kernel = candidates.rules.apply_kernel(_compute_squared_distances(own, own))
    np.fill_diagonal(kernel, candidates.rules.peak)
    factors, variances, base = _begin_factors(candidates, segment, conditions, max_picks)
    value = np.tile(candidates.weighted[segment], (len(conditions), 1))  # per candidate; -inf once it is picked
    depth, each = factors.shape[1] - max_picks, np.arange(len(conditions))
    gains, picks = np.zeros((len(conditions), max_picks + 1)), np.zeros((len(conditions), max_picks), np.int64)
    gains[:, 0] = base
    for step in range(max_picks):
        adds = value + np.log(variances)
        pick = np.argmax(adds, axis=1)  # ties: the first
        picks[:, step] = pick
        gains[:, step + 1] = gains[:, step] + adds[each, pick]
        at = depth + step
        known = np.matmul(factors[each, :at, pick][:, None], factors[:, :at])[:, 0]
        row = (kernel[pick] - known) / np.sqrt(variances[each, pick])[:, None]
        factors[:, at] = row
        variances = np.maximum(variances - row * row, _MIN_VARIANCE)
        value[each, pick] = -math.inf
    if candidates.rules.score == "conditional":
        gains[:, 1:] -= base[:, None]
    gains[:, 0] = 0
    return gains, segment[picks]


def _begin_factors(
    candidates: _Candidates, segment: Indices, conditions: list[tuple[int, ...]], max_picks: int
) -> tuple[Floats, Floats, Floats]:
    """Begin the Cholesky factors of `_pick_greedily` with the frames picked before the segment.

    Return factors float64[C, depth + max_picks, M] with the first `depth` rows filled, variances float64[C, M], and
    the score float64[C] of those frames.
    """
    depth, peak = max(map(len, conditions)), candidates.rules.peak
    factors = np.zeros((len(conditions), depth + max_picks, len(segment)))
    variances = np.full((len(conditions), len(segment)), peak)
    base = np.zeros(len(conditions))
    for number, condition in enumerate(conditions):
        if condition:
            rows, base[number] = _compute_condition_rows(candidates, segment, list(condition))
            factors[number, : len(rows)] = rows
            variances[number] = np.maximum(peak - np.einsum("cm,cm->m", rows, rows), _MIN_VARIANCE)
    return factors, variances, base


def _compute_condition_rows(candidates: _Candidates, segment: Indices, condition: list[int]) -> tuple[Floats, float]:
    """Return the Cholesky rows float64[c, M] of the frames in `condition`, and the score of these frames."""
    embeddings, peak = candidates.embeddings, candidates.rules.peak
    columns = np.concatenate([np.array(condition), segment])
    kernel = candidates.rules.apply_kernel(_compute_squared_distances(embeddings[condition], embeddings[columns]))
    np.fill_diagonal(kernel, peak)
    rows = np.zeros_like(kernel)
    score = 0.0
    for i, frame in enumerate(condition):
        variance = max(peak - float(rows[:i, i] @ rows[:i, i]), _MIN_VARIANCE)
        rows[i] = (kernel[i] - rows[:i, i] @ rows[:i]) / math.sqrt(variance)
        score += float(candidates.weighted[frame]) + math.log(variance)
    return rows[:, len(condition) :], score


def _spread_repeats(embeddings: Floats, picks: Indices) -> Indices:
    """Return `picks` sorted, with copies replaced by different frames while there are any.

    Each replacement is the frame farthest in time from all picks. When no different frame is left, any frame counts.
    """
    alike = np.tril(_compare_pairs(embeddings[picks], embeddings[picks]), -1).any(axis=1)
    kept = picks[~alike].tolist()
    for _ in range(int(alike.sum())):
        gaps = np.abs(np.arange(len(embeddings))[:, None] - np.array(kept)).min(axis=1)
        is_new = ~_compare_pairs(embeddings, embeddings[kept]).any(axis=1)
        kept.append(int(np.argmax(np.where(is_new, gaps, -1) if is_new.any() else gaps)))
    return np.sort(np.array(kept, np.int64))


def _compare_pairs(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """Return bool[A, B]: whether two embeddings are equal."""
    return _compute_squared_distances(a, b) < _SAME_DISTANCE
