"""Qwen3-VL (features of inner vision blocks enter the first decoder layers), Qwen3.5 (linear attention), also with experts."""

from __future__ import annotations

import torch
import transformers
from models import IMAGE, VIDEO
from torch import nn

from zoo import Kind, seeded
from zoo.qwen2 import END, FRAMES, START, patches, picture, types

TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
}


def build(prefix: str, attn: str, text: dict, vision: dict) -> nn.Module:
    """A model of the classes called `prefix`Config and `prefix`ForConditionalGeneration."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision, **TOKENS)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")._from_config(config, attn_implementation=attn)
    return seeded(model, [START, END, IMAGE, VIDEO])


def qwen3_vl(attn: str) -> nn.Module:
    return build("Qwen3VL", attn, dict(TEXT), {**VISION, "deepstack_visual_indexes": [0, 1, 2]})


def qwen3_vl_moe(attn: str) -> nn.Module:
    return build("Qwen3VLMoe", attn, {**TEXT, **EXPERTS}, {**VISION, "deepstack_visual_indexes": [0, 2]})


def hybrid(prefix: str, attn: str, **more) -> nn.Module:
    rope = {**TEXT["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope, **more}
    text |= {"layer_types": [f"{kind}_attention" for kind in ("linear", "full", "full", "linear")]}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    model = build(prefix, attn, text, dict(VISION))
    for name, parameter in model.named_parameters():
        if "conv1d" in name:  # queries and keys are normalised behind it: small ones would blow up rounding
            torch.nn.init.normal_(parameter, mean=0.5)
    return model


def qwen3_5(attn: str) -> nn.Module:
    return hybrid("Qwen3_5", attn)


def qwen3_5_moe(attn: str) -> nn.Module:
    return hybrid("Qwen3_5Moe", attn, **EXPERTS, shared_expert_intermediate_size=32)


def video(model, which):
    """Frames (pairs of them) of their own in the prompt, each after its time in words."""
    given = {
        "pixel_values_videos": patches(FRAMES * 24, slice(24 * which, 24 * which + 24), which),
        "video_grid_thw": torch.tensor([[FRAMES, 6, 4]]),
    }
    ids = []
    for frame in range(FRAMES):
        ids += [*range(10, 13 + frame % 2), START, *[VIDEO] * 6, END]
    return given, ids


def kind(name, build, prefix):
    return Kind(name, build, picture, video, (None,), types, needs=(f"{prefix}ForConditionalGeneration",), patch_pixels=16)


KINDS = [
    kind("qwen3-vl", qwen3_vl, "Qwen3VL"),
    kind("qwen3-vl-moe", qwen3_vl_moe, "Qwen3VLMoe"),
    kind("qwen3.5", qwen3_5, "Qwen3_5"),
    kind("qwen3.5-moe", qwen3_5_moe, "Qwen3_5Moe"),
]
