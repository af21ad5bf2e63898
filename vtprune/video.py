"""Reading video safely and in bounded memory: files, frame folders, lists of pictures, animations; or one clear error.

Nothing here holds more than a few decoded frames: `open_video` reads the header and the first frame, `Video.frames`
streams, and `sample` keeps only what it returns.
"""

from __future__ import annotations

import math
import operator
import re
import struct
import warnings
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vtprune.images import _BROKEN, FORMATS, MAX_ASPECT, MAX_PIXELS, ImageError, _to_rgb, open_image
from vtprune.pruner import VtpruneError

MAX_SECONDS = 24 * 3600.0
# no playlists (HLS, DASH, concat scripts), which name further files, and no text renderers
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,mxf,nut,ivf,obu,h264,hevc,m4v,mjpeg,vc1,dv"
)
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif", ".avif"}
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# these have no signature of their own and might take a video for a picture
_SNIFFED = tuple(f for f in FORMATS if f not in ("TGA", "ICO", "PPM"))
# frame times are rounded to the container's ticks, so a wanted time may fall just before its frame
_SLACK = 0.02


class VideoError(VtpruneError, ValueError):
    """A video that cannot be read, or a frame of it that does not exist; the message says what was found."""


class VideoNote(UserWarning):
    """Something about a video that the user should know, such as that its end is missing."""


class Frame(NamedTuple):
    """One frame.

    Attributes:
        time: when it is shown, in seconds after the first frame.
        image: 8-bit RGB, upright.
        index: its number from 0, None where that would need a pass over the file.
    """

    time: float
    image: Image.Image
    index: int | None


class Video(ABC):
    """An opened video; made by `open_video`. Holds no open file and no decoded frame.

    Attributes:
        name: base name of the file or folder, for messages.
        size: (width, height) of the first frame, upright. Pixels are taken as square.
        duration: seconds from the first frame to the end of the last; corrected when the file turns out to be cut short.
        count: frames; None where the header does not say and no pass was made (`exact_count` makes one).
        rate: mean frames per second, None if unknown.
        notes: what was warned about.
    """

    def __init__(self, name: str, size: tuple[int, int], duration: float, count: int | None, rate: float | None) -> None:
        self.name, self.size, self.duration, self.count, self.rate = name, size, duration, count, rate
        self.notes: list[str] = []

    def __repr__(self) -> str:
        frames = "?" if self.count is None else self.count
        return f"Video({self.name!r}, {self.size[0]} x {self.size[1]}, {self.duration:.2f} s, {frames} frames)"

    def frames(
        self,
        indices: Iterable[int] | None = None,
        *,
        times: Iterable[float] | None = None,
        size: tuple[int, int] | int | None = None,
    ) -> Iterator[Frame]:
        """Decode frames one after the other, all of them by default.

        Where a file ends earlier than it claims, what lies behind its last frame is left out, with a `VideoNote`.

        Parameters:
            indices: frame numbers in ascending order; repeats are given repeatedly.
            times: seconds in ascending order, instead of indices: the frame shown at each. Times after the end give the
                last frame.
            size: (width, height) to scale to, or the longest edge (int; aspect kept, never enlarged).
        Raises:
            VideoError: numbers out of order or range, or a frame that cannot be read.
        """
        if indices is not None and times is not None:
            raise VideoError("give indices or times, not both.")
        check_size(size)
        if indices is not None:
            # only a pass tells how many there are, and asking for none needs no pass
            found = self._by_index(self._checked(indices))
        elif times is not None:
            found = self._by_time(_ascending("times", times, float))
        else:
            found = self._all()
        return (Frame(time, resized(image, size), index) for time, image, index in found)

    def exact_count(self) -> int:
        """How many frames there are, from a pass over the file (without decoding) where the header does not say."""
        return self.count  # type: ignore[return-value]

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, VideoNote, stacklevel=4)

    def _checked(self, indices: Iterable[int]) -> list[int]:
        indices = _ascending("indices", indices, operator.index)
        if indices and indices[-1] >= self.exact_count():
            raise VideoError(f"frame {indices[-1]} of {self.name!r}, which has {self.exact_count()} frames (counted from 0).")
        return indices

    @abstractmethod
    def _all(self) -> Iterator[Frame]: ...

    @abstractmethod
    def _by_index(self, indices: list[int]) -> Iterator[Frame]: ...

    @abstractmethod
    def _by_time(self, times: list[float]) -> Iterator[Frame]: ...


