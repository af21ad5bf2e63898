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
    # as of aya-vision-8b; by default the encoder's width is no multiple of its heads
    example={
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 364,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "cohere2",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    },
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
    # as of Perception-LM-1B; by default there is no encoder that it could take
    example={
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 1024,
                "depth": 23,
                "img_size": [448, 448],
                "ref_feat_shape": [32, 32],
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
            },
            "do_pooling": False,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 11520,
        },
        "projector_pooling_ratio": 2,
    },
)
FAST_VLM = Family(
    name="FastVLM",
    base_classes=("FastVlmModel",),
    encoder_layers=(),
    convolutional=("vision_tower",),
    special_tokens=(),
    sealed="its encoder is convolutional (FastViT), so a token cannot leave out of its neighbours' reach",
)
