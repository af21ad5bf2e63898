"""FastV: after decoder layer K, keep the visual tokens that the last prompt token attends to most.

"An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764, ECCV 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import (
    Budget,
    BudgetError,
    Keep,
    Needs,
    PrefillView,
    Pruner,
    asks_for_fewer,
    check_budget,
    tokens_after_cut,
)
from vtprune.select import top


@dataclass
class FastV(Pruner):
    """FastV (arXiv 2403.06764): one cut inside the decoder by the last prompt token's attention.

    The score of a visual token is the head-mean post-softmax attention that the last prompt token pays to it in layer
    `layer - 1`; the rest leave before layer `layer`. Survivors keep their positions.

    Parameters:
        keep: budget as the mean over decoder layers of visual tokens computed on; the layers before the cut count in
            full. An int is per image, a float a share.
        layer: first decoder layer (0-based) that runs without the dropped tokens; the paper's K, 2 in its main runs.
        after: visual tokens left after the cut (the paper's 1 - R as a float, or a count), in place of `keep`.
    Raises:
        BudgetError: if the layers before the cut alone exceed `keep`; if `layer` lies outside the decoder.
    """

    keep: Budget = 0.5
    layer: int = 2
    after: Budget | None = None

    name = "fastv"
    paper = "FastV, arXiv 2403.06764 (ECCV 2024)"
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after is not None:
            self.after = check_budget(self.after, "after", per_image=True)

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        if self.after is None:
            return super().asks_to_prune(sizes)
        return asks_for_fewer(self.after, sizes)

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        if not 1 <= self.layer < depth:
            raise BudgetError(f"layer={self.layer}: the cut needs a layer before it, so 1 <= layer < {depth} here.")
        return {self.layer: Needs(queries="last")}

    def prefill(self, view: PrefillView) -> Keep:
        if self.after is None:
            k = tokens_after_cut(view.target(self.keep), view.tokens, view.layer, view.depth)
        else:
            k = min(view.tokens, view.target(self.after))
        return Keep(top(view.rows.attention().mean((1, 2)), k))
