"""DivPrune: the loneliest token first, then max-min, per image."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava

import vtprune
from vtprune.pruner import BudgetError, SelectView, budget_tokens
from vtprune.strategies.divprune import DivPrune

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def view_of(features: torch.Tensor) -> SelectView:
    count, tokens, width = features.shape
    index = torch.arange(tokens).expand(count, -1)
    ordinal = torch.zeros(count, dtype=torch.long)
    return SelectView(index, (tokens,), {}, features=features, ordinal=ordinal, text=[torch.zeros(0, width)] * count)


def slow(x: torch.Tensor, k: int) -> list[int]:
    """The definition over a whole distance matrix, in float64, recomputing every minimum at every step."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    others = [[float(distance[i, j]) for j in range(len(x)) if j != i] for i in range(len(x))]
    taken = [max(range(len(x)), key=lambda i: min(others[i]))]
    while len(taken) < k:
        left = [i for i in range(len(x)) if i not in taken]
        taken.append(max(left, key=lambda i: min(float(distance[i, c]) for c in taken)))
    return sorted(taken)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [1, 2, 7, 0.5])
def test_against_the_definition(dtype, keep):
    features = torch.randn(3, 30, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    kept = DivPrune(keep=keep).select(view_of(features)).indices.tolist()
    assert kept == [slow(item, budget_tokens(keep, 30)) for item in features]


def test_by_hand():
    # a tight pair, a wider pair, and one that lies alone: it comes first, then of each pair the one farther away
    angle = torch.deg2rad(torch.tensor([[0.0, 1.0, 100.0, 110.0, 220.0]]))
    features = torch.stack([angle.cos(), angle.sin()], -1)
    assert [DivPrune(keep=k).select(view_of(features)).indices.tolist()[0] for k in (1, 2, 3)] == [[4], [1, 4], [1, 3, 4]]


@quick
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.one_of(st.integers(1, 25), st.floats(0.01, 1.0)),
    st.sampled_from([0.0, 1.0, None]),
)
def test_exact_budget(count, tokens, keep, constant):
    features = torch.randn(count, tokens, 5) if constant is None else torch.full((count, tokens, 5), constant)
    chosen, k = DivPrune(keep=keep).select(view_of(features)), budget_tokens(keep, tokens)
    if k == tokens:
        assert chosen is None
        return
    for row in chosen.indices.tolist():
        assert row == sorted(set(row)) and len(row) == k and row[0] >= 0 and row[-1] < tokens
        assert constant is None or row == list(range(k))


def test_fields():
    strategy = DivPrune()
    assert strategy.stages() == ("select",) and strategy.positions == "compact"
    assert budget_tokens(strategy.keep, 576) == 56
    assert strategy.settings() == {"name": "divprune", **dataclasses.asdict(strategy)}
    with pytest.raises(BudgetError):
        DivPrune(keep=0)


def test_on_a_model():
    model, pixels = tiny_llava(), images(4)
    prompts = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I")]

    def last(ids, pictures, pruner):
        with torch.no_grad(), vtprune.pruning(model, pruner) as session:
            return model(**batch(ids), pixel_values=pictures).logits[:, -1], session.report

    together, report = last(prompts, pixels, DivPrune(keep=9))
    assert [len(s.kept) for s in report.samples] == [9, 18, 9]
    for row, at in enumerate([slice(0, 1), slice(1, 3), slice(3, 4)]):
        alone, single = last([prompts[row]], pixels[at], DivPrune(keep=9))
        assert torch.equal(single.samples[0].kept, report.samples[row].kept)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        plain = model(**batch(prompts), pixel_values=pixels).logits[:, -1]
    assert torch.equal(last(prompts, pixels, DivPrune(keep=TOKENS))[0], plain)
