"""Serving: vtprune as a vLLM general plugin.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). It names pruned subclasses of
vLLM's own models in vLLM's model registry. Without settings they do exactly what vLLM's classes do; with

    vllm serve MODEL --hf-overrides '{"vtprune": {"pruner": "flowcut", "keep": 64}}'

pictures reach the decoder with 64 visual tokens each, chosen by the same strategy files as on transformers.
"""

from __future__ import annotations

# architecture in a checkpoint's config.json -> module:class, imported by vLLM when a model of it is served
MODELS = {
    "LlavaForConditionalGeneration": "vtprune.vllm.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "vtprune.vllm.tiled:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "vtprune.vllm.tiled:PrunedLlavaOnevision",
    "Qwen2VLForConditionalGeneration": "vtprune.vllm.qwen:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "vtprune.vllm.qwen:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "vtprune.vllm.qwen:PrunedQwen3VL",
}

# vLLM's own, but that they do not pass over vtprune settings in silence
REFUSED = (
    "LlavaNextVideoForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
)


def register() -> None:
    """Name the pruned models in vLLM's registry; may be called any number of times."""
    from vllm import ModelRegistry

    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, target)
    for architecture in REFUSED:
        ModelRegistry.register_model(architecture, f"vtprune.vllm.refused:{architecture}")
