"""The results folder of a sweep: `trials/DIGEST.json`, the plan in `sweep.json`, one table in `results.parquet`.

Every file appears whole or not at all. What is read back is checked, and refused by name if another version wrote it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vtprune.sweep.config import SCHEMA, Reference, Sweep, SweepError, Trial
from vtprune.sweep.trial import Measured

FORMAT_SWEEP, FORMAT_TRIAL = "vtprune-sweep", "vtprune-trial"
MAX_BYTES = 1 << 30
_PART = ".vtprune-"


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Labels(_Checked):
    """How the report names a trial's model, strategy and budget."""

    model: str
    strategy: str
    budget: int | float | None = None


class Settings(_Checked):
    """All that a trial's result depends on; see `config.plan`."""

    pretrained: str | None
    args: dict[str, Any]
    pruner: str | None
    keep: int | float | None
    positions: str | None
    fields: dict[str, Any]
    attn: str
    dtype: str
    device: str
    batch_size: int
    tasks: list[str]
    limit: int | float | None
    seed: int
    include: str | None
    cpus: int
    gpus: int | float


class Metric(_Checked):
    value: float
    stderr: float | None = None
    higher_is_better: bool = True


class Accuracy(_Checked):
    """Of one task: its number of questions, its metrics, and per metric each question's score by its number."""

    n: int | None
    metrics: dict[str, Metric]
    samples: dict[str, dict[str, float]] = {}


class Attempt(_Checked):
    """Why one attempt failed, with the last lines that it said."""

    error: str
    lines: list[str] = []
    wall_s: float = 0.0


class Hardware(_Checked):
    device: str
    gpus: int | float
    cores: int
    threads: int


class Record(_Checked):
    """One trial, done or failed, as its JSON holds it."""

    format: Literal["vtprune-trial"] = FORMAT_TRIAL
    schema_: int = SCHEMA
    digest: str
    status: Literal["done", "failed"]
    labels: Labels
    settings: Settings
    command: str
    attempts: int
    errors: list[Attempt] = []
    started: str
    wall_s: float
    tasks: dict[str, Accuracy] = {}
    measured: Measured | None = None
    versions: dict[str, str] = {}
    hardware: Hardware | None = None
    commit: str | None = None

    def to_json(self) -> str:
        content = self.model_dump()
        content["schema"] = content.pop("schema_")
        return json.dumps({key: content[key] for key in ("format", "schema", *content)}, indent=1, ensure_ascii=False) + "\n"


class Planned(_Checked):
    digest: str
    labels: Labels
    tasks: list[str]
    seed: int


class Plan(_Checked):
    """What a sweep comes to, and what its report needs to know of the yaml."""

    format: Literal["vtprune-sweep"] = FORMAT_SWEEP
    schema_: int = SCHEMA
    vtprune: str
    name: str
    note: str
    at_once: int | None
    metrics: dict[str, str]
    reference: list[Reference]
    trials: list[Planned]


class Results:
    """A results folder.

    Parameters:
        folder: of the sweep; `open_` makes it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.trials = self.folder / "trials"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the folder and hold it, so that no second sweep writes there.

        Raises:
            SweepError: if it cannot be written, or another sweep holds it.
        """
        from filelock import FileLock, Timeout

        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except Timeout as error:
            raise SweepError(
                f"another sweep is writing to {str(self.folder)!r}; wait for it, or give another --out."
            ) from error
        except OSError as error:
            raise SweepError(f"cannot write to {str(self.folder)!r}: {error.strerror or error}.") from error
        try:
            # left by a sweep that was killed while it wrote
            for part in (*self.folder.glob(_PART + "*"), *self.trials.glob(_PART + "*")):
                part.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def write_plan(self, sweep: Sweep, trials: Sequence[Trial], at_once: int | None = None) -> None:
        import vtprune

        plan = Plan(
            vtprune=vtprune.__version__,
            name=sweep.name,
            note=sweep.note,
            at_once=at_once,
            metrics=sweep.metrics,
            reference=sweep.reference,
            trials=[
                Planned(digest=t.digest, labels=Labels(**t.labels), tasks=t.settings["tasks"], seed=t.settings["seed"])
                for t in trials
            ],
        )
        content = plan.model_dump()
        content["schema"] = content.pop("schema_")
        text = json.dumps({key: content[key] for key in ("format", "schema", *content)}, indent=1, ensure_ascii=False) + "\n"
        write_text(self.folder / "sweep.json", text)

    def plan(self) -> Plan | None:
        """What the sweep that wrote here last planned; None if there is no such file.

        Raises:
            SweepError: if it is damaged or of another version.
        """
        path = self.folder / "sweep.json"
        return _read(path, Plan, FORMAT_SWEEP) if path.exists() else None

    def record(self, digest: str) -> Record | None:
        """A trial that is over, or None.

        Raises:
            SweepError: if its file is damaged, of another version or of another trial.
        """
        path = self.trials / f"{digest}.json"
        if not path.exists():
            return None
        record = _read(path, Record, FORMAT_TRIAL)
        if record.digest != digest:
            raise SweepError(f"{path.name} holds the trial {record.digest}; it was renamed. Delete it.")
        return record

    def records(self) -> list[Record]:
        """All trials in the folder, in order of their digests."""
        found = sorted(p.stem for p in self.trials.glob("*.json") if re.fullmatch(r"[0-9a-f]{16}", p.stem))
        return [record for record in map(self.record, found) if record is not None]

    def save(self, record: Record) -> None:
        """Put a trial in its file.

        Raises:
            SweepError: if it cannot be written, e.g. because the disk is full.
        """
        write_text(self.trials / f"{record.digest}.json", record.to_json())

    def write_table(self, records: Sequence[Record]) -> None:
        """`results.parquet`: a row for every trial, task and metric, and one for every task of a failed trial."""
        import pyarrow as pa
        from pyarrow import parquet

        rows = [row for record in records for row in _rows(record)]
        table = pa.Table.from_pylist(rows, schema=pa.schema(_columns(pa)))
        write_whole(self.folder / "results.parquet", lambda path: parquet.write_table(table, path))


