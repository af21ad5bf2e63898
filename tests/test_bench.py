"""The benchmark times what it says, counts what the cache holds, and leaves the model bare."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import vtprune
from vtprune import embedded
from vtprune.families import locate
from vtprune.measure import pages
from vtprune.measure.bench import (
    Case,
    Row,
    Spread,
    allocated,
    build,
    cases_for,
    machine,
    measure,
    setting,
    timed,
)
from vtprune.measure.inputs import make_inputs
from vtprune.measure.limits import reasons, weight_bytes
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
    rows = measure(model, inputs, cases, repeats=2, warmup=1, decode_steps=2, tick=ticks.append, bounds=True, memory=True)
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
            assert 0 < row.projector.median < row.prefill.median
            assert row.decode.median > 0
            assert row.prefill.median <= row.ttft.median < row.total.median
            assert row.flops_share == row.speedup / row.flops_bound
            assert row.peak_bytes > row.kv_bytes
    # the bound is that of a decoder fed 8 visual tokens (36 of them where everything stays), in the same rounds
    assert pruned.bound_share == pruned.bound.median / pruned.prefill.median
    assert pruned.measured_bound == bare.prefill.median / pruned.bound.median
    assert bare.bound is None
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


def test_what_cannot_run_leaves_a_reason_and_the_others_go_on(model):
    @dataclasses.dataclass
    class Hungry(vtprune.Random):
        kind: str = "device"

        def select(self, view):
            if self.kind == "device":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            torch.empty(2**55)

    inputs = make_inputs(model, 1, 10)
    cases = [Case(kind, Hungry(keep=8, kind=kind)) for kind in ("device", "host")]
    rows = measure(model, inputs, [*cases, *cases_for(["random"], [8], vtprune.create, False)], 1, 0, bounds=True, memory=True)
    assert [row.error is None for row in rows] == [True, False, False, True]
    assert rows[1].error == "out of memory: CUDA out of memory. Tried to allocate 1.00 GiB."
    assert rows[2].error.startswith("out of memory: ")
    assert rows[3].bound is not None

    @dataclasses.dataclass
    class Broken(vtprune.Random):
        def select(self, view):
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        measure(model, inputs, [Case("x", Broken(keep=8))], 1, 0)


def test_allocations_are_counted():
    def run():
        x = torch.ones(1000, 1000)
        y = x + 1
        del x
        return y * 2  # two of 4 MB at a time

    assert 8_000_000 <= allocated(run) < 8_100_000


SHRUNK = {
    "llava-1.5-7b": 576,
    "llava-next-7b": 2880,
    "llava-onevision-0.5b": 8 * 196,
    "llava-onevision-7b": 8 * 196,
    "qwen2.5-vl-7b": 1296,
    "internvl3-8b": 13 * 256,
}


@pytest.mark.parametrize("name", SHRUNK)
def test_every_configuration_runs(tmp_path, name):
    """With its own tokens, tiles, grids and frames; only its widths and depths are made small."""
    values = json.loads(embedded.config(name).read_text())
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    values["text_config"].update(small, num_hidden_layers=2, num_key_value_heads=2, vocab_size=152064)
    if "mrope_section" in values["text_config"]["rope_parameters"]:
        values["text_config"]["rope_parameters"]["mrope_section"] = [2, 1, 1]
    if "depth" in values["vision_config"]:
        values["vision_config"].update(small, depth=1, num_heads=4, out_hidden_size=32, fullatt_block_indexes=[0])
    else:
        values["vision_config"].update(small, num_hidden_layers=2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    made = build(path, None, torch.float32, "cpu", "sdpa")
    frames = 8 if "onevision" in name else None
    inputs = make_inputs(made, 1, 10, frames=frames)
    rows = measure(made, inputs, cases_for(["random"], [64], vtprune.create, False), 1, 0, decode_steps=1, bounds=True)
    assert [row.error for row in rows] == [None, None]
    assert rows[0].visual_tokens == SHRUNK[name]
    assert rows[1].entered == 64
    assert rows[1].bound is not None
    with pytest.raises(UnsupportedError):
        make_inputs(made, 1, 10, frames=0)


def test_pictures_of_tiles_are_told_apart(model):
    assert make_inputs(model, 2, 10, images=3)["pixel_values"].shape[0] == 6
    with pytest.raises(UnsupportedError, match="takes no videos"):
        make_inputs(model, 1, 10, frames=4)


def row(label: str, milliseconds: float, **more):
    spread = Spread(milliseconds, milliseconds, milliseconds)
    return Row(label, label, prefill=spread, encoder=Spread(40.0, 0, 0), projector=Spread(0.0, 0, 0), decoder=spread, **more)


def test_the_reasons_are_in_the_numbers():
    bare = row("unpruned", 100.0, equivalent_tokens=576, kv_bytes=400, ttft=Spread(100.0, 0, 0), decode=Spread(10.0, 0, 0))
    pruned = row("x keep=64", 60.0, equivalent_tokens=64, kv_bytes=100, decode=Spread(9.9, 0, 0))
    said = reasons([bare, pruned], 9600, Spread(30.0, 30.0, 30.0))
    assert len(said) == 4
    assert "40.0 of 100.0 ms" in said[0] and "2.50x" in said[0]
    assert "at most 1.03x" in said[1] and "bound by the weights" in said[1] and "10.0 and 9.9 ms" in said[1]
    assert "is 9%" in said[2] and "1.10x" in said[2]
    assert "50% of that" in said[3]
    assert reasons([bare], 9600) == []
    assert reasons([Row("unpruned", "unpruned", error="out of memory"), pruned], 9600) == []


def test_weights_of_a_step(model):
    layers = sum(p.numel() for p in locate(model).decoder.layers.parameters()) + model.config.text_config.hidden_size
    assert weight_bytes(model) == 4 * (layers + model.lm_head.weight.numel())


def test_pages(model, tmp_path):
    inputs = make_inputs(model, 1, 10)
    rows = measure(model, inputs, cases_for(["random", "fastv"], [8, 16], vtprune.create, False), 1, 0, bounds=True)
    data = {
        "setting": setting("tiny-random", model, [1], 10, 1, 0, 0),
        "reasons": ["a reason"],
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    text = pages.table(json.loads(json.dumps(data)), "b.json")
    lines = text.splitlines()
    assert lines[0].startswith("| case | in | equiv. |") and "measured bound" in lines[0] and "per token" not in lines[0]
    assert all(line.count("|") == lines[0].count("|") for line in lines[1:7])
    assert "([raw](b.json))" in text and "- a reason" in text and "fastv keep=8 did not run" in text
    for name in ("b.png", "b.svg"):
        pages.draw(data, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match="no row"):
        pages.draw({**data, "rows": data["rows"][:1]}, tmp_path / "c.png")
