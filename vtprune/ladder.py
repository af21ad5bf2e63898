"""Schedules: how many visual tokens each decoder layer computes on. Integer maths for strategies that cut more than once.

All of it is plain Python on as many numbers as there are layers; callers cache it per budget and token count.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from vtprune.pruner import BudgetError


def check_layers(layers: Any, last: int) -> tuple[int, ...]:
    """`layers`, which must be ints that rise within 0 .. `last`, numbered as in the papers' decoder of 32."""
    given = tuple(layers) if isinstance(layers, Sequence) else ()
    ints = all(isinstance(x, numbers.Integral) and not isinstance(x, bool) and 0 <= x <= last for x in given)
    if not given or not ints or list(given) != sorted(set(given)):
        raise BudgetError(f"layers={layers!r}: give ascending, distinct ints in 0 .. {last}, for a decoder of 32 layers.")
    return tuple(int(x) for x in given)


@lru_cache(maxsize=4096)
def cut_layers(curve: tuple[float, ...], cuts: int | None, first: int) -> tuple[int, ...]:
    """Where to cut so that a staircase of at most `cuts` cuts comes nearest to a falling curve.

    Dynamic programming over the ends of the stairs; the error is the sum over layers of the squared difference to the
    stair's mean. The first cut is always at `first`.

    Parameters:
        curve: non-increasing, one value per layer; cuts: at least 1, or None for one wherever the curve falls.
        first: layers before it stay whole.
    Returns:
        Ascending layers.
    """
    depth = len(curve)
    falls = tuple(layer for layer in range(first, depth) if layer == first or curve[layer] < curve[layer - 1])
    if cuts is None or len(falls) <= cuts:
        return falls

    def error(start: int, end: int) -> float:
        mean = math.fsum(curve[start:end]) / (end - start)
        return math.fsum((value - mean) ** 2 for value in curve[start:end])

    # best[end]: least error of the layers first .. end - 1 in so many stairs, and where those stairs start
    best = {end: (error(first, end), (first,)) for end in range(first + 1, depth + 1)}
    for stairs in range(2, cuts + 1):
        best = {
            end: min((best[start][0] + error(start, end), (*best[start][1], start)) for start in range(first + stairs - 1, end))
            for end in range(first + stairs, depth + 1)
        }
    return best[depth][1]