_TEXT = ("digest", "model", "strategy", "pruner", "positions", "fields", "task", "metric", "status", "error")
_WHERE = ("attn", "dtype", "device", "vtprune", "torch", "transformers", "lmms_eval", "python", "commit")
_MEASURED = ("visual_tokens", "entered", "equivalent_tokens", "prefill_ms", "prefill_ms_median", "ttft_ms", "tpot_ms")
_MEASURED += ("selection_ms", "kv_bytes", "kv_bytes_full", "flops", "flops_full", "peak_bytes")
_NUMBERS = ("keep", "value", "stderr", *_MEASURED, "wall_s")
_COUNTS = ("seed", "n", "batch_size", "threads", "attempts")


def _columns(pa) -> list[tuple[str, Any]]:
    kinds = {**dict.fromkeys((*_TEXT, *_WHERE), pa.string()), **dict.fromkeys(_NUMBERS, pa.float64())}
    kinds |= dict.fromkeys(_COUNTS, pa.int64())
    return list(kinds.items())


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    settings, measured = record.settings, record.measured
    base = {
        "digest": record.digest,
        "model": record.labels.model,
        "strategy": record.labels.strategy,
        "pruner": settings.pruner,
        "positions": settings.positions,
        "fields": json.dumps(settings.fields, sort_keys=True, ensure_ascii=False),
        "keep": settings.keep,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "status": record.status,
        "error": record.errors[-1].error if record.status == "failed" and record.errors else None,
        "attempts": record.attempts,
        "wall_s": record.wall_s,
        "commit": record.commit,
        "attn": measured.attn if measured else settings.attn,
        "dtype": measured.dtype if measured else settings.dtype,
        "device": record.hardware.device if record.hardware else None,
        "threads": record.hardware.threads if record.hardware else None,
        **{key: record.versions.get(key) for key in ("vtprune", "torch", "transformers", "lmms_eval", "python")},
    }
    if record.status == "failed":
        yield from ({**base, "task": task} for task in settings.tasks)
        return
    for task, accuracy in record.tasks.items():
        costs = measured.tasks.get(task) if measured else None
        cost = {key: getattr(costs, key) for key in _MEASURED} if costs else {}
        for metric, found in accuracy.metrics.items():
            yield {
                **base,
                "task": task,
                "metric": metric,
                "value": found.value,
                "stderr": found.stderr,
                "n": accuracy.n,
                **cost,
            }


def _read(path: Path, kind: type[Any], form: str) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SweepError(f"{path.name} has more than {MAX_BYTES} bytes.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SweepError(f"{path.name} is damaged ({error}); delete it and run the sweep again.") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise SweepError(f"{path.name} is no file of a vtprune sweep.")
    version = content.pop("schema", None)
    if version != SCHEMA:
        raise SweepError(
            f"{path.name} was written by another vtprune: its schema is {version!r}, this one reads {SCHEMA}. Read it with the "
            "vtprune that wrote it, or give another --out and run the sweep again."
        )
    try:
        return kind.model_validate({**content, "schema_": version})
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, mistake["loc"]))
        raise SweepError(f"{path.name} is damaged: {place}: {mistake['msg']}. Delete it and run the sweep again.") from error


def write_text(path: Path, text: str) -> None:
    """Put `text` into a file in one step.

    Raises:
        SweepError: if the place cannot be written.
    """
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a neighbour of `path`, then put it in place in one step.

    Raises:
        SweepError: if the place cannot be written, a full disk included.
    """
    part = None
    try:
        handle, name = tempfile.mkstemp(prefix=_PART, suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            save(part)
            os.fsync(handle)
        finally:
            os.close(handle)
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise SweepError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
