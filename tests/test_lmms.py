"""vtprune as a model of lmms-eval: arguments, answers, measurements, mistakes, and the offline tasks by its own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance, unwrap_generation_output

import vtprune
from evaluations.tasks import shapes
from evaluations.tiny.asking import CHECKPOINT, answers, batch, load, picture, pictures
from vtprune.cli.console import UserError
from vtprune.lmms import manifest, measuring, media
from vtprune.lmms.arguments import Arguments
from vtprune.lmms.model import Chat, Simple
from vtprune.pruner import BudgetError
from vtprune.registry import UnknownStrategyError

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "evaluations" / "tasks"
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white")


@lru_cache
def documents() -> list[dict]:
    """The questions about one picture of the world."""
    asked = picture(0)
    return [{"image": asked.image, "question": q.text, "answer": q.answer, "type": q.type} for q in asked.questions]


def model(cls=Simple, docs=None, **given):
    made = cls(**{"device": "cpu", **given})
    made.task_dict = {"shapes": {"test": documents() if docs is None else docs}}
    return made


def about(doc_id: int, padding: bool = False, task: str = "shapes") -> dict:
    return {"task": task, "doc_id": doc_id, "repeats": 1, **({"__padding_only__": True} if padding else {})}


def asks(lm, count: int, visual=shapes.doc_to_visual, options=None, padding: bool = False) -> list[Instance]:
    """generate_until requests in the form of the model's type."""
    options = {"max_new_tokens": 8} if options is None else options
    docs, made = lm.task_dict["shapes"]["test"], []
    for at in range(count):
        if lm.is_simple:
            arguments = (docs[at]["question"], options, visual, at, "shapes", "test")
        else:

            def messages(doc):
                content = [{"type": "image", "url": image} for image in visual(doc)]
                return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]

            arguments = ("", messages, options, at, "shapes", "test")
        made.append(Instance("generate_until", arguments, 0, about(at, padding)))
    return made


def choices(lm, at: int, among) -> list[Instance]:
    doc = lm.task_dict["shapes"]["test"][at]
    return [
        Instance(
            "loglikelihood", (doc["question"], f" {c}", shapes.doc_to_visual, at, "shapes", "test"), i, about(at)
        )
        for i, c in enumerate(among)
    ]  # fmt: skip


# ------------------------------------------------------------------ arguments


def test_announced_to_lmms_eval():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("vtprune") is Chat
    assert registry.get_model_class("vtprune", force_simple=True) is Simple


def test_arguments_are_read():
    given = {"pretrained": "tiny", "pruner": "flowcut+evict", "keep": 64, "evict.keep": 32, "momentum": 0.25, "num_frames": 8}
    made = Arguments.of({**given, "batch_size": "4", "decoder_keep": "none"})
    assert (made.pretrained, made.name, made.keep, made.batch_size, made.max_frames) == (None, "tiny", 64, 4, 8)
    flowcut, evict = made.strategy({}).parts
    assert (flowcut.keep, flowcut.momentum, flowcut.decoder_keep, evict.keep) == (64, 0.25, None, 32)
    assert Arguments.of({}).strategy({}) is None
    assert Arguments.of({"pruner": "none"}).strategy({}) is None


def test_schedules_of_the_tiny_model_are_taken():
    schedules = vtprune.embedded.schedules()
    made = Arguments.of({"pruner": "gsearch", "keep": 0.5}).strategy(schedules)
    assert str(made.schedule) == str(schedules["gsearch"])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"pruner": "flowcat"}, UnknownStrategyError, "Did you mean 'flowcut'"),
        ({"pruner": "flowcut", "momentun": 1}, UserError, "momentum.*Fields: .*semantic_weight"),
        ({"pruner": "flowcut", "keep": 0}, BudgetError, "at least 1"),
        ({"pruner": "flowcut", "keep": "lots"}, BudgetError, "lots"),
        ({"keep": 64}, UserError, "without a strategy"),
        ({"pretraned": "x"}, UserError, "Did you mean 'pretrained'"),
        ({"batch_size": "auto"}, UserError, "batch_size"),
        ({"max_frames": 0}, UserError, "max_frames"),
        ({"trust_remote_code": "yes"}, UserError, "true or false"),
        ({"max_frames": 4, "num_frames": 8}, UserError, "twice"),
        ({"pruner": "flowcut+visionzip", "keep": 64}, UserError, "claim"),
        ({"device": "warp"}, UserError, "warp"),
        ({"max_pixels": 1000}, UserError, "does not limit"),
        ({"attn": "magic"}, UserError, "magic"),
    ],
)
def test_wrong_arguments_are_named(given, error, said):
    with pytest.raises(error, match=said):
        Simple(**{"device": "cpu", **given})


