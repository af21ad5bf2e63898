"""MustDrop's thresholds for a mean number of visual tokens, by bisection on a calibration set.

"Multi-Stage Vision Token Dropping", arXiv 2411.10803, 2024: thresholds were tuned per benchmark to reach 192, 128 or 64
tokens on average. How is not published; a fixed ratio of the two thresholds and bisection are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtprune.search.judge import SearchError

# individual_thr / global_thr of the published setting for 64 tokens (0.01 and 0.011)
RATIO = 0.01 / 0.011
LOW, HIGH = 1e-7, 1.0


@dataclass(frozen=True)
class Found:
    """Thresholds, and the mean number of visual tokens per decoder layer and image that they leave."""

    global_thr: float
    individual_thr: float
    tokens: float
    trace: list[dict[str, Any]]


def search(
    evaluate: Callable[[float, float], float],
    target: float,
    ratio: float = RATIO,
    within: float = 0.01,
    trials: int = 20,
    watch: Callable[[int, float], None] = lambda trial, global_thr: None,
) -> Found:
    """Bisect ln(global_thr) in [ln 1e-7, 0], individual_thr = ratio * global_thr.

    Parameters:
        evaluate: (global_thr, individual_thr) -> mean visual tokens; never rises with the first.
        target: the mean wanted; within: relative distance that is near enough.
        watch: told of each trial before it runs: trial (from 1), global_thr.
    Raises:
        SearchError: if the target is outside of what the thresholds can reach, or no trial came near enough.
    """
    if not (math.isfinite(ratio) and ratio > 0 and 0 < within < 1 and trials >= 3):
        raise SearchError(f"ratio={ratio}, within={within}, trials={trials}: above 0, in (0, 1), and at least 3.")
    trace: list[dict[str, Any]] = []

    def tokens(log_thr: float) -> float:
        thr = float(f"{math.exp(log_thr):.6g}")
        watch(len(trace) + 1, thr)
        trace.append({"global_thr": thr, "individual_thr": ratio * thr, "tokens": evaluate(thr, ratio * thr)})
        return trace[-1]["tokens"]

    def near() -> bool:
        return abs(trace[-1]["tokens"] - target) <= within * target

    low, high = math.log(LOW), math.log(HIGH)
    most = tokens(low)
    if most < target and not near():
        raise SearchError(
            f"keep: {target:.1f} tokens cannot be reached: merging alike patches in the encoder alone leaves {most:.1f}. "
            f"Raise sim_thr (above 1: merge nothing), or ask for less."
        )
    least = most
    if not near():
        least = tokens(high)
        if least > target and not near():
            raise SearchError(
                f"keep: {target:.1f} tokens cannot be reached: the layers before the first filter and the key set cost "
                f"{least:.1f} at any threshold. Lower key_rate, filter earlier (layers), or ask for more."
            )
    while not near() and len(trace) < trials:
        middle = (low + high) / 2
        low, high = (middle, high) if tokens(middle) > target else (low, middle)
    best = min(trace, key=lambda t: abs(t["tokens"] - target))
    if abs(best["tokens"] - target) > within * target:
        raise SearchError(
            f"keep: no threshold came within {100 * within:g} % of {target:.1f} tokens; the nearest leaves "
            f"{best['tokens']:.1f}. Ask for that, widen the distance (--within), or use more questions."
        )
    return Found(best["global_thr"], best["individual_thr"], best["tokens"], trace)
