"""Merging maths: pure functions on tensors that put several tokens into one (`Keep` holds tensors)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.pruner import Keep
from vtprune.select import at, ranked


def windows(grid: tuple[int, int], w: int, device: torch.device | None = None) -> Tensor:
    """LongTensor [windows, w * w]: patch numbers of the w x w windows of a grid that w divides, all in raster order."""
    rows, columns = grid
    patches = torch.arange(rows * columns, device=device).view(rows // w, w, columns // w, w)
    return patches.transpose(1, 2).reshape(-1, w * w)


def window_similarity(hidden: Tensor, members: Tensor) -> Tensor:
    """[B, windows] mean cosine over the pairs of different patches in a window, fp32.

    Parameters:
        hidden: [B, N, C]; a zero vector counts as orthogonal to every other.
        members: [windows, P] patch numbers, P > 1.
    """
    count = members.shape[1]
    total = F.normalize(hidden.float(), dim=-1)[:, members].sum(2)
    return (total.square().sum(-1) - count) / (count * (count - 1))


def merge_windows(hidden: Tensor, members: Tensor, threshold: float, most: int) -> Keep:
    """Average the windows whose similarity reaches `threshold` (NaN does not), of them the `most` most similar.

    Parameters:
        hidden: [B, N, C]; members: [windows, P].
    Returns:
        Merged windows in descending similarity, then the untouched patches in raster order. A merged window goes by the
        number of its first patch.
    """
    tokens = hidden.shape[1]
    similarity = window_similarity(hidden, members)
    rank = ranked(similarity).argsort(1)
    merged = (similarity >= threshold) & (rank < most)
    counts = (tokens - merged.sum(1) * (members.shape[1] - 1)).tolist()  # decides shapes
    window = torch.empty(tokens, dtype=torch.long, device=hidden.device)
    window[members] = torch.arange(len(members), device=hidden.device)[:, None]
    number = torch.arange(tokens, device=hidden.device)
    first = members[:, 0][window]
    inside = merged[:, window]
    head = inside & (number == first)
    # sort key: heads by rank, the untouched by number, then what has been merged away
    key = torch.where(head, rank[:, window], number + torch.where(inside, len(members) + tokens, len(members)))
    order = key.argsort(1)
    means = hidden.float()[:, members].mean(2).to(hidden.dtype)[:, window]
    vectors = at(torch.where(head[..., None], means, hidden), order)
    return Keep(
        [row[:n] for row, n in zip(order, counts, strict=True)],
        [row[:n] for row, n in zip(vectors, counts, strict=True)],
        torch.where(inside & ~head, first, -1),
        ordered=True,
    )


def dpc_knn(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering: centres are dense points far from any denser one; the rest go to the nearest centre.

    A point's density falls with the mean squared distance to its `clusters` nearest points, itself among them, as in the
    published code. Where that adds noise against ties, the lower index counts as the denser one (ours).

    Parameters:
        x: [B, M, D], any float dtype; clusters: 1 .. M.
    Returns:
        centres LongTensor [B, clusters], best first, and LongTensor [B, M], the number of each point's cluster.
    """
    x = x.float()
    count = x.shape[1]
    # not by way of a matrix product: equal points must be at distance zero, in every batch
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    # in logs, as the density itself may underflow
    density = -distance.topk(clusters, largest=False).values.square().mean(-1)
    index = torch.arange(count, device=x.device)
    denser = density[:, None] > density[..., None]
    denser |= (density[:, None] == density[..., None]) & (index < index[:, None])
    gap = distance.masked_fill(~denser, float("inf")).amin(-1)
    # nothing is denser than the peak
    gap = torch.minimum(gap, distance.flatten(1).amax(-1, keepdim=True))
    centres = ranked(gap.log() + density)[:, :clusters]
    cluster = distance.gather(1, centres[..., None].expand(-1, -1, count)).argmin(1)
    own = torch.arange(clusters, device=x.device).expand_as(centres)
    return centres, cluster.scatter(1, centres, own)


def cluster_means(x: Tensor, cluster: Tensor, clusters: int) -> Tensor:
    """[B, clusters, D] means of x [B, M, D] over each cluster, in fp32 and then x's dtype; zero for an empty one.

    Parameters:
        cluster: LongTensor [B, M], the number of each point's cluster.
    """
    # a product with 0 and 1, as scattered sums depend on the order of threads
    member = F.one_hot(cluster, clusters).float().mT
    return (member @ x.float() / member.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype)
