"""One encoder batch through a strategy: all pictures of all requests at once. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtprune.engine.attention import Request, attention_rows
from vtprune.engine.encoding import Encoding
from vtprune.engine.items import Item, checked, stack_carry, unstack_carry
from vtprune.engine.stream import groups
from vtprune.measure.clock import Clock
from vtprune.pruner import Encoder, Pruner, Rows, SelectView, UnsupportedError

Grid = tuple[int, int] | None
# (hidden [B, S, C], mask bool [B, 1, S, S] or None, what is wanted of its attention) -> hidden [B, S, C]
Block = Callable[[Tensor, Tensor | None, list[tuple[Request, Callable[[Rows], None]]]], Tensor]


def square(tokens: int) -> Grid:
    """The grid of a square picture."""
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None


def encode(pruner: Pruner | None, encoder: Encoder, blocks: Sequence[Block], hidden: Tensor) -> tuple[Tensor, list[Item]]:
    """Run the vision encoder's blocks; patches leave between them as the strategy's `encode` stage says.

    Parameters:
        pruner: None keeps everything.
        encoder: the tower; blocks: at least `encoder.depth`; those after it run where the strategy watches them.
        hidden: [B, special + N, C] what enters the first block.
    Returns:
        [B, K, C] output of the feature block for the patches, padded on the right, and what is left of each picture.
    """
    owner, special = None if pruner is None else pruner.part("encode"), int(encoder.cls)
    needs = {} if owner is None else owner.encode_needs(encoder)
    run = Encoding(owner, needs, encoder.depth, special, lambda: "sdpa", square, Clock(torch.device("cpu")))
    features = hidden
    last = max([encoder.depth - 1, *needs])
    for at, block in enumerate(blocks[: last + 1]):
        fed = run.before_block(at, (hidden,), {})
        mask = None if fed is None else fed[1]["attention_mask"]
        hidden = block(hidden, mask, list(run.requests(at)))
        shorter = run.after_block(at, hidden)
        hidden = hidden if shorter is None else shorter
        if at == encoder.depth - 1:
            features = hidden
    run.doubts.settle()
    return features[:, special:], run.items


def fresh(features: list[Tensor]) -> list[Item]:
    """Pictures of which nothing has left yet."""
    return [Item(torch.arange(len(f), device=f.device), (len(f),)) for f in features]


def select(
    pruner: Pruner, features: list[Tensor], items: list[Item], grids: list[Grid], frames: Sequence[int] | None = None
) -> list[Tensor]:
    """The strategy's `select` stage: one call for all pictures of equal size.

    Parameters:
        features: [n, D] per picture, projected; items: what is left of each, cut here; grids: of the unpruned pictures.
        frames: of each, where they are videos; a grid is then one frame's.
    Returns:
        [k, D] per picture.
    """
    owner = pruner.part("select")
    chosen = list(features)
    if owner is None:
        return chosen
    frames = [1] * len(items) if frames is None else frames
    for group in groups([(len(i.index), i.sizes, g, f) for i, g, f in zip(items, grids, frames, strict=True)]):
        members = [items[i] for i in group]
        view = SelectView(
            index=torch.stack([item.index for item in members]),
            sizes=members[0].sizes,
            carry=stack_carry(members),
            features=torch.stack([features[i] for i in group]),
            grid=grids[group[0]],
            frames=frames[group[0]],
            # a picture's features are cached and shared, whatever its place in a prompt: each counts as the first
            ordinal=torch.zeros(len(group), dtype=torch.long),
        )
        keep = owner.select(view)
        unstack_carry(members, view.carry)
        if keep is None:
            continue
        for i, choice in zip(group, checked(keep, len(group), view.tokens, f"{owner.name}.select"), strict=True):
            items[i].cut(choice)
            chosen[i] = features[i][choice.kept] if choice.hidden is None else choice.hidden.to(features[i].dtype)
    return chosen


class Rehearsed(NamedTuple):
    """What a strategy did to one picture: tokens left of it, and the sequence length of each block of the encoder that ran."""

    left: int
    lengths: list[int]


def rehearse(pruner: Pruner, tokens: int, encoder: Encoder | None = None, blocks: int = 0) -> Rehearsed:
    """The strategy on one picture of random numbers; finds what its declarations do not tell.

    Parameters:
        tokens: of a picture; encoder, blocks: the tower and how many of its blocks run, or None.
    Raises:
        UnsupportedError: if the strategy cannot work on what a server has.
    """
    generator, heads, width, lengths = torch.Generator().manual_seed(0), 2, 8, []

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def block(hidden: Tensor, mask: Tensor | None, wanted: list) -> Tensor:
        lengths.append(hidden.shape[1])
        for request, sink in wanted:
            q, k, v = (random(1, heads, hidden.shape[1], width) for _ in range(3))
            sink(attention_rows(q, k, v, width**-0.5, request))
        return random(*hidden.shape)

    try:
        if encoder is None:
            features = [random(tokens, heads * width)]
            items = fresh(features)
        else:
            hidden, items = encode(pruner, encoder, [block] * blocks, random(1, tokens + encoder.cls, heads * width))
            features = [hidden[0, : len(items[0].index)]]
        return Rehearsed(len(select(pruner, features, items, [square(tokens)])[0]), lengths)
    except (RuntimeError, AttributeError, IndexError, TypeError) as error:
        raise UnsupportedError(
            f"vtprune: {pruner.name!r} failed on a picture of random numbers ({type(error).__name__}: {error}); it may read "
            f"something that vLLM does not have where pictures are encoded, such as the text."
        ) from error
