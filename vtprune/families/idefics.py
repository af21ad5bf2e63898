"""Idefics3 and SmolVLM: tiles as pictures of their own with text between them, pixel shuffle before the decoder.

SmolVLM's videos are frames that go in as pictures; each is an image of its own.
"""

from __future__ import annotations

from dataclasses import replace

from vtprune.families.base import Family
from vtprune.families.tiles import marked

IDEFICS3 = Family(
    name="Idefics3",
    base_classes=("Idefics3Model",),
    encoder_layers=("vision_model.encoder.layers",),
    projector=("connector",),
    decoder=("text_model",),
    special_tokens=(),
    runs=marked,
    tile_tokens=lambda base: base.image_seq_len,
    sealed="its connector joins neighbouring patches (pixel shuffle), so they cannot leave one by one",
    # by default, some versions have a padding token beyond the text model's vocabulary
    example={"text_config": {"model_type": "llama", "pad_token_id": 0}},
)
SMOL_VLM = replace(IDEFICS3, name="SmolVLM", base_classes=("SmolVLMModel",))
