"""Where a visual token is in its picture: views, and the boxes of their cells. Knows no model; families say what views are.

A view is a grid of tokens over the whole picture, or over one tile of it. A tiled picture has several: the whole picture small,
and its tiles at full size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class View:
    """A grid of an image's visual tokens, which come view by view, each in raster order.

    Parameters:
        rows, columns: of the grid.
        tile: which of the `tiles` that the picture was cut into it shows, in raster order; None for the whole picture.
        across: tiles side by side, or 0 where only the picture's shape tells: the cut nearest to it in shape was taken, or
            (`largest`) the one in which it is largest.
    """

    rows: int
    columns: int
    tile: int | None = None
    tiles: int = 1
    across: int = 0
    largest: bool = False

    @property
    def cells(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Canvas:
    """One grid over the whole picture, put together from the views that show it at one scale.

    Parameters:
        numbers: int64 [rows, columns], the number within its image of each cell's token.
    """

    numbers: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        return self.numbers.shape  # type: ignore[return-value]


def arrangement(tiles: int, width: int, height: int, largest: bool = False) -> tuple[int, int]:
    """(rows, columns) of so many tiles whose shape is nearest to the picture's, in ratio, or in which it is largest."""
    pairs = [(tiles // c, c) for c in range(1, tiles + 1) if tiles % c == 0]
    if largest:
        return max(pairs, key=lambda pair: min(pair[1] / width, pair[0] / height))
    return min(pairs, key=lambda pair: abs(pair[1] / pair[0] - width / height))


def canvases(views: tuple[View, ...], width: int, height: int) -> list[Canvas]:
    """The picture's grids, coarse before fine: one for each view of the whole, and one that joins the tiles.

    Parameters:
        views: of one image; width, height: of the picture, in pixels or any unit.
    """
    found, tiles, start = [], {}, 0
    for view in views:
        numbers = np.arange(start, start + view.cells).reshape(view.rows, view.columns)
        start += view.cells
        if view.tile is None:
            found.append(Canvas(numbers))
        else:
            tiles[view.tile] = numbers
    if tiles:
        first = next(view for view in views if view.tile is not None)
        across = first.across or arrangement(first.tiles, width, height, first.largest)[1]
        rows = [[tiles[at] for at in range(begin, begin + across)] for begin in range(0, first.tiles, across)]
        found.append(Canvas(np.block(rows)))
    return sorted(found, key=lambda canvas: canvas.numbers.size)


def shown(grid: tuple[int, int], width: int, height: int, fit: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what the processor shows the encoder of a picture, in its pixels.

    Parameters:
        fit: "stretch", all of it; "crop", the largest middle part of the grid's shape, as CLIP's processor leaves.
    Raises:
        ValueError: for another `fit`.
    """
    if fit not in ("crop", "stretch"):
        raise ValueError(f"fit={fit!r}: 'crop' or 'stretch'.")
    if fit == "stretch":
        return 0.0, 0.0, float(width), float(height)
    rows, columns = grid
    scale = max(columns / width, rows / height)
    # no wider than the picture by rounding: Pillow refuses to cut out what is outside
    w, h = min(columns / scale, width), min(rows / scale, height)
    x, y = (width - w) / 2, (height - h) / 2
    return x, y, min(x + w, width), min(y + h, height)


def boxes(views: tuple[View, ...], size: tuple[int, int], fit: str = "stretch") -> np.ndarray:
    """[N, 4] float: left, top, right, bottom of each of an image's tokens, in pixels of a picture of `size` (width, height).

    Parameters:
        fit: how the processor made it fit, for images of one view; tiles cover all of it.
    Raises:
        ValueError: for an image whose tokens have no place in it (`views` empty), or another `fit`.
    """
    if not views:
        raise ValueError("the image's tokens form no grid, so they have no place in the picture.")
    width, height = size
    found = np.zeros((sum(view.cells for view in views), 4))
    for canvas in canvases(views, width, height):
        rows, columns = canvas.grid
        left, top, right, bottom = shown(canvas.grid, width, height, fit if len(views) == 1 else "stretch")
        x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
        corners = np.stack(
            [*np.broadcast_arrays(x[None, :-1], y[:-1, None]), *np.broadcast_arrays(x[None, 1:], y[1:, None])], -1
        )
        found[canvas.numbers] = corners
    return found
