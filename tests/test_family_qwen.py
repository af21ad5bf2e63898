"""3-axis positions: Qwen-VL up to Qwen3.5, and GLM-V.

What is special here: text between the frames of a video, features added to visual tokens inside the decoder, layers of
linear attention, one placeholder id for pictures and videos.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from harness import ask, assert_masked, assert_same, cache_sizes, run
from models import IMAGE, VIDEO, preencoding
from oracle import Watch, oracle_logits
from PIL import Image
from processors import processor_of
from transformers import DynamicCache
from zoo import glm, model_of, qwen2, qwen3

import vtprune
from vtprune.pruner import Keep

KINDS = {kind.name: kind for kind in [*qwen2.KINDS, *qwen3.KINDS, *glm.KINDS] if kind.available}
NEW = [name for name in KINDS if name not in ("qwen2", "qwen2.5")]
CORE = ["qwen2", "qwen2.5", "qwen3-vl", "qwen3.5", "glm4v"]  # the others differ from one of them in experts or sizes
HYBRID = [name for name in KINDS if name.startswith("qwen3.5")]
DEEP = [name for name in KINDS if name.startswith("qwen3-vl")]
# the hybrid models here attend in layers 1 and 2 of 0 .. 3
STRATEGIES = {
    "todre": lambda: vtprune.ToDRE(keep=0.4, tau=0.6),
    "fastv": lambda: vtprune.FastV(keep=0.7, layer=2),
    "pyramiddrop": lambda: vtprune.PyramidDrop(keep=0.7, layers=(1, 2)),
    "sparsevlm": lambda: vtprune.SparseVLM(keep=0.8, layers=(8,)),
    "random+fastv": lambda: vtprune.Random(keep=0.6) + vtprune.FastV(keep=0.45, layer=2),
    "divprune+fastv+evict": lambda: vtprune.create("divprune+fastv+evict", keep=0.4, layer=1),
    "moving": lambda: Moving(keep=0.4),
    # inside the vision tower; attention of random models is almost flat, but for the exponent little would leave early
    "flowcut-twice": lambda: vtprune.FlowCut(keep=14, decoder_keep=7, every=1, entropy_power=300.0),
    "flowcut-survivors": lambda: vtprune.FlowCut(keep=14, decoder_keep=7, groups="survivors", entropy_power=300.0),
}
EVICTS = {"divprune+fastv+evict"}  # refused by linear attention
ACROSS = {"flowcut-survivors"}  # refused by towers that join patches of inner blocks
KEPT = {"all": lambda: vtprune.Random(keep=1.0)}
PROMPTS = {
    "padded": [[2, "A", 5], [3, "B", 2, "A", 4], [1, "B", 7]],
    "video": [[2, "V", 5], [3, "W", 4, "V", 6]],
}


@dataclass
class Moving(vtprune.Pruner):
    """Turns the order of what it keeps around at both of its stages, and averages what it drops into the first of them."""

    keep: float = 0.4
    name = "moving"
    paper = "none"

    def select(self, view):
        return self._turned(view, view.features)

    def prefill_needs(self, depth):
        return {depth - 2: vtprune.Needs(hidden=True)}

    def prefill(self, view):
        return self._turned(view, view.hidden)

    def _turned(self, view, vectors):
        k = max(2, view.tokens * 2 // 3)
        if self.keep == 1.0:
            return None
        kept = torch.arange(view.tokens - 1, view.tokens - k - 1, -1).expand(len(view.index), -1)
        hidden = vectors.flip(1)[:, :k].clone()
        hidden[:, 0] = torch.cat([hidden[:, :1], vectors[:, : view.tokens - k]], 1).mean(1)
        into = torch.full_like(view.index, -1)
        into[:, : view.tokens - k] = view.tokens - 1
        return Keep(kept, hidden=hidden, into=into, ordered=True)


every_kind = pytest.mark.parametrize("name", KINDS)
every_new = pytest.mark.parametrize("name", NEW)
OTHERS = ["random+fastv", "moving", "flowcut-twice"]
PAIRS = [(name, strategy) for name in KINDS for strategy in (STRATEGIES if name in CORE else OTHERS)]
every_pair = pytest.mark.parametrize("name, strategy", PAIRS)
every_new_pair = pytest.mark.parametrize("name, strategy", [pair for pair in PAIRS if pair[0] in NEW])
every_prompt = pytest.mark.parametrize("prompts", PROMPTS)


def pruner_for(name: str, strategy: str) -> vtprune.Pruner:
    """The strategy; skips what the family refuses, once it has."""
    pruner = {**STRATEGIES, **KEPT}[strategy]()
    if name in DEEP and strategy in ACROSS:
        with pytest.raises(vtprune.UnsupportedError, match="inner blocks"):
            vtprune.wrap(model_of(KINDS[name], "sdpa"), pruner)
        pytest.skip("which patches are left is not known between its blocks")
    if name in HYBRID and strategy in EVICTS:
        with pytest.raises(vtprune.UnsupportedError, match="linear attention"):
            vtprune.wrap(model_of(KINDS[name], "sdpa"), pruner)
        pytest.skip("no token can be evicted from a state")
    return pruner


def whole(pruner: vtprune.Pruner) -> vtprune.Pruner:
    """The strategy with a budget of all."""
    for part in getattr(pruner, "parts", [pruner]):
        mine = getattr(part, "pruner", part)
        mine.keep = 1.0
        if getattr(mine, "decoder_keep", None) is not None:
            mine.decoder_keep = 1.0
    return pruner


@every_new_pair
@every_prompt
def test_keep_all_is_bit_identical(name, strategy, prompts):
    asked = ask(KINDS[name], PROMPTS[prompts])
    pruner = whole(pruner_for(name, strategy))
    bare, pruned = run(asked), run(asked, pruner=pruner)
    assert torch.equal(bare.tokens, pruned.tokens) and torch.equal(bare.logits, pruned.logits)


@every_pair
@every_prompt
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_masking_equals_removing_for_eight_steps(name, strategy, prompts, attn):
    asked = ask(KINDS[name], PROMPTS[prompts], attn)
    # linear attention goes in chunks over a prompt and step by step after it: the bare model's own 5e-5 between the two
    tolerance = 5e-4 if name in HYBRID else 1e-4
    assert_masked(asked, run(asked, attn, pruner_for(name, strategy), steps=8), attn, tolerance)


@every_new_pair
@every_prompt
def test_batch_equals_single_and_bytes_are_as_reported(name, strategy, prompts):
    asked = ask(KINDS[name], PROMPTS[prompts])
    first = run(asked, pruner=pruner_for(name, strategy), steps=1)  # the report speaks of the cache after prefill
    assert 0 < first.report.kv_bytes == cache_sizes(first.cache) < first.report.kv_bytes_full
    together = run(asked, pruner=pruner_for(name, strategy))
    for row in range(len(asked.ids)):
        alone = run(asked.alone(row), pruner=pruner_for(name, strategy))
        assert_same(together, alone, slice(row, row + 1))
        for a, b in zip(together.report.samples[row].layers, alone.report.samples[0].layers, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen3.5", "glm4v"])
@pytest.mark.parametrize("strategy", ["todre", "sparsevlm", "moving", "flowcut-twice"])
@every_prompt
def test_cached_equals_uncached(name, strategy, prompts):
    asked = ask(KINDS[name], PROMPTS[prompts])
    cached, uncached = (run(asked, pruner=pruner_for(name, strategy), use_cache=cache) for cache in (True, False))
    assert_same(cached, uncached)


@every_kind
def test_samples_without_pictures(name):
    """Their position deltas are zero, whatever stands beside them in the batch."""
    asked = ask(KINDS[name], [[2, "A", 5], [9], [3, "B", 4]])
    model, pruner = model_of(KINDS[name], "sdpa"), vtprune.DivPrune(keep=0.6) + vtprune.FastV(keep=0.45, layer=2)
    with_pictures = run(asked, pruner=pruner)
    deltas = model.model.rope_deltas.flatten().tolist()
    bare = run(ask(KINDS[name], [[9]]))
    assert torch.equal(with_pictures.tokens[1], bare.tokens[0])
    torch.testing.assert_close(with_pictures.logits[1], bare.logits[0], atol=1e-4, rtol=1e-4)
    assert deltas[1] == 0 and deltas[0] < 0 and deltas[2] < 0
    for row in (0, 2):
        alone = run(asked.alone(row), pruner=pruner)
        assert_same(with_pictures, alone, slice(row, row + 1))


def _conversation(name: str, strategy: str, prompts, attn: str = "sdpa"):
    """A batch over two turns, each with a picture per row, and both turns as the oracle wants them."""
    kind, model = KINDS[name], model_of(KINDS[name], attn)
    first, more = ask(kind, prompts[0], attn), ask(kind, prompts[1], attn)
    options = {"min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    pruner = pruner_for(name, strategy)
    with vtprune.pruning(model, pruner) as session:
        watch = Watch(model, pruner)
        fed = first.inputs()
        cache = DynamicCache(config=model.config.text_config)
        one = model.generate(**fed, past_key_values=cache, max_new_tokens=3, **options)
        watch.close()
        said, reports = one.sequences[:, fed["input_ids"].shape[1] :], [session.report]
        watches = [watch]
        ids = torch.cat([one.sequences, torch.tensor([row[1:] for row in more.ids])], 1)
        mask = torch.cat([fed["attention_mask"], torch.ones_like(ids[:, fed["attention_mask"].shape[1] :])], 1)
        watch = Watch(model, pruner)
        seen = model.get_image_features(**joined(more.given), return_dict=True)
        # the placeholders of both turns are placed by the pictures' sizes, so those of the first are told again
        grids = [g["image_grid_thw"] for pair in zip(first.given, more.given, strict=True) for g in pair]
        two = model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs={"image": seen},
            image_grid_thw=torch.cat(grids),
            **kind.types(ids),
            past_key_values=cache,
            max_new_tokens=8,
            **{**options, "min_new_tokens": 8},
        )
        watch.close()
        reports.append(session.report)
        watches.append(watch)
    answer = two.sequences[:, ids.shape[1] :]
    conversations = []
    for row in range(len(first.ids)):
        last = said[row].tolist()
        turns = [
            watches[0].turn(first.ids[row], last[:-1], reports[0].samples[row], None, row, row),
            watches[1].turn(last[-1:] + more.ids[row][1:], answer[row].tolist(), reports[1].samples[row], None, row, row),
        ]
        for turn, given in zip(turns, (first.given[row], more.given[row]), strict=True):
            turn.extra, turn.visual = given, (IMAGE, VIDEO)
        conversations.append(turns)
    return model, conversations, torch.stack(two.logits, 1)


def joined(given):
    return {key: torch.cat([one[key] for one in given]) for key in given[0]}


IN_TURNS = ("todre", "divprune+fastv+evict", "moving", "flowcut-twice")


@preencoding  # before, generate() has no way to take a picture in a later turn
@pytest.mark.parametrize("name, strategy", [pair for pair in PAIRS if pair[1] in IN_TURNS])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_second_turn_with_another_picture(name, strategy, attn):
    """Over the pruned cache, padded rows of unequal pictures; the rows of a turn are told apart by nothing but their own."""
    if not _talks(name):
        pytest.skip("the bare model's own second turn differs from the whole conversation in one run, in this version")
    _assert_talk(name, strategy, attn)


def _assert_talk(name: str, strategy: str, attn: str) -> None:
    equal = name in HYBRID  # a state cannot skip padding between turns, so that rows keep equally many in the second
    prompts = [[2, "A", 5], [4, "B", 1]], [[3, "B", 2], [2, "B", 3]] if equal else [[9, "A", 2], [3, "B", 2]]
    model, conversations, logits = _conversation(name, strategy, prompts, attn)
    for row, turns in enumerate(conversations):
        expected = oracle_logits(model, turns, False, KINDS[name].types)
        tolerance = 5e-4 if name in HYBRID else 1e-4
        torch.testing.assert_close(logits[row], expected[-9:-1], atol=tolerance, rtol=tolerance)


@lru_cache
def _talks(name: str) -> bool:
    """Whether a second turn with a picture is right where nothing is dropped, which is the bare model's."""
    try:
        _assert_talk(name, "all", "sdpa")
    except AssertionError:
        return False
    return True


