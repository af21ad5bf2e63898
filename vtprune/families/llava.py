"""LLaVA-1.5 and models of its class: CLIP (or SigLIP) patches in raster order, MLP projector, Llama-like decoder."""

from vtprune.families.base import Family

LLAVA = Family(name="LLaVA", base_classes=("LlavaModel",))
