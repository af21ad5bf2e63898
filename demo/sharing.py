"""What a visitor takes home: a card, a report, the code that makes it again, and a link."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from PIL import Image

from vtprune import embedded
from vtprune.cli.demoing import Limits
from vtprune.viz import Entry, contact_sheet, final_picture
from vtprune.viz_timeline import timeline

from .asking import UNPRUNED, Answer, Column
from .session import Session, Source

# what the page starts with, on a picture of 576 visual tokens and on a clip of 1152
START = (Column(UNPRUNED, 576), Column("flowcut", 64), Column("random", 64), Column("fastv", 192))


START_CLIP = (Column(UNPRUNED, 1152), Column("quota", 288), Column("framedrop", 288), Column("fastv", 432))


@dataclass(frozen=True)
class View:
    """What a link says: the picture's name (shipped ones alone), the question, all four columns, how many show, the stage.

    Parameters:
        stage: of the slider; None for the decoder's entry.
    """

    picture: str = "scene-0"
    question: str = ""
    columns: tuple[Column, ...] = START
    count: int = 3
    stage: int | None = None


def to_query(view: View) -> str:
    """The view as a URL's query, without the question mark."""
    pairs = [("picture", view.picture)] if view.picture else []
    pairs += [("question", view.question)] if view.question else []
    pairs += [("column", f"{c.pruner}:{c.keep}") for c in view.columns[: view.count]]
    pairs += [("stage", str(view.stage))] if view.stage is not None else []
    return urlencode(pairs)


def from_query(query: str, limits: Limits) -> View:
    """The view that a link asks for; what makes no sense is left at the start's value, as links come from anyone."""
    try:
        found = parse_qs(query, max_num_fields=32)
    except ValueError:
        found = {}
    one = lambda name: found.get(name, [""])[0]
    columns = []
    for text in found.get("column", [])[:4]:
        name, _, keep = text.rpartition(":")
        if name and len(name) <= 100 and keep.isascii() and keep.isdigit() and 1 <= int(keep[:9]) <= 100_000:
            columns.append(Column(name, int(keep[:9])))
    count = min(4, max(2, len(columns))) if columns else View.count
    picture = one("picture")
    columns += (START_CLIP if picture in embedded.clips() else START)[len(columns) :]
    stage = one("stage")
    return View(
        picture if picture in {**embedded.pictures(), **embedded.clips()} else View.picture,
        one("question")[: limits.characters],
        tuple(columns),
        count,
        int(stage[:4]) if stage.isascii() and stage.isdigit() else None,
    )


def command(source: Source, question: str, column: Column, model: str | None, limits: Limits) -> str:
    """The command line that gives this column's answer and figures."""
    picture, tokens = source.name, limits.new_tokens
    words = ["vtprune", "ask", picture, question]
    options = ["--pruner", column.pruner]
    options += [] if column.pruner == UNPRUNED else ["--keep", str(column.keep)]
    options += ["--video", "--frames", str(limits.frames)] if source.clip else []
    options += [] if model is None else ["--model", model]
    options += [] if tokens == 64 else ["--max-new-tokens", str(tokens)]
    # a question may begin with a dash
    dashed = any(word.startswith("-") for word in words[2:])
    return shlex.join(["vtprune", "ask", *options, "--", picture, question] if dashed else [*words, *options])


