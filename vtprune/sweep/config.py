"""A sweep's yaml: what stands in it, checked before anything runs, and the trials that it comes to.

Every mistake is an error that names the key. A trial's digest covers all that its result depends on and nothing else:
labels, time-outs and how many run at once may change without a trial being run again.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

import vtprune
from vtprune.pruner import BudgetError, VtpruneError, check_budget

SCHEMA = 1
UNPRUNED = "none"
TINY = "tiny"
MAX_BYTES = 1 << 20
MAX_TRIALS = 100_000
# what decides what is asked and how it is judged, questions that lie beside it included
_TASK_FILES = ("yaml", ".yml", ".py", ".json", ".jsonl", ".parquet")
# arguments of the plugin that the sweep sets itself
_OWN_ARGS = ("pruner", "strategy", "keep", "positions", "attn", "dtype", "device", "batch_size")
_TASK = re.compile(r"[A-Za-z0-9_][\w.@-]*")


class SweepError(VtpruneError, ValueError):
    """A sweep, its results folder or its report that cannot be had; the message says what was found and what to do."""


def _whole_budget(value: Any) -> Any:
    try:
        return check_budget(value, "budget ")
    except BudgetError as error:
        raise ValueError(str(error)) from error


def _limited(value: Any) -> Any:
    good = not isinstance(value, bool) and (
        (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value < 1)
    )
    if value is not None and not good:
        raise ValueError(f"{value!r}: give a number of questions per task (an int of 1 or more) or a share between 0 and 1.")
    return value


def _task_name(value: Any) -> Any:
    if not isinstance(value, str) or not _TASK.fullmatch(value):
        raise ValueError(f"{value!r} is no name of an lmms-eval task.")
    return value


def _model(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value, "pretrained": None if value == TINY else value}
    if isinstance(value, Mapping) and "name" not in value:
        return {"name": value.get("pretrained") or TINY, **value}
    return value


def _strategy(value: Any) -> Any:
    return {"pruner": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Budget = Annotated[int | float, BeforeValidator(_whole_budget)]
Limit = Annotated[int | float | None, BeforeValidator(_limited)]
Task = Annotated[str, BeforeValidator(_task_name)]
# tasks in one inner list share a process and with it the loading of the model
Group = Annotated[list[Task], BeforeValidator(_listed), Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(_Strict):
    """A model of the sweep; `pretrained` None is the embedded tiny one, `args` more of the plugin's arguments, such as
    `max_frames`. None elsewhere: what the sweep says."""

    name: str
    pretrained: str | None = None
    args: dict[str, str | int | float | bool] = {}
    attn: str | None = None
    dtype: str | None = None
    device: str | None = None


class Strategy(_Strict):
    """A strategy of the sweep; `fields` go to `vtprune.create`, `budgets` take the place of the sweep's."""

    pruner: str
    name: str | None = None
    fields: dict[str, Any] = {}
    positions: Literal["original", "compact"] | None = None
    budgets: list[Budget] | None = None

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        return ", ".join([self.pruner, *(f"{key}={value}" for key, value in self.fields.items())])


class Reference(_Strict):
    """A published figure, for a column beside ours; `budget` is left out for the unpruned model.

    Parameters:
        value: in the paper's own unit (percent, or MME's points); source: where it stands.
    """

    strategy: str
    task: Task
    value: float
    source: str
    budget: Budget | None = None


class Sweep(_Strict):
    """What a yaml says. Every combination of model, strategy, budget, task and seed is one trial.

    Parameters:
        models: ids or folders, `tiny` for the embedded model, or mappings (`Model`).
        strategies: names as `vtprune list` shows them, `none` for the unpruned model, or mappings (`Strategy`).
        budgets: visual tokens per image (int) or their share (float).
        tasks: lmms-eval's names; an inner list shares one process.
        metrics: the metric that the report shows of a task, where it has several.
        limit: questions per task, or a share of them; None for all.
        seeds: for strategies that draw; others run once, with the first.
        include_path: folder of more lmms-eval tasks, seen from the yaml.
        timeout: seconds for one trial; gpus, cpus: what one trial takes; concurrency: most trials at once.
        note: for the report's head.
    """

    name: str = "sweep"
    note: str = ""
    models: Annotated[list[Annotated[Model, BeforeValidator(_model)]], Field(min_length=1)]
    strategies: Annotated[list[Annotated[Strategy, BeforeValidator(_strategy)]], Field(min_length=1)]
    budgets: list[Budget] = []
    tasks: Annotated[list[Group], Field(min_length=1)]
    metrics: dict[str, str] = {}
    limit: Limit = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    attn: str = "sdpa"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    include_path: str | None = None
    timeout: Annotated[int | float, Field(gt=0)] = 24 * 3600
    gpus: Annotated[int | float, Field(ge=0)] = 0
    cpus: Annotated[int, Field(ge=1)] = 1
    concurrency: Annotated[int, Field(ge=1)] | None = None
    reference: list[Reference] = []


