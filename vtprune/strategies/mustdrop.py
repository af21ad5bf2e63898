"""MustDrop: merge alike neighbours in the encoder, filter by text attention in prefill, cache the survivors alone.

"Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv 2411.10803, 2024.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.pruner import (
    Budget,
    BudgetError,
    DecodeView,
    Encoder,
    EncodeView,
    Keep,
    Model,
    Needs,
    PrefillView,
    Pruner,
    UnsupportedError,
    check_budget,
)
from vtprune.select import top, top_ragged


def windows(grid: tuple[int, int], w: int, device: torch.device | None = None) -> Tensor:
    """LongTensor [windows, w * w]: patch numbers of the w x w windows of a grid that w divides, all in raster order."""
    rows, columns = grid
    patches = torch.arange(rows * columns, device=device).view(rows // w, w, columns // w, w)
    return patches.transpose(1, 2).reshape(-1, w * w)


def window_similarity(hidden: Tensor, members: Tensor) -> Tensor:
    """[B, windows] mean cosine over the pairs of different patches in a window, fp32.

    Parameters:
        hidden: [B, N, C]; a zero vector counts as orthogonal to every other.
        members: [windows, P] patch numbers, P > 1.
    """
    count = members.shape[1]
    total = F.normalize(hidden.float(), dim=-1)[:, members].sum(2)
    return (total.square().sum(-1) - count) / (count * (count - 1))


def merge_windows(hidden: Tensor, members: Tensor, threshold: float, most: int) -> Keep:
    """Average the windows whose similarity reaches `threshold`, of them the `most` most similar.

    Parameters:
        hidden: [B, N, C]; members: [windows, P].
    Returns:
        Merged windows in descending similarity, then the untouched patches in raster order. A merged window goes by the
        number of its first patch (ours; the paper has no use for one).
    """
    tokens, width = hidden.shape[1:]
    similarity = torch.nan_to_num(window_similarity(hidden, members), nan=float("-inf"))
    rank = torch.sort(similarity, dim=1, descending=True, stable=True).indices.argsort(1)
    merged = (similarity >= threshold) & (rank < most)
    counts = (tokens - merged.sum(1) * (members.shape[1] - 1)).tolist()  # decides shapes
    window = torch.empty(tokens, dtype=torch.long, device=hidden.device)
    window[members] = torch.arange(len(members), device=hidden.device)[:, None]
    number = torch.arange(tokens, device=hidden.device)
    first = members[:, 0][window]
    inside = merged[:, window]
    head = inside & (number == first)
    # sort key: heads by rank, the untouched by number, then what has been merged away
    key = torch.where(head, rank[:, window], number + torch.where(inside, len(members) + tokens, len(members)))
    order = key.argsort(1)
    means = hidden.float()[:, members].mean(2).to(hidden.dtype)[:, window]
    vectors = torch.where(head[..., None], means, hidden).gather(1, order[..., None].expand(-1, -1, width))
    return Keep(
        [row[:n] for row, n in zip(order, counts, strict=True)],
        [row[:n] for row, n in zip(vectors, counts, strict=True)],
        torch.where(inside & ~head, first, -1),
        ordered=True,
    )


def dual_attention(attention: Tensor) -> tuple[Tensor, Tensor]:
    """What the text pays to each visual token: sum and maximum over text tokens of the head mean.

    Parameters:
        attention: [B, H, T, N] post-softmax; T may be 0, NaN counts as none.
    Returns:
        [B, N] and [B, N], fp32.
    """
    mean = torch.nan_to_num(attention.float().mean(1))
    if mean.shape[1] == 0:
        mean = mean.new_zeros(mean.shape[0], 1, mean.shape[2])
    return mean.sum(1), mean.amax(1)


def stage_count(target: int, computed: tuple[int, ...], cuts: list[int], depth: int, later: float, least: int) -> int:
    """Tokens to leave at the next cut, for a mean over `depth` layers within 0.5 of `target` (ours).

    Every further cut is meant to leave `later` of the one before; each cut solves for what is left to spend, so that
    rounding at one is made good at the next.

    Parameters:
        computed: tokens that each layer before this cut computed on; cuts: layers before which this cut and the further
            ones come; least: tokens that no cut may drop (at least 1).
    Raises:
        BudgetError: if not even `least` tokens from here on meet the target.
    """
    spans = [end - start for start, end in zip(cuts, [*cuts[1:], depth], strict=True)]
    left = target * depth - sum(computed)
    if least * sum(spans) - left > depth / 2:
        need = math.ceil((sum(computed) + least * sum(spans)) / depth)
        raise BudgetError(
            f"keep: {target} visual tokens, as the mean over {depth} decoder layers, cannot be reached: the {len(computed)} "
            f"layers before the first cut alone cost {sum(computed) / depth:.1f}, and {least} tokens stay after it (key "
            f"tokens, or one). Raise keep to at least {need}, cut earlier (layers), or lower key_rate."
        )
    share = left / sum(span * later**i for i, span in enumerate(spans))
    room = (left - least * sum(spans[1:])) / spans[0]
    return max(least, min(computed[-1], round(share), round(room)))


def chosen(mask: Tensor) -> Keep | None:
    """The tokens marked in a bool [B, N], None if all are."""
    counts = mask.sum(1).tolist()  # decides shapes
    if min(counts) == mask.shape[1]:
        return None
    order = torch.sort(mask, dim=1, descending=True, stable=True).indices
    return Keep([row[:n] for row, n in zip(order, counts, strict=True)])


@dataclass
class MustDrop(Pruner):
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
        key_rate: share of the encoder's final tokens in the key set, rounded up.
        layers: 0-based decoder layers of 32 after which to filter; scaled to other depths, rounding down (ours).
        merge, merge_layer: whether to merge, and the encoder block after which.
        later: share of a cut's tokens that the next one leaves, under `keep` (ours).
        fitted: the model that the thresholds were calibrated on; any other is refused.
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

    def __post_init__(self) -> None:
        if self.keep is not None:
            self.keep = check_budget(self.keep)
        ranges = {
            "global_thr": (numbers.Real, 0, math.inf),
            "individual_thr": (numbers.Real, 0, math.inf),
            "sim_thr": (numbers.Real, -1, math.inf),
            "key_rate": (numbers.Real, 0, 1),
            "later": (numbers.Real, 1e-9, 1),
            "window": (numbers.Integral, 1, math.inf),
            "merge_layer": (numbers.Integral, 0, math.inf),
        }
        for name, (kind, low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == math.inf:
                what = "an int" if kind is numbers.Integral else "a finite number"
                raise BudgetError(f"{name}={value!r}: give {what} from {low} to {high}.")
        if not isinstance(self.merge, bool):
            raise BudgetError(f"merge={self.merge!r}: True or False.")
        layers = self.layers if isinstance(self.layers, tuple | list) else ()
        ints = all(isinstance(x, numbers.Integral) and not isinstance(x, bool) and 0 <= x <= 30 for x in layers)
        if not layers or not ints or list(layers) != sorted(set(layers)):
            raise BudgetError(f"layers={self.layers!r}: give ascending, distinct ints in 0 .. 30, for a decoder of 32 layers.")
        self.layers = tuple(int(x) for x in layers)
        if self.keep is not None and self.global_thr == self.individual_thr == 0:
            raise BudgetError("global_thr and individual_thr are both 0: with keep one of them must rank the tokens.")
        if self.fitted is not None and not isinstance(self.fitted, Model):
            raise BudgetError(f"fitted={self.fitted!r}: a vtprune.pruner.Model, or None; use MustDrop.load(path).")

    @classmethod
    def load(cls, path: str | PathLike, **others) -> MustDrop:
        """With the thresholds of a calibration that `vtprune search mustdrop` wrote; `others` are the other fields."""
        from vtprune import schedule

        fit = schedule.read(path, "mustdrop")
        thresholds = {name: fit.values[name] for name in ("global_thr", "individual_thr")}
        return cls(**thresholds, fitted=fit.model, **others)

    def check_model(self, model: Model) -> None:
        wanted = self.fitted
        if wanted is not None and (wanted.fingerprint, wanted.depth) != (model.fingerprint, model.depth):
            raise UnsupportedError(
                f"these thresholds were calibrated on {wanted.name!r} ({wanted.depth} layers, fingerprint "
                f"{wanted.fingerprint}), this is {model.name!r} ({model.depth} layers, fingerprint {model.fingerprint}). "
                f"Calibrate on this model (vtprune search mustdrop), or give global_thr and individual_thr yourself."
            )

    def settings(self) -> dict:
        return {**super().settings(), "fitted": None if self.fitted is None else self.fitted.name}

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
        blocks = min(encoder.depth, encoder.last)
        if self.merge_layer >= blocks:
            raise BudgetError(
                f"merge_layer={self.merge_layer}: must lie in 0 .. {blocks - 1} for this encoder; or merge=False."
            )
        return {self.merge_layer: Needs(), **key}

    def encode(self, view: EncodeView) -> Keep | None:
        if view.rows is None:
            return self._merge(view)
        score = view.rows.attention()[:, :, 0].mean(1)
        key = torch.zeros_like(view.index, dtype=torch.bool)
        view.carry["key"] = key.scatter(1, top(score, math.ceil(self.key_rate * view.tokens)), True)
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
        # without the encoder stage (`only`) there is no key set
        key = view.carry.get("key", torch.zeros_like(view.index, dtype=torch.bool))
        protected, text = torch.stack([key.sum(1), view.rows.valid.sum(1)]).tolist()
        if 0 in text:
            kept = "all visual tokens stay" if target is None else "the first visual tokens stay"
            view.note(f"mustdrop: a prompt has no text after its image, so there is no attention to filter by; {kept}.")
        if target is None:
            return chosen((total >= self.global_thr * whole) | (highest >= self.individual_thr) | key)
        # share / global_thr and highest / individual_thr, free of division: only the order counts
        score = torch.maximum(self.individual_thr * total, self.global_thr * whole * highest)
        cuts = [layer + 1 for layer in self.filters(view.depth) if layer + 1 >= view.layer]
        counts = [stage_count(target, view.computed, cuts, view.depth, self.later, max(1, n)) for n in protected]
        return Keep(top_ragged(score.masked_fill(key, math.inf), counts))

    # Stage 3, once prefill is over.
    def decode_needs(self, depth: int) -> dict[int, Needs]:
        filters = self.filters(depth)
        return dict.fromkeys(range(filters[0], filters[-1] + 1), Needs())

    def decode(self, view: DecodeView) -> Keep | None:
        return chosen(view.survived)
