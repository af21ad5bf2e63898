"""What all commands share: output streams, one-line errors, parsing of budgets and fields, writing files whole."""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from vtprune.marks import between

USAGE = 2  # exit code of every mistake that the user can mend


def out() -> Console:
    """Standard output: answers and tables."""
    return Console(highlight=False)


def err() -> Console:
    """Standard error: progress, notes, errors; so that JSON on standard output stays clean."""
    return Console(stderr=True, highlight=False)


class UserError(Exception):
    """A mistake the user can mend, in one line: what was found and what to do."""


def fail(message: str) -> typer.Exit:
    """Print one red line and return the exit to raise."""
    err().print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True)
    return typer.Exit(USAGE)


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn errors that vtprune raises on purpose into one line and exit code 2; others keep their traceback."""
    from vtprune.pruner import VtpruneError
    from vtprune.registry import UnknownStrategyError

    with warnings.catch_warnings():
        # the report's notes are printed with the report
        warnings.filterwarnings("ignore", message=".*exceeds an image's")
        warnings.showwarning = _note
        try:
            yield
        except (UserError, VtpruneError, UnknownStrategyError) as error:
            raise fail(str(error)) from error


def _note(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning as one line without the place in our code that raised it."""
    err().print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)


def budget(text: str) -> int | float:
    """`64` is visual tokens per image, `0.1` a share.

    Raises:
        UserError: if the text is no number; BudgetError: if the number is no budget.
    """
    from vtprune.pruner import check_budget

    for kind in (int, float):
        try:
            return check_budget(kind(text), "--keep ")
        except ValueError as error:
            if type(error) is not ValueError:
                raise
    raise UserError(f"--keep {text!r} is no number; give visual tokens per image such as 64, or a share such as 0.1.")


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["layer=2", "evict.keep=32"]` as a dict; values are Python literals, other text stays text.

    Raises:
        UserError: for a pair without "=" or a name given twice.
    """
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = (part.strip() for part in pair.partition("="))
        if not sign or not name:
            raise UserError(f"--set {pair!r}: write it as field=value, e.g. --set layer=2 or --set evict.keep=32.")
        if name in fields:
            raise UserError(f"--set {name} is given twice.")
        fields[name] = _literal(text)
    return fields


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def strategy(name: str, keep: int | float, fields: dict[str, Any], schedules: Mapping[str, Path] = MappingProxyType({})):
    """The strategy as `vtprune.create` makes it, with the user's mistakes as `UserError`.

    Parameters:
        schedules: files for strategies that follow one, by name, used where `fields` give neither schedule nor rates.
    Raises:
        UserError, UnknownStrategyError, BudgetError.
    """
    from vtprune.pruner import VtpruneError
    from vtprune.registry import UnknownStrategyError, create

    given = {key.replace("__", ".").rpartition(".")[2] for key in fields}
    for part in (part.strip() for part in name.split("+")):
        if part in schedules and not given & {"schedule", "rates"}:
            fields = {**fields, f"{part}.schedule": str(schedules[part])}
    try:
        return create(name, **{"keep": keep, **fields})
    except (VtpruneError, UnknownStrategyError):
        raise
    except (TypeError, ValueError) as error:
        # an unknown field, a value of the wrong type, two parts claiming one stage
        raise UserError(f"--pruner {name}: {error}") from error


def write_whole(path: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a temporary neighbour of `path`, then put it in place in one step.

    Raises:
        UserError: if the place cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=".vtprune-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}.") from error
    try:
        save(Path(temporary))
        # mkstemp makes private files; give what open() would have
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_picture(path: Path, picture) -> None:
    """Save a PIL image, whole or not at all.

    Raises:
        UserError: if the name has no picture ending or the place cannot be written.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{str(path)!r}: end the picture's name in .png, .jpg or .webp.")
    write_whole(path, picture.save)


def print_json(data: Any) -> None:
    """JSON on standard output, and nothing else there."""
    json.dump(data, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def flops(count: float) -> str:
    """FLOPs for people."""
    return f"{count / 1e9:.2f} G" if count < 1e12 else f"{count / 1e12:.2f} T"


def share(part: float, whole: float) -> str:
    """`12 %` or, without a whole, nothing."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def put_between(path: Path, mark: str, text: str) -> None:
    """Write `text` between the lines `<!-- MARK:begin ... -->` and `<!-- MARK:end -->` of a page.

    Raises:
        UserError: if the page or its marks are not there.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    try:
        made = between(page, f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->", text)
    except ValueError as error:
        raise UserError(f"{path.name} has no place for it: {error}") from error
    write_whole(path, lambda place: place.write_text(made, encoding="utf-8"))
