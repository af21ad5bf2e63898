"""Accuracy of the tiny model under every strategy and budget, measured through vtprune's public API.

    python -m evaluations.tiny.table --questions 2000 --json results/tiny.json

Each answer is a real `generate` on the wrapped model, greedy, scored by exact match. Questions about one picture share
its image features; they are a batch of their own, left-padded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import vtprune
from evaluations.tiny.asking import CHECKPOINT, GRADED, Asked, answers, batch, load, pictures, write
from evaluations.tiny.oracle import Oracle
from evaluations.worlds import GRID, PATCH, TYPES
from vtprune.pruner import BudgetError, Pruner

BUDGETS = (192, 128, 64, 32)
# the rows that the model's bars are about
BARS = {("unpruned", 576), ("noise", 576), ("oracle", 64), ("random", 64), ("random", 32)}


@dataclass
class Row:
    """One line of the table: a strategy at a budget, built anew for every picture."""

    name: str
    budget: int
    build: Callable[[Asked, int], Pruner | None]
    noise: bool = False
    positions: str | None = None
    hits: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[float] = field(default_factory=list)
    refused: str = ""


def rows() -> list[Row]:
    """What stands in the table."""
    made = [Row("unpruned", GRID * GRID, lambda asked, at: None), Row("noise", GRID * GRID, lambda a, i: None, noise=True)]
    for k in BUDGETS:
        made += [
            Row("oracle", k, lambda asked, at, k=k: Oracle(keep=k, wanted=[asked.wanted(q) for q in asked.questions], seed=at)),
            Row("random", k, lambda asked, at, k=k: vtprune.Random(keep=k, seed=at)),
            Row("uniform", k, lambda asked, at, k=k: vtprune.Uniform(keep=k)),
            Row("flowcut", k, lambda asked, at, k=k: vtprune.FlowCut(keep=k)),
            Row("flowcut, original positions", k, lambda asked, at, k=k: vtprune.FlowCut(keep=k), positions="original"),
            Row("fastv", k, lambda asked, at, k=k: vtprune.FastV(keep=k, layer=1)),
            Row("fastv, left after layer 2", k, lambda asked, at, k=k: vtprune.FastV(after=k, layer=2)),
        ]
    return made


def measure(folder: Path, questions: int, only: set[str] | None = None, few: int = 0) -> dict:
    """All rows over the same pictures.

    Parameters:
        folder: the checkpoint. questions: at least so many, reading not counted. only: names of rows.
        few: rows outside `BARS` use only so many questions (0: all).
    """
    model, processor = load(folder)
    asked = pictures(questions)
    enough, total = 0, 0
    while few and total < few and enough < len(asked):
        total += sum(q.type != "reading" for q in asked[enough].questions)
        enough += 1
    table = [r for r in rows() if only is None or r.name in only]
    with Progress(console=Console(stderr=True)) as progress:
        for row in table:
            short = few and (row.name, row.budget) not in BARS
            todo = asked[:enough] if short else asked
            for at, one in enumerate(progress.track(todo, description=f"{row.name} {row.budget}")):
                if row.refused:
                    break
                _ask(model, processor, row, one, at)
    counts = Counter(q.type for a in asked for q in a.questions)
    return {
        "folder": folder.name,
        "pictures": len(asked),
        "questions": dict(counts),
        "rows": [_summary(row) for row in table],
        "versions": {"vtprune": vtprune.__version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


def _ask(model, processor, row: Row, one: Asked, at: int) -> None:
    image = None
    if row.noise:
        noise = np.random.default_rng([9, one.scene.seed]).integers(0, 256, (GRID * PATCH, GRID * PATCH, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
    pruner, asked = row.build(one, at), batch(model, processor, one, image)
    if pruner is None:
        said = answers(model, processor, asked)
    else:
        try:
            with vtprune.pruning(model, pruner, positions=row.positions) as session:
                said = answers(model, processor, asked)
            row.tokens.append(session.report.equivalent_tokens)
        except BudgetError as error:
            row.refused = str(error)
            return
    for question, text in zip(one.questions, said, strict=True):
        row.hits[question.type].append(text == question.answer)


def _summary(row: Row) -> dict:
    graded = [hit for kind in GRADED for hit in row.hits[kind]]
    return {
        "name": row.name,
        "budget": row.budget,
        "equivalent_tokens": float(np.mean(row.tokens)) if row.tokens else float(row.budget),
        "questions": len(graded),
        "accuracy": {kind: float(np.mean(row.hits[kind])) for kind in TYPES if row.hits[kind]},
        "all": float(np.mean(graded)) if graded else None,
        "refused": row.refused,
    }


def markdown(result: dict) -> str:
    """The table as Markdown: percent of exact matches, `all` over every type but reading."""
    head = ["strategy", "tokens", "equivalent", "questions", *TYPES, "all"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in result["rows"]:
        if row["refused"]:
            cells = ["-", "", *["-"] * (len(TYPES) + 1)]
        else:
            cells = [f"{row['equivalent_tokens']:.0f}", str(row["questions"])]
            cells += [f"{100 * row['accuracy'][t]:.1f}" if t in row["accuracy"] else "-" for t in TYPES]
            cells.append(f"**{100 * row['all']:.1f}**")
        lines.append(f"| {row['name']} | {row['budget']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(result: dict) -> list[tuple[str, str, bool]]:
    """What a model that behaves under pruning has to show: (bar, measured, met)."""
    at = {(r["name"], r["budget"]): r for r in result["rows"]}
    full = at["unpruned", GRID * GRID]
    weakest = min((full["accuracy"][t], t) for t in GRADED)
    noise, oracle = at["noise", GRID * GRID]["all"], at["oracle", 64]["all"]
    made = [
        ("all types but reading: at least 88 %", f"{100 * full['all']:.1f} %", full["all"] >= 0.88),
        ("weakest type but reading: at least 72 %", f"{100 * weakest[0]:.1f} % ({weakest[1]})", weakest[0] >= 0.72),
        ("noise in place of the picture: at most 50 %", f"{100 * noise:.1f} %", noise <= 0.5),
        ("the objects' own tokens, 64: at least 97 % of unpruned", f"{100 * oracle / full['all']:.1f} %",
         oracle >= 0.97 * full["all"]),
    ]  # fmt: skip
    for k, least in ((64, 8), (32, 15)):
        loss = 100 * (full["all"] - at["random", k]["all"])
        made.append((f"random, {k}: loses at least {least} points", f"{loss:.1f} points", loss >= least))
    return made


BEGIN, END = "<!-- strategies:begin -->", "<!-- strategies:end -->"


def section(result: dict) -> str:
    """The model card's part on strategies."""
    fewer = sorted({r["questions"] for r in result["rows"] if not r["refused"]})
    lines = [
        BEGIN,
        "## Under every strategy",
        "",
        f"Real `generate` calls through vtprune's public API, greedy, exact match in percent, on {result['pictures']} pictures",
        f'of the `test` split ({fewer[-1]} questions not counting reading; rows with fewer name their number). "Tokens" is the',
        "budget, as the mean over decoder layers. FastV computes its first layer on all 576 tokens (`layer=1` here, the",
        'earliest), so it cannot reach 64 of 576 as a mean over 8 layers: no figure. "Left after layer 2" is the paper\'s own',
        'way to count, at a higher cost ("equivalent"). FlowCut numbers its survivors anew, as published; the row below it',
        "leaves them their positions.",
        "",
        markdown(result),
        "",
        "| bar | measured | met |",
        "| --- | --- | --- |",
        *[f"| {bar} | {measured} | {'yes' if met else '**no**'} |" for bar, measured, met in bars(result)],
        "",
        f"Made by `{result['command']}` on {result['date']}",
        f"({result['machine']}; torch {result['versions']['torch']}, float32).",
        END,
    ]
    return "\n".join(lines)


