"""The numbers of a sweep's report: rows that may be compared, with intervals, relative to the unpruned model.

Rows are compared over one task list, on one machine, with one kernel, dtype and set of versions; anything else is refused
with both sides named. Intervals are percentiles of one bootstrap over questions, the same draws for every row, so that
differences are paired; a task without plain scores per question is drawn from its standard error instead.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtprune.sweep.config import SweepError
from vtprune.sweep.store import Labels, Record, Results

RESAMPLES = 2000
LEVEL = 95
_CHUNK = 1 << 23
Key = tuple[str, str, int | float | None]
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """A figure with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Paper:
    """A published figure.

    Parameters:
        value: in the paper's unit; relative: percent of the unpruned model by the same source, where that is known.
        source: number of its source in the report's list, from 1.
    """

    value: float
    relative: float | None
    source: int


@dataclass(frozen=True)
class Cell:
    """A row on one task.

    Parameters:
        accuracy: in percent where the metric is a share, as it is otherwise; relative: percent of the unpruned model.
        questions: how many were asked.
    """

    accuracy: Value
    relative: Value | None
    questions: int | None
    paper: Paper | None


@dataclass
class Row:
    """A model with a strategy at a budget.

    Parameters:
        cells: by task; those that failed or were not run are missing.
        missing: why the row stands in no mean and no plot; empty if nothing is missing.
        accuracy: mean over tasks, None where a task's metric is no share; relative: mean over tasks, percent.
        equivalent_tokens, entered, visual_tokens, prefill_ms, ttft_ms, tpot_ms, selection_ms, selection_share, kv_bytes,
            flops_share, peak_bytes: means over tasks, times in milliseconds; None where nothing was measured.
        seeds: runs that were averaged.
    """

    model: str
    strategy: str
    budget: int | float | None
    unpruned: bool
    cells: dict[str, Cell] = field(default_factory=dict)
    papers: dict[str, Paper] = field(default_factory=dict)
    missing: str = ""
    accuracy: Value | None = None
    relative: Value | None = None
    equivalent_tokens: float | None = None
    entered: float | None = None
    visual_tokens: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    selection_ms: float | None = None
    selection_share: float | None = None
    kv_bytes: float | None = None
    flops_share: float | None = None
    peak_bytes: float | None = None
    seeds: int = 1

    @property
    def title(self) -> str:
        if self.unpruned:
            return "unpruned"
        return self.strategy if self.budget is None else f"{self.strategy} @ {self.budget}"


@dataclass
class Section:
    """One model: its rows, and which of the tasks are shares (shown in percent)."""

    model: str
    rows: list[Row]
    shares: dict[str, bool]

    @property
    def base(self) -> Row | None:
        return next((row for row in self.rows if row.unpruned), None)


@dataclass
class Report:
    """What the pages show.

    Parameters:
        conditions: what all rows have in common, by name; metrics: the one shown of each task.
        intervals: how each task's interval was had; sources: of published figures; failures: (trial, error).
    """

    title: str
    note: str
    conditions: dict[str, str]
    tasks: list[str]
    metrics: dict[str, str]
    intervals: dict[str, str]
    sections: list[Section]
    sources: list[str]
    failures: list[tuple[str, str]]
    notes: list[str]
    trials: int


@dataclass
class _Known:
    """A trial of the plan: what it is called, and its record if there is one."""

    labels: Labels
    tasks: list[str]
    seed: int
    record: Record | None
    digest: str


def _machine_of(record: Record) -> str:
    hardware = record.hardware
    if hardware is None:
        return "unknown"
    kind = "" if record.measured is None else record.measured.device.partition(":")[0]
    if kind not in ("", "cpu"):
        return f"{hardware.gpus:g} x {hardware.device}"
    return f"{hardware.device}, {hardware.threads} of {hardware.cores} cores"


# name in messages and in the header, key of --only, how to read it
_CONDITIONS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("machine", "device", _machine_of),
    ("attention kernel", "attn", lambda r: r.measured.attn if r.measured else r.settings.attn),
    ("dtype", "dtype", lambda r: r.measured.dtype if r.measured else r.settings.dtype),
    ("batch size", "batch_size", lambda r: str(r.settings.batch_size)),
    ("questions per task", "limit", lambda r: "all" if r.settings.limit is None else f"{r.settings.limit:g}"),
    ("task files", "include", lambda r: r.settings.include or "lmms-eval's own"),
    ("vtprune", "vtprune", lambda r: r.versions.get("vtprune", "?")),
    ("torch", "torch", lambda r: r.versions.get("torch", "?")),
    ("transformers", "transformers", lambda r: r.versions.get("transformers", "?")),
    ("lmms-eval", "lmms_eval", lambda r: r.versions.get("lmms_eval", "?")),
)
_COSTS = ("equivalent_tokens", "entered", "visual_tokens", "ttft_ms", "tpot_ms", "selection_ms", "kv_bytes", "peak_bytes")


