"""Select frames of a video among candidates: uniform, top-k by relevance, or MDP3.

Knows embeddings only: no pictures, no encoder, no model. MDP3 (arXiv 2501.02885, ICCV 2025; `plugin/mdp3.py` of
AIDC-AI/Ovis) scores a set S of frames by relevance and by diversity, in segments that follow each other in time:

    F(S) = weight * sum of ln r_i over S + ln det K_S     r_i: kernel of query and frame i; K: kernel of frames

Within a segment frames are picked greedily, given the last frame picked before it; dynamic programming over the
segments shares the k picks among them.
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
"""Widths of the Gaussians that the kernel adds up: exp(-d^2 / 2a)."""
RELEVANCE_WEIGHT = 10.0  # 2 / lambda, with the paper's lambda of 0.2

_MIN_RELEVANCE = 1e-30
_MIN_VARIANCE = 1e-12  # what a frame adds to the determinant if it equals one that is there
_UNIT_TOLERANCE = 1e-4  # an embedding is of unit length if its rounding allows it
_SAME_DISTANCE = 1e-12  # squared; below what float32 can tell apart


class Selection(NamedTuple):
    """`indices` int64[k] of the frames, ascending; `scores` float64[k + 1]: the best total of 0 to k frames."""

    indices: Indices
    scores: Floats


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What MDP3 leaves open.

    segment_size: candidates a segment; 0 or less is one segment, the plugin's own choice.
    score: "upstream" counts the frame that a segment is conditioned on once more in each segment, as the published
        code does, which favours picks in many segments and needs kernels that are sums. "conditional" counts it once:
        the paper's conditional gain, whatever the scale of the kernel.
    condition_size: how many frames picked before a segment it is conditioned on.
    mean_kernel: the mean of the Gaussians instead of their sum.
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
        """float64, same shape: how alike embeddings at these squared distances are."""
        total = _sum_gaussians(squared_distances, tuple(sorted(self.alphas, reverse=True)))
        return total / len(self.alphas) if self.mean_kernel else total

    @cached_property
    def peak(self) -> float:
        """The kernel of two equal embeddings."""
        return float(self.apply_kernel(np.zeros(1))[0])


@dataclass(frozen=True)
class _Candidates:
    """All candidates: unit embeddings float64[N, d] and weighted log-relevance float64[N]."""

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
    """Indices int64[k] of the frames to show, ascending and distinct; all of them if there are no more than `k`.

    frames: float[N, d], embeddings of the candidates in the order of time.
    query: float[d], the embedding of the text that the frames should match; None asks for diversity alone.
    relevance: float[N], > 0, instead of `query`: a judgement of each frame; only its ratios count.
    method: "mdp3", whose `rules` are the fields of `Rules`; "top-k", the k most relevant; "uniform".

    Embeddings are brought to unit length and everything is computed in float64. A frame that equals one picked
    already adds nothing: MDP3 takes different ones as long as there are any, and spreads the others over time. Raises
    ValueError for k below 1, for embeddings that are not finite, and for top-k without relevance.
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
        raise ValueError("top-k needs a query or relevance; without either use mdp3 or uniform")
    return np.sort(np.argsort(-known, kind="stable")[:k])


def select_uniform(count: int, k: int) -> Indices:
    """int64[min(k, count)]: the middle of each of `k` equal parts of `count` frames (the model card's rule)."""
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
    """MDP3's choice and its scores; arguments as in `select_frames`, with 1 <= k < N."""
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
        raise ValueError(f"k={k} frames cannot be selected; ask for at least 1")
    if count == 0:
        raise ValueError("there are no frames to select from")
    if method not in ("uniform", "top-k", "mdp3"):
        raise ValueError(f"method={method!r} must be 'uniform', 'top-k' or 'mdp3'")


