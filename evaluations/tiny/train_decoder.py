"""Stage 2: the projector and the language model, on cached features of the frozen tower.

Every step keeps a drawn number of visual tokens, at their original positions: sometimes all 576, sometimes a random
few, sometimes those of the objects and some more. A decoder that has only seen all 576 falls apart when tokens leave.

    python -m evaluations.tiny.train_decoder --minutes 40 --out work/decoder.safetensors
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..worlds import Scene, make_scene, render_many
from .model import build_models, encode, load_state, pixels, save_models, save_state
from .packing import PATCHES, Packer, answer_loss, gather, keep_all, keep_oracle, keep_random, looks_of, per_question
from .train_encoder import Heads, optimizers, set_rate

ASKED = (
    "colour", "shape", "existence", "existence", "counting", "counting", "counting", "location", "relation", "relation",
    "relation", "reading",
)  # fmt: skip
COMPACT = 0.35  # share of the rows whose survivors are numbered anew, as methods that splice the sequence do


@torch.no_grad()
def cache_features(vision: nn.Module, seeds: range, split: str, workers: int = 2) -> Tensor:
    """What the projector sees, (N, 576, width) in bfloat16."""
    out = []
    for at in range(seeds.start, seeds.stop, 500):
        pictures = render_many(range(at, min(at + 500, seeds.stop)), split, workers=workers)
        for i in range(0, len(pictures), 25):
            with torch.autocast("cpu", torch.bfloat16):
                states = encode(vision, pixels(pictures[i : i + 25]))
            out.append(states[-2][:, 1:].bfloat16())
    return torch.cat(out)


def draw_kept(scenes: list[Scene], rng: np.random.Generator, full: float, easy: bool = False) -> np.ndarray:
    """The visual tokens of a training step, (B, K): one K for the batch, drawn anew each time."""
    if rng.random() < full:
        return np.tile(np.arange(PATCHES), (len(scenes), 1))
    if easy:  # every object, and hardly anything else: the quickest way to learn to look things up
        k = int(rng.integers(56, 76))
        return np.stack([keep_oracle(k)(s, (), rng) for s in scenes])
    k = int(rng.integers(24, 64)) if rng.random() < 0.3 else int(rng.integers(64, 144))
    share = 0.6 if k >= 64 else 0.25  # of the rows that keep every object: with few tokens they would not fit
    pick = [keep_oracle(k) if rng.random() < share else keep_random(k) for _ in scenes]
    return np.stack([f(s, (), rng) for f, s in zip(pick, scenes, strict=True)])


@torch.no_grad()
def score(llava: nn.Module, scenes: list[Scene], features: Tensor, packer: Packer, select, per: int = 8,
          types: tuple[str, ...] | None = None, batch: int = 25, compact: bool = False) -> dict[str, float]:  # fmt: skip
    """Exact-match accuracy per question type, and "all" over every type but reading."""
    rng = np.random.default_rng(5)
    hits: dict[str, list[bool]] = defaultdict(list)
    for i in range(0, len(scenes), batch):
        some = scenes[i : i + batch]
        asked = [s.questions(per, **({"types": types} if types else {}), salt=99) for s in some]
        use = [j for j, a in enumerate(asked) if a]
        kept = torch.from_numpy(np.stack([select(some[j], asked[j], rng) for j in use]))
        packed = packer.pack([asked[j] for j in use])
        with torch.autocast("cpu", torch.bfloat16):
            visual = llava.model.multi_modal_projector(gather(features[i : i + batch][use], kept).float())
            _, right, _ = answer_loss(llava, packed, visual, kept, torch.full((len(use),), compact))
        for q, ok in per_question(packed, right):
            hits[q.type].append(ok)
    every = [ok for t, v in hits.items() if t != "reading" for ok in v]
    return {
        **{t: float(np.mean(v)) for t, v in sorted(hits.items())},
        "all": float(np.mean(every)),
    }


def train(args: argparse.Namespace) -> None:
    llava, clip = build_models(args.seed)
    heads, packer = Heads(), Packer()
    modules: dict[str, nn.Module] = {"llava": llava, "clip": clip, "heads": heads}
    out = Path(args.out)
    source = out if out.exists() and not args.fresh else Path(args.encoder)
    load_state(modules, source)
    print("starting from", source, flush=True)
    t0 = time.time()
    val = [make_scene(s, "val") for s in range(args.val)]
    val_features = cache_features(llava.model.vision_tower, range(args.val), "val", workers=0)
    scenes = [make_scene(s) for s in range(args.first_picture, args.first_picture + args.pictures)]
    features = torch.zeros(args.pictures, PATCHES, val_features.shape[-1], dtype=torch.bfloat16)
    have = min(args.at_first, args.pictures)
    new = range(args.first_picture, args.first_picture + have)
    features[:have] = cache_features(llava.model.vision_tower, new, "train", workers=0)
    print(f"cached {have} pictures in {time.time() - t0:.0f} s", flush=True)
    opts = optimizers(
        [llava.model.multi_modal_projector, llava.model.language_model],
        args.muon_lr,
        args.adam_lr,
    )
    params = [p for o in opts for g in o.param_groups for p in g["params"]]
    rng = np.random.default_rng(args.seed + args.first_step)
    log = out.with_suffix(".csv")
    best, step, saved, start = 0.0, 0, time.time(), time.time()
    run: dict[str, list[bool]] = defaultdict(list)
    order: list[int] = []
    while (used := (time.time() - start) / 60) < args.minutes:
        done = used / args.minutes
        full = used >= args.easy and rng.random() < args.full
        n = args.batch // 4 if full else args.batch
        while len(order) < n:
            order += rng.permutation(have).tolist()
        take = [order.pop() for _ in range(n)]
        some = [scenes[i] for i in take]
        asked = [s.questions(args.questions, types=ASKED, salt=100 + args.first_step + step) for s in some]
        easy = used < args.easy
        kept = torch.from_numpy(draw_kept(some, rng, 1.0 if full else 0.0, easy))
        packed = packer.pack(asked)
        set_rate(
            opts,
            min(1, (step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done)),
        )
        with torch.autocast("cpu", torch.bfloat16):
            visual = llava.model.multi_modal_projector(gather(features[take], kept).float())
            looks = looks_of(packed, some, kept) if args.look_weight and not full else None
            compact = torch.from_numpy(rng.random(n) < COMPACT)
            loss, right, surprise = answer_loss(llava, packed, visual, kept, compact, looks)
            total = loss if surprise is None else loss + args.look_weight * surprise
        for o in opts:
            o.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o in opts:
            o.step()
        for q, ok in per_question(packed, right):
            run[q.type].append(ok)
        if step % 25 == 24:
            row = {"step": step, "minutes": round(used, 2), "loss": round(loss.item(), 3)}
            if surprise is not None:
                row["look"] = round(surprise.item(), 3)
            row |= {t: round(float(np.mean(v)), 3) for t, v in sorted(run.items())}
            run.clear()
            print(row, flush=True)
        if time.time() - saved > args.every * 60:
            result = score(llava, val, val_features, packer, keep_all)
            oracle = score(llava, val, val_features, packer, keep_oracle(64))
            few = score(llava, val, val_features, packer, keep_random(64))
            anew = score(llava, val, val_features, packer, keep_oracle(64), compact=True)
            row = {"step": step, "minutes": round(used, 2), **{t: round(v, 3) for t, v in result.items()}}
            for name, found in (("oracle64", oracle), ("random64", few), ("oracle64_compact", anew)):
                row[name] = round(found["all"], 3)
            print("VAL", row, flush=True)
            first = not log.exists()
            with log.open("a", newline="") as f:
                writer = csv.DictWriter(f, list(row))
                if first:
                    writer.writeheader()
                writer.writerow(row)
            save_state(modules, out, step=step)
            if result["all"] > best:
                best = result["all"]
                save_models(llava, clip)
            saved = time.time()
        if have < args.pictures and step % 10 == 9:  # the cache grows while the decoder learns
            more = range(have, min(have + args.grow, args.pictures))
            new = range(args.first_picture + more.start, args.first_picture + more.stop)
            features[more.start : more.stop] = cache_features(llava.model.vision_tower, new, "train", workers=0)
            order += [i for i in more for _ in range(2)]
            have = more.stop
        step += 1
    save_state(modules, out, step=step)
    save_models(llava, clip)
    for name, select in (
        ("full", keep_all),
        ("oracle64", keep_oracle(64)),
        ("random64", keep_random(64)),
    ):
        print(
            name,
            {t: round(v, 3) for t, v in score(llava, val, val_features, packer, select).items()},
            flush=True,
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=40)
    p.add_argument("--encoder", default="work/encoder.safetensors")
    p.add_argument("--out", default="work/decoder.safetensors")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--first-step",
        type=int,
        default=0,
        help="give another number when resuming: fresh questions",
    )
    p.add_argument("--pictures", type=int, default=6000)
    p.add_argument("--at-first", type=int, default=1000, help="pictures cached before the first step")
    p.add_argument("--grow", type=int, default=25, help="pictures added to the cache every ten steps")
    p.add_argument("--first-picture", type=int, default=0, help="give another number when resuming: fresh pictures")
    p.add_argument("--val", type=int, default=120)
    p.add_argument("--batch", type=int, default=48)
    p.add_argument("--questions", type=int, default=7)
    p.add_argument("--full", type=float, default=0.15, help="share of the steps on all 576 tokens")
    p.add_argument("--easy", type=float, default=8, help="minutes at first that keep all objects and little else")
    p.add_argument("--look-weight", type=float, default=0.1, help="weight of the two heads' looking where asked")
    p.add_argument("--every", type=float, default=4, help="minutes between validations")
    p.add_argument("--muon-lr", type=float, default=2e-3)
    p.add_argument("--adam-lr", type=float, default=1e-3)
    p.add_argument("--fresh", action="store_true")
    train(p.parse_args())


if __name__ == "__main__":
    main()
