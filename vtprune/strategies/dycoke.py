"""DyCoke: merge tokens that repeat those of an earlier frame.

"DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv 2411.15024, CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruner import Budget, BudgetError, Keep, Pruner, SelectView, check_budget
from vtprune.temporal import dycoke_merge


@dataclass
class DyCoke(Pruner):
    """DyCoke (arXiv 2411.15024), its first stage: temporal merging before the decoder. Videos only.

    In each window of frames the first stays whole; of the others the share `k` of tokens most like the earlier frame's at
    the same place leaves, as in the published code, which drops where the paper says merge; the report names the token
    that stands for each. The second stage, which brings cached tokens back at decode steps, is not here.

    Parameters:
        keep: None for the paper's `k`; a budget (ours) takes the least k whose tokens do not exceed it, and the report says
            how many tokens that leaves unspent.
        k: share to drop of each compared frame; 0.7 in the paper.
        window: frames in a window.
    Raises:
        BudgetError: for a budget below the windows' first frames. UnsupportedError: for a picture.
    """

    keep: Budget | None = None
    k: float = 0.7
    window: int = 4

    name = "dycoke"
    paper = "DyCoke, arXiv 2411.15024 (CVPR 2025)"
    positions = "original"
    modality = "video"

    def __post_init__(self) -> None:
        if self.keep is not None:
            self.keep = check_budget(self.keep, per_image=True)
        self.check_fields(k="[0, 1]")
        self.check_fields(window="[1, 1000]", integer=True)

    def asks_to_prune(self, sizes: tuple[int, ...]) -> bool:
        if self.keep is None:
            return self.k > 0 and self.window > 1
        return super().asks_to_prune(sizes)

    def select(self, view: SelectView) -> Keep | None:
        k = self.k
        if self.keep is not None:
            target = view.target(self.keep)
            if target >= view.tokens:
                return None
            k = self._share(target, view)
        if k == 0:
            return None
        merge = dycoke_merge(view.by_frame(), k, self.window)
        return Keep(merge.kept, into=merge.into)

    def _share(self, target: int, view: SelectView) -> float:
        """The k that leaves at most `target` tokens."""
        frames, tokens = view.by_frame().shape[1:3]
        whole = -(-frames // self.window)
        if target < whole * tokens or frames == whole:
            raise BudgetError(
                f"keep={self.keep} is {target} tokens of a video of {frames} frames, but the first frame of each window of "
                f"{self.window} stays whole, {whole * tokens} tokens in all. Raise keep, or window."
            )
        each = (target - whole * tokens) // (frames - whole)
        spent = whole * tokens + each * (frames - whole)
        if spent < target:
            view.note(f"dycoke: keep={self.keep} is {target} tokens; equal cuts of the frames leave {spent}.")
        # the middle of the shares that leave so many, away from rounding
        return max(0.0, 1 - (each + 0.5) / tokens)
