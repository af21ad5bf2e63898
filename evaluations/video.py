"""QuoTA and the ways of spending a video's budget, on needles in clips of the embedded video model's world.

    python -m evaluations.video --questions 150 --timed 5 --json docs/video/results.json --markdown docs/video.md

Every row answers the same questions with the same number of visual tokens, through the processor and `generate`. Frames get
sensor noise of their own, so that no two are equal. Accuracy and times come from separate passes: in the first the vision
tower's features of a clip are computed once for all rows; in the second nothing is kept, rows take turns on each question,
and prefill includes the scorer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from evaluations.tiny.asking import write
from evaluations.worlds import FPS, NEEDLE_TYPES, ClipQuestion, make_clip
from vtprune import embedded
from vtprune.measure.bench import Everything, machine
from vtprune.pruner import Pruner
from vtprune.quota import ClipBackend, FrameScorer, VlmBackend

FRAMES = 64
NOISE = 3  # grey levels to either side
RESAMPLES = 10_000
BASELINE = "even over all frames"
MARKS = ("<!-- ablation -->", "<!-- /ablation -->")


@dataclass
class Asked:
    """A question about a clip, with its frames, uint8 [T, H, W, 3]."""

    question: ClipQuestion
    frames: np.ndarray


@dataclass
class Row:
    """A way of spending the budget.

    Parameters:
        name: for the table; build: (budget, question) -> strategy, or None for the bare model.
        native: whether it sees only as many evenly sampled frames as the budget holds at the model's own pooling.
        most: how many of the questions it answers, for slow ones; None for all.
        raw: per question, whether the answer was right.
    """

    name: str
    build: Callable[[int, ClipQuestion], Pruner | None]
    native: bool = False
    group: str = ""
    most: int | None = None
    raw: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    selection_ms: list[float] = field(default_factory=list)


class Bench:
    """The embedded video model, its scorers, and the rows."""

    def __init__(self) -> None:
        folder = embedded.tiny_video()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
        clip = ClipBackend.embedded(vision=self.model.model.vision_tower)
        self.clip = FrameScorer.for_processor(clip, self.processor)
        self.itself = FrameScorer.for_processor(VlmBackend(self.model, self.processor), self.processor)
        vision = self.model.config.vision_config
        self.frame = ((vision.image_size // vision.patch_size + 1) // 2) ** 2

    def scorer(self, question: ClipQuestion, listed: bool = True) -> FrameScorer:
        """CLIP, told what to look for or given the question as it is."""
        self.clip.objects = list(question.about) if listed else []
        return self.clip

    def forget(self) -> None:
        """Let no scorer answer from memory."""
        for scorer in (self.clip, self.itself):
            scorer.forget()

    def rows(self) -> list[Row]:
        def quota(**fields: Any) -> Callable[[int, ClipQuestion], Pruner]:
            return lambda budget, q: vtprune.QuoTA(keep=budget, scorer=self.scorer(q), **fields)

        def truth(budget: int, q: ClipQuestion) -> Pruner:
            return vtprune.QuoTA(keep=budget, scores=[float(t in q.frames) for t in range(FRAMES)])

        return [
            Row("fewer frames, the model's own pooling", lambda b, q: None, native=True, group="no scores"),
            Row(BASELINE, lambda b, q: vtprune.QuoTA(keep=b, scores=[1.0] * FRAMES), group="no scores"),
            Row("framedrop", lambda b, q: vtprune.FrameDrop(keep=b), group="no scores"),
            Row("evs", lambda b, q: vtprune.EVS(keep=b), group="no scores"),
            Row("quota, CLIP, list of objects", quota(), group="scorers"),
            Row(
                "quota, CLIP, the question as it is",
                lambda b, q: vtprune.QuoTA(keep=b, scorer=self.scorer(q, listed=False)),
                group="scorers",
            ),
            Row("quota, the model itself", lambda b, q: vtprune.QuoTA(keep=b, scorer=self.itself), group="scorers", most=20),
            Row("quota, text embeddings", lambda b, q: vtprune.QuoTA(keep=b), group="scorers"),
            Row("quota, told the frames", truth, group="scorers"),
            Row("quota, CLIP, adaptive pooling", quota(reducer="pool"), group="reducers"),
            Row("quota, CLIP, every n-th token", quota(reducer="linspace"), group="reducers"),
            Row("quota, CLIP, token merging", quota(reducer="tome"), group="reducers"),
            Row("quota, CLIP, DivPrune within frames", quota(within=vtprune.DivPrune()), group="reducers"),
            Row("quota, CLIP, published arithmetic", quota(parity=True), group="reducers"),
            Row("quota, CLIP, power 1", quota(power=1.0), group="planner"),
            Row("quota, CLIP, power 4", quota(power=4.0), group="planner"),
        ]

    def inputs(self, asked: Asked, frames: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """What the processor makes of the clip (or some of its frames) and the question."""
        video = asked.frames if frames is None else asked.frames[list(frames)]
        content = [{"type": "video"}, {"type": "text", "text": asked.question.text}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(self.processor(text=text, videos=[video], return_tensors="pt"))

    def answer(self, row: Row, budget: int, asked: Asked) -> tuple[str, Any]:
        """What the model says, and the report."""
        frames = None
        if row.native:
            frames = np.linspace(0, FRAMES - 1, max(1, budget // self.frame)).round().astype(int).tolist()
        inputs = self.inputs(asked, frames)
        with vtprune.pruning(self.model, row.build(budget, asked.question) or Everything()) as session:
            made = self.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        said = self.processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return said.strip(), session.report

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """The vision tower answers from memory when it is shown the same pixels again."""
        tower, known = self.model.model.vision_tower, {}
        forward = tower.forward

        def remembered(pixel_values: torch.Tensor, **more: Any):
            key = (
                *pixel_values.shape,
                *(float(f) for f in pixel_values.double().square().sum((1, 2, 3))),
                *sorted(more.items()),
            )
            if key not in known:
                if len(known) > 8:
                    known.pop(next(iter(known)))
                known[key] = forward(pixel_values, **more)
            return known[key]

        tower.forward = remembered
        try:
            yield
        finally:
            del tower.forward


def questions(count: int, types: Sequence[str] = NEEDLE_TYPES, start: int = 0) -> list[Asked]:
    """Needle questions of test clips, at most three of a clip."""
    found: list[Asked] = []
    seed = start
    while len(found) < count:
        clip = make_clip(seed, "test", FRAMES)
        noise = np.random.default_rng([seed, 9]).integers(-NOISE, NOISE + 1, (FRAMES, 168, 168, 1))
        frames = np.clip(clip.frames().astype(np.int16) + noise, 0, 255).astype(np.uint8)
        found += [Asked(q, frames) for q in clip.questions(3, types=types, salt=99)]
        seed += 1
    return found[:count]


def run(bench: Bench, budget: int, asked: list[Asked], timed: int) -> list[Row]:
    """All rows on all questions, then times on the first `timed`."""
    rows, console = bench.rows(), Console(stderr=True)
    with torch.inference_mode(), bench.remembering():
        for at, one in enumerate(track(asked, f"{budget} tokens", console=console)):
            for row in rows:
                if row.most is not None and at >= row.most:
                    continue
                said, report = bench.answer(row, budget, one)
                row.raw.append(said == one.question.answer)
                row.tokens.append(len(report.samples[0].kept))
    take_times(bench, rows, budget, asked[: timed + 1])
    return rows


def take_times(bench: Bench, rows: list[Row], budget: int, asked: list[Asked]) -> None:
    """Prefill and selection of all rows on each question in turn; the first question is for warming up."""
    with torch.inference_mode():
        for turn, one in enumerate(track(asked, "times", console=Console(stderr=True))):
            for row in rows:
                bench.forget()
                _, report = bench.answer(row, budget, one)
                if turn:
                    row.prefill_ms.append(report.prefill_ms)
                    row.selection_ms.append(report.selection_ms)


def compared(right: Sequence[bool], against: Sequence[bool], seed: int = 0) -> dict[str, float]:
    """Accuracy in per cent with a 95 % interval, the difference to `against`, and the share of resamples without one."""
    mine, other = np.asarray(right, float), np.asarray(against, float)
    draws = np.random.default_rng(seed).integers(0, len(mine), (RESAMPLES, len(mine)))
    means, gains = mine[draws].mean(1), (mine - other)[draws].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    p = (1 + int((gains <= 1e-9).sum())) / (1 + RESAMPLES)
    return {
        "accuracy": 100 * mine.mean(),
        "low": 100 * float(low),
        "high": 100 * float(high),
        "gain": 100 * float((mine - other).mean()),
        "p": p,
    }


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    base = next(row for row in rows if row.name == BASELINE)
    found = []
    for row in rows:
        prefill, selection = (statistics.median(ms) if ms else float("nan") for ms in (row.prefill_ms, row.selection_ms))
        found.append(
            {
                "name": row.name,
                "group": row.group,
                "tokens": statistics.fmean(row.tokens),
                "prefill_ms": prefill,
                "selection_ms": selection,
                "questions": len(row.raw),
                **compared(row.raw, base.raw[: len(row.raw)]),
                "raw": row.raw,
            }
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    setup = result["setup"]
    lines = [
        f"Made by `{setup['command']}` on {setup['date'][:10]}: {setup['device']}, {setup['threads']} threads, float32, "
        f"{setup['minutes']:.0f} min. {setup['questions']} questions ({', '.join(NEEDLE_TYPES)}) about test clips of {FRAMES} "
        f"frames at {FPS} a second; what is asked about is shown in one to eight of them. Gain: points over *{BASELINE}*, "
        f"paired; p: one-sided, {RESAMPLES:,} bootstrap resamples of questions. Times: medians over {setup['timed']} "
        "questions, the scorer included.",
    ]
    for budget, rows in result["budgets"].items():
        lines += [
            "",
            f"### {budget} visual tokens",
            "",
            "| | accuracy % (95 %) | gain | p | tokens | prefill ms | of which selection and scoring |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            name = row["name"] + (f" (first {row['questions']} questions)" if row["questions"] < setup["questions"] else "")
            gain, p = ("", "") if row["name"] == BASELINE else (f"{row['gain']:+.1f}", f"{row['p']:.4f}")
            lines.append(
                f"| {name} | {row['accuracy']:.1f} ({row['low']:.0f} .. {row['high']:.0f}) | {gain} | {p} | "
                f"{row['tokens']:.0f} | {row['prefill_ms']:.0f} | {row['selection_ms']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def again(args: argparse.Namespace) -> None:
    """Replace the times of a result that was made on a busy machine."""
    result, bench = json.loads(args.json.read_text(encoding="utf-8")), Bench()
    asked = questions(args.timed + 1)
    for budget, rows in result["budgets"].items():
        fresh = {row.name: row for row in bench.rows()}
        take_times(bench, list(fresh.values()), int(budget), asked)
        for row in rows:
            row["prefill_ms"] = statistics.median(fresh[row["name"]].prefill_ms)
            row["selection_ms"] = statistics.median(fresh[row["name"]].selection_ms)
    result["setup"]["timed"] = args.timed
    finish(args, result)


def finish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    write(args.json, json.dumps(result, indent=1) + "\n")
    if args.markdown:
        page = args.markdown.read_text(encoding="utf-8")
        before, (_, after) = page.split(MARKS[0])[0], page.split(MARKS[1])
        write(args.markdown, f"{before}{MARKS[0]}\n{markdown(result)}{MARKS[1]}{after}")
    print(markdown(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--timed", type=int, default=8, help="questions on which times are taken")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--times", action="store_true", help="take the times in --json anew, and nothing else")
    parser.add_argument("--markdown", type=Path, help=f"page whose part between {MARKS[0]} and {MARKS[1]} is written anew")
    args = parser.parse_args()
    if args.times:
        again(args)
        return
    began = time.time()
    bench, asked = Bench(), questions(args.questions)
    budgets = {str(budget): summary(run(bench, budget, asked, args.timed)) for budget in args.budgets}
    setup = {
        "command": "python -m evaluations.video " + " ".join(sys.argv[1:]),
        **machine("cpu"),
        "minutes": (time.time() - began) / 60,
        "questions": len(asked),
        "timed": args.timed,
        "asked": [asdict(one.question) for one in asked],
    }
    finish(args, {"setup": setup, "budgets": budgets})


if __name__ == "__main__":
    main()
