"""QuoTA's planner: every budget spent, every limit held, bad scores and budgets refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vtprune.pruner import BudgetError, UnsupportedError
from vtprune.quota import check_scores, plan, redistribute
from vtprune.quota.planner import grid, published_grid, water_fill

SCORES = st.lists(st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e-6)), min_size=1, max_size=40)
SIDES = st.integers(1, 30)
GRIDS = st.tuples(SIDES, SIDES)


def cells(size: tuple[int, int]) -> int:
    return size[0] * size[1]


# ---------------------------------------------------------------------- the default rule


@settings(max_examples=150, deadline=None)
@given(SCORES, st.integers(1, 20000), GRIDS, st.sampled_from([0.0, 0.5, 1.0, 2.0, 8.0]), st.integers(0, 2), st.data())
def test_the_whole_budget_within_the_limits(scores, budget, native, power, floor, data):
    cap = data.draw(st.none() | st.integers(1, 800))
    source = data.draw(st.none() | st.lists(st.integers(0, 5), min_size=len(scores), max_size=len(scores)))
    different = len(scores) if source is None else len(set(source))
    most = min(cells(native), cap or math.inf)
    assume(min(floor, most) * different <= budget)
    made = plan(scores, budget, native, power=power, cap=cap, floor=floor, source=source)
    total = min(budget, most * different)
    assert sum(made.counts) == total
    assert all(min(floor, most) <= n <= most for n in made.counts if n or source is None)
    assert sum(made.shares) == pytest.approx(1)
    if source is not None:
        first = {source.index(frame) for frame in source}
        assert set(made.frames) <= first
        assert not floor or set(made.frames) == first
    for n, size, full in zip(made.counts, made.grids, made.native, strict=True):
        assert (n == 0) == (size == (0, 0))
        assert size[0] <= full[0] and size[1] <= full[1] and cells(size) <= most
    assert made.tokens <= total
    # by how much grids may fall short: less than a row or column of any frame that could still grow
    left = total - made.tokens
    for i in made.frames:
        rows, columns = made.grids[i]
        if rows < native[0]:
            assert columns > left or cells((rows + 1, columns)) > most
        if columns < native[1]:
            assert rows > left or cells((rows, columns + 1)) > most


@settings(max_examples=100, deadline=None)
@given(SCORES, st.integers(1, 5000), GRIDS, st.integers(0, 1))
def test_more_relevant_frames_get_no_less(scores, budget, native, floor):
    assume(floor * len(scores) <= budget)
    made = plan(scores, budget, native, floor=floor)
    for a in range(len(scores)):
        for b in range(len(scores)):
            if scores[a] > scores[b]:
                assert made.counts[a] >= made.counts[b]
            elif scores[a] == scores[b]:
                assert abs(made.counts[a] - made.counts[b]) <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1), st.data())
def test_water_filling_against_bisection(weights, part, data):
    """The level by plain bisection instead of by breakpoints."""
    weights = np.array([w if w > 1e-6 else 0.0 for w in weights])
    most = np.array(data.draw(st.lists(st.integers(1, 50), min_size=len(weights), max_size=len(weights))))
    least = np.minimum(data.draw(st.integers(0, 3)), most)
    total = round(least.sum() + part * (most.sum() - least.sum()))
    expected = least.astype(float)
    for group, w in ((weights > 0, weights), (weights == 0, np.ones_like(weights))):
        room = total - expected[~group].sum()
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            spent = sum(min(max(middle * w[i], least[i]), most[i]) for i in range(len(w)) if group[i])
            low, high = (middle, high) if spent < room else (low, middle)
        for i in range(len(w)):
            if group[i]:
                expected[i] = min(max(high * w[i], least[i]), most[i])
    np.testing.assert_allclose(water_fill(weights, total, least, most), expected, atol=1e-6)


def test_one_dominant_frame():
    """The published rule enlarges it beyond its features; here it is capped, and the rest goes to the others."""
    scores = [1e-4] * 95 + [0.99]
    published = plan(scores, 12544, (27, 27), parity=True)
    assert max(published.counts) > 729 and max(map(cells, published.grids)) > 729
    made = plan(scores, 12544, (27, 27))
    assert made.counts[-1] == 729 and made.grids[-1] == (27, 27)
    assert sum(made.counts) == 12544 and max(made.counts[:-1]) - min(made.counts[:-1]) <= 1
    single_sweep = plan(np.linspace(0.01, 1, 20) ** 4, 5000, (27, 27), parity=True, cap=729)
    assert sum(single_sweep.counts) < 5000 - 20  # more is lost than rounding takes
    assert sum(plan(np.linspace(0.01, 1, 20) ** 4, 5000, (27, 27)).counts) == 5000


@pytest.mark.parametrize("parity", [True, False])
def test_all_zero_scores_are_all_alike(parity):
    zero, even = (plan([value] * 8, 8 * 196, (27, 27), parity=parity) for value in (0.0, 0.3))
    assert zero == even
    assert zero.grids == ((14, 14),) * 8


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_a_budget_below_the_number_of_frames_is_spread_over_time(budget):
    made = plan([0.5] * 64, budget, (27, 27))
    assert made.tokens == len(made.frames) == budget
    gaps = np.diff([*made.frames, made.frames[0] + 64])
    assert gaps.max() <= 2 * gaps.min()


def test_everything_fits():
    made = plan([0.1, 0.9, 0.0], 10**6, (5, 7))
    assert made.grids == ((5, 7),) * 3 and made.tokens == 105


def test_repeated_frames_get_nothing():
    source = [0, 0, 1, 2, 2, 2]
    made = plan([0.5, 0.9, 0.5, 0.5, 0.1, 0.9], 300, (27, 27), source=source)
    assert made.counts == (100, 0, 100, 100, 0, 0)
    assert plan([0.0, 0.9], 10, (27, 27), source=[0, 0]).counts == (10, 0)


def test_a_grid_per_frame():
    made = plan([1, 1, 1], 60, [(4, 4), (12, 3), (3, 12)])
    assert made.counts == (16, 22, 22)
    assert made.tokens == 60
    assert made.grids[0] == (4, 4)
    assert made.grids[1][0] > made.grids[1][1] and made.grids[2][0] < made.grids[2][1]


def test_small_shares_do_not_overflow():
    made = plan([1e-300, 1e-155, 1.0], 700, (27, 27))
    assert made.counts == (0, 0, 700)
    assert sum(plan([1e-300, 1e-155, 1.0], 2000, (27, 27)).counts) == 2000
    assert plan([1e-308, 1.0, 1e-156], 2, (1, 1)).counts == (0, 1, 1)
    tiny = plan([1e-200, 2e-200], 100, (27, 27))
    assert tiny.counts == (20, 80)


def test_long_videos():
    made = plan(np.random.default_rng(0).random(10_000), 12544, (27, 27))
    assert sum(made.counts) == made.tokens == 12544


# ---------------------------------------------------------------------- grids


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 900), GRIDS)
def test_grids_against_every_grid(tokens, native):
    high, wide = native
    every = [(h, w) for h in range(1, high + 1) for w in range(1, wide + 1) if h * w <= tokens]
    best = max(min(h / high, w / wide) for h, w in every)
    best = [(h, w) for h, w in every if min(h / high, w / wide) > best - 1e-12]
    size = grid(tokens, native)
    assert size in best and cells(size) == max(map(cells, best))


def test_square_grids_follow_the_published_rule():
    for n in range(1, 730):
        made, published = grid(n, (27, 27)), published_grid(n)
        assert min(made) == min(published) == math.isqrt(n)
        assert 0 <= cells(made) - cells(published) <= min(published)
        assert made[0] >= made[1]
    assert published_grid(0) == (0, 0)


def test_native_aspect():
    assert grid(60, (12, 20)) == (6, 10)
    assert grid(240, (12, 20)) == (12, 20)
    rows, columns = grid(100, (40, 10))
    assert rows == 4 * columns == 20


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "scores, match",
    [
        ([0.1, math.nan], "frame 1 is nan"),
        ([0.1, math.inf], "frame 1 is inf"),
        ([-0.2, 0.1], "frame 0 is -0.2, negative"),
        ([], "no score|one real number"),
        ([[0.1, 0.2]], "one real number per frame"),
        (["a", "b"], "one real number per frame"),
        ([True, False], "one real number per frame"),
        ([None, 1.0], "one real number per frame"),
        (torch.tensor([1j]), "one real number per frame"),
        (0.3, "one real number per frame"),
    ],
)
@pytest.mark.parametrize("parity", [True, False])
def test_bad_scores(scores, match, parity):
    with pytest.raises(UnsupportedError, match=match):
        plan(scores, 100, (27, 27), parity=parity)


def test_scores_of_another_number_of_frames():
    with pytest.raises(UnsupportedError, match="3 scores for 4 frames"):
        check_scores([0.1, 0.2, 0.3], 4)
    for scores in ([1, 2], np.float32([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)):
        assert check_scores(scores, 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": 0.5}, "budget=0.5"),
        ({"budget": True}, "budget=True"),
        ({"cap": 0}, "cap=0"),
        ({"floor": -1}, "floor=-1"),
        ({"power": -1}, "power=-1"),
        ({"power": math.nan}, "power=nan"),
        ({"floor": 4, "budget": 11}, "a floor of 4 tokens for 3 frames takes 12, the budget is 11"),
        ({"floor": 1, "parity": True}, "neither floor nor source"),
        ({"source": [0, 1, 2], "parity": True}, "neither floor nor source"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(BudgetError, match=match):
        plan([0.1, 0.2, 0.3], **{"budget": 100, "native": (4, 4), **options})


@pytest.mark.parametrize("options", [{"source": [1]}, {"native": [(4, 4)]}, {"native": (4, 0)}, {"native": [(4, 4, 4)] * 3}])
def test_options_of_another_number_of_frames(options):
    with pytest.raises(UnsupportedError):
        plan([0.1, 0.2, 0.3], 100, **{"native": (4, 4), **options})


def test_published_cap_below_every_share():
    assert redistribute(np.full(4, 0.25), 0.3).tolist() == [0.25] * 4
    assert redistribute(np.full(4, 0.25), 0.1).tolist() == [0.1] * 4
