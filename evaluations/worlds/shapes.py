"""The shape world: pictures of coloured shapes and short printed words, with questions about them.

Every picture is a pure function of ``(seed, split, grid, packed)``. Objects sit on the 14-px patch raster (with a jitter
of one pixel), so the patches that carry each of them are known exactly: that is what an oracle selection needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PATCH = 14
GRID = 24
SPLITS = ("train", "val", "test")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 160, 50),
    "blue": (35, 65, 220),
    "yellow": (245, 220, 35),
    "purple": (150, 45, 190),
    "cyan": (50, 215, 225),
    "white": (250, 250, 250),
}
SIZES: dict[str, int] = {"small": 2, "medium": 3, "large": 5}  # side in patches
SIZE_ODDS = {"small": 0.55, "medium": 0.27, "large": 0.18}
WORDS = (
    "cat", "dog", "sun", "box", "map", "key", "bus", "cup", "hat", "pen", "fox", "jam", "ice", "owl", "van", "zip",
    "milk", "farm", "book", "fish", "door", "lamp", "tree", "ship", "quiz", "gold", "wave", "park", "blue", "open",
)  # fmt: skip
TYPES = ("colour", "shape", "existence", "counting", "location", "relation", "reading")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

PHRASES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What color is the {r}?", "What is the color of the {r}?", "Which color does the {r} have?",
        "Tell me the color of the {r}.",
    ),
    "shape": (
        "What shape is the {r}?", "What is the shape of the {r}?", "Which shape does the {r} have?",
        "Tell me the shape of the {r}.",
    ),
    "existence": (
        "Is there a {r} in the picture?", "Is there a {r}?", "Does the picture show a {r}?", "Can you see a {r}?",
    ),
    "counting": (
        "How many {r} are there?", "How many {r} are in the picture?", "How many {r} can you see?", "Count the {r}.",
    ),
    "location": (
        "Where is the {r}?", "In which corner is the {r}?", "Where in the picture is the {r}?",
        "Which part of the picture shows the {r}?",
    ),
    "relation": (
        "Is the {a} {d} the {b}?", "Can you see the {a} {d} the {b}?", "Does the picture show the {a} {d} the {b}?",
    ),
    "choice": (
        "Is the {a} {d} or {e} the {b}?", "Which is true: the {a} is {d} or {e} the {b}?",
    ),
    "reading": (
        "What word is written in the picture?", "What does the text say?", "Which word can you read?", "Read the word.",
    ),
}  # fmt: skip
DIRECTION_WORDS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}


def vocabulary() -> list[str]:
    """Every lower-case word the world can say, sorted: what the tokenizer needs as whole tokens."""
    text = " ".join(p for group in PHRASES.values() for p in group) + " " + " ".join(DIRECTION_WORDS.values())
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w\}", " ", text.lower())))
    words |= set(SHAPES) | {s + ("es" if s == "cross" else "s") for s in SHAPES} | set(COLORS) | set(SIZES) | set(WORDS)
    more = (
        "yes no object objects top bottom left right above below "
        "a an and the of with word picture nothing user assistant system"
    )
    words |= {str(i) for i in range(10)} | set(more.split())
    return sorted(words)


def scene_seed(seed: int, split: str) -> int:
    """The number that seeds the generator; no two splits can ever share one."""
    if seed < 0:
        raise ValueError("seed must be >= 0")
    return seed * len(SPLITS) + SPLITS.index(split)


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; ``about`` are the indices of the objects concerned, -1 the printed word."""

    text: str
    answer: str
    type: str
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class PictureObject:
    """A coloured shape in a square of ``side`` x ``side`` patches whose top left patch is ``(row, col)``."""

    shape: str
    color: str
    size: str
    row: int
    col: int
    jitter: tuple[int, int] = (0, 0)
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def side(self) -> int:
        return SIZES[self.size]

    @property
    def center(self) -> tuple[float, float]:
        """(row, col) of the middle, in patches."""
        return self.row + self.side / 2, self.col + self.side / 2

    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class PrintedWord:
    """A word on a pale label; each letter takes one patch in width and two in height."""

    text: str
    row: int
    col: int


