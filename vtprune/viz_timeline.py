"""A video as a strip of frames: what each scored, what it got of the budget, and where in the frame that went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from PIL import Image, ImageDraw

from vtprune.pruner import FramePlan
from vtprune.reporting import SampleReport
from vtprune.video import Frame
from vtprune.viz import (
    FAINT,
    GAP,
    INK,
    KEPT,
    MARGIN,
    MERGED,
    PAPER,
    Entry,
    VizError,
    _dimmed,
    _font,
    _model_view,
    _panel,
    _wrap,
    stages,
)

MOST = 64  # frames drawn
WIDE, NARROW = 168, 112  # pixels of a frame, few in a row and many
TRACK = (232, 234, 237)  # what a bar could grow to
BAR = 40  # pixels of the tallest bar
NUMBER = 18  # pixels of the line above it


@dataclass(frozen=True)
class Shares:
    """What a video's F frames (or pairs of them that the model merged) were left with.

    Parameters:
        plan: tokens, and scores and grids where there are any.
        own: whether the plan is the strategy's; it is counted otherwise.
        total: visual tokens of the video before pruning.
        where: the stage that the tokens were counted at, in words.
        kept: which of the video's tokens were left there with a vector of their own, numbered within the video.
        grid: (rows, columns) of one frame's tokens before pruning, as far as the report tells.
    """

    plan: FramePlan
    own: bool
    total: int
    where: str
    kept: np.ndarray
    grid: tuple[int, int] | None


def shares(sample: SampleReport, video: int = 0) -> Shares:
    """What the frames of a sample's video got: by the strategy's own plan, or counted at its last stage.

    Parameters:
        video: which of the sample's videos, pictures not counted.
    Raises:
        VizError: if there is no such video, or its tokens do not come frame by frame.
    """
    plans = sample.plans or [None] * len(sample.images)
    videos = [[at] for at, n in enumerate(sample.frames) if n > 1]
    if not videos and plans and None not in plans:
        videos = [list(range(len(plans)))]  # pictures that stood for the frames of a video
    if not videos:
        raise VizError("the sample has pictures only, no frames of a video; report.overlay draws pictures.")
    if not 0 <= video < len(videos):
        raise VizError(f"video={video}: the sample has {len(videos)} video(s), counted from 0.")
    at = videos[video]
    first, total = sum(sample.images[: at[0]]), sum(sample.images[i] for i in at)
    stage = stages(sample)[-1]
    inside = stage.kept[(stage.kept >= first) & (stage.kept < first + total)]
    kept = inside[~np.isin(inside, sample.foreign)] - first
    grid = sample.grids[at[0]] if sample.grids else None
    given = [plan for plan in (plans[i] for i in at) if plan is not None]
    if given:
        return Shares(_joined(given), True, total, "entering the decoder", kept, grid)
    frames = sample.frames[at[0]]
    if total % frames:
        raise VizError(f"the video's {total} visual tokens do not divide evenly over its {frames} frames.")
    counts = np.bincount((inside - first) // (total // frames), minlength=frames)
    return Shares(FramePlan(tuple(counts.tolist())), False, total, stage.title, kept, grid)


def _joined(plans: list[FramePlan]) -> FramePlan:
    tokens, scores, grids = ([getattr(plan, name) for plan in plans] for name in ("tokens", "scores", "grids"))
    return FramePlan(*(None if None in parts else tuple(chain.from_iterable(parts)) for parts in (tokens, scores, grids)))


def timeline(
    sample: SampleReport,
    frames: Sequence[Image.Image | Frame],
    video: int = 0,
    fit: str = "stretch",
    most: int = MOST,
    columns: int | None = None,
    bare: bool = False,
) -> Image.Image:
    """The video's frames in reading order, above each a bar for its score and one for its tokens.

    On each frame is drawn the grid that it was resized to, or which of its tokens were kept (bright, outlined in blue, as in
    `vtprune.viz.overlay`). Frames that got nothing are dark and grey.

    Parameters:
        sample: one sample of a report.
        frames: those that the model was fed, in order; labelled with their times if they are `vtprune.video.Frame`. Of a
            model that merges pairs of frames, the first of each pair will do as well.
        video: which of the sample's videos, pictures not counted.
        fit: how the processor made frames square, "stretch" or "crop" (shortest edge, centre crop).
        most: frames drawn at most, evenly chosen.
        columns: frames in a row; None for as many as look well.
        bare: without heading and legend.
    Raises:
        VizError: for pictures, or another number of frames.
    """
    found = shares(sample, video)
    count, per = len(found.plan.tokens), 1
    if len(frames) != count:
        per = 2
        if -(-len(frames) // per) != count:
            raise VizError(f"the model saw {count} frames (or pairs of frames), {len(frames)} given; pass them all, in order.")
    if most < 1 or (columns is not None and columns < 1):
        raise VizError(f"most={most}, columns={columns}: at least 1.")
    shown = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
    columns = columns or (8 if len(shown) <= 24 else 16)
    # rows of even length look better than full rows and a remainder
    columns = -(-len(shown) // -(-len(shown) // columns))
    grid, width = _grid(found, per), WIDE if columns <= 8 else NARROW
    pictures = [frame.image if isinstance(frame, Frame) else frame for frame in frames]
    # without a grid all get the first one's shape
    height = round(width * min(2.0, max(0.25, pictures[0].height / pictures[0].width)))
    cells = []
    for i in shown:
        frame, picture = frames[i * per], pictures[i * per].convert("RGB")
        view = picture.resize((width, height)) if grid is None else _model_view(picture, grid, fit, width)
        label = clock(frame.time) if isinstance(frame, Frame) else f"frame {i * per}"
        cells.append(_cell(_frame(view, found, i, grid), found, i, label))
    page = _lay(cells, columns)
    return page if bare else _headed(page, found, len(shown), per)


def strips(entries: Sequence[Entry], heading: str = "") -> Image.Image:
    """All entries under each other: a line with title, caption and answer, and the picture, a bare timeline, below it.

    Parameters:
        entries: in reading order; of one without a picture the caption says why.
        heading: lines above them, e.g. the question and what the bars are.
    Raises:
        VizError: without entries.
    """
    if not entries:
        raise VizError("a sheet of strips needs at least one entry.")
    width = max([e.picture.width for e in entries if e.picture is not None] or [8 * WIDE])
    bold, small, head = _font(18), _font(15), _font(22)
    above = [_wrap(line, head, width, 3) for line in heading.splitlines()]
    rows, y = [], MARGIN + 28 * sum(map(len, above))
    for entry in entries:
        indent = round(bold.getlength(entry.title)) + 14
        text = f"{entry.caption}   {entry.answer}" if entry.picture else f"did not run: {entry.caption}"
        lines = _wrap(text, small, width - indent, 1 if entry.picture else 2)
        y += GAP
        rows.append((y, indent, lines))
        y += 4 + 20 * len(lines) + (entry.picture.height + 4 if entry.picture else 0)
    page = Image.new("RGB", (width + 2 * MARGIN, y + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for at, text in enumerate(line for lines in above for line in lines):
        draw.text((MARGIN, MARGIN + 28 * at), text, INK, head)
    for entry, (y, indent, lines) in zip(entries, rows, strict=True):
        draw.text((MARGIN, y), entry.title, INK, bold)
        for at, text in enumerate(lines):
            draw.text((MARGIN + indent, y + 2 + 20 * at), text, INK if entry.picture else FAINT, small)
        if entry.picture is not None:
            page.paste(entry.picture, (MARGIN, y + 4 + 20 * len(lines)))
    return page


def clock(seconds: float) -> str:
    """`0:07.5`, `1:02:07.5`."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"


