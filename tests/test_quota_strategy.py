"""QuoTA inside a model: what each frame gets, where its tokens go, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VIDEO, batch, images, prompt, tiny_llava
from test_videos import FRAMES, brightness, fed, inputs_of, model_of, run

import vtprune
from vtprune.pruner import BudgetError, Frames, NothingPrunedError, SelectView, UnsupportedError
from vtprune.quota import plan, reduce_frames, resize
from vtprune.strategies.quota import _slots

POOLED = 9  # tokens that the tiny models pool a frame of 36 to


def ask(model, pruner, pixels: torch.Tensor, newline: int = 1):
    """Logits of the last token of a prompt with one video [T, 3, H, W]."""
    row = [*prompt(3), *[VIDEO] * (len(pixels) * POOLED + newline), *prompt(4)[1:]]
    inputs = {**batch([row]), "pixel_values_videos": pixels[None]}
    if pruner is None:
        return model(**inputs, logits_to_keep=1).logits, None
    with vtprune.pruning(model, pruner) as session:
        return model(**inputs, logits_to_keep=1).logits, session.report


def test_even_scores_are_the_models_own_pooling_bit_for_bit():
    """Each frame fed twice: repeats get nothing, and what the others get is what the model would have made of them."""
    model, frames = model_of("onevision"), images(4, seed=3)
    plain, _ = ask(model, None, frames)
    pruned, report = ask(model, vtprune.QuoTA(keep=4 * POOLED, scores=[0.7] * 8), frames.repeat_interleave(2, 0))
    assert report.samples[0].plans[0].tokens == (POOLED, 0) * 4
    assert torch.equal(plain, pruned)


def test_even_plan_is_apply_pooling_on_odd_grids():
    """SigLIP's 27 x 27 cells, pooled to 14 x 14."""
    model = model_of("onevision").model
    size = model.config.vision_config.image_size, model.config.vision_config.patch_size
    features = torch.randn(5, 27 * 27, 12)
    try:
        model.config.vision_config.image_size, model.config.vision_config.patch_size = 384, 14
        pooled = model.apply_pooling(features)
    finally:
        model.config.vision_config.image_size, model.config.vision_config.patch_size = size
    for parity in (True, False):
        divided = plan([0.3] * 5, 5 * 196, (27, 27), parity=parity)
        assert torch.equal(reduce_frames(features, divided).tokens, pooled.flatten(0, 1))


def test_a_relevant_frame_gets_its_unpooled_grid():
    """One frame scores, and enters with nearly all of its 36 cells; what makes no further row is told."""
    model, frames = model_of("onevision"), images(FRAMES, seed=5)
    _, report = ask(model, vtprune.QuoTA(keep=35, scores=[0, 0, 1, 0]), frames)
    found = report.samples[0].plans[0]
    assert found.grids[2] == (6, 5) and found.tokens == (0, 0, 30, 0) and "30 of 35" in report.notes[0]
    # 30 tokens in the 9 places of one frame: others hold the rest
    assert report.samples[0].foreign and len(report.samples[0].kept) == 30
    assert found.scores == (0.0, 0.0, 1.0, 0.0)


