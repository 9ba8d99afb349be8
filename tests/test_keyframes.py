"""Key frames: the published selector's choices, the laws of the method, and the errors of the published code."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovis_model.inputs.keyframes import Rules, select_frames, select_mdp3, select_uniform
from tests.support.frame_vectors import Array, make_frames, normalize

GOLDEN = Path(__file__).parent / "golden" / "mdp3"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())["cases"]
ARRAYS = np.load(GOLDEN / "expected.npz")


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_picks_and_scores_equal_the_published_selectors(case: dict[str, Any]) -> None:
    frames, query = ARRAYS[f"{case['name']}_F"], ARRAYS[f"{case['name']}_q"]
    rules = Rules(
        segment_size=case["segment_size"], relevance_weight=2 / case["lamda"], condition_size=case["condition_size"]
    )
    indices, scores = select_mdp3(frames, query, case["n_selection"], rules=rules)
    assert indices.tolist() == case["indices_f64"]
    expected = np.array(case["dp_last_row_f64"])
    assert (np.abs(scores - expected) <= 1e-6 * np.maximum(1, np.abs(expected))).all()
    assert scores[-1] == pytest.approx(case["score_f64"], rel=1e-6)
    picked = select_frames(frames, query, case["n_selection"], segment_size=case["segment_size"])
    assert picked.tolist() == case["indices"]


def select_greedily(frames: Array, query: Array, k: int) -> list[int]:
    """Select frames greedily by the objective as published, computing each determinant from scratch."""

    def compute_kernel(a: Array, b: Array) -> Array:
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.sum([np.exp(-squared / (2 * alpha)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2)], axis=0)

    def evaluate(chosen: list[int]) -> float:
        relevance = 10 * np.log(compute_kernel(query[None], frames[chosen])).sum()
        return float(relevance + np.linalg.slogdet(compute_kernel(frames[chosen], frames[chosen]))[1])

    chosen: list[int] = []
    for _ in range(k):
        others = [i for i in range(len(frames)) if i not in chosen]
        chosen.append(max(others, key=lambda i: evaluate([*chosen, i])))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_one_segment_equals_a_greedy_choice_by_the_objective(seed: int) -> None:
    frames, query = make_frames(40, seed=seed)
    assert select_frames(frames, query, 6, segment_size=-1).tolist() == select_greedily(frames, query, 6)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 50),
    k=st.integers(1, 20),
    segment_size=st.integers(-1, 60),
    score=st.sampled_from(["upstream", "conditional"]),
    condition_size=st.integers(0, 4),
    seed=st.integers(0, 3),
    with_query=st.booleans(),
    distinct=st.integers(1, 50),
)
def test_picks_are_k_distinct_ascending_frames(
    count: int, k: int, segment_size: int, score: str, condition_size: int, seed: int, with_query: bool, distinct: int
) -> None:
    """This holds for all sizes, also for a shorter last segment and for repeated frames."""
    frames, query = make_frames(count, seed=seed)
    frames = frames[np.arange(count) % distinct]
    picks = select_frames(
        frames,
        query if with_query else None,
        k,
        segment_size=segment_size,
        score=score,
        condition_size=condition_size,
    )
    assert picks.dtype == np.int64
    assert len(picks) == min(k, count)
    assert (np.diff(picks) > 0).all()
    assert picks[0] >= 0
    assert picks[-1] < count
    assert len({p % distinct for p in picks.tolist()}) >= min(k, distinct, count)


def test_scores_of_fewer_frames_are_prefixes_of_one_run() -> None:
    frames, query = make_frames(48)
    for segment_size in (-1, 16):
        rules = Rules(segment_size=segment_size)
        longest = select_mdp3(frames, query, 9, rules=rules)
        for k in range(1, 9):
            assert np.allclose(select_mdp3(frames, query, k, rules=rules).scores, longest.scores[: k + 1], rtol=1e-12)
    one_segment = [set(select_frames(frames, query, k, segment_size=-1).tolist()) for k in range(1, 10)]
    assert all(fewer < more for fewer, more in itertools.pairwise(one_segment))


def test_a_segment_size_over_all_frames_means_one_segment() -> None:
    frames, query = make_frames(30)
    for size in (30, 31, 1000, 0):
        assert (
            select_frames(frames, query, 5, segment_size=size).tolist()
            == select_frames(frames, query, 5, segment_size=-1).tolist()
        )


def test_within_one_segment_the_order_of_frames_does_not_matter() -> None:
    frames, query = make_frames(30)
    order = np.random.default_rng(1).permutation(30)
    picks = select_frames(frames[order], query, 6, segment_size=-1)
    assert sorted(order[picks].tolist()) == select_frames(frames, query, 6, segment_size=-1).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_conditional_score_does_not_depend_on_the_kernels_scale(seed: int) -> None:
    frames, query = make_frames(96, seed=seed)
    by_sum, by_mean = (
        select_frames(frames, query, 8, score="conditional", mean_kernel=mean).tolist() for mean in (False, True)
    )
    assert by_sum == by_mean


def test_upstream_score_with_the_mean_kernel_covers_fewer_segments() -> None:
    """With the mean the picks gather in few segments, which is why both scores exist."""
    frames, query = make_frames(128, seed=3)
    segments = [
        {pick // 32 for pick in select_frames(frames, query, 8, mean_kernel=mean).tolist()} for mean in (False, True)
    ]
    assert len(segments[0]) == 4
    assert len(segments[1]) < 4


def test_conditional_score_is_the_objective_given_the_previous_frame() -> None:
    """With one pick in each of two segments, the second pick adds its gain given the first."""
    frames, query = make_frames(20)
    rules = Rules(segment_size=10, score="conditional")
    picks, scores = select_mdp3(frames, query, 2, rules=rules)
    both = select_mdp3(frames[picks], query, 2, rules=Rules(segment_size=-1)).scores[2]
    assert picks[0] < 10 <= picks[1]
    assert scores[2] == pytest.approx(both)
    assert select_mdp3(frames, query, 2, rules=Rules(segment_size=10)).scores[2] != pytest.approx(both)


@pytest.mark.parametrize("segment_size", [-1, 7, 32])
def test_a_static_video_gives_frames_spread_over_time(segment_size: int) -> None:
    still = np.tile(normalize(np.ones(8)), (20, 1)).astype(np.float32)
    for query in (None, np.eye(8)[0]):
        picks = select_frames(still, query, 4, segment_size=segment_size)
        assert len(picks) == 4
        assert np.diff(picks).min() >= 4


def test_surplus_picks_are_spread_over_the_scenes() -> None:
    scenes = np.repeat(np.eye(4), 16, axis=0)
    picks = select_frames(scenes, [0.2, 0.1, 0, 0], 8, segment_size=-1)
    assert np.bincount(picks // 16, minlength=4).tolist() == [2, 2, 2, 2]


def test_near_duplicates_are_distinguished_in_float64() -> None:
    """One frame of eight differs from the others by less than float32 distances resolve."""
    frames = np.tile(normalize(np.ones(1152)), (8, 1))
    frames[5, 0] += 1e-5
    assert 5 in select_frames(frames, None, 2, segment_size=-1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_embedding_that_is_not_finite_is_named(bad: float) -> None:
    frames, query = make_frames(10)
    frames[3, 2] = bad
    for k in (4, 20):
        with pytest.raises(ValueError, match="frame 3 is not finite"):
            select_frames(frames, query, k)
    with pytest.raises(ValueError, match="query 0 is not finite"):
        select_frames(make_frames(10)[0], np.full(32, bad), 4)


def test_the_norm_of_embeddings_does_not_matter() -> None:
    frames, query = make_frames(40)
    assert select_frames(frames * 40, query * 3, 5).tolist() == select_frames(frames, query, 5).tolist()


def test_half_precision_embeddings_are_accepted() -> None:
    frames, query = make_frames(40)
    assert len(select_frames(frames.astype(np.float16), query.astype(np.float16), 5)) == 5


def test_top_k_takes_the_wanted() -> None:
    frames, query = make_frames(40)
    wanted = sorted(np.argsort(-(frames @ query))[:5].tolist())
    assert select_frames(frames, query, 5, method="top-k").tolist() == wanted
    assert select_frames(frames, None, 5, method="top-k", relevance=np.arange(40)).tolist() == [35, 36, 37, 38, 39]
    with pytest.raises(ValueError, match="needs a query"):
        select_frames(frames, None, 5, method="top-k")


def test_relevance_may_be_given_instead_of_a_query() -> None:
    frames, _ = make_frames(40)
    relevance = np.full(40, 0.01)
    relevance[[7, 8, 30]] = 0.9
    assert select_frames(frames, None, 3, relevance=relevance).tolist() == [7, 8, 30]
    with pytest.raises(ValueError, match="each of the 40 frames"):
        select_frames(frames, None, 3, relevance=relevance[:5])


def test_uniform_takes_the_middle_of_equal_parts() -> None:
    """The model card's rule is min(T - 1, int((s i + s (i + 1)) / 2)) with s = T / N."""
    assert select_uniform(250, 12).tolist() == [10, 31, 52, 72, 93, 114, 135, 156, 177, 197, 218, 239]
    assert select_uniform(12, 12).tolist() == list(range(12))
    assert select_uniform(5, 12).tolist() == list(range(5))
    assert select_frames(np.eye(9), None, 3, method="uniform").tolist() == [1, 4, 7]


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (0, {}, "k=0 frames"),
        (2, {"method": "best"}, "method='best'"),
        (2, {"score": "mean"}, "score='mean'"),
        (2, {"condition_size": -1}, "condition_size=-1"),
        (2, {"alphas": ()}, "alphas="),
    ],
)
def test_invalid_arguments_are_refused(k: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_frames(np.eye(5), None, k, **options)
    with pytest.raises(ValueError, match="no frames"):
        select_frames(np.zeros((0, 3)), None, 2)


def test_peak_memory_of_512_frames_is_under_50_mb() -> None:
    frames, query = make_frames(512, 1152)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    select_frames(frames.astype(np.float32), query, 32, segment_size=-1)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 50e6


def test_top_k_keeps_a_smallest_distance() -> None:
    relevance = np.concatenate([np.full(20, 1.0), np.linspace(5, 9, 20), np.full(88, 2.0)])
    picks = select_frames(np.eye(128), None, 4, method="top-k", relevance=relevance)
    assert picks.tolist() == [27, 31, 35, 39]
