"""What a visitor may ask of the demo; every number is a flag of `vtprune demo`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on what comes in and on what one visitor may take.

    Parameters:
        megapixels: of a picture, or of a frame of a clip; megabytes: of an uploaded file; seconds: of a clip.
        frames: of a clip that the model is fed, at most; characters: of a question.
        new_tokens: of an answer; turns: of a chat.
        concurrency: runs at a time, the others queue; queue: visitors that may wait.
        idle: minutes without a click after which a visitor's pictures, answers and chat are deleted.
    """

    megapixels: float = 25.0
    megabytes: float = 20.0
    seconds: float = 60.0
    frames: int = 32
    characters: int = 1000
    new_tokens: int = 64
    turns: int = 12
    concurrency: int = 1
    queue: int = 64
    idle: float = 30.0
