"""Which frames of a video are looked at: evenly spaced, more of them the longer it lasts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vtprune.pruner import UnsupportedError


@dataclass(frozen=True)
class Sampled:
    """Frames to decode.

    Parameters:
        frames: their numbers in the video, ascending; with parity=True a number may come more than once.
        times: when each is shown, seconds at the mean frame rate.
        seconds: duration of the video.
    """

    frames: tuple[int, ...]
    times: tuple[float, ...]
    seconds: float

    @property
    def stamps(self) -> str:
        """The times as they are told to the model, "0.00s,0.30s"."""
        return ",".join(f"{time:.2f}s" for time in self.times)


def sample(
    frames: int,
    fps: float,
    base: int = 96,
    extra: int = 64,
    period: float = 3600.0,
    most: int | None = None,
    parity: bool = False,
) -> Sampled:
    """QuoTA's sampling: base + trunc(seconds / period * extra) frames at trunc(linspace(0, frames - 1)).

    Parameters:
        frames: frames in the video, at least 1.
        fps: mean frame rate (of a variable one: frames / duration).
        base, extra: frames for any video, and more of them per `period` seconds.
        most: upper limit, None for base + extra. Never more than the video has.
        parity: no limits, as published: 2 hours give 224 frames, and a short clip gives the same frame several times.
    Raises:
        UnsupportedError: for a video without frames or rate, or counts without meaning.
    """
    if frames < 1:
        raise UnsupportedError(f"the video has {frames} frames: there is nothing to sample; check that the file decodes.")
    if not (math.isfinite(fps) and fps > 0):
        raise UnsupportedError(f"fps={fps}: the mean frame rate must be a positive number; give frames / duration.")
    most = base + extra if most is None else most
    if base < 1 or extra < 0 or most < 1 or not period > 0:
        raise UnsupportedError(f"base={base}, extra={extra}, period={period}, most={most}: at least 1, 0, above 0 and 1.")
    seconds = frames / fps
    count = base + int(seconds / period * extra)
    if not parity:
        count = min(count, most, frames)
    numbers = np.linspace(0, frames - 1, count, dtype=int)
    return Sampled(tuple(numbers.tolist()), tuple((numbers / fps).tolist()), seconds)