def open_video(
    source: Any,
    *,
    rate: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float | None = MAX_SECONDS,
) -> Video:
    """Open a video without decoding more than its first frame (an animation is passed over once, for its timing).

    Parameters:
        source: a video file (through PyAV), an animated GIF, WebP or PNG, a picture (one frame), a folder of pictures in
            the order of their names (numbers in them counted as numbers), a sequence of picture files, PIL images or
            arrays ([H, W], [H, W, C] or [C, H, W]; uint8, or floats in 0 .. 1), one array of these with time in front,
            or a `Video`. Only local files: no addresses, no playlists.
        rate: frames per second of a folder or sequence, which do not say; 1 by default.
        max_pixels: most pixels in a frame.
        max_seconds: longest duration; None for any.
    Raises:
        VideoError: missing, empty, without picture, broken, too large or too long, or PyAV is not installed.
    """
    if isinstance(source, Video):
        return source
    if rate is not None and not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0):
        raise VideoError(f"rate={rate!r}: give frames per second, a number above 0.")
    if isinstance(source, (str, Path)):
        video = _open_path(str(source), Path(source), rate, max_pixels)
    else:
        video = _Pictures("the sequence", _as_sequence(source), rate, max_pixels)
    if max_seconds is not None and video.duration > max_seconds:
        raise VideoError(f"{video.name!r} lasts {video.duration:.0f} s; the limit is {max_seconds:.0f} s (max_seconds).")
    return video


