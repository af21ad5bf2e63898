"""The report of one call: what was kept, what it saved, what it cost. Read by the CLI, the demo, the evaluations, the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vtprune import places
from vtprune.places import View

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.measure.clock import Clock
    from vtprune.pruner import FramePlan
    from vtprune.video import Frame


@dataclass
class SampleReport:
    """One sample of the batch.

    Parameters:
        visual_tokens: visual tokens of the sample before pruning, over all its images.
        kept: LongTensor, ascending: which of them entered the decoder.
        layers: one LongTensor per decoder layer: which of them that layer computed on, in that order (ascending unless
            the strategy rearranges tokens).
        cached: visual tokens that each decoder layer's cache held after prefill (equal to `layers` in length unless a
            decode-stage strategy evicted some; empty without a cache).
        encoded: one LongTensor per vision-encoder cut: (block, patches that went on), in order as in `layers`; block -1 is
            a picture that was scaled down before the encoder.
        merged: {kept index: indices averaged into it}, empty where nothing merged.
        frames: of each image, 1; of a video, its frames.
        plans: of each image, None; of a video, what each frame got, if the strategy divided its budget over frames.
        slots: which of the sample's image placeholders in the prompt its visual tokens are, where some separate rows
            (newline embeddings of tiled pictures, which always stay); None where all are visual.
        foreign: kept indices whose vector stands for something else, such as the class token in a dropped patch's place.
        images: tokens of each image before pruning, in order; an image's tokens are numbered after its predecessors'.
        grids: (rows, columns) of each image's tokens, of a video one frame's, or None where they form no one grid.
        views: the grids of each picture's tokens, several where it is tiled; () where they form none, and for a video.
    """

    visual_tokens: int
    kept: Tensor
    layers: list[Tensor]
    cached: list[Tensor] = field(default_factory=list)
    encoded: list[tuple[int, Tensor]] = field(default_factory=list)
    merged: dict[int, list[int]] = field(default_factory=dict)
    images: list[int] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    slots: Tensor | None = None
    frames: list[int] = field(default_factory=list)
    plans: list[FramePlan | None] = field(default_factory=list)
    views: list[tuple[View, ...]] = field(default_factory=list)

    def boxes(self, image: int, size: tuple[int, int], fit: str = "crop") -> np.ndarray:
        """[N, 4] float: left, top, right, bottom of each visual token of a picture, in its pixels, by number within it.

        Parameters:
            image: which of the sample's; size: (width, height) of the picture as given to the processor.
            fit: how the processor made it square, "crop" (shortest edge, centre crop, as CLIP's) or "stretch"; tiled pictures
                are covered whole.
        Raises:
            ValueError: for a picture whose tokens form no grid, and for videos.
        """
        return places.boxes(self.views_of(image), size, fit)

    def views_of(self, image: int) -> tuple[View, ...]:
        """The grids of one picture's tokens; () where they have no place in it."""
        if self.views:
            return self.views[image]
        grid = self.grids[image]
        return () if grid is None or (self.frames and self.frames[image] > 1) else (View(*grid),)

    @property
    def equivalent_tokens(self) -> float:
        """Mean over decoder layers of visual tokens computed on."""
        return sum(len(layer) for layer in self.layers) / len(self.layers)

    def trail(self) -> list[Step]:
        """Where each token went: one step per place where some left, in running order, every token in exactly one of
        them or in the last step, which holds those that stayed. A merged token left where it was merged.

        Of a cache whose layers hold different sets, a token left where no layer holds it any more.
        """
        places = [
            (f"after vision block {block}" if block >= 0 else "as the picture was scaled down", set(index.tolist()))
            for block, index in self.encoded
        ]
        places.append(("before the decoder", set(self.kept.tolist())))
        places += [(f"before decoder layer {at}", set(index.tolist())) for at, index in enumerate(self.layers)]
        if self.cached:
            places.append(("from the cache", {n for index in self.cached for n in index.tolist()} & places[-1][1]))
        into = {gone: kept for kept, all_gone in self.merged.items() for gone in all_gone}
        steps, present = [], set(range(self.visual_tokens))
        for where, left in places:
            gone = sorted(present - left)
            if gone:
                steps.append(Step(where, gone, sum(n in into for n in gone)))
                present &= left
        return [*steps, Step("stayed", sorted(present), 0)]


@dataclass(frozen=True)
class Step:
    """Tokens that left at one place, or those that stayed.

    Parameters:
        where: in words; tokens: their numbers, ascending; merged: how many of them live on in another one.
    """

    where: str
    tokens: list[int]
    merged: int


def describe_trail(steps: list[Step]) -> str:
    """`460 after vision block 3 (12 merged), 52 before decoder layer 2, 64 stayed`."""
    return ", ".join(f"{len(step.tokens)} {step.where}" + (f" ({step.merged} merged)" if step.merged else "") for step in steps)


@dataclass
class Report:
    """What the last pruned prefill kept, saved and cost.

    Parameters:
        strategy: the strategy with its settings, as text.
        positions: "original" or "compact".
        samples: one entry per sample of the batch (beams and returned sequences of one sample counted once).
        kv_bytes, kv_bytes_full: bytes of keys and values held after prefill, padding included; what an unpruned run
            would hold. 0 without a cache.
        flops, flops_full: vision encoder, projector and decoder prefill, two per multiply-add, with and without pruning
            (convention: linear layers and both attention products, causal half not subtracted; no LM head, no norms).
        notes: what the user should know, e.g. a budget above an image's token count.
    """

    strategy: str
    positions: str
    samples: list[SampleReport]
    kv_bytes: int
    kv_bytes_full: int
    flops: int
    flops_full: int
    clock: Clock = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def equivalent_tokens(self) -> float:
        """Mean over decoder layers, and samples with images, of visual tokens computed on."""
        seen = [s.equivalent_tokens for s in self.samples if s.visual_tokens]
        return sum(seen) / len(seen)

    @cached_property
    def prefill_ms(self) -> float:
        """Vision encoder, projector and decoder prefill, everything vtprune adds included; wall clock or device time."""
        return self.clock.total("prefill")

    @cached_property
    def selection_ms(self) -> float:
        """All that vtprune adds to it: attention rows, scores, selections, gathers, masks."""
        return self.clock.total("selection")

    def overlay(self, image: Image.Image | list[Image.Image], sample: int = 0, fit: str = "crop") -> Image.Image:
        """Picture of what was kept at each stage, drawn over the sample's image (or list of images).

        Parameters:
            image: as given to the processor.
            sample: which sample of the batch.
            fit: how the processor made the picture square, "crop" (shortest edge, centre crop, as CLIP's) or "stretch".
        """
        from vtprune.viz import overlay

        return overlay(self.samples[sample], image, fit=fit)

    def timeline(
        self, frames: Sequence[Image.Image | Frame], sample: int = 0, video: int = 0, fit: str = "stretch"
    ) -> Image.Image:
        """Picture of what each frame of a video scored, what it got of the budget, and which of its tokens were kept.

        Parameters:
            frames: those that the model was fed, in order; labelled with their times if they are `vtprune.video.Frame`.
            sample: which sample of the batch; video: which of its videos, pictures not counted.
            fit: how the processor made frames square, "stretch" or "crop" (shortest edge, centre crop, as CLIP's).
        """
        from vtprune.viz_timeline import timeline

        return timeline(self.samples[sample], frames, video=video, fit=fit)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "strategy": self.strategy,
            "positions": self.positions,
            "equivalent_tokens": self.equivalent_tokens,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "flops": self.flops,
            "flops_full": self.flops_full,
            "prefill_ms": self.prefill_ms,
            "selection_ms": self.selection_ms,
            "notes": list(self.notes),
            "samples": [
                {
                    "visual_tokens": s.visual_tokens,
                    "kept": s.kept.tolist(),
                    "layers": [layer.tolist() for layer in s.layers],
                    "cached": [layer.tolist() for layer in s.cached],
                    "encoded": [[block, index.tolist()] for block, index in s.encoded],
                    "merged": {str(k): v for k, v in s.merged.items()},
                    "foreign": list(s.foreign),
                    "trail": [{"where": step.where, "tokens": len(step.tokens), "merged": step.merged} for step in s.trail()],
                    "images": list(s.images),
                    "grids": [list(g) if g else None for g in s.grids],
                    "views": [[asdict(view) for view in views] for views in s.views],
                    "frames": list(s.frames),
                    "plans": [None if plan is None else asdict(plan) for plan in s.plans],
                    "slots": None if s.slots is None else s.slots.tolist(),
                }
                for s in self.samples
            ],
        }

    def __str__(self) -> str:
        def ratio(part: int, whole: int) -> str:
            return f" ({part / whole:.0%} of unpruned)" if whole else ""

        tokens = ", ".join(f"{len(s.kept)} of {s.visual_tokens}" for s in self.samples)
        lines = [
            self.strategy,
            f"  visual tokens entering the decoder: {tokens}",
            f"  equivalent tokens (mean over decoder layers): {self.equivalent_tokens:.1f}",
            f"  KV cache after prefill: {self.kv_bytes / 2**20:.2f} MiB{ratio(self.kv_bytes, self.kv_bytes_full)}",
            f"  FLOPs to the first token: {self.flops / 1e9:.2f} G{ratio(self.flops, self.flops_full)}",
            f"  prefill: {self.prefill_ms:.1f} ms, of which vtprune {self.selection_ms:.1f} ms",
            f"  where they went: {describe_trail(self.samples[0].trail())}",
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
