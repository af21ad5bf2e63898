"""How good the video model and its frame scorer are: exact-match accuracy on clips it has not seen, and its model card.

python -m evaluations.tiny.video_evaluate --clips 40 --card
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from vtprune.quota import ClipBackend, plan, relevance

from ..worlds import CLIP_TYPES
from .train_video import planners, score
from .video_model import CHECKPOINT, load_video
from .video_packing import NATIVE, Seen, VideoPacker, sampled, see

FORMS = ("{s}", "{c} {s}", "a {s}", "{c} object", "What color is the {s}?")
PER = 8


class Scorer:
    """What the embedded CLIP says of clips' frames: similarities, by text, of every frame."""

    def __init__(self, model, seen: list[Seen]) -> None:
        self.backend = ClipBackend.embedded(model.model.vision_tower)
        self.frames = {}
        for one in seen:
            pictures, which = one.clip.pictures()
            looks = self.backend.pictures([Image.fromarray(p) for p in pictures])
            self.frames[one.clip] = normalize(looks.float(), dim=-1)[torch.from_numpy(which)]
        self.known: dict[str, torch.Tensor] = {}

    def text(self, text: str) -> torch.Tensor:
        if text not in self.known:
            self.known[text] = normalize(self.backend.texts([text]).float(), dim=-1)[0]
        return self.known[text]

    def similarity(self, clip, texts) -> torch.Tensor:
        return self.frames[clip] @ torch.stack([self.text(t) for t in texts], 1)

    def scores(self, clip, texts, mapping: str = "minmax") -> np.ndarray:
        generic = self.similarity(clip, self.backend.generic)
        near = self.similarity(clip, texts)
        return relevance(near, mapping, generic=generic, scale=self.backend.scale).double().numpy()

    def table(self, seen: list[Seen]) -> dict[str, dict[str, float]]:
        """By form of text, over all needles: is the best frame one that shows it, and these frames' share of p ** 2."""
        found: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
        for clip in (one.clip for one in seen):
            for actor in (clip.actors[i] for i in clip.needles):
                shown = list(actor.frames)
                for form in FORMS:
                    texts = [form.format(c=actor.color, s=actor.shape)]
                    row = found[form]
                    best = int(self.similarity(clip, texts)[:, 0].argmax())
                    row.setdefault("top-1", []).append(float(best in shown))
                    for mapping in ("minmax", "generic", "sigmoid"):
                        p = self.scores(clip, texts, mapping) ** 2
                        row.setdefault(mapping, []).append(float(p[shown].sum() / p.sum()))
        return {form: {k: float(np.mean(v)) for k, v in row.items()} for form, row in found.items()}


