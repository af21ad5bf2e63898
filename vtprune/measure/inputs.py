"""Random pictures, videos and prompts in the form that a model's processor would hand them over.

Knows the arguments that families take, not what is in them: speed does not depend on it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.families import locate
from vtprune.families.base import Site
from vtprune.pruner import UnsupportedError

# pixels along a picture for models that take any size (a multiple of every patch and window in use), and tiles of a picture for
# models whose processor cuts it freely: twelve, the usual limit, and the whole picture
_SIDE = 1008
_TILES = 13


def make_inputs(
    model: nn.Module, batch: int, text_tokens: int, seed: int = 0, images: int = 1, frames: int | None = None
) -> dict[str, Tensor]:
    """Random pictures or videos and prompts for `model`: half the text before them, half after.

    Parameters:
        images: pictures (or videos) per sample; a tiled model gets the largest picture that it takes.
        frames: feed videos of so many frames instead of pictures.
    Raises:
        UnsupportedError: if text_tokens is below 2 (for tiles that are told apart by text: 1 + images), batch, images or
            frames below 1, the prompt exceeds the decoder's positions, or the model takes no such input.
    """
    if text_tokens < 2 or batch < 1 or images < 1 or (frames is not None and frames < 1):
        raise UnsupportedError(
            f"batch={batch}, images={images}, text_tokens={text_tokens}, frames={frames}: at least 1, 1, 2 and 1."
        )
    config, site = model.config, locate(model)
    modality = "image" if frames is None else "video"
    token = site.placeholder(modality)
    if token is None or (frames is not None and site.family.videos is None):
        raise UnsupportedError(f"{site.family.name} takes no {modality}s.")
    each, given = _picture(site, batch * images) if frames is None else _video(site, batch * images, frames)
    # tiles that come as pictures of their own belong to one image as long as nothing stands between them
    between = images - 1 if site.family.runs else 0
    if text_tokens < 2 + between:
        raise UnsupportedError(
            f"text_tokens={text_tokens}: {images} pictures need at least {2 + between}, one between each two."
        )
    limit = config.text_config.max_position_embeddings
    if images * each + text_tokens >= limit:
        raise UnsupportedError(
            f"{images * each} visual + {text_tokens} text tokens do not fit the decoder's {limit} positions."
        )
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, min(token, config.text_config.vocab_size), (batch, text_tokens), generator=generator)
    before = (text_tokens - between) // 2
    parts = [text[:, :before]]
    for image in range(images):
        parts.append(torch.full((batch, each), token))
        if image < between:
            parts.append(text[:, before + image : before + image + 1])
    ids = torch.cat([*parts, text[:, before + between :]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        inputs["mm_token_type_ids"] = (ids == token).int() * (1 if frames is None else 2)
    for name, shape in given.items():
        if isinstance(shape, Tensor):
            inputs[name] = shape
        else:
            inputs[name] = torch.randn(shape, generator=generator).to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _side(value: int | list[int]) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value


def _picture(site: Site, count: int) -> tuple[int, dict[str, Any]]:
    """Placeholder tokens of one picture, and the arguments of `count`: tensors, or shapes to fill at random."""
    family, config = site.family, site.base.config
    vision = config.vision_config
    if family.tiles is not None:
        sizes = torch.tensor([max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])]).repeat(count, 1)
        layout = site.layouts(sizes[:1])[0]
        side = _side(vision.image_size)
        return layout.placeholders, {"image_sizes": sizes, "pixel_values": (count, layout.tiles, 3, side, side)}
    if hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        return _patches(site, count, 1, "pixel_values", "image_grid_thw")
    side = _side(vision.image_size) if hasattr(vision, "image_size") else 0
    if family.runs:
        return _TILES * config.image_seq_length, {"pixel_values": (count * _TILES, 3, side, side)}
    if family.layouts is not None or not side:
        raise UnsupportedError(f"no random pictures are made for {family.name} yet.")
    return (side // _side(vision.patch_size)) ** 2, {"pixel_values": (count, 3, side, side)}


def _patches(site: Site, count: int, frames: int, name: str, grids: str) -> tuple[int, dict[str, Any]]:
    """As `_picture`, for encoders that are fed patches with their grid; `frames` pairs of frames of a smaller side."""
    vision = site.base.config.vision_config
    rows = (_SIDE if frames == 1 else _SIDE // 3) // vision.patch_size
    grid = torch.tensor([[frames, rows, rows]]).repeat(count, 1)
    width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    tokens = frames * (rows // vision.spatial_merge_size) ** 2
    return tokens, {name: (count * frames * rows * rows, width), grids: grid}


def _video(site: Site, count: int, frames: int) -> tuple[int, dict[str, Any]]:
    """As `_picture`, for videos."""
    family, vision = site.family, site.base.config.vision_config
    if hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        slots = max(1, frames // vision.temporal_patch_size)
        return _patches(site, count, slots, "pixel_values_videos", "video_grid_thw")
    if family.pooling != "apply_pooling":
        raise UnsupportedError(f"no random videos are made for {family.name} yet.")
    side = _side(vision.image_size)
    shape = (count, frames, 3, side, side)
    given = {"pixel_values_videos": torch.empty(shape, device="meta")}
    layout = family.videos(site.base, given, torch.empty(1, 1))[0]
    return layout.placeholders, {"pixel_values_videos": shape}
