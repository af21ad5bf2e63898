"""G-Search: the least share of visual tokens that each decoder layer needs, found from shallow to deep.

"Searching Optimal Vision Token Reduction", arXiv 2412.00556, CVPR 2025. The order of the search and one one-dimensional
search per layer are the paper's, as is Bayesian optimisation for it; bisection, the grid, the rule of acceptance and
the trial counts are ours, since the paper's could not be had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vtprune.search.judge import Outcome, Rule, SearchError, Verdict

METHODS = ("bisect", "bo")
Rates = tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    """How to search.

    Parameters:
        rule: when a schedule is as good as the full model.
        method: "bisect" (log2(grid) trials per layer) or "bo" (constrained Bayesian optimisation, needs optuna).
        trials: most trials per layer.
        grid: rates are multiples of 1 / grid, at least one of them.
        min_layer: first decoder layer (0-based) that may compute on fewer tokens; the ranking of the first layer of all
            is the one that the paper calls unreliable.
        every: search every so many layers; those between take the rate above.
        seed: of the Bayesian optimisation.
    """

    rule: Rule = field(default_factory=Rule)
    method: str = "bisect"
    trials: int = 8
    grid: int = 32
    min_layer: int = 2
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SearchError(f"method={self.method!r}: one of {', '.join(METHODS)}.")
        for name, least in {"trials": 1, "grid": 2, "min_layer": 1, "every": 1}.items():
            if getattr(self, name) < least:
                raise SearchError(f"{name}={getattr(self, name)}: must be at least {least}.")

    def layers(self, depth: int) -> range:
        """The decoder layers searched.

        Raises:
            SearchError: if there are none.
        """
        if depth <= self.min_layer:
            raise SearchError(f"min_layer={self.min_layer}: this decoder has {depth} layers, so no layer is left to search.")
        return range(self.min_layer, depth, self.every)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Parameters:
        rates: per decoder layer; verdict: of these rates, None if nothing could be cut; trace: all trials in order.
    """

    rates: Rates
    verdict: Verdict | None
    trace: list[dict[str, Any]]

    @property
    def mean_keep(self) -> float:
        return sum(self.rates) / len(self.rates)


def search(
    evaluate: Callable[[Rates], Outcome],
    full: Outcome,
    depth: int,
    settings: Settings | None = None,
    watch: Callable[[int, int, Rates], None] = lambda layer, trial, rates: None,
) -> Found:
    """Find a rate for each layer, those above frozen, survivors flowing on through the layers below.

    Parameters:
        evaluate: how the model does under the given rates, one per decoder layer.
        full: how it does unpruned.
        watch: told of each trial before it runs: layer, trial of this layer (from 1), rates.
    """
    settings = settings or Settings()
    find = _bisect if settings.method == "bisect" else _optimise
    units, accepted = [settings.grid] * depth, None
    trace: list[dict[str, Any]] = []
    slack = settings.rule.tolerance  # of the full model
    for layer in settings.layers(depth):
        count = 0
        verdicts: dict[int, Verdict] = {}

        def try_units(n: int, layer=layer, verdicts=verdicts) -> Verdict:
            nonlocal count
            if n not in verdicts:
                count += 1
                rates = tuple(u / settings.grid for u in units[:layer]) + (n / settings.grid,) * (depth - layer)
                watch(layer, count, rates)
                verdicts[n] = verdict = settings.rule.judge(evaluate(rates), full)
                trace.append(
                    {
                        "layer": layer,
                        "rate": n / settings.grid,
                        "accepted": verdict.accepted,
                        "ratio": verdict.ratio,
                        "bound": verdict.bound,
                        "accuracy": verdict.accuracy,
                        "agreement": verdict.agreement,
                    }
                )
            return verdicts[n]

        above = units[layer - 1]
        least = find(try_units, above, slack, settings, layer)
        if least < above:
            units[layer:] = [least] * (depth - layer)
            accepted = verdicts[least]
            slack = accepted.slack
        if least == 1:
            break
    return Found(tuple(u / settings.grid for u in units), accepted, trace)


def _bisect(try_units: Callable[[int], Verdict], above: int, slack: float, settings: Settings, layer: int) -> int:
    """The least acceptable rate, if acceptance is monotone in it; `above` is known to be acceptable."""
    low, high = 0, above
    for _ in range(settings.trials):
        if high - low < 2:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if try_units(middle).accepted else (middle, high)
    return high


def _optimise(try_units: Callable[[int], Verdict], above: int, slack: float, settings: Settings, layer: int) -> int:
    """Least rate under the rule as constraint, by a Gaussian process; seeded with `above` and its half."""
    if above == 1:
        return 1
    study, distributions = constrained_study(settings.seed + layer, above)
    best = above
    for n, run in ((above, False), (max(1, above // 2), True), *((None, True),) * (settings.trials - 1)):
        if n is not None:
            study.enqueue_trial({"units": n})
        trial = study.ask(distributions)
        chosen = trial.params["units"]
        if n is None and chosen in {t.params["units"] for t in study.get_trials(deepcopy=False)[:-1]}:
            break  # the process sees nothing better to try
        verdict = try_units(chosen) if run else None
        room = verdict.slack if verdict else slack
        accepted = verdict is None or verdict.accepted
        trial.set_user_attr("over", min(-room, 0.0) if accepted else max(-room, 1e-9))
        study.tell(trial, chosen / settings.grid)
        if accepted:
            best = min(best, chosen)
    return best


def optuna():
    """The module, silent.

    Raises:
        SearchError: if it is not installed.
    """
    try:
        import optuna as found
        import scipy  # noqa: F401  (the Gaussian process needs it, and says so late)
    except ImportError as error:
        raise SearchError(
            f"Bayesian optimisation needs optuna and scipy ({error.name} is missing): pip install 'vtprune[search]'"
        ) from error
    found.logging.set_verbosity(found.logging.ERROR)
    return found


def constrained_study(seed: int, above: int):
    """A study over 1 .. `above` whose trials' user attribute "over" is positive where the constraint is broken."""
    import warnings

    module = optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts of the sampler call themselves experimental
        sampler = module.samplers.GPSampler(
            seed=seed,
            n_startup_trials=2,
            deterministic_objective=True,
            constraints_func=lambda trial: (trial.user_attrs["over"],),
        )
    return module.create_study(sampler=sampler), {"units": module.distributions.IntDistribution(1, above)}
