"""Many questions about one picture in one sequence, and how they are scored.

A row is ``<s> user : [visual tokens] [question 1 + answer] [question 2 + answer] ...``. Each question sees the picture
and itself, never its neighbours, and every question starts at the same position id, the one it has in a prompt of its
own. Visual tokens that were dropped leave a gap (those that stay keep the position ids of the full sequence) or, with
compact numbering, none (what stays is counted anew, the text after it too): a real model takes both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..worlds import GRID, Question, Scene
from .model import EOS, PAD, build_tokenizer

PATCHES = GRID * GRID
HEAD = ("<s>", "user", ":")
LOOK_LAYER = 3
Selection = Callable[[Scene, Sequence[Question], np.random.Generator], np.ndarray]


@dataclass
class Packed:
    """One batch: ids of the text, where it stands, who sees whom, and which predictions count."""

    head: Tensor  # (B, 3)
    text: Tensor  # (B, T)
    text_positions: Tensor  # (B, T)
    block: Tensor  # (B, T), the question's number, -1 for padding
    targets: Tensor  # (B, T), the next token where it is an answer's, else -100
    questions: list[list[Question]]


class Packer:
    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.head = self.tokenizer.convert_tokens_to_ids(list(HEAD))
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def pack(self, questions: list[list[Question]]) -> Packed:
        rows = []
        for asked in questions:
            text, pos, block, target = [], [], [], []
            for k, q in enumerate(asked):
                prompt, answer = (
                    self.ids(q.text + " ASSISTANT:"),
                    [*self.ids(q.answer), EOS],
                )
                ids = prompt + answer[:-1]
                text += ids
                pos += range(len(HEAD) + PATCHES, len(HEAD) + PATCHES + len(ids))
                block += [k] * len(ids)
                target += [-100] * (len(prompt) - 1) + answer
            rows.append((text, pos, block, target))
        width = max(len(r[0]) for r in rows)
        fills = (PAD, 0, -1, -100)
        text, pos, block, target = (torch.tensor([r[i] + [fills[i]] * (width - len(r[i])) for r in rows]) for i in range(4))
        head = torch.tensor(self.head).expand(len(rows), -1)
        return Packed(head, text, pos, block, target, questions)


def mask_of(packed: Packed, kept: int) -> Tensor:
    """(B, 1, L, L) boolean: causal, and a question's tokens do not see another question's."""
    b, t = packed.text.shape
    pre = packed.head.shape[1] + kept
    n = pre + t
    mask = torch.ones(n, n, dtype=torch.bool).tril().expand(b, n, n).clone()
    mask[:, pre:, pre:] &= packed.block[:, :, None] == packed.block[:, None, :]
    return mask[:, None]


def run_layer(layer: nn.Module, x: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """One Llama block as in HF, and its attention's scores where they were made.

    Written out because the fused CPU attention is five times slower than plain products on sequences this short.
    """
    att = layer.self_attn
    b, n, _ = x.shape
    h = layer.input_layernorm(x)
    q, k, v = (f(h).view(b, n, -1, att.head_dim).transpose(1, 2) for f in (att.q_proj, att.k_proj, att.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *rope)
    with torch.autocast("cpu", enabled=False):
        scores = None
        if n <= 400:
            scores = (q * att.scaling) @ k.transpose(-1, -2) + bias
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    x = x + att.o_proj(y.transpose(1, 2).reshape(b, n, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), scores


def answer_logits(
    llava: LlavaForConditionalGeneration,
    packed: Packed,
    visual: Tensor,
    kept: Tensor,
    compact: Tensor | None = None,
    looks: Looks | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and targets of the answers' tokens, (A, vocabulary) and (A,). ``visual`` is projected, (B, K, width).

    ``compact``, (B,) booleans, says which rows are numbered without gaps. With ``looks`` there is a third result: how
    surprising it is that two heads look, just before they answer, at the patches the question is about.
    """
    lm = llava.model.language_model
    n_head = packed.head.shape[1]
    x = torch.cat([lm.embed_tokens(packed.head), visual.float(), lm.embed_tokens(packed.text)], 1)
    places, after = kept, packed.text_positions
    if compact is not None:
        places = torch.where(compact[:, None], torch.arange(kept.shape[1]), kept)
        after = after - compact[:, None].long() * (PATCHES - kept.shape[1])
    positions = torch.cat([torch.arange(n_head).expand(len(kept), -1), n_head + places, after], 1)
    kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    bias = torch.zeros(mask_of(packed, kept.shape[1]).shape, dtype=kind)
    bias.masked_fill_(~mask_of(packed, kept.shape[1]), -1e9)
    rope = tuple(t.to(kind) for t in lm.rotary_emb(x, positions))
    surprise = None
    for n, layer in enumerate(lm.layers):
        x, scores = run_layer(layer, x, bias, rope)
        if looks is not None and n == LOOK_LAYER and scores is not None and len(looks.row):
            own = scores[looks.row, :2, n_head + kept.shape[1] + looks.column].float().log_softmax(-1)
            own = own[..., n_head : n_head + kept.shape[1]]
            surprise = -own.masked_fill(~looks.patches, -1e9).logsumexp(-1).mean()
    x = x[:, n_head + kept.shape[1] :]
    on = packed.targets != -100
    return llava.lm_head(lm.norm(x[on])), packed.targets[on], surprise


