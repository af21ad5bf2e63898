"""Pictures of what pruning kept: panels per stage for one strategy, and one sheet for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vtprune.places import Canvas, canvases, shown
from vtprune.pruner import VtpruneError
from vtprune.reporting import SampleReport

# Okabe and Ito's palette, told apart by colour-blind eyes; on white
KEPT = (86, 180, 233)
MERGED = (230, 159, 0)
INK = (32, 33, 36)
FAINT = (105, 109, 116)
PAPER = (255, 255, 255)

PANEL = 336  # long side of a panel in pixels, about
GAP = 14
MARGIN = 16
# how many encoder cuts get a panel of their own
ENCODER_PANELS = 2


class VizError(VtpruneError, ValueError):
    """A picture of the pruning that cannot be drawn; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One panel: a stage's name and which of the sample's visual tokens were left at it.

    Parameters:
        title: a few words.
        kept: indices over all visual tokens of the sample.
        merged: {kept index: indices averaged into it}.
    """

    title: str
    kept: np.ndarray
    merged: dict[int, list[int]]


@dataclass(frozen=True)
class Entry:
    """One cell of a contact sheet.

    Parameters:
        title: the strategy.
        caption: a line below it, e.g. how many tokens it kept.
        answer: what the model said.
        picture: as `final_picture` draws it, or None for a strategy that did not run; the caption says why, then.
    """

    title: str
    caption: str
    answer: str
    picture: Image.Image | None = None


def stages(sample: SampleReport) -> list[Stage]:
    """What to show of a sample, in running order: encoder cuts, decoder entry, decoder cuts, cache."""
    kept = _numbers(sample.kept)
    encoded = [(block, np.sort(_numbers(index))) for block, index in sample.encoded]
    # the last encoder cut is usually what enters the decoder, and needs no panel of its own
    encoded = [(block, index) for block, index in encoded if len(index) not in (len(kept), sample.visual_tokens)]
    shown = [
        Stage(f"after encoder block {block}" if block >= 0 else "scaled down", index, {})
        for block, index in encoded[-ENCODER_PANELS:]
    ]
    shown.append(Stage("entering the decoder", kept, sample.merged))
    previous = kept
    for layer, index in enumerate(np.sort(_numbers(layer)) for layer in sample.layers):
        if not np.array_equal(index, previous):
            shown.append(Stage(f"from decoder layer {layer}", index, {}))
            previous = index
    if sample.cached and any(len(c) != len(x) for c, x in zip(sample.cached, sample.layers, strict=True)):
        held = [np.sort(_numbers(index)) for index in sample.cached]
        # layers may hold different sets: the picture shows the last layer's
        same = all(np.array_equal(index, held[-1]) for index in held)
        shown.append(Stage("in the cache" if same else "in the last layer's cache", held[-1], {}))
    return shown


def overlay(sample: SampleReport, image: Image.Image | Sequence[Image.Image], fit: str = "crop") -> Image.Image:
    """Panels side by side, one per stage; one row per image of the sample, two where it is tiled: the whole, and its tiles.

    Kept patches are bright with a blue outline, dropped ones dim and grey; a patch that others were merged into has an
    orange outline together with them.

    Parameters:
        sample: one sample of a report.
        image: the sample's image, or list of images, as given to the processor.
        fit: how the processor made it square, "crop" (short edge resized, centre cropped, as CLIP's) or "stretch".
    Raises:
        VizError: if the number of images differs, or an image's tokens form no grid.
    """
    images = _images(sample, image)
    shown = stages(sample)
    rows = []
    for number, picture in enumerate(images):
        first = sum(sample.images[:number])
        drawn = _canvases(sample, number, picture)
        for canvas in drawn:
            view = _model_view(picture, canvas.grid, fit if len(drawn) == 1 else "stretch")
            row = []
            for stage in shown:
                kept = stage.kept[~np.isin(stage.kept, sample.foreign)] - first
                groups = {k - first: [i - first for i in v] for k, v in stage.merged.items() if v}
                kept, groups = _on(canvas, kept, groups)
                count = f"{len(kept)} of {canvas.numbers.size} tokens" + (" of this view" if len(drawn) > 1 else "")
                row.append((_panel(view, canvas.grid, kept, groups), stage.title, count))
            rows.append(row)
    return _sheet(rows)


def final_picture(sample: SampleReport, image: Image.Image, fit: str = "crop") -> Image.Image:
    """The sample's first image with what was left at the last stage, as one bare panel; of a tiled one, its tiles.

    Raises:
        VizError: if the image's tokens form no grid.
    """
    stage, drawn = stages(sample)[-1], _canvases(sample, 0, image)
    canvas = drawn[-1]
    kept, groups = _on(canvas, stage.kept[~np.isin(stage.kept, sample.foreign)], {k: v for k, v in sample.merged.items() if v})
    return _panel(_model_view(image, canvas.grid, fit if len(drawn) == 1 else "stretch"), canvas.grid, kept, groups)


def contact_sheet(entries: Sequence[Entry], heading: str = "", columns: int = 4) -> Image.Image:
    """All entries on one page: picture, title, caption and answer below each.

    Parameters:
        entries: the cells, in reading order.
        heading: a line above them, e.g. the question.
        columns: cells per row, at most.
    Raises:
        VizError: without entries.
    """
    if not entries:
        raise VizError("a contact sheet needs at least one entry.")
    columns = min(columns, len(entries))
    # rows of even length look better than a full row and a remainder
    columns = -(-len(entries) // -(-len(entries) // columns))
    sizes = [e.picture.size for e in entries if e.picture is not None] or [(PANEL, PANEL)]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    title, small, said, head = _font(20), _font(15), _font(18), _font(22)
    answers = [_wrap(e.answer, said, width, 3) for e in entries]
    captions = [_wrap(e.caption if e.picture else "", small, width, 2) for e in entries]
    texts = []
    for at in range(0, len(entries), columns):
        lines = max(len(c) + len(a) for c, a in zip(captions[at : at + columns], answers[at : at + columns], strict=True))
        texts.append(30 + 22 * lines + 6)
    top = MARGIN + (0 if not heading else 28 * len(_wrap(heading, head, columns * (width + GAP), 3)) + 8)
    page = Image.new(
        "RGB",
        (2 * MARGIN + columns * width + (columns - 1) * GAP, top + sum(texts) + len(texts) * (height + GAP) + MARGIN - GAP),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    for line, text in enumerate(_wrap(heading, head, page.width - 2 * MARGIN, 3)):
        draw.text((MARGIN, MARGIN + 28 * line), text, INK, head)
    for at, entry in enumerate(entries):
        row, column = divmod(at, columns)
        x = MARGIN + column * (width + GAP)
        y = top + sum(texts[:row]) + row * (height + GAP)
        if entry.picture is None:
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=(241, 243, 244))
            draw.text((x + 14, y + 14), "did not run", INK, title)
            for line, text in enumerate(_wrap(entry.caption, small, width - 28, (height - 60) // 20)):
                draw.text((x + 14, y + 46 + 20 * line), text, FAINT, small)
        else:
            page.paste(entry.picture, (x, y))
        draw.text((x, y + height + 6), _wrap(entry.title, title, width, 1)[0], INK, title)
        y += height + 32
        for text in captions[at]:
            draw.text((x, y), text, FAINT, small)
            y += 22
        for text in answers[at]:
            draw.text((x, y), text, INK, said)
            y += 22
    return page


def _numbers(index: Tensor) -> np.ndarray:
    return index.detach().cpu().numpy()


def _images(sample: SampleReport, image: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    images = [image] if isinstance(image, Image.Image) else list(image)
    if len(images) != len(sample.images):
        raise VizError(f"the sample has {len(sample.images)} image(s), {len(images)} given; pass them all, in prompt order.")
    return [picture.convert("RGB") for picture in images]


def _canvases(sample: SampleReport, number: int, image: Image.Image) -> list[Canvas]:
    views = sample.views_of(number)
    if not views:
        raise VizError(
            f"image {number} has {sample.images[number]} visual tokens that form no grid (a video's frames form several), so "
            f"they have no place in one picture. report.timeline draws videos; the indices are in samples[...].kept."
        )
    return canvases(views, image.width, image.height)


def _on(canvas: Canvas, kept: np.ndarray, groups: dict[int, list[int]]) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Kept tokens and merged groups, numbered within their image, as cells of a canvas; those elsewhere are left out."""
    cell = {int(number): at for at, number in enumerate(canvas.numbers.ravel())}
    there = {cell[into]: [cell[n] for n in members if n in cell] for into, members in groups.items() if into in cell}
    return np.array([cell[n] for n in kept.tolist() if n in cell], dtype=np.int64), there


def _model_view(image: Image.Image, grid: tuple[int, int], fit: str, side: int = PANEL) -> Image.Image:
    """What the processor shows the encoder, at a whole number of pixels per patch and about `side` pixels long."""
    rows, columns = grid
    cell = max(4, round(side / max(rows, columns)))
    try:
        part = shown(grid, image.width, image.height, fit)
    except ValueError as error:
        raise VizError(str(error)) from error
    # crop before resizing: the same picture without a large one in between
    return image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC, box=part)


