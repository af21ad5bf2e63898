"""Gemma 3 and PaliGemma: SigLIP patches, a Gemma decoder whose tokens partly see each other in both directions.

Tokens of one picture do in Gemma 3, the whole prompt does in PaliGemma. Gemma 3 and PaliGemma 2 alternate layers with a
sliding window and without; their masks are read off the model (engine/masks.py).
"""

from __future__ import annotations

from vtprune.families.base import Family

GEMMA3 = Family(
    name="Gemma 3",
    base_classes=("Gemma3Model",),
    special_tokens=(),
    sealed="its projector pools squares of patches (4 x 4 of them) into one token each, so they cannot leave one by one",
)
PALIGEMMA = Family(name="PaliGemma", base_classes=("PaliGemmaModel",), prepares_masks=True)
