"""The examples: shipped pictures with questions of every type, written down as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from vtprune import embedded
from vtprune.video import open_video


@dataclass(frozen=True)
class Example:
    """A picture's name, a question about it, and the question's type; `alt` describes the picture."""

    picture: str
    question: str
    type: str
    alt: str = ""

    @property
    def label(self) -> str:
        return f"{self.type}: {self.question}"


@lru_cache(maxsize=1)
def examples() -> tuple[Example, ...]:
    """All of them, in the file's order."""
    data = json.loads((Path(__file__).parent / "gallery.json").read_text(encoding="utf-8"))
    return tuple(Example(**entry) for entry in data)


def names() -> list[str]:
    """The pictures and clips that have examples, in order."""
    known = {**embedded.pictures(), **embedded.clips()}
    return [name for name in dict.fromkeys(example.picture for example in examples()) if name in known]


def still() -> list[str]:
    """The pictures among them."""
    return [name for name in names() if name in embedded.pictures()]


def pictures() -> list[tuple[str | Image.Image, str]]:
    """(picture, description) of each; of a clip its first frame."""
    shipped, clips = embedded.pictures(), embedded.clips()
    return [(str(shipped[name]) if name in shipped else _first(clips[name]), alt(name)) for name in names()]


def _first(clip: Path) -> Image.Image:
    """A clip's first frame with a sign that it moves."""
    frame = next(iter(open_video(clip).frames(times=[0.0]))).image.copy()
    side = min(frame.size)
    x, y, r = frame.width / 2, frame.height / 2, side / 5
    draw = ImageDraw.Draw(frame)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(0, 0, 0), outline=(255, 255, 255), width=max(1, side // 60))
    draw.polygon([(x - r / 3, y - r / 2), (x - r / 3, y + r / 2), (x + r / 2, y)], fill=(255, 255, 255))
    return frame


def alt(name: str) -> str:
    """What is to be seen in a shipped picture."""
    return next((e.alt for e in examples() if e.picture == name and e.alt), name)


def of(name: str) -> list[Example]:
    """The examples of one picture."""
    return [example for example in examples() if example.picture == name]
