"""The clip world: short videos of the shape world's objects, with questions about what is shown for a moment.

Every clip is a pure function of ``(seed, split, frames)``. Some objects stay, some move in jumps, some come or go; *needles*
flash up: a needle's shape and its colour belong to nothing else in the clip, and it is shown once, for one frame or two in a
row, or several times, for one frame each. Between two changes the frames are the same to the pixel.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from .shapes import COLORS, PHRASES, SHAPES, SIZES, PictureObject, Scene, _boxes_apart, scene_seed

CLIP_GRID = 12
LENGTHS = (8, 12, 16, 24, 32, 40, 48, 64)
FPS = 2
CLIP_TYPES = ("colour", "shape", "existence", "location", "order", "counting", "static")
NEEDLE_TYPES = ("colour", "shape", "existence", "location")
MOST_TIMES = 4
CLIP_PHRASES: dict[str, tuple[str, ...]] = {
    "colour": PHRASES["colour"],
    "shape": PHRASES["shape"],
    "existence": (
        "Is there a {r} in the video?", "Is there a {r}?", "Does the video show a {r}?", "Can you see a {r}?",
    ),
    "location": ("Where is the {r}?", "In which corner is the {r}?", "Where in the video is the {r}?"),
    "before": ("Does the {a} appear before the {b}?", "Is the {a} there before the {b}?"),
    "after": ("Does the {a} appear after the {b}?", "Is the {a} there after the {b}?"),
    "first": ("Which appears first, the {a} or the {b}?", "What is there first, the {a} or the {b}?"),
    "last": ("Which appears last, the {a} or the {b}?", "What is there last, the {a} or the {b}?"),
    "counting": ("How many times does the {r} appear?", "How many times can you see the {r}?", "Count the times of the {r}."),
    "static": PHRASES["colour"],
}  # fmt: skip
# what these questions say beyond `shapes.vocabulary()`; new ones go to the end, as checkpoints number them in this order
CLIP_WORDS = ("video", "appear", "appears", "before", "after", "first", "last", "times")


@dataclass(frozen=True)
class ClipQuestion:
    """A question with its one right answer.

    ``about`` are the things to look for, as a scorer is asked ("star", "red star"), ``actors`` their numbers in the clip and
    ``frames`` those that show one of them. Where the answer is no they are the needle that shares its shape or its colour.
    """

    text: str
    answer: str
    type: str
    about: tuple[str, ...]
    actors: tuple[int, ...]
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Actor:
    """An object and where it is: for every frame the (row, col) of its top left patch, None where it is not shown."""

    shape: str
    color: str
    size: str
    needle: bool
    places: tuple[tuple[int, int] | None, ...]
    jitter: tuple[int, int] = (0, 0)
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def frames(self) -> tuple[int, ...]:
        """Those that show it, ascending."""
        return tuple(t for t, place in enumerate(self.places) if place is not None)

    @property
    def times(self) -> int:
        """How often it comes into view: runs of frames that show it."""
        return sum(1 for t in self.frames if t == 0 or self.places[t - 1] is None)

    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def at(self, frame: int) -> PictureObject | None:
        place = self.places[frame]
        return None if place is None else PictureObject(self.shape, self.color, self.size, *place, self.jitter, self.tint)


@dataclass(frozen=True)
class Clip:
    """One clip and everything known about it."""

    seed: int
    split: str
    count: int
    actors: tuple[Actor, ...]
    background: dict[str, Any] = field(compare=False, hash=False, default_factory=dict)
    fps: int = FPS

    @property
    def needles(self) -> tuple[int, ...]:
        return tuple(i for i, actor in enumerate(self.actors) if actor.needle)

    def scene(self, frame: int) -> Scene:
        """One frame as a picture of the shape world; its objects are those of the actors that are shown, in order."""
        shown = tuple(o for o in (actor.at(frame) for actor in self.actors) if o is not None)
        return Scene(self.seed, self.split, CLIP_GRID, shown, None, self.background)

    def patches_of(self, actor: int, frame: int) -> list[int]:
        """Sorted raster indices of the patches that one actor covers in a frame, none where it is not shown."""
        if self.actors[actor].places[frame] is None:
            return []
        return self.scene(frame).patches_of(sum(a.places[frame] is not None for a in self.actors[:actor]))

    # -- pixels ------------------------------------------------------------------------------------------------
    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """The different frames, uint8 (D, H, W, 3), and for each frame of the clip which of them it is, (T,)."""
        known: dict[tuple[Any, ...], int] = {}
        arrays, which = [], []
        for t in range(self.count):
            scene = self.scene(t)
            if scene.objects not in known:
                known[scene.objects] = len(arrays)
                arrays.append(scene.array())
            which.append(known[scene.objects])
        return np.stack(arrays), np.asarray(which)

    def frames(self) -> np.ndarray:
        """The clip as uint8 (T, H, W, 3)."""
        arrays, which = self.pictures()
        return arrays[which]

    # -- words -------------------------------------------------------------------------------------------------
    def questions(self, n: int, types: Sequence[str] = CLIP_TYPES, salt: int = 0) -> list[ClipQuestion]:
        """Up to ``n`` different questions, the types in turn; fewer when the clip has no more to ask about."""
        rng = np.random.default_rng([scene_seed(self.seed, self.split), 5, self.count, salt])
        order = list(types)
        rng.shuffle(order)
        out: list[ClipQuestion] = []
        seen: set[str] = set()
        for turn in range(4 * max(n, len(order))):
            if len(out) >= n:
                break
            q = self._ask(order[turn % len(order)], rng)
            if q is not None and q.text not in seen:
                seen.add(q.text)
                out.append(q)
        return out

    def _ask(self, kind: str, rng: np.random.Generator) -> ClipQuestion | None:
        def pick(items: Sequence[Any]) -> Any:
            return items[int(rng.integers(len(items)))]

        def made(text: str, answer: str, about: tuple[str, ...], *actors: int) -> ClipQuestion:
            frames = sorted({t for i in actors for t in self.actors[i].frames})
            return ClipQuestion(text, answer, kind, about, actors, tuple(frames))

        if kind == "static":
            shapes = Counter(actor.shape for actor in self.actors)
            fit = [i for i, a in enumerate(self.actors) if not a.needle and shapes[a.shape] == 1]
            if not fit:
                return None
            i = pick(fit)
            one = self.actors[i]
            return made(pick(CLIP_PHRASES[kind]).format(r=one.shape), one.color, (one.shape,), i)
        if kind == "order":
            pairs = [(i, j) for i in self.needles for j in self.needles
                     if i != j and (self.actors[i].frames[-1] < self.actors[j].frames[0]
                                    or self.actors[j].frames[-1] < self.actors[i].frames[0])]  # fmt: skip
            if not pairs:
                return None
            i, j = pick(pairs)
            a, b = self.actors[i], self.actors[j]
            a_first = a.frames[0] < b.frames[0]
            way = pick(("before", "after", "first", "last"))
            text = pick(CLIP_PHRASES[way]).format(a=a.shape, b=b.shape)
            if way in ("before", "after"):
                answer = "yes" if a_first == (way == "before") else "no"
            else:
                answer = a.shape if a_first == (way == "first") else b.shape
            return made(text, answer, (a.shape, b.shape), i, j)
        i = pick(self.needles)
        one = self.actors[i]
        phrase = pick(CLIP_PHRASES[kind])
        if kind == "colour":
            return made(phrase.format(r=one.shape), one.color, (one.shape,), i)
        if kind == "shape":
            return made(phrase.format(r=f"{one.color} object"), one.shape, (f"{one.color} object",), i)
        if kind == "location":
            name = pick((one.shape, one.name()))
            return made(phrase.format(r=name), corner(one.at(one.frames[0])), (name,), i)
        if kind == "counting" and len(one.frames) > one.times:
            return None
        if kind == "counting":
            return made(phrase.format(r=one.shape), str(one.times), (one.shape,), i)
        if kind == "existence":
            if rng.random() < 0.5:
                return made(phrase.format(r=one.name()), "yes", (one.name(),), i)
            present = {(a.color, a.shape) for a in self.actors}
            # the thing asked for shares its shape or its colour with the needle, and often the other with something else
            near = [(one.color, s) for s in SHAPES] + [(c, one.shape) for c in COLORS]
            near = [p for p in near if p not in present]
            both = [p for p in near if any(a.color == p[0] for a in self.actors)
                    and any(a.shape == p[1] for a in self.actors)]  # fmt: skip
            name = " ".join(pick(both if both and rng.random() < 0.7 else near))
            return made(phrase.format(r=name), "no", (name,), i)
        raise ValueError(f"unknown question type {kind!r}")


def corner(thing: PictureObject) -> str:
    """Which quarter of the frame the middle of an object is in."""
    row, col = thing.center
    half = CLIP_GRID / 2
    return f"{'top' if row < half else 'bottom'} {'left' if col < half else 'right'}"


@lru_cache(maxsize=4096)
def make_clip(seed: int, split: str = "train", frames: int | None = None) -> Clip:
    """The clip with this seed; ``frames`` asks for so many (at least 8), None draws one of ``LENGTHS``."""
    if frames is not None and frames < LENGTHS[0]:
        raise ValueError(f"frames={frames}: at least {LENGTHS[0]}")
    rng = np.random.default_rng([scene_seed(seed, split), 4, frames or 0])
    count = int(rng.choice(LENGTHS)) if frames is None else frames
    gray = rng.uniform(70, 150)
    stripe = None
    if rng.random() < 0.5:
        stripe = {"angle": float(rng.uniform(0, np.pi)), "pitch": float(rng.uniform(0.08, 0.7)),
                  "height": float(rng.uniform(4, 14))}  # fmt: skip
    background = {"base": tuple(float(v) for v in gray + rng.uniform(-16, 16, 3)), "cells": int(rng.integers(3, 16)),
                  "contrast": float(rng.uniform(4, 18)), "stripe": stripe}  # fmt: skip
    shapes, colors = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLORS)).tolist()
    needles = int(rng.choice((1, 2, 3), p=(0.2, 0.5, 0.3)))
    taken: list[list[tuple[int, int, int, int]]] = [[] for _ in range(count)]
    actors: list[Actor] = []

    def free(place: tuple[int, int], side: int, when: Iterable[int]) -> bool:
        box = (*place, side, side)
        return all(_boxes_apart(box, taken[t], 1) for t in when)

    def put(shape: str, color: str, size: str, needle: bool, where: dict[int, tuple[int, int]]) -> None:
        side = SIZES[size]
        for t, place in where.items():
            taken[t].append((*place, side, side))
        actors.append(Actor(shape, color, size, needle, tuple(where.get(t) for t in range(count)),
                            tuple(int(v) for v in rng.integers(-1, 2, 2)),
                            tuple(int(v) for v in rng.integers(-14, 15, 3))))  # fmt: skip

    def somewhere(side: int) -> tuple[int, int]:
        return tuple(int(v) for v in rng.integers(0, CLIP_GRID - side + 1, 2))  # type: ignore[return-value]

    # the rest of the cast first: it is there for longer, and the needles take what room is left
    parts = np.array_split(np.arange(count), min(2 + count // 12, 6))
    for _ in range(int(rng.integers(1, 4))):
        shape, color = str(rng.choice(shapes[needles:])), str(rng.choice(colors[needles:]))
        size = str(rng.choice(list(SIZES), p=(0.6, 0.3, 0.1)))
        kind = str(rng.choice(("stays", "moves", "comes", "goes"), p=(0.4, 0.3, 0.15, 0.15)))
        first, end = {"comes": (len(parts) // 2, len(parts)), "goes": (0, len(parts) // 2)}.get(kind, (0, len(parts)))
        shown = [int(t) for part in parts[first:end] for t in part]
        side = SIZES[size]
        for _ in range(40):
            place = somewhere(side)
            if free(place, side, shown):
                break
        else:
            continue
        where = dict.fromkeys(shown, place)
        if kind == "moves":
            for part in parts[first + 1 : end]:
                step = rng.integers(-2, 3, 2)
                near = tuple(int(v) for v in np.clip(np.asarray(place) + step, 0, CLIP_GRID - side))
                place = near if free(near, side, part.tolist()) else place  # type: ignore[assignment]
                where.update(dict.fromkeys(part.tolist(), place))
        put(shape, color, size, False, where)
    for shape, color in zip(shapes[:needles], colors[:needles], strict=True):
        times = int(rng.choice(range(1, MOST_TIMES + 1), p=(0.4, 0.25, 0.2, 0.15)))
        times = min(times, count // 4)
        long = 2 if rng.random() < 0.3 and times == 1 else 1
        shown = _moments(rng, count, times, long)
        for attempt in range(200):
            # late attempts are for crowded clips: the smallest size finds a place
            size = "small" if attempt >= 40 or rng.random() < 0.65 else "medium"
            side = SIZES[size]
            place = somewhere(side)
            if min(abs(v + side / 2 - CLIP_GRID / 2) for v in place) >= 1.5 and free(place, side, shown):
                put(shape, color, size, True, dict.fromkeys(shown, place))
                break
    order = rng.permutation(len(actors))
    clip = Clip(seed, split, count, tuple(actors[i] for i in order), background)
    if not clip.needles:
        raise RuntimeError(f"no room for a needle in clip {seed} of {split}")
    return clip


def _moments(rng: np.random.Generator, count: int, times: int, long: int) -> list[int]:
    """Frames of ``times`` runs of ``long`` frames with at least one frame between them, all ways alike."""
    slack = count - times * long - (times - 1)
    cuts = np.sort(rng.integers(0, slack + 1, times))
    starts = cuts + np.arange(times) * (long + 1)
    return [int(s) + k for s in starts for k in range(long)]


def _frames(seed: int, split: str, frames: int | None) -> np.ndarray:
    return make_clip(seed, split, frames).frames()


def render_clips(seeds: Iterable[int], split: str = "train", frames: int | None = None, workers: int = 0) -> list[np.ndarray]:
    """Clips as uint8 arrays (T, H, W, 3), drawn by ``workers`` processes (0: in this one)."""
    draw = partial(_frames, split=split, frames=frames)
    if workers <= 0:
        return [draw(s) for s in seeds]
    # A fork of a process whose maths library has threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(draw, seeds, chunksize=4))


def write_clip(frames: np.ndarray, path: str | Path, fps: int = FPS, quality: int = 10) -> None:
    """Write uint8 frames (T, H, W, 3) as H.264 in mp4, through PyAV.

    Parameters:
        quality: x264's constant rate factor, 0 (without loss but for the chroma) to 51.
    """
    import av

    path = Path(path)
    part = path.with_name(path.name + ".part")
    with av.open(str(part), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(quality), "preset": "slow"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    os.replace(part, path)