def sample(video: Video, count: int, *, size: tuple[int, int] | int | None = None, repeats: bool = False) -> list[Frame]:
    """`count` frames, evenly spaced in time from the first to the last; one alone is taken from the middle.

    Parameters:
        repeats: give exactly `count` where the video has fewer frames, some of them repeatedly, as published sampling
            code does; by default each frame is given once.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise VideoError(f"count={count!r}: give an int >= 1.")
    while True:
        claimed = video.duration
        step = min(1 / video.rate if video.rate else 0.0, claimed)
        reach = claimed - step
        times = [claimed / 2] if count == 1 else [i / (count - 1) * reach + _SLACK * step for i in range(count)]
        found = list(video.frames(times=times, size=size))
        # the file ended early: spread over what there is
        if video.duration >= claimed:
            break
    if not repeats:
        found = [frame for i, frame in enumerate(found) if not i or frame.time > found[i - 1].time]
    return found


def check_size(size: tuple[int, int] | int | None) -> None:
    """Raise `VideoError` unless `size` is None, an int >= 1 or two of them."""
    parts = () if size is None else size if isinstance(size, tuple) else (size,)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in parts)
    if not whole or (isinstance(size, tuple) and len(size) != 2):
        raise VideoError(f"size={size!r}: give (width, height), the longest edge, or None.")


def resized(image: Image.Image, size: tuple[int, int] | int | None) -> Image.Image:
    """`image` at (width, height), or with its longest edge at most `size`."""
    if isinstance(size, int):
        scale = min(1.0, size / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size is None or size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)


def _ascending(what: str, values: Iterable, kind: Callable[[Any], float]) -> list:
    try:
        found = [kind(v) for v in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise VideoError(f"{what} must be numbers ({error}).") from error
    if not all(v >= 0 for v in found) or not all(math.isfinite(v) for v in found):
        raise VideoError(f"{what} must be finite and at least 0.")
    if any(a > b for a, b in pairwise(found)):
        raise VideoError(f"{what} must ascend, so that the video is read once from front to back.")
    return found


def _check_frame(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise VideoError(f"{name!r} has frames of {width} x {height} pixels; the limit is {max_pixels} pixels (max_pixels).")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise VideoError(
            f"{name!r} has frames of {width} x {height} pixels; the long side may be at most {MAX_ASPECT} times the short."
        )


def _open_path(given: str, path: Path, rate: float | None, max_pixels: int) -> Video:
    name = path.name or given
    try:
        path.stat()
    except FileNotFoundError as error:
        protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", given)
        if protocol:
            raise VideoError(f"{protocol[1]!r} addresses are not read; give a local file or folder.") from error
        raise VideoError(f"no file {name!r}.") from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{name[:80]!r} cannot be opened as a file.") from error
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.name[0] != "."), key=_natural)
        if not files:
            raise VideoError(f"the folder {name!r} holds no picture ({', '.join(sorted(PICTURES))}).")
        return _Pictures(name, files, rate, max_pixels)
    if not path.is_file():
        raise VideoError(f"{name!r} is no regular file.")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except PermissionError as error:
        raise VideoError(f"{name!r} may not be read (permission denied).") from error
    if not head:
        raise VideoError(f"{name!r} is empty (0 bytes).")
    kind = _picture_kind(path)
    # a broken picture is the picture reader's to explain
    if kind == "still" or (kind is None and path.suffix.lower() in PICTURES):
        return _Pictures(name, [path], rate, max_pixels)
    if kind == "animated":
        return _Animation(name, path, max_pixels)
    return _File(name, path, head, max_pixels)


def _natural(path: Path) -> list:
    """Sort key that puts frame_9 before frame_10; the full name decides between 01 and 1."""
    parts = [(0, int(p), "") if p.isascii() and p.isdigit() else (1, 0, p) for p in re.split(r"([0-9]+)", path.name)]
    return [parts, path.name]


def _picture_kind(path: Path) -> str | None:
    if path.suffix.lower() in (".mjpeg", ".mjpg"):
        return None  # many JPEGs in a row
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=[f for f in _SNIFFED if f in Image.OPEN]) as image:
                moving = image.format in _ANIMATED and getattr(image, "is_animated", False)
                return "animated" if moving else "still"
        except Image.DecompressionBombError:
            return "still"  # the picture reader says how large it is
        except _BROKEN:
            return None


class _Timed(Video):
    """A video whose frames' start times are all known: `self.starts`."""

    starts: Sequence[float]

    def _all(self) -> Iterator[Frame]:
        return self._by_index(range(len(self.starts)))

    def _by_time(self, times: list[float]) -> Iterator[Frame]:
        # a time that was computed from a frame's own must find that frame
        return self._by_index([max(0, bisect_right(self.starts, t + 1e-9) - 1) for t in times])


class _Pictures(_Timed):
    """A sequence of pictures at an even rate."""

    def __init__(self, name: str, items: Sequence, rate: float | None, max_pixels: int) -> None:
        if not len(items):
            raise VideoError(f"{name} holds no picture.")
        self.items, self.max_pixels = items, max_pixels
        rate = 1.0 if rate is None else float(rate)
        super().__init__(name, (0, 0), len(items) / rate, len(items), rate)
        self.starts = [i / rate for i in range(len(items))]
        self.size = self._picture(0).size

    def _by_index(self, indices: Iterable[int]) -> Iterator[Frame]:
        for i in indices:
            yield Frame(self.starts[i], self._picture(i), i)

    def _picture(self, i: int) -> Image.Image:
        item = self.items[i]
        where = f"picture {i} of {self.name}"
        if isinstance(item, (str, Path)):
            try:
                image = open_image(item)
            except ImageError as error:
                raise VideoError(f"{where}: {error}") from error
        elif isinstance(item, Image.Image):
            _check_frame(where, *item.size, self.max_pixels)
            try:
                image = _to_rgb(item)
            except _BROKEN as error:
                raise VideoError(f"{where} is broken or closed: its pixels cannot be decoded.") from error
        else:
            image = _from_array(where, item)
        _check_frame(where, *image.size, self.max_pixels)
        return image


