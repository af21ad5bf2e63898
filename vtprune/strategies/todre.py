"""ToDRE: a diverse set of visual tokens for the decoder, and none at all in its last layers.

"ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757 (v2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.pruner import Budget, BudgetError, Encoder, EncodeView, Keep, Needs, PrefillView, Pruner, Rows, SelectView
from vtprune.select import k_center, max_sum, row_mean, top

VARIANTS = {"max_sum": max_sum, "k_center": k_center}


def visual_mass(rows: Rows) -> Tensor:
    """[B] mean over text rows and heads of the attention mass on visual tokens; 0 without a text row."""
    return row_mean(rows).sum(-1)


@dataclass
class ToDRE(Pruner):
    """ToDRE (arXiv 2505.18757): greedy diversity from a pivot, then a gate that drops every visual token late.

    Stage 1 starts from the patch that CLS attends to most in the encoder's last block and adds, on the projected
    embeddings, the token whose summed cosine to those kept is least. Stage 2 looks once, in prefill, at how much the text
    after the first image attends to visual tokens in layer `gate_layer`; below `tau` all of a sample's visual tokens leave
    after it. The paper also asks for visual-to-text attention below tau, which a causal decoder with the image first
    makes zero. The gate comes on top of `keep`, which counts the tokens that enter the decoder; it does not act on a
    sample of which `keep` leaves everything, nor where no text follows the image, as the mass is undefined then.

    Parameters:
        keep: visual tokens per image that enter the decoder (int) or share of them (float); 0.25 and 0.10 in the paper.
        variant: "max_sum" (v2 of the paper) or "k_center" (v1, from its abstract: farthest-first; ours in detail).
        tau: attention mass in [0, 1] under which the gate fires; None or 0 switches the second stage off.
        gate_layer: 0-based last decoder layer that sees visual tokens when the gate fires. None: floor(7 L / 8), at most
            L - 2, as the paper names the depth but neither rounding nor base (ours).
        seed: of the random pivot that the paper takes for encoders without a class token; it depends on the seed, the
            image's token count and its place in the sample alone (ours).
    Raises:
        BudgetError: for a field without meaning, or a gate layer that the decoder does not have.
    """

    keep: Budget = 0.25
    variant: str = "max_sum"
    tau: float | None = 0.10
    gate_layer: int | None = None
    seed: int = 0

    name = "todre"
    paper = "ToDRE, arXiv 2505.18757 v2 (2025)"
    positions = "compact"  # the paper is silent; LLaVA code numbers what it splices anew (ours)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise BudgetError(f"variant={self.variant!r}: give one of {', '.join(map(repr, VARIANTS))}.")
        if self.tau is not None and not 0 <= self.tau <= 1:  # NaN fails every comparison
            raise BudgetError(f"tau={self.tau}: a share of attention, in [0, 1]; None or 0 switches the second stage off.")

    def stages(self) -> tuple[str, ...]:
        return ("encode", "select", "prefill") if self.tau else ("encode", "select")

    def encode_needs(self, encoder: Encoder) -> dict[int, Needs]:
        return {encoder.last: Needs(queries="cls")} if encoder.cls else {}

    def encode(self, view: EncodeView) -> None:
        view.carry["pivot"] = view.rows.attention()[:, :, 0].mean(1)

    def select(self, view: SelectView) -> Keep | None:
        k = view.target(self.keep)
        if k >= view.tokens:
            return None
        if "pivot" in view.carry:
            first = top(view.carry["pivot"], 1)[:, 0]
        else:
            view.note(f"todre: no class-token attention came from the encoder, so the pivot is random (seed={self.seed}).")
            draws = [self._draw(ordinal, view.tokens) for ordinal in view.ordinal.tolist()]
            first = torch.tensor(draws, device=view.features.device)
        return Keep(VARIANTS[self.variant](view.features, first, k))

    def _draw(self, ordinal: int, tokens: int) -> int:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + ordinal) % 2**63)
        return int(torch.randint(tokens, (), generator=generator))

    def prefill_needs(self, depth: int) -> dict[int, Needs]:
        layer = min(7 * depth // 8, depth - 2) if self.gate_layer is None else self.gate_layer
        if not 0 <= layer <= depth - 2:
            raise BudgetError(
                f"gate_layer={self.gate_layer}: a layer must follow it, so 0 <= gate_layer <= {depth - 2} in this decoder of "
                f"{depth} layers; tau=None switches the gate off."
            )
        return {layer + 1: Needs(queries="text")}

    def prefill(self, view: PrefillView) -> Keep | None:
        if view.target(self.keep) >= view.total:
            return None
        fires = (visual_mass(view.rows) < self.tau) & view.rows.valid.any(-1)  # NaN does not fire
        everything = torch.arange(view.tokens, device=view.index.device)
        return Keep([everything[:0] if fire else everything for fire in fires.tolist()])
