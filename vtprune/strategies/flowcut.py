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
    asks_for_fewer,
    check_budget,
)
from vtprune.select import top, top_ragged


def share(weights: Tensor) -> Tensor:
    """[B, N] weights of any float dtype, in fp32 and scaled to sum 1; flat where a row has underflowed to zero."""
    weights = weights.float()
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones_like(weights))
    return weights / weights.sum(-1, keepdim=True)


def flow_score(attention: Tensor, semantic: Tensor, value: Tensor, semantic_weight: float = 1.0) -> Tensor:
    """(attention share + semantic_weight * semantic share) * L1 norm of the head-mean value.

    Parameters:
        attention, semantic: [B, N] head means, each renormalised here over the N patches.
        value: [B, N, d] head-mean value vectors.
    Returns:
        [B, N] fp32.
    """
    return (share(attention) + semantic_weight * share(semantic)) * value.float().abs().sum(-1)


def entropy_ratio(attention: Tensor) -> Tensor:
    """[B] entropy of the renormalised attention [B, N] over its maximum ln N: 1 for flat, 0 for a single peak."""
    # entr is 0 at p = 0, where p * ln p would be NaN
    entropy = torch.special.entr(share(attention)).sum(-1)
    return entropy / math.log(max(attention.shape[-1], 2))


def drop_count(attention: Tensor, target: int, remaining: int, entropy_power: float, depth_power: float) -> Tensor:
    """[B] patches to drop now: round((N - target) / remaining^depth_power * (1 - r^entropy_power)), never negative."""
    ratio = entropy_ratio(attention)
    drop = (attention.shape[-1] - target) / remaining**depth_power * (1 - ratio**entropy_power)
    return drop.clamp(min=0).round().long()


@dataclass
class FlowCut(Pruner):
    """FlowCut (arXiv 2505.19536): progressive pruning in the encoder, optionally one more cut in the decoder.

    Every second block, counted from the end, drops the patches with the lowest score accumulated so far; how many
    follows from the entropy of the CLS attention; the last cut, one block before the feature block, leaves exactly
    `keep`. The count is decided per image (the published code takes the batch maximum), so that a batch equals its
    images one at a time.

    Parameters:
        keep: patches per image that enter the decoder (int) or share of them (float).
        decoder_keep: visual tokens left after decoder layer `decoder_layer` (the paper's second stage, used with tiles
            and Qwen2-VL); None leaves the decoder alone, as published for LLaVA-1.5.
        decoder_layer: 0-based decoder layer whose output is cut.
        momentum: weight of the accumulated score against the current block's.
        every: blocks between two cuts.
        semantic_weight: weight of value similarity to CLS against attention from CLS.
        entropy_power, depth_power: exponents of the entropy ratio and of the number of blocks left.
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

    name = "flowcut"
    paper = "FlowCut, arXiv 2505.19536 (NeurIPS 2025)"
    positions = "compact"
    requires = frozenset({"cls"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_keep is not None:
            self.decoder_keep = check_budget(self.decoder_keep, "decoder_keep", per_image=True)
        if not 0 <= self.momentum < 1 or self.every < 1:
            raise BudgetError(f"momentum={self.momentum} must lie in [0, 1) and every={self.every} must be at least 1.")

    def stages(self) -> tuple[str, ...]:
        return ("encode",) if self.decoder_keep is None else ("encode", "prefill")

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        later = self.decoder_keep is not None and asks_for_fewer(self.decoder_keep, sizes)
        return later or super().asks_to_prune(sizes)

    # Stage V, in the encoder. The feature block is depth - 1; the last cut comes after block depth - 2.
    def encode_needs(self, encoder: Encoder) -> dict[int, Needs]:
        if encoder.depth < 2:
            raise BudgetError("FlowCut needs at least two encoder blocks up to the feature block.")
        return dict.fromkeys(range(encoder.depth - 1), Needs(queries="cls", values=True))

    def encode(self, view: EncodeView) -> Keep | None:
        target = view.target(self.keep)
        if view.tokens <= target:
            return None
        rows = view.rows
        attention = rows.attention()[:, :, 0].mean(1)
        # value similarity to CLS as a distribution over CLS and the patches; unscaled, as in the published code
        to_patch = torch.einsum("bhd,bhnd->bhn", rows.query_values[:, :, 0], rows.values)
        to_cls = rows.query_values[:, :, 0].square().sum(-1, keepdim=True)
        semantic = torch.cat([to_cls, to_patch], -1).softmax(-1)[..., 1:].mean(1)
        score = flow_score(attention, semantic, rows.values.mean(1), self.semantic_weight)
        past = view.carry.get("flow")
        flow = score if past is None else self.momentum * past + (1 - self.momentum) * score
        view.carry["flow"] = flow

        remaining = view.depth - 2 - view.layer
        if remaining % self.every:
            return None
        if remaining == 0:
            return Keep(top(flow, target))
        drop = drop_count(attention, target, remaining, self.entropy_power, self.depth_power)
        return Keep(top_ragged(flow, [max(view.tokens - p, target) for p in drop.tolist()]))

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
