"""CDPruner: visual tokens that are diverse among those the question is about.

"Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", arXiv 2506.10967,
NeurIPS 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.pruner import (
    Budget,
    BudgetError,
    Encoder,
    EncodeView,
    Keep,
    Needs,
    Pruner,
    SelectView,
    UnsupportedError,
)
from vtprune.select import dpp, exact

PATCHES = "cdpruner.patches"


def scaled(relevance: Tensor) -> Tensor:
    """[B, N] fp64, each row's relevance from 1e-6 (about) to 1 (about); all ones where a row is all equal.

    NaN and infinite entries count as the least relevant.
    """
    relevance = exact(relevance)
    finite = torch.isfinite(relevance)
    low = relevance.masked_fill(~finite, math.inf).amin(-1, keepdim=True)
    high = relevance.masked_fill(~finite, -math.inf).amax(-1, keepdim=True)
    relevance = torch.where(finite, relevance, low)
    width = high - low
    # equal on paper is equal here, whatever the order in which the cosines were summed
    return torch.where(width > 1e-6, (relevance - low + 1e-6) / width, 1.0)


def likeness(features: Tensor, text: list[Tensor]) -> Tensor:
    """[B, N] fp64 cosines of the tokens [B, N, D] with the mean of their sample's text embeddings, B times [T, D]."""
    # a sum over no words is zero, whose cosine is zero with every token
    mean = torch.stack([exact(words).sum(0) for words in text]).to(features.device)
    unit = torch.nn.functional.normalize
    return torch.bmm(unit(mean, dim=-1)[:, None], unit(exact(features), dim=-1).transpose(1, 2))[:, 0]


@dataclass
class CDPruner(Pruner):
    """CDPruner (arXiv 2506.10967): greedy MAP of a determinantal point process conditioned on relevance to the text.

    The kernel is diag(r) S diag(r): S the cosines of the projected tokens, r their relevance, scaled to (0, 1] per image
    (the published code scales over all crops), so that a batch equals its images one at a time. Where an image's tokens
    span no further dimension, the rest of the budget goes by relevance (ours). Without text, or where all tokens are
    equally relevant, r is 1 throughout (ours).

    Parameters:
        keep: visual tokens per image (int) or share of them (float); 128, 64 and 32 of 576 in the paper, 1/4 is ours.
        relevance: called per image with the feature block's hidden states of its patches [N, C] and the token ids [T] of
            its sample's text, gives [N], higher for more relevant: `vtprune.relevance.ClipRelevance` is the paper's. None,
            for models without a paired text tower: cosine of a projected token with the mean text embedding (ours).
        theta: in [0, 1); above 0 the weight becomes exp(theta / (2 (1 - theta)) r), so that near 1 relevance counts for
            more. None or 0 is off.
    Raises:
        BudgetError: for a field without meaning.
        UnsupportedError: if `relevance` is given but patches or token ids are not to be had.
    """

    keep: Budget = 0.25
    relevance: Callable[[Tensor, Tensor], Tensor] | None = None
    theta: float | None = None

    name = "cdpruner"
    paper = "CDPruner, arXiv 2506.10967 (NeurIPS 2025)"
    positions = "compact"
    reads = ("text embeddings",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance is not None and not callable(self.relevance):
            raise BudgetError(f"relevance={self.relevance!r}: give a callable of (patches, ids), or None.")
        if self.theta is not None and not 0 <= self.theta < 1:  # NaN fails every comparison
            raise BudgetError(f"theta={self.theta}: must lie in [0, 1); None or 0 is off.")

    def stages(self) -> tuple[str, ...]:
        return ("select",) if self.relevance is None else ("encode", "select")

    def settings(self) -> dict[str, Any]:
        named = self.relevance if self.relevance is None else getattr(self.relevance, "__name__", repr(self.relevance))
        return {**super().settings(), "relevance": named}

    def encode_needs(self, encoder: Encoder) -> dict[int, Needs]:
        return {encoder.depth - 1: Needs()}

    def encode(self, view: EncodeView) -> None:
        if view.target(self.keep) < view.tokens:
            view.carry[PATCHES] = view.hidden

    def select(self, view: SelectView) -> Keep | None:
        k = view.target(self.keep)
        if k >= view.tokens:
            return None
        relevance = likeness(view.features, view.text) if self.relevance is None else self._ask(view)
        weight = scaled(relevance)
        if self.theta:
            weight = torch.exp(self.theta / (2 * (1 - self.theta)) * weight)
        return Keep(dpp(view.features, weight, k))

    def _ask(self, view: SelectView) -> Tensor:
        if PATCHES not in view.carry:
            raise UnsupportedError(
                "relevance= reads the vision encoder's patches, and none came: features were handed over ready-made, or the "
                "encode stage belongs to another strategy. Pass pixel_values and keep both stages, or leave relevance=None."
            )
        if len(view.ids) != len(view.features):
            raise UnsupportedError("relevance= reads token ids, and embeddings came. Pass input_ids, or leave relevance=None.")
        answers = []
        for patches, ids in zip(view.carry[PATCHES], view.ids, strict=True):
            answer = self.relevance(patches, ids) if len(ids) else torch.zeros(view.tokens)
            if answer.shape != (view.tokens,):
                raise UnsupportedError(f"relevance= gave shape {tuple(answer.shape)} for {view.tokens} tokens; give one each.")
            answers.append(answer.to(view.features.device))
        return torch.stack(answers)
