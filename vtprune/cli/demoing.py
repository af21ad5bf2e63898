"""`vtprune demo`. Finds the demo's files, hands over to them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, get_type_hints

import typer

from vtprune.cli.console import UserError, err, mistakes

PACKAGE = "vtprune_demo"


@dataclass(frozen=True)
class Limits:
    """What visitors may ask of the demo. Every field is a flag of `vtprune demo`, which is made from it."""

    megapixels: Annotated[
        float, typer.Option("--max-megapixels", min=0.01, help="Of an uploaded picture, or a clip's frame.")
    ] = 25.0
    megabytes: Annotated[float, typer.Option("--max-megabytes", min=0.01, help="Of an uploaded file.")] = 20.0
    seconds: Annotated[float, typer.Option("--max-seconds", min=0.1, help="Of an uploaded clip.")] = 60.0
    frames: Annotated[int, typer.Option("--max-frames", min=1, help="Of a clip that the model is fed.")] = 32
    characters: Annotated[int, typer.Option("--max-characters", min=1, help="Of a question.")] = 1000
    new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 64
    turns: Annotated[int, typer.Option("--max-turns", min=1, help="Of a chat.")] = 12
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Runs at a time; the others wait in line.")] = 1
    queue: Annotated[int, typer.Option("--max-queue", min=1, help="Runs that may wait.")] = 64
    idle: Annotated[
        float, typer.Option("--idle-minutes", min=0.1, help="Without a click, until a visitor's data is deleted.")
    ] = 30.0


def limited(command: Callable) -> Callable:
    """A command whose `**limits` are the fields of `Limits`, for typer, which reads signatures."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(Limits, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    flags = [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(Limits)]
    command.__signature__ = signature.replace(parameters=[*own, *flags])
    return command


@limited
def demo(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder. Default: the embedded tiny model.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Make a public link through gradio's servers.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
    **limits: float,
) -> None:
    """Open a page in the browser that shows strategies side by side."""
    with mistakes():
        serving = load(folder())
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
        try:
            serving.start(model, port, host, share, Limits(**limits), device, dtype)
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
