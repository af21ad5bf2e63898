"""The demo without a browser: its figures are those of `vtprune ask`, bad input is refused in words, sessions are apart."""

from __future__ import annotations

import functools
import gc
import inspect
import io
import json
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio")

import vtprune
from demo import depth, gallery, sharing
from demo.asking import Answer, Column, ask, make
from demo.chatting import Chat
from demo.finding import smallest
from demo.guard import DemoError, check_question, read_picture, say
from demo.keeper import Keeper, Stopped
from demo.line import Line
from demo.page import Page
from demo.patch import story
from demo.session import Session, Source
from vtprune import embedded
from vtprune.cli import app, demoing, running
from vtprune.cli.demoing import Limits
from vtprune.images import open_image
from vtprune.places import View
from vtprune.reporting import SampleReport

LIMITS = Limits()
QUESTION = "What shape is the white object?"
TIMES = ("prefill_ms", "selection_ms")
SCENE = Source.of_gallery("scene-0", LIMITS)


@pytest.fixture(scope="module")
def keeper():
    keeper = Keeper(device="cpu")
    keeper.get()
    return keeper


@pytest.fixture(scope="module")
def clips():
    keeper = Keeper(device="cpu", clips=True)
    keeper.get()
    return keeper


def run(keeper, pruner, keep, picture="scene-0", question=QUESTION, stop=None, made=None, tokens=64) -> Answer:
    prepare = Source.of_gallery(picture, LIMITS).prepare(question, LIMITS)
    *_, answer = ask(keeper, prepare, Column(pruner, keep), tokens, stop or threading.Event(), made)
    return answer


def session_with(keeper, *columns, picture="scene-0", question=QUESTION) -> Session:
    session = Session()
    session.show(Source.of_gallery(picture, LIMITS))
    session.question = question
    for n, (pruner, keep) in enumerate(columns):
        session.answers[n] = run(keeper, pruner, keep, picture, question)
    return session


# ---------------------------------------------------------------------- the same numbers as the command line's


@pytest.mark.parametrize(
    ("pruner", "keep"), [("none", 1), ("flowcut", 64), ("fastv", 200), ("visionzip", 64), ("psigmoid", 300), ("evict", 99)]
)
def test_a_column_is_what_the_command_line_gives(keeper, pruner, keep):
    """Answer, settings and the whole report, number for number; times excepted."""
    column = json.loads(json.dumps(run(keeper, pruner, keep).to_dict()))
    words = shlex.split(sharing.command(SCENE, QUESTION, Column(pruner, keep), None, LIMITS))
    said = CliRunner().invoke(app, [*words[1:], "--json", "--device", "cpu"])
    assert said.exit_code == 0, said.output
    expected = json.loads(said.stdout)
    for report in (column["report"], expected["report"]):
        for name in TIMES:
            assert report.pop(name) > 0
    assert column["report"] == expected["report"]
    assert column["answer"] == expected["answer"] and column["settings"] == expected["settings"]


@pytest.mark.slow
@pytest.mark.parametrize(("pruner", "keep"), [("none", 1), ("quota", 200), ("fastv", 400)])
def test_a_clip_is_what_the_command_line_gives(clips, pruner, keep):
    limits, source = Limits(frames=16), Source.of_gallery("needle", LIMITS)
    question = "What color is the star?"
    made = functools.partial(make, own=True, clip=True)
    *_, answer = ask(clips, source.prepare(question, limits), Column(pruner, keep), 64, threading.Event(), made)
    assert not answer.error
    column = json.loads(json.dumps(answer.to_dict()))
    words = shlex.split(sharing.command(source, question, Column(pruner, keep), None, limits))
    said = CliRunner().invoke(app, [*words[1:], "--json", "--device", "cpu"])
    assert said.exit_code == 0, said.output
    expected = json.loads(said.stdout)
    for report in (column["report"], expected["report"]):
        for name in TIMES:
            report.pop(name)
    assert column["report"] == expected["report"]
    assert column["answer"] == expected["answer"] and column["settings"] == expected["settings"]
    assert len(source.frames) == len(expected["video"]["frames"]) == 16
    # the timeline at the encoder shows all tokens of every frame, at the end what the strategy left
    sample = answer.report.samples[0]
    first, last = (
        depth.strip(sample, source.frames, place, "stretch") for place in (depth.places(8, 8)[0], depth.places(8, 8)[16])
    )
    assert first.size == last.size and (np.asarray(first) != np.asarray(last)).any() == (pruner != "none")


