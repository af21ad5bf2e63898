"""QuoTA: a video's budget divided over its frames by their relevance to the question, before the decoder.

Wang et al., "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
arXiv 2503.08689 (AAAI 2026). Scorers, planner, reducers and packing are in `vtprune.quota`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.pruner import Budget, BudgetError, FramePlan, Frames, Keep, Pruner, SelectView, UnsupportedError
from vtprune.quota import pack_frames, plan, reduce_frames
from vtprune.quota.planner import Plan
from vtprune.quota.reduce import METHODS, Reduced
from vtprune.quota.score import by_slot, check_scores, relevance


@dataclass
class QuoTA(Pruner):
    """QuoTA (arXiv 2503.08689): frames are resized to the tokens that their relevance to the question earns them.

    The published rule is score ** 2, each frame resized bilinearly from its un-pooled grid, frames that earn nothing left
    out. By default (ours) the whole budget is spent: no frame gets more than it has, repeated frames get nothing, all
    scores zero means all frames alike; `parity` is the published arithmetic. A token goes into the placeholder of its frame
    that lies nearest to what it shows; where a frame gets more than the model's own pooling leaves it, the next free one.
    Videos, and prompts of several pictures of one size, which then are the frames.

    Parameters:
        keep: visual tokens per video (int) or share of those that the model's own pooling makes (float); separators are not
            counted. 12,544, 6,272 and 3,136 in the paper.
        scorer: called per video with its frames as fed to the model [F, 3, H, W] and the token ids [L] of its sample's
            text, gives [F] scores >= 0: `vtprune.quota.FrameScorer`, its time counted in the prefill. None: cosines of the
            frame's projected features and the text embeddings (ours; cheap, and no better than the projector is aligned).
        scores: [F] made beforehand, for prompts of one video.
        power: of the score; 2 in the paper, 0 spends evenly.
        reducer: "bilinear" (the paper's default), "pool", "linspace" or "tome".
        within: a strategy of the select stage that picks each frame's share from the pooled tokens, in place of a reducer.
        cap: most tokens of a frame, None for all it has (with `parity` more than it has: frames are scaled up).
        floor: fewest tokens of a frame; 0 lets frames go.
        merged: of frames that the model merges in time, "max" or "mean" of their scores (ours).
        newlines: "grid" to end each row with the model's separator, as LLaVA-Video does; "none" leaves the family's own way.
        parity: the published arithmetic to the token; may leave a part of the budget unspent.
    Raises:
        BudgetError: for a field without meaning, or fewer tokens than the floors take.
        UnsupportedError: for pictures, scores that are no scores, or newlines of a model that has none.
    """

    keep: Budget = 0.25
    scorer: Callable[[Tensor, Tensor], Tensor] | None = None
    scores: Sequence[float] | Tensor | None = None
    power: float = 2.0
    reducer: str = "bilinear"
    within: Pruner | None = None
    cap: int | None = None
    floor: int = 0
    merged: str = "max"
    newlines: str = "none"
    parity: bool = False

    name = "quota"
    paper = "QuoTA, arXiv 2503.08689 (AAAI 2026)"
    positions = "compact"
    reads = ("text embeddings", "frames before pooling")
    modality = "video"
    reads_frames = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(power="[0, 100]")
        self.check_fields(floor="[0, 1000000]", integer=True)
        if self.cap is not None:
            self.check_fields(cap="[1, 1000000]", integer=True)
        if self.scorer is not None and (self.scores is not None or not callable(self.scorer)):
            raise BudgetError(f"scorer={self.scorer!r}: give a callable of (frames, ids), and not scores= as well.")
        for field, value, known in (
            ("reducer", self.reducer, METHODS),
            ("merged", self.merged, ("max", "mean")),
            ("newlines", self.newlines, ("none", "grid")),
        ):
            if value not in known:
                raise BudgetError(f"{field}={value!r}: one of {', '.join(known)}.")
        if self.within is not None and not (isinstance(self.within, Pruner) and self.within.stages() == ("select",)):
            raise BudgetError(f"within={self.within!r}: give a strategy of the select stage alone, such as DivPrune().")
        if self.within is not None and (self.parity or self.newlines == "grid"):
            raise BudgetError("within= picks tokens and leaves no rows: it goes with neither parity=True nor newlines='grid'.")
        if self.scores is not None:
            check_scores(self.scores)

    def settings(self) -> dict[str, Any]:
        scores = self.scores.tolist() if isinstance(self.scores, Tensor) else self.scores
        within = None if self.within is None else self.within.settings()
        return {
            **super().settings(),
            "scorer": None if self.scorer is None else repr(self.scorer),
            "scores": None if scores is None else list(scores),
            "within": within,
        }

    def select(self, view: SelectView) -> Keep | None:
        if not view.videos:
            raise UnsupportedError(
                "quota divides a budget over the frames of a video, or over several pictures of one size; a picture by itself "
                "(or one cut into tiles) was given."
            )
        if self.scores is not None and (len(view.videos) > 1 or int(view.ordinal[0])):
            raise UnsupportedError("scores= are of one video, and several were given: give a scorer, or one video at a time.")
        if view.target(self.keep) >= view.tokens:
            return None
        each = [self._video(view, at, video) for at, video in enumerate(view.videos)]
        return Keep(
            [keep.indices for keep in each],
            None if self.within is not None else [keep.hidden for keep in each],
            [keep.into for keep in each],
            foreign=[keep.foreign for keep in each],
            plans=[keep.plans for keep in each],
        )

    def _video(self, view: SelectView, at: int, video: Frames) -> Keep:
        """`Keep` of one video, each field without its batch dimension."""
        scores = check_scores(self._scores(video, view.ids[at], view.text[at]), len(video.features))
        native = video.grid if self.within is None else view.grid
        # of each frame the first of its kind; a model may merge frames in time
        source = None if self.parity else _firsts(video)
        rule = {"power": self.power, "cap": self.cap, "floor": self.floor, "source": source, "parity": self.parity}
        divided = plan(scores, view.target(self.keep), native, **rule)
        if self.within is not None:
            kept = self._picked(view, at, divided)
            return _reported(Keep(kept, None, torch.full_like(view.index[at], -1), foreign=kept[:0]), divided, scores, False)
        reduced = reduce_frames(video.features, divided, self.reducer)
        packed = pack_frames(reduced, self.newlines, video.newline)
        if len(packed.tokens) > view.tokens:
            raise BudgetError(
                f"{packed.visual} visual tokens and {len(packed.tokens) - packed.visual} separators of rows do not fit the "
                f"{view.tokens} places that the model keeps for this video. Lower keep, or use newlines='none'."
            )
        if packed.visual < min(divided.budget, view.target(self.keep)):
            view.note(f"quota: {packed.visual} of {divided.budget} tokens spent; the rest makes no whole row of a frame.")
        slots, own = _slots(packed.boxes, video.grid, view.grid, view.tokens)
        own &= ~packed.newline
        into = _into(reduced, divided, slots[~packed.newline], own[~packed.newline], view.grid, view.tokens)
        hidden = packed.tokens if video.project is None else video.project(packed.tokens)
        return _reported(Keep(slots, hidden, into, foreign=slots[~own]), divided, scores, self.reducer in ("bilinear", "pool"))

    def _scores(self, video: Frames, ids: Tensor, text: Tensor) -> Tensor | Sequence[float]:
        scores = self.scores
        if self.scorer is not None:
            if video.pixels is None or not len(ids):
                raise UnsupportedError(
                    "scorer= reads frames and token ids: pass pixel_values_videos and input_ids to the model."
                )
            scores = self.scorer(video.pixels, ids)
        if scores is None:
            return _likeness(video, text)
        # as many as frames went in, or one for each pair that the model merged
        fed = len(video.features) if video.pixels is None else len(video.pixels)
        if len(scores) == len(video.features) != fed:
            fed = len(video.features)
        scores = torch.from_numpy(check_scores(scores, fed))
        return by_slot(scores, fed // len(video.features), self.merged)

    def _picked(self, view: SelectView, at: int, divided: Plan) -> Tensor:
        """[K] indices: of each frame's pooled tokens, those that `within` keeps for the frame's share."""
        frames, each = view.features[at].unflatten(0, (view.frames, -1)), view.tokens // view.frames
        picked = []
        for count in sorted(set(divided.counts) - {0}):
            members = torch.tensor([i for i, n in enumerate(divided.counts) if n == count], device=frames.device)
            index = torch.arange(each, device=frames.device).expand(len(members), -1)
            kept = index
            if count < each:
                shown = SelectView(
                    index=index,
                    sizes=(each,),
                    carry={},
                    notes=view.notes,
                    features=frames[members],
                    grid=view.grid,
                    ordinal=members.cpu(),
                    text=[view.text[at]] * len(members),
                    ids=[view.ids[at]] * len(members),
                )
                kept = replace(self.within, keep=count).select(shown).indices
            picked.append((kept + each * members[:, None]).flatten())
        return torch.cat(picked).sort().values


def _likeness(video: Frames, text: Tensor) -> Tensor:
    """[T] in [0, 1]: how much more than in other frames some word of the text [W, D] is found in a token of a frame."""
    frames = video.features if video.project is None else torch.stack([video.project(frame) for frame in video.features])
    if not len(text):
        return torch.ones(len(frames))
    words = normalize(text.float(), dim=-1)
    found = torch.stack([(normalize(frame.float(), dim=-1) @ words.T).amax(0) for frame in frames])
    return relevance(found - found.median(0).values, mapping="minmax")


def _firsts(video: Frames) -> list[int]:
    """[T] for each frame the number of the first of the run of equal frames that it is in."""
    shown = video.features if video.pixels is None else video.pixels
    shown = shown.reshape(len(video.features), -1)
    new = torch.ones(len(shown), dtype=torch.long)
    new[1:] = torch.stack([(a != b).any() for a, b in zip(shown[1:], shown[:-1], strict=True)]).cpu() if len(shown) > 1 else 0
    return new.cumsum(0).tolist()


def _slots(boxes: Tensor, native: tuple[int, int], pooled: tuple[int, int], tokens: int) -> tuple[Tensor, Tensor]:
    """LongTensor [P] ascending, distinct: the placeholder of each packed token; and bool [P], whether it is its frame's own."""
    frame, top, left, bottom, right = boxes.T
    row = ((top + bottom) * pooled[0]).div(2 * native[0], rounding_mode="floor")
    column = ((left + right) * pooled[1]).div(2 * native[1], rounding_mode="floor").clamp(max=pooled[1] - 1)
    number, each = torch.arange(len(boxes), device=boxes.device), pooled[0] * pooled[1]
    near = (frame * pooled[0] + row) * pooled[1] + column
    # of all that still leave room for the tokens to come, those of its frame where all frames fit into their own
    _, which, lengths = frame.unique_consecutive(return_inverse=True, return_counts=True)
    last = (frame + 1) * each - lengths.cumsum(0)[which] if bool((lengths <= each).all()) else tokens - len(boxes)
    # the nearest that is free after the token before; everything less the token's own number, so that equal means next
    free = torch.minimum((near - number).cummax(0).values, torch.as_tensor(last, device=boxes.device))
    slots = free.flip(0).cummin(0).values.flip(0) + number
    return slots, slots.div(each, rounding_mode="floor") == frame


def _into(reduced: Reduced, divided: Plan, slots: Tensor, own: Tensor, pooled: tuple[int, int], tokens: int) -> Tensor:
    """[N] for the report: the placeholder that holds what stood in each one that went, -1 where nothing does."""
    device, each = slots.device, pooled[0] * pooled[1]
    into = torch.full((tokens,), -1, dtype=torch.long, device=device)
    start = 0
    for frame, length in zip(divided.frames, reduced.lengths, strict=True):
        high, wide = divided.native[frame]
        row = torch.arange(pooled[0], device=device)[:, None] * 2 + 1
        column = torch.arange(pooled[1], device=device)[None] * 2 + 1
        if reduced.owner is not None:
            cell = row * high // (2 * pooled[0]) * wide + column * wide // (2 * pooled[1])
            holder = reduced.owner[frame].flatten()[cell.flatten()]
        elif reduced.widths is not None:
            rows, columns = divided.grids[frame]
            holder = start + (row * rows // (2 * pooled[0]) * columns + column * columns // (2 * pooled[1])).flatten()
        else:
            holder = None
        if holder is not None:
            into[frame * each : (frame + 1) * each] = torch.where(own[holder], slots[holder], -1)
        start += length
    into[slots] = -1
    return into


def _reported(keep: Keep, divided: Plan, scores: Any, resized: bool) -> Keep:
    tokens = [rows * columns for rows, columns in divided.grids] if resized else divided.counts
    grids = divided.grids if resized else None
    keep.plans = FramePlan(tuple(tokens), tuple(float(score) for score in scores), grids)
    return keep