@dataclass
class Looks:
    """Where two heads should look: for each question (row, column of its last token) the patches, (N, 2, K)."""

    row: Tensor
    column: Tensor
    patches: Tensor


def looks_of(packed: Packed, scenes: list[Scene], kept: Tensor) -> Looks:
    """The first head at the first thing asked about, the second at the second; at all of them when they are counted."""
    rows, columns, patches = [], [], []
    start = (packed.targets != -100) & (packed.targets.roll(1, 1) == -100)
    for r, (scene, asked) in enumerate(zip(scenes, packed.questions, strict=True)):
        owner = np.full(PATCHES, -2)
        for i in range(-1, len(scene.objects)):
            owner[scene.patches_of(i)] = i
        here = owner[kept[r].numpy()]
        first = start[r].nonzero()[:, 0].tolist()
        for q, column in zip(asked, first, strict=True):
            if q.type == "existence" and q.answer == "no":
                continue
            pair = (q.about[:1], q.about[1:]) if q.type == "relation" else (q.about, q.about)
            want = np.stack([np.isin(here, a) for a in pair])
            if want.any(1).all():
                rows.append(r)
                columns.append(column)
                patches.append(want)
    found = np.stack(patches) if patches else np.zeros((0, 2, kept.shape[1]), dtype=bool)
    return Looks(torch.tensor(rows), torch.tensor(columns), torch.from_numpy(found))


def gather(features: Tensor, kept: Tensor) -> Tensor:
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


def answer_loss(
    llava: LlavaForConditionalGeneration,
    packed: Packed,
    visual: Tensor,
    kept: Tensor,
    compact: Tensor | None = None,
    looks: Looks | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mean loss over answer tokens, which of them are right, and the heads' surprise (see ``answer_logits``)."""
    logits, targets, surprise = answer_logits(llava, packed, visual, kept, compact, looks)
    return F.cross_entropy(logits.float(), targets), (logits.argmax(-1) == targets), surprise


def per_question(packed: Packed, right: Tensor) -> list[tuple[Question, bool]]:
    """Whether each question is answered in full, its end included: just what greedy generation would give."""
    on = packed.targets != -100
    rows, cols = on.nonzero(as_tuple=True)
    ok: dict[tuple[int, int], bool] = defaultdict(lambda: True)
    for r, k, good in zip(rows.tolist(), packed.block[rows, cols].tolist(), right.tolist(), strict=True):
        ok[r, k] &= good
    return [(packed.questions[r][k], v) for (r, k), v in ok.items()]


# -- which visual tokens stay --------------------------------------------------------------------------------------
def keep_all(scene: Scene, questions: Sequence[Question], rng: np.random.Generator) -> np.ndarray:
    return np.arange(PATCHES)


def keep_random(k: int) -> Selection:
    def select(scene: Scene, questions: Sequence[Question], rng: np.random.Generator) -> np.ndarray:
        return np.sort(rng.choice(PATCHES, k, replace=False))

    return select


def keep_oracle(k: int) -> Selection:
    """The objects' own patches (for a reading question the word's first), then chance."""

    def select(scene: Scene, questions: Sequence[Question], rng: np.random.Generator) -> np.ndarray:
        objects, word = scene.object_patches(), scene.word_patches()
        reading = bool(questions) and all(q.type == "reading" for q in questions)
        first = word + objects if reading else objects + word
        rest = np.setdiff1d(np.arange(PATCHES), first)
        rng.shuffle(rest)
        return np.sort(np.asarray([*first, *rest])[:k].astype(int))

    return select
