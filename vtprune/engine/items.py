"""Between the engine's padded tensors and a strategy's views: one item (image or sample) is a row with a count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from vtprune.pruner import FramePlan, Keep, Rows, VtpruneError


@dataclass
class Choice:
    """A strategy's answer for one item, checked.

    Parameters:
        kept: LongTensor [K], positions in the view; ascending unless `ordered`.
        hidden: [K, ...] replacement vectors, or None; into, foreign, plan: as in `Keep`, or None.
    """

    kept: Tensor
    hidden: Tensor | None = None
    into: Tensor | None = None
    ordered: bool = False
    foreign: Tensor | None = None
    plan: FramePlan | None = None

    def changes(self, tokens: int) -> bool:
        """Whether it does anything to an item of so many tokens."""
        return len(self.kept) < tokens or self.hidden is not None or self.ordered

    def split(self, counts: list[int]) -> list[Choice]:
        """A choice among several images' tokens as one for each, of `counts` tokens.

        Raises:
            VtpruneError: if tokens were rearranged, which could put one image's among another's.
        """
        if len(counts) == 1:
            return [self]
        if self.ordered:
            raise VtpruneError("a strategy rearranged the tokens of several images at once; it may do so within one only.")
        parts, start = [], 0
        for at, count in enumerate(counts):
            mine = (self.kept >= start) & (self.kept < start + count)
            into = None if self.into is None else self.into[start : start + count] - start
            plan = None
            if self.plan is not None:
                scores, grids = self.plan.scores, self.plan.grids
                plan = FramePlan(
                    self.plan.tokens[at : at + 1],
                    None if scores is None else scores[at : at + 1],
                    None if grids is None else grids[at : at + 1],
                )
            parts.append(
                Choice(
                    self.kept[mine] - start,
                    None if self.hidden is None else self.hidden[mine],
                    # what lives on in another image's token is not said
                    None if into is None else torch.where((into >= 0) & (into < count), into, -1),
                    False,
                    None if self.foreign is None else _within(self.foreign, start, count),
                    plan,
                )
            )
            start += count
        return parts


def _within(numbers: Tensor, start: int, count: int) -> Tensor:
    return numbers[(numbers >= start) & (numbers < start + count)] - start


# {survivor: numbers averaged into it}, and numbers of survivors whose vector stands for something else
Past = tuple[dict[int, list[int]], list[int]]


def nothing_past() -> Past:
    """Of tokens that nothing was merged into."""
    return {}, []


@dataclass
class Item:
    """What is known of the visual tokens of one image or sample, as pruning goes on.

    Parameters:
        index: LongTensor [N], the survivors' numbers before any pruning, in the order in which they flow.
        sizes: tokens of each of its images before any pruning.
        carry: per-token tensors [N, ...].
        past: gives `merged` and `foreign`, not to be changed. They are for the report alone and take reading from the device,
            so they are found when they are asked for.
        cuts: (layer, what gives the survivors' numbers) after each cut; for the report alone, as `past`.
        ordered: whether a strategy has rearranged them, so that `index` need not ascend.
        plan: what each frame of a video got, if a strategy said so.
    """

    index: Tensor
    sizes: tuple[int, ...]
    carry: dict[str, Tensor] = field(default_factory=dict)
    past: Callable[[], Past] = nothing_past
    cuts: list[tuple[int, Callable[[], Tensor]]] = field(default_factory=list)
    ordered: bool = False
    plan: FramePlan | None = None

    @property
    def merged(self) -> dict[int, list[int]]:
        """{survivor: numbers averaged into it}."""
        return self.past()[0]

    @property
    def foreign(self) -> list[int]:
        """Numbers of survivors whose vector stands for something else."""
        return self.past()[1]

    def cut(self, choice: Choice) -> None:
        """Keep the chosen tokens."""
        if choice.into is not None or choice.foreign is not None or self.past is not nothing_past:
            self.past = later(self.past, self.index, choice.kept, choice.into, choice.foreign)
        self.index = self.index[choice.kept]
        self.carry = {name: t[choice.kept] for name, t in self.carry.items()}
        self.ordered = self.ordered or choice.ordered
        self.plan = choice.plan or self.plan

    def copy(self) -> Item:
        """Another item with the same content, for another call over the same features."""
        return Item(self.index, self.sizes, dict(self.carry), self.past, list(self.cuts), self.ordered, self.plan)

    def detached(self) -> Item:
        """A copy whose carried tensors have no graph."""
        return replace(self.copy(), carry={name: t.detach() for name, t in self.carry.items()})


def later(
    before: Callable[[], Past], index: Tensor, kept: Tensor, into: Tensor | None, foreign: Tensor | None
) -> Callable[[], Past]:
    """The past of what is left of `index` after a cut, found when it is asked for."""
    return cache(lambda: _merged(before(), index, kept, into, foreign))


def _merged(before: Past, index: Tensor, kept: Tensor, into: Tensor | None, foreign: Tensor | None) -> Past:
    """The past of what is left of `index` after a cut."""
    merged = {survivor: list(gone) for survivor, gone in before[0].items()}
    numbers, alive = index.tolist(), set(kept.tolist())
    targets = [-1] * len(numbers) if into is None else into.tolist()
    if into is not None or merged:
        for at, number in enumerate(numbers):
            if at in alive:
                continue
            gone = [number, *merged.pop(number, [])]
            if targets[at] >= 0:
                merged.setdefault(numbers[targets[at]], []).extend(gone)
    return merged, [*before[1], *([] if foreign is None else index[foreign].tolist())]


def stack_carry(items: list[Item]) -> dict[str, Tensor]:
    """The carried tensors that all `items` (of equal count) have, batched."""
    names = set.intersection(*(set(i.carry) for i in items))
    return {name: torch.stack([i.carry[name] for i in items]) for name in names}


def unstack_carry(items: list[Item], carry: dict[str, Tensor]) -> None:
    for name, batched in carry.items():
        for item, row in zip(items, batched, strict=True):
            item.carry[name] = row


def slice_rows(rows: Rows | None, group: list[int], count: int) -> Rows | None:
    """The rows of a group of items that have `count` tokens each."""
    if rows is None:
        return None
    if len(group) == rows.logits.shape[0] and count == rows.logits.shape[-1]:
        return rows

    def tokens(t: Tensor | None, dim: int) -> Tensor | None:
        return None if t is None else t[group].narrow(dim, 0, count)

    queries = None if rows.query_values is None else rows.query_values[group]
    return Rows(
        tokens(rows.logits, 3), rows.lse[group], rows.valid[group], tokens(rows.keys, 2), tokens(rows.values, 2), queries
    )


@dataclass
class Picks:
    """A strategy's answer for several items, checked, in tensors for all of them.

    Parameters:
        kept: LongTensor [G, K], positions in the view, ascending unless `ordered`; of item g the first counts[g].
        counts: how many each item keeps.
        hidden: per item [K_g, ...], or None; into, foreign: as in `Keep`, or None.
    """

    kept: Tensor
    counts: list[int]
    ordered: bool = False
    hidden: Tensor | list[Tensor] | None = None
    into: Tensor | list[Tensor] | None = None
    foreign: Tensor | list[Tensor] | None = None

    def choices(self) -> list[Choice]:
        """One choice per item."""
        return [
            Choice(
                self.kept[at, :count],
                None if self.hidden is None else self.hidden[at],
                None if self.into is None else self.into[at],
                self.ordered,
                None if self.foreign is None else self.foreign[at],
            )
            for at, count in enumerate(self.counts)
        ]


def picked(keep: Keep, tokens: list[int], who: str, doubts: Doubts) -> Picks:
    """An `encode` strategy's answer, checked.

    Parameters:
        tokens: how many each item of the view has; doubts: where to leave checks that are to be read later.
    Raises:
        VtpruneError: for indices of the wrong shape, repeated, out of range, or none at all.
    """
    if not isinstance(keep, Keep):
        raise VtpruneError(f"{who} returned a {type(keep).__name__}, not a Keep (or None to keep all).")
    items, indices, counts = len(tokens), keep.indices, keep.counts
    if isinstance(indices, list):
        if len(indices) != items or any(i.dtype != torch.long or i.ndim != 1 for i in indices):
            raise VtpruneError(f"{who} returned indices for {len(indices)} of {items} items, or not as 1-D int64 per item.")
        counts = [len(index) for index in indices]
        indices = torch.nn.utils.rnn.pad_sequence(indices, batch_first=True)
    elif indices.dtype != torch.long or indices.ndim != 2 or len(indices) != items:
        raise VtpruneError(f"{who} returned indices for {len(indices)} of {items} items, or not as 1-D int64 per item.")
    counts = [indices.shape[1]] * items if counts is None else counts
    if len(counts) != items or not all(0 < count <= indices.shape[1] for count in counts):
        raise VtpruneError(f"{who} kept no token of an image; at least one must enter the decoder.")
    longest = max(counts)
    indices, limit = indices[:, :longest], tokens[0]
    ragged = min(counts) < longest or min(tokens) < max(tokens)
    if ragged:
        device, places = indices.device, torch.arange(longest, device=indices.device)
        limits, real = torch.tensor([tokens, counts], device=device)[..., None]
        # what only pads gets numbers of its own, behind all others
        indices = torch.where(places < real, indices.masked_fill(indices >= limits, -1), max(tokens) + places)
        limit = max(tokens) + longest
    rows = indices.sort(-1).values
    wrong = (rows[:, 0] < 0) | (rows[:, -1] >= limit) | (rows[:, 1:] == rows[:, :-1]).any(1)
    doubts.add(wrong.any(), f"{who} returned indices that repeat or lie outside 0 .. {max(tokens) - 1}.")
    kept = indices if keep.ordered else rows
    if ragged or kept.device.type != "cpu":
        # an index out of range would end the whole process's use of the device before the check is read
        kept = kept.clamp(0, max(tokens) - 1)
    for hidden, count in zip(keep.hidden, counts, strict=True) if keep.hidden is not None else ():
        if len(hidden) != count:
            raise VtpruneError(f"{who} returned {len(hidden)} vectors for {count} kept tokens.")
    return Picks(kept, counts, keep.ordered, keep.hidden, keep.into, keep.foreign)


class Doubts:
    """Checks whose outcome lies on a device: reading each when it is made would stall the device each time."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, str]] = []

    def add(self, wrong: Tensor, message: str) -> None:
        """Note a check, bool []; on the CPU it is read at once.

        Raises:
            VtpruneError: with the message, if it is true.
        """
        if wrong.device.type != "cpu":
            self._found.append((wrong, message))
        elif bool(wrong):
            raise VtpruneError(message)

    def settle(self) -> None:
        """Read all checks together.

        Raises:
            VtpruneError: for the first that is true.
        """
        found, self._found = self._found, []
        if found:
            # a model's layers may lie on several devices
            devices = {wrong.device for wrong, _ in found}
            read = {device: iter(torch.stack([w for w, _ in found if w.device == device]).tolist()) for device in devices}
            for wrong, message in found:
                if next(read[wrong.device]):
                    raise VtpruneError(message)


def checked(keep: Keep, items: int, tokens: int, who: str, least: int = 1, doubts: Doubts | None = None) -> list[Choice]:
    """A strategy's answer, one choice per item.

    Parameters:
        doubts: where to leave checks that are to be read later; None reads them now.
    Raises:
        VtpruneError: for indices of the wrong shape, repeated, out of range, or none at all.
    """
    if not isinstance(keep, Keep):
        raise VtpruneError(f"{who} returned a {type(keep).__name__}, not a Keep (or None to keep all).")
    indices = list(keep.indices)
    if keep.counts is not None:
        indices = [row[:count] for row, count in zip(indices, keep.counts, strict=True)]
    if len(indices) != items or any(i.dtype != torch.long or i.ndim != 1 for i in indices):
        raise VtpruneError(f"{who} returned indices for {len(indices)} of {items} items, or not as 1-D int64 per item.")
    hidden, into, foreign = (None if t is None else list(t) for t in (keep.hidden, keep.into, keep.foreign))
    if any(len(index) < least for index in indices):
        raise VtpruneError(f"{who} kept no token of an image; at least one must enter the decoder.")
    # one check for all items where they keep equally many
    together = isinstance(keep.indices, Tensor) and keep.counts is None
    sets = [keep.indices] if together else [index[None] for index in indices]
    sets = [rows.sort(-1).values for rows in sets]
    now = Doubts() if doubts is None else doubts
    for rows in sets:
        if rows.shape[1]:
            wrong = (rows[:, 0] < 0) | (rows[:, -1] >= tokens) | (rows[:, 1:] == rows[:, :-1]).any(1)
            now.add(wrong.any(), f"{who} returned indices that repeat or lie outside 0 .. {tokens - 1}.")
    if doubts is None:
        now.settle()
    elif sets[0].device.type != "cpu":
        # an index out of range would end the whole process's use of the device before the check is read
        sets, indices = [s.clamp(0, tokens - 1) for s in sets], [i.clamp(0, tokens - 1) for i in indices]
    ascending = [row for rows in sets for row in rows]
    choices = []
    for at, index in enumerate(indices):
        if hidden is not None and len(hidden[at]) != len(index):
            raise VtpruneError(f"{who} returned {len(hidden[at])} vectors for {len(index)} kept tokens.")
        choices.append(
            Choice(
                index if keep.ordered else ascending[at],
                None if hidden is None else hidden[at],
                None if into is None else into[at],
                keep.ordered,
                None if foreign is None else foreign[at],
                None if keep.plans is None else keep.plans[at],
            )
        )
    return choices
