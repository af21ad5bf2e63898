"""Schedules: what a search found for one model, in one JSON file that a strategy can be made from.

A file says which model and which questions it was fitted to, when and by what command, so that a strategy can refuse
another model and a reader can repeat the search. Reading checks everything; nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vtprune.pruner import BudgetError, Model, VtpruneError, check_budget

FORMAT, VERSION = "vtprune-schedule", 1
KINDS = ("gsearch", "psigmoid", "mustdrop")
MAX_BYTES = 1 << 20
MAX_DEPTH = 1000
# of PSigmoid
MAX_STEEPNESS = 100.0
_FIELDS = ("format", "version", "kind", "model", "data", "date", "vtprune", "command", "values", "trace")
_VALUES = {
    "gsearch": ("rates", "min_layer"),
    "psigmoid": ("steepness", "keep", "min_layer"),
    "mustdrop": ("global_thr", "individual_thr", "keep", "equivalent_tokens"),
}


class ScheduleError(VtpruneError, ValueError):
    """A schedule that cannot be read, written or used; the message says what was found and what to do."""


@dataclass(frozen=True)
class Data:
    """The calibration set that a schedule was fitted to.

    Parameters:
        name: of its folder or file; questions: how many were asked; sha256: of the questions and their pictures.
    """

    name: str
    questions: int
    sha256: str


@dataclass(frozen=True)
class Stored:
    """One schedule.

    Parameters:
        kind: of `KINDS`; model: what it was fitted to; data: on which questions.
        values: gsearch: `rates`, the share of visual tokens that each decoder layer computes on (0 leaves one token), and
            `min_layer`, the first layer that was allowed fewer tokens than there are. psigmoid: `steepness`, `keep` and
            `min_layer`. mustdrop: `global_thr`, `individual_thr`, the budget `keep` they were fitted to and the
            `equivalent_tokens` they reached.
        trace: the trials, for readers; nothing is computed from it.
        date, vtprune, command: when, by which version and by what it was made.
    """

    kind: str
    model: Model
    data: Data
    values: dict[str, Any]
    trace: list[dict[str, Any]] = field(default_factory=list)
    date: str = ""
    vtprune: str = ""
    command: str = ""


def write(
    path: str | Path,
    kind: str,
    model: Model,
    data: Data,
    values: Mapping[str, Any],
    trace: Sequence[Mapping[str, Any]] = (),
    command: str = "",
) -> Stored:
    """Check a schedule and write it, whole or not at all.

    Returns:
        What `read` will return.
    Raises:
        ScheduleError: if a value means nothing, or the place cannot be written.
    """
    import vtprune

    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "model": {"name": model.name, "depth": model.depth, "fingerprint": model.fingerprint},
        "data": {"name": data.name, "questions": data.questions, "sha256": data.sha256},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "vtprune": vtprune.__version__,
        "command": command,
        "values": dict(values),
        "trace": [dict(trial) for trial in trace],
    }
    stored = _checked(content, kind, "this schedule")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise ScheduleError(f"this schedule takes {len(text.encode())} bytes; the limit is {MAX_BYTES}. Shorten its trace.")
    write_text(path, text)
    return stored


def read(path: str | Path, kind: str | None = None) -> Stored:
    """Read a schedule.

    Parameters:
        kind: the kind it has to be, None for any.
    Raises:
        ScheduleError: missing, no regular file, too large, no JSON, another format, version or kind, a field that is
            missing, unknown or of the wrong type, a value that means nothing.
    """
    name = repr(str(path))
    return _checked(read_json(path, MAX_BYTES, "a schedule"), kind, name)


def read_json(path: str | Path, limit: int, what: str) -> Any:
    """The content of a JSON file of at most `limit` bytes, without NaN, infinities or names given twice.

    Raises:
        ScheduleError: with the reason.
    """
    name, path = repr(str(path)), Path(path)
    try:
        if path.is_dir():
            raise ScheduleError(f"{name} is a folder; give the file of {what}.")
        if not path.exists():
            raise ScheduleError(f"no file {name}; `vtprune search` writes {what}.")
        if not path.is_file():
            raise ScheduleError(f"{name} is no regular file.")
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ScheduleError):
            raise
        reason = getattr(error, "strerror", None) or error  # ValueError: a null byte in the name
        raise ScheduleError(f"{name} cannot be read: {reason}.") from error
    if len(raw) > limit:
        raise ScheduleError(f"{name} has more than {limit} bytes, too many for {what}.")
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ScheduleError(f"{name} is no JSON, or damaged ({reason}); write it again with `vtprune search`.") from error


def write_text(path: str | Path, text: str) -> None:
    """Put `text` into a file in one step, so that a kill leaves the old file or the new one.

    Raises:
        ScheduleError: if the place cannot be written.
    """
    path, part = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".vtprune-", suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            part = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        raise ScheduleError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number that can be computed with")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _checked(content: Any, kind: str | None, name: str) -> Stored:
    """The schedule in a file's content, or the reason why there is none."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ScheduleError(f'{name} is no vtprune schedule (it lacks "format": "{FORMAT}"); write one with `vtprune search`.')
    version = content.get("version")
    if not _is_int(version) or version != VERSION:
        raise ScheduleError(
            f"{name} has the format version {version!r}, this vtprune reads {VERSION}. Update vtprune, or search again."
        )
    found = content.get("kind")
    if found not in KINDS:
        raise ScheduleError(f"{name} has the kind {found!r}; known are {', '.join(KINDS)}.")
    if kind is not None and found != kind:
        raise ScheduleError(
            f"{name} is a {found} schedule, but a {kind} schedule is needed; `vtprune search {kind}` makes one."
        )
    _exactly(content, _FIELDS, name)
    model = _part(content, "model", ("name", "depth", "fingerprint"), name)
    data = _part(content, "data", ("name", "questions", "sha256"), name)
    values = _part(content, "values", _VALUES[found], name)
    depth = _integer(model["depth"], 1, MAX_DEPTH, "model.depth", name)
    for part, where, keys in ((model, "model.", ("name", "fingerprint")), (data, "data.", ("name", "sha256"))):
        for key in keys:
            _text(part[key], where + key, name)
    for key in ("date", "vtprune", "command"):
        _text(content[key], key, name, empty=True)
    trace = content["trace"]
    if not isinstance(trace, list) or not all(isinstance(trial, dict) for trial in trace):
        raise ScheduleError(f"{name}: trace must be a list of objects.")
    _finite(trace, name)
    return Stored(
        found,
        Model(model["name"], depth, model["fingerprint"]),
        Data(data["name"], _integer(data["questions"], 1, 10**9, "data.questions", name), data["sha256"]),
        _CHECKS[found](values, depth, name),
        trace,
        content["date"],
        content["vtprune"],
        content["command"],
    )


