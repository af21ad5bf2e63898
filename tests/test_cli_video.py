"""Videos on the command line: what is taken for one, what is printed and drawn, and one line for every mistake."""

from __future__ import annotations

import builtins
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_cli import refused, run

from vtprune import embedded
from vtprune.cli import running as running_module
from vtprune.cli import watching
from vtprune.video import open_video

av = pytest.importorskip("av")
QUESTION = "What color is the star?"
SHORT = ("--max-new-tokens", "2")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def load_once():
    real, kept = running_module.load, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_module, "load", lambda *args: kept[args] if args in kept else kept.setdefault(args, real(*args)))
        yield


def pictures(count: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    made = []
    for i in range(count):
        image = Image.new("RGB", size, (200, 220, 230))
        ImageDraw.Draw(image).ellipse((4 + i % 60, 10, 34 + i % 60, 40), fill=(220, 40 + 3 * (i % 30), 40))
        made.append(image)
    return made


def write(path, frames: list[Image.Image], rate: int = 8) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures(12))


def asked(*args: str) -> dict:
    result = run("ask", *args, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---------------------------------------------------------------- ask


def test_ask_prints_the_answer_the_frames_and_the_report(clip, tmp_path):
    shown = tmp_path / "frames.png"
    result = run("ask", clip, QUESTION, "--keep", "60", "--overlay", str(shown), *SHORT)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "clip.mp4, 1.5 s, 12 of 12 frames" in text and "visual tokens 432" in text
    spent = [int(n) for n in re.search(r"tokens per frame ([\d ]+)", text)[1].split()]
    assert len(spent) == 12 and 50 <= sum(spent) <= 60
    assert f"entering the decoder {sum(spent)}" in text
    assert "ClipBackend('embedded'" in text
    with Image.open(shown) as picture:
        assert picture.width > 500


def test_json_has_times_scores_and_tokens(clip):
    data = asked(clip, QUESTION, "--keep", "60", "--frames", "5")
    assert "images" not in data and data["video"]["name"] == "clip.mp4"
    plan, frames = data["report"]["samples"][0]["plans"][0], data["video"]["frames"]
    assert [f["tokens"] for f in frames] == plan["tokens"] and [f["score"] for f in frames] == plan["scores"]
    assert [f["index"] for f in frames] == [0, 2, 5, 8, 11]
    assert [f["time"] for f in frames] == pytest.approx([n / 8 for n in (0, 2, 5, 8, 11)])
    assert data["settings"]["name"] == "quota" and data["settings"]["keep"] == 60


def test_ask_is_what_the_library_says(clip):
    """Same tokens as a few lines of ordinary transformers code around `vtprune.pruning`."""
    import vtprune
    from vtprune.quota import ClipBackend, FrameScorer

    loaded = running_module.load(None, "auto", "auto", "sdpa", False, True)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    frames = np.stack([np.asarray(frame.image) for frame in open_video(clip).frames()])
    inputs = loaded.processor(videos=[frames], text=text, return_tensors="pt")
    scorer = FrameScorer.for_processor(ClipBackend.embedded(loaded.model.model.vision_tower), loaded.processor)
    with vtprune.pruning(loaded.model, vtprune.QuoTA(keep=0.25, scorer=scorer)) as session:
        out = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    said = loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    data = json.loads(run("ask", clip, QUESTION, "--max-new-tokens", "8", "--json").stdout)
    assert data["answer"] == said
    assert data["report"]["samples"][0]["kept"] == session.report.samples[0].kept.tolist()


def test_a_folder_and_an_animation_are_videos_and_a_still_gif_is_not(tmp_path):
    frames = pictures(6)
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames):  # one of another size
        (frame if i != 3 else frame.resize((50, 70))).save(tmp_path / "frames" / f"f{i}.png")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "still.gif")
    data = asked(str(tmp_path / "frames"), QUESTION, "--video", "--pruner", "framedrop", "--keep", "0.5")
    assert sorted(f["tokens"] for f in data["video"]["frames"]) == [0, 0, 0, 36, 36, 36]
    assert data["video"]["frames"][0]["score"] is None
    assert asked(str(tmp_path / "moving.gif"), QUESTION, "--pruner", "none")["report"]["samples"][0]["frames"] == [6]
    assert asked(str(tmp_path / "still.gif"), QUESTION)["images"] == [str(tmp_path / "still.gif")]
    assert "--video for a folder" in refused("ask", str(tmp_path / "frames"), QUESTION)
    assert "two or more" in refused("ask", str(tmp_path / "still.gif"), QUESTION, "--video")


