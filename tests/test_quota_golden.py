"""QuoTA against its published code (tests/golden/README.md): numbers of tokens, grids and frames exactly, features to 1e-6."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden_flowcut import golden, tensor

from vtprune import quota

NATIVE = (27, 27)


def config(z: dict[str, np.ndarray]) -> dict:
    return json.loads(str(z["config"]))


@pytest.mark.parametrize("row", range(15))
def test_counts_and_grids(row):
    z = golden("quota_01_alloc_v1")
    frames = int(z["num_frames"][row])
    plan = quota.plan(z["scores"][row, :frames], int(z["budget"][row]), NATIVE, parity=True)
    assert plan.counts == tuple(z["n_tokens"][row, :frames])
    assert plan.grids == tuple(zip(z["height"][row, :frames], z["width"][row, :frames], strict=True))
    np.testing.assert_allclose(plan.shares, z["weights"][row, :frames], rtol=1e-14)
    assert plan.frames == tuple(np.flatnonzero(z["n_tokens"][row, :frames] > 0))


def test_published_cap():
    z = golden("quota_08_cap_redistribute")
    for n, cap, given, expected, total in zip(
        z["n"], z["max_value"], z["weights_in"], z["weights_out"], z["sum_out"], strict=True
    ):
        shares = given[:n].copy()
        out = quota.redistribute(shares, cap)
        np.testing.assert_allclose(out, expected[:n], rtol=1e-14)
        assert out.sum() == pytest.approx(total, rel=1e-12)
        assert np.array_equal(shares, given[:n])  # the caller's array is left alone


@pytest.mark.parametrize("row", range(16))
def test_published_cap_in_a_plan(row):
    z = golden("quota_08_cap_redistribute")
    n, cap = int(z["n"][row]), float(z["max_value"][row])
    budget = 10**9
    plan = quota.plan(np.sqrt(z["weights_in"][row, :n]), budget, NATIVE, parity=True, cap=round(cap * budget))
    np.testing.assert_allclose(plan.shares, z["weights_out"][row, :n], rtol=1e-6)


@pytest.mark.parametrize("name", ["02a_v1_fp32_mixed", "02b_v1_fp32_uniform_equals_baseline"])
@pytest.mark.parametrize("chunk", [1, 32])
def test_bilinear(name, chunk):
    z = golden(f"quota_{name}")
    plan = quota.plan(z["scores"], config(z)["budget"], NATIVE, parity=True)
    assert plan.counts == tuple(z["n_tokens"])
    assert plan.frames == tuple(z["kept_frames"])
    assert [plan.grids[i] for i in plan.frames] == [tuple(size) for size in z["out_hw"]]
    reduced = quota.reduce_frames(tensor(z["features"]), plan, chunk=chunk)
    torch.testing.assert_close(reduced.tokens, tensor(z["out_tokens"]), atol=1e-6, rtol=0)
    packed = quota.pack_frames(reduced, "grid", tensor(z["newline"]))
    torch.testing.assert_close(packed.tokens, tensor(z["packed_grid"]), atol=1e-6, rtol=0)
    assert packed.visual == plan.tokens == len(z["out_tokens"])


@pytest.mark.parametrize("parity", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uniform_scores_are_the_models_own_pooling(parity, dtype):
    z = golden("quota_02b_v1_fp32_uniform_equals_baseline")
    features = tensor(z["features"]).to(dtype)
    plan = quota.plan(z["scores"], config(z)["budget"], NATIVE, parity=parity)
    assert plan.grids == ((14, 14),) * 4
    tokens = quota.reduce_frames(features, plan, chunk=3).tokens
    # as LLaVA-OneVision does it
    own = F.interpolate(features.view(4, 27, 27, -1).permute(0, 3, 1, 2).contiguous(), size=[14, 14], mode="bilinear")
    assert torch.equal(tokens, own.permute(0, 2, 3, 1).reshape(-1, 4))
    if dtype == torch.float32:
        torch.testing.assert_close(tokens, tensor(z["baseline_pool"]).flatten(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("row", range(9))
def test_sampling(row):
    z = golden("quota_09_dynamic_sampler")
    frames, fps, base, extra = (z[name][row].item() for name in ("total_frames", "fps", "base", "extra"))
    sampled = quota.sample(frames, fps, base, extra, parity=True)
    count = int(z["num_sampled"][row])
    assert sampled.frames == tuple(z["frame_idx"][row, :count])
    assert sampled.seconds == pytest.approx(float(z["video_time"][row]))
    assert sampled.stamps == str(z["frame_time_text"][row])
    clamped = quota.sample(frames, fps, base, extra)
    assert len(clamped.frames) == min(count, frames, base + extra) == len(set(clamped.frames))
    if count <= min(frames, base + extra):
        assert clamped == sampled


def test_parsing():
    z = golden("quota_10_cot_parse")
    for reply, outcome, objects in zip(z["replies"], z["outcome"], z["objects_json"], strict=True):
        expected = json.loads(str(objects)) if outcome == "list" else []
        assert quota.parse(str(reply)) == expected, reply
    assert {str(outcome).split(":")[0] for outcome in z["outcome"]} == {"list", "undefined", "error"}


def test_score_head():
    z = golden("quota_11_score_head")
    letters = config(z)["a_token_id"], config(z)["b_token_id"]
    logits = quota.last(tensor(z["logits"]))
    p = quota.yes_probability(logits, letters[0])
    assert p.dtype == torch.float32
    np.testing.assert_allclose(p, z["p_a_fp32"], rtol=1e-5)
    np.testing.assert_allclose((100 * p.double()) ** 2, z["raw_weights_fp32"], rtol=1e-5)
    np.testing.assert_allclose(
        quota.yes_probability(logits, *letters, over="letters"), z["not_official_p_a_over_ab"], rtol=1e-5
    )
    half = quota.yes_probability(logits.bfloat16(), letters[0])
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, z["p_a_bf16"], rtol=0.05)


def test_whole_input():
    z = golden("quota_12_pack_grid_v1")
    plan = quota.plan(z["scores"], config(z)["budget"], NATIVE, parity=True)
    packed = quota.pack_frames(quota.reduce_frames(tensor(z["features"]), plan), "grid", tensor(z["newline"]))
    table, ids = tensor(z["embed_table"]), z["input_ids"][0]
    at = int(np.flatnonzero(ids == config(z)["placeholder"])[0])
    whole = torch.cat([table[tensor(ids[:at])], packed.tokens, table[tensor(ids[at + 1 :])]])
    torch.testing.assert_close(whole[None], tensor(z["inputs_embeds"]), atol=1e-6, rtol=0)
