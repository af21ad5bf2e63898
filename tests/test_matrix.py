"""The promises over every family of the zoo: what a user gets, whichever model and strategy are put together.

Where a family cannot serve a strategy, its constructor says so; what is nearest to the strategy stands in for it then.
`pytest tests/test_matrix.py -n 2 --table` prints the outcome, family by strategy.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from harness import ask, assert_masked, assert_same, cache_sizes, run
from zoo import every, model_of

import vtprune

KINDS = every()
STRATEGIES = {
    "flowcut": [
        lambda keep: vtprune.FlowCut(keep=keep),
        # what comes out of an encoder that lets nothing leave from inside
        lambda keep: vtprune.DivPrune(keep=keep),
    ],
    "flowcut-twice": [
        # attention of random models is almost flat: with this exponent much leaves after the first blocks, too
        lambda keep: vtprune.FlowCut(keep=min(1.0, keep + 0.2), decoder_keep=keep, every=1, entropy_power=300.0),
        # its cut inside the decoder alone
        lambda keep: vtprune.FlowCut(keep=keep, decoder_keep=keep).only("prefill"),
    ],
    "todre": [lambda keep: vtprune.ToDRE(keep=keep, tau=0.6)],
    "mustdrop": [
        lambda keep: vtprune.MustDrop(keep=min(1.0, keep + 0.2), sim_thr=0.1, layers=(0, 12)),
        # what is left of it without a class token
        lambda keep: vtprune.MustDrop(keep=min(1.0, keep + 0.2), layers=(0, 12), merge=False).only("prefill", "decode"),
        # and where nothing can be evicted; layers of linear attention have no rows to filter by
        lambda keep: vtprune.MustDrop(keep=min(1.0, keep + 0.4), layers=(8,), merge=False).only("prefill"),
    ],
    "fastv": [
        lambda keep: vtprune.FastV(keep=min(1.0, keep + 0.2), layer=1),
        lambda keep: vtprune.FastV(keep=min(1.0, keep + 0.3), layer=2),
    ],
    "random": [lambda keep: vtprune.Random(keep=keep, seed=3)],
    "divprune+fastv+evict": [
        # by name the cache would get half of what enters
        lambda keep: (
            vtprune.create("divprune+fastv+evict", keep=keep, layer=1)
            if keep < 1
            else vtprune.DivPrune(keep=1.0) + vtprune.FastV(keep=1.0, layer=1) + vtprune.Evict(keep=1.0)
        )
    ],
}
EVERYWHERE = {"todre", "random"}  # served by every family
KEEP = 0.4
PROMPTS = {
    "single": [[2, "A", 5]],
    "padded": [[2, "A", 5], [3, "B", 2, "A", 4], [1, "B", 7]],
    "video": [[2, "V", 5], [3, "W", 4, "V", 6]],
    "mixed": [[2, "V", 3, "A", 4], [1, "A", 2, "W", 6]],
}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_kernel = pytest.mark.parametrize("attn", ["sdpa", "eager"])
every_prompt = pytest.mark.parametrize("prompts", PROMPTS)


@pytest.fixture(autouse=True)
def _cell(request, record_property):
    """Which cell of `--table` a test counts for."""
    params = request.node.callspec.params
    strategy = params.get("strategy", "random")
    form = _served(params["kind"], strategy)
    record_property("row", str(params["kind"]))
    record_property("column", strategy)
    record_property("mark", "" if form == 0 else "*")


@lru_cache
def _served(kind, strategy: str) -> int | str:
    """Which of a strategy's forms this family serves, or why none."""
    reason = ""
    for at, build in enumerate(STRATEGIES[strategy]):
        try:
            with vtprune.pruning(model_of(kind), build(KEEP)):
                return at
        except vtprune.UnsupportedError as error:
            reason = str(error)
    return reason


