"""Reading pictures safely: whatever is in the file, either an 8-bit RGB image or one clear error."""

from __future__ import annotations

import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from vtprune.pruner import VtpruneError

MAX_PIXELS = 100_000_000
# processors scale the short edge up to the model's input size, so a thin strip becomes gigapixels there
MAX_ASPECT = 100
# no EPS or PDF (they start other programs), no scientific containers
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "ICO", "TGA")
_LOCK = threading.Lock()
# EXIF orientation -> what makes it upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what Pillow's decoders are known to raise on broken files
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageError(VtpruneError, ValueError):
    """A picture that cannot be read; the message says what was found."""


class ImageNote(UserWarning):
    """Something about a picture that the user should know, such as that only its first frame is used."""


def open_image(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB, upright, on white where it is transparent.

    Of an animation or a multi-page file the first frame is read, with an `ImageNote` warning.

    Parameters:
        path: a PNG, JPEG, GIF, WebP, BMP, TIFF, PPM, AVIF, ICO or TGA file.
    Raises:
        ImageError: missing, a folder, empty, no picture, broken, too large or too thin.
    """
    name = str(path)
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{name!r} is a folder; give one picture file.")
    if not path.exists():
        raise ImageError(f"no file {name!r}.")
    if not path.is_file():
        raise ImageError(f"{name!r} is no regular file.")
    if path.stat().st_size == 0:
        raise ImageError(f"{name!r} is empty (0 bytes).")
    Image.init()
    formats = [f for f in FORMATS if f in Image.OPEN]
    with warnings.catch_warnings():
        # the header alone is read here, and its size is checked below against our own limit
        warnings.simplefilter("ignore")
        try:
            image = Image.open(path, formats=formats)
        except UnidentifiedImageError as error:
            raise ImageError(f"{name!r} is not a picture in a format read here ({', '.join(FORMATS)}).") from error
        except PermissionError as error:
            raise ImageError(f"{name!r} may not be read (permission denied).") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name!r} claims to be far larger than {MAX_PIXELS // 10**6} megapixels.") from error
        except _BROKEN as error:
            raise ImageError(f"{name!r} is broken: its header cannot be read.") from error
    with image:
        _check_size(name, *image.size)
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            warnings.warn(f"{name!r} has {image.n_frames} frames; the first is used.", ImageNote, stacklevel=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with _no_gaps():
                    image.load()
                # a file may hold another size than its header promised
                _check_size(name, *image.size)
                rgb = _to_rgb(image)
            except ImageError:
                raise
            except _BROKEN as error:
                raise ImageError(f"{name!r} is broken or cut short: its pixels cannot be decoded.") from error
        turn = _TURNS.get(_orientation(image, name))
        return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _no_gaps() -> Iterator[None]:
    """Cut-short files raise, also where another library (lmms-eval is one) has told Pillow to fill them with grey."""
    with _LOCK:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name!r} has {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels. Scale it down first."
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name!r} has {width} x {height} pixels; the long side may be at most {MAX_ASPECT} times the short.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale to 8 bits by the type's range, not by the picture's own, so that a dark picture stays dark."""
    full = 65535.0  # 16-bit files, also where Pillow holds them as 32-bit integers
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        # floats are 0 .. 1 by custom, 0 .. 255 by the second custom
        full = next((top for top in (1.0, 255.0) if values.max() <= top), full)
    return np.round(np.clip(values.astype(np.float64) / full, 0.0, 1.0) * 255).astype(np.uint8)


def _orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 (upright) without one."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        warnings.warn(
            f"{name!r}: its EXIF data cannot be read, so its orientation is taken as upright.", ImageNote, stacklevel=3
        )
        return 1
