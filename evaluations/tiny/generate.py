"""The same questions the slow way: one prompt at a time through the processor and ``generate``.

Checks that what ``evaluate`` scores under teacher forcing is what a user of the checkpoint gets; with ``--method`` the
answers come from under ``vtprune.pruning``.

    python -m evaluations.tiny.generate --questions 100
    python -m evaluations.tiny.generate --questions 100 --method random --keep 64
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..worlds import TYPES, make_scene
from .model import CHECKPOINT


@torch.no_grad()
def generated_accuracy(
    folder: Path, questions: int, method: str | None = None, keep: int = 64, dtype: str = "auto"
) -> dict[str, list[bool]]:
    """Exact match of greedy answers per question type, on the first pictures of the test split."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    context = nullcontext()
    if method is not None:
        import vtprune

        context = vtprune.pruning(model, method, keep=keep)
    hits: dict[str, list[bool]] = defaultdict(list)
    seed = asked = 0
    with context:
        while asked < questions:
            scene = make_scene(seed, "test")
            seed += 1
            image = scene.image()
            for q in scene.questions(len(TYPES), salt=99):
                content = [{"type": "image"}, {"type": "text", "text": q.text}]
                text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
                inputs = processor(images=image, text=text, return_tensors="pt").to(model.dtype)
                out = model.generate(**inputs, max_new_tokens=8)
                said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
                hits[q.type].append(said == q.answer)
                asked += 1
    return hits


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=CHECKPOINT)
    p.add_argument("--questions", type=int, default=100)
    p.add_argument("--method", help="a method of vtprune; without it nothing is pruned")
    p.add_argument("--keep", type=int, default=64)
    p.add_argument("--dtype", default="auto", help="auto (as stored) or float32")
    args = p.parse_args()
    hits = generated_accuracy(args.folder, args.questions, args.method, args.keep, args.dtype)
    for kind, right in sorted(hits.items()):
        print(f"{kind:10s} {100 * sum(right) / len(right):5.1f} % of {len(right)}")
    graded = [ok for kind, right in hits.items() if kind != "reading" for ok in right]
    print(f"all but reading {100 * sum(graded) / len(graded):.1f} % of {len(graded)}")


if __name__ == "__main__":
    main()
