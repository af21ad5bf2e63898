"""Sweeps: mistakes in the yaml by name, digests, resuming, crashes, the results folder, and the report's numbers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("pydantic")

from vtprune.cli import app
from vtprune.sweep import config, store, trial
from vtprune.sweep.config import SweepError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "evaluations" / "recipes").glob("*.yaml"))

# lmms-eval as far as a sweep sees it: arguments in, files out; VTPRUNE_FAKE says how to go wrong
FAKE = """
import argparse, hashlib, json, os, random, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "seed", "limit", "include_path", "output_path"):
    parser.add_argument("--" + name)
parser.add_argument("--log_samples", action="store_true")
asked = parser.parse_args()
args = dict(pair.split("=", 1) for pair in asked.model_args.split(","))
how = json.loads(os.environ.get("VTPRUNE_FAKE", "{}"))


def log(what):
    if how.get("log"):
        with open(how["log"], "a") as file:
            file.write(json.dumps([what, asked.model_args, asked.tasks, time.time()]) + "\\n")


log("start")
time.sleep(how.get("sleep", 0))
mode = how.get("modes", {}).get(args.get("pruner", "none"))
if mode == "once" and not Path(how["mark"]).exists():
    Path(how["mark"]).touch()
    mode = "exit"
if mode == "exit":
    place = "Traceback (most recent call last):\\n  File \\"/home/someone/secret/model.py\\", line 3"
    print(place + "\\nValueError: no such layer", file=sys.stderr)
    sys.exit(1)
if mode == "refuse":
    print("error: a budget of 8 cannot be reached.", file=sys.stderr)
    sys.exit(2)
if mode == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "hang":
    time.sleep(600)
if mode == "quiet":
    print("ERROR - Error during evaluation: CUDA out of memory. Please set `--verbosity=DEBUG` to get more information.")
    sys.exit(0)
