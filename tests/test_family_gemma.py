"""What is special to decoders with sliding windows and to pictures that are seen in both directions.

The promises over all families, these included, are in test_matrix.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
import transformers
from harness import ask, assert_masked, assert_same, cache_sizes, run
from models import IMAGE, TOKENS, preencoding, prompt
from oracle import Watch, oracle_logits
from transformers import DynamicCache
from zoo import every, model_of
from zoo.gemma import WINDOW, gemma3
from zoo.windows import TEXT, under_llava

import vtprune
from vtprune.engine.attention import kernel_mask
from vtprune.engine.cache import PrunedLayer
from vtprune.pruner import Keep, Needs, UnsupportedError

KINDS = {kind.name: kind for kind in every()}
WINDOWED = [n for n in ("gemma3", "paligemma2", "llava-mistral-window", "llava-cohere2", "qwen2.5-window") if n in KINDS]
ALL = [*WINDOWED, "paligemma", "mistral3-window"]
PADDED = [[2, "A", 5], [3, "B", 2, "A", 4], [1, "B", 7]]
STRATEGIES = {
    "select": lambda: vtprune.DivPrune(keep=0.3),
    "prefill": lambda: vtprune.FastV(keep=0.6, layer=1),
    "ahead": lambda: vtprune.PyramidDrop(keep=0.6),
    "all": lambda: vtprune.create("divprune+fastv+evict", keep=0.4, layer=1),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_windowed = pytest.mark.parametrize("name", WINDOWED)


@lru_cache
def second_turns(name: str) -> bool:
    """Whether the bare model says the same of text that follows over a cache as of the whole in one run."""
    kind = KINDS[name]
    inputs, more = ask(kind, [[2, "A", 5]]).inputs(), torch.tensor([prompt(6)[1:]])
    whole = torch.cat([inputs["input_ids"], more], 1)
    cache = DynamicCache(config=text_config(kind))
    with torch.no_grad():
        model_of(kind)(**inputs, past_key_values=cache)
        later = model_of(kind)(input_ids=more, past_key_values=cache).logits
        once = model_of(kind)(
            **{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole), **kind.types(whole)}
        ).logits[:, -more.shape[1] :]
    return torch.allclose(later, once, atol=1e-3, rtol=1e-3)


def text_config(kind, attn="sdpa"):
    return model_of(kind, attn).config.text_config


def chat(kind, turns, pruner, attn="sdpa", positions=None, steps=3, cache=None):
    """Turns (parts of a prompt each) over one cache, pruned; the last answer's logits and the oracle's."""
    model = model_of(kind, attn)
    cache = DynamicCache(config=text_config(kind, attn)) if cache is None else cache
    asked = [ask(kind, [parts], attn) for parts in turns]
    seen, told, ids, last = [], [], [], 0
    with vtprune.pruning(model, pruner, positions=positions) as session:
        for at, one in enumerate(asked):
            fresh = one.ids[0] if at == 0 else one.ids[0][1:]
            ids = ids + fresh
            whole = torch.tensor([ids])
            watch = Watch(model, pruner)
            out = model.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                **one.given[0],
                **kind.types(whole),
                past_key_values=cache,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            watch.close()
            said = out.sequences[0, len(ids) :].tolist()
            # the last token of an answer is fed with the turn after it
            fed = fresh if at == 0 else [last, *fresh]
            told.append((fed, said))
            if one.given[0]:
                seen.append((at, watch.turn(fed, said, session.report.samples[0], None, 0, 0), one.given[0]))
            last, ids = said[-1], ids + said
    conversation = []
    for at, (fed, said) in enumerate(told):
        mine = [(turn, given) for when, turn, given in seen if when == at]
        if mine:
            turn, turn.extra = mine[0][0], mine[0][1]
            turn.generated = said[:-1] if at < len(told) - 1 else said
            conversation.append(turn)
        else:
            more = fed + (said[:-1] if at < len(told) - 1 else said)
            assert conversation, "begin with a picture"
            conversation[-1].generated = conversation[-1].generated + more
    expected = oracle_logits(model, conversation, session.report.positions == "compact", kind.types)
    return torch.stack(out.logits, 1)[0], expected[len(ids) - steps - 1 : -1], out, session.report


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@every_windowed
@every_strategy
def test_steps_beyond_the_window(name, strategy, attn):
    """Twenty steps over a window of eight: everything that was pruned is out of sight at the end, or in full layers alone."""
    kind = KINDS[name]
    asked = ask(kind, PADDED, attn)
    for positions in kind.positions:
        ran = run(asked, attn, STRATEGIES[strategy](), positions, steps=20)
        assert_masked(asked, ran, attn)
        kept = [layer for layer in ran.cache.layers if layer.is_sliding]
        assert kept and all(layer.physical <= WINDOW - 1 for layer in kept)
        assert all(layer.get_seq_length() == ran.cache.get_seq_length() for layer in ran.cache.layers)


@every_windowed
def test_one_row_over_the_window_holds_no_more_than_the_unpruned_cache(name):
    kind = KINDS[name]
    asked = ask(kind, [[2, "A", 5]])
    bare, pruned = run(asked, steps=1), run(asked, pruner=STRATEGIES["select"](), steps=1)
    assert pruned.report.kv_bytes == cache_sizes(pruned.cache) < cache_sizes(bare.cache) or kind.windowed
    assert pruned.report.kv_bytes_full == cache_sizes(bare.cache)
    for layer, sample in zip(pruned.cache.layers, pruned.report.samples[0].cached, strict=True):
        text = min(len(asked.ids[0]) - pruned.report.samples[0].visual_tokens, layer.physical - len(sample))
        assert layer.physical == text + len(sample)


@every_windowed
@every_strategy
def test_a_cache_without_windows(name, strategy):
    """A DynamicCache that was not told of the windows keeps all keys; the layers' masks know of them all the same."""
    kind = KINDS[name]
    asked = ask(kind, PADDED)
    ran = run(asked, pruner=STRATEGIES[strategy](), steps=12, past_key_values=DynamicCache())
    assert_masked(asked, ran)
    assert not any(layer.is_sliding for layer in ran.cache.layers)
    assert_same(ran, run(asked, pruner=STRATEGIES[strategy](), steps=12))


