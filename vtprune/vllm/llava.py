"""LLaVA-1.5 in vLLM with fewer visual tokens."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtprune.pruner import Pruner
from vtprune.vllm import tower
from vtprune.vllm.choosing import fresh, select, square
from vtprune.vllm.processing import TOKENS, PrunedProcessor
from vtprune.vllm.serving import Serving, factories
from vtprune.vllm.weights import published_names


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5's prompts with room for the pruned tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    **factories(LlavaForConditionalGeneration, PrunedLlavaProcessor, LlavaProcessingInfo, Serving.of)
)
class PrunedLlava(LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5; with vtprune settings its features are pruned, without them it is vLLM's.

    Raises:
        VtpruneError: for settings that cannot be served.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtprune = Serving.of(vllm_config.model_config)
        if self.vtprune is None:
            return
        # adapters of the tower are laid out by token counts that no longer hold
        self.supports_tower_connector_lora = False
        if self.vtprune.blocks:
            where = maybe_prefix(prefix, "vision_tower.vision_model")
            tower.add_blocks(self.vision_tower.vision_model, self.vtprune.blocks, where, vllm_config.quant_config)

    def embed_multimodal(self, **kwargs: object):
        """Features of an encoder batch, as many of each picture as its prompt has room for."""
        fields = kwargs.pop(TOKENS, None)
        if self.vtprune is None or fields is None:
            return super().embed_multimodal(**kwargs)
        pixels = self._parse_and_validate_image_input(**kwargs)["pixel_values"]

        def prune(pictures: list[int], size: int, pruner: Pruner | None) -> list[Tensor]:
            return self._features(pixels if len(pictures) == len(pixels) else pixels[pictures], pruner)

        return self.vtprune.batch(fields, prune)

    def _features(self, pixels: Tensor, pruner: Pruner | None) -> list[Tensor]:
        if self.vtprune.blocks:
            hidden, items = tower.run(self.vision_tower.vision_model, pruner, self.vtprune.tower.encoder, pixels)
            projected = self.multi_modal_projector(hidden)
            features = [row[: len(item.index)] for row, item in zip(projected, items, strict=True)]
        else:
            hidden = self._image_pixels_to_features(self.vision_tower, pixels)
            features = list(self.multi_modal_projector(hidden))
            items = fresh(features)
        if pruner is None:
            return features
        return select(pruner, features, items, [square(self.vtprune.tower.size)] * len(features))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(published_names(weights))
