"""The vision encoder's side: strategies that let patches leave between its blocks, or read its attention rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.attention import Request, padding_mask
from vtprune.engine.items import Doubts, Item, Past, Picks, later, nothing_past, picked, slice_rows
from vtprune.engine.stream import groups
from vtprune.families.base import Layout, layouts_by_packing
from vtprune.measure.clock import Clock
from vtprune.pruner import BudgetError, EncodeView, Frames, Needs, Pruner, Rows, UnsupportedError, VtpruneError, budget_of


@dataclass
class Start:
    """The tokens that the encoder starts with, where pictures were scaled down before it.

    Parameters:
        size: tokens at full size; index: LongTensor [n], the numbers that the remaining ones go by.
        grid: (rows, columns) of them; merged: {number: numbers that it also covers}.
    """

    size: int
    index: Tensor
    grid: tuple[int, int]
    merged: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, full: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Start:
        """A grid laid over a finer one: each of its cells goes by the number of the fine cell in its middle."""
        (tall, wide), (rows, columns) = full, grid
        middle_y = [(2 * i + 1) * tall // (2 * rows) for i in range(rows)]
        middle_x = [(2 * j + 1) * wide // (2 * columns) for j in range(columns)]
        number = [y * wide + x for y in middle_y for x in middle_x]
        merged: dict[int, list[int]] = {n: [] for n in number}
        for fine in range(tall * wide):
            y, x = divmod(fine, wide)
            owner = number[y * rows // tall * columns + x * columns // wide]
            if fine != owner:
                merged[owner].append(fine)
        return cls(tall * wide, torch.tensor(number, device=device), grid, {k: v for k, v in merged.items() if v})


# pictures of so many different sizes are remembered
_LAYOUTS = 256


class Encoding:
    """One run of the vision encoder over a batch of images.

    Patches leave after a block. Images may then hold different counts: rows are padded on the right and masked.

    Parameters:
        pruner: the strategy that owns the `encode` stage, or None to only count tokens.
        needs: its declaration per block; depth: blocks that feed the projector; special: tokens before the patches.
        start: where pictures were scaled down first, what is left.
        tiles: pictures that each image goes in as, or None where each is one.
        known: layouts by picture size, of this call and those before it.
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
        start: Start | None = None,
        tiles: list[int] | None = None,
        known: dict | None = None,
    ):
        self.pruner, self.needs, self.depth, self.special = pruner, needs, depth, special
        self.kernel, self.grid, self.clock, self.start = kernel, grid, clock, start
        self.parts = None if tiles is None else [(at, n) for n in tiles for at in range(n)]
        self.known: dict[tuple, Layout] = {} if known is None else known
        self.layouts: list[Layout] | None = None
        self.unpooled: Tensor | None = None  # what went into the pooling of a video's frames
        self.notes: list[str] = []
        self.doubts = Doubts()
        self.tokens: list[Item] | None = None  # where patches are joined behind the last block: what became of them
        self.images: list[tuple[int, ...]] = []
        self.sequence = 0
        self.lengths: list[list[int]] = []
        # of all images, padded on the right: survivors' numbers, how many, what is carried with them (and by which images)
        self.index: Tensor | None = None
        self.counts: list[int] = []
        self.carry: dict[str, tuple[Tensor, set[int]]] = {}
        self.cuts: list[tuple[int, Tensor, list[int], set[int]]] = []
        self.pasts: list[Callable[[], Past]] = []
        self.ordered: list[bool] = []
        self.idle = True  # whether there is nothing to choose
        self._items: list[Item] | None = None
        self.flops = 0  # of what is no block, where a family says so
        self._rows: Rows | None = None
        self._real: Tensor | None = None  # bool [B, S], False where a row pads; None where none does
        self._mask: Tensor | None = None

    @property
    def items(self) -> list[Item]:
        """What is left of each image."""
        if self._items is None:
            self._items = [self._item(at) for at in range(len(self.counts))]
        return self._items

    def _item(self, at: int) -> Item:
        count = self.counts[at]
        return Item(
            self.index[at, :count],
            (self.sequence - self.special,),
            {name: tensor[at, :count] for name, (tensor, owners) in self.carry.items() if at in owners},
            self.pasts[at],
            [
                (block, functools.partial(_row, index, at, counts[at]))
                for block, index, counts, changed in self.cuts
                if at in changed
            ],
            self.ordered[at],
        )

    def tile_items(self) -> list[list[Item]]:
        """The items of each image's tiles."""
        left = iter(self.items)
        return [[next(left) for _ in range(layout.tiles)] for layout in self.layouts]

    def pack(self, packing: Callable, arguments: dict):
        """Run the model's packing of tiles on features at full length, and note the layouts that it makes."""
        patches = None if self.pruner is None else self.sequence - self.special
        self.layouts = layouts = self._layouts(packing, arguments, patches)
        if self.pruner is not None:
            arguments = {
                **arguments,
                "image_features": [
                    torch.stack([_full_length(row, item) for row, item in zip(feature, items, strict=True)])
                    for feature, items in zip(arguments["image_features"], self.tile_items(), strict=True)
                ],
            }
        if [layout.tiles for layout in layouts] != [len(f) for f in arguments["image_features"]]:
            raise VtpruneError("the model packed other tiles than it was expected to.")
        return packing(**arguments)

    def unpruned(self) -> list[list[int]]:
        """What each block that ran would have run on, had nothing left: `lengths` at full size."""
        return [[self.sequence] * len(self.counts)] * len(self.lengths) if self.counts else self.lengths

    def _layouts(self, packing: Callable, arguments: dict, patches: int | None) -> list[Layout]:
        """The layouts of `pack`; those of sizes that were packed before are remembered."""
        sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
        found = []
        for at, feature in enumerate(arguments["image_features"]):
            tokens = feature.shape[1] if patches is None else patches
            rest = tuple(value for value in arguments.values() if isinstance(value, (str, int)))
            newline = arguments.get("image_newline") is not None
            key = (*sizes[at], len(feature), tokens, newline, feature.device, rest)
            if key not in self.known:
                if len(self.known) >= _LAYOUTS:
                    self.known.clear()
                one = {"image_features": [feature.new_zeros(len(feature), tokens, 1)]}
                one["image_sizes"] = arguments["image_sizes"][at : at + 1]
                self.known[key] = layouts_by_packing(packing, {**arguments, **one})[0]
            found.append(self.known[key])
        return found

    def count(self, tokens: list[int]) -> None:
        """Note what a block of a sealed encoder runs on: the lengths of its sequences."""
        self.lengths.append(tokens)

    def before_block(self, block: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note what the block runs on; hand it a mask where rows are padded."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if block == 0:
            batch, patches, past = len(hidden), hidden.shape[1] - self.special, nothing_past
            index, size = torch.arange(patches, device=hidden.device), patches
            if self.start is not None:
                start = self.start
                index, size, past = start.index, start.size, lambda: (start.merged, [])
            self.index, self.counts = index.expand(batch, -1), [len(index)] * batch
            self.pasts, self.ordered, self.carry = [past] * batch, [False] * batch, {}
            self.cuts = [] if self.start is None else [(-1, self.index, self.counts, set(range(batch)))]
            self._items, self.sequence = None, self.special + size
            self._number_images()
            self._look([size * of for which, of in self.parts or [(0, 1)] * batch if which == 0])
        self.lengths.append([self.special + n for n in self.counts])
        if self._mask is None:
            return None
        if len(args) > 1:
            return (args[0], self._mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": self._mask}

    def _look(self, sizes: list[int]) -> None:
        """Find out whether the budget asks for anything of images of these sizes, before rows are computed for nothing."""
        self.idle = self.pruner is None or not self.pruner.asks_to_prune(tuple(sizes))

    def _number_images(self) -> None:
        """Which image of its prompt each item is of, where budgets name each.

        Raises:
            BudgetError: if the images cannot be so many to a prompt.
        """
        budgets = None if self.pruner is None else self.pruner.budgets()
        self.images = [()] * len(self.counts)
        if budgets is None:
            return
        at = torch.tensor([which == 0 for which, _ in self.parts or [(0, 1)] * len(self.counts)]).cumsum(0)
        if int(at[-1]) % budgets:
            raise BudgetError(
                f"{self.pruner.describe()} has budgets for {budgets} images a prompt, and {int(at[-1])} images came. Give as "
                f"many budgets as every prompt has images, or one number for all of them."
            )
        self.images = [((n - 1) % budgets,) for n in at.tolist()]

    def requests(self, block: int) -> Iterator[tuple[Request, Callable[[Rows], None]]]:
        """The attention rows wanted of a block."""
        need = self.needs.get(block)
        if need is None or need.queries is None or self.idle:
            return
        with self.clock.span("selection"):
            first = slice(0, 1) if need.queries == "cls" else None
            patches = slice(self.special, self.special + max(self.counts))
            yield Request(need, first, None, patches, self._real, None), self._take

    def _take(self, rows: Rows) -> None:
        self._rows = rows

    def after_block(self, block: int, output):
        """Run the strategy on the block's output; returns the shortened output, or None to leave it."""
        if block not in self.needs or self.idle:
            return None
        with self.clock.span("selection"):
            hidden = output[0] if isinstance(output, tuple) else output
            rows, self._rows = self._rows, None
            found = self._choose(block, hidden, rows)
            if not found:
                return None
            hidden = self._cut(block, hidden, found)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _choose(self, block: int, hidden: Tensor, rows: Rows | None) -> list[tuple[list[int], Picks]]:
        """What the strategy chose for groups of images; those of which nothing changes are left out."""
        found = []
        remaining = sum(block < other < self.depth for other in self.needs)
        parts = self.parts or [(0, 1)] * len(self.counts)
        for group in self._groups(parts):
            counts = [self.counts[i] for i in group]
            view = EncodeView(
                notes=self.notes,
                part=parts[group[0]],
                images=self.images[group[0]],
                owners=[self.images[i] for i in group],
                layer=block,
                depth=self.depth,
                remaining=remaining,
                counts=counts if min(counts) < max(counts) else None,
                valid=self._real[:, self.special :] if min(counts) < max(counts) else None,
                parts=[parts[i] for i in group],
                **self._shown(group, max(counts), hidden, rows),
            )
            keep = self.pruner.encode(view)
            self._carry_on(group, view.carry)
            if keep is None:
                continue
            if block >= self.depth:
                raise VtpruneError(
                    f"{self.pruner.name}.encode returned a choice after block {block}, but the projector is fed by the block "
                    f"before it: nothing can be dropped any more, only looked at."
                )
            picks = picked(keep, counts, f"{self.pruner.name}.encode", self.doubts)
            if picks.counts != counts or picks.hidden is not None or picks.ordered:
                found.append((group, picks))
        return found

    def _groups(self, parts: list[tuple[int, int]]) -> list[list[int]]:
        """Images that the strategy is shown together: all, if it takes them so, else those of equal count and share."""
        if self.pruner.ragged:
            return [list(range(len(self.counts)))]

        def share(part: tuple[int, int], images: tuple[int, ...]) -> tuple:
            # of a whole number of tokens the first tiles get the remainder
            keep = budget_of(self.pruner.keep, *images) if images else self.pruner.keep
            return part[1], images, isinstance(keep, int) and part[0] < keep % part[1]

        return groups([(n, share(*which)) for n, *which in zip(self.counts, parts, self.images, strict=True)])

    def _shown(self, group: list[int], n: int, hidden: Tensor, rows: Rows | None) -> dict[str, Any]:
        """What a view shows of the images in `group`, which have `n` patches each, or at the most."""
        whole = len(group) == len(self.counts)
        mine, index = (hidden, self.index) if whole else (hidden[group], self.index[group])
        return {
            "index": index[:, :n],
            "sizes": (self.sequence - self.special,),
            "carry": {
                name: (tensor if whole else tensor[group])[:, :n]
                for name, (tensor, owners) in self.carry.items()
                if owners.issuperset(group)
            },
            "hidden": mine[:, self.special : self.special + n],
            "special": mine[:, : self.special],
            "rows": slice_rows(rows, group, n),
            "grid": self.grid(self.sequence - self.special) if self.start is None else self.start.grid,
        }

    def _carry_on(self, group: list[int], carry: dict[str, Tensor]) -> None:
        """Keep what a strategy carries with the patches of `group`."""
        self._items = None
        batch, longest = len(self.counts), max(self.counts)
        for name, mine in carry.items():
            if len(group) == batch and mine.shape[1] == longest:
                self.carry[name] = mine, set(group)
                continue
            before, owners = self.carry.get(name, (None, set()))
            if before is None:
                before = mine.new_zeros(batch, longest, *mine.shape[2:])
            at = torch.tensor(group, device=mine.device)
            padded = before[at].to(mine.dtype)
            padded[:, : mine.shape[1]] = mine
            self.carry[name] = before.index_copy(0, at, padded), owners | set(group)

    def _cut(self, block: int, hidden: Tensor, found: list[tuple[list[int], Picks]]) -> Tensor:
        """Leave the patches that were chosen; returns their hidden states."""
        before = self.counts
        if len(found) == 1 and len(found[0][0]) == len(before):
            picks, counts = found[0][1].kept, found[0][1].counts
        else:
            counts = list(before)
            for group, mine in found:
                for i, count in zip(group, mine.counts, strict=True):
                    counts[i] = count
            picks = torch.arange(max(counts), device=hidden.device).repeat(len(counts), 1)
            # behind an image's last patch any number does
            picks = picks.clamp(max=max(before) - 1)
            for group, mine in found:
                width = mine.kept.shape[1]
                picks[torch.tensor(group, device=picks.device)[:, None], torch.arange(width, device=picks.device)] = mine.kept
        self._remember(found)
        self.index, self.counts, self._items = self.index.gather(1, picks), counts, None
        self.carry = {name: (_along(tensor, picks), owners) for name, (tensor, owners) in self.carry.items()}
        self.cuts.append((block, self.index, counts, {i for group, _ in found for i in group}))
        return self._shortened(hidden, picks, found)

    def _remember(self, found: list[tuple[list[int], Picks]]) -> None:
        """Note what merges into what, for the report, and which images are rearranged."""
        for group, mine in found:
            for at, (i, count) in enumerate(zip(group, mine.counts, strict=True)):
                self.ordered[i] = self.ordered[i] or mine.ordered
                into, foreign = (None if t is None else t[at] for t in (mine.into, mine.foreign))
                if into is not None or foreign is not None or self.pasts[i] is not nothing_past:
                    index, kept = self.index[i, : self.counts[i]], mine.kept[at, :count]
                    self.pasts[i] = later(self.pasts[i], index, kept, into, foreign)

    def _shortened(self, hidden: Tensor, picks: Tensor, found: list[tuple[list[int], Picks]]) -> Tensor:
        """`hidden` without what left, merged vectors in their places; notes the mask for rows that are padded from now on."""
        counts, special = self.counts, self.special
        longest, device = max(counts), hidden.device
        places = torch.arange(special, device=device).expand(len(counts), -1)
        index = torch.cat([places, picks + special], 1)
        self._mask = self._real = None
        if min(counts) < longest:
            lengths = torch.tensor([[special + n] for n in counts], device=device)
            self._real = torch.arange(special + longest, device=device) < lengths
            self._mask = padding_mask(self.kernel(), self._real, hidden.dtype)
        shorter = _along(hidden, index)
        for group, mine in found:
            for at, i in enumerate(group if mine.hidden is not None else ()):
                shorter[i, special : special + counts[i]] = mine.hidden[at].to(shorter.dtype)
        return shorter


def _row(index: Tensor, at: int, count: int) -> Tensor:
    return index[at, :count]


def _along(t: Tensor, index: Tensor) -> Tensor:
    """t[b, index[b]] for t [B, N, ...] and index [B, K]."""
    return t.gather(1, index.view(*index.shape, *[1] * (t.ndim - 2)).expand(*index.shape, *t.shape[2:]))


class ImageTokens:
    """What went on from the encoder for one image; travels with its projected features.

    Parameters:
        item: survivors and what is carried with them.
        layout: how the image's placeholders stand for patches.
        encoding: the run it came from, or None for features that a user computed elsewhere.
        owner: the session that ran it.
        frames: of a video, what it was before the model pooled it, where a strategy reads that; picture: the same of a
            picture, for prompts in which several stand for a video.
        parts: names of what it was put together from; the same of the same features.
    """

    def __init__(self, item: Item, layout: Layout, encoding: Encoding | None, owner: object = None):
        self.item, self.layout, self.encoding, self.owner = item, layout, encoding, owner
        self.frames: Frames | None = None
        self.picture: Frames | None = None
        self.parts: tuple = (id(self),)
        self.replays: list[tuple[Tensor, object]] = []

    def __deepcopy__(self, memo: dict) -> ImageTokens:
        # copies of features (assisted decoding makes some) are of the same run, which is nothing to copy
        return self

    @property
    def size(self) -> int:
        """Visual tokens before pruning."""
        return self.layout.size

    @classmethod
    def of(cls, features: Tensor) -> ImageTokens:
        """The record attached to an image's features, or a fresh one for features that never met this engine."""
        found = getattr(features, "_vtprune", None)
        if found is not None:
            return found
        index = torch.arange(len(features), device=features.device)
        return cls(Item(index, (len(features),)), Layout(len(features)), None)


def attach_layout(features: Tensor, layout: Layout, owner: object) -> None:
    """A record of features that were computed elsewhere, whose layout is known all the same."""
    index = torch.arange(layout.size, device=features.device)
    features._vtprune = ImageTokens(Item(index, (layout.size,)), layout, None, owner)


def attach_records(features: list[Tensor], encoding: Encoding, owner: object) -> list[Tensor]:
    """Projected features at full length (dropped rows zero, to match the placeholders), each with its record."""
    result = []
    cut = encoding.pruner is not None or encoding.start is not None
    tiles = encoding.tile_items() if cut and encoding.layouts is not None and encoding.tokens is None else None
    for at, feature in enumerate(features):
        layout, full = Layout(len(feature)), feature
        if encoding.layouts is not None:
            layout = encoding.layouts[at]
        if encoding.tokens is not None:
            item = encoding.tokens[at]
        elif not cut:
            item = Item(torch.arange(layout.size, device=feature.device), (layout.size,))
        elif tiles is not None:
            item = join_tiles(tiles[at], layout)
        else:
            item = encoding.items[at]
            if len(feature) != max(encoding.counts):
                raise UnsupportedError(
                    f"{len(feature)} visual tokens came out of the projector for {max(encoding.counts)} patches, so they do "
                    f"not stand for one another (vision_feature_select_strategy='full' keeps the class token, for one). Use "
                    f"the 'default' select strategy, or a strategy of another stage."
                )
            full, layout = _full_length(feature, item), Layout(item.sizes[0])
        # the tensor object itself is what reaches the decoder, once per beam, and is what a second question finds again
        full._vtprune = ImageTokens(item, layout, encoding, owner)
        result.append(full)
    return result


def join_tiles(items: list[Item], layout: Layout) -> Item:
    """One image's tiles as one item, numbered as its visual tokens are; patches that the packing leaves out are lost.

    Tokens follow the image's own order, or that of the tiles where a strategy rearranged them.
    """
    if layout.patch is None:
        raise UnsupportedError(
            "this picture has more tiles than the model takes at full resolution, so its tokens are blends of patches and a "
            "strategy inside the encoder cannot say which of them stay. Use a smaller picture, or a strategy of another stage."
        )
    device = layout.patch.device
    number = torch.full((layout.tiles * layout.patches,), -1, dtype=torch.long, device=device)
    number[layout.patch] = torch.arange(layout.size, device=device)
    numbers = [number[item.index + at * layout.patches] for at, item in enumerate(items)]
    index = torch.cat(numbers)
    stays = (index >= 0).nonzero()[:, 0]
    ordered = any(item.ordered for item in items)
    if not ordered:
        stays = stays[index[stays].argsort()]
    joined = Item(index[stays], (layout.size,), ordered=ordered)
    for name in set.intersection(*(set(item.carry) for item in items)):
        joined.carry[name] = torch.cat([item.carry[name] for item in items])[stays]
    if any(item.past is not nothing_past for item in items):
        pasts = [item.past for item in items]
        joined.past = cache(lambda: _joined_past(pasts, number.tolist(), layout.patches))
    for block in sorted({block for item in items for block, _ in item.cuts}):
        joined.cuts.append((block, cache(functools.partial(_joined_cut, items, number, layout.patches, block))))
    return joined


def _joined_cut(items: list[Item], number: Tensor, patches: int, block: int) -> Tensor:
    """What was left of an image's tiles after `block`, by the numbers that their patches have in the image."""
    left = []
    for at, item in enumerate(items):
        done = [found for b, found in item.cuts if b <= block]
        index = done[-1]() if done else torch.arange(patches, device=number.device)
        left.append(number[index + at * patches])
    found = torch.cat(left)
    return found[found >= 0]


def _joined_past(pasts: list[Callable[[], Past]], number: list[int], patches: int) -> Past:
    """What was merged within tiles, by the numbers that their patches have in the image (-1: none)."""
    merged: dict[int, list[int]] = {}
    foreign: list[int] = []
    for at, past in enumerate(pasts):
        local = number[at * patches : (at + 1) * patches]
        within, strange = past()
        foreign += [local[n] for n in strange if local[n] >= 0]
        for kept, gone in within.items():
            if local[kept] >= 0:
                merged[local[kept]] = [local[n] for n in gone if local[n] >= 0]
    return merged, foreign


def _full_length(feature: Tensor, item: Item) -> Tensor:
    """`feature` (padded rows after the kept ones) with each kept row at its own number, zero elsewhere."""
    if len(item.index) == item.sizes[0] and not item.ordered:
        return feature
    index = item.index.to(feature.device)
    return feature.new_zeros(item.sizes[0], feature.shape[-1]).index_copy(0, index, feature[: len(index)])


def new_clock(module: nn.Module) -> Clock:
    return Clock(next(module.parameters()).device)
