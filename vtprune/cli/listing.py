"""What `vtprune list` says of each strategy, asked of the strategy itself."""

from __future__ import annotations

from typing import Any

from vtprune.pruner import STAGES, Pruner, VtpruneError
from vtprune.registry import SHIPPED, available

# any depth does to ask a strategy what it reads; this one has room for every layer a paper names
_DEPTH = 32
# Needs.queries, and a model's capabilities, in words
_WORDS = {
    "cls": "CLS attention",
    "mean": "mean patch attention",
    "last": "last-token attention",
    "text": "text attention",
}


def describe_all() -> list[dict[str, Any]]:
    """One JSON-ready row per strategy: name, stages, positions, needs, paper, package (of third-party ones)."""
    return [
        {
            "name": name,
            "stages": [stage for stage in STAGES if getattr(cls, stage) is not getattr(Pruner, stage)],
            "positions": cls.positions,
            "needs": _needs(cls),
            "paper": cls.paper,
            "package": None if name in SHIPPED else cls.__module__.partition(".")[0],
        }
        for name, cls in available().items()
    ]


def _needs(cls: type[Pruner]) -> list[str]:
    """Capabilities the model must have, then the attention rows that the strategy reads with its defaults."""
    found = dict.fromkeys("CLS token" if need == "cls" else need for need in sorted(cls.requires))
    try:
        pruner = cls()
    except (TypeError, VtpruneError):
        return list(found)  # a strategy without defaults tells only with a budget at hand
    for stage in ("encode", "prefill", "decode"):
        if pruner.part(stage) is None:
            continue
        for need in getattr(pruner, f"{stage}_needs")(_DEPTH).values():
            if need.queries:
                found[_WORDS.get(need.queries, need.queries)] = None
    return list(found)
