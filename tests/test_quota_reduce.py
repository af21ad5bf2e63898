"""QuoTA's reducers and packer: the maths against plain loops, and which cell of which frame each token stands for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.pruner import UnsupportedError
from vtprune.quota import Reduced, pack_frames, plan, reduce_frames, resize
from vtprune.quota.reduce import METHODS, cells_of, merge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------- reducers


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 12)] * 2), st.sampled_from(["bilinear", "pool"]))
def test_resizing_against_loops(native, size, method):
    x = noise(native[0] * native[1], 3).double().view(*native, 3)
    expected = torch.zeros(*size, 3, dtype=torch.float64)
    for row in range(size[0]):
        for column in range(size[1]):
            if method == "pool":
                edge = [(i * n // m, math.ceil((i + 1) * n / m)) for i, n, m in zip((row, column), native, size, strict=True)]
                expected[row, column] = x[slice(*edge[0]), slice(*edge[1])].mean((0, 1))
                continue
            ends = []
            for i, n, m in zip((row, column), native, size, strict=True):
                at = max((i + 0.5) * n / m - 0.5, 0.0)
                low = min(int(at), n - 1)
                ends.append((low, min(low + 1, n - 1), at - low))
            (y0, y1, dy), (x0, x1, dx) = ends
            expected[row, column] = (1 - dy) * ((1 - dx) * x[y0, x0] + dx * x[y0, x1]) + dy * (
                (1 - dx) * x[y1, x0] + dx * x[y1, x1]
            )
    made = resize(x.view(1, -1, 3).float(), native, size, method)
    torch.testing.assert_close(made[0], expected.view(-1, 3).float(), atol=1e-5, rtol=0)


def merged_by_loops(x: list[torch.Tensor], count: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The published merging, one token at a time: (tokens in the published order, the positions that each one holds)."""
    holds = [[i] for i in range(len(x))]
    while len(x) > count:
        few = min(len(x) - count, len(x) // 2)
        sources, goals = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        best = []
        for s in sources:
            similarity = [round(float(torch.cosine_similarity(x[s], x[g], dim=0)), 8) for g in goals]
            best.append((max(similarity), goals[similarity.index(max(similarity))]))
        order = sorted(range(len(sources)), key=lambda i: -best[i][0])
        parts = {g: [g] for g in goals}
        for i in order[:few]:
            parts[best[i][1]].append(sources[i])
        groups = [[sources[i]] for i in order[few:]] + [parts[g] for g in goals]
        x = [torch.stack([x[i] for i in group]).mean(0) for group in groups]
        holds = [sorted(cell for i in group for cell in holds[i]) for group in groups]
    return x, holds


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13, 24, 25])
@pytest.mark.parametrize("raster", [True, False])
def test_merging_against_loops(count, raster):
    x = noise(3, 25, 6, seed=count)
    made, went = merge(x, count, raster)
    assert made.shape == (3, count, 6)
    for item in range(3):
        tokens, holds = merged_by_loops(list(x[item].double()), count)
        if raster:
            order = sorted(range(count), key=lambda i: holds[i][0])
            tokens, holds = [tokens[i] for i in order], [holds[i] for i in order]
        torch.testing.assert_close(made[item], torch.stack(tokens).float(), atol=1e-5, rtol=0)
        assert [(went[item] == i).nonzero()[:, 0].tolist() for i in range(count)] == holds


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_similarities_go_to_the_lower_position(dtype):
    """Parallel vectors: on paper every cosine is 1, in floating point none is quite."""
    lengths = torch.linspace(0.1, 9, 40, dtype=torch.float64)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    x = (noise(3, 1, 300).double() * lengths[:, None]).float() if dtype == torch.float32 else noise(3, 1, 300, dtype=dtype)
    went = merge(x.expand(3, 40, 300), 30, raster=False)[1]
    expected = [0] * 40
    for position in range(40):
        if position % 2:
            expected[position] = 10 + position // 2
        else:
            expected[position] = 10 if position < 20 else position // 2 - 10
    assert went.tolist() == [expected] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.data(), st.sampled_from(DTYPES), st.booleans())
