"""What the pruned models share: checks at start, and an encoder batch pruned group by group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, PretrainedConfig
from vllm.config import ModelConfig
from vllm.model_executor.models.utils import get_layer_index
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, InputProcessingContext

from vtprune.engine.stream import groups
from vtprune.pruner import Encoder, Pruner, UnsupportedError
from vtprune.vllm.choosing import rehearse
from vtprune.vllm.processing import PrunedProcessor, log_settings, settings_of, with_context
from vtprune.vllm.settings import Settings, check_count, check_encoder

REHEARSED = 1024  # visual tokens of the picture that a strategy is tried on where the model takes pictures of any size


@dataclass(frozen=True)
class Tower:
    """A model's vision tower.

    Parameters:
        size: visual tokens of the picture that it takes, or None where it takes pictures of any size.
        encoder: its blocks; why_not: why they cannot run one by one, or "".
    """

    size: int | None
    encoder: Encoder
    why_not: str = ""

    @classmethod
    def of(cls, config: PretrainedConfig, tiled: bool = False) -> Tower:
        """Read off a LLaVA-like configuration.

        Parameters:
            tiled: whether the model cuts pictures into tiles.
        Raises:
            UnsupportedError: where features are no grid of patches.
        """
        vision, layer, kept = config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy
        clip = isinstance(vision, CLIPVisionConfig)
        if kept != ("default" if clip else "full"):
            raise UnsupportedError(
                f"vtprune: vision_feature_select_strategy={kept!r} with a {vision.model_type!r} tower: the features are not "
                f"the patches alone, so tokens cannot be chosen among them."
            )
        size = (vision.image_size // vision.patch_size) ** 2
        why_not = ""
        if tiled:
            why_not = "how many of a tile's patches are left after it depends on what the model cuts off the picture's edges"
        elif not clip:
            why_not = f"vtprune runs CLIP towers block by block, and this is a {vision.model_type!r}"
        elif not isinstance(layer, int):
            why_not = f"the features come from several blocks (vision_feature_layer={layer!r})"
        depth = get_layer_index(layer, vision.num_hidden_layers) if isinstance(layer, int) else vision.num_hidden_layers
        return cls(size, Encoder(depth, vision.num_hidden_layers, cls=clip), why_not)


@dataclass(frozen=True)
class Serving:
    """A strategy on one model, checked.

    Parameters:
        settings, tower: as they are; blocks: of the tower that have to run one by one, 0 if the tower runs as a whole.
    """

    settings: Settings
    tower: Tower
    blocks: int

    @classmethod
    def of(cls, model_config: ModelConfig, tower: Callable[[PretrainedConfig], Tower] = Tower.of) -> Serving | None:
        """What the server was asked to do on this model; None: nothing.

        Parameters:
            tower: reads the model's vision tower off its configuration.
        Raises:
            VtpruneError: for what cannot be served, with the reason.
        """
        settings = settings_of(model_config)
        return None if settings is None else _serving(settings, tower(model_config.hf_config))

    def batch(self, fields: Tensor, prune: Callable[[list[int], int, Pruner | None], list[Tensor]]) -> list[Tensor]:
        """The visual features of an encoder batch: one call of `prune` for all pictures of one size and budget.

        Parameters:
            fields: LongTensor [B, 2], visual tokens of each picture (or video) that stay, and of how many.
            prune: (pictures, their size, strategy or None where everything stays) -> [k, D] of each.
        """
        counts: list[tuple[int, int]] = [tuple(row) for row in fields.tolist()]
        found: list[Tensor] = [torch.empty(0)] * len(counts)
        for group in groups(counts):
            count, size = counts[group[0]]
            pruner = None if count == size else self.settings.for_tokens(count, size)
            for i, features in zip(group, prune(group, size, pruner), strict=True):
                check_count(len(features), count, self.settings.pruner)
                found[i] = features
        return found


@functools.lru_cache(maxsize=8)
def _serving(settings: Settings, tower: Tower) -> Serving:
    pruner = settings.strategy()
    blocks = check_encoder(pruner, tower.encoder, tower.why_not)
    size = REHEARSED if tower.size is None else tower.size
    left = settings.tokens(size)
    if left < size:
        found = rehearse(pruner, size, tower.encoder if blocks else None, blocks)
        check_count(found.left, left, settings.pruner)
    log_settings(settings, tower.size)
    return Serving(settings, tower, blocks)


def factories(
    model: type,
    processor: type[PrunedProcessor],
    info: type[BaseProcessingInfo],
    serving: Callable[[ModelConfig], Any],
    inform: Callable[[InputProcessingContext], BaseProcessingInfo] | None = None,
) -> dict:
    """Arguments of vLLM's `register_processor` that put `processor` in front of what `model` uses.

    Parameters:
        info: of the family; a model of the class that has another is served by vLLM as ever, and never pruned.
        serving: gives the `Serving` of a model, or None.
        inform: makes the processing info, where it is not vLLM's.
    """
    theirs = model._processor_factory

    def build(found: BaseProcessingInfo, dummy_inputs) -> BaseMultiModalProcessor:
        if not isinstance(found, info):
            if settings_of(found.ctx.model_config) is not None:
                raise UnsupportedError(f"vtprune: {type(found).__name__} belongs to a model that is not served with pruning.")
            return theirs.processor(found, dummy_inputs)
        asked = serving(found.ctx.model_config)
        made = processor(found, dummy_inputs)
        made.settings = None if asked is None else asked.settings
        return made

    return {"processor": build, "info": with_context(inform or theirs.info), "dummy_inputs": theirs.dummy_inputs}
