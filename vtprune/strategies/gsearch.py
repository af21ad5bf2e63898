"""G-Search: a keep rate for every decoder layer, searched offline, greedily from shallow to deep.

"Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction", arXiv 2412.00556, CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vtprune.fitted import Scheduled
from vtprune.ladder import cut_layers, spend
from vtprune.pruner import Budget, BudgetError, Keep, Model, Needs, PrefillView, UnsupportedError
from vtprune.select import row_mean, top


@lru_cache(maxsize=4096)
def searched_counts(rates: tuple[float, ...], cuts: tuple[int, ...], exact: bool, target: int | None, tokens: int):
    """Counts per decoder layer: the rates of `tokens` (`target` None), or scaled by one factor to the mean `target`.

    Parameters:
        cuts: layers that may cut; exact: whether those are all layers where the rates fall.
    """
    depth = len(rates)
    counts = tuple(max(1, round(rate * tokens)) for rate in rates)
    if target is None and (exact or counts[-1] == tokens):
        return counts
    total = sum(counts) if target is None else target * depth
    # with a factor of tokens / min(rates) every layer keeps all
    return spend(lambda x: [x * rate for rate in rates], cuts, total, tokens, depth, 0.0, tokens / rates[-1])


@dataclass
class GSearch(Scheduled):
    """G-Search (arXiv 2412.00556): layer i goes on with the rates[i] * N tokens that layer i - 1 attended to most.

    N is what entered the decoder. Survivors keep their positions. Counts are round(rate * N), at least 1, never rising.
    Which queries and heads the paper scores with was not to be had: `query_scope` is ours. With no text after the image,
    or a flat or NaN score, the first tokens stay.

    Parameters:
        rates: keep rate of every decoder layer in 0 .. 1, non-increasing; 0 leaves one token.
        schedule: path of a file from `vtprune search gsearch`, in place of `rates`.
        keep: None applies the rates as searched. A budget (ours) scales them by one factor, clipped at 1, so that the
            mean over decoder layers of visual tokens computed on is `keep`.
        query_scope: "text", the mean over heads and over all text tokens after the first visual one, or "last", the last
            prompt token (FastV's score).
        max_cuts: ours, a staircase of at most so many cuts, the nearest in squared error, stands for the rates, as few
            large cuts are faster than many small ones; the mean over layers stays. None: the rates as they are.
        min_layer: first layer whose input may be cut (layer 1's ranking is what the paper finds unreliable); rates before
            it count as 1. None: the schedule's, or 2 (ours).
        fitted: the model that `schedule` was searched on; read from the file.
    The mean is exact where the stairs' lengths allow it, as they do if rates fall at every layer and `max_cuts=None`; else
    it is at most half a token off, with six cuts seldom more than a tenth.
    Raises:
        BudgetError: without rates; for rates that rise, lie outside 0 .. 1 or are not one per layer; for a `keep` below
            what the layers before `min_layer` cost. UnsupportedError: on a model other than the schedule's.
    """

    rates: tuple[float, ...] | None = None
    schedule: str | None = None
    keep: Budget | None = None
    query_scope: str = "text"
    max_cuts: int | None = 6
    min_layer: int | None = None
    fitted: Model | None = field(default=None, repr=False)

    name = "gsearch"
    paper = "G-Search, arXiv 2412.00556 (CVPR 2025)"
    positions = "original"

    def __post_init__(self) -> None:
        values, given = self.read_schedule(), self.rates
        self.take(values, min_layer=2)
        super().__post_init__()
        self.rates = values.get("rates", given)
        if self.rates is None:
            return
        self.rates = tuple(float(rate) for rate in self.rates)
        if given is not None and tuple(map(float, given)) != self.rates:
            raise BudgetError(f"rates and schedule={self.schedule!r} differ: give one of them.")
        if not self.rates or not all(0.0 <= rate <= 1.0 for rate in self.rates):
            raise BudgetError(f"rates={self.rates}: give one share in 0 .. 1 per decoder layer.")
        if any(later > rate for rate, later in zip(self.rates, self.rates[1:], strict=False)):
            raise BudgetError(f"rates={self.rates}: they must not rise, as a dropped token does not come back.")

    def _rates(self) -> tuple[float, ...]:
        """The rates in force: those before `min_layer` are 1."""
        if self.rates is None:
            raise BudgetError(
                "gsearch has no keep rates: give schedule=PATH or rates=(...), one per decoder layer. "
                "`vtprune search gsearch` makes a schedule for a model."
            )
        # above zero, as one token stays and a factor has to have something to scale
        return (1.0,) * min(self.min_layer, len(self.rates)) + tuple(max(r, 1e-9) for r in self.rates[self.min_layer :])

    def _cuts(self, depth: int) -> tuple[tuple[int, ...], bool]:
        """The layers that may cut, and whether they are all those where the rates fall."""
        rates = self._rates()
        if len(rates) != depth:
            raise BudgetError(f"rates has {len(rates)} entries, this decoder {depth} layers: give one rate per layer.")
        self.check_fields(integer=True, min_layer=f"[1, {depth - 1}]", why=" for this decoder")
        # scaled down, the rates fall at min_layer already
        first = self.min_layer if self.keep is not None else next((i for i, rate in enumerate(rates) if rate < 1.0), depth)
        falls = cut_layers(rates, None, first)
        cuts = cut_layers(rates, self.max_cuts, first)
        return cuts, cuts == falls

    @classmethod
    def trial(cls, depth: int) -> GSearch:
        return cls(rates=(1.0,) * min(2, depth) + (0.5,) * max(0, depth - 2))

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        if self.rates is not None and len(self.rates) != model.depth:
            raise UnsupportedError(f"rates has {len(self.rates)} entries, {model.name!r} {model.depth} decoder layers.")

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        last = self._rates()[-1]
        if self.keep is not None:
            return super().asks_to_prune(sizes)
        return any(max(1, round(last * n)) < n for n in sizes)

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        return dict.fromkeys(self._cuts(depth)[0], Needs(queries=self.query_scope))

    def prefill(self, view: PrefillView) -> Keep | None:
        entered = view.computed[0]
        target = None if self.keep is None else view.target(self.keep)
        if target is not None and target >= entered:
            return None
        k = searched_counts(self._rates(), *self._cuts(view.depth), target, entered)[view.layer]
        return None if k >= view.tokens else Keep(top(row_mean(view.rows), k))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rates": self.rates and list(self.rates)}
