"""`vtprune bench`: running the benchmark and showing what it found."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from vtprune.cli.console import UserError, err, out, put_between, write_whole

if TYPE_CHECKING:
    from torch import nn

    from vtprune.measure.bench import Case


def measured(
    config: str,
    model: nn.Module,
    cases: Sequence[Case],
    batches: Sequence[int],
    seed: int,
    shape: dict[str, Any],
    rounds: dict[str, int],
    bounds: bool,
    memory: bool,
) -> dict[str, Any]:
    """Time all cases at each batch size; JSON-ready.

    Parameters:
        shape: text_tokens, images, frames of the prompts; rounds: repeats, warmup, decode_steps.
        bounds, memory: as in `vtprune.measure.bench.measure`.
    """
    from dataclasses import asdict

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vtprune.measure.bench import launch_floor, measure, setting
    from vtprune.measure.inputs import make_inputs
    from vtprune.measure.limits import reasons, weight_bytes

    floor = launch_floor(model) if model.device.type != "cpu" else None
    rows, said = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        turns = rounds["repeats"] + rounds["warmup"]
        task = progress.add_task("", total=(len(cases) + 1) * turns * len(batches))

        def tick(label: str) -> None:
            progress.update(task, description=escape(label))
            progress.advance(task)

        for batch in batches:
            inputs = make_inputs(model, batch, seed=seed, **shape)
            found = measure(model, inputs, cases, **rounds, tick=tick, bounds=bounds, memory=memory)
            rows += found
            said += reasons(found, weight_bytes(model), floor)
    return {
        "command": shlex.join(["vtprune", *sys.argv[1:]]),
        "setting": setting(config, model, batches, **shape, **rounds),
        "launch_floor": None if floor is None else asdict(floor),
        "reasons": said,
        "rows": [asdict(row) for row in rows],
    }


def read(path: Path) -> dict[str, Any]:
    """A file of `vtprune bench --json`.

    Raises:
        UserError: if it is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list) or not isinstance(data.get("setting"), dict):
        raise UserError(f"{path.name} is no file of `vtprune bench --json`: it has no rows and no setting.")
    return data


def show(data: dict[str, Any], plot: Path | None = None, quiet: bool = False) -> None:
    """Print what was measured; draw it if asked to.

    Parameters:
        quiet: print nothing.
    Raises:
        UserError: if the picture cannot be drawn or written.
    """
    from vtprune.measure import pages

    if not quiet:
        for part in pages.PARTS:
            headings, cells = pages.grid(data["rows"], part)
            table = Table(box=None, pad_edge=False, header_style="bold")
            for heading in headings:
                table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=heading == "case")
            for row in cells:
                table.add_row(*map(escape, row))
            out().print(table)
            out().print()
        for reason in data.get("reasons", ()):
            out().print(f"- {escape(reason)}", soft_wrap=True)
        out().print(escape(pages.described(data["setting"])), soft_wrap=True)
    for row in data["rows"]:
        if row.get("error"):
            label = f"{row['label']} (batch {row.get('batch', 1)})"
            err().print(f"[yellow]{escape(label)} did not run:[/] {escape(row['error'])}", soft_wrap=True)
    if plot is not None:
        try:
            write_whole(plot, lambda place: pages.draw(data, place))
        except ImportError as error:
            raise UserError("--plot needs matplotlib: pip install 'vtprune[bench]'.") from error
        except ValueError as error:
            raise UserError(f"--plot {plot.name}: {error}") from error


def write(page: Path, mark: str, found: Sequence[tuple[dict[str, Any], Path | None]], columns: str | None) -> None:
    """Put the tables of several benchmarks into a page, one after the other, between its marks.

    Parameters:
        found: what was measured, and the file that it is in, for the page to link to.
        columns: headings to show, comma-separated; None for all.
    Raises:
        UserError: for an unknown heading, or a page that cannot be written.
    """
    from vtprune.measure import pages

    only = None if columns is None else [name.strip() for name in columns.split(",")]
    known = [heading for heading, _ in pages.COLUMNS]
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise UserError(f"--columns {', '.join(unknown)}: there are {', '.join(known)}.")
    tables = []
    for data, raw in found:
        link = None if raw is None else Path(os.path.relpath(raw, page.parent)).as_posix()
        tables.append(pages.table(data, link, only))
    put_between(page, mark, "\n\n".join(tables))
