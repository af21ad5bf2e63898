"""Runs of any family of the zoo, pruned or not, and what they are held to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from models import IMAGE, VIDEO, batch, prompt
from oracle import Turn, Watch, oracle_logits
from torch import Tensor
from zoo import Given, Kind, model_of

import vtprune
from vtprune.reporting import Report

PICTURES, VIDEOS = "AB", "VW"
Parts = list[int | str]


@lru_cache
def _seen(kind: Kind, attn: str, part: str) -> tuple[Given, list[int]]:
    model = model_of(kind, attn)
    return kind.picture(model, PICTURES.index(part)) if part in PICTURES else kind.video(model, VIDEOS.index(part))


@dataclass
class Asked:
    """A batch of prompts.

    Parameters:
        ids: token ids per sample; given: what the processor made of each sample's pictures and videos.
        pictures: how many pictures each sample has.
    """

    kind: Kind
    ids: list[list[int]]
    given: list[Given]
    pictures: list[int]

    def inputs(self, side: str = "left") -> Given:
        """Everything that the model takes, padded."""
        inputs = batch(self.ids, side)
        for name in dict.fromkeys(name for one in self.given for name in one):
            inputs[name] = torch.cat([one[name] for one in self.given if name in one])
        return {**inputs, **self.kind.types(inputs["input_ids"])}

    def alone(self, row: int) -> Asked:
        return Asked(self.kind, [self.ids[row]], [self.given[row]], [self.pictures[row]])


def ask(kind: Kind, prompts: list[Parts], attn: str = "sdpa") -> Asked:
    """Prompts in which an int is that many text tokens, "A" and "B" are two pictures, "V" and "W" two videos."""
    asked = Asked(kind, [], [], [])
    for parts in prompts:
        row, seen = [1], {}
        for part in parts:
            if isinstance(part, int):
                row += prompt(part)[1:]
                continue
            one, tokens = _seen(kind, attn, part)
            row += tokens
            for name, value in one.items():
                seen.setdefault(name, []).append(value)
        asked.ids.append(row)
        asked.given.append({name: torch.cat(values) for name, values in seen.items()})
        asked.pictures.append(sum(part in PICTURES for part in parts if isinstance(part, str)))
    return asked


@dataclass
class Ran:
    """A run's new tokens [B, steps], logits [B, steps, vocabulary], cache, and what was pruned."""

    tokens: Tensor
    logits: Tensor
    cache: Any
    report: Report | None = None
    watch: Watch | None = None


def run(asked: Asked, attn: str = "sdpa", pruner=None, positions=None, steps: int = 4, side: str = "left", **options) -> Ran:
    """Greedy generation of `steps` tokens, wrapped for its length if a pruner is given."""
    model = model_of(asked.kind, attn)

    def generate():
        return model.generate(
            **asked.inputs(side),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    if pruner is None:
        out = generate()
        return Ran(out.sequences[:, -steps:], torch.stack(out.logits, 1), getattr(out, "past_key_values", None))
    with vtprune.pruning(model, pruner, positions=positions) as session:
        watch = Watch(model, pruner)
        try:
            out = generate()
        finally:
            watch.close()
        report = session.report if any(asked.given) else None
    return Ran(out.sequences[:, -steps:], torch.stack(out.logits, 1), getattr(out, "past_key_values", None), report, watch)


def turns_of(asked: Asked, ran: Ran) -> list[Turn]:
    """What the oracle needs of each sample."""
    turns, first = [], 0
    for row, given in enumerate(asked.given):
        turn = ran.watch.turn(asked.ids[row], ran.tokens[row].tolist(), ran.report.samples[row], None, row, first)
        turn.extra, turn.visual = given, (IMAGE, VIDEO)
        first += asked.pictures[row]
        turns.append(turn)
    return turns


def assert_masked(asked: Asked, ran: Ran, attn: str = "sdpa", tolerance: float = 1e-4) -> None:
    """Masking equals removing: logits are those of the full model in which what left is attended to no more."""
    model, compact = model_of(asked.kind, attn), ran.report.positions == "compact"
    for row, turn in enumerate(turns_of(asked, ran)):
        expected = oracle_logits(model, [turn], compact, asked.kind.types)[len(asked.ids[row]) - 1 : -1]
        torch.testing.assert_close(ran.logits[row], expected, atol=tolerance, rtol=tolerance)


def assert_same(a: Ran, b: Ran, rows: slice | None = None, tolerance: float = 1e-4) -> None:
    """Same tokens, and logits as near as another order of summing leaves them."""
    rows = rows or slice(None)
    assert torch.equal(a.tokens[rows], b.tokens)
    torch.testing.assert_close(a.logits[rows], b.logits, atol=tolerance, rtol=tolerance)


def cache_sizes(cache) -> int:
    """Bytes of keys and values that a cache holds."""
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
