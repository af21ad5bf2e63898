"""What one visitor has on the page; lives in gradio's session state and nowhere else."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vtprune import embedded
from vtprune.cli.demoing import Limits

from .asking import UNPRUNED, Answer, Column
from .guard import PREVIEW, DemoError, is_clip, read_clip, read_picture
from .keeper import Stopped

if TYPE_CHECKING:
    from vtprune.cli.running import Loaded
    from vtprune.video import Frame

    from .chatting import Chat


@dataclass
class Source:
    """The picture or clip that is asked about.

    Parameters:
        name: as a command line would call it: a shipped one's name, or the uploaded file's own name.
        path: of the file; preview: for drawing, of a clip its first frame; notes: what should be said about it.
        shipped: whether it travels with vtprune; clip: whether it is a video.
        frames: of a clip, those that the model was fed, once it was; total: visual tokens, once they were counted.
    """

    name: str
    path: Path
    preview: Image.Image
    notes: list[str] = field(default_factory=list)
    shipped: bool = False
    clip: bool = False
    frames: list[Frame] = field(default_factory=list)
    total: int | None = None

    @classmethod
    def of_gallery(cls, name: str, limits: Limits) -> Source:
        """A shipped picture or clip by name.

        Raises:
            DemoError: if there is none of that name.
        """
        path = {**embedded.pictures(), **embedded.clips()}.get(name)
        if path is None:
            raise DemoError(f"There is no example {name[:40]!r}.")
        source = cls.of_file(path, limits)
        source.name, source.shipped = name, True
        return source

    @classmethod
    def of_file(cls, path: Path, limits: Limits) -> Source:
        """An uploaded picture or clip.

        Raises:
            DemoError: if it is neither, or too large.
        """
        if is_clip(path):
            _, first, notes = read_clip(path, limits)
            return cls(path.name, path, first, notes, clip=True)
        picture, notes = read_picture(path, limits)
        return cls(path.name, path, _small(picture), notes)

    def prepare(self, question: str, limits: Limits):
        """`Loaded` -> inputs of `generate`, for `asking.ask`."""

        def inputs(loaded: Loaded) -> dict[str, Any]:
            from vtprune.cli import running, watching

            if not self.clip:
                return running.prepare(loaded, [read_picture(self.path, limits)[0]], question)
            watched = watching.watch(read_clip(self.path, limits)[0], limits.frames, loaded.processor)
            self.frames = watched.frames
            return watching.prepare(loaded, watched, question)

        return inputs


class Session:
    """One browser tab: its picture, its columns' answers, its chat, its runs. `close` leaves nothing behind."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.source: Source | None = None
        self.question = ""
        self.answers: list[Answer | None] = [None] * 4
        # visual tokens that the budget sliders span
        self.total = 576
        self.marked: int | None = None
        self.chat: Chat | None = None
        self.closed = False
        self._runs: set[threading.Event] = set()
        self._folder: Path | None = None
        self._guard = threading.Lock()

    @contextmanager
    def run(self) -> Iterator[threading.Event]:
        """The event that stops a run, while it lasts.

        Raises:
            Stopped: if the tab is closed already.
        """
        if self.closed:
            raise Stopped
        stop = threading.Event()
        self._runs.add(stop)
        try:
            yield stop
        finally:
            # a page that went away in the middle stops its run
            stop.set()
            self._runs.discard(stop)

    def stop(self) -> int:
        """End all runs at their next token; how many there were."""
        running = list(self._runs)
        for event in running:
            event.set()
        return len(running)

    def folder(self) -> Path:
        """A folder of this session's own.

        Raises:
            Stopped: if the tab is closed: what comes late from it is not kept.
        """
        with self._guard:
            if self.closed:
                raise Stopped
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="vtprune-demo-"))
                # also where gradio drops the session without a word, and when the server ends
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            return self._folder

    def take(self, upload: str | Path) -> Path:
        """Move an uploaded file out of the shared cache into this session's folder.

        Raises:
            DemoError: if it is gone.
        """
        upload = Path(upload)
        target = self.folder() / secrets.token_hex(4) / upload.name
        target.parent.mkdir()
        try:
            shutil.move(upload, target)
        except OSError as error:
            raise DemoError("The uploaded file is gone; upload it again.") from error
        return target

    def show(self, source: Source) -> None:
        """Put another picture on the page; the one before is deleted if it was uploaded."""
        self.forget()
        if self.source is not None and not self.source.shipped and self.source.path != source.path:
            self.source.path.unlink(missing_ok=True)
        self.source = source

    def forget(self) -> None:
        """Drop the answers, as picture or question changed."""
        self.answers = [None] * 4
        self.marked = None

    def unpruned(self) -> Answer | None:
        """The answer of an unpruned column, to compare with."""
        found = (a for a in self.answers if a is not None and a.column.pruner == UNPRUNED and a.done and not a.stopped)
        return next(found, None)

    def close(self) -> None:
        """Stop what runs, delete every file, drop every tensor."""
        with self._guard:
            self.closed = True
            folder, self._folder = self._folder, None
        self.stop()
        self.source, self.chat, self.question = None, None, ""
        self.forget()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def columns_of(pruners: list[str], keeps: list[float], count: int) -> list[Column]:
    """The first `count` columns of the page."""
    return [Column((name or UNPRUNED).strip(), int(keep)) for name, keep in zip(pruners, keeps, strict=True)][:count]


def _small(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((PREVIEW, PREVIEW))
    return picture
