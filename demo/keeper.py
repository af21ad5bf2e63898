"""The model that everyone shares: loaded in the background, used by one run at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .guard import DemoError, say

if TYPE_CHECKING:
    from vtprune.cli.running import Loaded

log = logging.getLogger("vtprune.demo")


class Stopped(Exception):
    """The visitor said stop."""


class Keeper:
    """Loads a model and its processor, says how far it has got, and lends them out.

    Parameters:
        model: Hugging Face id or folder; None is the embedded one.
        load: makes it; defaults to what `vtprune ask` loads.
        clips: whether it serves videos; of the embedded models another one does.
        warm: run once after loading, so that the first visitor does not wait for it.
    """

    def __init__(
        self,
        model: str | None = None,
        load: Callable[[], Loaded] | None = None,
        warm: Callable[[Keeper], None] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        clips: bool = False,
    ):
        self.model, self.device, self.dtype, self.clips = model, device, dtype, clips
        self._load = load or self._by_name
        self._warm = warm
        self._lock = threading.Lock()
        # one thread for all runs: a new one each time would set up torch's own threads anew
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="vtprune-demo-run")
        self._ready = threading.Event()
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loaded: Loaded | None = None
        self.share, self.doing, self.error = 0.0, "waiting", ""

    @property
    def embedded(self) -> bool:
        return self.model is None

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    def start(self) -> Keeper:
        """Begin to load in the background, once."""
        with self._started:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vtprune-demo-load", daemon=True)
                self._thread.start()
        return self

    def get(self, timeout: float = 600.0, stop: threading.Event | None = None) -> Loaded:
        """The model, as soon as it is there.

        Raises:
            DemoError: if it could not be loaded, or takes longer. Stopped: if `stop` was set meanwhile.
        """
        self.start()
        end = time.monotonic() + timeout
        while not self._ready.wait(0.1):
            if stop is not None and stop.is_set():
                raise Stopped
            if time.monotonic() > end:
                raise DemoError("The model is still being loaded; try again in a moment.")
        if self._loaded is None:
            raise DemoError(self.error)
        return self._loaded

    @contextmanager
    def lend(self, stop: threading.Event) -> Iterator[Loaded]:
        """The model for one run; others wait meanwhile.

        Raises:
            Stopped: if `stop` is set before it is this run's turn.
        """
        loaded = self.get(stop=stop)
        while not self._lock.acquire(timeout=0.1):
            if stop.is_set():
                raise Stopped
        try:
            if stop.is_set():
                raise Stopped
            yield loaded
        finally:
            self._lock.release()

    def _tell(self, share: float, doing: str) -> None:
        self.share, self.doing = share, doing

    def _by_name(self) -> Loaded:
        self._tell(0.05, "starting PyTorch and transformers")
        import transformers  # noqa: F401  (the slow part of a small model's loading)

        from vtprune.cli.running import load

        self._tell(0.4, "reading the weights")
        return load(self.model, self.device, self.dtype, "sdpa", False, self.clips)

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            loaded = self._load()
            self._loaded = loaded
            if self._warm is not None:
                self._tell(0.85, "first run")
                self._ready.set()
                self._warm(self)
            self._tell(1.0, "ready")
            log.info("model ready after %.1f s", time.monotonic() - begin)
        except Exception as error:  # noqa: BLE001  (whatever it is: the page says so, the log holds the story)
            self.error = f"The model could not be loaded. {say(error)}"
            self._tell(1.0, "failed")
        finally:
            self._ready.set()
