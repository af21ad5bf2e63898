"""Starting the demo: flags in, a web server out."""

from __future__ import annotations

import signal

import gradio as gr

from vtprune.cli.demoing import Limits

from .heaps import few_heaps
from .keeper import Keeper
from .ui import HERE, build, warm


def start(
    model: str | None = None,
    port: int | None = None,
    host: str | None = None,
    share: bool = False,
    limits: Limits | None = None,
    device: str = "auto",
    dtype: str = "auto",
    block: bool = True,
    keeper: Keeper | None = None,
    made=None,
):
    """Build the page, begin to load the model, serve.

    Parameters:
        model: Hugging Face id or folder; None is the embedded one. port: None for the first free one from 7860.
        host: to listen on, None for this machine alone; share: make a public link through
            gradio's servers. block: until interrupted.
        keeper, made: in place of those that `model` asks for.
    Returns:
        gradio's Blocks and the local address.
    """
    few_heaps()
    limits = limits or Limits()
    keeper = (keeper or Keeper(model, warm=warm, device=device, dtype=dtype)).start()
    demo = build(keeper, limits, autorun=keeper.embedded, made=made)
    # runs wait in the page's own line, each in a thread of its own; gradio's queue is for what takes no time
    demo.queue(max_size=4 * limits.queue, default_concurrency_limit=8)
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        max_threads=limits.queue + limits.concurrency + 16,
        show_error=False,
        quiet=True,
        max_file_size=f"{limits.megabytes:g}mb",
        state_session_capacity=500,
        enable_monitoring=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[HERE / "style.css"],
    )
    if block:
        print(f"vtprune demo: {address}", flush=True)
        # ended by a service manager it cleans up as after Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        demo.block_thread()
    return demo, address


def theme() -> gr.Theme:
    """System fonts: nothing is fetched from elsewhere."""
    sans, mono = ["system-ui", "Segoe UI", "Roboto", "sans-serif"], ["ui-monospace", "Consolas", "monospace"]
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
