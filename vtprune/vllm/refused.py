"""Models that vtprune prunes on transformers and not in vLLM: vLLM's own, which refuse vtprune settings with the reason."""

from __future__ import annotations

import functools
import importlib

from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtprune.pruner import UnsupportedError
from vtprune.vllm.processing import settings_of, with_context

OTHER = "how vLLM lays out its pictures is not known to vtprune"

# architecture -> (vLLM's module, its class there, why not)
REASONS = {
    "LlavaNextVideoForConditionalGeneration": ("llava_next_video", "LlavaNextVideoForConditionalGeneration", OTHER),
    "InternVLForConditionalGeneration": ("interns1", "InternS1ForConditionalGeneration", OTHER),
    "Mistral3ForConditionalGeneration": ("mistral3", "Mistral3ForConditionalGeneration", OTHER),
}


def check(name: str, model_config: ModelConfig) -> None:
    """Refuse vtprune settings on a model of architecture `name`.

    Raises:
        UnsupportedError: if there are any; says why.
    """
    if settings_of(model_config) is not None:
        raise UnsupportedError(
            f"vtprune: {name} cannot be served with pruning yet: {REASONS[name][-1]}. Serve it without vtprune settings, or "
            f"use vtprune on transformers."
        )


@functools.cache
def _refusing(name: str) -> type:
    module, found, _ = REASONS[name]
    theirs = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), found)
    registered = theirs._processor_factory

    def build(info, dummy_inputs):
        check(name, info.ctx.model_config)
        return registered.processor(info, dummy_inputs)

    register = MULTIMODAL_REGISTRY.register_processor(
        build, info=with_context(registered.info), dummy_inputs=registered.dummy_inputs
    )
    return register(type(name, (theirs,), {"__doc__": f"vLLM's {name}; refuses vtprune settings."}))


def __getattr__(name: str) -> type:
    # vLLM asks for the class of the model that is served; the others' modules are not imported
    if name not in REASONS:
        raise AttributeError(name)
    return _refusing(name)
