"""Evict: drop visual tokens from the KV cache once the prompt has been read.

The observation window and head-shared ranking follow the family of prompt-time KV eviction methods (SnapKV, arXiv
2404.14469) reduced to one query row and to visual tokens; it is the plain decode-stage baseline, not that paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, DecodeView, Keep, Needs, Pruner
from vtprune.select import top


@dataclass
class Evict(Pruner):
    """Visual KV eviction after prefill, per decoder layer, by the last prompt token's attention.

    Prefill runs on every token, so it saves cache and decode work, not prefill: its equivalent tokens stay at all.

    Parameters:
        keep: visual tokens per image (int) or share of them (float) that each layer's cache retains.
    """

    keep: Budget = 0.5

    name = "evict"
    paper = "baseline, after SnapKV, arXiv 2404.14469 (NeurIPS 2024)"
    positions = "original"

    def decode_needs(self, depth: int) -> dict[int, Needs]:
        return dict.fromkeys(range(depth), Needs(queries="last"))

    def decode(self, view: DecodeView) -> Keep:
        return Keep(top(view.rows.attention().mean((1, 2)), min(view.tokens, view.target(self.keep))))
