"""Interval timing that does not stall a GPU: wall clock on the CPU, device events elsewhere, read when asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums named intervals; on an accelerator their lengths are read from events only when `total` is called."""

    def __init__(self, device: torch.device):
        self.module = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
        self.intervals: dict[str, list] = {}
        self._inside: set[str] = set()

    def _now(self):
        if self.module is None:
            return time.perf_counter()
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str):
        return name, self._now()

    def stop(self, mark) -> None:
        name, begin = mark
        self.intervals.setdefault(name, []).append((begin, self._now()))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the enclosed work under `name`; a span inside one of the same name counts once."""
        if name in self._inside:
            yield
            return
        self._inside.add(name)
        mark = self.start(name)
        try:
            yield
        finally:
            self.stop(mark)
            self._inside.discard(name)

    def each(self, name: str) -> list[float]:
        """Milliseconds of each interval under `name`."""
        spans = self.intervals.get(name, [])
        if self.module is None:
            return [1e3 * (end - begin) for begin, end in spans]
        self.module.synchronize()
        return [begin.elapsed_time(end) for begin, end in spans]

    def total(self, name: str) -> float:
        """Milliseconds spent under `name`."""
        return sum(self.each(name))

    def fork(self) -> Clock:
        """A clock that starts from what this one has counted."""
        other = Clock(torch.device("cpu"))
        other.module = self.module
        other.intervals = {name: list(spans) for name, spans in self.intervals.items()}
        return other


class NoClock(Clock):
    """Counts nothing; for decode steps, which no report covers."""

    def __init__(self) -> None:
        self.module, self.intervals = None, {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        yield
