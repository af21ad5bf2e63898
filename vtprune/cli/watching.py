"""Videos in place of a picture: which arguments are videos, their frames, what looks at the frames, what to say of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vtprune import embedded
from vtprune.cli.console import UserError, err
from vtprune.cli.running import Loaded, encode, load
from vtprune.images import FORMATS
from vtprune.pruner import Pruner
from vtprune.quota.sampling import sample
from vtprune.video import Frame, Video, _picture_kind, open_video
from vtprune.viz_timeline import shares

if TYPE_CHECKING:
    from vtprune.quota.scorers import FrameScorer
    from vtprune.reporting import Report

SCORERS = "embedded, self, open_clip:NAME[:PRETRAINED], clip:ID, vlm:ID, none"
KEEP = "0.25"  # of a video's tokens, where nothing else is asked for
EDGE = 1024  # pixels of a frame's long side as it is read, at most


@dataclass(frozen=True)
class Options:
    """What a command was told about videos; None where nothing was said."""

    video: bool = False
    frames: int | None = None
    scorer: str | None = None
    objects: str | None = None
    decouple: bool = False

    def check(self, video: bool, pruners: Iterable[Pruner]) -> None:
        """Find mistakes before a model is loaded.

        Parameters:
            video: whether one was given; pruners: that will be asked.
        Raises:
            UserError: for options of videos with a picture, an unknown scorer, or options without any use.
        """
        given = {"--frames": self.frames, "--scorer": self.scorer, "--objects": self.objects, "--decouple": self.decouple}
        named = [name for name, value in given.items() if value]
        if named and not video:
            raise UserError(f"{' and '.join(named)}: for videos, and a picture was given.")
        if self.objects is not None and not self.phrases():
            raise UserError("--objects names nothing; write it as --objects 'star, ring'.")
        kind, _, source = (self.scorer or "none").partition(":")
        of = {"embedded": False, "self": False, "none": False, "open_clip": True, "clip": True, "vlm": True}
        if of.get(kind) is not bool(source):
            raise UserError(f"--scorer {self.scorer!r}: one of {SCORERS}.")
        if kind != "none" and not any(takes_scorer(pruner) for pruner in pruners):
            raise UserError(f"--scorer {self.scorer}: no strategy here takes a scorer; quota does.")

    def phrases(self) -> list[str]:
        return [part.strip() for part in (self.objects or "").split(",") if part.strip()]


@dataclass(frozen=True)
class Watched:
    """The frames of a video that the model is fed.

    Parameters:
        video: as opened, its duration and count corrected by reading it; frames: ascending, all of one size.
    """

    video: Video
    frames: list[Frame]

    def describe(self) -> str:
        """`clip.mp4, 8.0 s, 32 of 240 frames`."""
        return f"{self.video.name}, {self.video.duration:.1f} s, {len(self.frames)} of {self.video.exact_count()} frames"

    def to_dict(self, report: Report) -> dict[str, Any]:
        """JSON-ready: the video, and each frame (or pair of them that the model merged) with what it scored and got."""
        plan = shares(report.samples[0]).plan
        per = -(-len(self.frames) // len(plan.tokens))
        scores = plan.scores or [None] * len(plan.tokens)
        return {
            "name": self.video.name,
            "seconds": self.video.duration,
            "frames_in_all": self.video.exact_count(),
            "frames": [
                {"index": frame.index, "time": frame.time, "score": scores[i // per], "tokens": plan.tokens[i // per]}
                for i, frame in enumerate(self.frames)
                if i % per == 0
            ],
        }


def open_argument(name: str, options: Options) -> Video | None:
    """The video that a command's argument names, or None where it is a picture.

    Raises:
        UserError: for a folder without --video; VideoError: for a video that cannot be read.
    """
    path, clips = Path(name), embedded.clips()
    if name in clips and not path.exists():
        path = clips[name]
    elif not options.video:
        if path.is_dir():
            raise UserError(f"{name!r} is a folder; give one picture or video file, or add --video for a folder of frames.")
        if _is_picture(name, path):
            return None
    return open_video(path)


def _is_picture(name: str, path: Path) -> bool:
    if name in embedded.pictures() and not path.exists():
        return True
    kind = _picture_kind(path)
    # a broken picture, and formats that have no signature, are known by their names
    return kind == "still" or (kind is None and Image.registered_extensions().get(path.suffix.lower()) in FORMATS)


def watch(video: Video, frames: int | None, processor: Any) -> Watched:
    """Read the frames that QuoTA's sampling chooses, scaled down as they come.

    Parameters:
        frames: how many, None for 96 and 64 more per hour; never more than the video has.
    Raises:
        VideoError, UnsupportedError: if there is none.
    """
    how = {} if frames is None else {"base": frames, "extra": 0}
    scale = min(1.0, _edge(processor) / max(video.size))
    # one size for all: a folder's pictures may differ
    size = tuple(max(1, round(side * scale)) for side in video.size)
    while True:
        count = video.exact_count()
        chosen = sample(count, count / video.duration, **how)
        found = list(video.frames(chosen.frames, size=size))
        # a file that was cut short tells when it is read: spread over what there is
        if video.exact_count() == count:
            break
    if len(found) < 2:
        raise UserError(
            f"{video.name!r} has {len(found)} frame(s) to be read; a video has two or more. Ask about a picture instead."
        )
    return Watched(video, found)


def _edge(processor: Any) -> int:
    """Longest side to read frames at: twice what the processor makes of them, so that its own scaling decides."""
    size = getattr(getattr(processor, "video_processor", None), "size", None) or {}
    sides = [size.get(name) for name in ("height", "width")]
    sides = [side for side in sides if side] or [size.get("shortest_edge") or EDGE]
    return min(EDGE, 2 * max(sides))


def prepare(loaded: Loaded, watched: Watched, question: str) -> dict[str, Any]:
    """Model inputs for the video followed by the question.

    Raises:
        UserError: if the model takes no videos, or as `running.prepare`.
    """
    if not getattr(loaded.processor, "video_processor", None) or not getattr(loaded.processor, "video_token", None):
        raise UserError(f"{loaded.name} takes no videos; give a picture, or another --model such as LLaVA-OneVision.")
    count = watched.video.exact_count()
    metadata = {
        "total_num_frames": count,
        "fps": count / watched.video.duration,
        "duration": watched.video.duration,
        # frames of raw streams and the like may not know their number
        "frames_indices": [round(frame.time * count / watched.video.duration) for frame in watched.frames],
    }
    pixels = np.stack([np.asarray(frame.image) for frame in watched.frames])
    more = {"videos": [pixels], "do_sample_frames": False, "video_metadata": [metadata]}
    return encode(loaded, "video", 1, question, more)


def takes_scorer(pruner: Pruner) -> bool:
    """Whether it, or a part of it, has a field `scorer`."""
    return any("scorer" in getattr(type(part), "__dataclass_fields__", {}) for part in getattr(pruner, "parts", [pruner]))


def scorer(pruners: Iterable[Pruner], options: Options, loaded: Loaded, own: bool) -> FrameScorer | None:
    """What looks at the frames for those of `pruners` that take a scorer; None for their own way.

    Parameters:
        own: whether the model is the embedded one.
    Raises:
        UserError: for one that cannot be loaded, or nothing that --objects and --decouple could be for.
    """
    takers = [part for p in pruners for part in getattr(p, "parts", [p]) if takes_scorer(part)]
    # scores made beforehand, given by --set, need no scorer
    bare = any(getattr(part, "scores", None) is None for part in takers)
    kind, _, source = (options.scorer or ("embedded" if own and bare else "none")).partition(":")
    if kind == "none":
        if options.objects or options.decouple:
            raise UserError("--objects and --decouple say what a scorer looks for; give --scorer as well.")
        return None
    from vtprune.quota.scorers import Decoupler, FrameScorer

    slow = kind in ("self", "vlm")
    return FrameScorer.for_processor(
        _backend(kind, source, loaded, own),
        loaded.processor,
        objects=options.phrases() or None,
        decoupler=Decoupler(loaded.model, loaded.processor) if options.decouple else None,
        batch=8 if slow else 64,
        progress=slow and err().is_terminal,
        # each timed run pays for its scores
        remember=0,
    )


def _backend(kind: str, source: str, loaded: Loaded, own: bool):
    from vtprune.quota.scorers import ClipBackend, VlmBackend

    device = loaded.model.device
    if kind == "embedded":
        return ClipBackend.embedded(loaded.model.model.vision_tower if own else None)
    if kind == "self":
        return VlmBackend(loaded.model, loaded.processor)
    if kind == "vlm":
        other = load(source, str(device), str(loaded.model.dtype).removeprefix("torch."), "sdpa", False)
        return VlmBackend(other.model, other.processor)
    if kind == "open_clip":
        if source.startswith(("hf-hub:", "local-dir:")):
            return ClipBackend.open_clip(source, device=device)
        name, _, tag = source.partition(":")
        _check_open_clip(name)
        return ClipBackend.open_clip(name, tag or "openai", device=device)
    try:
        return ClipBackend.from_pretrained(source, device=device)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"--scorer clip:{source} cannot be loaded: {reason}") from error


def _check_open_clip(name: str) -> None:
    """Offer the nearest names instead of open_clip's own list of all."""
    try:
        from open_clip import list_models
    except ImportError:
        return  # what loads the model says what to install
    known = list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--scorer open_clip:{name}: open_clip has no model of that name.{hint}")


def rows(report: Report, watched: Watched) -> Sequence[tuple[str, str]]:
    """For the report's table: which frames were looked at, and the tokens of each."""
    tokens = shares(report.samples[0]).plan.tokens
    return (("video", watched.describe()), ("tokens per frame", " ".join(map(str, tokens))))