@preencoding
@pytest.mark.parametrize("name", HYBRID)
def test_a_state_cannot_skip_padding_between_turns(name):
    with pytest.raises(vtprune.UnsupportedError, match="in a later turn"):
        _conversation(name, "random+fastv", ([[2, "A", 5], [4, "B", 1]], [[9, "A", 2], [3, "B", 2]]))


# ---------------------------------------------------------------------- inside the vision tower


@every_kind
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_tower_runs_on_less_from_block_to_block(name, attn):
    asked, model, lengths = ask(KINDS[name], PROMPTS["padded"], attn), model_of(KINDS[name], attn), []
    blocks = model.model.visual.blocks
    whole = [block for block in range(len(blocks)) if block not in vtprune.families.locate(model).tower.windowed]

    def note(module, args, output):
        lengths.append(len(output))

    pruner = vtprune.FlowCut(keep=0.4, every=1, entropy_power=300.0)
    with vtprune.pruning(model, pruner) as session:
        handles = [block.register_forward_hook(note) for block in blocks]
        with torch.no_grad():
            model(**asked.inputs())
        for handle in handles:
            handle.remove()
        report = session.report
    kept = 4 * sum(len(sample.kept) for sample in report.samples)
    assert kept == 4 * (10 + 12 + 10 + 12) and lengths[-1] == kept
    assert all(lengths[b] < (4 * 108 if at == 0 else lengths[whole[at - 1]]) for at, b in enumerate(whole))
    assert [block for block, _ in report.samples[0].encoded] == whole
    assert report.flops < report.flops_full


