"""Every way in which people run a model: sampling, beams, streaming, plain forward, features computed beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from models import IMAGE, TOKENS, batch, beams_keep_images_together, images, preencoding, prompt, tiny_llava
from oracle import Turn, oracle_logits
from transformers import DynamicCache, TextIteratorStreamer

import vtprune

COMPOSED = "flowcut+fastv+evict"
FIELDS = {"flowcut.keep": 20, "fastv.keep": 14, "fastv.layer": 1, "evict.keep": 5}


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


PROMPTS = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6)]
PIXELS = images(3, seed=2)
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6}


def several():
    """Prompts and pictures for beams; several pictures in one where the installed version keeps them together."""
    return (PROMPTS, PIXELS) if beams_keep_images_together() else ([PROMPTS[0], prompt(4, "I", 6)], PIXELS[:2])


def generate(model, prompts, pixels, **options):
    return model.generate(**batch(prompts), pixel_values=pixels, **GENERATE, **options)


def test_sampling_depends_on_the_seed_alone(model):
    with vtprune.pruning(model, COMPOSED, **FIELDS):
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(generate(model, PROMPTS, PIXELS, do_sample=True, temperature=2.0))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@preencoding  # before, each beam is encoded, and reported, by itself
@pytest.mark.parametrize("strategy", ["flowcut", "fastv", COMPOSED])
def test_beams_batch_equals_single(model, strategy):
    """Beams copy and reorder cache rows; validity and shifts have to follow them."""
    fields = FIELDS if strategy == COMPOSED else {"keep": 24}
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    prompts, pixels = several()
    with vtprune.pruning(model, strategy, positions="compact", **fields) as session:
        together = generate(model, prompts, pixels, **options)
        report = session.report
        singles = [generate(model, [prompts[0]], pixels[:1], **options), generate(model, [prompts[1]], pixels[1:], **options)]
    assert [s.visual_tokens for s in report.samples] == [TOKENS, TOKENS * (len(pixels) - 1)]
    assert torch.equal(together[:, -6:], torch.cat([s[:, -6:] for s in singles]))


@preencoding
def test_beams_that_lose_images_are_refused(model):
    """The bare model would say something about other images than the prompt's."""
    if beams_keep_images_together():
        pytest.skip("this version hands each beam the images of its prompt")
    with vtprune.pruning(model, "random", keep=10), pytest.raises(vtprune.UnsupportedError, match="several times in place of"):
        generate(model, PROMPTS, PIXELS, num_beams=2)


@preencoding
def test_beams_without_a_cache(model):
    """Each step feeds everything again; what was kept must be what the prompt decided."""
    options = {"num_beams": 3, "do_sample": False}
    prompts, pixels = several()
    with vtprune.pruning(model, "flowcut+fastv", **{"flowcut.keep": 20, "fastv.keep": 14, "fastv.layer": 1}):
        cached = generate(model, prompts, pixels, **options)
        uncached = generate(model, prompts, pixels, **options, use_cache=False)
    assert torch.equal(cached, uncached)


def test_one_beam_search_equals_greedy_when_beams_cannot_differ(model):
    with vtprune.pruning(model, "random", keep=10):
        greedy = generate(model, PROMPTS[:1], PIXELS[:1], do_sample=False)
        returned = generate(model, PROMPTS[:1], PIXELS[:1], do_sample=True, top_k=1, num_return_sequences=3)
    assert all(torch.equal(row, greedy[0]) for row in returned)