if mode == "worker" and not Path(how["mark"]).exists():
    Path(how["mark"]).touch()
    guard = os.getppid()
    worker = int(Path(f"/proc/{guard}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    time.sleep(600)
n = int(asked.limit or 20)
share = 1.0 if "keep" not in args else min(1.0, float(args["keep"]) / 576)
out = Path(asked.output_path) / "tiny"
out.mkdir(parents=True)
results = {"results": {}, "group_subtasks": {}, "higher_is_better": {}, "n-samples": {}}
costs = {}
for task in asked.tasks.split(","):
    draw = random.Random(asked.model_args + task)
    scores = [float(draw.random() < 0.5 + 0.4 * share) for _ in range(n)]
    mean = sum(scores) / n
    error = float("nan") if mode == "nan" else (mean * (1 - mean) / (n - 1)) ** 0.5
    found = {"alias": task, "samples": n, "exact_match,none": mean, "exact_match_stderr,none": error, "other,none": "N/A"}
    results["results"][task] = found
    with open(out / f"x_samples_{task}.jsonl", "w") as file:
        for doc, score in enumerate(scores):
            file.write(json.dumps({"doc_id": doc, "exact_match": score, "target": "a"}) + "\\n")
    cost = {"samples": n, "visual_tokens": 576, "entered": 576 * share, "equivalent_tokens": 576 * share, "ttft_ms": None}
    cost |= {"prefill_ms": 100 * share, "prefill_ms_median": 90 * share, "selection_ms": 0 if share == 1 else 2}
    cost |= {"kv_bytes": 2**20 * share, "kv_bytes_full": 2**20, "flops": 10 * share, "flops_full": 10, "peak_bytes": None}
    costs[task] = cost
(out / "x_results.json").write_text(json.dumps(results))
if mode != "unmeasured":
    content = {"schema": 2 if mode == "schema" else 1, "vtprune": "0", "model": "tiny", "pruner": args.get("pruner")}
    content |= {"settings": {}, "attn": args["attn"], "dtype": "float32", "device": "cpu", "per_sample": []}
    content |= {"batch_size": int(asked.batch_size), "tasks": costs}
    Path(os.environ["VTPRUNE_MEASURED"]).write_text(json.dumps(content))
log("end")
"""

SWEEP = {"models": ["tiny"], "strategies": ["none", "flowcut"], "budgets": [64], "tasks": ["shape"], "limit": 10}


def written(folder: Path, content, name: str = "sweep.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def made(folder: Path, **more) -> config.Sweep:
    return config.load(written(folder, {**SWEEP, **more}))


# --- the yaml ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stategies": ["none"]}, ("unknown key 'stategies'", "'strategies'")),
        ({"strategies": [{"pruner": "fastv", "field": {}}]}, ("unknown key 'strategies[0].field'", "'fields'")),
        ({"models": [{"pretraned": "x"}]}, ("models[0].pretraned", "'pretrained'")),
        ({"strategies": ["flowcot"]}, ("strategies[0]", "'flowcot'", "'flowcut'")),
        ({"strategies": [{"pruner": "fastv", "fields": {"layr": 2}}]}, ("strategies[0] (fastv)", "'layr'", "'layer'")),
        ({"strategies": [{"pruner": "fastv", "fields": {"layer": "a,b"}}]}, ("strategies[0] (fastv)", "'layer'")),
        ({"strategies": ["flowcut", "flowcut"]}, ("strategies", "'flowcut'", "twice")),
        ({"strategies": [{"pruner": "none", "fields": {"keep": 3}}]}, ("strategies[0] (none)", "unpruned")),
        ({"budgets": [0]}, ("budgets[0]", "at least 1")),
        ({"budgets": [1.5]}, ("budgets[0]", "(0, 1]")),
        ({"budgets": ["64"]}, ("budgets[0]", "'64'")),
        ({"budgets": [True]}, ("budgets[0]", "bool")),
        ({"budgets": []}, ("strategies[1] (flowcut)", "no budget")),
        ({"tasks": ["--tasks"]}, ("tasks[0]", "'--tasks'")),
        ({"tasks": ["a,b"]}, ("tasks[0]", "'a,b'")),
        ({"tasks": ["a", ["b", "a"]]}, ("tasks", "'a'", "twice")),
        ({"tasks": []}, ("tasks", "at least 1")),
        ({"limit": -1}, ("limit", "-1")),
        ({"batch_size": 0}, ("batch_size", "greater than or equal to 1")),
        ({"seeds": [0.5]}, ("seeds[0]", "integer")),
        ({"dtype": "float8"}, ("dtype", "float32")),
        ({"device": "cuda"}, ("gpus", "cuda")),
        ({"include_path": "nowhere"}, ("include_path", "nowhere")),
        ({"metrics": {"shap": "exact_match"}}, ("metrics", "'shap'", "'shape'")),
        (
            {"reference": [{"strategy": "flowcut", "task": "shape", "value": 1.0, "source": "x", "budget": 65}]},
            ("reference[0]", "65", "64"),
        ),
        ({"models": [{"name": "m", "pretrained": "x,y"}]}, ("models[0]", "'x,y'")),
        ({"models": [{"name": "m", "args": {"keep": 3}}]}, ("models[0]", "keep")),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    with pytest.raises(SweepError) as error:
        made(tmp_path, **change)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(tmp_path) not in str(error.value).replace(str(tmp_path / "nowhere"), "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [tiny\n", "no yaml"),
        ("models: [tiny]\nmodels: [tiny]\n", "'models' is given twice"),
        ("- 1\n", "holds no sweep"),
        ("models: !!python/object/apply:os.getcwd []\n", "no yaml"),
        ("tasks: [a]\nstrategies: [none]\n", "'models' is missing"),
    ],
)
def test_what_is_no_sweep(tmp_path, text, words):
    with pytest.raises(SweepError, match=re.escape(words)):
        config.load(written(tmp_path, text))
    with pytest.raises(SweepError, match="cannot be read"):
        config.load(tmp_path / "absent.yaml")


def test_plan_is_the_product_and_seeds_are_for_those_that_draw(tmp_path):
    sweep = made(
        tmp_path,
        models=["tiny", {"name": "other", "pretrained": "org/other", "attn": "eager", "args": {"max_frames": 8}}],
        strategies=["none", "flowcut", "random", {"pruner": "fastv", "fields": {"layer": 1}, "budgets": [0.5]}],
        budgets=[64, 0.25],
        tasks=["a", ["b", "c"]],
        seeds=[0, 1, 2],
    )
    trials = config.plan(sweep)
    # per model and task group: unpruned, 2 budgets, 2 budgets of 3 seeds, 1 budget
    assert len(trials) == 2 * 2 * (1 + 2 + 6 + 1)
    assert len({t.digest for t in trials}) == len(trials)
    assert [t.settings["fields"] for t in trials if t.labels["strategy"] == "random"][:3:2] == [{"seed": 0}, {"seed": 1}]
    last = trials[-1]
    assert last.settings["tasks"] == ["b", "c"]
    assert last.labels == {"model": "other", "strategy": "fastv, layer=1", "budget": 0.5}
    words = trial.arguments(last.settings, "tasks")
    assert words[words.index("--model_args") + 1] == (
        "pretrained=org/other,pruner=fastv,keep=0.5,max_frames=8,layer=1,attn=eager,dtype=auto,device=auto"
    )
    assert words[words.index("--tasks") + 1] == "b,c"


def test_model_args_come_back_as_lmms_eval_reads_them():
    utils = pytest.importorskip("lmms_eval.utils")
    settings = {"pretrained": None, "args": {"max_frames": 8}, "pruner": "pyramiddrop", "keep": 0.25, "positions": None}
    settings |= {"fields": {"layers": [8, 16], "tau": None, "seed": 3}, "attn": "sdpa", "dtype": "auto", "device": "auto"}
    found = utils.simple_parse_args_string(trial.model_args(settings))
    assert found["keep"] == 0.25 and found["seed"] == 3 and found["layers"] == "[8, 16]" and found["tau"] == "null"


def test_digest_is_of_what_the_result_depends_on(tmp_path, monkeypatch):
    def digests(**more):
        return [t.digest for t in config.plan(made(tmp_path, **more))]

    before = digests()
    assert before == digests()
    # another name, time-out or number at once is the same trial
    assert before == digests(name="x", timeout=5, concurrency=3, models=[{"name": "renamed"}], metrics={"shape": "exact_match"})
    for change in ({"limit": 11}, {"attn": "eager"}, {"batch_size": 2}, {"cpus": 2}, {"dtype": "bfloat16"}, {"seeds": [1]}):
        assert not set(before) & set(digests(**change)), change
    assert digests(budgets=[65])[0] == before[0] and digests(budgets=[65])[1] != before[1]
    monkeypatch.setattr("vtprune.__version__", "99")
    assert not set(before) & set(digests())


def test_digest_follows_the_task_files_and_not_their_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shape.yaml").write_text("task: shape")

    def first(name):
        return config.plan(made(tmp_path, include_path=name))[0].digest

    assert first("one") == first("two")
    (tmp_path / "two" / "shape.yaml").write_text("task: shape\ndescription: other")
    assert first("one") != first("two")


def test_overrides_take_the_place_of_keys_and_drop_what_no_longer_holds(tmp_path):
    reference = [{"strategy": "flowcut", "budget": 64, "task": "shape", "value": 59.5, "source": "a paper"}]
    path = written(tmp_path, {**SWEEP, "reference": reference, "metrics": {"shape": "exact_match"}})
    assert len(config.load(path).reference) == 1
    swapped = config.load(path, {"models": ["tiny"], "tasks": [["colour"]], "limit": 2, "attn": None})
    assert swapped.reference == [] and swapped.metrics == {} and swapped.limit == 2 and swapped.attn == "sdpa"


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "tiny"], ids=lambda p: p.stem)
def test_recipes_hold(path):
    sweep = config.load(path)
    assert "To be run on a GPU with the checkpoints" in sweep.note and sweep.gpus == 1
    assert sweep.reference and all(r.source for r in sweep.reference)
    assert any(s.pruner == config.UNPRUNED for s in sweep.strategies)
    # every published row has the unpruned one or another source's beside it, and runs
    planned = {(t.labels["strategy"], t.labels["budget"]) for t in config.plan(sweep)}
    assert {(r.strategy, r.budget) for r in sweep.reference} <= planned


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_with_the_tiny_model(path):
    words = ["sweep", str(path), "--dry-run", "--model", "tiny", "--tasks", "shapes_a,shapes_b", "--limit", "4", "--gpus", "0"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "tiny, none, shapes_a shapes_b" in found.output


# --- one trial ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """(command, how): a stand-in for lmms-eval, and a function that tells it what to do."""
    script = tmp_path / "fake_lmms_eval.py"
    script.write_text(FAKE)

    def how(**more):
        monkeypatch.setenv("VTPRUNE_FAKE", json.dumps(more))

    return [sys.executable, str(script)], how


def job(tmp_path, command, timeout=60, **more):
    one = config.plan(made(tmp_path, **more))[-1]
    return {
        "settings": one.settings,
        "include_path": None,
        "command": command,
        "timeout": timeout,
        "environment": trial.passed_on(),
        "folder": str(tmp_path),
    }


def test_an_attempt_brings_back_everything(tmp_path, fake):
    command, how = fake
    how(modes={})
    found = trial.attempt(job(tmp_path, command))
    assert found["error"] is None
    metric = found["tasks"]["shape"]["metrics"]["exact_match"]
    scores = found["tasks"]["shape"]["samples"]["exact_match"]
    assert found["tasks"]["shape"]["n"] == len(scores) == 10
    assert set(found["tasks"]["shape"]["metrics"]) == {"exact_match"}
    assert metric["value"] == pytest.approx(sum(scores.values()) / 10) and metric["stderr"] > 0
    assert found["measured"]["tasks"]["shape"]["equivalent_tokens"] == 64 and found["measured"]["dtype"] == "float32"
    assert found["hardware"]["threads"] == 1 and found["versions"]["torch"] and found["wall_s"] > 0


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit", "exit code 1"),
        ("refuse", "exit code 2: a budget of 8 cannot be reached."),
        ("kill", "killed by SIGKILL"),
        ("hang", "timed out after 2 s"),
        ("quiet", "without results: CUDA out of memory"),
        ("unmeasured", "no measurements"),
        ("schema", "schema 2"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path, fake, mode, words):
    command, how = fake
    how(modes={"flowcut": mode})
    found = trial.attempt(job(tmp_path, command, timeout=2 if mode == "hang" else 60))
    assert words in found["error"]
    assert found["final"] == (mode == "refuse")
    assert "/home" not in json.dumps(found) and "secret" not in json.dumps(found)
    if mode == "exit":
        assert found["lines"][-1] == "ValueError: no such layer" and "…/model.py" in found["lines"][1]


def test_a_figure_that_is_no_number_is_left_out(tmp_path, fake):
    command, how = fake
    how(modes={"flowcut": "nan"})
    found = trial.attempt(job(tmp_path, command))
    assert found["tasks"]["shape"]["metrics"]["exact_match"]["stderr"] is None
    json.dumps(found, allow_nan=False)


def test_a_command_that_is_not_there_and_a_full_disk_are_told(tmp_path, fake, monkeypatch):
    command, how = fake
    how(modes={})

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial.tempfile, "mkdtemp", full)
    assert trial.attempt(job(tmp_path, command))["error"] == "OSError: No space left on device"


def test_groups_without_figures_stand_by_their_parts():
    results = {
        "results": {"a": {"m,none": 0.5}, "b": {"m,strict": 0.25}, "g": {"alias": "g"}},
        "group_subtasks": {"g": ["a", "b"]},
    }
    assert trial._leaves(results, ["g"]) == ["a", "b"]
    assert trial._accuracy(results, "b")["metrics"] == {"m,strict": {"value": 0.25, "stderr": None, "higher_is_better": True}}
    with pytest.raises(trial.Failure, match="'c'"):
        trial._leaves(results, ["c"])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('File "/home/a/b.py", line 3', 'File "…/b.py", line 3'),
        (
            "see https://example.org/a/b and llava-hf/llava-1.5-7b-hf",
            "see https://example.org/a/b and llava-hf/llava-1.5-7b-hf",
        ),
        ("\x1b[31m~/x/y.txt\x1b[0m", "…/y.txt"),
    ],
)
def test_no_host_paths(text, left):
    assert trial.without_paths(text) == left


def alive(mark: str) -> list[str]:
    """Command lines of running processes that hold `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [line] if mark in line else []
    return found


def gone(mark: str, within: float = 10) -> bool:
    end = time.time() + within
    while alive(mark) and time.time() < end:
        time.sleep(0.1)
    return not alive(mark)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("children_too", [False, True])
def test_a_killed_worker_leaves_no_orphan(tmp_path, fake, children_too):
    """Ray may kill a lost worker's own children as well, and does not reach theirs."""
    command, how = fake
    how(modes={"flowcut": "hang"})
    code = "import json, sys; from vtprune.sweep import trial; trial.attempt(json.loads(sys.argv[1]))"
    worker = subprocess.Popen([sys.executable, "-c", code, json.dumps(job(tmp_path, command))])
    end = time.time() + 20
    while not any("--output_path" in line and "guard" not in line for line in alive(command[1])) and time.time() < end:
        time.sleep(0.05)
    assert len(alive(command[1])) >= 2
    if children_too:
        # in one go, or the worker would see its child's end and clean up
        worker.send_signal(signal.SIGSTOP)
        for process in Path("/proc").glob("[0-9]*"):
            if _is_guard(process, command[1]) and _parent(process) == worker.pid:
                os.kill(int(process.name), signal.SIGKILL)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert gone(command[1])


# --- the results folder ------------------------------------------------------------------------------------------------


def record(
    labels, tasks, n=40, attn="sdpa", device="a CPU", status="done", seed=0, cost=None, limit=None, stderr=True, samples=True
):
    """A trial as a sweep records it; `tasks` gives the right answers of each as a share or a list of scores."""
    settings = {
        "pretrained": None,
        "args": {},
        "pruner": None if labels[2] is None else labels[1],
        "keep": labels[2],
        "positions": None,
    }
    settings |= {
        "fields": {},
        "attn": attn,
        "dtype": "auto",
        "device": "auto",
        "batch_size": 1,
        "tasks": list(tasks),
        "limit": limit,
    }
    settings |= {"seed": seed, "include": None, "cpus": 1, "gpus": 0}
    found, costs = {}, {}
    for task, right in tasks.items():
        scores = right if isinstance(right, list) else [float(i < round(right * n)) for i in range(n)]
        mean = sum(scores) / len(scores)
        found[task] = {
            "n": len(scores),
            "metrics": {"exact_match": {"value": mean, "stderr": 0.01 if stderr else None, "higher_is_better": True}},
            "samples": {"exact_match": {str(i): s for i, s in enumerate(scores)}} if samples else {},
        }
        tokens = cost or 576
        costs[task] = {
            "equivalent_tokens": tokens,
            "prefill_ms": tokens / 4,
            "prefill_ms_median": tokens / 5,
            "selection_ms": 2.0,
        }
        costs[task] |= {"kv_bytes": tokens * 2**14, "flops": tokens, "flops_full": 576}
    measured = {
        "vtprune": "0",
        "model": "m",
        "attn": attn,
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 1,
        "tasks": costs,
    }
    done = status == "done"
    return store.Record.model_validate(
        {
            "digest": config.digest({**settings, "labels": labels, "machine": device}),
            "status": status,
            "labels": dict(zip(("model", "strategy", "budget"), labels, strict=True)),
            "settings": settings,
            "command": "lmms-eval",
            "attempts": 1 if done else 2,
            "errors": [] if done else [{"error": "out of <memory>"}],
            "started": "2026-01-02 03:04:05 UTC",
            "wall_s": 1.0,
            "tasks": found if done else {},
            "measured": measured if done else None,
            "versions": {"vtprune": "0.1", "torch": "2", "transformers": "5", "lmms_eval": "0.7", "python": "3.11"},
            "hardware": {"device": device, "gpus": 0, "cores": 2, "threads": 1},
        }
    )


def saved(folder: Path, *records: store.Record) -> Path:
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    for one in records:
        store.Results(folder).save(one)
    return folder


def test_a_record_comes_back_whole(tmp_path):
    one = record(("m", "flowcut", 64), {"a": 0.5})
    assert store.Results(saved(tmp_path, one)).record(one.digest) == one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {**c, "schema": 2}, "schema is 2, this one reads 1"),
        (lambda c: {**c, "format": "x"}, "no file of a vtprune sweep"),
        (lambda c: {**c, "status": "well"}, "status"),
        (lambda c: {**c, "attempts": "many"}, "attempts"),
        (lambda c: {**c, "more": 1}, "more"),
        (lambda c: [c], "no file of a vtprune sweep"),
        (lambda c: {**c, "digest": "0" * 16}, "renamed"),
    ],
)
def test_another_version_or_damage_is_refused_by_name(tmp_path, change, words):
    one = record(("m", "flowcut", 64), {"a": 0.5})
    path = saved(tmp_path, one) / "trials" / f"{one.digest}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(SweepError, match=re.escape(words)) as error:
        store.Results(tmp_path).records()
    assert one.digest in str(error.value)
    path.write_text("{")
    with pytest.raises(SweepError, match="is damaged"):
        store.Results(tmp_path).records()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    one = record(("m", "flowcut", 64), {"a": 0.5})
    path = saved(tmp_path, one) / "trials" / f"{one.digest}.json"
    before = path.read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(SweepError, match=r"cannot write .*No space left on device"):
        store.Results(tmp_path).save(one.model_copy(update={"attempts": 2}))
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_table_has_a_row_for_each_figure(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        record(("m", "none", None), {"a": 0.75, "b": 0.5}),
        record(("m", "fastv", 64), {"a": 0.1, "b": 0.1}, status="failed"),
    ]
    results = store.Results(saved(tmp_path, *records))
    results.write_table(records)
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(r["strategy"], r["task"], r["value"], r["status"]) for r in rows] == [
        ("none", "a", 0.75, "done"),
        ("none", "b", 0.5, "done"),
        ("fastv", "a", None, "failed"),
        ("fastv", "b", None, "failed"),
    ]
    assert rows[0]["equivalent_tokens"] == 576 and rows[0]["n"] == 40 and rows[2]["error"] == "out of <memory>"


# --- the report --------------------------------------------------------------------------------------------------------

reporting = pytest.importorskip("vtprune.sweep.report")


def test_the_reports_numbers(tmp_path):
    base = record(("m", "none", None), {"a": 0.9, "b": 0.8})
    pruned = record(("m", "flowcut", 64), {"a": 0.45, "b": 0.8}, cost=64)
    report = reporting.build([saved(tmp_path, base, pruned)])
    rows = {row.title: row for row in report.sections[0].rows}
    full, cut = rows["unpruned"], rows["flowcut @ 64"]
    assert full.unpruned and full.relative.value == 100 and full.accuracy.value == pytest.approx(85)
    assert cut.cells["a"].accuracy.value == pytest.approx(45) and cut.cells["a"].relative.value == pytest.approx(50)
    assert cut.accuracy.value == pytest.approx(62.5) and cut.relative.value == pytest.approx(75)
    assert cut.equivalent_tokens == 64 and cut.prefill_ms == pytest.approx(12.8) and cut.kv_bytes == 2**20
    assert cut.selection_share == pytest.approx(2 / 16) and cut.flops_share == pytest.approx(1 / 9)
    # on b both answer the same questions rightly: paired, their ratio has no spread, though each alone has
    same = cut.cells["b"]
    assert (same.relative.low, same.relative.high) == (100, 100) and same.accuracy.low < 80 < same.accuracy.high
    # a share of .45 of 40 questions: a binomial's interval, roughly 0.45 -+ 1.96 * 0.0787
    found = cut.cells["a"].accuracy
    assert found.low == pytest.approx(45 - 15.4, abs=3) and found.high == pytest.approx(45 + 15.4, abs=3)
    assert report.conditions["attention kernel"] == "sdpa" and report.conditions["machine"] == "a CPU, 1 of 2 cores"


def test_without_plain_scores_intervals_come_from_standard_errors(tmp_path):
    base = record(("m", "none", None), {"a": 0.8}, samples=False)
    pruned = record(("m", "flowcut", 64), {"a": 0.4}, samples=False)
    row = reporting.build([saved(tmp_path, base, pruned)]).sections[0].rows[1]
    assert row.cells["a"].accuracy.low == pytest.approx(40 - 1.96, abs=0.25)
    # relative error of a quotient: sqrt((.01/.4)^2 + (.01/.8)^2) of 50 %
    assert row.relative.high - row.relative.low == pytest.approx(2 * 1.96 * 50 * 0.02795, rel=0.1)
    bare = reporting.build([saved(tmp_path / "bare", record(("m", "none", None), {"a": 0.8}, samples=False, stderr=False))])
    assert bare.sections[0].rows[0].accuracy == reporting.Value(pytest.approx(80))
    assert bare.intervals["a"] == "none"


def test_scores_that_do_not_make_up_the_figure_are_not_resampled(tmp_path):
    one = record(("m", "none", None), {"a": 0.8})
    one.tasks["a"].metrics["exact_match"].value = 0.7  # an F1, say
    assert reporting.build([saved(tmp_path, one)]).intervals["a"].startswith("standard error")


def test_seeds_are_averaged_question_by_question(tmp_path):
    base = record(("m", "none", None), {"a": 1.0}, n=4)
    draws = [record(("m", "random", 8), {"a": [1.0, 0.0, 0.0, float(seed)]}, seed=seed) for seed in (0, 1)]
    report = reporting.build([saved(tmp_path, base, *draws)])
    row = next(r for r in report.sections[0].rows if not r.unpruned)
    assert row.seeds == 2 and row.cells["a"].accuracy.value == pytest.approx(100 * 1.5 / 4)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            record(("m", "fastv", 64), {"a": 0.5}, attn="eager"),
            ("attention kernel differs", "'sdpa'", "'eager'", "--only attn"),
        ),
        (record(("m", "fastv", 64), {"a": 0.5}, device="a GPU"), ("machine differs", "a CPU", "a GPU", "--only device")),
        (record(("m", "fastv", 64), {"b": 0.5}), ("task lists differ", "m, none has a", "m, fastv @ 64 has b")),
        (record(("m", "fastv", 64), {"a": 0.5}, limit=40), ("questions per task differs", "'all'", "'40'", "--only limit")),
        (record(("m", "fastv", 64), {"a": 0.5}, n=20), ("20", "40", "m, none", "m, fastv @ 64")),
    ],
)
def test_what_cannot_be_compared_is_refused_with_both_sides(tmp_path, other, words):
    folder = saved(tmp_path, record(("m", "none", None), {"a": 0.9}), other)
    with pytest.raises(SweepError) as error:
        reporting.build([folder])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_other_questions_are_refused(tmp_path):
    one, two = record(("m", "none", None), {"a": 0.9}), record(("m", "flowcut", 64), {"a": 0.9})
    two.tasks["a"].samples["exact_match"] = {
        str(i + 1): s for i, s in enumerate(two.tasks["a"].samples["exact_match"].values())
    }
    with pytest.raises(SweepError, match="different questions"):
        reporting.build([saved(tmp_path, one, two)])


def test_only_chooses_and_keeps_the_unpruned_row(tmp_path):
    folder = saved(
        tmp_path,
        record(("m", "none", None), {"a": 0.9}),
        record(("m", "fastv", 64), {"a": 0.5}),
        record(("m", "flowcut", 64), {"a": 0.5}),
        record(("m", "none", None), {"a": 0.9}, attn="eager"),
    )
    report = reporting.build([folder], {"attn": ["sdpa"], "strategy": ["fastv"]})
    assert sorted(row.title for row in report.sections[0].rows) == ["fastv @ 64", "unpruned"]
    for only, words in (({"atn": ["x"]}, "'attn'"), ({"strategy": ["fastw"]}, "no trial has it. Here: fastv, flowcut")):
        with pytest.raises(SweepError, match=re.escape(words)):
            reporting.build([folder], only)


def test_a_row_with_a_failed_task_stands_in_no_mean(tmp_path):
    folder = saved(
        tmp_path,
        record(("m", "none", None), {"a": 0.9}),
        record(("m", "none", None), {"b": 0.9}),
        record(("m", "fastv", 64), {"a": 0.5}),
        record(("m", "fastv", 64), {"b": 0.5}, status="failed"),
    )
    report = reporting.build([folder])
    row = next(r for r in report.sections[0].rows if not r.unpruned)
    assert row.missing == "failed: b" and row.accuracy is None and row.relative is None
    assert row.cells["a"].relative.value == pytest.approx(100 * 0.5 / 0.9)
    assert report.failures == [("m, fastv @ 64, b", "out of <memory>")]


def test_metrics_that_are_no_share_have_no_mean_accuracy(tmp_path):
    one, two = (
        record(("m", "none", None), {"a": 0.9, "mme": 0.9}, samples=False),
        record(("m", "flowcut", 8), {"a": 0.9, "mme": 0.5}),
    )
    for each, value in ((one, 1500.0), (two, 1200.0)):
        each.tasks["mme"].metrics["exact_match"].value = value
    rows = {r.title: r for r in reporting.build([saved(tmp_path, one, two)]).sections[0].rows}
    assert rows["flowcut @ 8"].accuracy is None and rows["flowcut @ 8"].cells["mme"].accuracy.value == 1200
    assert rows["flowcut @ 8"].relative.value == pytest.approx(90)


def test_published_figures_stand_beside_ours(tmp_path):
    sweep = made(
        tmp_path,
        reference=[
            {"strategy": "none", "task": "shape", "value": 62.0, "source": "A paper"},
            {"strategy": "flowcut", "budget": 64, "task": "shape", "value": 31.0, "source": "A paper"},
            {"strategy": "flowcut", "budget": 64, "task": "shape", "value": 1.0, "source": "Another"},
        ],
    )
    folder = tmp_path / "out"
    trials = config.plan(sweep)
    records = [record((t.labels["model"], t.labels["strategy"], t.labels["budget"]), {"shape": 0.5}) for t in trials]
    saved(folder, *(r.model_copy(update={"digest": t.digest}) for r, t in zip(records, trials, strict=True)))
    store.Results(folder).write_plan(sweep, trials)
    report = reporting.build([folder])
    paper = report.sections[0].rows[1].cells["shape"].paper
    assert (paper.value, paper.relative, report.sources[paper.source - 1]) == (31.0, 50.0, "A paper")
    # and what the plan has but nobody ran is told
    (folder / "trials" / f"{trials[1].digest}.json").unlink()
    report = reporting.build([folder])
    assert report.sections[0].rows[1].missing == "not run: shape" and any("1 of 2 trials" in note for note in report.notes)


def test_pareto():
    assert reporting.pareto([(3, 9), (1, 5), (2, 4), (2, 7), (4, 9), (1, 3)]) == [(1, 5), (2, 7), (3, 9)]


def test_pages_hold_what_they_should_and_escape_what_is_not_theirs(tmp_path):
    pytest.importorskip("matplotlib")
    from vtprune.sweep import pages

    evil = '<script>alert("x")</script>|$\\frac$'
    folder = saved(
        tmp_path,
        record(("m", "none", None), {"a": 0.9}),
        record(("m", evil, 64), {"a": 0.6}, cost=64),
        record(("m", "fastv", 8), {"a": 0.5}, status="failed"),
    )
    report = reporting.build([folder])
    written_files = {path.name for path in pages.write(report, tmp_path)}
    assert {"report.html", "report.md", "report-1-tokens.svg", "report-1-time.svg", "report-1-cache.svg"} == written_files
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "out of &lt;memory&gt;" in html
    assert "<script" not in markdown and "\\|$" in markdown
    # nothing from outside: no address but the names of XML's own spaces, no file, no code
    outside = {a for a in re.findall(r"https?://[^\s\"'<)]+", html) if not a.startswith("http://www.w3.org/")}
    assert not outside and not re.search(r"\s(src|href)=\"(?!#)", html)
    assert html.count("<svg") == 3 and 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    assert "66.7" in html and "Pareto front" not in re.sub(r"<[^>]*>", "", html)  # the plots' text is drawn as paths


def test_the_table_goes_between_its_marks(tmp_path):
    pytest.importorskip("matplotlib")
    from vtprune.sweep import pages

    folder = saved(tmp_path, record(("m", "none", None), {"a": 0.9}), record(("m", "flowcut", 64), {"a": 0.45}))
    readme = written(tmp_path, f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n", "README.md")
    found = CliRunner().invoke(app, ["report", str(folder), "--readme", str(readme)])
    assert found.exit_code == 0, found.output
    text = readme.read_text()
    assert (
        text.startswith(f"before\n{pages.BEGIN}\n| strategy |") and text.endswith(f"{pages.END}\nafter\n") and "old" not in text
    )
    assert re.search(r"\| flowcut \| 64 \| .*\| 50\.0 \[", text) and "a CPU" in text
    again = CliRunner().invoke(app, ["report", str(folder), "--readme", str(readme)])
    assert again.exit_code == 0 and readme.read_text() == text
    for wrong in ("nothing", f"{pages.END}\n{pages.BEGIN}", f"{pages.BEGIN}\n{pages.BEGIN}\n{pages.END}"):
        readme.write_text(wrong)
        refused = CliRunner().invoke(app, ["report", str(folder), "--readme", str(readme)])
        assert refused.exit_code == 2 and readme.read_text() == wrong


def test_no_results_is_one_line(tmp_path):
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2 and "no results of a sweep" in found.output and "Traceback" not in found.output


# --- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from vtprune.sweep.run import start_local

    start_local(2)
    yield
    ray.shutdown()


def starts(log: Path) -> list[list]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
def test_crashes_are_retried_once_and_cost_no_other_trial(tmp_path, fake, cluster):
    from vtprune.sweep.run import run

    command, how = fake
    log = tmp_path / "log"
    modes = {"flowcut": "once", "divprune": "exit", "random": "kill", "uniform": "worker"}
    how(modes=modes, mark=str(tmp_path / "mark"), log=str(log))
    sweep = made(tmp_path, strategies=["none", *modes, "visionzip"])
    # one mark for two modes: run them one after the other
    first = run(sweep, tmp_path / "out", command=command)
    by_name = {r.labels.strategy: r for r in first.ran}
    assert {name: (r.status, r.attempts) for name, r in by_name.items() if name != "uniform"} == {
        "none": ("done", 1),
        "visionzip": ("done", 1),
        "flowcut": ("done", 2),
        "divprune": ("failed", 2),
        "random": ("failed", 2),
    }
    assert "exit code 1" in by_name["divprune"].errors[1].error and "SIGKILL" in by_name["random"].errors[0].error
    assert by_name["flowcut"].errors[0].lines[-1] == "ValueError: no such layer"
    count = len(starts(log))
    second = run(sweep, tmp_path / "out", command=command)
    assert not second.ran and len(second.found) == 6 and len(second.failed) == 2 and len(starts(log)) == count
    how(modes={}, log=str(log))
    third = run(sweep, tmp_path / "out", command=command, retry_failed=True)
    assert len(third.ran) == 2 and not third.failed


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_a_killed_ray_worker_costs_one_attempt(tmp_path, fake, cluster):
    from vtprune.sweep.run import run

    command, how = fake
    how(modes={"flowcut": "worker"}, mark=str(tmp_path / "mark"))
    outcome = run(made(tmp_path), tmp_path / "out", command=command)
    found = next(r for r in outcome.ran if r.labels.strategy == "flowcut")
    assert found.status == "done" and found.attempts == 2 and "Ray worker was lost" in found.errors[0].error
    assert gone(command[1])


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_sweep_and_loses_nothing(tmp_path, fake, cluster, monkeypatch):
    from vtprune.sweep.run import run

    command, how = fake
    how(modes={})
    sweep = made(tmp_path, budgets=[8, 16, 32, 64], concurrency=1)
    save, left = store.Results.save, [2]

    def filling(self, one):
        left[0] -= 1
        if left[0] < 0:
            raise SweepError("cannot write 'x': No space left on device.")
        save(self, one)

    monkeypatch.setattr(store.Results, "save", filling)
    with pytest.raises(SweepError, match="No space left"):
        run(sweep, tmp_path / "out", command=command)
    assert len(store.Results(tmp_path / "out").records()) == 2
    monkeypatch.setattr(store.Results, "save", save)
    outcome = run(sweep, tmp_path / "out", command=command)
    assert len(outcome.ran) == 3 and len(outcome.found) == 2


@pytest.mark.slow
def test_what_no_machine_has_and_a_second_sweep_are_refused(tmp_path, fake, cluster):
    from vtprune.sweep.run import run

    command, how = fake
    how(modes={})
    with pytest.raises(SweepError, match="takes 4 GPUs and 1 CPUs"):
        run(made(tmp_path, gpus=4), tmp_path / "out", command=command)
    results = store.Results(tmp_path / "out")
    with results.writing(), pytest.raises(SweepError, match="another sweep is writing"):
        run(made(tmp_path), tmp_path / "out", command=command)


DRIVER = """
import json, sys
from vtprune.sweep import config
from vtprune.sweep.run import run

path, out, command = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
outcome = run(config.load(path), out, command=command)
print(json.dumps([len(outcome.ran), len(outcome.found), len(outcome.failed)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_a_sweep_killed_three_times_ends_as_if_it_had_not_been(tmp_path, fake, cluster):
    parquet = pytest.importorskip("pyarrow.parquet")
    from vtprune.sweep.run import run

    command, how = fake
    content = {**SWEEP, "strategies": ["none", "flowcut", "divprune", "random"], "budgets": [192, 128, 64], "concurrency": 2}
    content |= {"tasks": ["a", "b"], "seeds": [0, 1]}
    path = written(tmp_path, content)
    trials = config.plan(config.load(path))
    assert len(trials) >= 24
    how(modes={})
    run(config.load(path), tmp_path / "calm", command=command)

    log, out = tmp_path / "log", tmp_path / "killed"
    how(modes={}, log=str(log), sleep=0.4)
    draw = random.Random(7)
    driver = [sys.executable, "-c", DRIVER, str(path), str(out), json.dumps(command)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}

    def over() -> int:
        return len(list((out / "trials").glob("[0-9a-f]*.json")))

    for kill in range(3):
        enough = over() + draw.randint(2, 6)
        process = subprocess.Popen(driver, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        end = time.time() + 120
        while over() < enough and time.time() < end and process.poll() is None:
            time.sleep(0.02)
        if kill == 1:
            # a Ray worker first, which is lmms-eval's guard's parent; then the driver
            guards = [p for p in Path("/proc").glob("[0-9]*") if _is_guard(p, command[1])]
            if guards:
                # its watcher is a guard's child
                watched = {int(p.name) for p in guards}
                worker = next((found for p in guards if (found := _parent(p)) and found not in watched), None)
                if worker is not None:
                    os.kill(worker, signal.SIGKILL)
                time.sleep(draw.random())
        time.sleep(draw.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert gone(command[1]), alive(command[1])
        assert enough <= over() < len(trials)
        # whole, every one
        assert len(store.Results(out).records()) == over()
    last = subprocess.run(driver, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    ran, found, failed = json.loads(last.stdout.strip().splitlines()[-1])
    assert ran + found == len(trials) and failed == 0 and found > 0

    def table(folder: Path):
        rows = parquet.read_table(folder / "results.parquet").to_pylist()
        return [{k: v for k, v in row.items() if k not in ("wall_s", "attempts")} for row in rows]

    assert table(out) == table(tmp_path / "calm")
    # nothing was begun after it was over
    ended = {}
    for one in trials:
        key = (trial.model_args(one.settings), ",".join(one.settings["tasks"]))
        ended[key] = (out / "trials" / f"{one.digest}.json").stat().st_mtime
    events = starts(log)
    assert not [e for e in events if e[0] == "start" and e[3] > ended[e[1], e[2]]]
    again = subprocess.run(driver, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert json.loads(again.stdout.strip().splitlines()[-1]) == [0, len(trials), 0] and len(starts(log)) == len(events)


def _parent(process: Path) -> int:
    """A process's parent, 0 for one that is gone."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _is_guard(process: Path, mark: str) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return "guard.py" in words and mark in words


@pytest.mark.slow
def test_the_command_says_what_failed_and_that_nothing_is_left(tmp_path, fake):
    """The command itself, with a Ray of its own: `python -m lmms_eval` is the stand-in by a package of that name."""
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    command, how = fake
    package = tmp_path / "lmms_eval"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(command[1], package / "__main__.py")
    path = written(tmp_path, {**SWEEP, "strategies": ["none", "flowcut", "divprune"]})
    vtprune = [sys.executable, "-c", "from vtprune.cli import main; main()", "sweep", str(path), "--out", "out"]
    how(modes={"divprune": "exit"})
    found = subprocess.run(vtprune, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1, found.stderr
    said = found.stderr
    assert "1 trials failed" in said and "divprune" in said and "Traceback" not in said and "3 trials ran" in found.stdout
    how(modes={})
    again = subprocess.run([*vtprune, "--retry-failed"], check=False, cwd=tmp_path, timeout=300, capture_output=True)
    assert again.returncode == 0
    calm = subprocess.run(vtprune, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert calm.returncode == 0 and "nothing to do: all 3 trials" in calm.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "results.parquet",
        "sweep.json",
        "trials",
    ]
