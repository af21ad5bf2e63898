"""EVS: keep the tokens of a video that changed most since the frame before.

Efficient Video Sampling, as vLLM ships it (NVIDIA, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, Keep, Pruner, SelectView
from vtprune.temporal import evs


@dataclass
class EVS(Pruner):
    """Efficient Video Sampling: temporal redundancy of the projected embeddings, between projector and decoder.

    A token's score is 1 - cosine to the token at its place one frame before; the first frame stays whole. Videos only.

    Parameters:
        keep: visual tokens per video (int) or share of them (float); at least one frame's.
    Raises:
        BudgetError: for a budget below one frame's tokens.
        UnsupportedError: for a picture, which has no frame before.
    """

    keep: Budget = 0.25

    name = "evs"
    paper = "Efficient Video Sampling, NVIDIA in vLLM (2025)"
    positions = "original"
    modality = "video"

    def select(self, view: SelectView) -> Keep | None:
        target = view.target(self.keep)
        return None if target >= view.tokens else Keep(evs(view.by_frame(), target))
