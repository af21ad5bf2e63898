"""LLaVA and its successors: CLIP or SigLIP patches in raster order, MLP projector, Llama-like decoder.

LLaVA-NeXT and LLaVA-OneVision cut a picture into tiles and add newline embeddings; where each patch ends up is read off
their own packing. Video-LLaVA has an encoder for pictures and another for videos.
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
        for size in torch.as_tensor(given["image_sizes"]).tolist()
    ]


def _onevision_tiles(base: nn.Module, given: dict[str, Any]) -> list[int]:
    counts = _next_tiles(base, given)
    together = given.get("batch_num_images")
    if together is None:
        return counts
    # several pictures in a prompt go in whole
    alone = [int(n) == 1 for n in together for _ in range(int(n))]
    return [count if single else 1 for count, single in zip(counts, alone, strict=True)]


def _frames(given: dict[str, Any]) -> int:
    pixels = given.get("pixel_values_videos", given.get("pixel_values"))  # its name before transformers 5.18
    return pixels.shape[1]


def _next_videos(base: nn.Module, given: dict[str, Any], features: Tensor | tuple[Tensor, ...]) -> list[Layout]:
    """Frame by frame, nothing between them."""
    frames = _frames(given)
    lengths = [video.numel() // video.shape[-1] for video in features]
    sides = [math.isqrt(length // frames) for length in lengths]
    return [Layout(length, grid=(side, side), frames=frames) for length, side in zip(lengths, sides, strict=True)]


def _onevision_videos(base: nn.Module, given: dict[str, Any], features: Tensor) -> list[Layout]:
    """Frame by frame, pooled two by two, with one newline at the end (which older versions add later)."""
    vision, frames = base.config.vision_config, _frames(given)
    side = math.ceil(vision.image_size // vision.patch_size / 2)
    tokens = frames * side * side
    visual = torch.arange(tokens, device=features.device)
    return [Layout(tokens + 1, visual, grid=(side, side), frames=frames) for _ in features]


def _video_llava_videos(base: nn.Module, given: dict[str, Any], features: Tensor) -> list[Layout]:
    """Frame by frame, the class token first, which pictures leave behind but frames take along to the decoder."""
    pixels, patch = given["pixel_values_videos"], base.config.vision_config.patch_size
    videos, frames, _, height, width = pixels.shape
    grid = (height // patch, width // patch)
    tokens, patches = features.shape[1], grid[0] * grid[1]
    # a class token stands for no place in its frame: offered among the visual tokens it would shift every patch of the grid
    # and be ranked, merged and dropped as one. As a separator it always stays and counts nowhere, like a newline.
    visual = torch.arange(frames * tokens, device=features.device).view(frames, tokens)[:, tokens - patches :].flatten()
    return [Layout(frames * tokens, visual, grid=grid, frames=frames) for _ in range(videos)]


LLAVA = Family(name="LLaVA", base_classes=("LlavaModel",))
LLAVA_NEXT = Family(name="LLaVA-NeXT", base_classes=("LlavaNextModel",), tiles=_next_tiles)
LLAVA_NEXT_VIDEO = Family(
    name="LLaVA-NeXT-Video",
    base_classes=("LlavaNextVideoModel",),
    tiles=_next_tiles,
    videos=_next_videos,
    pooling="vision_resampler",
    projects_pooled=True,
)
LLAVA_ONEVISION = Family(
    name="LLaVA-OneVision",
    base_classes=("LlavaOnevisionModel",),
    tiles=_onevision_tiles,
    videos=_onevision_videos,
    pooling="apply_pooling",
    newline="image_newline",
)
VIDEO_LLAVA = Family(
    name="Video-LLaVA",
    base_classes=("VideoLlavaModel",),
    encoder_layers=("image_tower.encoder.layers", "image_tower.vision_model.encoder.layers"),
    video_layers=("video_tower.encoder.layers", "video_tower.vision_model.encoder.layers"),
    videos=_video_llava_videos,
)
