"""LLaVA and its successors."""

from __future__ import annotations

import torch
from models import GRID, IMAGE, TOKENS, VIDEO, images, tiny_llava, tiny_other, tiny_tiled, tiny_video_llava

from zoo import Kind

SIDE = 8 * GRID
FRAMES = 4
# (height, width) of the original pictures: one row of two tiles with padding, and four tiles with padding
SIZES = ((SIDE - 20, 2 * SIDE), (2 * SIDE, 2 * SIDE - 30))


def plain(model, which):
    return {"pixel_values": images(1, seed=which)}, [IMAGE] * TOKENS


def tiled(model, which):
    tiles = 3 if which == 0 else 5
    pixels = torch.zeros(1, 5, 3, SIDE, SIDE)
    pixels[0, :tiles] = images(tiles, seed=which)
    given = {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[which]])}
    with torch.no_grad():
        features = model.model.get_image_features(**given, return_dict=True).pooler_output
    return given, [IMAGE] * len(features[0])


def pooled(model, which):
    """Four frames of nine tokens."""
    return {"pixel_values_videos": images(FRAMES, which)[None]}, [VIDEO] * FRAMES * (GRID // 2) ** 2


def pooled_newline(model, which):
    given, tokens = pooled(model, which)
    return given, [*tokens, VIDEO]


def video_llava_picture(model, which):
    return {"pixel_values_images": images(1, seed=which)}, [IMAGE] * TOKENS


def video_llava_video(model, which):
    """Its frames bring their class token along."""
    return {"pixel_values_videos": images(FRAMES, which)[None]}, [VIDEO] * FRAMES * (TOKENS + 1)


KINDS = [
    Kind("llava", tiny_llava, plain, patch_pixels=8),
    Kind("llava-siglip", lambda attn: tiny_llava(attn, siglip=True), plain, patch_pixels=8),
    Kind("vipllava", lambda attn: tiny_other("vipllava", attn), plain, patch_pixels=8),
    Kind("next", lambda attn: tiny_tiled("next", attn), tiled),
    Kind("next-video", lambda attn: tiny_tiled("next-video", attn), tiled, pooled),
    Kind("onevision", lambda attn: tiny_tiled("onevision", attn), tiled, pooled_newline),
    Kind("video-llava", tiny_video_llava, video_llava_picture, video_llava_video, patch_pixels=8),
]
