"""The video model's last vision block, taught to tell by its class token which frame shows what a text names.

No visual token comes out of that block (the features are those of the one before), and tiny-llava's text tower stays as it
is, so `ClipBackend.embedded(model.model.vision_tower)` is all that changes.

    python -m evaluations.tiny.video_scorer --minutes 4 --out work/video.safetensors
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.quota import ClipBackend

from ..worlds import COLORS, SHAPES
from ..worlds.clips import CLIP_PHRASES
from .model import load_llava
from .video_model import build_video_model, load_scorer, load_state, save_state
from .video_packing import Seen, see

ASKED = ("colour", "location")
Text = tuple[str, str | None, str | None]


def texts() -> list[Text]:
    """(text, colour or None, shape or None): names as a scorer gets them, and questions."""
    named = [(f"{c} {s}", c, s) for c in COLORS for s in SHAPES]
    named += [(f"{c} object", c, None) for c in COLORS] + [(s, None, s) for s in SHAPES]
    asked = [(p.format(r=s), None, s) for kind in ASKED for p in CLIP_PHRASES[kind] for s in SHAPES]
    asked += [(p.format(r=n), c, s) for p in CLIP_PHRASES["existence"][:2] for n, c, s in named[: len(COLORS) * len(SHAPES)]]
    return [*named, *((f"a {n}", c, s) for n, c, s in named), *asked]


def shows(seen: Seen, wanted: list[Text]) -> Tensor:
    """(D, texts) 0 or 1: does each of the clip's different frames show what the text names?"""
    rows = []
    for d in range(len(seen.states)):
        objects = seen.clip.scene(int((seen.which == d).argmax())).objects
        rows.append([any((c is None or o.color == c) and (s is None or o.shape == s) for o in objects) for _, c, s in wanted])
    return torch.tensor(rows).float()


def class_token(vision: nn.Module, states: Tensor) -> Tensor:
    """What the tower pools, (N, width), off the states before its last block: only the class token's row of it."""
    block = vision.encoder.layers[-1]
    att = block.self_attn
    x = block.layer_norm1(states)
    heads = (len(x), -1, att.num_heads, att.head_dim)
    q = att.q_proj(x[:, :1]).view(heads).transpose(1, 2)
    k, v = (f(x).view(heads).transpose(1, 2) for f in (att.k_proj, att.v_proj))
    mixed = ((q @ k.transpose(-1, -2) * att.scale).softmax(-1) @ v).transpose(1, 2).reshape(len(x), -1)
    first = states[:, 0] + att.out_proj(mixed)
    return vision.post_layernorm(first + block.mlp(block.layer_norm2(first)))


@torch.no_grad()
def found(clip: nn.Module, seen: list[Seen], words: Tensor, wanted: list[Text]) -> dict[str, float]:
    """For names of needles, by form: how often the best frame shows it, and its frames' share of the squared min-max score."""
    index = {text: n for n, (text, _, _) in enumerate(wanted)}
    forms = ("{s}", "{c} {s}", "a {s}", "{c} object", "What color is the {s}?")
    out: dict[str, list[float]] = {}
    for one in seen:
        seen_as = F.normalize(clip.visual_projection(class_token(clip.vision_model, one.states.float())), dim=-1)
        near = (seen_as @ words.T)[torch.from_numpy(one.which)]
        for actor in (one.clip.actors[i] for i in one.clip.needles):
            for form in forms:
                s = near[:, index[form.format(c=actor.color, s=actor.shape)]]
                p = ((s - s.min()) / (s.max() - s.min())) ** 2
                out.setdefault(form, []).append(float(int(s.argmax()) in actor.frames))
                out.setdefault(form + " share", []).append(float(p[list(actor.frames)].sum() / p.sum()))
    return {k: round(float(np.mean(v)), 3) for k, v in out.items()}


def train(args: argparse.Namespace) -> None:
    model, out = build_video_model(load_llava()), Path(args.out)
    if out.exists():
        load_state(out, video=model)
        print("starting from", out, flush=True)
    clip = load_scorer(model)
    vision = clip.vision_model
    vision.set_attn_implementation("eager")
    clip.requires_grad_(False)
    learn = [vision.encoder.layers[-1], vision.post_layernorm]
    for module in learn:
        module.requires_grad_(True)
    params = [p for m in learn for p in m.parameters()]
    level = nn.Parameter(torch.tensor([3.0, -2.0]))  # log of the scale, and the bias, of the loss only
    opt = torch.optim.AdamW([{"params": params}, {"params": [level], "lr": 10 * args.lr}], lr=args.lr, weight_decay=0.01)
    rates = [group["lr"] for group in opt.param_groups]
    wanted = texts()
    backend = ClipBackend.embedded(vision)
    with torch.no_grad():
        words = F.normalize(backend.texts([text for text, _, _ in wanted]), dim=-1)
    val = see(vision, range(args.val), "val")
    seen = see(vision, range(args.first_clip, args.first_clip + args.clips), "train")
    states, truth = torch.cat([s.states for s in seen]), torch.cat([shows(s, wanted) for s in seen])
    print(len(states), "frames,", len(wanted), "texts; before:", found(clip, val, words, wanted), flush=True)
    rng, step, start = np.random.default_rng(args.first_clip), 0, time.time()
    while (done := (time.time() - start) / 60 / args.minutes) < 1:
        rate = min(1, (step + 1) / 10) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        for group, first in zip(opt.param_groups, rates, strict=True):
            group["lr"] = first * rate
        take = torch.from_numpy(rng.choice(len(states), args.batch, replace=False))
        with torch.autocast("cpu", torch.bfloat16):
            pooled = class_token(vision, states[take].float())
        near = F.normalize(clip.visual_projection(pooled.float()), dim=-1) @ words.T
        y = truth[take]
        each = F.binary_cross_entropy_with_logits(level[0].exp() * near + level[1], y, reduction="none")
        # what is there weighs as much as the many things that are not
        loss = (each * y).sum() / y.sum() + (each * (1 - y)).sum() / (1 - y).sum()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        if step % 20 == 0:
            print({"step": step, "done": round(done, 2), "loss": round(loss.item(), 3), "scale": level.tolist()}, flush=True)
        step += 1
    print("after", step, "steps:", found(clip, val, words, wanted), flush=True)
    save_state(out, video=model)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=4)
    p.add_argument("--out", default="work/video.safetensors")
    p.add_argument("--clips", type=int, default=250)
    p.add_argument("--first-clip", type=int, default=50_000)
    p.add_argument("--val", type=int, default=40)
    p.add_argument("--batch", type=int, default=96)
    p.add_argument("--lr", type=float, default=1e-3)
    train(p.parse_args())


if __name__ == "__main__":
    main()
