"""PyramidDrop: its ladder, its score, and both inside a running model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava

import vtprune
from vtprune.pruner import BudgetError, Needs, PrefillView, Rows
from vtprune.strategies.pyramiddrop import RATIOS, PyramidDrop, geometric

quick = settings(max_examples=60, deadline=None, derandomize=True)
DEPTHS = [4, 8, 24, 28, 32, 40]


def make_view(layer: int, depth: int, entered: int, tokens: int | None = None, items: int = 1, sizes=None, seed=0, dtype=None):
    tokens = entered if tokens is None else tokens
    logits = torch.randn(items, 4, 1, tokens, generator=torch.Generator().manual_seed(seed))
    logits = logits.to(dtype or torch.float32)
    rows = Rows(logits, torch.logaddexp(logits.float().logsumexp(-1), torch.zeros(())), torch.ones(items, 1, dtype=torch.bool))
    index = torch.arange(tokens).expand(items, -1)
    return PrefillView(
        index, sizes or (entered,), {}, layer=layer, depth=depth, rows=rows, computed=(entered,) * (layer - 1) + (tokens,)
    )


def cascade(strategy: PyramidDrop, depth: int, entered: int, sizes=None, items: int = 1) -> list[int]:
    """Tokens that each layer computes on when the strategy is run over views made by hand."""
    needs, counts, tokens = strategy.prefill_needs(depth), [], entered
    for layer in range(depth):
        if layer in needs:
            view = make_view(layer, depth, entered, tokens, items, sizes, seed=layer)
            keep = strategy.prefill(view)
            if keep is not None:
                assert keep.indices.shape[0] == items and keep.indices.shape[1] < tokens
                for row in keep.indices.tolist():
                    assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < tokens
                tokens = keep.indices.shape[1]
        counts.append(tokens)
    return counts


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_papers_ratios_at_a_quarter_a_half_and_three_quarters(depth):
    strategy, quarter = PyramidDrop(), depth // 4
    assert strategy.prefill_needs(depth) == {quarter * i: Needs("last", ahead=True) for i in (1, 2, 3)}
    assert cascade(strategy, depth, 576) == [n for n in (576, 288, 144, 72) for _ in range(quarter)]


def test_published_cuts_are_before_layers_8_16_and_24_of_32():
    assert list(PyramidDrop().prefill_needs(32)) == [8, 16, 24]
    assert list(PyramidDrop(layers=(8, 16, 24)).prefill_needs(40)) == [8, 16, 24]  # as in the 13B scripts
    assert sum(cascade(PyramidDrop(), 32, 576)) / 32 == 270


def test_ratios_are_of_what_entered_and_round_down():
    strategy = PyramidDrop(ratios=(0.5, 0.3, 0.01))
    # 99 of 200 tokens came in from an encoder strategy
    assert cascade(strategy, 4, 99, sizes=(200,)) == [99, 49, 29, 1]


@quick
@given(st.integers(2, 48), st.integers(2, 3000), st.data())
def test_the_ladder_spends_the_budget(depth, tokens, data):
    cuts = tuple(sorted(set(PyramidDrop()._cuts(depth))))
    target = data.draw(st.integers(1, tokens - 1))
    least = cuts[0] * tokens + depth - cuts[0]
    if target * depth < least:
        with pytest.raises(BudgetError, match=f"at least {math.ceil(least / depth)} of {tokens}"):
            geometric(cuts, target, tokens, depth)
        return
    counts = geometric(cuts, target, tokens, depth)
    assert len(counts) == depth and counts[: cuts[0]] == (tokens,) * cuts[0]
    assert list(counts) == sorted(counts, reverse=True) and counts[-1] >= 1
    assert {i for i in range(1, depth) if counts[i] < counts[i - 1]} <= set(cuts)
    off = abs(sum(counts) - target * depth)
    assert off <= depth / 2
    if depth % 4 == 0:
        assert off == 0


@pytest.mark.parametrize("target", [192, 270, 400])
def test_the_ladder_is_geometric(target):
    counts = geometric((8, 16, 24), target, 576, 32)
    rho = (counts[8] / 576 + counts[16] / counts[8]) / 2
    for stage in (1, 2, 3):
        assert abs(counts[8 * stage] - 576 * rho**stage) <= 2.5
    if target == 270:  # the paper's own factor
        assert counts[::8] == (576, 288, 144, 72)


def test_budget_of_several_images_and_after_an_encoder_strategy():
    counts = cascade(PyramidDrop(keep=20), 8, 120, sizes=(60, 60), items=3)
    assert sum(counts) == 40 * 8 and counts[:2] == [120, 120]
    # the encoder left 30 of 60: 20 on the mean over layers of those
    counts = cascade(PyramidDrop(keep=20), 8, 30, sizes=(60,))
    assert sum(counts) == 20 * 8 and counts[0] == 30


def test_keep_everything_cuts_nothing():
    for strategy in (PyramidDrop(keep=1.0), PyramidDrop(keep=36), PyramidDrop(ratios=(1.0, 1.0, 1.0))):
        assert cascade(strategy, 8, 36) == [36] * 8
        assert not strategy.asks_to_prune((36,))
    assert PyramidDrop().asks_to_prune((2,)) and not PyramidDrop().asks_to_prune((1,))
    assert PyramidDrop(keep=9).asks_to_prune((9, 10)) and not PyramidDrop(keep=9).asks_to_prune((9,))
    assert cascade(PyramidDrop(), 8, 1) == [1] * 8


@quick
@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_score_is_the_mean_over_heads(seed, items, dtype):
    view = make_view(2, 8, 30, items=items, seed=seed, dtype=dtype)
    kept = PyramidDrop().prefill(view).indices
    logits, lse = view.rows.logits.double(), view.rows.lse.double()
    for b in range(items):
        score = [sum(math.exp(logits[b, h, 0, j] - lse[b, h, 0]) for h in range(4)) / 4 for j in range(30)]
        ranked = sorted(score, reverse=True)
        assume(ranked[14] - ranked[15] > 1e-6)  # else rounding decides
        assert kept[b].tolist() == sorted(sorted(range(30), key=lambda j: -score[j])[:15])


@pytest.mark.parametrize("fill", [0.0, -math.inf, math.nan])
def test_flat_zero_and_nan_scores_keep_the_first_tokens(fill):
    view = make_view(2, 8, 10, items=2)
    view.rows.logits.fill_(fill)
    view.rows.lse.zero_()
    assert PyramidDrop().prefill(view).indices.tolist() == [list(range(5))] * 2


def test_shares_that_fall_together_take_the_last_ratio():
    strategy = PyramidDrop()
    assert list(strategy.prefill_needs(2)) == [1]
    assert cascade(strategy, 2, 80) == [80, 10]
    assert cascade(PyramidDrop(keep=50), 2, 80) == [80, 20]


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"ratios": (0.5, 0.25)},
        {"ratios": (0.25, 0.5, 0.1)},
        {"ratios": (0.5, 0.25, 0.0)},
        {"ratios": (math.nan, 0.25, 0.1)},
        {"layers": ()},
        {"layers": (0, 2, 3)},
        {"layers": (0.5, 0.25, 0.75)},
        {"layers": (0.25, 8, 24)},
        {"layers": (0.25, 0.5, 1.0)},
    ],
)
def test_fields_without_meaning_are_refused(fields):
    with pytest.raises(BudgetError):
        PyramidDrop(**fields)


def test_a_layer_outside_the_decoder_is_refused():
    with pytest.raises(BudgetError, match=r"1 \.\. 23 of this decoder"):
        PyramidDrop(layers=(8, 16, 24)).prefill_needs(24)
    with pytest.raises(BudgetError, match="of this decoder"):
        PyramidDrop().prefill_needs(1)


def test_settings_carry_the_fields():
    assert PyramidDrop(keep=0.5).settings() == {"name": "pyramiddrop", "keep": 0.5, "ratios": None, "layers": (0.25, 0.5, 0.75)}
    assert RATIOS == (0.5, 0.25, 0.125) and PyramidDrop(ratios=[0.5, 0.25, 0.125]) == PyramidDrop(ratios=RATIOS)


# ---------------------------------------------------------------------- in a model


def generate(model, prompts, pixels):
    return model.generate(
        **batch(prompts),
        pixel_values=pixels,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_in_a_model_it_keeps_what_the_running_layers_own_attention_prefers(attn):
    model = tiny_llava(attn, layers=4)
    ids, pixels = prompt(2, "I", 5), images(1)
    with vtprune.pruning(model, PyramidDrop(ratios=(0.5, 0.5, 0.5))) as session:
        model(**batch([ids]), pixel_values=pixels)
    sample = session.report.samples[0]
    # before the first cut nothing differs from the full model, so layer 1 of it shows the rows
    full = tiny_llava("eager", layers=4)
    attention = full(**batch([ids]), pixel_values=pixels, output_attentions=True).attentions[1]
    score = attention[0, :, -1, 3 : 3 + TOKENS].mean(0)
    ranked = score.sort(descending=True).values
    assert ranked[17] - ranked[18] > 1e-6
    assert sample.layers[1].tolist() == sorted(score.topk(18).indices.tolist())
    assert [len(layer) for layer in sample.layers] == [36, 18, 18, 18]


def test_in_a_model_the_budget_is_exact_and_a_batch_equals_its_samples():
    model = tiny_llava(layers=8)
    prompts = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I")]
    pixels = images(4)
    with vtprune.pruning(model, PyramidDrop(keep=18)) as session:
        together = generate(model, prompts, pixels)
    report, first = session.report, 0
    assert [s.equivalent_tokens for s in report.samples] == [18.0, 36.0, 18.0]
    for i, ids in enumerate(prompts):
        count = 2 if i == 1 else 1
        with vtprune.pruning(model, PyramidDrop(keep=18)) as session:
            alone = generate(model, [ids], pixels[first : first + count])
        first += count
        assert alone.sequences[0, -4:].tolist() == together.sequences[i, -4:].tolist()
        for a, b in zip(session.report.samples[0].layers, report.samples[i].layers, strict=True):
            assert torch.equal(a, b)


def test_in_a_model_after_an_encoder_strategy():
    model = tiny_llava(layers=8)
    with vtprune.pruning(model, vtprune.FlowCut(keep=24) + PyramidDrop(keep=12)) as session:
        generate(model, [prompt(2, "I", 5)], images(1))
    sample = session.report.samples[0]
    assert len(sample.layers[0]) == 24 and sample.equivalent_tokens == 12.0
