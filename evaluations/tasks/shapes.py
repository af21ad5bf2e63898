"""What lmms-eval needs for the picture world's tasks: where the questions are, how they are put and graded.

lmms-eval loads this file by its path, from any folder, so it imports nothing of its neighbours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FOLDER = "VTPRUNE_TASKS"
TYPES = ("colour", "shape", "existence", "counting", "location", "relation", "reading")


def folder() -> Path:
    """Where `python -m evaluations.tasks.make` wrote: $VTPRUNE_TASKS, or `data` beside this file."""
    return Path(os.environ.get(FOLDER) or Path(__file__).parent / "data")


def __getattr__(name: str) -> dict[str, list[str]]:
    """`!function shapes.colour` in a yaml: the parquet file of that question type, as `data_files` of a dataset;
    `shapes.graded` those of all types but reading.

    Raises:
        SystemExit: if they were not made yet; lmms-eval would end with exit code 0 after any other error.
    """
    if name not in (*TYPES, "graded"):
        raise AttributeError(name)
    kinds = [kind for kind in TYPES if kind != "reading"] if name == "graded" else [name]
    paths = [folder() / f"shapes-{kind}.parquet" for kind in kinds]
    if not all(path.is_file() for path in paths):
        raise SystemExit(
            f"error: the questions of task shapes_{'all' if name == 'graded' else name} are not there. Make them: "
            f"python -m evaluations.tasks.make (in a checkout of vtprune; another folder by --out, which {FOLDER} then has to "
            f"name)."
        )
    return {"test": [str(path) for path in paths]}


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return doc["question"]


def doc_to_target(doc: dict[str, Any]) -> str:
    return doc["answer"]


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the very answer, white space around it aside, as the leaderboard grades."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
