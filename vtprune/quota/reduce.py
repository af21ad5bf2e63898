"""Frame features to the grid or the count that a plan grants: pure functions on tensors, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.pruner import UnsupportedError
from vtprune.quota.planner import Grid, Plan
from vtprune.select import at, exact

METHODS = ("bilinear", "pool", "linspace", "tome")


@dataclass(frozen=True)
class Reduced:
    """The visual tokens of the frames that stay, in the order of time.

    Parameters:
        tokens: [M, D], the dtype of the features.
        boxes: LongTensor [M, 5], what each token stands for: frame, y0, x0, y1, x1 in cells of the frame's native grid, half
            open. Neighbours share a cell where the grids do not divide. After merging it is the box around all that was merged.
        lengths: tokens of each frame that stays.
        widths: LongTensor, tokens of each row, all frames in sequence; None for flat lists, which have no rows.
        owner: after merging, for each frame which of the M tokens every native cell went into, [rows, columns].
    """

    tokens: Tensor
    boxes: Tensor
    lengths: tuple[int, ...]
    widths: Tensor | None = None
    owner: Mapping[int, Tensor] | None = None


def reduce_frames(
    features: Tensor | Sequence[Tensor], plan: Plan, method: str = "bilinear", raster: bool = True, chunk: int = 32
) -> Reduced:
    """Reduce every frame to what the plan grants it.

    Bilinear resizing works in the features' own type, as models pool; the others work on half precision in fp32 and round
    once.

    Parameters:
        features: [T, N, D], or T tensors [N_i, D]: projected and not pooled, in raster order over the plan's native grids.
        method: "bilinear" (the paper's default; equals the pooling of LLaVA-OneVision where the sizes do), "pool" (adaptive
            average), "linspace" (evenly spaced positions), or "tome" (merge the most similar; its published form first
            resizes to the pooled grid, which is `resize` and a plan with that native grid).
        raster: put merged tokens in the order of their first cells (ours). False: unmerged ones by falling similarity, then
            those merged into, as published.
        chunk: frames worked on at once, which bounds memory.
    Raises:
        UnsupportedError: for features that do not fit the plan, an unknown method, a plan without frames, or a flat method
            asked for more tokens than there are (a plan in parity mode without `cap`).
    """
    if method not in METHODS:
        raise UnsupportedError(f"method={method!r}: one of {', '.join(METHODS)}.")
    _check(features, plan)
    flat = method in ("linspace", "tome")
    frames = plan.frames
    if not frames:
        raise UnsupportedError(
            f"no frame gets a token: a budget of {plan.budget} over {len(plan.counts)} frames, each share rounded down. "
            f"Raise the budget, or leave parity mode."
        )
    for i in frames if flat else ():
        cells = plan.native[i][0] * plan.native[i][1]
        if plan.counts[i] > cells:
            raise UnsupportedError(
                f"method={method!r} cannot make {plan.counts[i]} tokens of frame {i}'s {cells}: plan with cap={cells} or less."
            )
    lengths = [plan.counts[i] if flat else plan.grids[i][0] * plan.grids[i][1] for i in frames]
    starts = dict(zip(frames, accumulate([0, *lengths]), strict=False))
    alike: dict[tuple[Grid, Grid], list[int]] = {}
    for i, length in zip(frames, lengths, strict=True):
        alike.setdefault((plan.native[i], (length, 1) if flat else plan.grids[i]), []).append(i)

    device = features[0].device
    tokens = features[0].new_empty(sum(lengths), features[0].shape[-1])
    boxes = torch.empty(sum(lengths), 5, dtype=torch.long, device=device)
    owner: dict[int, Tensor] = {}
    for (native, size), group in alike.items():
        for members in (group[i : i + chunk] for i in range(0, len(group), chunk)):
            x = features[torch.tensor(members, device=device)] if isinstance(features, Tensor) else _stacked(features, members)
            start = torch.tensor([starts[i] for i in members], device=device)
            places = start[:, None] + torch.arange(size[0] * size[1], device=device)
            if method == "tome":
                out, went = merge(x, size[0], raster)
                box = _around(went, size[0], native)
                owner.update((i, (place + cells).view(native)) for i, place, cells in zip(members, start, went, strict=True))
            elif method == "linspace":
                out, box = _spaced(x, size[0], native)
            else:
                out, box = resize(x, native, size, method), cells_of(native, size, device)
            tokens[places] = out
            boxes[places, 0] = torch.tensor(members, device=device)[:, None]
            boxes[places, 1:] = box.expand(len(members), -1, -1)
    widths = [torch.full((plan.grids[i][0],), plan.grids[i][1], device=device) for i in frames]
    return Reduced(tokens, boxes, tuple(lengths), None if flat else torch.cat(widths), owner if method == "tome" else None)


def resize(x: Tensor, native: Grid, size: Grid, method: str = "bilinear") -> Tensor:
    """[G, rows * columns, D]: G frames of features [G, N, D] on another grid.

    Parameters:
        native: (rows, columns) with N cells; size: the same of the result, larger or smaller.
        method: "bilinear" (half-pixel centres, no antialiasing) or "pool" (adaptive average).
    """
    if native == size:
        return x
    if method == "bilinear":
        # the features' own type, contiguous with channels first, as models do it: any other kernel rounds in another way
        grid = F.interpolate(x.unflatten(1, native).permute(0, 3, 1, 2).contiguous(), size=size, mode="bilinear")
    else:
        grid = F.adaptive_avg_pool2d(_wide(x).unflatten(1, native).permute(0, 3, 1, 2), size)
    return grid.permute(0, 2, 3, 1).flatten(1, 2).to(x.dtype)


def cells_of(native: Grid, size: Grid, device: torch.device | None = None) -> Tensor:
    """LongTensor [1, rows * columns, 4]: y0, x0, y1, x1 of the native cells under each cell of a grid laid over them."""
    edges = []
    for cells, count in zip(native, size, strict=True):
        number = torch.arange(count, device=device)
        edges.append((number * cells // count, -(-(number + 1) * cells // count)))
    (top, bottom), (left, right) = edges
    box = torch.stack([*torch.meshgrid(top, left, indexing="ij"), *torch.meshgrid(bottom, right, indexing="ij")], -1)
    return box.view(1, -1, 4)


def merge(x: Tensor, count: int, raster: bool = True) -> tuple[Tensor, Tensor]:
    """Token merging (ToMe, arXiv 2210.09461) until `count` are left, at most half in each round, as QuoTA uses it.

    In every round even positions are sources and odd ones destinations; the sources with the highest cosine to a
    destination are averaged into it. How many a token already stands for is forgotten between rounds, as published.
    Similarities are fp64 rounded to 8 decimals, ties to the lower position, so that no kernel or batch decides them. NaN
    and infinite features count as zero there, a zero vector is orthogonal to all.

    Parameters:
        x: [G, N, D]; count: 1 .. N; raster: as in `reduce_frames`.
    Returns:
        [G, count, D] and LongTensor [G, N], the token that each position went into.
    """
    wide = _wide(x)
    went = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    while wide.shape[1] > count:
        tokens = wide.shape[1]
        few = min(tokens - count, tokens // 2)
        rows = F.normalize(torch.nan_to_num(exact(wide), 0.0, 0.0, 0.0), dim=-1, eps=1e-30)
        best, target = (rows[:, ::2] @ rows[:, 1::2].mT).round(decimals=8).max(-1)
        # in full precision: `ranked` compares in fp32
        order = torch.sort(best, dim=-1, descending=True, stable=True).indices
        gone, stay = order[:, :few], order[:, few:]
        into = target.gather(1, gone)
        goals = wide[:, 1::2]
        # a product with 0 and 1, as scattered sums depend on the order of threads
        member = F.one_hot(into, goals.shape[1]).to(wide.dtype).mT
        means = (goals + member @ at(wide[:, ::2], gone)) / (1 + member.sum(-1, keepdim=True))
        number = torch.empty(len(x), tokens, dtype=torch.long, device=x.device)
        number[:, 1::2] = stay.shape[1] + torch.arange(goals.shape[1], device=x.device)
        number.scatter_(1, 2 * stay, torch.arange(stay.shape[1], device=x.device).expand_as(stay))
        number.scatter_(1, 2 * gone, stay.shape[1] + into)
        wide, went = torch.cat([at(wide[:, ::2], stay), means], 1), number.gather(1, went)
    if raster:
        cell = torch.arange(x.shape[1], device=x.device).expand_as(went)
        first = torch.full_like(went[:, :count], x.shape[1]).scatter_reduce_(1, went, cell, "amin")
        order = first.argsort(1)
        wide, went = at(wide, order), order.argsort(1).gather(1, went)
    return wide.to(x.dtype), went


def _spaced(x: Tensor, count: int, native: Grid) -> tuple[Tensor, Tensor]:
    """Cells floor(i * (N - 1) / (count - 1)), in whole numbers, and their boxes."""
    picked = torch.arange(count, device=x.device) * (x.shape[1] - 1) // max(1, count - 1)
    row, column = picked // native[1], picked % native[1]
    return x[:, picked], torch.stack([row, column, row + 1, column + 1], -1)[None]


def _around(went: Tensor, count: int, native: Grid) -> Tensor:
    """[G, count, 4]: the smallest box with every cell that went into each token."""
    cell = torch.arange(went.shape[1], device=went.device).expand_as(went)
    sides = []
    for value, how in ((cell // native[1], "amin"), (cell % native[1], "amin")):
        sides.append(torch.full_like(went[:, :count], went.shape[1]).scatter_reduce_(1, went, value, how))
    for value in (cell // native[1], cell % native[1]):
        sides.append(torch.zeros_like(went[:, :count]).scatter_reduce_(1, went, value + 1, "amax"))
    return torch.stack(sides, -1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stacked(features: Sequence[Tensor], members: list[int]) -> Tensor:
    return torch.stack([features[i] for i in members])


def _check(features: Tensor | Sequence[Tensor], plan: Plan) -> None:
    if len(features) != len(plan.counts):
        raise UnsupportedError(
            f"features of {len(features)} frames, a plan for {len(plan.counts)}: plan on these frames' scores."
        )
    for i, frame in enumerate(features):
        cells = plan.native[i][0] * plan.native[i][1]
        if frame.ndim != 2 or frame.shape[0] != cells or frame.shape[1] != features[0].shape[1] or frame.dtype.is_complex:
            raise UnsupportedError(
                f"frame {i} has features of shape {tuple(frame.shape)}, the plan says {plan.native[i]} cells: [{cells}, D] "
                f"before any pooling is needed, D the same for all."
            )
        if not frame.dtype.is_floating_point:
            raise UnsupportedError(f"frame {i} has features of type {frame.dtype}; a float type is needed.")
