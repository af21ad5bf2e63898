"""The video model: tiny-llava's projector and decoder go on learning, on clips whose frames get unequal shares.

The tower stays as it is but for its last block, which no feature comes from and the class token alone leaves by; `video_scorer`
teaches that one to tell which frame shows what a text names. Frames are cached; each row gets a plan of its own, as QuoTA
makes them (see `draw_plan`).

    python -m evaluations.tiny.train_video --minutes 40 --out work/video.safetensors
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from vtprune.quota import Plan, plan

from ..worlds import CLIP_TYPES, NEEDLE_TYPES, Clip, ClipQuestion
from .model import load_llava
from .train_encoder import optimizers, set_rate
from .video_model import build_video_model, load_state, save_state, save_video
from .video_packing import NATIVE, Seen, TimeHeads, VideoPacker, even, fixed, per_question, sampled, see, true

ASKED = (*CLIP_TYPES, "order", "order", "order", "counting", "counting")
Planner = Callable[[Clip, ClipQuestion], Plan]


def draw_budget(rng: np.random.Generator) -> int:
    """Visual tokens of a step: most are short, as they cost less."""
    if rng.random() < 0.75:
        return int(rng.integers(100, 220))
    return int(rng.integers(220, 560))


def draw_focus(clip: Clip, rng: np.random.Generator) -> list[int]:
    """The needles that a row's plan and questions are about."""
    needles = list(clip.needles)
    if rng.random() < 0.5:
        return needles
    return [needles[i] for i in rng.permutation(len(needles))[: int(rng.integers(1, len(needles) + 1))]]


