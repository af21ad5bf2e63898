"""SparseVLM: visual tokens rated by the text tokens that look at the image, with what was cut recycled as clusters.

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417, ICML 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from vtprune.ladder import check_layers, spend
from vtprune.merge import cluster_means, dpc_knn
from vtprune.pruner import Budget, BudgetError, Inputs, Keep, Needs, PrefillView, Pruner, budget_tokens, check_budget
from vtprune.select import at, ranked, row_mean, top

# the published tokens kept of 576 at each cut, by the budget that they are quoted for; clusters come on top
PUBLISHED: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
)


def raters(inputs: Inputs, valid: Tensor) -> Tensor:
    """[B, R] bool, the text tokens that match the image better than the mean text token does.

    The match is the mean over visual tokens of a softmax over text tokens of their embeddings' dot products. Ours: above
    the mean by 1e-5 of it, so that rounding does not choose among equals; if none is, every text token is a rater.

    Parameters:
        inputs: embeddings at the decoder's input; valid: [B, R] bool.
    """
    match = inputs.visual.float() @ inputs.text.float().transpose(1, 2)
    # a sample without text has a row of -inf throughout, whose softmax is NaN
    match = match.masked_fill(~valid[:, None], float("-inf")).softmax(-1).mean(1).nan_to_num(0.0)
    mean = match.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    chosen = valid & (match > mean * (1 + 1e-5))
    return torch.where(chosen.any(-1, keepdim=True), chosen, valid)


@lru_cache(maxsize=4096)
def scaled_counts(cuts: tuple[int, ...], target: int, tokens: int, depth: int) -> tuple[int, ...]:
    """Counts per decoder layer with the mean `target`: the published list of the nearest budget, scaled by one factor."""
    label = min(PUBLISHED, key=lambda label: abs(math.log(target / tokens) - math.log(label / 576)))
    published = PUBLISHED[label][-len(cuts) :]
    stage = [sum(layer >= cut for cut in cuts) - 1 for layer in range(depth)]
    # the layers before the first cut, stage -1, keep all whatever stands here
    return spend(
        lambda x: [x * published[max(s, 0)] for s in stage], cuts, target * depth, tokens, depth, 0.0, tokens / published[-1]
    )


@dataclass
class SparseVLM(Pruner):
    """SparseVLM v1.5 (arXiv 2410.04417): three cuts by the raters' attention, with token recycling.

    Raters are chosen once, on the decoder's input, among the text tokens after the first visual token. At each cut the
    tokens with the highest head- and rater-mean attention stay in order; of the dropped, the best `tau` are clustered
    on their hidden states and the cluster means follow the kept tokens, each in the slot of its cluster's centre.
    Survivors are renumbered. The paper's rule for counts from the rank of the attention is not used; neither is it in its
    public code, which has lists. With no text after the image, or a flat or NaN score, the first tokens stay.

    Parameters:
        keep: budget as the mean over decoder layers of visual tokens computed on, recycled ones included; an int is per
            image, a float a share. Ours: the counts of the nearest published list are scaled by one factor and made
            whole, so that the mean is `keep` (where the stages' lengths allow no sum that is, at most half a token off);
            clusters are at most half of a cut's tokens.
        counts: in place of `keep`, tokens kept at each cut, clusters on top, e.g. `PUBLISHED[64]` = (66, 30, 17) with 576
            tokens; ints per image, or shares.
        layers: 0-based layers after which to cut, of a decoder of 32; scaled to others as layer * depth // 32 (ours), where
            those that fall together make one cut, with the last one's count.
        recycle: False just drops.
        tau: share of the dropped tokens that are clustered, plus one token; theta: clusters per clustered token, plus one.
    Raises:
        BudgetError: if the layers before the first cut alone exceed `keep` (the message has the least that works); for
            fields without meaning; for a decoder that has no layer after the first cut.
    """

    keep: Budget = 1 / 3
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int, ...] = (2, 6, 15)
    recycle: bool = True
    tau: float = 0.3
    theta: float = 0.1

    name = "sparsevlm"
    paper = "SparseVLM, arXiv 2410.04417 (ICML 2025)"
    positions = "compact"
    reads = ("text embeddings",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = check_layers(self.layers, 31)
        if len(self.layers) > 3:
            raise BudgetError(f"layers={self.layers}: give one to three; the published lists have three counts.")
        if self.counts is not None:
            self.counts = tuple(check_budget(count, "counts") for count in self.counts)
            if len(self.counts) != len(self.layers):
                raise BudgetError(f"counts={self.counts}: give one for each of layers={self.layers}.")
        self.check_fields(tau="[0, 1]", theta="[0, 1]")

    def _clusters(self, dropped: int) -> int:
        """Clusters that so many dropped tokens make."""
        return min(dropped, int(self._recycled(dropped) * self.theta) + 1) if self.recycle and dropped else 0

    def _recycled(self, dropped: int) -> int:
        return min(dropped, int(dropped * self.tau) + 1)

    def _split(self, target: int, tokens: int) -> int:
        """Tokens to keep so that they and their clusters are `target`."""
        kept = target
        # one token more kept is at most one cluster less, so the sum passes over no number
        while kept > target - target // 2 and kept + self._clusters(tokens - kept) > target:
            kept -= 1
        return kept

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        if self.counts is None:
            return super().asks_to_prune(sizes)
        kept = [(budget_tokens(count, n), n) for count in self.counts for n in sizes]
        return any(k + self._clusters(n - k) < n for k, n in kept)

    def _cuts(self, depth: int) -> list[int]:
        """The layer before which each cut comes, in the order of `layers`; small decoders may have equal ones."""
        cuts = [layer * depth // 32 + 1 for layer in self.layers]
        if cuts[-1] >= depth:
            raise BudgetError(f"layers={self.layers}, of 32, leave no layer after a cut in this decoder of {depth}.")
        return cuts

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        return {cut: Needs(queries="text", hidden=True, inputs=True) for cut in self._cuts(depth)}

    def prefill(self, view: PrefillView) -> Keep | None:
        cuts, tokens = self._cuts(view.depth), view.tokens
        if self.counts is not None:
            k = min(tokens, view.target(dict(zip(cuts, self.counts, strict=True))[view.layer]))
            clusters = self._clusters(tokens - k)
        else:
            target, entered = view.target(self.keep), view.computed[0]
            if target >= entered:
                return None
            left = min(tokens, scaled_counts(tuple(dict.fromkeys(cuts)), target, entered, view.depth)[view.layer])
            k = self._split(left, tokens)
            clusters = left - k
        if k + clusters >= tokens:
            return None

        score = row_mean(view.rows, raters(view.inputs, view.rows.valid))
        if clusters == 0:
            return Keep(top(score, k))
        order = ranked(score)
        kept = order[:, :k].sort(-1).values
        pool = order[:, k : k + self._recycled(tokens - k)].sort(-1).values
        hidden = at(view.hidden, pool)
        centres, cluster = dpc_knn(hidden, clusters)
        slots = pool.gather(1, centres)
        into = torch.full_like(view.index, -1).scatter(1, pool, slots.gather(1, cluster)).scatter(1, slots, -1)
        vectors = torch.cat([at(view.hidden, kept), cluster_means(hidden, cluster, clusters)], 1)
        return Keep(torch.cat([kept, slots], 1), hidden=vectors, into=into, ordered=True)