def strategy_for(kind, strategy: str, prompts: str, keep: float = KEEP):
    """The strategy as this family serves it; skips what it refuses, with the reason, and prompts that it has no inputs for."""
    if prompts in ("video", "mixed") and kind.video is None:
        pytest.skip("takes no videos")
    if prompts == "mixed" and not kind.mixes:
        pytest.skip("takes no pictures beside videos")
    form = _served(kind, strategy)
    if isinstance(form, str):
        assert strategy not in EVERYWHERE, form
        pytest.skip(form)
    pruner = STRATEGIES[strategy][form](keep)
    if prompts in ("video", "mixed") and not set(pruner.stages()) & {"select", "prefill", "decode"}:
        pytest.skip("works inside the encoder alone, so it refuses videos")
    return pruner


@every_kind
@every_strategy
@every_prompt
def test_keep_all_is_bit_identical(kind, strategy, prompts):
    pruner = strategy_for(kind, strategy, prompts, 1.0)
    asked = ask(kind, PROMPTS[prompts])
    bare, pruned = run(asked), run(asked, pruner=pruner)
    assert torch.equal(bare.tokens, pruned.tokens) and torch.equal(bare.logits, pruned.logits)
    assert all(len(s.kept) == s.visual_tokens for s in pruned.report.samples)


@every_kind
@every_strategy
@every_prompt
@every_kernel
def test_masking_equals_removing(kind, strategy, prompts, attn):
    pruner = strategy_for(kind, strategy, prompts)
    asked = ask(kind, PROMPTS[prompts], attn)
    for positions in kind.positions:
        assert_masked(asked, run(asked, attn, pruner, positions), attn)


@every_kind
@every_strategy
@pytest.mark.parametrize("prompts", ["padded", "video"])
def test_batch_equals_single_and_bytes_are_as_reported(kind, strategy, prompts):
    pruner = strategy_for(kind, strategy, prompts)
    asked = ask(kind, PROMPTS[prompts])
    # the cache after prefill alone is what the report speaks of
    whole = run(asked, pruner=pruner, steps=1)
    assert 0 < whole.report.kv_bytes == cache_sizes(whole.cache) <= whole.report.kv_bytes_full
    whole = run(asked, pruner=pruner)
    for row in range(len(asked.ids)):
        alone = run(asked.alone(row), pruner=pruner)
        assert_same(whole, alone, slice(row, row + 1))
        for a, b in zip(whole.report.samples[row].layers, alone.report.samples[0].layers, strict=True):
            assert torch.equal(a, b)


@lru_cache
def _cached_as_uncached(kind, prompts: str) -> bool:
    asked = ask(kind, PROMPTS[prompts])
    a, b = run(asked), run(asked, use_cache=False)
    return torch.equal(a.tokens, b.tokens) and torch.allclose(a.logits, b.logits, atol=1e-4, rtol=1e-4)


@every_kind
@pytest.mark.parametrize("strategy", ["todre", "fastv", "random"])
@pytest.mark.parametrize("prompts", ["padded", "video"])
def test_cached_equals_uncached(kind, strategy, prompts):
    pruner = strategy_for(kind, strategy, prompts)
    asked = ask(kind, PROMPTS[prompts])
    if not _cached_as_uncached(kind, prompts):
        pytest.skip("the bare model itself differs with and without a cache, in this version")
    assert_same(run(asked, pruner=pruner), run(asked, pruner=pruner, use_cache=False))


@every_kind
def test_memory_and_work_fall_with_the_budget(kind):
    asked = ask(kind, PROMPTS["single"])
    reports = [run(asked, pruner=vtprune.Random(keep=keep), steps=1).report for keep in (1.0, 0.6, 0.2)]
    bytes_held, work = [r.kv_bytes for r in reports], [r.flops for r in reports]
    # a window is full of what came last
    assert bytes_held == sorted(bytes_held, reverse=True) and len(set(bytes_held)) == (1 if kind.windowed else 3)
    assert work == sorted(work, reverse=True) and len(set(work)) == 3
    assert reports[0].kv_bytes == reports[2].kv_bytes_full
