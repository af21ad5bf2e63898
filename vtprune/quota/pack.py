"""Reduced frames to the sequence that a decoder reads, with the newline tokens that its family uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.pruner import UnsupportedError
from vtprune.quota.reduce import Reduced

NEWLINES = ("grid", "one_token", "none")


@dataclass(frozen=True)
class Packed:
    """A sequence of visual tokens and newlines.

    Parameters:
        tokens: [P, D].
        boxes: LongTensor [P, 5], as in `Reduced`. A newline has an empty box: at the right edge of the row that it ends, or
            with frame -1 and zeros at the end of all.
        newline: bool [P], the newlines.
    """

    tokens: Tensor
    boxes: Tensor
    newline: Tensor

    @property
    def visual(self) -> int:
        """Tokens that show something, which is what a budget counts."""
        return int((~self.newline).sum())

    def split(self) -> dict[int, Tensor]:
        """Each frame's part of the sequence, newlines of its rows included; for prompts with a placeholder per picture.

        Raises:
            UnsupportedError: for a sequence with a newline that belongs to no frame.
        """
        frames, lengths = torch.unique_consecutive(self.boxes[:, 0], return_counts=True)
        if len(frames) and frames[-1] < 0:
            raise UnsupportedError("a single newline ends the whole sequence; pack with newlines 'grid' or 'none' to split it.")
        return dict(zip(frames.tolist(), self.tokens.split(lengths.tolist()), strict=True))


def pack_frames(reduced: Reduced, newlines: str = "none", newline: Tensor | None = None) -> Packed:
    """Concatenate the frames that stay.

    Parameters:
        reduced: from `reduce_frames`.
        newlines: "grid", one after each row (LLaVA-Video); "one_token", one at the very end (LLaVA-OneVision); "none"
            (LLaVA-NeXT-Video, Video-LLaVA, Qwen2.5-VL).
        newline: [D], the model's newline embedding; needed unless newlines="none".
    Raises:
        UnsupportedError: for an unknown mode, a missing or ill-shaped newline, or "grid" on flat lists, which have no rows.
    """
    if newlines not in NEWLINES:
        raise UnsupportedError(f"newlines={newlines!r}: one of {', '.join(NEWLINES)}.")
    tokens, boxes = reduced.tokens, reduced.boxes
    if newlines == "none":
        return Packed(tokens, boxes, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device))
    if newline is None or newline.shape != tokens.shape[1:]:
        shape = None if newline is None else tuple(newline.shape)
        raise UnsupportedError(f"newline={shape}: newlines={newlines!r} needs the newline embedding, [{tokens.shape[1]}].")
    if newlines == "grid" and reduced.widths is None:
        raise UnsupportedError(
            "newlines='grid' ends rows, and 'linspace' and 'tome' leave none: reduce with 'bilinear' or 'pool', or pack "
            "with 'one_token' or 'none'."
        )
    if newlines == "one_token":
        ends = torch.tensor([len(tokens)], device=tokens.device)
        empty = torch.tensor([[-1, 0, 0, 0, 0]], device=tokens.device)
    else:
        after = reduced.widths.cumsum(0)
        ends = after + torch.arange(len(after), device=tokens.device)
        empty = boxes[after - 1]
        empty[:, 2] = empty[:, 4]
    ended = torch.zeros(len(tokens) + len(ends), dtype=torch.bool, device=tokens.device)
    ended[ends] = True
    sequence, where = tokens.new_empty(len(ended), tokens.shape[1]), boxes.new_empty(len(ended), 5)
    sequence[~ended], sequence[ended] = tokens, newline.to(tokens)
    where[~ended], where[ended] = boxes, empty
    return Packed(sequence, where, ended)
