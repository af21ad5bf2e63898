"""Every strategy at equal equivalent tokens on the embedded model's picture world, with confidence intervals.

    python -m evaluations.leaderboard --json docs/leaderboard/results.json --markdown docs/leaderboard.md

Knows the tiny model's pictures, vtprune's public API and its timing; nothing of the engine. Accuracy comes from real
`generate` calls in `--workers` processes of one thread each. Time comes from a second, interleaved pass of one process.
A killed run goes on from `RESULTS.part.json` beside `--json`.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import multiprocessing
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import vtprune
from evaluations.tiny.asking import CHECKPOINT, GRADED, Asked, Batch, answers, batch, load, picture, pictures, write
from evaluations.tiny.oracle import Oracle
from evaluations.worlds import GRID, TYPES
from vtprune.measure.bench import Case, machine, timed
from vtprune.pruner import Pruner, VtpruneError
from vtprune.relevance import ClipRelevance

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (192, 128, 64, 32)
RESAMPLES = 10_000
# measured equivalent tokens may be so far from the budget before the row is marked
TOLERANCE = 0.02
BASELINE = "random"


@dataclass(frozen=True)
class Entry:
    """A strategy of the table.

    Parameters:
        name: in the table; strategy: for `vtprune.create`, "oracle", or None for the bare model.
        group: "reference", "before" the decoder, "inside" it, or "composed".
        choices: fields to try in turn; the first with which a budget can be reached is taken.
        seeds: draws per picture, averaged question by question.
        towers: whether `relevance` is the paper's, from the text tower.
        rescue: only where the entry of this name cannot reach the budget.
        varies: whether it depends on the picture which budgets can be reached; then the run itself tells.
        twin: left out of the table where it did the same as the entry of this name throughout.
    """

    name: str
    strategy: str | None
    group: str
    choices: tuple[dict[str, Any], ...] = ({},)
    seeds: int = 1
    towers: bool = False
    rescue: str = ""
    varies: bool = False
    twin: str = ""


@dataclass
class Row:
    """An entry at a budget, with what was measured.

    Parameters:
        fields: the choice taken; label: the name, with that choice where it is not the first; settings: all fields.
        refused: why it cannot reach the budget.
        hits: per picture one digit per question, of how many seeds answered it rightly.
        tokens: per picture, mean over its questions of equivalent tokens.
        prefill_ms, selection_ms, of_unpruned: one per picture of the timing pass; the last is prefill over the unpruned
            row's in the same turn.
    """

    name: str
    strategy: str | None
    group: str
    budget: int | None
    fields: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    towers: bool = False
    rescue: str = ""
    twin: str = ""
    label: str = ""
    settings: str = ""
    refused: str = ""
    hits: list[str] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    selection_ms: list[float] = field(default_factory=list)
    of_unpruned: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.name} @ {self.budget}"

    def build(self, asked: Sequence[list[int]], seed: int, relevance: Any) -> Pruner | None:
        """The strategy; `asked` is what the oracle is told, question by question."""
        if self.strategy is None:
            return None
        if self.strategy == "oracle":
            return Oracle(keep=self.budget, wanted=list(asked), seed=seed)
        more = {"seed": seed} if self.strategy == "random" else {}
        if self.towers:
            more["relevance"] = relevance
        return vtprune.create(self.strategy, keep=self.budget, **self.fields, **more)


def entries(schedules: Path, budget: int) -> list[Entry]:
    """What stands in the table at a budget."""
    found = sorted(glob.glob(str(schedules / "tiny-llava.psigmoid*.json")))
    nearest = min(found, key=lambda path: (abs(_stored_keep(path) - budget), path), default=None)
    psigmoid = {"schedule": _inside(nearest)} if nearest else {}
    gsearch = schedules / "tiny-llava.gsearch.json"
    made = [
        Entry("random", "random", "reference", seeds=3),
        Entry("oracle", "oracle", "reference"),
        Entry("uniform", "uniform", "reference"),
        Entry("resolution", "resolution", "reference"),
        Entry("flowcut", "flowcut", "before"),
        Entry("todre", "todre", "before"),
        Entry("todre, no gate", "todre", "before", ({"tau": None},), twin="todre"),
        Entry("todre, k_center", "todre", "before", ({"variant": "k_center"},)),
        Entry("visionzip", "visionzip", "before"),
        Entry("divprune", "divprune", "before"),
        Entry("cdpruner, embeddings", "cdpruner", "before"),
        Entry("cdpruner, text tower", "cdpruner", "before", towers=True),
        # the papers' first cut first; on 8 layers it is often too late
        Entry("fastv", "fastv", "inside", ({"layer": 2}, {"layer": 1})),
        Entry("pyramiddrop", "pyramiddrop", "inside"),
        Entry("sparsevlm", "sparsevlm", "inside"),
        Entry("mustdrop", "mustdrop", "inside", varies=True),
        Entry("mustdrop, key_rate=0.02", "mustdrop", "inside", ({"key_rate": 0.02},), rescue="mustdrop", varies=True),
        Entry("psigmoid", "psigmoid", "inside", (psigmoid, {**psigmoid, "min_layer": 1})),
        Entry("flowcut+fastv", "flowcut+fastv", "composed"),
        Entry("flowcut+pyramiddrop", "flowcut+pyramiddrop", "composed"),
        Entry("todre+evict", "todre+evict", "composed"),
    ]
    if gsearch.is_file():
        searched = {"schedule": _inside(gsearch)}
        made.insert(-4, Entry("gsearch", "gsearch", "inside", (searched, {**searched, "min_layer": 1})))
    return made


def _stored_keep(path: str) -> float:
    from vtprune.schedule import read

    keep = read(path).values.get("keep") or 0.5
    return keep if isinstance(keep, int) else keep * GRID * GRID


def _inside(path: str | Path) -> str:
    """As seen from the current folder where it lies below, so that a page names no one's home."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# --- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """The model with what it takes to ask it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.processor = load(folder)
        tower = folder / "text_tower"
        self.relevance = ClipRelevance.from_pretrained(tower, self.processor.tokenizer, vision=self.model.model.vision_tower)
        self.relevance.source = "text_tower"

    def ask(self, row: Row, asked: Asked, ready: Batch) -> tuple[str, float | None] | str:
        """(one digit per question, mean equivalent tokens), or why the row cannot be had."""
        right = [0] * len(asked.questions)
        tokens = []
        for draw in range(row.seeds):
            # other tokens on every picture, or one lucky draw would count for the whole table
            pruner = row.build([asked.wanted(q) for q in asked.questions], row.seeds * asked.scene.seed + draw, self.relevance)
            if pruner is None:
                said = answers(self.model, self.processor, ready)
            else:
                try:
                    with vtprune.pruning(self.model, pruner) as session:
                        said = answers(self.model, self.processor, ready)
                except VtpruneError as error:
                    return str(error)
                tokens.append(session.report.equivalent_tokens)
            for at, (question, text) in enumerate(zip(asked.questions, said, strict=True)):
                right[at] += text == question.answer
        return "".join(map(str, right)), statistics.fmean(tokens) if tokens else None

    def about(self, rows: list[Row], seed: int) -> dict[str, Any]:
        """What `ask` says of each row, for one picture."""
        asked = picture(seed)
        ready = batch(self.model, self.processor, asked)
        return {row.key: self.ask(row, asked, ready) for row in rows}

    def single(self, seed: int) -> tuple[Asked, dict[str, torch.Tensor]]:
        """A picture with its first question alone."""
        asked = picture(seed)
        asked.questions = asked.questions[:1]
        ready = batch(self.model, self.processor, asked)
        return asked, {**ready.inputs, "pixel_values": ready.pixels}

    def time(self, row: Row, asked: Asked, inputs: dict[str, torch.Tensor]):
        """One timed prefill, or a VtpruneError."""
        pruner = row.build([asked.wanted(q) for q in asked.questions], asked.scene.seed, self.relevance)
        return timed(self.model, inputs, Case(row.label, pruner))


