"""The promises on videos: frames that the model pools or merges, one item each, alone and beside pictures."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from models import (
    GRID,
    IMAGE,
    VIDEO,
    batch,
    images,
    preencoding,
    prompt,
    tiny_qwen,
    tiny_tiled,
    tiny_video_llava,
    vision_blocks,
)
from oracle import Watch, oracle_logits, token_types
from test_families import picture

import vtprune
from vtprune.pruner import Keep, SelectView

FRAMES = 4


def brightness(pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return pixels.double().clamp(min=0).flatten(1).mean(1) ** 4


STRATEGIES = {
    "uniform": lambda: vtprune.Uniform(keep=12),
    "todre": lambda: vtprune.ToDRE(keep=14),
    "divprune": lambda: vtprune.DivPrune(keep=0.4),
    "cdpruner": lambda: vtprune.CDPruner(keep=14),
    "fastv": lambda: vtprune.FastV(keep=18, layer=1),
    "pyramiddrop": lambda: vtprune.PyramidDrop(keep=20),
    "sparsevlm": lambda: vtprune.SparseVLM(keep=18),
    "evict": lambda: vtprune.Evict(keep=8),
    "framedrop": lambda: vtprune.FrameDrop(keep=16),
    "evs": lambda: vtprune.EVS(keep=13),
    "dycoke": lambda: vtprune.DyCoke(keep=0.5),
    "quota": lambda: vtprune.QuoTA(keep=13),
    "quota-tome": lambda: vtprune.QuoTA(keep=0.4, reducer="tome", scorer=brightness),
    "quota-within": lambda: vtprune.QuoTA(keep=15, within=vtprune.DivPrune(), scorer=brightness),
    "quota+fastv": lambda: vtprune.QuoTA(keep=20, scorer=brightness) + vtprune.FastV(keep=12, layer=1),
    "divprune+fastv+evict": lambda: vtprune.create("divprune+fastv+evict", keep=10, layer=1),
}
every_family = pytest.mark.parametrize("family", ["onevision", "next-video", "video-llava", "qwen2", "qwen2.5"])
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_kernel = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def build(family: str, strategy: str) -> vtprune.Pruner:
    """The strategy, with four times the tokens where a frame has 36 instead of at most nine."""
    pruner = STRATEGIES[strategy]()
    for part in getattr(pruner, "parts", [pruner]):
        if family == "video-llava" and isinstance(part.keep, int):
            part.keep *= 4
    return pruner


@lru_cache
def model_of(family: str, attn: str = "sdpa"):
    if family == "video-llava":
        return tiny_video_llava(attn)
    return tiny_qwen(attn, version=family[4:]) if family.startswith("qwen") else tiny_tiled(family, attn)


def clip(family: str, seed: int) -> tuple[dict[str, torch.Tensor], int]:
    """What the processor would make of a video, and its placeholders."""
    if family.startswith("qwen"):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(FRAMES * 6 * 4, 3 * 2 * 8 * 8, generator=generator) * 0.3
        pixels[24 * seed : 24 * seed + 24] += 1.0
        grid = {"video_grid_thw": torch.tensor([[FRAMES, 6, 4]])}
        if family == "qwen2.5":
            grid["second_per_grid_ts"] = torch.tensor([1.0])
        return {"pixel_values_videos": pixels, **grid}, FRAMES * 6
    if family == "video-llava":
        return {"pixel_values_videos": images(FRAMES, seed)[None]}, FRAMES * (GRID**2 + 1)
    newline = 1 if family == "onevision" else 0
    return {"pixel_values_videos": images(FRAMES, seed)[None]}, FRAMES * (GRID // 2) ** 2 + newline


def inputs_of(family: str, prompts: list[list[int | str]]) -> tuple[list[list[int]], list[dict[str, torch.Tensor]]]:
    """Prompts in which "V" and "W" stand for two videos and "A" for a picture."""
    rows, given = [], []
    for parts in prompts:
        row, seen = [1], {}
        for part in parts:
            if isinstance(part, int):
                row += prompt(part)[1:]
                continue
            one, count = picture(family, 0) if part == "A" else clip(family, "VW".index(part))
            token = IMAGE if part == "A" else VIDEO
            row += [97, *[token] * count, 96] if family.startswith("qwen") else [token] * count
            for name, value in one.items():
                seen.setdefault(name, []).append(value)
        rows.append(row)
        given.append({name: torch.cat(values) for name, values in seen.items()})
    return rows, given


def fed(family: str, ids, given) -> dict[str, torch.Tensor]:
    inputs = batch(ids)
    for name in {name for one in given for name in one}:
        inputs[name] = torch.cat([one[name] for one in given if name in one])
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = token_types(inputs["input_ids"])
    return inputs


def run(model, family, ids, given, pruner=None, steps=4, **options):
    def generate():
        return model.generate(
            **fed(family, ids, given),
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
    with vtprune.pruning(model, pruner) as session:
        watch = Watch(model, pruner)
        try:
            out = generate()
        finally:
            watch.close()
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), session.report, watch


PROMPTS = [[2, "V", 5], [3, "W", 4], [1, "V", 7]]


@every_family
@every_strategy
def test_keep_all_is_bit_identical(family, strategy):
    model = model_of(family)
    ids, given = inputs_of(family, PROMPTS)
    everything = build(family, strategy)
    for part in getattr(everything, "parts", [everything]):
        part.keep = 1.0
    tokens, logits, _, _ = run(model, family, ids, given)
    kept, pruned, report, _ = run(model, family, ids, given, everything)
    assert torch.equal(tokens, kept) and torch.equal(logits, pruned)
    assert [s.frames for s in report.samples] == [[FRAMES]] * 3


@every_family
@every_strategy
@every_kernel
def test_masking_equals_removing(family, strategy, attn):
    model = model_of(family, attn)
    ids, given = inputs_of(family, PROMPTS)
    tokens, logits, report, watch = run(model, family, ids, given, build(family, strategy))
    for row, one in enumerate(given):
        turn = watch.turn(ids[row], tokens[row].tolist(), report.samples[row], None, row, 0)
        turn.extra, turn.visual = one, (IMAGE, VIDEO)
        expected = oracle_logits(model, [turn], report.positions == "compact")[len(ids[row]) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@every_family
@every_strategy
def test_batch_equals_single(family, strategy):
    model = model_of(family)
    ids, given = inputs_of(family, PROMPTS)
    tokens, logits, report, _ = run(model, family, ids, given, build(family, strategy))
    for row, one in enumerate(given):
        alone, by_itself, single, _ = run(model, family, [ids[row]], [one], build(family, strategy))
        assert torch.equal(tokens[row], alone[0])
        torch.testing.assert_close(logits[row], by_itself[0], atol=1e-4, rtol=1e-4)
        for a, b in zip(report.samples[row].layers, single.samples[0].layers, strict=True):
            assert torch.equal(a, b)


@every_family
@pytest.mark.parametrize("strategy", ["divprune", "fastv", "sparsevlm"])
def test_cached_equals_uncached(family, strategy):
    model = model_of(family)
    ids, given = inputs_of(family, PROMPTS)
    cached = run(model, family, ids, given, build(family, strategy))
    uncached = run(model, family, ids, given, build(family, strategy), use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)


@preencoding  # before, Qwen2.5-VL takes a video's time step for every picture as well
@pytest.mark.parametrize("family", ["onevision", "video-llava", "qwen2.5"])
def test_pictures_and_videos_in_one_prompt(family):
    """Items stand in the order of the prompt, whichever modality was encoded first."""
    model = model_of(family)
    ids, given = inputs_of(family, [[2, "V", 3, "A", 4], [1, "A", 2, "V", 6]])
    tokens, logits, report, watch = run(model, family, ids, given, vtprune.create("divprune+fastv", keep=10, layer=1))
    assert [s.frames for s in report.samples] == [[FRAMES, 1], [1, FRAMES]]
    assert all(s.images[s.frames.index(FRAMES)] in (24, 36, 144) for s in report.samples)
    for row, one in enumerate(given):
        turn = watch.turn(ids[row], tokens[row].tolist(), report.samples[row], None, row, row)
        turn.extra, turn.visual = one, (IMAGE, VIDEO)
        expected = oracle_logits(model, [turn], report.positions == "compact")[len(ids[row]) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@every_family
def test_what_a_strategy_sees_of_a_video(family):
    seen: list[SelectView] = []

    class Look(vtprune.Uniform):
        def select(self, view):
            seen.append(view)
            return Keep(torch.arange(3).expand(len(view.index), -1))

    model = model_of(family)
    ids, given = inputs_of(family, PROMPTS[:2])
    with torch.no_grad(), vtprune.pruning(model, Look(keep=3)) as session:
        model(**fed(family, ids, given))
    (view,) = seen
    grid = (3, 2) if family.startswith("qwen") else (GRID, GRID) if family == "video-llava" else (3, 3)
    tokens = FRAMES * grid[0] * grid[1]
    assert view.frames == FRAMES and view.tokens == tokens and len(view.index) == 2
    assert view.grid == grid
    assert [len(s.kept) for s in session.report.samples] == [3, 3]
    assert session.report.samples[0].grids == [grid]


def test_class_tokens_of_frames_stay_and_are_not_offered():
    """Video-LLaVA's frames take their class token along to the decoder: it separates frames, as newlines separate rows."""
    model = model_of("video-llava")
    ids, given = inputs_of("video-llava", PROMPTS[:1])
    inputs = fed("video-llava", ids, given)
    entered = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        with torch.no_grad():
            model(**inputs)
            with vtprune.pruning(model, "divprune", keep=11) as session:
                model(**inputs)
    finally:
        handle.remove()
    full, pruned = (hidden[0] for hidden in entered)
    sample = session.report.samples[0]
    assert sample.visual_tokens == FRAMES * GRID**2 and len(sample.kept) == 11
    assert len(pruned) == len(ids[0]) - FRAMES * GRID**2 + 11
    class_tokens = [frame * (GRID**2 + 1) for frame in range(FRAMES)]
    assert not set(class_tokens) & set(sample.slots.tolist())
    for slot in class_tokens:
        assert bool((pruned == full[ids[0].index(VIDEO) + slot]).all(-1).any()), slot