def _normalize_embeddings(values: ArrayLike, what: str) -> Floats:
    """float64[N, d] of unit length. Those that are so up to rounding stay as they are; zeros stay zeros."""
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
    """float64[N], None if nothing is asked for."""
    if relevance is not None:
        given = np.asarray(relevance, np.float64)
        if given.shape != (len(embeddings),) or not np.isfinite(given).all():
            raise ValueError(f"relevance must be a finite number for each of the {len(embeddings)} frames")
    elif query is not None:
        target = _normalize_embeddings(np.asarray(query, np.float64).reshape(1, -1), "query")
        given = rules.apply_kernel(_compute_squared_distances(target, embeddings)[0])
    else:
        return None
    logarithms: Floats = np.log(np.maximum(given, _MIN_RELEVANCE))
    return logarithms


def _compute_squared_distances(a: Floats, b: Floats) -> Floats:
    """float64[A, B]. By one matrix product: nothing of shape [A, B, d] is ever made."""
    distances: Floats = a @ b.T
    distances *= -2
    distances += np.einsum("nd,nd->n", a, a)[:, None]
    distances += np.einsum("nd,nd->n", b, b)
    return np.maximum(distances, 0, out=distances)


def _sum_gaussians(squared_distances: Floats, alphas: tuple[float, ...]) -> Floats:
    """`alphas` from wide to narrow. One of half the width is the square of the one before: exp is the dear part."""
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
    """One step of the dynamic programming: the best scores and picks of 0 to k frames once `segment` may be used."""
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
    best = np.argmax(totals, axis=0)  # the fewest frames before, among equals
    new_traces = [
        traces[start] + sorted(picks[distinct.index(condition), : j - start].tolist()) if j >= start else []
        for j, start, condition in ((j, starts[b], given[b]) for j, b in enumerate(best.tolist()))
    ]
    return totals.max(axis=0), new_traces


def _pick_greedily(
    candidates: _Candidates, segment: Indices, conditions: list[tuple[int, ...]], max_picks: int
) -> tuple[Floats, Indices]:
    """Greedy picks in one segment, for each of the `conditions` (frames picked before it) side by side.

    Returns gains float64[C, most + 1], of 0 to `most` picks, and the picks int64[C, most] in their order.
    The determinant grows with incremental Cholesky: `variances` is what each candidate would add to it.
    """
    own = candidates.embeddings[segment]
    kernel = candidates.rules.apply_kernel(_compute_squared_distances(own, own))
    np.fill_diagonal(kernel, candidates.rules.peak)
    factors, variances, base = _begin_factors(candidates, segment, conditions, max_picks)
    value = np.tile(candidates.weighted[segment], (len(conditions), 1))  # of each candidate; -inf once it is picked
    depth, each = factors.shape[1] - max_picks, np.arange(len(conditions))
    gains, picks = np.zeros((len(conditions), max_picks + 1)), np.zeros((len(conditions), max_picks), np.int64)
    gains[:, 0] = base
    for step in range(max_picks):
        adds = value + np.log(variances)
        pick = np.argmax(adds, axis=1)  # the first, among equals
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
    """The start of `_greedy`: rows of the Cholesky factor for the frames picked before.

    Returns factors float64[C, depth + most, M] with the first `depth` rows filled, variances float64[C, M], and the
    score of those frames float64[C].
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
    """Cholesky rows float64[c, M] of the frames in `condition`, and their own score."""
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
    """`picks`, sorted; those that equal another are replaced by different frames while there are any.

    Of those it takes what is farthest in time from all others, and so it does when there are no different ones left.
    """
    alike = np.tril(_compare_pairs(embeddings[picks], embeddings[picks]), -1).any(axis=1)
    kept = picks[~alike].tolist()
    for _ in range(int(alike.sum())):
        gaps = np.abs(np.arange(len(embeddings))[:, None] - np.array(kept)).min(axis=1)
        is_new = ~_compare_pairs(embeddings, embeddings[kept]).any(axis=1)
        kept.append(int(np.argmax(np.where(is_new, gaps, -1) if is_new.any() else gaps)))
    return np.sort(np.array(kept, np.int64))


def _compare_pairs(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """bool[A, B]."""
    return _compute_squared_distances(a, b) < _SAME_DISTANCE
