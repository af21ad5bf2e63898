"""How a pruned model did on the calibration questions, and whether that is as good as the full model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtprune.pruner import VtpruneError


class SearchError(VtpruneError, RuntimeError):
    """A search that cannot start, go on or reach its target; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """Question by question, what one model did.

    Parameters:
        logprobs: mean log-probability per token of the full model's own answer, teacher-forced after this model's
            prefill of the prompt.
        same: whether this model's greedy answer is the full model's.
        right: whether it is the reference answer (where there is none: the full model's).
    """

    logprobs: tuple[float, ...]
    same: tuple[bool, ...]
    right: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.logprobs) == len(self.same) == len(self.right) > 0:
            raise ValueError("an outcome has the same three facts for each of at least one question.")

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def agreement(self) -> float:
        return sum(self.same) / len(self.same)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"logprobs": list(self.logprobs), "same": list(map(int, self.same)), "right": list(map(int, self.right))}

    @classmethod
    def from_dict(cls, data: Any) -> Outcome:
        """Raises:
        ValueError: if it is none.
        """
        try:
            values = tuple(float(v) for v in data["logprobs"])
            made = cls(values, tuple(map(bool, data["same"])), tuple(map(bool, data["right"])))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no outcome: {error}") from error
        if not all(map(math.isfinite, values)):
            raise ValueError("no outcome: a log-probability is not finite.")
        return made


def log_gain(outcome: Outcome, full: Outcome) -> float:
    """Mean over questions of the log-probability gained over the full model; negative is worse."""
    return float(np.mean(np.subtract(outcome.logprobs, full.logprobs)))


@dataclass(frozen=True)
class Verdict:
    """One trial against the full model.

    Parameters:
        accepted: the rule's answer.
        ratio: mean answer probability over the full model's; bound: its bootstrap quantile that was tested.
        accuracy, agreement: of the greedy answers.
        slack: how far inside (positive) or outside the rule, in shares of the full model.
    """

    accepted: bool
    ratio: float
    bound: float
    accuracy: float
    agreement: float
    slack: float


@dataclass(frozen=True)
class Rule:
    """When a pruned model is as good as the full one (all ours; the paper's rule is not known).

    Two things must both hold, each with the same relative tolerance and always against the *full* model, so that losses
    of many layers cannot add up:

    - the probability of the full model's own answers (exp of the mean log-probability per token, averaged over the
      questions) is at least 1 - tolerance of the full model's, with the given confidence;
    - the number of right greedy answers is at least 1 - tolerance of the full model's.

    Parameters:
        tolerance: relative loss that is allowed, in [0, 1).
        confidence: one-sided, by a paired bootstrap over the questions, against noise that lets too small a rate pass.
            0.95 demands evidence that the loss is within the tolerance; 0.5 looks at the mean alone; 0.05 rejects only on
            evidence that it is not.
        resamples, seed: of the bootstrap.
    """

    tolerance: float = 0.01
    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:  # NaN fails as well
            raise SearchError(f"tolerance={self.tolerance!r}: must lie in [0, 1).")
        if not 0 < self.confidence < 1:
            raise SearchError(f"confidence={self.confidence!r}: must lie in (0, 1); 0.5 looks at the mean alone.")

    def judge(self, outcome: Outcome, full: Outcome) -> Verdict:
        here, there = np.exp(outcome.logprobs), np.exp(full.logprobs)
        ratio = float(here.mean() / there.mean())
        bound = ratio
        if self.confidence != 0.5:
            draws = np.random.default_rng(self.seed).integers(len(here), size=(self.resamples, len(here)))
            bound = float(np.quantile(here[draws].mean(1) / there[draws].mean(1), 1 - self.confidence))
        least = 1 - self.tolerance
        answers = outcome.accuracy / full.accuracy if full.accuracy else 1.0
        # a schedule that changes nothing must pass at tolerance 0, whatever the last bit of a kernel
        slack = min(bound, answers) - least
        return Verdict(slack >= -1e-6, ratio, bound, outcome.accuracy, outcome.agreement, slack)
