"""The smallest budget that still gives the unpruned answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from .asking import UNPRUNED, Column, ask


@dataclass
class Search:
    """How far the search is.

    Parameters:
        pruner: the strategy; target: the unpruned answer; total: visual tokens of the picture.
        tried: {budget: answer, or None where the strategy cannot reach it}.
        best: the smallest budget found that gives the target; done, stopped, error: how it ended.
    """

    pruner: str
    target: str = ""
    total: int = 0
    tried: dict[int, str | None] = field(default_factory=dict)
    best: int | None = None
    done: bool = False
    stopped: bool = False
    error: str = ""

    def same(self, keep: int) -> bool:
        return self.tried.get(keep) == self.target

    def in_words(self) -> str:
        """One line for the page."""
        if self.error:
            return self.error
        if not self.done:
            state = "stopped" if self.stopped else "searching"
            best = f", {self.best} tokens do so far" if self.best else ""
            return f"{state}: {len(self.tried)} budgets tried{best}."
        if self.best is None:
            return f"No budget below all {self.total} tokens that was tried gives the unpruned answer with {self.pruner}."
        below = [keep for keep in self.tried if keep < self.best]
        why = f"{max(below)} no longer does" if below else "it is the least there is"
        odd = [keep for keep in self.tried if keep > self.best and not self.same(keep)]
        more = f" Not every larger one does: {', '.join(map(str, sorted(odd)))} failed." if odd else ""
        return (
            f"{self.best} of {self.total} visual tokens are enough for {self.pruner} to give the unpruned answer; {why} "
            f"({len(self.tried)} budgets tried).{more}"
        )


def smallest(keeper, prepare, pruner: str, tokens: int, stop: threading.Event, made=None) -> Iterator[Search]:
    """Find a budget that gives the unpruned answer while one less does not; yields after each run.

    Budgets 1, 2, 4, ... are tried until one gives the answer; between it and the last that did not, bisection finds a
    border. Answers need not be monotone in the budget, so a smaller one that was not tried may do by luck.

    Parameters:
        prepare, tokens, stop, made: as in `asking.ask`.
    """
    search = Search(pruner)
    yield search
    if pruner == UNPRUNED:
        search.error = "An unpruned column has no budget; choose a strategy."
        yield search
        return

    def run(column: Column):
        *_, answer = ask(keeper, prepare, column, tokens, stop, made)
        return answer

    reference = run(Column(UNPRUNED, 1))
    if reference.stopped or reference.error:
        search.stopped, search.error = reference.stopped, reference.error
        yield search
        return
    search.target, search.total = reference.text, reference.figures()["visual_tokens"]
    if not search.target:
        search.error = "The unpruned model gave an empty answer; there is nothing to compare with."
        yield search
        return
    low, high, keep, reasons = 0, None, 1, []
    while True:
        answer = run(Column(pruner, keep))
        if answer.stopped:
            search.stopped = True
            yield search
            return
        search.tried[keep] = answer.text if answer.done else None
        if answer.error:
            reasons.append(answer.error)
        if search.same(keep):
            search.best = high = keep
        else:
            low = keep
        yield search
        if high is None:
            if keep >= search.total - 1:
                break
            keep = min(2 * keep, search.total - 1)
        elif high - low <= 1:
            break
        else:
            keep = (low + high) // 2
    search.done = True
    if search.best is None and len(reasons) == len(search.tried):
        # not one run came through: the reason tells more than "none"
        search.error = reasons[-1]
    yield search
