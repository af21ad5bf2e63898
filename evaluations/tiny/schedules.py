"""The searched schedules on the tiny model's `test` pictures, against FastV, straight lines and P-Sigmoid's defaults.

    python -m evaluations.tiny.schedules --questions 2000 --json docs/search/results.json --markdown docs/search.md

Real `generate` calls through the public API, exact match. Every comparison made stands in the page, with a paired
bootstrap over pictures and Holm's correction over all of them. Of the page, what lies between the markers is written.
A killed run goes on from the `.part.json` beside `--json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import vtprune
from evaluations.leaderboard import RESAMPLES, interval, resampled
from evaluations.tiny.asking import CHECKPOINT, GRADED, answers, batch, load, picture, pictures, write
from evaluations.worlds import GRID
from vtprune.measure.bench import machine
from vtprune.pruner import Pruner
from vtprune.schedule import Stored, read

SCHEDULES = Path(__file__).resolve().parents[2] / "assets" / "schedules"
TOKENS, DEPTH = GRID * GRID, 8
SCALED = (176, 152)
TOLERANCE = 0.01
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


@dataclass(frozen=True)
class Row:
    """A strategy to measure: name, group of the page, budget in equivalent tokens, how to make it."""

    name: str
    group: str
    budget: float
    build: Callable[[], Pruner | None]


@dataclass(frozen=True)
class Comparison:
    """Whether row `better` beats row `other`, whose accuracy counts `factor`-fold; `part` says what the two differ in."""

    better: str
    other: str
    part: str
    factor: float = 1.0


def line(share: float, first: int, depth: int) -> tuple[float, ...]:
    """Rates that are 1 before layer `first` and fall from there by the same step each, to 0 at the least; mean `share`."""

    def rates(step: float) -> tuple[float, ...]:
        return tuple(max(0.0, 1.0 - step * max(0, layer - first + 1)) for layer in range(depth))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(rates(middle)) > share * depth else (low, middle)
    return rates(high)


def ramp(share: float, first: int, depth: int) -> tuple[float, ...]:
    """Rates that are 1 before layer `first`, and from there on a line which reaches 0 after the last layer; mean `share`.

    Where the line would have to start above 1, as `line`.
    """
    length = depth - first
    top = 2 * (share * depth - first) / (length + 1)
    if top > 1:
        return line(share, first, depth)
    return (1.0,) * first + tuple(top * (length - at) / length for at in range(length))


def rows(folder: Path = SCHEDULES, scaled: Sequence[int] = SCALED) -> list[Row]:
    """Everything that is measured."""
    made = [Row("unpruned", "", TOKENS, lambda: None)]
    path = folder / "tiny-llava.gsearch.json"
    counts = [max(1, round(rate * TOKENS)) for rate in read(path, "gsearch").values["rates"]]
    # rounded up, so that FastV has no fewer
    made += _searched(path, None, sum(counts) / DEPTH, math.ceil(sum(counts) / DEPTH))
    for budget in scaled:
        made += [row for row in _searched(path, budget, budget, budget) if "," not in row.name]
    for path in sorted(folder.glob("tiny-llava.psigmoid*.json")):
        made += _sigmoid(path)
    return made


def _searched(path: Path, keep: int | None, budget: float, tokens: int) -> list[Row]:
    """The searched curve, as found or scaled to `keep`, and FastV's one cut, each with either score."""
    after = (tokens * DEPTH - 2 * TOKENS) / (DEPTH - 2) / TOKENS
    step = (1.0, 1.0, *[after] * (DEPTH - 2))
    at = f"{budget:g}"
    return [
        Row(f"G-Search {at}", "gsearch", budget, lambda: vtprune.GSearch(schedule=str(path), keep=keep)),
        Row(f"G-Search {at}, last token's score", "gsearch", budget,
            lambda: vtprune.GSearch(schedule=str(path), keep=keep, query_scope="last")),
        Row(f"FastV {at}, text's score", "gsearch", budget, lambda: vtprune.GSearch(rates=step, keep=tokens)),
        Row(f"FastV {at}", "gsearch", budget, lambda: vtprune.FastV(keep=tokens, layer=2)),
    ]  # fmt: skip