@lru_cache(maxsize=512)
def _mask(shape: str, side: int, jitter: tuple[int, int]) -> np.ndarray:
    """Coverage in [0, 1] of a shape over its square, drawn four times as large and averaged down."""
    n, up = side * PATCH, 4
    big = Image.new("L", (n * up, n * up), 0)
    draw = ImageDraw.Draw(big)
    lo, hi = 1.5 * up, (n - 1.5) * up
    dx, dy = jitter[0] * up, jitter[1] * up
    mid, rad = (lo + hi) / 2, (hi - lo) / 2

    def box(f: float) -> list[float]:
        return [
            mid - f * rad + dx,
            mid - f * rad + dy,
            mid + f * rad + dx,
            mid + f * rad + dy,
        ]

    if shape == "circle":
        draw.ellipse(box(1), fill=255)
    elif shape == "square":
        draw.rectangle(box(0.94), fill=255)
    elif shape == "triangle":
        draw.polygon([(mid + dx, lo + dy), (lo + dx, hi + dy), (hi + dx, hi + dy)], fill=255)
    elif shape == "cross":
        w = 0.28 * rad
        draw.rectangle([mid - w + dx, lo + dy, mid + w + dx, hi + dy], fill=255)
        draw.rectangle([lo + dx, mid - w + dy, hi + dx, mid + w + dy], fill=255)
    elif shape == "ring":
        draw.ellipse(box(1), fill=255)
        draw.ellipse(box(0.56), fill=0)
    elif shape == "star":
        angles = [np.pi * (0.2 * k - 0.5) for k in range(10)]
        radii = [rad * (1.05 if k % 2 == 0 else 0.42) for k in range(10)]
        draw.polygon(
            [(mid + dx + r * np.cos(a), mid + dy + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)],
            fill=255,
        )
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return np.asarray(big.resize((n, n), Image.Resampling.BOX), dtype=np.float32) / 255


@lru_cache(maxsize=512)
def _covered(shape: str, side: int, jitter: tuple[int, int]) -> np.ndarray:
    """Which patches of the square the shape really touches (a ring has a hole, a star has empty corners)."""
    mask = _mask(shape, side, jitter).reshape(side, PATCH, side, PATCH).mean((1, 3))
    return mask > 0.03


@lru_cache(maxsize=64)
def _letter(char: str) -> np.ndarray:
    """Coverage of one letter over 28 x 14 px; the font ships with Pillow, so it is the same on every machine."""
    up = 4
    font = ImageFont.load_default(size=18 * up)
    big = Image.new("L", (PATCH * up, 2 * PATCH * up), 0)
    ImageDraw.Draw(big).text((PATCH * up / 2, PATCH * up), char.upper(), font=font, fill=255, anchor="mm",
                             stroke_width=2)  # fmt: skip
    return np.asarray(big.resize((PATCH, 2 * PATCH), Image.Resampling.BOX), dtype=np.float32) / 255


