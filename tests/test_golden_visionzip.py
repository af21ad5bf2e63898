"""VisionZip against its published code: indices exactly, features to 2e-4 (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from test_golden_flowcut import KERNELS, ProjectorInput, clip_llava, golden, prompt, tensor

import vtprune
from vtprune.pruner import EncodeView, Rows
from vtprune.strategies.visionzip import VisionZip


def test_without_a_model():
    z = golden("visionzip_free_n576_d54_c10")
    row, hidden, keys = (tensor(z[name]) for name in ("attn_cls_row", "hidden_m2", "key_layer_m2"))
    rows = Rows(row[:, :, None, 1:].log(), torch.zeros(1, 4, 1), torch.ones(1, 1, dtype=torch.bool), keys=keys[:, :, 1:])
    index = torch.arange(576)[None]
    view = EncodeView(
        index, (576,), {}, layer=22, depth=23, hidden=hidden[:, 1:], special=hidden[:, :1], rows=rows, grid=(24, 24)
    )
    # 54 + 10 of 64 is the default split
    answer = VisionZip(keep=64).encode(view)
    dominant = z["all_indices_sorted"][0]
    assert dominant[0] == 0
    assert answer.indices[0, 1:54].tolist() == (dominant[1:] - 1).tolist()
    torch.testing.assert_close(answer.hidden, tensor(z["out_tokens"]), atol=2e-4, rtol=0)


class Traced(VisionZip):
    """Notes the head-mean keys and the choice."""

    seen: dict = {}

    def encode(self, view):
        keep = super().encode(view)
        self.seen.update(layer=view.layer, keys=view.rows.keys.mean(1), indices=keep.indices)
        return keep


@KERNELS
@torch.no_grad()
def test_from_pixels_to_the_projector(attn, monkeypatch):
    z = golden("visionzip_clip_l24_n144_b2_d27_c5")
    monkeypatch.setattr(Traced, "seen", {})
    model, pixels, expected = clip_llava(z, attn), tensor(z["pixel_values"]), tensor(z["out_tokens"])
    strategy = Traced(keep=32, contextual=5)
    projected = ProjectorInput(model)
    with vtprune.pruning(model, strategy) as session:
        model(input_ids=prompt(2, 144), pixel_values=pixels)
        report = session.report
    assert projected.value.shape == expected.shape == (2, 32, 16)
    torch.testing.assert_close(projected.value, expected, atol=2e-4, rtol=0)
    # the keys are those of the block whose output feeds the projector
    assert Traced.seen["layer"] == 22
    torch.testing.assert_close(Traced.seen["keys"], tensor(z["metric_layer22"])[:, 1:], atol=2e-5, rtol=0)
    for image in range(2):
        dominant = sorted(z["all_indices"][image].tolist())
        assert dominant[0] == 0
        assert Traced.seen["indices"][image, 1:27].tolist() == [j - 1 for j in dominant[1:]]
        sample = report.samples[image]
        assert sample.kept.tolist() == sorted(Traced.seen["indices"][image].tolist())
        assert len(sample.kept) == 32 and sample.foreign == Traced.seen["indices"][image, :1].tolist()
        # every patch is dominant, target, or merged into a target, but for the one whose number the class token took
        merged = [j for group in sample.merged.values() for j in group]
        assert len(merged) == len(set(merged)) == 144 - 32
        assert set(sample.merged) <= set(Traced.seen["indices"][image, 27:].tolist())


@KERNELS
@torch.no_grad()
def test_images_alone_and_together(attn):
    z = golden("visionzip_clip_l24_n144_b2_d27_c5")
    model, pixels = clip_llava(z, attn), tensor(z["pixel_values"])
    projected = ProjectorInput(model)
    with vtprune.pruning(model, VisionZip(keep=32, contextual=5)) as session:
        for image in range(2):
            model(input_ids=prompt(1, 144), pixel_values=pixels[image : image + 1])
            torch.testing.assert_close(projected.value[0], tensor(z["out_tokens"][image]), atol=2e-4, rtol=0)
            assert len(session.report.samples[0].kept) == 32


@KERNELS
@torch.no_grad()
def test_nothing_changes_at_full_budget(attn):
    z = golden("visionzip_clip_l24_n144_b2_d27_c5")
    model, pixels, ids = clip_llava(z, attn), tensor(z["pixel_values"]), prompt(2, 144)
    plain = model(input_ids=ids, pixel_values=pixels).logits
    with vtprune.pruning(model, VisionZip(keep=144)) as session:
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, plain)
        assert session.report.samples[0].kept.tolist() == list(range(144))


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 2, 143])
def test_odd_budgets_run(keep):
    z = golden("visionzip_clip_l24_n144_b2_d27_c5")
    model = clip_llava(z, "sdpa")
    with vtprune.pruning(model, VisionZip(keep=keep)) as session:
        out = model(input_ids=prompt(2, 144), pixel_values=tensor(z["pixel_values"]))
        assert [len(s.kept) for s in session.report.samples] == [keep, keep]
        assert session.report.equivalent_tokens == keep
    assert bool(torch.isfinite(out.logits).all())