@torch.no_grad()
def evaluate(folder: Path, clips: int, budgets: tuple[int, ...]) -> dict:
    model, packer = load_video(folder).eval(), VideoPacker()
    vision = model.model.vision_tower
    vision.set_attn_implementation("eager")
    seen = [s for frames in (32, 48, 64) for s in see(vision, range(-(-clips // 3)), "test", frames)]
    counts = Counter(q.type for s in seen for q in s.clip.questions(PER, salt=99))
    scorer = Scorer(model, seen)
    result: dict = {"clips": len(seen), "counts": dict(counts), "scorer": scorer.table(seen), "plans": {}}
    for form, row in result["scorer"].items():
        print(f"{form:24s}", {k: round(v, 3) for k, v in row.items()}, flush=True)

    def quota(budget: int, question: bool = False):
        def how(clip, q):
            return plan(scorer.scores(clip, [q.text] if question else q.about), budget, NATIVE)

        return how

    named = {}
    for budget in budgets:
        named |= planners(budget)
        named[f"quota, names {budget}"] = quota(budget)
    named[f"quota, question {budgets[0]}"] = quota(budgets[0], question=True)
    for name, how in named.items():
        result["plans"][name] = score(model, packer, seen, how, PER)
        print(f"{name:20s}", {k: round(v, 3) for k, v in result["plans"][name].items()}, flush=True)
    short = see(vision, range(-(-clips // 3)), "test", 16)
    result["plans"]["all of 16 frames, 576"] = score(model, packer, short, lambda clip, q: sampled(clip.count, 10**6), PER)
    # every clip answers for the one before: what the questions give away
    blind = [Seen(a.clip, b.states, b.which, b.owner) for a, b in zip(seen, seen[1:] + seen[:1], strict=True)
             if a.clip.count == b.clip.count]  # fmt: skip
    even = f"even {budgets[0]}"
    result["plans"][f"another clip, {even}"] = score(model, packer, blind, planners(budgets[0])[even], PER)
    for name in list(result["plans"])[-2:]:
        print(f"{name:20s}", {k: round(v, 3) for k, v in result["plans"][name].items()}, flush=True)
    return result


CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
license: apache-2.0
---

# tiny-video

A `LlavaOnevisionForConditionalGeneration` of {size:.1f} MB for clips: tiny-llava's CLIP tower cut to 168 px (12 x 12 patches
of 14 px, feature layer -2, select strategy "default"), pooled by the model to 6 x 6 = 36 visual tokens per frame and one
newline at the end, and a Llama decoder of 8 blocks. It was trained from tiny-llava's weights on the seeded clips of
`evaluations/worlds/clips.py` (`evaluations/tiny/README.md` has the recipe), with frames resized to shares as QuoTA gives
them. It knows that world and nothing else: its purpose is to behave under the pruning of videos as a real model does.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("assets/tiny-video")
model = AutoModelForImageTextToText.from_pretrained("assets/tiny-video")
chat = [{{"role": "user", "content": [{{"type": "video"}}, {{"type": "text", "text": "What color is the star?"}}]}}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(videos=[frames], text=text, return_tensors="pt").to(model.dtype)  # a list of pictures, or uint8 [T, H, W, 3]
print(processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`vtprune.quota.ClipBackend.embedded(model.model.vision_tower)` scores frames with this tower and tiny-llava's text tower.
Pictures are taken, too (`images=`, 300 visual tokens each), but not graded.

## Measured

{clips} clips of the `test` split, a third each of 32, 48 and 64 frames, {total} questions, greedy decoding, exact match, in
percent. A *needle* is an object whose shape and colour nothing else in the clip has, shown once, for one frame or two in a
row, or two to four times, for one frame each. Colour, shape, existence, location, order and counting ask about needles,
static about what is there for longer; "needle" is over the first four. Visual tokens are those of the whole clip, the
newline not counted.

- `sampled`: as many evenly spaced frames as fit, at the model's own 36 tokens (what one does without pruning).
- `even`: the budget spread over all frames. `true`: over the frames that show what the question is about, as far as they can
  take it, the rest evenly.
- `quota, names`: QuoTA's rule (score squared) with the embedded CLIP asked for what to look for ("star"), min-max per clip;
  `quota, question`: with the question itself.
- `all of 16 frames`: clips of 16 frames, unpruned. `another clip`: the frames of a different clip.

{table}

The scorer, over {needles} needles of these clips: how often the frame with the highest similarity shows the needle, and the
share of the squared scores that its frames get, by mapping (they are {area:.1f} % of the frames).

| text | best frame | minmax | generic | sigmoid |
| --- | ---: | ---: | ---: | ---: |
{scorer}

Weights as stored ({dtype}), computed under bfloat16 autocast.

What it does not tell: two heads of the fourth decoder block were told in training where to look, the scorer was trained on
this world's texts, and frames between two changes are the same to the pixel. A ranking on these clips is no ranking elsewhere.

Made by `python -m evaluations.tiny.video_evaluate --clips {asked} --card` on {date} ({machine}, torch {torch}).
"""


def card(result: dict, folder: Path, asked: int) -> str:
    columns = [*CLIP_TYPES, "needle", "all"]
    counts = result["counts"]
    numbers = {**counts, "needle": sum(counts[t] for t in CLIP_TYPES[:4]), "all": sum(counts.values())}
    rows = ["| plan, tokens | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    rows.append("| questions | " + " | ".join(str(numbers[t]) for t in columns) + " |")
    for name, row in result["plans"].items():
        rows.append(f"| {name} | " + " | ".join(f"{100 * row[t]:.1f}" if t in row else "-" for t in columns) + " |")
    from ..worlds import make_clip

    n = result["clips"] // 3
    clips = [make_clip(s, "test", frames) for frames in (32, 48, 64) for s in range(n)]
    shown = [len(c.actors[i].frames) / c.count for c in clips for i in c.needles]
    return CARD.format(
        size=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.suffix != ".part") / 1e6,
        clips=result["clips"], total=numbers["all"], table="\n".join(rows), needles=len(shown), area=100 * np.mean(shown),
        scorer="\n".join("| " + f.format(s="star", c="red") + " | " + " | ".join(
            f"{100 * r[k]:.1f}" for k in ("top-1", "minmax", "generic", "sigmoid")) + " |"
            for f, r in result["scorer"].items()),
        dtype=json.loads((folder / "config.json").read_text()).get("dtype"), asked=asked, date=time.strftime("%Y-%m-%d"),
        machine=platform.machine(), torch=torch.__version__,
    )  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=CHECKPOINT)
    p.add_argument("--clips", type=int, default=40)
    p.add_argument("--budgets", type=int, nargs="+", default=(256, 512))
    p.add_argument("--card", action="store_true", help="write the model card into the folder")
    args = p.parse_args()
    result = evaluate(args.folder, args.clips, tuple(args.budgets))
    if args.card:
        new = args.folder / "README.md.part"
        new.write_text(card(result, args.folder, args.clips))
        new.replace(args.folder / "README.md")


if __name__ == "__main__":
    main()
