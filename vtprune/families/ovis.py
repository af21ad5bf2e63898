"""Ovis2: patches become words of a visual vocabulary, tiles stand between indicator tokens."""

from __future__ import annotations

from torch import nn

from vtprune.families.base import Family, Tiling
from vtprune.families.tiles import Span, grouped


def _worded(base: nn.Module, ids: list[int], spans: list[Span]) -> list[Tiling]:
    """The overview first, then tiles row by row; what stands between them says where columns and rows end."""
    _, behind_overview, column_end, row_end, _ = base.visual_indicator_token_ids
    found = []
    for group in grouped(spans, lambda one, two: two[0] - one[1] == 1):
        between = [ids[one[1]] for one in group[1:-1]]  # without what follows the overview
        rows = between.count(row_end) + 1
        columns = len(group[1:]) // rows
        expected = ([column_end] * (columns - 1) + [row_end]) * rows
        regular = len(group) > 1 and ids[group[0][1]] == behind_overview and [*between, row_end] == expected
        found.append(Tiling(len(group), 0, columns if regular else 0))
    return found


OVIS2 = Family(
    name="Ovis2",
    base_classes=("Ovis2Model",),
    encoder_layers=("vision_tower.transformer.encoder.layers",),
    projector=("vision_tower.head_linear",),
    special_tokens=(),
    runs=_worded,
    sealed="its patches are joined and looked up in a visual vocabulary together, so they cannot leave one by one",
)