def test_how_many_frames_and_how_large(tmp_path):
    long = write(tmp_path / "long.mp4", pictures(240, (320, 240)), rate=24)
    processor = running_module.load(None, "auto", "auto", "sdpa", False, True).processor
    seen = watching.watch(open_video(long), None, processor)
    assert len(seen.frames) == 96 and {f.image.size for f in seen.frames} == {(320, 240)}
    hour = open_video(long)
    hour.duration = 3600.0  # the sampling rule looks at nothing else
    assert len(watching.watch(hour, None, processor).frames) == 160
    wide = open_video([Image.new("RGB", (3000, 1000))] * 3)
    assert {f.image.size for f in watching.watch(wide, 2, processor).frames} == {(336, 112)}


def test_a_video_that_was_cut_short_is_spread_over_what_there_is(tmp_path):
    frames = pictures(120, (320, 240))
    for frame in frames:  # noise, so that the file is large enough to cut
        frame.paste(Image.effect_noise((320, 120), 90), (0, 120))
    whole = write(tmp_path / "whole.avi", frames)
    data = Path(whole).read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    result = run("ask", str(tmp_path / "cut.avi"), QUESTION, "--frames", "10", "--pruner", "evs", *SHORT, "--json")
    assert result.exit_code == 0, result.output
    assert "note:" in result.stderr
    video = json.loads(result.stdout)["video"]
    assert len(video["frames"]) == 10 and 30 < video["frames"][-1]["index"] < 80


def test_a_shipped_clip_has_a_name():
    names = embedded.clips()
    if not names:
        pytest.skip("no clips are shipped")
    name = next(iter(names))
    assert asked(name, QUESTION, "--frames", "4")["video"]["name"] == f"{name}.mp4"


def test_qwen_is_told_when_its_frames_are_shown(tmp_path):
    """Its processor makes seconds per pair of frames of the metadata: 6 of 12 frames at 8 a second are 0.5 s apart in pairs."""
    from models import tiny_qwen
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = AutoTokenizer.from_pretrained(embedded.tiny_model())
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    sizes = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes))
    loaded = running_module.Loaded(tiny_qwen(), processor, "qwen")
    seen = watching.watch(open_video(write(tmp_path / "clip.mp4", pictures(12))), 6, processor)
    inputs = watching.prepare(loaded, seen, QUESTION)
    assert "video_metadata" not in inputs  # the model would not know it
    frames, rows, columns = inputs["video_grid_thw"][0].tolist()
    assert frames == 3 and int((inputs["input_ids"] == processor.video_token_id).sum()) == 3 * rows * columns // 4
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(0.5)


# ---------------------------------------------------------------- scorers


def test_scorers_and_objects(clip):
    own = asked(clip, QUESTION, "--scorer", "none", "--frames", "4")
    assert own["settings"]["scorer"] is None and own["video"]["frames"][0]["score"] is not None
    told = asked(clip, QUESTION, "--frames", "4", "--objects", "red star, ring")
    assert "objects=['red star', 'ring']" in told["settings"]["scorer"]
    given = asked(clip, QUESTION, "--frames", "4", "--set", "scores=[0,0,1,0]", "--keep", "20")
    assert [f["tokens"] for f in given["video"]["frames"]] == [0, 0, 20, 0]
    composed = asked(clip, QUESTION, "--frames", "4", "--pruner", "quota+evict", "--keep", "20")
    assert "quota" in composed["report"]["strategy"] and "ClipBackend" in composed["report"]["strategy"]


