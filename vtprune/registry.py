"""Strategies by name: the shipped ones and those that other packages announce by entry point."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vtprune.pruner import STAGES, Budget, PerImage, Pipeline, Pruner, check_budget

GROUP = "vtprune.strategies"

# name -> module:class; imported when asked for
SHIPPED = {
    "flowcut": "vtprune.strategies.flowcut:FlowCut",
    "todre": "vtprune.strategies.todre:ToDRE",
    "mustdrop": "vtprune.strategies.mustdrop:MustDrop",
    "gsearch": "vtprune.strategies.gsearch:GSearch",
    "psigmoid": "vtprune.strategies.psigmoid:PSigmoid",
    "visionzip": "vtprune.strategies.visionzip:VisionZip",
    "divprune": "vtprune.strategies.divprune:DivPrune",
    "cdpruner": "vtprune.strategies.cdpruner:CDPruner",
    "fastv": "vtprune.strategies.fastv:FastV",
    "pyramiddrop": "vtprune.strategies.pyramiddrop:PyramidDrop",
    "sparsevlm": "vtprune.strategies.sparsevlm:SparseVLM",
    "quota": "vtprune.strategies.quota:QuoTA",
    "framedrop": "vtprune.strategies.framedrop:FrameDrop",
    "evs": "vtprune.strategies.evs:EVS",
    "dycoke": "vtprune.strategies.dycoke:DyCoke",
    "evict": "vtprune.strategies.evict:Evict",
    "resolution": "vtprune.strategies.resolution:Resolution",
    "random": "vtprune.strategies.random:Random",
    "uniform": "vtprune.strategies.uniform:Uniform",
}


class UnknownStrategyError(KeyError, ValueError):
    """No strategy of that name; the message offers the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


def available() -> dict[str, type[Pruner]]:
    """All strategies by name.

    Raises:
        TypeError: if another package announces something that is no strategy.
        ValueError: if it announces a name that is taken.
    """
    found = {name: _load(target) for name, target in SHIPPED.items()}
    for entry in entry_points(group=GROUP):
        loaded = _load_entry(entry)
        if found.setdefault(entry.name, loaded) is not loaded:
            raise ValueError(f"entry point {entry.name!r} ({entry.value}) takes the name of an existing strategy.")
    return found


def strategy_class(name: str) -> type[Pruner]:
    """The class behind a name; nothing else is imported.

    Raises:
        UnknownStrategyError: with the nearest names.
    """
    if name in SHIPPED:
        return _load(SHIPPED[name])
    announced = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in announced:
        return _load_entry(announced[name])
    known = sorted({*SHIPPED, *announced})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UnknownStrategyError(f"unknown strategy {name!r}.{hint} Available: {', '.join(known)}.")


def create(name: str, **fields: Any) -> Pruner:
    """A strategy from its name and fields; `"a+b"` composes.

    Parameters:
        name: a name of `available()`, or several joined by "+".
        fields: hyper-parameters. In a composition a field goes to every part that has it; `part__field` (or
            "part.field") addresses one. A `keep` for the whole composition is one budget that `split` divides; one that
            addresses a part leaves the division to the caller.
    Raises:
        UnknownStrategyError: unknown name. TypeError: unknown field; both offer the nearest.
    """
    names = [part.strip() for part in name.split("+")]
    classes = [strategy_class(part) for part in names]
    arguments: list[dict[str, Any]] = [{} for _ in names]
    for key, value in fields.items():
        owner, _, field = key.replace("__", ".").rpartition(".")
        takers = [
            i
            for i, (part, cls) in enumerate(zip(names, classes, strict=True))
            if owner in ("", part) and field in {f.name for f in dataclasses.fields(cls)}
        ]
        if not takers:
            known = sorted({f.name for cls in classes for f in dataclasses.fields(cls)})
            near = difflib.get_close_matches(field, known, n=2, cutoff=0.4)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TypeError(f"{name} has no field {key!r}.{hint} Fields: {', '.join(known)}.")
        for i in takers:
            # an addressed field wins over a general one
            if owner or field not in arguments[i]:
                arguments[i][field] = value
    parts = [cls(**args) for cls, args in zip(classes, arguments, strict=True)]
    if len(parts) == 1:
        return parts[0]
    if fields.get("keep") is not None and not any(key.endswith(("__keep", ".keep")) for key in fields):
        parts = split(parts, check_budget(fields["keep"], per_image=True))
    return Pipeline(parts)


def split(parts: Sequence[Pruner], keep: Budget) -> list[Pruner]:
    """The parts of a composition with one budget divided among them (ours; no paper composes).

    What a composition costs is what its decoder computes on, so the last part that shortens the sequence gets `keep`
    itself: a prefill strategy as the mean over layers, otherwise what enters. Each part before it leaves twice as many
    as the next, so that both have something to choose from. A cache policy halves what is left.

    Parameters:
        parts: in any order; each serves stages of its own. keep: visual tokens per image, or a share.
    Returns:
        Copies in the same order.
    """

    def times(factor: float, keep: Budget = keep) -> Budget:
        if isinstance(keep, PerImage):
            return PerImage(times(factor, one) for one in keep)
        return max(1, round(keep * factor)) if isinstance(keep, int) else min(1.0, keep * factor)

    shortening = [s for s in STAGES if s != "decode"]
    first = {id(p): min(STAGES.index(s) for s in p.stages()) for p in parts}
    before = sorted((p for p in parts if set(p.stages()) & set(shortening)), key=lambda p: first[id(p)])
    budget = {id(p): times(2.0 ** (len(before) - 1 - at)) for at, p in enumerate(before)}
    return [dataclasses.replace(p, keep=budget.get(id(p), times(0.5))) for p in parts]


def _load(target: str) -> type[Pruner]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _load_entry(entry: EntryPoint) -> type[Pruner]:
    loaded = entry.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Pruner) and dataclasses.is_dataclass(loaded)):
        raise TypeError(f"entry point {entry.name!r} ({entry.value}) of group {GROUP!r} is no Pruner dataclass.")
    return loaded