def test_the_command_line_ends_with_one_line_and_a_code(capsys):
    with pytest.raises(SystemExit) as left:
        Chat.create_from_arg_string("pruner=flowcut,depth_powr=1", {"batch_size": "1", "device": None})
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "depth_power" in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        Chat.create_from_arg_string("pruner", {})


def test_no_field_of_a_strategy_has_the_name_of_an_argument():
    import dataclasses

    ours = {f.name for f in dataclasses.fields(Arguments)} - {"keep", "positions"}
    for name, cls in vtprune.available().items():
        assert not ours & {f.name for f in dataclasses.fields(cls)}, name


# ------------------------------------------------------------------ answers and what they cost


def test_each_answer_carries_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setenv(measuring.MEASURED, str(tmp_path / "measured.json"))
    lm = model(pruner="flowcut", keep=64, batch_size=3)
    lm.generate_until(asks(lm, 1, padding=True))
    results = lm.generate_until(asks(lm, 4))
    counts = [unwrap_generation_output(r)[1].to_dict() for r in results]
    assert all(c["visual_tokens"] == 576 and c["entered"] == c["equivalent_tokens"] == 64 for c in counts)
    assert [c["batch"] for c in counts] == [3, 3, 3, 1]
    for count in counts:
        assert 0 < count["selection_ms"] < count["prefill_ms"] <= count["ttft_ms"]
        assert 0 < count["kv_bytes"] < count["kv_bytes_full"] and 0 < count["flops"] < count["flops_full"]
        assert count["peak_bytes"] > 1e6 and 1 <= count["output_tokens"] <= 8 and count["input_tokens"] > 576
    lm.clean()
    content = json.loads((tmp_path / "measured.json").read_text())
    assert content["schema"] == 1 and content["pruner"].startswith("flowcut(keep=64") and content["batch_size"] == 3
    task = content["tasks"]["shapes"]
    assert task["samples"] == len(content["per_sample"]) == 4  # requests that only pad are left out
    for name in ("prefill_ms", "ttft_ms", "kv_bytes", "flops"):
        assert task[name] == pytest.approx(np.mean([c[name] for c in counts]))
    assert task["prefill_ms_median"] == pytest.approx(np.median([c["prefill_ms"] for c in counts]))


def test_unpruned_is_measured_by_the_same_engine():
    lm = model()
    (result,) = lm.generate_until(asks(lm, 1))
    found = result.token_counts.measured
    assert found.visual_tokens == found.entered == found.equivalent_tokens == 576
    assert found.kv_bytes == found.kv_bytes_full and found.flops == found.flops_full


@pytest.mark.parametrize("cls", [Simple, Chat])
def test_a_batch_answers_as_each_alone(cls):
    alone, together = model(cls, pruner="fastv", keep=0.5), model(cls, pruner="fastv", keep=0.5, batch_size=3)
    one, many = alone.generate_until(asks(alone, 5)), together.generate_until(asks(together, 5))
    assert [r.text for r in one] == [r.text for r in many]
    tokens = [[s.equivalent_tokens for s in lm.samples] for lm in (alone, together)]
    assert tokens[0] == tokens[1]


def test_answers_end_where_the_task_says():
    lm = model(docs=[doc for doc in documents() if doc["type"] == "colour"])
    (whole,) = lm.generate_until(asks(lm, 1))
    assert len(whole.text) > 2
    (cut,) = lm.generate_until(asks(lm, 1, options={"max_new_tokens": 8, "until": [whole.text[1]]}))
    assert cut.text == whole.text[0]


def test_requests_with_other_options_keep_their_order():
    lm = model(batch_size=4)
    plain = [r.text for r in lm.generate_until(asks(lm, 4))]
    mixed = asks(lm, 4)
    mixed[1::2] = asks(lm, 4, options={"max_new_tokens": 7})[1::2]
    assert [r.text for r in lm.generate_until(mixed)] == plain


def test_the_right_answer_is_the_likeliest():
    lm, together = model(pruner="flowcut", keep=128), model(pruner="flowcut", keep=128, batch_size=7)
    at = next(i for i, d in enumerate(documents()) if d["type"] == "colour")
    found = [unwrap_generation_output(r)[0] for r in lm.loglikelihood(choices(lm, at, COLOURS))]
    losses = [loss for loss, _ in found]
    right = COLOURS.index(documents()[at]["answer"])
    assert int(np.argmin(losses)) == right
    assert [greedy for _, greedy in found] == [c == COLOURS[right] for c in COLOURS]
    assert all(s.entered == 128 for s in lm.samples)
    both = [unwrap_generation_output(r)[0] for r in together.loglikelihood(choices(together, at, COLOURS))]
    assert [loss for loss, _ in both] == pytest.approx(losses, abs=1e-3)


