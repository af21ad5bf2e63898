"""A calibration set for the tiny model: pictures of the `train` split with questions about them.

    python -m evaluations.tiny.calibration --questions 96 --out calibration

Writes PNG files and a `questions.jsonl`, as `vtprune search` reads them. No picture of it is in the `test` split.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from evaluations.worlds import TYPES, make_scene

# far from the seeds that training starts with; still its split, so disjoint from `val` and `test`
FIRST = 5_000_000
PER_PICTURE = 4
GRADED = tuple(t for t in TYPES if t != "reading")


def write(folder: Path, questions: int, per_picture: int = PER_PICTURE, first: int = FIRST) -> int:
    """Fill `folder`; returns the number of pictures.

    Parameters:
        questions: how many, of all types but reading in turn; per_picture: at most so many about one picture.
        first: seed of the first picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    seed, pictures = first, 0
    while len(lines) < questions:
        scene = make_scene(seed, "train")
        asked = scene.questions(min(per_picture, questions - len(lines)), types=GRADED, salt=7)
        if asked:
            name = f"train-{seed}.png"
            scene.image().save(folder / name)
            pictures += 1
            lines += [json.dumps({"image": name, "question": q.text, "answer": q.answer, "type": q.type}) for q in asked]
        seed += 1
    part = folder / "questions.jsonl.part"
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, folder / "questions.jsonl")
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--per-picture", type=int, default=PER_PICTURE)
    parser.add_argument("--first", type=int, default=FIRST, help="seed of the first picture")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.questions < 1 or args.per_picture < 1 or args.first < 0:
        parser.error("--questions and --per-picture must be at least 1, --first at least 0")
    pictures = write(args.out, args.questions, args.per_picture, args.first)
    print(f"{args.questions} questions about {pictures} pictures in {args.out}")


if __name__ == "__main__":
    main()
