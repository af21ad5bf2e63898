"""Gemma 3, PaliGemma and PaliGemma 2: pictures and prompts that are seen in both directions, windows shorter than a picture."""

from __future__ import annotations

import torch
import transformers
from models import GRID, IMAGE, TOKENS, images

from zoo import Kind, seeded

WINDOW = 8
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vision_use_head": False,
}


def gemma3(attn: str, window: int = WINDOW, types: list[str] = TYPES):
    """36 tokens a picture, each of four patches; every other layer has a window of eight tokens."""
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**VISION, image_size=8 * GRID, patch_size=4)
    text = transformers.Gemma3TextConfig(**TEXT, query_pre_attn_scalar=12, sliding_window=window, layer_types=types)
    config = transformers.Gemma3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        mm_tokens_per_image=TOKENS,
        boi_token_id=97,
        eoi_token_id=96,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attn)
    return seeded(model, [IMAGE, 97, 96])


def paligemma(attn: str, second: bool = False):
    """36 tokens a picture; the second one's decoder is of Gemma 2: windows, and a bound on attention scores."""
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**VISION, image_size=8 * GRID, patch_size=8, projection_dim=32)
    if second:
        more = {"query_pre_attn_scalar": 12, "sliding_window": WINDOW, "layer_types": TYPES, "attn_logit_softcapping": 2.0}
        text = transformers.Gemma2Config(**TEXT, **more)
    else:
        text = transformers.GemmaConfig(**TEXT)
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)
    model = transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=attn)
    return seeded(model, [IMAGE])


def framed(model, which):
    """A picture stands between two tokens of its own."""
    return {"pixel_values": images(1, seed=which)}, [97, *[IMAGE] * TOKENS, 96]


def bare(model, which):
    return {"pixel_values": images(1, seed=which)}, [IMAGE] * TOKENS


def pictures_are_one(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def prompts_are_zero(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_type_ids": torch.zeros_like(ids)}


KINDS = [
    Kind("gemma3", gemma3, framed, types=pictures_are_one, patch_pixels=8),
    Kind("paligemma", paligemma, bare, types=prompts_are_zero, said=(("token_type_ids", 1),), patch_pixels=8),
    Kind(
        "paligemma2",
        # transformers has no sdpa for it, as its scores are bounded
        lambda attn: paligemma("eager", second=True),
        bare,
        types=prompts_are_zero,
        said=(("token_type_ids", 1),),
        patch_pixels=8,
    ),
]