def test_streaming_from_a_thread(model):
    import threading

    class Plain:
        """A tokenizer that writes token numbers."""

        def decode(self, ids, **_):
            return "".join(f"{int(i)} " for i in ids)

    streamer = TextIteratorStreamer(Plain(), skip_prompt=True)
    with vtprune.pruning(model, "fastv", keep=24) as session:
        expected = generate(model, PROMPTS[:1], PIXELS[:1], do_sample=False)
        thread = threading.Thread(
            target=generate, args=(model, PROMPTS[:1], PIXELS[:1]), kwargs={"do_sample": False, "streamer": streamer}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert session.report.equivalent_tokens == 24
    assert text.split() == [str(t) for t in expected[0, -6:].tolist()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_forward_keeps_the_fed_length(side, use_cache, attn):
    """Logits stand where the user fed the tokens, padded on either side; text positions equal the oracle's."""
    model = tiny_llava(attn)
    inputs = batch(PROMPTS, side)
    with torch.no_grad(), vtprune.pruning(model, COMPOSED, positions="compact", **FIELDS) as session:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, pixel_values=PIXELS, position_ids=positions, use_cache=use_cache)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    first = 0
    for row, ids in enumerate(PROMPTS):
        count = ids.count(IMAGE) // TOKENS
        turn = Turn(ids, [], session.report.samples[row], PIXELS[first : first + count])
        first += count
        expected = oracle_logits(model, [turn], compact=True)
        text = torch.tensor([t != IMAGE for t in ids])
        got = out.logits[row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(got[text], expected[text], atol=1e-4, rtol=1e-4)


def test_forward_by_hand_token_by_token(model):
    """Prefill and decode through forward(), with a cache the user made and without position ids."""
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), vtprune.pruning(model, COMPOSED, **FIELDS):
        expected = generate(model, PROMPTS[:1], PIXELS[:1], do_sample=False)[0, -6:]
        cache = DynamicCache(config=model.config)
        out = model(input_ids=ids, pixel_values=PIXELS[:1], past_key_values=cache)
        said = []
        for _ in range(6):
            scores = out.logits[:, -1].clone()
            scores[:, IMAGE] = -torch.inf
            said.append(scores.argmax(-1))
            out = model(input_ids=said[-1][:, None], past_key_values=cache)
    assert torch.equal(torch.cat(said), expected)
    assert cache.get_seq_length() == len(PROMPTS[0]) + 6


def test_several_tokens_at_once_onto_a_pruned_cache(model):
    """Feeding the answer in one piece equals feeding it token by token."""
    with torch.no_grad(), vtprune.pruning(model, COMPOSED, positions="compact", **FIELDS):
        logits = []
        for pieces in ([[7, 8, 9]], [[7], [8], [9]]):
            cache = DynamicCache()
            model(input_ids=torch.tensor([PROMPTS[0]]), pixel_values=PIXELS[:1], past_key_values=cache)
            for piece in pieces:
                out = model(input_ids=torch.tensor([piece]), past_key_values=cache)
            logits.append(out.logits[:, -1])
            cache.crop(-2)
            logits.append(model(input_ids=torch.tensor([[8, 9]]), past_key_values=cache).logits[:, -1])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=1e-4)


def test_embeddings_instead_of_ids(model):
    ids = torch.tensor([PROMPTS[0]])
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad(), vtprune.pruning(model, "fastv", keep=24):
        by_ids = model(input_ids=ids, pixel_values=PIXELS[:1]).logits
        by_embeds = model(inputs_embeds=embeds, pixel_values=PIXELS[:1]).logits
    assert torch.equal(by_ids, by_embeds)


@preencoding
@pytest.mark.parametrize("strategy", ["flowcut", "fastv"])
def test_features_computed_once_and_asked_twice(model, strategy):
    """Image features handed over by hand, with different questions: nothing of the first question sticks."""
    questions = [prompt(2, "I", 5), prompt(2, "I", 4, 6)]
    options = {"do_sample": False, "use_cache": False}
    with torch.no_grad(), vtprune.pruning(model, strategy, keep=24):
        direct = [generate(model, [q], PIXELS[:1], **options) for q in questions]
        features = model.model.get_image_features(PIXELS[:1], return_dict=True)
        for question, expected in zip(questions, direct, strict=True):
            out = model.generate(**batch([question]), mm_encoder_outputs={"image": features}, **GENERATE, **options)
            assert torch.equal(out, expected)


def test_hidden_states_and_tuples_still_come(model):
    with torch.no_grad(), vtprune.pruning(model, "flowcut", keep=12):
        out = model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1], output_hidden_states=True)
        as_tuple = model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1], return_dict=False)
    assert len(out.hidden_states) == 5
    assert torch.equal(as_tuple[0], out.logits)


def test_half_precision(model):
    half = tiny_llava().to(torch.bfloat16)
    with vtprune.pruning(half, COMPOSED, **FIELDS) as session:
        out = generate(half, PROMPTS, PIXELS.bfloat16(), do_sample=False)
    assert out.shape[1] == max(map(len, PROMPTS)) + 6
    assert session.report.equivalent_tokens == 14 * 1.5


def test_gradients_flow_through_a_pruned_forward():
    model = tiny_llava()
    with vtprune.pruning(model, "random", keep=8):
        out = model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1])
        out.logits[:, -1].sum().backward()
    grad = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad is not None and float(grad.abs().sum()) > 0


def test_wrapping_the_base_model():
    base = tiny_llava().model
    with torch.no_grad(), vtprune.pruning(base, "uniform", keep=9) as session:
        out = base(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1])
    assert out.last_hidden_state.shape[1] == len(PROMPTS[0]) and session.report.equivalent_tokens == 9


