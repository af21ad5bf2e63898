"""Random: the floor that every selection has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.pruner import Budget, Keep, Pruner, SelectView


@dataclass
class Random(Pruner):
    """Seeded uniform choice without replacement, between projector and decoder.

    The draw depends on the seed, the image's token count and its place among its sample's images, on nothing else: an
    image gets the same tokens alone, in a batch, and in a later turn. Vary `seed` over a data set for a fair floor.

    Parameters:
        keep: visual tokens per image (int) or share of them (float).
        seed: any int.
    """

    keep: Budget = 0.5
    seed: int = 0

    name = "random"
    paper = "baseline"
    positions = "original"

    def select(self, view: SelectView) -> Keep:
        k = view.target(self.keep)
        draws = []
        for ordinal in view.ordinal.tolist():
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + ordinal) % 2**63)
            draws.append(torch.randperm(view.tokens, generator=generator)[: min(k, view.tokens)].sort().values)
        return Keep(torch.stack(draws).to(view.index.device))
