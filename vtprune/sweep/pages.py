"""A report as Markdown, as one self-contained HTML page, and as a table inside another Markdown file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtprune.marks import between
from vtprune.sweep import plots
from vtprune.sweep.config import SweepError
from vtprune.sweep.report import LEVEL, RESAMPLES, Report, Row, Section, Value
from vtprune.sweep.store import write_text

BEGIN, END = "<!-- vtprune:sweep -->", "<!-- /vtprune:sweep -->"
_NONE = "-"
_TEMPLATES = Path(__file__).with_name("templates")


def write(report: Report, folder: str | Path) -> list[Path]:
    """Write `report.md` with its plots and `report.html` into a folder.

    Raises:
        SweepError: if they cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SweepError(f"{str(folder)!r} is no folder; make it first.")
    sections = [_section(number, section, report) for number, section in enumerate(report.sections, 1)]
    written = []
    for section in sections:
        for plot in section["plots"]:
            write_text(folder / plot["file"], plot["svg"])
            written.append(folder / plot["file"])
    values = {"report": report, "sections": sections, "level": LEVEL, "resamples": RESAMPLES}
    for name in ("report.md", "report.html"):
        write_text(folder / name, _environment(html=name.endswith("html")).get_template(f"{name}.j2").render(values))
        written.append(folder / name)
    return written[::-1]


def put_table(report: Report, path: str | Path) -> None:
    """Put the summary between `<!-- vtprune:sweep -->` and `<!-- /vtprune:sweep -->` in a Markdown file.

    Raises:
        SweepError: if the file lacks these marks or cannot be written.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}.") from error
    sections = [_section(number, section, report, drawn=False) for number, section in enumerate(report.sections, 1)]
    table = _environment(html=False).get_template("table.md.j2").render(report=report, sections=sections, level=LEVEL)
    try:
        made = between(text, BEGIN, END, table)
    except ValueError as error:
        raise SweepError(f"{path.name}: {error}") from error
    write_text(path, made)


def _environment(html: bool):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["md"] = _markdown
    made.filters["percent"] = lambda value: _NONE if value is None else f"{100 * value:.0f} %"
    return made


def _markdown(text: Any) -> str:
    """`text` as it is inside a Markdown table's cell."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # brackets stay as they are unless they would make a link
    return re.sub(r"([|\\`*_]|\](?=[(\[:]))", r"\\\1", text)


def _section(number: int, section: Section, report: Report, drawn: bool = True) -> dict[str, Any]:
    has_mean = all(section.shares.values())
    heads = ["strategy", "budget", "equivalent tokens"]
    heads += ["mean accuracy, %"] if has_mean else []
    heads += ["% of unpruned", "prefill, ms", "selection, ms", "share of prefill", "KV cache, MiB", "FLOPs"]
    rows = [
        [
            row.strategy if not row.unpruned else "unpruned",
            _budget(row),
            _number(row.equivalent_tokens, 1),
            *([_interval(row.accuracy)] if has_mean else []),
            _interval(row.relative),
            _number(row.prefill_ms, 1),
            _number(row.selection_ms, 2),
            _NONE if row.selection_share is None else f"{100 * row.selection_share:.1f} %",
            _number(None if row.kv_bytes is None else row.kv_bytes / 2**20, 2),
            _NONE if row.flops_share is None else f"{100 * row.flops_share:.0f} %",
        ]
        for row in section.rows
    ]
    return {
        "number": number,
        "model": section.model,
        "heads": heads,
        "rows": rows,
        "overview": _overview(section, report),
        "tasks": [_task(section, task, report) for task in report.tasks],
        "incomplete": [(row.title, row.missing) for row in section.rows if row.missing],
        "plots": [
            {"title": plot.axis.title, "file": f"report-{number}-{plot.axis.name}.svg", "svg": plot.svg, "alt": plot.alt}
            for plot in (plots.draw(section) if drawn else [])
        ],
    }


def _overview(section: Section, report: Report) -> dict[str, Any]:
    """Every task beside the others: the value, and what percent of the unpruned model's it is."""
    rows = []
    for row in section.rows:
        cells = [row.cells.get(task) for task in report.tasks]
        said = [
            _NONE if cell is None else f"{cell.accuracy.value:.1f}" + (f" ({cell.relative.value:.1f})" if cell.relative else "")
            for cell in cells
        ]
        rows.append([row.strategy if not row.unpruned else "unpruned", _budget(row), *said])
    return {"heads": ["strategy", "budget", *report.tasks], "rows": rows}


def _task(section: Section, task: str, report: Report) -> dict[str, Any]:
    shown = [row for row in section.rows if task in row.cells or task in row.papers]
    published = any(task in row.papers for row in shown)
    relative = published and any(row.papers[task].relative is not None for row in shown if task in row.papers)
    unit = ", %" if section.shares[task] else ""
    heads = ["strategy", "budget", f"{report.metrics[task]}{unit}", "% of unpruned"]
    heads += ["paper"] if published else []
    heads += ["paper, % of unpruned"] if relative else []
    rows = []
    for row in shown:
        cell, paper = row.cells.get(task), row.papers.get(task)
        line = [row.strategy if not row.unpruned else "unpruned", _budget(row)]
        line += [_interval(cell.accuracy if cell else None), _interval(cell.relative if cell else None)]
        line += [f"{paper.value:g} [{paper.source}]" if paper else _NONE] if published else []
        line += [f"{paper.relative:.1f}" if paper and paper.relative is not None else _NONE] if relative else []
        rows.append(line)
    questions = next((row.cells[task].questions for row in shown if task in row.cells), None)
    return {"name": task, "heads": heads, "rows": rows, "questions": questions, "interval": report.intervals.get(task, "none")}


def _budget(row: Row) -> str:
    return _NONE if row.budget is None else f"{row.budget:g}"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _interval(value: Value | None) -> str:
    if value is None:
        return _NONE
    if value.low is None or value.high is None:
        return f"{value.value:.1f}"
    return f"{value.value:.1f} [{value.low:.1f}, {value.high:.1f}]"
