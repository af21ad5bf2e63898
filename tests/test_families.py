"""The promises on families whose pictures go in as tiles with newlines between rows, or at any size with 3-axis positions."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from models import GRID, IMAGE, batch, images, preencoding, prompt, tiny_other, tiny_qwen, tiny_tiled, tiny_video_llava
from oracle import Watch, oracle_logits
from transformers import DynamicCache

import vtprune
from vtprune.pruner import budget_tokens

SIDE = 8 * GRID
TILE = GRID * GRID
# (height, width) of the original pictures: one row of two tiles with padding, and four tiles with padding
SIZES = ((SIDE - 20, 2 * SIDE), (2 * SIDE, 2 * SIDE - 30))
STRATEGIES = {
    "flowcut": lambda: vtprune.FlowCut(keep=30),
    "todre": lambda: vtprune.ToDRE(keep=30),
    "visionzip": lambda: vtprune.VisionZip(keep=40),
    "mustdrop": lambda: vtprune.MustDrop(keep=70, sim_thr=0.1, layers=(0, 12)),
    "divprune": lambda: vtprune.DivPrune(keep=0.3),
    "cdpruner": lambda: vtprune.CDPruner(keep=25),
    "fastv": lambda: vtprune.FastV(keep=60, layer=1),
    "sparsevlm": lambda: vtprune.SparseVLM(keep=60),
    "psigmoid": lambda: vtprune.PSigmoid(keep=0.6),
    "evict": lambda: vtprune.Evict(keep=20),
    "random+fastv+evict": lambda: vtprune.create("random+fastv+evict", keep=30, layer=1),
}
INSIDE = {
    "flowcut": {"next", "video-llava", "onevision", "qwen2", "qwen2.5"},
    "visionzip": {"next", "video-llava", "onevision"},
    "mustdrop": {"next", "video-llava"},
}
TILED = ["next", "onevision"]
every_family = pytest.mark.parametrize(
    "family", [*TILED, "qwen2", "qwen2.5", "internvl", "mistral3", "vipllava", "video-llava"]
)
every_tiled = pytest.mark.parametrize("family", TILED)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_kernel = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@lru_cache
def model_of(family: str, attn: str):
    if family.startswith("qwen"):
        return tiny_qwen(attn, version=family[4:])
    if family == "video-llava":
        return tiny_video_llava(attn)
    return tiny_tiled(family, attn) if family in TILED else tiny_other(family, attn)


@lru_cache
def picture(family: str, which: int) -> tuple[dict[str, torch.Tensor], int]:
    """What the processor would make of a picture, and its placeholders in the prompt."""
    if family.startswith("qwen"):
        rows, columns = ((8, 12), (12, 10))[which]
        generator = torch.Generator().manual_seed(which)
        pixels = torch.randn(rows * columns, 3 * 2 * 8 * 8, generator=generator) * 0.3
        pixels[: columns * 2] += 1.0
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])}, rows * columns // 4
    if family == "internvl":
        big = images(2 + which, seed=which).repeat_interleave(2, -1).repeat_interleave(2, -2)
        return {"pixel_values": big}, len(big) * TILE
    if family == "vipllava":
        return {"pixel_values": images(1, seed=which)}, TILE
    if family == "video-llava":
        return {"pixel_values_images": images(1, seed=which)}, TILE
    if family == "mistral3":
        height, width = ((96, 128), (128, 112))[which]
        pixels = torch.zeros(1, 3, 128, 128)
        pixels[..., :height, :width] = torch.randn(3, height, width, generator=torch.Generator().manual_seed(which)) * 0.3
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}, height * width // 256
    tiles = 3 if which == 0 else 5
    pixels = torch.zeros(1, 5, 3, SIDE, SIDE)
    pixels[0, :tiles] = images(tiles, seed=which)
    given = {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[which]])}
    with torch.no_grad():
        features = model_of(family, "sdpa").model.get_image_features(**given, return_dict=True).pooler_output
    return given, len(features[0])


def inputs_of(family: str, prompts: list[list[int | str]]) -> tuple[list[list[int]], list[dict[str, torch.Tensor]]]:
    """Token ids, and what goes with them, of prompts in which "A" and "B" stand for the two pictures."""
    ids, given = [], []
    for parts in prompts:
        row, seen = [1], []
        for part in parts:
            if part in ("A", "B"):
                one, count = picture(family, "AB".index(part))
                row += [97, *[IMAGE] * count, 96] if family.startswith("qwen") else [IMAGE] * count
                seen.append(one)
            else:
                row += prompt(part)[1:]
        ids.append(row)
        given.append(joined(seen))
    return ids, given


def fed(ids, given) -> dict[str, torch.Tensor]:
    """Everything that the model takes."""
    inputs = {**batch(ids), **joined(given)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def besides(one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in one.items() if name != "pixel_values"}


def choices(family: str) -> list[str | None]:
    return [None] if family.startswith("qwen") else ["original", "compact"]


def joined(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in given]) for name in given[0]}


def run(model, ids, given, pruner=None, positions=None, steps=4, **options):
    def generate():
        return model.generate(
            **fed(ids, given),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    if pruner is None:
        out = generate()
        return out.sequences[:, -steps:], torch.stack(out.logits, 1), None, None
    with vtprune.pruning(model, pruner, positions=positions) as session:
        watch = Watch(model, pruner)
        try:
            out = generate()
        finally:
            watch.close()
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), session.report, watch


PROMPTS = [[2, "A", 5], [3, "B", 2, "A", 4], [1, "B", 7]]


def applies(family: str, strategy: str) -> None:
    """Skip what refuses an encoder without a class token, or one that joins patches."""
    if family not in INSIDE.get(strategy, {family}):
        with pytest.raises(vtprune.UnsupportedError, match=r"cls|does not allow|allows only"):
            vtprune.wrap(model_of(family, "sdpa"), STRATEGIES[strategy]())
        pytest.skip("does not work inside this encoder")


@every_family
@every_strategy
def test_keep_all_is_bit_identical(family, strategy):
    applies(family, strategy)
    model = model_of(family, "sdpa")
    ids, given = inputs_of(family, PROMPTS)
    everything = STRATEGIES[strategy]()
    for part in getattr(everything, "parts", [everything]):
        part.keep = 1.0
    tokens, logits, _, _ = run(model, ids, given)
    kept, pruned, report, _ = run(model, ids, given, everything)
    assert torch.equal(tokens, kept) and torch.equal(logits, pruned)
    assert all(len(s.kept) == s.visual_tokens <= row.count(IMAGE) for s, row in zip(report.samples, ids, strict=True))


@every_family
@every_strategy
@every_kernel
def test_masking_equals_removing(family, strategy, attn):
    applies(family, strategy)
    model = model_of(family, attn)
    ids, given = inputs_of(family, PROMPTS)
    for positions in choices(family):
        tokens, logits, report, watch = run(model, ids, given, STRATEGIES[strategy](), positions)
        first = 0
        for row, one in enumerate(given):
            turn = watch.turn(ids[row], tokens[row].tolist(), report.samples[row], one.get("pixel_values"), row, first)
            turn.extra = besides(one)
            first += len(report.samples[row].images)
            expected = oracle_logits(model, [turn], positions == "compact")[len(ids[row]) - 1 : -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@every_family
@every_strategy
def test_batch_equals_single(family, strategy):
    applies(family, strategy)
    model = model_of(family, "sdpa")
    ids, given = inputs_of(family, PROMPTS)
    tokens, logits, report, _ = run(model, ids, given, STRATEGIES[strategy]())
    for row, one in enumerate(given):
        alone, by_itself, single, _ = run(model, [ids[row]], [one], STRATEGIES[strategy]())
        assert torch.equal(tokens[row], alone[0])
        torch.testing.assert_close(logits[row], by_itself[0], atol=1e-4, rtol=1e-4)
        for a, b in zip(report.samples[row].layers, single.samples[0].layers, strict=True):
            assert torch.equal(a, b)


@every_family
@pytest.mark.parametrize("strategy", ["flowcut", "todre", "fastv", "sparsevlm"])
def test_cached_equals_uncached(family, strategy):
    applies(family, strategy)
    model = model_of(family, "sdpa")
    ids, given = inputs_of(family, PROMPTS)
    cached = run(model, ids, given, STRATEGIES[strategy]())
    uncached = run(model, ids, given, STRATEGIES[strategy](), use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)


@every_tiled
def test_numbers_are_patches_and_newlines_stay(family):
    """Visual tokens are the unpadded patches in packed order; separators are counted nowhere and always there."""
    model = model_of(family, "sdpa")
    ids, given = inputs_of(family, PROMPTS[:1])
    with torch.no_grad(), vtprune.pruning(model, "random", keep=10) as session:
        seen = []
        model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**fed(ids, given))
    sample = session.report.samples[0]
    newlines = ids[0].count(IMAGE) - sample.visual_tokens
    # one per row of the unpadded picture, whose padding is no patch either
    assert 1 < newlines <= GRID and sample.visual_tokens < 3 * TILE
    assert len(sample.kept) == 10 and len(sample.slots) == sample.visual_tokens
    assert seen[0].shape[1] == len(ids[0]) - sample.visual_tokens + 10
    newline = model.model.image_newline
    assert int((seen[0][0] == newline).all(-1).sum()) == newlines
    assert sample.grids == [None]


@every_tiled
def test_encoder_choices_are_the_same_patches_after_packing(family):
    """What an encoder strategy keeps of each tile is what enters the decoder, at its place in the packed picture."""
    from dataclasses import dataclass

    from vtprune.pruner import Keep, Needs

    @dataclass
    class Fixed(vtprune.Pruner):
        keep: int = 20
        name = "fixed"

        def encode_needs(self, encoder):
            return {encoder.depth - 1: Needs()}

        def encode(self, view):
            assert view.part[1] == 3 and view.target(self.keep) in (6, 7)
            chosen.extend(view.parts)
            return Keep(torch.stack([torch.arange(view.target(self.keep)) * 5 + which for which, _ in view.parts]))

    chosen = []
    model = model_of(family, "sdpa")
    given, _ = picture(family, 0)
    with torch.no_grad():
        whole = model.model.get_image_features(**given, return_dict=True).pooler_output[0]
        with vtprune.pruning(model, Fixed()):
            output = model.model.get_image_features(**given, return_dict=True)
    record = output.pooler_output[0]._vtprune
    assert chosen == [(0, 3), (1, 3), (2, 3)]
    slots = record.layout.visual[record.item.index]
    assert record.item.index.tolist() == sorted(record.item.index.tolist()) and len(slots) <= 20
    torch.testing.assert_close(output.pooler_output[0][slots], whole[slots], atol=1e-5, rtol=1e-5)
    others = torch.ones(len(whole), dtype=torch.bool)
    others[slots] = False
    newlines = torch.ones(len(whole), dtype=torch.bool)
    newlines[record.layout.visual] = False
    assert not output.pooler_output[0][others & ~newlines].any()
    torch.testing.assert_close(output.pooler_output[0][newlines], whole[newlines])


def test_a_budget_below_one_token_a_tile_is_refused():
    model = model_of("next", "sdpa")
    ids, given = inputs_of("next", PROMPTS[:1])
    with vtprune.pruning(model, "flowcut", keep=2), pytest.raises(vtprune.BudgetError, match="3 tiles"):
        model(**fed(ids, given))


def test_what_a_sealed_encoder_refuses():
    model = model_of("qwen2.5", "sdpa")

    with pytest.raises(vtprune.UnsupportedError, match=r"allows only .* merges patches two by two"):
        vtprune.wrap(model, "visionzip", keep=10)
    with pytest.raises(vtprune.UnsupportedError, match="does not allow: its patches are merged two by two"):
        vtprune.wrap(model_of("internvl", "sdpa"), "flowcut", keep=10)
    with pytest.raises(vtprune.UnsupportedError, match="positions='compact' on Qwen-VL"):
        vtprune.wrap(model, "divprune", keep=10, positions="compact")


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5"])
def test_grids_of_any_shape(family):
    model = model_of(family, "sdpa")
    ids, given = inputs_of(family, PROMPTS[1:2])
    with torch.no_grad(), vtprune.pruning(model, "todre", keep=8) as session:
        model(**fed(ids, given))
    sample = session.report.samples[0]
    assert sample.grids == [(6, 5), (4, 6)] and sample.images == [30, 24] and len(sample.kept) == 16
    assert session.report.positions == "original" and any("pivot is random" in note for note in session.report.notes)
    assert session.report.flops < session.report.flops_full


# before, Qwen2.5-VL's own second turn differs from a run of the whole conversation
@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen2.5", marks=preencoding)])
def test_chat_goes_on_over_the_same_cache(family):
    """Positions go on where the unpruned conversation's would: rope_deltas and logical lengths are untouched."""
    model = model_of(family, "sdpa")
    ids, given = inputs_of(family, PROMPTS[:1])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    follow = [7, 8, 9]
    for keep in (1.0, 10):
        pruner = vtprune.FastV(keep=keep, layer=1) if keep == 1.0 else vtprune.DivPrune(keep=keep)
        with vtprune.pruning(model, pruner) as session:
            watch = Watch(model, pruner)
            one = model.generate(**fed(ids, given), past_key_values=DynamicCache(config=model.config.text_config), **options)
            said = one.sequences[0, len(ids[0]) :].tolist()
            turn = watch.turn(ids[0], [*said, *follow], session.report.samples[0], given[0]["pixel_values"], 0, 0)
            watch.close()
            whole = torch.tensor([ids[0] + said + follow])
            two = model.generate(input_ids=whole, past_key_values=one.past_key_values, **options)
        turn.generated += two.sequences[0, whole.shape[1] :].tolist()
        turn.extra = besides(given[0])
        expected = oracle_logits(model, [turn], compact=False)[whole.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(two.logits, 1)[0], expected, atol=1e-4, rtol=1e-4)


