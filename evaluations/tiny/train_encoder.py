"""Stage 1: the vision tower, taught patch by patch and, through its CLS token, with captions.

The dense labels go through LLaVA's projector and are scored against the language model's own word embeddings (the
patch of a red ring must point at "red" and "ring"), so the decoder starts with features it can already read. The first
steps see small grids packed with objects, laid anywhere on the raster; the last ones whole pictures.

    python -m evaluations.tiny.train_encoder --minutes 50 --out work/encoder.safetensors
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..worlds import COLORS, GRID, SHAPES, Scene, make_scene
from .model import (
    EOS,
    PAD,
    TEXT_LENGTH,
    WIDTH,
    build_models,
    build_tokenizer,
    encode,
    load_state,
    pixels,
    save_state,
)

PLACES = ("left", "right", "top", "bottom")
COMBOS = [(c, s) for c in COLORS for s in SHAPES]


class Heads(nn.Module):
    """What only training needs: a word for "nothing here", the parts of an object, letters, and the CLS's list."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.corner = nn.Linear(WIDTH, 3)  # not an object, its first patch, another of its patches
        self.cell = nn.Linear(WIDTH, 3 * 25)  # which patch of an object of which size
        self.letter = nn.Linear(WIDTH, 27)
        self.place = nn.Linear(WIDTH, 2)
        self.listed = nn.ModuleList([nn.Linear(WIDTH, len(COMBOS)) for _ in range(2)])


@dataclass
class Labels:
    """Per-patch and per-picture targets of a batch."""

    shape: Tensor
    color: Tensor
    corner: Tensor
    cell: Tensor
    letter: Tensor
    combos: Tensor
    xy: Tensor


