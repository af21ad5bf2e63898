"""The page's pieces as they look for a session: columns, overlays, stories, links."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from vtprune.cli.demoing import Limits

from . import depth, gallery, sharing, words
from .asking import Column, make
from .guard import DemoError
from .keeper import Keeper
from .line import Line
from .patch import story
from .session import Session, Source
from .watching import ATTENTION

COLUMNS = 4
KEPT, HEAT = "kept tokens", "attention"


class Showing:
    """What to write into which part; `parts` names gradio's components.

    Parameters:
        keeper: of the model for pictures; clips: of the one for videos, the same if it takes both.
        made: makes strategies, as in `asking.ask`.
    """

    def __init__(self, keeper: Keeper, clips: Keeper, limits: Limits, made=None):
        self.keeper, self.clips, self.limits, self._made = keeper, clips, limits, made
        self.line = Line(limits.concurrency, limits.queue)
        self.parts: dict[str, Any] = {}

    # ------------------------------------------------------------------ the model and its shape

    def keeper_of(self, source: Source) -> Keeper:
        return self.clips if source.clip else self.keeper

    def made(self, source: Source):
        """What makes the strategies for this source."""
        if self._made is not None:
            return self._made
        return functools.partial(make, own=self.keeper.embedded, clip=source.clip)

    def places(self, source: Source | None = None) -> list[depth.Place]:
        """Where the stage slider may stand; before the model is there, as for the embedded one."""
        keeper = self.keeper if source is None else self.keeper_of(source)
        there = keeper.ready and not keeper.error
        return depth.places(*(depth.depths(keeper.get().model) if there else (8, 8)))

    def place(self, source: Source, stage: int) -> depth.Place:
        places = self.places(source)
        return places[max(0, min(int(stage), len(places) - 1))]

    def fit(self, source: Source) -> str:
        """How the processor makes pictures square."""
        processor = self.keeper_of(source).get().processor
        part = getattr(processor, "video_processor" if source.clip else "image_processor", None)
        return "crop" if getattr(part, "do_center_crop", False) else "stretch"

    def total(self, source: Source) -> int:
        """Visual tokens of the picture or clip, as the processor makes places for them."""
        loaded = self.keeper_of(source).get()
        ids = source.prepare("?", self.limits)(loaded)["input_ids"]
        config, kind = loaded.model.config, "video" if source.clip else "image"
        token = getattr(config, f"{kind}_token_id", None) or getattr(config, f"{kind}_token_index", None)
        count = int((ids == token).sum())
        # a separator behind a clip's frames is no visual token
        return count - count % len(source.frames) if source.clip and source.frames else count

    # ------------------------------------------------------------------ pieces

    def source(self, session: Session) -> Source:
        if session.source is None:
            raise DemoError("Your picture was deleted after a while without a click: choose an example or upload one.")
        return session.source

    def show_source(self, session: Session) -> dict:
        """The picture beside the question, and the examples for it."""
        source = session.source
        shown = [e.label for e in gallery.of(source.name)] if source.shipped else []
        alt = gallery.alt(source.name) if source.shipped else f"Your {'clip' if source.clip else 'picture'} {source.name}"
        return {
            self.parts["preview"]: gr.update(value=source.preview, alt_text=alt, label=source.name),
            self.parts["examples"]: gr.update(choices=shown, value=None, visible=bool(shown)),
        }

    def show_count(self, count: int) -> dict:
        return {self.parts[f"column{n}"]: gr.update(visible=n < int(count)) for n in range(COLUMNS)}

    def blank(self) -> dict:
        """Columns without answers."""
        out = {}
        for n in range(COLUMNS):
            out[self.parts[f"image{n}"]] = None
            out |= {self.parts[f"{part}{n}"]: "" for part in ("caption", "answer", "figures", "found")}
        return out

    def show_answer(self, session: Session, n: int, stage: int, view: str) -> dict:
        """Column `n` once its run is over."""
        answer = session.answers[n]
        image, line, text, table = (self.parts[f"{part}{n}"] for part in ("image", "caption", "answer", "figures"))
        if answer.error:
            return {image: None, line: "", text: "", table: words.error(answer.error)}
        if answer.report is None:
            return {text: answer.text, table: words.status("Stopped before there was anything to show.")}
        return {
            **self.show_overlay(session, n, stage, view),
            text: answer.text,
            table: words.figures(answer, session.unpruned()),
        }

    def show_overlay(self, session: Session, n: int, stage: int, view: str) -> dict:
        """Column `n`'s picture at the slider's place, and the line under it."""
        answer, source, image, line = session.answers[n], session.source, self.parts[f"image{n}"], self.parts[f"caption{n}"]
        sample, place, fit = answer.report.samples[0], self.place(source, stage), self.fit(source)
        count = f"{len(depth.left(sample, place))} of {sample.visual_tokens} tokens {place.title}"
        if source.clip:
            drawn = depth.strip(sample, source.frames, place, fit)
            alt = f"{count}, over {len(source.frames)} frames; bars above each frame show its score and its tokens"
            return {image: gr.update(value=drawn, alt_text=alt), line: words.caption(count)}
        if not sample.views_of(0):
            plain = gr.update(value=source.preview, alt_text="The picture; its tokens form no grid to draw")
            return {image: plain, line: words.caption(f"{count}. They form no grid, so none is drawn.")}
        one = sample.grids[0] is not None
        visited = depth.visit(answer.seen, place, ATTENTION) if view == HEAT and one else None
        if visited is None:
            drawn = depth.draw(sample, source.preview, place, fit, session.marked)
            text = count if one else f"{count}, those of the tiles drawn"
            if view == HEAT:
                text += ". This strategy reads no attention." if one else ". Attention is drawn on one grid alone."
        else:
            drawn = depth.heat(sample, visited, ATTENTION, source.preview, fit, session.marked)
            text = f"Attention that the strategy saw {visited.where}; grey had left."
        alt = words.seen_alt(answer, sample, place, visited is not None)
        return {image: gr.update(value=drawn, alt_text=alt), line: words.caption(text)}

    def show_stories(self, session: Session) -> dict:
        told = []
        if session.marked is not None:
            having = [a for a in session.answers if a is not None and a.report is not None and a.report.samples[0].grids[0]]
            told = [(a, story(a.report.samples[0], a.seen, session.marked)) for a in having]
        return {self.parts["story"]: words.stories(told)}

    def show_links(self, session: Session, question: str, asked: list[Column], stage: int) -> dict:
        """Code, commands and the link that make the page again."""
        source, model = session.source, self.keeper.model
        columns = tuple(asked) + sharing.START[len(asked) :]
        link = sharing.View(source.name if source.shipped else "", question, columns, len(asked), int(stage))
        lines = [sharing.command(source, question, column, model, self.limits) for column in asked]
        return {
            self.parts["snippet"]: sharing.snippet(source, question, asked, model, self.limits),
            self.parts["command"]: "\n".join(lines),
            self.parts["address"]: sharing.to_query(link),
        }