def test_a_slow_scorer_shows_in_the_prefill(clip, monkeypatch):
    def slow(frames, question, objects):
        assert QUESTION.lower()[:-1] in question.lower()
        time.sleep(0.5)
        return [float(i) for i in range(len(frames))]

    monkeypatch.setattr(watching, "_backend", lambda *args: slow)
    report = asked(clip, QUESTION, "--scorer", "embedded", "--frames", "4")["report"]
    assert report["selection_ms"] >= 500 and report["prefill_ms"] >= report["selection_ms"]
    assert report["samples"][0]["plans"][0]["scores"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_compare_scores_anew_in_each_timed_run(clip, monkeypatch):
    def slow(frames, question, objects):
        time.sleep(0.5)
        return [1.0] * len(frames)

    monkeypatch.setattr(watching, "_backend", lambda *args: slow)
    args = ("--pruner", "quota", "--pruner", "evs", "--frames", "4", "--repeats", "2", *SHORT, "--json")
    rows = {row["name"]: row for row in json.loads(run("compare", clip, QUESTION, *args).stdout)["rows"]}
    assert rows["quota"]["selection_ms"] >= 500 > rows["evs"]["selection_ms"]


def test_a_question_longer_than_the_scorer_reads_is_noted(clip):
    result = run("ask", clip, " ".join([QUESTION] * 20), "--frames", "3", *SHORT)
    assert result.exit_code == 0 and "is compared in" in result.stderr and result.stderr.startswith("note: ")


# ---------------------------------------------------------------- compare, list


@pytest.mark.slow
def test_compare_draws_a_strip_each(clip, tmp_path):
    sheet = tmp_path / "sheet.png"
    chosen = ("quota", "evs", "fastv", "flowcut")
    args = [*(part for name in chosen for part in ("--pruner", name)), "--keep", "40", "--frames", "6", "--repeats", "1"]
    result = run("compare", clip, QUESTION, *args, *SHORT, "--json", "--out", str(sheet))
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["unpruned"]["entered"] == 216 and rows["evs"]["entered"] == 40
    assert "ClipBackend" in rows["quota"]["strategy"] and "cannot be reached" in rows["fastv"]["error"]
    assert "video" in rows["flowcut"]["error"] and data["video"] == clip
    with Image.open(sheet) as picture:
        assert picture.height > 3 * 150


def test_compare_leaves_out_what_serves_no_videos(clip, monkeypatch):
    from vtprune.cli import comparing

    seen = []
    monkeypatch.setattr(comparing, "run", lambda loaded, inputs, pruners, *rest: seen.extend(pruners) or [])
    run("compare", clip, QUESTION, "--frames", "2")
    assert {"quota", "evs", "divprune", "fastv", "evict"} <= set(seen)
    assert not {"flowcut", "resolution"} & set(seen)
    seen.clear()
    run("compare", "scene-0", QUESTION)
    assert {"flowcut", "resolution", "divprune"} <= set(seen) and not {"quota", "evs"} & set(seen)


def test_list_says_what_serves_videos_and_takes_a_scorer():
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert (rows["quota"]["serves"], rows["flowcut"]["serves"], rows["divprune"]["serves"]) == ("videos", "pictures", "both")
    assert [name for name, row in rows.items() if "a scorer if given" in row["needs"]] == ["quota"]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--scorer", "clap"], "one of embedded, self"),
        (["--scorer", "clip"], "one of embedded, self"),
        (["--scorer", "embedded:x"], "one of embedded, self"),
        (["--scorer", "clip:/nowhere/at/all"], "cannot be loaded"),
        (["--scorer", "vlm:/nowhere"], "cannot load"),
        (["--pruner", "evs", "--scorer", "embedded"], "takes a scorer"),
        (["--pruner", "none", "--scorer", "embedded"], "takes a scorer"),
        (["--scorer", "none", "--objects", "star"], "--scorer"),
        (["--objects", " , "], "names nothing"),
        (["--image", "scene-0"], "asked about alone"),
        (["--pruner", "flowcut", "--keep", "64"], "video"),
        (["--pruner", "evs", "--keep", "9"], "raise keep"),
        (["--keep", "5", "--set", "floor=1"], "floor"),
        (["--model", str(embedded.tiny_model())], "takes no videos"),
    ],
)
def test_mistakes_in_options(clip, args, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in refused("ask", clip, QUESTION, "--frames", "6", *args)


@pytest.mark.slow
def test_the_nearest_names_of_open_clip_are_offered(clip):
    pytest.importorskip("open_clip")
    assert "Did you mean" in refused("ask", clip, QUESTION, "--frames", "6", "--scorer", "open_clip:ViT-B33")


def test_mistakes_in_the_file(clip, tmp_path):
    data = Path(clip).read_bytes()
    for name, content, said in (
        ("empty.mp4", b"", "empty"),
        ("cut.mp4", data[: len(data) // 2], "broken"),
        ("text.mp4", b"no video at all\n" * 20, "it is text"),
    ):
        (tmp_path / name).write_bytes(content)
        assert said in refused("ask", str(tmp_path / name), QUESTION)
    (tmp_path / "none").mkdir()
    assert "holds no picture" in refused("ask", str(tmp_path / "none"), QUESTION, "--video")
    assert "no file" in refused("ask", str(tmp_path / "nowhere.mp4"), QUESTION)


@pytest.mark.parametrize("args", [["--frames", "4"], ["--scorer", "embedded"], ["--objects", "star"], ["--decouple"]])
def test_options_of_videos_with_a_picture(args):
    assert f"{args[0]}: for videos" in refused("ask", "scene-0", QUESTION, *args)


def test_a_video_strategy_with_a_picture():
    assert "over the frames of a video" in refused("ask", "scene-0", QUESTION, "--pruner", "quota")


def test_without_pyav_the_extra_is_named(clip, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "vtprune[video]" in refused("ask", clip, QUESTION)
