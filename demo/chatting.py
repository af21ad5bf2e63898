"""Several turns over one pruned cache: what was dropped stays dropped, new pictures may come in later turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .asking import Column, Generation, make
from .guard import DemoError, say
from .keeper import Keeper, Stopped

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.cli.running import Loaded


@dataclass
class Turn:
    """One question with its answer.

    Parameters:
        question, answer: text; pictures: how many new ones came with it.
        cached: visual tokens in the last layer's cache that this turn's pictures left there; held: bytes of the cache.
        error: why there is no answer; stopped: by the visitor.
    """

    question: str
    pictures: int = 0
    answer: str = ""
    visual_tokens: int = 0
    cached: int = 0
    held: int = 0
    error: str = ""
    stopped: bool = False


@dataclass
class Chat:
    """A conversation with one strategy at one budget, and its cache.

    Parameters:
        column: the strategy and its budget per picture; both stay for the whole conversation.
    """

    column: Column
    turns: list[Turn] = field(default_factory=list)
    _messages: list[dict[str, Any]] = field(default_factory=list)
    _ids: list[int] = field(default_factory=list)
    _said: list[int] = field(default_factory=list)
    _cache: Any = None

    def ask(
        self, keeper: Keeper, question: str, images: list[Image.Image], tokens: int, stop: threading.Event, most: int
    ) -> Iterator[Turn]:
        """One more turn; yields it as its answer grows.

        A turn that fails before its answer begins leaves the conversation as it was; after a failure in its middle the
        cache is of no more use and the conversation is over.

        Parameters:
            images: new pictures of this turn, before its text. tokens: most to generate; most: turns a chat may have.
        Raises:
            DemoError: with too many turns, or none before and no picture.
        """
        if len(self.turns) >= most:
            raise DemoError(f"A chat has at most {most} turns here; start a new one.")
        if not self.turns and not images:
            raise DemoError("A chat begins with a picture: choose an example or upload one.")
        turn = Turn(question, len(images))
        new = {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]}
        try:
            loaded = keeper.get(stop=stop)
            pruner = make(self.column, loaded, keeper.embedded)
            if self._cache is None:
                from transformers import DynamicCache

                self._cache = DynamicCache(config=loaded.model.config.get_text_config())
            before = list(self._messages)

            def inputs(lent: Loaded) -> dict[str, Any]:
                return self._inputs(lent, before, new, images)

            run = Generation(keeper, inputs, pruner, tokens, stop, past=self._cache, watch=False)
            self.turns.append(turn)
            for piece in run.pieces():
                turn.answer += piece
                yield turn
            turn.answer, turn.stopped = run.text, stop.is_set()
            if run.report is not None:
                sample = run.report.samples[0]
                turn.visual_tokens = sample.visual_tokens
                turn.cached = len((sample.cached or sample.layers)[-1])
            turn.held = held(self._cache)
            self._ids, self._said = run.fed, run.ids
            self._messages = [*before, new, {"role": "assistant", "content": [{"type": "text", "text": run.text}]}]
        except Stopped:
            turn.stopped = True
            if turn in self.turns:
                self.turns.remove(turn)
        except Exception as error:  # noqa: BLE001  (a strategy may raise anything; the turn says so)
            turn.error = say(error)
            if turn in self.turns:
                self.turns.remove(turn)
            # a prompt that was refused has not touched the cache, anything later may have
            if self._cache is not None and self._cache.get_seq_length() != max(len(self._ids) + len(self._said) - 1, 0):
                self._cache, self.turns, self._messages, self._ids, self._said = None, [], [], [], []
                turn.error += " The conversation starts anew."
        yield turn

    def _inputs(self, loaded: Loaded, before: list[dict], new: dict, images: list[Image.Image]) -> dict[str, Any]:
        """All that was fed and said so far, then this turn's prompt; pictures of this turn alone."""
        import torch

        processor = loaded.processor
        token = getattr(processor, "image_token", "<image>")
        if any(token in part.get("text", "") for part in new["content"]):
            raise DemoError(f"The question holds {token!r}, which marks a picture's place.")
        if not getattr(processor, "chat_template", None):
            raise DemoError(f"{loaded.name} has no chat template; the comparison above works without one.")
        text = processor.apply_chat_template([*before, new], add_generation_prompt=True)
        if not before:
            made = processor(images=images or None, text=text, return_tensors="pt")
            return dict(made.to(loaded.model.device, loaded.model.dtype))
        old = processor.apply_chat_template(before, add_generation_prompt=False)
        if not text.startswith(old):
            raise DemoError(f"{loaded.name}'s chat template rewrites earlier turns, so its cache cannot be gone on with.")
        answer = before[-1]["content"][0]["text"]
        # what the template puts behind an answer, unless the model has said it itself
        closing = old[old.rindex(answer) + len(answer) :] if answer else ""
        tokenizer = processor.tokenizer
        if self._said and self._said[-1] == tokenizer.eos_token_id:
            closing = closing.removeprefix(tokenizer.eos_token or "")
        more = processor(images=images or None, text=closing + text[len(old) :], return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([torch.tensor([self._ids + self._said]), more.pop("input_ids")], 1)
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit - 8:
            raise DemoError(f"The conversation has {ids.shape[1]} tokens and the model sees {limit}; start a new one.")
        made = more.to(loaded.model.device, loaded.model.dtype)
        pictures = {name: value for name, value in made.items() if name not in ("attention_mask", "token_type_ids")}
        ids = ids.to(loaded.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}


def held(cache: Any) -> int:
    """Bytes of keys and values in a cache."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
