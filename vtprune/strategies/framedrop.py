"""FrameDrop: whole frames, evenly spaced; the floor that every video strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, Keep, Pruner, SelectView
from vtprune.temporal import uniform_frames


@dataclass
class FrameDrop(Pruner):
    """Uniform frame dropping, between projector and decoder. Videos only.

    Parameters:
        keep: visual tokens per video (int) or share of them (float): whole frames, and evenly spaced tokens of one more for
            what is left (ours).
    Raises:
        UnsupportedError: for a picture.
    """

    keep: Budget = 0.25

    name = "framedrop"
    paper = "baseline"
    positions = "original"
    modality = "video"

    def select(self, view: SelectView) -> Keep | None:
        target = view.target(self.keep)
        if target >= view.tokens:
            return None
        frames, tokens = view.by_frame().shape[1:3]
        return Keep(uniform_frames(frames, tokens, target, view.index.device).expand(len(view.index), -1))
