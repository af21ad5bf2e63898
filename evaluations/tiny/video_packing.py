"""Frames of a clip under a plan, and many questions about it, as rows of a batch; how the answers are scored.

A row is ``<s> user : [frames, each on its own grid] [newline] [question 1 + answer] [question 2 + answer] ...``, positions
consecutive. Each question sees the frames and itself, and starts at the position it has in a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from vtprune.quota import Plan, plan, reduce_frames

from ..worlds import CLIP_GRID, SHAPES, Clip, ClipQuestion, make_clip
from ..worlds.clips import MOST_TIMES
from .model import EOS, PAD, WIDTH
from .packing import HEAD, LOOK_LAYER, run_layer
from .video_model import CELLS, POOLED, build_video_tokenizer, frame_states

NATIVE = (CLIP_GRID, CLIP_GRID)
MOST_ACTORS = 6
_TOUCHED = 0.15  # share of an object in a visual token from which on it can be seen there


@dataclass
class Seen:
    """A clip after the vision tower."""

    clip: Clip
    states: Tensor  # (D, 145, width) bfloat16, of the frames that differ, the class token first
    which: np.ndarray  # (T,), which of them each frame is
    owner: Tensor  # (D, 144, actors) float, the patches that each actor covers


def see(vision: nn.Module, seeds: Sequence[int], split: str, frames: int | None = None) -> list[Seen]:
    """Clips drawn and put through the tower."""
    clips = [make_clip(s, split, frames) for s in seeds]
    drawn = [clip.pictures() for clip in clips]
    states = frame_states(vision, np.concatenate([p for p, _ in drawn])).split([len(p) for p, _ in drawn])
    out = []
    for clip, (pictures, which), some in zip(clips, drawn, states, strict=True):
        owner = torch.zeros(len(pictures), CELLS, MOST_ACTORS)
        for d in range(len(pictures)):
            at = int((which == d).argmax())
            for a in range(len(clip.actors)):
                owner[d, clip.patches_of(a, at), a] = 1
        out.append(Seen(clip, some, which, owner))
    return out


# -- plans ---------------------------------------------------------------------------------------------------------
def fixed(frames: int, chosen: Sequence[int], grid: tuple[int, int] = (POOLED, POOLED)) -> Plan:
    """The chosen frames on one grid, by default the model's own after pooling."""
    grids = tuple(grid if t in set(chosen) else (0, 0) for t in range(frames))
    counts = tuple(h * w for h, w in grids)
    return Plan(sum(counts), tuple(c / sum(counts) for c in counts), counts, grids, (NATIVE,) * frames)