@every_strategy
@pytest.mark.parametrize("name", [*WINDOWED, "paligemma"])
def test_text_follows_over_the_same_cache(name, strategy):
    kind = KINDS[name]
    if kind.said:
        pytest.skip("its prompts are seen in both directions, and the next turn's in one: no one run has such masks")
    if not second_turns(name):
        pytest.skip("the bare model's own second turn over a cache is not what it is in one run, in this version")
    for positions in kind.positions:
        logits, expected, _, _ = chat(kind, [[2, "A", 5], [6]], STRATEGIES[strategy](), positions=positions, steps=12)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@preencoding
@every_strategy
@pytest.mark.parametrize("name", ["gemma3", "llava-mistral-window", "llava-cohere2"])  # Qwen's processor tells of all pictures
def test_another_picture_follows(name, strategy):
    kind = KINDS[name]
    for attn in ("sdpa", "eager"):
        for positions in kind.positions:
            turns = [[2, "A", 5], [4, "B", 3]]
            logits, expected, _, _ = chat(kind, turns, STRATEGIES[strategy](), attn, positions, steps=10)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@preencoding
def test_a_picture_after_more_text_than_the_window_holds():
    """The cache comes with trimmed layers of transformers' own; from there on they are ours."""
    kind = KINDS["gemma3"]
    model = model_of(kind)
    for positions in kind.positions:
        cache = DynamicCache(config=text_config(kind))
        talk = torch.tensor([prompt(30)])
        with torch.no_grad():
            model(input_ids=talk, token_type_ids=torch.zeros_like(talk), past_key_values=cache)
        assert cache.layers[0].keys.shape[-2] == WINDOW - 1
        asked = ask(kind, [["A", 5]])
        whole = torch.cat([talk, torch.tensor([asked.ids[0]])], 1)
        pruner = STRATEGIES["all"]()
        with vtprune.pruning(model, pruner, positions=positions) as session:
            watch = Watch(model, pruner)
            out = model.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                **asked.given[0],
                **kind.types(whole),
                past_key_values=cache,
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            watch.close()
        turn = watch.turn(whole[0].tolist(), out.sequences[0, -12:].tolist(), session.report.samples[0], None, 0, 0)
        turn.extra = asked.given[0]
        expected = oracle_logits(model, [turn], positions == "compact", kind.types)[whole.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1)[0], expected, atol=1e-4, rtol=1e-4)
        assert all(isinstance(layer, PrunedLayer) for layer in cache.layers)


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2", "llava-mistral-window", "llava-cohere2"])
def test_compact_is_a_prompt_that_never_had_the_tokens(name):
    """No oracle: the unwrapped decoder over the kept tokens' embeddings, with the masks that it makes for these."""
    kind = KINDS[name]
    model, asked = model_of(kind), ask(kind, [[2, "A", 9]])
    inputs = asked.inputs()
    with torch.no_grad():
        with vtprune.pruning(model, "divprune", keep=0.4, positions="compact") as session:
            pruned = model(**inputs).logits[0]
        kept = session.report.samples[0].kept
        ids = inputs["input_ids"]
        stays = torch.ones_like(ids, dtype=torch.bool)
        stays[ids == IMAGE] = False
        stays[0, (ids[0] == IMAGE).nonzero()[:, 0][kept]] = True
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        types = {n: t[stays][None] for n, t in kind.types(ids).items()}
        alone = model(inputs_embeds=embeds[stays][None], attention_mask=torch.ones(1, int(stays.sum())), **types).logits[0]
    torch.testing.assert_close(pruned[stays[0]], alone, atol=1e-4, rtol=1e-4)


