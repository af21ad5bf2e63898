"""The vision encoder's side: strategies that let patches leave between its blocks, or read its attention rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vtprune.engine.attention import Request, padding_mask
from vtprune.engine.items import Item, checked, slice_rows, stack_carry, unstack_carry
from vtprune.engine.stream import groups
from vtprune.measure.clock import Clock
from vtprune.pruner import EncodeView, Needs, Pruner, Rows, UnsupportedError


class Encoding:
    """One run of the vision encoder over a batch of images.

    Patches leave after a block. Images may then hold different counts: rows are padded on the right and masked.

    Parameters:
        pruner: the strategy that owns the `encode` stage, or None to only count tokens.
        needs: its declaration per block; depth: blocks that feed the projector; special: tokens before the patches.
    """

    def __init__(
        self,
        pruner: Pruner | None,
        needs: Mapping[int, Needs],
        depth: int,
        special: int,
        kernel: Callable[[], str],
        grid,
        clock,
    ):
        self.pruner, self.needs, self.depth, self.special = pruner, needs, depth, special
        self.kernel, self.grid, self.clock = kernel, grid, clock
        self.items: list[Item] = []
        self.sequence = 0
        self.lengths: list[list[int]] = []
        self._rows: Rows | None = None
        self._mask: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        return [len(item.index) for item in self.items]

    def before_block(self, block: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note what the block runs on; hand it a mask where rows are padded."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if block == 0:
            patches = hidden.shape[1] - self.special
            index = torch.arange(patches, device=hidden.device)
            self.items = [Item(index, (patches,)) for _ in range(hidden.shape[0])]
            self.sequence = hidden.shape[1]
        self.lengths.append([self.special + n for n in self.counts])
        if self._mask is None:
            return None
        if len(args) > 1:
            return (args[0], self._mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": self._mask}

    def requests(self, block: int) -> Iterator[tuple[Request, Callable[[Rows], None]]]:
        """The attention rows wanted of a block."""
        need = self.needs.get(block)
        if need is None or need.queries is None or not self.items:
            return
        with self.clock.span("selection"):
            counts = self.counts
            batch, longest, device = len(counts), max(counts), self.items[0].index.device
            columns = torch.arange(self.special, self.special + longest, device=device).expand(batch, -1)
            valid = None
            if min(counts) != longest:
                valid = torch.arange(self.special + longest, device=device) < torch.tensor(
                    [[self.special + n] for n in counts], device=device
                )
            rows = torch.zeros(batch, 1, dtype=torch.long, device=device) if need.queries == "cls" else None
            one = torch.ones(batch, 1, dtype=torch.bool, device=device)
            yield Request(need, rows, one, columns, valid, None), self._take

    def _take(self, rows: Rows) -> None:
        self._rows = rows

    def after_block(self, block: int, output):
        """Run the strategy on the block's output; returns the shortened output, or None to leave it."""
        if block not in self.needs:
            return None
        with self.clock.span("selection"):
            hidden = output[0] if isinstance(output, tuple) else output
            rows, self._rows = self._rows, None
            kept, replaced = self._choose(block, hidden, rows)
            if kept is None:
                return None
            hidden = self._gather(hidden, kept, replaced)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _choose(self, block: int, hidden: Tensor, rows: Rows | None):
        counts, special = self.counts, self.special
        kept: list[Tensor | None] = [None] * len(counts)
        replaced: dict[int, Tensor] = {}
        for group in groups(counts):
            n, items = counts[group[0]], [self.items[i] for i in group]
            whole = len(group) == len(counts)
            view = EncodeView(
                index=torch.stack([item.index for item in items]),
                sizes=items[0].sizes,
                carry=stack_carry(items),
                layer=block,
                depth=self.depth,
                hidden=(hidden if whole else hidden[group])[:, special : special + n],
                rows=slice_rows(rows, group, n),
                grid=self.grid(items[0].sizes[0]),
            )
            keep = self.pruner.encode(view)
            unstack_carry(items, view.carry)
            if keep is None:
                continue
            indices, vectors, into = checked(keep, len(group), n, f"{self.pruner.name}.encode")
            for at, i in enumerate(group):
                if len(indices[at]) < n or vectors is not None:
                    self.items[i].cut(indices[at], into[at] if into else None)
                    self.items[i].cuts.append((block, self.items[i].index))
                    kept[i] = indices[at]
                    if vectors is not None:
                        replaced[i] = vectors[at]
        if all(k is None for k in kept):
            return None, replaced
        device = hidden.device
        return [torch.arange(n, device=device) if k is None else k for k, n in zip(kept, counts, strict=True)], replaced

    def _gather(self, hidden: Tensor, kept: list[Tensor], replaced: dict[int, Tensor]) -> Tensor:
        counts, special = [len(k) for k in kept], self.special
        longest = max(counts)
        index = torch.zeros(len(kept), special + longest, dtype=torch.long, device=hidden.device)
        index[:, :special] = torch.arange(special, device=hidden.device)
        if min(counts) == longest:
            index[:, special:] = torch.stack(kept) + special
            self._mask = None
        else:
            for i, k in enumerate(kept):
                index[i, special : special + len(k)] = k + special
            valid = torch.arange(special + longest, device=hidden.device) < torch.tensor(
                [[special + n] for n in counts], device=hidden.device
            )
            self._mask = padding_mask(self.kernel(), valid, hidden.dtype)
        shorter = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        for i, vectors in replaced.items():
            shorter[i, special : special + counts[i]] = vectors.to(shorter.dtype)
        return shorter


