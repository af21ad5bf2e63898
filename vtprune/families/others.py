"""Families that follow the common pattern up to their projector."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.families.base import Family, Layout


def _merged_by_size(base: nn.Module, given: dict[str, Any]) -> list[Layout]:
    """Pixtral's patches, merged in the projector."""
    side = base.vision_tower.patch_size * base.config.spatial_merge_size
    grids = [(int(height) // side, int(width) // side) for height, width in given["image_sizes"]]
    return [Layout(rows * columns, grid=(rows, columns)) for rows, columns in grids]


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
    runs=True,
    whole="last",
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
