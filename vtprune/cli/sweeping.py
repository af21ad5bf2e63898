"""`vtprune sweep` and `vtprune report`. Parses, hands over to the library, prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vtprune.cli.console import UserError, budget, err, fail, mistakes, out

if TYPE_CHECKING:
    from vtprune.sweep.config import Trial
    from vtprune.sweep.store import Record

File = Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's yaml: models, strategies, budgets, tasks.")]
Many = Annotated[list[str] | None, typer.Option(help="In place of the yaml's. Repeatable.")]
Whole = Annotated[int | None, typer.Option(min=1, help="In place of the yaml's.")]
Text = Annotated[str | None, typer.Option(help="In place of the yaml's.")]

FAILED = 1  # exit code of a sweep that ran and has failed trials


def sweep(
    file: File,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Results folder. Default: results/NAME of the yaml.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: Ray on this machine.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run trials again that failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the trials, run none.")] = False,
    model: Many = None,
    strategy: Many = None,
    keep: Annotated[list[str] | None, typer.Option(help="Budgets in place of the yaml's. Repeatable.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="In place of the yaml's; a,b share a process. Repeatable.")] = None,
    include_path: Text = None,
    limit: Annotated[float | None, typer.Option(help="Questions per task, or a share, in place of the yaml's.")] = None,
    batch_size: Whole = None,
    attn: Text = None,
    dtype: Text = None,
    device: Text = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="Per trial, in place of the yaml's.")] = None,
    cpus: Whole = None,
    concurrency: Whole = None,
) -> None:
    """Run models x strategies x budgets x tasks as lmms-eval runs; a killed sweep goes on where it was."""
    with mistakes(), _extra("sweep"):
        from vtprune.sweep import config
        from vtprune.sweep.run import run

        overrides = {
            "models": model,
            "strategies": strategy,
            "budgets": None if keep is None else [budget(text) for text in keep],
            "tasks": None if tasks is None else [_split(text) for text in tasks],
            "include_path": include_path,
            "limit": int(limit) if limit is not None and limit.is_integer() else limit,
            "batch_size": batch_size,
            "attn": attn,
            "dtype": dtype,
            "device": device,
            "gpus": gpus,
            "cpus": cpus,
            "concurrency": concurrency,
        }
        made = config.load(file, overrides)
        trials = config.plan(made)
        if dry_run:
            for trial in trials:
                out().print(f"{trial.digest}  {escape(trial.title)}", soft_wrap=True)
            _line(f"{len(trials)} trials, none run.")
            return
        folder = out_dir or Path("results") / file.stem
        with _stoppable(), _progress(len(trials)) as watch:
            outcome = run(made, folder, address, retry_failed, watch=watch)
        if not outcome.ran:
            _line(f"nothing to do: all {outcome.planned} trials are in {folder}.")
        else:
            _line(f"{len(outcome.ran)} trials ran, {len(outcome.found)} were there; {outcome.table}")
        if outcome.failed:
            _failures(outcome.failed)
            raise typer.Exit(FAILED)
        if outcome.ran:
            _line(f"next: vtprune report {folder}")


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results folders of sweeps.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for the pages. Default: the first RESULTS.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="key=value[,value]: model, strategy, budget, task, attn, device ... Repeatable.")
    ] = None,
    readme: Annotated[Path | None, typer.Option(help="Also put the table between this file's vtprune:sweep marks.")] = None,
) -> None:
    """A sweep as Markdown and one HTML page: accuracy against tokens, time and cache, with intervals."""
    with mistakes(), _extra("sweep"):
        from vtprune.sweep import pages
        from vtprune.sweep import report as reporting

        made = reporting.build(folders, _chosen(only or []))
        written = pages.write(made, out_dir or folders[0])
        if readme is not None:
            pages.put_table(made, readme)
            written.append(readme)
        for note in made.notes:
            err().print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
        for path in written:
            _line(f"wrote {path}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _chosen(pairs: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in pairs:
        key, sign, values = pair.partition("=")
        if not sign or not values:
            raise UserError(f"--only {pair!r}: write it as key=value, e.g. --only strategy=flowcut or --only task=gqa,pope.")
        found.setdefault(key.strip(), []).extend(_split(values))
    return found


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """What is missing of an extra in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "vtprune"):
            raise
        raise UserError(f"this needs {missing}, which is not installed; pip install 'vtprune[{name}]'.") from error


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err().print("[yellow]note:[/] stopped; the same command goes on where it was.")
        raise typer.Exit(130) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, Trial | None, int], None]]:
    """A bar with the time that is left; on no terminal a line for each trial."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    console = err()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)

        def watch(what: str, trial: Trial | None, over: int) -> None:
            title = "" if trial is None else trial.title
            bar.update(task, completed=over, description=escape(title))
            if what in ("failed", "retry") or not console.is_terminal:
                console.print(f"{over} of {total}  {what}: {escape(title)}", soft_wrap=True)

        yield watch


def _failures(records: list[Record]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("failed trial", "error", "file"):
        table.add_column(head, overflow="fold")
    for record in records:
        labels = record.labels
        keep = "" if labels.budget is None else f" @ {labels.budget}"
        title = f"{labels.model}, {labels.strategy}{keep}, {' '.join(record.settings.tasks)}"
        error = record.errors[-1].error if record.errors else "unknown"
        table.add_row(escape(title), escape(error), f"trials/{record.digest}.json")
    err().print(table)
    fail(f"{len(records)} trials failed; the others are recorded. --retry-failed runs them again.")


def _line(text: Any) -> None:
    out().print(escape(str(text)), soft_wrap=True)
    sys.stdout.flush()
