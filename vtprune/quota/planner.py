"""Scores to token counts and grids, one per frame. Host arithmetic in float64: the numbers decide shapes."""

from __future__ import annotations

import heapq
import math
import numbers
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vtprune.pruner import BudgetError, UnsupportedError
from vtprune.quota.score import check_scores

Grid = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What each of T frames gets; a frame with a count of zero is dropped.

    Parameters:
        budget: visual tokens asked for, newlines not counted.
        shares: of the budget, after cap and floor; they sum to 1 except where the published cap loses some.
        counts: tokens granted, what reducers to a flat list use.
        grids: (rows, columns), what reducers to a grid use; (0, 0) for a dropped frame.
        native: (rows, columns) of each frame's features.
    """

    budget: int
    shares: tuple[float, ...]
    counts: tuple[int, ...]
    grids: tuple[Grid, ...]
    native: tuple[Grid, ...]

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames that stay, ascending."""
        return tuple(i for i, count in enumerate(self.counts) if count)

    @property
    def tokens(self) -> int:
        """Visual tokens over all grids; less than `budget` where no grids of that many fit."""
        return sum(rows * columns for rows, columns in self.grids)


def plan(
    scores: Any,
    budget: int,
    native: Grid | Sequence[Grid],
    *,
    power: float = 2.0,
    cap: int | None = None,
    floor: int = 0,
    source: Sequence[Hashable] | None = None,
    parity: bool = False,
) -> Plan:
    """Divide a budget over frames in proportion to score ** power, QuoTA's rule (arXiv 2503.08689).

    By default (ours) no frame gets more than its native grid; what it cannot take goes to the others in proportion, to those
    with score zero last and evenly. Counts add up to the budget, or to all there is; the remainders go to the largest
    fractions, those of equal scores spread over time. A grid keeps near the native aspect, and what rounding to grids leaves
    over is spent on rows and columns of the frames that lost most. All scores zero means all frames alike.

    Parameters:
        scores: [T], finite and >= 0: tensor, array or sequence.
        budget: visual tokens for all frames.
        native: (rows, columns) of every frame's features before pooling, or one pair per frame.
        power: 0 spends evenly, larger values favour the best frames.
        cap: most tokens of a frame, None for its native grid. With parity=True None means no cap at all (bilinear), a number
            the published single sweep, which may lose a part of the budget.
        floor: fewest tokens of a frame, 0 to drop frames.
        source: which frame of the video each one is; repeats of a frame get nothing. None: all are different.
        parity: the published arithmetic to the token: counts truncated, grids near square whatever the native one (larger
            than it for a very relevant frame). `floor` and `source` cannot be had then.
    Raises:
        BudgetError: for a budget below 1, or below the sum of the floors, or options without meaning.
        UnsupportedError: for scores that `check_scores` refuses, or grids or sources that do not match them.
    """
    scores = check_scores(scores)
    for name, value, least in (("budget", budget, 1), ("cap", cap, 1), ("floor", floor, 0)):
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not (name == "cap" and value is None) and not (whole and value >= least):
            raise BudgetError(f"{name}={value!r}: give a whole number of tokens, at least {least}.")
    if isinstance(power, bool) or not isinstance(power, numbers.Real) or not (0 <= power < math.inf):
        raise BudgetError(f"power={power!r}: give a finite number >= 0.")
    grids = _natives(native, len(scores))
    if parity:
        if floor or source is not None:
            raise BudgetError("parity=True is the published rule, which knows neither floor nor source; leave them out.")
        return _published(scores, int(budget), grids, power, cap)

    cells = np.array([rows * columns for rows, columns in grids])
    most = cells if cap is None else np.minimum(cells, cap)
    if source is not None:
        if len(source) != len(scores):
            raise UnsupportedError(f"{len(source)} sources for {len(scores)} scores: one per frame, in the same order.")
        first = {}
        most = np.where([first.setdefault(frame, i) == i for i, frame in enumerate(source)], most, 0)
    least = np.minimum(most, floor)
    total = min(int(budget), int(most.sum()))
    if least.sum() > total:
        raise BudgetError(
            f"a floor of {floor} tokens for {int((most > 0).sum())} frames takes {int(least.sum())}, the budget is {budget}: "
            f"raise the budget, lower the floor or sample fewer frames."
        )
    weights = _weights(scores, power) * (most > 0)
    amounts = water_fill(weights, total, least, most)
    counts = _whole(amounts, total, most, scores)
    chosen = _spend([grid(int(n), g) if n else (0, 0) for n, g in zip(counts, grids, strict=True)], counts, most, grids, total)
    return Plan(int(budget), tuple((amounts / total).tolist()), tuple(counts.tolist()), tuple(chosen), grids)


