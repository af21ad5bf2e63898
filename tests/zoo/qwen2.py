"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import torch
from models import IMAGE, VIDEO, preencoding, tiny_qwen
from torch import Tensor

from zoo import Kind

FRAMES = 4
START, END = 97, 96


def types(ids: Tensor) -> dict[str, Tensor]:
    """Text 0, picture 1, video 2, as the processor marks them."""
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def patches(count: int, bright: slice, seed: int) -> Tensor:
    pixels = torch.randn(count, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(seed)) * 0.3
    pixels[bright] += 1.0
    return pixels


def picture(model, which):
    rows, columns = ((8, 12), (12, 10))[which]
    given = {
        "pixel_values": patches(rows * columns, slice(0, columns * 2), which),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    return given, [START, *[IMAGE] * (rows * columns // 4), END]


def video(model, which, seconds: bool = False):
    given = {
        "pixel_values_videos": patches(FRAMES * 24, slice(24 * which, 24 * which + 24), which),
        "video_grid_thw": torch.tensor([[FRAMES, 6, 4]]),
    }
    if seconds:
        given["second_per_grid_ts"] = torch.tensor([1.0])
    return given, [START, *[VIDEO] * FRAMES * 6, END]


def timed_video(model, which):
    return video(model, which, seconds=True)


# before, Qwen2.5-VL takes a video's time step for every picture as well
MIXES = not preencoding.args[0]
KINDS = [
    Kind("qwen2", lambda attn: tiny_qwen(attn, version="2"), picture, video, (None,), types, patch_pixels=16),
    Kind(
        "qwen2.5",
        lambda attn: tiny_qwen(attn, version="2.5"),
        picture,
        timed_video,
        (None,),
        types,
        patch_pixels=16,
        mixes=MIXES,
    ),
]
