"""FlowCut: prune inside the vision encoder by how much information flows from each patch to CLS.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536, NeurIPS 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.pruner import (
    Budget,
    BudgetError,
    Encoder,
    EncodeView,
    Keep,
    Needs,
    PrefillView,
    Pruner,
    UnsupportedError,
    asks_for_fewer,
    check_budget,
)
from vtprune.select import top, top_cells

SPLITS, NEWLINES, GROUPS = ("image", "tile"), ("model", "none"), ("cells", "survivors")


def share(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, N] weights of any float dtype, in fp32 and scaled to sum 1; flat where a row has underflowed to zero.

    Parameters:
        valid: bool [B, N], False where a slot only pads and its weight is zero; None if none does.
    """
    weights = weights.float()
    total = weights.sum(-1, keepdim=True)
    flat = 1 / weights.shape[-1] if valid is None else valid / valid.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, flat)


def flow_score(
    attention: Tensor, semantic: Tensor, value: Tensor, semantic_weight: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """(attention share + semantic_weight * semantic share) * L1 norm of the head-mean value.

    Parameters:
        attention, semantic: [B, N] head means, each renormalised here over the N patches.
        value: [B, N, d] head-mean value vectors; valid: as for `share`.
    Returns:
        [B, N] fp32.
    """
    relation, similarity = share(torch.stack([attention, semantic]), valid)
    return (relation + semantic_weight * similarity) * value.float().abs().sum(-1)


def entropy_ratio(attention: Tensor, epsilon: float = 0.0, valid: Tensor | None = None) -> Tensor:
    """[B] entropy of the attention [B, N] over its maximum ln N: 1 for flat, 0 for a single peak.

    Parameters:
        epsilon: added to p in ln p. The published code adds 1e-7 without a class token, and does not renormalise then.
        valid: as for `share`; N counts these alone.
    """
    p = attention.float() if epsilon else share(attention, valid)
    # xlogy is 0 at p = 0, where p * ln p would be NaN
    entropy = -torch.special.xlogy(p, p + epsilon).sum(-1)
    return entropy / (math.log(max(p.shape[-1], 2)) if valid is None else valid.sum(-1).clamp(min=2).log())


def drop_count(
    attention: Tensor,
    target: int | Tensor,
    remaining: int,
    entropy_power: float,
    depth_power: float,
    epsilon: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """[B] patches to drop now: round((N - target) / remaining^depth_power * (1 - r^entropy_power)), never negative.

    Parameters:
        target: of all rows, or LongTensor [B]; others as for `entropy_ratio`.
    """
    ratio = entropy_ratio(attention, epsilon, valid)
    patches = attention.shape[-1] if valid is None else valid.sum(-1)
    drop = (patches - target) / remaining**depth_power * (1 - ratio**entropy_power)
    return drop.clamp(min=0).round().long()


@dataclass
class FlowCut(Pruner):
    """FlowCut (arXiv 2505.19536): progressive pruning in the encoder, optionally one more cut in the decoder.

    Every second block, counted from the end, drops the patches with the lowest score accumulated so far; how many
    follows from the entropy of the CLS attention; the last cut, one block before the feature block, leaves exactly
    `keep`. The count is decided per image (the published code takes the batch maximum), so that a batch equals its
    images one at a time.

    Without a class token, attention is that of the mean query of all patches, values are not compared, and the last cut
    comes after the last block, as published for Qwen2-VL. Of a tower with windows (Qwen2.5-VL) only blocks that attend to
    the whole picture are scored, counted and followed by cuts (ours). Merged tokens keep places of their own, where the
    published code gives them those of a picture's first ones. Its settings for a target of T: for tiles keep=T // 2,
    decoder_keep=T, split="tile", newlines="none"; for Qwen2-VL keep=2 * T, decoder_keep=T, groups="survivors".

    Parameters:
        keep: visual tokens per image that enter the decoder (int) or share of them (float).
        decoder_keep: visual tokens left after decoder layer `decoder_layer` (the paper's second stage, used with tiles
            and Qwen2-VL); None leaves the decoder alone, as published for LLaVA-1.5.
        decoder_layer: 0-based decoder layer whose output is cut.
        momentum: weight of the accumulated score against the current block's.
        every: blocks between two cuts.
        semantic_weight: weight of value similarity to CLS against attention from CLS.
        entropy_power, depth_power: exponents of the entropy ratio and of the number of blocks left.
        split: of a tiled picture, whether an int `keep` is divided among its tiles ("image", ours) or is each tile's.
        newlines: whether separators between a tiled picture's rows stay ("model", ours) or leave ("none", as published)
            once any of its tokens does.
        groups: where patches are merged behind the encoder, whether they stay by whole cells, so that a token is what it
            was ("cells", ours), or one by one, so that those left are merged in order, across cells ("survivors"; not where
            patches of inner blocks are merged as well, as in Qwen3-VL).
    Raises:
        BudgetError: for a budget or field without meaning.
    """

    keep: Budget = 0.25
    decoder_keep: Budget | None = None
    decoder_layer: int = 1
    momentum: float = 0.5
    every: int = 2
    semantic_weight: float = 1.0
    entropy_power: float = 2.0
    depth_power: float = 0.5
    split: str = "image"
    newlines: str = "model"
    groups: str = "cells"

    name = "flowcut"
    paper = "FlowCut, arXiv 2505.19536 (NeurIPS 2025)"
    positions = "compact"
    cells = True
    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, allowed in (("split", SPLITS), ("newlines", NEWLINES), ("groups", GROUPS)):
            if getattr(self, field) not in allowed:
                raise BudgetError(f"{field}={getattr(self, field)!r}: give {' or '.join(map(repr, allowed))}.")
        if self.decoder_keep is not None:
            self.decoder_keep = check_budget(self.decoder_keep, "decoder_keep", per_image=True)
        if not 0 <= self.momentum < 1 or self.every < 1:
            raise BudgetError(f"momentum={self.momentum} must lie in [0, 1) and every={self.every} must be at least 1.")

    def stages(self) -> tuple[str, ...]:
        return ("encode",) if self.decoder_keep is None else ("encode", "prefill")

    @property
    def separators(self) -> bool:
        return self.newlines == "model"

    def _later(self, sizes: tuple[int, ...]) -> bool:
        return self.decoder_keep is not None and asks_for_fewer(self.decoder_keep, sizes)

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        return self._later(sizes) or super().asks_to_prune(sizes)

    def promises_to_prune(self, sizes: tuple[int, ...]) -> bool:
        # a count for each tile may be more than a tile has, which the sizes of whole images do not tell
        counts = any(isinstance(keep, int) for keep in (self.keep if isinstance(self.keep, tuple) else (self.keep,)))
        return self._later(sizes) or ((self.split == "image" or not counts) and super().asks_to_prune(sizes))

    # Stage V, in the encoder. With a class token the last cut comes one block before the feature block, else after it.
    def encode_needs(self, encoder: Encoder) -> dict[int, Needs]:
        if encoder.whole_cells and self.groups != "cells":
            raise UnsupportedError(
                f"groups={self.groups!r} merges patches across cells of {encoder.cell}, but this vision encoder merges those "
                f"of its inner blocks as well, before it is known which are left. Give groups='cells'."
            )
        if not encoder.cls:
            return dict.fromkeys(encoder.whole, Needs(queries="mean", values=True))
        if encoder.depth < 2:
            raise BudgetError("FlowCut needs at least two encoder blocks up to the feature block.")
        return dict.fromkeys(range(encoder.depth - 1), Needs(queries="cls", values=True))

    def encode(self, view: EncodeView) -> Keep | None:
        counts, valid = view.counts or [view.tokens] * len(view.index), view.valid
        targets = [view.cell * one for one in view.targets(self.keep, whole=self.split == "tile")]
        if all(n <= target for n, target in zip(counts, targets, strict=True)):
            return None
        rows, epsilon = view.rows, 0.0
        attention, value = rows.attention()[:, :, 0].mean(1), rows.values.mean(1)
        if view.special.shape[1]:
            # value similarity to CLS as a distribution over CLS and the patches; unscaled, as in the published code
            query = rows.query_values[:, :, 0]
            to_patch = torch.einsum("bhd,bhnd->bhn", query, rows.values)
            if valid is not None:
                to_patch = to_patch.masked_fill(~valid[:, None], -torch.inf)
            semantic = torch.cat([query.square().sum(-1, keepdim=True), to_patch], -1).softmax(-1)[..., 1:].mean(1)
            score = flow_score(attention, semantic, value, self.semantic_weight, valid)
        else:
            view.note("flowcut: no class token, so flow is that to the mean query of all patches, values are not compared.")
            score, epsilon = attention * value.abs().sum(-1), 1e-7
        past = view.carry.get("flow")
        flow = score if past is None else self.momentum * past + (1 - self.momentum) * score
        view.carry["flow"] = flow

        if view.remaining % self.every:
            return None
        left = [min(n, target) for n, target in zip(counts, targets, strict=True)]
        if view.remaining:
            target = targets[0] if len(set(targets)) == 1 else torch.tensor(targets, device=flow.device)
            drop = drop_count(attention, target, view.remaining, self.entropy_power, self.depth_power, epsilon, valid)
            left = [max(n - p, k) for n, p, k in zip(counts, drop.tolist(), left, strict=True)]
        if valid is not None:
            flow = flow.masked_fill(~valid, -torch.inf)
        return top_cells(flow, left, view.cell if self.groups == "cells" else 1)

    # Stage L, in the decoder.
    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        self.check_fields(integer=True, decoder_layer=f"[0, {depth - 2}]", why=" for this decoder")
        return {self.decoder_layer + 1: Needs(queries="last", values=True)}

    def prefill(self, view: PrefillView) -> Keep | None:
        target = view.target(self.decoder_keep)
        if view.tokens <= target:
            return None
        rows = view.rows
        relation = rows.logits[:, :, 0].softmax(-1).mean(1)
        scale = rows.values.shape[-1] ** -0.5
        semantic = torch.einsum("bhd,bhnd->bhn", rows.query_values[:, :, 0], rows.values) * scale
        semantic = semantic.softmax(-1).mean(1)
        return Keep(top(flow_score(relation, semantic, rows.values.mean(1), self.semantic_weight), target))
