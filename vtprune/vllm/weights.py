"""Names of weights. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

TOWER = "vision_tower."
PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")


def published_names(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights, with the tower's named as in published checkpoints and in vLLM; transformers 5.23 names them anew."""
    for name, weight in weights:
        yield _published(name), weight


def _published(name: str) -> str:
    for head in (TOWER, "model." + TOWER):
        if name.startswith(tuple(head + part for part in PARTS)):
            return f"{head}vision_model.{name.removeprefix(head)}"
    return name
