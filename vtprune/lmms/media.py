"""What lmms-eval hands over for a question (pictures, files, frames, messages) as one form, and that as model inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtprune.cli.console import UserError
from vtprune.images import open_image

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts")


@dataclass
class Clip:
    """A video's chosen frames.

    Parameters:
        frames: [T, H, W, 3] uint8; indices: which frames of the video they are; total: how many it has; fps: frames a second.
    """

    frames: np.ndarray
    indices: list[int]
    total: int
    fps: float


@dataclass
class Prompt:
    """A conversation as processors take it: the places of pictures and videos in `messages`, themselves in order."""

    messages: list[dict[str, Any]]
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Clip] = field(default_factory=list)


def question(text: str, visuals: Sequence[Any] | None, tokens: Sequence[str], frames: int) -> Prompt:
    """A prompt of one turn: pictures and videos first, unless the text says by placeholders where each goes.

    Parameters:
        visuals: as a task's `doc_to_visual` gives them; tokens: the processor's placeholders; frames: most of a video.
    Raises:
        UserError: for what is neither a picture nor a video, or cannot be read.
    """
    prompt = Prompt([])
    parts = [place(visual, prompt, frames) for visual in flat(visuals)]
    pieces = [text]
    for token in tokens:
        pieces = [piece for part in pieces for piece in part.split(token)]
    if len(pieces) == len(parts) + 1 and parts:
        content: list[dict[str, Any]] = []
        for at, piece in enumerate(pieces):
            content += [{"type": "text", "text": piece}] if piece.strip() else []
            content += parts[at : at + 1]
    else:
        # a placeholder that stands for nothing would be counted as one
        content = [*parts, {"type": "text", "text": "".join(pieces).strip() if len(pieces) > 1 else text}]
    prompt.messages.append({"role": "user", "content": content})
    return prompt


def conversation(messages: Sequence[Any], tokens: Sequence[str], frames: int) -> Prompt:
    """A prompt from lmms-eval's chat messages (`ChatMessages.messages`).

    Raises:
        UserError: for audio, or media that cannot be read.
    """
    prompt = Prompt([])
    for message in messages:
        content = []
        for part in message.content:
            if part.type == "text":
                text = part.text
                for token in tokens:
                    text = text.replace(token, "")
                content.append({"type": "text", "text": text})
            elif part.type == "image":
                content.append(place(part.url, prompt, frames, "image"))
            elif part.type == "video":
                content.append(place(part.url, prompt, frames, "video", part.start_time, part.end_time))
            else:
                raise UserError(f"the task asks about {part.type}; vtprune serves pictures and videos.")
        prompt.messages.append({"role": message.role, "content": content})
    return prompt


def flat(visuals: Any) -> list[Any]:
    """Visuals in one list; tasks nest them, or give one alone. A list of frames within the list stays a video."""
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        return [visuals]
    if len(visuals) == 1 and isinstance(visuals[0], list | tuple):
        return list(visuals[0])
    return [visual for visual in visuals if visual is not None]


def kind_of(visual: Any) -> str:
    """ "image" or "video", without reading it.

    Raises:
        UserError: for anything else.
    """
    if isinstance(visual, Image.Image):
        return "image"
    if isinstance(visual, str | Path):
        return "video" if str(visual).lower().endswith(VIDEO_ENDINGS) else "image"
    if isinstance(visual, np.ndarray) and visual.ndim == 4:
        return "video"
    if isinstance(visual, list | tuple) and visual and all(isinstance(frame, Image.Image) for frame in visual):
        return "video"
    raise UserError(f"the task hands over a {type(visual).__name__}; vtprune serves pictures and videos.")


def place(
    visual: Any, prompt: Prompt, frames: int, kind: str | None = None, start: float | None = None, end: float | None = None
) -> dict[str, str]:
    """Read a picture or video into `prompt`; its placeholder for the messages."""
    kind = kind or kind_of(visual)
    if kind == "image":
        prompt.images.append(visual.convert("RGB") if isinstance(visual, Image.Image) else open_image(visual))
    else:
        prompt.videos.append(clip(visual, frames, start, end))
    return {"type": kind}


def clip(video: Any, frames: int, start: float | None = None, end: float | None = None) -> Clip:
    """At most `frames` evenly spaced frames of a video file, of an array [T, H, W, 3], or of a list of pictures.

    Parameters:
        start, end: of the part to take, in seconds; files only.
    Raises:
        UserError: if it cannot be read, or PyAV is missing.
    """
    if isinstance(video, str | Path):
        return _decoded(Path(video), frames, start, end)
    total = len(video)
    if not total:
        raise UserError("the task hands over a video without frames.")
    chosen = spaced(total, frames)
    taken = [np.asarray(video[at].convert("RGB") if isinstance(video[at], Image.Image) else video[at]) for at in chosen]
    return Clip(np.stack(taken), chosen, total, 1.0)


def spaced(total: int, most: int, first: int = 0) -> list[int]:
    """The middles of `most` equal parts of `total` frames, or all of them."""
    count = min(total, most)
    return [first + int((at + 0.5) * total / count) for at in range(count)]


def _decoded(path: Path, frames: int, start: float | None, end: float | None) -> Clip:
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos needs PyAV; install it with pip install 'vtprune[video]'.") from error
    if not path.is_file():
        raise UserError(f"no video file {path.name!r}.")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 25)
            total = stream.frames or sum(1 for _ in container.decode(stream))
        first = min(int((start or 0) * fps), max(total - 1, 0))
        last = total if end is None else min(total, max(first + 1, round(end * fps)))
        wanted = spaced(last - first, frames, first)
        taken = []
        with av.open(str(path)) as container:
            for at, frame in enumerate(container.decode(container.streams.video[0])):
                if at > wanted[-1]:
                    break
                if at in wanted:
                    taken.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"the video {path.name!r} cannot be read.") from error
    if not taken:
        raise UserError(f"the video {path.name!r} has no frames.")
    return Clip(np.stack(taken), wanted[: len(taken)], total, fps)


def inputs(processor: Any, prompts: Sequence[Prompt], limits: dict[str, int], answers: Callable[[Prompt], str]) -> Any:
    """Model inputs of a batch, padded on the left.

    Parameters:
        limits: min_pixels and max_pixels, as far as given; answers: a prompt's text, up to where the answer begins.
    Raises:
        UserError: if the processor refuses.
    """
    images = [image for prompt in prompts for image in prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    given: dict[str, Any] = {"text": [answers(prompt) for prompt in prompts]}
    if images:
        given |= {"images": images, "images_kwargs": limits}
    if videos:
        about = [{"total_num_frames": v.total, "fps": v.fps, "frames_indices": v.indices} for v in videos]
        given["videos"] = [v.frames for v in videos]
        given["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": about, **limits}
    try:
        return processor(**given, padding=True, return_tensors="pt")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the model's processor cannot take what the task asks: {error}") from error


def text_of(processor: Any, prompt: Prompt) -> str:
    """A prompt as the model's chat template writes it, up to where the answer begins."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
    tokens = {"image": getattr(processor, "image_token", "<image>"), "video": getattr(processor, "video_token", "<video>")}
    words = {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"}
    lines = []
    for message in prompt.messages:
        said = "".join(p["text"] if p["type"] == "text" else f"{tokens[p['type']]}\n" for p in message["content"])
        lines.append(f"{words[message['role']]}: {said}")
    return " ".join([*lines, "ASSISTANT:"])
