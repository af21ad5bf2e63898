"""Qwen-VL: pictures of any size, patches merged two by two inside the vision tower, positions with three axes."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.families.base import Family, Layout


def _merged_layouts(base: nn.Module, given: dict[str, Any], grids: str = "image_grid_thw") -> list[Layout]:
    merge = base.visual.spatial_merge_size
    found = []
    for frames, rows, columns in given[grids].tolist():
        grid = (rows // merge, columns // merge)
        found.append(Layout(frames * grid[0] * grid[1], grid=grid, frames=frames))
    return found


def _video_layouts(base: nn.Module, given: dict[str, Any], features: Any) -> list[Layout]:
    return _merged_layouts(base, given, "video_grid_thw")


QWEN_VL = Family(
    name="Qwen-VL",
    base_classes=("Qwen2VLModel", "Qwen2_5_VLModel"),
    encoder_layers=("visual.blocks",),
    projector=("visual.merger",),
    special_tokens=(),
    layouts=_merged_layouts,
    videos=_video_layouts,
    sealed="its vision tower merges patches two by two and attends within windows, so they cannot leave one by one",
    # a token's place in the picture is in its position: there is no other numbering of what is left
    positions=("original",),
)
