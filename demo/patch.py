"""Why one patch went: when it left, what became of it, and what the strategy had seen of it until then."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.reporting import SampleReport

from .watching import Seen


@dataclass(frozen=True)
class Visit:
    """A token at one stage: where, under which score, how high, the how-manieth of how many, and whether it went on."""

    where: str
    name: str
    score: float
    rank: int
    of: int
    kept: bool


@dataclass(frozen=True)
class Story:
    """A token's way.

    Parameters:
        token: its number; row, column: in the grid.
        fate: in words; left: the place where it left, or "" if it stayed; merged_into: the token it lives on in, or None.
        group: tokens that live on in it.
        visits: what the strategy saw of it, in running order.
    """

    token: int
    row: int
    column: int
    fate: str
    left: str
    merged_into: int | None
    group: list[int]
    visits: list[Visit]


def story(sample: SampleReport, seen: list[Seen], token: int) -> Story:
    """Follow one token of the sample's first picture."""
    columns = sample.grids[0][1] if sample.grids and sample.grids[0] else sample.images[0]
    row, column = divmod(token, columns)
    steps = sample.trail()
    step = next(step for step in steps if token in step.tokens)
    into = next((kept for kept, gone in sample.merged.items() if token in gone), None)
    left = "" if step.where == "stayed" else step.where
    if not left:
        fate = "stayed to the end"
    elif into is not None:
        fate = f"merged into patch ({into // columns}, {into % columns}) {left}"
    else:
        fate = f"dropped {left}" if not left.startswith("from") else f"dropped {left} after prefill"
    visits = []
    for visit in seen:
        for name in visit.scores:
            ranked = visit.rank(token, name)
            if ranked is not None:
                kept = bool(visit.kept[visit.numbers == token][0])
                visits.append(Visit(visit.where, name, *ranked, kept))
    return Story(token, row, column, fate, left, into, list(sample.merged.get(token, [])), visits)