def test_both_encoders_of_video_llava_are_watched_and_restored():
    model = model_of("video-llava")
    towers = [vision_blocks(model), getattr(model.model.video_tower, "vision_model", model.model.video_tower).encoder.layers]
    ids, given = inputs_of("video-llava", [[2, "V", 5]])
    alone = fed("video-llava", ids, given)
    ids, given = inputs_of("video-llava", [[2, "V", 3, "A", 4]])
    both = fed("video-llava", ids, given)
    with torch.no_grad():
        logits = model(**both).logits
        with vtprune.pruning(model, "divprune", keep=11) as session:
            assert all(block._forward_pre_hooks for tower in towers for block in tower)
            model(**alone)
            one = session.report
            model(**both)
        assert not any(block._forward_pre_hooks for tower in towers for block in tower)
        assert not {"get_image_features", "get_video_features"} & set(vars(model.model))
        assert torch.equal(model(**both).logits, logits)
    assert 0 < one.flops < one.flops_full < session.report.flops_full


@pytest.mark.parametrize("strategy", ["framedrop", "evs", "dycoke"])
def test_video_strategies_refuse_pictures(strategy):
    ids, given = inputs_of("onevision", [[2, "A", 4]])
    model = model_of("onevision")
    with vtprune.pruning(model, strategy, keep=0.5), pytest.raises(vtprune.UnsupportedError, match="frames of a video"):
        model(**fed("onevision", ids, given))