def water_fill(weights: np.ndarray, total: float, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """float64 [T]: the amounts clip(level * weight, least, most) that add up to `total`.

    Where all with a weight are at their most, the rest goes evenly to those with weight zero.

    Parameters:
        weights: [T] >= 0; least, most: [T] with sum(least) <= total <= sum(most).
    """
    amounts = np.array(least, np.float64)
    for group, weight in ((weights > 0, weights), (weights <= 0, np.ones_like(weights))):
        left = total - amounts[~group].sum()
        amounts[group] = _level(weight[group], left, np.asarray(least)[group], np.asarray(most)[group])
    return amounts


def redistribute(shares: np.ndarray, cap: float) -> np.ndarray:
    """The published cap on shares: one sweep in the order of time, in which a part of what is cut off may be lost."""
    over = np.maximum(shares - cap, 0.0).sum()
    shares = np.minimum(shares, cap)
    total = shares.sum()
    if over <= 0:
        return shares
    for i in range(len(shares)):
        if shares[i] < cap:
            shares[i] += over * shares[i] / total
            if shares[i] > cap:
                over += shares[i] - cap
                shares[i] = cap
    return shares


@lru_cache(maxsize=4096)
def grid(tokens: int, native: Grid) -> Grid:
    """The (rows, columns) of at most `tokens` cells, within the native grid, that shrink it least.

    Of all, the one whose more reduced side is reduced least, then the one with most cells, then the one with more rows. On
    square grids that is the published rule, but for a second column where it fits.
    """
    high, wide = native
    sizes = ((min(high, tokens // columns), columns) for columns in range(1, min(wide, tokens) + 1))
    return max(sizes, key=lambda size: (_scale(size, native), size[0] * size[1], size[0]))


def published_grid(tokens: int) -> Grid:
    """QuoTA's grid for a count: s x s, or s + 1 rows of s where they fit."""
    side = math.isqrt(tokens)
    return (side + 1, side) if side * (side + 1) <= tokens and side else (side, side)


# ---------------------------------------------------------------------- inside


def _published(scores: np.ndarray, budget: int, native: tuple[Grid, ...], power: float, cap: int | None) -> Plan:
    raw = (100 * scores) ** power
    total = raw.sum()
    # the published code stops at a sum of zero
    shares = raw / total if 0 < total < math.inf else _weights(scores, power) / _weights(scores, power).sum()
    if cap is not None:
        shares = redistribute(shares, cap / budget)
    counts = tuple((budget * shares).astype(np.int64).tolist())
    return Plan(budget, tuple(shares.tolist()), counts, tuple(published_grid(n) for n in counts), native)


def _weights(scores: np.ndarray, power: float) -> np.ndarray:
    best = scores.max()
    if best == 0:
        return np.ones_like(scores)
    weights = (scores / best) ** power
    # positive ones stay so, and a count divided by one stays finite
    return np.where(scores > 0, np.maximum(weights, 1e-200), weights)


def _level(weights: np.ndarray, total: float, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """`water_fill` for weights above zero, of as much of `total` as fits."""
    if not len(weights) or total >= most.sum():
        return most.astype(np.float64)
    levels = np.unique(np.concatenate([least / weights, most / weights]))
    at = max(0, bisect_right(levels, total, key=lambda level: np.clip(level * weights, least, most).sum()) - 1)
    # between two levels the same frames are at neither limit; the middle tells which without rounding
    middle = levels[at] / 2 + levels[min(at + 1, len(levels) - 1)] / 2
    amounts = np.clip(middle * weights, least, most)
    free = (amounts > least) & (amounts < most)
    if free.any():
        level = (total - amounts[~free].sum()) / weights[free].sum()
        amounts[free] = np.clip(level * weights, least, most)[free]
    return amounts


def _whole(amounts: np.ndarray, total: int, most: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to `total`, each amount rounded up or down; equal fractions up for the higher score."""
    counts = np.minimum(np.floor(amounts + 1e-9).astype(np.int64), most)
    fraction = np.where(counts < most, np.round(amounts - counts, 9), -1.0)
    order = np.lexsort((_spread(len(amounts)), -scores, -fraction))
    counts[order[: total - counts.sum()]] += 1
    return counts


def _spread(count: int) -> np.ndarray:
    """A rank per frame of which every beginning is spread over time: the frame's number with its bits reversed."""
    bits = max(1, (count - 1).bit_length())
    return np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)])


def _spend(sizes: list[Grid], counts: np.ndarray, most: np.ndarray, native: tuple[Grid, ...], total: int) -> list[Grid]:
    """Give what rounding to grids left over to frames in the order of what they lost, until no row or column fits."""
    left = total - sum(rows * columns for rows, columns in sizes)
    rank = _spread(len(sizes)).tolist()
    queue = [(math.prod(sizes[i]) - int(counts[i]), rank[i], i) for i in np.flatnonzero(counts).tolist()]
    heapq.heapify(queue)
    while queue and left:
        lost, place, i = heapq.heappop(queue)
        (rows, columns), (high, wide) = sizes[i], native[i]
        area = rows * columns
        longer = ([(rows + 1, columns)] if rows < high else []) + ([(rows, columns + 1)] if columns < wide else [])
        longer = [size for size in longer if math.prod(size) <= min(area + left, int(most[i]))]
        if longer:
            sizes[i] = max(longer, key=lambda size: (_scale(size, native[i]), size))
            gained = math.prod(sizes[i]) - area
            left -= gained
            heapq.heappush(queue, (lost + gained, place, i))
    if not left:
        return sizes
    # less than a row of any frame; one of them may have a grid of just that many cells more
    best = None
    for i in np.flatnonzero(counts).tolist():
        size = _exactly(math.prod(sizes[i]) + left, native[i], int(most[i]))
        if size is not None:
            kept = _scale(size, native[i]) / _scale(sizes[i], native[i])
            best = max(best or (-1.0,), (kept, -rank[i], i, size))
    if best is not None:
        sizes[best[2]] = best[3]
    return sizes


@lru_cache(maxsize=4096)
def _exactly(tokens: int, native: Grid, most: int) -> Grid | None:
    """The grid of exactly `tokens` cells that shrinks the native one least; None if all are stretched more than twofold."""
    high, wide = native
    sizes = [(tokens // n, n) for n in range(1, wide + 1) if tokens % n == 0 and tokens // n <= high]
    sizes = [size for size in sizes if max(size[0] * wide, size[1] * high) <= 2 * _scale(size, native)]
    return max(sizes, key=lambda size: (_scale(size, native), size), default=None) if tokens <= most else None


def _scale(size: Grid, native: Grid) -> int:
    """By how much the more reduced side is reduced, in units that only compare on one native grid."""
    return min(size[0] * native[1], size[1] * native[0])


def _natives(native: Any, frames: int) -> tuple[Grid, ...]:
    pairs = list(native)
    if len(pairs) == 2 and all(isinstance(n, numbers.Integral) for n in pairs):
        pairs = [tuple(pairs)] * frames
    if len(pairs) != frames:
        raise UnsupportedError(f"{len(pairs)} native grids for {frames} scores: one per frame, or one pair for all.")
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise UnsupportedError(f"native={native!r}: a grid has at least one row and one column.")
    return tuple((int(rows), int(columns)) for rows, columns in pairs)
