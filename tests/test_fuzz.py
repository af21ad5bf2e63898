"""Random combinations of family, strategy, budget, batch, pictures, padding and kernel: a documented error, or every promise.

`pytest tests/test_fuzz.py --hypothesis-profile thorough` draws 1,000 of them. What failed once is kept as an example.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from harness import Parts, ask, assert_masked, assert_same, cache_sizes, run
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from zoo import every

import vtprune
from vtprune.pruner import budget_tokens

KINDS = {kind.name: kind for kind in every()}
EXACT = {"random", "uniform", "divprune", "cdpruner", "todre"}  # choose before the decoder, exactly as many as asked
NAMES = [
    *sorted(EXACT),
    "flowcut",
    "visionzip",
    "mustdrop",
    "fastv",
    "pyramiddrop",
    "sparsevlm",
    "psigmoid",
    "evict",
    "resolution",
    "quota",
    "framedrop",
    "evs",
    "dycoke",
    "flowcut+fastv",
    "divprune+fastv+evict",
    "random+evict",
]


@dataclass(frozen=True)
class Setting:
    """One configuration; prompts as in `harness.ask`."""

    kind: str
    name: str
    keep: int | float
    prompts: tuple[tuple[int | str, ...], ...]
    attn: str
    positions: int
    cached: bool


@st.composite
def configurations(draw) -> Setting:
    kind = draw(st.sampled_from(sorted(KINDS)))
    keep = draw(st.one_of(st.integers(1, 80), st.floats(0.02, 1.0)))
    shown = "ABVW" if KINDS[kind].video else "AB"
    if not KINDS[kind].mixes:
        shown = draw(st.sampled_from(["AB", "VW"]))
    words = st.integers(1, 9)
    prompts = []
    for at in range(draw(st.integers(1, 3))):
        parts: list[int | str] = [draw(words)]
        # the first sample has a picture; the others may be text alone
        for _ in range(draw(st.integers(1 if at == 0 else 0, 2))):
            parts += [draw(st.sampled_from(shown)), draw(words)]
        prompts.append(tuple(parts))
    return Setting(
        kind,
        draw(st.sampled_from(NAMES)),
        keep,
        tuple(prompts),
        draw(st.sampled_from(["sdpa", "eager"])),
        draw(st.integers(0, 1)),
        draw(st.booleans()),
    )


def check(one: Setting) -> str:
    """Run it; returns what became of it: "refused" with a documented error, or "held"."""
    kind = KINDS[one.kind]
    prompts: list[Parts] = [list(parts) for parts in one.prompts]
    asked = ask(kind, prompts, one.attn)
    positions = kind.positions[one.positions % len(kind.positions)]
    try:
        # these decoders are four layers deep: a cut at FastV's own layer would leave little to choose
        pruner = vtprune.create(one.name, keep=one.keep, **({"layer": 1} if "fastv" in one.name else {}))
        ran = run(asked, one.attn, pruner, positions, steps=3, use_cache=one.cached)
    except vtprune.VtpruneError as error:
        assert len(str(error)) > 20  # says what was found and what to do
        return "refused"
    report = ran.report
    assert len(report.samples) == len(prompts)
    for row, sample in enumerate(report.samples):
        kept = sample.kept.tolist()
        assert kept == sorted(set(kept)) and all(0 <= n < sample.visual_tokens for n in kept)
        assert len(sample.images) == len(sample.frames) == len(sample.views)
        if one.name in EXACT:
            assert len(kept) == sum(budget_tokens(one.keep, n) for n in sample.images), row
        for earlier, later in zip(sample.layers, sample.layers[1:], strict=False):
            assert set(later.tolist()) <= set(earlier.tolist())
    assert 0 < report.flops <= report.flops_full * 1.0001
    if one.cached:
        first = run(asked, one.attn, pruner, positions, steps=1)
        assert first.report.kv_bytes == cache_sizes(first.cache) <= first.report.kv_bytes_full
        assert torch.equal(first.tokens, ran.tokens[:, :1])
    assert_masked(asked, ran, one.attn, tolerance=2e-4)
    row = len(prompts) - 1
    if row and asked.given[row]:
        alone = run(asked.alone(row), one.attn, pruner, positions, steps=3, use_cache=one.cached)
        assert_same(ran, alone, slice(row, row + 1), tolerance=2e-4)
    return "held"


# every tile's patches in an order of their own, none dropped before the decoder
@example(Setting("next", "mustdrop", 28, ((1, "A", 1),), "sdpa", 0, False))
@given(configurations())
@settings(suppress_health_check=list(HealthCheck), print_blob=True)
def test_any_combination(one):
    event(f"{one.kind}: {check(one)}")


def test_most_combinations_are_served():
    """The property above means something: most of what is drawn runs."""
    names = ("random", "fastv", "todre")
    plain = [check(Setting(kind, name, 0.5, ((2, "A", 4),), "sdpa", 0, True)) for kind in KINDS for name in names]
    assert plain.count("held") >= 0.9 * len(plain)


@pytest.mark.parametrize("keep", [1, 0.02, 1.0, 10**6])
def test_extreme_budgets(keep):
    for kind in KINDS:
        check(Setting(kind, "divprune", keep, ((1, "A", 1), (3,)), "sdpa", 0, True))