def plan(bench: Bench, budgets: Sequence[int], schedules: Path, only: Sequence[str] | None = None) -> list[Row]:
    """The rows, each with the first of its settings that reaches the budget on the first picture.

    Raises:
        SystemExit: for a name in `only` that no row has.
    """
    wanted = {budget: entries(schedules, budget) for budget in budgets}
    known = {"unpruned", *(entry.name for made in wanted.values() for entry in made)}
    if only is not None and set(only) - known:
        missing = ", ".join(map(repr, sorted(set(only) - known)))
        raise SystemExit(f"no row is named {missing}. Rows: {', '.join(sorted(known))}; gsearch needs a schedule.")
    rows = [Row("unpruned", None, "reference", None, label="unpruned", settings="unpruned")]
    asked, inputs = bench.single(0)
    for budget, made in wanted.items():
        rows += [_fitting(bench, e, budget, asked, inputs) for e in made if only is None or e.name in only]
    return rows


def _fitting(bench: Bench, entry: Entry, budget: int, asked: Asked, inputs: dict[str, torch.Tensor]) -> Row:
    same = {name: getattr(entry, name) for name in ("name", "strategy", "group", "seeds", "towers", "rescue", "twin")}
    row = Row(budget=budget, **same)
    for choice in entry.choices:
        changed = [f"{k}={v}" for k, v in choice.items() if entry.choices[0].get(k, ...) != v]
        row.fields, row.label = dict(choice), ", ".join([entry.name, *changed])
        try:
            if not entry.varies:
                bench.time(row, asked, inputs)
        except VtpruneError as error:
            row.refused = str(error)
            continue
        told = row.strategy == "oracle"
        row.refused, row.settings = "", "oracle" if told else row.build([], 0, bench.relevance).describe()
        break
    return row


