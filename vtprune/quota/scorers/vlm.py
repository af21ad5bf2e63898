"""Frames shown one by one to a vision-language model, which says whether they help: the published scorer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtprune.pruner import UnsupportedError
from vtprune.quota.query import NO, YES, frame_question
from vtprune.quota.score import last, yes_probability


@dataclass(frozen=True)
class _Asked:
    """The prompt with one image placeholder, and the token ids of both letters."""

    prompt: str
    yes: list[int]
    no: list[int]


class VlmBackend:
    """How probable a vision-language model finds it that its answer begins with the letter for yes.

    Any AutoModelForImageTextToText with a chat template; the paper's is Qwen2-VL-2B-Instruct with max_pixels = 1280 * 28 * 28.
    The model that is pruned may score its own frames: those calls run unpruned.

    Parameters:
        model, processor: as loaded; the processor's settings, such as max_pixels, are the user's.
        over: "vocabulary" as published, or "letters": see `vtprune.quota.yes_probability`.
        yes, no: what the two answers begin with; the question lists A for yes and B for no.
    """

    shared = False

    def __init__(self, model: nn.Module, processor: Any, over: str = "vocabulary", yes: str = YES, no: str = NO) -> None:
        if over not in ("vocabulary", "letters"):
            raise UnsupportedError(f"over={over!r}: 'vocabulary' or 'letters'.")
        if getattr(processor, "tokenizer", None) is None:
            raise UnsupportedError(
                f"{type(processor).__name__} has no tokenizer; give the model's processor, for pictures and text."
            )
        self.model, self.processor, self.over, self.yes, self.no = model, processor, over, yes, no
        # an instance's forward may be wrapped by hooks of others
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def __repr__(self) -> str:
        source = getattr(self.model, "name_or_path", "").rstrip("/").rsplit("/", 1)[-1]
        return f"VlmBackend({type(self.model).__name__}{f' {source!r}' if source else ''}, over={self.over!r})"

    def prepare(self, question: str, objects: list[str]) -> _Asked:
        content = [{"type": "image"}, {"type": "text", "text": frame_question(question, objects)}]
        prompt = chat(self.processor, content)
        tokenizer = self.processor.tokenizer
        return _Asked(prompt, *(_continuations(tokenizer, prompt, letter) for letter in (self.yes, self.no)))

    @torch.inference_mode()
    def look(self, asked: _Asked, frames: list[Image.Image]) -> Tensor:
        """[n] fp32 probabilities."""
        inputs = self.processor(
            text=[asked.prompt] * len(frames),
            images=[[frame.convert("RGB")] for frame in frames],
            padding=True,
            # the last position is then real in every row; rotary positions do not mind where a row begins
            padding_side="left",
            return_tensors="pt",
            **specials(self.processor.tokenizer, asked.prompt),
        ).to(self.model.device, self.model.dtype)
        with undisturbed(self.model):
            keep = {"logits_to_keep": 1} if self._keeps else {}
            logits = self.model(**inputs, use_cache=False, **keep).logits
        logits = logits[:, -1] if logits.shape[1] == 1 else last(logits, inputs.get("attention_mask"))
        return yes_probability(logits, asked.yes, asked.no, over=self.over).cpu()

    def finish(self, asked: _Asked, seen: Tensor) -> Tensor:
        return seen


def chat(processor: Any, content: Any) -> str:
    """One turn of the user in the model's own format, up to where its answer begins.

    Raises:
        UnsupportedError: if processor and tokenizer have no chat template.
    """
    if not getattr(processor, "chat_template", None) and not getattr(
        getattr(processor, "tokenizer", None), "chat_template", None
    ):
        raise UnsupportedError(f"{type(processor).__name__} has no chat template; an instruction-tuned model is needed.")
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def specials(tokenizer: Any, prompt: str) -> dict[str, bool]:
    """Some templates write the start token themselves; the tokenizer would add a second one."""
    return {"add_special_tokens": False} if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token) else {}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Qwen's models keep `rope_deltas` between calls; a call from within another one gives them back as they were."""
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, value in kept:
            module.rope_deltas = value


def _continuations(tokenizer: Any, prompt: str, letter: str) -> list[int]:
    """Ids of the single tokens that go on from the prompt with the letter, with and without a space before it."""
    begun, found = tokenizer(prompt, add_special_tokens=False).input_ids, []
    for more in (letter, f" {letter}"):
        ids = tokenizer(prompt + more, add_special_tokens=False).input_ids
        if len(ids) == len(begun) + 1 and ids[:-1] == begun:
            found.append(ids[-1])
    # a prompt that ends in a space may have it drawn into the letter's token
    alone = tokenizer(letter, add_special_tokens=False).input_ids
    if not found and len(alone) == 1:
        found = alone
    found = [number for number in dict.fromkeys(found) if number != tokenizer.unk_token_id]
    if not found:
        raise UnsupportedError(
            f"the scorer's tokenizer has no single token for {letter!r} to go on with; give other yes= and no=."
        )
    return found
