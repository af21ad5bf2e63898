"""DivPrune: the visual tokens that are farthest from each other.

"DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175, CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, Keep, Pruner, SelectView
from vtprune.select import max_min


@dataclass
class DivPrune(Pruner):
    """DivPrune (arXiv 2503.02175): greedy max-min diversity over the projected embeddings, without text or attention.

    Starts from the token whose nearest other token is farthest in cosine distance and adds the token farthest from all
    those kept. Chosen per image (the published code pools all tiles of a sample), so that a batch equals its images one
    at a time. All-zero tokens count as orthogonal to all others (ours).

    Parameters:
        keep: visual tokens per image (int) or share of them (float); 0.098 is the paper's main setting.
    Raises:
        BudgetError: for a budget without meaning.
    """

    keep: Budget = 0.098

    name = "divprune"
    paper = "DivPrune, arXiv 2503.02175 (CVPR 2025)"
    positions = "compact"

    def select(self, view: SelectView) -> Keep | None:
        k = view.target(self.keep)
        if k >= view.tokens:
            return None
        return Keep(max_min(view.features, k))
