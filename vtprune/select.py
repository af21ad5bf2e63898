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


def top_counts(scores: Tensor, counts: list[int]) -> Keep:
    """As `top`, with a count of its own for each row, in one tensor."""
    most = max(counts)
    order = ranked(scores)[:, :most]
    if min(counts) == most:
        return Keep(order.sort(-1).values)
    behind = torch.arange(most, device=scores.device) >= torch.tensor(counts, device=scores.device)[:, None]
    return Keep(order.masked_fill(behind, scores.shape[1]).sort(-1).values, counts=counts)


def top_cells(scores: Tensor, counts: list[int], cell: int) -> Keep:
    """As `top_counts`, but only whole cells of `cell` neighbours stay: those with the highest mean that hold `counts`."""
    if cell == 1:
        return top_counts(scores, counts)
    keep = top_counts(scores.unflatten(1, (-1, cell)).float().mean(-1), [-(-n // cell) for n in counts])
    within = torch.arange(cell, device=scores.device)
    patches = (keep.indices[..., None] * cell + within).flatten(1)
    return Keep(patches, counts=keep.counts and [n * cell for n in keep.counts])


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
# On a GPU that is fast in fp64, all cosines are computed at once and `greedy.py` picks from the table. On a CPU the rows of
# the likeliest next picks are computed together (`_Table`), as one product reads all N rows once, be it of one row or of
# sixteen. Elsewhere a pick reads the N rows.

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
    if x.device.type == "cpu":
        return torch.stack([_loneliest(_unit(item), chunk) for item in x])
    # every pair at once is arithmetic, not memory traffic, and there fp64 is slow on most accelerators
    return _grid(_nearest(_unit(x).float(), chunk)).argmin(-1)


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
    if x.device.type == "cpu":
        return torch.stack([_determinant(_unit(item), exact(w), k) for item, w in zip(x, weight, strict=True)])
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
    if x.device.type == "cpu":
        return torch.stack([_spread_one(_unit(item), int(f), k, join) for item, f in zip(x, first, strict=True)])
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


class _Table:
    """Rows of one image's table of cosines on a CPU, computed a block at a time.

    Parameters:
        unit: fp64 [N, D], rows of length 1.
    """

    def __init__(self, unit: Tensor):
        self.unit = unit
        self.rows: dict[int, Tensor] = {}
        self.known = torch.zeros(len(unit), dtype=torch.bool)
        self.block, self.used = 1, 0

    def row(self, pick: int, merit: Tensor | None) -> Tensor:
        """[N] cosines of row `pick` with all rows.

        Parameters:
            merit: [N], the higher the likelier a row is to be asked for next; -inf for those that will not be. None: unknown.
        """
        if pick not in self.rows:
            # blocks grow while at least a third of the last one was needed; a row more costs a quarter of a row alone
            self.block = min(64, 2 * self.block) if 3 * self.used >= self.block else max(4, self.block // 2)
            ahead = [pick]
            if merit is not None:
                merit = merit.masked_fill(self.known, -torch.inf)
                merit[pick] = -torch.inf
                best = merit.topk(min(self.block - 1, len(merit)))
                ahead += best.indices[best.values > -torch.inf].tolist()
            self.rows.update(zip(ahead, self.unit[ahead] @ self.unit.T, strict=True))
            self.known[ahead] = True
            self.used = 0
        self.used += 1
        return self.rows[pick]


def _spread_one(unit: Tensor, first: int, k: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`_spread_out` for one image on a CPU."""
    table, picks = _Table(unit), [first]
    score = shown = None
    for _ in range(k - 1):
        row = table.row(picks[-1], None if shown is None else -shown)
        score = row.clone() if score is None else join(score, row)
        # of those taken, nothing is asked any more
        score[picks[-1]] = torch.inf
        shown = _grid(score)
        picks.append(int(shown.argmin()))
    return torch.tensor(sorted(picks))


def _determinant(unit: Tensor, weight: Tensor, k: int) -> Tensor:
    """`dpp` for one image on a CPU."""
    table, picks = _Table(unit), []
    left = torch.ones_like(weight)  # the part of each row outside the span of those taken
    square, hopeless = weight.square(), -1 / (1 + weight)
    factors = unit.new_zeros(k, len(unit))
    taken = torch.zeros(len(unit), dtype=torch.bool)
    for step in range(k):
        shown = _grid(left)
        gain = torch.where(shown > 0, square * shown, hopeless).float().masked_fill(taken, -torch.inf)
        pick = int(gain.argmax())
        picks.append(pick)
        taken[pick] = True
        rest = left[pick]
        # a row inside the span of those taken takes nothing from the others
        if _grid(rest) > 0:
            past = factors[:step]
            factors[step] = (table.row(pick, gain) - past[:, pick] @ past) / rest.sqrt()
            left = left - factors[step].square()
    return torch.tensor(sorted(picks))


def _nearest(rows: Tensor, chunk: int) -> Tensor:
    """[B, N] the largest product of each row of [B, N, D] with another one."""
    number = torch.arange(rows.shape[1], device=rows.device)
    nearest = []
    for part, own in zip(rows.split(chunk, 1), number.split(chunk), strict=True):
        near = torch.bmm(part, rows.transpose(1, 2)).masked_fill_(own[:, None] == number, -2.0)
        nearest.append(near.amax(-1))
    return torch.cat(nearest, 1)


def _loneliest(unit: Tensor, chunk: int) -> Tensor:
    """`loneliest` for one image on a CPU: fp32 leaves a few rows that it could be, and fp64 decides among them."""
    tokens, width = unit.shape
    # what all rows share is taken out before, as it would cost fp32 the digits in which they differ:
    # with u = m + v, u_i u_j = (m m + m v_i) + (m v_j + v_i v_j)
    mean = unit.mean(0)
    shared = mean @ mean
    along = unit @ mean - shared
    parts = [(part - mean).float() for part in unit.split(min(chunk, 512))]
    sides = along.float().split(min(chunk, 512))
    near = [part.new_full((len(part),), -4.0) for part in parts]
    for i, part in enumerate(parts):
        for j in range(i, len(parts)):  # the table is symmetric
            cosines = part @ parts[j].T
            if i == j:
                cosines.fill_diagonal_(-4.0)
            else:
                near[j] = torch.maximum(near[j], (cosines + sides[i][:, None]).amax(0))
            near[i] = torch.maximum(near[i], (cosines + sides[j]).amax(1))
    nearest = torch.cat(near).double() + along + shared
    # rounding to fp32 and a sum of D products, in whatever order, are off by no more than this
    largest = max(float(part.square().sum(1).max()) for part in parts)
    slack = ((width + 16) * largest + 4 * float(along.abs().max())) * 2.0**-24
    could = (nearest <= nearest.min() + 2 * slack + 1e-8).nonzero()[:, 0]
    if len(could) > tokens // 2:
        return _grid(_nearest(unit[None], chunk)[0]).argmin()
    best = []
    for some in could.split(chunk):
        cosines = unit[some] @ unit.T
        best.append(cosines.scatter_(1, some[:, None], -2.0).amax(1))
    return could[_grid(torch.cat(best)).argmin()]


def exact(x: Tensor) -> Tensor:
    """`x` in fp64, or in fp32 where the device has no more."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, or 0 where a row is zero."""
    x = exact(torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0))
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-30))


def _against(vector: Tensor, rows: Tensor) -> Tensor:
    """[B, N] products of `vector` [B, D] with every row of [B, N, D]."""
    return torch.bmm(vector[:, None], rows.transpose(1, 2))[:, 0]


def _grid(x: Tensor) -> Tensor:
    return torch.round(x, decimals=8)
