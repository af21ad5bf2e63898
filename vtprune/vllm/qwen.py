"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM with fewer visual tokens; strategies of the select stage.

Tokens have positions on three axes, and what is left of a picture keeps its own. vLLM wants a prompt's positions before it
has seen a feature: text stands where it stands in the unpruned prompt, a picture's tokens all where the picture starts. How
far from there each survivor is travels in columns behind the features, the way of vLLM's own video pruning, and is added
where the model is run. vLLM's interface for such corrections (`SupportsMultiModalPruning`) is not used: it is on with
`--video-pruning-rate` alone, and never on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vtprune.pruner import Encoder, Pruner, UnsupportedError
from vtprune.vllm.choosing import fresh, select
from vtprune.vllm.positions import AXES, parted, written
from vtprune.vllm.processing import TOKENS, PrunedProcessor, settings_of
from vtprune.vllm.serving import Serving, Tower, factories

SEALED = "its vision tower merges patches two by two, so they cannot leave one by one"
FRAMES_APART = (
    "a video's frames stand apart in the prompt, with the time between them, and how many tokens each would keep is not known "
    "before the features are"
)


def tower(config: PretrainedConfig) -> Tower:
    """Read off a Qwen-VL configuration."""
    depth = config.vision_config.depth
    return Tower(None, Encoder(depth, depth, cls=False), SEALED)


serving = functools.partial(Serving.of, tower=tower)


class QwenProcessor(PrunedProcessor):
    """What the processors of the three share."""

    modalities = ("image", "video")