def label(scenes: list[Scene], offset: tuple[int, int] = (0, 0)) -> Labels:
    grid = scenes[0].grid
    n = grid * grid
    shape = np.full((len(scenes), n), len(SHAPES))
    color = np.full((len(scenes), n), len(COLORS))
    corner, letter = np.zeros_like(shape), np.zeros_like(shape)
    cell = np.full_like(shape, -100)
    combos = np.zeros((len(scenes), len(COMBOS)), dtype=np.float32)
    names = list(COLORS)
    for b, scene in enumerate(scenes):
        for i, o in enumerate(scene.objects):
            where = scene.patches_of(i)
            shape[b, where] = SHAPES.index(o.shape)
            color[b, where] = names.index(o.color)
            corner[b, where] = 2
            corner[b, where[0]] = 1
            base = {2: 0, 3: 25, 5: 50}[o.side]
            for p in where:
                cell[b, p] = base + (p // grid - o.row) * 5 + p % grid - o.col
            combos[b, COMBOS.index((o.color, o.shape))] = 1
        if scene.word is not None:
            for k, p in enumerate(scene.word_patches()):
                letter[b, p] = 1 + ord(scene.word.text[k % len(scene.word.text)]) - ord("a")
    rows = (np.arange(n) // grid + offset[0] + 0.5) / GRID * 2 - 1
    cols = (np.arange(n) % grid + offset[1] + 0.5) / GRID * 2 - 1
    t = torch.from_numpy
    return Labels(t(shape), t(color), t(corner), t(cell), t(letter), t(combos),
                  t(np.stack([cols, rows], 1).astype(np.float32)))  # fmt: skip


class WordIds:
    """Token ids of the words the dense labels are scored against."""

    def __init__(self) -> None:
        tok = build_tokenizer()
        ids = tok.convert_tokens_to_ids
        self.shapes = torch.tensor(ids(list(SHAPES)))
        self.colors = torch.tensor(ids(list(COLORS)))
        self.places = torch.tensor(ids(list(PLACES)))
        self.tokenizer = tok

    def captions(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [[*self.tokenizer(t).input_ids[: TEXT_LENGTH - 1], EOS] for t in texts]
        width = max(map(len, rows))
        ids = torch.tensor([r + [PAD] * (width - len(r)) for r in rows])
        return ids, (ids != PAD).long()


def dense_loss(projected: Tensor, words: Tensor, heads: Heads, y: Labels, ids: WordIds) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropies over patches; objects and letters weigh as much as all the background does."""
    scale = WIDTH**-0.5
    x = F.layer_norm(projected, (WIDTH,))
    on = y.shape < len(SHAPES)
    shape = x @ torch.cat([words[ids.shapes], heads.nothing[:1]]).T * scale * 3
    color = x @ torch.cat([words[ids.colors], heads.nothing[1:]]).T * scale * 3
    place = x @ words[ids.places].T * scale * 3
    flat = lambda t: t.float().flatten(0, 1)
    w_s = torch.ones(len(SHAPES) + 1)
    w_s[-1] = 0.2
    w_c = torch.ones(len(COLORS) + 1)
    w_c[-1] = 0.2
    loss_s = F.cross_entropy(flat(shape), y.shape.flatten(), weight=w_s)
    loss_c = F.cross_entropy(flat(color), y.color.flatten(), weight=w_c)
    loss_o = F.cross_entropy(flat(heads.corner(x)), y.corner.flatten(), weight=torch.tensor([0.2, 1.5, 1.0]))
    cell = F.cross_entropy(flat(heads.cell(x)), y.cell.flatten(), ignore_index=-100)
    w_l = torch.ones(27)
    w_l[0] = 0.05
    loss_l = F.cross_entropy(flat(heads.letter(x)), y.letter.flatten(), weight=w_l)
    # "left" against "right" and "top" against "bottom": a soft target makes their difference grow with the coordinate.
    side = (place.unflatten(-1, (2, 2))[..., 1] - place.unflatten(-1, (2, 2))[..., 0]).float()
    loss_p = F.binary_cross_entropy_with_logits(side, (3 * y.xy).sigmoid().expand_as(side))
    loss_xy = F.mse_loss(heads.place(x).float(), y.xy.expand(len(x), -1, -1))
    with torch.no_grad():
        stats = {
            "shape": (shape.argmax(-1) == y.shape)[on].float().mean().item(),
            "colour": (color.argmax(-1) == y.color)[on].float().mean().item(),
            "empty": (shape.argmax(-1) == y.shape)[~on].float().mean().item(),
            "letter": (heads.letter(x).argmax(-1) == y.letter)[y.letter > 0].float().mean().item(),
            "cell": cell.item(),
            "xy": loss_xy.item(),
        }
    return (
        loss_s + loss_c + 0.7 * loss_o + 0.3 * cell + 0.7 * loss_l + loss_p + loss_xy,
        stats,
    )


def cls_loss(states: list[Tensor], clip: nn.Module, heads: Heads, y: Labels, scenes: list[Scene], ids: WordIds,
             rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """CLIP's loss on captions, and a list of what is in the picture asked of the CLS at both depths."""
    texts = [s.caption(rng, most=4) for s in scenes]
    t = clip.get_text_features(*ids.captions(texts))
    t = t if isinstance(t, Tensor) else t.pooler_output
    v = clip.visual_projection(clip.vision_model.post_layernorm(states[-1][:, 0]))
    t, v = F.normalize(t.float(), dim=-1), F.normalize(v.float(), dim=-1)
    logits = v @ t.T * clip.logit_scale.clamp(max=4.0).exp()
    target = torch.arange(len(v))
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    weight = torch.tensor(5.0)
    listed = sum(
        F.binary_cross_entropy_with_logits(head(F.layer_norm(s[:, 0], (WIDTH,))).float(), y.combos, pos_weight=weight)
        for head, s in zip(heads.listed, states[-len(heads.listed) :], strict=True)
    )
    return contrast + listed, {
        "contrast": contrast.item(),
        "match": (logits.argmax(1) == target).float().mean().item(),
        "listed": listed.item() / len(heads.listed),
    }


def optimizers(modules: list[nn.Module], muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms, biases and heads."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in modules:
        for name, p in module.named_parameters():
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            inner = ".layers." in f".{name}" or name.startswith("linear_")
            (matrices if p.ndim == 2 and inner else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def set_rate(opts: list[torch.optim.Optimizer], factor: float) -> None:
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group.setdefault("first_lr", group["lr"]) * factor


def train(args: argparse.Namespace) -> None:
    llava, clip = build_models(args.seed)
    heads, ids = Heads(), WordIds()
    vision, projector = llava.model.vision_tower, llava.model.multi_modal_projector
    words = llava.model.language_model.embed_tokens
    modules: dict[str, nn.Module] = {"llava": llava, "clip": clip, "heads": heads}
    out = Path(args.out)
    if out.exists() and not args.fresh:
        load_state(modules, out)
        print("resumed from", out, flush=True)
    opts = optimizers([vision, projector, words, heads, clip], args.muon_lr, args.adam_lr)
    params = [p for o in opts for g in o.param_groups for p in g["params"]]
    rng = np.random.default_rng(args.seed + 7919 * args.first_seed)
    log = out.with_suffix(".csv")
    start, saved, step, seed = time.time(), time.time(), 0, args.first_seed
    while (used := (time.time() - start) / 60) < args.minutes:
        done = used / args.minutes
        whole = done > args.whole_from or (step % 12 == 11)
        n = args.batch // 3 if whole else args.batch
        if whole:
            scenes = [make_scene(s, packed=None if s % 2 == 0 else 16) for s in range(seed, seed + n)]
            offset = (0, 0)
        else:
            packed = int(rng.integers(3, 8))
            scenes = [make_scene(s, grid=12, packed=packed) for s in range(seed, seed + n)]
            offset = (int(rng.integers(0, 13)), int(rng.integers(0, 13)))
        seed += n
        x = pixels(np.stack([s.array() for s in scenes]))
        y = label(scenes, offset)
        set_rate(
            opts,
            min(1, (step + 1) / 30) * max(0.03, 0.5 + 0.5 * math.cos(math.pi * done)),
        )
        with torch.autocast("cpu", torch.bfloat16):
            states = encode(vision, x, offset)
            dense, stats = dense_loss(projector(states[-2][:, 1:]), words.weight, heads, y, ids)
            cls, more = cls_loss(states, clip, heads, y, scenes, ids, rng)
            loss = dense + args.cls_weight * cls
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o in opts:
            o.step()
        if step % 20 == 0:
            row = {"step": step, "minutes": round(used, 2), "whole": int(whole), "loss": round(loss.item(), 4),
                   **{k: round(v, 4) for k, v in {**stats, **more}.items()}}  # fmt: skip
            first = not log.exists()
            with log.open("a", newline="") as f:
                writer = csv.DictWriter(f, list(row))
                if first:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
        if time.time() - saved > 150:
            save_state(modules, out, step=step, seed=seed)
            saved = time.time()
        step += 1
    save_state(modules, out, step=step, seed=seed)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=50)
    p.add_argument("--out", default="work/encoder.safetensors")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--first-seed",
        type=int,
        default=1_000_000,
        help="first picture; give another when resuming",
    )
    p.add_argument("--batch", type=int, default=72)
    p.add_argument("--muon-lr", type=float, default=2e-3)
    p.add_argument("--adam-lr", type=float, default=2e-3)
    p.add_argument("--cls-weight", type=float, default=0.5)
    p.add_argument(
        "--whole-from",
        type=float,
        default=0.6,
        help="share of the time after which only whole pictures",
    )
    p.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    train(p.parse_args())


if __name__ == "__main__":
    main()
