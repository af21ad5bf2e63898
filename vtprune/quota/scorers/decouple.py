"""From a question to the objects that it is about, by asking a language model once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from vtprune.pruner import UnsupportedError
from vtprune.quota.query import decouple_prompt, parse
from vtprune.quota.scorers.vlm import chat, specials, undisturbed


class Decoupler:
    """One greedy, text-only generation per question; [] for every reply that does not keep to the form.

    The published pipeline asks the model that is pruned, `Decoupler(model, processor)`; those calls run unpruned.

    Parameters:
        model: a language model, with or without pictures; processor: its processor or tokenizer, with a chat template.
        max_new_tokens: upper limit of the reply.
        remember: how many questions' objects are kept.
    """

    def __init__(self, model: nn.Module, processor: Any, max_new_tokens: int = 4096, remember: int = 1024) -> None:
        if max_new_tokens < 1 or remember < 0:
            raise UnsupportedError(f"max_new_tokens={max_new_tokens}, remember={remember}: at least 1 and 0.")
        self.model, self.processor, self.max_new_tokens, self.remember = model, processor, max_new_tokens, remember
        self._known: OrderedDict[str, list[str]] = OrderedDict()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"Decoupler({type(self.model).__name__}, max_new_tokens={self.max_new_tokens})"

    def __call__(self, question: str) -> list[str]:
        """The objects, in lower case.

        Raises:
            UnsupportedError: for an empty question, or a model without a chat template.
        """
        with self._lock:
            objects = self._known.pop(question, None)
            if objects is None:
                objects = parse(self.reply(question))
            self._known[question] = objects
            while len(self._known) > self.remember:
                self._known.popitem(last=False)
            return list(objects)

    @torch.inference_mode()
    def reply(self, question: str) -> str:
        """What the model says, as it says it."""
        tokenizer, text = getattr(self.processor, "tokenizer", None), decouple_prompt(question)
        if tokenizer is None:
            # a tokenizer's template wants a string, and writes all special tokens itself
            tokenizer, prompt, more = self.processor, chat(self.processor, text), {"add_special_tokens": False}
        else:
            prompt = chat(self.processor, [{"type": "text", "text": text}])
            more = specials(tokenizer, prompt)
        inputs = tokenizer(prompt, return_tensors="pt", **more).to(self.model.device)
        with undisturbed(self.model):
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                # a model's own sampling settings would only be warned about
                temperature=None,
                top_p=None,
                top_k=None,
            )
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