class ImageTokens:
    """What went on from the encoder for one image; travels with its projected features.

    Parameters:
        item: survivors and what is carried with them.
        size: visual tokens before pruning.
        encoding: the run it came from, or None for features that a user computed elsewhere.
        owner: the session that ran it.
    """

    def __init__(self, item: Item, size: int, encoding: Encoding | None, owner: object = None):
        self.item, self.size, self.encoding, self.owner = item, size, encoding, owner
        self.replays: list[tuple[Tensor, object]] = []

    @classmethod
    def of(cls, features: Tensor) -> ImageTokens:
        """The record attached to an image's features, or a fresh one for features that never met this engine."""
        found = getattr(features, "_vtprune", None)
        if found is not None:
            return found
        index = torch.arange(len(features), device=features.device)
        return cls(Item(index, (len(features),)), len(features), None)


def attach_records(features: list[Tensor], encoding: Encoding, owner: object) -> list[Tensor]:
    """Projected features at full length (dropped rows zero, to match the placeholders), each with its record."""
    result = []
    for at, feature in enumerate(features):
        if encoding.pruner is None:
            index = torch.arange(len(feature), device=feature.device)
            item, full = Item(index, (len(feature),)), feature
        else:
            item = encoding.items[at]
            if len(feature) != max(encoding.counts):
                raise UnsupportedError(
                    f"{len(feature)} visual tokens came out of the projector for {max(encoding.counts)} patches, so they do "
                    f"not stand for one another (vision_feature_select_strategy='full' keeps the class token, for one). Use "
                    f"the 'default' select strategy, or a strategy of another stage."
                )
            full = _full_length(feature, item.index.to(feature.device), item.sizes[0])
        # the tensor object itself is what reaches the decoder, once per beam, and is what a second question finds again
        full._vtprune = ImageTokens(item, item.sizes[0], encoding, owner)
        result.append(full)
    return result


def _full_length(feature: Tensor, index: Tensor, size: int) -> Tensor:
    """`feature` (padded rows after the kept ones) with each kept row at its own number, zero elsewhere."""
    if len(index) == size:
        return feature
    return feature.new_zeros(size, feature.shape[-1]).index_copy(0, index, feature[: len(index)])


def new_clock(module: nn.Module) -> Clock:
    return Clock(next(module.parameters()).device)