def _grid(found: Shares, per: int) -> tuple[int, int] | None:
    """(rows, columns) of one frame's tokens before pruning, or None if they are not known."""
    each, rest = divmod(found.total, len(found.plan.tokens))
    if found.grid is not None and found.grid[0] * found.grid[1] == each:
        return found.grid
    side = round(each**0.5)
    # models that pool each frame by itself make it square first; those that merge pairs of them keep their shape
    return (side, side) if per == 1 and not rest and side * side == each else None


def _frame(view: Image.Image, found: Shares, i: int, grid: tuple[int, int] | None) -> Image.Image:
    """One frame with the grid that it was resized to, or the tokens that it kept."""
    if not found.plan.tokens[i]:
        return Image.fromarray(_dimmed(np.asarray(view).astype(np.float32)).astype(np.uint8))
    if found.plan.grids is not None:
        return _ruled(view, found.plan.grids[i])
    if grid is None:
        return view
    each = grid[0] * grid[1]
    kept = found.kept[found.kept // each == i] - i * each
    # a planned token may stand for more than its own cell
    return view if found.own and len(kept) != found.plan.tokens[i] else _panel(view, grid, kept, {})


def _ruled(view: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The frame under thin lines between `grid`'s rows and columns."""
    ruled = view.copy()
    # a dark line beside each white one shows on light frames; dense grids have no room for it
    shades = ((0, PAPER, 160), (1, INK, 90)) if max(view.height / grid[0], view.width / grid[1]) >= 16 else ((0, PAPER, 110),)
    for shift, colour, strength in shades:
        lines = Image.new("L", view.size, 0)
        draw = ImageDraw.Draw(lines)
        for at in (round(view.width * part / grid[1]) + shift for part in range(1, grid[1])):
            draw.line((at, 0, at, view.height), fill=strength)
        for at in (round(view.height * part / grid[0]) + shift for part in range(1, grid[0])):
            draw.line((0, at, view.width, at), fill=strength)
        ruled.paste(Image.new("RGB", view.size, colour), mask=lines)
    ImageDraw.Draw(ruled).rectangle((0, 0, view.width - 1, view.height - 1), outline=KEPT, width=2)
    return ruled


def _tops(found: Shares) -> tuple[float, int]:
    """What the tallest score bar and the tallest token bar stand for."""
    return max(found.plan.scores or (0.0,)) or 1.0, max(found.plan.tokens) or 1


def _cell(frame: Image.Image, found: Shares, i: int, label: str) -> Image.Image:
    """A frame with its bars and numbers above and its label below."""
    font, space = _font(13), 4
    head = NUMBER + BAR + space
    cell = Image.new("RGB", (frame.width, head + frame.height + 18), PAPER)
    draw = ImageDraw.Draw(cell)
    top_score, top_tokens = _tops(found)
    bars = [(f"{found.plan.tokens[i]}", found.plan.tokens[i] / top_tokens, KEPT)]
    if found.plan.scores is not None:
        bars.insert(0, (f"{found.plan.scores[i]:.2f}", found.plan.scores[i] / top_score, MERGED))
    width = (frame.width - space * (len(bars) - 1)) // len(bars)
    for number, (text, share, colour) in enumerate(bars):
        x = number * (width + space)
        draw.rectangle((x, NUMBER, x + width - 1, NUMBER + BAR - 1), fill=TRACK)
        # a share above zero shows
        height = max(1, round(share * BAR)) if share > 0 else 0
        if height:
            draw.rectangle((x, NUMBER + BAR - height, x + width - 1, NUMBER + BAR - 1), fill=colour)
        draw.text((x + (width - font.getlength(text)) / 2, 1), text, INK if share > 0 else FAINT, font)
    cell.paste(frame, (0, head))
    draw.text((0, head + frame.height + 2), label, FAINT, font)
    return cell


def _lay(cells: list[Image.Image], columns: int) -> Image.Image:
    """Cells of one size in rows, on white."""
    width, height = cells[0].size
    rows, gap = -(-len(cells) // columns), 6
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + GAP) - GAP), PAPER)
    for at, cell in enumerate(cells):
        row, column = divmod(at, columns)
        page.paste(cell, (column * (width + gap), row * (height + GAP)))
    return page


