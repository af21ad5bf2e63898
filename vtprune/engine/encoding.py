"""The vision encoder's side: strategies that let patches leave between its blocks, or read its attention rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from vtprune.engine.attention import Request, padding_mask
from vtprune.engine.items import Choice, Doubts, Item, Past, checked, nothing_past, slice_rows, stack_carry, unstack_carry
from vtprune.engine.stream import groups
from vtprune.families.base import Layout, layouts_by_packing
from vtprune.measure.clock import Clock
from vtprune.pruner import EncodeView, Frames, Needs, Pruner, Rows, UnsupportedError, VtpruneError


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
        self.items: list[Item] = []
        self.sequence = 0
        self.lengths: list[list[int]] = []
        self._rows: Rows | None = None
        self._mask: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        return [len(item.index) for item in self.items]

    def tile_items(self) -> list[list[Item]]:
        """The items of each image's tiles."""
        left = iter(self.items)
        return [[next(left) for _ in range(layout.tiles)] for layout in self.layouts]

    def pack(self, packing: Callable, arguments: dict):
        """Run the model's packing of tiles on features at full length, and note the layouts that it makes."""
        patches = None if self.pruner is None else self.items[0].sizes[0]
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

    def count(self, tokens: int) -> None:
        """Note what a block of a sealed encoder runs on: all pictures' patches in one sequence."""
        self.sequence = tokens
        self.lengths.append([tokens])

    def before_block(self, block: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note what the block runs on; hand it a mask where rows are padded."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if block == 0:
            patches = hidden.shape[1] - self.special
            if self.start is None:
                index = torch.arange(patches, device=hidden.device)
                self.items = [Item(index, (patches,)) for _ in range(hidden.shape[0])]
            else:
                start = self.start
                first = Item(start.index, (start.size,), past=lambda: (start.merged, []), cuts=[(-1, start.index)])
                self.items = [first.copy() for _ in range(hidden.shape[0])]
            self.sequence = self.special + self.items[0].sizes[0]
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
            chosen = self._choose(block, hidden, rows)
            if chosen is None:
                return None
            hidden = self._gather(hidden, chosen)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _choose(self, block: int, hidden: Tensor, rows: Rows | None) -> list[Choice] | None:
        """The strategy's choice for every image, or None if nothing changes."""
        counts, special = self.counts, self.special
        chosen: list[Choice | None] = [None] * len(counts)
        parts = self.parts or [(0, 1)] * len(counts)
        for group in groups(list(zip(counts, parts, strict=True))):
            n, items = counts[group[0]], [self.items[i] for i in group]
            mine = hidden if len(group) == len(counts) else hidden[group]
            view = EncodeView(
                index=torch.stack([item.index for item in items]),
                sizes=items[0].sizes,
                carry=stack_carry(items),
                notes=self.notes,
                part=parts[group[0]],
                layer=block,
                depth=self.depth,
                hidden=mine[:, special : special + n],
                special=mine[:, :special],
                rows=slice_rows(rows, group, n),
                grid=self.grid(items[0].sizes[0]) if self.start is None else self.start.grid,
            )
            keep = self.pruner.encode(view)
            unstack_carry(items, view.carry)
            if keep is None:
                continue
            if block >= self.depth:
                raise VtpruneError(
                    f"{self.pruner.name}.encode returned a choice after block {block}, but the projector is fed by the block "
                    f"before it: nothing can be dropped any more, only looked at."
                )
            choices = checked(keep, len(group), n, f"{self.pruner.name}.encode", doubts=self.doubts)
            for i, choice in zip(group, choices, strict=True):
                if choice.changes(n):
                    self.items[i].cut(choice)
                    self.items[i].cuts.append((block, self.items[i].index))
                    chosen[i] = choice
        if all(choice is None for choice in chosen):
            return None
        return [
            Choice(torch.arange(n, device=hidden.device)) if choice is None else choice
            for choice, n in zip(chosen, counts, strict=True)
        ]

    def _gather(self, hidden: Tensor, chosen: list[Choice]) -> Tensor:
        kept = [choice.kept for choice in chosen]
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
        for i, choice in enumerate(chosen):
            if choice.hidden is not None:
                shorter[i, special : special + counts[i]] = choice.hidden.to(shorter.dtype)
        return shorter


class ImageTokens:
    """What went on from the encoder for one image; travels with its projected features.

    Parameters:
        item: survivors and what is carried with them.
        layout: how the image's placeholders stand for patches.
        encoding: the run it came from, or None for features that a user computed elsewhere.
        owner: the session that ran it.
        frames: of a video, what it was before the model pooled it, where a strategy reads that; picture: the same of a
            picture, for prompts in which several stand for a video.
    """

    def __init__(self, item: Item, layout: Layout, encoding: Encoding | None, owner: object = None):
        self.item, self.layout, self.encoding, self.owner = item, layout, encoding, owner
        self.frames: Frames | None = None
        self.picture: Frames | None = None
        self.replays: list[tuple[Tensor, object]] = []

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


def attach_records(features: list[Tensor], encoding: Encoding, owner: object) -> list[Tensor]:
    """Projected features at full length (dropped rows zero, to match the placeholders), each with its record."""
    result = []
    cut = encoding.pruner is not None or encoding.start is not None
    tiles = encoding.tile_items() if cut and encoding.layouts is not None else None
    for at, feature in enumerate(features):
        layout, full = Layout(len(feature)), feature
        if encoding.layouts is not None:
            layout = encoding.layouts[at]
        if not cut:
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
        left = []
        for at, item in enumerate(items):
            done = [index for b, index in item.cuts if b <= block]
            patches = done[-1] if done else torch.arange(layout.patches, device=device)
            left.append(number[patches + at * layout.patches])
        joined.cuts.append((block, torch.cat([n[n >= 0] for n in left])))
    return joined


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
