"""From a scorer's raw answers to scores: one number per frame, finite, not negative, larger for more relevant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vtprune.pruner import UnsupportedError

MAPPINGS = ("sigmoid", "generic", "minmax")


def check_scores(scores: Tensor | np.ndarray | Sequence[float], frames: int | None = None) -> np.ndarray:
    """The scores as float64 [T] on the host.

    Parameters:
        scores: [T] real numbers, finite and >= 0; they need not be probabilities.
        frames: how many there must be; None for any number above zero.
    Raises:
        UnsupportedError: for NaN, infinite or negative scores (the first such frame is named), too few, too many or none.
    """
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu()
        scores = (scores.double() if not scores.is_complex() else scores).numpy()
    values = np.asarray(scores)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise UnsupportedError(
            f"scores of shape {values.shape} and type {values.dtype}: one real number per frame, [T], is needed."
        )
    values = values.astype(np.float64)
    if not len(values):
        raise UnsupportedError("no scores: there is no frame to plan for.")
    if frames is not None and len(values) != frames:
        raise UnsupportedError(f"{len(values)} scores for {frames} frames: score every frame once, in the order of the frames.")
    for bad, what in ((~np.isfinite(values), "not a finite number"), (values < 0, "negative")):
        if bad.any():
            at = int(bad.argmax())
            raise UnsupportedError(
                f"the score of frame {at} is {values[at]}, {what} ({int(bad.sum())} of {len(values)} are): look at the scorer; "
                f"raw similarities first go through vtprune.quota.relevance."
            )
    return values


def last(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, V]: the logits at each row's last real position, whichever side is padded.

    Parameters:
        logits: [B, L, V]; mask: [B, L], nonzero where a position is real; None if all are.
    Raises:
        UnsupportedError: if a row has no real position.
    """
    if mask is None:
        return logits[:, -1]
    real = mask.to(logits.device).bool()
    if not real.any(1).all():
        raise UnsupportedError("a row of the attention mask is all padding: there is no position to read an answer from.")
    position = torch.arange(logits.shape[1], device=logits.device).where(real, -1).amax(1)
    return logits[torch.arange(len(logits), device=logits.device), position]


def yes_probability(
    logits: Tensor, yes: int | Sequence[int], no: int | Sequence[int] | None = None, *, over: str = "vocabulary"
) -> Tensor:
    """[B] fp32: how probable the scorer finds it that the next token is the letter for yes.

    The published code takes the softmax in the model's dtype, which in bf16 leaves three digits; here it is always fp32.

    Parameters:
        logits: [B, V], any float dtype.
        yes: token id of the letter, or several ids whose probabilities add up (with and without a leading space).
        no: the same for the other letter; needed for over="letters".
        over: "vocabulary" as in the published code (a scorer that answers neither letter gives a low score), or "letters",
            renormalised over the two.
    Raises:
        UnsupportedError: for ids outside the vocabulary or in both letters, or a scorer that answers NaN.
    """
    if over not in ("vocabulary", "letters"):
        raise UnsupportedError(f"over={over!r}: 'vocabulary' or 'letters'.")
    if over == "letters" and no is None:
        raise UnsupportedError("over='letters' needs the token id of the other letter, no=.")
    sides = [[side] if isinstance(side, int) else list(side) for side in (yes, () if no is None else no)]
    ids = sides[0] + sides[1]
    if not sides[0] or (over == "letters" and not sides[1]) or len(set(ids)) < len(ids):
        raise UnsupportedError(f"yes={yes!r}, no={no!r}: each letter needs token ids of its own, each once.")
    if any(not 0 <= number < logits.shape[-1] for number in ids):
        raise UnsupportedError(f"token ids {ids} do not all lie in the scorer's vocabulary of {logits.shape[-1]}.")
    logits = logits.float()
    whole = logits if over == "vocabulary" else logits[..., ids]
    found = (torch.logsumexp(logits[..., sides[0]], -1) - torch.logsumexp(whole, -1)).exp()
    if not found.isfinite().all():
        bad = (~found.isfinite()).nonzero()[:, 0].tolist()
        raise UnsupportedError(
            f"the scorer answers NaN or infinities for frames {bad[:8]} of its batch: it needs a wider dtype."
        )
    return found.clamp(max=1.0)


def relevance(
    similarity: Tensor,
    mapping: str = "minmax",
    *,
    generic: Tensor | None = None,
    scale: float = 100.0,
    bias: float = 0.0,
) -> Tensor:
    """[T] fp32 scores in [0, 1] from image-text similarities, which span too narrow a band to be spent as they are.

    A frame counts by the phrase that it fits best. How sharply the budget follows the scores is the planner's `power`.

    Parameters:
        similarity: [T] or [T, M], raw cosines of T frames with M phrases, any float dtype.
        mapping: "sigmoid" (SigLIP: sigmoid(scale * s + bias)), "generic" (each phrase against generic descriptions, softmax
            of scale * s), or "minmax" (per video: its best frame 1, its worst 0, all 1 where no frame stands out).
        generic: [T, G] cosines with descriptions that fit any picture ("a photo"), for mapping="generic".
        scale, bias: the scorer's own logit scale and bias.
    Raises:
        UnsupportedError: for an unknown mapping, missing or ill-shaped tensors, or values that are not finite.
    """
    if mapping not in MAPPINGS:
        raise UnsupportedError(f"mapping={mapping!r}: one of {', '.join(MAPPINGS)}.")
    values = (similarity[:, None] if similarity.ndim == 1 else similarity).float()
    if values.ndim != 2 or 0 in values.shape:
        raise UnsupportedError(f"similarities of shape {tuple(similarity.shape)}: [frames] or [frames, phrases] is needed.")
    if mapping == "generic":
        if generic is None or generic.ndim != 2 or len(generic) != len(values) or not generic.shape[1]:
            shape = None if generic is None else tuple(generic.shape)
            raise UnsupportedError(f"generic={shape}: mapping='generic' needs similarities [{len(values)}, prompts].")
        values, generic = values * scale, generic.float() * scale
        against = torch.logsumexp(generic, -1, keepdim=True)
        values = torch.sigmoid(values - against)
    elif mapping == "sigmoid":
        values = torch.sigmoid(values * scale + bias)
    bad = ~values.isfinite().all(-1)
    if bad.any():
        raise UnsupportedError(f"the similarities of frames {bad.nonzero()[:, 0].tolist()[:8]} are not finite numbers.")
    best = values.amax(-1)
    if mapping != "minmax":
        return best
    low, high = best.min(), best.max()
    return torch.where(high > low, (best - low) / (high - low), 1.0)


def by_slot(scores: Tensor, frames: int, how: str = "max") -> Tensor:
    """[ceil(T / frames)]: scores of temporal slots of `frames` frames each (Qwen2.5-VL: 2), the last one maybe shorter.

    Parameters:
        scores: [T]; how: "max", a slot is as relevant as its best frame, or "mean".
    """
    if how not in ("max", "mean") or frames < 1:
        raise UnsupportedError(f"how={how!r}, frames={frames}: 'max' or 'mean' over at least 1 frame.")
    parts = scores.split(frames)
    return torch.stack([part.amax() if how == "max" else part.mean() for part in parts])