def test_merging_defined_for_ties_and_bad_numbers(tokens, data, dtype, raster):
    count = data.draw(st.integers(1, tokens))
    values = data.draw(st.sampled_from(["equal", "zero", "few", "nan"]))
    x = torch.ones(2, tokens, 4, dtype=dtype)
    if values == "zero":
        x = torch.zeros_like(x)
    elif values == "few":
        x = noise(2, 4, dtype=dtype)[torch.arange(2 * tokens).view(2, -1) % 2]
    elif values == "nan":
        x[0, 0] = math.nan
    made, went = merge(x, count, raster)
    assert made.dtype == dtype and made.shape == (2, count, 4)
    for item in range(2):
        assert went[item].unique().tolist() == list(range(count))  # every token holds something
    if values != "nan":
        assert made.isfinite().all()
    else:
        assert made[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("method", ["pool", "tome"])
def test_half_precision_is_rounded_once(method, dtype):
    x = noise(4, 81, 8, dtype=dtype)
    made = plan([0.9, 0.3, 0.5, 0.01], 90, (9, 9))
    low, high = reduce_frames(x, made, method), reduce_frames(x.float(), made, method)
    assert low.tokens.dtype == dtype
    assert torch.equal(low.tokens, high.tokens.to(dtype))
    assert torch.equal(low.boxes, high.boxes)


@pytest.mark.parametrize("method", METHODS)
def test_frames_do_not_depend_on_each_other(method):
    x = noise(6, 81, 8)
    scores = [0.5, 0.5, 0.01, 0.5, 0.9, 0.5]
    made = plan(scores, 150, (9, 9))
    assert len(set(made.counts)) > 1
    together = reduce_frames(x, made, method)
    assert sum(together.lengths) == len(together.tokens) == len(together.boxes)
    assert sum(together.lengths) == (150 if method in ("linspace", "tome") else made.tokens)
    for chunk in (1, 2):
        again = reduce_frames(list(x), made, method, chunk=chunk)
        assert torch.equal(again.tokens, together.tokens) and torch.equal(again.boxes, together.boxes)
    parts = together.tokens.split(together.lengths)
    for i, part in zip(made.frames, parts, strict=True):
        alone = plan([1.0], made.counts[i] if method in ("linspace", "tome") else len(part), (9, 9))
        if alone.grids[0] == made.grids[i] or method in ("linspace", "tome"):
            assert torch.equal(reduce_frames(x[i : i + 1], alone, method).tokens, part)


@pytest.mark.parametrize("method", METHODS)
def test_everything_granted_is_everything_unchanged(method):
    x = noise(3, 20, 8, dtype=torch.bfloat16)
    reduced = reduce_frames(x, plan([0.1, 0.0, 0.7], 60, (4, 5)), method)
    assert torch.equal(reduced.tokens, x.flatten(0, 1))
    cells = [[f, i // 5, i % 5, i // 5 + 1, i % 5 + 1] for f in range(3) for i in range(20)]
    assert reduced.boxes.tolist() == cells


def test_linspace_positions():
    x = torch.arange(100.0).view(1, 100, 1)
    for count in (1, 2, 3, 7, 34, 67, 99, 100):
        reduced = reduce_frames(x, plan([1.0], count, (10, 10)), "linspace")
        expected = [i * 99 // max(1, count - 1) for i in range(count)]
        assert reduced.tokens[:, 0].tolist() == expected
        assert reduced.boxes[:, 1:3].tolist() == [[i // 10, i % 10] for i in expected]


# ---------------------------------------------------------------------- what a token stands for


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 30)] * 2), st.tuples(*[st.integers(1, 40)] * 2))
def test_boxes_cover_the_native_grid(native, size):
    boxes = cells_of(native, size)[0]
    assert len(boxes) == size[0] * size[1]
    hits = torch.zeros(native, dtype=torch.long)
    for y0, x0, y1, x1 in boxes.tolist():
        assert 0 <= y0 < y1 <= native[0] and 0 <= x0 < x1 <= native[1]
        hits[y0:y1, x0:x1] += 1
    assert hits.min() >= 1
    if native[0] % size[0] == 0 and native[1] % size[1] == 0:
        assert hits.max() == 1


@pytest.mark.parametrize("method", ["bilinear", "pool"])
def test_a_token_shows_what_is_in_its_box(method):
    """Features that are their own coordinates, away from the edges where bilinear resizing repeats them."""
    high, wide = 12, 20
    y, x = torch.meshgrid(torch.arange(high) + 0.5, torch.arange(wide) + 0.5, indexing="ij")
    features = torch.stack([y, x, torch.full_like(y, 5)], -1).view(1, -1, 3).repeat(3, 1, 1)
    features[:, :, 2] = torch.arange(3.0)[:, None]
    reduced = reduce_frames(features, plan([0.9, 0.0, 0.4], 75, (high, wide)), method)
    for token, (frame, y0, x0, y1, x1) in zip(reduced.tokens.tolist(), reduced.boxes.tolist(), strict=True):
        assert token[2] == frame
        assert y0 <= token[0] <= y1 and x0 <= token[1] <= x1


def test_owners_of_merged_cells():
    x = noise(3, 30, 8)
    reduced = reduce_frames(x, plan([0.9, 0.0, 0.4], 25, (5, 6)), "tome")
    assert set(reduced.owner) == {0, 2}
    holders = torch.cat([cells.flatten() for cells in reduced.owner.values()])
    assert holders.unique().tolist() == list(range(25))
    for token, (frame, *box) in enumerate(reduced.boxes.tolist()):
        rows, columns = (reduced.owner[frame] == token).nonzero(as_tuple=True)
        assert box == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]


# ---------------------------------------------------------------------- packing


def reduced_pair() -> Reduced:
    x = noise(3, 36, 4)
    return reduce_frames(x, plan([0.9, 0.0, 0.5], 20, (6, 6)))


def test_newlines_after_rows():
    reduced = reduced_pair()
    newline = torch.full((4,), 7.0)
    packed = pack_frames(reduced, "grid", newline)
    assert packed.visual == len(reduced.tokens) == 20
    assert torch.equal(packed.tokens[~packed.newline], reduced.tokens)
    assert torch.equal(packed.boxes[~packed.newline], reduced.boxes)
    assert (packed.tokens[packed.newline] == 7).all()
    expected, at = [], 0
    for width in reduced.widths.tolist():
        expected += [False] * width + [True]
        frame, y0, _, y1, x1 = reduced.boxes[at + width - 1].tolist()
        assert packed.boxes[len(expected) - 1].tolist() == [frame, y0, x1, y1, x1]
        assert x1 == 6
        at += width
    assert packed.newline.tolist() == expected
    parts = packed.split()
    assert list(parts) == [0, 2] and torch.equal(torch.cat(list(parts.values())), packed.tokens)


def test_one_newline_and_none():
    reduced = reduced_pair()
    newline = torch.full((4,), 7.0)
    packed = pack_frames(reduced, "one_token", newline)
    assert torch.equal(packed.tokens, torch.cat([reduced.tokens, newline[None]]))
    assert packed.newline.nonzero().tolist() == [[20]]
    assert packed.boxes[-1].tolist() == [-1, 0, 0, 0, 0]
    with pytest.raises(UnsupportedError, match="ends the whole sequence"):
        packed.split()
    plain = pack_frames(reduced)
    assert torch.equal(plain.tokens, reduced.tokens) and plain.visual == 20 and not plain.newline.any()
    assert [len(part) for part in plain.split().values()] == list(reduced.lengths)


def test_pictures_of_different_sizes():
    """A prompt with many pictures: a grid and a placeholder for each."""
    sizes = [(4, 4), (8, 2), (2, 8)]
    features = [noise(rows * columns, 4, seed=rows) for rows, columns in sizes]
    made = plan([0.5, 0.2, 0.5], 24, sizes)
    reduced = reduce_frames(features, made)
    parts = pack_frames(reduced).split()
    assert {i: len(part) for i, part in parts.items()} == {i: math.prod(made.grids[i]) for i in made.frames}
    for i in made.frames:
        torch.testing.assert_close(parts[i], resize(features[i][None], sizes[i], made.grids[i])[0])


# ---------------------------------------------------------------------- what is refused


def test_features_that_do_not_fit():
    made = plan([0.5, 0.5], 8, (3, 3))
    for features, match in (
        (noise(3, 9, 4), "features of 3 frames, a plan for 2"),
        (noise(2, 8, 4), r"frame 0 has features of shape \(8, 4\)"),
        ([noise(9, 4), noise(9, 5)], "frame 1 has features"),
        (noise(2, 3, 3, 4), "frame 0 has features"),
        (torch.ones(2, 9, 4, dtype=torch.long), "float type"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            reduce_frames(features, made)


def test_options_that_do_not_fit():
    x = noise(2, 9, 4)
    with pytest.raises(UnsupportedError, match="method='median'"):
        reduce_frames(x, plan([0.5, 0.5], 8, (3, 3)), "median")
    with pytest.raises(UnsupportedError, match="no frame gets a token"):
        reduce_frames(x, plan([0.5, 0.5], 1, (3, 3), parity=True))
    enlarged = plan([0.5, 0.5], 100, (3, 3), parity=True)
    assert sum(reduce_frames(x, enlarged).lengths) > 18
    for method in ("linspace", "tome"):
        with pytest.raises(UnsupportedError, match="plan with cap=9"):
            reduce_frames(x, enlarged, method)
        flat = reduce_frames(x, plan([0.5, 0.5], 8, (3, 3)), method)
        with pytest.raises(UnsupportedError, match="leave none"):
            pack_frames(flat, "grid", torch.zeros(4))
        assert pack_frames(flat, "one_token", torch.zeros(4)).visual == 8
    reduced = reduced_pair()
    for options, match in (
        (("rows",), "newlines='rows'"),
        (("grid",), "newline=None"),
        (("one_token", torch.zeros(5)), r"newline=\(5,\)"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            pack_frames(reduced, *options)
