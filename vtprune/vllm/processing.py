"""Prompts with room for the pruned tokens: what the pruned models' multimodal processors share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)

from vtprune.pruner import UnsupportedError
from vtprune.vllm.settings import KEY, Settings

logger = init_logger("vllm.vtprune")  # below vLLM's own, so that its handlers and levels hold

TOKENS = "vtprune_tokens"  # the field that tells the model how many visual tokens of each picture stay, and of how many


def settings_of(model_config: ModelConfig) -> Settings | None:
    """What the server was asked to do, from `--hf-overrides` and over it `--mm-processor-kwargs`; None: nothing.

    Raises:
        VtpruneError: for settings that cannot be served.
    """
    given: Any = getattr(model_config.hf_config, KEY, None)
    multimodal = model_config.multimodal_config
    over = None if multimodal is None else (multimodal.mm_processor_kwargs or {}).get(KEY)
    if isinstance(given, Mapping) and isinstance(over, Mapping):
        given = {**given, **over}
    elif over is not None:
        given = over
    return Settings.read(given)


@dataclasses.dataclass(frozen=True)
class Context(InputProcessingContext):
    """vLLM's context, which hands transformers' processor everything but vtprune's settings."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **options: Any) -> dict[str, Any]:
        merged = super().get_merged_mm_kwargs(kwargs, **options)
        merged.pop(KEY, None)
        return merged


def with_context(build: Callable[[InputProcessingContext], BaseProcessingInfo]):
    """A factory of vLLM's processing info, made to hide vtprune's settings from transformers' processor."""

    def build_info(ctx: InputProcessingContext) -> BaseProcessingInfo:
        return build(Context(ctx.model_config, ctx.tokenizer))

    return build_info


class PrunedProcessor(BaseMultiModalProcessor):
    """In front of one of vLLM's processors: pictures and videos get as many placeholders as tokens will be left of them."""

    settings: Settings | None = None
    # what is pruned of them: "image", "video"
    modalities: tuple[str, ...] = ("image",)

    def visual(self, full: int, items: ProcessorBatchItems, at: int) -> int:
        """Visual tokens among the `full` placeholders of an unpruned picture or video `items[at]`; the others separate."""
        return full

    def _budget(self, hf_processor_mm_kwargs: Mapping[str, object]):
        given = hf_processor_mm_kwargs.get(KEY)
        if self.settings is not None:
            return self.settings.requested(given)
        if given is not None:
            raise UnsupportedError(
                "vtprune: this server was started without a strategy, so a request cannot ask for pruning. Start it with "
                '--hf-overrides \'{"vtprune": {"pruner": "flowcut", "keep": 64}}\'.'
            )
        return None

    def _get_mm_hashes(self, inputs: ProcessorInputs):
        budget = self._budget(inputs.hf_processor_mm_kwargs)
        if self.settings is None:
            return super()._get_mm_hashes(inputs)
        named = {**inputs.hf_processor_mm_kwargs, KEY: self.settings.cache_key(budget)}
        return super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs=named))

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        budget = self._budget(hf_processor_mm_kwargs)
        return updates if self.settings is None else [self._shrunk(u, mm_items, budget, out_mm_kwargs) for u in updates]

    def _shrunk(self, update: PromptUpdate, mm_items: MultiModalDataItems, budget, out_mm_kwargs: MultiModalKwargsItems):
        items = mm_items.get(update.modality)
        # features that a user computed elsewhere are left as they are
        if update.modality not in self.modalities or not isinstance(items, ProcessorBatchItems):
            return update
        if not isinstance(update, PromptReplacement):
            raise UnsupportedError(
                f"vtprune: {type(self).__name__} lays out {update.modality}s in a way that is not known here."
            )
        fields, contents = [], []
        for at in range(len(items)):
            full = update.resolve(at).content.full
            if len(set(full)) != 1:
                raise UnsupportedError(
                    f"vtprune: {type(self).__name__} lays out {update.modality}s in a way that is not known here."
                )
            visual = self.visual(len(full), items, at)
            count = self.settings.tokens(visual, budget)
            fields.append((count, visual))
            contents.append(full[: len(full) - visual + count])
        # the model reads them here, so prompt and features agree by construction
        for item, field in zip(out_mm_kwargs[update.modality], fields, strict=True):
            item[TOKENS] = MultiModalFieldElem(torch.tensor(field), MultiModalBatchedField(keep_on_cpu=True))
        return dataclasses.replace(update, replacement=contents.__getitem__)


def log_settings(settings: Settings, size: int | None) -> None:
    """Say at start what the server will do to a picture of `size` visual tokens, or of any number."""
    if size is None:
        what = f"{settings.keep:g} of the" if isinstance(settings.keep, float) else f"at most {settings.keep}"
        logger.info("vtprune: %s leaves %s visual tokens of a picture or video.", settings.pruner, what)
        return
    left = settings.tokens(size)
    if left == size:
        logger.warning(
            "vtprune: keep=%s asks for no fewer than the %d visual tokens of a picture: nothing will be pruned.",
            settings.keep,
            size,
        )
    else:
        logger.info("vtprune: %s leaves %d of %d visual tokens of a picture.", settings.pruner, left, size)
