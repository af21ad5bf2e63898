"""Strategies by name: the shipped ones and those that other packages announce by entry point."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vtprune.pruner import Pipeline, Pruner

GROUP = "vtprune.strategies"

# name -> module:class; imported when asked for
SHIPPED = {
    "flowcut": "vtprune.strategies.flowcut:FlowCut",
    "fastv": "vtprune.strategies.fastv:FastV",
    "evict": "vtprune.strategies.evict:Evict",
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
            "part.field") addresses one.
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
    return parts[0] if len(parts) == 1 else Pipeline(parts)


def _load(target: str) -> type[Pruner]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _load_entry(entry: EntryPoint) -> type[Pruner]:
    loaded = entry.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Pruner) and dataclasses.is_dataclass(loaded)):
        raise TypeError(f"entry point {entry.name!r} ({entry.value}) of group {GROUP!r} is no Pruner dataclass.")
    return loaded