def _sigmoid(path: Path) -> list[Row]:
    stored = read(path, "psigmoid")
    keep, first = stored.values["keep"], stored.values["min_layer"]
    share = keep / TOKENS if isinstance(keep, int) else keep
    at, budget = f"{100 * share:g} %", share * TOKENS
    straight, falling = line(share, first, DEPTH), ramp(share, first, DEPTH)
    return [
        Row(f"P-Sigmoid {at}", "psigmoid", budget, lambda: vtprune.PSigmoid(schedule=str(path))),
        Row(f"P-Sigmoid {at}, steepness 0.5", "psigmoid", budget,
            lambda: vtprune.PSigmoid(keep=keep, steepness=0.5, min_layer=first)),
        Row(f"line {at}, from all", "psigmoid", budget, lambda: vtprune.GSearch(rates=straight, keep=keep, min_layer=first)),
        Row(f"line {at}, to none", "psigmoid", budget, lambda: vtprune.GSearch(rates=falling, keep=keep, min_layer=first)),
        Row(f"FastV {at}", "psigmoid", budget, lambda: vtprune.FastV(keep=keep, layer=first)),
    ]  # fmt: skip


def comparisons(names: Sequence[str]) -> list[Comparison]:
    """All that are made between the rows `names`."""
    made = []
    for name in names:
        kind, _, at = name.partition(" ")
        if "," in name:
            continue
        if kind == "G-Search":
            fastv, text, last = f"FastV {at}", f"FastV {at}, text's score", f"{name}, last token's score"
            made += [Comparison(name, fastv, "schedule and score"), Comparison(name, text, "schedule")]
            made += [Comparison(last, fastv, "schedule"), Comparison(text, fastv, "score")]
        if kind == "P-Sigmoid":
            made += [Comparison(name, f"line {at}, {end}", "schedule") for end in ("from all", "to none")]
            made.append(Comparison(name, f"FastV {at}", "schedule and score"))
            made.append(Comparison(name, f"{name}, steepness 0.5", "steepness"))
    searched = next((name for name in names if name.startswith("G-Search ")), None)
    if searched:
        made.insert(0, Comparison(searched, "unpruned", "all pruning", 1 - TOLERANCE))
    return [one for one in made if {one.better, one.other} <= set(names)]


# --- measuring ---------------------------------------------------------------------------------------------------------

_kit: tuple[Any, Any, list[Row]] | None = None


def _start(folder: Path, schedules: Path, scaled: Sequence[int]) -> None:
    global _kit  # noqa: PLW0603 (a worker's own, made once per process)
    torch.set_num_threads(1)
    _kit = (*load(folder), rows(schedules, scaled))


