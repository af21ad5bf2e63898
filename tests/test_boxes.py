"""A token's box covers what the token saw: white cells in grey pictures, through the real processors, for every family.

A picture is white where one token's box is and grey elsewhere; the token that stands out must be that one. So the number of a
token, its box and what the processor did to the picture (crops, tiles, padding, mergers) say the same, cell by cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import GRID, IMAGE, VIDEO
from PIL import Image
from processors import PROCESSORS, gemma_processor, processor_of
from test_timeline import cells
from test_timeline import picture as frame_of
from zoo import every, plain, qwen2
from zoo.plain import FAST_SIDE

import vtprune
from vtprune.cli.app import _fit
from vtprune.families import FAMILIES, locate
from vtprune.places import View, arrangement, boxes, canvases, shown
from vtprune.pruner import Keep, SelectView
from vtprune.viz import KEPT
from vtprune.viz_timeline import shares, timeline

pytest.importorskip("torchvision")
SIDE = 8 * GRID
KINDS = {kind.name: kind for kind in every()}
GREY, WHITE = 90, 255


@dataclass
class Brightest(vtprune.Pruner):
    """Keeps the token nearest to what a white picture has in its place; what it has seen serves as such a reference."""

    keep: int = 1
    white: torch.Tensor | None = field(default=None, repr=False)
    seen: list[torch.Tensor] = field(default_factory=list, repr=False)
    name = "brightest"
    positions = "original"

    def select(self, view: SelectView) -> Keep:
        features = view.features.float()
        self.seen.append(features)
        return Keep(self.far(features).argmin(1, keepdim=True))

    def far(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N] how far each token is from the reference."""
        return (features - (0.0 if self.white is None else self.white)).norm(dim=-1)


def blind(model):
    """A model whose encoder lets no patch look at another, so that a token shows its own patch alone."""
    for name, parameter in model.model.named_parameters():
        if "language_model" in name or "text_model" in name:
            continue
        last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        inside = any(part in name for part in (".layers.", ".layer.", ".blocks."))
        joins = inside and last in ("out_proj", "o_proj", "projection_layer", "proj", "fc2", "down_proj")
        if joins or "position" in name or "pos_embed" in name:
            torch.nn.init.zeros_(parameter)
    kernels = [one for one in locate(model).convolutions if getattr(one, "kernel_size", (1,))[0] > 1]
    strided = [one for one in kernels if one.stride[0] > 1]
    for module in kernels:
        # of a kernel one tap, as large as the whole was: of all together, the one in the middle of a token's cell
        tap, side = module.kernel_size[0] // 2 + (module is strided[-1]), module.kernel_size[0]
        kept = torch.zeros(side, side)
        kept[tap, tap] = side
        module.weight.data *= kept
    return model


# ------------------------------------------------------------------ what processors make of pictures


@dataclass(frozen=True)
class Feed:
    """A family's model and its processor.

    Parameters:
        model: its encoder is blind.
        give: a picture, or a video's frames -> what the model takes.
        processor: the real one.
    """

    model: Any
    give: Callable[[Any], dict[str, torch.Tensor]]
    processor: Any

    @property
    def fit(self) -> str:
        """How the command line takes pictures to be fitted."""
        return _fit(self.processor, False)


def alone(make: Callable[[], Any], *before: int, drop: Sequence[str] = ()):
    """A family whose image processor says it all: its placeholders just follow each other."""

    def feed(kind) -> Feed:
        model, processor = blind(kind.build("sdpa")), make()

        def give(image):
            given = {key: value for key, value in processor(image, return_tensors="pt").items() if key not in drop}
            with torch.no_grad():
                features = model.model.get_image_features(**given, return_dict=True).pooler_output
            ids = torch.tensor([[1, *before, *[IMAGE] * sum(map(len, features)), 5, 6]])
            return {"input_ids": ids, **given, **kind.types(ids)}

        return Feed(model, give, SimpleNamespace(image_processor=processor))

    return feed


