"""Seeded picture worlds: pictures with questions whose answers are known."""

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
    "COLORS", "GRID", "PATCH", "SHAPES", "SIZES", "SPLITS", "TYPES", "WORDS", "PictureObject", "Question", "Scene",
    "make_scene", "render_many", "scene_seed", "vocabulary",
]  # fmt: skip
