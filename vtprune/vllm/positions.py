"""Three-axis positions that travel as columns behind features. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 128  # digits below it are exact in bfloat16 and float16
AXES = 3
COLUMNS = 2 * AXES  # a high digit and a low one for each axis


def written(places: Tensor | None, like: Tensor) -> Tensor:
    """[N, COLUMNS] columns to put behind features [N, D].

    Parameters:
        places: LongTensor [N, 3] below BASE * BASE, from where the picture starts; None: its tokens' positions are known.
        like: the features.
    """
    if places is None:
        return like.new_zeros(len(like), COLUMNS)
    return torch.cat([places // BASE, places % BASE], dim=1).to(like)


def parted(features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Features without their columns, and what the columns say of all of them: LongTensor [3, N]."""
    columns = torch.cat([f[:, -COLUMNS:] for f in features]).float().round().long()
    high, low = columns.T.chunk(2)
    return [f[:, :-COLUMNS] for f in features], high * BASE + low