# ---------------------------------------------------------------------- features added inside the decoder


@dataclass
class Last(vtprune.Pruner):
    """Keeps every third cell after the last block of the vision tower, where the features of all others are what they were."""

    keep: float = 0.3
    name = "last"
    cells = True

    def encode_needs(self, encoder):
        return {encoder.last: vtprune.Needs()}

    def encode(self, view):
        return Keep([torch.arange(view.tokens).view(-1, view.cell)[1::3].flatten()] * len(view.index))


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("prompts, pruner", [("padded", Moving()), ("video", Moving()), ("padded", Last())])
def test_added_features_are_those_of_the_tokens_that_are_left(name, prompts, pruner):
    """Read off the decoder: what is added after each of its first layers, against the encoder's features by number."""
    asked, model = ask(KINDS[name], PROMPTS[prompts]), model_of(KINDS[name], "sdpa")
    decoder, added, whole_rows = model.model.language_model, [], []
    original = type(decoder)._deepstack_process

    def look(self, hidden, placeholders, features):
        out = original(self, hidden, placeholders, features)
        added.append((out - hidden, features))
        return out

    type(decoder)._deepstack_process = look
    try:
        with torch.no_grad():
            model(**asked.inputs())
            whole_rows, added = [features for _, features in added], []
            with vtprune.pruning(model, pruner) as session:
                model(**asked.inputs())
    finally:
        type(decoder)._deepstack_process = original
    assert len(added) == len(whole_rows) == len(model.config.vision_config.deepstack_visual_indexes)
    starts = torch.tensor([0, *(s.visual_tokens for s in session.report.samples)]).cumsum(0)
    for layer, (difference, _) in enumerate(added):
        for row, sample in enumerate(session.report.samples):
            mine = difference[row][difference[row].abs().sum(-1) > 0]
            expected = whole_rows[layer][sample.layers[layer] + starts[row]]
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- layers of linear attention


