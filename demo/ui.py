"""The page's layout, and which click goes where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from vtprune.cli.demoing import Limits
from vtprune.registry import available

from . import gallery, sharing
from .asking import UNPRUNED
from .heaps import give_back
from .keeper import Keeper
from .page import Page
from .session import Session, Source
from .showing import COLUMNS, HEAT, KEPT

HERE = Path(__file__).parent
TITLE = "vtprune: see what pruning keeps"
# what the browser does with a new link: it becomes the page's address, without loading anything
ADDRESS = "(query) => { if (query) history.replaceState(null, '', '?' + query + location.hash); }"
LEGEND = (
    "<p class='vt-legend'><span><i style='border-color:#56b4e9'></i>kept</span><span><i style='border-color:#e69f00'>"
    "</i>merged group</span><span><i style='border-color:#777;background:#333'></i>dropped</span>"
    "<span>bars over a clip's frames: score (if any) and tokens</span></p>"
)
MEASURED = """
Every column runs the whole model, one column after the other. Shares are of an unpruned run of the same input; times are
compared with the unpruned column's, where there is one.

- **Tokens in**: visual tokens that enter the decoder.
- **Equivalent tokens**: mean over decoder layers of the visual tokens computed on. Budgets are spent in this unit.
- **Prefill**: vision encoder, projector and decoder up to the first token, all that vtprune adds included; one run.
- **First token**: time from the call of `generate`. **Tokens / s**: after the first one.
- **KV cache**: bytes of keys and values after prefill. **FLOPs**: two per multiply-add, no LM head.
- **Selection**: attention rows, scores, selections, gathers, masks; as a share of the unpruned prefill.

The embedded model is small and knows drawn shapes only: it shows how strategies work, not how they rank on photographs.
Uploaded files are deleted when the page is closed, or after a while without a click.
"""


def strategies() -> list[tuple[str, str]]:
    """(label, name) of what a column may run on pictures."""
    found = sorted(available().items(), key=lambda item: (item[1].modality == "video", item[0]))
    labels = [(name if cls.modality != "video" else f"{name} (clips)", name) for name, cls in found]
    return [("unpruned", UNPRUNED), *labels, ("flowcut+fastv+evict",) * 2]


def warm(keeper: Keeper) -> None:
    """Run the start page's first columns once, so that nobody waits for what only a first run does."""
    import threading

    from .asking import ask

    limits, name = Limits(), gallery.names()[0]
    prepare = Source.of_gallery(name, limits).prepare(gallery.of(name)[0].question, limits)
    for column in sharing.START[:2]:
        for _ in ask(keeper, prepare, column, 2, threading.Event()):
            pass


def build(keeper: Keeper, limits: Limits, autorun: bool = True, made=None) -> gr.Blocks:
    """The page.

    Parameters:
        keeper: of the model; limits: what visitors may ask; autorun: answer the start page's question on opening.
        made: makes strategies, as in `asking.ask`.
    """
    clips = Keeper(None, clips=True, device=keeper.device, dtype=keeper.dtype) if keeper.embedded else keeper
    page = Page(keeper, clips, limits, made)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 600)) as demo:
        parts = page.parts
        idle = limits.idle * 60
        parts["session"] = gr.State(None, time_to_live=idle, delete_callback=_close)
        model = "an embedded tiny model that knows drawn shapes" if keeper.embedded else keeper.model
        gr.HTML(
            f"<h1>What does visual token pruning keep?</h1><p>One picture, one question, several strategies on {_text(model)}."
            " Drag a budget and watch the answer.</p>",
            elem_classes="vt-title",
        )
        parts["loading"] = gr.HTML(elem_id="loading")
        parts["timer"] = gr.Timer(0.5)
        _question(parts, limits)
        _controls(parts, page)
        with gr.Row(equal_height=False):
            for n in range(COLUMNS):
                _column(parts, n)
        with gr.Tabs():
            with gr.Tab("Why did a patch go?"):
                _patch(parts)
            with gr.Tab("Chat over the pruned cache"):
                _chat(parts, limits)
            with gr.Tab("Keep and share"):
                _share(parts)
            with gr.Tab("What is measured"):
                gr.Markdown(MEASURED)
        _wire(demo, page, limits, autorun)
    return demo


