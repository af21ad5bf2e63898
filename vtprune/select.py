"""Selection maths that more than one paper uses: pure functions on tensors, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


def top(scores: Tensor, k: int) -> Tensor:
    """Ascending indices of the `k` largest scores of each row; ties go to the lower index.

    Parameters:
        scores: [B, N], any float dtype; compared in fp32. NaN counts as the smallest value.
        k: 1 <= k <= N.
    Returns:
        LongTensor [B, k].
    """
    scores = torch.nan_to_num(scores.float(), nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # a stable sort, not topk: topk leaves the order of equal scores to the kernel, hence to device and batch
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(-1).values


def top_ragged(scores: Tensor, counts: list[int]) -> list[Tensor]:
    """As `top`, with a count of its own for each row."""
    scores = torch.nan_to_num(scores.float(), nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return [row[:k].sort().values for row, k in zip(order, counts, strict=True)]


def spread(tokens: int, k: int, device: torch.device | None = None) -> Tensor:
    """LongTensor [k]: evenly spaced indices floor((i + 0.5) * tokens / k), strictly ascending."""
    return ((2 * torch.arange(k, device=device) + 1) * tokens).div(2 * k, rounding_mode="floor")