def _mark(folder: Path, schedules: Path, todo: Sequence[Row]) -> str:
    """Of what the answers depend on, the code aside."""
    files = [folder / "model.safetensors", *sorted(schedules.glob("tiny-llava.*.json"))]
    digest = hashlib.sha256(json.dumps([row.name for row in todo]).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _about(seed: int) -> tuple[int, dict[str, tuple[int, int, float]]]:
    """Of one picture, for every row: right answers, right readings, equivalent tokens."""
    model, processor, todo = _kit
    asked = picture(seed)
    ready = batch(model, processor, asked)
    found = {}
    for row in todo:
        pruner = row.build()
        if pruner is None:
            said, tokens = answers(model, processor, ready), float(TOKENS)
        else:
            with vtprune.pruning(model, pruner) as session:
                said = answers(model, processor, ready)
            tokens = session.report.equivalent_tokens
        right = [(q.type, text == q.answer) for q, text in zip(asked.questions, said, strict=True)]
        graded = sum(hit for kind, hit in right if kind in GRADED)
        found[row.name] = (graded, sum(hit for _, hit in right) - graded, tokens)
    return seed, found


def measure(
    folder: Path, schedules: Path, questions: int, scaled: Sequence[int], workers: int, partial: Path | None = None
) -> dict[str, Any]:
    """Every row over the same pictures; what `partial` holds of the same rows is not asked again."""
    began, asked = time.monotonic(), pictures(questions)
    found: dict[int, dict[str, tuple[int, int, float]]] = {}
    mark = _mark(folder, schedules, rows(schedules, scaled))
    if partial and partial.is_file():
        kept = json.loads(partial.read_text(encoding="utf-8"))
        found = {int(seed): result for seed, result in kept["pictures"].items()} if kept["mark"] == mark else {}
    left = [one.scene.seed for one in asked if one.scene.seed not in found]
    context = multiprocessing.get_context("spawn")
    with (
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(workers, context, _start, (folder, schedules, tuple(scaled))) as pool,
    ):
        jobs = [pool.submit(_about, seed) for seed in left]
        for job in progress.track(as_completed(jobs), total=len(jobs), description="pictures"):
            seed, result = job.result()
            found[seed] = result
            if partial:
                write(partial, json.dumps({"mark": mark, "pictures": found}))
    ordered = [found[one.scene.seed] for one in asked]
    minutes = round((time.monotonic() - began) / 60, 1)
    return {
        "questions": [sum(q.type in GRADED for q in one.questions) for one in asked],
        "readings": [sum(q.type not in GRADED for q in one.questions) for one in asked],
        "rows": [
            {
                "name": row.name,
                "group": row.group,
                "budget": row.budget,
                "equivalent_tokens": statistics.fmean(one[row.name][2] for one in ordered),
                "right": [one[row.name][0] for one in ordered],
                "read": [one[row.name][1] for one in ordered],
            }
            for row in rows(schedules, scaled)
        ],
        "setup": {"model": folder.name, "workers": workers, "minutes": minutes, **machine("cpu")},
    }


# --- summing up --------------------------------------------------------------------------------------------------------


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the given order."""
    found, worst = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        worst = max(worst, min(1.0, (len(values) - rank) * values[at]))
        found[at] = worst
    return found


def summarise(result: dict[str, Any], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """`result` with accuracies in percent and their 95 % intervals, and with all comparisons."""
    counts = np.asarray(result["questions"])
    names = [row["name"] for row in result["rows"]]
    sums = np.asarray([row["right"] for row in result["rows"]])
    means, drawn = sums.sum(1) / counts.sum(), resampled(sums, counts, resamples, seed)
    reads = max(1, sum(result["readings"]))
    summed = []
    for at, row in enumerate(result["rows"]):
        span = interval(drawn[:, at], float(means[at]))
        more = {"accuracy": span.mean, "low": span.low, "high": span.high, "reading": 100 * sum(row["read"]) / reads}
        summed.append({**row, **more})
    compared = []
    for one in comparisons(names):
        a, b = names.index(one.better), names.index(one.other)
        gain = interval(drawn[:, a] - one.factor * drawn[:, b], float(means[a] - one.factor * means[b]), against=True)
        what = {"better": one.better, "other": one.other, "factor": one.factor, "part": one.part}
        compared.append({**what, "gain": gain.mean, "low": gain.low, "high": gain.high, "p": gain.p})
    for one, p in zip(compared, holm([one["p"] for one in compared]), strict=True):
        one["holm"] = p
    return {**result, "rows": summed, "comparisons": compared, "bootstrap": {"resamples": resamples, "seed": seed}}


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Markdown, the first `left` columns flush left."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines)]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


GROUPS = (
    (
        "gsearch",
        "### G-Search and FastV",
        (
            "FastV cuts once, before layer 2, by the last prompt token's attention (\"last token's score\"), G-Search by that",
            "of all text after the picture (\"text's score\"). Rows with the other's score tell schedule and score apart.",
            "The first budget is the schedule's as found, the others scale its curve (`GSearch(keep=K)`).",
        ),
    ),
    (
        "psigmoid",
        "### P-Sigmoid",
        (
            'A line "from all" falls from 1 by the same step at every layer from the schedule\'s first on, to one token at',
            'the least; "to none" starts at that layer so low that it ends at nothing after the last. Both have P-Sigmoid\'s',
            "score and mean. FastV cuts once, before the same first layer.",
        ),
    ),
)


def section(result: dict[str, Any], stored: dict[str, Stored]) -> str:
    """What stands between the markers."""
    setup, rows_ = result["setup"], result["rows"]
    lines = [BEGIN, "## The shipped schedules", ""]
    cells = []
    for name, one in stored.items():
        values = one.values
        if one.kind == "gsearch":
            found, mean = ", ".join(f"{rate:g}" for rate in values["rates"]), sum(values["rates"]) / one.model.depth
        else:
            found, mean = f"steepness {values['steepness']:g}", values["keep"]
        mean = f"{mean} tokens" if isinstance(mean, int) else f"{100 * mean:.4g} %"
        cells.append([f"`{name}`", found, str(values["min_layer"]), mean, str(len(one.trace)), one.date])
    lines += _table(["file", "found", "first layer", "mean keep", "trials", "date"], cells, 2)
    lines += ["", *[f"- `{name}`: `{one.command}`" for name, one in stored.items()]]
    lines += [
        "",
        "## Accuracy on test pictures",
        "",
        f"{len(result['questions'])} pictures of the `test` split, {sum(result['questions'])} questions, and "
        f"{sum(result['readings'])} about a printed word",
        '("reading"; the calibration set has none, and they do not count as accuracy). Real `generate` calls, greedy, exact',
        'match in percent with 95 % intervals (bootstrap over pictures). "Tokens" is measured: the mean over decoder layers',
        "of visual tokens computed on.",
    ]
    for group, head, legend in GROUPS:
        cells = [
            [r["name"], f"{r['equivalent_tokens']:.2f}", f"{100 * r['equivalent_tokens'] / TOKENS:.1f} %",
             f"{r['accuracy']:.1f} [{r['low']:.1f}, {r['high']:.1f}]", f"{r['reading']:.1f}"]
            for r in rows_ if r["group"] in ("", group)
        ]  # fmt: skip
        lines += ["", head, "", *legend, "", *_table(["strategy", "tokens", "mean keep", "accuracy", "reading"], cells, 1)]
    cells = []
    for one in result["comparisons"]:
        other = one["other"] if one["factor"] == 1 else f"{one['factor']:g} x {one['other']}"
        gain = f"{one['gain']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}]"
        verdict = "yes" if one["holm"] < 0.05 else "no"
        cells.append([one["better"], other, one["part"], gain, _p(one["p"]), _p(one["holm"]), verdict])
    heads = ["is", "better than", "the two differ in", "points", "p", "p, Holm", "p, Holm < 0.05"]
    lines += [
        "",
        "### Every comparison made",
        "",
        f"Paired bootstrap over pictures, {result['bootstrap']['resamples']} resamples, seed {result['bootstrap']['seed']};",
        f'p is one-sided, for "is better"; Holm\'s correction is over all {len(cells)} lines.',
        "",
        *_table(heads, cells, 3),
        "",
        f"Made by `{result['command']}` on {setup['date']} in {setup['minutes']} minutes",
        f"({setup['device']}, {setup['workers']} processes of one thread on {setup['cores']} shared cores;",
        f"torch {setup['torch']}, transformers {setup['transformers']}, vtprune {setup['vtprune']}, float32).",
        END,
    ]
    return "\n".join(lines)


def write_page(page: Path, text: str) -> None:
    """Put the section into the page, in place of an older one; the rest of the page stays."""
    before = page.read_text(encoding="utf-8") if page.is_file() else "# Searched schedules\n"
    head, found, rest = before.partition(BEGIN)
    tail = rest.partition(END)[2] if found else "\n"
    write(page, head.rstrip() + "\n\n" + text + tail)


def dumps(result: dict[str, Any]) -> str:
    """As JSON with short lines of numbers on one line each."""
    text = json.dumps({k: v for k, v in result.items() if k not in ("rows", "comparisons")}, indent=None)[:-1]
    for key in ("rows", "comparisons"):
        inner = ",\n  ".join(json.dumps(one) for one in result[key])
        text += f',\n "{key}": [\n  {inner}\n ]'
    return text + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="the checkpoint")
    parser.add_argument("--schedules", type=Path, default=SCHEDULES, help="folder of the searched schedules")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many, reading not counted")
    parser.add_argument(
        "--scaled", type=int, nargs="*", default=list(SCALED), help="budgets that the searched curve is scaled to"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--read", type=Path, help="take the numbers from this file")
    parser.add_argument("--markdown", type=Path, help="write the tables there, between the markers")
    args = parser.parse_args()
    if args.questions < 1 or args.workers < 1:
        parser.error("--questions and --workers must be at least 1")
    if args.read:
        result = json.loads(args.read.read_text(encoding="utf-8"))
    else:
        partial = args.json.with_suffix(".part.json") if args.json else None
        result = measure(args.folder, args.schedules, args.questions, args.scaled, args.workers, partial)
        result["command"] = shlex.join(["python", "-m", "evaluations.tiny.schedules", *sys.argv[1:]])
    result = summarise(result)
    stored = {path.name: read(path) for path in sorted(args.schedules.glob("tiny-llava.*.json"))}
    text = section(result, stored)
    print(text)
    if args.json:
        write(args.json, dumps(result))
        args.json.with_suffix(".part.json").unlink(missing_ok=True)
    if args.markdown:
        write_page(args.markdown, text)


if __name__ == "__main__":
    main()