_bench: Bench | None = None


def _start(folder: Path) -> None:
    global _bench  # noqa: PLW0603 (a worker's own, made once per process)
    torch.set_num_threads(1)
    _bench = Bench(folder)


def _work(rows: list[Row], seed: int) -> tuple[int, dict[str, Any]]:
    return seed, _bench.about(rows, seed)


def accuracy(bench: Bench, rows: list[Row], asked: list[Asked], workers: int, partial: Path | None, progress: Progress) -> None:
    """Ask every row about every picture; what `partial` holds of the same run is not asked again."""
    todo = [row for row in rows if not row.refused]
    mark = _fingerprint(bench.folder, todo)
    done: dict[int, dict[str, Any]] = {}
    if partial and partial.is_file():
        kept = json.loads(partial.read_text(encoding="utf-8"))
        if kept["mark"] == mark:
            done = {int(seed): found for seed, found in kept["pictures"].items()}
    left = [one.scene.seed for one in asked if one.scene.seed not in done]
    task = progress.add_task("accuracy", total=len(asked), completed=len(asked) - len(left))

    def take(seed: int, found: dict[str, Any]) -> None:
        done[seed] = found
        progress.advance(task)
        if partial:
            write(partial, json.dumps({"mark": mark, "pictures": done}))

    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (bench.folder,)) as pool:
            for finished in as_completed([pool.submit(_work, todo, seed) for seed in left]):
                take(*finished.result())
    else:
        for seed in left:
            take(seed, bench.about(todo, seed))
    for row in todo:
        found = [done[one.scene.seed][row.key] for one in asked]
        errors = [one for one in found if isinstance(one, str)]
        if errors:
            row.refused = f"on {len(errors)} of {len(asked)} pictures: {errors[0]}"
            continue
        row.hits = [hits for hits, _ in found]
        row.tokens = [tokens for _, tokens in found if tokens is not None]