class PrunedQwen2Processor(QwenProcessor, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's prompts with room for the pruned tokens."""


class PrunedQwen25Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's prompts with room for the pruned tokens."""


class PrunedQwen3Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's prompts with room for the pruned tokens of pictures."""

    modalities = ("image",)


class Qwen3Info(Qwen3VLProcessingInfo):
    """vLLM's, but that a server that prunes takes no videos."""

    @property
    def _pruned(self) -> bool:
        return settings_of(self.ctx.model_config) is not None

    def get_supported_mm_limits(self):
        limits = dict(super().get_supported_mm_limits())
        return limits | {"video": 0} if self._pruned else limits

    def validate_num_items(self, modality: str, num_items: int) -> None:
        if modality == "video" and num_items > 0 and self._pruned:
            raise UnsupportedError(
                f"vtprune: Qwen3-VL's videos cannot be pruned in vLLM: {FRAMES_APART}. Send pictures, or serve the model "
                f"without vtprune settings (vLLM's own --video-pruning-rate prunes its videos)."
            )
        super().validate_num_items(modality, num_items)


class Qwen:
    """In front of one of vLLM's Qwen-VL models; without vtprune settings it is vLLM's.

    Raises:
        VtpruneError: for settings that cannot be served.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtprune = serving(vllm_config.model_config)
        if self.vtprune is None:
            return
        check_place(vllm_config)
        # adapters of the merger are laid out by token counts that no longer hold
        self.supports_tower_connector_lora = False
        # in place, as the model may run from a recorded graph; a column more keeps slices of it strided, which vLLM's
        # compiled layers expect of positions
        tokens = vllm_config.scheduler_config.max_num_batched_tokens + 1
        self.register_buffer("places", torch.zeros(AXES, tokens, dtype=torch.long), persistent=False)
        self.register_buffer("corrected", torch.zeros(AXES, tokens, dtype=torch.long), persistent=False)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions [3, N] of the unpruned prompt without what leaves, a pruned picture's all at its start."""
        if self.vtprune is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        tokens, features, stays, starts, end = [], [], [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            where, kept = feature.mm_position, feature.data.get(TOKENS)
            count, size = (where.length, where.length) if kept is None else kept.data.tolist()
            tokens += input_tokens[end : where.offset]
            stays += [True] * (where.offset - end + where.length) + [False] * (size - count)
            features.append(dataclasses.replace(feature, mm_position=PlaceholderRange(len(tokens), size, where.is_embed)))
            end = where.offset + where.length
            tokens += input_tokens[where.offset : end] + input_tokens[end - 1 : end] * (size - count)
            if kept is not None:
                starts.append(slice(where.offset, end))
        tokens += input_tokens[end:]
        stays += [True] * (len(input_tokens) - end)
        positions, delta = super().get_mrope_input_positions(tokens, features)
        positions = positions[:, torch.tensor(stays)]
        for picture in starts:
            # its first token is nowhere but at its start, and the first of those that stay here
            positions[:, picture] = positions[:, picture.start, None].clone()
        return positions, delta + len(tokens) - len(input_tokens)

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings=None, *, is_multimodal: Tensor | None = None) -> Tensor:
        if self.vtprune is not None:
            self.places.zero_()
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                multimodal_embeddings, places = parted(multimodal_embeddings)
                where = is_multimodal.nonzero()[:, 0].to(self.places.device)
                self.places.index_copy_(1, where, places.to(self.places.device))
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any):
        if self.vtprune is not None:
            tokens = positions.shape[-1]
            positions = torch.add(positions, self.places[:, :tokens], out=self.corrected[:, :tokens])
        return super().forward(input_ids, positions, *args, **kwargs)

    def embed_multimodal(self, **kwargs: object):
        """Features of an encoder batch, as many of each picture or video as its prompt has room for, and their positions."""
        fields = kwargs.pop(TOKENS, None)
        packed = super().embed_multimodal(**kwargs)
        if self.vtprune is None or not packed:
            return packed
        if fields is None:
            return [torch.cat([f, written(None, f)], dim=1) for f in packed]
        modality = "video" if "video_grid_thw" in kwargs else "image"
        sizes = kwargs[f"{modality}_grid_thw"].tolist()
        merge, width = self.visual.spatial_merge_size, self.config.text_config.hidden_size
        seconds = kwargs.get("second_per_grid_ts")
        seconds = [None] * len(sizes) if seconds is None else seconds
        places = [self._places(modality, grid, len(f), s) for grid, f, s in zip(sizes, packed, seconds, strict=True)]

        def prune(pictures: list[int], size: int, pruner: Pruner | None) -> list[Tensor]:
            features = [packed[i] for i in pictures]
            items, chosen = fresh(features), features
            if pruner is not None:
                grids = [(sizes[i][1] // merge, sizes[i][2] // merge) for i in pictures]
                frames = [sizes[i][0] for i in pictures]
                # Qwen3-VL's features for later layers follow a token's own, and go where it goes
                own = select(pruner, [f[:, :width] for f in features], items, grids, frames)
                chosen = [
                    torch.cat([mine, whole[item.index, width:]], dim=1)
                    for mine, whole, item in zip(own, features, items, strict=True)
                ]
            return [
                torch.cat([f, written(places[i][item.index.cpu()], f)], dim=1)
                for f, i, item in zip(chosen, pictures, items, strict=True)
            ]

        return self.vtprune.batch(fields, prune)

    def _places(self, modality: str, grid: list[int], size: int, seconds: Tensor | float | None) -> Tensor:
        """LongTensor [size, 3] of a picture or video at the start of a prompt, as vLLM counts them."""
        given = {f"{modality}_grid_thw": torch.tensor(grid)}
        if seconds is not None:
            given["second_per_grid_ts"] = torch.as_tensor(seconds)
        data = MultiModalKwargsItem({k: MultiModalFieldElem(v, MultiModalBatchedField()) for k, v in given.items()})
        feature = MultiModalFeatureSpec(data, modality, "", PlaceholderRange(0, size))
        positions, _ = super().get_mrope_input_positions([self.config.image_token_id] * size, [feature])
        return positions.T

    def get_encoder_cudagraph_config(self):
        config = super().get_encoder_cudagraph_config()
        # vLLM's graphs of the encoder go past `embed_multimodal`
        return config if self.vtprune is None else dataclasses.replace(config, modalities=[])


def check_place(vllm_config: VllmConfig) -> None:
    """Refuse what corrected positions do not reach.

    Raises:
        UnsupportedError: with the reason.
    """
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if vllm_config.model_config.multimodal_config.get_video_pruning_spec() is not None:
        raise UnsupportedError("vtprune: --video-pruning-rate and vtprune settings both prune videos. Give one of them.")
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedError(
            "vtprune: Qwen-VL cannot be pruned with pipeline parallelism: the positions of what is left of a picture are "
            "known to the first stage alone. Use --tensor-parallel-size."
        )
    if parallel.use_ubatching:
        raise UnsupportedError("vtprune: Qwen-VL cannot be pruned with --enable-dbo, which runs a batch in two parts.")
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
        raise UnsupportedError(
            f"vtprune: Qwen-VL cannot be pruned with a draft model ({speculative.method!r}), which knows nothing of positions "
            f"that are corrected later. Use none, or the method ngram."
        )


@MULTIMODAL_REGISTRY.register_processor(
    **factories(Qwen2VLForConditionalGeneration, PrunedQwen2Processor, Qwen2VLProcessingInfo, serving)
)
class PrunedQwen2VL(Qwen, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    **factories(Qwen2_5_VLForConditionalGeneration, PrunedQwen25Processor, Qwen2_5_VLProcessingInfo, serving)
)
class PrunedQwen25VL(Qwen, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    **factories(Qwen3VLForConditionalGeneration, PrunedQwen3Processor, Qwen3VLProcessingInfo, serving, Qwen3Info)
)
class PrunedQwen3VL(Qwen, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL; its videos are refused while pictures are pruned."""
