"""What lmms-eval needs for the video world's tasks; loaded by its path, as `shapes.py` is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FOLDER = "VTPRUNE_TASKS"
# things that flash up for a frame or two, and what happens in which order or how often
GROUPS = {"needle": ("colour", "shape", "existence", "location"), "story": ("order", "counting", "static")}


def folder() -> Path:
    """Where `python -m evaluations.tasks.make` wrote: $VTPRUNE_TASKS, or `data` beside this file."""
    return Path(os.environ.get(FOLDER) or Path(__file__).parent / "data")


def __getattr__(name: str) -> dict[str, str]:
    """`!function clips.needle` in a yaml: the parquet file of that group, as `data_files` of a dataset.

    Raises:
        SystemExit: if it was not made yet.
    """
    if name not in GROUPS:
        raise AttributeError(name)
    path = folder() / f"clips-{name}.parquet"
    if not path.is_file():
        raise SystemExit(
            f"error: the questions of task clips_{name} are not there. Make them: python -m evaluations.tasks.make --clips 40 "
            f"(in a checkout of vtprune; another folder by --out, which {FOLDER} then has to name)."
        )
    return {"test": str(path)}


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    return [str(folder() / doc["video"])]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return doc["question"]


def doc_to_target(doc: dict[str, Any]) -> str:
    return doc["answer"]


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the very answer, white space around it aside."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