def _text(text: str) -> str:
    from html import escape

    return escape(text)


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()


def _leaving(demo: gr.Blocks, page: Page) -> Callable:
    """What is done when a tab is closed."""

    def leave(request: gr.Request) -> None:
        page.leave(request)
        # gradio keeps a copy of the whole page for each of the last `state_session_capacity` tabs, closed ones, too
        demo.state_holder.session_data.pop(request.session_hash, None)
        demo.state_holder.time_last_used.pop(request.session_hash, None)
        give_back()

    return leave


def _question(parts: dict[str, Any], limits: Limits) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            parts["gallery"] = gr.Gallery(
                gallery.pictures(), columns=5, fit_columns=True, rows=1, height=110, allow_preview=False, label="Examples",
                show_label=False, interactive=False, buttons=[], elem_id="gallery", object_fit="contain",
            )  # fmt: skip
            parts["upload"] = gr.File(
                label=f"Your picture or clip (to {limits.megabytes:g} MB, {limits.megapixels:g} MP, {limits.seconds:g} s)",
                file_count="single", file_types=["image", "video"], type="filepath", height=150, elem_id="upload",
            )  # fmt: skip
        with gr.Column(scale=1, min_width=160):
            parts["preview"] = gr.Image(
                type="pil", format="webp", interactive=False, height=255, label="Picture", buttons=[], elem_id="preview"
            )
        with gr.Column(scale=3, min_width=280):
            parts["question"] = gr.Textbox(
                label="Question", lines=1, max_lines=4, placeholder="What shape is the white object?", elem_id="question"
            )
            with gr.Row():
                parts["ask"] = gr.Button("Ask", variant="primary", elem_id="ask", min_width=100)
                parts["stop"] = gr.Button("Stop", variant="stop", elem_id="stop", min_width=100)
            parts["examples"] = gr.Radio([], label="Questions for this picture, one of each type", elem_id="examples")
            parts["status"] = gr.HTML("", elem_id="status", min_height=40)


def _controls(parts: dict[str, Any], page: Page) -> None:
    places = page.places()
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            parts["stage"] = gr.Slider(
                0, len(places) - 1, value=len(places) - 2, step=1, elem_id="stage", buttons=[],
                label="Stage: drag from the vision encoder to the cache",
            )  # fmt: skip
            parts["place"] = gr.Textbox(
                places[-2].title, show_label=False, container=False, interactive=False, elem_id="place", elem_classes="vt-place"
            )
        with gr.Column(scale=2, min_width=280), gr.Row():
            parts["view"] = gr.Radio([KEPT, HEAT], value=KEPT, label="Show", elem_id="view", min_width=140)
            parts["count"] = gr.Radio([2, 3, 4], value=3, label="Columns", elem_id="count", min_width=120)
    gr.HTML(LEGEND)


def _column(parts: dict[str, Any], n: int) -> None:
    start = sharing.START[n]
    with gr.Column(min_width=250, visible=n < 3, elem_id=f"column{n}") as parts[f"column{n}"]:
        parts[f"pruner{n}"] = gr.Dropdown(
            strategies(), value=start.pruner, label=f"Strategy {n + 1}", allow_custom_value=True, elem_id=f"pruner{n}"
        )
        parts[f"keep{n}"] = gr.Slider(
            1, 576, value=start.keep, step=1, label="Budget (visual tokens)", elem_id=f"keep{n}", buttons=[]
        )
        parts[f"image{n}"] = gr.Image(
            type="pil", format="webp", interactive=False, label=f"Patches of column {n + 1}", show_label=False,
            buttons=["fullscreen"], elem_id=f"image{n}", elem_classes="vt-overlay",
        )  # fmt: skip
        parts[f"caption{n}"] = gr.HTML("", elem_id=f"caption{n}")
        parts[f"answer{n}"] = gr.Textbox(
            label="Answer", interactive=False, lines=1, max_lines=8, elem_id=f"answer{n}", elem_classes="vt-answer"
        )
        parts[f"figures{n}"] = gr.HTML("", elem_id=f"figures{n}")
        parts[f"find{n}"] = gr.Button("Find the smallest budget with the unpruned answer", size="sm", elem_id=f"find{n}")
        parts[f"found{n}"] = gr.HTML("", elem_id=f"found{n}")


