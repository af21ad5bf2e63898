"""Strategies inside vision encoders without a class token, in packed towers that join patches, and over tiles: golden
vectors of the published code, and the promises."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE
from test_golden_flowcut import KERNELS, golden, load_weights, tensor

import vtprune

QWEN = "flowcut_qwen_vit_d8_16x12_t8"


def golden_qwen(attn: str):
    import transformers

    z = golden(QWEN)
    vision = {
        "depth": int(z["depth"]),
        "embed_dim": int(z["embed_dim"]),
        "num_heads": int(z["num_heads"]),
        "hidden_size": int(z["hidden"]),
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "mlp_ratio": 2,
        "hidden_act": "quick_gelu",
    }
    text = {
        "hidden_size": int(z["hidden"]),
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "pad_token_id": 0,
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attn).eval()
    load_weights(model.model.visual, z)
    return z, model


@KERNELS
@torch.no_grad()
def test_published_pruning_inside_qwens_tower(attn):
    z, model = golden_qwen(attn)
    target = int(z["target_num"])
    strategy = vtprune.FlowCut(keep=2 * target, decoder_keep=target, groups="survivors")
    joined, left = [], {}
    model.model.visual.merger.register_forward_hook(lambda module, args, output: joined.append(output))
    size = int(z["grid_thw"].prod()) // 4
    ids = torch.tensor([[1, 97, *[IMAGE] * size, 96, 5, 6]])
    given = {"pixel_values": tensor(z["pixel_values"]), "image_grid_thw": tensor(z["grid_thw"])}

    class Watched(vtprune.FlowCut):
        def encode(self, view):
            keep = super().encode(view)
            if keep is not None:
                left[view.layer] = view.index[0, keep.indices[0]]
            return keep

    strategy = Watched(keep=2 * target, decoder_keep=target, groups="survivors")
    with vtprune.pruning(model, strategy) as session:
        model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), **given)
        sample = session.report.samples[0]
    assert [len(index) for index in left.values()] == z["kept_at_prune"].tolist()
    assert left[7].tolist() == z["keep_patch_indices"].tolist()
    torch.testing.assert_close(joined[0], tensor(z["merged_features"]), atol=2e-4, rtol=0)
    assert [len(layer) for layer in sample.layers] == [2 * target, 2 * target, target]