@dataclass
class Reading(vtprune.Pruner):
    """Takes down the rows of every layer; drops every other token before layer `cut`, if there is one."""

    needs: Needs
    cut: int | None = None
    keep: float = 1.0
    rows: dict = field(default_factory=dict)

    name = "reading"

    def prefill_needs(self, depth):
        found = dict.fromkeys(range(1, depth), self.needs)
        return found if self.cut is None else {**found, self.cut: Needs()}

    def prefill(self, view):
        if view.layer == self.cut:
            return Keep(torch.arange(0, view.tokens, 2).expand(len(view.index), -1))
        self.rows[view.layer if self.needs.ahead else view.layer - 1] = view.rows
        return None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cut", [None, 1], ids=["whole", "cut"])
@pytest.mark.parametrize("ahead", [False, True], ids=["behind", "ahead"])
def test_rows_are_those_of_eager_attention(name, ahead, cut):
    """Windows, both directions, bounded scores, norms of queries and keys, layers without positions."""
    kind = KINDS[name]
    model, asked = model_of(kind, "eager"), ask(kind, [[2, "A", 5]], "eager")
    maps = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output, at=at: maps.__setitem__(at, output[1]))
        for at, layer in enumerate(model.model.language_model.layers)
    ]
    reading = Reading(Needs(queries="text", ahead=ahead), cut, 1.0 if cut is None else 0.5)
    try:
        with torch.no_grad(), vtprune.pruning(model, reading, positions=kind.positions[-1]):
            model(**asked.inputs())
    finally:
        for handle in handles:
            handle.remove()
    ids = asked.ids[0]
    pictures = [at for at, token in enumerate(ids) if token == IMAGE]
    left = ids if cut is None else [token for at, token in enumerate(ids) if at not in pictures[1::2]]
    visual = [at for at, token in enumerate(left) if token == IMAGE]
    text = [at for at, token in enumerate(left) if token != IMAGE and at > visual[0]]
    layers = [at for at in reading.rows if cut is None or at >= cut]
    assert len(layers) >= 2
    unseen = 0
    for at in layers:
        expected = maps[at][:, :, text][..., visual]
        torch.testing.assert_close(reading.rows[at].attention(), expected, atol=1e-5, rtol=1e-5)
        assert bool(expected.any()) or name in WINDOWED
        unseen += int((expected == 0).all(1).any())
        assert torch.equal(reading.rows[at].logits == float("-inf"), expected == 0)
    assert bool(unseen) == (name not in ("paligemma", "paligemma2"))  # one sees all of a prompt


def test_attention_in_both_directions_shows_in_the_rows():
    """A prompt's last token but one sees the picture and the token after it, in PaliGemma."""
    kind = KINDS["paligemma"]
    asked = ask(kind, [[2, "A", 5]])
    whole, causal = (Reading(Needs(queries="text")) for _ in range(2))
    model = model_of(kind)
    inputs = asked.inputs()
    with torch.no_grad():
        with vtprune.pruning(model, whole):
            model(**inputs)
        with vtprune.pruning(model, causal):
            model(**{**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])})
    assert bool((whole.rows[0].lse[..., :-1] > causal.rows[0].lse[..., :-1]).all())
    torch.testing.assert_close(whole.rows[0].lse[..., -1], causal.rows[0].lse[..., -1])


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_without_token_types(name):
    """What the model then does is its own affair (PaliGemma may attend in both directions); pruning changes none of it."""
    kind = KINDS[name]
    for attn in ("sdpa", "eager"):
        model, asked = model_of(kind, attn), ask(kind, [[2, "A", 5]], attn)
        inputs = {n: t for n, t in asked.inputs().items() if n != "token_type_ids"}
        inputs["attention_mask"] = None
        with torch.no_grad():
            whole = model(**inputs).logits
            before = slice(0, 2 + TOKENS if name == "paligemma" else 3 + TOKENS)
            # with another token at the end
            other = {**inputs, "input_ids": torch.cat([inputs["input_ids"][:, :-1], 103 - inputs["input_ids"][:, -1:]], 1)}
            both_ways = not torch.allclose(model(**other).logits[:, before], whole[:, before], atol=1e-4)
            assert not both_ways or name == "paligemma"
            for keep in (1.0, 0.99):
                # the last visual token goes: nothing sees it but itself and what comes after, or all of the prompt
                with vtprune.pruning(model, Last(keep), positions="original"):
                    pruned = model(**inputs).logits
                if keep == 1.0:
                    assert torch.equal(whole, pruned)
                elif both_ways:
                    assert not torch.allclose(whole[:, before], pruned[:, before], atol=1e-4)
                else:
                    torch.testing.assert_close(whole[:, before], pruned[:, before], atol=1e-4, rtol=1e-4)


