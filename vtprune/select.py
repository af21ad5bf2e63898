"""Selection maths that more than one paper uses: pure functions on tensors, nothing else (`Rows` and `Keep` hold tensors)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from vtprune.pruner import Keep, Rows


def ranked(scores: Tensor) -> Tensor:
    """LongTensor [B, N]: indices from the highest score to the lowest; ties to the lower index, NaN last.

    Parameters:
        scores: [B, N], any float dtype; compared in fp32.
    """
    scores = torch.nan_to_num(scores.float(), nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # a stable sort, not topk: topk leaves the order of equal scores to the kernel, hence to device and batch
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top(scores: Tensor, k: int) -> Tensor:
    """Ascending indices of the `k` largest scores of each row; ties go to the lower index.

    Parameters:
        scores: [B, N], any float dtype; compared in fp32. NaN counts as the smallest value.
        k: 1 <= k <= N.
    Returns:
        LongTensor [B, k].
    """
    return ranked(scores)[..., :k].sort(-1).values


def top_ragged(scores: Tensor, counts: list[int]) -> list[Tensor]:
    """As `top`, with a count of its own for each row."""
    return [row[:k].sort().values for row, k in zip(ranked(scores), counts, strict=True)]


def chosen(mask: Tensor) -> Keep | None:
    """The tokens marked in a bool [B, N], None if all are."""
    counts = mask.sum(1).tolist()  # decides shapes
    if min(counts) == mask.shape[1]:
        return None
    return Keep([row[:n] for row, n in zip(ranked(mask), counts, strict=True)])


def marked(indices: Tensor, tokens: int) -> Tensor:
    """[B, tokens] bool, True at `indices` [B, K]."""
    return torch.zeros(indices.shape[0], tokens, dtype=torch.bool, device=indices.device).scatter_(1, indices, True)


def without(taken: Tensor, tokens: int) -> Tensor:
    """LongTensor [B, tokens - K]: ascending, the indices of 0 .. tokens - 1 that are not in `taken` [B, K] (distinct)."""
    return ranked(~marked(taken, tokens))[:, : tokens - taken.shape[1]]


def at(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b]] for x [B, N, C] and index [B, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def row_mean(rows: Rows, of: Tensor | None = None) -> Tensor:
    """[B, N] fp32 attention, the mean over heads and over the query rows `of` [B, R] bool; zero where there is none.

    Parameters:
        of: some of the real rows; None for all of them.
    """
    of = rows.valid if of is None else of
    attention = rows.attention().mean(1).masked_fill(~of[..., None], 0.0)
    return attention.sum(1) / of.sum(-1, keepdim=True).clamp(min=1)


def spread(tokens: int, k: int, device: torch.device | None = None) -> Tensor:
    """LongTensor [k]: evenly spaced indices floor((i + 0.5) * tokens / k), strictly ascending."""
    return ((2 * torch.arange(k, device=device) + 1) * tokens).div(2 * k, rounding_mode="floor")


# Greedy selections. Each pick follows from all before it, so one near-tie that falls the other way changes the rest of the set.
# Kernels sum in an order of their own (it differs with the batch, the thread count, even the row), hence fp64, compared
# on a grid far coarser than its error and far finer than any difference that matters: what is equal on paper ties.
# On a GPU that is fast in fp64, all cosines are computed at once and `greedy.py` picks from the table; elsewhere a pick reads
# the N rows once, and no N x N table is made.

# bytes of tables of cosines at a time: a batch goes through in parts, images of more tokens go without
_TABLES = 1 << 30
_LONGEST = 8192


def max_sum(x: Tensor, first: Tensor, k: int) -> Tensor:
    """Greedy max-sum diversity: from `first`, always add the row whose summed cosine to those taken is least.

    Parameters:
        x: [B, N, D], any float dtype, no padding. An all-zero row has cosine 0 to every row; NaN and infinite entries
            count as zero.
        first: LongTensor [B], the row to start from.
        k: 1 <= k <= N.
    Returns:
        LongTensor [B, k], ascending. Ties go to the lower index.
    """
    return _spread_out(x, first, k, torch.add)


def k_center(x: Tensor, first: Tensor, k: int) -> Tensor:
    """Greedy k-center (farthest-first, max-min): as `max_sum`, but the row whose largest cosine to one taken is least."""
    return _spread_out(x, first, k, torch.maximum)


def max_min(x: Tensor, k: int) -> Tensor:
    """`k_center` from the `loneliest` row on: LongTensor [B, k], ascending."""
    kernels = _kernels(x)
    if kernels is None:
        return k_center(x, loneliest(x), k)
    return _by_table(x, lambda table, part: kernels.spread_out(table, _apart(table), k, largest=True))


def loneliest(x: Tensor, chunk: int = 1024) -> Tensor:
    """LongTensor [B]: the row of `x` [B, N, D] whose largest cosine to another row is least; ties as in `max_sum`.

    Looks at `chunk` rows at a time where there is no table of all cosines, so that memory stays linear in N.
    """
    if _kernels(x) is not None:
        return _by_table(x, lambda table, part: _apart(table)[:, None])[:, 0]
    # every pair at once is arithmetic, not memory traffic, and there fp64 is slow on most accelerators
    rows = _unit(x) if x.device.type == "cpu" else _unit(x).float()
    number = torch.arange(rows.shape[1], device=x.device)
    nearest = []
    for part, own in zip(rows.split(chunk, 1), number.split(chunk), strict=True):
        near = torch.bmm(part, rows.transpose(1, 2)).masked_fill_(own[:, None] == number, -2.0)
        nearest.append(near.amax(-1))
    return _grid(torch.cat(nearest, 1)).argmin(-1)


def dpp(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """Greedy MAP of the determinantal point process with kernel diag(weight) S diag(weight), S the cosines of `x`.

    Incremental Cholesky on S: O(N k^2 + N k D) time, O(N k) memory (on a GPU that is fast in fp64 O(N^2 (k + D)) and O(N^2)).
    Where the rows taken span the rest (more picks than the rank of S, duplicates), every determinant is zero and the
    remaining picks go by weight.

    Parameters:
        x: [B, N, D] as for `max_sum`; an all-zero row is orthogonal to all others.
        weight: [B, N], finite, not negative.
        k: 1 <= k <= N.
    Returns:
        LongTensor [B, k], ascending. Ties go to the lower index.
    """
    kernels = _kernels(x)
    if kernels is not None:
        return _by_table(x, lambda table, part: kernels.determinant(table, exact(weight[part]), k))
    rows = _unit(x)
    items = torch.arange(len(rows), device=x.device)
    weight = weight.to(rows.dtype)
    left = torch.ones_like(weight)  # the part of each row outside the span of those taken
    factors = rows.new_zeros(rows.shape[0], k, rows.shape[1])
    taken = torch.zeros_like(left, dtype=torch.bool)
    picks = []
    for step in range(k):
        shown = _grid(left)
        gain = torch.where(shown > 0, weight.square() * shown, -1 / (1 + weight))
        pick = gain.float().masked_fill(taken, -torch.inf).argmax(-1)
        picks.append(pick)
        taken[items, pick] = True
        past = factors[:, :step]
        row = _against(rows[items, pick], rows) - _against(past[items, :, pick], past.transpose(1, 2))
        rest = left[items, pick][:, None]
        # a row inside the span of those taken takes nothing from the others
        factors[:, step] = torch.where(_grid(rest) > 0, row / rest.clamp(min=1e-9).sqrt(), 0)
        left = left - factors[:, step].square()
    return torch.stack(picks, -1).sort(-1).values


def _spread_out(x: Tensor, first: Tensor, k: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    kernels = _kernels(x)
    if kernels is not None:
        largest = join is torch.maximum
        return _by_table(x, lambda table, part: kernels.spread_out(table, first[part], k, largest))
    rows = _unit(x)
    items = torch.arange(len(rows), device=x.device)
    pick, picks = first, [first]
    score = None
    taken = torch.zeros(rows.shape[:2], dtype=torch.bool, device=x.device)
    for _ in range(k - 1):
        taken[items, pick] = True
        near = _against(rows[items, pick], rows)
        score = near if score is None else join(score, near)
        # argmin returns the first of equal values on every device
        pick = _grid(score).masked_fill(taken, torch.inf).argmin(-1)
        picks.append(pick)
    return torch.stack(picks, -1).sort(-1).values


def _kernels(x: Tensor) -> ModuleType | None:
    """`vtprune.greedy`, if it serves this device and so many tokens."""
    return _greedy(x.device) if x.is_cuda and x.shape[1] <= _LONGEST else None


@cache
def _greedy(device: torch.device) -> ModuleType | None:
    # elsewhere fp64 runs at 1/32 or 1/64 of the speed of fp32, and the table costs more than it saves
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) not in {
        (6, 0),
        (7, 0),
        (8, 0),
        (9, 0),
        (10, 0),
    }:
        return None
    try:
        from vtprune import greedy
    except ImportError:  # torch for this platform brings no triton
        return None
    return greedy


def _by_table(x: Tensor, choose: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What `choose` picks from fp64 tables of cosines [b, N, N], one part of the batch after the other; ascending."""
    tokens = x.shape[1]
    size = max(1, _TABLES // (8 * tokens * tokens))
    picks = []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = _unit(x[part])
        picks.append(choose(torch.bmm(rows, rows.transpose(1, 2)), part))
    return torch.cat(picks).sort(-1).values


def _apart(table: Tensor) -> Tensor:
    """LongTensor [B]: the row whose largest cosine to another is least; overwrites the diagonal."""
    table.diagonal(dim1=1, dim2=2).fill_(-2.0)
    return _grid(table.amax(-1)).argmin(-1)


def exact(x: Tensor) -> Tensor:
    """`x` in fp64, or in fp32 where the device has no more."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, or 0 where a row is zero."""
    x = torch.nan_to_num(exact(x), nan=0.0, posinf=0.0, neginf=0.0)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-30)


def _against(vector: Tensor, rows: Tensor) -> Tensor:
    """[B, N] products of `vector` [B, D] with every row of [B, N, D]."""
    return torch.bmm(vector[:, None], rows.transpose(1, 2))[:, 0]


def _grid(x: Tensor) -> Tensor:
    return torch.round(x, decimals=8)