def _gsearch(values: dict[str, Any], depth: int, name: str) -> dict[str, Any]:
    rates = values["rates"]
    if not isinstance(rates, list):
        raise ScheduleError(f"{name}: values.rates must be a list of numbers, found {type(rates).__name__}.")
    if len(rates) != depth:
        raise ScheduleError(f"{name}: values.rates has {len(rates)} entries for {depth} decoder layers.")
    found = [_number(rate, 0.0, 1.0, f"values.rates[{at}]", name) for at, rate in enumerate(rates)]
    for at in range(1, depth):
        if found[at] > found[at - 1]:
            raise ScheduleError(
                f"{name}: values.rates[{at}] = {found[at]} is above the layer before ({found[at - 1]}); tokens that left "
                f"cannot come back, so rates may only fall."
            )
    return {"rates": found, "min_layer": _min_layer(values, depth, name)}


def _psigmoid(values: dict[str, Any], depth: int, name: str) -> dict[str, Any]:
    steepness = _number(values["steepness"], 0.0, MAX_STEEPNESS, "values.steepness", name)
    if steepness == 0:
        raise ScheduleError(f"{name}: values.steepness = 0 makes a flat curve; it must be positive.")
    return {"steepness": steepness, "keep": _keep(values, name), "min_layer": _min_layer(values, depth, name)}


def _mustdrop(values: dict[str, Any], depth: int, name: str) -> dict[str, Any]:
    return {
        "global_thr": _number(values["global_thr"], 0.0, math.inf, "values.global_thr", name),
        "individual_thr": _number(values["individual_thr"], 0.0, math.inf, "values.individual_thr", name),
        "keep": _keep(values, name),
        "equivalent_tokens": _number(values["equivalent_tokens"], 0.0, math.inf, "values.equivalent_tokens", name),
    }


_CHECKS = {"gsearch": _gsearch, "psigmoid": _psigmoid, "mustdrop": _mustdrop}


def _keep(values: dict[str, Any], name: str) -> int | float:
    try:
        return check_budget(values["keep"], "values.keep")
    except BudgetError as error:
        raise ScheduleError(f"{name}: {error}") from error


def _min_layer(values: dict[str, Any], depth: int, name: str) -> int:
    # a decoder of one layer has nothing to cut, and its file may still say so
    return _integer(values["min_layer"], 1, max(1, depth - 1), "values.min_layer", name)


def _part(content: dict[str, Any], key: str, keys: tuple[str, ...], name: str) -> dict[str, Any]:
    part = content[key]
    if not isinstance(part, dict):
        raise ScheduleError(f"{name}: {key} must be an object, found {type(part).__name__}.")
    _exactly(part, keys, name, f"{key}.")
    return part


def _exactly(part: dict[str, Any], keys: tuple[str, ...], name: str, where: str = "") -> None:
    missing = [key for key in keys if key not in part]
    if missing:
        raise ScheduleError(f"{name} lacks {', '.join(where + key for key in missing)}; write it again with `vtprune search`.")
    unknown = sorted(set(part) - set(keys))
    if unknown:
        raise ScheduleError(f"{name} has the unknown fields {', '.join(where + key for key in unknown)}; take them out.")


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(value: Any, low: int, high: int, what: str, name: str) -> int:
    if not _is_int(value) or not low <= value <= high:
        raise ScheduleError(f"{name}: {what} = {value!r} must be an integer from {low} to {high}.")
    return int(value)


def _number(value: Any, low: float, high: float, what: str, name: str) -> float:
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        limits = f"a finite number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise ScheduleError(f"{name}: {what} = {value!r} must be {limits}.")
    return number


def _text(value: Any, what: str, name: str, empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or empty):
        raise ScheduleError(f"{name}: {what} must be {'' if empty else 'non-empty '}text, found {value!r}.")


def _finite(value: Any, name: str) -> None:
    """Refuse numbers that overflowed, wherever they are."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise ScheduleError(f"{name}: trace holds a number that is not finite.")
        stack.extend(one.values() if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ())