def build(folders: Sequence[str | Path], only: Mapping[str, Sequence[str]] | None = None) -> Report:
    """Read results folders and compute the report.

    Parameters:
        only: which trials, values by key: model, strategy, budget, task, seed, or one of the conditions. The unpruned
            model stays whatever strategies and budgets are chosen.
    Raises:
        SweepError: if there is nothing, or the trials may not be compared; both sides are named.
    """
    plans = [(folder, Results(folder)) for folder in dict.fromkeys(map(Path, folders))]
    known: list[_Known] = []
    notes: list[str] = []
    title, note, metrics, references, at_once = "", "", {}, [], []
    for folder, results in plans:
        plan = results.plan()
        records = results.records() if results.trials.is_dir() else []
        if plan is None and not records:
            raise SweepError(f"no results of a sweep in {str(folder)!r}; `vtprune sweep` writes them.")
        by_digest = {record.digest: record for record in records}
        if plan is None:
            known += [_Known(r.labels, r.settings.tasks, r.settings.seed, r, r.digest) for r in records]
            continue
        planned = [_Known(t.labels, t.tasks, t.seed, by_digest.pop(t.digest, None), t.digest) for t in plan.trials]
        known += planned
        if by_digest:
            notes.append(f"{len(by_digest)} trials of earlier sweeps in {folder.name!r} are left out; its last sweep counts.")
        title, note = title or plan.name, note or plan.note
        metrics |= plan.metrics
        references += plan.reference
        if plan.at_once != 1:
            at_once.append(plan.at_once)
    chosen = _choose(known, only or {})
    done = [k for k in chosen if k.record is not None and k.record.status == "done"]
    if not done:
        raise SweepError("there is no trial that ended well to report; run the sweep first, or see its failed trials.")
    _comparable([(k, k.record) for k in done if k.record is not None])
    tasks = _task_list(chosen, (only or {}).get("task"))
    made = _Builder(chosen, tasks, metrics, references)
    sections = made.sections()
    missing = sum(k.record is None for k in chosen)
    if missing:
        notes.append(f"{missing} of {len(chosen)} trials have not been run yet; the same sweep goes on with them.")
    if at_once:
        notes.append("Trials may have run at the same time on one machine, which makes times longer and less certain.")
    notes += made.notes
    first = done[0].record
    conditions = {name: read(first) for name, _, read in _CONDITIONS}
    conditions |= {
        "Python": _all(k.record.versions.get("python", "?") for k in done),
        "commit": _all(k.record.commit or "none (installed)" for k in done),
        "date": _span([k.record.started for k in done]),
    }
    failures = [
        (f"{_title(k.labels)}, {' '.join(k.tasks)}", k.record.errors[-1].error if k.record.errors else "unknown")
        for k in chosen
        if k.record is not None and k.record.status == "failed"
    ]
    return Report(
        title or "sweep",
        note,
        conditions,
        made.tasks,
        made.metrics,
        made.intervals,
        sections,
        made.sources,
        failures,
        notes,
        len(done),
    )


def _choose(known: Sequence[_Known], only: Mapping[str, Sequence[str]]) -> list[_Known]:
    keys = {"model", "strategy", "budget", "task", "seed", *(key for _, key, _ in _CONDITIONS)}
    for key in only:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SweepError(f"--only {key}: nothing of that name.{hint} Known: {', '.join(sorted(keys))}.")
    reads = {key: read for _, key, read in _CONDITIONS}
    for key, values in only.items():
        present: set[str] = set()
        kept = []
        for one in known:
            if key == "task":
                found = set(one.tasks)
                good = bool(found & set(values))
            elif key in reads:
                # what has not run has no conditions yet
                found = {reads[key](one.record)} if one.record is not None and one.record.status == "done" else set()
                good = any(_meant(key, value, text) for text in found for value in values)
            else:
                text = str(one.seed if key == "seed" else getattr(one.labels, key))
                found = {text}
                good = text in values or (key in ("strategy", "budget") and one.labels.budget is None)
            present |= found
            kept += [one] if good else []
        # a value that nothing has is a mistake, even where others have something
        for value in values:
            if not any(_meant(key, value, text) for text in present):
                raise SweepError(f"--only {key}={value}: no trial has it. Here: {', '.join(sorted(present))}.")
        known = kept
    if not known:
        raise SweepError("no trial is left after --only.")
    return list(known)


