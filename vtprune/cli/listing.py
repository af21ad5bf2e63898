"""What `vtprune list` says of each strategy, asked of the strategy itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vtprune.pruner import STAGES, Encoder, Pruner, VtpruneError
from vtprune.registry import SHIPPED, available

if TYPE_CHECKING:
    from vtprune.supporting import Support

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


def for_model(source: str, trust_remote_code: bool) -> dict[str, Support]:
    """What each strategy can do on a model, by Hugging Face id or folder; its configuration is read, not its weights.

    Raises:
        UserError: if the configuration cannot be loaded. UnsupportedError: if the model is of no supported family.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vtprune.cli.console import UserError
    from vtprune.supporting import supports

    transformers.utils.logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"cannot load the configuration of {source!r}: {reason}") from error
    return supports(model)


def for_families() -> dict[str, dict[str, Support] | str]:
    """The same for every model class of every family, with its default configuration, by "family (class)"; a sentence where the
    installed transformers has no such class or cannot build it."""
    import transformers

    from vtprune.families import FAMILIES
    from vtprune.supporting import of_class, supports

    transformers.utils.logging.set_verbosity_error()
    found: dict[str, dict[str, Support] | str] = {}
    for family in FAMILIES:
        for name in family.base_classes:
            title = family.name if len(family.base_classes) == 1 else f"{family.name} ({name.removesuffix('Model')})"
            if not hasattr(transformers, name):
                found[title] = f"transformers {transformers.__version__} has no {name}"
                continue
            try:
                found[title] = supports(of_class(name))
            except (ImportError, OSError, ValueError, TypeError) as error:  # some have no default that can be built
                found[title] = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return found


def verdict(support: Support) -> str:
    """ "yes", which stages do not act, which would by themselves, or "no"."""
    acting = [stage for stage, why in support.stages.items() if not why]
    if support.works:
        idle = [stage for stage, why in support.stages.items() if why]
        said = "yes" if not support.note else "yes, once fitted"
        return said if not idle else f"{said}, without {', '.join(idle)}"
    return "no" if not acting else f"{', '.join(acting)} alone"


def table_of_families(found: Mapping[str, Mapping[str, Support] | str]) -> str:
    """Markdown: a row per family, a column per group of strategies that fare alike everywhere, footnotes with the reasons."""
    served = {title: of for title, of in found.items() if not isinstance(of, str)}
    columns: dict[tuple, list[str]] = {}
    for name in next(iter(served.values())):
        columns.setdefault(tuple(_cell(of[name], "") for of in served.values()), []).append(name)
    notes: dict[str, int] = {}
    lines = ["| family | videos | " + " | ".join(", ".join(names) for names in columns.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for title, of in found.items():
        if isinstance(of, str):
            lines.append(f"| {title} | not asked: {of} |" + " |" * len(columns))
            continue
        cells = []
        for names in columns.values():
            said, reasons = _cell(of[names[0]], title.partition(" (")[0])
            marks = [str(notes.setdefault(reason, len(notes) + 1)) for reason in reasons]
            cells.append(said + (f" [{', '.join(marks)}]" if marks else ""))
        videos = "yes" if any(one.videos for one in of.values()) else "-"
        lines.append(f"| {title} | {videos} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())])


def _cell(support: Support, family: str) -> tuple[str, tuple[str, ...]]:
    """What a table says of it, and why; in words that fit other strategies and families as well."""
    reasons = [support.reason] if support.reason else [support.note, *support.stages.values()]
    return verdict(support), tuple(
        dict.fromkeys(_general(reason, support.strategy, family) for reason in filter(None, reasons))
    )


def _general(reason: str, strategy: str, family: str) -> str:
    said = re.sub(rf"^{re.escape(strategy)}\b", "It", reason)
    said = re.sub(r", which '\w+' does not have", ", which this one does not have", said)
    if family:
        said = re.sub(rf"^{re.escape(family)}\b", "The family", said)
        said = re.sub(rf"\b(which|in) {re.escape(family)}\b", r"\1 the family", said)
    return said