def merged(old: dict, new: dict) -> dict:
    """`old` with the rows of `new` in place of, or added to, its own; in the table's order."""
    found = {(r["name"], r["budget"]): r for r in [*old["rows"], *new["rows"]]}
    order = [(r.name, r.budget) for r in rows()]
    return {
        **old,
        "rows": [found[key] for key in order if key in found],
        "command": f"{old['command']}`, then `{new['command']}",
    }


def write_card(path: Path, result: dict) -> None:
    """Put the section into the model card, in place of an older one."""
    text = path.read_text(encoding="utf-8")
    if BEGIN in text:
        head, rest = text.split(BEGIN, 1)
        text = head.rstrip() + "\n\n" + section(result) + rest.split(END, 1)[1]
    else:
        text = text.rstrip() + "\n\n" + section(result) + "\n"
    write(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=2000, help="at least so many, reading not counted")
    parser.add_argument("--few", type=int, default=0, help="so many for rows that no bar is about (0: all)")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--read", type=Path, help="take the numbers from this file; with --only, measure those rows anew")
    parser.add_argument("--card", action="store_true", help="put the table into the checkpoint's model card")
    args = parser.parse_args()
    if args.read:
        result = json.loads(args.read.read_text(encoding="utf-8"))
    if args.only or not args.read:
        measured = measure(args.folder, args.questions, set(args.only) if args.only else None, args.few)
        measured["command"] = shlex.join(["python", "-m", "evaluations.tiny.table", *sys.argv[1:]])
        result = merged(result, measured) if args.read else measured
    print(markdown(result))
    if args.json:
        write(args.json, json.dumps(result, indent=1))
    if args.card:
        write_card(args.folder / "README.md", result)


if __name__ == "__main__":
    main()
