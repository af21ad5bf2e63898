"""P-Sigmoid: keep rates that fall over the decoder along a sigmoid, for a given budget.

"Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction", arXiv 2412.00556, CVPR 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

from vtprune.fitted import Scheduled
from vtprune.ladder import cut_layers, rising_root, spend
from vtprune.pruner import Budget, Keep, Model, Needs, PrefillView, budget_counts
from vtprune.select import row_mean, top


def sigmoid_curve(steepness: float, alpha: float, depth: int) -> list[float]:
    """Keep rates 1 / (1 + exp(k * (i - alpha))) of the layers i = 0 .. depth - 1."""
    # as tanh, which does not overflow
    return [0.5 - 0.5 * math.tanh(0.5 * steepness * (layer - alpha)) for layer in range(depth)]


@lru_cache(maxsize=4096)
def midpoint(steepness: float, share: float, depth: int, min_layer: int) -> float:
    """The alpha at which the mean rate is `share`, with the layers before `min_layer` at 1.

    A share that those layers alone exceed gives the least alpha, at which next to nothing follows them.
    """
    reach = 60.0 / steepness

    def spent(alpha: float) -> float:
        return min_layer + math.fsum(sigmoid_curve(steepness, alpha, depth)[min_layer:])

    return rising_root(spent, share * depth, -reach, depth + reach)


@lru_cache(maxsize=4096)
def sigmoid_cuts(steepness: float, share: float, depth: int, min_layer: int, max_cuts: int | None) -> tuple[int, ...]:
    """The layers before which a staircase nearest to the sigmoid cuts."""
    alpha = midpoint(steepness, share, depth, min_layer)
    return cut_layers((1.0,) * min_layer + tuple(sigmoid_curve(steepness, alpha, depth)[min_layer:]), max_cuts, min_layer)


@lru_cache(maxsize=4096)
def sigmoid_counts(steepness: float, cuts: tuple[int, ...], target: int, tokens: int, depth: int) -> tuple[int, ...]:
    """Counts per decoder layer along the sigmoid whose mean is `target`."""

    def curve(alpha: float) -> list[float]:
        return [tokens * rate for rate in sigmoid_curve(steepness, alpha, depth)]

    reach = (60.0 + math.log(tokens)) / steepness
    return spend(curve, cuts, target * depth, tokens, depth, -reach, depth + reach)


@dataclass
class PSigmoid(Scheduled):
    """P-Sigmoid (arXiv 2412.00556): layer i keeps the share 1 / (1 + exp(k (i - alpha))) that layer i - 1 attends to most.

    The midpoint alpha follows from the budget: the mean over layers is `keep`, which leaves the steepness k to be
    searched. That reading, the sign of k and `query_scope` are ours, as the paper's own text was not to be had. Survivors
    keep their positions. With no text after the image, or a flat or NaN score, the first tokens stay.

    Parameters:
        keep: budget as the mean over decoder layers of visual tokens computed on; an int is per image, a float a share.
            None: the schedule's, or 0.5.
        steepness: k per layer, in (0, 100]. None: the schedule's, or 0.5 (ours).
        schedule: path of a file from `vtprune search psigmoid`; a field that is given wins over the file's.
        query_scope, max_cuts, fitted: as in `GSearch`.
        min_layer: first layer whose input may be cut; the layers before it keep all, and alpha makes up for them. None:
            the schedule's, or 2 (ours).
    The mean is exact with `max_cuts=None`; with fewer cuts it is exact where the stairs' lengths allow it, else at most
    half a token off, with six cuts seldom more than a tenth.
    Raises:
        BudgetError: for a `keep` below what the layers before `min_layer` cost (the message has the least that works);
            for fields without meaning. UnsupportedError: on a model other than the schedule's.
    """

    keep: Budget | None = None
    steepness: float | None = None
    schedule: str | None = None
    query_scope: str = "text"
    max_cuts: int | None = 6
    min_layer: int | None = None
    fitted: Model | None = field(default=None, repr=False)

    name = "psigmoid"
    paper = "P-Sigmoid, arXiv 2412.00556 (CVPR 2025)"
    positions = "original"

    def __post_init__(self) -> None:
        values = self.read_schedule()
        self.take(values, keep=0.5, steepness=0.5, min_layer=2)
        super().__post_init__()
        self.check_fields(steepness="(0, 100]", why=", where the curve falls")
        self.steepness = float(self.steepness)

    def _cuts(self, share: float, depth: int) -> tuple[int, ...]:
        return sigmoid_cuts(self.steepness, share, depth, self.min_layer, self.max_cuts)

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        self.check_fields(integer=True, min_layer=f"[1, {depth - 1}]", why=" for this decoder")
        return dict.fromkeys(range(self.min_layer, depth), Needs(queries=self.query_scope))

    def prefill_at(self, depth: int, sizes: tuple[int, ...], entered: int) -> tuple[int, ...]:
        target = sum(budget_counts(self.keep, sizes))
        return () if target >= entered else self._cuts(target / entered, depth)

    def prefill(self, view: PrefillView) -> Keep | None:
        entered, target = view.computed[0], view.target(self.keep)
        if target >= entered:
            return None
        cuts = self._cuts(target / entered, view.depth)
        k = sigmoid_counts(self.steepness, cuts, target, entered, view.depth)[view.layer]
        return None if k >= view.tokens else Keep(top(row_mean(view.rows), k))