@dataclass(frozen=True)
class Trial:
    """One lmms-eval run.

    Parameters:
        settings: all that its result depends on, JSON-ready; labels: model, strategy and budget as the report names them.
        include_path: where the task files lie on this machine, not part of the settings (their content is).
    """

    settings: dict[str, Any]
    labels: dict[str, Any]
    include_path: str | None = None

    @property
    def digest(self) -> str:
        return digest(self.settings)

    @property
    def title(self) -> str:
        keep = "" if self.labels["budget"] is None else f" @ {self.labels['budget']}"
        seed = f", seed {self.settings['seed']}" if self.settings["seed"] else ""
        return f"{self.labels['model']}, {self.labels['strategy']}{keep}, {' '.join(self.settings['tasks'])}{seed}"


def digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits over a trial's settings and vtprune's version."""
    content = {"schema": SCHEMA, "vtprune": vtprune.__version__, "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read and check a sweep.

    Parameters:
        overrides: keys of the yaml with values that take its place; those that are None do not.
    Raises:
        SweepError: if the file cannot be read, or with the first mistake in it, by name.
    """
    path = Path(path)
    content = _read_yaml(path)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if "include_path" not in given and isinstance(content.get("include_path"), str):
        content["include_path"] = str(path.parent / content["include_path"])
    if given.keys() & {"models", "tasks"}:
        # figures of a paper say nothing about another model or other tasks, and metrics belong to tasks
        content.pop("reference", None)
    if "tasks" in given:
        content.pop("metrics", None)
    if "budgets" in given:
        strategies = content.get("strategies")
        for entry in strategies if isinstance(strategies, list) else []:
            if isinstance(entry, dict):
                entry.pop("budgets", None)
    content.update(given)
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise SweepError(f"{path.name}: {_first_mistake(error)}") from error
    _check(sweep, path.name)
    return sweep


def plan(sweep: Sweep) -> list[Trial]:
    """The trials of a sweep, each once, in the order in which they are to run.

    Raises:
        SweepError: if the task files cannot be read, or there are too many trials.
    """
    include = None if sweep.include_path is None else _content_of(Path(sweep.include_path))
    found: dict[str, Trial] = {}
    for model in sweep.models:
        for strategy in sweep.strategies:
            for keep in _budgets(sweep, strategy):
                for fields, seed in _draws(sweep, strategy):
                    for tasks in sweep.tasks:
                        settings = {
                            "pretrained": model.pretrained,
                            "args": dict(model.args),
                            "pruner": None if strategy.pruner == UNPRUNED else strategy.pruner,
                            "keep": keep,
                            "positions": strategy.positions,
                            "fields": fields,
                            "attn": model.attn or sweep.attn,
                            "dtype": model.dtype or sweep.dtype,
                            "device": model.device or sweep.device,
                            "batch_size": sweep.batch_size,
                            "tasks": list(tasks),
                            "limit": sweep.limit,
                            "seed": seed,
                            "include": include,
                            "cpus": sweep.cpus,
                            "gpus": sweep.gpus,
                        }
                        labels = {"model": model.name, "strategy": strategy.label, "budget": keep}
                        trial = Trial(settings, labels, sweep.include_path)
                        found.setdefault(trial.digest, trial)
                        if len(found) > MAX_TRIALS:
                            raise SweepError(f"this sweep has more than {MAX_TRIALS} trials; split it.")
    return list(found.values())


def _budgets(sweep: Sweep, strategy: Strategy) -> Sequence[int | float | None]:
    if strategy.pruner == UNPRUNED:
        return [None]
    return sweep.budgets if strategy.budgets is None else strategy.budgets


def _draws(sweep: Sweep, strategy: Strategy) -> list[tuple[dict[str, Any], int]]:
    """(fields, seed) of each run of a strategy: one per seed where it draws."""
    fields = dict(strategy.fields)
    if strategy.pruner == UNPRUNED or any(key.replace("__", ".").rpartition(".")[2] == "seed" for key in fields):
        return [(fields, sweep.seeds[0])]
    from vtprune.registry import strategy_class

    classes = [strategy_class(part.strip()) for part in strategy.pruner.split("+")]
    if not any(f.name == "seed" for cls in classes for f in dataclasses.fields(cls)):
        return [(fields, sweep.seeds[0])]
    return [({**fields, "seed": seed}, seed) for seed in sweep.seeds]


