"""Tiny random models of every family, one file each, and what their processors would make of pictures and videos.

A file of this folder declares `KINDS`, a list of `Kind`; `every()` finds them all. What holds for all families is tested
over them in one place, so that a new family is one file here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Given = dict[str, Tensor]


def nothing(ids: Tensor) -> Given:
    return {}


@dataclass(frozen=True)
class Kind:
    """A family as the tests know it.

    Parameters:
        name: for test ids.
        build: attention kernel -> a tiny random model of the real classes, large enough weights that a dropped token shows.
        picture: (model, 0 or 1) -> what the processor makes of one picture, each tensor with a row (or rows) per picture so
            that several are joined with `torch.cat`, and the token ids that stand for it in the prompt. The two pictures
            differ in size where the family allows it.
        video: the same for a video, or None.
        positions: what `positions=` may be, None for the default alone.
        types: padded input_ids [B, L] -> further inputs (mm_token_type_ids, token_type_ids).
        said: what `types` is of generated tokens, where that is not what it is of text in a prompt.
        needs: names that transformers must have; older versions skip the family.
        windowed: whether all decoder layers keep a window of tokens alone that is shorter than a prompt.
        patch_pixels: pixels along a visual token of `picture` at its own scale, for overlays; 0 where it varies.
        mixes: whether the model itself takes pictures and videos in one call.
    """

    name: str
    build: Callable[[str], nn.Module]
    picture: Callable[[nn.Module, int], tuple[Given, list[int]]]
    video: Callable[[nn.Module, int], tuple[Given, list[int]]] | None = None
    positions: tuple[str | None, ...] = ("original", "compact")
    types: Callable[[Tensor], Given] = nothing
    said: tuple[tuple[str, int], ...] = ()
    needs: tuple[str, ...] = ()
    windowed: bool = False
    patch_pixels: int = 0
    mixes: bool = True

    @property
    def available(self) -> bool:
        return all(hasattr(transformers, name) for name in self.needs)

    def told(self, ids: Tensor, prompt: int) -> Given:
        """`types` of a conversation [1, L] of which the first `prompt` tokens were fed as a prompt."""
        given = self.types(ids)
        for name, value in self.said:
            given[name][:, prompt:] = value
        return given

    def __str__(self) -> str:
        return self.name


def every() -> list[Kind]:
    """All families of this folder, those that the installed transformers has not got left out."""
    found: list[Kind] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found += importlib.import_module(f"{__name__}.{module.name}").KINDS
    return [kind for kind in found if kind.available]


@lru_cache
def model_of(kind: Kind, attn: str = "sdpa") -> nn.Module:
    """The same weights whichever test asks first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind.build(attn)


def seeded(model: nn.Module, suppress: list[int], std: float = 0.2) -> nn.Module:
    """`model` with weights large enough to tell tokens apart, that generates no placeholder and does not stop by itself."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "newline" in name or "class_embedding" in name:
            torch.nn.init.normal_(parameter, std=std)
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.suppress_tokens = None, 0, suppress
    return model.eval()
