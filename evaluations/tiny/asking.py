"""How the tiny model is asked: pictures of the shape world with their questions, answered through the public API.

All questions about one picture are a batch of their own, left-padded, and share its image features.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from evaluations.worlds import TYPES, Question, Scene, make_scene

CHECKPOINT = Path(__file__).resolve().parents[2] / "assets" / "tiny-llava"
GRADED = tuple(t for t in TYPES if t != "reading")
PER_PICTURE = 8


@dataclass
class Asked:
    """A picture with its questions."""

    scene: Scene
    image: Image.Image
    questions: list[Question]

    def wanted(self, question: Question) -> list[int]:
        """Patches the oracle keeps: the objects', and the word's where it is asked for."""
        return [*self.scene.object_patches(), *(self.scene.word_patches() if question.type == "reading" else ())]


@dataclass
class Batch:
    """A picture's questions as the model takes them: `inputs` without pixels, which are there once."""

    inputs: dict[str, torch.Tensor]
    pixels: torch.Tensor


def picture(seed: int, split: str = "test") -> Asked:
    """One picture of `split` with its questions, the one about a printed word last."""
    scene = make_scene(seed, split)
    questions = scene.questions(PER_PICTURE, types=GRADED, salt=99)
    if scene.word is not None:
        questions += scene.questions(1, types=("reading",), salt=99)
    return Asked(scene, scene.image(), questions)


def pictures(questions: int, split: str = "test") -> list[Asked]:
    """Pictures of `split` with at least so many questions, not counting those about a printed word."""
    found: list[Asked] = []
    total = 0
    while total < questions:
        found.append(picture(len(found), split))
        total += sum(q.type in GRADED for q in found[-1].questions)
    return found


def load(folder: Path) -> tuple[Any, Any]:
    """(model, processor) of a checkpoint, float32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def batch(model, processor, asked: Asked, image: Image.Image | None = None) -> Batch:
    """The questions about a picture, which another `image` may stand in for."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}], add_generation_prompt=True
        )
        for q in asked.questions
    ]
    images = [asked.image if image is None else image] * len(prompts)
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    return Batch(inputs, inputs.pop("pixel_values")[:1].to(model.dtype))


@torch.inference_mode()
def answers(model, processor, asked: Batch) -> list[str]:
    """Greedy answers to all questions of a batch."""
    inputs, rows = asked.inputs, len(asked.inputs["input_ids"])
    # inside the model's own method, so that strategies that work in the encoder do
    features = model.model.get_image_features(asked.pixels, return_dict=True)
    features.pooler_output = list(features.pooler_output) * rows
    out = model.generate(**inputs, mm_encoder_outputs={"image": features}, max_new_tokens=8, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [t.strip() for t in texts]


def write(path: Path, text: str) -> None:
    """Atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".part", encoding="utf-8") as part:
        part.write(text)
    Path(part.name).chmod(0o644)
    os.replace(part.name, path)