def test_what_enters_is_what_the_reducer_makes():
    """The vectors in the decoder, in order, for a model that projects after pooling and one that projects before."""
    for family in ("onevision", "next-video"):
        model, frames = model_of(family), images(FRAMES, seed=6)
        seen = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        try:
            newline = int(family == "onevision")
            _, report = ask(model, vtprune.QuoTA(keep=15, scores=[4, 1, 0, 2]), frames, newline)
        finally:
            handle.remove()
        tower = model.model.vision_tower(frames, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        whole = tower[:, 1:] if model.config.vision_feature_select_strategy == "default" else tower
        project = model.model.multi_modal_projector
        divided = plan([4, 1, 0, 2], 15, (6, 6))
        parts = []
        for i in divided.frames:
            cells = whole[i][None] if family == "next-video" else project(whole[i][None])
            cells = resize(cells, (6, 6), divided.grids[i])[0]
            parts.append(project(cells) if family == "next-video" else cells)
        expected = torch.cat(parts)
        start = len(prompt(3))
        torch.testing.assert_close(seen[0][0, start : start + 15], expected, rtol=1e-5, atol=1e-5)
        assert seen[0].shape[1] == start + 15 + newline + 4 and report.samples[0].plans[0].grids == divided.grids


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5"])
def test_qwen_frames_are_put_together_from_patches(family):
    """The scorer sees frames, two for each merged one; tokens keep the true time of their frame."""
    model, seen = model_of(family), []

    def scorer(pixels, ids):
        seen.append((pixels, ids))
        return torch.tensor([0.0, 0, 1, 9, 0, 0, 3, 1])

    ids, inputs = inputs_of(family, [[3, "V", 4]])
    with vtprune.pruning(model, vtprune.QuoTA(keep=10, scorer=scorer)) as session:
        model(**fed(family, ids, inputs))
    (pixels, told) = seen[0]
    assert pixels.shape == (8, 3, 48, 32) and VIDEO not in told.tolist()
    # the patch convolution of the model on our frames, cut anew, is what it computes on its own patches
    vision = model.model.visual
    cut = pixels.view(4, 2, 3, 6, 8, 4, 8)
    first = cut[:, :, :, 0, :, 0].transpose(1, 2).reshape(4, -1)  # [slot, channel, frame, rows, columns]
    flat = inputs[0]["pixel_values_videos"].view(4, 24, -1)[:, 0]
    assert torch.equal(first, flat) and vision.patch_embed(first).shape == (4, 32)
    sample = session.report.samples[0]
    assert sample.plans[0].tokens[0] == 0 and sample.plans[0].scores == (0, 9, 0, 3)
    assert not sample.foreign  # each token sits in its own frame, whose time its position has
    assert all(n // 6 in (1, 3) or sample.plans[0].tokens[n // 6] for n in sample.kept.tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_single_with_scorer(side):
    model = model_of("onevision")
    ids, given = inputs_of("onevision", [[3, "V", 4], [2, "W", 9]])
    pruner = vtprune.QuoTA(keep=14, scorer=brightness)
    together, _, report, _ = run(model, "onevision", ids, given, pruner)
    for row in range(2):
        alone, _, one, _ = run(model, "onevision", ids[row : row + 1], given[row : row + 1], pruner)
        assert torch.equal(together[row], alone[0])
        assert one.samples[0].plans == report.samples[row].plans


def test_rows_end_with_the_models_separator():
    model, frames = model_of("onevision"), images(FRAMES, seed=5)
    seen = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        _, report = ask(model, vtprune.QuoTA(keep=8, scores=[1, 0, 0, 1], newlines="grid"), frames)
    finally:
        handle.remove()
    rows = sum(grid[0] for grid in report.samples[0].plans[0].grids)
    ends = (seen[0][0] == model.model.image_newline).all(-1)
    assert int(ends.sum()) == rows + 1  # and the one that the model puts at the end itself
    assert len(report.samples[0].kept) == sum(report.samples[0].plans[0].tokens) + rows


def test_separators_that_do_not_fit_are_refused():
    with pytest.raises(BudgetError, match="separators"):
        ask(model_of("onevision"), vtprune.QuoTA(keep=33, newlines="grid"), images(FRAMES))
    with pytest.raises(UnsupportedError, match="newline"):
        ask(model_of("next-video"), vtprune.QuoTA(keep=8, newlines="grid"), images(FRAMES), newline=0)


def test_a_scorer_may_ask_the_wrapped_model_itself():
    """Calls from within a strategy run on the bare model and leave the pruned call as it was."""
    model, frames = model_of("onevision"), images(FRAMES, seed=5)
    bare = [ask(model, None, frame[None])[0] for frame in frames]
    answers = []

    def itself(pixels, ids):
        answers.extend(model(**_one(frame), logits_to_keep=1).logits for frame in pixels)
        return torch.tensor([a.softmax(-1)[0, -1, 7].item() for a in answers])

    def _one(frame):
        return {**batch([[*prompt(3), *[VIDEO] * (POOLED + 1), *prompt(4)[1:]]]), "pixel_values_videos": frame[None, None]}

    logits, report = ask(model, vtprune.QuoTA(keep=12, scorer=itself), frames)
    assert all(torch.equal(a, b) for a, b in zip(answers, bare, strict=True))
    again, _ = ask(model, vtprune.QuoTA(keep=12, scores=list(report.samples[0].plans[0].scores)), frames)
    assert torch.equal(logits, again)


def test_the_scorers_time_is_counted():
    import time

    def slow(pixels, ids):
        time.sleep(0.2)
        return torch.ones(len(pixels))

    _, report = ask(model_of("onevision"), vtprune.QuoTA(keep=12, scorer=slow), images(FRAMES))
    assert report.selection_ms > 200 and report.prefill_ms > report.selection_ms


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": [1, 2, 3]}, "3 scores for 4 frames"),
        ({"scores": [1, 2, 3, 4, 5]}, "5 scores for 4 frames"),
        ({"scorer": lambda p, i: torch.tensor([1, float("nan"), 1, 1])}, "not a finite number"),
        ({"scorer": lambda p, i: -torch.ones(4)}, "negative"),
        ({"scorer": lambda p, i: torch.ones(2, 2)}, "shape"),
        ({"scorer": lambda p, i: torch.ones(0)}, "no scores"),
        ({"scorer": lambda p, i: ["a", "b", "c", "d"]}, "type"),
    ],
)
def test_scores_that_are_none(fields, message):
    with pytest.raises(UnsupportedError, match=message):
        ask(model_of("onevision"), vtprune.QuoTA(keep=12, **fields), images(FRAMES))


