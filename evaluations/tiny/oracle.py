"""An upper bound for selections: it knows where the objects are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vtprune import Keep, Pruner, SelectView


@dataclass
class Oracle(Pruner):
    """Keeps the visual tokens it is told matter, then fills up at random.

    Parameters:
        keep: visual tokens per image.
        wanted: for each image of the call, in order, the token numbers to keep first.
        seed: of the filling.
    """

    keep: int = 64
    wanted: list[list[int]] = field(default_factory=list)
    seed: int = 0

    name = "oracle"
    paper = "upper bound of this repository's picture world"

    def select(self, view: SelectView) -> Keep:
        if len(self.wanted) != view.index.shape[0]:
            raise ValueError(f"the oracle was told about {len(self.wanted)} images and sees {view.index.shape[0]}.")
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(len(self.wanted), view.tokens, generator=generator)
        for row, tokens in enumerate(self.wanted):
            score[row, torch.tensor(tokens, dtype=torch.long)] += 1.0
        return Keep(score.topk(view.target(self.keep), dim=1).indices.to(view.index.device))