def snippet(about: Source, question: str, columns: list[Column], model: str | None, limits: Limits) -> str:
    """Python that gives the same answers and reports."""
    if about.clip:
        return _clip_snippet(about, question, columns, model, limits)
    tokens, shipped = limits.new_tokens, about.shipped
    source = "embedded.tiny_model()" if model is None else repr(model)
    where = f"embedded.pictures()[{about.name!r}]" if shipped else repr(about.name)
    uses = ["import torch", "from transformers import AutoModelForImageTextToText, AutoProcessor", "", "import vtprune"]
    uses += ["from vtprune import embedded"] if model is None or shipped else []
    fitted = [c.pruner for c in columns if model is None and c.pruner in embedded.schedules()]
    cells = []
    for column in columns:
        extra = f", schedule=str(embedded.schedules()[{column.pruner!r}])" if column.pruner in fitted else ""
        if column.pruner != UNPRUNED:
            cells.append(f"    vtprune.create({column.pruner!r}, keep={column.keep}{extra}),")
    lines = [
        *uses,
        "from vtprune.images import open_image",
        "",
        f"source = {source}",
        "processor = AutoProcessor.from_pretrained(source)",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float32 if device == "cpu" else torch.bfloat16',
        "model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()",
        f"picture, question = open_image({where}), {question!r}",
        'chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]',
        "text = processor.apply_chat_template(chat, add_generation_prompt=True)",
        'inputs = processor(images=[picture], text=text, return_tensors="pt").to(model.device, model.dtype)',
        'length = inputs["input_ids"].shape[1]',
        "",
    ]
    run = f"model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)"
    say = "print(processor.decode(out[0, length:], skip_special_tokens=True))"
    if any(c.pruner == UNPRUNED for c in columns):
        lines += [f"out = {run}  # unpruned", say]
    if cells:
        lines += ["for strategy in [", *cells, "]:"]
        lines += ["    with vtprune.pruning(model, strategy) as session:", f"        out = {run}", f"    {say}"]
        lines += ["    print(session.report)"]
    return "\n".join(lines) + "\n"


def _clip_snippet(about: Source, question: str, columns: list[Column], model: str | None, limits: Limits) -> str:
    where = f"embedded.clips()[{about.name!r}]" if about.shipped else repr(about.name)
    run = f"running.answer(loaded, inputs, strategy, None, {limits.new_tokens})"
    lines = [
        *(["from vtprune import embedded"] if about.shipped else []),
        "from vtprune.cli import running, watching",
        "from vtprune.cli.console import strategy as create",
        "from vtprune.video import open_video",
        "",
        f'loaded = running.load({model!r}, "auto", "auto", "sdpa", False, video=True)',
        f"watched = watching.watch(open_video({where}), {limits.frames}, loaded.processor)",
        f"inputs = watching.prepare(loaded, watched, {question!r})",
        "",
        f"for name, keep in {[(c.pruner, c.keep) for c in columns]!r}:",
        f"    strategy = None if name == {UNPRUNED!r} else create(name, keep, {{}})",
        "    if strategy is not None:",
        f"        looks = watching.scorer([strategy], watching.Options(video=True), loaded, {model is None})",
        '        strategy = strategy if looks is None else create(name, keep, {"scorer": looks})',
        f"    text, report = {run}",
        "    print(text)",
        "    print(report)",
    ]
    return "\n".join(lines) + "\n"


def shown(session: Session) -> list[Answer]:
    return [answer for answer in session.answers if answer is not None]


def card(session: Session, fit: str) -> Image.Image:
    """The comparison on one page."""
    entries = []
    for answer in shown(session):
        title = "unpruned" if answer.column.pruner == UNPRUNED else f"{answer.column.pruner}, {answer.column.keep} tokens"
        if answer.report is None:
            entries.append(Entry(title, answer.error or "stopped", ""))
            continue
        figures = answer.figures()
        caption = (
            f"{figures['equivalent_tokens']:.0f} of {figures['visual_tokens']} tokens, "
            f"{figures['flops'] / figures['flops_full']:.0%} of the FLOPs, {figures['kv_bytes'] / 2**20:.2f} MiB cache"
        )
        sample = answer.report.samples[0]
        picture = session.source.preview
        if session.source.clip:
            picture = timeline(sample, session.source.frames, fit=fit, columns=4, bare=True)
        elif sample.views_of(0):
            picture = final_picture(sample, picture, fit)
        entries.append(Entry(title, caption, f"\u201c{answer.text}\u201d", picture))
    return contact_sheet(entries, session.question)


def report(session: Session, model: str) -> dict[str, Any]:
    """All figures of the page, JSON-ready."""
    return {
        "question": session.question,
        "video" if session.source.clip else "images": session.source.name if session.source.clip else [session.source.name],
        "model": model,
        "columns": [answer.to_dict() for answer in shown(session)],
    }


def files(session: Session, fit: str, model: str) -> list[str]:
    """The card and the report, written into the session's own folder."""
    folder = session.folder()
    picture, data = folder / "vtprune-comparison.png", folder / "vtprune-report.json"
    card(session, fit).save(picture)
    Path(data).write_text(json.dumps(report(session, model), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [str(picture), str(data)]