def written(name: str):
    """A family whose processor writes tokens between tiles."""

    def feed(kind) -> Feed:
        processor, word, _, build = PROCESSORS[name]()

        def give(image):
            images = [[image]] if name in ("idefics3", "smolvlm") else [image]
            inputs = processor(images=images, text=[f"{word}?"], return_tensors="pt")
            return {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask") or "pixel" in key}

        return Feed(blind(build()), give, processor)

    return feed


def three_axes(kind) -> Feed:
    processor = processor_of(kind.name)
    words = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
    words = words if kind.name.startswith("glm") else ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")

    def give(image):
        inputs = processor(text=[f"a {''.join(words)} b"], images=[image], return_tensors="pt")
        return {**inputs, **kind.types(inputs["input_ids"])}

    return Feed(blind(kind.build("sdpa")), give, processor)


def gemma(kind) -> Feed:
    processor = gemma_processor()

    def give(image):
        return dict(processor(text=["a <start_of_image> b"], images=[[image]], return_tensors="pt"))

    return Feed(blind(kind.build("sdpa")), give, processor)


def square(name: str, side: int = SIDE, **more):
    return lambda: getattr(transformers, name)(size={"height": side, "width": side}, **more)


def cropping(name: str = "CLIPImageProcessor", side: int = SIDE, **more):
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return lambda: getattr(transformers, name)(**sizes, **more)


POINTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
QWEN = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 64 * 64, "longest_edge": 160 * 160}}
clip = alone(cropping())
siglip = alone(square("SiglipImageProcessor"))
next_tiles = alone(cropping("LlavaNextImageProcessor", **POINTS))
qwen = alone(lambda: transformers.Qwen2VLImageProcessor(**QWEN), qwen2.START)
pixtral = alone(lambda: transformers.PixtralImageProcessor(size={"longest_edge": 128}, patch_size={"height": 16, "width": 16}))
PICTURES = {
    "llava": clip,
    "llava-siglip": siglip,
    "llava-mistral-window": clip,
    "llava-cohere2": clip,
    "vipllava": clip,
    "next": next_tiles,
    "next-video": next_tiles,
    "onevision": alone(square("LlavaOnevisionImageProcessor", **POINTS), drop=("batch_num_images",)),
    "video-llava": alone(cropping("VideoLlavaImageProcessor")),
    "qwen2": qwen,
    "qwen2.5": qwen,
    "qwen2.5-window": qwen,
    "qwen3-vl": three_axes,
    "qwen3-vl-moe": three_axes,
    "qwen3.5": three_axes,
    "qwen3.5-moe": three_axes,
    "glm4v": three_axes,
    "glm4v-moe": three_axes,
    "glm46v": three_axes,
    "glm-ocr": three_axes,
    "internvl": alone(
        square("GotOcr2ImageProcessor", 2 * SIDE, crop_to_patches=True, min_patches=1, max_patches=6), drop=("num_patches",)
    ),
    "mistral3": pixtral,
    "mistral3-window": pixtral,
    "gemma3": gemma,
    "paligemma": siglip,
    "paligemma2": siglip,
    "idefics3": written("idefics3"),
    "smolvlm": written("smolvlm"),
    "aya": written("aya"),
    "ovis2": written("ovis2"),
    "perception_lm": written("perception_lm"),
    "fast_vlm": alone(cropping(side=FAST_SIDE)),
}


def test_every_family_is_here():
    """A family, or a kind of it in the zoo, that no case of this file has would go untested."""
    assert set(KINDS) <= set(PICTURES) and {kind.name for kind in KINDS.values() if kind.video} <= set(VIDEOS)
    served = {locate(kind.build("sdpa")).family.name for kind in KINDS.values()}
    unserved = {family.name for family in FAMILIES} - served
    assert unserved <= (set() if plain.TIMM else {"PerceptionLM", "FastVLM"})


@lru_cache
def feed_of(name: str) -> Feed:
    return PICTURES[name](KINDS[name])


def ran(feed: Feed, seen, white: torch.Tensor | None = None):
    """The report of a prompt, and the strategy that ran."""
    pruner = Brightest(white=white)
    with torch.no_grad(), vtprune.pruning(feed.model, pruner) as session:
        feed.model(**feed.give(seen))
    return session.report, pruner


def painted(size: tuple[int, int], box: Sequence[float]) -> Image.Image:
    """Grey, but white in the box."""
    pixels = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    left, top, right, bottom = np.round(box).astype(int)
    pixels[top:bottom, left:right] = WHITE
    return Image.fromarray(pixels)