@pytest.mark.parametrize(
    "fields",
    [
        {"power": -1},
        {"power": float("nan")},
        {"reducer": "lanczos"},
        {"merged": "sum"},
        {"newlines": "all"},
        {"floor": -1},
        {"cap": 0},
        {"scorer": 3},
        {"scorer": brightness, "scores": [1]},
        {"within": vtprune.FastV(keep=0.5)},
        {"within": vtprune.DivPrune(), "parity": True},
        {"keep": 0},
    ],
)
def test_fields_without_meaning(fields):
    with pytest.raises(BudgetError):
        vtprune.QuoTA(**{"keep": 12, **fields})


def test_scores_of_their_own_are_checked_at_once():
    with pytest.raises(UnsupportedError, match="negative"):
        vtprune.QuoTA(keep=12, scores=[1, -1])


def test_pictures_are_refused():
    model = tiny_llava()
    inputs = {**batch([prompt(2, "I", 3)]), "pixel_values": images(1)}
    with vtprune.pruning(model, vtprune.QuoTA(keep=12)), pytest.raises(UnsupportedError, match="picture"):
        model(**inputs)
    assert not model._forward_hooks


def test_fewer_tokens_than_floors():
    with pytest.raises(BudgetError, match="floor"):
        ask(model_of("onevision"), vtprune.QuoTA(keep=12, floor=4), images(FRAMES))


def test_one_frame():
    _, report = ask(model_of("onevision"), vtprune.QuoTA(keep=4), images(1))
    assert report.samples[0].plans[0].tokens == (4,)


def test_zero_scores_mean_all_alike_and_one_token_goes_to_one_frame():
    _, report = ask(model_of("onevision"), vtprune.QuoTA(keep=16, scores=[0] * 4), images(FRAMES))
    assert report.samples[0].plans[0].tokens == (4,) * 4
    _, report = ask(model_of("onevision"), vtprune.QuoTA(keep=1, scores=[1, 5, 2, 2]), images(FRAMES))
    assert report.samples[0].plans[0].tokens == (0, 1, 0, 0)


