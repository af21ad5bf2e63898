"""The null competitor: pictures scaled down before the encoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava, tiny_other, tiny_tiled

import vtprune
from vtprune.pruner import ShrinkView
from vtprune.strategies.resolution import nearest_grid

quick = settings(max_examples=80, deadline=None, derandomize=True)


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_the_grid_fits_the_budget_and_the_picture(rows, columns, data):
    tokens = data.draw(st.integers(1, rows * columns))
    r, c = nearest_grid(rows, columns, tokens)
    assert 1 <= r <= rows and 1 <= c <= columns and r * c <= tokens
    assert nearest_grid(rows, columns, rows * columns) == (rows, columns)
    # no fitting grid of the same or a better shape is nearer to the budget
    shape = max(r * columns, c * rows) / min(r * columns, c * rows)
    for a in range(1, rows + 1):
        b = min(columns, tokens // a)
        if b and a * b > r * c:
            assert max(a * columns, b * rows) / min(a * columns, b * rows) > shape


@pytest.mark.parametrize(("tokens", "grid"), [(64, (8, 8)), (128, (11, 11)), (1, (1, 1)), (575, (23, 24)), (576, (24, 24))])
def test_llava_grids(tokens, grid):
    assert nearest_grid(24, 24, tokens) == grid


def test_keep_all_leaves_the_picture():
    view = ShrinkView(torch.arange(36)[None], (36,), {}, grid=(6, 6))
    assert vtprune.Resolution(keep=36).shrink(view) is None and vtprune.Resolution(keep=1.0).shrink(view) is None
    assert view.notes == []


@pytest.mark.parametrize("siglip", [False, True])
def test_features_are_those_of_the_small_picture(siglip):
    """What enters the decoder is what the unwrapped encoder makes of the picture scaled down by hand."""
    model, pixels, seen = tiny_llava(siglip=siglip), images(2), []
    small = torch.nn.functional.interpolate(pixels, size=(24, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = model.model.get_image_features(small, interpolate_pos_encoding=True, return_dict=True).pooler_output
    with torch.no_grad(), vtprune.pruning(model, "resolution", keep=13) as session:
        model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**batch([prompt(2, "I", 5, "I")]), pixel_values=pixels)
    sample = session.report.samples[0]
    assert len(sample.kept) == 24
    torch.testing.assert_close(seen[-1][0, 3:15], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[-1][0, 20:32], expected[1], atol=1e-5, rtol=1e-5)
    assert any("keep=13" in note and "3 x 4" in note for note in session.report.notes)


def test_every_patch_is_covered_once():
    model = tiny_llava()
    with torch.no_grad(), vtprune.pruning(model, "resolution", keep=9) as session:
        model(**batch([prompt(2, "I", 5)]), pixel_values=images(1))
    sample = session.report.samples[0]
    assert sample.kept.tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    assert sorted([*sample.merged, *(n for gone in sample.merged.values() for n in gone)]) == list(range(TOKENS))
    assert sample.merged[7] == [0, 1, 6]
    assert session.report.flops < session.report.flops_full and sample.trail()[0].where == "as the picture was scaled down"
    assert sample.trail()[0].merged == TOKENS - 9


def test_it_composes_with_a_strategy_inside_the_encoder():
    model = tiny_llava()
    with torch.no_grad(), vtprune.pruning(model, "resolution+flowcut+evict", keep=8) as session:
        model(**batch([prompt(2, "I", 5)]), pixel_values=images(1))
    sample = session.report.samples[0]
    assert len(sample.encoded[0][1]) == 16 and len(sample.kept) == 8
    assert [len(c) for c in sample.cached] == [4] * 4


@pytest.mark.parametrize("family", ["next", "onevision", "vipllava"])
def test_families_that_fix_the_count_are_refused(family):
    model = tiny_other(family) if family == "vipllava" else tiny_tiled(family)
    with pytest.raises(vtprune.UnsupportedError, match="cannot be given a smaller picture"):
        vtprune.wrap(model, "resolution", keep=9)


def test_merging_later_in_a_batch_is_each_picture_s_own():
    """What one picture merges on top of the scaling shows in no other's report."""
    model, pixels = tiny_llava(), images(2)
    with torch.no_grad(), vtprune.pruning(model, "resolution+visionzip", keep=8) as session:
        model(**batch([prompt(2, "I", 5), prompt(2, "I", 5)]), pixel_values=pixels)
        together = session.report.samples
        for row in range(2):
            model(**batch([prompt(2, "I", 5)]), pixel_values=pixels[row : row + 1])
            assert session.report.samples[0].merged == together[row].merged


def test_an_encoder_that_takes_no_smaller_picture_is_refused(monkeypatch):
    model = tiny_llava()
    model.config.vision_config.model_type = "some_vision_model"
    with pytest.raises(vtprune.UnsupportedError, match=r"some_vision_model.*smaller picture"):
        vtprune.wrap(model, "resolution")


def test_features_computed_elsewhere_are_refused():
    model = tiny_llava()
    with torch.no_grad():
        features = model.model.get_image_features(images(1), return_dict=True)
        vtprune.wrap(model, "resolution", keep=9)
        with pytest.raises(vtprune.UnsupportedError, match="resolution works inside the vision encoder"):
            model(**batch([prompt(2, "I", 5)]), mm_encoder_outputs={"image": features})