@pytest.mark.parametrize("name", HYBRID)
def test_select_is_the_bare_model_on_the_shorter_sequence(name):
    """Embeddings of the kept tokens at their own positions, fed to the unwrapped language model."""
    asked, model = ask(KINDS[name], [[3, "B", 2, "A", 4]]), model_of(KINDS[name], "sdpa")
    inputs, seen = asked.inputs(), {}

    def note(module, args, kwargs):
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        with vtprune.pruning(model, "divprune", keep=9) as session:
            pruned = model(**inputs).logits[0]
        sample = session.report.samples[0]
        visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        stays = torch.ones(len(asked.ids[0]), dtype=torch.bool)
        stays[visual] = False
        stays[visual[sample.kept]] = True
        hidden = model.model.language_model(
            inputs_embeds=seen["inputs_embeds"][:, stays], position_ids=seen["position_ids"][-3:, :, stays]
        ).last_hidden_state
        expected = model.lm_head(hidden)[0]
    assert stays.sum() == len(asked.ids[0]) - len(visual) + 18
    torch.testing.assert_close(pruned[stays], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HYBRID)
def test_what_linear_attention_refuses(name):
    model = model_of(KINDS[name], "sdpa")
    for refused, match in (
        (vtprune.FastV(keep=0.5, layer=1), r"reads the attention of decoder layers \[0\].*before layers of \[2, 3\]"),
        (vtprune.PyramidDrop(keep=0.8, layers=(3,)), r"decoder layers \[3\].*before layers of \[1, 2\]"),
        (vtprune.Evict(keep=0.5), r"evict evicts tokens from the cache of decoder layers \[0, 3\].*\[1, 2\]"),
        (vtprune.create("divprune+fastv+evict", keep=0.4, layer=2), "evict evicts"),
    ):
        with pytest.raises(vtprune.UnsupportedError, match=match):
            vtprune.wrap(model, refused)
        assert not model.model.language_model._forward_pre_hooks


