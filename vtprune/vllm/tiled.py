"""LLaVA-NeXT and LLaVA-OneVision in vLLM with fewer visual tokens; strategies of the select stage.

A picture's features are those of the whole, then those of its tiles laid out row by row, each row ended by a separator
(`image_newline`); a video's come frame by frame with one separator at the end. As on transformers, separators are not
offered to a strategy and stay.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems, ProcessorBatchItems

from vtprune.pruner import Pruner
from vtprune.vllm.choosing import fresh, select, square
from vtprune.vllm.processing import TOKENS, PrunedProcessor
from vtprune.vllm.serving import Serving, Tower, factories
from vtprune.vllm.weights import published_names

serving = functools.partial(Serving.of, tower=functools.partial(Tower.of, tiled=True))


def separators(total: int, whole: int, rows: int, device: torch.device) -> Tensor:
    """Bool [total], which features end a row: none of the first `whole`, and the last of each of `rows` rows after them."""
    mark = torch.zeros(total, dtype=torch.bool, device=device)
    if rows:
        mark[whole:].view(rows, -1)[:, -1] = True
    return mark


class TiledProcessor(PrunedProcessor):
    """Tells the separators of a tiled picture's rows from its visual tokens."""

    def visual(self, full: int, items: ProcessorBatchItems, at: int) -> int:
        if not isinstance(items, ImageProcessorItems):
            return full - 1
        width, height = items.get_image_size(at)
        config, encoder = self.info.get_hf_config(), self.info.get_vision_encoder_info()
        tall, wide = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, encoder.get_image_size())
        # one separator for each row that the model leaves of the tiles
        _, rows = self.info._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=tall,
            num_patch_width=wide,
        )
        return full - rows


class PrunedNextProcessor(TiledProcessor, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's prompts with room for the pruned tokens."""


class PrunedOnevisionProcessor(TiledProcessor, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's prompts with room for the pruned tokens."""

    modalities = ("image", "video")


class Tiled:
    """In front of one of vLLM's tiled models; without vtprune settings it is vLLM's.

    Raises:
        VtpruneError: for settings that cannot be served.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtprune = serving(vllm_config.model_config)
        if self.vtprune is not None:
            # adapters of the projector are laid out by token counts that no longer hold
            self.supports_tower_connector_lora = False

    def embed_multimodal(self, **kwargs: object):
        """Features of an encoder batch, as many of each picture or video as its prompt has room for."""
        fields = kwargs.pop(TOKENS, None)
        packed = super().embed_multimodal(**kwargs)
        if self.vtprune is None or fields is None:
            return packed
        # videos of unequal length come with a dimension more
        packed = [features.flatten(0, -2) for features in packed]
        frames = [len(video) for video in kwargs["pixel_values_videos"]] if "pixel_values_videos" in kwargs else None
        whole = self.vtprune.tower.size
        marks = [
            separators(len(features), whole if frames is None else size, len(features) - size, features.device)
            for features, (_, size) in zip(packed, fields.tolist(), strict=True)
        ]
        places: list[Tensor] = [torch.empty(0)] * len(packed)

        def prune(pictures: list[int], size: int, pruner: Pruner | None) -> list[Tensor]:
            features = [packed[i][~marks[i]] for i in pictures]
            items = fresh(features)
            if pruner is None:
                chosen = features
            elif frames is None:
                chosen = select(pruner, features, items, [None] * len(items))
            else:
                lengths = [frames[i] for i in pictures]
                chosen = select(pruner, features, items, [square(size // length) for length in lengths], lengths)
            for i, item in zip(pictures, items, strict=True):
                places[i] = (~marks[i]).nonzero()[:, 0][item.index.sort().values]
            return chosen

        found = self.vtprune.batch(fields, prune)
        return [_joined(*parts) for parts in zip(packed, marks, places, found, strict=True)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(published_names(weights))


def _joined(packed: Tensor, mark: Tensor, places: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens at their places, with the separators between them."""
    stays = mark.clone()
    stays[places] = True
    return packed.index_copy(0, places, chosen)[stays]


@MULTIMODAL_REGISTRY.register_processor(
    **factories(LlavaNextForConditionalGeneration, PrunedNextProcessor, LlavaNextProcessingInfo, serving)
)
class PrunedLlavaNext(Tiled, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT."""


@MULTIMODAL_REGISTRY.register_processor(
    **factories(LlavaOnevisionForConditionalGeneration, PrunedOnevisionProcessor, LlavaOnevisionProcessingInfo, serving)
)
class PrunedLlavaOnevision(Tiled, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision."""
