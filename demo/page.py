"""What happens when something on the page is clicked; knows nothing of the page's layout but its parts' names."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import gradio as gr

from vtprune.cli.demoing import Limits

from . import depth, gallery, sharing, words
from .asking import Column, ask
from .finding import smallest
from .guard import DemoError, check_question, say
from .keeper import Keeper, Stopped
from .session import Session, Source, columns_of
from .showing import COLUMNS
from .talking import Talking


def spoken(method: Callable) -> Callable:
    """Turn whatever goes wrong into the page's status line; nothing else of it reaches the browser.

    A session that came in is handed back: gradio counts its idle time from there.
    """

    @functools.wraps(method)
    def wrapped(self, *args):
        same = {self.parts["session"]: args[0]} if args and isinstance(args[0], Session) else {}
        try:
            return {**same, **method(self, *args)}
        except Stopped:
            return {**same, self.parts["status"]: words.status("Stopped.")}
        except Exception as error:  # noqa: BLE001  (the last stop before gradio)
            return {**same, self.parts["status"]: words.status(say(error), "vt-bad")}

    return wrapped


def spoken_steps(method: Callable) -> Callable:
    """`spoken` for what fills the page step by step."""

    @functools.wraps(method)
    def wrapped(self, *args):
        try:
            yield from method(self, *args)
        except GeneratorExit:
            raise
        except Stopped:
            yield {self.parts["status"]: words.status("Stopped.")}
        except Exception as error:  # noqa: BLE001  (the last stop before gradio)
            yield {self.parts["status"]: words.status(say(error), "vt-bad")}

    return wrapped


class Page(Talking):
    """The handlers."""

    def __init__(self, keeper: Keeper, clips: Keeper, limits: Limits, made=None):
        super().__init__(keeper, clips, limits, made)
        # only to find a closed tab's session: holds none alive
        self._open: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()

    # ------------------------------------------------------------------ coming and going

    @spoken
    def open(self, request: gr.Request):
        """A tab was opened: its session, and what its link says."""
        session = Session()
        self._open[request.session_hash or session.id] = session
        params = request.query_params
        pairs = params.multi_items() if hasattr(params, "multi_items") else dict(params).items()
        view = sharing.from_query(urlencode(list(pairs)), self.limits)
        session.show(Source.of_gallery(view.picture, self.limits))
        places = self.places(session.source)
        stage = len(places) - 2 if view.stage is None else min(view.stage, len(places) - 1)
        return {
            self.parts["session"]: session,
            self.parts["question"]: view.question or gallery.of(view.picture)[0].question,
            self.parts["count"]: view.count,
            self.parts["stage"]: gr.update(value=stage, maximum=len(places) - 1),
            self.parts["place"]: places[stage].title,
            **self._span(session, view.columns),
            **self.show_source(session),
            **self.show_count(view.count),
        }

    def leave(self, request: gr.Request) -> None:
        """A tab was closed."""
        session = self._open.pop(request.session_hash or "", None)
        if session is not None:
            session.close()

    def progress(self):
        """The model's loading, until it is over."""
        done = self.keeper.share >= 1
        out = {
            self.parts["loading"]: words.loading(self.keeper.share, self.keeper.doing, self.keeper.error),
            self.parts["timer"]: gr.update(active=not done),
        }
        if done and not self.keeper.error:
            out[self.parts["stage"]] = gr.update(maximum=len(self.places()) - 1)
        return out

    # ------------------------------------------------------------------ picture and question

    @spoken
    def choose(self, session: Session, event: gr.SelectData):
        """An example was clicked."""
        names = gallery.names()
        name = names[event.index] if 0 <= event.index < len(names) else ""
        out = self._put(_alive(session), Source.of_gallery(name, self.limits))
        return {self.parts["question"]: gallery.of(name)[0].question, **out}

    def choose_question(self, label: str):
        """An example question was chosen."""
        found = next((e.question for e in gallery.examples() if e.label == label), None)
        return gr.skip() if found is None else found

    @spoken
    def upload(self, session: Session, path: str | None):
        """A file came."""
        if not path:
            return {self.parts["status"]: words.status("")}
        taken = _alive(session).take(path)
        try:
            source = Source.of_file(taken, self.limits)
        except Exception as error:  # noqa: BLE001  (whatever it is, the file goes)
            taken.unlink(missing_ok=True)
            return {self.parts["upload"]: None, self.parts["status"]: words.status(say(error), "vt-bad")}
        text = " ".join([f"{source.name} is ready: ask about it.", *source.notes])
        return {self.parts["upload"]: None, **self._put(session, source), self.parts["status"]: words.status(text)}

    def _put(self, session: Session, source: Source) -> dict:
        """Another picture or clip; where one follows the other, the strategies change with it."""
        changed = session.source is None or session.source.clip != source.clip
        session.show(source)
        if source.clip:
            self.clips.start()
        out = {**self.show_source(session), **self.blank(), self.parts["status"]: words.status("")}
        if changed:
            out |= self._span(session, sharing.START_CLIP if source.clip else sharing.START)
        return out

    def _span(self, session: Session, columns: tuple[Column, ...]) -> dict:
        """Columns with their budgets, on sliders that reach to all visual tokens."""
        # until a source's tokens are counted, those of the embedded models are a good guess
        session.total = 1152 if session.source.clip else 576
        out = {self.parts[f"pruner{n}"]: column.pruner for n, column in enumerate(columns)}
        for n, column in enumerate(columns):
            out[self.parts[f"keep{n}"]] = gr.update(maximum=max(session.total, column.keep), value=column.keep)
        return out

    # ------------------------------------------------------------------ asking

    @spoken_steps
    def ask_all(self, session: Session, question: str, count: int, stage: int, view: str, *columns) -> Iterator[dict]:
        """Ask all columns, one after the other, answers streaming in."""
        yield from self._ask(session, question, count, stage, view, columns, range(int(count)))

    def ask_one(self, at: int) -> Callable:
        """The handler that asks column `at` alone, after its strategy or budget changed."""

        @spoken_steps
        def asked(self: Page, session, question, count, stage, view, *columns) -> Iterator[dict]:
            yield from self._ask(session, question, count, stage, view, columns, [at])

        return functools.partial(asked, self)

    def _ask(self, session, question, count, stage, view, columns, which) -> Iterator[dict]:
        session, source = _alive(session), self.source(session)
        question = check_question(question, self.limits)
        asked = columns_of(list(columns[:COLUMNS]), list(columns[COLUMNS:]), COLUMNS)
        if question != session.question:
            session.forget()
            session.question = question
        keeper, status = self.keeper_of(source), self.parts["status"]
        yield {status: words.status(""), self.parts["session"]: session}
        with session.run() as stop, self.line.stand(stop) as place:
            for ahead in place.wait():
                yield {status: words.waiting(ahead)}
            if not keeper.ready:
                yield {status: words.busy("The model is being loaded; the answers come as soon as it is there.")}
            keeper.get(stop=stop)
            fitting = self._fitted(session, source, asked)
            if fitting:
                asked = [Column(c.pruner, max(1, round(c.keep * fitting))) for c in asked]
                yield {self.parts[f"keep{n}"]: gr.update(maximum=session.total, value=c.keep) for n, c in enumerate(asked)}
            prepare = source.prepare(question, self.limits)
            for n in which:
                yield {status: words.busy(f"Asking {asked[n].title}.")}
                session.answers[n] = None
                for answer in ask(keeper, prepare, asked[n], self.limits.new_tokens, stop, self.made(source)):
                    session.answers[n] = answer
                    yield {self.parts[f"answer{n}"]: answer.text or "\u2026"}
                yield self.show_answer(session, n, stage, view)
                if stop.is_set():
                    break
        # the unpruned figures may have come last
        out = {}
        for n, answer in enumerate(session.answers):
            if answer is not None and answer.report is not None:
                out[self.parts[f"figures{n}"]] = words.figures(answer, session.unpruned())
                out[self.parts[f"answer{n}"]] = answer.text
        stopped = any(session.answers[n] is not None and session.answers[n].stopped for n in which)
        out[status] = words.status(" ".join(["Stopped." if stopped else "Done.", *source.notes]))
        yield {**out, **self.show_links(session, question, asked[: int(count)], stage), **self.show_stories(session)}

    def _fitted(self, session: Session, source: Source, asked: list[Column]) -> float | None:
        """By what the budgets have to be multiplied, as this source has another number of tokens than the sliders span."""
        if source.total is None:
            source.total = self.total(source)
        if source.total == session.total or not source.total:
            return None
        factor, session.total = source.total / session.total, source.total
        return factor

    def stop(self, session: Session):
        """End what runs for this tab."""
        stopped = session is not None and session.stop()
        return words.status("Stopped." if stopped else "Nothing is running.")

    # ------------------------------------------------------------------ understanding

    @spoken
    def scrub(self, session: Session, count: int, stage: int, view: str):
        """The stage slider or the view changed: draw anew what is there."""
        source = self.source(_alive(session))
        out = {self.parts["place"]: self.place(source, stage).title}
        for n, answer in enumerate(session.answers):
            if answer is not None and answer.report is not None:
                out |= self.show_overlay(session, n, stage, view)
        return out

    def mark(self, at: int) -> Callable:
        """The handler of a click on column `at`'s picture."""

        @spoken
        def marked(self: Page, session, count, stage, view, event: gr.SelectData):
            answer = _alive(session).answers[at]
            if answer is None or answer.report is None or session.source.clip:
                return {}
            sample = answer.report.samples[0]
            drawn = depth.draw(sample, session.source.preview, self.places()[0], self.fit(session.source))
            session.marked = depth.token_at(sample, drawn.size, *event.index)
            return {**self.scrub(session, count, stage, view), **self.show_stories(session)}

        def handler(session, count, stage, view, event: gr.SelectData):
            return marked(self, session, count, stage, view, event)

        return handler

    @spoken
    def point(self, session: Session, count: int, stage: int, view: str, row: float, column: float):
        """A patch by its row and column, for those who do not click."""
        answer = next((a for a in _alive(session).answers if a is not None and a.report is not None), None)
        if answer is None:
            raise DemoError("Ask a question first; then there are patches to look at.")
        grid = None if session.source.clip else answer.report.samples[0].grids[0]
        if grid is None:
            raise DemoError(
                "These tokens form no one grid (frames of a clip, tiles of a picture), so no patch can be pointed at."
            )
        if row is None or column is None or not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise DemoError(f"Rows go from 0 to {grid[0] - 1} and columns from 0 to {grid[1] - 1}.")
        session.marked = int(row) * grid[1] + int(column)
        return {**self.scrub(session, count, stage, view), **self.show_stories(session)}

    def find(self, at: int) -> Callable:
        """The handler that finds column `at`'s smallest budget."""

        @spoken_steps
        def found(self: Page, session, question, pruner) -> Iterator[dict]:
            part, source = self.parts[f"found{at}"], self.source(_alive(session))
            prepare = source.prepare(check_question(question, self.limits), self.limits)
            keeper, tokens = self.keeper_of(source), self.limits.new_tokens
            try:
                with session.run() as stop, self.line.stand(stop) as place:
                    for ahead in place.wait():
                        yield {part: words.waiting(ahead)}
                    for search in smallest(keeper, prepare, pruner or "", tokens, stop, self.made(source)):
                        yield {part: words.searching(search)}
            except Stopped:
                yield {part: words.status("Stopped.")}
                return
            if search.best is not None:
                yield {self.parts[f"keep{at}"]: search.best, self.parts["session"]: session}

        return functools.partial(found, self)

    # ------------------------------------------------------------------ the rest

    def count(self, count: int):
        """The number of columns changed."""
        return self.show_count(count)

    @spoken
    def files(self, session: Session):
        """Write the card and the report."""
        if not sharing.shown(_alive(session)):
            raise DemoError("Ask a question first; then there is something to save.")
        model = self.keeper_of(session.source).get().name
        return {self.parts["files"]: sharing.files(session, self.fit(session.source), model)}


def _alive(session: Session | None) -> Session:
    if session is None:
        raise DemoError("This page was left alone for too long and its data was deleted. Reload it.")
    return session