def _panel(view: Image.Image, grid: tuple[int, int], kept: np.ndarray, groups: dict[int, list[int]]) -> Image.Image:
    """The view with dropped patches dimmed and outlines around kept patches and merged groups."""
    rows, columns = grid
    cell = view.width // columns
    alive = np.zeros(rows * columns, dtype=bool)
    alive[kept] = True
    pixels = np.asarray(view).astype(np.float32)
    dim = _dimmed(pixels)
    if len(kept) < rows * columns:
        lit = np.kron(alive.reshape(rows, columns), np.ones((cell, cell), dtype=bool))
        pixels = np.where(lit[..., None], pixels, dim)
        labels = np.where(alive, 1, 0)
        _outline(pixels, labels.reshape(rows, columns), cell, KEPT)
    if groups:
        labels = np.zeros(rows * columns, dtype=np.int64)
        for number, (into, members) in enumerate(groups.items(), start=1):
            labels[[into, *members]] = number
        _outline(pixels, labels.reshape(rows, columns), cell, MERGED)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _dimmed(pixels: np.ndarray) -> np.ndarray:
    """Luma, darkened: the picture stays readable, and no colour there competes with a kept patch."""
    return np.repeat((pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None], 3, -1) * 0.35 + 12


def _outline(pixels: np.ndarray, labels: np.ndarray, cell: int, colour: tuple[int, int, int]) -> None:
    """Draw, in place and inside the cells, the borders of regions of equal non-zero label."""
    wide = np.kron(labels, np.ones((cell, cell), dtype=labels.dtype))
    thickness = 2 if cell >= 10 else 1
    padded = np.pad(wide, thickness)
    edge = np.zeros(wide.shape, dtype=bool)
    h, w = wide.shape
    for step in range(1, thickness + 1):
        for dy, dx in ((step, 0), (-step, 0), (0, step), (0, -step)):
            edge |= padded[thickness + dy : thickness + dy + h, thickness + dx : thickness + dx + w] != wide
    pixels[edge & (wide > 0)] = colour


