"""Idefics3, SmolVLM, Aya Vision, Ovis2, PerceptionLM and FastVLM: the promises, and that tiles lie where the layout says."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from models import IMAGE, TOKENS, VIDEO, batch, prompt
from oracle import Watch, oracle_logits
from transformers import DynamicCache
from zoo import model_of
from zoo.plain import KINDS

import vtprune

STRATEGIES = {
    "todre": lambda: vtprune.ToDRE(keep=30),
    "fastv": lambda: vtprune.FastV(keep=0.5, layer=1),
    "pyramiddrop": lambda: vtprune.PyramidDrop(keep=0.6),
    "random": lambda: vtprune.Random(keep=0.4, seed=3),
    "divprune+fastv+evict": lambda: vtprune.create("divprune+fastv+evict", keep=0.3, layer=1),
}
PROMPTS = [[2, "A", 5], [3, "B", 2, "A", 4], [1, "B", 7]]
VIDEOS = [[2, "V", 5], [3, "W", 2, "A", 4]]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_kernel = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@lru_cache
def seen(kind, part: str):
    model = model_of(kind)
    return kind.picture(model, "AB".index(part)) if part in "AB" else kind.video(model, "VW".index(part))


def ask(kind, prompts):
    """Token ids and other inputs per sample; an int is that many text tokens, "A" and "B" pictures, "V" and "W" videos."""
    ids, given = [], []
    for parts in prompts:
        row, inputs = [1], {}
        for part in parts:
            if isinstance(part, int):
                row += prompt(part)[1:]
                continue
            one, tokens = seen(kind, part)
            row += tokens
            for name, value in one.items():
                inputs.setdefault(name, []).append(value)
        ids.append(row)
        given.append({name: torch.cat(values) for name, values in inputs.items()})
    return ids, given


def fed(ids, given):
    names = dict.fromkeys(name for one in given for name in one)
    return {**batch(ids), **{name: torch.cat([one[name] for one in given if name in one]) for name in names}}


def run(kind, ids, given, pruner=None, positions=None, attn="sdpa", steps=4, **options):
    model = model_of(kind, attn)

    def generate():
        return model.generate(
            **fed(ids, given),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    if pruner is None:
        out = generate()
        return out.sequences[:, -steps:], torch.stack(out.logits, 1), None, None
    with vtprune.pruning(model, pruner, positions=positions) as session:
        watch = Watch(model, pruner)
        try:
            out = generate()
        finally:
            watch.close()
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), session.report, watch


def assert_masked(kind, ids, given, result, attn="sdpa"):
    tokens, logits, report, watch = result
    for row, one in enumerate(given):
        turn = watch.turn(ids[row], tokens[row].tolist(), report.samples[row], None, row, 0)
        turn.extra, turn.visual = one, (IMAGE, VIDEO)
        expected = oracle_logits(model_of(kind, attn), [turn], report.positions == "compact")[len(ids[row]) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@every_kind
@every_strategy
def test_keep_all_is_bit_identical(kind, strategy):
    ids, given = ask(kind, PROMPTS)
    everything = STRATEGIES[strategy]()
    for part in getattr(everything, "parts", [getattr(everything, "pruner", everything)]):
        part.keep = 1.0
    tokens, logits, _, _ = run(kind, ids, given)
    kept, pruned, report, _ = run(kind, ids, given, everything)
    assert torch.equal(tokens, kept) and torch.equal(logits, pruned)
    assert all(len(s.kept) == s.visual_tokens == row.count(IMAGE) for s, row in zip(report.samples, ids, strict=True))


@every_kind
@every_strategy
@every_kernel
def test_masking_equals_removing(kind, strategy, attn):
    ids, given = ask(kind, PROMPTS)
    for positions in kind.positions:
        assert_masked(kind, ids, given, run(kind, ids, given, STRATEGIES[strategy](), positions, attn), attn)


@every_kind
@every_strategy
def test_batch_equals_single(kind, strategy):
    ids, given = ask(kind, PROMPTS)
    tokens, logits, report, _ = run(kind, ids, given, STRATEGIES[strategy]())
    for row, one in enumerate(given):
        alone, by_itself, single, _ = run(kind, [ids[row]], [one], STRATEGIES[strategy]())
        assert torch.equal(tokens[row], alone[0])
        torch.testing.assert_close(logits[row], by_itself[0], atol=1e-4, rtol=1e-4)
        for a, b in zip(report.samples[row].layers, single.samples[0].layers, strict=True):
            assert torch.equal(a, b)


@every_kind
@pytest.mark.parametrize("strategy", ["todre", "fastv"])
def test_cached_equals_uncached(kind, strategy):
    ids, given = ask(kind, PROMPTS)
    cached = run(kind, ids, given, STRATEGIES[strategy]())
    uncached = run(kind, ids, given, STRATEGIES[strategy](), use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)
