"""The questions of the offline tasks as parquet files, the same for the same number of questions.

    python -m evaluations.tasks.make --questions 500 --clips 40

The pictures and their questions are those that the leaderboard asks with `--questions` of the same number.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evaluations.tasks import clips, shapes
from evaluations.tiny.asking import Asked, pictures
from evaluations.worlds.clips import make_clip, write_clip

# as many frames as the plugin takes of a video unless told otherwise, so that it sees every one
FRAMES = 32
PER_CLIP = 6


def question_rows(asked: Iterable[Asked]) -> dict[str, list[dict[str, Any]]]:
    """Rows by question type: question, answer, image (PNG), and the picture's number."""
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in shapes.TYPES}
    for one in asked:
        buffer = io.BytesIO()
        one.image.save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        for question in one.questions:
            rows[question.type].append(
                {"question": question.text, "answer": question.answer, "picture": one.scene.seed, "image": image}
            )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
    """A parquet file that `datasets` reads back with its pictures, whole or not at all."""
    from datasets import Dataset, Features

    # in memory: a generator would leave a copy in the cache of datasets
    made = Dataset.from_list(rows, features=Features(features))
    write_whole(path, lambda part: made.to_parquet(str(part)))


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a neighbour of `path`, then put it in place."""
    handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save(Path(part))
        Path(part).chmod(0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def make_shapes(questions: int, out: Path) -> dict[str, int]:
    """Write one file per question type; how many questions each holds.

    Parameters:
        questions: at least so many, those about a printed word not counted.
    """
    from datasets import Image, Value

    features = {"question": Value("string"), "answer": Value("string"), "picture": Value("int64"), "image": Image()}
    out.mkdir(parents=True, exist_ok=True)
    rows = question_rows(pictures(questions))
    for kind, found in rows.items():
        write_rows(out / f"shapes-{kind}.parquet", found, features)
    return {kind: len(found) for kind, found in rows.items()}


def make_clips(count: int, out: Path) -> dict[str, int]:
    """Write `count` held-out clips as video files, and one parquet file per group of questions about them.

    Returns:
        How many questions each group holds.
    """
    from datasets import Value

    features = {name: Value("string") for name in ("question", "answer", "type", "video")}
    (out / "clips").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in clips.GROUPS}
    for seed in range(count):
        clip = make_clip(seed, "test", FRAMES)
        name = f"clips/{seed:04d}.mp4"
        write_clip(clip.frames(), out / name)
        for group, types in clips.GROUPS.items():
            for question in clip.questions(PER_CLIP // len(clips.GROUPS), types=types):
                rows[group].append({"question": question.text, "answer": question.answer, "type": question.type, "video": name})
    for group, found in rows.items():
        write_rows(out / f"clips-{group}.parquet", found, features)
    return {group: len(found) for group, found in rows.items()}


def main() -> None:
    """Entry point of `python -m evaluations.tasks.make`."""
    parser = argparse.ArgumentParser(description="Make the questions of vtprune's offline lmms-eval tasks.")
    parser.add_argument("--questions", type=int, default=500, help="at least so many about pictures, reading not counted")
    parser.add_argument("--out", type=Path, help=f"default: ${shapes.FOLDER}, or evaluations/tasks/data")
    parser.add_argument("--clips", type=int, default=0, help="videos with 6 questions each; PyAV writes them")
    given = parser.parse_args()
    if given.questions < 1 or given.clips < 0:
        parser.error("--questions: at least 1; --clips: at least 0.")
    out = given.out or shapes.folder()
    for kind, count in make_shapes(given.questions, out).items():
        print(f"shapes_{kind}: {count} questions")
    if given.clips:
        for group, count in make_clips(given.clips, out).items():
            print(f"clips_{group}: {count} questions")


if __name__ == "__main__":
    main()