def test_a_longer_continuation_is_scored_as_the_bare_model_does():
    import torch

    lm = model(batch_size=2)
    found = [unwrap_generation_output(r)[0] for r in lm.loglikelihood(choices(lm, 0, ("top left", "yes")))]
    bare, processor = load(CHECKPOINT)
    doc = documents()[0]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": doc["question"]}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True) + " top left"
    inputs = processor(images=[doc["image"]], text=text, return_tensors="pt")
    with torch.inference_mode():
        scores = bare(**inputs).logits.log_softmax(-1)[0, -3:-1]
    expected = -scores.gather(-1, inputs["input_ids"][0, -2:, None]).mean().item()
    assert found[0][0] == pytest.approx(expected, abs=1e-3)


def test_rounds_follow_each_other():
    lm = model()
    told = []

    def ask(doc, previous_output, round_idx, previous_round_info):
        told.append((list(previous_output), previous_round_info))
        return [doc["image"]], documents()[1]["question"], round_idx == 2, previous_output, round_idx

    first = documents()[0]
    arguments = (first["question"], {"max_new_tokens": 8}, shapes.doc_to_visual, ask, 0, "shapes", "test")
    (said,) = lm.generate_until_multi_round([Instance("generate_until_multi_round", arguments, 0, about(0))])
    plain = [r.text for r in lm.generate_until(asks(lm, 2))]
    assert said == plain
    assert told == [(said[:1], None), (said, 1)]


# ------------------------------------------------------------------ pictures and videos


def test_several_pictures_and_their_places():
    doc = {**documents()[0], "question": "<image>\nand <image> What color is the star?"}
    lm = model(docs=[doc], pruner="uniform", keep=10)
    lm.generate_until(asks(lm, 1, visual=lambda d: [d["image"], d["image"]]))
    assert (lm.samples[0].visual_tokens, lm.samples[0].entered) == (1152, 20)
    prompt = media.question("a <image> b", [doc["image"]], ("<image>",), 8)
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["text", "image", "text"]
    prompt = media.question("no <image> here", [], ("<image>",), 8)
    assert prompt.messages[0]["content"] == [{"type": "text", "text": "no  here"}]


def test_frames_are_spaced_over_the_part_asked_for(tmp_path):
    av = pytest.importorskip("av")
    assert av and media.spaced(8, 4) == [1, 3, 5, 7] and media.spaced(3, 8) == [0, 1, 2]
    from evaluations.worlds.clips import write_clip

    grey = np.repeat(np.arange(0, 160, 10, dtype=np.uint8), 32 * 32 * 3).reshape(16, 32, 32, 3)
    write_clip(grey, tmp_path / "clip.mp4", fps=2)
    clip = media.clip(str(tmp_path / "clip.mp4"), 4)
    assert (clip.indices, clip.total, clip.fps) == ([2, 6, 10, 14], 16, 2.0)
    assert np.abs(clip.frames.mean((1, 2, 3)) - [20, 60, 100, 140]).max() < 4
    assert media.clip(str(tmp_path / "clip.mp4"), 4, start=4, end=6).indices == [8, 9, 10, 11]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"broken\.mp4"):
        media.clip(str(tmp_path / "broken.mp4"), 4)


