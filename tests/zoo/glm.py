"""GLM-4.1V, GLM-4.5V (experts), GLM-4.6V and GLM-OCR: a video's frames stand in the prompt as pictures do."""

from __future__ import annotations

import functools

import torch
import transformers
from models import IMAGE, VIDEO
from torch import Tensor, nn

from zoo import Kind, seeded
from zoo.qwen2 import END, FRAMES, START, patches, picture
from zoo.qwen3 import TEXT, VISION

VIDEO_START, VIDEO_END = 95, 94
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def types(ids: Tensor) -> dict[str, Tensor]:
    """Text 0, picture 1, and 2 for what stands between the beginning and the end of a video."""
    within = (ids == VIDEO_START).cumsum(-1) > (ids == VIDEO_END).cumsum(-1)
    return {"mm_token_type_ids": (ids == IMAGE).long() * torch.where(within, 2, 1)}


def build(prefix: str, attn: str, **text) -> nn.Module:
    torch.manual_seed(0)
    text = {**TEXT, **text}
    half = {} if prefix == "GlmOcr" else {"partial_rotary_factor": 0.5}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], **half}
    if half:
        text |= {"hidden_size": 64, "head_dim": 16}
    vision = {**VISION, "image_size": 48, "out_hidden_size": text["hidden_size"]}
    del vision["num_position_embeddings"]
    if prefix == "Glm46V":
        text["model_type"], vision["model_type"] = "glm4v_text", "glm4v_vision"
    config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision, **TOKENS)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")._from_config(config, attn_implementation=attn)
    return seeded(model, [START, END, VIDEO_START, VIDEO_END, IMAGE, VIDEO])


def video(model, which):
    given = {
        "pixel_values_videos": patches(FRAMES * 24, slice(24 * which, 24 * which + 24), which),
        "video_grid_thw": torch.tensor([[FRAMES, 6, 4]]),
    }
    ids = [VIDEO_START]
    for frame in range(FRAMES):
        ids += [START, *[IMAGE] * 6, END, 10 + frame]
    return given, [*ids, VIDEO_END]


def kind(name: str, prefix: str, **text):
    needs = (f"{prefix}ForConditionalGeneration",)
    make = functools.partial(build, prefix, **text)
    return Kind(name, make, picture, video, (None,), types, needs=needs, patch_pixels=16, mixes=False)


KINDS = [
    kind("glm4v", "Glm4v"),
    kind("glm4v-moe", "Glm4vMoe", **EXPERTS),
    kind("glm46v", "Glm46V"),
    kind("glm-ocr", "GlmOcr"),
]