def _meant(key: str, value: str, text: str) -> bool:
    """Whether a value of --only names `text`; of a machine's long name a part is enough."""
    return value.lower() in text.lower() if key == "device" else value == text


def _comparable(trials: Sequence[tuple[_Known, Record]]) -> None:
    """Raises SweepError unless all trials ran under the same conditions."""
    for name, key, read in _CONDITIONS:
        found: dict[str, list[_Known]] = {}
        for one, record in trials:
            found.setdefault(read(record), []).append(one)
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise SweepError(
                f"these trials cannot be compared, their {name} differs: {one!r} ({len(first)} trials, such as "
                f"{_title(first[0].labels)}) and {other!r} ({len(second)}, such as {_title(second[0].labels)}). "
                f"Choose with --only {key}=..."
            )


def _task_list(chosen: Sequence[_Known], only: Sequence[str] | None) -> list[str]:
    """The tasks that every row was to be asked, groups in place of their parts.

    Raises:
        SweepError: if rows were to be asked different ones.
    """
    by_row: dict[Key, list[str]] = {}
    for one in chosen:
        found = by_row.setdefault(_key(one), [])
        found += [task for task in one.tasks if task not in found and (only is None or task in only)]
    rows = list(by_row.items())
    for key, tasks in rows[1:]:
        if set(tasks) != set(rows[0][1]):
            raise SweepError(
                f"these rows cannot be compared, their task lists differ: {_name(rows[0][0])} has {', '.join(rows[0][1])}, "
                f"{_name(key)} has {', '.join(tasks)}. Choose with --only task=... or --only strategy=..."
            )
    return rows[0][1]