def _as_sequence(source: Any) -> Sequence:
    if isinstance(source, Image.Image):
        return [source]
    if hasattr(source, "shape"):
        if len(source.shape) not in (3, 4):
            raise VideoError(f"an array of shape {tuple(source.shape)} is no video; give [T, H, W, C] or [T, C, H, W].")
        return source
    if isinstance(source, (list, tuple)):
        return source
    raise VideoError(f"{type(source).__name__} is no video: give a file, a folder, a list of pictures or an array.")


def _from_array(where: str, item: Any) -> Image.Image:
    if hasattr(item, "detach"):  # a tensor, perhaps bf16 or on a device
        item = item.detach().cpu()
        item = item.float().numpy() if item.is_floating_point() else item.numpy()
    try:
        pixels = np.asarray(item)
    except (TypeError, ValueError) as error:
        raise VideoError(f"{where} is a {type(item).__name__}, no picture.") from error
    if pixels.dtype.kind not in "biuf":
        raise VideoError(f"{where} is a {type(item).__name__}, no picture.")
    shape = pixels.shape
    if pixels.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not pixels.size or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise VideoError(f"{where} has shape {tuple(shape)}; give [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels.")
    if pixels.dtype.kind == "b":
        pixels = pixels * np.uint8(255)
    low, high = pixels.min(), pixels.max()
    full = 1 if pixels.dtype.kind == "f" else 255
    if not (low >= 0 and high <= full):  # NaN too
        raise VideoError(f"{where} has {pixels.dtype} values in {low} .. {high}; give uint8, or floats in 0 .. 1.")
    if full == 1:
        pixels = np.round(pixels.astype(np.float64) * 255)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8))))


