"""Which pictures of a prompt are tiles of one image, told from what stands between them, and how they lie in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from vtprune.families.base import Tiling

Span = tuple[int, int]


def touching(base: nn.Module, ids: list[int], spans: list[Span], apart: int = 0) -> list[Tiling]:
    """Tiles with at most `apart` tokens between them are one image, its overview last (InternVL, Aya Vision)."""
    return [_tiling(len(group)) for group in grouped(spans, lambda one, two: two[0] - one[1] <= apart)]


one_apart = partial(touching, apart=1)


def marked(base: nn.Module, ids: list[int], spans: list[Span]) -> list[Tiling]:
    """Tiles behind a mark and their row and column, rows ended by a newline, the overview last (Idefics3, SmolVLM).

    Between tiles of a row stand the mark and a row-column token, between rows a newline (one token or two) before them.
    A mark closes the image, so that what follows another image's mark is an image of its own.
    """

    def follows(one: Span, two: Span) -> bool:
        between = ids[one[1] : two[0]]
        if one[0] < 2 or not 2 <= len(between) <= 4 or between[-2] != ids[one[0] - 2]:
            return False
        return len(between) == 2 or between[0] != between[-2]

    found = []
    for group in grouped(spans, follows):
        ends = [at for at in range(len(group) - 1) if group[at + 1][0] - group[at][1] > 2]
        rows = [end - start for start, end in zip([-1, *ends[:-1]], ends, strict=True)] if ends else []
        # rows of equal length, then the overview alone: anything else was not made by the processor
        regular = bool(ends) and ends[-1] == len(group) - 2 and len(set(rows)) == 1
        found.append(_tiling(len(group), rows[0] if regular else 0))
    return found


def grouped(spans: list[Span], together: Callable[[Span, Span], bool]) -> list[list[Span]]:
    """Neighbours for which `together` holds, in groups."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and together(groups[-1][-1], span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _tiling(tiles: int, across: int = 0) -> Tiling:
    """The usual tiling: parts in raster order, then the overview; an image of one tile is its own overview."""
    return Tiling(tiles, tiles - 1, across)
