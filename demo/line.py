"""Whose turn it is: runs stand in one line, are told how many are before them, and may leave it at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .guard import DemoError
from .keeper import Stopped


class Place:
    """One run's place in the line."""

    def __init__(self, line: Line, stop: threading.Event):
        self._line, self._stop = line, stop

    def wait(self) -> Iterator[int]:
        """Until it is this run's turn; yields how many are before it, each time that this changes.

        Raises:
            Stopped: if the run's `stop` is set meanwhile.
        """
        said = 0
        while ahead := self._line.ahead(self):
            if ahead != said:
                said = ahead
                yield ahead
            self._line.changed(0.2)
            if self._stop.is_set():
                raise Stopped


class Line:
    """First come, first served.

    Parameters:
        at_once: runs at a time; most: runs that may wait.
    """

    def __init__(self, at_once: int, most: int):
        self.at_once, self.most = at_once, most
        self._places: list[Place] = []
        self._change = threading.Condition()

    @contextmanager
    def stand(self, stop: threading.Event) -> Iterator[Place]:
        """A place at the end, given up when the block ends, however it ends.

        Raises:
            DemoError: if too many wait already.
        """
        place = Place(self, stop)
        with self._change:
            waiting = len(self._places) - self.at_once
            if waiting >= self.most:
                raise DemoError(f"{waiting} others wait already, more than are let in; try again in a moment.")
            self._places.append(place)
        try:
            yield place
        finally:
            with self._change:
                self._places.remove(place)
                self._change.notify_all()

    def ahead(self, place: Place) -> int:
        """How many have to end before this one begins."""
        with self._change:
            return max(0, self._places.index(place) - self.at_once + 1)

    def changed(self, timeout: float) -> None:
        """Wait until the line moves, at most so many seconds."""
        with self._change:
            self._change.wait(timeout)