def test_what_is_displayed_is_what_the_report_says(keeper):
    from demo import words

    answer, unpruned = run(keeper, "flowcut", 64), run(keeper, "none", 1)
    table, report = words.figures(answer, unpruned), answer.report
    assert "64 of 576" in table and f"{report.kv_bytes / 2**20:.2f} MiB" in table
    assert f"{report.prefill_ms:.1f} ms" in table and f"{report.flops / 1e9:.2f} G" in table
    assert f"{100 * report.prefill_ms / unpruned.report.prefill_ms:.0f}\u202f%" in table
    assert answer.ttft_ms >= report.prefill_ms and answer.rate > 0 and answer.tokens == 2


def test_watching_changes_nothing(keeper):
    """Beside a run without the demo: the same report, and `stages()` is none the wiser."""
    inputs = running.prepare(keeper.get(), [open_image(embedded.pictures()["scene-0"])], QUESTION)
    _, plain = running.answer(keeper.get(), inputs, vtprune.create("flowcut+fastv+evict", keep=64), None, 8)
    answer = run(keeper, "flowcut+fastv+evict", 64)
    a, b = answer.report.to_dict(), plain.to_dict()
    assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert [s.stage for s in answer.seen] == ["encode"] * 6 + ["prefill"] + ["decode"] * 8


def test_answers_come_in_pieces(keeper):
    prepare = Source.of_gallery("scene-0", LIMITS).prepare("Where is the yellow ring?", LIMITS)
    texts = [a.text for a in ask(keeper, prepare, Column("flowcut", 64), 64, threading.Event())]
    assert texts[-1] == "top left" and len(texts) > 2