@dataclass(frozen=True)
class Scene:
    """One picture of the world and everything known about it."""

    seed: int
    split: str
    grid: int
    objects: tuple[PictureObject, ...]
    word: PrintedWord | None
    background: dict[str, Any] = field(compare=False, hash=False, default_factory=dict)

    # -- pixels ------------------------------------------------------------------------------------------------
    def array(self) -> np.ndarray:
        """The picture as uint8 (H, W, 3)."""
        n = self.grid * PATCH
        rng = np.random.default_rng([scene_seed(self.seed, self.split), 2])
        base = np.asarray(self.background["base"], dtype=np.float32)
        cells = int(self.background["cells"])
        coarse = rng.normal(0, self.background["contrast"], (cells, cells)).astype(np.float32)
        soft = Image.fromarray(coarse).resize((n, n), Image.Resampling.BICUBIC)
        picture = base + np.asarray(soft)[..., None]
        stripe = self.background["stripe"]
        if stripe:
            y, x = np.mgrid[:n, :n].astype(np.float32)
            wave = np.sin((x * np.cos(stripe["angle"]) + y * np.sin(stripe["angle"])) * stripe["pitch"])
            picture += stripe["height"] * wave[..., None]
        for obj in self.objects:
            m = _mask(obj.shape, obj.side, obj.jitter)[..., None]
            r, c, s = obj.row * PATCH, obj.col * PATCH, obj.side * PATCH
            paint = np.asarray(COLORS[obj.color], dtype=np.float32) + np.asarray(obj.tint, dtype=np.float32)
            picture[r : r + s, c : c + s] = picture[r : r + s, c : c + s] * (1 - m) + paint * m
        if self.word is not None:
            letters = np.concatenate([_letter(ch) for ch in self.word.text], 1)[..., None]
            r, c = self.word.row * PATCH, self.word.col * PATCH
            h, w = letters.shape[:2]
            picture[r : r + h, c : c + w] = 225 * (1 - letters) + 10 * letters
        grain = rng.integers(-9, 10, (n, n, 1), dtype=np.int8)
        return np.clip(picture + grain, 0, 255).astype(np.uint8)

    def image(self) -> Image.Image:
        return Image.fromarray(self.array())

    # -- where things are --------------------------------------------------------------------------------------
    def patches_of(self, index: int) -> list[int]:
        """Sorted raster indices of the patches one object covers; index -1 is the printed word."""
        if index == -1:
            if self.word is None:
                return []
            w = self.word
            return [r * self.grid + c for r in range(w.row, w.row + 2) for c in range(w.col, w.col + len(w.text))]
        o = self.objects[index]
        rows, cols = np.nonzero(_covered(o.shape, o.side, o.jitter))
        return sorted(int((o.row + r) * self.grid + o.col + c) for r, c in zip(rows, cols, strict=True))

    def object_patches(self) -> list[int]:
        """Sorted raster indices of every patch an object covers (words not included)."""
        return sorted({p for i in range(len(self.objects)) for p in self.patches_of(i)})

    def word_patches(self) -> list[int]:
        return self.patches_of(-1)

    # -- words -------------------------------------------------------------------------------------------------
    def caption(self, rng: np.random.Generator | None = None, most: int = 8) -> str:
        """What is in the picture; with a generator, only some of it and in a drawn order."""
        order = list(range(len(self.objects)))
        with_word = self.word is not None
        if rng is not None:
            rng.shuffle(order)
            order = order[: int(rng.integers(1, most + 1))]
            with_word = with_word and rng.random() < 0.4
        parts = [f"a {self.objects[i].size} {self.objects[i].name()}" for i in order]
        if with_word and self.word is not None:
            parts.append(f"the word {self.word.text}")
        return " and ".join(parts) if parts else "nothing"

    def _references(self) -> list[list[str]]:
        """For each object the noun phrases that fit it alone, the full name first."""
        names = Counter(o.name() for o in self.objects)
        shapes = Counter(o.shape for o in self.objects)
        colors = Counter(o.color for o in self.objects)
        out = []
        for o in self.objects:
            refs = [o.name()] if names[o.name()] == 1 else []
            if refs and shapes[o.shape] == 1:
                refs.append(o.shape)
            if refs and colors[o.color] == 1:
                refs.append(f"{o.color} object")
            out.append(refs)
        return out

    def questions(self, n: int, types: Sequence[str] = TYPES, salt: int = 0) -> list[Question]:
        """Up to ``n`` different questions, the types in turn; fewer when the picture has no more to ask about."""
        rng = np.random.default_rng([scene_seed(self.seed, self.split), 3, salt])
        order = list(types)
        rng.shuffle(order)
        out: list[Question] = []
        seen: set[tuple[str, str]] = set()
        for turn in range(4 * max(n, len(order))):
            if len(out) >= n:
                break
            q = self._ask(order[turn % len(order)], rng)
            if q is not None and (q.text, q.type) not in seen:
                seen.add((q.text, q.type))
                out.append(q)
        return out

    def _ask(self, kind: str, rng: np.random.Generator) -> Question | None:
        def pick(items: Sequence[Any]) -> Any:
            return items[int(rng.integers(len(items)))]

        phrase = pick(PHRASES[kind])
        if kind == "reading":
            return None if self.word is None else Question(phrase, self.word.text, kind, (-1,))
        if not self.objects:
            return None
        if kind in ("colour", "shape"):
            attr = "shape" if kind == "colour" else "color"
            counts = Counter(getattr(o, attr) for o in self.objects)
            fit = [i for i, o in enumerate(self.objects) if counts[getattr(o, attr)] == 1]
            if not fit:
                return None
            i = pick(fit)
            o = self.objects[i]
            if kind == "colour":
                return Question(phrase.format(r=o.shape), o.color, kind, (i,))
            return Question(phrase.format(r=f"{o.color} object"), o.shape, kind, (i,))
        if kind == "existence":
            i = pick(range(len(self.objects)))
            o = self.objects[i]
            if rng.random() < 0.5:
                return Question(phrase.format(r=o.name()), "yes", kind, (i,))
            present = {(p.color, p.shape) for p in self.objects}
            # Adversarial: the thing asked for shares its colour or its shape with a thing that is there. Where both
            # its colour and its shape occur (on different objects), so much the better.
            near = [(o.color, s) for s in SHAPES] + [(c, o.shape) for c in COLORS]
            near = [p for p in near if p not in present]
            both = [p for p in near if any(q.color == p[0] for q in self.objects)
                    and any(q.shape == p[1] for q in self.objects)]  # fmt: skip
            color, shape = pick(both if both and rng.random() < 0.5 else near)
            about = tuple(k for k, p in enumerate(self.objects) if p.color == color or p.shape == shape)
            return Question(phrase.format(r=f"{color} {shape}"), "no", kind, about)
        if kind == "counting":
            groups: dict[str, list[int]] = {}
            for i, o in enumerate(self.objects):
                groups.setdefault(o.shape + ("es" if o.shape == "cross" else "s"), []).append(i)
                groups.setdefault(f"{o.color} objects", []).append(i)
            if rng.random() < 0.3:
                return Question(phrase.format(r="objects"), str(len(self.objects)), kind,
                                tuple(range(len(self.objects))))  # fmt: skip
            # First the number, then the group: otherwise nearly every answer would be 1.
            count = pick(sorted({len(v) for v in groups.values()}))
            ref = pick(sorted(k for k, v in groups.items() if len(v) == count))
            return Question(phrase.format(r=ref), str(count), kind, tuple(groups[ref]))
        refs = self._references()
        named = [i for i, r in enumerate(refs) if r]
        if kind == "location":
            half = self.grid / 2
            fit = [i for i in named if min(abs(x - half) for x in self.objects[i].center) >= 1.5]
            if not fit:
                return None
            i = pick(fit)
            row, col = self.objects[i].center
            answer = f"{'top' if row < half else 'bottom'} {'left' if col < half else 'right'}"
            return Question(phrase.format(r=pick(refs[i])), answer, kind, (i,))
        if kind == "relation":
            pairs = []
            for i in named:
                for j in named:
                    (ri, ci), (rj, cj) = self.objects[i].center, self.objects[j].center
                    if i != j and abs(ci - cj) >= 4:
                        pairs.append((i, j, "left" if ci < cj else "right"))
                    if i != j and abs(ri - rj) >= 4:
                        pairs.append((i, j, "above" if ri < rj else "below"))
            if not pairs:
                return None
            i, j, true = pick(pairs)
            a, b = pick(refs[i]), pick(refs[j])
            flip = rng.random() < 0.5
            said = OPPOSITE[true] if flip else true
            if rng.random() < 0.4:
                text = pick(PHRASES["choice"]).format(a=a, b=b, d=_bare(said), e=DIRECTION_WORDS[OPPOSITE[said]])
                return Question(text, true, kind, (i, j))
            return Question(
                phrase.format(a=a, b=b, d=DIRECTION_WORDS[said]),
                "no" if flip else "yes",
                kind,
                (i, j),
            )
        raise ValueError(f"unknown question type {kind!r}")


