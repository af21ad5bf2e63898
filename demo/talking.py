"""The chat's handlers."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from PIL import Image

from . import words
from .asking import Column
from .chatting import Chat, Turn
from .guard import DemoError, check_question, read_picture, say
from .keeper import Stopped
from .session import Session, Source
from .showing import Showing


class Talking(Showing):
    """A chat over one pruned cache."""

    def chat(self, session: Session, text: str, pruner: str, keep: float, example: str, path: str | None) -> Iterator[dict]:
        """One more turn."""
        news, log = self.parts["chat_status"], self.parts["chat_log"]
        try:
            if session is None:
                raise DemoError("This page was left alone for too long and its data was deleted. Reload it.")
            question = check_question(text, self.limits)
            column = Column((pruner or "none").strip(), int(keep))
            if session.chat is not None and session.chat.turns and session.chat.column != column:
                raise DemoError("A chat stays with its strategy and budget, as they made its cache. Start a new one to change.")
            images = self._new_pictures(session, example, path)
            if session.chat is None or not session.chat.turns:
                session.chat = Chat(column)
                images = images or [self._whole(self.source(session))]
            chat = session.chat
            yield {self.parts["chat_text"]: "", self.parts["chat_file"]: None, self.parts["chat_example"]: ""}
            with session.run() as stop, self.line.stand(stop) as place:
                for ahead in place.wait():
                    yield {news: words.waiting(ahead)}
                for step in chat.ask(self.keeper, question, images, self.limits.new_tokens, stop, self.limits.turns):
                    turn = step
                    yield {log: _log(chat), news: words.busy("The model is answering.")}
            if turn.error:
                yield {self.parts["chat_text"]: text, log: _log(chat), news: words.status(turn.error, "vt-bad")}
            else:
                yield {log: _log(chat), news: words.status(_news(turn)), self.parts["session"]: session}
        except GeneratorExit:
            raise
        except Stopped:
            yield {self.parts["chat_text"]: text, news: words.status("Stopped.")}
        except Exception as error:  # noqa: BLE001  (said where the visitor looks)
            yield {news: words.status(say(error), "vt-bad")}

    def chat_anew(self, session: Session) -> dict:
        """Forget the conversation and its cache."""
        if session is not None:
            session.chat = None
        return {self.parts["chat_log"]: [], self.parts["chat_status"]: words.status("A new chat.")}

    def _new_pictures(self, session: Session, example: str, path: str | None) -> list[Image.Image]:
        images = [self._whole(Source.of_gallery(example, self.limits))] if example else []
        if path:
            taken = session.take(path)
            try:
                images.append(read_picture(taken, self.limits)[0])
            finally:
                taken.unlink(missing_ok=True)
        return images

    def _whole(self, source: Source) -> Image.Image:
        if source.clip:
            raise DemoError("The chat takes pictures, and a clip is on the page: choose a picture, or add one to this turn.")
        return read_picture(source.path, self.limits)[0]


def _log(chat: Chat) -> list[dict[str, str]]:
    """Gradio's messages; it would render markup in them, so what was written is escaped."""
    log = []
    for turn in chat.turns:
        pictures = "" if not turn.pictures else f"[{turn.pictures} new picture{'s' if turn.pictures > 1 else ''}] "
        log.append({"role": "user", "content": pictures + escape(turn.question)})
        log.append({"role": "assistant", "content": escape(turn.answer) or "\u2026"})
    return log


def _news(turn: Turn) -> str:
    held = f"the cache holds {turn.held / 2**20:.2f} MiB"
    stopped = "Stopped. " if turn.stopped else ""
    if turn.visual_tokens:
        return f"{stopped}Of {turn.visual_tokens} new visual tokens {turn.cached} stayed in the last layer's cache; {held}."
    return f"{stopped}No new picture; {held}."