def _patch(parts: dict[str, Any]) -> None:
    with gr.Row():
        parts["row"] = gr.Number(label="Row", value=0, precision=0, minimum=0, elem_id="row", min_width=100)
        parts["col"] = gr.Number(label="Column", value=0, precision=0, minimum=0, elem_id="col", min_width=100)
        parts["look"] = gr.Button("Look at this patch", elem_id="look", min_width=140)
    parts["story"] = gr.HTML(
        "<p class='vt-note'>Click a patch of a picture above, or give its row and column.</p>", elem_id="story"
    )


def _chat(parts: dict[str, Any], limits: Limits) -> None:
    with gr.Row():
        parts["chat_pruner"] = gr.Dropdown(
            strategies(), value="flowcut", label="Strategy of the chat", allow_custom_value=True, elem_id="chat_pruner"
        )
        parts["chat_keep"] = gr.Slider(
            1, 576, value=128, step=1, label="Budget (visual tokens)", elem_id="chat_keep", buttons=[]
        )
    parts["chat_log"] = gr.Chatbot(
        label="Chat; it begins with the picture above", height=320, render_markdown=False, sanitize_html=True,
        elem_id="chat_log", buttons=[], allow_tags=False, latex_delimiters=[],
    )  # fmt: skip
    with gr.Row():
        parts["chat_text"] = gr.Textbox(label="Your turn", lines=1, max_lines=3, elem_id="chat_text", scale=4)
        parts["chat_send"] = gr.Button("Send", variant="primary", elem_id="chat_send", min_width=90, scale=1)
        parts["chat_new"] = gr.Button("New chat", elem_id="chat_new", min_width=90, scale=1)
    with gr.Row():
        choices = [("no new picture", ""), *((f"{name}: {gallery.alt(name)}", name) for name in gallery.still())]
        parts["chat_example"] = gr.Dropdown(choices, value="", label="A further picture with this turn", elem_id="chat_example")
        parts["chat_file"] = gr.File(
            label="Or your own", file_count="single", file_types=["image"], type="filepath", height=90, elem_id="chat_file"
        )
    parts["chat_status"] = gr.HTML("", elem_id="chat_status")


def _share(parts: dict[str, Any]) -> None:
    gr.Markdown("The page's address is the link to this comparison (uploaded pictures do not travel with it).")
    parts["save"] = gr.Button("Make the card (PNG) and the report (JSON)", elem_id="save")
    parts["files"] = gr.File(label="Card and report", file_count="multiple", interactive=False, elem_id="files")
    parts["command"] = gr.Code(language="shell", label="On the command line", interactive=False, elem_id="command")
    parts["snippet"] = gr.Code(language="python", label="In Python", interactive=False, elem_id="snippet")
    parts["address"] = gr.Textbox(visible="hidden", elem_id="address")