def _fingerprint(folder: Path, rows: Iterable[Row]) -> str:
    """Of what the answers depend on: weights, code, rows."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    for source in sorted([*(ROOT / "vtprune").rglob("*.py"), *(ROOT / "evaluations").rglob("*.py")]):
        digest.update(source.read_bytes())
    digest.update(json.dumps([asdict(row) for row in rows], default=str).encode())
    return digest.hexdigest()


def timing(bench: Bench, rows: list[Row], asked: list[Asked], turns: int, progress: Progress) -> None:
    """Prefill times: in each of `turns` turns, on another picture, every row runs once, after a turn that is not counted."""
    todo = [row for row in rows if not row.refused]
    task = progress.add_task("time", total=(turns + 1) * len(todo))
    for turn in range(turns + 1):
        one, inputs = bench.single(asked[max(0, turn - 1) % len(asked)].scene.seed)
        # another one goes first each time, as what ran before matters to caches
        first = turn * 7 % len(todo)
        for row in [*todo[first:], *todo[:first]]:
            run = bench.time(row, one, inputs)
            if turn:
                row.prefill_ms.append(round(run.prefill_ms, 3))
                row.selection_ms.append(round(run.selection_ms, 3))
            progress.advance(task)
    bare = next(row for row in todo if row.budget is None)
    for row in todo:
        row.of_unpruned = [round(a / b, 4) for a, b in zip(row.prefill_ms, bare.prefill_ms, strict=True)]


def measure(
    folder: Path,
    questions: int,
    budgets: Sequence[int],
    schedules: Path,
    only: Sequence[str] | None = None,
    workers: int = 2,
    turns: int = 20,
    partial: Path | None = None,
) -> dict[str, Any]:
    """Accuracy and time of all rows, unsummarised.

    Parameters:
        questions: at least so many, reading not counted. only: names of rows; the unpruned one always stands.
        turns: pictures of the timing pass, at least 1. partial: where a run saves what it has.
    """
    began = time.monotonic()
    asked = pictures(questions)
    bench = Bench(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = plan(bench, budgets, schedules, only)
    with Progress(console=Console(stderr=True)) as progress:
        accuracy(bench, rows, asked, workers, partial, progress)
        # a rescue where there was nothing to rescue
        fine = {(row.name, row.budget) for row in rows if not row.refused}
        rows = [row for row in rows if (row.rescue, row.budget) not in fine]
        torch.set_num_threads(threads)
        timing(bench, rows, asked, turns, progress)
    return {
        "pictures": [[one.scene.seed, " ".join(q.type for q in one.questions)] for one in asked],
        "budgets": list(budgets),
        "visual_tokens": bench.model.config.image_seq_length,
        "depth": bench.model.config.text_config.num_hidden_layers,
        "setup": {
            "model": folder.name,
            "dtype": str(bench.model.dtype).removeprefix("torch."),
            "attention": bench.model.config._attn_implementation,
            "workers": workers,
            "timing_pictures": turns,
            "minutes": round((time.monotonic() - began) / 60, 1),
            **machine("cpu"),
        },
        "raw": [{**asdict(row), "hits": " ".join(row.hits)} for row in rows],
    }


# --- summing up --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over questions, in percent, with its 95 % interval; `p` of a difference, one-sided."""

    mean: float
    low: float
    high: float
    p: float | None = None


