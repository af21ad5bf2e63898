"""What travels with the package: tiny models, a few pictures and a clip, model configurations for weight-free benchmarks."""

from __future__ import annotations

import difflib
from pathlib import Path

from vtprune.pruner import VtpruneError

TINY = "tiny-llava"
TINY_VIDEO = "tiny-video"


class EmbeddedError(VtpruneError, LookupError):
    """Something that should travel with the package is not there, or has another name."""


def assets() -> Path:
    """The folder of embedded files: inside an installed wheel, or at the root of a checkout.

    Raises:
        EmbeddedError: if neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_assets", package.parent / "assets"):
        if (folder / TINY).is_dir():
            return folder
    raise EmbeddedError("this installation lacks the embedded model and pictures; install vtprune from its wheel or checkout.")


def tiny_model() -> Path:
    """Folder of the embedded LLaVA-shaped model."""
    return assets() / TINY


def tiny_video() -> Path:
    """Folder of the embedded model for videos, of LLaVA-OneVision's shape."""
    return assets() / TINY_VIDEO


def pictures() -> dict[str, Path]:
    """The embedded pictures by name."""
    return {path.stem: path for path in sorted((assets() / "pictures").glob("*.png"))}


def clips() -> dict[str, Path]:
    """The embedded video clips by name; beside each lies a .json with questions and their answers."""
    return {path.stem: path for path in sorted((assets() / "clips").glob("*.mp4"))}


def schedules() -> dict[str, Path]:
    """Schedules that were searched on the embedded model, by strategy."""
    found = sorted((assets() / "schedules").glob(f"{TINY}.*.json"))
    return {path.name.split(".")[1]: path for path in found}


def configs() -> dict[str, Path]:
    """The model configurations for weight-free benchmarks, by name."""
    return {path.stem: path for path in sorted((assets() / "configs").glob("*.json"))}


def config(name: str) -> Path:
    """A configuration by its embedded name, or the path of one.

    Raises:
        EmbeddedError: if there is neither; offers the nearest names.
    """
    known = configs()
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise EmbeddedError(f"no configuration {name!r}.{hint} Embedded: {', '.join(known)}; or give a config.json's path.")
