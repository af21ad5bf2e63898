"""The stage slider: every place on a token's way through the model, what was left there, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from vtprune.reporting import SampleReport
from vtprune.viz import final_picture
from vtprune.viz_timeline import timeline

if TYPE_CHECKING:
    from vtprune.video import Frame

    from .watching import Seen

# the ends and the middle of a map from dark to bright whose lightness alone tells the order (after cividis)
_SHADES = np.array([(0, 34, 78), (66, 78, 108), (123, 123, 120), (185, 172, 112), (254, 232, 56)], dtype=np.float32)
_MARK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Place:
    """Where the slider stands: a vision block, the decoder's entry, a decoder layer, or the cache after prefill.

    Parameters:
        kind: "block", "entry", "layer" or "cache"; at: which block or layer; title: in words.
    """

    kind: str
    at: int
    title: str


def places(blocks: int, layers: int) -> list[Place]:
    """All of them in running order, for a model of so many vision blocks and decoder layers."""
    return [
        *(Place("block", n, f"after vision block {n}") for n in range(blocks)),
        Place("entry", 0, "entering the decoder"),
        *(Place("layer", n, f"at decoder layer {n}") for n in range(layers)),
        Place("cache", layers - 1, "in the cache of the last layer"),
    ]


def depths(model: Any) -> tuple[int, int]:
    """Vision blocks and decoder layers of a loaded model, by its configuration; 1 block where it names none."""
    vision, text = getattr(model.config, "vision_config", None), model.config.get_text_config()
    blocks = next((n for n in (getattr(vision, name, None) for name in ("num_hidden_layers", "depth")) if n), 1)
    return int(blocks), int(text.num_hidden_layers)


def left(sample: SampleReport, place: Place) -> np.ndarray:
    """Ascending numbers of the tokens present at a place."""
    if place.kind == "block":
        cuts = [index for block, index in sample.encoded if block <= place.at]
        index = cuts[-1] if cuts else torch.arange(sample.visual_tokens)
    elif place.kind == "entry":
        index = sample.kept
    elif place.kind == "layer" or not sample.cached:
        index = sample.layers[place.at]
    else:
        index = sample.cached[-1]
    return np.sort(index.detach().cpu().numpy())


def groups(sample: SampleReport, present: np.ndarray) -> dict[int, list[int]]:
    """{token: those merged into it} at a place where `present` are: what is still there by itself is not merged yet."""
    alive = set(present.tolist())
    found = {kept: [n for n in gone if n not in alive] for kept, gone in sample.merged.items() if kept in alive}
    return {kept: gone for kept, gone in found.items() if gone}


def at(sample: SampleReport, place: Place) -> SampleReport:
    """The sample as if the run had ended at `place`, so that the library's own pictures show that place."""
    present = left(sample, place)
    index = torch.from_numpy(present)
    foreign = sample.foreign if place.kind != "block" else []
    # what the frames of a video got is told by their plan as long as nothing else left
    plans = sample.plans if len(present) == len(sample.kept) else [None] * len(sample.images)
    return replace(
        sample, kept=index, layers=[index], cached=[], encoded=[], merged=groups(sample, present), foreign=foreign, plans=plans
    )


def draw(sample: SampleReport, image: Image.Image, place: Place, fit: str, marked: int | None = None) -> Image.Image:
    """The picture with what was left at a place: kept patches bright in blue outlines, merged groups within orange ones.

    Parameters:
        marked: a patch to point at.
    Raises:
        VizError: if the tokens form no grid.
    """
    return _mark(final_picture(at(sample, place), image, fit), sample, marked)


def strip(sample: SampleReport, frames: Sequence[Frame], place: Place, fit: str) -> Image.Image:
    """A clip's frames with what each had left at a place."""
    return timeline(at(sample, place), frames, fit=fit, columns=4, bare=True)


def visit(seen: list[Seen], place: Place, name: str) -> Seen | None:
    """The strategy's last visit up to a place (else its first one) that gave scores of this name."""
    having = [s for s in seen if name in s.scores]
    before = [s for s in having if _order(s) <= _place_order(place)]
    return before[-1] if before else (having[0] if having else None)


def heat(
    sample: SampleReport, visited: Seen, name: str, image: Image.Image, fit: str, marked: int | None = None
) -> Image.Image:
    """The picture under a map of scores from dark (low) to bright (high); tokens that had left stay grey.

    The scale is the square root of the share of the highest score, as attention is mostly near zero.
    """
    rows, columns = sample.grids[0]
    whole = replace(sample, kept=torch.arange(sample.visual_tokens), merged={}, foreign=[])
    whole = replace(whole, layers=[whole.kept], cached=[], encoded=[])
    view = np.asarray(final_picture(whole, image, fit)).astype(np.float32)
    cell = view.shape[1] // columns
    values = visited.scores[name]
    low, high = min(0.0, float(values.min(initial=0.0))), float(values.max(initial=0.0))
    strength = np.full(rows * columns, np.nan, dtype=np.float32)
    strength[visited.numbers] = np.sqrt((values - low) / ((high - low) or 1.0))
    wide = np.kron(strength.reshape(rows, columns), np.ones((cell, cell), dtype=np.float32))
    steps = np.linspace(0, 1, len(_SHADES))
    colours = np.stack([np.interp(np.nan_to_num(wide), steps, _SHADES[:, c]) for c in range(3)], -1)
    grey = np.repeat((view @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None], 3, -1)
    mixed = np.where(np.isnan(wide)[..., None], grey * 0.35 + 12, 0.25 * grey + 0.75 * colours)
    return _mark(Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)), sample, marked)


def token_at(sample: SampleReport, size: tuple[int, int], x: float, y: float) -> int | None:
    """The token under a point of a drawn picture of this size."""
    if not sample.grids or sample.grids[0] is None:
        return None
    rows, columns = sample.grids[0]
    row, column = int(y * rows / size[1]), int(x * columns / size[0])
    return row * columns + column if 0 <= row < rows and 0 <= column < columns else None


def _mark(picture: Image.Image, sample: SampleReport, marked: int | None) -> Image.Image:
    if marked is None or sample.grids[0] is None:
        return picture
    rows, columns = sample.grids[0]
    row, column = divmod(marked, columns)
    if row >= rows:
        return picture
    cell, paint = picture.width // columns, ImageDraw.Draw(picture)
    for grow, colour in ((3, _MARK[1]), (1, _MARK[0])):
        box = (column * cell - grow, row * cell - grow, (column + 1) * cell + grow - 1, (row + 1) * cell + grow - 1)
        paint.rectangle(box, outline=colour, width=2)
    return picture


def _order(seen: Seen) -> tuple[int, int]:
    return {"shrink": (0, -1), "encode": (0, seen.at), "select": (1, 0), "prefill": (2, seen.at), "decode": (3, seen.at)}[
        seen.stage
    ]


def _place_order(place: Place) -> tuple[int, int]:
    return {"block": (0, place.at), "entry": (1, 0), "layer": (2, place.at), "cache": (3, place.at)}[place.kind]
