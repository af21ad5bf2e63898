"""vtprune: training-free pruning of visual tokens in vision-language models, in one line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.api import pruning, report, unwrap, wrap
    from vtprune.pruner import (
        BudgetError,
        DecodeView,
        Encoder,
        EncodeView,
        Keep,
        Needs,
        NothingPrunedError,
        Pipeline,
        PrefillView,
        Pruner,
        SelectView,
        ShrinkView,
        UnsupportedError,
        VtpruneError,
    )
    from vtprune.registry import UnknownStrategyError, available, create
    from vtprune.relevance import ClipRelevance
    from vtprune.strategies.cdpruner import CDPruner
    from vtprune.strategies.divprune import DivPrune
    from vtprune.strategies.dycoke import DyCoke
    from vtprune.strategies.evict import Evict
    from vtprune.strategies.evs import EVS
    from vtprune.strategies.fastv import FastV
    from vtprune.strategies.flowcut import FlowCut
    from vtprune.strategies.framedrop import FrameDrop
    from vtprune.strategies.gsearch import GSearch
    from vtprune.strategies.mustdrop import MustDrop
    from vtprune.strategies.psigmoid import PSigmoid
    from vtprune.strategies.pyramiddrop import PyramidDrop
    from vtprune.strategies.quota import QuoTA
    from vtprune.strategies.random import Random
    from vtprune.strategies.resolution import Resolution
    from vtprune.strategies.sparsevlm import SparseVLM
    from vtprune.strategies.todre import ToDRE
    from vtprune.strategies.uniform import Uniform
    from vtprune.strategies.visionzip import VisionZip
    from vtprune.supporting import supports

__version__ = "0.1.0"

# loaded on first use: `import vtprune` costs neither torch nor transformers
_HOME = {
    "vtprune.api": ("pruning", "report", "unwrap", "wrap"),
    "vtprune.pruner": (
        "BudgetError",
        "DecodeView",
        "EncodeView",
        "Encoder",
        "Keep",
        "Needs",
        "NothingPrunedError",
        "Pipeline",
        "PrefillView",
        "Pruner",
        "SelectView",
        "ShrinkView",
        "UnsupportedError",
        "VtpruneError",
    ),
    "vtprune.relevance": ("ClipRelevance",),
    "vtprune.registry": ("UnknownStrategyError", "available", "create"),
    "vtprune.strategies.cdpruner": ("CDPruner",),
    "vtprune.strategies.divprune": ("DivPrune",),
    "vtprune.strategies.dycoke": ("DyCoke",),
    "vtprune.strategies.evict": ("Evict",),
    "vtprune.strategies.evs": ("EVS",),
    "vtprune.strategies.fastv": ("FastV",),
    "vtprune.strategies.flowcut": ("FlowCut",),
    "vtprune.strategies.framedrop": ("FrameDrop",),
    "vtprune.strategies.gsearch": ("GSearch",),
    "vtprune.strategies.mustdrop": ("MustDrop",),
    "vtprune.strategies.psigmoid": ("PSigmoid",),
    "vtprune.strategies.pyramiddrop": ("PyramidDrop",),
    "vtprune.strategies.quota": ("QuoTA",),
    "vtprune.strategies.random": ("Random",),
    "vtprune.strategies.resolution": ("Resolution",),
    "vtprune.strategies.sparsevlm": ("SparseVLM",),
    "vtprune.strategies.todre": ("ToDRE",),
    "vtprune.strategies.uniform": ("Uniform",),
    "vtprune.strategies.visionzip": ("VisionZip",),
    "vtprune.supporting": ("supports",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "EVS",
    "BudgetError",
    "CDPruner",
    "ClipRelevance",
    "DecodeView",
    "DivPrune",
    "DyCoke",
    "EncodeView",
    "Encoder",
    "Evict",
    "FastV",
    "FlowCut",
    "FrameDrop",
    "GSearch",
    "Keep",
    "MustDrop",
    "Needs",
    "NothingPrunedError",
    "PSigmoid",
    "Pipeline",
    "PrefillView",
    "Pruner",
    "PyramidDrop",
    "QuoTA",
    "Random",
    "Resolution",
    "SelectView",
    "ShrinkView",
    "SparseVLM",
    "ToDRE",
    "Uniform",
    "UnknownStrategyError",
    "UnsupportedError",
    "VisionZip",
    "VtpruneError",
    "available",
    "create",
    "pruning",
    "report",
    "supports",
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