@dataclass
class Last(vtprune.Pruner):
    """Drops an image's last token."""

    keep: float = 1.0

    name = "last"

    def select(self, view):
        return None if self.keep == 1.0 else Keep(torch.arange(view.tokens - 1).expand(len(view.index), -1))


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "llava-mistral-window", "llava-cohere2"])
def test_beams_carry_their_windows(name):
    """Copies of features that are one tensor for all pictures are known again."""
    kind = KINDS[name]
    asked = ask(kind, PADDED)
    model = model_of(kind)
    inputs, options = asked.inputs(), {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3, "do_sample": False}
    if not torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False)):
        pytest.skip("the bare model's own beams under a window differ with and without a cache, in this version")
    with vtprune.pruning(model, STRATEGIES["prefill"]()):
        beams = model.generate(**inputs, **options)
        again = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(beams, again)


def test_a_window_that_rolled_on_cannot_be_taken_back():
    kind = KINDS["gemma3"]
    ran = run(ask(kind, [[2, "A", 5]]), pruner=STRATEGIES["prefill"](), steps=4)
    lengths = [layer.physical for layer in ran.cache.layers]
    with pytest.raises(UnsupportedError, match=r"sliding window of 8 .* Start a new cache"):
        ran.cache.crop(-1)
    assert [layer.physical for layer in ran.cache.layers] == lengths


def test_a_recorded_past_can_be_taken_back():
    """As in assisted decoding: what the window has passed over is kept until `crop`."""
    kind = KINDS["gemma3"]
    model, asked = model_of(kind), ask(kind, [[2, "A", 5]])
    inputs = asked.inputs()
    cache = DynamicCache(config=text_config(kind))
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    if not any(getattr(layer, "record_past", False) for layer in cache.layers):
        pytest.skip("needs a transformers whose sliding layers record the past")
    with torch.no_grad(), vtprune.pruning(model, STRATEGIES["prefill"]()):
        model(**inputs, past_key_values=cache)
        steps = [torch.tensor([[token]]) for token in (5, 6, 7)]
        first = [model(input_ids=step, past_key_values=cache).logits for step in steps]
        cache.crop(-2)
        assert cache.layers[0].physical == WINDOW - 1 and cache.get_seq_length() == len(asked.ids[0]) + 1
        second = [model(input_ids=step, past_key_values=cache).logits for step in steps[1:]]
    for a, b in zip(first[1:], second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_masks_that_are_not_served_are_named():
    config = {n: v for n, v in TEXT.items() if n != "num_hidden_layers"}
    chunked = transformers.Llama4TextConfig(
        **config, num_hidden_layers=2, intermediate_size_mlp=64, num_local_experts=1, attention_chunk_size=8
    )
    with pytest.raises(UnsupportedError, match="chunked_attention"):
        vtprune.wrap(under_llava("eager", chunked), "random", keep=9)
    model = gemma3("sdpa")
    model.config.text_config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedError, match="both directions throughout"):
        vtprune.wrap(model, "random", keep=9)


def test_flash_kernels_cannot_be_told():
    index = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="sliding window"):
        kernel_mask("flash_attention_2", 4, 0, None, index, torch.float32, torch.ones(1, 4, 4, dtype=torch.bool))
    assert kernel_mask("flash_attention_2", 4, 0, None, index, torch.float32) is None


def test_inside_the_encoder():
    model = model_of(KINDS["gemma3"])

    class Inside(vtprune.FlowCut):
        requires = frozenset()

    with pytest.raises(UnsupportedError, match="pools squares of patches"):
        vtprune.wrap(model, Inside(keep=9))
