"""vtprune: training-free pruning of visual tokens in vision-language models, in one line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.api import pruning, report, unwrap, wrap
    from vtprune.pruner import (
        BudgetError,
        DecodeView,
        EncodeView,
        Keep,
        Needs,
        NothingPrunedError,
        Pipeline,
        PrefillView,
        Pruner,
        SelectView,
        UnsupportedError,
        VtpruneError,
    )
    from vtprune.registry import UnknownStrategyError, available, create
    from vtprune.strategies.evict import Evict
    from vtprune.strategies.fastv import FastV
    from vtprune.strategies.flowcut import FlowCut
    from vtprune.strategies.random import Random
    from vtprune.strategies.uniform import Uniform

__version__ = "0.1.0"

# loaded on first use: `import vtprune` costs neither torch nor transformers
_HOME = {
    "vtprune.api": ("pruning", "report", "unwrap", "wrap"),
    "vtprune.pruner": (
        "BudgetError",
        "DecodeView",
        "EncodeView",
        "Keep",
        "Needs",
        "NothingPrunedError",
        "Pipeline",
        "PrefillView",
        "Pruner",
        "SelectView",
        "UnsupportedError",
        "VtpruneError",
    ),
    "vtprune.registry": ("UnknownStrategyError", "available", "create"),
    "vtprune.strategies.evict": ("Evict",),
    "vtprune.strategies.fastv": ("FastV",),
    "vtprune.strategies.flowcut": ("FlowCut",),
    "vtprune.strategies.random": ("Random",),
    "vtprune.strategies.uniform": ("Uniform",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BudgetError",
    "DecodeView",
    "EncodeView",
    "Evict",
    "FastV",
    "FlowCut",
    "Keep",
    "Needs",
    "NothingPrunedError",
    "Pipeline",
    "PrefillView",
    "Pruner",
    "Random",
    "SelectView",
    "Uniform",
    "UnknownStrategyError",
    "UnsupportedError",
    "VtpruneError",
    "available",
    "create",
    "pruning",
    "report",
    "unwrap",
    "wrap",
]


def __getattr__(name: str):
    # a strategy's module must not hide `vtprune.report`, the function, behind `vtprune.report`, the module
    if name not in _WHERE:
        raise AttributeError(f"module 'vtprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
