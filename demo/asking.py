"""One column: a strategy at a budget on a picture (or clip) and a question, its answer token by token, its figures."""

from __future__ import annotations

import inspect
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from vtprune import embedded
from vtprune.cli.console import strategy
from vtprune.pruner import Pruner

from .guard import DemoError, say
from .keeper import Keeper, Stopped
from .watching import Seen, Watch

if TYPE_CHECKING:
    from vtprune.cli.running import Loaded
    from vtprune.reporting import Report

UNPRUNED = "none"


@dataclass(frozen=True)
class Column:
    """What a column asks for: a strategy's name (compositions by +, "none" for unpruned), visual tokens per image."""

    pruner: str
    keep: int

    @property
    def title(self) -> str:
        return "the unpruned model" if self.pruner == UNPRUNED else f"{self.pruner} with {self.keep} tokens"


@dataclass
class Answer:
    """What a column shows.

    Parameters:
        column: what was asked for; text: so far, or whole once `done`.
        report: of the prefill; None before the end, and where it failed.
        settings: of the strategy, JSON-ready; seen: what it looked at.
        ttft_ms: from the call of `generate` to the first token; rate: tokens per second after the first, None with one.
        tokens: that were generated; stopped: by the visitor; error: why there is no answer, in words for the visitor.
    """

    column: Column
    text: str = ""
    report: Report | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    ttft_ms: float | None = None
    rate: float | None = None
    tokens: int = 0
    done: bool = False
    stopped: bool = False
    error: str = ""

    def figures(self) -> dict[str, Any]:
        """The numbers under the column, JSON-ready; shares are of an unpruned run."""
        if self.report is None:
            return {}
        report = self.report
        return {
            "visual_tokens": sum(s.visual_tokens for s in report.samples),
            "entered": sum(len(s.kept) for s in report.samples),
            "equivalent_tokens": report.equivalent_tokens,
            "prefill_ms": report.prefill_ms,
            "selection_ms": report.selection_ms,
            "ttft_ms": self.ttft_ms,
            "tokens_per_second": self.rate,
            "new_tokens": self.tokens,
            "kv_bytes": report.kv_bytes,
            "kv_bytes_full": report.kv_bytes_full,
            "flops": report.flops,
            "flops_full": report.flops_full,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: as `vtprune ask --json` puts it, and what was measured besides."""
        return {
            "pruner": self.column.pruner,
            "keep": self.column.keep,
            "answer": self.text if self.done else None,
            "error": self.error or None,
            "settings": self.settings,
            "measured": {"ttft_ms": self.ttft_ms, "tokens_per_second": self.rate, "new_tokens": self.tokens},
            "report": None if self.report is None else self.report.to_dict(),
        }


def make(column: Column, loaded: Loaded, own: bool, clip: bool = False) -> Pruner | None:
    """The strategy as `vtprune ask` makes it; None for unpruned.

    Parameters:
        own: whether the model is an embedded one; clip: whether a video is asked about.
    Raises:
        UserError, VtpruneError, UnknownStrategyError: with what is wrong.
    """
    if column.pruner == UNPRUNED:
        return None
    if not clip:
        return strategy(column.pruner, column.keep, {}, embedded.schedules() if own else {})
    from vtprune.cli import watching

    pruner = strategy(column.pruner, column.keep, {})
    looks = watching.scorer([pruner], watching.Options(video=True), loaded, own)
    return pruner if looks is None else strategy(column.pruner, column.keep, {"scorer": looks})


@cache
def _listeners() -> tuple[type, type]:
    """What listens to `generate`; made late, as transformers takes its time to import."""
    import torch
    from transformers import StoppingCriteria, TextStreamer

    class Stream(TextStreamer):
        """Hands on words, notes when tokens came."""

        def __init__(self, tokenizer, words: Queue, times: list[float]):
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.words, self.times = words, times

        def put(self, value) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                self.words.put(text)

    class Asked(StoppingCriteria):
        """Ends when the visitor says so."""

        def __init__(self, stop: threading.Event):
            self.stop = stop

        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)

    return Stream, Asked


class Generation:
    """A call of `generate` in the keeper's thread, read piece by piece.

    Parameters:
        keeper: lends the model. prepare: `Loaded` -> inputs of `generate`, called once the model is lent.
        pruner: None for unpruned. stop: ends it at the next token. past: a cache to go on from, or None.
        watch: whether to keep what the strategy looked at.
    """

    def __init__(self, keeper, prepare, pruner: Pruner | None, tokens: int, stop: threading.Event, past=None, watch=True):
        self.keeper, self.prepare, self.pruner, self.tokens = keeper, prepare, pruner, tokens
        self.stop, self.past = stop, past
        self.watch = Watch(pruner) if watch and pruner is not None else None
        self.report: Report | None = None
        self.ids: list[int] = []
        self.fed: list[int] = []
        self.text, self.error = "", None
        self.begin, self.times = 0.0, []
        self._queue: Queue[str | None] = Queue()
        self._seen: list[Seen] = []

    def pieces(self) -> Iterator[str]:
        """The answer's text as it comes.

        Raises:
            Stopped: before the first token; afterwards a stop ends the pieces early.
            Exception: whatever the strategy or model raised.
        """
        job = self.keeper.worker.submit(self._work)
        try:
            while True:
                try:
                    piece = self._queue.get(timeout=0.2)
                except Empty:
                    if self.stop.is_set() and job.cancel():
                        raise Stopped from None  # its turn had not come yet
                    continue
                if piece is None:
                    break
                yield piece
        except GeneratorExit:
            self.stop.set()  # the page is gone
            raise
        if self.error is not None:
            raise self.error

    def seen(self) -> list[Seen]:
        return self._seen

    def _work(self) -> None:
        try:
            with self.keeper.lend(self.stop) as loaded:
                self._generate(loaded)
        except BaseException as error:  # noqa: BLE001  (raised again where the pieces are read)
            self.error = error
        finally:
            self._queue.put(None)

    def _generate(self, loaded: Loaded) -> None:
        import torch
        from transformers import StoppingCriteriaList

        import vtprune
        from vtprune.measure.bench import Everything

        stream, asked = _listeners()
        words = getattr(loaded.processor, "tokenizer", loaded.processor)
        inputs = self.prepare(loaded)
        fed = inputs["input_ids"]
        # transformers 5.24 gave the argument another name
        name = "cache" if "cache" in inspect.signature(type(loaded.model).forward).parameters else "past_key_values"
        more = {} if self.past is None else {name: self.past}
        with vtprune.pruning(loaded.model, self.pruner or Everything()) as session, torch.inference_mode():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
                warnings.filterwarnings("ignore", message=".*exceeds an image's")
                self.begin = time.perf_counter()
                made = loaded.model.generate(
                    **inputs,
                    **more,
                    max_new_tokens=self.tokens,
                    do_sample=False,
                    streamer=stream(words, self._queue, self.times),
                    stopping_criteria=StoppingCriteriaList([asked(self.stop)]),
                )
            self.report = session.report if self._has_picture(inputs) else None
            self.fed, self.ids = fed[0].tolist(), made[0, fed.shape[1] :].tolist()
            self.text = loaded.processor.decode(self.ids, skip_special_tokens=True).strip()
            if self.report is not None:
                # read the clock while the device is at hand
                _ = self.report.prefill_ms, self.report.selection_ms
            if self.watch is not None:
                self._seen = self.watch.seen()

    @staticmethod
    def _has_picture(inputs: dict[str, Any]) -> bool:
        return any(name in inputs for name in ("pixel_values", "pixel_values_videos"))

    @property
    def ttft_ms(self) -> float | None:
        return 1e3 * (self.times[0] - self.begin) if self.times else None

    @property
    def rate(self) -> float | None:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None


def ask(keeper: Keeper, prepare, column: Column, tokens: int, stop: threading.Event, made=None) -> Iterator[Answer]:
    """Run one column; yields the same `Answer` again and again as it fills, last of all with `done` or `error`.

    A strategy that raises ends its own column alone.

    Parameters:
        prepare: `Loaded` -> inputs of `generate`. tokens: most to generate. stop: set it to end the run.
        made: `(Column, Loaded)` -> strategy, in place of `make`.
    """
    answer = Answer(column)
    try:
        loaded = keeper.get(stop=stop)
        pruner = made(column, loaded) if made is not None else make(column, loaded, keeper.embedded)
        answer.settings = pruner.settings() if pruner is not None else {"name": UNPRUNED}
        run = Generation(keeper, prepare, pruner, tokens, stop)
        for piece in run.pieces():
            answer.text += piece
            yield answer
        answer.text, answer.report, answer.seen = run.text, run.report, run.seen()
        answer.ttft_ms, answer.rate, answer.tokens = run.ttft_ms, run.rate, len(run.ids)
        answer.done, answer.stopped = True, stop.is_set()
    except Stopped:
        answer.stopped = True
    except Exception as error:  # noqa: BLE001  (a strategy may raise anything; its column says so, the others go on)
        answer.error = say(error)
    yield answer


def check_columns(columns: list[Column]) -> None:
    """Raise DemoError for more columns than the page has, or budgets without meaning."""
    if not 1 <= len(columns) <= 4:
        raise DemoError(f"{len(columns)} columns: one to four.")
    for column in columns:
        if column.keep < 1:
            raise DemoError(f"a budget of {column.keep} visual tokens: at least 1 must be kept.")
