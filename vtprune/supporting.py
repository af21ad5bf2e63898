"""What works on which model, and why the rest does not: asked of the same constructor that `wrap` calls, without weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vtprune.engine.session import Session
from vtprune.families import FAMILIES, locate
from vtprune.pruner import Pruner, VtpruneError
from vtprune.registry import available, strategy_class

# stages that act on what enters the decoder, and so on a video's tokens, too
_BEHIND_ENCODER = {"select", "prefill", "decode"}


@dataclass(frozen=True)
class Support:
    """Whether a model can be pruned by a strategy with its default fields.

    Parameters:
        strategy: its name; reason: why not, "" if it can be; note: what it has to be given first, "" if nothing.
        stages: stage -> "" if it acts, or why it does not; of a strategy that is refused, each stage by itself
            (`create(name).only(stage)`).
        pictures, videos: whether it prunes them on this model. A strategy for videos takes several pictures of one size for
            frames where `pictures` is True.
    """

    strategy: str
    reason: str
    stages: dict[str, str]
    pictures: bool
    videos: bool
    note: str = ""

    @property
    def works(self) -> bool:
        return not self.reason


def supports(model: nn.Module, strategies: Iterable[str] | None = None) -> dict[str, Support]:
    """What `wrap(model, name)` would say of each strategy; nothing is attached and nothing runs.

    Parameters:
        model: as `wrap` takes it; may live on the meta device, without weights.
        strategies: names; None for all.
    Raises:
        UnsupportedError: if the model is of no supported family.
    """
    locate(model)
    return {name: _ask(model, name) for name in strategies or available()}


def of_class(name: str) -> nn.Module:
    """The transformers model class `name` with no weights (meta device), configured by default or as its family's example.

    Raises:
        AttributeError: if the installed transformers has no such class.
    """
    import transformers

    config = config_of(name)
    with torch.device("meta"):
        return getattr(transformers, name)(config)


def config_of(name: str) -> Any:
    """The default configuration of the transformers model class `name`, or its family's example where it declares one.

    Raises:
        AttributeError: if the installed transformers has no such class.
    """
    import transformers

    cls = getattr(transformers, name)
    example = next((family.example for family in FAMILIES if name in family.base_classes and family.example), {})
    # configurations keep, and change, the dictionaries that they are given
    return cls.config_class(**copy.deepcopy(dict(example)))


def _ask(model: nn.Module, name: str) -> Support:
    site = locate(model)
    cls, note = strategy_class(name), ""
    reason, session = _session(model, cls)
    if session is None:
        # what it has not got yet may be all that is missing
        trial = functools.partial(cls.trial, len(site.decoder_layers))
        within, session = _session(model, trial)
        reason, note = (within, "") if session is None else ("", reason)
        stages = trial().stages()
    else:
        stages = session.pruner.stages()
    found = {}
    for stage in stages:
        if session is None:
            found[stage] = _session(model, lambda stage=stage: trial().only(stage))[0]
        elif stage == "encode" and not session.encode_needs:
            found[stage] = "asks nothing of this encoder"
        else:
            found[stage] = ""
    acts = {stage for stage, why in found.items() if not why} if session is not None else set()
    videos = site.family.videos is not None and bool(acts & _BEHIND_ENCODER)
    return Support(name, reason, found, bool(acts), videos, note)


def _session(model: nn.Module, make: Callable[[], Pruner]) -> tuple[str, Session | None]:
    try:
        return "", Session(model, make())
    except VtpruneError as error:
        return str(error), None
