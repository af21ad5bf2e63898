"""Seeded worlds: pictures and clips with questions whose answers are known."""

from .clips import (
    CLIP_GRID,
    CLIP_TYPES,
    CLIP_WORDS,
    FPS,
    NEEDLE_TYPES,
    Actor,
    Clip,
    ClipQuestion,
    make_clip,
    render_clips,
    write_clip,
)
from .shapes import (
    COLORS,
    GRID,
    PATCH,
    SHAPES,
    SIZES,
    SPLITS,
    TYPES,
    WORDS,
    PictureObject,
    Question,
    Scene,
    make_scene,
    render_many,
    scene_seed,
    vocabulary,
)

__all__ = [
    "CLIP_GRID", "CLIP_TYPES", "CLIP_WORDS", "COLORS", "FPS", "GRID", "NEEDLE_TYPES", "PATCH", "SHAPES", "SIZES", "SPLITS",
    "TYPES", "WORDS", "Actor", "Clip", "ClipQuestion", "PictureObject", "Question", "Scene", "make_clip", "make_scene",
    "render_clips", "render_many", "scene_seed", "vocabulary", "write_clip",
]  # fmt: skip