class _Animation(_Timed):
    """An animated GIF, WebP or PNG, through Pillow. A frame with no time of its own lasts 0.1 s, as in browsers."""

    def __init__(self, name: str, path: Path, max_pixels: int) -> None:
        self.path, self.max_pixels = path, max_pixels
        super().__init__(name, (0, 0), 0.0, 0, None)
        durations = []
        for image in self._decoded(None):
            self.size = image.size
            milliseconds = image.info.get("duration", 0) or 0
            durations.append(milliseconds / 1000 if milliseconds > 10 else 0.1)
        if not durations:
            raise VideoError(f"{name!r} is a broken animation: none of its frames can be decoded.")
        ends = list(accumulate(durations))
        self.starts, self.duration, self.count = [0.0, *ends[:-1]], ends[-1], len(ends)
        self.rate = self.count / self.duration

    def _by_index(self, indices: Iterable[int]) -> Iterator[Frame]:
        wanted = iter(indices)
        i = next(wanted, None)
        for number, image in enumerate(self._decoded(self.count)):
            while i == number:
                yield Frame(self.starts[i], _to_rgb(image), i)
                i = next(wanted, None)
            if i is None:
                return

    def _decoded(self, count: int | None) -> Iterator[Image.Image]:
        """The frames in place: the same image object, moved on. Ends, with a note, where the file does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(self.path, formats=[f for f in _ANIMATED if f in Image.OPEN])
        with image:
            _check_frame(self.name, *image.size, self.max_pixels)
            try:
                claimed = image.n_frames if count is None else None
            except _BROKEN:
                claimed = None
            # the picture shown by readers that know no animation is not part of it
            first = 1 if image.info.get("default_image") else 0
            number = first
            while count is None or number < first + count:
                try:
                    image.seek(number)
                    image.load()
                except EOFError:
                    break
                except _BROKEN:
                    claimed = max(claimed or 0, number + 1)
                    break
                yield image
                number += 1
        if count is None and claimed is not None and number < claimed:
            self.note(f"{self.name!r} is cut short or broken: {number - first} of {claimed - first} frames decode.")


class _File(Video):
    """A video file, through PyAV. Frames are found by their own time stamps, whatever the rate does."""

    def __init__(self, name: str, path: Path, head: bytes, max_pixels: int) -> None:
        self.path, self.head, self.max_pixels = path, head, max_pixels
        self.tick: Fraction | None = None
        self.origin = 0
        self.cut: int | None = None  # the tick where the frames end, if before the claimed end
        self._pts: array | None = None
        self._packets = 0
        self.stamped, self.seekable = True, False
        super().__init__(name, (0, 0), 0.0, None, None)
        with _Reader(self) as reader:
            stream, container = reader.stream, reader.container
            rate = stream.average_rate or stream.guessed_rate
            self.rate = float(rate) if rate else None
            found = reader.next()
            if found is None:
                raise VideoError(f"{name!r} has a video stream, but no frame of it can be decoded: it is empty or broken.")
            # asked of one frame only: its side data and the frame hold each other, and would pile up until collected
            self.turn = _turn(found[1])
            self.size = self.image(found[1]).size
            # raw streams have no time stamps, and AVI has them in decoding order only: their frames are counted
            reordered = container.format.name == "avi" and bool(stream.codec_context.has_b_frames)
            self.stamped = found[1].pts is not None and stream.time_base is not None and not reordered
            self.tick = stream.time_base if self.stamped else 1 / Fraction(rate or 25)
            # program streams stamp a few frames at a time: no frame is where a seek says, and the length is a guess
            self.seekable = self.stamped and container.format.name not in ("mpeg", "mpegvideo")
            self.origin = found[0] if self.stamped else 0
            self.count = stream.frames or None
            if stream.duration and self.seekable:
                start = self.origin if stream.start_time is None else stream.start_time
                self.duration = float((start + stream.duration - self.origin) * self.tick)
            elif container.duration and self.seekable and abs(self.origin * self.tick) < 0.5:
                # containers differ in whether this counts from 0 or from their start: after a late start a pass decides
                self.duration = float(Fraction(container.duration, 1_000_000))
            lasting = float((_lasting(found[1]) if self.stamped else 1) * self.tick)
        if self.duration <= 0 or not math.isfinite(self.duration):
            self.duration = self._scanned_end()
        self.duration = max(self.duration, lasting, 1e-3)

    @property
    def step(self) -> int:
        """Ticks from a frame to the next on average, at least 1."""
        return max(1, round(1 / (self.rate * self.tick))) if self.rate and self.tick else 1

    def exact_count(self) -> int:
        if self.count is None:
            self.count = self._scan()
        return self.count

    def _scan(self) -> int:
        """A pass over the packets, undecoded: 8 bytes are kept of each."""
        if self._pts is None:
            pts, packets = array("q"), 0
            with _Reader(self) as reader:
                for packet in reader.packets():
                    if packet.size and not getattr(packet, "is_discard", False):
                        packets += 1
                        if packet.pts is not None:
                            pts.append(packet.pts)
                self._packets = packets
            complete = self.stamped and len(pts) == packets
            self._pts = array("q", sorted({p for p in pts if p >= self.origin})) if complete else array("q")
        return len(self._pts) or self._packets

    def _scanned_end(self) -> float:
        packets = self._scan()
        if self._pts:
            return float((self._pts[-1] + self.step - self.origin) * self.tick)
        return float(packets * self.step * self.tick)

    def _all(self) -> Iterator[Frame]:
        with _Reader(self) as reader:
            number = 0
            while (found := reader.next()) is not None:
                yield self._frame(*found, number)
                number += 1
            self._ended(reader)

    def _by_index(self, indices: list[int]) -> Iterator[Frame]:
        if not indices:
            return
        self._scan()
        if self._pts:
            # a header that counts more frames than there are packets asks for what is not there
            yield from self._seek([self._pts[i] for i in indices if i < len(self._pts)])
            if indices[-1] >= len(self._pts):
                self.note(f"{self.name!r} claims {self.count} frames but holds {len(self._pts)}.")
                self.count = len(self._pts)
            return
        wanted = iter(indices)
        i = next(wanted)
        for frame in self._all():
            while i == frame.index:
                yield frame
                if (i := next(wanted, None)) is None:
                    return

    def _by_time(self, times: list[float]) -> Iterator[Frame]:
        # a thousandth of a tick undoes the rounding of a time that was computed from a frame's own
        return self._seek([self.origin + math.floor(t / self.tick + 1e-3) for t in times])

    def _seek(self, targets: list[int]) -> Iterator[Frame]:
        """The frame shown at each of the ascending ticks `targets`."""
        with _Reader(self) as reader:
            shown = following = reader.next()
            for target in targets:
                if following is not None and target - following[0] > reader.leap:
                    shown = following = reader.jump(target, following[0])
                while following is not None and following[0] <= target:
                    shown, following = following, reader.next()
                if following is None:
                    self._ended(reader)
                    if shown is None or (self.cut is not None and target >= self.cut):
                        return
                yield self._frame(*shown, self._index(shown[0]))

    def _index(self, clock: int) -> int | None:
        if not self.stamped:
            return clock // self.step
        if not self._pts:
            return 0 if clock == self.origin else None
        return max(0, bisect_right(self._pts, clock) - 1)

    def _frame(self, clock: int, frame: Any, index: int | None) -> Frame:
        return Frame(float((clock - self.origin) * self.tick), self.image(frame), index)

    def image(self, frame: Any) -> Image.Image:
        """A decoded frame as an upright picture."""
        _check_frame(self.name, frame.width, frame.height, self.max_pixels)
        try:
            image = frame.to_image()
        except (ValueError, OSError) as error:  # what PyAV's errors derive from
            raise VideoError(f"{self.name!r} has frames in a format ({frame.format.name}) that cannot be converted.") from error
        return image if self.turn is None else image.transpose(self.turn)

    def _ended(self, reader: _Reader) -> None:
        """Compare where the frames end with where the header says they do."""
        if reader.bad:
            self.note(f"{self.name!r} is damaged: some of its packets cannot be decoded, their frames are missing.")
        end = float((reader.end - self.origin) * self.tick)
        slack = max(2.5 * self.step * float(self.tick), 0.1, 0.01 * self.duration)
        if end < self.duration - slack:
            self.note(f"{self.name!r} claims {self.duration:.2f} s, but its frames end at {end:.2f} s; the rest is missing.")
            self.duration, self.cut = end, reader.end


# the quarter turns and mirrors that a display matrix (a, b, c, d) may hold: x' = ax + cy, y' = bx + dy
_MATRIX_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def _turn(frame: Any) -> Image.Transpose | None:
    """What makes a frame upright by its display matrix; None if it is, or for angles between the quarter turns."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None or len(matrix) < 36:
        return None
    a, b, _, c, d = struct.unpack("=9i", matrix[:36])[:5]
    top = max(abs(v) for v in (a, b, c, d))
    return _MATRIX_TURNS.get(tuple(round(v / top) for v in (a, b, c, d))) if top else None


