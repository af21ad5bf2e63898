"""ToDRE: pivot, diverse set, and the gate that drops every visual token of a sample."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava

import vtprune
from vtprune.pruner import BudgetError, Encoder, EncodeView, Needs, PrefillView, Rows, SelectView, budget_tokens
from vtprune.select import k_center, max_sum
from vtprune.strategies.todre import ToDRE, visual_mass

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def rows_over(weights: torch.Tensor, valid: torch.Tensor | None = None) -> Rows:
    """Rows [B, H, R, N] of the given post-softmax weights."""
    valid = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool) if valid is None else valid
    return Rows(weights.log(), torch.zeros(weights.shape[:-1]), valid)


def select_view(features: torch.Tensor, ordinal: list[int] | None = None, **carry: torch.Tensor) -> SelectView:
    count, tokens, width = features.shape
    index = torch.arange(tokens).expand(count, -1)
    ordinal = torch.tensor(ordinal or [0] * count)
    return SelectView(index, (tokens,), carry, features=features, ordinal=ordinal, text=[torch.zeros(2, width)] * count)


def gate_view(weights: torch.Tensor, valid: torch.Tensor | None = None, sizes: tuple[int, ...] = (40,)) -> PrefillView:
    index = torch.arange(weights.shape[-1]).expand(len(weights), -1)
    return PrefillView(index, sizes, {}, layer=7, depth=8, rows=rows_over(weights, valid), computed=(weights.shape[-1],) * 7)


# ---------------------------------------------------------------------- stage 1


def test_the_pivot_is_what_cls_attends_to_most():
    weights = torch.rand(2, 3, 1, 9) / 20
    # one head stares at 4, but the mean over heads is highest at 6
    weights[0, 0, 0, 4], weights[0, :, 0, 6], weights[1, :, 0, 2] = 0.5, 0.4, 0.3
    index = torch.arange(9).expand(2, -1)
    view = EncodeView(index, (9,), {}, layer=7, depth=7, hidden=torch.zeros(2, 9, 4), rows=rows_over(weights))
    assert ToDRE().encode(view) is None
    torch.testing.assert_close(view.carry["pivot"], weights[:, :, 0].mean(1))
    features = torch.randn(2, 9, 5)
    for variant, choose in (("max_sum", max_sum), ("k_center", k_center)):
        chosen = select_view(features, **view.carry)
        kept = ToDRE(keep=4, variant=variant).select(chosen).indices
        assert torch.equal(kept, choose(features, torch.tensor([6, 2]), 4))
        assert chosen.notes == []
    assert ToDRE(keep=1).select(select_view(features, **view.carry)).indices.tolist() == [[6], [2]]


def test_the_two_variants_differ_as_sum_and_minimum_do():
    # from 0: opposite 1 first; then 2 lies at cosine 0 to both (max cosine 0, sum 0), 3 nearer to both ends in turn
    x = torch.tensor([[[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [-0.9, 0.1, 0.0], [0.6, 0.8, 0.0]]])
    view = select_view(x, pivot=torch.tensor([[1.0, 0, 0, 0]]))
    assert ToDRE(keep=2).select(view).indices.tolist() == [[0, 1]]
    assert ToDRE(keep=2, variant="k_center").select(view).indices.tolist() == [[0, 1]]
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.02], [-1.0, -0.02], [0.1, 1.0]]])
    view = select_view(x, pivot=torch.tensor([[1.0, 0, 0, 0]]))
    assert ToDRE(keep=3).select(view).indices.tolist() != ToDRE(keep=3, variant="k_center").select(view).indices.tolist()


def test_without_a_class_token_the_pivot_is_drawn_and_said():
    assert ToDRE().encode_needs(Encoder(6, 6, cls=False)) == {}
    assert ToDRE().encode_needs(Encoder(5, 6, cls=True)) == {5: Needs(queries="cls")}
    assert ToDRE().encode_needs(Encoder(6, 6, cls=True)) == {5: Needs(queries="cls")}

    features = torch.randn(1, 50, 6).expand(3, -1, -1)
    view = select_view(features, [0, 1, 0])
    first = ToDRE(keep=1, seed=4).select(view).indices.tolist()
    assert len(view.notes) == 1 and "random" in view.notes[0] and "seed=4" in view.notes[0]
    assert first[0] == first[2] != first[1]
    # the draw depends on seed, size and place alone, and leaves the user's random stream be
    assert ToDRE(keep=1, seed=4).select(select_view(torch.randn(1, 50, 6), [1])).indices.tolist() == [first[1]]
    state = torch.random.get_rng_state()
    ToDRE(keep=1).select(view)
    assert torch.equal(state, torch.random.get_rng_state())
    pivots = {ToDRE(keep=1, seed=s).select(select_view(features[:1, :8])).indices.item() for s in range(60)}
    assert pivots == set(range(8))


@quick
@given(st.integers(1, 3), st.integers(1, 20), st.one_of(st.integers(1, 25), st.floats(0.01, 1.0)), st.booleans(), st.data())
def test_stage_one_keeps_exactly_its_budget(count, tokens, keep, flat, data):
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    features = torch.zeros(count, tokens, 6) if flat else torch.randn(count, tokens, 6)
    pivot = torch.full((count, tokens), data.draw(st.sampled_from([0.0, math.nan, 1.0])))
    view = select_view(features.to(dtype), pivot=pivot)
    chosen = ToDRE(keep=keep, variant=data.draw(st.sampled_from(["max_sum", "k_center"]))).select(view)
    k = budget_tokens(keep, tokens)
    if k == tokens:
        assert chosen is None
        return
    assert chosen.indices.shape == (count, k)
    for row in chosen.indices.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < tokens
        assert 0 in row  # attention that says nothing: the pivot is the first token


# ---------------------------------------------------------------------- stage 2


def test_mass_is_the_mean_over_heads_and_text_rows():
    weights = torch.rand(3, 4, 5, 11) / 11
    valid = torch.tensor([[True] * 5, [False, True, True, False, True], [False] * 5])
    expected = []
    for b in range(3):
        cells = [
            math.fsum(weights[b, h, r].double().tolist()) for h in range(4) for r in range(5) if bool(valid[b, r])
        ]  # one per head and row
        expected.append(math.fsum(cells) / len(cells) if cells else 0.0)
    assert visual_mass(rows_over(weights, valid)).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gate_decides_per_sample():
    weights = torch.full((4, 2, 3, 10), 0.009)  # mass 0.09
    weights[1] = 0.011  # mass 0.11
    weights[2, 0, 0, 0] = 1.0  # one row of one head alone lifts the mean over tau
    weights[3, 0, 0, 0] = math.nan
    keep = ToDRE().prefill(gate_view(weights))
    assert [row.tolist() for row in keep.indices] == [[], list(range(10)), list(range(10)), list(range(10))]
    assert all(row.dtype == torch.long for row in keep.indices)
    assert [len(row) for row in ToDRE(tau=0.12).prefill(gate_view(weights)).indices] == [0, 0, 10, 10]
    assert [len(row) for row in ToDRE(tau=0.05).prefill(gate_view(weights)).indices] == [10] * 4


def test_no_text_after_the_image_leaves_the_tokens():
    weights = torch.zeros(2, 2, 3, 10)
    valid = torch.tensor([[False] * 3, [True, False, False]])
    assert [len(row) for row in ToDRE().prefill(gate_view(weights, valid)).indices] == [10, 0]
    # nor does a view without a single row
    assert [len(row) for row in ToDRE().prefill(gate_view(weights[:, :, :0])).indices] == [10, 10]


def test_a_budget_of_everything_switches_the_gate_off():
    weights = torch.zeros(1, 2, 3, 40)
    assert ToDRE(keep=1.0).prefill(gate_view(weights)) is None
    assert ToDRE(keep=40).prefill(gate_view(weights)) is None
    assert ToDRE(keep=39).prefill(gate_view(weights)) is not None
    # as a sample's images are counted together
    assert ToDRE(keep=40).prefill(gate_view(weights, sizes=(40, 41))) is not None


@pytest.mark.parametrize(("depth", "layer"), [(32, 28), (40, 35), (28, 24), (24, 21), (8, 6), (4, 2), (3, 1), (2, 0)])
def test_the_gate_stands_at_seven_eighths(depth, layer):
    assert ToDRE().prefill_needs(depth) == {layer + 1: Needs(queries="text")}


def test_fields_that_mean_nothing_are_refused():
    assert ToDRE(gate_layer=0).prefill_needs(2) == {1: Needs(queries="text")}
    for strategy, depth in ((ToDRE(), 1), (ToDRE(gate_layer=3), 4), (ToDRE(gate_layer=-1), 4)):
        with pytest.raises(BudgetError, match="gate_layer"):
            strategy.prefill_needs(depth)
    wrong = [({"variant": "min"}, "variant='min'"), ({"tau": math.nan}, "tau"), ({"tau": -0.1}, "tau"), ({"tau": 2}, "tau")]
    for fields, what in wrong:
        with pytest.raises(BudgetError, match=what):
            ToDRE(**fields)
    assert ToDRE(tau=0).stages() == ToDRE(tau=None).stages() == ("encode", "select")
    assert ToDRE().stages() == ("encode", "select", "prefill")
    assert ToDRE().settings() == {"name": "todre", **dataclasses.asdict(ToDRE())}


# ---------------------------------------------------------------------- on a model


PROMPTS = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I")]


def forward(model, prompts, pixels, pruner=None):
    """Logits at each prompt's end, and the report."""
    with torch.no_grad():
        if pruner is None:
            return model(**batch(prompts), pixel_values=pixels).logits, None
        with vtprune.pruning(model, pruner) as session:
            return model(**batch(prompts), pixel_values=pixels).logits[:, -1], session.report


