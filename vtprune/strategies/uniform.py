"""Uniform: evenly spaced tokens of the raster, the floor without luck."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, Keep, Pruner, SelectView
from vtprune.select import spread


@dataclass
class Uniform(Pruner):
    """Every (N / k)-th visual token in raster order, between projector and decoder.

    Parameters:
        keep: visual tokens per image (int) or share of them (float).
    """

    keep: Budget = 0.5

    name = "uniform"
    paper = "baseline"
    positions = "original"

    def select(self, view: SelectView) -> Keep:
        index = spread(view.tokens, min(view.tokens, view.target(self.keep)), view.index.device)
        return Keep(index.expand(view.index.shape[0], -1))