def shared(box: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Which share of each box `box` covers."""
    wide = np.minimum(found[:, 2], box[2]) - np.maximum(found[:, 0], box[0])
    high = np.minimum(found[:, 3], box[3]) - np.maximum(found[:, 1], box[1])
    area = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    return wide.clip(0) * high.clip(0) / area


side = st.integers(200, 700)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=6)
@given(width=side, height=side, places=st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3))
@example(width=640, height=270, places=[0.0, 0.5, 0.999])
@example(width=210, height=600, places=[0.1, 0.45, 0.999])
def test_the_token_of_a_white_cell_is_the_brightest(name, width, height, places):
    feed, size = feed_of(name), (width, height)
    report, reference = ran(feed, Image.new("RGB", size, (WHITE,) * 3))
    (sample,) = report.samples
    assert len(sample.images) == 1 and len(reference.seen) == 1
    found = sample.boxes(0, size, feed.fit)
    assert found.shape == (sample.visual_tokens, 4) and (found >= 0).all() and (found.max(0) <= [*size, *size]).all()
    starts = np.cumsum([0, *(view.cells for view in sample.views_of(0))])
    for place in places:
        number = int(place * sample.visual_tokens)
        image = painted(size, found[number])
        report, pruner = ran(feed, image, reference.seen[0])
        far = pruner.far(pruner.seen[0])[0].numpy()
        (kept,) = report.samples[0].kept.tolist()
        # of a tiled picture, the whole and a tile show the cell, at two scales, and either may be nearer to white
        assert max(shared(found[kept], found)[number], shared(found[number], found)[kept]) > 0.2, (number, kept)
        view = int(np.searchsorted(starts, number, "right")) - 1
        assert starts[view] + far[starts[view] : starts[view + 1]].argmin() == number
        drawn = np.asarray(report.overlay(image, fit=feed.fit))
        assert (drawn == KEPT).all(-1).sum() > 20


# ------------------------------------------------------------------ what processors make of videos

FRAMES = 8
METADATA = {"fps": 2.0, "total_num_frames": FRAMES, "frames_indices": list(range(FRAMES)), "duration": FRAMES / 2}


def video_alone(make: Callable[[], Any], count: Callable[[dict], int], *before: int):
    """A family whose video processor says it all; `count` is what its processor of prompts would make of a video."""

    def feed(kind) -> Feed:
        processor = make()

        def give(frames):
            given = dict(processor(videos=[clip_of(frames)], return_tensors="pt", do_sample_frames=False))
            ids = torch.tensor([[1, *before, *[VIDEO] * count(given), 5, 6]])
            return {"input_ids": ids, **given, **kind.types(ids)}

        return Feed(blind(kind.build("sdpa")), give, SimpleNamespace(video_processor=processor))

    return feed


def clip_of(frames: Sequence[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)


def timed(kind) -> Feed:
    """Frames stand apart in the prompt, with their times in words."""
    processor = processor_of(kind.name)
    words = ("<|begin_of_video|>", "<|video|>", "<|end_of_video|>")
    words = words if kind.name.startswith("glm") else ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")

    def give(frames):
        made = processor(
            text=[f"a {''.join(words)} b"],
            videos=[clip_of(frames)],
            video_metadata=[[METADATA]],
            do_sample_frames=False,
            return_tensors="pt",
        )
        return {**made, **kind.types(made["input_ids"])}

    return Feed(blind(kind.build("sdpa")), give, processor)


def pooled_video(kind) -> Feed:
    processor, _, _, build = PROCESSORS["perception_lm"]()

    def give(frames):
        made = processor(videos=[clip_of(frames)], text=["<|video|>?"], return_tensors="pt", do_sample_frames=False)
        return {key: value for key, value in made.items() if key in ("input_ids", "attention_mask") or "pixel" in key}

    return Feed(blind(build()), give, processor)


def per_frame(tokens: int, more: int = 0):
    return lambda given: FRAMES * tokens + more


def merged(given: dict) -> int:
    return int(given["video_grid_thw"].prod()) // 4


clips = video_alone(lambda: transformers.Qwen2VLVideoProcessor(**QWEN, temporal_patch_size=2), merged, qwen2.START)
VIDEOS = {
    "next-video": video_alone(cropping("LlavaNextVideoVideoProcessor"), per_frame((GRID // 2) ** 2)),
    "onevision": video_alone(square("LlavaOnevisionVideoProcessor"), per_frame((GRID // 2) ** 2, 1)),
    "video-llava": video_alone(cropping("VideoLlavaVideoProcessor"), per_frame(GRID**2 + 1)),
    "qwen2": clips,
    "qwen2.5": clips,
    "qwen3-vl": timed,
    "qwen3-vl-moe": timed,
    "qwen3.5": timed,
    "qwen3.5-moe": timed,
    "glm4v": timed,
    "glm4v-moe": timed,
    "glm46v": timed,
    "glm-ocr": timed,
    "perception_lm": pooled_video,
}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.video])
@pytest.mark.parametrize("size", [(480, 270), (200, 330)], ids=str)
def test_the_frame_and_the_token_of_a_white_cell_are_the_brightest(name, size):
    feed = VIDEOS[name](KINDS[name])
    fit = _fit(feed.processor, True)
    white, grey = (Image.new("RGB", size, (level,) * 3) for level in (WHITE, GREY))
    report, reference = ran(feed, [white] * FRAMES)
    (sample,) = report.samples
    (slots,), ((rows, columns),) = sample.frames, sample.grids
    per, each = FRAMES // slots, rows * columns
    assert sample.visual_tokens == slots * each and per in (1, 2) and rows * columns > 4
    places = boxes((View(rows, columns),), size, fit)
    for slot, cell in ((0, 0), (1, each - 1), (slots - 2, columns), (slots - 1, 1)):
        frames = [grey] * FRAMES
        frames[slot * per : slot * per + per] = [painted(size, places[cell])] * per
        report, _ = ran(feed, frames, reference.seen[0])
        (kept,) = report.samples[0].kept.tolist()
        assert kept == slot * each + cell
        with pytest.raises(ValueError, match="form no grid"):
            report.samples[0].boxes(0, size)
        # as drawn: the frame's time, and where in it
        assert shares(report.samples[0]).plan.tokens == tuple(int(at == slot) for at in range(slots))
        drawn = [frame_of(one) for one in cells(timeline(report.samples[0], frames, fit=fit, bare=True), slots)]
        for at, frame in enumerate(drawn):
            lit, dark = (frame > 235).all(-1).mean() * each, (abs(frame - 101) < 8).all(-1).mean() * each
            assert lit > 0.25 and dark < 0.3 if at == slot else lit == dark == 0, (at, slot, lit, dark)


def test_frames_that_go_in_as_pictures():
    """SmolVLM's: each frame is an image of its own, in the order of the video."""
    if "smolvlm" not in KINDS:
        pytest.skip("no SmolVLM")
    processor, _, _, build = PROCESSORS["smolvlm"]()
    model, size = blind(build()), (300, 200)

    def give(frames):
        made = processor(videos=[[clip_of(frames)]], text=["<video>?"], return_tensors="pt", do_sample_frames=False)
        return {key: value for key, value in made.items() if key in ("input_ids", "attention_mask") or "pixel" in key}

    feed = Feed(model, give, processor)
    white, grey = (Image.new("RGB", size, (level,) * 3) for level in (WHITE, GREY))
    report, reference = ran(feed, [white] * 4)
    assert report.samples[0].images == [GRID**2] * 4
    places = report.samples[0].boxes(2, size, "stretch")
    for cell in (0, 8, 35):
        report, pruner = ran(feed, [grey, grey, painted(size, places[cell]), grey], torch.cat(reference.seen))
        far = pruner.far(torch.cat(pruner.seen))
        assert divmod(int(far.argmin()), GRID**2) == (2, cell)
        assert report.samples[0].kept[2] == 2 * GRID**2 + cell


def test_crops_of_pan_and_scan_are_pictures_of_their_own():
    """Gemma 3's: a token's box is in the crop that it is of, as the processor cut it."""
    if "gemma3" not in KINDS:
        pytest.skip("no Gemma 3")
    crops = {"pan_and_scan_min_crop_size": 40, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
    processor, size = gemma_processor(), (500, 170)

    def give(image):
        options = {"do_pan_and_scan": True, **crops}
        return dict(processor(text=["a <start_of_image> b"], images=[[image]], return_tensors="pt", images_kwargs=options))

    feed = Feed(blind(KINDS["gemma3"].build("sdpa")), give, processor)
    report, reference = ran(feed, Image.new("RGB", size, (WHITE,) * 3))
    (sample,) = report.samples
    assert sample.images == [GRID**2] * 4  # the whole, and three crops side by side
    wide = -(-size[0] // 3)
    cuts = [(0, 0, *size), *((at * wide, 0, min(size[0], at * wide + wide), size[1]) for at in range(3))]
    for image, cell in ((0, 14), (1, 0), (2, 20), (3, 35)):
        left, top, right, bottom = cuts[image]
        box = sample.boxes(image, (right - left, bottom - top), "stretch")[cell] + [left, top, left, top]
        picture = painted(size, box)
        report, pruner = ran(feed, picture, torch.cat(reference.seen))
        far = pruner.far(torch.cat(pruner.seen))
        assert int(far[image].argmin()) == cell and int(report.samples[0].kept[image]) == image * GRID**2 + cell
        with pytest.raises(vtprune.VtpruneError, match=r"4 image\(s\), 1 given"):
            report.overlay(picture)
        assert report.overlay([picture.crop(cut) for cut in cuts], fit="stretch").width > 100


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


def test_a_crop_stays_within_the_picture():
    """Of any size; some that are divided and multiplied again come out a hair larger."""
    for grid in ((6, 6), (24, 24), (7, 5)):
        for width in range(1, 700):
            for height in (width, 337):
                left, top, right, bottom = shown(grid, width, height, "crop")
                assert 0 <= left < right <= width and 0 <= top < bottom <= height
                assert abs((right - left) / (bottom - top) - grid[1] / grid[0]) < 1e-9