class _Builder:
    """From chosen trials to sections; `tasks`, `metrics`, `intervals`, `sources` and `notes` are filled on the way."""

    def __init__(self, chosen: Sequence[_Known], asked: Sequence[str], metrics: Mapping[str, str], references: Sequence[Any]):
        self.rows: dict[Key, list[_Known]] = {}
        for one in chosen:
            self.rows.setdefault(_key(one), []).append(one)
        self.asked = list(asked)
        self.wanted = dict(metrics)
        self.references = list(references)
        self.tasks: list[str] = []
        self.metrics: dict[str, str] = {}
        self.intervals: dict[str, str] = {}
        self.sources: list[str] = []
        self.notes: list[str] = []
        # [row][task] -> seeds' records
        self.runs: dict[Key, dict[str, list[Record]]] = {}
        self._gather()

    def _gather(self) -> None:
        for key, trials in self.rows.items():
            runs = self.runs.setdefault(key, {})
            seen: set[tuple[str, int]] = set()
            for one in trials:
                for asked in one.tasks:
                    if (asked, one.seed) in seen:
                        raise SweepError(
                            f"{_name(key)} was measured twice on {asked} (trials/{one.digest}.json is one of the two). Give "
                            "only one of the results folders."
                        )
                    seen.add((asked, one.seed))
                if one.record is None or one.record.status != "done":
                    continue
                for task in one.record.tasks:
                    # of a shared process, a task that was not chosen; a group's parts do not bear its name
                    if task in one.tasks and task not in self.asked:
                        continue
                    runs.setdefault(task, []).append(one.record)
                    if task not in self.tasks:
                        self.tasks.append(task)
        for task in self.tasks:
            self.metrics[task] = self._metric(task)
            counts = {r.tasks[task].n: key for key, runs in self.runs.items() for r in runs.get(task, ())}
            if len(counts) > 1:
                (n, one), (m, other) = list(counts.items())[:2]
                raise SweepError(
                    f"on {task}, {_name(one)} was asked {n} questions and {_name(other)} {m}; they cannot be compared."
                )

    def _metric(self, task: str) -> str:
        records = [r for runs in self.runs.values() for r in runs.get(task, ())]
        wanted = self.wanted.get(task) or next(iter(records[0].tasks[task].metrics))
        for record in records:
            if wanted not in record.tasks[task].metrics:
                known = ", ".join(record.tasks[task].metrics)
                raise SweepError(f"metrics: {task} has no metric {wanted!r} in trials/{record.digest}.json, but {known}.")
        return wanted

    def sections(self) -> list[Section]:
        models = dict.fromkeys(key[0] for key in self.rows)
        return [self._section(model) for model in models]

    def _section(self, model: str) -> Section:
        # the unpruned model first; otherwise as planned
        keys = sorted((key for key in self.rows if key[0] == model), key=lambda key: not _unpruned(self.rows[key]))
        values = {key: {task: self._mean(runs, task) for task, runs in self.runs[key].items()} for key in keys}
        shares = {task: all(0 <= found[task] <= 1 for found in values.values() if task in found) for task in self.tasks}
        draws = self._draws(keys, shares)
        base = next((key for key in keys if _unpruned(self.rows[key])), None)
        if base is None:
            self.notes.append(f"{model}: the unpruned model was not run, so nothing is relative to it; add the strategy none.")
        rows = []
        for key in keys:
            row = Row(*key, unpruned=key == base, seeds=len({one.seed for one in self.rows[key]}))
            row.missing = self._missing(key)
            drawn: list[Draws | None] = []
            ratios: list[tuple[float, Draws | None] | None] = []
            for task in self.tasks:
                row.papers |= self._paper(key, task)
                if task not in values[key]:
                    continue
                scale = 100.0 if shares[task] else 1.0
                own = draws.get((key, task))
                ratio = None
                if base is not None and task in values[base]:
                    lower = not self.runs[key][task][0].tasks[task].metrics[self.metrics[task]].higher_is_better
                    ratio = _ratio(values[key][task], values[base][task], own, draws.get((base, task)), lower)
                drawn.append(None if own is None else own * scale)
                ratios.append(ratio)
                row.cells[task] = Cell(
                    _value(values[key][task] * scale, None if own is None else own * scale),
                    None if ratio is None else _value(*ratio) if key != base else Value(ratio[0]),
                    self.runs[key][task][0].tasks[task].n,
                    row.papers.get(task),
                )
            if not row.missing:
                if all(shares[task] for task in self.tasks):
                    row.accuracy = _value(_average([cell.accuracy.value for cell in row.cells.values()]), _averaged(drawn))
                if ratios and all(ratio is not None for ratio in ratios):
                    some = [ratio for ratio in ratios if ratio is not None]
                    spread = None if key == base else _averaged([r[1] for r in some])
                    row.relative = _value(_average([r[0] for r in some]), spread)
            self._costs(key, row)
            rows.append(row)
        return Section(model, rows, shares)

    def _missing(self, key: Key) -> str:
        failed = [t for one in self.rows[key] if one.record is not None and one.record.status == "failed" for t in one.tasks]
        waiting = [t for one in self.rows[key] if one.record is None for t in one.tasks]
        absent = [task for task in self.tasks if task not in self.runs[key] and task not in (*failed, *waiting)]
        reasons = {"failed": failed, "not run": waiting, "no figure": absent}
        return "; ".join(f"{why}: {', '.join(dict.fromkeys(tasks))}" for why, tasks in reasons.items() if tasks)

    def _mean(self, runs: Sequence[Record], task: str) -> float:
        return _average([r.tasks[task].metrics[self.metrics[task]].value for r in runs])

    def _draws(self, keys: Sequence[Key], shares: Mapping[str, bool]) -> dict[tuple[Key, str], Draws]:
        """Bootstrap distributions of each row's value on each task, [RESAMPLES], paired over rows."""
        found: dict[tuple[Key, str], Draws] = {}
        for number, task in enumerate(self.tasks):
            rng = np.random.default_rng([0, number])
            present = [key for key in keys if task in self.runs[key]]
            scores = {key: self._scores(self.runs[key][task], task) for key in present}
            if present and all(s is not None for s in scores.values()):
                self._same_questions(scores, task)
                order = sorted(scores[present[0]])
                table = np.array([[scores[key][doc] for doc in order] for key in present])
                for key, drawn in zip(present, _resampled(table, rng), strict=True):
                    found[key, task] = drawn
                self.intervals[task] = f"paired bootstrap over {len(order)} questions"
                continue
            errors = {key: self._stderr(self.runs[key][task], task) for key in present}
            for key, error in errors.items():
                if error is not None:
                    drawn = self._mean(self.runs[key][task], task) + error * rng.standard_normal(RESAMPLES)
                    found[key, task] = drawn.clip(0, 1) if shares[task] else drawn
            self.intervals[task] = "standard error, not paired" if any(e is not None for e in errors.values()) else "none"
        return found

    def _scores(self, runs: Sequence[Record], task: str) -> dict[str, float] | None:
        """Each question's score, mean over seeds; None where they do not make up the value (an F1, say)."""
        metric = self.metrics[task]
        found = [r.tasks[task].samples.get(metric) for r in runs]
        for record, scores in zip(runs, found, strict=True):
            value = record.tasks[task].metrics[metric].value
            if not scores or not math.isclose(_average(list(scores.values())), value, rel_tol=1e-6, abs_tol=1e-9):
                return None
        first = found[0]
        if any(scores.keys() != first.keys() for scores in found):
            return None
        return {doc: _average([scores[doc] for scores in found]) for doc in first}

    @staticmethod
    def _same_questions(scores: Mapping[Key, Mapping[str, float]], task: str) -> None:
        (one, first), *others = scores.items()
        for other, second in others:
            if first.keys() != second.keys():
                raise SweepError(
                    f"on {task}, {_name(one)} and {_name(other)} answered different questions; they cannot be compared."
                )

    def _stderr(self, runs: Sequence[Record], task: str) -> float | None:
        errors = [r.tasks[task].metrics[self.metrics[task]].stderr for r in runs]
        if any(e is None for e in errors):
            return None
        # seeds ask the same questions: their errors do not average out
        return _average(errors)

    def _costs(self, key: Key, row: Row) -> None:
        def mean(name: str) -> float | None:
            found = [
                getattr(r.measured.tasks[task], name)
                for task, runs in self.runs[key].items()
                for r in runs
                if r.measured and task in r.measured.tasks
            ]
            return _average(found) if found and all(v is not None for v in found) else None

        for name in _COSTS:
            setattr(row, name, mean(name))
        whole = mean("prefill_ms")
        row.prefill_ms = mean("prefill_ms_median") if mean("prefill_ms_median") is not None else whole
        if row.selection_ms is not None and whole:
            row.selection_share = row.selection_ms / whole
        flops, full = mean("flops"), mean("flops_full")
        if flops is not None and full:
            row.flops_share = flops / full

    def _paper(self, key: Key, task: str) -> dict[str, Paper]:
        entry = next((r for r in self.references if (r.strategy, r.budget, r.task) == (key[1], key[2], task)), None)
        if entry is None:
            return {}
        full = [r for r in self.references if r.budget is None and r.task == task]
        base = next((r for r in full if r.source == entry.source), None)
        if entry.source not in self.sources:
            self.sources.append(entry.source)
        relative = 100 * entry.value / base.value if base is not None and base.value else None
        return {task: Paper(entry.value, relative, self.sources.index(entry.source) + 1)}


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain) those that no other one beats in both, by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _resampled(table: Draws, rng: np.random.Generator) -> Draws:
    """Means of `table` [rows, n] over resampled columns: [rows, RESAMPLES]."""
    rows, n = table.shape
    step = max(1, min(RESAMPLES, _CHUNK // n))
    parts = []
    for start in range(0, RESAMPLES, step):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, RESAMPLES - start))
        parts.append(table @ counts.T / n)
    return np.concatenate(parts, axis=1).reshape(rows, RESAMPLES)


