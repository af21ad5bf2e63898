"""`vtprune demo`. Finds the demo's files, hands over to them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from vtprune.cli.console import UserError, err, mistakes

PACKAGE = "vtprune_demo"


def demo(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder. Default: the embedded tiny model.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Make a public link through gradio's servers.")] = False,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Of an uploaded picture, or a clip's frame.")] = 25.0,
    max_megabytes: Annotated[float, typer.Option(min=0.01, help="Of an uploaded file.")] = 20.0,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Of an uploaded clip.")] = 60.0,
    max_frames: Annotated[int, typer.Option(min=1, help="Of a clip that the model is fed.")] = 32,
    max_characters: Annotated[int, typer.Option(min=1, help="Of a question.")] = 1000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    max_turns: Annotated[int, typer.Option(min=1, help="Of a chat.")] = 12,
    concurrency: Annotated[int, typer.Option(min=1, help="Visitors served at a time; the others queue.")] = 1,
    max_queue: Annotated[int, typer.Option(min=1, help="Visitors that may wait.")] = 64,
    idle_minutes: Annotated[float, typer.Option(min=0.1, help="Without a click, until a visitor's data is deleted.")] = 30.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
) -> None:
    """Open a page in the browser that shows strategies side by side."""
    with mistakes():
        serving = load(folder())
        limits = serving.Limits(
            megapixels=max_megapixels,
            megabytes=max_megabytes,
            seconds=max_seconds,
            frames=max_frames,
            characters=max_characters,
            new_tokens=max_new_tokens,
            turns=max_turns,
            concurrency=concurrency,
            queue=max_queue,
            idle=idle_minutes,
        )
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
        try:
            serving.start(model, port, host, share, limits, device, dtype)
        except OSError as error:
            raise UserError(f"cannot listen on {host or 'this machine'}, port {port or 'from 7860'}: {error}") from error
        except KeyboardInterrupt:
            err().print("stopped")


def folder() -> Path:
    """Where the demo's files are: inside an installed wheel, or at the root of a checkout.

    Raises:
        UserError: if they are in neither.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "_demo", package.parent / "demo"):
        if (place / "serving.py").is_file():
            return place
    raise UserError("this installation lacks the demo's files; install vtprune from its wheel or checkout.")


def load(place: Path) -> ModuleType:
    """The demo's module `serving`, from a folder of any name.

    Raises:
        UserError: without gradio.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the demo needs gradio: pip install "vtprune[demo]"')
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, place / "__init__.py", submodule_search_locations=[str(place)])
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.serving")
