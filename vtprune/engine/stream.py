"""Which tokens of a forward pass are still flowing, per sample, and what follows from it: gathers, positions, masks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance."""
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def compress(alive: Tensor, left: bool, counts: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
    """Slots of each row that are alive, in order, padded to the longest row.

    Parameters:
        alive: bool [B, n].
        left: pad on the left (rows end together) rather than on the right.
        counts: how many of each row are, where that is known; reading it stalls a GPU.
    Returns:
        LongTensor [B, m] into the n slots, and bool [B, m] marking the real ones (None if all rows are equally long).
    """
    counts = alive.sum(1).tolist() if counts is None else counts  # decides a shape
    longest, shortest = max(counts), min(counts)
    order = torch.sort(alive, dim=1, descending=not left, stable=True).indices
    index = order[:, order.shape[1] - longest :] if left else order[:, :longest]
    # a stable sort keeps the order of equals, in either direction
    return index, None if longest == shortest else alive.gather(1, index)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[..., b, index[b], :] for x [..., B or 1, n, d] and index [B, m]."""
    if x.shape[-3] != index.shape[0]:
        x = x.expand(*x.shape[:-3], index.shape[0], *x.shape[-2:])
    at = index[..., None].expand(*index.shape, x.shape[-1])
    return x.gather(-2, at.expand(*x.shape[:-2], *at.shape[-2:]))


def last(marks: Tensor, count: int) -> Tensor:
    """The last `count` columns of bool [B, n]; those before its first are marked."""
    missing = count - marks.shape[1]
    return torch.nn.functional.pad(marks, (missing, 0), value=True) if missing > 0 else marks[:, -missing:]


@dataclass
class Stream:
    """The tokens that enter a decoder layer in this forward pass.

    Parameters:
        length: L, tokens that the user fed in this pass.
        index: LongTensor [B, n] into them; valid: bool [B, n] or None if every slot is real.
        visual: LongTensor [B, L], a visual token's number within its sample, -1 for text and padding.
        gone: bool [B, L] or None, visual tokens dropped so far in this pass.
        left: padding side.
        moved: LongTensor [B, L] or None, where a strategy has rearranged visual tokens: the place that the token now in
            a fed slot came from.
        real, seen: how many slots of each row are real, and how many are visual tokens, as far as that is known without
            reading it from the device.
    """

    length: int
    index: Tensor
    valid: Tensor | None
    visual: Tensor
    gone: Tensor | None = None
    left: bool = True
    moved: Tensor | None = None
    real: list[int] | None = None
    seen: list[int] | None = None
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def pruned(self) -> bool:
        return self.gone is not None

    def memo(self, key: Hashable, make: Callable[[], object], *alive: object):
        """Computed once per stream: consecutive layers share it. `alive` are objects whose id() is part of the key."""
        if key not in self._cache:
            self._cache[key] = make(), alive
        return self._cache[key][0]

    def columns(self) -> Tensor:
        """LongTensor [B, L], each fed slot's own place."""
        return torch.arange(self.length, device=self.index.device).expand(self.index.shape[0], -1)

    def rearranged(self, row: int, here: Tensor, there: Tensor) -> Stream:
        """The stream in which slots `here` of a row hold the tokens that were in slots `there` (a permutation)."""
        visual, moved = self.visual.clone(), (self.columns() if self.moved is None else self.moved).clone()
        to, of = self.index[row, here], self.index[row, there]
        visual[row, to], moved[row, to] = visual[row, of], moved[row, of]
        return replace(self, visual=visual, moved=moved, _cache={})

    @property
    def numbers(self) -> Tensor:
        """LongTensor [B, n], each slot's visual number, -1 for text and padding."""

        def make() -> Tensor:
            numbers = self.visual.gather(1, self.index)
            return numbers if self.valid is None else numbers.masked_fill(~self.valid, -1)

        return self.memo("numbers", make)

    def visual_slots(self) -> tuple[list[int], Tensor, Tensor]:
        """Per sample the count of visual tokens; their slots and numbers, [B, max], right-padded."""

        def make():
            mask = self.numbers >= 0
            counts = mask.sum(1).tolist() if self.seen is None else self.seen  # decides shapes
            order = torch.sort(mask, dim=1, descending=True, stable=True).indices[:, : max(counts)]
            return counts, order, self.numbers.gather(1, order)

        return self.memo("visual", make)

    def drop(
        self, lost: Tensor, dropped: Sequence[int] | None = None, others: Sequence[int] | None = None
    ) -> tuple[Stream, Tensor]:
        """The stream without the slots marked in `lost` (bool [B, n]), and the gather [B, m] that leads to it.

        Parameters:
            dropped: how many visual tokens of each row `lost` marks, where that is known; others: how many that are none.
        """
        alive = ~lost if self.valid is None else self.valid & ~lost
        real, seen = (
            None if known is None or dropped is None else [n - d for n, d in zip(known, dropped, strict=True)]
            for known in (self.real, self.seen)
        )
        if real is not None and others is not None:
            real = [n - d for n, d in zip(real, others, strict=True)]
        gather, valid = compress(alive, self.left, real)
        gone = torch.zeros_like(self.visual, dtype=torch.bool) if self.gone is None else self.gone.clone()
        gone.scatter_(1, self.index, lost | gone.gather(1, self.index))
        index = self.index.gather(1, gather)
        return Stream(self.length, index, valid, self.visual, gone, self.left, self.moved, real, seen), gather

    def gap(self) -> Tensor:
        """LongTensor [B, n], how many visual tokens were dropped before each slot."""
        return self.memo("gap", lambda: (self.gone.long().cumsum(1) - self.gone.long()).gather(1, self.index))

    def positions(self, logical: Tensor, compact: bool, shift: Tensor | None) -> Tensor:
        """Positions of the slots, from the fed tokens' `logical` ones [..., B or 1, L].

        Parameters:
            compact: renumber over what is gone, in the order in which tokens flow; else a token that was moved keeps the
                position that it had.
            shift: LongTensor [B] or None, what earlier passes over the same cache have already dropped.
        """
        index = self.index if compact or self.moved is None else self.moved.gather(1, self.index)
        index = index.expand(*logical.shape[:-2], *self.index.shape)
        at = logical.expand(*logical.shape[:-2], *self.index.shape[:1], logical.shape[-1]).gather(-1, index)
        if compact and self.gone is not None:
            at = at - self.gap()
        if compact and shift is not None:
            at = at - shift[:, None]
        return at

    def restore(self, hidden: Tensor) -> Tensor:
        """[B, n, D] back to the fed length [B, L, D]; rows of dropped tokens are zero.

        The last place is an exception where a prompt ends in a picture: what is said next follows the last token that is left.
        """
        at = self.index if self.valid is None else self.index.masked_fill(~self.valid, self.length)
        full = hidden.new_zeros(hidden.shape[0], self.length + 1, hidden.shape[2])
        full = full.scatter(1, at[..., None].expand_as(hidden), hidden)[:, : self.length]
        if self.left and hidden.shape[1]:  # rows end together, so the last of each is real
            full[:, -1] = hidden[:, -1]
        return full

    def followed(self, labels: Tensor) -> Tensor:
        """Labels [B, L] for a loss that pairs the logits of each place with the label of the next one.

        Where tokens between two survivors are gone, the first of the two predicts the second: its label moves to the place
        after the first. All else is -100: what has left predicts nothing and is predicted by nothing, padding included.
        """
        to, labelled = self.index[:, :-1] + 1, labels.gather(1, self.index[:, 1:])
        if self.valid is not None:
            to = to.masked_fill(~(self.valid[:, :-1] & self.valid[:, 1:]), self.length)
        full = labels.new_full((labels.shape[0], self.length + 1), -100)
        return full.scatter(1, to, labelled)[:, : self.length]


def join_valid(past_valid: Tensor | None, past: int, valid: Tensor | None, index: Tensor) -> Tensor | None:
    """bool [B, past + n], which of the cached and the new keys are real; None if all are."""
    if valid is None and past_valid is None:
        return None
    ones = torch.ones(index.shape[0], 1, dtype=torch.bool, device=index.device)
    old = past_valid if past_valid is not None else ones.expand(-1, past)
    return torch.cat([old, valid if valid is not None else ones.expand(-1, index.shape[1])], -1)


def causal_mask(queries: int, past: int, keys_valid: Tensor | None, device: torch.device) -> Tensor:
    """bool [B or 1, 1, queries, past + queries]: causal over cached and new keys, without those that only pad.

    A padding query sees itself alone, as a row without any key is NaN under some kernels.
    """
    causal = torch.ones(queries, past + queries, dtype=torch.bool, device=device).tril(past)
    if keys_valid is None:
        return causal[None, None]
    return ((causal & keys_valid[:, None, :]) | causal.triu(past))[:, None]
