"""Stage 3: everything unfrozen, on fresh pictures; the dense labels and the CLS token's losses stay on.

python -m evaluations.tiny.joint --minutes 20 --out work/joint.safetensors
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
from torch import nn

from ..worlds import make_scene
from .model import build_models, encode, load_state, pixels, save_models, save_state
from .packing import (
    Packer,
    answer_loss,
    gather,
    keep_all,
    keep_oracle,
    keep_random,
    per_question,
)
from .train_decoder import ASKED, COMPACT, cache_features, draw_kept, score
from .train_encoder import (
    Heads,
    WordIds,
    cls_loss,
    dense_loss,
    label,
    optimizers,
    set_rate,
)


def train(args: argparse.Namespace) -> None:
    llava, clip = build_models(args.seed)
    heads, packer, ids = Heads(), Packer(), WordIds()
    modules: dict[str, nn.Module] = {"llava": llava, "clip": clip, "heads": heads}
    out = Path(args.out)
    source = out if out.exists() and not args.fresh else Path(args.decoder)
    load_state(modules, source)
    print("starting from", source, flush=True)
    vision, projector = llava.model.vision_tower, llava.model.multi_modal_projector
    words = llava.model.language_model.embed_tokens
    opts = optimizers([llava.model, heads, clip], args.muon_lr, args.adam_lr)
    params = [p for o in opts for g in o.param_groups for p in g["params"]]
    rng = np.random.default_rng(args.seed + args.first_seed)
    log = out.with_suffix(".csv")
    val = [make_scene(s, "val") for s in range(args.val)]
    step, seed, best, start = 0, args.first_seed, 0.0, time.time()
    saved = start
    run: dict[str, list[bool]] = defaultdict(list)

    def validate(used: float) -> None:
        nonlocal best
        features = cache_features(vision, range(args.val), "val", workers=0)
        result = score(llava, val, features, packer, keep_all)
        row = {
            "step": step,
            "minutes": round(used, 2),
            **{t: round(v, 3) for t, v in result.items()},
        }
        for name, select in (
            ("oracle64", keep_oracle(64)),
            ("random64", keep_random(64)),
        ):
            row[name] = round(score(llava, val, features, packer, select)["all"], 3)
        print("VAL", row, flush=True)
        first = not log.exists()
        with log.open("a", newline="") as f:
            writer = csv.DictWriter(f, list(row))
            if first:
                writer.writeheader()
            writer.writerow(row)
        save_state(modules, out, step=step, seed=seed)
        if result["all"] > best:
            best = result["all"]
            save_models(llava, clip)

    validate(0.0)  # what there is may be better than what comes
    while (used := (time.time() - start) / 60) < args.minutes:
        done = used / args.minutes
        n = args.batch
        scenes = [make_scene(s) for s in range(seed, seed + n)]
        seed += n
        asked = [s.questions(args.questions, types=ASKED) for s in scenes]
        full = rng.random() < args.full
        kept = torch.from_numpy(draw_kept(scenes, rng, 1.0 if full else 0.0))
        packed, y = packer.pack(asked), label(scenes)
        set_rate(
            opts,
            min(1, (step + 1) / 20) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done)),
        )
        with torch.autocast("cpu", torch.bfloat16):
            states = encode(vision, pixels(np.stack([s.array() for s in scenes])))
            visual = projector(states[-2][:, 1:])
            dense, stats = dense_loss(visual, words.weight, heads, y, ids)
            cls, more = cls_loss(states, clip, heads, y, scenes, ids, rng)
            compact = torch.from_numpy(rng.random(n) < COMPACT)
            loss, right, _ = answer_loss(llava, packed, gather(visual, kept), kept, compact)
            total = loss + args.dense_weight * dense + args.cls_weight * cls
        for o in opts:
            o.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o in opts:
            o.step()
        for q, ok in per_question(packed, right):
            run[q.type].append(ok)
        if step % 20 == 19:
            print({"step": step, "minutes": round(used, 2), "loss": round(loss.item(), 3),
                   **{k: round(v, 3) for k, v in {**stats, **more}.items()},
                   **{"q_" + t: round(float(np.mean(v)), 3) for t, v in sorted(run.items())}}, flush=True)  # fmt: skip
            run.clear()
        step += 1
        if time.time() - saved > args.every * 60:
            validate(used)
            saved = time.time()
    validate(args.minutes)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=20)
    p.add_argument("--decoder", default="work/decoder.safetensors")
    p.add_argument("--out", default="work/joint.safetensors")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--first-seed", type=int, default=2_000_000)
    p.add_argument("--val", type=int, default=120)
    p.add_argument("--batch", type=int, default=24)
    p.add_argument("--questions", type=int, default=9)
    p.add_argument("--full", type=float, default=0.2)
    p.add_argument("--every", type=float, default=5)
    p.add_argument("--muon-lr", type=float, default=4e-4)
    p.add_argument("--adam-lr", type=float, default=3e-4)
    p.add_argument("--dense-weight", type=float, default=0.3)
    p.add_argument("--cls-weight", type=float, default=0.3)
    p.add_argument("--fresh", action="store_true")
    train(p.parse_args())


if __name__ == "__main__":
    main()
