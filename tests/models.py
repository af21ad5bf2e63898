"""Tiny random models of real transformers classes, and prompts for them."""

from __future__ import annotations

import inspect
from functools import lru_cache

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

# transformers >= 5.18 encodes images before the forward pass; earlier, features cannot be handed over
preencoding = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters,
    reason="needs transformers >= 5.18",
)


@lru_cache
def beams_keep_images_together() -> bool:
    """Whether `generate` hands each beam all images of its prompt; 5.18 gives it one of them several times."""
    model, seen = tiny_llava(), []
    base = model.model
    base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model.generate(**batch([prompt(1, "I", 1, "I", 1)]), pixel_values=images(2), num_beams=2, max_new_tokens=1)
    handed = seen[0]["mm_encoder_outputs"]["image"]
    features = handed.pooler_output
    return all(torch.equal(a, b) for a, b in zip(features[:2], features[2:], strict=True))


IMAGE = 99
VIDEO = 98
GRID = 6
TOKENS = GRID * GRID


def tiny_llava(
    attn: str = "sdpa", kv_heads: int = 2, layers: int = 4, blocks: int = 6, seed: int = 0, siglip: bool = False, **options
):
    """A LLaVA of 36 visual tokens with weights large enough that dropping a token shows in the logits."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "image_size": 8 * GRID,
        "patch_size": 8,
    }
    vision = SiglipVisionConfig(**sizes, vision_use_head=False) if siglip else CLIPVisionConfig(**sizes, projection_dim=16)
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=100,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "full" if siglip else "default", **options},
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [IMAGE]  # a random model may say anything but that
    return model


def tiny_tiled(family: str, attn: str = "sdpa", seed: int = 0):
    """A tiny LLaVA-NeXT or LLaVA-NeXT-Video ("next", "next-video", CLIP) or LLaVA-OneVision ("onevision", SigLIP).

    Tiles have 36 patches, frames 9 tokens.
    """
    import transformers

    plain = tiny_llava(attn, seed=seed, siglip=family == "onevision").config
    side = 8 * GRID
    config_class, model_class = {
        "next": (transformers.LlavaNextConfig, transformers.LlavaNextForConditionalGeneration),
        "next-video": (transformers.LlavaNextVideoConfig, transformers.LlavaNextVideoForConditionalGeneration),
        "onevision": (transformers.LlavaOnevisionConfig, transformers.LlavaOnevisionForConditionalGeneration),
    }[family]
    config = config_class(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_id=IMAGE,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        vision_feature_layer=-2,
        vision_feature_select_strategy=plain.vision_feature_select_strategy,
        **({} if family == "next" else {"video_token_id": VIDEO}),
    )
    model = model_class._from_config(config, attn_implementation=attn).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "newline" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def tiny_qwen(attn: str = "sdpa", seed: int = 0, version: str = "2.5", blocks: int = 2):
    """A tiny Qwen2-VL or Qwen2.5-VL: vision blocks (of 2.5 every second sees whole pictures), four decoder layers,
    three-axis positions."""
    import transformers

    torch.manual_seed(seed)
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": blocks, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if version == "2.5":
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
        vision |= {"window_size": 32, "fullatt_block_indexes": list(range(1, blocks, 2))}
        config_class, model_class = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    else:
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config_class, model_class = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 97, "vision_end_token_id": 96}
    config = config_class(text_config=text, vision_config=vision, **tokens)
    model = model_class._from_config(config, attn_implementation=attn).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [96, 97, VIDEO, IMAGE]
    return model


def tiny_other(family: str, attn: str = "sdpa", seed: int = 0):
    """A tiny InternVL (36 tokens a tile), Mistral 3 (pictures of any size, 16 pixels a token) or VipLLaVA (36 tokens)."""
    import transformers

    plain = tiny_llava(attn, seed=seed).config
    text = {name: getattr(plain.text_config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 1024}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    if family == "internvl":
        vision = transformers.InternVLVisionConfig(**sizes, image_size=[16 * GRID] * 2, patch_size=[8, 8])
        decoder, more, config_class = transformers.Qwen2Config(**text), {}, transformers.InternVLConfig
        model_class = transformers.InternVLForConditionalGeneration
    elif family == "mistral3":
        vision = transformers.PixtralVisionConfig(**sizes, image_size=128, patch_size=8, head_dim=8)
        decoder = transformers.MistralConfig(**text, sliding_window=None)
        more, config_class = {"spatial_merge_size": 2, "vision_feature_layer": -1}, transformers.Mistral3Config
        model_class = transformers.Mistral3ForConditionalGeneration
    else:
        vision, decoder, more = plain.vision_config, plain.text_config, {"vision_feature_layers": [-2, -3]}
        config_class, model_class = transformers.VipLlavaConfig, transformers.VipLlavaForConditionalGeneration
    config = config_class(vision_config=vision, text_config=decoder, image_token_id=IMAGE, **more)
    model = model_class._from_config(config, attn_implementation=attn).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def tiny_video_llava(attn: str = "sdpa", seed: int = 0):
    """A tiny Video-LLaVA: 36 tokens a picture, 37 a frame (its class token comes along)."""
    import transformers

    plain = tiny_llava(attn, seed=seed).config
    config = transformers.VideoLlavaConfig(
        vision_config=plain.vision_config, text_config=plain.text_config, image_token_index=IMAGE, video_token_index=VIDEO
    )
    model = transformers.VideoLlavaForConditionalGeneration._from_config(config, attn_implementation=attn).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "class_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def vision_blocks(model):
    """The blocks of the encoder that sees pictures; older transformers put one more module in between."""
    tower = getattr(model.model, "vision_tower", None) or model.model.image_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def prompt(*parts: int | str) -> list[int]:
    """Token ids: an int stands for that many text tokens, "I" for an image."""
    ids, word = [1], 3
    for part in parts:
        if part == "I":
            ids += [IMAGE] * TOKENS
        else:
            for _ in range(part):
                ids.append(3 + word % 90)
                word = word * 7 + 5
    return ids


def batch(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, padded."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, p in enumerate(prompts):
        at = slice(longest - len(p), None) if side == "left" else slice(0, len(p))
        ids[row, at], mask[row, at] = torch.tensor(p), 1
    return {"input_ids": ids, "attention_mask": mask}


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Random pictures with some structure: a bright patch region each, so that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 8 * GRID, 8 * GRID, generator=generator) * 0.3
    for i in range(count):
        x, y = torch.randint(0, 4 * GRID, (2,), generator=generator).tolist()
        pixels[i, :, y : y + 16, x : x + 16] += 2.0
    return pixels
