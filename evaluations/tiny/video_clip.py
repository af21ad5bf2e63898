"""Writes the clip that travels with the package, and beside it its questions with answers.

python -m evaluations.tiny.video_clip
"""

from __future__ import annotations

import json
from pathlib import Path

from ..worlds import make_clip, write_clip
from .model import ROOT

SEED, FRAMES = 75, 32
FOLDER = ROOT / "assets" / "clips"
# of the questions about the clip, those of these texts
TEXTS = (
    "What color is the star?",
    "What shape is the purple object?",
    "Where is the star?",
    "What color is the circle?",
    "How many times does the circle appear?",
)


def main(folder: Path = FOLDER) -> None:
    clip = make_clip(SEED, "test", FRAMES)
    asked = {q.text: q for salt in range(40) for q in clip.questions(20, salt=salt)}
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(clip.frames(), folder / "needle.mp4", clip.fps)
    told = {
        "clip": "needle.mp4", "seed": SEED, "split": "test", "frames": FRAMES, "fps": clip.fps,
        "questions": [{"question": t, "answer": asked[t].answer, "type": asked[t].type, "about": list(asked[t].about),
                       "frames": list(asked[t].frames)} for t in TEXTS],
    }  # fmt: skip
    part = folder / "needle.json.part"
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "needle.json")


if __name__ == "__main__":
    main()