def _sheet(rows: list[list[tuple[Image.Image, str, str]]]) -> Image.Image:
    """Rows of captioned panels on white."""
    bold, small = _font(18), _font(15)
    caption = 50
    widths = [max(row[c][0].width for row in rows) for c in range(len(rows[0]))]
    heights = [max(panel.height for panel, _, _ in row) + caption for row in rows]
    page = Image.new(
        "RGB", (2 * MARGIN + sum(widths) + GAP * (len(widths) - 1), MARGIN + sum(heights) + GAP * (len(rows) - 1) + 6), PAPER
    )
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        x = MARGIN
        for (panel, title, count), width in zip(row, widths, strict=True):
            page.paste(panel, (x, y))
            draw.text((x, y + panel.height + 5), _wrap(title, bold, width, 1)[0], INK, bold)
            draw.text((x, y + panel.height + 27), count, FAINT, small)
            x += width + GAP
        y += height + GAP
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Break `text` into at most `lines` lines of `width` pixels, with an ellipsis where it goes on."""
    # no letter is narrower than two pixels, so more text than this cannot fit
    words, out, line = text[: lines * width // 2 + 1].split(), [], ""
    while words:
        longer = f"{line} {words[0]}".strip()
        if font.getlength(longer) <= width:
            line = longer
            words.pop(0)
        elif line:
            out.append(line)
            line = ""
        else:  # a single word wider than the line
            fits = next(n for n in range(len(words[0]), 0, -1) if n == 1 or font.getlength(words[0][:n]) <= width)
            out.append(words[0][:fits])
            words[0] = words[0][fits:]
            if not words[0]:
                words.pop(0)
        if len(out) == lines:
            break
    rest = bool(words or line) and len(out) >= lines
    if line and not rest:
        out.append(line)
    if rest:
        last = out[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        out[lines - 1] = last + "..."
    return out[:lines] or [""]
