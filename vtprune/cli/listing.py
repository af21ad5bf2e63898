"""What `vtprune list` says of each strategy, asked of the strategy itself."""

from __future__ import annotations

import re
from typing import Any

from vtprune.pruner import STAGES, Encoder, Pruner, VtpruneError
from vtprune.registry import SHIPPED, available

# any depth does to ask a strategy what it reads; this one has room for every layer a paper names
_DEPTH = 32
_ENCODER = Encoder(depth=23, blocks=24, cls=True)
# Needs.queries, and a model's capabilities, in words
_WORDS = {
    "cls": "CLS attention",
    "mean": "mean patch attention",
    "patches": "attention received by patches",
    "last": "last-token attention",
    "text": "text attention",
}


def describe_all() -> list[dict[str, Any]]:
    """One JSON-ready row per strategy: name, stages, serves, positions, needs, paper, year, package (of third-party ones)."""
    return [
        {
            "name": name,
            "stages": _stages(cls),
            "serves": serves(cls),
            "positions": cls.positions,
            "needs": _needs(cls),
            "paper": cls.paper,
            "year": _year(cls.paper),
            "package": None if name in SHIPPED else cls.__module__.partition(".")[0],
        }
        for name, cls in available().items()
    ]


def serves(cls: type[Pruner]) -> str:
    """ "pictures", "videos" or "both": a video's frames are pooled behind the encoder, so work inside it alone serves none."""
    if cls.modality == "video":
        return "videos"
    try:
        stages = cls().stages()  # with its defaults, a strategy may leave out some
    except (TypeError, VtpruneError):
        stages = _stages(cls)
    return "both" if set(stages) & {"select", "prefill", "decode"} else "pictures"


def _stages(cls: type[Pruner]) -> list[str]:
    return [stage for stage in STAGES if getattr(cls, stage) is not getattr(Pruner, stage)]


def _year(paper: str) -> int | None:
    """The year of publication that a paper's line ends with, if it names one."""
    found = re.findall(r"\b(?:19|20)\d\d\b(?!\.)", paper)
    return int(found[-1]) if found else None


def _needs(cls: type[Pruner]) -> list[str]:
    """Capabilities the model must have, then the attention rows that the strategy reads with its defaults."""
    found = dict.fromkeys("CLS token" if need == "cls" else need for need in sorted(cls.requires))
    try:
        pruner = cls()
    except (TypeError, VtpruneError):
        return list(found)  # a strategy without defaults tells only with a budget at hand
    layers = {"encode": _ENCODER, "prefill": _DEPTH, "decode": _DEPTH}
    for stage, of in layers.items():
        try:
            needs = getattr(pruner, f"{stage}_needs")(of) if pruner.part(stage) is not None else {}
        except VtpruneError:
            continue  # it cannot tell before it is given a schedule
        for need in needs.values():
            if need.queries:
                found[_WORDS.get(need.queries, need.queries)] = None
    found.update(dict.fromkeys(cls.reads))
    if "scorer" in cls.__dataclass_fields__:
        found["a scorer if given"] = None
    return list(found)
