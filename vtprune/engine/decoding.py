"""The decoder's side: one forward pass of the language model whose visual tokens leave before, inside or after it.

A `Pass` lives for one call of the language model. It shortens the input (`select`), cuts between layers (`prefill`),
hands every layer its own mask, positions and cache layer, restores the output to the fed length, evicts from the cache
(`decode`). `accounting.py` makes its report. What outlives it sits in the cache (`PrunedLayer`) or beside the image
features.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from vtprune.engine.attention import Request, kernel_mask, rows_ahead
from vtprune.engine.cache import OLD_NAME, PrunedLayer, cache_name, check_cache, held_keys, is_pruned, pruned_layer
from vtprune.engine.encoding import ImageTokens
from vtprune.engine.items import Choice, Doubts, Item, Past, checked, nothing_past, slice_rows, stack_carry, unstack_carry
from vtprune.engine.masks import Held, Kinds, Masks
from vtprune.engine.stream import Stream, compress, groups, join_valid, last, take
from vtprune.families.base import Site
from vtprune.measure.clock import Clock
from vtprune.measure.flops import layer_costs, linear_flops_per_token
from vtprune.pruner import (
    BudgetError,
    DecodeView,
    Frames,
    Inputs,
    Needs,
    PrefillView,
    Pruner,
    Rows,
    SelectView,
    UnsupportedError,
)

_REPEATED = (
    "For beams and returned sequences transformers handed on each image of a prompt several times in place of all its images: "
    "some versions do so, and some families' own code. Use prompts with one image each, or try a newer version."
)


@dataclass
class Plan:
    """What a session prepared once for all calls.

    Parameters:
        pruner, positions: as wrapped; site: the model's places.
        prefill: {layer: Needs} of the `prefill` stage; decode: of the `decode` stage.
    """

    pruner: Pruner
    positions: str
    site: Site
    prefill: Mapping[int, Needs]
    decode: Mapping[int, Needs]

    @property
    def compact(self) -> bool:
        return self.positions == "compact"

    @property
    def depth(self) -> int:
        return len(self.site.decoder_layers)

    @cached_property
    def costs(self) -> tuple[list[tuple[int, int]], int, list[tuple[int, int]]]:
        """FLOPs of the encoder blocks, the projector (per token) and the decoder layers; the modules are walked once."""
        site = self.site
        decoder = [
            (linear, width if attends else 0)
            for (linear, width), attends in zip(layer_costs(site.decoder_layers), site.attends, strict=True)
        ]
        return layer_costs(site.encoder_layers), linear_flops_per_token(site.projector), decoder

    @property
    def kernel(self) -> str:
        return self.site.decoder.config._attn_implementation

    @cached_property
    def kinds(self) -> Kinds:
        return Kinds.of(self.site.decoder.config, self.depth, self.site.family.prepares_masks)


@dataclass
class Decision:
    """What one sample's prefill decided, for runs that feed the whole sequence again (no cache).

    Parameters:
        images: per image, what entered the decoder, and the vectors it was given there, if any.
        layers: per layer, the numbers of those that went on, in order, and the vectors they were given, if any.
        past: as in `Item`, at the end.
    """

    images: list[tuple[Item, Tensor | None]]
    layers: dict[int, tuple[Tensor, Tensor | None]]
    past: Callable[[], Past]


class Pass:
    """One call of the language model.

    Parameters:
        plan: see there.
        clock: where time is counted.
        input_ids: LongTensor [B, L] as the user fed them, or None if embeddings were fed.
        placeholders: bool [B, L], where image features were put; None if there are no images.
        features: projected features per image, in the order of their placeholders.
        aside: within it, calls of the wrapped model are left alone; a strategy may ask the model itself.
        fed_mask: the attention mask that the base model was called with; ... where it was not called.
    """

    def __init__(
        self,
        plan: Plan,
        clock: Clock,
        input_ids: Tensor | None = None,
        placeholders: Tensor | None = None,
        features: list[Tensor] | None = None,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
        fed_mask: Any = ...,
    ):
        self.plan, self.clock, self.input_ids, self.placeholders = plan, clock, input_ids, placeholders
        self.aside, self.fed_mask = aside, fed_mask
        self.features = features or []
        self.stream: Stream | None = None
        self.past, self.continues = 0, False  # tokens in the cache, and whether an earlier pass pruned some of them
        self.streams: list[Stream] = []
        self.rows: dict[tuple[str, int], Rows] = {}
        self.items: list[Item] = []
        self.cache: Cache | None = None
        self.masks: Masks | None = None
        self.held: list[Held] = []  # what each layer's cache held before this pass
        self.whole: dict[tuple[int, bool], Held] = {}
        self.cut_off: dict[int, int] = {}  # leading keys that sliding layers have released since
        self.past_valid: Tensor | None = None
        self.fed_valid: Tensor | None = None
        self.logical: Tensor | None = None
        self.replays: list[Decision | None] | None = None
        self.bare: tuple[Tensor, list[int]] | None = None  # bool [B, L], separators that left; how many per row
        self.evicted: dict[int, Tensor] = {}
        self.notes: list[str] = []
        self.doubts = Doubts()
        self.cutting: set[int] = set()
        # embeddings at the fed length, and what `select` and `prefill` put in their place: for `Needs.inputs`, replays
        self.embeds: Tensor | None = None
        self.entering: Stream | None = None
        self.selected: dict[int, Tensor] = {}
        self.went_on: dict[int, dict[int, tuple[Tensor, Tensor | None]]] = {}
        # of the images fed in this pass: which belong to each row, what the encoder left of them, what entered
        self.images: list[list[int]] = []
        self.places: list[int] = []  # placeholders per row
        self.records: list[ImageTokens] = []
        self.image_items: list[Item] = []

    @property
    def active(self) -> bool:
        """Whether layers need anything from this pass."""
        return self.stream is not None

    # ------------------------------------------------------------------ before the decoder

    def begin(self, kwargs: dict) -> dict | None:
        """Prepare the pass from the language model's arguments; returns them shortened, or None to leave them."""
        name = cache_name(self.plan.site.decoder)
        if name != OLD_NAME and kwargs.get(OLD_NAME) is not None:
            kwargs[name] = kwargs.pop(OLD_NAME)  # newer models still take it by its old name
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get(name)
        self.cache = cache
        pruned_before = self.continues = is_pruned(cache)
        if not self.features and not pruned_before:
            return None
        if embeds is None:
            embeds = self.plan.site.decoder.get_input_embeddings()(kwargs.pop("input_ids"))
            kwargs["inputs_embeds"] = embeds
        with self.clock.span("selection"):
            return self._begin(embeds, kwargs, pruned_before)

    def _begin(self, embeds: Tensor, kwargs: dict, pruned_before: bool) -> dict:
        batch, length, device = *embeds.shape[:2], embeds.device
        config = self.plan.site.decoder.config
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.plan.site.checkpoints():
            kwargs["use_cache"] = use_cache = False  # layers that run again in the backward pass write to no cache
        asks = self.features and self.plan.pruner.asks_to_prune(tuple(ImageTokens.of(f).size for f in self.features))
        if use_cache and self.cache is None:
            self.cache = kwargs[cache_name(self.plan.site.decoder)] = DynamicCache(config=config)
        if self.cache is not None and asks:
            check_cache(self.cache, self.plan.depth)
        past = self.past = 0 if self.cache is None else self.cache.get_seq_length()

        mask, own = kwargs.get("attention_mask"), None
        if _is_made(mask) and (self.fed_mask is None or (isinstance(self.fed_mask, Tensor) and self.fed_mask.ndim == 2)):
            mask, own = self.fed_mask, mask  # the model made masks of it before it came to its language model
        if _is_made(mask) and not asks and not pruned_before:
            mask = None  # transformers makes its own 4-D masks for caches that it compiles; nothing will be cut here
        valid, real, left = self._read_mask(mask, past, batch, length)
        self.fed_valid = valid
        self.masks = Masks(self.plan.kinds, past, length)
        self.masks.read(own, valid, self.plan.kernel, device)
        self.logical = kwargs.get("position_ids")
        if self.logical is not None and self.logical.ndim == 3 and self.logical.shape[0] == 4:
            self.logical = self.logical[1:]  # the first axis only tells packed sequences apart
        if self.logical is None:
            self.logical = torch.arange(past, past + length, device=device)[None]
        index = torch.arange(length, device=device).expand(batch, -1)
        visual = torch.full((batch, length), -1, device=device)
        self.stream = Stream(length, index, valid, visual, left=left, real=real, seen=[0] * batch)
        if self.features:
            kwargs = self._enter(embeds, kwargs, past, use_cache)
        # from here on each layer gets its own mask; the model must not build one for lengths that layers do not have
        if self.stream.pruned or pruned_before:
            none = dict.fromkeys(own) if isinstance(own, Mapping) else None
            kwargs = {**kwargs, "attention_mask": none}
        return kwargs

    def _read_mask(self, mask: Any, past: int, batch: int, length: int) -> tuple[Tensor | None, list[int], bool]:
        """Split a padding mask into what is cached and what is fed.

        Returns:
            bool [B, length] of what is fed, None where nothing is padded; real tokens per row; whether padding is on the left.
        """
        whole = None, [length] * batch, True
        if mask is None:
            return whole
        if _is_made(mask):
            found = f"a {mask.ndim}-D attention mask" if isinstance(mask, Tensor) else "attention masks by layer type"
            raise UnsupportedError(
                f"{found} together with pruning: token numbers in it would no longer hold. Pass the "
                f"2-D padding mask [batch, tokens], or none."
            )
        mask = mask.bool()
        fed = mask[:, -length:]
        # decides shapes; one read
        *real, left, every = torch.cat([fed.sum(1), mask[:, -1:].all()[None], mask.all()[None]]).tolist()
        if every:
            return whole
        self.past_valid = mask[:, :past] if past else None
        return fed, real, bool(left)  # rows that end with padding are padded on the right

    def _enter(self, embeds: Tensor, kwargs: dict, past: int, use_cache: bool) -> dict:
        """Number the visual tokens, run `select`, and shorten the embeddings by all that has left so far."""
        records = [ImageTokens.of(f) for f in self.features]
        self.places = self.placeholders.sum(1).tolist()  # decides shapes
        fed = [r.layout.placeholders for r in records]
        if sum(self.places) != sum(fed):
            raise UnsupportedError(
                f"the prompt has {sum(self.places)} image placeholder tokens, the images make {sum(fed)} tokens. Let the "
                f"processor build prompt and images together, one placeholder per image."
            )
        first = list(accumulate(fed, initial=0))
        ends = list(accumulate(self.places))
        self.images = [[] for _ in range(embeds.shape[0])]
        for image, (start, count) in enumerate(zip(first, fed, strict=False)):
            row = min(bisect_right(ends, start), len(ends) - 1)
            if start + count > ends[row]:
                copied = f" {_REPEATED}" if len({id(r) for r in records}) < len(records) else ""
                raise UnsupportedError(f"an image's placeholder tokens are spread over two samples of the batch.{copied}")
            self.images[row].append(image)
        self._check_copies(records)
        budgets = self.plan.pruner.budgets()
        odd = [len(images) for images in self.images if images and len(images) != budgets]
        if budgets is not None and odd:
            raise BudgetError(
                f"{self.plan.pruner.describe()} has budgets for {budgets} images, and a prompt with {odd[0]} came. Give as "
                f"many budgets as every prompt has images (and videos), or one number for all of them."
            )
        # places in the flattened batch, in order; a nonzero() would wait for the device to count them
        slots = torch.sort(self.placeholders.flatten(), descending=True, stable=True).indices[: sum(fed)]
        # separators among the placeholders are no visual tokens: they are neither offered nor dropped
        is_visual = self.placeholders
        if any(r.layout.visual is not None for r in records):
            slots = slots[torch.cat([r.layout.slots(slots.device) + at for r, at in zip(records, first, strict=False)])]
            is_visual = torch.zeros_like(is_visual).view(-1).index_fill_(0, slots, True).view_as(is_visual)
        starts = list(accumulate((r.size for r in records), initial=0))
        total = starts[-1]
        self.stream.visual.copy_(torch.where(is_visual, is_visual.long().cumsum(1) - 1, -1))
        self.stream.seen = [sum(records[i].size for i in images) for images in self.images]

        if past == 0 and not use_cache:
            self.replays = self._find_replays(records)
        # a fresh copy per call: features may be fed again with another question
        items = [r.item.copy() for r in records]
        if self.replays is not None:
            for row, decision in enumerate(self.replays):
                for image, (item, vectors) in zip(self.images[row], decision.images if decision else [], strict=True):
                    items[image] = item.copy()
                    if vectors is not None:
                        self.selected[image] = vectors
        elif self.plan.pruner.part("select") is not None:
            self._select(items, records, slots, starts, embeds)
        if self.selected or any(item.ordered for item in items):
            embeds = self._arrange(items, slots, starts, embeds.clone(memory_format=torch.contiguous_format))
            kwargs = {**kwargs, "inputs_embeds": embeds}
        self.embeds = embeds

        if sum(len(item.index) for item in items) < total:
            alive = torch.zeros(total, dtype=torch.bool, device=embeds.device)
            alive.index_fill_(0, torch.cat([item.index + start for item, start in zip(items, starts, strict=False)]), True)
            lost = is_visual.masked_scatter(is_visual, ~alive)
            dropped = [sum(records[i].size - len(items[i].index) for i in images) for images in self.images]
            if not self.plan.pruner.separators:
                self.bare = self._bare(items, records, ~is_visual)
                lost = lost | self.bare[0]
            self.stream, gather = self.stream.drop(lost, dropped, None if self.bare is None else self.bare[1])
            kwargs = {
                **kwargs,
                "inputs_embeds": take(embeds, gather),
                "position_ids": self.stream.positions(self.logical, self.plan.compact, None),
            }
        self.entering = self.stream
        self.records = records
        self.image_items = items
        self.items = [self._join([items[i] for i in images]) for images in self.images]
        self.cutting = self._cutting_layers()
        for item, decision in zip(self.items, self.replays or [], strict=False):
            if decision is not None:
                item.past = decision.past
        return kwargs

    def _check_copies(self, records: list[ImageTokens]) -> None:
        """Refuse prompts that are copies of each other and were not given the same images.

        Raises:
            UnsupportedError: as beams would be said of images that are not the prompt's.
        """
        given = [[part for i in images for part in records[i].parts] for images in self.images]
        odd = [row for row, images in enumerate(given) if len(set(images)) < len(images)]
        if self.input_ids is None or not odd:
            return
        for row in odd:
            for other, images in enumerate(given):
                if images != given[row] and torch.equal(self._prompt(row), self._prompt(other)):
                    raise UnsupportedError(f"copies of a prompt came with different images. {_REPEATED}")

    def _bare(self, items: list[Item], records: list[ImageTokens], others: Tensor) -> tuple[Tensor, list[int]]:
        """Of the tokens marked in `others` bool [B, L], separators of tiled images that have lost tokens; how many per row."""
        some = [len(i.index) < i.sizes[0] and r.layout.tiles > 1 for i, r in zip(items, records, strict=True)]
        fed = torch.tensor([r.layout.placeholders for r in records])
        marks = torch.tensor(some).repeat_interleave(fed).to(self.placeholders.device)
        between = [some[i] * (r.layout.placeholders - r.size) for i, r in enumerate(records)]
        counts = [sum(between[i] for i in images) for images in self.images]
        return self.placeholders.masked_scatter(self.placeholders, marks) & others, counts

    def _cutting_layers(self) -> set[int]:
        """Layers before which `prefill` is to be asked in this pass."""
        strategy, layers = self.plan.pruner.part("prefill"), set(self.plan.prefill)
        if not layers:
            return layers
        wanted: set[int] = set()
        for item in self.items:
            at = strategy.prefill_at(self.plan.depth, item.sizes, len(item.index)) if item.sizes else ()
            if at is None:
                return layers
            wanted |= layers.intersection(at)
        return wanted

    def _find_replays(self, records: list[ImageTokens]) -> list[Decision | None] | None:
        """Decisions of an earlier, shorter run of the same prompts over the same features, if all rows have one."""
        if self.input_ids is None:
            return None
        found: list[Decision | None] = []
        for row, images in enumerate(self.images):
            if not images:
                found.append(None)
                continue
            prompt = self._prompt(row)
            # a run without cache feeds one token more each time; anything else is a new question about the same features
            match = next((d for ids, d in records[images[0]].replays if torch.equal(ids, prompt[:-1])), None)
            if match is None:
                return None
            found.append(match)
        return found

    def _prompt(self, row: int) -> Tensor:
        return self.input_ids[row] if self.fed_valid is None else self.input_ids[row][self.fed_valid[row]]

    def _join(self, items: list[Item]) -> Item:
        """Images of one sample, numbered one after the other."""
        if not items:
            return Item(torch.zeros(0, dtype=torch.long), ())
        offsets = [0]
        for item in items:
            offsets.append(offsets[-1] + item.sizes[0])
        names = set.intersection(*(set(i.carry) for i in items))

        pasts = [(item.past, offset) for item, offset in zip(items, offsets, strict=False)]

        def past() -> Past:
            found = [(*before(), o) for before, o in pasts]
            merged = {k + o: [v + o for v in vs] for part, _, o in found for k, vs in part.items()}
            return merged, [n + o for _, part, o in found for n in part]

        return Item(
            torch.cat([item.index + o for item, o in zip(items, offsets, strict=False)]),
            tuple(item.sizes[0] for item in items),
            {name: torch.cat([i.carry[name] for i in items]) for name in names},
            nothing_past if all(item.past is nothing_past for item in items) else cache(past),
        )

    def _arrange(self, items: list[Item], slots: Tensor, begins: list[int], embeds: Tensor) -> Tensor:
        """Write the vectors that `select` made, and move the tokens of rearranged images to the slots of their order."""
        flat = embeds.view(-1, embeds.shape[-1])
        for image, vectors in self.selected.items():
            flat[slots[items[image].index + begins[image]]] = vectors.to(flat.dtype)
        if any(item.ordered for item in items):
            self.stream.moved = self.stream.columns().clone()
            visual, moved = self.stream.visual.view(-1), self.stream.moved.view(-1)
            for item, begin in zip(items, begins, strict=False):
                if item.ordered:
                    here, there = slots[item.index.sort().values + begin], slots[item.index + begin]
                    flat[here], visual[here], moved[here] = flat[there], visual[there], moved[there]
        return embeds

    def _select(self, items: list[Item], records: list[ImageTokens], slots: Tensor, starts: list[int], embeds: Tensor) -> None:
        strategy = self.plan.pruner.part("select")
        first = {image: at for images in self.images for at, image in enumerate(images)}
        text_of: dict[int, tuple[Tensor, Tensor]] = {}
        stream = self.stream  # as fed: text may be asked for when tokens have left
        text_mask = ~self.placeholders if stream.valid is None else stream.valid & ~self.placeholders

        def text(row: int) -> tuple[Tensor, Tensor]:
            if row not in text_of:
                count = stream.real[row] - self.places[row]
                here = torch.sort(text_mask[row], descending=True, stable=True).indices[:count]
                text_of[row] = embeds[row][here], here[:0] if self.input_ids is None else self.input_ids[row][here]
            return text_of[row]

        row_of = {image: row for row, images in enumerate(self.images) for image in images}
        flat = embeds.reshape(-1, embeds.shape[-1])
        grid = self.plan.site.grid
        units = self._units(strategy, records)
        asked = [items[unit[0]] if len(unit) == 1 else self._join([items[i] for i in unit]) for unit in units]
        shapes = [(len(unit), records[unit[0]].layout.frames, grid(records[unit[0]].layout)) for unit in units]
        # which images of their prompt they are; matters to budgets that name each
        named = self.plan.pruner.budgets() is not None
        which = [tuple(first[i] for i in unit) if named else () for unit in units]
        keys = [(len(item.index), item.sizes, *more) for item, *more in zip(asked, shapes, which, strict=True)]
        for group in groups(keys):
            members, images = [asked[u] for u in group], [units[u] for u in group]
            heads = [unit[0] for unit in images]
            # images of a sample follow each other, so a joined item's numbers go on from its first image
            places = torch.stack([item.index + starts[head] for item, head in zip(members, heads, strict=True)])
            view = SelectView(
                index=torch.stack([item.index for item in members]),
                sizes=members[0].sizes,
                carry=stack_carry(members),
                notes=self.notes,
                images=which[group[0]],
                features=flat[slots[places]],
                grid=grid(records[heads[0]].layout),
                frames=max(len(images[0]), records[heads[0]].layout.frames),
                ordinal=torch.tensor([first[i] for i in heads]),
                text=_Late([row_of[i] for i in heads], lambda row: text(row)[0]),
                ids=_Late([row_of[i] for i in heads], lambda row: text(row)[1]),
                videos=_videos([[records[i] for i in unit] for unit in images]),
            )
            with self.aside():
                keep = strategy.select(view)
            if len(images[0]) == 1:
                unstack_carry(members, view.carry)
            if keep is None:
                continue
            choices = checked(keep, len(group), view.tokens, f"{strategy.name}.select", doubts=self.doubts)
            for unit, choice in zip(images, choices, strict=True):
                for image, part in zip(unit, choice.split([len(items[i].index) for i in unit]), strict=True):
                    items[image].cut(part)
                    if part.hidden is not None:
                        self.selected[image] = part.hidden

    def _units(self, strategy: Pruner, records: list[ImageTokens]) -> list[list[int]]:
        """Images that `select` is asked about together: each by itself, but for strategies that compare a video's frames,
        which take several pictures of one size in a prompt as frames."""
        units: list[list[int]] = []
        for images in self.images:
            layouts = [records[i].layout for i in images]
            pictures = all(layout.frames == layout.tiles == 1 for layout in layouts)
            alike = len({(layout.size, self.plan.site.grid(layout)) for layout in layouts}) == 1
            together = strategy.modality == "video" and len(images) > 1 and pictures and alike
            units += [images] if together else [[image] for image in images]
        return units

    # ------------------------------------------------------------------ between layers

    def before_layer(self, layer: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut before `layer` if its turn has come; give it mask, positions and cache layer where they differ."""
        if not self.active:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        cuts = layer in self.cutting
        # masks and positions are made at the first layer of a stream; after that there is nothing to count
        with self.clock.span("selection") if cuts or not self.streams or self.streams[-1] is not self.stream else nullcontext():
            if cuts:
                hidden = self._cut(layer, hidden, kwargs)
            self.streams.append(self.stream)
            self.held.append(self._held(layer))
            attends = self.plan.site.attends[layer]
            # tokens that were only rearranged take their positions along
            astray = self.stream.moved is not None and not self.plan.compact
            if not (self.stream.pruned or astray or (is_pruned(self.cache, layer) if attends else self.continues)):
                return None
            kwargs = {**kwargs, **self._layer_arguments(layer, hidden, kwargs)}
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def _layer_arguments(self, layer: int, hidden: Tensor, kwargs: dict) -> dict:
        if not self.plan.site.attends[layer]:
            return {"attention_mask": self._state_mask()}
        stream, held = self.stream, self.held[layer]
        cached = None if self.cache is None else self._swapped(layer, self.past_valid, self.masks.past)
        window = None if cached is None or cached.record_past else cached.window

        def make() -> tuple[dict, tuple, Tensor | None]:
            kernel, queries, compact = self.plan.kernel, stream.index.shape[1], self.plan.compact
            keys_valid = self._keys_valid(stream, held)
            seen = self.masks.seen(layer, stream, held, keys_valid, compact)
            mask = kernel_mask(kernel, queries, held.past, keys_valid, stream.index, hidden.dtype, seen, self.plan.kinds.causal)
            positions, rotary = self._rotary(layer, hidden, held.shift)
            given = {"attention_mask": mask, "position_embeddings": rotary}
            if kwargs.get("position_ids") is not None:
                # flash kernels read gaps in position ids as packed sequences; the rotation is already in the embeddings
                given["position_ids"] = None if "flash" in kernel else positions
            further = held.shift
            if compact and stream.pruned:
                dropped = stream.gone.sum(1)
                further = dropped if further is None else further + dropped
            places = self.masks.new_places(layer, stream, held, compact)
            gone = self.masks.released(window, stream, held, keys_valid, places)
            known = [t if t is None or gone == 0 else t[:, gone:] for t in (keys_valid, *places)]
            return given, (known[0], stream.pruned, *known[1:], gone), further

        # layers in the same state share the very same tensors, so that they are found again by identity in later passes
        state = held.valid, held.shift, held.slots, held.behind
        key = (self.plan.kinds.names[layer], window, held.past, *map(id, state))
        given, expected, further = stream.memo(key, make, *state)
        if cached is not None:
            cached.expect(stream.length, *expected)
            cached.shift = further
        return given

    def _rotary(self, layer: int, hidden: Tensor, shift: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Positions of the stream's tokens, and the rotations that they make in `layer`."""
        stream, site = self.stream, self.plan.site
        positions = stream.memo(
            ("positions", id(shift)), lambda: stream.positions(self.logical, self.plan.compact, shift), shift
        )
        key = ("rope", id(shift), site.rotation_type(layer))
        return positions, stream.memo(key, lambda: site.rotations(hidden, positions, layer), shift)

    def _held(self, layer: int) -> Held:
        """What `layer` has in the cache before it runs."""
        cached = None if self.cache is None or layer >= len(self.cache.layers) else self.cache.layers[layer]
        if isinstance(cached, PrunedLayer):
            return Held(cached.physical, cached.valid, cached.shift, cached.slots, cached.behind)
        past, windowed = held_keys(cached), self.plan.kinds.windows[layer] is not None
        if isinstance(cached, DynamicSlidingWindowLayer):
            past = min(past, cached.sliding_window - 1)  # it hands on no more, also where it records the past
        if (past, windowed) not in self.whole:  # one object for all layers that hold as much: they share their masks
            valid = None if self.past_valid is None or past == 0 else last(self.past_valid, past)
            self.whole[past, windowed] = Held(past, valid, slots=self._slots(past, self.masks.past) if windowed else None)
        return self.whole[past, windowed]

    def _slots(self, count: int, end: int) -> Tensor:
        """LongTensor [B, count], the last slots of `end` that were fed."""
        index = self.stream.index
        return torch.arange(end - count, end, device=index.device).expand(index.shape[0], -1)

    def _swapped(self, layer: int, valid: Tensor | None, end: int) -> PrunedLayer:
        """`layer` of the cache as one that keeps its own books; of `end` tokens fed, `valid` marks the real ones it held."""
        if is_pruned(self.cache, layer):
            return self.cache.layers[layer]
        count, windowed = held_keys(self.cache.layers[layer]), self.plan.kinds.windows[layer] is not None
        valid, slots = self.stream.memo(
            ("swapped", count, windowed, end, id(valid)),
            lambda: (
                None if valid is None or bool(valid.all()) else last(valid, count),
                self._slots(count, end) if windowed and count else None,
            ),
            valid,
        )
        return pruned_layer(self.cache, layer, valid, slots)

    @staticmethod
    def _keys_valid(stream: Stream, held: Held) -> Tensor | None:
        """bool [B, P + n], which keys of a layer are real; None if all are."""
        return stream.memo(
            ("valid", held.past, id(held.valid)),
            lambda: join_valid(held.valid, held.past, stream.valid, stream.index),
            held.valid,
        )

    def _state_mask(self) -> Tensor | None:
        """bool [B, n], the real tokens, for a layer that folds them into a state; None where all are."""
        stream = self.stream
        if stream.valid is None or stream.index.shape[1] == 1:
            return None
        if self.past and stream.pruned:
            raise UnsupportedError(
                f"the rows of this batch keep different numbers of tokens in a later turn. {self.plan.site.family.name} has "
                f"layers of linear attention, whose state cannot skip the padding that would stand between the turns. Continue "
                f"the conversations one by one, or start a new cache."
            )
        return stream.valid

    def inject(self, original: Callable, hidden: Tensor, placeholders: Tensor, features: Tensor) -> Tensor:
        """The model's adding of `features` [placeholders, D] to its visual tokens, for those that are left, where they are.

        A token keeps its own features, moved or with others merged into it.

        Parameters:
            hidden: [B, n, D] between two layers; placeholders: bool [B, L] of the fed tokens.
        """
        stream = self.stream
        if not self.active or not (stream.pruned or stream.moved is not None):
            return original(hidden, placeholders, features)
        source = stream.index if stream.moved is None else stream.moved.gather(1, stream.index)
        placeholders = placeholders.to(source.device)
        row = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders).gather(1, source)
        here = placeholders.gather(1, source)
        here = here if stream.valid is None else here & stream.valid
        return original(hidden, here, features[row[here].to(features.device)])

    def _cut(self, layer: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Ask `prefill` what goes on from `layer`; returns the hidden states that do."""
        choices = self._replayed(layer) if self.replays is not None else self._ask_prefill(layer, hidden, kwargs)
        counts, slots, _ = self.stream.visual_slots()
        lost = torch.zeros(self.stream.index.shape, dtype=torch.bool, device=hidden.device)
        dropped, copied = [0] * len(counts), False
        for row, choice in choices.items():
            here = there = slots[row, choice.kept]
            if choice.ordered:
                here = there.sort().values
                self.stream = self.stream.rearranged(row, here, there)
            if choice.ordered or choice.hidden is not None:
                hidden, copied = (hidden if copied else hidden.clone()), True
                hidden[row, here] = hidden[row, there] if choice.hidden is None else choice.hidden.to(hidden.dtype)
            if len(here) < counts[row]:
                lost[row].index_fill_(0, slots[row, : counts[row]], True).index_fill_(0, here, False)
                dropped[row] = counts[row] - len(here)
        if not any(dropped):
            return hidden
        self.stream, gather = self.stream.drop(lost, dropped)
        return take(hidden, gather)

    def _ask_prefill(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[int, Choice]:
        """What the strategy chooses before `layer`, per row that changes."""
        strategy, need = self.plan.pruner.part("prefill"), self.plan.prefill[layer]
        counts, slots, numbers = self.stream.visual_slots()
        rows = self._ahead(layer, need, hidden, kwargs) if need.ahead else self.rows.pop(("prefill", layer - 1), None)
        computed = list(zip(*(stream.visual_slots()[0] for stream in self.streams), strict=True))
        choices: dict[int, Choice] = {}
        for group, common in self._views(counts, numbers, rows, alike=computed):
            members = [self.items[i] for i in group]
            here = slots[group][:, : counts[group[0]]]
            view = PrefillView(
                **common,
                layer=layer,
                depth=self.plan.depth,
                hidden=take(hidden[group], here) if need.hidden else None,
                inputs=self._inputs(group, need) if need.inputs else None,
                computed=computed[group[0]],
            )
            keep = strategy.prefill(view)
            unstack_carry(members, view.carry)
            if keep is None:
                continue
            found = checked(keep, len(group), view.tokens, f"{strategy.name}.prefill", least=0, doubts=self.doubts)
            for row, choice in zip(group, found, strict=True):
                if choice.changes(view.tokens):
                    choices[row] = choice
                    self.items[row].cut(choice)
                    self.went_on.setdefault(layer, {})[row] = self.items[row].index, choice.hidden
        return choices

    def _replayed(self, layer: int) -> dict[int, Choice]:
        """What was chosen before `layer` when the prompt alone was fed."""
        counts, _, numbers = self.stream.visual_slots()
        choices: dict[int, Choice] = {}
        for row, decision in enumerate(self.replays):
            if decision is None or layer not in decision.layers:
                continue
            wanted, vectors = decision.layers[layer]
            kept = (wanted[:, None] == numbers[row, : counts[row]]).nonzero()[:, 1]
            choices[row] = Choice(kept, vectors, ordered=True)
        return choices

    def _inputs(self, group: list[int], need: Needs) -> Inputs:
        """What the group's visual and query tokens entered the decoder as; its members entered equally many."""
        counts, slots, _ = self.entering.visual_slots()
        visual = self.entering.index[group].gather(1, slots[group][:, : counts[group[0]]])
        queries = self._query_rows(need.queries or "text")[0]
        text = self.stream.index.gather(1, queries)[group]
        embeds = self.embeds if len(group) == len(self.items) else self.embeds[group]
        return Inputs(take(embeds, visual), take(embeds, text))

    def _ahead(self, layer: int, need: Needs, hidden: Tensor, kwargs: dict) -> Rows | None:
        """The rows that `layer` would compute on its input, were nothing cut before it."""
        stream, held = self.stream, self._held(layer)
        counts, _, _ = stream.visual_slots()
        if max(counts) == 0:
            return None
        rotary = kwargs["position_embeddings"]
        if stream.pruned or is_pruned(self.cache, layer):
            rotary = self._rotary(layer, hidden, held.shift)[1]
        past = self.cache.layers[layer].keys[:, :, -held.past :] if held.past else None
        return rows_ahead(self.plan.site, layer, hidden, rotary, past, self._request(layer, need, held))

    def _request(self, layer: int, need: Needs, held: Held) -> Request:
        """The rows of `layer` that a strategy asks for."""
        stream = self.stream
        rows, rows_valid = self._query_rows(need.queries)
        keys_valid = self._keys_valid(stream, held)
        seen = self.masks.seen(layer, stream, held, keys_valid, self.plan.compact, rows)
        _, slots, _ = stream.visual_slots()
        return Request(need, rows, rows_valid, slots + held.past, keys_valid, held.past, seen)

    def _views(
        self, counts: list[int], numbers: Tensor, rows: Rows | None, alike: list | None = None, carried: bool = True
    ) -> Iterator[tuple[list[int], dict]]:
        """Samples of equal token count and image sizes together, with what every view has.

        Parameters:
            alike: one more thing per sample in which a group agrees.
            carried: hand over carried tensors, which follow the tokens that flow now (not those of an earlier layer).
        """
        for group in groups([(n, self.items[i].sizes, alike[i] if alike else None) for i, n in enumerate(counts)]):
            n = counts[group[0]]
            if n == 0:
                continue
            members = [self.items[i] for i in group]
            whole = len(group) == len(counts)
            yield (
                group,
                {
                    "index": (numbers if whole else numbers[group])[:, :n],
                    "sizes": members[0].sizes,
                    "carry": stack_carry(members) if carried else {},
                    "notes": self.notes,
                    "rows": slice_rows(rows, group, n),
                },
            )

    def requests(self, layer: int) -> Iterator[tuple[Request, Callable[[Rows], None]]]:
        """The attention rows wanted of decoder layer `layer`."""
        if not self.active or not self.items or self.replays is not None:
            return
        ahead = self.plan.prefill[layer + 1] if layer + 1 in self.cutting else None
        wanted = [("prefill", None if ahead is None or ahead.ahead else ahead), ("decode", self.plan.decode.get(layer))]
        wanted = [(stage, need) for stage, need in wanted if need is not None and need.queries is not None]
        if not wanted:
            return
        with self.clock.span("selection"):
            if max(self.stream.visual_slots()[0]) == 0:
                return
            for stage, need in wanted:
                request = self._request(layer, need, self.held[layer])
                yield request, lambda found, stage=stage: self.rows.__setitem__((stage, layer), found)

    def _query_rows(self, queries: str) -> tuple[Tensor, Tensor]:
        stream = self.stream
        batch, n = stream.index.shape

        def last() -> Tensor:
            if stream.valid is None or stream.left:
                return torch.full((batch, 1), n - 1, device=stream.index.device)
            return stream.valid.sum(1, keepdim=True) - 1

        if queries == "last":
            rows = stream.memo("last", last)
            return rows, torch.ones_like(rows, dtype=torch.bool)
        if queries != "text":
            raise ValueError(f"queries={queries!r} in a decoder stage: 'last' or 'text'.")

        def text() -> tuple[Tensor, Tensor]:
            is_text = stream.numbers < 0 if stream.valid is None else stream.valid & (stream.numbers < 0)
            if self.placeholders is not None:  # separators between rows of patches are no text
                is_text = is_text & ~self.placeholders.gather(1, stream.index)
            after = (stream.numbers >= 0).long().cumsum(1) > 0
            index, valid = compress(is_text & after, left=False)
            return index, torch.ones_like(index, dtype=torch.bool) if valid is None else valid

        return stream.memo("text", text)

    # ------------------------------------------------------------------ after the decoder

    def finish(self, output):
        """Restore the output to the fed length, evict from the cache; returns the output, or None to leave it."""
        if not self.active:
            return None
        with self.clock.span("selection"):
            if self.items and self.cache is not None:
                for layer, (stream, held) in enumerate(zip(self.streams, self.held, strict=True)):
                    if self.plan.site.attends[layer]:  # a state holds no token of its own
                        self.cut_off[layer] = held.past + stream.index.shape[1] - held_keys(self.cache.layers[layer])
                for layer in sorted(self.plan.decode):
                    self._evict(layer)
                if self.stream.pruned or self.evicted:
                    self._settle()
            if not self.stream.pruned:
                return None
            hidden = self.stream.restore(output[0])
            if isinstance(output, tuple):
                return (hidden, *output[1:])
            output.last_hidden_state = hidden
            return output

    def _settle(self) -> None:
        """From now on every layer of the cache speaks for itself, and none can be cropped into this prompt."""
        for layer, stream in enumerate(self.streams):
            if not self.plan.site.attends[layer]:
                continue
            if layer in self.evicted:  # speaks for itself already, and holds fewer keys than this pass fed
                self.cache.layers[layer].tail = 0
                continue
            self._swapped(layer, self._keys_valid(stream, self.held[layer]), self.masks.past + self.masks.length).tail = 0

    def _evict(self, layer: int) -> None:
        stream, strategy = self.streams[layer], self.plan.pruner.part("decode")
        counts, slots, numbers = stream.visual_slots()
        rows = self.rows.pop(("decode", layer), None)
        held = self.held[layer]
        at_end = torch.zeros(len(counts), 1 + max(sum(i.sizes) for i in self.items), dtype=torch.bool, device=slots.device)
        at_end.scatter_(1, self.stream.numbers + 1, True)
        lost = torch.zeros(stream.index.shape, dtype=torch.bool, device=slots.device)
        some = False
        for group, common in self._views(counts, numbers, rows, carried=False):
            survived = at_end[group].gather(1, common["index"] + 1)
            view = DecodeView(**common, layer=layer, depth=self.plan.depth, survived=survived)
            keep = strategy.decode(view)
            if keep is None:
                continue
            found = checked(keep, len(group), view.tokens, f"{strategy.name}.decode", least=0, doubts=self.doubts)
            for row, choice in zip(group, found, strict=True):
                if len(choice.kept) < view.tokens:
                    lost[row].index_fill_(0, slots[row, : counts[row]], True)
                    lost[row].index_fill_(0, slots[row, choice.kept], False)
                    some = True
        if not some:
            return
        keys_valid = self._keys_valid(stream, held)
        gone = torch.cat([lost.new_zeros(lost.shape[0], held.past), lost], -1)
        alive = ~gone if keys_valid is None else keys_valid & ~gone
        cached = self._swapped(layer, keys_valid, self.masks.past + self.masks.length)
        # of a sliding window's layer only the last keys are still there
        cached.evict(*compress(last(alive, cached.physical), left=True))
        self.evicted[layer] = lost

    # ------------------------------------------------------------------ what is left behind

    def remember(self) -> None:
        """Keep this pass's decisions beside the features, for a run without cache that feeds everything again."""
        if not self.items or self.cache is not None or self.input_ids is None:
            return
        fresh: set[int] = set()  # beams share one record, with an entry each
        for row, images in enumerate(self.images):
            if images:
                decision = self.replays[row] if self.replays is not None else None
                if decision is None:
                    # without the graph that made them, which would keep a training step alive into the next
                    decision = Decision(
                        [(self.image_items[i].detached(), _detached(self.selected.get(i))) for i in images],
                        {at: (rows[row][0], _detached(rows[row][1])) for at, rows in self.went_on.items() if row in rows},
                        self.items[row].past,
                    )
                record = self.records[images[0]]
                if id(record.replays) not in fresh:
                    record.replays.clear()
                    fresh.add(id(record.replays))
                record.replays.append((self._prompt(row).clone(), decision))

    def computed(self, row: int, layer: int) -> Tensor:
        """Numbers of a sample's visual tokens that `layer` ran on, in the order in which it did."""
        stream = self.streams[layer]
        counts, _, numbers = stream.visual_slots()
        return stream.memo(("computed", row), lambda: numbers[row, : counts[row]])


class _Late(Sequence):
    """What `find` gives for each of `keys`, found when it is asked for."""

    def __init__(self, keys: list[int], find: Callable[[int], Tensor]):
        self.keys, self.find = keys, find

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, at):
        return [self.find(key) for key in self.keys[at]] if isinstance(at, slice) else self.find(self.keys[at])


def _is_made(mask: Any) -> bool:
    """Whether an attention mask is one that a model makes of the user's padding mask: 4-D, or several by layer type."""
    return isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim != 2)


def _detached(vectors: Tensor | None) -> Tensor | None:
    return None if vectors is None else vectors.detach()


def _videos(units: list[list[ImageTokens]]) -> list[Frames]:
    """Videos before pooling, or several pictures that stand for one; those that are not known are left out."""
    found = []
    for unit in units:
        parts = [unit[0].frames] if len(unit) == 1 else [record.picture for record in unit]
        if any(part is None for part in parts):
            continue
        if len(parts) == 1:
            found.append(parts[0])
            continue
        shapes = {None if part.pixels is None else part.pixels.shape for part in parts}
        pixels = torch.cat([part.pixels for part in parts]) if len(shapes) == 1 and None not in shapes else None
        found.append(replace(parts[0], features=torch.cat([part.features for part in parts]), pixels=pixels))
    return found