@pytest.mark.parametrize(
    ("visual", "given", "said"),
    [
        (lambda d: [np.zeros((4, 32, 32, 3), np.uint8)], {}, "'shapes' asks about videos, which tiny does not take"),
        (lambda d: [d["image"]], {"pruner": "framedrop"}, "framedrop serves videos alone"),
        (lambda d: [{"array": 1}], {}, "dict"),
        (lambda d: ["missing.png"], {}, "missing.png"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(visual, given, said):
    lm = model(**given)
    with pytest.raises(Exception, match=said):
        lm.generate_until(asks(lm, 1, visual=visual))
    lm.leaves = True
    with pytest.raises(SystemExit):
        lm.generate_until(asks(lm, 1, visual=visual))


VIDEO = ROOT / "assets" / "tiny-video"
video = pytest.mark.skipif(not (VIDEO / "config.json").is_file(), reason="needs the embedded video model")


@video
def test_videos_are_pruned_within_a_budget_meant_for_them():
    frames = np.stack([np.full((168, 168, 3), 40 * at, np.uint8) for at in range(4)])
    lm = model(pretrained=str(VIDEO), pruner="divprune", keep=0.25, batch_size=2)
    lm.generate_until(asks(lm, 2, visual=lambda d: [frames]))
    assert all(s.visual_tokens % 4 == 0 and s.entered == round(s.visual_tokens / 4) for s in lm.samples)
    lm = model(pretrained=str(VIDEO), pruner="divprune", keep=3)
    with pytest.raises(UserError, match="at least keep=4"):
        lm.generate_until(asks(lm, 1, visual=lambda d: [frames]))


# ------------------------------------------------------------------ the offline tasks


def test_unmade_questions_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv(shapes.FOLDER, str(tmp_path))
    with pytest.raises(SystemExit, match=r"shapes_colour.*evaluations\.tasks\.make"):
        _ = shapes.colour


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    from evaluations.tasks.make import make_shapes

    folder = tmp_path_factory.mktemp("tasks")
    make_shapes(40, folder)
    return folder


def lmms_eval(made: Path, out: Path, arguments: str, tasks: str, *more: str, launcher=()) -> tuple[dict, dict]:
    """lmms-eval's own command in a process of its own: (accuracies, measurements)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {shapes.FOLDER: str(made), measuring.MEASURED: str(out / "measured.json")}
    environment |= {"HF_HOME": str(made / "home")}
    out.mkdir()
    command = [sys.executable, *(launcher or ("-m", "lmms_eval")), "--model", "vtprune", "--tasks", tasks]
    command += ["--model_args", arguments, "--include_path", str(TASKS), "--output_path", str(out / "out"), "--log_samples"]
    done = subprocess.run([*command, *more], env=environment, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (results,) = (out / "out").rglob("*_results.json")
    found = json.loads(results.read_text())["results"]
    return found, json.loads((out / "measured.json").read_text())


def hits(folder: Path) -> dict[tuple[str, int], float]:
    found = {}
    for path in (folder / "out").rglob("*_samples_*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row["token_counts"][0]["visual_tokens"] == 576
            found[path.name.partition("_samples_")[2], row["doc_id"]] = row["exact_match"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "flowcut", "divprune", "visionzip"])
def test_lmms_eval_gives_the_leaderboards_accuracy(made, tmp_path, name):
    bare, processor = load(CHECKPOINT)
    right: dict[str, list[bool]] = {}
    for asked in pictures(40):
        ready = batch(bare, processor, asked)
        if name is None:
            said = answers(bare, processor, ready)
        else:
            with vtprune.pruning(bare, name, keep=32):
                said = answers(bare, processor, ready)
        for question, text in zip(asked.questions, said, strict=True):
            right.setdefault(f"shapes_{question.type}", []).append(text == question.answer)
    arguments = "pretrained=tiny,device=cpu" + (f",pruner={name},keep=32" if name else "")
    found, measured = lmms_eval(made, tmp_path / "run", arguments, "shapes,shapes_reading", "--batch_size", "4")
    for task, graded in right.items():
        assert found[task]["exact_match,none"] == pytest.approx(np.mean(graded), abs=0)
        assert measured["tasks"][task]["samples"] == len(graded)
        assert measured["tasks"][task]["equivalent_tokens"] == (32 if name else 576)
    graded = [hit for task, all_ in right.items() if task != "shapes_reading" for hit in all_]
    assert found["shapes"]["exact_match,none"] == pytest.approx(np.mean(graded))
    assert 0 < found["shapes"]["exact_match_stderr,none"] < 0.1


def test_all_questions_are_one_task(made, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv(shapes.FOLDER, str(made))
    monkeypatch.setenv("HF_HOME", str(made / "home"))
    lm = model(Chat, pruner="random", keep=16)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, model_name="vtprune")
    found = simple_evaluate(model=lm, tasks=["shapes_all"], task_manager=manager, limit=2, bootstrap_iters=0)
    assert [len(found["samples"]["shapes_all"]), found["n-samples"]["shapes_all"]["original"]] == [2, 40]
    assert {s.task for s in lm.samples} == {"shapes_all"}


@pytest.mark.slow
def test_two_processes_give_what_one_gives(made, tmp_path):
    arguments, tasks = "pruner=flowcut,keep=32,device=cpu", "shapes_colour,shapes_counting"
    one, single = lmms_eval(made, tmp_path / "one", arguments, tasks)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "lmms_eval")
    two, double = lmms_eval(made, tmp_path / "two", arguments, tasks, launcher=launcher)
    for task in tasks.split(","):
        assert two[task]["exact_match,none"] == one[task]["exact_match,none"]
        assert two[task]["exact_match_stderr,none"] == pytest.approx(one[task]["exact_match_stderr,none"])
        for name in ("samples", "visual_tokens", "equivalent_tokens", "kv_bytes", "flops"):
            assert double["tasks"][task][name] == pytest.approx(single["tasks"][task][name])
    assert hits(tmp_path / "two") == hits(tmp_path / "one")


@pytest.mark.slow
def test_choices_are_graded_by_likelihood(made, tmp_path):
    found, measured = lmms_eval(
        made, tmp_path / "run", "pruner=flowcut,keep=64,device=cpu", "shapes_colour_choice", "--force_simple", "--limit", "3"
    )
    assert found["shapes_colour_choice"]["acc,none"] > 0.6
    assert measured["tasks"]["shapes_colour_choice"]["samples"] == 21
