"""P-Sigmoid: the steepness of a falling curve of keep rates whose mean is the budget.

"Searching Optimal Vision Token Reduction", arXiv 2412.00556, CVPR 2025. One parameter under Bayesian optimisation is the
paper's; its range, the trial count and the objective are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtprune.search.gsearch import optuna
from vtprune.search.judge import Outcome, SearchError, log_gain

LOW, HIGH = 0.05, 5.0


@dataclass(frozen=True)
class Found:
    """The best steepness, the log-probability it gains over the full model (as a rule negative), its outcome."""

    steepness: float
    gain: float
    outcome: Outcome
    trace: list[dict[str, Any]]


def check(keep: int | float, depth: int, min_layer: int) -> None:
    """Refuse a budget that no steepness reaches, as far as can be said without a picture.

    Raises:
        SearchError: with the share that does, or with the layers that may be cut.
    """
    if depth <= min_layer:
        raise SearchError(f"min_layer={min_layer}: this decoder has {depth} layers, so no layer is left to prune.")
    # a share of exactly that leaves the other layers without the one token they keep
    if isinstance(keep, float) and keep * depth <= min_layer:
        whole = "layer 0 sees" if min_layer == 1 else f"layers 0 .. {min_layer - 1} see"
        earlier = "" if min_layer == 1 else ", or let earlier layers prune (min_layer)"
        raise SearchError(
            f"keep={keep:g} cannot be reached: {whole} all visual tokens, which over {depth} layers is a mean share of "
            f"{min_layer / depth:g} already. Give more than that{earlier}."
        )


def search(
    evaluate: Callable[[float], Outcome],
    full: Outcome,
    trials: int = 16,
    seed: int = 0,
    start: float | None = None,
    watch: Callable[[int, float], None] = lambda trial, steepness: None,
) -> Found:
    """Maximise the mean log-probability of the full model's own answers over ln(steepness) in [ln 0.05, ln 5].

    Parameters:
        evaluate: how the model does at a steepness.
        start: try this one first; without it the first trial is the middle of the range.
        watch: told of each trial before it runs: trial (from 1), steepness.
    """
    if trials < 1:
        raise SearchError(f"trials={trials}: at least 1.")
    import warnings

    module = optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = module.samplers.GPSampler(seed=seed, n_startup_trials=5, deterministic_objective=True)
    study = module.create_study(sampler=sampler, direction="maximize")
    span = {"log_k": module.distributions.FloatDistribution(math.log(LOW), math.log(HIGH))}
    # ends last: flat and stepped curves are rarely best
    seeds = [math.log(min(HIGH, max(LOW, start)))] if start is not None else []
    seeds += [math.log(k) for k in (0.5, 1.5, 0.15, HIGH)]
    trace: list[dict[str, Any]] = []
    best: tuple[float, float, Outcome] | None = None
    for at in range(trials):
        if at < len(seeds):
            study.enqueue_trial({"log_k": seeds[at]})
        trial = study.ask(span)
        # rounded, so that a file's few digits say exactly what was tried
        steepness = float(f"{math.exp(trial.params['log_k']):.4g}")
        watch(at + 1, steepness)
        outcome = evaluate(steepness)
        gain = log_gain(outcome, full)
        study.tell(trial, gain)
        trace.append({"steepness": steepness, "gain": gain, "accuracy": outcome.accuracy, "agreement": outcome.agreement})
        if best is None or gain > best[1]:
            best = (steepness, gain, outcome)
    return Found(*best, trace)


def fit(rates: Sequence[float]) -> float:
    """The steepness of the falling sigmoid nearest to a schedule, by least squares over steepness and midpoint."""
    layer = np.arange(len(rates))
    steepness = np.exp(np.linspace(math.log(LOW), math.log(HIGH), 93))
    middle = np.linspace(-len(rates), 2 * len(rates), 40 * len(rates) + 1)
    power = np.clip(steepness[:, None, None] * (layer - middle[:, None]), -60, 60)
    error = np.square(1 / (1 + np.exp(power)) - np.asarray(rates, dtype=float)).sum(-1)
    return float(steepness[error.min(1).argmin()])
