"""What comes from a visitor is checked here, and what goes wrong is put into words that give nothing away."""

from __future__ import annotations

import logging
import secrets
import traceback
import warnings
from pathlib import Path

from PIL import Image

from vtprune.cli.console import UserError
from vtprune.cli.demoing import Limits
from vtprune.images import FORMATS, ImageNote, open_image
from vtprune.pruner import VtpruneError
from vtprune.registry import UnknownStrategyError
from vtprune.video import Video, VideoNote, open_video

CLIPS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv"}
PREVIEW = 1024  # pixels of the long side of what overlays are drawn on, at most

log = logging.getLogger("vtprune.demo")

# errors that say on purpose what was found and what to do
SPOKEN = (VtpruneError, UserError, UnknownStrategyError)


class DemoError(VtpruneError, ValueError):
    """Something a visitor can mend; the message is shown as it is."""


def check_question(text: str | None, limits: Limits) -> str:
    """The question without space around it.

    Raises:
        DemoError: if it is empty or too long.
    """
    text = (text or "").strip()
    if not text:
        raise DemoError("The question is empty: write one, or choose an example.")
    if len(text) > limits.characters:
        raise DemoError(f"The question has {len(text)} characters; at most {limits.characters} are taken.")
    return text


def read_picture(path: str | Path, limits: Limits) -> tuple[Image.Image, list[str]]:
    """An uploaded picture and what should be said about it.

    Raises:
        DemoError: if the file is too large or no picture; names no path but the file's own name.
    """
    path = Path(path)
    check_size(path, limits)
    pixels = _claimed_pixels(path)
    if pixels is not None and pixels > limits.megapixels * 1e6:
        raise DemoError(
            f"{path.name!r} has {pixels / 1e6:.0f} megapixels; at most {limits.megapixels:g} are taken. Scale it down first."
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImageNote)
        try:
            picture = open_image(path)
        except VtpruneError as error:
            raise DemoError(_without_path(str(error), path)) from error
    notes = [_without_path(str(w.message), path) for w in caught if issubclass(w.category, ImageNote)]
    return picture, notes


def is_clip(path: str | Path) -> bool:
    """Whether a file is taken for a video, by its name; animations are taken for pictures."""
    return Path(path).suffix.lower() in CLIPS


def read_clip(path: str | Path, limits: Limits) -> tuple[Video, Image.Image, list[str]]:
    """An uploaded video, its first frame, and what should be said about it.

    Raises:
        DemoError: if the file is too large, too long or no video; names no path but the file's own name.
    """
    path = Path(path)
    check_size(path, limits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VideoNote)
        try:
            video = open_video(path)
            if video.duration > limits.seconds:
                raise DemoError(f"{path.name!r} lasts {video.duration:.0f} s; at most {limits.seconds:g} are taken.")
            pixels = video.size[0] * video.size[1]
            if pixels > limits.megapixels * 1e6:
                raise DemoError(f"{path.name!r} has frames of {pixels / 1e6:.0f} megapixels; at most {limits.megapixels:g}.")
            first = next(iter(video.frames(times=[0.0], size=PREVIEW)))
        except DemoError:
            raise
        except VtpruneError as error:
            raise DemoError(_without_path(str(error), path)) from error
        except StopIteration as error:
            raise DemoError(f"{path.name!r} has no frame that can be decoded.") from error
    notes = [_without_path(str(w.message), path) for w in caught if issubclass(w.category, VideoNote)]
    return video, first.image, notes


def check_size(path: Path, limits: Limits) -> None:
    """Raise DemoError for a file of more bytes than are taken, or none that is there any more."""
    if not path.is_file():
        raise DemoError("The uploaded file is gone: it was deleted after a while without a click. Upload it again.")
    size = path.stat().st_size
    if size > limits.megabytes * 1e6:
        raise DemoError(f"{path.name!r} has {size / 1e6:.1f} MB; at most {limits.megabytes:g} are taken.")


def _claimed_pixels(path: Path) -> int | None:
    """Pixels by the file's header, read before anything is decoded; None where `open_image` will say what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                return image.width * image.height
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None


def _without_path(text: str, path: Path) -> str:
    """The message with the file's name in place of where it lies."""
    return text.replace(str(path), path.name).replace(str(path.parent), "")


def say(error: BaseException) -> str:
    """An error in one line for a visitor. What was not raised on purpose gets a number; its story is in the log alone."""
    if isinstance(error, SPOKEN):
        return " ".join(str(error).split())
    number = secrets.token_hex(4)
    log.error("incident %s\n%s", number, "".join(traceback.format_exception(error)))
    return f"Something went wrong on the server (incident {number}). Nothing of it is your fault; try another input."
