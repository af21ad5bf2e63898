"""Model families. To add one: declare a `Family` in a file here and list it in `FAMILIES` (docs/architecture.md)."""

from __future__ import annotations

from torch import nn

from vtprune.families.base import Family, Site
from vtprune.families.idefics import IDEFICS3
from vtprune.families.llava import LLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION, VIDEO_LLAVA
from vtprune.families.others import AYA_VISION, FAST_VLM, INTERNVL, MISTRAL3, PERCEPTION_LM, VIP_LLAVA
from vtprune.families.ovis import OVIS2
from vtprune.families.qwen import QWEN_VL
from vtprune.pruner import UnsupportedError

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_NEXT_VIDEO,
    LLAVA_ONEVISION,
    VIDEO_LLAVA,
    VIP_LLAVA,
    QWEN_VL,
    INTERNVL,
    MISTRAL3,
    IDEFICS3,
    AYA_VISION,
    OVIS2,
    PERCEPTION_LM,
    FAST_VLM,
)


def locate(model: nn.Module) -> Site:
    """Find the family of `model` and its places in it, also below wrappers such as an LM head or adapters.

    Raises:
        UnsupportedError: if no module below `model` is of a known family.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"wrap() takes a loaded model (torch.nn.Module), found {type(model).__name__}. Load one first, e.g. "
            f"AutoModelForImageTextToText.from_pretrained(...)."
        )
    for module in model.modules():
        for family in FAMILIES:
            # subclasses count too, hence the walk over the class's ancestors
            if any(cls.__name__ in family.base_classes for cls in type(module).__mro__):
                return Site(family, module)
    supported = "; ".join(f"{f.name} ({', '.join(f.base_classes)})" for f in FAMILIES)
    raise UnsupportedError(
        f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', 'unknown')!r}) holds no "
        f"model of a supported family. Supported: {supported}. To add one, declare it in vtprune/families "
        f"(docs/architecture.md, 'Adding a family')."
    )
