"""One score per frame, whatever looks at the frames: pictures from what a model was fed, batches, a memory."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vtprune.prompts import ROLES, words
from vtprune.pruner import UnsupportedError
from vtprune.quota.query import check_objects, phrases
from vtprune.quota.score import check_scores

# 256 MiB of fp32 image embeddings
_VALUES = 2**26


class ScoreNote(UserWarning):
    """Something about a scorer that the user should know, such as a text that it cannot read in one piece."""


class Backend(Protocol):
    """What looks at frames, each by itself.

    Parameters:
        shared: `look` answers the same for every question, so that its answer serves further questions on the video.
    """

    shared: bool

    def prepare(self, question: str, objects: list[str]) -> Any:
        """What the question costs once, whatever the number of frames; handed to the other two."""

    def look(self, asked: Any, frames: list[Image.Image]) -> Tensor:
        """[n, ...] of n frames."""

    def finish(self, asked: Any, seen: Tensor) -> Tensor:
        """[T] scores >= 0 from what `look` answered of all T frames."""


class CallableBackend:
    """Any function from pictures, the question and the objects to one number per picture."""

    shared = False

    def __init__(self, function: Callable[[list[Image.Image], str, list[str]], Any]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", None) or repr(self.function)

    def prepare(self, question: str, objects: list[str]) -> tuple[str, list[str]]:
        phrases(question, objects)  # refuses to ask about nothing
        return question, objects

    def look(self, asked: tuple[str, list[str]], frames: list[Image.Image]) -> Any:
        return self.function(frames, *asked)

    def finish(self, asked: tuple[str, list[str]], seen: Tensor) -> Tensor:
        return seen


class FrameScorer:
    """From the frames that a model was fed and the prompt's token ids to one score per frame.

    What is looked for: `objects` if given, else what `decoupler` makes of the question, else the whole question. A
    video's scores are kept, so that the same question on the same frames costs a hash of the pixels. One thread scores at
    a time.

        FrameScorer.for_processor(ClipBackend.open_clip("ViT-B-16", "openai"), processor)

    Parameters:
        backend: a `VlmBackend`, a `ClipBackend`, anything with their three methods, or a callable
            f(frames, question, objects) -> scores.
        tokenizer: of the language model; only `score` can do without it, `mean` and `std`.
        mean, std: per channel, what the pixels were normalised with.
        objects: what to look for, the same for every question.
        decoupler: question -> list of objects, such as a `Decoupler`.
        strip: regular expression of what the chat template adds to the text.
        placeholders: token ids taken out before the prompt is decoded; None for the tokenizer's special tokens.
        batch: frames looked at together; no more are held as pictures at any time.
        progress: whether to draw a progress bar on stderr.
        remember: how many (video, question) pairs are kept; 0 for none.
    Raises:
        UnsupportedError: for a backend, objects or counts without meaning.
    """

    def __init__(
        self,
        backend: Backend | Callable[..., Any],
        tokenizer: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        objects: Sequence[str] | None = None,
        decoupler: Callable[[str], list[str]] | None = None,
        strip: str = ROLES,
        placeholders: Collection[int] | None = None,
        batch: int = 64,
        progress: bool = False,
        remember: int = 32,
    ) -> None:
        if not hasattr(backend, "look"):
            if not callable(backend):
                raise UnsupportedError(f"{backend!r} is no scorer: give a backend or a callable f(frames, question, objects).")
            backend = CallableBackend(backend)
        if batch < 1 or remember < 0:
            raise UnsupportedError(f"batch={batch}, remember={remember}: at least 1 and 0.")
        self.backend, self.tokenizer, self.decoupler = backend, tokenizer, decoupler
        self.mean, self.std = (None if v is None else torch.tensor(list(v)).view(-1, 1, 1) for v in (mean, std))
        self.objects = check_objects(objects)
        self.strip, self.placeholders = re.compile(strip, re.MULTILINE), placeholders
        self.batch, self.progress = batch, progress
        self._scores, self._seen = _Recent(remember), _Recent(remember, _VALUES)
        self._lock = threading.RLock()

    @classmethod
    def for_processor(cls, backend: Backend | Callable[..., Any], processor: Any, **options: Any) -> FrameScorer:
        """With tokenizer, mean and std of the processor of the model that is pruned.

        Raises:
            UnsupportedError: if the processor does not say how it normalises frames.
        """
        parts = [getattr(processor, name, None) for name in ("video_processor", "image_processor")]
        part = next((part for part in parts if getattr(part, "image_mean", None) is not None), None)
        if part is None:
            raise UnsupportedError(f"{type(processor).__name__} names no image_mean; give tokenizer, mean and std yourself.")
        mean, std = (part.image_mean, part.image_std) if part.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        tokenizer = processor.tokenizer
        # not every tokenizer counts the placeholders among its special tokens
        own = {getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video")} - {None}
        options.setdefault("placeholders", own | set(tokenizer.all_special_ids))
        return cls(backend, tokenizer, mean, std, **options)

    def settings(self) -> dict[str, Any]:
        """JSON-ready, for reports."""
        return {
            "backend": repr(self.backend),
            "objects": list(self.objects) or None,
            "decoupler": None if self.decoupler is None else repr(self.decoupler),
        }

    def __repr__(self) -> str:
        found = self.settings()
        more = (
            [f"objects={found['objects']}"] if self.objects else [f"decoupler={found['decoupler']}"] if self.decoupler else []
        )
        return f"FrameScorer({', '.join([found['backend'], *more])})"

    def __call__(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """float64 [T] on the CPU, >= 0.

        Parameters:
            pixels: [T, 3, H, W] as fed to the model, normalised, any float dtype.
            ids: LongTensor [L], the sample's token ids.
        Raises:
            UnsupportedError: for pixels that are no pictures, a prompt without words, or scores that `check_scores` refuses.
        """
        if self.tokenizer is None or self.mean is None or self.std is None:
            raise UnsupportedError(
                "the scorer lacks the model's tokenizer, mean or std; make it with FrameScorer.for_processor."
            )
        if pixels.ndim != 4 or not pixels.numel() or pixels.shape[1] != len(self.mean) or not pixels.dtype.is_floating_point:
            raise UnsupportedError(f"pixels of shape {tuple(pixels.shape)}, {pixels.dtype}: floats [T, 3, H, W] are needed.")
        question = words(self.tokenizer, ids, self.strip, self.placeholders)
        video = _digest(pixels, self.batch)
        with self._lock:
            objects = self._looked_for(question)
            key = (video, question, tuple(objects))
            scores = self._scores.get(key)
            if scores is None:
                asked = self.backend.prepare(question, objects)
                seen = self._seen.get(video) if self.backend.shared else None
                if seen is None:
                    seen = self._look(asked, self._pictures(pixels), len(pixels))
                    if self.backend.shared:
                        self._seen.put(video, seen)
                scores = self._finish(asked, seen)
                self._scores.put(key, scores)
        return scores.clone()

    def score(self, frames: Iterable[Image.Image], question: str, total: int | None = None) -> Tensor:
        """float64 [T] on the CPU, >= 0, of frames that are read as they are needed; nothing is kept for a second call.

        Parameters:
            frames: pictures, such as (frame.image for frame in open_video(path).frames()).
            question: the user's, with its options.
            total: how many frames to expect, for the progress bar.
        Raises:
            UnsupportedError: as when called.
        """
        with self._lock:
            asked = self.backend.prepare(question, self._looked_for(question))
            return self._finish(asked, self._look(asked, frames, total))

    def forget(self) -> None:
        """Score again what was scored before."""
        with self._lock:
            self._scores.clear()
            self._seen.clear()

    def _looked_for(self, question: str) -> list[str]:
        if self.objects or self.decoupler is None:
            return list(self.objects)
        return check_objects(self.decoupler(question))

    def _pictures(self, pixels: Tensor) -> Iterator[Image.Image]:
        for part in pixels.split(self.batch):
            mean, std = self.mean.to(part.device), self.std.to(part.device)
            shown = (part.float() * std + mean).clamp(0, 1).mul(255).round()
            if not shown.isfinite().all():
                raise UnsupportedError("the pixels hold NaN; look at what the model is fed.")
            yield from map(Image.fromarray, shown.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())

    def _look(self, asked: Any, frames: Iterable[Image.Image], total: int | None) -> Tensor:
        frames, parts = iter(frames), []
        with _bar(self.progress, total) as tick:
            while True:
                pictures = list(islice(frames, self.batch))
                if not pictures:
                    break
                if not all(isinstance(picture, Image.Image) for picture in pictures):
                    kinds = {type(picture).__name__ for picture in pictures}
                    raise UnsupportedError(f"frames of type {', '.join(sorted(kinds))}: give PIL pictures.")
                parts.append(self._rows(self.backend.look(asked, pictures), len(pictures)))
                tick(len(pictures))
                del pictures  # or it would be held while the next ones are read
        if not parts:
            raise UnsupportedError("there is no frame to score.")
        return torch.cat(parts)

    def _rows(self, answer: Any, count: int) -> Tensor:
        """A backend's answer on the CPU, one row per frame."""
        try:
            rows = torch.as_tensor(answer).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedError(f"the scorer {self.backend!r} answered no numbers but a {type(answer).__name__}.") from error
        if not rows.ndim or len(rows) != count:
            raise UnsupportedError(
                f"the scorer {self.backend!r} answered {len(rows) if rows.ndim else 'one'} for {count} frames: one score per "
                f"frame is needed, in the order of the frames."
            )
        return rows

    def _finish(self, asked: Any, seen: Tensor) -> Tensor:
        try:
            return torch.from_numpy(check_scores(self.backend.finish(asked, seen), len(seen)))
        except UnsupportedError as error:
            raise UnsupportedError(f"the scorer {self.backend!r}: {error}") from error


class _Recent:
    """What was used last, by key; the oldest leave.

    Parameters:
        entries: how many are kept; values: how many numbers they may hold together.
    """

    def __init__(self, entries: int, values: float = math.inf) -> None:
        self.entries, self.values = entries, values
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def clear(self) -> None:
        self._kept.clear()

    def put(self, key: Hashable, value: Tensor) -> None:
        self._kept[key] = value
        while self._kept and (len(self._kept) > self.entries or sum(v.numel() for v in self._kept.values()) > self.values):
            self._kept.popitem(last=False)


def _digest(pixels: Tensor, batch: int) -> bytes:
    found = hashlib.blake2b(f"{tuple(pixels.shape)} {pixels.dtype}".encode(), digest_size=32)
    for part in pixels.detach().split(batch):
        found.update(part.cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
    return found.digest()


@contextmanager
def _bar(wanted: bool, total: int | None) -> Iterator[Callable[[int], None]]:
    if not wanted:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("frames scored"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
