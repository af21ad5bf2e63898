"""The benchmark times what it says, counts what the cache holds, and leaves the model bare."""

from __future__ import annotations

import json

import pytest
import torch

import vtprune
from vtprune import embedded
from vtprune.families import locate
from vtprune.measure.bench import Case, Spread, build, cases_for, machine, measure, timed
from vtprune.measure.inputs import make_inputs
from vtprune.pruner import UnsupportedError


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return build(embedded.config("tiny-random"), 4, torch.float32, "cpu", "sdpa")


def test_weights_are_seeded_finite_and_not_constant(model):
    again = build(embedded.config("tiny-random"), 4, torch.float32, "cpu", "sdpa")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.isfinite().all(), name
        assert a.ndim == 1 or a.std() > 0.01, name
    for name, buffer in model.named_buffers():
        assert buffer.isfinite().all(), name


def test_encoder_stays_whole_and_the_decoder_is_cut():
    made = build(embedded.config("tiny-random"), 2, torch.bfloat16, "cpu", "eager")
    assert len(made.model.language_model.layers) == 2
    assert len(locate(made).encoder_layers) == 6
    assert next(made.parameters()).dtype == torch.bfloat16


def test_rows(model):
    inputs = make_inputs(model, 2, 10)
    before = {name for name, _ in model.named_modules()}, dict(model.model.__dict__)
    cases = cases_for(["uniform", "fastv"], [8, 30], vtprune.create)
    ticks: list[str] = []
    rows = measure(model, inputs, cases, repeats=2, warmup=1, decode_steps=2, tick=ticks.append)
    assert [r.label for r in rows] == ["unpruned", *[c.label for c in cases]]
    assert ticks == [r.label for r in rows] * 3
    bare, whole, pruned = rows[:3]
    config = model.config.text_config
    per_token = 2 * 4 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    assert bare.kv_bytes == whole.kv_bytes == 2 * (36 + 10) * per_token
    assert pruned.kv_bytes == 2 * (8 + 10) * per_token
    assert bare.flops == whole.flops == pruned.flops_full > pruned.flops
    assert pruned.entered == pruned.equivalent_tokens == 8
    assert bare.speedup == 1.0
    assert pruned.selection.median > 0
    for row in rows:
        if row.error is None:
            assert row.prefill.low <= row.prefill.median <= row.prefill.high
            assert 0 < row.encoder.median < row.prefill.median
            assert row.decode.median > 0
    # the cut at layer 2 of 4 cannot reach a mean of 8 of 36
    failed = next(r for r in rows if r.label == "fastv keep=8")
    assert "cannot be reached" in failed.error
    assert failed.prefill is None
    assert next(r for r in rows if r.label == "fastv keep=30").equivalent_tokens == 30
    assert ({name for name, _ in model.named_modules()}, dict(model.model.__dict__)) == before


def test_an_interrupted_run_leaves_the_model_bare(model):
    inputs = make_inputs(model, 1, 10)
    with pytest.raises(vtprune.BudgetError):
        timed(model, inputs, Case("x", vtprune.create("fastv", keep=1)))
    assert "get_image_features" not in model.model.__dict__
    assert "_vtprune_session" not in model.model.__dict__


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 3.0]) == Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("layers", "said"),
    [(0, "1 .. 6"), (7, "1 .. 6")],
)
def test_layers_out_of_range(layers, said):
    with pytest.raises(UnsupportedError, match=said):
        build(embedded.config("tiny-random"), layers, torch.float32, "cpu", "sdpa")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "nothing"}', '{"model_type": "llama"}', "\x00"])
def test_unusable_configurations(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UnsupportedError, match=r"c\.json"):
        build(tmp_path / "c.json", None, torch.float32, "cpu", "sdpa")


def test_prompts_must_fit(model):
    for batch, text in ((0, 10), (1, 1), (1, 600)):
        with pytest.raises(UnsupportedError):
            make_inputs(model, batch, text)


def test_configurations_are_the_published_sizes():
    sizes = {"llava-1.5-7b": (4096, 11008, 32, 32), "llava-1.5-13b": (5120, 13824, 40, 40)}
    for name, expected in sizes.items():
        text = json.loads(embedded.config(name).read_text())["text_config"]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        assert tuple(text[n] for n in names) == expected
    with pytest.raises(embedded.EmbeddedError, match=r"llava-1\.5-7b"):
        embedded.config("llava-1.5-7")


def test_machine_is_named():
    said = machine("cpu")
    assert said["torch"] == torch.__version__
    assert said["device"]
    assert said["date"].startswith("20")
