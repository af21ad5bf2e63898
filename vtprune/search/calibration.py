"""Calibration questions, and how a model under pruning answers them compared with the same model in full.

The yardstick is the full model's own greedy answer. A pruned model reads the prompt (and decides what to keep from the
prompt alone), then the answer's tokens are fed over its cache: one prefill per question and no generation, and a value
that moves long before an answer flips.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtprune.api import _SESSION, pruning
from vtprune.engine.cache import cache_name
from vtprune.families import locate
from vtprune.images import ImageError, open_image
from vtprune.pruner import Pruner, UnsupportedError, VtpruneError
from vtprune.schedule import Data
from vtprune.search.judge import Outcome

FILE = "questions.jsonl"
MAX_BYTES = 1 << 26
MAX_IMAGES = 64
# what of a processor's output runs along the prompt; the rest belongs to the pictures
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class CalibrationError(VtpruneError, ValueError):
    """A calibration set that cannot be used; the message says where and what to do."""


@dataclass(frozen=True)
class Question:
    """One line of a set: pictures (one or more), question, reference answer (or None), line number."""

    images: tuple[Path, ...]
    text: str
    answer: str | None
    line: int


@dataclass(frozen=True)
class Calibration:
    """A set of questions.

    Parameters:
        name: of its folder or file; questions: in the order of the file; sha256: of questions and pictures.
    """

    name: str
    questions: tuple[Question, ...]
    sha256: str

    @classmethod
    def load(cls, path: str | Path, most: int | None = None) -> Calibration:
        """Read a set: a JSONL file, or a folder with a `questions.jsonl`.

        Each line is an object with `image` (a path below the file's folder, or a list of them), `question`, and
        optionally `answer`; other names are left alone.

        Parameters:
            most: use the first so many questions, None for all.
        Raises:
            CalibrationError: with the line number, for whatever is wrong with the file; pictures are looked for here
                and opened later.
        """
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        lines = _lines(file)
        root = file.parent.resolve()
        digest = hashlib.sha256()
        questions, hashes = [], {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if most is not None and len(questions) >= most:
                break
            question = _question(line, number, root, file)
            for image in question.images:
                if image not in hashes:
                    hashes[image] = _hash(image, file, number)
            parts = [question.text, question.answer, *(hashes[image] for image in question.images)]
            digest.update(json.dumps(parts).encode() + b"\n")
            questions.append(question)
        if not questions:
            raise CalibrationError(f"{str(file)!r} holds no questions{'' if most is None else f' (of {most} asked for)'}.")
        name = path.resolve().name or "calibration"
        return cls(name, tuple(questions), digest.hexdigest())

    @property
    def data(self) -> Data:
        """What a schedule says of it."""
        return Data(self.name, len(self.questions), self.sha256)

    def encode(
        self,
        model: nn.Module,
        processor: Any,
        batch: int = 8,
        max_new_tokens: int = 16,
        tick: Callable[[int], None] = lambda done: None,
        answers: bool = True,
    ) -> Proxy:
        """Prompts and pictures as `model` takes them, and the full model's answers; see `Proxy`."""
        return Proxy(model, processor, self, batch, max_new_tokens, tick, answers)


def _lines(file: Path) -> list[str]:
    name = repr(str(file))
    try:
        if not file.is_file():
            raise CalibrationError(f"no file {name}; give a folder with a {FILE}, or a JSONL file.")
        with file.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise CalibrationError(f"{name} cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_BYTES:
        raise CalibrationError(f"{name} has more than {MAX_BYTES >> 20} MiB; a few hundred questions are enough.")
    try:
        return raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{name} is no UTF-8 text ({error.reason} at byte {error.start}).") from error


def _question(line: str, number: int, root: Path, file: Path) -> Question:
    where = f"{str(file)!r}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is no JSON: {error}.") from error
    if not isinstance(entry, dict):
        raise CalibrationError(f'{where}: an object with "image" and "question" was expected.')
    text, answer, images = entry.get("question"), entry.get("answer"), entry.get("image")
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError(f'{where}: "question" must be non-empty text, found {text!r}.')
    if answer is not None and not isinstance(answer, str):
        raise CalibrationError(f'{where}: "answer" must be text or absent, found {answer!r}.')
    names = images if isinstance(images, list) else [images]
    if not names or len(names) > MAX_IMAGES or not all(isinstance(n, str) and n for n in names):
        raise CalibrationError(f'{where}: "image" must be a path, or a list of 1 to {MAX_IMAGES}, found {images!r}.')
    return Question(tuple(_inside(n, root, where) for n in names), text, answer, number)


def _inside(name: str, root: Path, where: str) -> Path:
    """The picture's real path, if it lies below `root` even after symbolic links."""
    try:
        path = (root / name).resolve()
        outside = Path(name).is_absolute() or not path.is_relative_to(root)
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # null bytes, endless links, names too long
        raise CalibrationError(f"{where}: the picture's path {name!r} means nothing here ({error}).") from error
    if outside:
        raise CalibrationError(
            f"{where}: the picture {name!r} lies outside of the set's folder; put it there and give its relative path."
        )
    if not there:
        raise CalibrationError(f"{where}: no picture {name!r}.")
    return path


def _hash(image: Path, file: Path, number: int) -> str:
    try:
        with image.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CalibrationError(f"{str(file)!r}, line {number}: {image.name!r} cannot be read: {error.strerror}.") from error


@dataclass
class _Batch:
    """Questions that run together: their numbers, the left-padded text, and their pictures.

    Parameters:
        pictures: per row the keys into `Proxy.pixels`; extra: what the processor made of the pictures where they cannot
            be told apart, per row.
    """

    rows: list[int]
    text: dict[str, Tensor]
    pictures: list[list[Path]]
    extra: list[dict[str, Tensor]]

    def __getitem__(self, at: list[int]) -> _Batch:
        start = int(self.text["attention_mask"][at].any(0).int().argmax())  # padding that they have in common
        return _Batch(
            [self.rows[i] for i in at],
            {name: value[at, start:] for name, value in self.text.items()},
            [self.pictures[i] for i in at],
            [self.extra[i] for i in at],
        )


class Proxy:
    """Calibration questions on one model. `full` is the bare model's outcome, `measure` a pruned one's.

    Greedy answers are taken from the bare logits, the image placeholder excepted, without what a generation config may
    add (penalties, suppressed tokens).

    Parameters:
        model: bare, with its weights, in evaluation mode; processor: its own.
        batch: questions per forward; max_new_tokens: most tokens of an answer.
        tick: told how many questions are answered, after each batch.
        answers: False leaves the full model alone; then there is `tokens`, but no `full`, `measure` or `generate`.
    Raises:
        CalibrationError: if a picture cannot be opened, or a question holds the image placeholder.
        UnsupportedError: if the model is wrapped, or its logits are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        calibration: Calibration,
        batch: int = 8,
        max_new_tokens: int = 16,
        tick: Callable[[int], None] = lambda done: None,
        answers: bool = True,
    ):
        if batch < 1 or max_new_tokens < 1:
            raise CalibrationError(f"batch={batch}, max_new_tokens={max_new_tokens}: at least 1.")
        self.model, self.processor, self.questions = model, processor, calibration.questions
        self.site = locate(model)
        if getattr(self.site.base, _SESSION, None) is not None:
            raise UnsupportedError("this model is wrapped, but the full model is the yardstick; vtprune.unwrap(model) first.")
        self.max_new_tokens = max_new_tokens
        ends = model.generation_config.eos_token_id
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1).tolist()
        # transformers >= 5.18 takes image features by themselves, so that an image is encoded once
        self.by_features = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        self.pixels: dict[Path, Tensor] = {}
        self.batches = list(self._batches(batch))
        self.features: dict[Path, Tensor] = {}
        if answers:
            with torch.inference_mode():
                self._answer(tick)

    @property
    def visual_tokens(self) -> float:
        """Mean over questions of visual tokens per image, unpruned."""
        placeholders = sum(int((group.text["input_ids"] == self.site.image_token_id).sum()) for group in self.batches)
        return placeholders / sum(len(question.images) for question in self.questions)

    def measure(self, pruner: Pruner, positions: str | None = None) -> Outcome:
        """How the model under `pruner` does; it is bare again afterwards."""
        logprobs, same, right = ([None] * len(self.questions) for _ in range(3))
        with self._pruned(pruner, positions) as features:
            for group in self.batches:
                self._features_of(group, features)
                values, agree = self._forced(group, features)
                # another answer can only be right where the full model's was wrong, and there is something to compare
                unsure = [
                    i
                    for i, row in enumerate(group.rows)
                    if not agree[i] and not self.full.right[row] and self.questions[row].answer is not None
                ]
                said = self._greedy(group[unsure], features)[0] if unsure else []
                hits = dict(zip(unsure, said, strict=True))
                for i, row in enumerate(group.rows):
                    logprobs[row], same[row] = values[i], agree[i]
                    right[row] = self.full.right[row] if agree[i] else i in hits and self._is_right(row, hits[i])
        return Outcome(tuple(logprobs), tuple(same), tuple(right))

    def generate(self, pruner: Pruner, positions: str | None = None) -> tuple[list[str], float]:
        """Greedy answers under `pruner`, the slow way, and the share that is right; to confirm what `measure` says."""
        answers = [""] * len(self.questions)
        with self._pruned(pruner, positions) as features:
            for group in self.batches:
                self._features_of(group, features)
                for row, tokens in zip(group.rows, self._greedy(group, features)[0], strict=True):
                    answers[row] = self._text(tokens)
        right = [text == self._reference(row) for row, text in enumerate(answers)]
        return answers, sum(right) / len(right)

    def tokens(self, pruner: Pruner, positions: str | None = None) -> tuple[float, float]:
        """Mean over questions of equivalent visual tokens per image under `pruner`, and of their share of all."""
        counts, shares = [], []
        with self._pruned(pruner, positions) as features:
            for group in self.batches:
                self._features_of(group, features)
                self._prefill(group, features)
                for sample in features.session.report.samples:
                    counts.append(sample.equivalent_tokens / max(1, len(sample.images)))
                    shares.append(sample.equivalent_tokens / sample.visual_tokens)
        return sum(counts) / len(counts), sum(shares) / len(shares)

    # ------------------------------------------------------------------ prompts and pictures

    def _batches(self, size: int) -> Iterator[_Batch]:
        read = lru_cache(maxsize=4)(open_image)
        token = getattr(self.processor, "image_token", "<image>")
        # questions about the same pictures stand together, so that a picture is encoded for one batch
        order = sorted(range(len(self.questions)), key=lambda i: self.questions[i].images)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            texts, extras = [], []
            for row in rows:
                made = self._process(self.questions[row], token, read)
                texts.append({name: made.pop(name)[0] for name in _TEXT if name in made})
                pictures = self.questions[row].images
                pixels = made.get("pixel_values")
                if set(made) == {"pixel_values"} and pixels.ndim == 4 and len(pixels) == len(pictures):
                    self.pixels.update(zip(pictures, pixels.to(self.model.dtype), strict=True))
                    made = {}
                else:
                    self.by_features = False
                extras.append(made)
            longest = max(len(text["input_ids"]) for text in texts)
            padded = {}
            for name in texts[0]:
                padded[name] = torch.stack(
                    [torch.cat([t[name].new_full((longest - len(t[name]),), self._padding(name)), t[name]]) for t in texts]
                ).to(self.model.device)
            yield _Batch(rows, padded, [list(self.questions[row].images) for row in rows], extras)

    def _padding(self, name: str) -> int:
        # masked, so any id will do that stands for no picture
        return int(name == "input_ids" and self.site.image_token_id == 0)

    def _process(self, question: Question, token: str, read: Callable[[Path], Image.Image]) -> dict[str, Tensor]:
        if token in question.text:
            raise CalibrationError(
                f"line {question.line}: the question holds {token!r}, which marks a picture's place; pictures come first by "
                f"themselves."
            )
        try:
            images = [read(path) for path in question.images]
        except ImageError as error:
            raise CalibrationError(f"line {question.line}: {error}") from error
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question.text}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            pictures = f"{token}\n" * len(images)
            text = f"USER: {pictures}{question.text} ASSISTANT:"
        try:
            made = dict(self.processor(images=images, text=text, return_tensors="pt"))
        except (ValueError, TypeError, AttributeError) as error:
            raise CalibrationError(f"line {question.line}: the processor cannot take this question: {error}") from error
        made.setdefault("attention_mask", torch.ones_like(made["input_ids"]))
        return made

    # ------------------------------------------------------------------ running

    @contextmanager
    def _pruned(self, pruner: Pruner, positions: str | None) -> Iterator[_Features]:
        """The model under `pruner`, and where the image features of its batches are."""
        anew, bare = bool({"shrink", "encode"} & set(pruner.stages())), _Features(None, self.features, False)
        with torch.inference_mode():
            if not anew:
                for group in self.batches:
                    self._features_of(group, bare)
            with pruning(self.model, pruner, positions=positions) as session:
                yield _Features(session, {} if anew else self.features, anew)

    def _features_of(self, group: _Batch, features: _Features) -> None:
        """Encode what a batch needs; features of a strategy that works in the encoder are dropped when done with."""
        if not self.by_features:
            return
        if features.anew:
            needed = {picture for row in group.pictures for picture in row}
            features.known = {picture: known for picture, known in features.known.items() if picture in needed}
        self._encode(group, features.known)

    def _encode(self, group: _Batch, known: dict[Path, Tensor]) -> None:
        missing = list(dict.fromkeys(p for row in group.pictures for p in row if p not in known))
        if missing:
            pixels = torch.stack([self.pixels[picture] for picture in missing]).to(self.model.device)
            output = self.site.base.get_image_features(pixels, return_dict=True)
            known.update(zip(missing, output.pooler_output, strict=True))

    def _prefill(self, group: _Batch, features: _Features):
        vision: dict[str, Any] = {}
        if self.by_features:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            wanted = [features.known[picture] for row in group.pictures for picture in row]
            vision["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=wanted)}
        else:
            rows = [
                extra or {"pixel_values": torch.stack([self.pixels[p] for p in pictures])}
                for extra, pictures in zip(group.extra, group.pictures, strict=True)
            ]
            for name in rows[0]:
                joined = torch.cat([row[name] for row in rows]).to(self.model.device)
                vision[name] = joined.to(self.model.dtype) if joined.is_floating_point() else joined
        return self.model(**group.text, **vision, use_cache=True, logits_to_keep=1)

    def _next(self, output, group: _Batch, fed: Tensor, sofar: int):
        """Feed tokens over the cache; `sofar` were fed after the prompt before."""
        mask = group.text["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(len(mask), sofar + fed.shape[1])], 1)
        name = cache_name(self.model)
        return self.model(input_ids=fed, attention_mask=mask, use_cache=True, **{name: getattr(output, name)})

    def _logprobs(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        logits[..., self.site.image_token_id] = float("-inf")
        found = logits.log_softmax(-1)
        if bool(found.isnan().any()):
            raise UnsupportedError("the model's logits are not finite on the calibration questions; try another --dtype.")
        return found

    def _forced(self, group: _Batch, features: _Features) -> tuple[list[float], list[bool]]:
        """Mean log-probability of the full model's answers, and whether each would be the greedy one."""
        answers = [self.answers[row] for row in group.rows]
        longest = max(map(len, answers))
        filler = self._padding("input_ids")
        tokens = torch.tensor([a + [filler] * (longest - len(a)) for a in answers], device=self.model.device)
        counted = torch.tensor([[i < len(a) for i in range(longest)] for a in answers], device=self.model.device)
        output = self._prefill(group, features)
        logits = output.logits[:, -1:]
        if longest > 1:
            logits = torch.cat([logits, self._next(output, group, tokens[:, :-1], 0).logits], 1)
        logprobs = self._logprobs(logits)
        mine = logprobs.gather(-1, tokens[..., None])[..., 0].masked_fill(~counted, 0.0)
        same = ((logprobs.argmax(-1) == tokens) | ~counted).all(1)
        return (mine.sum(1) / counted.sum(1)).tolist(), same.tolist()

    def _greedy(self, group: _Batch, features: _Features) -> tuple[list[list[int]], list[float]]:
        """Greedy answers, their end token included, and their mean log-probabilities."""
        output = self._prefill(group, features)
        ends = torch.tensor(self.ends, dtype=torch.long, device=self.model.device)
        tokens, values = [], []
        for step in range(self.max_new_tokens):
            best = self._logprobs(output.logits[:, -1]).max(-1)
            tokens.append(best.indices)
            values.append(best.values)
            if bool(torch.isin(torch.stack(tokens), ends).any(0).all()) or step + 1 == self.max_new_tokens:
                break
            output = self._next(output, group, best.indices[:, None], step)
        answers, means = [], []
        for said, value in zip(torch.stack(tokens, 1).tolist(), torch.stack(values, 1).tolist(), strict=True):
            length = next((at + 1 for at, token in enumerate(said) if token in self.ends), len(said))
            answers.append(said[:length])
            means.append(sum(value[:length]) / length)
        return answers, means

    def _answer(self, tick: Callable[[int], None]) -> None:
        """The full model's answers and their outcome."""
        self.answers: list[list[int]] = [[] for _ in self.questions]
        self.said: list[str] = ["" for _ in self.questions]
        logprobs = [0.0] * len(self.questions)
        features = _Features(None, self.features, False)
        done = 0
        for group in self.batches:
            self._features_of(group, features)
            for row, tokens, value in zip(group.rows, *self._greedy(group, features), strict=True):
                self.answers[row], logprobs[row], self.said[row] = tokens, value, self._text(tokens)
            done += len(group.rows)
            tick(done)
        right = tuple(self.said[row] == self._reference(row) for row in range(len(self.questions)))
        self.full = Outcome(tuple(logprobs), (True,) * len(right), right)

    # ------------------------------------------------------------------ answers

    def _text(self, tokens: Sequence[int]) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True).strip()

    def _reference(self, row: int) -> str:
        answer = self.questions[row].answer
        return self.said[row] if answer is None else answer.strip()

    def _is_right(self, row: int, tokens: Sequence[int]) -> bool:
        return self._text(tokens) == self._reference(row)


class _Features:
    """Image features by picture: the bare model's, or (anew) those of a strategy that works in the encoder."""

    def __init__(self, session, known: dict[Path, Tensor], anew: bool):
        self.session, self.known, self.anew = session, known, anew
