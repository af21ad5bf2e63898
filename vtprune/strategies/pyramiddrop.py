"""PyramidDrop: shed visual tokens in stages, by the attention that the next block would pay them.

"PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv 2410.17247,
CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vtprune.ladder import spend
from vtprune.pruner import Budget, BudgetError, Keep, Needs, PrefillView, Pruner, check_budget
from vtprune.select import top

RATIOS = (0.5, 0.25, 0.125)  # the paper's, of the tokens that entered the decoder


@lru_cache(maxsize=4096)
def geometric(cuts: tuple[int, ...], target: int, tokens: int, depth: int) -> tuple[int, ...]:
    """Counts per decoder layer that fall by one factor at every cut and whose mean is `target`."""
    stage = [sum(layer >= cut for cut in cuts) for layer in range(depth)]
    return spend(lambda rho: [tokens * rho**s for s in stage], cuts, target * depth, tokens, depth, 0.0, 1.0)


@dataclass
class PyramidDrop(Pruner):
    """PyramidDrop (arXiv 2410.17247): three cuts at a quarter, a half and three quarters of the decoder.

    The score of a visual token is the head-mean post-softmax attention of the last prompt token under the queries and
    keys of the layer that is about to run, computed on its input. The published "after layer 8, 16, 24" counts layers
    from one: with 32 layers the cuts are before the 0-based layers 8, 16 and 24. Survivors are renumbered after each cut.
    A score that is flat, zero or NaN throughout keeps the first tokens.

    Parameters:
        keep: budget as the mean over decoder layers of visual tokens computed on; an int is per image, a float a share.
            Ours: the counts fall by one factor at every cut (the paper's 0.5), solved for and made whole. The mean is
            exact if all stages are equally long, else at most half a token off. None: `ratios`.
        ratios: in place of `keep`, the share after each cut of the tokens that entered the decoder, rounded down. With
            neither, the paper's (0.5, 0.25, 0.125), which spends 0.469 on the mean.
        layers: first 0-based layers without the dropped tokens, as ints, or as shares of the decoder (ours for other
            depths than 32). Shares that fall on one layer make one cut, with the last one's ratio.
    Raises:
        BudgetError: if the layers before the first cut alone exceed `keep` (the message has the least that works); if a
            layer lies outside the decoder; for ratios that rise or are not one per layer.
    """

    keep: Budget | None = None
    ratios: tuple[float, ...] | None = None
    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)

    name = "pyramiddrop"
    paper = "PyramidDrop, arXiv 2410.17247 (CVPR 2025)"
    positions = "compact"

    def __post_init__(self) -> None:
        if self.keep is not None:
            self.keep = check_budget(self.keep, per_image=True)
        self.layers = tuple(self.layers)
        ints = all(type(layer) is int and layer >= 1 for layer in self.layers)
        shares = all(type(layer) is float and 0.0 < layer < 1.0 for layer in self.layers)
        if not self.layers or not (ints or shares) or list(self.layers) != sorted(set(self.layers)):
            raise BudgetError(f"layers={self.layers}: give rising ints from 1 on, or rising shares of the decoder in (0, 1).")
        if self.ratios is not None:
            self.ratios = tuple(float(ratio) for ratio in self.ratios)
        ratios = self._ratios()
        if ratios is None:
            return
        falling = all(0.0 < ratio <= 1.0 for ratio in ratios) and list(ratios) == sorted(ratios, reverse=True)
        if not falling or len(ratios) != len(self.layers):
            raise BudgetError(
                f"ratios={ratios}: give one share in (0, 1] for each of layers={self.layers}, none above the one before."
            )

    def _ratios(self) -> tuple[float, ...] | None:
        """What stands in place of `keep`, if anything does."""
        return self.ratios if self.ratios is not None else RATIOS if self.keep is None else None

    def _cuts(self, depth: int) -> list[int]:
        """The layer of each cut, in the order of `layers`; small decoders may have equal ones."""
        # the epsilon keeps shares such as 0.29 of 100 layers from falling one short
        cuts = [layer if isinstance(layer, int) else max(1, int(layer * depth + 1e-9)) for layer in self.layers]
        if cuts[-1] >= depth:
            raise BudgetError(f"layers={self.layers}: cuts must come before layers 1 .. {depth - 1} of this decoder.")
        return cuts

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        ratios = self._ratios()
        if ratios is None:
            return super().asks_to_prune(sizes)
        return any(max(1, int(ratios[-1] * n)) < n for n in sizes)

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        return {cut: Needs(queries="last", ahead=True) for cut in self._cuts(depth)}

    def prefill(self, view: PrefillView) -> Keep | None:
        cuts, entered, ratios = self._cuts(view.depth), view.computed[0], self._ratios()
        if ratios is not None:
            k = max(1, int(dict(zip(cuts, ratios, strict=True))[view.layer] * entered))
        else:
            target = view.target(self.keep)
            if target >= entered:
                return None
            k = geometric(tuple(sorted(set(cuts))), target, entered, view.depth)[view.layer]
        if k >= view.tokens:
            return None
        return Keep(top(view.rows.attention().mean((1, 2)), k))
