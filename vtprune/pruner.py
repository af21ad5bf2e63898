"""The interface between strategies and the engine: budgets, what a stage sees, what it returns.

Knows no model and no paper. A strategy subclasses `Pruner` and implements at most one method per stage:

    shrink   before the vision encoder              the grid that the pictures are scaled to
    encode   after a vision-encoder block           which patches go on
    select   between projector and decoder          which visual tokens enter the decoder
    prefill  before a decoder layer, in prefill     which visual tokens go on from this layer
    decode   once after prefill, per decoder layer  which cached visual tokens stay

Views are batched over items (images in the first three, samples in `prefill` and `decode`) of equal token count; the
engine groups unequal ones. Only visual tokens are ever offered, so text cannot be pruned by construction.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor


class PerImage(tuple):
    """Budgets for the images (and videos) of a prompt, one each, in the order in which they stand in it."""


Budget = int | float | PerImage

STAGES = ("shrink", "encode", "select", "prefill", "decode")


class VtpruneError(Exception):
    """Base of every error that vtprune raises on purpose."""


class BudgetError(VtpruneError, ValueError):
    """A `keep` that means nothing, or that a strategy cannot reach on this model."""


class UnsupportedError(VtpruneError, ValueError):
    """A model, input, cache or option that cannot be served; the message says what was found and what to do."""


class NothingPrunedError(VtpruneError, RuntimeError):
    """Images went in, the budget asked for fewer tokens, and none was dropped."""


def check_budget(keep: Any, name: str = "keep", per_image: bool = False) -> Budget:
    """Return `keep` as a plain int (visual tokens per image) or float in (0, 1] (share of them).

    Parameters:
        per_image: whether it may also be a list or tuple of such numbers, one for each image of a prompt.
    Raises:
        BudgetError: for a bool, NaN, zero, a negative number, a float above 1, or anything that is no number.
    """
    if per_image and isinstance(keep, list | tuple):
        if not keep:
            raise BudgetError(f"{name}={keep!r}: give one budget for each image of a prompt.")
        return PerImage(check_budget(one, f"{name}[{at}]") for at, one in enumerate(keep))
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise BudgetError(
            f"{name}={keep!r} ({type(keep).__name__}): give an int >= 1 (visual tokens per image) or a float in (0, 1]."
        )
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise BudgetError(f"{name}={keep}: at least 1 visual token per image must be kept.")
        return int(keep)
    keep = float(keep)
    if not 0.0 < keep <= 1.0:  # NaN fails every comparison
        raise BudgetError(f"{name}={keep}: a float is a share and must lie in (0, 1]; for a token count give an int.")
    return keep


def budget_of(keep: Budget | None, image: int) -> Budget | None:
    """The budget of a prompt's `image`-th image; the engine refuses prompts with more or fewer images than budgets, so of
    all the images of a batch in order, this is the right one, too."""
    return keep[image % len(keep)] if isinstance(keep, PerImage) else keep


def budget_tokens(keep: Budget, tokens: int, image: int = 0) -> int:
    """How many of an image's `tokens` a budget keeps: at least 1, at most all, shares rounded half to even."""
    keep = budget_of(keep, image)
    return min(tokens, keep) if isinstance(keep, int) else min(tokens, max(1, round(keep * tokens)))


def budget_counts(keep: Budget, sizes: Sequence[int]) -> list[int]:
    """How many tokens of each image a budget keeps, of images of these sizes in the order of their prompt."""
    return [budget_tokens(keep, size, image) for image, size in enumerate(sizes)]


def asks_for_fewer(keep: Budget, sizes: Sequence[int]) -> bool:
    """Whether a budget keeps less than all of any of the images."""
    return budget_counts(keep, sizes) != list(sizes)


