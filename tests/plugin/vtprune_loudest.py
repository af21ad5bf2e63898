"""Loudest: keep the visual tokens of the largest norm. A strategy from outside vtprune, in full."""

from dataclasses import dataclass

from vtprune import Keep, Pruner, SelectView
from vtprune.select import top


@dataclass
class Loudest(Pruner):
    """Largest L2 norm after the projector.

    Parameters:
        keep: visual tokens per image (int) or share of them (float).
    """

    keep: int | float = 0.5

    name = "loudest"
    paper = "none, an example"

    def select(self, view: SelectView) -> Keep:
        return Keep(top(view.features.float().norm(dim=-1), view.target(self.keep)))