def test_changing_the_attention_kernel_while_wrapped():
    model = tiny_llava("sdpa")
    with vtprune.pruning(model, COMPOSED, **FIELDS):
        by_sdpa = generate(model, PROMPTS, PIXELS, do_sample=False)
        model.set_attn_implementation("eager")
        by_eager = generate(model, PROMPTS, PIXELS, do_sample=False)
    assert torch.equal(by_sdpa, by_eager)
    assert model.config.text_config._attn_implementation == "eager"


def test_merging_strategies_are_reported():
    """A strategy may replace kept vectors and say what went into them."""

    @dataclass
    class Pairs(vtprune.Pruner):
        """Averages each two neighbours in the encoder, then each two survivors before the decoder."""

        keep: float = 0.25
        name = "pairs"

        @staticmethod
        def halve(vectors):
            count = vectors.shape[1] // 2
            items = vectors.shape[0]
            even = (torch.arange(count) * 2).expand(items, -1)
            into = torch.full((items, 2 * count), -1)
            into[:, 1::2] = even
            return vtprune.Keep(even, hidden=vectors.reshape(items, count, 2, -1).mean(2), into=into)

        def encode_needs(self, encoder):
            return {1: vtprune.Needs()}

        def encode(self, view):
            return self.halve(view.hidden)

        def select(self, view):
            return self.halve(view.features)

    model = tiny_llava()
    with torch.no_grad(), vtprune.pruning(model, Pairs()) as session:
        model(**batch(PROMPTS), pixel_values=PIXELS)
    sample = session.report.samples[1]
    assert sample.kept.tolist() == list(range(0, 2 * TOKENS, 4))
    assert sample.merged[40] == [42, 43, 41] or sorted(sample.merged[40]) == [41, 42, 43]
    assert sum(1 + len(v) for v in sample.merged.values()) == 2 * TOKENS


def test_report_reads_well_and_is_json(model):
    import json

    with vtprune.pruning(model, COMPOSED, **FIELDS) as session:
        generate(model, PROMPTS, PIXELS, do_sample=False)
    data = json.loads(json.dumps(session.report.to_dict()))
    assert data["samples"][1]["visual_tokens"] == 2 * TOKENS
    assert len(data["samples"][0]["layers"]) == 4 and len(data["samples"][0]["cached"][3]) == 5
    assert data["flops"] < data["flops_full"] and data["kv_bytes"] < data["kv_bytes_full"]
    assert 0 < data["selection_ms"] < data["prefill_ms"]
    text = str(session.report)
    assert "20 of 36, 40 of 72" in text and "equivalent tokens" in text


def test_flops_are_what_the_formula_says(model):
    """Linear layers 2*n*weights, attention 4*n*keys*width; counted by hand for the unpruned half."""
    with torch.no_grad(), vtprune.pruning(model, "uniform", keep=9) as session:
        model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1])
    text, n, full = 8, 8 + 9, 8 + TOKENS
    decoder = lambda t: 4 * (2 * t * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 4 * t * t * 32)
    encoder = 6 * (2 * 37 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 37 * 37 * 32)
    projector = 2 * TOKENS * 2 * 32 * 32
    assert text == len(PROMPTS[0]) - TOKENS
    assert session.report.flops_full == decoder(full) + encoder + projector
    assert session.report.flops == decoder(n) + encoder + projector


def test_only_some_stages_of_a_strategy(model):
    """`only` gives the stages away: FlowCut's decoder cut after a random choice, without its encoder stage."""
    second = vtprune.FlowCut(keep=1.0, decoder_keep=6).only("prefill")
    with torch.no_grad(), vtprune.pruning(model, vtprune.Random(keep=12) + second) as session:
        model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1])
    assert [len(layer) for layer in session.report.samples[0].layers] == [12, 12, 6, 6]
    assert session.report.positions == "compact" and ".only('prefill')" in session.report.strategy
    with pytest.raises(ValueError, match="stages"):
        vtprune.Random(keep=12).only("decode")