def tokens_after_cut(target: int, tokens: int, layer: int, depth: int) -> int:
    """Tokens to leave from decoder layer `layer` on, so that the mean over `depth` layers is `target`.

    Layers before the cut compute on all `tokens`; this is how in-decoder strategies spend the common budget.

    Raises:
        BudgetError: if the layers before the cut alone exceed the budget.
    """
    if target >= tokens:
        return tokens
    left = (target * depth - layer * tokens) / (depth - layer)
    if round(left) < 1:
        least = math.ceil((layer * tokens + (depth - layer)) / depth)
        raise BudgetError(
            f"a budget of {target} of {tokens} visual tokens, as the mean over {depth} decoder layers, cannot be reached "
            f"with a first cut at layer {layer}: the layers before it alone cost {layer * tokens / depth:.1f}. Cut at an "
            f"earlier layer, raise keep to at least {least}, or give the count after the cut directly."
        )
    return round(left)


@dataclass(frozen=True)
class Needs:
    """What a stage needs from the attention of one layer; nothing else is computed.

    Parameters:
        queries: whose attention rows to compute. Encoder: "cls" (the class token), or without one "mean" (the mean query
            over patches) or "patches" (all patches' rows, averaged: the attention that each patch receives). Decoder:
            "last" (the last prompt token) or "text" (every text token after the first visual token). None: no rows.
        keys: also hand over the visual tokens' keys.
        values: also hand over the visual tokens' values and those of the query tokens.
        hidden: `prefill` only, also hand over the visual tokens' hidden states (a gather; patches come for free).
        inputs: `prefill` only, also hand over the embeddings with which the visual and the query tokens entered the
            decoder.
        ahead: `prefill` only, take the rows from the layer that is about to run (its norm, queries and keys are
            computed on its input first) in place of the layer before. Values are not to be had this way.
    """

    queries: str | None = None
    keys: bool = False
    values: bool = False
    hidden: bool = False
    inputs: bool = False
    ahead: bool = False


@dataclass(frozen=True)
class Encoder:
    """What an `encode` strategy may know of the vision encoder before anything runs.

    Parameters:
        depth: number of blocks that feed the projector; the feature block is depth - 1.
        blocks: number of blocks that run; those from `depth` on may be watched, but nothing can be dropped after them.
        cls: whether there is a class token.
        cell: patches that are joined to one visual token behind the last block; 1 where each is one.
        windowed: blocks whose attention stays within windows of a picture, so that no row spans it.
        whole_cells: whether patches have to leave by whole cells, as those of blocks in between are joined as well.
    """

    depth: int
    blocks: int
    cls: bool
    cell: int = 1
    windowed: frozenset[int] = frozenset()
    whole_cells: bool = False

    @property
    def last(self) -> int:
        """The encoder's last block, one after the feature block in LLaVA."""
        return self.blocks - 1

    @property
    def whole(self) -> list[int]:
        """The blocks that feed the projector and attend over the whole picture."""
        return [block for block in range(self.depth) if block not in self.windowed]


@dataclass(frozen=True)
class Model:
    """What a strategy that was fitted to one model may compare.

    Parameters:
        name: as loaded; depth: decoder layers; fingerprint: of architecture and weights, the same for every dtype,
            kernel and folder.
    """

    name: str
    depth: int
    fingerprint: str


@dataclass
class Rows:
    """Attention rows of a few query tokens over the visual tokens, in fp32, after position embedding.

    Parameters:
        logits: [B, H, R, N] scaled scores; -inf where the query may not see the token.
        lse: [B, H, R] log-sum-exp over *all* keys that the query sees, text and special tokens included.
        valid: [B, R] bool, False for rows that only pad the batch.
        keys: [B, Hkv, N, d] or None; values: [B, Hkv, N, d] or None; query_values: [B, Hkv, R, d] or None.
    """

    logits: Tensor
    lse: Tensor
    valid: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    query_values: Tensor | None = None

    def attention(self) -> Tensor:
        """[B, H, R, N] post-softmax weights; they do not sum to 1 over N, as the other keys took their share.

        Rows that only pad the batch are zero.
        """
        return torch.exp(self.logits - self.lse[..., None])


