"""A token's box covers what the token saw: a bright spot in a picture, the token that stands out, the box drawn for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models import GRID, IMAGE, VIDEO
from PIL import Image
from zoo import every, seeded

import vtprune
from vtprune.places import View, arrangement, boxes, canvases
from vtprune.pruner import Keep, SelectView

SIDE = 8 * GRID
KINDS = {kind.name: kind for kind in every()}


@dataclass
class Brightest(vtprune.Pruner):
    """Keeps the token most like that of an all-white picture, or the one that differs most from the others."""

    keep: int = 1
    white: torch.Tensor | None = None
    name = "brightest"
    positions = "original"

    def select(self, view: SelectView) -> Keep:
        x = view.features.float()
        if self.white is None:
            score = (x - x.median(1, keepdim=True).values).norm(dim=-1)
        else:
            score = torch.cosine_similarity(x, self.white, dim=-1)
        return Keep(score.argmax(1, keepdim=True))


def blind(model):
    """A model whose encoder lets no patch look at another, so that a token shows its own patch alone."""
    seeded(model, [])
    for name, parameter in model.model.named_parameters():
        if "language_model" in name or "text_model" in name:
            continue
        last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        inside = any(part in name for part in (".layers.", ".layer.", ".blocks."))
        if (inside and last in ("out_proj", "o_proj", "projection_layer", "proj", "fc2", "down_proj")) or "position" in name:
            torch.nn.init.zeros_(parameter)
    return model


def picture(width: int, height: int, x: float, y: float, part: float = 0.3) -> Image.Image:
    """Grey with a bright rectangle around (x, y), given as shares of the picture."""
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    half_w, half_h = part * width / 2, part * height / 2
    left, top = int(x * width - half_w), int(y * height - half_h)
    pixels[max(0, top) : int(y * height + half_h), max(0, left) : int(x * width + half_w)] = 255
    return Image.fromarray(pixels)


def clip_like(image):
    from transformers import CLIPImageProcessor

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPImageProcessor(**size)(image, return_tensors="pt")


def llava_next(image):
    from transformers import LlavaNextImageProcessor

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    points = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return LlavaNextImageProcessor(**size, image_grid_pinpoints=points)(image, return_tensors="pt")


def onevision(image):
    from transformers import LlavaOnevisionImageProcessor

    points = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    made = LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=points)
    found = made(image, return_tensors="pt")
    return {"pixel_values": found["pixel_values"], "image_sizes": found["image_sizes"]}


def qwen(image):
    from transformers import Qwen2VLImageProcessor

    size = {"shortest_edge": 64 * 64, "longest_edge": 160 * 160}
    return Qwen2VLImageProcessor(patch_size=8, merge_size=2, size=size)(image, return_tensors="pt")


def internvl(image):
    from transformers import GotOcr2ImageProcessor

    made = GotOcr2ImageProcessor(
        size={"height": 2 * SIDE, "width": 2 * SIDE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    return {"pixel_values": made(image, return_tensors="pt")["pixel_values"]}


def pixtral(image):
    from transformers import PixtralImageProcessor

    made = PixtralImageProcessor(size={"longest_edge": 128}, patch_size={"height": 16, "width": 16})
    return made(image, return_tensors="pt")


# kind -> what its processor makes of a picture, how that fits it, tokens around the placeholders
FAMILIES = {
    "llava": (clip_like, "crop", []),
    "next": (llava_next, "stretch", []),
    "onevision": (onevision, "stretch", []),
    "qwen2": (qwen, "stretch", [97]),
    "qwen2.5": (qwen, "stretch", [97]),
    "internvl": (internvl, "stretch", []),
    "mistral3": (pixtral, "stretch", []),
}
SHAPES = [(200, 200), (300, 150), (140, 310), (256, 90)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_box_of_the_brightest_token_covers_the_spot(name, shape):
    process, fit, before = FAMILIES[name]
    kind = KINDS[name]
    model = blind(kind.build("sdpa"))
    # a centre crop sees only the middle
    near = 0.25 if fit == "crop" and shape != (200, 200) else 1.0
    for away_x, away_y in ((0.0, 0.0), (-0.25, -0.2), (0.3, 0.25)):
        x, y = 0.5 + away_x * near, 0.5 + away_y * near
        image = picture(*shape, x, y)
        given = dict(process(image))
        with torch.no_grad():
            features = model.model.get_image_features(**given, return_dict=True).pooler_output
            whole = dict(process(Image.new("RGB", shape, (255, 255, 255))))
            white = model.model.get_image_features(**whole, return_dict=True).pooler_output[0][0]
        count = sum(len(one) for one in features)
        ids = torch.tensor([[1, *before, *[IMAGE] * count, 5, 6]])
        with torch.no_grad(), vtprune.pruning(model, Brightest(white=white)) as session:
            model(input_ids=ids, **given, **kind.types(ids))
        sample = session.report.samples[0]
        assert len(sample.images) == 1 and len(sample.kept) == 1
        found = sample.boxes(0, image.size, fit)
        assert len(found) == sample.visual_tokens
        left, top, right, bottom = found[int(sample.kept[0])]
        spot_x, spot_y = x * shape[0], y * shape[1]
        half_w, half_h = 0.15 * shape[0] + 1, 0.15 * shape[1] + 1
        # the token lies within the spot but for its own size, as a token beside it would not
        assert left > spot_x - half_w - (right - left) and right < spot_x + half_w + (right - left), (left, right, spot_x)
        assert top > spot_y - half_h - (bottom - top) and bottom < spot_y + half_h + (bottom - top), (top, bottom, spot_y)
        centre = ((left + right) / 2, (top + bottom) / 2)
        assert np.asarray(image)[int(centre[1]), int(centre[0]), 0] == 255
        drawn = np.asarray(session.report.overlay(image, fit=fit))
        assert ((drawn == (86, 180, 233)).all(-1)).sum() > 20  # the outline of what was kept


@pytest.mark.parametrize("name", [name for name in ("onevision", "next-video", "qwen2", "qwen2.5") if name in KINDS])
@pytest.mark.parametrize("at", [(1, 0, 2), (2, 1, 1)], ids=str)
def test_the_frame_and_cell_of_the_brightest_token_of_a_video(name, at):
    kind = KINDS[name]
    model = blind(kind.build("sdpa"))
    given, tokens = kind.video(model, 0)
    frame, row, column = at
    if name.startswith("qwen"):
        rows, columns, slots = 3, 2, 4
        column = min(column, columns - 1)
        pixels = torch.zeros_like(given["pixel_values_videos"])
        # four patches of a cell follow each other
        first = frame * rows * columns * 4 + (row * columns + column) * 4
        pixels[first : first + 4] = 3.0
    else:
        rows = columns = GRID // 2
        slots = 4
        pixels = torch.zeros_like(given["pixel_values_videos"])
        pixels[0, frame, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 3.0
    given["pixel_values_videos"] = pixels
    ids = torch.tensor([[1, *tokens, 5, 6]])
    with torch.no_grad(), vtprune.pruning(model, Brightest()) as session:
        model(input_ids=ids, **given, **kind.types(ids))
    sample = session.report.samples[0]
    assert sample.frames == [slots] and sample.grids == [(rows, columns)]
    number = int(sample.kept[0])
    assert number == (frame * rows + row) * columns + column
    assert ids[0].tolist().count(VIDEO) >= sample.visual_tokens
    with pytest.raises(ValueError, match="form no grid"):
        sample.boxes(0, (100, 100))


def test_boxes_tile_the_picture():
    """Each view's boxes cover the picture once."""
    views = (View(2, 3), *(View(4, 4, tile, 6) for tile in range(6)))
    found = boxes(views, (300, 190))
    area = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    assert np.isclose(area[:6].sum(), 300 * 190) and np.isclose(area[6:].sum(), 300 * 190)
    coarse, fine = canvases(views, 300, 190)
    assert coarse.grid == (2, 3) and fine.grid == (8, 12)
    # the second tile begins where the first ends
    assert fine.numbers[0, 4] == 6 + 16 and np.array_equal(np.sort(fine.numbers.ravel()), np.arange(6, 6 + 96))


def test_arrangements():
    assert arrangement(6, 300, 200) == (2, 3) and arrangement(6, 100, 300) == (6, 1) and arrangement(1, 5, 9) == (1, 1)
    assert canvases((View(2, 2, 0, 2, across=1), View(2, 2, 1, 2, across=1)), 300, 100)[0].grid == (4, 2)