def test_parity_says_what_it_leaves():
    _, report = ask(model_of("onevision"), vtprune.QuoTA(keep=13, scores=[3, 2, 2, 1], parity=True), images(FRAMES))
    spent = sum(report.samples[0].plans[0].tokens)
    assert spent < 13 and any(f"{spent} of 13" in note for note in report.notes)


def test_nothing_is_lost_silently_under_composition():
    """The decoder's strategy spends on what QuoTA let in."""
    model, frames = model_of("onevision"), images(FRAMES, seed=2)
    both = vtprune.QuoTA(keep=20, scorer=brightness) + vtprune.FastV(keep=12, layer=1)
    _, report = ask(model, both, frames)
    assert len(report.samples[0].kept) == 20 and report.equivalent_tokens == pytest.approx(12, abs=0.5)
    with pytest.raises(NothingPrunedError):
        ask(model, _Lazy(keep=4), frames)


class _Lazy(vtprune.QuoTA):
    def select(self, view: SelectView):
        assert view.videos and isinstance(view.videos[0], Frames)


@pytest.mark.parametrize("family", ["llava", "qwen2.5"])
def test_several_pictures_are_frames(family):
    """One budget for all of a sample's pictures; each in its own placeholders; a batch is its samples one at a time."""
    seen = []

    def scorer(pixels, ids):
        seen.append(pixels)
        return torch.arange(1, len(pixels) + 1).double()

    if family == "llava":
        model, pixels = tiny_llava(), images(5)
        rows = [prompt(2, "I", 1, "I", 1, "I", 3), prompt(1, "I", 3, "I", 2)]
        given, size = [{"pixel_values": pixels[:3]}, {"pixel_values": pixels[3:]}], 36
    else:
        model = model_of(family)
        rows, given = inputs_of(family, [[2, "A", 1, "A", 3], [1, "A", 3, "A", 2]])
        for one in given:
            one["pixel_values"][len(one["pixel_values"]) // 2 :] += 0.3  # or it would be the same picture twice
        size = None
    pruner = vtprune.QuoTA(keep=0.25, scorer=scorer)
    together, _, report, _ = run(model, family, rows, given, pruner)
    count = len(report.samples)
    for row, sample in enumerate(report.samples):
        alone, _, one, _ = run(model, family, rows[row : row + 1], given[row : row + 1], pruner)
        assert torch.equal(together[row], alone[0])
        assert torch.equal(one.samples[0].kept, sample.kept)
        got = [plan.tokens[0] for plan in sample.plans]
        assert got == sorted(got) and sum(got) == len(sample.kept) == sum(round(0.25 * n) for n in sample.images)
        starts = torch.tensor([0, *sample.images]).cumsum(0)
        within = [int(((sample.kept >= a) & (sample.kept < b)).sum()) for a, b in itertools.pairwise(starts.tolist())]
        assert within == got
    if size:
        assert count == 2 and torch.equal(seen[0], pixels[:3])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_places_are_distinct_ascending_and_in_range(data):
    native = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    pooled = data.draw(st.tuples(st.integers(1, native[0]), st.integers(1, native[1])))
    frames = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.floats(0, 5), min_size=frames, max_size=frames))
    total = frames * pooled[0] * pooled[1]
    budget = data.draw(st.integers(1, total))
    method = data.draw(st.sampled_from(["bilinear", "tome", "linspace"]))
    divided = plan(scores, budget, native)
    reduced = reduce_frames(torch.randn(frames, native[0] * native[1], 3), divided, method)
    slots, own = _slots(reduced.boxes, native, pooled, total)
    assert len(slots) == sum(reduced.lengths) <= budget
    assert bool((slots[1:] > slots[:-1]).all()) and int(slots[0]) >= 0 and int(slots[-1]) < total
    if max(reduced.lengths) <= pooled[0] * pooled[1]:
        assert bool(own.all())  # positions on three axes rely on it
