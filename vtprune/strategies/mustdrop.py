"""MustDrop: merge alike neighbours in the encoder, filter by text attention in prefill, cache the survivors alone.

"Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv 2411.10803, 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.fitted import Fitted
from vtprune.ladder import check_layers, stage_count
from vtprune.merge import merge_windows, windows
from vtprune.pruner import Budget, BudgetError, DecodeView, Encoder, EncodeView, Keep, Model, Needs, PrefillView
from vtprune.select import chosen, marked, top, top_ragged


def dual_attention(attention: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] fp32 sum and maximum over text tokens of the head mean of `attention` [B, H, T, N]; NaN counts as none."""
    mean = F.pad(attention.float().mean(1).nan_to_num(), (0, 0, 0, 1))  # a row of zeros, as there may be no text
    return mean.sum(1), mean.amax(1)


@dataclass
class MustDrop(Fitted):
    """MustDrop (arXiv 2411.10803): three stages, driven by thresholds or, ours, by an exact budget.

    Encoder: windows of neighbours that are alike enough are averaged, and the patches that CLS attends to most in the
    last block form a key set that no later stage drops. Prefill: after a few decoder layers a visual token leaves if
    both its share of the attention that the text after the image pays (sum over the text) and the highest single value
    are too low. Decode: the layers from the first of these on cache only what survived them all.

    Without `keep` counts follow from the data. With `keep`, tokens stay in the order of
    max(share / global_thr, highest / individual_thr): the paper's test with both thresholds scaled as each sample and
    stage need. How many windows merge is each image's own, where the published code takes the batch minimum. Text rows
    include text between the images of a sample. A sample without text after the image keeps everything without `keep`,
    else its first tokens.

    Parameters:
        keep: None, or the mean over decoder layers of visual tokens computed on: int per image, or float share.
        global_thr, individual_thr: least share and least attention; 0 in either keeps all (their ratio counts under
            `keep`). Default: the published pair for 128 tokens on TextVQA. Others: (0.001, 0.001) for 192, (0.011, 0.01)
            for 64. They do not transfer between data sets: calibrate, and `load`.
        window, sim_thr: side of the windows and least mean cosine for merging. A grid that `window` does not divide gets
            the next smaller side that does (ours). No merging goes below `keep`.
        layers: 0-based decoder layers of 32 after which to filter; scaled to other depths, rounding down (ours).
        key_rate: share of the encoder's final tokens in the key set, rounded up.
        merge, merge_layer: whether to merge, and after which encoder block; fitted: the model of the calibration.
        later: share of a cut's tokens that the next one leaves, under `keep` (ours).
    Raises:
        BudgetError: for fields without meaning; if the layers before the first cut, or the key set, exceed `keep`.
        UnsupportedError: for a model other than `fitted`.
    """

    keep: Budget | None = None
    global_thr: float = 0.0012
    individual_thr: float = 0.001
    window: int = 3
    sim_thr: float = 0.8
    key_rate: float = 0.08
    layers: tuple[int, ...] = (2, 6, 10, 14)
    merge: bool = True
    merge_layer: int = 0
    later: float = 0.9
    fitted: Model | None = None

    name = "mustdrop"
    paper = "MustDrop, arXiv 2411.10803 (2024)"
    positions = "compact"
    requires = frozenset({"cls"})
    searched = ("global_thr", "individual_thr")
    origin = "the thresholds were calibrated"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(global_thr="[0, inf)", individual_thr="[0, inf)", sim_thr="[-1, inf)")
        self.check_fields(key_rate="[0, 1]", later="(0, 1]")
        self.check_fields(integer=True, window="[1, inf)", merge_layer="[0, inf)")
        if not isinstance(self.merge, bool):
            raise BudgetError(f"merge={self.merge!r}: True or False.")
        self.layers = check_layers(self.layers, 30)
        if self.keep is not None and self.global_thr == self.individual_thr == 0:
            raise BudgetError("global_thr and individual_thr are both 0: with keep one of them must rank the tokens.")

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        if self.keep is not None:
            return super().asks_to_prune(sizes)
        merges = self.merge and self.window > 1 and self.sim_thr <= 1
        return merges or (self.global_thr > 0 and self.individual_thr > 0)

    def promises_to_prune(self, sizes: tuple[int, ...]) -> bool:
        return self.keep is not None and self.asks_to_prune(sizes)

    # Stage 1, in the encoder.
    def encode_needs(self, encoder: Encoder) -> dict[int, Needs]:
        key = {encoder.last: Needs(queries="cls")}
        if not self.merge:
            return key
        last = min(encoder.depth, encoder.last) - 1
        self.check_fields(integer=True, merge_layer=f"[0, {last}]", why=" for this encoder, or merge=False")
        return {self.merge_layer: Needs(), **key}

    def encode(self, view: EncodeView) -> Keep | None:
        if view.rows is None:
            return self._merge(view)
        score = view.rows.attention()[:, :, 0].mean(1)
        view.carry["key"] = marked(top(score, math.ceil(self.key_rate * view.tokens)), view.tokens)
        return None

    def _merge(self, view: EncodeView) -> Keep | None:
        target = 1 if self.keep is None else view.target(self.keep)
        if view.tokens <= target:
            return None
        if view.grid is None or math.prod(view.grid) != view.tokens:
            view.note("mustdrop: the patches form no grid, so no windows were merged.")
            return None
        w = max(w for w in range(1, self.window + 1) if view.grid[0] % w == view.grid[1] % w == 0)
        if w < self.window:
            done = f"{w} x {w} windows were merged" if w > 1 else "no windows were merged"
            view.note(f"mustdrop: window={self.window} does not divide the grid of {view.grid}; {done}.")
        if w == 1:
            return None
        members = windows(view.grid, w, view.hidden.device)
        return merge_windows(view.hidden, members, self.sim_thr, (view.tokens - target) // (w * w - 1))

    # Stage 2, in the decoder's prefill.
    def filters(self, depth: int) -> list[int]:
        """Decoder layers whose output is filtered, in a decoder of this depth."""
        if depth < 2:
            raise BudgetError("MustDrop needs at least two decoder layers.")
        return sorted({min(layer * depth // 32, depth - 2) for layer in self.layers})

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        return {layer + 1: Needs(queries="text") for layer in self.filters(depth)}

    def prefill(self, view: PrefillView) -> Keep | None:
        target = None if self.keep is None else view.target(self.keep)
        if target is not None and view.computed[0] <= target:
            return None
        total, highest = dual_attention(view.rows.attention())
        whole = total.sum(-1, keepdim=True)
        key = view.carry.get("key", torch.zeros_like(view.index, dtype=torch.bool))  # none without `encode` (`only`)
        protected, text = torch.stack([key.sum(1), view.rows.valid.sum(1)]).tolist()
        if 0 in text:
            kept = "all" if target is None else "the first"
            view.note(f"mustdrop: a prompt has no text after its image to filter by; {kept} visual tokens stay.")
        if target is None:
            return chosen((total >= self.global_thr * whole) | (highest >= self.individual_thr) | key)
        # share / global_thr and highest / individual_thr, free of division: only the order counts
        score = torch.maximum(self.individual_thr * total, self.global_thr * whole * highest)
        cuts = [layer + 1 for layer in self.filters(view.depth) if layer + 1 >= view.layer]
        lower = ", or lower key_rate"
        counts = [stage_count(target, view.computed, cuts, view.depth, self.later, max(1, n), lower) for n in protected]
        return Keep(top_ragged(score.masked_fill(key, math.inf), counts))

    # Stage 3, once prefill is over.
    def decode_needs(self, depth: int) -> dict[int, Needs]:
        return dict.fromkeys(range(self.filters(depth)[0], self.filters(depth)[-1] + 1), Needs())

    def decode(self, view: DecodeView) -> Keep | None:
        return chosen(view.survived)
