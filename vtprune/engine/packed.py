"""A vision encoder that runs all pictures as one packed sequence and joins neighbouring patches behind its blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.attention import Request
from vtprune.engine.encoding import Encoding
from vtprune.engine.items import Item, Picks, stack_carry, unstack_carry
from vtprune.engine.stream import groups
from vtprune.families.base import Layout, Tower
from vtprune.pruner import Needs, Pruner, Rows, UnsupportedError, VtpruneError


class PackedEncoding(Encoding):
    """One run of such an encoder.

    Patches leave the sequence itself, and with them their rotary embeddings; the bounds within which blocks attend close up.
    Nothing is padded. Views number a picture's patches cell by cell, in whatever order the tower keeps them.

    What is left of a picture is joined in the tower's order, as many patches at a time as make a cell. Where a strategy
    keeps whole cells a token is the cell it was; otherwise it goes by the cell of its first patch (no two tokens share one),
    and cells of which only other patches are in it count as merged into that. Behind the joining the sequence of tokens is
    at full length again, dropped ones zero.

    Parameters:
        pruner, needs, depth, kernel, clock: as in `Encoding`; without a strategy, blocks are only counted.
        tower: what the family says of it; layouts: of the pictures, in the order in which they are packed.
    Raises:
        UnsupportedError: for pictures of several frames, where a strategy wants to choose.
    """

    def __init__(
        self,
        pruner: Pruner | None,
        needs: Mapping[int, Needs],
        depth: int,
        kernel: Callable[[], str],
        clock,
        tower: Tower,
        layouts: list[Layout],
    ):
        super().__init__(pruner, needs, depth, 0, kernel, None, clock)
        self.tower, self.cells, self.grids = tower, [layout.size for layout in layouts], [layout.grid for layout in layouts]
        if pruner is not None and any(layout.frames > 1 for layout in layouts):
            raise UnsupportedError(
                f"{pruner.name} works inside the vision encoder, and a picture of several frames came. Pass videos as "
                f"videos, or use a strategy of another stage."
            )
        self.order = tower.order(layouts) if pruner is not None and tower.order is not None else None
        self.begins = [0, *accumulate(n * tower.cell for n in self.cells)]  # each picture's first patch
        self.full: list[list[int]] = []
        self._segment = 0
        self._found: dict[int, Rows] = {}
        # by the id of what the tower bounds a block with, which blocks share: that, closed up, lengths before and after
        self._bounds: dict[int, tuple[Tensor, Tensor, list[int], list[int]]] = {}

    def unpruned(self) -> list[list[int]]:
        return self.full

    def before_block(self, block: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note what the block runs on; hand it what is left of its bounds and rotary embeddings."""
        bounds = kwargs["cu_seqlens"]
        if block == 0:
            self._begin(args[0] if args else kwargs["hidden_states"])
        self._segment = 0
        whole = self.pruner is None or len(self.flow) == self.begins[-1]
        with self.clock.span("selection"):
            if id(bounds) not in self._bounds:
                full, closer = bounds.diff().tolist(), bounds if whole else self._closed_up(bounds)
                self._bounds[id(bounds)] = bounds, closer, full, full if whole else closer.diff().tolist()
            _, closer, full, lengths = self._bounds[id(bounds)]
            self.lengths.append(lengths)
            self.full.append(full)
            if whole:
                return None
            rotary = tuple(part.index_select(-2, self.flow) for part in kwargs["position_embeddings"])
            given = {**kwargs, "cu_seqlens": closer, "position_embeddings": rotary}
            if given.get("max_seqlen") is not None:
                given["max_seqlen"] = max(lengths)
            return args, given

    def _begin(self, hidden: Tensor) -> None:
        if self.pruner is None:
            return
        device = hidden.device
        number = torch.arange(len(hidden), device=device)
        self.number = number  # at each place of the whole sequence, the patch that is there
        if self.order is not None:
            within = torch.arange(self.tower.cell, device=device)
            self.number = (self.order.to(device)[:, None] * self.tower.cell + within).flatten()
        self.place = torch.empty_like(number).index_copy_(0, self.number, number)
        self.flow = number  # the places that are left
        self._items = [Item(torch.arange(n * self.tower.cell, device=device), (n,)) for n in self.cells]
        self.counts = [len(item.index) for item in self._items]
        self._number_images()
        self._look(self.cells)

    def _closed_up(self, bounds: Tensor) -> Tensor:
        """Bounds of what is left within `bounds`; between two of them there is something."""
        return torch.searchsorted(self.flow, bounds.to(self.flow)).unique_consecutive().to(bounds)

    def _at(self, item: int) -> Tensor:
        """Where in what is left of the sequence a picture's patches are, in the order of their numbers."""
        return torch.searchsorted(self.flow, self.place[self.items[item].index + self.begins[item]])

    def requests(self, block: int) -> Iterator[tuple[Request, Callable[[Rows], None]]]:
        """The attention rows wanted of a block, which attends to one picture after the other."""
        need = self.needs.get(block)
        if need is None or need.queries is None or self.idle:
            return
        with self.clock.span("selection"):
            item, self._segment = self._segment, self._segment + 1
            columns = self._at(item)[None]
            yield Request(need, None, None, columns - columns.min(), None, None), lambda rows: self._found.update({item: rows})

    def _groups(self, parts: list[tuple[int, int]]) -> list[list[int]]:
        return groups(list(zip(self.counts, self.grids, self.images, strict=True)))

    def _shown(self, group: list[int], n: int, hidden: Tensor, rows: Rows | None) -> dict[str, Any]:
        items = [self.items[i] for i in group]
        found = [self._found.pop(i) for i in group if i in self._found]
        mine = torch.stack([hidden[self._at(i)] for i in group])
        return {
            "index": torch.stack([item.index for item in items]),
            "sizes": items[0].sizes,
            "carry": stack_carry(items),
            "hidden": mine,
            "special": mine[:, :0],
            "rows": _stacked(found) if found else None,
            "grid": self.grids[group[0]],
            "cell": self.tower.cell,
        }

    def _carry_on(self, group: list[int], carry: dict[str, Tensor]) -> None:
        unstack_carry([self.items[i] for i in group], carry)

    def _cut(self, block: int, hidden: Tensor, found: list[tuple[list[int], Picks]]) -> Tensor:
        for group, picks in found:
            if picks.hidden is not None or picks.ordered:
                raise VtpruneError(
                    f"{self.pruner.name}.encode merged or rearranged patches, which this tower will join by their places."
                )
            for item, choice in zip((self.items[i] for i in group), picks.choices(), strict=True):
                item.cut(choice)
                item.cuts.append((block, functools.partial(torch.Tensor.clone, item.index)))
        self.counts = [len(item.index) for item in self.items]
        left = [self.place[item.index + begin] for item, begin in zip(self.items, self.begins, strict=False)]
        before, self.flow = self.flow, torch.cat(left).sort().values
        self._bounds.clear()
        return hidden[torch.searchsorted(before, self.flow)]

    def check_cells(self) -> None:
        """Refuse to join what is left between two blocks, where it is no whole cells: later cuts would join it otherwise.

        Raises:
            UnsupportedError: naming the strategy.
        """
        if self.pruner is None or len(self.flow) == self.begins[-1]:
            return
        cells, cell = self.flow // self.tower.cell, self.tower.cell
        if len(cells) % cell or bool((cells.view(-1, cell) != cells[::cell, None]).any()):
            raise UnsupportedError(
                f"{self.pruner.name} kept patches one by one, but this vision tower joins {cell} at a time between blocks, "
                f"too, where they are not yet the ones that will be left. Have it keep whole cells of {cell} patches."
            )

    def join(self) -> None:
        """Note which tokens what is left is about to be joined to."""
        if self.pruner is not None:
            with self.clock.span("selection"):
                self.tokens = [self._token_item(i) for i in range(len(self.items))]

    def spread(self, joined: Tensor) -> Tensor | None:
        """The tokens [T, D] that the patches left so far were joined to, at full length; None where nothing left."""
        if self.pruner is None or len(self.flow) == self.begins[-1]:
            return None
        with self.clock.span("selection"):
            cell = self.tower.cell
            full = joined.new_zeros(self.begins[-1] // cell, joined.shape[-1])
            return full.index_copy(0, self.flow[::cell] // cell, joined)

    def _token_item(self, at: int) -> Item:
        """A picture's tokens after joining, from its patches."""
        patches, cell = self.items[at], self.tower.cell
        if len(patches.index) % cell:
            raise VtpruneError(
                f"{self.pruner.name}.encode left {len(patches.index)} patches of a picture, and this vision tower joins {cell} "
                f"at a time; the number has to be a multiple of that."
            )
        # as they flow, and as they are numbered; the two differ where windows order them
        flowing = self.number[self.place[patches.index + self.begins[at]].sort().values] - self.begins[at]
        cells = (flowing // cell).view(-1, cell)
        order = cells[:, 0].argsort()
        item = Item(cells[order, 0], patches.sizes)
        item.cuts = [(block, functools.partial(_cells_of, index, cell)) for block, index in patches.cuts]
        rank = torch.searchsorted(patches.index, flowing).view(-1, cell)[order]
        item.carry = {name: _pooled(t[rank]) for name, t in patches.carry.items()}
        item.past = cache(lambda: (_merged(cells[order].tolist()), []))
        return item


def _cells_of(index: Callable[[], Tensor], cell: int) -> Tensor:
    return (index() // cell).unique()


def _merged(tokens: list[list[int]]) -> dict[int, list[int]]:
    """{token: cells that live on in it alone}, of the cells of each token's patches, of which it goes by the first."""
    own = {cells[0] for cells in tokens}
    return {cells[0]: sorted(gone) for cells in tokens if (gone := set(cells) - own)}


def _pooled(t: Tensor) -> Tensor:
    """[T, ...] of what was carried per patch [T, cell, ...]: the mean of numbers, whether any of flags."""
    return t.any(1) if t.dtype == torch.bool else t.float().mean(1).to(t.dtype)


def _stacked(found: list[Rows]) -> Rows:
    """Rows of single pictures of one size as a batch."""
    names = ("logits", "lse", "valid", "keys", "values", "query_values")
    parts = {name: [getattr(rows, name) for rows in found] for name in names}
    return Rows(**{name: None if ts[0] is None else torch.cat(ts) for name, ts in parts.items()})
