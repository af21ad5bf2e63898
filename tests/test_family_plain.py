"""Idefics3, SmolVLM, Aya Vision, Ovis2, PerceptionLM and FastVLM: what their tiles add to the promises of test_matrix.py."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo.plain as zoo_plain
from harness import ask, run
from models import IMAGE, TOKENS, beams_keep_images_together, preencoding
from oracle import Watch, oracle_logits
from processors import PROCESSORS
from transformers import DynamicCache
from zoo import every, model_of
from zoo.plain import KINDS, NEWLINE, WORDS, marked, worded

import vtprune
from vtprune.families import locate
from vtprune.families.ovis import _worded
from vtprune.families.tiles import marked as by_marks
from vtprune.families.tiles import touching
from vtprune.places import arrangement
from vtprune.pruner import Needs, Pruner

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
JOINED = [kind for kind in KINDS if kind.name != "fast_vlm"]  # those that join patches two by two
PADDED = [[2, "A", 5], [3, "B", 2, "A", 4], [1, "B", 7]]


def of(name: str):
    found = [kind for kind in KINDS if kind.name == name]
    if not found:
        pytest.skip("timm is not installed")
    return found[0]


# ------------------------------------------------------------------ one image, one budget


@every_kind
def test_an_image_is_one_item_with_its_tiles(kind):
    """A budget is spent per image, whatever number of tiles it came in, and each sample has its own images."""
    asked = ask(kind, PADDED)
    report = run(asked, pruner=vtprune.DivPrune(keep=10)).report
    sizes = {part: tokens.count(IMAGE) for part, tokens in ((p, kind.picture(model_of(kind), "AB".index(p))[1]) for p in "AB")}
    assert [s.images for s in report.samples] == [[sizes["A"]], [sizes["B"], sizes["A"]], [sizes["B"]]]
    assert [len(s.kept) for s in report.samples] == [10, 20, 10]
    assert not report.notes


@every_kind
def test_what_its_encoder_refuses(kind):
    model = model_of(kind)

    class Inside(vtprune.FlowCut):
        requires = frozenset()

    with pytest.raises(vtprune.UnsupportedError, match=r"works inside the vision encoder, which .* does not allow: it"):
        vtprune.wrap(model, Inside(keep=10))
    with pytest.raises(vtprune.UnsupportedError, match=r"needs cls|does not allow"):
        vtprune.wrap(model, "visionzip", keep=10)
    with pytest.raises(vtprune.UnsupportedError, match="cannot be given a smaller picture"):
        vtprune.wrap(model, "resolution", keep=10)


@pytest.mark.parametrize("kind", every(), ids=str)
@preencoding
def test_beams_batch_equals_single(kind):
    """Beams stack features anew in some families: what was known of them is found again."""
    # GLM-V's own expansion for beams (and in 5.18 every family's) repeats each picture, so several of a prompt go astray;
    # GLM-V's fails on videos
    pictures = PADDED if kind.mixes and beams_keep_images_together() else [[2, "A", 5], [1, "B", 7]]
    family = locate(model_of(kind)).family
    if (family.runs or family.tiles_apart) and not beams_keep_images_together():
        pytest.skip("this version splits tiles up among beams")
    for prompts in [pictures, [[2, "V", 5], [3, "W", 4]]][
        : 1 + (kind.video is not None and kind.mixes and beams_keep_images_together())
    ]:
        asked, options = ask(kind, prompts), {"num_beams": 2}
        # a state of linear attention cannot be evicted from
        hybrid = not all(locate(model_of(kind)).attends)
        pruner = vtprune.create("random" if hybrid else "random+fastv+evict", keep=20, **({} if hybrid else {"layer": 1}))
        together = run(asked, pruner=pruner, **options)
        # what is encoded once for each beam counts each time: PerceptionLM's videos, and pictures of some families in 5.18
        step = len(together.report.samples) // len(prompts)
        assert step == 1 or (step == 2 and (kind.name == "perception_lm" or not beams_keep_images_together()))
        for row in range(len(prompts)):
            alone = run(asked.alone(row), pruner=pruner, **options)
            assert torch.equal(alone.tokens[0], together.tokens[row])
            assert alone.report.samples[0].images == together.report.samples[step * row].images
            assert alone.report.samples[0].views == together.report.samples[step * row].views


@every_kind
def test_embeddings_fed_by_the_user_are_pruned_as_ids_are(kind):
    """Tiles are told to belong together by what stands between them, which embeddings show as well as ids do."""
    model, (ids, given) = model_of(kind), (ask(kind, PADDED[1:2]).ids, ask(kind, PADDED[1:2]).given)
    ids = torch.tensor(ids)
    try:
        model(inputs_embeds=model.get_input_embeddings()(ids), **given[0])
    except ValueError:
        pytest.skip("this version takes no embeddings beside pixels")
    with torch.no_grad(), vtprune.pruning(model, "divprune", keep=10) as session:
        fed = model(input_ids=ids, **given[0]).logits
        by_ids = session.report.samples[0]
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), **given[0]).logits
        by_embeds = session.report.samples[0]
    torch.testing.assert_close(fed, embedded)
    assert by_ids.images == by_embeds.images and torch.equal(by_ids.kept, by_embeds.kept)


@every_kind
def test_features_computed_elsewhere(kind):
    """Before wrapping, or by hand: what is known of them from their size alone is used, the rest is refused."""
    model, asked = model_of(kind), ask(kind, PADDED[1:2])
    with torch.no_grad():
        bare = model.model.get_image_features(**asked.given[0], return_dict=True)
        if preencoding.args[0]:
            pytest.skip("features cannot be handed over before transformers 5.18")
        with vtprune.pruning(model, "divprune", keep=10) as session:
            if kind.name == "perception_lm":
                with pytest.raises(vtprune.UnsupportedError, match="features come tile by tile"):
                    model(input_ids=torch.tensor(asked.ids), mm_encoder_outputs={"image": bare})
                return
            handed = model(input_ids=torch.tensor(asked.ids), mm_encoder_outputs={"image": bare}).logits
            before = session.report.samples[0].images
            fed = model(input_ids=torch.tensor(asked.ids), **asked.given[0]).logits
    torch.testing.assert_close(handed, fed)
    assert before == session.report.samples[0].images


@every_kind
def test_a_second_turn_with_another_picture(kind):
    model = model_of(kind)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one, two = ask(kind, [[2, "A", 5]]), ask(kind, [[3, "B", 2]])
    first, more = one.ids[0], two.ids[0]
    pruner = vtprune.create("divprune+fastv", keep=20, layer=1)
    turns = []
    with vtprune.pruning(model, pruner) as session:
        watch = Watch(model, pruner)
        cache = DynamicCache(config=model.config.text_config)
        out = model.generate(input_ids=torch.tensor([first]), **one.given[0], past_key_values=cache, **options)
        said = out.sequences[0, len(first) :].tolist()
        turns.append(watch.turn(first, said[:-1], session.report.samples[0], None, 0, 0))
        watch.close()
        watch = Watch(model, pruner)
        whole = torch.tensor([first + said + more[1:]])
        again = model.generate(input_ids=whole, **two.given[0], past_key_values=out.past_key_values, **options)
        answer = again.sequences[0, whole.shape[1] :].tolist()
        turns.append(watch.turn(said[-1:] + more[1:], answer, session.report.samples[0], None, 0, 0))
        watch.close()
    for turn, asked in zip(turns, (one, two), strict=True):
        turn.extra = asked.given[0]
    expected = oracle_logits(model, turns, compact=True)[whole.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(again.logits, 1)[0], expected, atol=1e-4, rtol=1e-4)


@dataclass
class Probe(Pruner):
    """Takes down the attention rows that layer 1 would have, and keeps all."""

    keep: float = 1.0
    name = "probe"

    def prefill_needs(self, depth):
        return {1: Needs(queries="last", ahead=True)}

    def prefill(self, view):
        probed.append((view.rows.logits - view.rows.lse[..., None]).exp())


probed: list[torch.Tensor] = []


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_rows_ahead_are_the_attention_of_the_layer(name):
    """Aya Vision's layers of full attention do not rotate; the others do."""
    kind = of(name)
    asked, model = ask(kind, [[2, "A", 5]], "eager"), model_of(kind, "eager")
    probed.clear()
    with torch.no_grad():
        seen = model(input_ids=torch.tensor(asked.ids), **asked.given[0], output_attentions=True).attentions[1]
        with vtprune.pruning(model, Probe()):
            model(input_ids=torch.tensor(asked.ids), **asked.given[0])
    at = torch.tensor([i for i, token in enumerate(asked.ids[0]) if token == IMAGE])
    torch.testing.assert_close(probed[0][0, :, 0], seen[0, :, -1, at], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ where a token is in its picture


def flat(output) -> torch.Tensor:
    """[tokens, D] features of all tiles, which come as rows and columns in some versions."""
    return torch.cat([one.flatten(0, -2) for one in output.pooler_output])


@pytest.mark.parametrize("kind", JOINED, ids=str)
def test_the_token_of_a_patch(kind):
    """What changes when one patch does is the token of its cell: patches are joined two by two, in raster order."""
    model = model_of(kind)
    given, _ = kind.picture(model, 0)
    place = {"ovis2": "vision_tower.transformer", "idefics3": "connector", "smolvlm": "connector"}
    module = model.model.get_submodule(place.get(kind.name, "multi_modal_projector"))
    row, column, side = 7, 4, 12

    def nudge(features):
        features = features.clone()
        features[1, row * side + column] += 3.0
        return features

    def before(module, args):
        return (nudge(args[0]), *args[1:])

    def after(module, args, output):
        output.last_hidden_state = nudge(output.last_hidden_state)
        return output

    with torch.no_grad():
        plain = flat(model.model.get_image_features(**given, return_dict=True))
        hook = module.register_forward_hook(after) if kind.name == "ovis2" else module.register_forward_pre_hook(before)
        nudged = flat(model.model.get_image_features(**given, return_dict=True))
        hook.remove()
    changed = ((plain - nudged).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
    assert changed == [TOKENS + row // 2 * (side // 2) + column // 2]


def test_tiles_are_told_apart_by_what_stands_between_them():
    def spans(ids):
        starts = [i for i, t in enumerate(ids) if t == IMAGE and (i == 0 or ids[i - 1] != IMAGE)]
        return [(at, at + TOKENS) for at in starts]

    def read(*parts):
        ids = [1, *[t for part in parts for t in part]]
        return [(tiling.tiles, tiling.across) for tiling in by_marks(None, ids, spans(ids))]

    split, single = marked(2, 3), marked(0, 0)
    one_break = [t for i, t in enumerate(split) if not (t == NEWLINE and split[i - 1] == NEWLINE)]  # "\n\n" as one token
    for image in (split, one_break):
        assert read(image) == [(7, 3)]
        assert read([5], image, single, image, [5, 6]) == [(7, 3), (1, 0), (7, 3)]
    assert read(single, [NEWLINE, NEWLINE], single, [7], single) == [(1, 0)] * 3
    # frames of a video: a time stamp each
    assert read(*[[NEWLINE, 11, 12, 13, *single]] * 4) == [(1, 0)] * 4
    # made by hand, without marks
    assert read([IMAGE] * TOKENS, [7], [IMAGE] * TOKENS, [7, 8, 9], [IMAGE] * TOKENS) == [(1, 0)] * 3
    # no image of the processor's: rows of different length stay one image, of no known arrangement
    odd = [t for t in marked(1, 2)[: -TOKENS - 4]] + marked(1, 3)
    assert read(odd) == [(6, 0)]

    class Base:
        visual_indicator_token_ids = WORDS

    for rows, columns in ((1, 1), (2, 3), (1, 4), (3, 1)):
        ids = [1, 5, *worded(rows, columns), *worded(1, 1), *worded(rows, columns), 7]
        parts = rows * columns
        expected = (1, 0) if parts == 1 else (1 + parts, columns)
        found = [(tiling.tiles, tiling.across) for tiling in _worded(Base, ids, spans_of(ids))]
        assert found == [expected, (1, 0), expected]

    ids = [IMAGE] * 8 + [5] + [IMAGE] * 4
    assert [t.tiles for t in touching(None, ids, [(0, 4), (4, 8), (9, 13)])] == [2, 1]


def spans_of(ids: list[int]) -> list[tuple[int, int]]:
    """Ovis2's tiles never touch each other."""
    starts = [i for i, t in enumerate(ids) if t == IMAGE and ids[i - 1] != IMAGE]
    return [(at, at + TOKENS) for at in starts]


# ------------------------------------------------------------------ the real processors

pytest.importorskip("torchvision")
PIL = pytest.importorskip("PIL.Image")
every_processor = pytest.mark.parametrize("name", PROCESSORS)
# (width, height, where it is bright: left, top)
PICTURES = [(320, 150, 0.55, 0.25), (90, 100, 0.1, 0.7)]


def picture(width: int, height: int, left: float, top: float):
    """Dark, with one bright square of a fifth of the shorter side."""
    made, side = PIL.new("RGB", (width, height), (9, 12, 15)), min(width, height) // 5
    made.paste(
        (250, 245, 240), (round(left * width), round(top * height), round(left * width) + side, round(top * height) + side)
    )
    return made


@every_processor
def test_the_processors_prompt_has_the_declared_layout(name):
    processor, word, token, build = PROCESSORS[name]()
    model = build()
    pictures = [picture(*PICTURES[0]), picture(*PICTURES[1])]
    if name == "perception_lm":  # of equally many tiles alone
        pictures[1] = picture(320, 150, 0.1, 0.7)
    nested = name in ("idefics3", "smolvlm")
    images = [[pictures[0]], pictures[::-1]] if nested else [pictures[0], *pictures[::-1]]
    inputs = processor(images=images, text=[f"Say: {word}What?", f"{word}and {word}differ?"], return_tensors="pt", padding=True)
    inputs = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask") or "pixel" in key}
    fed = (inputs["input_ids"] == token).sum(1).tolist()
    assert fed[0] > TOKENS  # the wide one is tiled
    options = {"max_new_tokens": 3, "do_sample": False}
    bare = model.generate(**inputs, **options)
    with vtprune.pruning(model, "fastv", keep=1.0, layer=1) as session:
        assert torch.equal(bare, model.generate(**inputs, **options))
    vtprune.wrap(model, "divprune", keep=15)
    model.generate(**inputs, **options)
    samples = vtprune.report(model).samples
    assert [len(s.images) for s in samples] == [1, 2] and [s.visual_tokens for s in samples] == fed
    assert [len(s.kept) for s in samples] == [15, 30] and samples[0].images[0] == samples[1].images[1]
    assert len(session.report.samples[0].views[0]) * TOKENS == fed[0]
    vtprune.unwrap(model)


def brightness(pixels: torch.Tensor, cell: int) -> torch.Tensor:
    """[tokens] how bright each token's cell is, tile by tile."""
    return torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), cell).flatten()


@every_processor
@pytest.mark.parametrize("shape", [PICTURES[0], (150, 320, 0.3, 0.8), (200, 190, 0.7, 0.1), (310, 300, 0.05, 0.55)])
def test_the_brightest_tokens_box_covers_the_bright_square(name, shape):
    """Through the real processor: in each tile that shows the square, the brightest token's box is on it."""
    processor, word, _, build = PROCESSORS[name]()
    width, height, left, top = shape
    inputs = processor(images=[picture(*shape)], text=[f"{word}?"], return_tensors="pt")
    pixels = inputs["pixel_values"].flatten(0, -4)
    model = build()
    given = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask") or "pixel" in key}
    with torch.no_grad(), vtprune.pruning(model, "uniform", keep=5) as session:
        model(**given)
    sample = session.report.samples[0]
    boxes = sample.boxes(0, (width, height), fit="stretch")
    assert boxes.shape == (sample.visual_tokens, 4) and boxes.min() >= 0 and (boxes.max(0) <= max(width, height)).all()
    light = brightness(pixels, pixels.shape[-1] // 6)
    assert len(light) == sample.visual_tokens
    bright = min(width, height) // 5
    x, y = round(left * width), round(top * height)
    square = (x, y, x + bright, y + bright)
    tiles = light.view(-1, TOKENS)
    shown = 0
    for tile, row in enumerate(tiles):
        if row.max() < tiles.min() + 0.15 * (tiles.max() - tiles.min()):
            continue  # none of the square in it
        box = boxes[tile * TOKENS + int(row.argmax())].tolist()
        assert box[0] < square[2] and square[0] < box[2] and box[1] < square[3] and square[1] < box[3]
        shown += 1
    assert shown >= (2 if len(tiles) > 1 else 1)  # the overview, and a part


def test_arrangements_are_those_of_the_processors():
    """How many tiles there are, and the picture's shape, say how they lie."""
    import transformers
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    draw = random.Random(0)
    perception = transformers.PerceptionLMImageProcessor(tile_size=64, max_num_tiles=36)
    for _ in range(60):
        width, height = draw.randint(20, 1500), draw.randint(20, 1500)
        columns, rows = get_optimal_tiled_canvas((height, width), (64, 64), 1, 12)
        assert arrangement(columns * rows, width, height) == (rows, columns)
        canvas = perception._fit_image_to_canvas(img_width=width, img_height=height, tile_size=64)
        if canvas is not None:
            assert arrangement(canvas[0] * canvas[1], width, height, largest=True) == canvas[::-1]


def test_frames_of_smolvlm_are_pictures():
    """Its processor feeds a video as pictures with a time stamp each: every frame has the budget."""
    import numpy

    processor, _, _, build = PROCESSORS["smolvlm"]()
    frames = numpy.random.default_rng(0).integers(0, 255, (4, 60, 80, 3), dtype=numpy.uint8)
    inputs = processor(videos=[[frames]], text=["<video>What?"], return_tensors="pt", padding=True)
    given = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask") or "pixel" in key}
    model = build()
    with vtprune.pruning(model, "divprune", keep=7) as session:
        model.generate(**given, max_new_tokens=2, do_sample=False)
    assert session.report.samples[0].images == [TOKENS] * 4 and len(session.report.samples[0].kept) == 28
    # a strategy that compares frames is asked about all of them together
    with vtprune.pruning(model, "framedrop", keep=18) as session:
        model.generate(**given, max_new_tokens=2, do_sample=False)
    assert len(session.report.samples[0].kept) == 72


def test_flops_of_a_convolutional_encoder_are_counted():
    """FastVLM's encoder has no blocks that patches flow through; what its convolutions do is the same, pruned or not."""
    kind = of("fast_vlm")
    asked = ask(kind, [[2, "A", 5]])
    reports = [run(asked, pruner=vtprune.Random(keep=keep), steps=1).report for keep in (1.0, 0.2)]
    assert reports[0].flops == reports[0].flops_full == reports[1].flops_full
    model = model_of(kind)
    text = sum(p.numel() for layer in model.model.language_model.layers for p in layer.parameters() if p.ndim > 1)
    assert reports[0].flops > 2 * len(asked.ids[0]) * text * 2


# ------------------------------------------------------------------ families from outside, and those that cannot be


DOCS = Path(__file__).parent.parent / "docs" / "architecture.md"


class MyVlmModel(torch.nn.Module):
    """A model of a package of its own, as the documentation's example declares it: a CLIP-like encoder, a linear projector."""

    def __init__(self, config):
        from transformers import CLIPVisionModel, LlamaModel

        super().__init__()
        self.config = config
        tower = CLIPVisionModel._from_config(config.vision_config, attn_implementation="sdpa")
        inner = getattr(tower, "vision_model", tower)  # one module more before transformers 5.24
        self.vision_tower = torch.nn.Module()
        self.vision_tower.embed, self.vision_tower.norm = inner.embeddings, inner.pre_layrnorm
        self.vision_tower.blocks = inner.encoder.layers
        self.projector = torch.nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = LlamaModel._from_config(config.text_config, attn_implementation="sdpa")

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_image_features(self, pixel_values, return_dict=True):
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        hidden = self.vision_tower.norm(self.vision_tower.embed(pixel_values))
        for block in self.vision_tower.blocks:
            hidden = block(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return BaseModelOutputWithPooling(pooler_output=list(self.projector(hidden[:, 1:])))

    def forward(self, input_ids, pixel_values):
        embeds = self.get_input_embeddings()(input_ids)
        features = torch.cat(self.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output)
        where = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
        return self.language_model(inputs_embeds=embeds.masked_scatter(where, features))


def my_vlm() -> MyVlmModel:
    from types import SimpleNamespace

    from models import tiny_llava

    config = tiny_llava().config
    vision = config.vision_config.__class__(**{**config.vision_config.to_dict(), "model_type": "clip_vision_model"})
    vision.model_type = "my_vision_model"
    model = MyVlmModel(
        SimpleNamespace(vision_config=vision, text_config=config.text_config, image_token_id=IMAGE, vision_feature_layer=-1)
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def example() -> tuple[str, str]:
    """The documentation's declaration and its entry point."""
    text = DOCS.read_text().split("## Adding a family")[1]
    return text.split("```python\n")[1].split("```")[0], text.split("```toml\n")[1].split("```")[0]


def announce(folder: Path, lines: str, name: str = "mine") -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(lines)


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """An installed package that holds the documentation's example."""
    code, lines = example()
    (tmp_path / "my_vlm_family.py").write_text(code)
    announce(tmp_path, lines.replace('project.entry-points."vtprune.families"', "vtprune.families").replace('"', ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_vlm_family", None)


def test_the_documentations_example_serves_a_family_from_outside(declared):
    from models import TOKENS as PATCHES
    from models import batch, images, prompt

    code, lines = example()
    assert len(code.splitlines()) + len(lines.splitlines()) <= 20
    model = my_vlm()
    ids = batch([prompt(3, "I", 4)])["input_ids"]
    inputs = {"input_ids": ids, "pixel_values": images(1)}
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with vtprune.pruning(model, "flowcut+fastv", keep=1.0) as session:
            assert torch.equal(model(**inputs).last_hidden_state, plain)
        for strategy, fields in (("flowcut", {"keep": 9}), ("fastv", {"keep": 20, "layer": 1}), ("divprune", {"keep": 9})):
            with vtprune.pruning(model, strategy, **fields) as session:
                pruned = model(**inputs).last_hidden_state
            sample = session.report.samples[0]
            assert sample.visual_tokens == PATCHES and pruned.shape == plain.shape
            assert round(sample.equivalent_tokens) == fields["keep"] and not torch.allclose(pruned[:, -1], plain[:, -1])
        assert torch.equal(model(**inputs).last_hidden_state, plain)


def test_without_the_package_the_model_is_unknown():
    with pytest.raises(vtprune.UnsupportedError, match=r"MyVlmModel .* no model of a supported family.*'Adding a family'"):
        vtprune.wrap(my_vlm(), "divprune", keep=9)


def test_what_other_packages_announce_is_checked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    announce(tmp_path, "[vtprune.families]\nodd = vtprune.pruner:Keep\n", "odd")
    with pytest.raises(TypeError, match=r"entry point 'odd' \(vtprune.pruner:Keep\) .*is no Family"):
        vtprune.wrap(my_vlm(), "divprune", keep=9)
    (tmp_path / "odd-1.0.dist-info" / "entry_points.txt").write_text("[vtprune.families]\nodd = taken_family:MINE\n")
    (tmp_path / "taken_family.py").write_text(
        "from vtprune.families import Family\nMINE = Family(name='Odd', base_classes=('LlavaModel',))\n"
    )
    with pytest.raises(ValueError, match=r"entry point 'odd' .* declares LlavaModel, which LLaVA serves already"):
        vtprune.wrap(my_vlm(), "divprune", keep=9)


def cross_attending(family: str) -> torch.nn.Module:
    import transformers

    if family == "mllama":
        config = transformers.MllamaConfig(
            text_config={**zoo_plain.TEXT, "cross_attention_layers": [1], "rope_parameters": None, "pad_token_id": 0},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "vision_output_dim": 16,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
        )
        return transformers.MllamaForConditionalGeneration(config)
    if family == "idefics":
        config = transformers.IdeficsConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            cross_layer_interval=1,
            vision_config={
                "embed_dim": 32,
                "image_size": 16,
                "patch_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 32,
            },
        )
        return transformers.IdeficsForVisionText2Text(config)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}
    text |= {"encoder_hidden_size": 16, "projection_dim": 16, "bos_token_id": 1, "pad_token_id": 0, "sep_token_id": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config={**vision, "patch_size": 8}, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config)


@pytest.mark.parametrize("family, reason", [("mllama", "cross-attention"), ("idefics", "gated cross"), ("blip", "BLIP's text")])
def test_cross_attention_is_refused_by_name(family, reason):
    with pytest.raises(vtprune.UnsupportedError, match=f"has no visual tokens to prune: .*{reason}"):
        vtprune.wrap(cross_attending(family), "divprune", keep=9)