def _wire(demo: gr.Blocks, page: Page, limits: Limits, autorun: bool) -> None:
    parts = page.parts
    each = lambda *names: [parts[f"{name}{n}"] for n in range(COLUMNS) for name in names]
    asked = [parts[name] for name in ("session", "question", "count", "stage", "view")]
    asked += [parts[f"pruner{n}"] for n in range(COLUMNS)] + [parts[f"keep{n}"] for n in range(COLUMNS)]
    told = [parts[name] for name in ("status", "session", "snippet", "command", "address", "story")]
    news, drawn = each("image", "caption", "answer", "figures", "keep"), each("image", "caption")
    shown = [parts[name] for name in ("session", "count", "stage", "view")]
    looked = [parts[name] for name in ("session", "status", "place", "story")]
    # whose turn it is is the line's business, which can be left and says how long it is
    queued = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "undocumented"}
    quick = {"show_progress": "hidden", "concurrency_limit": 8, "api_visibility": "undocumented"}

    fields = [parts[name] for name in ("session", "question", "count", "stage", "place", "preview", "examples", "status")]
    opened = demo.load(page.open, None, [*fields, *each("pruner", "keep", "column")], api_name="open", **quick)
    demo.unload(_leaving(demo, page))
    ask = {"fn": page.ask_all, "inputs": asked, "outputs": [*told, *news], **queued}
    if autorun:
        opened.then(**ask, api_name="ask_first")
    parts["timer"].tick(page.progress, None, [parts["loading"], parts["timer"], parts["stage"]], **quick, api_name="progress")

    chosen = [parts[name] for name in ("session", "question", "preview", "examples", "status")]
    chosen += each("image", "caption", "answer", "figures", "found", "pruner", "keep")
    picked = parts["gallery"].select(page.choose, parts["session"], chosen, **quick, api_name="choose")
    picked.then(**ask, api_name="ask_example")
    typed = parts["examples"].input(page.choose_question, parts["examples"], parts["question"], **quick, api_name="question")
    typed.then(**ask, api_name="ask_question")
    parts["upload"].upload(
        page.upload, [parts["session"], parts["upload"]], [*chosen, parts["upload"]], **quick, api_name="upload"
    )
    parts["ask"].click(**ask, api_name="ask")
    parts["question"].submit(**ask, api_name="ask_enter")
    for n in range(COLUMNS):
        again = {"fn": page.ask_one(n), "inputs": asked, "outputs": [*told, *news], **queued}
        parts[f"pruner{n}"].input(**again, trigger_mode="always_last", api_name=f"strategy{n}")
        parts[f"keep{n}"].input(**again, trigger_mode="always_last", api_name=f"budget{n}")
        found = parts[f"find{n}"].click(
            page.find(n), [parts["session"], parts["question"], parts[f"pruner{n}"]],
            [parts["status"], parts["session"], parts[f"found{n}"], parts[f"keep{n}"]],
            **queued, api_name=f"find{n}",
        )  # fmt: skip
        found.then(**again, api_name=f"found{n}")
        parts[f"image{n}"].select(page.mark(n), shown, [*looked, *drawn], **quick, api_name=f"mark{n}")

    scrubbed = {"fn": page.scrub, "inputs": shown, "outputs": [*looked[:3], *drawn], **quick}
    parts["stage"].change(**scrubbed, trigger_mode="always_last", api_name="scrub")
    parts["view"].input(**scrubbed, api_name="view")
    parts["count"].input(page.count, parts["count"], each("column"), **quick, api_name="count")
    parts["look"].click(
        page.point, [*shown, parts["row"], parts["col"]], [*looked, *drawn], **quick,
        api_name="point",
    )  # fmt: skip

    told = [parts[f"chat_{name}"] for name in ("log", "text", "file", "example", "status")]
    said = [parts["session"], *(parts[f"chat_{name}"] for name in ("text", "pruner", "keep", "example", "file"))]
    for event, name in ((parts["chat_send"].click, "chat"), (parts["chat_text"].submit, "chat_enter")):
        event(page.chat, said, [*told, parts["session"], parts["status"]], **queued, api_name=name)
    parts["chat_new"].click(
        page.chat_anew,
        parts["session"],
        [parts["chat_log"], parts["chat_status"], parts["status"]],
        **quick,
        api_name="chat_new",
    )
    parts["save"].click(page.files, parts["session"], [*looked[:2], parts["files"]], **quick, api_name="files")
    parts["address"].change(None, parts["address"], None, js=ADDRESS)
    parts["stop"].click(page.stop, parts["session"], parts["status"], queue=False, api_name="stop")
