"""The picture world: the same seed gives the same picture and questions, and what it says about itself is true."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from evaluations.worlds import (
    COLORS,
    GRID,
    PATCH,
    SHAPES,
    SPLITS,
    TYPES,
    WORDS,
    make_scene,
    render_many,
    scene_seed,
    vocabulary,
)

ROOT = Path(__file__).resolve().parents[1]
DIGEST = """
import hashlib
from evaluations.worlds import make_scene
h = hashlib.sha256()
for s in range(3):
    scene = make_scene(s, "test")
    h.update(scene.array().tobytes())
    h.update(repr([scene.questions(8), scene.object_patches(), scene.caption()]).encode())
print(h.hexdigest())
"""


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(s, "test") for s in range(150)]


def _digest(hash_seed: str) -> str:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", DIGEST],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_a_seed_fixes_the_picture_and_the_questions_whatever_the_hash_seed():
    assert _digest("1") == _digest("2")


def test_splits_never_share_a_seed():
    seeds = {split: {scene_seed(s, split) for s in range(3000)} for split in SPLITS}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not seeds[a] & seeds[b]
    pictures = {hashlib.sha256(make_scene(s, split).array()).digest() for split in SPLITS for s in range(8)}
    assert len(pictures) == 8 * len(SPLITS)
    with pytest.raises(ValueError):
        scene_seed(-1, "train")


def test_workers_draw_the_same_pictures():
    assert np.array_equal(render_many(range(6), "val", workers=2), render_many(range(6), "val"))


def test_pictures_have_the_right_size(scenes):
    image = scenes[0].image()
    assert image.size == (GRID * PATCH, GRID * PATCH) and image.mode == "RGB"
    assert make_scene(1, "train", grid=12, packed=6).array().shape == (
        12 * PATCH,
        12 * PATCH,
        3,
    )


def test_one_to_eight_objects_small_ones_among_them(scenes):
    counts = {len(s.objects) for s in scenes}
    assert min(counts) >= 1 and max(counts) <= 8 and len(counts) == 8
    sizes = Counter(o.size for s in scenes for o in s.objects)
    assert sizes["small"] > sizes["medium"] > 0 and sizes["large"] > 0
    assert all(len(s.object_patches()) <= 64 for s in scenes)
    assert {o.shape for s in scenes for o in s.objects} == set(SHAPES)
    assert {o.color for s in scenes for o in s.objects} == set(COLORS)


def test_patches_hold_the_objects_pixels(scenes):
    for scene in scenes[:40]:
        picture = scene.array().astype(int)
        patches = scene.object_patches()
        assert patches == sorted(set(patches)) and patches[0] >= 0 and patches[-1] < GRID * GRID
        for i, o in enumerate(scene.objects):
            paint = np.clip(np.array(COLORS[o.color]) + np.array(o.tint), 0, 255)
            box = np.s_[
                o.row * PATCH : (o.row + o.side) * PATCH,
                o.col * PATCH : (o.col + o.side) * PATCH,
            ]
            hit = np.zeros(picture.shape[:2], dtype=bool)
            hit[box] = (np.abs(picture[box] - paint) <= 12).all(-1)
            owned = np.zeros((GRID, GRID), dtype=bool)
            owned.flat[scene.patches_of(i)] = True
            inside = hit & np.kron(owned, np.ones((PATCH, PATCH), dtype=bool))
            assert hit.sum() > 60
            assert inside.sum() >= 0.98 * hit.sum()


def test_objects_and_words_do_not_overlap(scenes):
    for scene in scenes:
        every = [p for i in range(len(scene.objects)) for p in scene.patches_of(i)] + scene.word_patches()
        assert len(every) == len(set(every))


def test_words_cover_two_patches_a_letter(scenes):
    with_word = [s for s in scenes if s.word]
    assert 0.3 < len(with_word) / len(scenes) < 0.9
    for s in with_word:
        assert s.word.text in WORDS and len(s.word_patches()) == 2 * len(s.word.text)
        assert max(s.word_patches()) < GRID * GRID


def test_every_type_is_asked_and_no_question_twice(scenes):
    types = Counter()
    for scene in scenes:
        asked = scene.questions(8)
        assert len({q.text for q in asked}) == len(asked) <= 8
        assert asked == scene.questions(8)
        types.update(q.type for q in asked)
    assert set(types) == set(TYPES)
    assert min(types.values()) > 60


def test_yes_and_no_are_balanced():
    for kind in ("existence", "relation"):
        asked = [q for s in range(500) for q in make_scene(s, "train").questions(3, types=[kind])]
        yes_no = Counter(q.answer for q in asked if q.answer in ("yes", "no"))
        assert 0.45 < yes_no["yes"] / (yes_no["yes"] + yes_no["no"]) < 0.55


def test_negatives_share_a_shape_or_a_colour_with_something_there(scenes):
    seen = 0
    for scene in scenes:
        pairs = {(o.color, o.shape) for o in scene.objects}
        for q in scene.questions(6, types=["existence"]):
            words = set(q.text.rstrip("?.").split())
            (color,), (shape,) = words & set(COLORS), words & set(SHAPES)
            assert ((color, shape) in pairs) == (q.answer == "yes")
            if q.answer == "no":
                seen += 1
                assert any(c == color or s == shape for c, s in pairs)
    assert seen > 50


def test_answers_agree_with_the_scene(scenes):
    for scene in scenes:
        for q in scene.questions(10):
            about = [scene.objects[i] for i in q.about if i >= 0]
            if q.type == "colour":
                assert q.answer == about[0].color and about[0].shape in q.text
                assert sum(o.shape == about[0].shape for o in scene.objects) == 1
            elif q.type == "shape":
                assert q.answer == about[0].shape and about[0].color in q.text
                assert sum(o.color == about[0].color for o in scene.objects) == 1
            elif q.type == "counting":
                assert q.answer == str(len(about)) == str(len(set(q.about)))
            elif q.type == "location":
                row, col = about[0].center
                assert q.answer == f"{'top' if row < GRID / 2 else 'bottom'} {'left' if col < GRID / 2 else 'right'}"
            elif q.type == "relation":
                (ra, ca), (rb, cb) = about[0].center, about[1].center
                true = {
                    "left": ca < cb,
                    "right": ca > cb,
                    "above": ra < rb,
                    "below": ra > rb,
                }
                if q.answer in true:
                    assert true[q.answer] and q.answer in q.text
                else:
                    (said,) = [d for d in true if d in q.text.replace(".", " ").replace("?", " ").split()]
                    assert true[said] == (q.answer == "yes")
            elif q.type == "reading":
                assert q.about == (-1,) and scene.word is not None and q.answer == scene.word.text


def test_the_vocabulary_covers_questions_answers_and_captions(scenes):
    known = set(vocabulary())
    for scene in scenes[:60]:
        said = " ".join([scene.caption(), *(f"{q.text} {q.answer}" for q in scene.questions(10))])
        assert set(said.lower().replace("?", " ").replace(".", " ").replace(":", " ").split()) <= known


def test_captions_name_what_is_there(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes[:60]:
        names = {f"a {o.size} {o.color} {o.shape}" for o in scene.objects}
        names |= {f"the word {scene.word.text}"} if scene.word else set()
        assert set(scene.caption().split(" and ")) == names
        assert set(scene.caption(rng, most=3).split(" and ")) <= names