@every_tiled
def test_a_second_turn_with_another_picture(family):
    model = model_of(family, "sdpa")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    (first, more), (one, two) = inputs_of(family, [[2, "A", 5], [3, "B", 2]])
    pruner = vtprune.create("divprune+fastv", keep=20, layer=1)
    with vtprune.pruning(model, pruner) as session:
        watch = Watch(model, pruner)
        out = model.generate(
            input_ids=torch.tensor([first]), **one, past_key_values=DynamicCache(config=model.config.text_config), **options
        )
        said = out.sequences[0, len(first) :].tolist()
        turns = [watch.turn(first, said[:-1], session.report.samples[0], one["pixel_values"], 0, 0)]
        watch.close()
        watch = Watch(model, pruner)
        whole = torch.tensor([first + said + more[1:]])
        again = model.generate(input_ids=whole, **two, past_key_values=out.past_key_values, **options)
        answer = again.sequences[0, whole.shape[1] :].tolist()
        turns.append(watch.turn(said[-1:] + more[1:], answer, session.report.samples[0], two["pixel_values"], 0, 0))
        watch.close()
    for turn, given in zip(turns, (one, two), strict=True):
        turn.extra = besides(given)
    expected = oracle_logits(model, turns, compact=True)[whole.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(again.logits, 1)[0], expected, atol=1e-4, rtol=1e-4)


def test_shares_of_a_tiled_budget():
    view = vtprune.EncodeView(torch.zeros(1, 36, dtype=torch.long), (36,), {}, part=(1, 3))
    assert [view.target(20), view.target(0.5), view.target(1000)] == [7, budget_tokens(0.5, 36), 36]