@pytest.mark.slow
def test_the_snippet_gives_the_same_answers(keeper, tmp_path):
    columns = [Column("none", 1), Column("flowcut", 64), Column("gsearch", 200)]
    code = sharing.snippet(SCENE, QUESTION, columns, None, LIMITS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    reports = (" ", "flowcut(", "gsearch(")
    lines = [line for line in done.stdout.splitlines() if not line.startswith(reports)]
    assert lines == [run(keeper, c.pruner, c.keep).text for c in columns]


# ---------------------------------------------------------------------- understanding


def test_every_place_shows_what_the_report_says(keeper):
    answer = run(keeper, "flowcut+fastv+evict", 64)
    sample, places = answer.report.samples[0], depth.places(*depth.depths(keeper.get().model))
    assert len(places) == 8 + 1 + 8 + 1
    counts = [len(depth.left(sample, place)) for place in places]
    assert counts == sorted(counts, reverse=True) and counts[0] == 576
    assert counts[9:17] == [len(layer) for layer in sample.layers] and counts[17] == len(sample.cached[-1])
    # a block after a cut holds what the cut left
    (block, index), *_ = sample.encoded
    assert counts[block] == len(index) and counts[block - 1] == 576


def test_overlays_are_bright_where_tokens_are(keeper):
    answer = run(keeper, "fastv", 200)
    sample, places = answer.report.samples[0], depth.places(8, 8)
    picture = Source.of_gallery("scene-0", LIMITS).preview
    before, after = (np.asarray(depth.draw(sample, picture, places[n], "crop")).astype(int) for n in (8, 16))
    whole = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(before - whole).mean() < 3
    kept = np.zeros(576, dtype=bool)
    kept[depth.left(sample, places[16])] = True
    cells = np.abs(after - whole).reshape(24, 14, 24, 14, 3)[:, 4:10, :, 4:10].mean((1, 3, 4)).ravel()
    assert cells[kept].max() < 3 < cells[~kept].mean()


def test_a_tiled_picture_is_drawn_tile_by_tile():
    """LLaVA-NeXT's way: the whole picture small, then two tiles; the tiles are drawn as one grid."""
    views = (View(4, 4), View(4, 4, 0, 2), View(4, 4, 1, 2))
    left = torch.tensor([3, 16, 47])  # in the small picture, the first tile's first patch, the second tile's last
    sample = SampleReport(48, left, [left, left], {}, images=[48], grids=[None], views=[views])
    picture = Image.new("RGB", (640, 320), (200, 120, 40))
    drawn = np.asarray(depth.draw(sample, picture, depth.places(2, 2)[-1], "stretch")).astype(int)
    cell = drawn.shape[0] // 4
    middles = drawn[cell // 2 :: cell, cell // 2 :: cell]
    bright = np.abs(middles - (200, 120, 40)).sum(-1) < 12
    assert middles.shape[:2] == (4, 8) and np.argwhere(bright).tolist() == [[0, 0], [3, 7]]


def test_a_patch_has_a_score_a_rank_and_a_fate(keeper):
    answer = run(keeper, "fastv", 200)
    sample, (seen,) = answer.report.samples[0], answer.seen
    stayed = set(sample.layers[-1].tolist())
    for token in (0, 100, 575, *list(stayed)[:3]):
        told = story(sample, answer.seen, token)
        (visit,) = told.visits
        # FastV's score is the attention itself: the best ranks stay
        assert (visit.rank <= len(stayed)) == visit.kept == (token in stayed)
        assert told.left == ("" if token in stayed else "before decoder layer 2")
    assert seen.scores["attention"].sum() < 1 and (told.row, told.column) == divmod(token, 24)


def test_merged_groups_appear_where_they_are_merged(keeper):
    sample = run(keeper, "visionzip", 64).report.samples[0]
    places = depth.places(8, 8)
    assert depth.groups(sample, depth.left(sample, places[0])) == {}
    groups = depth.groups(sample, depth.left(sample, places[8]))
    assert sum(map(len, groups.values())) == sum(map(len, sample.merged.values())) > 400
    merged = next(iter(groups.values()))[0]
    told = story(sample, [], merged)
    assert told.merged_into in groups and "merged into patch" in told.fate


def test_a_heat_map_is_bright_at_the_highest_score(keeper):
    answer = run(keeper, "fastv", 200)
    sample, (seen,) = answer.report.samples[0], answer.seen
    picture = Source.of_gallery("scene-0", LIMITS).preview
    assert depth.visit(answer.seen, depth.places(8, 8)[16], "attention") is seen
    drawn = np.asarray(depth.heat(sample, seen, "attention", picture, "crop"))
    cells = drawn.reshape(24, 14, 24, 14, 3).mean((1, 3, 4)).ravel()
    ranks = lambda values: np.argsort(np.argsort(values))
    # the picture shines through, so cells follow the scores but for neighbours in rank
    assert np.corrcoef(ranks(cells), ranks(seen.scores["attention"]))[0, 1] > 0.8


def test_the_smallest_budget_is_a_border(keeper):
    prepare = Source.of_gallery("scene-0", LIMITS).prepare(QUESTION, LIMITS)
    *steps, search = smallest(keeper, prepare, "flowcut", 64, threading.Event())
    assert search.done and search.target == "triangle" and search.total == 576
    assert run(keeper, "flowcut", search.best).text == "triangle" and search.tried[search.best] == "triangle"
    assert search.best == 1 or search.tried[search.best - 1] != "triangle"
    assert f"{search.best} of 576" in search.in_words() and len(steps) >= len(search.tried)


def test_a_search_is_stopped_and_says_why_it_cannot(keeper):
    stop = threading.Event()
    prepare = Source.of_gallery("scene-0", LIMITS).prepare(QUESTION, LIMITS)
    searching = smallest(keeper, prepare, "random", 64, stop)
    next(searching), next(searching)
    stop.set()
    *_, search = searching
    assert search.stopped and not search.done and "stopped" in search.in_words()
    *_, search = smallest(keeper, prepare, "none", 64, threading.Event())
    assert "no budget" in search.error
    *_, search = smallest(keeper, prepare, "evs", 64, threading.Event())
    assert "frames of a video" in search.in_words()


# ---------------------------------------------------------------------- chat


@pytest.mark.parametrize("pruner", ["none", "flowcut", "flowcut+fastv+evict"])
def test_a_chat_goes_on_over_its_cache(keeper, pruner):
    """Later turns see what was said; a new picture adds its own pruned tokens; an unpruned chat equals a whole prompt."""
    pictures = [open_image(embedded.pictures()[name]) for name in ("scene-0", "scene-1")]
    questions = [(QUESTION, pictures[:1]), ("What color is the circle?", []), ("How many objects are there?", pictures[1:])]
    chat = Chat(Column(pruner, 128))
    for question, new in questions:
        *_, turn = chat.ask(keeper, question, new, 16, threading.Event(), 12)
        assert not turn.error and turn.answer
        assert (turn.visual_tokens > 0) == bool(new)
    assert chat.turns[0].answer == "triangle" and chat.turns[1].held > chat.turns[0].held
    assert chat.turns[2].cached == {"none": 576, "flowcut": 128}.get(pruner, chat.turns[0].cached)
    if pruner != "none":
        return
    # the very same conversation in one piece
    loaded = keeper.get()
    messages = []
    for turn, (question, new) in zip(chat.turns, questions, strict=True):
        messages += [
            {"role": "user", "content": [*({"type": "image"} for _ in new), {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
        ]
    text = loaded.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    inputs = loaded.processor(images=pictures, text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == chat._ids
    out = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    whole = loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert whole.strip() == chat.turns[2].answer


def test_a_chat_has_bounds(keeper):
    chat = Chat(Column("flowcut", 64))
    with pytest.raises(DemoError, match="begins with a picture"):
        next(chat.ask(keeper, QUESTION, [], 8, threading.Event(), 12))
    picture = open_image(embedded.pictures()["scene-0"])
    for _ in range(2):
        *_, _turn = chat.ask(keeper, QUESTION, [picture] if not chat.turns else [], 8, threading.Event(), 2)
    *_, wrong = chat.ask(keeper, "and <image>?", [], 8, threading.Event(), 3)
    assert "marks a picture's place" in wrong.error and len(chat.turns) == 2
    with pytest.raises(DemoError, match="at most 2 turns"):
        next(chat.ask(keeper, QUESTION, [], 8, threading.Event(), 2))


# ---------------------------------------------------------------------- taking home


def test_card_report_and_link(keeper, tmp_path):
    session = session_with(keeper, ("none", 1), ("flowcut", 64), ("evs", 64))
    picture, data = map(Path, sharing.files(session, "crop", "tiny"))
    assert Image.open(picture).width > 900
    report = json.loads(data.read_text(encoding="utf-8"))
    assert [c["answer"] for c in report["columns"]] == ["triangle", "triangle", None]
    assert "frames of a video" in report["columns"][2]["error"]
    assert report["columns"][1]["report"]["samples"][0]["kept"] == session.answers[1].report.samples[0].kept.tolist()
    session.close()
    assert not picture.exists() and not data.exists()


def test_a_link_says_what_is_on_the_page_and_nonsense_is_ignored():
    columns = (Column("flowcut+fastv", 99), Column("none", 1), *sharing.START[2:])
    view = sharing.View("scene-2", "<b>&? x", columns, 2, 5)
    assert sharing.from_query(sharing.to_query(view), LIMITS) == view
    assert sharing.from_query("", LIMITS) == sharing.View()
    odd = "picture=../../etc/passwd&column=a:0&column=b:x&column=c&stage=-1&question=" + "y" * 5000 + "&x=1" * 100
    assert sharing.from_query(odd, LIMITS) == sharing.View()
    odd = f"picture=/etc/passwd&column=:5&column=a:{'9' * 5000}&stage=x&question=" + "y" * 5000
    view = sharing.from_query(odd, LIMITS)
    assert view.picture == "scene-0" and view.columns == sharing.START and len(view.question) == LIMITS.characters


def test_a_command_survives_any_question():
    for question in ('it\'s $(rm -rf /) `x` "q"', "-h", "--keep 3", "\n"):
        words = shlex.split(sharing.command(SCENE, question, Column("flowcut", 64), "a/b c", LIMITS))
        assert question in words and words[words.index("--model") + 1] == "a/b c"
        for source in (
            SCENE,
            Source("it's.png", Path("x"), SCENE.preview),
            Source("a'b.mp4", Path("x"), SCENE.preview, clip=True),
        ):
            compile(sharing.snippet(source, question, [Column("a'b", 3)], "m'", LIMITS), "snippet", "exec")


def test_examples_hold_every_type_and_are_answered_right(keeper):
    from evaluations.worlds.shapes import TYPES

    assert {e.type for e in gallery.examples()} == set(TYPES)
    right = {
        ("scene-0", "shape"): "triangle", ("scene-0", "reading"): "open", ("scene-1", "counting"): "5",
        ("scene-1", "colour"): "green", ("scene-2", "counting"): "7", ("scene-3", "existence"): "no",
        ("scene-2", "relation"): "yes", ("scene-0", "location"): "top right", ("scene-2", "location"): "bottom left",
    }  # fmt: skip
    for example in gallery.examples():
        said = run(keeper, "none", 1, example.picture, example.question).text
        assert said == right.get((example.picture, example.type), said), example


# ---------------------------------------------------------------------- bad input


def png(size, mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("big.png", lambda: png((3000, 2000)), "6 megapixels; at most 2"),
        ("bomb.png", lambda: png((20_000, 10_000), "1"), "megapixels"),
        ("fat.png", lambda: b"x" * 3_000_000, "3.0 MB; at most 1"),
        ("notes.png", lambda: b"just words", "not a picture"),
        ("none.png", lambda: b"", "empty"),
        ("cut.png", lambda: png((500, 500))[:90], "cannot be decoded"),
    ],
)
def test_bad_files_are_refused_without_their_place(tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data())
    with pytest.raises(DemoError, match=said) as error:
        read_picture(path, Limits(megapixels=2, megabytes=1))
    assert str(tmp_path) not in str(error.value) and name in str(error.value)


def clip_without_frames():
    """A whole MP4 of zero length."""
    av, stream = pytest.importorskip("av"), io.BytesIO()
    with av.open(stream, "w", format="mp4") as box:
        track = box.add_stream("mpeg4", rate=5)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        box.start_encoding()
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "limits", "said"),
    [
        ("none.mp4", lambda: b"", {}, "empty"),
        ("words.mp4", lambda: b"just words" * 50, {}, "words.mp4"),
        ("still.mp4", clip_without_frames, {}, "has no video stream"),
        ("cut.mp4", lambda: embedded.clips()["needle"].read_bytes()[:600], {}, "cut.mp4"),
        ("long.mp4", embedded.clips()["needle"].read_bytes, {"seconds": 5}, "lasts 16 s; at most 5"),
        ("wide.mp4", embedded.clips()["needle"].read_bytes, {"megapixels": 0.01}, "megapixels"),
    ],
)
def test_bad_clips_are_refused_without_their_place(tmp_path, name, data, limits, said):
    path = tmp_path / name
    path.write_bytes(data())
    with pytest.raises(DemoError, match=said) as error:
        Source.of_file(path, Limits(**limits))
    assert str(tmp_path) not in str(error.value)


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture, notes = read_picture(tmp_path / "moving.gif", LIMITS)
    assert picture.getpixel((5, 5)) == (255, 0, 0) and notes == ["'moving.gif' has 2 frames; the first is used."]


def test_questions_have_bounds():
    assert check_question("  why? ", LIMITS) == "why?"
    for text, said in ((None, "empty"), (" \n", "empty"), ("x" * 10_000, "10000 characters; at most 1000")):
        with pytest.raises(DemoError, match=said):
            check_question(text, LIMITS)


def test_what_nobody_foresaw_is_told_in_the_log_alone(caplog):
    said = say(RuntimeError("/root/secret"))
    number = said.split("incident ")[1][:8]
    assert "secret" not in said and number in caplog.text and "secret" in caplog.text
    assert say(DemoError("two\nlines")) == "two lines"


@dataclass
class Broken(vtprune.Pruner):
    keep: int = 1
    name = "broken"

    def select(self, view):
        raise RuntimeError("/root/secret")


def test_a_strategy_that_raises_ends_its_own_column_alone(keeper):
    answer = run(keeper, "broken", 1, made=lambda column, loaded: Broken())
    assert "incident" in answer.error and "secret" not in answer.error and not answer.done
    # the model is free again, and as it was
    assert run(keeper, "flowcut", 64).text == "triangle"
    assert "Did you mean 'flowcut'" in run(keeper, "flowcat", 64).error
    assert "cannot be reached" in run(keeper, "fastv", 10).error


def test_a_stopped_run_ends_early_and_frees_the_model(keeper):
    stop = threading.Event()
    prepare = Source.of_gallery("scene-0", LIMITS).prepare("Where is the yellow ring?", LIMITS)
    asking = ask(keeper, prepare, Column("none", 1), 64, stop)
    next(asking)
    stop.set()
    *_, answer = asking
    assert answer.stopped
    stop = threading.Event()
    stop.set()
    assert run(keeper, "none", 1, stop=stop).stopped
    assert run(keeper, "none", 1).text == "triangle"


def test_a_model_that_cannot_be_loaded_says_so():
    keeper = Keeper(load=lambda: (_ for _ in ()).throw(RuntimeError("/root/secret")))
    with pytest.raises(DemoError, match=r"could not be loaded.*incident"):
        keeper.get()
    assert keeper.share == 1 and "secret" not in keeper.error


# ---------------------------------------------------------------------- sessions


def test_sessions_at_once_do_not_mix(keeper):
    """Two tabs with different pictures, questions and strategies, run in turn by one model from two threads."""
    asked = {
        "scene-0": ("What word is written in the picture?", "open", "flowcut"),
        "scene-1": ("What word is written in the picture?", "fish", "visionzip"),
    }
    found: dict[str, list[Answer]] = {name: [] for name in asked}

    def visit(name):
        question, _, pruner = asked[name]
        for keep in (120, 160, 200):
            found[name].append(run(keeper, pruner, keep, name, question))

    threads = [threading.Thread(target=visit, args=(name,)) for name in asked]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for name, (_, word, pruner) in asked.items():
        assert [a.text for a in found[name]] == [word] * 3
        assert [len(a.report.samples[0].kept) for a in found[name]] == [120, 160, 200]
        assert all(a.settings["name"] == pruner for a in found[name])


def test_a_line_is_first_come_first_served():
    line, stops = Line(1, 2), [threading.Event() for _ in range(3)]
    with line.stand(stops[0]) as first, line.stand(stops[1]) as second, line.stand(stops[2]) as third:
        assert list(first.wait()) == []
        assert next(second.wait()) == 1 and next(third.wait()) == 2
        with pytest.raises(DemoError, match="2 others wait already"), line.stand(threading.Event()):
            pass
        stops[1].set()
        with pytest.raises(Stopped):
            list(second.wait())
    # a run that raises lets the next one in
    entered, go, seen = threading.Event(), threading.Event(), []

    def fail():
        with pytest.raises(RuntimeError), line.stand(threading.Event()):
            entered.set()
            go.wait(20)
            raise RuntimeError

    thread = threading.Thread(target=fail)
    thread.start()
    assert entered.wait(20)
    with line.stand(threading.Event()) as place:
        for ahead in place.wait():
            seen.append(ahead)
            go.set()
    thread.join()
    assert seen == [1]


class Parts(dict):
    """Stands for the page's components: each is its own name."""

    def __missing__(self, name):
        return name


@pytest.fixture
def page(keeper, clips):
    page = Page(keeper, clips, LIMITS)
    page.parts = Parts()
    return page


def test_every_click_counts_against_the_idle_time(page):
    """gradio counts from when a session was last handed back."""
    session = Session()
    session.show(Source.of_gallery("scene-0", LIMITS))
    assert page.scrub(session, 3, 0, "kept tokens")["session"] is session
    refused = page.point(session, 3, 0, "kept tokens", 0, 0)
    assert refused["session"] is session and "Ask a question first" in refused["status"]
    assert "deleted" in page.scrub(None, 3, 0, "kept tokens")["status"]


def test_a_search_that_waits_is_stopped(page):
    session, before = Session(), threading.Event()
    session.show(Source.of_gallery("scene-0", LIMITS))
    with page.line.stand(before):
        search = page.find(1)(session, QUESTION, "flowcut")
        assert "Waiting: 1 other run is before yours" in next(search)["found1"]
        assert "Stopped" in page.stop(session)
        assert "Stopped" in list(search)[-1]["found1"]
    assert "Nothing is running" in page.stop(session)


def test_what_comes_from_a_closed_tab_is_not_kept(tmp_path):
    cache = tmp_path / "late.png"
    Image.new("RGB", (30, 30)).save(cache)
    session = Session()
    session.close()
    with pytest.raises(Stopped):
        session.take(cache)
    with pytest.raises(Stopped), session.run():
        pass
    # and a session that is dropped without a word takes its folder along
    session = Session()
    folder = session.folder()
    del session
    gc.collect()
    assert not folder.exists()


def test_every_limit_is_a_flag():
    said = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"})
    flags = [p for p in inspect.signature(demoing.demo).parameters if p in {f.name for f in fields(Limits)}]
    assert flags == [f.name for f in fields(Limits)] and len(flags) >= 10
    for flag in ("--max-megapixels", "--max-seconds", "--concurrency", "--idle-minutes"):
        assert flag in said.stdout
    bad = CliRunner().invoke(app, ["demo", "--max-frames", "0"])
    assert bad.exit_code == 2


def test_a_closed_session_leaves_nothing(tmp_path):
    cache = tmp_path / "mine.png"
    Image.new("RGB", (30, 30)).save(cache)
    session = Session()
    taken = session.take(cache)
    session.show(Source.of_file(taken, LIMITS))
    assert taken.exists() and not cache.exists()
    with session.run() as stop:
        session.close()
        assert stop.is_set()
    assert not taken.exists() and session.source is None and session.answers == [None] * 4
    with pytest.raises(DemoError, match="gone"):
        Session().take(cache)
    # the next picture replaces the file of the one before
    Image.new("RGB", (30, 30)).save(cache)
    session = Session()
    taken = session.take(cache)
    session.show(Source.of_file(taken, LIMITS))
    session.show(Source.of_gallery("scene-0", LIMITS))
    assert not taken.exists()
    session.close()


def test_columns_are_made_as_the_command_line_makes_them():
    assert make(Column("none", 3), None, True) is None
    assert make(Column("gsearch", 200), None, True).schedule
    assert make(Column("flowcut+evict", 64), None, False).describe() == vtprune.create("flowcut+evict", keep=64).describe()