@pytest.mark.parametrize("strategy", ["framedrop", "evs", "dycoke"])
def test_video_strategies_want_whole_frames(strategy):
    view = SelectView(torch.arange(10)[None], (36,), {}, features=torch.randn(1, 10, 4), frames=4)
    with pytest.raises(vtprune.UnsupportedError, match="earlier stage"):
        vtprune.create(strategy, keep=5).select(view)


def video_view(frames: int, tokens: int, seed: int = 0) -> SelectView:
    features = torch.randn(2, frames * tokens, 6, generator=torch.Generator().manual_seed(seed))
    index = torch.arange(frames * tokens).expand(2, -1)
    return SelectView(index, (frames * tokens,), {}, features=features, frames=frames)


def test_video_budgets_are_exact():
    for keep in (9, 10, 17, 30):
        view = video_view(4, 9)
        assert vtprune.FrameDrop(keep=keep).select(view).indices.shape == (2, keep)
        kept = vtprune.EVS(keep=keep).select(view).indices
        assert kept.shape == (2, keep) and kept[0, :9].tolist() == list(range(9))
    with pytest.raises(vtprune.BudgetError):
        vtprune.EVS(keep=8).select(video_view(4, 9))


def test_dycoke_by_share_and_by_budget():
    view = video_view(8, 10)
    paper = vtprune.DyCoke().select(view)
    assert all(len(kept) == 2 * 10 + 6 * 3 for kept in paper.indices)
    assert int((paper.into[0] >= 0).sum()) == 80 - 38
    for keep, spent in ((38, 38), (43, 38), (44, 44), (20, 20), (79, 74)):
        view = video_view(8, 10)
        kept = vtprune.DyCoke(keep=keep).select(view)
        assert all(len(row) == spent for row in kept.indices), keep
        assert bool(view.notes) == (spent < keep)
    with pytest.raises(vtprune.BudgetError, match="20 tokens in all"):
        vtprune.DyCoke(keep=19).select(video_view(8, 10))
    assert vtprune.DyCoke(keep=1.0).select(video_view(8, 10)) is None


def test_strategies_inside_the_encoder_refuse_videos():
    model = model_of("next-video")
    ids, given = inputs_of("next-video", PROMPTS[:1])
    with vtprune.pruning(model, "flowcut", keep=8), pytest.raises(vtprune.UnsupportedError, match="pooled or merged"):
        model(**fed("next-video", ids, given))
    with torch.no_grad(), vtprune.pruning(model, "todre", keep=8) as session:
        model(**fed("next-video", ids, given))
    assert any("sees pictures only" in note for note in session.report.notes)


@every_family
def test_a_video_that_is_missing(family):
    ids, _ = inputs_of(family, PROMPTS[:1])
    model = model_of(family)
    with vtprune.pruning(model, "uniform", keep=8), pytest.raises(vtprune.UnsupportedError, match="no video was given"):
        model(**batch(ids))