def sampled(frames: int, budget: int) -> Plan:
    """As many evenly spaced frames as fit on the model's own grid: what one does without QuoTA."""
    fit = min(frames, max(1, budget // (POOLED * POOLED)))
    return fixed(frames, np.linspace(0, frames - 1, fit).round().astype(int).tolist())


def even(frames: int, budget: int) -> Plan:
    return plan(np.ones(frames), budget, NATIVE)


def true(frames: int, budget: int, relevant: Sequence[int]) -> Plan:
    """As an oracle scorer would have it: all to the frames asked about, what they cannot take to the others."""
    return plan(np.isin(np.arange(frames), relevant).astype(float), budget, NATIVE)


# -- rows ----------------------------------------------------------------------------------------------------------
class TimeHeads(nn.Module):
    """What only training needs, read off visual tokens before the block that looks: the shapes seen so far, and the how
    manieth time it is that what the token shows is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(WIDTH, len(SHAPES))
        self.time = nn.Linear(WIDTH, MOST_TIMES)

    def loss(self, hidden: Tensor, rows: Rows) -> Tensor:
        x = F.layer_norm(hidden.float(), (WIDTH,))
        on = torch.arange(x.shape[1]) < rows.lengths[:, None]
        seen = F.binary_cross_entropy_with_logits(self.seen(x)[on], rows.so_far[on])
        return seen + F.cross_entropy(self.time(x).flatten(0, 1), rows.time.flatten(), ignore_index=-100)


def _history(clip: Clip, wanted: Plan, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Per visual token (and the newline) the shapes seen before it or in it, [K, shapes], and the number of the time, from
    0, that its needle is seen, -100 where it shows none."""
    touched = shown > _TOUCHED
    frame = torch.tensor([t for t in wanted.frames for _ in range(wanted.grids[t][0] * wanted.grids[t][1])] + [-1])
    now = torch.zeros(len(shown), len(SHAPES))
    time = torch.full((len(shown),), -100)
    for a, actor in enumerate(clip.actors):
        now[touched[:, a], SHAPES.index(actor.shape)] = 1
        if actor.needle and len(actor.frames) == actor.times:
            visible = frame[touched[:, a]].unique()
            time[touched[:, a]] = torch.searchsorted(visible, frame[touched[:, a]])
    return now.cummax(0).values, time


@dataclass
class Rows:
    """A batch: visual tokens with a newline behind them, filled up on the right, and the questions."""

    visual: Tensor  # (B, K, width)
    lengths: Tensor  # (B,), newline included
    shown: Tensor  # (B, K, actors), how much of each visual token is each actor's
    text: Tensor  # (B, N)
    offsets: Tensor  # (B, N), position after the visual tokens
    block: Tensor  # (B, N), the question's number, -1 for padding
    targets: Tensor  # (B, N)
    questions: list[list[ClipQuestion]]
    so_far: Tensor  # (B, K, shapes), see `_history`
    time: Tensor  # (B, K)


class VideoPacker:
    def __init__(self) -> None:
        self.tokenizer = build_video_tokenizer()
        self.head = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(HEAD)))
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def rows(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        seen: Sequence[Seen],
        plans: Sequence[Plan],
        questions: Sequence[list[ClipQuestion]],
    ) -> Rows:
        """Project the frames, put each on its plan's grid, write the questions behind."""
        states = torch.cat([s.states[:, 1:] for s in seen])
        projected = model.model.multi_modal_projector(states.float()).float().split([len(s.states) for s in seen])
        newline = F.pad(model.model.image_newline[None].float(), (0, MOST_ACTORS))
        tokens = []
        for s, features, wanted in zip(seen, projected, plans, strict=True):
            both = torch.cat([features, s.owner], -1).unbind()
            tokens.append(torch.cat([reduce_frames([both[d] for d in s.which], wanted).tokens, newline]))
        lengths = torch.tensor([len(t) for t in tokens])
        both = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        written = []
        for asked in questions:
            text, offset, block, target = [], [], [], []
            for k, q in enumerate(asked):
                prompt, answer = self.ids(q.text + " ASSISTANT:"), [*self.ids(q.answer), EOS]
                ids = prompt + answer[:-1]
                text += ids
                offset += range(len(ids))
                block += [k] * len(ids)
                target += [-100] * (len(prompt) - 1) + answer
            written.append((text, offset, block, target))
        width = max(len(row[0]) for row in written)
        fills = (PAD, 0, -1, -100)
        parts = [torch.tensor([row[i] + [fills[i]] * (width - len(row[i])) for row in written]) for i in range(4)]
        shown = both[..., -MOST_ACTORS:].detach()
        past = [_history(s.clip, w, x[:n]) for s, w, x, n in zip(seen, plans, shown, lengths.tolist(), strict=True)]
        so_far = nn.utils.rnn.pad_sequence([a for a, _ in past], batch_first=True)
        time = nn.utils.rnn.pad_sequence([b for _, b in past], batch_first=True, padding_value=-100)
        return Rows(both[..., :-MOST_ACTORS], lengths, shown, *parts, list(questions), so_far, time)

    def loss(
        self, model: LlavaOnevisionForConditionalGeneration, rows: Rows, heads: TimeHeads | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The mean loss over answer tokens, which of them are right, how surprising it is that two heads look, just before
        they answer, at what the question is about (for an order one head at each), and the loss of `heads`."""
        lm = model.model.language_model
        b, k = rows.visual.shape[:2]
        head = self.head.expand(b, -1)
        h = head.shape[1]
        x = torch.cat([lm.embed_tokens(head), rows.visual, lm.embed_tokens(rows.text)], 1)
        before = torch.arange(h + k).expand(b, -1)
        positions = torch.cat([before, h + rows.lengths[:, None] + rows.offsets], 1)
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril().expand(b, n, n).clone()
        mask[:, h + k :, h + k :] &= rows.block[:, :, None] == rows.block[:, None, :]
        mask[:, h + k :, h : h + k] &= (torch.arange(k) < rows.lengths[:, None])[:, None]
        kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        bias = torch.zeros(b, 1, n, n, dtype=kind).masked_fill_(~mask[:, None], -1e9)
        rope = tuple(t.to(kind) for t in lm.rotary_emb(x, positions))
        surprise = told = None
        for number, layer in enumerate(lm.layers):
            if number == LOOK_LAYER and heads is not None:
                told = heads.loss(x[:, h : h + k], rows)
            x, scores = run_layer(layer, x, bias, rope)
            if number == LOOK_LAYER and scores is not None:
                surprise = self._surprise(rows, scores, h)
        x = x[:, h + k :]
        on = rows.targets != -100
        logits, targets = model.lm_head(lm.norm(x[on])).float(), rows.targets[on]
        return F.cross_entropy(logits, targets), logits.argmax(-1) == targets, surprise, told

    def _surprise(self, rows: Rows, scores: Tensor, h: int) -> Tensor | None:
        k = rows.visual.shape[1]
        start = (rows.targets != -100) & (rows.targets.roll(1, 1) == -100)
        at, columns, wanted = [], [], []
        for r, asked in enumerate(rows.questions):
            for q, column in zip(asked, start[r].nonzero()[:, 0].tolist(), strict=True):
                pair = (q.actors[:1], q.actors[1:]) if q.type == "order" else (q.actors, q.actors)
                want = torch.stack([rows.shown[r][:, list(a)].amax(-1) > _TOUCHED for a in pair])
                if want.any(1).all() and not (q.type == "existence" and q.answer == "no"):
                    at.append(r)
                    columns.append(h + k + column)
                    wanted.append(want)
        if not at:
            return None
        own = scores[at, :2, columns].float().log_softmax(-1)[..., h : h + k]
        return -own.masked_fill(~torch.stack(wanted), -1e9).logsumexp(-1).mean()


def per_question(rows: Rows, right: Tensor) -> list[tuple[ClipQuestion, bool]]:
    """Whether each question is answered in full, its end included: just what greedy generation would give."""
    on = rows.targets != -100
    where, columns = on.nonzero(as_tuple=True)
    ok: dict[tuple[int, int], bool] = {}
    for r, k, good in zip(where.tolist(), rows.block[where, columns].tolist(), right.tolist(), strict=True):
        ok[r, k] = ok.get((r, k), True) and good
    return [(rows.questions[r][k], v) for (r, k), v in ok.items()]