def rising_root(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """The least x in low .. high, to the last bit, at which a rising function is not below `value`; else high."""
    while low < (middle := (low + high) / 2) < high:
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return high


def spend(
    curve: Callable[[float], Sequence[float]],
    cuts: tuple[int, ...],
    total: int,
    tokens: int,
    depth: int,
    low: float,
    high: float,
) -> tuple[int, ...]:
    """Token counts per decoder layer, of a curve's shape, whose sum is the budget.

    The layers before the first cut compute on all `tokens`. The rest follow `curve(x)`, clipped to 1 .. `tokens`, with the
    x at which the sum over layers is `total`; each stair takes the mean of its layers, then a whole number.

    Parameters:
        curve: x -> one value in tokens per layer, non-increasing over layers and rising in x.
        cuts: ascending layers in 1 .. depth - 1, at least one.
        total: sum over layers to spend, the mean times `depth`.
        low, high: values of x that spend too little and enough.
    Returns:
        `depth` counts, non-increasing, at least 1. Their sum is `total` where the lengths of the stairs allow it (always
        if all are one layer long), else near it: never more than depth / 2 off, half a token of the mean.
    Raises:
        BudgetError: if even one token after the first cut exceeds `total`.
    """
    first = cuts[0]
    least = first * tokens + depth - first
    if total < least:
        need = math.ceil(least / depth)
        raise BudgetError(
            f"a budget of {total / depth:g} of {tokens} visual tokens, as the mean over {depth} decoder layers, cannot be "
            f"reached with a first cut before layer {first}: the layers before it alone cost {first * tokens / depth:.1f}. "
            f"Raise keep to at least {need} of {tokens} (a share of {math.ceil(1000 * need / tokens) / 1000})."
        )

    def clipped(x: float) -> list[float]:
        values = curve(x)
        return [float(tokens)] * first + [min(float(tokens), max(1.0, value)) for value in values[first:]]

    values = clipped(rising_root(lambda x: math.fsum(clipped(x)), total, low, high))
    ends = [*cuts[1:], depth]
    lengths = [end - start for start, end in zip(cuts, ends, strict=True)]
    means = [math.fsum(values[start:end]) / (end - start) for start, end in zip(cuts, ends, strict=True)]
    counts = whole(means, lengths, total - first * tokens, tokens)
    return (tokens,) * first + tuple(count for count, length in zip(counts, lengths, strict=True) for _ in range(length))


def whole(values: Sequence[float], lengths: Sequence[int], total: int, most: int) -> tuple[int, ...]:
    """Whole numbers near `values`, non-increasing in 1 .. `most`, whose sum weighted by `lengths` is nearest to `total`.

    Looked for within a few tokens of each value; among equally near sums the least squared change wins. Plain rounding
    is taken where it fits.
    """
    rounded = tuple(max(1, round(value)) for value in values)
    if sum(count * length for count, length in zip(rounded, lengths, strict=True)) == total:
        return rounded
    best = _near(values, lengths, total, most, 1)
    if best[0] and len(values) <= 8:  # few stairs, so that it stays quick, and more need of it
        best = min(best, _near(values, lengths, total, most, 4))
    return best[2]


def _near(
    values: Sequence[float], lengths: Sequence[int], total: int, most: int, reach: int
) -> tuple[int, float, tuple[int, ...]]:
    """(distance to the total, squared change, counts) of the best counts within `reach` of the values."""
    # (spent, last count) -> (squared change, counts)
    found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, most): (0.0, ())}
    for value, length in zip(values, lengths, strict=True):
        floor, after = math.floor(value), {}
        for (spent, last), (change, counts) in found.items():
            for count in range(max(1, floor - reach), min(last, floor + 1 + reach) + 1):
                key = (spent + length * count, count)
                new = (change + length * (count - value) ** 2, (*counts, count))
                if key not in after or new < after[key]:
                    after[key] = new
        found = after
    return min((abs(spent - total), *rest) for (spent, _), rest in found.items())


def stage_count(
    target: int, computed: tuple[int, ...], cuts: list[int], depth: int, later: float, least: int, other: str = ""
) -> int:
    """Tokens to leave at the next cut, for a mean over `depth` layers within 0.5 of `target`.

    For cuts at which not every count is free, so that it cannot be said beforehand (`spend` does). Every further cut is
    meant to leave `later` of the one before; each cut solves for what is left to spend, so that rounding at one is made
    good at the next.

    Parameters:
        computed: tokens that each layer before this cut computed on; cuts: layers before which this cut and the further
            ones come; least: tokens that no cut may drop (at least 1); other: what else the user can do, if not even
            they fit.
    Raises:
        BudgetError: if not even `least` tokens from here on meet the target.
    """
    spans = [end - start for start, end in zip(cuts, [*cuts[1:], depth], strict=True)]
    left = target * depth - sum(computed)
    if least * sum(spans) - left > depth / 2:
        need = math.ceil((sum(computed) + least * sum(spans)) / depth)
        raise BudgetError(
            f"keep: {target} visual tokens, as the mean over {depth} decoder layers, cannot be reached: the {len(computed)} "
            f"layers before the first cut alone cost {sum(computed) / depth:.1f}, and {least} tokens must stay after it. "
            f"Raise keep to at least {need}, or cut earlier (layers){other}."
        )
    share = left / sum(span * later**i for i, span in enumerate(spans))
    room = (left - least * sum(spans[1:])) / spans[0]
    return max(least, min(computed[-1], round(share), round(room)))
