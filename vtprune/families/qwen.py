"""Qwen-VL: pictures of any size, patches merged two by two inside the vision tower, positions with three axes.

Qwen3-VL adds features of inner vision blocks between its first decoder layers (deepstack). Most decoder layers of Qwen3.5 are
of linear attention.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.families.base import Family, Layout, Tower


def merged_layouts(base: nn.Module, given: dict[str, Any], grids: str = "image_grid_thw") -> list[Layout]:
    """Pictures by their grid of patches, merged `spatial_merge_size` times each way."""
    merge = base.visual.spatial_merge_size
    found = []
    for frames, rows, columns in given[grids].tolist():
        grid = (rows // merge, columns // merge)
        found.append(Layout(frames * grid[0] * grid[1], grid=grid, frames=frames))
    return found


def video_layouts(base: nn.Module, given: dict[str, Any], features: Any) -> list[Layout]:
    """The same of videos, frame by frame (pairs of them); text may stand between the frames in the prompt."""
    return merged_layouts(base, given, "video_grid_thw")


def frame_pixels(base: nn.Module, given: dict[str, Any], modality: str) -> list[Tensor]:
    """Frames put together again from the patches that they are fed as."""
    vision, merge = base.visual.config, base.visual.spatial_merge_size
    patch, times = vision.patch_size, vision.temporal_patch_size
    grids = given[f"{modality}_grid_thw"].tolist()
    pixels = given.get("pixel_values_videos") if modality == "video" else None
    pixels = given["pixel_values"] if pixels is None else pixels  # videos' name, too, before transformers 5.18
    found = []
    for video, (slots, rows, columns) in zip(pixels.split([t * h * w for t, h, w in grids]), grids, strict=True):
        # patches come block by block of those that will be merged: slot, block row, block column, row, column
        blocks = video.view(slots, rows // merge, columns // merge, merge, merge, -1, times, patch, patch)
        frames = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        frames = frames.reshape(slots * times, -1, rows * patch, columns * patch)
        found.append(frames if modality == "video" else frames[:1])  # a picture goes in twice
    return found


def _by_window(side: int, layouts: list[Layout]) -> Tensor:
    """The order in which Qwen2.5-VL keeps cells: window by window of side x side cells, those at the edges cut off."""
    found, start = [], 0
    for layout in layouts:
        rows, columns = layout.grid
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        window = row // side * -(-columns // side) + column // side
        # frames follow each other
        for _ in range(layout.frames):
            found.append(window.flatten().argsort(stable=True) + start)
            start += rows * columns
    return torch.cat(found)


def _tower(base: nn.Module) -> Tower:
    visual = base.visual
    cell = visual.spatial_merge_size**2
    inner = ("visual.deepstack_merger_list",) if hasattr(visual, "deepstack_merger_list") else ()
    whole = getattr(visual, "fullatt_block_indexes", None)
    if whole is None:
        return Tower(cell, inner=inner)
    side = visual.window_size // visual.spatial_merge_size // visual.patch_size
    windowed = frozenset(range(len(visual.blocks))) - set(whole)
    return Tower(cell, windowed, functools.partial(_by_window, side), inner)


QWEN_VL = Family(
    name="Qwen-VL",
    base_classes=("Qwen2VLModel", "Qwen2_5_VLModel"),
    encoder_layers=("visual.blocks",),
    projector=("visual.merger",),
    special_tokens=(),
    layouts=merged_layouts,
    videos=video_layouts,
    pixels=frame_pixels,
    sealed="its vision tower merges patches two by two, so they cannot leave one by one",
    packed=_tower,
    attention="attn",
    # a token's place in the picture is in its position: there is no other numbering of what is left
    positions=("original",),
)
QWEN3_VL = replace(
    QWEN_VL,
    name="Qwen3-VL",
    base_classes=("Qwen3VLModel", "Qwen3VLMoeModel"),
    sealed="its vision tower merges patches two by two, also those of its inner blocks that go on to the decoder (deepstack), "
    "so they cannot leave one by one",
    injects="_deepstack_process",
)
QWEN3_5 = replace(QWEN_VL, name="Qwen3.5", base_classes=("Qwen3_5Model", "Qwen3_5MoeModel"), query_gate=True)
