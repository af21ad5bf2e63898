"""Families that follow the common pattern up to their projector."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from vtprune.families.base import Family, Layout, Tiling
from vtprune.families.tiles import one_apart, touching


def _merged_by_size(base: nn.Module, given: dict[str, Any]) -> list[Layout]:
    """Pixtral's patches, merged in the projector."""
    side = base.vision_tower.patch_size * base.config.spatial_merge_size
    grids = [(int(height) // side, int(width) // side) for height, width in given["image_sizes"]]
    return [Layout(rows * columns, grid=(rows, columns)) for rows, columns in grids]


def _pooled_tiles(base: nn.Module, given: dict[str, Any]) -> list[Layout]:
    """PerceptionLM's pictures, fed as [pictures, tiles, 3, H, W], the overview first."""
    pictures, tiles = given["pixel_values"].shape[:2]
    grid = _pooled_grid(base, given["pixel_values"])
    views = Tiling(tiles, 0, largest=True).views(grid)
    return [Layout(tiles * math.prod(grid), tiles=tiles, views=views)] * pictures


def _pooled_frames(base: nn.Module, given: dict[str, Any], features: Tensor) -> list[Layout]:
    videos, frames = given["pixel_values"].shape[:2]
    grid = _pooled_grid(base, given["pixel_values"])
    return [Layout(frames * math.prod(grid), grid=grid, frames=frames)] * videos


def _pooled_grid(base: nn.Module, pixels: Tensor) -> tuple[int, int]:
    patch = base.vision_tower.timm_model.patch_embed.patch_size[0] * base.config.projector_pooling_ratio
    return pixels.shape[-2] // patch, pixels.shape[-1] // patch


VIP_LLAVA = Family(
    name="VipLLaVA",
    base_classes=("VipLlavaModel",),
    sealed="features of several of its encoder's blocks are joined per token, so no token may leave between them",
)
INTERNVL = Family(
    name="InternVL",
    base_classes=("InternVLModel",),
    encoder_layers=("vision_tower.encoder.layer",),
    special_tokens=(),
    runs=touching,
    sealed="its patches are merged two by two (pixel shuffle) before the projector, so they cannot leave one by one",
)
MISTRAL3 = Family(
    name="Mistral 3",
    base_classes=("Mistral3Model",),
    encoder_layers=("vision_tower.transformer.layers",),
    special_tokens=(),
    layouts=_merged_by_size,
    sealed="its projector merges patches two by two, so they cannot leave one by one",
)
AYA_VISION = Family(
    name="Aya Vision",
    base_classes=("AyaVisionModel",),
    special_tokens=(),
    runs=one_apart,
    # Cohere2's layers of full attention know no positions
    sealed="its projector joins patches two by two (pixel shuffle), so they cannot leave one by one",
)
PERCEPTION_LM = Family(
    name="PerceptionLM",
    base_classes=("PerceptionLMModel",),
    encoder_layers=("vision_tower.timm_model.blocks",),
    special_tokens=(),
    layouts=_pooled_tiles,
    videos=_pooled_frames,
    video_features="get_image_features",
    tiles_apart=True,
    sealed="its projector pools patches two by two and its encoder is timm's, which hands out no attention rows",
)
FAST_VLM = Family(
    name="FastVLM",
    base_classes=("FastVlmModel",),
    encoder_layers=(),
    convolutional=("vision_tower",),
    special_tokens=(),
    sealed="its encoder is convolutional (FastViT), so a token cannot leave out of its neighbours' reach",
)
