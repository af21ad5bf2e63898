"""Decoders with sliding windows, shorter than a picture, under families that mostly come without."""

from __future__ import annotations

import torch
import transformers
from models import IMAGE, tiny_llava, tiny_other, tiny_qwen

from zoo import Kind, seeded
from zoo.gemma import TEXT, TYPES, WINDOW
from zoo.llava import plain
from zoo.others import any_size
from zoo.qwen2 import KINDS as QWEN2


def under_llava(attn: str, text):
    """LLaVA with another decoder."""
    torch.manual_seed(0)
    like = tiny_llava(attn).config
    config = transformers.LlavaConfig(
        vision_config=like.vision_config,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return seeded(transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=attn), [IMAGE])


def llava_mistral(attn: str):
    """All layers have the window, as in Mistral 7B v0.1."""
    return under_llava(attn, transformers.MistralConfig(**TEXT, sliding_window=WINDOW))


def llava_cohere2(attn: str):
    """As in Aya Vision: layers with a window have positions, those without have none."""
    more = {"sliding_window": WINDOW, "layer_types": TYPES, "logit_scale": 1.0}
    return under_llava(attn, transformers.Cohere2Config(**TEXT, **more))


def mistral3(attn: str):
    config = tiny_other("mistral3", attn).config
    config.text_config.sliding_window = WINDOW
    torch.manual_seed(0)
    return seeded(transformers.Mistral3ForConditionalGeneration._from_config(config, attn_implementation=attn), [IMAGE])


def qwen2_5(attn: str):
    """The first two layers see everything, the others have the window; it counts tokens, not positions with three axes."""
    config = tiny_qwen(attn, version="2.5").config
    text = config.text_config.to_dict()
    text |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, "layer_types": None}
    config.text_config = type(config.text_config)(**text)
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn)
    return seeded(model, [96, 97, 98, IMAGE])


_QWEN = next(kind for kind in QWEN2 if kind.name == "qwen2.5")

KINDS = [
    Kind("llava-mistral-window", llava_mistral, plain, windowed=True, patch_pixels=8),
    Kind("llava-cohere2", llava_cohere2, plain, patch_pixels=8),
    Kind("mistral3-window", mistral3, any_size, windowed=True, patch_pixels=16),
    Kind("qwen2.5-window", qwen2_5, _QWEN.picture, positions=_QWEN.positions, types=_QWEN.types),
]