@pytest.mark.parametrize("siglip", [False, True])
def test_layers_after_the_gate_see_no_visual_token(siglip):
    model, pixels = tiny_llava(siglip=siglip), images(4)
    _, report = forward(model, PROMPTS, pixels, ToDRE(keep=9, tau=1.0, gate_layer=1))
    for sample, (size, fires) in zip(report.samples, [(9, True), (18, True), (9, False)], strict=True):
        # the last prompt ends with its image: no text row, no gate
        assert [len(layer) for layer in sample.layers] == [size] * 2 + [0 if fires else size] * 2
    assert any("pivot is random" in note for note in report.notes) == siglip
    _, report = forward(model, PROMPTS, pixels, ToDRE(keep=9, tau=1e-6, gate_layer=1))
    assert [[len(layer) for layer in sample.layers] for sample in report.samples] == [[9] * 4, [18] * 4, [9] * 4]


@pytest.mark.parametrize("fields", [{}, {"variant": "k_center"}, {"tau": 1.0}])
def test_a_batch_is_its_samples_one_at_a_time(fields):
    model, pixels = tiny_llava(), images(4)
    strategy = ToDRE(keep=7, **fields)
    together, report = forward(model, PROMPTS, pixels, strategy)
    for row, (ids, at) in enumerate(zip(PROMPTS, [slice(0, 1), slice(1, 3), slice(3, 4)], strict=True)):
        alone, single = forward(model, [ids], pixels[at], strategy)
        assert [t.tolist() for t in single.samples[0].layers] == [t.tolist() for t in report.samples[row].layers]
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_keep_everything_is_bit_identical():
    model, pixels = tiny_llava(), images(4)
    plain, _ = forward(model, PROMPTS, pixels)
    with torch.no_grad(), vtprune.pruning(model, ToDRE(keep=1.0, tau=1.0)):
        assert torch.equal(model(**batch(PROMPTS), pixel_values=pixels).logits, plain)
    with torch.no_grad(), vtprune.pruning(model, ToDRE(keep=TOKENS, tau=1.0)):
        assert torch.equal(model(**batch(PROMPTS), pixel_values=pixels).logits, plain)


def test_generation_goes_on_after_the_gate():
    model = tiny_llava()
    with vtprune.pruning(model, ToDRE(keep=6, tau=1.0)):
        cached = model.generate(**batch(PROMPTS[:2]), pixel_values=images(3), max_new_tokens=6, do_sample=False)
        uncached = model.generate(
            **batch(PROMPTS[:2]), pixel_values=images(3), max_new_tokens=6, do_sample=False, use_cache=False
        )
    assert torch.equal(cached, uncached)
