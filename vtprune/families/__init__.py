"""Model families. To add one: declare a `Family` in a file here and list it in `FAMILIES` (docs/architecture.md)."""

from __future__ import annotations

from importlib.metadata import entry_points

from torch import nn

from vtprune.families.base import Family, Layout, Site, Tiling
from vtprune.families.gemma import GEMMA3, PALIGEMMA
from vtprune.families.glm import GLM_V
from vtprune.families.idefics import IDEFICS3, SMOL_VLM
from vtprune.families.llava import LLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION, VIDEO_LLAVA
from vtprune.families.others import AYA_VISION, FAST_VLM, INTERNVL, MISTRAL3, PERCEPTION_LM, VIP_LLAVA
from vtprune.families.ovis import OVIS2
from vtprune.families.qwen import QWEN3_5, QWEN3_VL, QWEN_VL
from vtprune.pruner import UnsupportedError

__all__ = ["FAMILIES", "Family", "Layout", "Site", "Tiling", "announced", "locate"]

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_NEXT_VIDEO,
    LLAVA_ONEVISION,
    VIDEO_LLAVA,
    VIP_LLAVA,
    QWEN_VL,
    QWEN3_VL,
    QWEN3_5,
    GLM_V,
    INTERNVL,
    MISTRAL3,
    GEMMA3,
    PALIGEMMA,
    IDEFICS3,
    SMOL_VLM,
    AYA_VISION,
    OVIS2,
    PERCEPTION_LM,
    FAST_VLM,
)


GROUP = "vtprune.families"  # entry points of other packages, each a Family or a tuple of them

# classes whose pictures never become tokens of a sequence, and why that is so; nothing can be pruned there
IMPOSSIBLE = {
    "MllamaModel": "Llama 3.2 Vision reads pictures in cross-attention layers of their own",
    "IdeficsModel": "Idefics reads pictures in gated cross-attention layers between the layers of its decoder",
    "BlipForConditionalGeneration": "BLIP's text decoder reads the picture by cross-attention in every layer",
    "BlipForQuestionAnswering": "BLIP's text encoder reads the picture by cross-attention in every layer",
    "Pix2StructForConditionalGeneration": "Pix2Struct is an encoder-decoder: its text reads the picture by cross-attention",
    "VisionEncoderDecoderModel": "an encoder-decoder's text reads the picture by cross-attention in every layer",
}


def announced() -> tuple[Family, ...]:
    """The families that other installed packages announce by entry point.

    Raises:
        TypeError: for what is no Family.
        ValueError: for a base class that is served already.
    """
    found: list[Family] = []
    taken = {name: family for family in FAMILIES for name in family.base_classes}
    for entry in entry_points(group=GROUP):
        loaded = entry.load()
        loaded = loaded if isinstance(loaded, (tuple, list)) else (loaded,)
        for family in loaded:
            if not isinstance(family, Family):
                raise TypeError(f"entry point {entry.name!r} ({entry.value}) of group {GROUP!r} is no Family.")
            for name in family.base_classes:
                if taken.setdefault(name, family) is not family:
                    raise ValueError(
                        f"entry point {entry.name!r} ({entry.value}) declares {name}, which {taken[name].name} serves already."
                    )
            if family not in found:
                found.append(family)
    return tuple(found)


def locate(model: nn.Module) -> Site:
    """Find the family of `model` and its places in it, also below wrappers such as an LM head or adapters.

    Raises:
        UnsupportedError: if no module below `model` is of a known family; with the reason, where none can be.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"wrap() takes a loaded model (torch.nn.Module), found {type(model).__name__}. Load one first, e.g. "
            f"AutoModelForImageTextToText.from_pretrained(...)."
        )
    others: tuple[Family, ...] = ()
    site = _find(model, FAMILIES)
    if site is None:
        others = announced()  # looked up here alone: installed packages are searched for them
        site = _find(model, others)
    if site is not None:
        return site
    for module in model.modules():
        reason = next((IMPOSSIBLE[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in IMPOSSIBLE), None)
        if reason is not None:
            raise UnsupportedError(
                f"{type(model).__name__} has no visual tokens to prune: {reason}, so a picture never takes up places in the "
                f"text's sequence, its attention or its cache. Use a model that feeds pictures to its decoder as tokens."
            )
    supported = "; ".join(f"{f.name} ({', '.join(f.base_classes)})" for f in (*FAMILIES, *others))
    raise UnsupportedError(
        f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', 'unknown')!r}) holds no "
        f"model of a supported family. Supported: {supported}. To add one, declare it and announce it as an entry point "
        f"(docs/architecture.md, 'Adding a family')."
    )


def _find(model: nn.Module, families: tuple[Family, ...]) -> Site | None:
    for module in model.modules():
        for family in families:
            # subclasses count too, hence the walk over the class's ancestors
            if any(cls.__name__ in family.base_classes for cls in type(module).__mro__):
                return Site(family, module)
    return None