@pytest.mark.parametrize("name", HYBRID)
def test_caches_of_linear_attention(name):
    """Its layers keep what they are; those with keys and values keep their own books, and positions follow what was fed."""
    from vtprune.engine.cache import PrunedLayer, holds_state, is_pruned

    asked = ask(KINDS[name], [[2, "A", 5]])
    ran = run(asked, pruner=vtprune.DivPrune(keep=9), steps=3)
    cache = ran.cache
    assert [holds_state(layer) for layer in cache.layers] == [True, False, False, True]
    assert all(isinstance(layer, PrunedLayer) != holds_state(layer) for layer in cache.layers)
    assert is_pruned(cache) and not is_pruned(cache, 0) and is_pruned(cache, 1)
    fed = len(asked.ids[0]) + 2
    assert cache.get_seq_length() == fed and cache.layers[1].physical == fed - 24 + 9
    assert 0 < ran.report.flops < ran.report.flops_full


# ---------------------------------------------------------------------- layouts


@every_kind
def test_grids_and_frames(name):
    seen = []

    class Look(vtprune.Uniform):
        def select(self, view):
            seen.append(view)
            return super().select(view)

    asked, model = ask(KINDS[name], [[2, "V", 5]]), model_of(KINDS[name], "sdpa")
    with torch.no_grad(), vtprune.pruning(model, Look(keep=8)) as session:
        model(**asked.inputs())
    (view,), (sample,) = seen, session.report.samples
    assert (view.frames, view.grid, view.tokens) == (4, (3, 2), 24)
    assert (sample.frames, sample.grids, sample.images) == ([4], [(3, 2)], [24]) and len(sample.kept) == 8
    # a word between two frames is text, to strategies too
    assert len(view.text[0]) == len(view.ids[0]) == len(asked.ids[0]) - 24
    asked = ask(KINDS[name], [[3, "B", 2, "A", 4]])
    with torch.no_grad(), vtprune.pruning(model, "divprune", keep=8) as session:
        model(**asked.inputs())
    assert session.report.samples[0].grids == [(6, 5), (4, 6)] and session.report.samples[0].images == [30, 24]


