"""The greedy selections of `select.py` on a CUDA device: all picks of a batch in a handful of launches.

Each pick follows from the one before it, so a loop of torch operations waits for a launch ten times per pick. Here one
program per item holds its scores in registers and makes the picks; what it reads is one row of the item's table of cosines.
Same rules as in `select.py`: fp64, the grid, ties to the lower index. Imports triton, so it is imported where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1.5 * 2^52: adding and subtracting it rounds an fp64 number below 2^51 to an integer, halves to even
_ROUND = tl.constexpr(6755399441055744.0)
# picks between two updates of the table of what lies outside the span of those taken
SPAN = 32


@triton.jit
def _grid(x):
    """`x` in steps of 1e-8, as an integer."""
    return (x * 100000000.0 + _ROUND) - _ROUND


@triton.jit(do_not_specialize=["tokens", "k"])
def _spread(cosines, first, picks, tokens, k, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < tokens
    cosines += item * tokens * tokens
    picks += item * k
    pick = tl.load(first + item).to(tl.int32)
    tl.store(picks, pick.to(tl.int64))
    never = tl.full([BLOCK], float("inf"), tl.float64)
    start = tl.full([BLOCK], float("-inf") if LARGEST else 0.0, tl.float64)
    score = tl.where(inside, start, never)
    for step in range(1, k):
        near = tl.load(cosines + pick * tokens + at, mask=inside, other=0.0)
        score = tl.maximum(score, near) if LARGEST else score + near
        score = tl.where(at == pick, never, score)
        shown = _grid(score)
        pick = tl.min(tl.where(shown == tl.min(shown, 0), at, BLOCK), 0)
        tl.store(picks + step, pick.to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "k", "start", "stop"])
def _determinant(
    outside, square, hopeless, left, factors, picks, tokens, k, start, stop, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    item = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < tokens
    outside += item * tokens * tokens
    factors += item * k * tokens
    picks += item * k
    here = item * tokens + at
    gone = tl.full([BLOCK], float("-inf"), tl.float64)
    zero = tl.full([BLOCK], 0.0, tl.float64)
    squares = tl.load(square + here, mask=inside, other=0.0)
    without = tl.load(hopeless + here, mask=inside, other=0.0)
    rest = tl.load(left + here, mask=inside, other=float("-inf"))  # -inf: taken, or no token
    for step in range(start, stop):
        shown = _grid(rest) / 100000000.0
        gain = tl.where(shown > 0, squares * shown, without)
        gain = tl.where(rest == gone, gone, gain).to(tl.float32)
        pick = tl.min(tl.where(gain == tl.max(gain, 0), at, BLOCK), 0)
        tl.store(picks + step, pick.to(tl.int64))
        own = tl.sum(tl.where(at == pick, rest, zero), 0)
        row = tl.load(outside + pick * tokens + at, mask=inside, other=0.0)
        # what the picks since `start` have in common with this one; earlier ones are taken out of `outside` already
        for past in range(start, step, UNROLL):
            for one in tl.static_range(UNROLL):
                factor = factors + (past + one) * tokens
                some = past + one < step
                common = tl.load(factor + pick, mask=some, other=0.0)
                row -= common * tl.load(factor + at, mask=inside & some, other=0.0)
        # a row inside the span of those taken takes nothing from the others
        spans = _grid(own) > 0
        row = tl.where(spans, row / tl.sqrt(tl.where(spans, own, 1.0)), zero)
        tl.store(factors + step * tokens + at, row, mask=inside)
        rest = tl.where(at == pick, gone, rest - row * row)
        tl.debug_barrier()
    tl.store(left + here, rest, mask=inside)


def spread_out(cosines: Tensor, first: Tensor, k: int, largest: bool, warps: int | None = None) -> Tensor:
    """LongTensor [B, k], in the order of picking: from `first` on, always the row of least score.

    Parameters:
        cosines: fp64 [B, N, N], contiguous; the diagonal is not read into any score.
        first: LongTensor [B].
        largest: the score is the largest cosine to one taken; otherwise the sum of them.
        warps: of a program; None chooses by N.
    """
    batch, tokens = cosines.shape[:2]
    block = triton.next_power_of_2(tokens)
    picks = torch.empty(batch, k, dtype=torch.long, device=cosines.device)
    _spread[(batch,)](cosines, first, picks, tokens, k, LARGEST=largest, BLOCK=block, **_options(block, warps))
    return picks


def determinant(cosines: Tensor, weight: Tensor, k: int, warps: int | None = None, span: int = SPAN) -> Tensor:
    """LongTensor [B, k], in the order of picking: greedy MAP of the kernel diag(weight) cosines diag(weight).

    Parameters:
        cosines: fp64 [B, N, N], contiguous; overwritten.
        weight: fp64 [B, N].
        warps: as in `spread_out`; span: picks between two updates of the table.
    """
    batch, tokens = cosines.shape[:2]
    block = triton.next_power_of_2(tokens)
    picks = torch.empty(batch, k, dtype=torch.long, device=cosines.device)
    factors = torch.empty(batch, k, tokens, dtype=cosines.dtype, device=cosines.device)
    left, square, hopeless = torch.ones_like(weight), weight.square(), -1 / (1 + weight)
    for start in range(0, k, span):
        stop = min(k, start + span)
        tensors = (cosines, square, hopeless, left, factors, picks)
        _determinant[(batch,)](*tensors, tokens, k, start, stop, BLOCK=block, UNROLL=4, **_options(block, warps))
        if stop < k:
            mine = factors[:, start:stop]
            cosines.baddbmm_(mine.transpose(1, 2), mine, alpha=-1)
    return picks


def _options(block: int, warps: int | None) -> dict[str, int | bool]:
    # a fused multiply-add rounds once where the CPU rounds twice
    return {"num_warps": warps or max(1, min(16, block // 128)), "enable_fp_fusion": False}