def _ratio(value: float, base: float, own: Draws | None, other: Draws | None, lower: bool) -> tuple[float, Draws | None] | None:
    """Percent of the unpruned model; its inverse where less is better."""
    if lower:
        value, base, own, other = base, value, other, own
    if base == 0:
        return None
    if own is None or other is None or not np.all(other):
        return 100 * value / base, None
    return 100 * value / base, 100 * own / other


def _value(value: float, draws: Draws | None) -> Value:
    if draws is None:
        return Value(value)
    low, high = np.percentile(draws, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Value(value, float(low), float(high))


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _averaged(draws: Sequence[Draws | None]) -> Draws | None:
    return None if not draws or any(d is None for d in draws) else np.mean([d for d in draws if d is not None], axis=0)


def _key(one: _Known) -> Key:
    return one.labels.model, one.labels.strategy, one.labels.budget


def _unpruned(trials: Sequence[_Known]) -> bool:
    return trials[0].labels.budget is None


def _title(labels: Labels) -> str:
    return _name((labels.model, labels.strategy, labels.budget))


def _name(key: Key) -> str:
    return f"{key[0]}, {key[1]}" + ("" if key[2] is None else f" @ {key[2]}")


def _all(found: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(found))


def _span(dates: Sequence[str]) -> str:
    days = sorted(date.partition(" ")[0] for date in dates)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