def _check(sweep: Sweep, name: str) -> None:
    """What the schema cannot tell: strategies, their fields and budgets, names given twice, references to nothing.

    Raises:
        SweepError: with the first mistake.
    """
    from vtprune import embedded
    from vtprune.registry import UnknownStrategyError, create

    # the embedded model brings schedules for strategies that follow one
    schedules = embedded.schedules() if all(m.pretrained is None for m in sweep.models) else {}
    _once([m.name for m in sweep.models], f"{name}: models")
    for at, model in enumerate(sweep.models):
        for key, value in (("pretrained", model.pretrained), *model.args.items()):
            if key in _OWN_ARGS or not _sendable(value):
                raise SweepError(f"{name}: models[{at}].{key}: {value!r} cannot be given to lmms-eval there.")
    _once([s.label for s in sweep.strategies], f"{name}: strategies", "give one of them a `name`")
    _once([task for group in sweep.tasks for task in group], f"{name}: tasks")
    for at, strategy in enumerate(sweep.strategies):
        where = f"{name}: strategies[{at}] ({strategy.pruner})"
        if strategy.pruner == UNPRUNED:
            if strategy.fields or strategy.budgets is not None or strategy.positions:
                raise SweepError(f"{where}: the unpruned model has no fields, budgets or positions.")
            continue
        budgets = _budgets(sweep, strategy)
        if not budgets:
            raise SweepError(f"{where} has no budget; give `budgets`, such as [192, 128, 64].")
        for key, value in strategy.fields.items():
            if not _sendable(value):
                raise SweepError(
                    f"{where}: field {key!r} is {value!r}; give a number, a word, true, false, null or a list of them."
                )
        fields = dict(strategy.fields)
        for part in (part.strip() for part in strategy.pruner.split("+")):
            if part in schedules and not {k.rpartition(".")[2] for k in fields} & {"schedule", "rates"}:
                fields[f"{part}.schedule"] = str(schedules[part])
        for keep in budgets:
            try:
                create(strategy.pruner, **{"keep": keep, **fields})
            except (VtpruneError, UnknownStrategyError, TypeError, ValueError) as error:
                raise SweepError(f"{where}, budget {keep}: {error}") from error
    if sweep.include_path is not None and not Path(sweep.include_path).is_dir():
        raise SweepError(f"{name}: include_path {sweep.include_path!r} is no folder.")
    if sweep.gpus == 0 and any((m.device or sweep.device).startswith("cuda") for m in sweep.models):
        raise SweepError(f"{name}: device cuda with gpus: 0; say how many GPUs a trial takes, such as `gpus: 1`.")
    tasks = [task for group in sweep.tasks for task in group]
    for task in sweep.metrics:
        _among(task, tasks, f"{name}: metrics", "task")
    budgets_of = {s.label: _budgets(sweep, s) for s in sweep.strategies}
    for at, reference in enumerate(sweep.reference):
        where = f"{name}: reference[{at}]"
        _among(reference.task, tasks, where, "task")
        _among(reference.strategy, list(budgets_of), where, "strategy")
        if reference.budget not in budgets_of[reference.strategy]:
            known = ", ".join(map(str, budgets_of[reference.strategy]))
            raise SweepError(f"{where}: {reference.strategy} has no budget {reference.budget} in this sweep, but {known}.")


def _sendable(value: Any) -> bool:
    """Whether a field can travel in lmms-eval's --model_args."""
    if isinstance(value, list):
        return all(_sendable(item) and not isinstance(item, list) for item in value)
    if isinstance(value, str):
        return not re.search(r"[,\[\]{}\"'\n]", value)
    return value is None or isinstance(value, bool | int | float)


def _among(found: str, known: Sequence[str], where: str, what: str) -> None:
    if found not in known:
        raise SweepError(f"{where}: unknown {what} {found!r}.{_nearest(found, known)} Here: {', '.join(known)}.")


def _once(names: Sequence[str], where: str, advice: str = "give it once") -> None:
    for name in names:
        if names.count(name) > 1:
            raise SweepError(f"{where}: {name!r} stands there twice; {advice}.")


def _nearest(found: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(found), known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _first_mistake(error: ValidationError) -> str:
    """One mistake in words, an unknown key before others: what it misspells is then missing as well."""
    mistakes = error.errors(include_url=False, include_input=False, include_context=False)
    mistake = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in mistake["loc"]).lstrip(".")
    if mistake["type"] == "extra_forbidden":
        home = {"models": Model, "strategies": Strategy, "reference": Reference}.get(str(mistake["loc"][0]), Sweep)
        known = list((home if len(mistake["loc"]) > 1 else Sweep).model_fields)
        return f"unknown key {place!r}.{_nearest(mistake['loc'][-1], known)} Known: {', '.join(known)}."
    if mistake["type"] == "missing":
        return f"{place!r} is missing."
    return f"{place}: {mistake['msg'].removeprefix('Value error, ')}"


class _Loader(yaml.SafeLoader):
    """The safe loader, which in addition refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SweepError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_BYTES:
        raise SweepError(f"{str(path)!r} has more than {MAX_BYTES} bytes, too many for a sweep.")
    try:
        # a SafeLoader: builds plain values only
        content = yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not text in UTF-8, or nested too deeply"
        raise SweepError(f"{path.name} is no yaml: {reason}{where}.") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path.name} holds no sweep; it starts with keys such as models, strategies, budgets and tasks.")
    return content


def _content_of(folder: Path) -> str:
    """A digest of a folder's task files and questions, by relative name and content."""
    whole = hashlib.sha256()
    try:
        for path in sorted(p for p in folder.rglob("*") if p.name.endswith(_TASK_FILES) and p.is_file()):
            whole.update(path.relative_to(folder).as_posix().encode() + b"\0")
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise SweepError(f"include_path {str(folder)!r} cannot be read: {error.strerror}.") from error
    return whole.hexdigest()[:16]
