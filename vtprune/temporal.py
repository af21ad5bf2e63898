"""Temporal redundancy of video tokens: the baselines' selection maths as pure functions on tensors.

Features are [B, T, N, D]: B videos of T frames with N tokens of width D each, or [T, N, D] for one. Returned indices count
tokens in raster order over the whole video, frame t's token n being t * N + n; they ascend, and lose the batch dimension
where the features have none. Frames are compared position by position through cosines that are equal wherever they are on
paper, whatever the batch; all-zero tokens have cosine 0 to every token, NaN and infinite entries count as zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtprune.pruner import Budget, BudgetError, UnsupportedError, budget_tokens, check_budget
from vtprune.select import exact, marked, ranked, spread, top

# scores compared on a grid far coarser than the error of their sums and far finer than any difference that matters
_DECIMALS = 8


class Merge(NamedTuple):
    """What `dycoke_merge` keeps.

    Attributes:
        kept: LongTensor [B, K].
        into: LongTensor [B, T * N]: for a token that is not kept the kept token that stands for it, -1 for a kept one.
    """

    kept: Tensor
    into: Tensor


def evs_count(frames: int, tokens: int, rate: float) -> int:
    """Tokens that EVS keeps of a video at pruning rate `rate`, 0 <= rate < 1: never fewer than one frame's."""
    if not 0 <= rate < 1:
        raise BudgetError(f"rate={rate!r}: give a pruning rate in [0, 1).")
    return max(tokens, int(frames * tokens * (1 - rate)))


def evs(features: Tensor, keep: Budget) -> Tensor:
    """The `keep` tokens that differ most from their position's token one frame before (Efficient Video Sampling, in vLLM).

    The score is 1 - cosine; the first frame is always kept whole. Ties go to the lower index.

    Parameters:
        features: [B, T, N, D] or [T, N, D], any float dtype.
        keep: tokens per video (int) or share of them (float); at least one frame's.
    Returns:
        LongTensor [B, keep], or [keep].
    Raises:
        BudgetError: fewer tokens than a frame has.
    """
    batch = _batched(features)
    items, frames, tokens, _ = batch.shape
    k = budget_tokens(check_budget(keep), frames * tokens)
    if k < tokens:
        raise BudgetError(
            f"keep={keep!r} is {k} of {frames} x {tokens} tokens, fewer than the first frame, which EVS keeps whole: "
            f"raise keep to at least {tokens}, or use fewer frames."
        )
    # a frame at a time, which bounds the memory
    change = [1 - _cosine(batch[:, t], batch[:, t - 1]) for t in range(1, frames)]
    first = torch.full((items, tokens), torch.inf, device=batch.device)
    return _like(features, top(torch.cat([first, *change], 1), k))


def uniform_frames(frames: int, tokens: int, k: int, device: torch.device | None = None) -> Tensor:
    """`k` tokens in whole frames evenly spaced in time, the rest of `k` evenly spaced within the last of them.

    Frame dropping alone reaches only multiples of a frame; the partial frame makes it exact (ours).

    Parameters:
        frames, tokens: frames and tokens per frame.
        k: 1 <= k <= frames * tokens.
    Returns:
        LongTensor [k].
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= frames * tokens:
        raise BudgetError(f"k={k!r} of {frames} x {tokens} tokens: give an int in 1 .. {frames * tokens}.")
    whole, rest = divmod(k, tokens)
    taken = spread(frames, whole + bool(rest), device)
    every = torch.arange(tokens, device=device)
    part = taken[whole:] * tokens + spread(tokens, max(1, rest), device)  # empty without a rest
    return torch.cat([(taken[:whole, None] * tokens + every).flatten(), part])


def dycoke_merge(features: Tensor, k: float = 0.7, window: int = 4) -> Merge:
    """Temporal merging of DyCoke (arXiv 2411.15024), its first stage: tokens like those of an earlier frame are dropped.

    In each window of four frames the second is compared with the first, the fourth with the third, and the third with
    the first; the share `k` of its tokens most similar to the same position there is dropped, the first frame of each
    window stays whole. Comparisons are with the frames as given, not as reduced. In a window of any other length frame i
    is compared with i less its lowest set bit, which for 4 is the paper's (ours).

    The published code leaves the third frame of the last window whole and loses the last of an odd number of frames;
    here every window is treated alike and every frame counts. It also drops what it calls merged; `into` lets a caller
    average instead. Ties: the higher index is dropped.

    Parameters:
        features: [B, T, N, D] or [T, N, D], any float dtype.
        k: share of a compared frame's tokens to drop, 0 <= k <= 1; int((1 - k) * N) stay.
        window: frames in a window, at least 1.
    """
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 <= k <= 1:
        raise BudgetError(f"k={k!r}: give a share in 0 .. 1.")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise BudgetError(f"window={window!r}: give an int >= 1.")
    batch = _batched(features)
    items, frames, tokens, _ = batch.shape
    stay = int((1 - k) * tokens + 1e-9)  # 1 - 0.9 is a little less than 0.1
    rows = []
    for t in range(frames):
        place = t % window
        if place:
            likeness = _cosine(batch[:, t], batch[:, t - (place & -place)])
            rows.append(marked(ranked(-likeness)[:, :stay], tokens))
        else:
            rows.append(torch.ones(items, tokens, dtype=torch.bool, device=batch.device))
    mask = torch.stack(rows, 1)
    compared = frames - -(-frames // window)
    kept = ranked(mask.flatten(1))[:, : frames * tokens - compared * (tokens - stay)]
    # a token stands for itself, or is what its earlier frame's token at the same position came to
    number = torch.arange(frames, device=batch.device)
    place = number % window
    source = number[:, None].expand(items, frames, tokens)
    reference = number - (place & -place)
    for _ in range(window.bit_length()):
        # every step clears the lowest set bit of the place in the window
        gone = ~mask.gather(1, source)
        source = torch.where(gone, reference[source], source)
    into = source * tokens + torch.arange(tokens, device=batch.device)
    into = into.masked_fill(mask, -1).flatten(1)
    return Merge(_like(features, kept), _like(features, into))


def _batched(features: Tensor) -> Tensor:
    if features.ndim not in (3, 4) or not features.is_floating_point() or 0 in features.shape:
        raise UnsupportedError(
            f"features of shape {tuple(features.shape)}, {features.dtype}: give floats [B, T, N, D] or [T, N, D], not empty."
        )
    return features if features.ndim == 4 else features[None]


def _like(features: Tensor, found: Tensor) -> Tensor:
    return found if features.ndim == 4 else found[0]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """[B, N] cosines of a and b [B, N, D], on the grid."""
    # fp64: sums in fp32 differ with the batch and the kernel, and what is equal on paper must tie
    a, b = (torch.nan_to_num(exact(x), nan=0.0, posinf=0.0, neginf=0.0) for x in (a, b))
    a, b = (x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (a, b))
    norms = a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt()
    cosine = torch.where(norms > 0, (a * b).sum(-1) / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)
    return torch.round(cosine, decimals=_DECIMALS)