class _Reader:
    """One pass over a file. `clock` values are time stamps in ticks, ascending; frame numbers where there are none."""

    def __init__(self, video: _File) -> None:
        try:
            import av
        except ImportError as error:
            raise VideoError("reading video files needs PyAV: pip install 'vtprune[video]'") from error
        self.av, self.video = av, video
        self.bad = 0
        self.file = self.container = None

    def __enter__(self) -> _Reader:
        try:
            self._open()
        except VideoError:
            self.__exit__()
            raise
        # a first guess at what is cheaper to skip than to decode
        self.leap = math.ceil(1 / self.video.tick) if self.video.seekable else math.inf
        return self

    def __exit__(self, *_: object) -> None:
        if self.container is not None:
            self.container.close()
        if self.file is not None:
            self.file.close()

    def _open(self) -> None:
        self.__exit__()
        name = self.video.name
        try:
            # an open file, not its path, which FFmpeg would search for protocols; nor may it open further ones
            self.file = self.video.path.open("rb")
            options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
            self.container = self.av.open(self.file, container_options=options, metadata_errors="replace")
        except (self.av.error.FFmpegError, OSError) as error:
            raise VideoError(f"{name!r} cannot be read as a video: {_found(self.video.head)}.") from error
        streams = [s for s in self.container.streams.video if not _cover(s)]
        if not streams:
            kinds = sorted({s.type for s in self.container.streams}) or ["nothing"]
            raise VideoError(f"{name!r} has no video stream, only {' and '.join(kinds)}.")
        self.stream = streams[0]
        context = self.stream.codec_context
        if context is None:
            raise VideoError(f"{name!r} has a video stream in a codec that this FFmpeg cannot decode.")
        if context.width or context.height:
            _check_frame(name, context.width, context.height, self.video.max_pixels)
        context.options = {"max_pixels": str(self.video.max_pixels)}
        self.clock: int | None = None
        self.end = self.video.origin
        self.decoded = self._decode()

    def packets(self) -> Iterator[Any]:
        """The video's packets, up to where the file can be read."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except (self.av.error.FFmpegError, OSError):
                return
            if packet is None:
                return
            yield packet

    def _decode(self) -> Iterator[Any]:
        for packet in self.packets():
            try:
                found = packet.decode()
            except self.av.error.FFmpegError as error:
                if isinstance(error, self.av.error.EOFError):
                    return
                self.bad += 1
                continue
            yield from found

    def next(self) -> tuple[int, Any] | None:
        """The next frame and its clock; None at the end."""
        frame = next(self.decoded, None)
        if frame is None:
            return None
        step = self.video.step
        if self.clock is None:
            self.clock = frame.pts if self.video.stamped and frame.pts is not None else 0
        elif self.video.stamped and frame.pts is not None and frame.pts > self.clock:
            self.clock = frame.pts
        else:  # none, or stamps that start again within the file
            self.clock += step
        self.end = max(self.end, self.clock + max(_lasting(frame) if self.video.stamped else 0, step))
        return self.clock, frame

    def jump(self, target: int, here: int) -> tuple[int, Any]:
        """Go to a key frame at or before `target`, or to the start; the frame there. `here` is where we are."""
        back = 0
        while target - back > self.video.origin:
            found = self._key_frame(target - back)
            if found is not None and found[0] <= target:
                if found[0] <= here:
                    # no key frame between here and there: the next leap must be longer to be worth it
                    self.leap = max(2 * self.leap, 2 * (target - found[0]))
                return found
            # some containers land late, and a file that was cut short has nothing there
            back = max(4 * back, self.leap)
        self.leap = math.inf
        self._open()
        found = self.next()
        if found is None:
            raise VideoError(f"{self.video.name!r} could be read before and no longer can.")
        return found

    def _key_frame(self, target: int) -> tuple[int, Any] | None:
        """The first key frame decoded after a seek, None if there is none or its time is unknown."""
        try:
            self.container.seek(target, stream=self.stream, backward=True)
        except (self.av.error.FFmpegError, OSError):
            return None
        self.clock, self.decoded = None, self._decode()
        for frame in self.decoded:
            if frame.key_frame:
                if frame.pts is None:
                    return None
                self.clock = frame.pts
                self.end = max(self.end, frame.pts + max(_lasting(frame), self.video.step))
                return frame.pts, frame
        return None


def _lasting(frame: Any) -> int:
    """How many ticks a frame says it lasts, 0 where it or this PyAV does not say."""
    return getattr(frame, "duration", 0) or 0


def _cover(stream: Any) -> bool:
    """A picture attached to a sound file."""
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and bool(disposition & type(disposition).attached_pic)


def _found(head: bytes) -> str:
    """What a file that is no readable video begins like."""
    if head[4:8] == b"ftyp":
        return "it begins like an MP4, but its index is missing or broken, as in an unfinished download"
    for start, kind in ((b"\x1aE\xdf\xa3", "Matroska or WebM"), (b"RIFF", "AVI"), (b"GIF8", "GIF"), (b"\x89PNG", "PNG")):
        if head.startswith(start):
            return f"it begins like {kind}, but is broken or cut short"
    for start, kind in ((b"%PDF", "a PDF"), (b"PK\x03\x04", "a ZIP archive"), (b"\x1f\x8b", "a gzip archive")):
        if head.startswith(start):
            return f"it is {kind}"
    if head.startswith((b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD")):
        return "it is a playlist or XML text; give the video file itself"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "it is text"
    return "it is in no known video format, broken or cut short"
