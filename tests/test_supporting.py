"""What is said to work on a model works, and what is refused is refused with that reason."""

from __future__ import annotations

import json

import pytest
import torch
from harness import ask, run
from typer.testing import CliRunner
from zoo import every, model_of

import vtprune
from vtprune.cli import app, running
from vtprune.cli.listing import for_families, for_model, table_of_families, verdict
from vtprune.embedded import tiny_model, tiny_video
from vtprune.registry import strategy_class
from vtprune.supporting import of_class, supports

KINDS = every()
FRAMES = {"framedrop", "evs", "dycoke", "quota"}  # want several pictures of one size, or a video


def cli(*args: str):
    return CliRunner().invoke(app, list(args), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_said_to_work_works(kind):
    model = model_of(kind)
    said = supports(model)
    assert {name for name, one in said.items() if one.works} >= {"random", "uniform", "divprune"}
    ran = 0
    pictures = ask(kind, [[2, "A", "A", 5] if kind.name == "internvl" else [2, "A", 1, "A", 5]])
    video = None if kind.video is None else ask(kind, [[2, "V", 5]])
    depth = model.config.get_text_config().num_hidden_layers
    for name, one in said.items():
        if not one.works:
            with pytest.raises(vtprune.VtpruneError) as error:
                vtprune.wrap(model, name)
            assert str(error.value) == one.reason
            continue
        assert verdict(one).startswith("yes")
        pruner = strategy_class(name).trial(depth)
        seen = ([pictures] if one.pictures and name not in FRAMES else []) + ([video] if one.videos and video else [])
        for asked in seen:
            try:
                assert run(asked, pruner=pruner, steps=1).report.samples[0].visual_tokens > 0
                ran += 1
            except vtprune.BudgetError as error:
                assert "keep" in str(error)  # its default is too little for so few tokens or layers
    assert ran >= 6


def test_a_model_without_weights_says_the_same():
    model = running.load(None, "cpu", "float32", "sdpa", False).model
    assert supports(model) == for_model(str(tiny_model()), False)


def test_some_strategies_only():
    model = of_class("LlavaModel")
    assert next(model.parameters()).is_meta
    assert list(supports(model, ["fastv", "flowcut"])) == ["fastv", "flowcut"]
    with pytest.raises(vtprune.UnknownStrategyError):
        supports(model, ["fastw"])
    with pytest.raises(vtprune.UnsupportedError, match="holds no model"):
        supports(torch.nn.Linear(1, 1))


def test_stages_by_themselves():
    found = supports(of_class("VipLlavaModel"))["mustdrop"]
    assert not found.works and found.stages["encode"] and not found.stages["prefill"] and not found.stages["decode"]
    assert verdict(found) == "prefill, decode alone" and not found.pictures


def test_list_of_a_model():
    rows = json.loads(cli("list", "--model", str(tiny_video()), "--json").stdout)
    assert rows["quota"]["works"] and rows["quota"]["videos"] and "tiles" in rows["resolution"]["reason"]
    assert "once fitted" in cli("list", "--model", str(tiny_model())).stdout


def test_the_table_of_families(tmp_path):
    found = for_families()
    table = table_of_families(found)
    assert all(title in table for title in found)
    page = tmp_path / "page.md"
    page.write_text("# Before\n\n<!-- families:begin (made) -->\nOUTDATED\n<!-- families:end -->\n\nafter\n", encoding="utf-8")
    assert cli("list", "--markdown", str(page)).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert table in text and "OUTDATED" not in text and text.startswith("# Before") and text.endswith("after\n")


def test_pages_and_options_that_do_not_fit(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here", encoding="utf-8")
    for args, said in (
        (("--markdown", str(page)), "families:begin"),
        (("--markdown", str(tmp_path / "none.md")), "cannot read"),
        (("--families", "--model", "x"), "give one of them"),
        (("--model", str(tmp_path)), "cannot load the configuration"),
    ):
        made = cli("list", *args)
        assert made.exit_code == 2 and said in made.output
    assert page.read_text(encoding="utf-8") == "nothing here"


def test_the_committed_table_is_the_command_s():
    """docs/families.md is written by `vtprune list --families --markdown docs/families.md`."""
    from pathlib import Path

    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("the page is made with the newest transformers")
    page = Path(__file__).parent.parent / "docs" / "families.md"
    assert table_of_families(for_families()) in page.read_text(encoding="utf-8")
