"""What `vtprune compare` does: ask every strategy, time the prefills interleaved, draw the sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vtprune.cli.running import Loaded, answer
from vtprune.measure.bench import Case, measure
from vtprune.pruner import Pruner, VtpruneError
from vtprune.viz import Entry, contact_sheet, final_picture, stages
from vtprune.viz_timeline import strips, timeline

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.reporting import Report
    from vtprune.video import Frame

# frames of a video that each strategy's strip shows
STRIP = 16


@dataclass
class CompareRow:
    """One strategy's line; `error` says why it did not run, everything else is None then.

    Parameters:
        name, strategy: as asked for, with its settings; answer: what the model said.
        visual_tokens, entered, equivalent_tokens: before pruning, entering the decoder, mean over decoder layers.
        prefill_ms, selection_ms: medians of warm runs, interleaved with the others.
    """

    name: str
    strategy: str
    answer: str | None = None
    visual_tokens: int | None = None
    entered: int | None = None
    equivalent_tokens: float | None = None
    prefill_ms: float | None = None
    selection_ms: float | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    flops: int | None = None
    flops_full: int | None = None
    error: str | None = None
    report: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the report."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "report"}


def run(
    loaded: Loaded,
    inputs: dict[str, Any],
    pruners: dict[str, Pruner],
    positions: str | None,
    tokens: int,
    repeats: int,
    tick: Callable[[str], None],
) -> list[CompareRow]:
    """The unpruned model's row, then one per strategy.

    Parameters:
        pruners: by the name to show; tokens: most tokens to generate; repeats: timed prefills each.
        tick: told what is going on.
    """
    rows = []
    for name, pruner in {"unpruned": None, **pruners}.items():
        tick(f"asking {name}")
        row = CompareRow(name, pruner.describe() if pruner else "unpruned")
        rows.append(row)
        try:
            row.answer, row.report = answer(loaded, inputs, pruner, positions if pruner else None, tokens)
        except VtpruneError as error:
            if pruner is None:
                raise
            row.error = str(error)
            continue
        report = row.report
        row.visual_tokens = sum(s.visual_tokens for s in report.samples)
        row.entered = sum(len(s.kept) for s in report.samples)
        row.equivalent_tokens = report.equivalent_tokens
        row.kv_bytes, row.kv_bytes_full = report.kv_bytes, report.kv_bytes_full
        row.flops, row.flops_full = report.flops, report.flops_full
    ran = [row for row in rows[1:] if not row.error]
    cases = [Case(row.name, pruners[row.name], positions) for row in ran]
    timings = measure(loaded.model, inputs, cases, repeats, 1, 0, lambda label: tick(f"timing {label}"))
    for row, timing in zip([rows[0], *ran], timings, strict=True):
        row.prefill_ms, row.selection_ms = timing.prefill.median, timing.selection.median
    return rows


def draw(rows: list[CompareRow], shown: Image.Image | Sequence[Frame], heading: str, fit: str) -> Image.Image:
    """The contact sheet: what each strategy was left with at its last stage.

    Parameters:
        shown: the picture, or the video's frames that the model was fed.
    Raises:
        VizError: if the image's tokens form no grid.
    """
    # those that did not run go last
    entries = [_entry(row, shown, fit) for row in sorted(rows, key=lambda row: bool(row.error))]
    if not isinstance(shown, Sequence):
        return contact_sheet(entries, heading)
    part = f"{min(STRIP, len(shown))} of {len(shown)} frames. " if len(shown) > STRIP else ""
    return strips(entries, f"{heading}\n{part}Above each frame its tokens (blue), beside its score (orange) where it has one.")


def _entry(row: CompareRow, shown: Image.Image | Sequence[Frame], fit: str) -> Entry:
    if row.report is None:
        return Entry(row.name, row.error or "", "")
    sample = row.report.samples[0]
    steps = [f"{len(stage.kept)} {stage.title}" for stage in stages(sample) if not stage.title.startswith("after encoder")]
    if len(steps) == 1:
        kept = len(sample.kept)
        caption = (
            f"all {kept} visual tokens" if kept == sample.visual_tokens else f"{kept} of {sample.visual_tokens} visual tokens"
        )
    else:
        caption = f"{steps[-2]}, {steps[-1]}"
    if isinstance(shown, Sequence):
        picture = timeline(sample, shown, fit=fit, most=STRIP, columns=STRIP, bare=True)
    else:
        picture = final_picture(sample, shown, fit)
    return Entry(row.name, caption, f"\u201c{row.answer}\u201d", picture)