def _headed(page: Image.Image, found: Shares, shown: int, per: int) -> Image.Image:
    """The strip under a line of what it shows and a legend."""
    bold, small, swatch = _font(18), _font(14), 12
    count, (top_score, top_tokens) = len(found.plan.tokens), _tops(found)
    frames = f"{count} frames" if per == 1 else f"{count} pairs of frames"
    title = f"{sum(found.plan.tokens)} of {found.total} visual tokens {found.where}, over {frames}"
    legend = [(MERGED, f"score, highest {top_score:.3g}")] if found.plan.scores is not None else []
    legend += [(KEPT, f"tokens of a frame, most {top_tokens}"), ((72, 72, 72), "left out")]
    notes = [f"{shown} of {count} shown, evenly chosen"] if shown < count else []
    notes += ["the first frame of each pair is shown"] if per > 1 else []
    width = max(page.width, 460)
    # as many entries in a line as fit
    lines, x = [[]], 0
    for colour, text in [*legend, *((None, note) for note in notes)]:
        long = small.getlength(text) + (swatch + 6 if colour else 0) + 20
        if x and x + long > width:
            lines.append([])
            x = 0
        lines[-1].append((x, colour, text))
        x += long
    titles = _wrap(title, bold, width, 3)
    top = MARGIN + 24 * len(titles) + 20 * len(lines) + 10
    sheet = Image.new("RGB", (width + 2 * MARGIN, top + page.height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for at, text in enumerate(titles):
        draw.text((MARGIN, MARGIN + 24 * at), text, INK, bold)
    for at, line in enumerate(lines):
        y = MARGIN + 24 * len(titles) + 4 + 20 * at
        for x, colour, text in line:
            if colour:
                draw.rectangle((MARGIN + x, y + 3, MARGIN + x + swatch, y + 3 + swatch), fill=colour)
            draw.text((MARGIN + x + (swatch + 6 if colour else 0), y), text, FAINT, small)
    sheet.paste(page, (MARGIN, top))
    return sheet
