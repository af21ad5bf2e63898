"""The clip world, the embedded video model and the embedded clip."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from evaluations.worlds import CLIP_TYPES, SPLITS, make_clip, render_clips, scene_seed, write_clip
from evaluations.worlds.clips import CLIP_GRID, MOST_TIMES
from evaluations.worlds.shapes import PATCH
from vtprune import embedded
from vtprune.quota import ClipBackend, FrameScorer
from vtprune.video import open_video

SEEDS = range(60)


def fresh(*args):
    """Without the memory of clips made before."""
    return make_clip.__wrapped__(*args)


def runs(frames):
    return sum(1 for i, t in enumerate(frames) if i == 0 or t > frames[i - 1] + 1)


def test_a_clip_is_a_function_of_seed_split_and_length():
    for seed in (0, 7):
        one, other = fresh(seed, "val"), fresh(seed, "val")
        assert one == other and one.background == other.background
        assert np.array_equal(one.frames(), other.frames())
        assert one.questions(9, salt=3) == other.questions(9, salt=3)
    assert fresh(1, "val", 16).count == 16 and fresh(1, "val", 16) != fresh(1, "val", 24)
    with pytest.raises(ValueError, match="at least 8"):
        make_clip(0, "val", 7)


@pytest.mark.slow
def test_processes_draw_the_same_clips():
    alone, together = (render_clips(range(3), "val", 8, workers) for workers in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_splits_share_no_clip():
    assert len({scene_seed(s, split) for s in SEEDS for split in SPLITS}) == len(SEEDS) * len(SPLITS)
    pictures = {fresh(s, split, 8).frames()[0].tobytes() for s in range(10) for split in SPLITS}
    assert len(pictures) == 30


@pytest.mark.parametrize("seed", range(6))
def test_a_needle_is_seen_in_its_frames_and_nowhere_else(seed):
    clip = make_clip(seed, "val", 24)
    frames = clip.frames()
    assert frames.shape == (24, CLIP_GRID * PATCH, CLIP_GRID * PATCH, 3) and frames.dtype == np.uint8
    for i in clip.needles:
        needle, others = clip.actors[i], [a for n, a in enumerate(clip.actors) if n != i]
        assert all(a.shape != needle.shape and a.color != needle.color for a in others)
        without = type(clip)(clip.seed, clip.split, clip.count, tuple(others), clip.background)
        differs = (frames != without.frames()).reshape(24, CLIP_GRID, PATCH, CLIP_GRID, PATCH, 3).any((2, 4, 5))
        assert tuple(differs.any((1, 2)).nonzero()[0].tolist()) == needle.frames
        for t in needle.frames:
            seen = differs[t].flatten().nonzero()[0].tolist()
            assert set(clip.patches_of(i, t)) <= set(seen) and len(seen) <= needle.at(t).side ** 2


def test_needles_are_short_and_far_from_the_middle():
    for clip in (make_clip(s, "val") for s in SEEDS):
        assert 1 <= len(clip.needles) <= 3
        for needle in (clip.actors[i] for i in clip.needles):
            assert needle.times == runs(needle.frames) <= MOST_TIMES
            assert len(needle.frames) <= 2 * needle.times
            assert min(abs(v - CLIP_GRID / 2) for v in needle.at(needle.frames[0]).center) >= 1.5


def test_answers_are_right_by_what_is_drawn():
    asked, answers = Counter(), Counter()
    for clip in (make_clip(s, "val") for s in SEEDS):
        # what is shown, frame by frame
        shown = [{(o.shape, o.color): o for o in clip.scene(t).objects} for t in range(clip.count)]
        when = {}
        for t, objects in enumerate(shown):
            for shape, color in objects:
                when.setdefault(shape, []).append(t)
        for q in clip.questions(12):
            asked[q.type] += 1
            answers[q.answer] += 1
            shapes = [a.split()[-1] for a in q.about]
            there = {(s, c): o for t in q.frames for (s, c), o in shown[t].items()}
            if q.type in ("colour", "static"):
                assert {c for s, c in there if s == shapes[0]} == {q.answer}
                assert tuple(sorted(set(when[shapes[0]]))) == q.frames
            elif q.type == "shape":
                assert {s for s, c in there if c == q.about[0].split()[0]} == {q.answer}
            elif q.type == "existence":
                color, shape = q.about[0].split()
                assert q.answer == ("yes" if any((shape, color) in objects for objects in shown) else "no")
            elif q.type == "location":
                row, col = next(o.center for (s, _), o in there.items() if s == shapes[0])
                assert q.answer == f"{'top' if row < 6 else 'bottom'} {'left' if col < 6 else 'right'}"
            elif q.type == "counting":
                assert q.answer == str(runs(when[shapes[0]]))
            else:
                first = min(shapes, key=lambda s: when[s][0])
                last = max(shapes, key=lambda s: when[s][0])
                assert first != last and max(when[first]) < min(when[last])
                if "first" in q.text or "last" in q.text:
                    assert q.answer == (first if "first" in q.text else last)
                else:
                    claimed = shapes[0] if "before" in q.text else shapes[1]
                    assert q.answer == ("yes" if claimed == first else "no")
    assert set(asked) == set(CLIP_TYPES) and min(asked.values()) > 20
    assert {"yes", "no", "1", "2", "3", "4"} <= set(answers)


def test_a_written_clip_shows_the_same(tmp_path):
    pytest.importorskip("av")
    frames = make_clip(4, "val", 8).frames()
    write_clip(frames, tmp_path / "clip.mp4", fps=4)
    video = open_video(tmp_path / "clip.mp4")
    back = np.stack([np.asarray(f.image) for f in video.frames()])
    assert back.shape == frames.shape and video.rate == 4
    assert np.abs(back.astype(int) - frames).mean() < 4
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


# -- the embedded model ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        embedded.tiny_video(), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded.tiny_video())


def prompt(processor, kind, question):
    chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def answer(model, processor, frames, question):
    inputs = processor(videos=[frames], text=prompt(processor, "video", question), return_tensors="pt")
    told = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(told, skip_special_tokens=True)[0].strip()


def test_its_weights_have_the_published_names():
    with safe_open(embedded.tiny_video() / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert "vision_tower.vision_model.embeddings.position_embedding.weight" in names and "image_newline" in names
    assert "language_model.model.embed_tokens.weight" in names


def test_placeholders_are_as_many_as_the_tokens(model, processor):
    frames = make_clip(1, "val", 8).frames()
    text = prompt(processor, "video", "Where is the star?")
    inputs = processor(videos=[frames], text=text, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 8, 3, 168, 168)
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 8 * 36 + 1
    with torch.inference_mode():
        found = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output.shape[1]
        assert found in (8 * 36, 8 * 36 + 1)  # the newline behind the frames is added later before transformers 5.18
        picture = processor(images=open_video(frames[:1]).frames().__next__().image,
                            text=prompt(processor, "image", "Where is the star?"), return_tensors="pt")  # fmt: skip
        assert int((picture["input_ids"] == model.config.image_token_id).sum()) == 300
        assert model(**picture).logits.isfinite().all()


def test_every_word_of_the_world_is_one_token(processor):
    for clip in (make_clip(s, "val") for s in range(10)):
        for q in clip.questions(9):
            tokens = processor.tokenizer.tokenize(f"{q.text} {q.answer}")
            assert not any(t.startswith("##") or t == "<unk>" for t in tokens)


@pytest.mark.slow
def test_it_answers_on_a_short_clip_unpruned(model, processor):
    clip = make_clip(2, "test", 8)
    asked = clip.questions(6, ("colour", "location", "existence"))
    assert [answer(model, processor, clip.frames(), q.text) for q in asked] == [q.answer for q in asked]


@pytest.mark.slow
def test_the_embedded_clip_is_answered_whole_and_with_an_eighth_of_its_tokens(model, processor):
    """All 32 frames are 1,152 visual tokens; 144 suffice where they go to the frame that shows the needle."""
    pytest.importorskip("av")
    path = embedded.clips()["needle"]
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    video = open_video(path)
    frames = [f.image for f in video.frames()]
    assert len(frames) == told["frames"] and video.rate == told["fps"]
    question = told["questions"][0]
    assert question["frames"] == [12]
    assert answer(model, processor, frames, question["question"]) == question["answer"]
    backend = ClipBackend.embedded(model.model.vision_tower)
    scorer = FrameScorer.for_processor(backend, processor, objects=question["about"])
    with vtprune.pruning(model, vtprune.QuoTA(keep=144, scorer=scorer)):
        assert answer(model, processor, frames, question["question"]) == question["answer"]
