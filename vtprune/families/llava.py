"""LLaVA and its successors: CLIP or SigLIP patches in raster order, MLP projector, Llama-like decoder.

LLaVA-NeXT and LLaVA-OneVision cut a picture into tiles and add newline embeddings; where each patch ends up is read off
their own packing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.families.base import Family, Layout


def _next_tiles(base: nn.Module, given: dict[str, Any]) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base.config
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in given["image_sizes"]
    ]


def _onevision_tiles(base: nn.Module, given: dict[str, Any]) -> list[int]:
    counts = _next_tiles(base, given)
    together = given.get("batch_num_images")
    if together is None:
        return counts
    # several pictures in a prompt go in whole
    alone = [int(n) == 1 for n in together for _ in range(int(n))]
    return [count if single else 1 for count, single in zip(counts, alone, strict=True)]


def _pooled_videos(base: nn.Module, given: dict[str, Any], features: Tensor) -> list[Layout]:
    """Videos [videos, frames * tokens (+ 1), D]: frame by frame, with one newline at the end in LLaVA-OneVision."""
    videos, length = features.shape[:2]
    frames = given["pixel_values_videos"].shape[1]
    tokens = length // frames * frames
    side = math.isqrt(tokens // frames)
    visual = None if tokens == length else torch.arange(tokens, device=features.device)
    return [Layout(length, visual, grid=(side, side), frames=frames) for _ in range(videos)]


LLAVA = Family(name="LLaVA", base_classes=("LlavaModel",))
LLAVA_NEXT = Family(name="LLaVA-NeXT", base_classes=("LlavaNextModel",), tiles=_next_tiles)
LLAVA_NEXT_VIDEO = Family(
    name="LLaVA-NeXT-Video", base_classes=("LlavaNextVideoModel",), tiles=_next_tiles, videos=_pooled_videos
)
LLAVA_ONEVISION = Family(
    name="LLaVA-OneVision", base_classes=("LlavaOnevisionModel",), tiles=_onevision_tiles, videos=_pooled_videos
)