def resampled(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """[resamples, rows] mean per question, over pictures drawn with replacement; the same draws for every row.

    Questions about one picture share its features and what was kept of them, so that they are not independent; pictures
    are.

    Parameters:
        sums: [rows, pictures] right answers. counts: [pictures] questions.
    """
    pictures_ = len(counts)
    drawn = np.random.default_rng(seed).multinomial(pictures_, np.full(pictures_, 1 / pictures_), size=resamples)
    return (drawn @ sums.T) / (drawn @ counts)[:, None]


def interval(means: np.ndarray, mean: float, against: bool = False) -> Interval:
    """Percentile interval of bootstrap `means`; `against`: with the share of them that are not above zero."""
    low, high = np.percentile(means, [2.5, 97.5])
    # sums of thirds are not exact; the run itself counts as one resample, so that p is never zero
    p = float((1 + (means <= 1e-9).sum()) / (1 + len(means))) if against else None
    return Interval(100 * mean, 100 * float(low), 100 * float(high), p)


def marked(equivalent: float, budget: float) -> bool:
    """Whether a row's measured equivalent tokens are too far from its budget to stand beside the others unmarked."""
    return abs(equivalent - budget) > TOLERANCE * budget


def short(refused: str, depth: int) -> str:
    """Why a budget cannot be reached, in a few words."""
    where = re.match(r"on \d+ of \d+ pictures: ", refused)
    prefix, reason = (where[0], refused[where.end() :]) if where else ("", refused)
    found = re.search(r"first cut (?:at|before) layer (\d+): the layers before it alone cost (\d+(?:\.\d+)?)", reason)
    if found:
        layer, cost = int(found[1]), float(found[2])
        return f"{prefix}its first cut is before layer {layer}; {layer} of {depth} layers on everything cost {cost:g}"
    reason = re.split(r"(?<=[a-z\d])[.;] ", reason.rpartition("cannot be reached: ")[2])[0].rstrip(".")
    return prefix + (reason if len(reason) <= 200 else reason[:197] + "...")


def summarise(result: dict[str, Any], resamples: int = RESAMPLES) -> dict[str, Any]:
    """`result` with "rows": what stands in the tables, computed from "raw" alone."""
    types = [kinds.split() for _, kinds in result["pictures"]]
    counts = np.array([sum(kind in GRADED for kind in kinds) for kinds in types])
    ran = [raw for raw in result["raw"] if not raw["refused"]]
    sums = {_key(raw): _sums(raw, types) for raw in ran}
    drawn = resampled(np.array([sums[_key(raw)] for raw in ran]), counts, resamples) if ran else np.empty((resamples, 0))
    means = {_key(raw): drawn[:, at] for at, raw in enumerate(ran)}
    rows = []
    for raw in result["raw"]:
        key = _key(raw)
        row = {k: raw[k] for k in ("name", "label", "group", "budget", "settings", "seeds")}
        if raw["refused"]:
            rows.append({**row, "refused": raw["refused"]})
            continue
        twin = next((r for r in ran if raw["twin"] and _key(r) == (raw["twin"], raw["budget"])), None)
        if twin and (twin["hits"], twin["tokens"]) == (raw["hits"], raw["tokens"]):
            row["same_as"] = raw["twin"]
        row["all"] = asdict(interval(means[key], sums[key].sum() / counts.sum()))
        row["types"] = _by_type(raw, types)
        row["equivalent_tokens"] = statistics.fmean(raw["tokens"]) if raw["tokens"] else float(result["visual_tokens"])
        if raw["budget"] is not None:
            row["marked"] = marked(row["equivalent_tokens"], raw["budget"])
        row["against"] = {}
        for budget in result["budgets"] if raw["budget"] is None else [raw["budget"]]:
            other = (BASELINE, budget)
            if other in sums and other != key:
                difference = (sums[key] - sums[other]).sum() / counts.sum()
                row["against"][str(budget)] = asdict(interval(means[key] - means[other], difference, against=True))
        if raw["prefill_ms"]:
            row["prefill_ms"] = statistics.median(raw["prefill_ms"])
            row["selection_ms"] = statistics.median(raw["selection_ms"])
            shares = zip(raw["selection_ms"], raw["prefill_ms"], strict=True)
            row["selection_share"] = statistics.median(s / p for s, p in shares)
            row["of_unpruned"] = statistics.median(raw["of_unpruned"])
        rows.append(row)
    return {**result, "questions": int(counts.sum()), "reading": sum(k.count("reading") for k in types), "rows": rows}


def _key(raw: dict[str, Any]) -> tuple[str, int | None]:
    return raw["name"], raw["budget"]


def _sums(raw: dict[str, Any], types: list[list[str]]) -> np.ndarray:
    pairs = zip(raw["hits"].split(" "), types, strict=True)
    return (
        np.array([sum(int(h) for h, kind in zip(hits, kinds, strict=True) if kind in GRADED) for hits, kinds in pairs])
        / (raw["seeds"])
    )


def _by_type(raw: dict[str, Any], types: list[list[str]]) -> dict[str, float]:
    said: dict[str, list[int]] = {}
    for hits, kinds in zip(raw["hits"].split(" "), types, strict=True):
        for hit, kind in zip(hits, kinds, strict=True):
            said.setdefault(kind, []).append(int(hit))
    return {kind: 100 * statistics.fmean(said[kind]) / raw["seeds"] for kind in TYPES if kind in said}


def dumps(result: dict[str, Any]) -> str:
    """JSON with one line per row, so that a difference can be read."""

    def value(of: Any) -> str:
        if isinstance(of, list) and of and isinstance(of[0], dict | list):
            return "[\n  " + ",\n  ".join(map(json.dumps, of)) + "\n ]"
        return json.dumps(of)

    return "{\n " + ",\n ".join(f"{json.dumps(k)}: {value(v)}" for k, v in result.items()) + "\n}\n"


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the rows of `new` in place of its own of the same name and budget, or after them.

    Raises:
        SystemExit: if they were not asked the same questions.
    """
    if old["pictures"] != new["pictures"] or old["budgets"] != new["budgets"]:
        raise SystemExit("the file to read was measured on other questions or budgets: give its --questions and --budgets.")
    fresh = {_key(raw): raw for raw in new["raw"] if raw["budget"] is not None or not old["raw"]}
    raw = [fresh.pop(_key(r), r) for r in old["raw"]]
    return {**old, "raw": [*raw, *fresh.values()], "command": f"{old['command']}`, then `{new['command']}"}


# --- showing -----------------------------------------------------------------------------------------------------------

CAVEAT = """\
What this does and does not tell. The model is tiny and its world synthetic: flat coloured shapes and short printed words
on plain ground. Heads 0 and 1 of decoder block 3 were trained to look at the object asked about, and the encoder's CLS
token was trained to mark objects, so rankings by attention, the encoder's or the decoder's, get a better signal here than
from a model trained on photographs: they are flattered. With 8 decoder layers each layer that runs on everything costs an
eighth of the budget, against 1/32 in a 7B model, so methods that cut inside the decoder are punished, and some budgets are
out of their reach. Counting is the model's weak spot with all tokens too. Most rows near the top differ from random, not
from one another: intervals that overlap are no order. The p-values are one per row and not corrected for their number.
What can be read off: that each method runs at its budget, what it costs, and whether it beats chance where it can. The
ranking on real models may differ."""


def _num(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def _span(value: dict[str, Any], sign: bool = False) -> str:
    mean = _num(value["mean"])
    mean = f"+{mean}" if sign and not mean.startswith("-") else mean
    return f"{mean} [{_num(value['low'])}, {_num(value['high'])}]"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def table(result: dict[str, Any], budget: int) -> str:
    """One budget's rows, best first, then those that cannot reach it."""
    head = ["strategy", "equivalent tokens", "all %, 95 % CI", "over random, 95 % CI", "p", *TYPES]
    head += ["prefill ms", "of unpruned", "selection ms"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    here = [r for r in result["rows"] if r["budget"] == budget and "same_as" not in r]
    ran = sorted((r for r in here if "refused" not in r), key=lambda r: -r["all"]["mean"])
    for row in [*(r for r in result["rows"] if r["budget"] is None), *ran]:
        against = row["against"].get(str(budget))
        tokens = _num(row["equivalent_tokens"], 0 if float(row["equivalent_tokens"]).is_integer() else 1)
        cells = [
            row["label"],
            f"**{tokens}** †" if row.get("marked") else tokens,
            _span(row["all"]),
            _span(against, sign=True) if against else "-",
            _p(against["p"]) if against else "-",
            *(_num(row["types"][t]) if t in row["types"] else "-" for t in TYPES),
            _num(row["prefill_ms"]) if "prefill_ms" in row else "-",
            f"{row['of_unpruned']:.0%}" if "prefill_ms" in row else "-",
            f"{_num(row['selection_ms'])} ({row['selection_share']:.0%})" if "prefill_ms" in row else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for row in here:
        if "refused" in row:
            reason = short(row["refused"], result["depth"]).replace("|", "/")
            lines.append(f"| {row['label']} | cannot reach: {reason} |" + " - |" * (len(head) - 2))
    return "\n".join(lines)


def markdown(result: dict[str, Any], plots: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page, from a summarised result alone.

    Parameters:
        plots: (alternative text, path as seen from the page).
    """
    setup = result["setup"]
    twins = any("same_as" in r for r in result["rows"])
    lines = [
        "# Leaderboard of the embedded model",
        "",
        f"Every strategy at the same number of *equivalent tokens* (mean over the {result['depth']} decoder layers of visual",
        f"tokens computed on, of {result['visual_tokens']}) on `assets/{setup['model']}`: real `generate` calls through the",
        f"public API, greedy, exact match, {result['questions']} questions about {len(result['pictures'])} held-out pictures",
        f'(and {result["reading"]} about a printed word, which "all" does not count). Generated from the JSON beside the',
        "plots; no number was typed.",
        "",
        f"- Command: `{result['command']}`",
        f"- Made {setup['date']} in {setup['minutes']:g} minutes on {setup['device']}, {setup['cores']} cores; vtprune"
        f" {setup['vtprune']}, torch {setup['torch']}, transformers {setup['transformers']}, Python {setup['python']};"
        f" {setup['dtype']}, attention kernel `{setup['attention']}`.",
        "- Intervals: percentile bootstrap, 10,000 resamples of *pictures* (the questions about one share what was kept of it),"
        " the same draws for every row, so that differences to random are paired. p: share of resamples in which the row is"
        " not above random, one-sided.",
        "- Random: 3 draws per picture, other ones on every picture, averaged question by question. Oracle: knows the objects'"
        " patches; an upper bound, no method. Compositions divide the budget as `vtprune.create` does.",
        f"- Time: medians over {setup['timing_pictures']} pictures with one question each, one process, {setup['threads']}"
        " threads; on each picture all rows of all budgets run in turn, after one uncounted turn. Prefill is encoder,"
        " projector and decoder up to the first logits. Selection is all that vtprune adds, and its share of that prefill."
        ' "Of unpruned" is the median of ratios on the same picture.',
        f"- † Measured equivalent tokens are more than {TOLERANCE:.0%} from the budget: not at equal cost. Resolution takes the"
        " nearest grid that fits.",
        "- A setting behind a name (`layer=1`) stands where the default cannot reach the budget. All settings are in the JSON.",
    ]
    if twins:
        lines.append("- `todre, no gate` is left out where the gate never fired: it then is `todre`, answer by answer.")
    lines += ["", CAVEAT]
    lines += [line for alt, path in plots for line in ("", f"![{alt}]({path})")]
    for budget in result["budgets"]:
        lines += ["", f"## {budget} equivalent tokens", "", table(result, budget)]
    return "\n".join(lines) + "\n"


# Okabe and Ito's palette, told apart by the colour-blind; yellow left out, as it is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B", "#7A5C2E")
MARKERS = "os^DvPX*"
# points below the unpruned model that the lower row of a plot shows
NEAR = 9
PANELS = {
    "before": "chosen before the decoder",
    "inside": "chosen inside the decoder, wholly or in part",
    "composed": "references and compositions",
}


def draw(result: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Accuracy against equivalent tokens and against measured prefill time; needs matplotlib.

    Returns:
        (alternative text, path) of each picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, x, label in (
        ("tokens", "equivalent_tokens", "equivalent tokens"),
        ("time", "prefill_ms", "measured prefill, ms (median)"),
    ):
        path = folder / f"{name}.png"
        _figure(result, x, label, path)
        made.append(
            (
                f"Accuracy against {label}, one column per kind of strategy, with 95 % intervals; below, an enlargement",
                str(path),
            )
        )
    return made


def _figure(result: dict[str, Any], x: str, label: str, path: Path) -> None:
    from matplotlib import pyplot

    shown = [r for r in result["rows"] if "refused" not in r and "same_as" not in r and x in r]
    bare = next((r for r in shown if r["budget"] is None), None)
    floor = [r for r in shown if r["name"] == BASELINE]
    figure, axes = pyplot.subplots(2, len(PANELS), figsize=(14.5, 10), sharex=True, sharey="row", layout="constrained")
    for column, (group, title) in enumerate(PANELS.items()):
        names = list(dict.fromkeys(r["name"] for r in shown if r["group"] == group))
        if group == "composed":
            more = (r["name"] for r in shown if r["group"] == "reference" and r["budget"] and r["name"] != BASELINE)
            names = [*dict.fromkeys(more), *names]
        for axis, near in zip(axes[:, column], (False, True), strict=True):
            if bare:
                axis.axhline(bare["all"]["mean"], color="0.25", lw=1, ls="--", label="unpruned", zorder=1)
                if x == "prefill_ms":
                    axis.axvline(bare[x], color="0.25", lw=1, ls="--", zorder=1)
            _line(axis, floor, x, "0.5", "x", "random", 0, near)
            for at, name in enumerate(names):
                colour, marker = PALETTE[at % len(PALETTE)], MARKERS[at % len(MARKERS)]
                mine = [r for r in shown if r["name"] == name]
                _line(axis, mine, x, colour, marker, name, at - (len(names) - 1) / 2, near)
            if x == "equivalent_tokens":
                axis.set_xscale("log", base=2)
                axis.set_xticks(result["budgets"], [str(b) for b in result["budgets"]])
                axis.minorticks_off()
            axis.grid(color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set(title=title)
        axes[1, column].set(xlabel=label)
        if bare:
            axes[1, column].set_ylim(bare["all"]["mean"] - NEAR, max(r["all"]["high"] for r in shown) + 0.5)
        axes[1, column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9)
    axes[0, 0].set_ylabel("all types but reading, % right")
    axes[1, 0].set_ylabel("the same, near the unpruned model")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axis, rows: list[dict[str, Any]], x: str, colour: str, marker: str, name: str, place: float, near: bool) -> None:
    """One strategy: a band, or (`near`, or against time) bars, moved aside by `place` where many share an x."""
    if not rows:
        return
    # by budget, not by x: times may cross
    rows = sorted(rows, key=lambda r: r["budget"])
    aside = 1.018**place if near and x == "equivalent_tokens" else 1
    at, mean = [r[x] * aside for r in rows], [r["all"]["mean"] for r in rows]
    low, high = [r["all"]["low"] for r in rows], [r["all"]["high"] for r in rows]
    axis.plot(at, mean, color=colour, marker=marker, ms=5, lw=1.2 if near else 1.6, label=name, zorder=3)
    if x == "equivalent_tokens" and not near:
        axis.fill_between(at, low, high, color=colour, alpha=0.13, lw=0, zorder=2)
    else:
        error = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        axis.errorbar(at, mean, error, fmt="none", ecolor=colour, alpha=0.5, elinewidth=1.2, zorder=2)


def publish(result: dict[str, Any], page: Path) -> None:
    """Write the page and, with matplotlib there, its plots in the folder of its name."""
    try:
        plots = draw(result, page.with_suffix(""))
    except ImportError:
        print("matplotlib is not installed: the page has no plots (pip install 'vtprune[eval]').", file=sys.stderr)
        plots = []
    write(page, markdown(result, [(alt, Path(path).relative_to(page.parent).as_posix()) for alt, path in plots]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="the checkpoint")
    parser.add_argument("--questions", type=int, default=1000, help="at least so many, reading not counted")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="equivalent tokens")
    parser.add_argument("--only", nargs="+", help="names of rows; the unpruned one always stands")
    parser.add_argument("--schedules", type=Path, default=ROOT / "assets" / "schedules", help="folder of searched schedules")
    parser.add_argument("--workers", type=int, default=2, help="processes for the accuracy, one thread each")
    parser.add_argument("--timing-pictures", type=int, default=20, help="pictures of the timing pass")
    parser.add_argument("--json", type=Path, help="write the numbers there; a killed run goes on from its .part.json")
    parser.add_argument("--read", type=Path, help="take the numbers from this file; with --only, measure those rows anew")
    parser.add_argument("--markdown", type=Path, help="write the page there, plots in the folder of its name")
    args = parser.parse_args()
    if args.timing_pictures < 1 or args.questions < 1 or args.workers < 1 or min(args.budgets) < 1:
        parser.error("--questions, --budgets, --workers and --timing-pictures: at least 1 each.")
    result = json.loads(args.read.read_text(encoding="utf-8")) if args.read else None
    partial = args.json.with_suffix(".part.json") if args.json else None
    if args.only or result is None:
        fresh = measure(
            args.folder,
            args.questions,
            args.budgets,
            args.schedules,
            args.only,
            args.workers,
            args.timing_pictures,
            partial,
        )
        fresh["command"] = shlex.join(["python", "-m", "evaluations.leaderboard", *sys.argv[1:]])
        result = merged(result, fresh) if result else fresh
    result = summarise(result)
    for budget in result["budgets"]:
        print(f"\n{budget}\n{table(result, budget)}")
    if args.json:
        write(args.json, dumps(result))
        partial.unlink(missing_ok=True)
    if args.markdown:
        publish(result, args.markdown)


if __name__ == "__main__":
    main()
