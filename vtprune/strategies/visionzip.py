"""VisionZip: keep the patches that CLS attends to most, and merge the others into a few contextual tokens.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467, CVPR 2025.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.merge import cluster_means
from vtprune.pruner import Budget, BudgetError, Encoder, EncodeView, Keep, Needs, PerImage, Pruner
from vtprune.select import at, top, without


def targets_at(rest: int, count: int, device: torch.device | None = None) -> Tensor:
    """LongTensor [min(count, rest)]: the published spacing, every floor(rest / count)-th from the first on."""
    return torch.arange(min(count, rest), device=device) * max(1, rest // max(count, 1))


def assign(keys: Tensor, targets: Tensor) -> Tensor:
    """[B, R] which of the M target keys [B, M, d] each key of [B, R, d] is closest to by cosine; ties to the first.

    A key that is zero or not finite is as close to one target as to another.
    """
    keys, targets = (F.normalize(torch.nan_to_num(t.float(), 0.0, 0.0, 0.0), dim=-1) for t in (keys, targets))
    # equal patches give equal cosines but for the last bits, which the kernel and hence the batch decide
    return (keys @ targets.mT).round(decimals=5).argmax(-1)


@dataclass
class VisionZip(Pruner):
    """VisionZip (arXiv 2412.04467): dominant patches by CLS attention, the rest merged by key similarity.

    Of the block that feeds the projector: the class token and the patches with the most attention from it, summed over
    heads, are dominant. Of the others, evenly spaced ones become targets, and each remaining one goes to the target
    whose head-mean key is closest by cosine; a contextual token is its target plus the mean of what went to it. The
    decoder sees the class token, the dominant patches in raster order, then the contextual tokens.

    The class token takes the number of the dropped patch with the least attention in the report, where it is marked
    as foreign (ours). One token is the class token alone. With M targets out of R patches, M < R always holds, as the
    budget is smaller than the image. Without a class token, as the paper has it, the dominant patches are those that get
    the most attention from all patches on average.

    Parameters:
        keep: tokens per image (int) or share of the patches (float): dominant, class token and contextual together.
        contextual: how many of them are contextual: a count, or a share of `keep` (rounded, leaving at least one
            dominant). None (ours) is the share 10/64, which is the published 54 + 10, 108 + 20 and 162 + 30.
        cls_token: keep the class token as one of the dominant, as published; nothing where there is none.
    Raises:
        BudgetError: for fields without meaning, or if `contextual` leaves no dominant token.
    """

    keep: Budget = 64
    contextual: int | float | None = None
    cls_token: bool = True

    name = "visionzip"
    paper = "VisionZip, arXiv 2412.04467 (CVPR 2025)"
    positions = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.cls_token, bool):
            raise BudgetError(f"cls_token={self.cls_token!r}: True or False.")
        m = self.contextual
        if m is None:
            return
        real = isinstance(m, numbers.Real) and not isinstance(m, bool)
        if not real or not (m >= 0 if isinstance(m, numbers.Integral) else 0.0 <= m < 1.0):
            raise BudgetError(f"contextual={m!r}: give an int >= 0 (tokens), a float in [0, 1) (share of keep), or None.")
        self.contextual = int(m) if isinstance(m, numbers.Integral) else float(m)
        for keep in self.keep if isinstance(self.keep, PerImage) else (self.keep,):
            if isinstance(keep, int):
                self.split(keep)

    def split(self, keep: int) -> tuple[int, int]:
        """(dominant, contextual) tokens of a budget of `keep`; the dominant ones include the class token.

        Raises:
            BudgetError: if there is no dominant token.
        """
        if isinstance(self.contextual, int):
            if self.contextual >= keep:
                raise BudgetError(
                    f"contextual={self.contextual} of {keep} tokens leaves no dominant one: lower contextual, or give a share."
                )
            return keep - self.contextual, self.contextual
        share = 10 / 64 if self.contextual is None else self.contextual
        contextual = min(round(share * keep), keep - 1)
        return keep - contextual, contextual

    def encode_needs(self, encoder: Encoder) -> dict[int, Needs]:
        return {encoder.depth - 1: Needs(queries="cls" if encoder.cls else "patches", keys=True)}

    def encode(self, view: EncodeView) -> Keep | None:
        target = view.target(self.keep)
        if view.tokens <= target:
            return None
        dominant, contextual = self.split(target)
        attention, cls_token = view.rows.attention()[:, :, 0].sum(1), self.cls_token
        if not view.special.shape[1]:
            view.note("visionzip: no class token, so patches are ranked by the attention that they get from all patches.")
            cls_token = False
        chosen = top(attention, dominant - cls_token)
        rest = without(chosen, view.tokens)
        spaced = targets_at(rest.shape[1], contextual, rest.device)
        targets = rest[:, spaced]
        members = rest[:, without(spaced[None], rest.shape[1])[0]]

        parts, vectors = [chosen, targets], [at(view.hidden, chosen)]
        into = torch.full_like(view.index, -1)
        if contextual:
            keys = view.rows.keys.float().mean(1)
            goes = assign(at(keys, members), at(keys, targets))
            mean = cluster_means(at(view.hidden, members).float(), goes, contextual)
            vectors.append((at(view.hidden, targets).float() + mean).to(view.hidden.dtype))
            into = into.scatter(1, members, targets.gather(1, goes))
        if not cls_token:
            return Keep(torch.cat(parts, 1), torch.cat(vectors, 1), into, ordered=True)
        least = torch.sort(torch.nan_to_num(attention.gather(1, members), nan=-1.0), stable=True).indices[:, :1]
        slot = members.gather(1, least)
        hidden = torch.cat([view.special[:, :1], *vectors], 1)
        return Keep(torch.cat([slot, *parts], 1), hidden, into, ordered=True, foreign=slot)