@dataclass(frozen=True)
class FramePlan:
    """For the report: what each of a video's F frames (or merged pairs of them) scored and got.

    Parameters:
        tokens: visual tokens of each frame.
        scores: relevance of each frame, or None where frames were not scored.
        grids: (rows, columns) that each frame was resized to, (0, 0) for one that left; None where nothing was resized.
    """

    tokens: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    grids: tuple[tuple[int, int], ...] | None = None


@dataclass
class Keep:
    """What a stage returns.

    Parameters:
        indices: which of the view's N tokens stay: LongTensor [B, K], or one LongTensor per item where counts differ.
            Any order; the engine sorts unless `ordered`. Out of range or repeated raises. `prefill` and `decode` may
            keep none at all.
        hidden: replacement for the kept tokens' vectors, same layout as `indices` (in ascending index order unless
            `ordered`) with the width appended; None leaves them as they are. For merging.
        into: for the report, LongTensor [B, N] (or one [N] per item): index (into the view) of the kept token that a
            dropped token was merged into, -1 if it was just dropped.
        ordered: the tokens go on in the order of `indices`, for papers that rearrange them; not in `decode`.
        foreign: for the report, LongTensor [B, F] (or one per item): kept indices whose replaced vector no longer
            stands for that token, such as a class token that took its place.
        plans: for the report of `select`, one per item: what each frame of a video got.
        counts: where `indices` is one tensor and items keep unequally many, how many of each row count; what follows them is
            ignored. For views with padding (`Pruner.ragged`), whose items are all in one tensor.
    """

    indices: Tensor | list[Tensor]
    hidden: Tensor | list[Tensor] | None = None
    into: Tensor | list[Tensor] | None = None
    ordered: bool = False
    foreign: Tensor | list[Tensor] | None = None
    plans: list[FramePlan] | None = None
    counts: list[int] | None = None


@dataclass
class Inputs:
    """Embeddings with which tokens entered the decoder, in the model's dtype.

    Parameters:
        visual: [B, M, D] of all M visual tokens that did, those that left since included.
        text: [B, R, D] of the query tokens, aligned with the rows; rows that only pad the batch are not zero.
    """

    visual: Tensor
    text: Tensor


