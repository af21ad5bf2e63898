"""What a strategy looked at, kept for the page: attention and carried scores of every token, stage by stage.

The report says which tokens left and where. Why is with the strategy: so its stage methods are followed, on the one
instance that a column made, and what their views held is noted down. Nothing that the strategy returns is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from vtprune.pruner import STAGES, Keep, Pruner, Rows, View

ATTENTION = "attention"


@dataclass
class Seen:
    """One visit of a stage to a sample's tokens.

    Parameters:
        stage, at: "encode" after vision block `at`, "prefill" before decoder layer `at`, "decode" of layer `at`'s cache.
        numbers: int [N], the tokens that it saw; scores: float [N] each, by name: the attention that the needed rows paid
            them (mean over heads and rows), and per-token numbers that the strategy carries along.
        kept: bool [N], which went on.
    """

    stage: str
    at: int
    numbers: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray | None = None

    @property
    def where(self) -> str:
        """In words, as in `SampleReport.trail`."""
        return {
            "shrink": "as the picture was scaled down",
            "encode": f"after vision block {self.at}",
            "select": "before the decoder",
            "prefill": f"before decoder layer {self.at}",
            "decode": f"in the cache of decoder layer {self.at}",
        }[self.stage]

    def rank(self, token: int, name: str) -> tuple[float, int, int] | None:
        """(score, rank from 1, of how many) of a token, or None if it had left already."""
        place = np.flatnonzero(self.numbers == token)
        if not len(place):
            return None
        scores = self.scores[name]
        own = scores[place[0]]
        return float(own), int((scores > own).sum()) + 1, len(scores)


class Watch:
    """Follows one strategy through one run.

    Parameters:
        pruner: made for this run alone; its stage methods are replaced on the instance.
    """

    def __init__(self, pruner: Pruner):
        self._raw: list[tuple[str, View, dict[str, Tensor], Any]] = []
        for stage in STAGES:
            part = pruner.part(stage)
            if part is not None:
                # an attribute of the instance; `stages()` looks at the class and is none the wiser
                setattr(part, stage, self._following(stage, getattr(part, stage)))

    def _following(self, stage: str, method: Callable) -> Callable:
        def followed(view: View):
            answer = method(view)
            # references only: what they hold is worked out after the run, so that times stay the strategy's own
            self._raw.append((stage, view, dict(view.carry), answer))
            return answer

        return followed

    def seen(self) -> list[Seen]:
        """What was noted of the first item of each visit, in running order; forgets the tensors."""
        found = [self._summary(*visit) for visit in self._raw if not visit[1].part[0]]
        self._raw.clear()
        return found

    @staticmethod
    def _summary(stage: str, view: View, carry: dict[str, Tensor], answer: Keep | tuple | None) -> Seen:
        scores = {}
        rows = getattr(view, "rows", None)
        if rows is not None:
            scores[ATTENTION] = _mean(rows)
        count = view.tokens
        for name, values in carry.items():
            if values.dim() == 2 and values.shape[1] == count and values.is_floating_point():
                scores[name] = values[0].detach().float().cpu().numpy()
        kept = np.ones(count, dtype=bool)
        if isinstance(answer, Keep):
            kept[:] = False
            kept[answer.indices[0].detach().cpu().numpy()] = True
        return Seen(stage, getattr(view, "layer", 0), view.index[0].detach().cpu().numpy(), scores, kept)


def _mean(rows: Rows) -> np.ndarray:
    """[N] attention of the first item, mean over heads and its real rows."""
    weights = rows.attention()[0].float().mean(0)
    real = rows.valid[0].to(weights.device)
    if bool(real.any()):
        weights = weights[real]
    return np.nan_to_num(weights.mean(0).detach().cpu().numpy())