@pytest.mark.parametrize("strategy", ["uniform", "fastv", "evict"])
def test_a_refused_crop_leaves_the_cache_whole(model, strategy):
    with torch.no_grad(), vtprune.pruning(model, strategy, keep=24):
        cache = DynamicCache()
        model(input_ids=torch.tensor([PROMPTS[0]]), pixel_values=PIXELS[:1], past_key_values=cache)
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        with pytest.raises(vtprune.UnsupportedError, match="pruned cache"):
            cache.crop(-2)
        assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
        cache.crop(-2)
        assert [layer.keys.shape[-2] for layer in cache.layers] == lengths


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_an_encoder_without_a_class_token(attn):
    """SigLIP: what cannot do without CLS refuses, encoder-stage cuts by the mean query work and equal the oracle's."""

    @dataclass
    class Mean(vtprune.Pruner):
        keep: int = 15
        name = "mean"

        def encode_needs(self, encoder):
            return {1: vtprune.Needs("mean")}

        def encode(self, view):
            return vtprune.Keep(view.rows.attention()[:, :, 0].mean(1).topk(view.target(self.keep)).indices)

    model = tiny_llava(attn, siglip=True)
    with pytest.raises(vtprune.UnsupportedError, match=r"cls.*siglip"):
        vtprune.wrap(model, "mustdrop", keep=12)
    for pruner in (Mean(), vtprune.FastV(keep=24), vtprune.Uniform(keep=7)):
        with torch.no_grad(), vtprune.pruning(model, pruner) as session:
            out = model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1])
        turn = Turn(PROMPTS[0], [], session.report.samples[0], PIXELS[:1])
        expected = oracle_logits(model, [turn], compact=False)
        torch.testing.assert_close(out.logits[0, -1], expected[-1], atol=1e-4, rtol=1e-4)


def test_a_class_token_among_the_features_is_refused_by_encoder_strategies():
    model = tiny_llava(vision_feature_select_strategy="full")
    inputs = batch([[*prompt(2, "I"), IMAGE, 7, 8]])
    with torch.no_grad(), vtprune.pruning(model, "random", keep=12) as session:
        model(**inputs, pixel_values=PIXELS[:1])
        assert session.report.samples[0].visual_tokens == TOKENS + 1
    with vtprune.pruning(model, "flowcut", keep=12), pytest.raises(vtprune.UnsupportedError, match="select_strategy"):
        model(**inputs, pixel_values=PIXELS[:1])


def test_several_feature_layers_are_refused_by_encoder_strategies():
    model = tiny_llava(vision_feature_layer=[-2, -3])
    with torch.no_grad(), vtprune.pruning(model, "uniform", keep=12) as session:
        model(**batch(PROMPTS[:1]), pixel_values=PIXELS[:1])
    assert session.report.equivalent_tokens == 12
    with pytest.raises(vtprune.UnsupportedError, match="vision_feature_layer"):
        vtprune.wrap(model, "flowcut", keep=12)


@preencoding
def test_features_of_another_strategy(model):
    """Whole features may be asked about under another strategy; those an encoder-stage strategy shortened may not."""
    given = batch(PROMPTS[:1])
    with torch.no_grad():
        with vtprune.pruning(model, "random", keep=20):
            whole = model.model.get_image_features(PIXELS[:1], return_dict=True)
        with vtprune.pruning(model, "flowcut", keep=20):
            short = model.model.get_image_features(PIXELS[:1], return_dict=True)
            with pytest.raises(vtprune.UnsupportedError, match="computed elsewhere"):
                model(**given, mm_encoder_outputs={"image": whole})
        with vtprune.pruning(model, "uniform", keep=9) as session:
            again = model(**given, mm_encoder_outputs={"image": whole}).logits
            assert torch.equal(again, model(**given, pixel_values=PIXELS[:1]).logits)
            assert session.report.equivalent_tokens == 9
            with pytest.raises(vtprune.UnsupportedError, match="another strategy"):
                model(**given, mm_encoder_outputs={"image": short})


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_prompt_that_ends_in_a_picture_goes_on_from_the_last_token_left(positions):
    """Its last visual token has left; what comes next follows the last survivor, not a row of zeros."""
    model = tiny_llava()
    ids, pixels = torch.tensor([[*prompt(4), *[IMAGE] * TOKENS]]), images(1)

    @dataclass
    class First(vtprune.Pruner):
        keep: int = 5
        name = "first"

        def select(self, view):
            return vtprune.Keep(torch.arange(self.keep).expand(len(view.index), -1))

    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        kept = torch.cat([model.get_input_embeddings()(ids[:, :-TOKENS]), features[None, :5]], 1)
        expected = model(inputs_embeds=kept).logits[:, -1]
        with vtprune.pruning(model, First(), positions=positions):
            logits = model(input_ids=ids, pixel_values=pixels).logits
            said = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=1, do_sample=False)
    torch.testing.assert_close(logits[:, -1], expected, atol=1e-4, rtol=1e-4)
    scores = expected.clone()
    scores[:, IMAGE] = -torch.inf
    assert int(said[0, -1]) == int(scores.argmax())