@dataclass
class View:
    """What every stage sees.

    Parameters:
        index: LongTensor [B, N], the tokens' numbers before any pruning (raster order within an image).
        sizes: visual tokens before any pruning of each image of an item; one entry for per-image stages.
        carry: per-token tensors [B, N, ...] that follow their tokens through later cuts of this call; a stage may add
            to it. This is where a score that accumulates over layers lives.
        notes: lines for the report; a stage may add what the user should know (see `note`).
        part: (which, of how many) equal parts of an image this item is: a tile of a tiled image in `encode`; where tiles whose
            share of the strategy's `keep` is the same are seen together, the first of them.
        images: which image of its prompt each of `sizes` is; empty for all of them, in order.
    """

    index: Tensor
    sizes: tuple[int, ...]
    carry: dict[str, Tensor]
    notes: list[str] = field(default_factory=list, kw_only=True)
    part: tuple[int, int] = field(default=(0, 1), kw_only=True)
    images: tuple[int, ...] = field(default=(), kw_only=True)

    def note(self, text: str) -> None:
        """Tell the user, in the report, of something that was done otherwise than asked; said once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def tokens(self) -> int:
        """N, the visual tokens that this stage may choose from."""
        return self.index.shape[1]

    @property
    def total(self) -> int:
        """Visual tokens of an item before any pruning."""
        return sum(self.sizes)

    def target(self, keep: Budget) -> int:
        """The budget in tokens for one item: the sum over its images, or a tile's share of its image's.

        Raises:
            BudgetError: if a tile's share is less than a token.
        """
        return self._target(keep, self.part, self.images)

    def _target(self, keep: Budget, part: tuple[int, int], images: tuple[int, ...]) -> int:
        which, parts = part
        images = images or range(len(self.sizes))
        keep = budget_of(keep, images[0]) if parts > 1 else keep
        if parts > 1 and isinstance(keep, int):
            share = keep // parts + (which < keep % parts)
            if share < 1:
                raise BudgetError(
                    f"keep={keep} is less than one token for each of the {parts} tiles of an image, which the encoder sees one "
                    f"by one. Raise keep to at least {parts}, or use a strategy of another stage."
                )
            return min(share, self.total)
        return sum(budget_tokens(keep, size, image) for size, image in zip(self.sizes, images, strict=True))


@dataclass
class ShrinkView(View):
    """Before the vision encoder.

    Parameters:
        grid: (rows, columns) of patches at the picture's full size, or None if it has none.
    """

    grid: tuple[int, int] | None = None


@dataclass
class EncodeView(View):
    """After vision-encoder block `layer`.

    Where `cell` patches are joined to one visual token, the view's N tokens are patches, numbered cell by cell (patch p is
    of cell p // cell), while `sizes`, `total` and `target` count visual tokens; the patches that are left are joined in
    order, `cell` at a time.

    Parameters:
        layer: 0-based index of the block; depth: number of blocks that feed the projector (the feature block is
            depth - 1; from `depth` on the model uses nothing, so `encode` may look and carry, not drop).
        hidden: [B, N, C] the block's output for the patches, in the model's dtype.
        special: [B, S, C] the block's output for the tokens before the patches (the class token), S may be 0.
        rows: attention rows of this block as asked for (over the patches present in it), or None.
        grid: (rows, columns) of the unpruned patches, or cells of them; None if they have none.
        cell: patches that make one visual token.
        remaining: blocks still to come after which the stage runs and may drop.
        counts: where a strategy sees unequal items together (`Pruner.ragged`), how many patches each has; those behind them
            only pad. None: all have N. valid: bool [B, N], False for what pads; None where nothing does.
        parts, owners: of each item, as `part` and `images`, where items are seen together; None: all are as these say.
    """

    layer: int = 0
    depth: int = 0
    hidden: Tensor = None  # type: ignore[assignment]
    special: Tensor = None  # type: ignore[assignment]
    rows: Rows | None = None
    grid: tuple[int, int] | None = None
    cell: int = 1
    remaining: int = 0
    counts: list[int] | None = None
    valid: Tensor | None = None
    parts: list[tuple[int, int]] | None = None
    owners: list[tuple[int, ...]] | None = None

    def targets(self, keep: Budget, whole: bool = False) -> list[int]:
        """The budget of each item, as `target`; if `whole`, as if a part were an image of its own."""
        items = len(self.index)
        parts = [(0, 1)] * items if whole else self.parts or [self.part] * items
        owners = self.owners or [self.images] * items
        return [self._target(keep, part, images) for part, images in zip(parts, owners, strict=True)]


@dataclass
class Frames:
    """A video before the model pools it, for strategies that resize frames (`Pruner.reads_frames`).

    Parameters:
        features: [T, N, C] each frame's features in raster order, in the model's dtype; projected unless `project` is given.
        grid: (rows, columns) of them, N cells.
        project: [M, C] -> [M, D], for models that project after pooling; None where C is D already.
        pixels: [F, 3, H, W] the frames as the model was fed them, normalised; F is T, or a multiple of it where the model
            merges frames in time. None where they cannot be had.
        newline: [D] the model's row separator, or None if it has none.
    """

    features: Tensor
    grid: tuple[int, int]
    project: Callable[[Tensor], Tensor] | None = None
    pixels: Tensor | None = None
    newline: Tensor | None = None


@dataclass
class SelectView(View):
    """Between projector and decoder.

    Parameters:
        features: [B, N, D] projected visual embeddings, in the model's dtype.
        grid: (rows, columns) of the unpruned grid, or None; of a video, one frame's.
        frames: 1 for a picture; of a video, how many frames its unpruned tokens come in, one after the other.
        videos: B videos before pooling, if `Pruner.reads_frames`; empty for pictures.
        ordinal: LongTensor [B] on the CPU, which image of its sample an item is (0 for the first).
        text: B tensors [T, D], the text embeddings of the item's sample; gathered when they are asked for.
        ids: B LongTensors [T], the token ids behind them, empty ones if the user fed embeddings.
    """

    features: Tensor = None  # type: ignore[assignment]
    grid: tuple[int, int] | None = None
    ordinal: Tensor = None  # type: ignore[assignment]
    text: Sequence[Tensor] = ()
    ids: Sequence[Tensor] = ()
    frames: int = 1
    videos: list[Frames] = field(default_factory=list)

    def by_frame(self) -> Tensor:
        """[B, frames, tokens of a frame, D] features of a whole video.

        Raises:
            UnsupportedError: for a picture, or a video of which tokens have left already.
        """
        if self.frames == 1:
            raise UnsupportedError(
                "this strategy compares the frames of a video, and a picture (or a video of one frame) was given. Use another "
                "strategy for pictures."
            )
        if self.tokens != self.total:
            raise UnsupportedError("this strategy compares whole frames, but an earlier stage has taken tokens out of them.")
        return self.features.unflatten(1, (self.frames, -1))


@dataclass
class PrefillView(View):
    """Before decoder layer `layer` of `depth`, in prefill.

    Parameters:
        hidden: [B, N, D] the visual tokens' hidden states entering the layer, if asked for.
        rows: attention rows of layer `layer - 1` (of `layer` itself with `Needs.ahead`), as asked for, or None.
        inputs: embeddings of the tokens as they entered the decoder, if asked for.
        computed: visual tokens per item that each layer before this one computed on.
    """

    layer: int = 0
    depth: int = 0
    hidden: Tensor | None = None
    rows: Rows | None = None
    inputs: Inputs | None = None
    computed: tuple[int, ...] = ()


@dataclass
class DecodeView(View):
    """The cache of decoder layer `layer` once prefill is over.

    Parameters:
        rows: attention rows of this layer in prefill, as asked for, or None.
        survived: [B, N] bool, which of these tokens were still there at the last decoder layer.
    """

    layer: int = 0
    depth: int = 0
    rows: Rows | None = None
    survived: Tensor = None  # type: ignore[assignment]


class Pruner:
    """Base of every strategy: a dataclass whose fields are its paper's hyper-parameters.

    Class attributes:
        name: what `wrap(model, name)` and the command line call it.
        paper: title or id, year and venue, one line.
        positions: "original" (survivors keep their position) or "compact" (renumbered), as in the paper.
        requires: capabilities of the vision encoder that its `encode` cannot do without, of {"cls"}.
        reads: what it reads besides attention rows, in words, for `vtprune list`.
        modality: "video" if it serves videos alone, "any" otherwise.
        reads_frames: whether `select` wants videos as they are before the model pools them (`SelectView.videos`).
        cells: whether `encode` can choose among patches of which several make one visual token (`EncodeView.cell`).
        ragged: whether `encode` takes items of unequal counts in one view, padded on the right (`EncodeView.counts`).
        separators: whether the model's separators of rows (newlines of tiled pictures) stay in a picture that loses
            tokens before the decoder; a property where a field decides.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    positions: ClassVar[str] = "original"
    requires: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[tuple[str, ...]] = ()
    modality: ClassVar[str] = "any"
    reads_frames: ClassVar[bool] = False
    cells: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    separators: ClassVar[bool] = True

    keep: Budget | None

    def __post_init__(self) -> None:
        self.keep = check_budget(self.keep, per_image=True)

    def check_fields(self, integer: bool = False, why: str = "", **intervals: str) -> None:
        """Refuse fields that are no number in an interval, written as in maths: `momentum="[0, 1)"` has 0 and not 1.

        Parameters:
            integer: whether they have to be integers; why: appended to the message.
        Raises:
            BudgetError: also for a bool, NaN, and anything that is no number.
        """
        kind, what = (numbers.Integral, "an int") if integer else (numbers.Real, "a number")
        for name, interval in intervals.items():
            value = getattr(self, name)
            low, high = map(float, interval[1:-1].split(","))
            inside = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
            if not inside or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
                raise BudgetError(f"{name}={value!r}: give {what} in {interval}{why}.")

    def stages(self) -> tuple[str, ...]:
        """The stages that this instance claims, in running order."""
        return tuple(s for s in STAGES if getattr(type(self), s) is not getattr(Pruner, s))

    def part(self, stage: str) -> Pruner | None:
        """The strategy that serves `stage`, or None."""
        return self if stage in self.stages() else None

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        """Whether it may drop tokens of images of these sizes: with a budget, whether it asks for fewer than all."""
        return asks_for_fewer(self.keep, sizes)

    def budgets(self) -> int | None:
        """How many images a prompt must have, as a budget names each of them; None where any number will do.

        Raises:
            BudgetError: if two budgets name different numbers of them.
        """
        found = {len(value) for value in vars(self).values() if isinstance(value, PerImage)}
        return _same(found)

    def promises_to_prune(self, sizes: tuple[int, ...]) -> bool:
        """Whether a run that drops nothing is an error. Strategies driven by thresholds, not by a budget, say no."""
        return self.asks_to_prune(sizes)

    @classmethod
    def trial(cls, depth: int) -> Pruner:
        """An instance to ask what a model of `depth` decoder layers can serve; for strategies that have no values of their own
        until they are fitted, with some that would do."""
        return cls()

    def check_model(self, model: Model) -> None:
        """Refuse a model that this instance was not fitted to.

        Raises:
            UnsupportedError: with the reason.
        """

    # What each stage needs, said up front: {layer: Needs}. A stage runs at exactly these layers.
    def encode_needs(self, encoder: Encoder) -> Mapping[int, Needs]:
        """Encoder blocks (0-based) after which `encode` runs, and what it needs there; none leaves the encoder alone."""
        raise NotImplementedError

    def prefill_needs(self, depth: int) -> Mapping[int, Needs]:
        """Decoder layers (1 .. depth - 1) before which `prefill` runs; rows come from the layer before."""
        raise NotImplementedError

    def prefill_at(self, depth: int, sizes: tuple[int, ...], entered: int) -> Collection[int] | None:
        """Of the layers in `prefill_needs`, those at which it may cut a sample; rows are computed for no others.

        Parameters:
            sizes: tokens of the sample's images before any pruning; entered: of them, how many reached the decoder.
        Returns:
            None for all of them.
        """
        return None

    def decode_needs(self, depth: int) -> Mapping[int, Needs]:
        """Decoder layers (0 .. depth - 1) whose cache `decode` may cut."""
        raise NotImplementedError

    def shrink(self, view: ShrinkView) -> tuple[int, int] | None:
        """Choose the grid (rows, columns) of patches that the pictures are scaled down to; None leaves them."""
        raise NotImplementedError

    def encode(self, view: EncodeView) -> Keep | None:
        """Choose the patches that go on; None keeps all."""
        raise NotImplementedError

    def select(self, view: SelectView) -> Keep | None:
        """Choose the visual tokens that enter the decoder; None keeps all."""
        raise NotImplementedError

    def prefill(self, view: PrefillView) -> Keep | None:
        """Choose the visual tokens that go on from this layer; None keeps all."""
        raise NotImplementedError

    def decode(self, view: DecodeView) -> Keep | None:
        """Choose the cached visual tokens of this layer that stay; None keeps all."""
        raise NotImplementedError

    def __add__(self, other: Pruner) -> Pipeline:
        return Pipeline([self, other])

    def only(self, *stages: str) -> Pruner:
        """This strategy with just some of its stages, for composition: `FlowCut(...) + Other(...).only("decode")`.

        Raises:
            ValueError: if it does not claim one of them.
        """
        return Only(self, stages)

    def settings(self) -> dict[str, Any]:
        """Name and hyper-parameters, JSON-ready."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}}  # type: ignore[arg-type]

    def describe(self) -> str:
        """`name(field=value, ...)`, for tables and logs."""
        values = self.settings()
        return f"{values.pop('name')}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


def _same(counts: set[int | None]) -> int | None:
    if len(counts) > 1:
        raise BudgetError(
            f"budgets for {' and for '.join(map(str, sorted(counts)))} images: each names all images of a prompt."
        )
    return next(iter(counts), None)


class Only(Pruner):
    """Some stages of one strategy; made by `Pruner.only`."""

    def __init__(self, pruner: Pruner, stages: tuple[str, ...]):
        missing = [s for s in stages if s not in pruner.stages()]
        if missing or not stages:
            raise ValueError(f"{pruner.name} has the stages {pruner.stages()}; only({', '.join(map(repr, stages))}) is none.")
        self.pruner, self._stages, self.keep = pruner, stages, pruner.keep
        self.name, self.positions = pruner.name, pruner.positions  # type: ignore[misc]
        # what is asked of the vision encoder is asked by the stage inside it
        self.requires = pruner.requires if "encode" in stages else frozenset()  # type: ignore[misc]
        self.separators = pruner.separators  # type: ignore[misc]

    def stages(self) -> tuple[str, ...]:
        return tuple(s for s in STAGES if s in self._stages)

    def part(self, stage: str) -> Pruner | None:
        return self.pruner if stage in self._stages else None

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        return self.pruner.asks_to_prune(sizes)

    def promises_to_prune(self, sizes: tuple[int, ...]) -> bool:
        return self.pruner.promises_to_prune(sizes)

    def budgets(self) -> int | None:
        return self.pruner.budgets()

    def check_model(self, model: Model) -> None:
        self.pruner.check_model(model)

    def settings(self) -> dict[str, Any]:
        return {**self.pruner.settings(), "only": list(self.stages())}

    def describe(self) -> str:
        return f"{self.pruner.describe()}.only({', '.join(map(repr, self.stages()))})"

    def __repr__(self) -> str:
        return f"{self.pruner!r}.only({', '.join(map(repr, self.stages()))})"


class Pipeline(Pruner):
    """Several strategies, each serving its own stages: `FlowCut(keep=128) + FastV(keep=64)`.

    Each part spends its own `keep` (`vtprune.create("a+b", keep=...)` divides one among them). Positions are compact if
    any part's are.

    Raises:
        ValueError: if two parts claim the same stage.
    """

    name = "pipeline"

    def __init__(self, parts: list[Pruner]):
        self.parts = [p for part in parts for p in (part.parts if isinstance(part, Pipeline) else [part])]
        owner: dict[str, Pruner] = {}
        for part in self.parts:
            for stage in part.stages():
                if stage in owner:
                    raise ValueError(
                        f"both {owner[stage].name!r} and {part.name!r} claim the {stage!r} stage; a stage has one owner. "
                        f"Keep one of them, or use a strategy of another stage."
                    )
                owner[stage] = part.part(stage)
        self._owner = owner
        self.positions = "compact" if any(p.positions == "compact" for p in self.parts) else "original"  # type: ignore[misc]
        self.requires = frozenset().union(*(p.requires for p in self.parts))  # type: ignore[misc]
        self.separators = all(p.separators for p in self.parts)  # type: ignore[misc]

    def stages(self) -> tuple[str, ...]:
        return tuple(s for s in STAGES if s in self._owner)

    def part(self, stage: str) -> Pruner | None:
        return self._owner.get(stage)

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        return any(p.asks_to_prune(sizes) for p in self.parts)

    def promises_to_prune(self, sizes: tuple[int, ...]) -> bool:
        return any(p.promises_to_prune(sizes) for p in self.parts)

    def budgets(self) -> int | None:
        return _same({part.budgets() for part in self.parts} - {None})

    def check_model(self, model: Model) -> None:
        for part in self.parts:
            part.check_model(model)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "parts": [p.settings() for p in self.parts]}

    def describe(self) -> str:
        return " + ".join(p.describe() for p in self.parts)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))
