"""The commands: what they print, what they write, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vtprune import embedded
from vtprune.cli import app
from vtprune.cli import running as running_module

QUESTION = "What color is the cross?"
PICTURE = str(embedded.pictures()["scene-0"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def load_once():
    """The embedded model is read once for the file; every other model is loaded anew."""
    real, kept = running_module.load, {}

    def load(*args):
        if args[0] is not None:
            return real(*args)
        if args not in kept:
            kept[args] = real(*args)
        return kept[args]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_module, "load", load)
        yield


def run(*args: str):
    return CliRunner().invoke(app, list(args), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


def refused(*args: str) -> str:
    """Run a command that must fail; its one line."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


# ---------------------------------------------------------------- ask


def test_ask_prints_the_answer_and_the_report():
    result = run("ask", PICTURE, QUESTION, "--pruner", "flowcut", "--keep", "64")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "visual tokens 576" in text
    assert "entering the decoder 64" in text
    assert "flowcut(keep=64" in text
    assert "KV cache" in text


def test_ask_json_is_all_there_is_on_stdout(tmp_path):
    shown = tmp_path / "kept.png"
    result = run("ask", PICTURE, QUESTION, "--pruner", "uniform", "--keep", "0.25", "--json", "--overlay", str(shown))
    data = json.loads(result.stdout)
    assert data["settings"] == {"name": "uniform", "keep": 0.25}
    assert len(data["report"]["samples"][0]["kept"]) == 144
    assert isinstance(data["answer"], str)
    with Image.open(shown) as picture:
        assert picture.width > 300
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]


def test_ask_is_what_the_library_says():
    """Same tokens as a few lines of ordinary transformers code around `vtprune.pruning`."""
    import vtprune
    from vtprune.images import open_image

    loaded = running_module.load(None, "auto", "auto", "sdpa", False)
    text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = loaded.processor(images=open_image(PICTURE), text=text, return_tensors="pt")
    with vtprune.pruning(loaded.model, "flowcut", keep=64) as session:
        out = loaded.model.generate(**inputs.to(loaded.model.device), max_new_tokens=64, do_sample=False)
    answer = loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    data = json.loads(run("ask", PICTURE, QUESTION, "--json").stdout)
    assert data["answer"] == answer
    assert data["report"]["samples"][0]["kept"] == session.report.samples[0].kept.tolist()


def test_unpruned_is_counted_in_full():
    data = json.loads(run("ask", "scene-0", QUESTION, "--pruner", "none", "--json").stdout)
    report = data["report"]
    assert report["kv_bytes"] == report["kv_bytes_full"]
    assert report["flops"] == report["flops_full"]
    assert len(report["samples"][0]["kept"]) == 576


def test_composition_with_an_addressed_field_and_two_pictures():
    args = (
        "--pruner",
        "flowcut+evict",
        "--keep",
        "64",
        "--set",
        "evict.keep=16",
        "--image",
        "scene-1",
        "--positions",
        "original",
    )
    data = json.loads(run("ask", "scene-0", QUESTION, *args, "--json").stdout)
    sample = data["report"]["samples"][0]
    assert sample["images"] == [576, 576]
    assert len(sample["kept"]) == 128
    assert {len(layer) for layer in sample["cached"]} == {32}
    assert data["report"]["positions"] == "original"


def test_more_tokens_than_there_are_is_a_note():
    result = run("ask", "scene-0", QUESTION, "--pruner", "uniform", "--keep", "9999")
    assert result.exit_code == 0
    assert result.stderr.count("note:") == 1