def draw_plan(clip: Clip, focus: Sequence[int], budget: int, rng: np.random.Generator) -> tuple[Plan, bool]:
    """One of the ways to spend a budget on a clip, and whether it knew what is asked; about a third do not."""
    frames = clip.count
    relevant = np.zeros(frames, dtype=bool)
    relevant[[t for i in focus for t in clip.actors[i].frames]] = True
    way = rng.random()
    if way < 0.12:
        return even(frames, budget), False
    if way < 0.3:  # the model's own grid on few frames, in half of the rows those that matter among them
        fit = min(frames, max(1, budget // 36))
        chosen = np.linspace(0, frames - 1, fit).round().astype(int)
        knowing = rng.random() < 0.6
        if knowing:
            chosen = np.argsort(-(relevant + rng.random(frames)))[:fit]
        return fixed(frames, chosen.tolist()), knowing and fit >= relevant.sum()
    if way < 0.45:  # what a scorer says that has nothing to go by
        scores = rng.random(frames) ** rng.uniform(1, 6)
    elif way < 0.6:  # an oracle's
        scores = relevant.astype(float)
    else:  # a scorer's, with misses and false alarms
        scores = np.where(relevant, rng.uniform(0.5, 1, frames), rng.uniform(0, rng.uniform(0.05, 0.6), frames))
        loud = rng.random(frames) < 0.06
        scores[loud] = rng.uniform(0.4, 1, int(loud.sum()))
    return plan(scores, budget, NATIVE, power=float(rng.choice((1.0, 2.0, 2.0, 3.0)))), way >= 0.45


def draw_questions(
    clip: Clip, focus: Sequence[int], knowing: bool, count: int, salt: int, rng: np.random.Generator
) -> list[ClipQuestion]:
    """Mostly such as the plan can serve; orders and counts would be guesses where it knew nothing."""
    asked = clip.questions(18, ASKED if knowing else (*NEEDLE_TYPES, "static"), salt)
    good = [q for q in asked if q.type == "static" or set(q.actors) <= set(focus) or rng.random() < 0.12]
    return (good or asked)[:count]


@torch.no_grad()
def score(model, packer: VideoPacker, clips: Sequence[Seen], planner: Planner, per: int = 8, batch: int = 12,
          types: Sequence[str] = CLIP_TYPES, salt: int = 99) -> dict[str, float]:  # fmt: skip
    """Exact-match accuracy per question type, over the needle's own types ("needle") and over all ("all")."""
    rows: list[tuple[Seen, Plan, list[ClipQuestion]]] = []
    for seen in clips:
        groups: dict[tuple, tuple[Plan, list[ClipQuestion]]] = {}
        for q in seen.clip.questions(per, types, salt):
            wanted = planner(seen.clip, q)
            groups.setdefault((wanted.grids,), (wanted, []))[1].append(q)
        rows += [(seen, wanted, asked) for wanted, asked in groups.values()]
    rows.sort(key=lambda row: row[1].tokens)
    hits: dict[str, list[bool]] = defaultdict(list)
    for i in range(0, len(rows), batch):
        seen, plans, asked = zip(*rows[i : i + batch], strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            packed = packer.rows(model, seen, plans, asked)
            _, right, _, _ = packer.loss(model, packed)
        for q, ok in per_question(packed, right):
            hits[q.type].append(ok)
    found = {t: float(np.mean(v)) for t, v in sorted(hits.items())}
    found["needle"] = float(np.mean([ok for t in NEEDLE_TYPES for ok in hits[t]]))
    return found | {"all": float(np.mean([ok for v in hits.values() for ok in v]))}


def planners(budget: int) -> dict[str, Planner]:
    """The ways that validation compares."""
    return {
        f"sampled {budget}": lambda clip, q: sampled(clip.count, budget),
        f"even {budget}": lambda clip, q: even(clip.count, budget),
        f"true {budget}": lambda clip, q: true(clip.count, budget, q.frames),
    }


def validate(model, packer: VideoPacker, clips: Sequence[Seen], budgets: Sequence[int]) -> dict[str, dict[str, float]]:
    named = {name: how for budget in budgets for name, how in planners(budget).items()}
    return {name: score(model, packer, clips, how) for name, how in named.items()}


def train(args: argparse.Namespace) -> None:
    model, packer, out = build_video_model(load_llava(), args.seed), VideoPacker(), Path(args.out)
    heads = TimeHeads()
    if out.exists() and not args.fresh:
        load_state(out, video=model)
        if out.with_suffix(".heads.safetensors").exists():
            load_state(out.with_suffix(".heads.safetensors"), heads=heads)
        print("starting from", out, flush=True)
    vision = model.model.vision_tower.eval()
    vision.set_attn_implementation("eager")  # faster than the fused kernel on processors, at 145 tokens
    val = [s for frames in (32, 48, 64) for s in see(vision, range(args.val // 3), "val", frames)]
    start, have = time.time(), args.at_first
    clips = see(vision, range(args.first_clip, args.first_clip + have), "train")
    print(f"cached {have} clips in {time.time() - start:.0f} s", flush=True)
    opts = optimizers([model.model.multi_modal_projector, model.model.language_model], args.muon_lr, args.adam_lr)
    opts[1].add_param_group({"params": [model.model.image_newline, *heads.parameters()]})
    params = [p for o in opts for g in o.param_groups for p in g["params"]]
    rng = np.random.default_rng([args.seed, args.first_clip])
    log, step, order = out.with_suffix(".csv"), 0, []
    saved = start = time.time()
    run: dict[str, list[bool]] = defaultdict(list)
    while (used := (time.time() - start) / 60) < args.minutes:
        budget = draw_budget(rng)
        n = max(4, args.tokens // (budget + 100))
        whole = rng.random() < args.whole  # as the model does it without pruning
        if whole:
            n = 4
        while len(order) < n:
            order += rng.permutation(have).tolist()
        some = [clips[order.pop()] for _ in range(n)]
        focus = [draw_focus(s.clip, rng) for s in some]
        if whole:
            drawn = [(sampled(s.clip.count, 36 * 32), s.clip.count <= 32) for s in some]
        else:
            drawn = [draw_plan(s.clip, f, budget, rng) for s, f in zip(some, focus, strict=True)]
        plans = [wanted for wanted, _ in drawn]
        asked = [draw_questions(s.clip, f, knowing, args.questions, 100 + step, rng)
                 for s, f, (_, knowing) in zip(some, focus, drawn, strict=True)]  # fmt: skip
        set_rate(opts, min(1, (step + 1) / 15) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * used / args.minutes)))
        with torch.autocast("cpu", torch.bfloat16):
            rows = packer.rows(model, some, plans, asked)
            loss, right, surprise, told = packer.loss(model, rows, heads)
            total = loss + args.time_weight * told
            total = total if surprise is None else total + args.look_weight * surprise
        for o in opts:
            o.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o in opts:
            o.step()
        for q, ok in per_question(rows, right):
            run[q.type].append(ok)
        if step % 20 == 19:
            row = {"step": step, "minutes": round(used, 2), "clips": have}
            row |= {"loss": round(loss.item(), 3), "time": round(told.item(), 3)}
            print(row | {t: round(float(np.mean(v)), 3) for t, v in sorted(run.items())}, flush=True)
            run.clear()
        if have < args.clips and step % 5 == 4:  # the cache grows while the decoder learns
            new = min(args.grow, args.clips - have)
            clips += see(vision, range(args.first_clip + have, args.first_clip + have + new), "train")
            order += list(range(have, have + new)) * 2
            have += new
        if time.time() - saved > args.every * 60:
            save_state(out, video=model)
            save_state(out.with_suffix(".heads.safetensors"), heads=heads)
            save_video(model, Path(args.folder))
            checked = {} if args.no_validation else validate(model, packer, val, (256,))
            for name, found in checked.items():
                row = {"step": step, "minutes": round(used, 2), "plan": name, **{t: round(v, 3) for t, v in found.items()}}
                print("VAL", row, flush=True)
                first = not log.exists()
                with log.open("a", newline="") as f:
                    writer = csv.DictWriter(f, list(row))
                    if first:
                        writer.writeheader()
                    writer.writerow(row)
            saved = time.time()
        step += 1
    save_state(out, video=model)
    save_state(out.with_suffix(".heads.safetensors"), heads=heads)
    save_video(model, Path(args.folder))
    for name, found in ({} if args.no_validation else validate(model, packer, val, (256, 512))).items():
        print(name, {t: round(v, 3) for t, v in found.items()}, flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=40)
    p.add_argument("--out", default="work/video.safetensors")
    p.add_argument("--folder", default="assets/tiny-video", help="where the checkpoint goes, at every save")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--clips", type=int, default=4000)
    p.add_argument("--at-first", type=int, default=300, help="clips cached before the first step")
    p.add_argument("--grow", type=int, default=10, help="clips added to the cache every five steps")
    p.add_argument("--first-clip", type=int, default=0, help="give another number when resuming: fresh clips and plans")
    p.add_argument("--val", type=int, default=36)
    p.add_argument("--tokens", type=int, default=8000, help="tokens in a step, questions included")
    p.add_argument("--questions", type=int, default=7)
    p.add_argument("--whole", type=float, default=0.05, help="share of the steps on up to 32 frames as the model pools them")
    p.add_argument("--look-weight", type=float, default=0.2, help="weight of the two heads' looking where asked")
    p.add_argument("--time-weight", type=float, default=0.5, help="weight of what visual tokens tell of what came before")
    p.add_argument("--no-validation", action="store_true", help="only save on the way")
    p.add_argument("--every", type=float, default=5, help="minutes between validations")
    p.add_argument("--muon-lr", type=float, default=1.5e-3)
    p.add_argument("--adam-lr", type=float, default=7e-4)
    p.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    train(p.parse_args())


if __name__ == "__main__":
    main()
