"""The greedy selections of select.py against slow loops in float64, and what they promise about ties and batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtprune.select import dpp, k_center, loneliest, max_sum, top_cells

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# ---------------------------------------------------------------------- slow loops


def cosines(x: torch.Tensor) -> list[list[float]]:
    rows = []
    for row in x.double().tolist():
        norm = math.sqrt(math.fsum(v * v for v in row))
        rows.append([v / norm if norm else 0.0 for v in row])
    return [[math.fsum(p * q for p, q in zip(a, b, strict=True)) for b in rows] for a in rows]


def first_best(scores: dict[int, float], sign: int) -> int:
    """The lowest index of those within 5e-9 of the best."""
    best = max(sign * s for s in scores.values())
    return min(i for i, s in scores.items() if sign * s > best - 5e-9)


def slow_greedy(x: torch.Tensor, first: int, k: int, reduce) -> list[int]:
    table, taken = cosines(x), [first]
    while len(taken) < k:
        left = [i for i in range(len(x)) if i not in taken]
        taken.append(first_best({i: reduce(table[i][c] for c in taken) for i in left}, -1))
    return sorted(taken)


def determinant(table: list[list[float]], weight: list[float], chosen: list[int]) -> float:
    matrix = [[weight[i] * table[i][j] * weight[j] for j in chosen] for i in chosen]
    return float(torch.linalg.det(torch.tensor(matrix, dtype=torch.float64)))


def slow_dpp(x: torch.Tensor, weight: torch.Tensor, k: int) -> list[int]:
    """Greedy by definition: add whichever item makes the determinant largest."""
    table, taken = cosines(x), []
    while len(taken) < k:
        left = [i for i in range(len(x)) if i not in taken]
        taken.append(first_best({i: determinant(table, weight.tolist(), [*taken, i]) for i in left}, 1))
    return sorted(taken)


# ---------------------------------------------------------------------- random tables


@st.composite
def tables(draw):
    """Features on a coarse lattice, in every dtype: exact ties, duplicates and zero rows are common."""
    batch, tokens, width = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    value = st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0])
    flat = draw(st.lists(value, min_size=batch * tokens * width, max_size=batch * tokens * width))
    x = torch.tensor(flat, dtype=torch.float64).view(batch, tokens, width)
    return x.to(draw(st.sampled_from(DTYPES)))


def assert_chosen(kept: torch.Tensor, batch: int, tokens: int, k: int) -> None:
    assert kept.dtype == torch.long and kept.shape == (batch, k)
    for row in kept.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < tokens


@quick
@given(tables(), st.data())
def test_max_sum_and_k_center(x, data):
    batch, tokens, _ = x.shape
    k = data.draw(st.integers(1, tokens))
    first = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch)))
    before = x.clone()
    for choose, reduce in ((max_sum, math.fsum), (k_center, max)):
        kept = choose(x, first, k)
        assert_chosen(kept, batch, tokens, k)
        assert kept.tolist() == [slow_greedy(item, int(f), k, reduce) for item, f in zip(x, first, strict=True)]
    assert torch.equal(x, before)


@quick
@given(tables())
def test_loneliest(x):
    expected = []
    for item in x:
        table = cosines(item)
        near = {i: max((c for j, c in enumerate(row) if j != i), default=-2.0) for i, row in enumerate(table)}
        expected.append(first_best(near, -1))
    assert loneliest(x).tolist() == expected
    assert loneliest(x, chunk=2).tolist() == expected


@quick
@given(tables(), st.data())
def test_dpp_keeps_exactly_k(x, data):
    batch, tokens, _ = x.shape
    k = data.draw(st.integers(1, tokens))
    weight = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=tokens, max_size=tokens)))
    assert_chosen(dpp(x, weight.expand(batch, -1), k), batch, tokens, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_dpp_maximises_the_determinant_greedily(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 14, 10, generator=generator).to(dtype)
    weight = torch.rand(2, 14, generator=generator) + 0.05
    for k in (1, 2, 5, 9):
        assert dpp(x, weight, k).tolist() == [slow_dpp(a, w, k) for a, w in zip(x, weight, strict=True)]


def test_dpp_by_hand():
    # two near-copies of high weight, an orthogonal row of lower weight: the orthogonal one comes second
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]])
    weight = torch.tensor([[1.0, 0.9, 0.3]])
    assert dpp(x, weight, 2).tolist() == [[0, 2]]
    # where nothing outside the span is left, weight decides, then the index
    x = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3])
    weight = torch.tensor([[0.2, 1.0, 0.4, 0.5, 0.5, 0.9]])
    assert dpp(x, weight, 3).tolist() == [[1, 3, 5]]
    assert dpp(x, weight, 4).tolist() == [[1, 3, 4, 5]]


# ---------------------------------------------------------------------- degenerate input


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rows_keep_the_first(value):
    x = torch.full((2, 9, 7), value)
    first = torch.tensor([4, 0])
    assert max_sum(x, first, 3).tolist() == [[0, 1, 4], [0, 1, 2]]
    assert k_center(x, first, 3).tolist() == [[0, 1, 4], [0, 1, 2]]
    assert dpp(x, torch.ones(2, 9), 3).tolist() == [[0, 1, 2]] * 2
    assert loneliest(x).tolist() == [0, 0]


def test_all_rows_can_be_taken():
    x, first = torch.randn(2, 6, 4), torch.tensor([5, 2])
    for kept in (max_sum(x, first, 6), k_center(x, first, 6), dpp(x, torch.ones(2, 6), 6)):
        assert kept.tolist() == [list(range(6))] * 2


def test_nan_and_infinity_count_as_zero():
    x = torch.randn(1, 8, 5)
    clean, dirty = x.clone(), x.clone()
    clean[0, 3, 1] = clean[0, 6] = 0.0
    dirty[0, 3, 1], dirty[0, 6] = math.nan, math.inf
    first, weight = torch.tensor([2]), torch.ones(1, 8)
    for choose in (lambda t: max_sum(t, first, 5), lambda t: k_center(t, first, 5), lambda t: dpp(t, weight, 5), loneliest):
        assert torch.equal(choose(clean), choose(dirty))


def test_half_precision_rows_do_not_overflow():
    x = torch.tensor([[[60000.0, 60000.0], [60000.0, 0.0], [-60000.0, 60000.0]]], dtype=torch.float16)
    assert max_sum(x, torch.tensor([1]), 2).tolist() == [[1, 2]]


def test_scale_of_a_row_does_not_matter():
    x, first = torch.randn(2, 30, 8), torch.tensor([3, 4])
    scaled = x * (2.0 ** torch.randint(-8, 8, (2, 30, 1)))
    assert torch.equal(max_sum(x, first, 9), max_sum(scaled, first, 9))
    assert torch.equal(k_center(x, first, 9), k_center(scaled, first, 9))


# ---------------------------------------------------------------------- batch equals single


@pytest.mark.parametrize(("tokens", "width"), [(36, 32), (50, 40), (193, 67), (577, 193)])
def test_an_item_is_chosen_alike_alone_and_in_a_batch(tokens, width):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(5, tokens, width, generator=generator).bfloat16()
    # duplicates, where two orders of summation would part
    x[:, tokens // 2], x[:, tokens - 1], x[:, 7] = x[:, 2], x[:, 2], 0
    weight, first, k = torch.rand(5, tokens, generator=generator).round(decimals=1), torch.arange(5), tokens * 3 // 4
    choices = {
        "max_sum": lambda s: max_sum(x[s], first[s], k),
        "k_center": lambda s: k_center(x[s], first[s], k),
        "dpp": lambda s: dpp(x[s], weight[s], k),
        "loneliest": lambda s: loneliest(x[s])[:, None],
    }
    for name, choose in choices.items():
        alone = torch.cat([choose(slice(i, i + 1)) for i in range(5)])
        assert torch.equal(choose(slice(None)), alone), name
        assert torch.equal(choose(slice(1, 4)), alone[1:4]), name


def test_duplicates_go_in_ascending_order():
    # each row three times over, shuffled: of equal rows the first in index order is taken first
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 48, generator=generator)
    group = torch.randperm(60, generator=generator) % 20
    first = 0
    for choose in (max_sum, k_center):
        kept = choose(base[group][None], torch.tensor([first]), 31)[0].tolist()
        for member in range(20):
            places = [i for i in range(60) if int(group[i]) == member]
            here = [i for i in kept if i in places and i != first]
            rest = [i for i in places if i != first]
            assert here == rest[: len(here)]


def test_cells_stay_whole():
    scores = torch.tensor([[9.0, 0, 0, 0, 3, 3, 3, 3, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]])
    kept = top_cells(scores, [5, 4], 4)
    assert kept.indices[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and kept.indices[1, :4].tolist() == [8, 9, 10, 11]
    assert kept.counts == [8, 4]
    assert top_cells(scores, [2, 1], 1).indices.tolist() == [[0, 4], [11, 12]]