@every_kind
def test_frames_as_pixels(name):
    """What a scorer of frames is shown is what the patches were made of."""
    kind, model = KINDS[name], model_of(KINDS[name], "sdpa")
    frames = torch.randn(8, 3, 48, 32, generator=torch.Generator().manual_seed(5))
    # slot, time, channel, row of blocks, row in it, row of the patch, and so for columns
    blocks = frames.view(4, 2, 3, 3, 2, 8, 2, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    given, _ = kind.video(model, 0)
    given = {**given, "pixel_values_videos": blocks.reshape(4 * 24, -1)}
    found = vtprune.families.locate(model).family.pixels(model.model, given, "video")
    assert len(found) == 1 and torch.equal(found[0], frames)


@every_kind
def test_the_brightest_cell_is_the_one_kept(name):
    """A picture dark but for one cell: the number of the token that differs most is that of the cell in the grid."""
    kind, model = KINDS[name], copy.deepcopy(model_of(KINDS[name], "sdpa"))
    for parameter in (
        p for n, p in model.model.visual.named_parameters() if any(s in n for s in ("attn.proj", "pos_embed", "position_emb"))
    ):
        parameter.data.zero_()  # a random tower would spread the cell over all tokens
    rows, columns = 4, 6
    asked = ask(kind, [[2, "A", 5]])
    for cell in ((0, 0), (1, 4), (3, 2)):
        picture = torch.zeros(2, 3, rows * 16, columns * 16)
        picture[:, :, 16 * cell[0] : 16 * cell[0] + 16, 16 * cell[1] : 16 * cell[1] + 16] = 3.0
        blocks = picture.view(1, 2, 3, rows, 2, 8, columns, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        asked.given[0] = {**asked.given[0], "pixel_values": blocks.reshape(rows * columns * 4, -1)}

        class Odd(vtprune.Uniform):
            def select(self, view):
                middle = view.features.float().median(1, keepdim=True).values
                return Keep((view.features.float() - middle).norm(dim=-1).topk(1).indices)

        with torch.no_grad(), vtprune.pruning(model, Odd(keep=1)) as session:
            model(**asked.inputs())
        (sample,) = session.report.samples
        assert sample.grids == [(rows, columns)]
        assert divmod(int(sample.kept), columns) == cell


# ---------------------------------------------------------------------- real processors


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen3.5", "glm4v"])
def test_layouts_are_those_of_the_processor(name):
    """Pictures of two sizes, and a video whose frames stand apart in the prompt, as the real processor hands them on."""
    processor, model = processor_of(name), model_of(KINDS[name], "sdpa")
    glm_like = name == "glm4v"
    start, end = ("<|begin_of_image|>", "<|end_of_image|>") if glm_like else ("<|vision_start|>", "<|vision_end|>")
    picture, video = (f"{start}{'<|image|>' if glm_like else '<|image_pad|>'}{end}", "<|video_pad|>")
    pictures = [Image.new("RGB", size, "navy") for size in ((96, 64), (48, 80))]
    inputs = processor(
        text=[f"a {picture} b {picture} what", f"{picture} no"],
        images=[*pictures, pictures[1]],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad(), vtprune.pruning(model, "divprune", keep=5) as session:
        model(**inputs)
    first, second = session.report.samples
    assert first.grids == [(4, 6), (5, 3)] and second.grids == [(5, 3)]
    assert first.images == [24, 15] and len(first.kept) == 10 and len(second.kept) == 5
    clip = torch.zeros(6, 3, 64, 48, dtype=torch.uint8)
    prompt = "a <|begin_of_video|><|video|><|end_of_video|> what" if glm_like else f"a {start}{video}{end} what"
    inputs = processor(
        text=[prompt],
        videos=[clip],
        video_metadata=[[{"fps": 2.0, "total_num_frames": 6, "frames_indices": list(range(6)), "duration": 3.0}]],
        do_sample_frames=False,
        return_tensors="pt",
    )
    runs = (inputs["input_ids"][0] == (IMAGE if glm_like else VIDEO)).long().diff().clamp(min=0).sum()
    with torch.no_grad(), vtprune.pruning(model, "divprune", keep=5) as session:
        model(**inputs)
    (sample,) = session.report.samples
    frames, rows, columns = inputs["video_grid_thw"][0].tolist()
    assert int(runs) == frames == sample.frames[0] > 1, "each frame stands apart"
    assert sample.grids == [(rows // 2, columns // 2)] and sample.images == [frames * rows * columns // 4]
    assert len(sample.kept) == 5