def test_a_written_file_is_whole_or_absent(tmp_path):
    line = refused("ask", "scene-0", QUESTION, "--overlay", str(tmp_path / "no" / "kept.png"))
    assert "cannot write" in line
    assert "end the picture's name" in refused("ask", "scene-0", QUESTION, "--overlay", str(tmp_path / "kept.txt"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--pruner", "flowcat"], "Did you mean 'flowcut'"),
        (["--pruner", "flowcut+uniform", "--set", "uniform.sneed=1"], "no field"),
        (["--pruner", "uniform+random"], "claim the 'select' stage"),
        (["--keep", "many"], "is no number"),
        (["--keep", "0"], "at least 1"),
        (["--keep", "1.5"], "share"),
        (["--keep", "nan"], "share"),
        (["--keep", "-3"], "at least 1"),
        (["--set", "momentum"], "field=value"),
        (["--set", "mumentum=0.5"], "momentum"),
        (["--set", "momentum=0.5", "--set", "momentum=0.6"], "twice"),
        (["--set", "momentum=high"], "flowcut"),
        (["--pruner", "none", "--set", "keep=3"], "no fields"),
        (["--positions", "random"], "'original' or 'compact'"),
        (["--pruner", "fastv", "--keep", "1"], "cannot be reached"),
        (["--pruner", "fastv", "--set", "layer=99"], "layer"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--dtype", "int3"], "float32"),
        (["--attn", "magic"], "magic"),
        (["--image", "nowhere.png"], "no file 'nowhere.png'"),
    ],
)
def test_mistakes_in_options(args, said):
    assert said in refused("ask", "scene-0", QUESTION, *args)


def test_mistakes_in_arguments(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    assert "not a picture" in refused("ask", str(tmp_path / "a.png"), QUESTION)
    assert "folder" in refused("ask", str(tmp_path), QUESTION)
    assert "empty" in refused("ask", "scene-0", "  ")
    assert "<image>" in refused("ask", "scene-0", "what is <image>?")
    assert "config.json" in refused("ask", "scene-0", QUESTION, "--model", str(tmp_path))


def test_a_model_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "cannot load" in refused("ask", "scene-0", QUESTION, "--model", str(tmp_path))


# ---------------------------------------------------------------- compare, list, bench


def test_compare_goes_on_without_those_that_cannot(tmp_path):
    sheet = tmp_path / "sheet.png"
    args = ("--pruner", "uniform", "--pruner", "fastv", "--keep", "64", "--repeats", "1", "--max-new-tokens", "4")
    result = run("compare", "scene-0", QUESTION, *args, "--out", str(sheet), "--json")
    assert result.exit_code == 0, result.stderr
    unpruned, uniform, fastv = json.loads(result.stdout)["rows"]
    assert (unpruned["name"], unpruned["entered"]) == ("unpruned", 576)
    assert uniform["entered"] == 64
    assert uniform["flops"] < uniform["flops_full"] == unpruned["flops"]
    assert uniform["prefill_ms"] > 0
    assert "cannot be reached" in fastv["error"]
    with Image.open(sheet) as picture:
        assert picture.width > 1000


def test_compare_fails_if_none_runs():
    args = ("--pruner", "fastv", "--keep", "2", "--repeats", "1", "--max-new-tokens", "1")
    result = run("compare", "scene-0", QUESTION, *args)
    assert result.exit_code == 2
    assert "no strategy could run" in result.stderr
    assert "did not run" in result.stdout


def test_list():
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert rows["flowcut"]["stages"] == ["encode", "prefill"]
    assert "CLS token" in rows["mustdrop"]["needs"] and rows["flowcut"]["needs"] == ["CLS attention"]
    assert rows["uniform"]["needs"] == []
    assert all(row["package"] is None for row in rows.values() if row["name"] in ("flowcut", "random"))
    table = run("list").stdout
    assert all(name in table for name in rows)


def test_list_marks_third_parties(monkeypatch):
    from dataclasses import dataclass

    from vtprune import registry
    from vtprune.strategies.uniform import Uniform

    @dataclass
    class Mine(Uniform):
        name = "mine"

    class Entry:
        name, value = "mine", "mypackage:Mine"

        def load(self):
            return Mine

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert rows["mine"]["package"] == __name__.partition(".")[0]


def test_the_example_of_contributing_works(tmp_path, monkeypatch):
    """The package in CONTRIBUTING.md, laid out as an installer does it, is found, listed and asked."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    project = tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])["project"]
    (tmp_path / "vtprune_norm.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    info = tmp_path / f"vtprune_norm-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, entries),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    monkeypatch.syspath_prepend(tmp_path)
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert rows["norm"]["package"] == "vtprune_norm"
    result = run("ask", "scene-0", QUESTION, "--pruner", "norm", "--keep", "64", "--max-new-tokens", "2", "--json")
    assert len(json.loads(result.stdout)["report"]["samples"][0]["kept"]) == 64


def test_the_readme_begins_with_two_command_lines():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    first, second = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].strip().splitlines()
    assert "vtprune ask assets/pictures/" in first
    assert "pytest" in second


def test_bench_writes_its_figures_whole(tmp_path):
    path = tmp_path / "b.json"
    args = ("--config", "tiny-random", "--keep", "8", "--repeats", "1", "--decode-steps", "1", "--dtype", "float32")
    result = run("bench", *args, "--layers", "3", "--pruner", "flowcut", "--pruner", "uniform", "--json", str(path))
    assert result.exit_code == 0, result.stderr
    data = json.loads(path.read_text())
    assert [row["label"] for row in data["rows"]] == [
        "unpruned",
        "flowcut keep=all",
        "flowcut keep=8",
        "uniform keep=all",
        "uniform keep=8",
    ]
    assert data["setting"]["decoder_layers"] == 3
    assert torch.__version__ in " ".join(result.stdout.split())
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    data = json.loads(run("bench", *args, "--layers", "2", "--json", "-").stdout)
    assert data["rows"][0]["speedup"] == 1.0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--config", "nothing"], "no configuration 'nothing'"),
        (["--config", "tiny-random", "--layers", "40"], "1 .. 6"),
        (["--config", "tiny-random", "--keep", "x"], "no number"),
        (["--config", "tiny-random", "--pruner", "x"], "unknown strategy"),
        (["--config", "tiny-random", "--text-tokens", "4000"], "positions"),
    ],
)
def test_mistakes_in_bench(args, said):
    assert said in refused("bench", *args)


# ---------------------------------------------------------------- the process


def test_help_needs_no_torch():
    code = "import sys; from vtprune.cli import app; assert 'torch' not in sys.modules, 'torch'; print('light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "light\n"
    for command in ([], ["ask"], ["compare"], ["list"], ["bench"]):
        assert run(*command, "--help").exit_code == 0


def test_version():
    import vtprune

    assert run("--version").stdout.strip() == vtprune.__version__