def _bare(direction: str) -> str:
    return f"to the {direction}" if direction in ("left", "right") else direction


def _boxes_apart(box: tuple[int, int, int, int], others: list[tuple[int, int, int, int]], gap: int) -> bool:
    r, c, h, w = box
    return all(r + h + gap <= r2 or r2 + h2 + gap <= r or c + w + gap <= c2 or c2 + w2 + gap <= c
               for r2, c2, h2, w2 in others)  # fmt: skip


def make_scene(seed: int, split: str = "train", grid: int = GRID, packed: int | None = None) -> Scene:
    """The picture with this seed. ``packed`` asks for that many objects (for training the encoder on small grids)."""
    rng = np.random.default_rng([scene_seed(seed, split), 1, grid, packed or 0])
    gray = rng.uniform(70, 150)
    base = gray + rng.uniform(-16, 16, 3)
    stripe = None
    if rng.random() < 0.5:
        stripe = {"angle": float(rng.uniform(0, np.pi)), "pitch": float(rng.uniform(0.08, 0.7)),
                  "height": float(rng.uniform(4, 14))}  # fmt: skip
    background = {"base": tuple(float(v) for v in base), "cells": int(rng.integers(3, 28)),
                  "contrast": float(rng.uniform(4, 18)), "stripe": stripe}  # fmt: skip
    taken: list[tuple[int, int, int, int]] = []

    def place(h: int, w: int) -> tuple[int, int] | None:
        for _ in range(40):
            r, c = (
                int(rng.integers(0, grid - h + 1)),
                int(rng.integers(0, grid - w + 1)),
            )
            if _boxes_apart((r, c, h, w), taken, 1 if packed is None else 0):
                taken.append((r, c, h, w))
                return r, c
        return None

    word = None
    if rng.random() < 0.6:
        text = WORDS[int(rng.integers(len(WORDS)))]
        where = place(2, len(text))
        if where is not None:
            word = PrintedWord(text, *where)
    count = int(rng.integers(1, 9)) if packed is None else packed
    names, odds = list(SIZE_ODDS), list(SIZE_ODDS.values())
    sizes = sorted(
        (names[int(rng.choice(3, p=odds))] for _ in range(count)),
        key=lambda s: -SIZES[s],
    )
    objects = []
    colors = list(COLORS)
    # One large, two medium and five small objects are 63 patches: an oracle with a budget of 64 tokens can keep all.
    room = {"large": 1, "medium": 2, "small": 8}
    for drawn in sizes:
        size = drawn
        if packed is None:
            size = drawn if room[drawn] else "small"
            room[size] -= 1
        where = place(SIZES[size], SIZES[size])
        if where is None:
            continue
        objects.append(PictureObject(
            SHAPES[int(rng.integers(len(SHAPES)))], colors[int(rng.integers(len(colors)))], size, *where,
            jitter=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            tint=tuple(int(v) for v in rng.integers(-14, 15, 3)),
        ))  # fmt: skip
    order = rng.permutation(len(objects))
    return Scene(seed, split, grid, tuple(objects[i] for i in order), word, background)


def _render(job: tuple[int, str, int, int | None]) -> np.ndarray:
    return make_scene(*job).array()


def render_many(
    seeds: Iterable[int],
    split: str = "train",
    grid: int = GRID,
    packed: int | None = None,
    workers: int = 0,
) -> np.ndarray:
    """Pictures as one uint8 array (N, H, W, 3), drawn by ``workers`` processes (0: in this one)."""
    jobs = [(s, split, grid, packed) for s in seeds]
    if workers <= 0:
        return np.stack([_render(j) for j in jobs])
    # A fork of a process whose maths library has threads can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return np.stack(list(pool.map(_render, jobs, chunksize=max(1, len(jobs) // (4 * workers)))))
