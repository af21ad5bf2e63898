"""What a pruned prefill allocates, for every model class at the picture size that its processor makes."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from evaluations import memory
from vtprune.marks import between
from vtprune.measure.bench import allocated_around
from vtprune.supporting import config_of

TIMM = importlib.util.find_spec("timm") is not None
# few layers and narrow: there the encoder is the larger part of most families
NARROW, DEPTH = 4, 5


def test_every_class_has_a_shape():
    assert set(memory.classes()) <= set(memory.SHAPES)


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="the page is made with the newest transformers")
@pytest.mark.parametrize("name", memory.classes())
def test_a_pruned_prefill_allocates_less(name):
    if not TIMM and name in ("PerceptionLMModel", "FastVlmModel"):
        pytest.skip("needs timm")
    model = memory.build(name, NARROW, DEPTH)
    inputs = memory.inputs_of(name, model)
    bare, random, fastv = [memory.prefill(model, inputs, pruner) for pruner in (None, *memory.strategies(model))]
    for pruned in (random, fastv):
        assert pruned.kv == pruned.reported and bare.kv == pruned.reported_full
        assert pruned.decoder < bare.decoder
        # where the encoder sets it, it stays; but for notes of what the pictures are
        assert pruned.whole <= bare.whole + 2**16
        if bare.decoder > bare.encoder:
            assert pruned.whole < bare.whole
    assert random.entered == pytest.approx(memory.KEEP * random.tokens, abs=40)  # a share is rounded per picture
    assert random.kv < bare.kv and fastv.entered == fastv.tokens == random.tokens


@pytest.mark.parametrize("name", ["LlavaModel", "Qwen3VLModel"])
def test_what_is_not_computed_is_allocated_alike(name):
    model = memory.build(name, 8 if name == "LlavaModel" else NARROW, 3, computed=True)
    inputs = memory.inputs_of(name, model)
    for pruner in (None, *memory.strategies(model)):
        made, computed = (memory.prefill(model, inputs, pruner, flag) for flag in (False, True))
        assert made.kv == computed.kv
        assert made.encoder == pytest.approx(computed.encoder, rel=0.02)
        assert made.decoder == pytest.approx(computed.decoder, rel=0.02)


def test_phases_of_allocation():
    module, size = nn.Identity(), 1 << 20

    def run():
        first = torch.empty(3 * size, dtype=torch.uint8)
        del first
        module(torch.empty(2 * size, dtype=torch.uint8))

    assert allocated_around(run, module) == (3 * size, 2 * size)
    assert allocated_around(run, None) == (3 * size, 0)
    assert not module._forward_pre_hooks


def test_the_page(tmp_path, monkeypatch, capsys):
    page, data = tmp_path / "page.md", tmp_path / "data.json"
    page.write_text("a\n<!-- memory:begin (x) -->\nold\n<!-- memory:end -->\nb\n", encoding="utf-8")
    bare = memory.Peak("unpruned", 100, 400, 80)
    pruned = memory.Peak("random", 100, 200, 8, 8, 80, 10, 100)
    wrong = memory.Peak("random", 500, 200, 8, 9, 80, 10, 100)
    made = {"LlavaModel": [bare, pruned], "GlmOcrModel": [memory.Peak("unpruned", 500, 400, 80), wrong]}
    monkeypatch.setattr(memory, "measure", lambda name, *_: made[name])
    options = ["--json", str(data), "--markdown", str(page), "--only"]
    monkeypatch.setattr(sys, "argv", ["memory", *options, "LlavaModel"])
    memory.main()
    text = page.read_text(encoding="utf-8")
    assert "| Llava | LLaVA-1.5-7B | 100 |" in text and "| 50 % | 50 % |" in text and "| 10 % |" in text
    assert "to the byte" in text and "old" not in text and text.startswith("a\n") and text.endswith("b\n")
    # what the file has is not measured again
    made.pop("LlavaModel")
    monkeypatch.setattr(sys, "argv", ["memory", *options, "LlavaModel", "GlmOcrModel"])
    memory.main()
    text = page.read_text(encoding="utf-8")
    assert "| Llava |" in text and "| 100 % | 50 % |" in text and "Of GlmOcr the encoder" in text
    assert "not the report's: GlmOcr (random)" in text and len(json.loads(data.read_text())["rows"]) == 2
    monkeypatch.setattr(sys, "argv", ["memory", "--depth", "2", *options, "LlavaModel"])
    with pytest.raises(SystemExit):
        memory.main()
    capsys.readouterr()


def test_between():
    page = "a\n<!-- x:begin (by y) -->\nold\n<!-- x:end -->\nb\n"
    assert between(page, "<!-- x:begin -->", "<!-- x:end -->", "\nnew\n") == page.replace("old", "new")
    for broken in ("", page + page, "<!-- x:end -->\n<!-- x:begin -->", page.replace("x:begin", "xx:begin")):
        with pytest.raises(ValueError, match="goes between"):
            between(broken, "<!-- x:begin -->", "<!-- x:end -->", "new")


@pytest.mark.skipif(not TIMM, reason="needs timm")
def test_examples_are_copies():
    config_of("PerceptionLMModel").vision_config.model_args["depth"] = 1
    assert config_of("PerceptionLMModel").vision_config.model_args["depth"] == 23
