"""Loud: what cannot be served raises, says what was found and what to do, and leaves the model usable."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from models import IMAGE, TOKENS, batch, images, preencoding, prompt, tiny_llava, vision_blocks
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from vtprune import (
    BudgetError,
    Evict,
    FastV,
    FlowCut,
    Keep,
    Needs,
    NothingPrunedError,
    Random,
    Uniform,
    UnsupportedError,
    VtpruneError,
)


@pytest.fixture(scope="module")
def shared():
    model = tiny_llava()
    generate(model)  # transformers puts its own recording hooks on at the first call
    return model


@pytest.fixture
def model(shared):
    """The module's one model; every test must leave it as it found it."""
    before = snapshot(shared)
    yield shared
    if hasattr(shared.model, "_vtprune_session"):
        vtprune.unwrap(shared)
    assert snapshot(shared) == before


def snapshot(model: nn.Module):
    """Everything that wrapping touches."""
    return [
        (
            name,
            sorted(k for k, v in vars(module).items() if callable(v) or "vtprune" in k),
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
            id(vars(module).get("config")),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]


def inputs(*parts, pictures: int | None = None) -> dict:
    parts = parts or (4, "I", 5)
    count = parts.count("I") if pictures is None else pictures
    return {**batch([prompt(*parts)]), **({"pixel_values": images(count)} if count else {})}


def generate(model, given: dict | None = None, **kwargs) -> list[list[int]]:
    options = {"max_new_tokens": 4, "do_sample": False, **kwargs}
    return model.generate(**(given or inputs()), **options).tolist()


# ---------------------------------------------------------------------- strategies and fields


def test_unknown_strategy_offers_the_nearest(model):
    with pytest.raises(vtprune.UnknownStrategyError) as caught:
        vtprune.wrap(model, "flowcat")
    message = str(caught.value)
    assert "'flowcat'" in message and "Did you mean 'flowcut'" in message
    for name in ("evict", "fastv", "flowcut", "random", "uniform"):
        assert name in message
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)


def test_unknown_strategy_far_from_all_lists_them(model):
    with pytest.raises(vtprune.UnknownStrategyError, match=r"'zzzz'\. Available: cdpruner, divprune"):
        vtprune.wrap(model, "zzzz")
    with pytest.raises(vtprune.UnknownStrategyError, match="unknown strategy ''"):
        vtprune.wrap(model, "flowcut+")


@pytest.mark.parametrize("strategy", [Uniform, None, 64, {"name": "uniform"}])
def test_what_is_no_strategy(model, strategy):
    with pytest.raises(TypeError, match=r"vtprune\.available\(\)"):
        vtprune.wrap(model, strategy)


def test_fields_beside_a_built_strategy(model):
    with pytest.raises(TypeError, match=r"\['keep'\].*already built"):
        vtprune.wrap(model, Uniform(), keep=3)


def test_positions_that_do_not_exist(model):
    with pytest.raises(BudgetError, match="positions='packed': 'original' or 'compact'"):
        vtprune.wrap(model, "uniform", positions="packed")


BAD_BUDGETS = [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False, "64", None, [], 64j, np.float64(2.0), torch.tensor(3)]


@pytest.mark.parametrize("keep", BAD_BUDGETS, ids=repr)
@pytest.mark.parametrize("name", ["uniform", "random", "fastv", "evict", "flowcut"])
def test_bad_budgets(name, keep):
    with pytest.raises(BudgetError, match="keep=") as caught:
        vtprune.create(name, keep=keep)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("keep", [(64, 0), [64, 1.5], [True], ["64"], [[64]], [64, None]], ids=repr)
@pytest.mark.parametrize("name", ["uniform", "dycoke", "pyramiddrop", "flowcut+evict"])
def test_bad_budgets_of_one_image(name, keep):
    with pytest.raises(BudgetError, match=rf"keep\[{len(keep) - 1}\]="):
        vtprune.create(name, keep=keep)


@pytest.mark.parametrize("keep", [0, 1.5, True, "64"], ids=repr)
def test_bad_second_budgets_are_named(keep):
    with pytest.raises(BudgetError, match="after="):
        FastV(after=keep)
    with pytest.raises(BudgetError, match="decoder_keep="):
        FlowCut(decoder_keep=keep)


@pytest.mark.parametrize("fields", [{"momentum": 1.0}, {"momentum": -0.1}, {"momentum": math.nan}, {"every": 0}])
def test_bad_flowcut_fields(fields):
    with pytest.raises(BudgetError, match=r"momentum=.*every="):
        FlowCut(**fields)


@pytest.mark.parametrize(
    "strategy",
    [
        FastV(layer=0),
        FastV(layer=4),
        FastV(layer=-1),
        FlowCut(decoder_keep=3, decoder_layer=3),
        FlowCut(decoder_keep=3, decoder_layer=-1),
    ],
    ids=repr,
)
def test_layers_outside_the_decoder(model, strategy):
    before = snapshot(model)
    with pytest.raises(BudgetError, match=r"layer=-?[0-9]"):
        vtprune.wrap(model, strategy)
    assert snapshot(model) == before


def test_a_budget_that_the_layers_before_the_cut_exceed(model):
    plain = generate(model)
    vtprune.wrap(model, "fastv", keep=12, layer=2)
    with pytest.raises(BudgetError, match=r"12 of 36 .*4 decoder layers.* first cut at layer 2: .*cost 18\.0.*at least 19"):
        generate(model)
    with pytest.raises(BudgetError):
        model(**inputs())
    vtprune.wrap(model, "fastv", keep=19, layer=2)
    generate(model)
    assert vtprune.report(model).equivalent_tokens == 19
    vtprune.unwrap(model)
    assert generate(model) == plain


@pytest.mark.parametrize(
    ("first", "second", "stage"),
    [
        (Uniform(), Random(), "select"),
        (FlowCut(), FlowCut(keep=8), "encode"),
        (FlowCut(decoder_keep=8), FastV(), "prefill"),
        (Evict(), Evict(), "decode"),
    ],
)
def test_two_strategies_that_claim_one_stage(first, second, stage):
    with pytest.raises(ValueError, match=f"both '{first.name}' and '{second.name}' claim the '{stage}' stage"):
        first + second


def test_two_strategies_that_claim_one_stage_by_name(model):
    with pytest.raises(ValueError, match="'select' stage"):
        vtprune.wrap(model, "uniform+random")


# ---------------------------------------------------------------------- models


def tiny_text(**kwargs) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, **kwargs})


@pytest.mark.parametrize("what", ["llama", "linear", "container"])
def test_models_of_no_supported_family(what):
    module = {
        "llama": lambda: LlamaForCausalLM(tiny_text()),
        "linear": lambda: nn.Linear(2, 2),
        "container": lambda: nn.ModuleList([nn.Linear(2, 2)]),
    }[what]()
    for call in (
        lambda: vtprune.wrap(module, "uniform"),
        lambda: vtprune.unwrap(module),
        lambda: vtprune.report(module),
        lambda: vtprune.pruning(module, "uniform").__enter__(),
    ):
        with pytest.raises(UnsupportedError) as caught:
            call()
        message = str(caught.value)
        assert type(module).__name__ in message
        assert "Supported: LLaVA (LlavaModel)" in message
        if what == "llama":
            assert "model_type 'llama'" in message


@pytest.mark.parametrize("thing", [None, "llava-hf/llava-1.5-7b-hf", LlavaForConditionalGeneration, {}])
def test_things_that_are_no_module(thing):
    with pytest.raises(UnsupportedError, match=f"loaded model .*found {type(thing).__name__}.*from_pretrained"):
        vtprune.wrap(thing, "uniform")


def llava_of(vision, layer=-2, text=None, attn="sdpa"):
    config = LlavaConfig(
        vision_config=vision,
        text_config=text or tiny_text(),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if vision.model_type == "siglip_vision_model" else "default",
    )
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attn).eval()


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SIX = {"image_size": 12, "patch_size": 2}


def tiny_inputs(patches: int = 36, size: int = 12) -> dict:
    torch.manual_seed(0)
    return {"input_ids": torch.tensor([[1, 5, *[IMAGE] * patches, 6, 7]]), "pixel_values": torch.randn(1, 3, size, size)}


def test_an_encoder_without_class_token():
    model = llava_of(SiglipVisionConfig(**VISION, **SIX))
    with pytest.raises(UnsupportedError, match=r"mustdrop needs cls .*'siglip_vision_model' does not have"):
        vtprune.wrap(model, "mustdrop", keep=9)
    with vtprune.pruning(model, "uniform", keep=9) as session:
        model(**tiny_inputs())
        assert len(session.report.samples[0].kept) == 9


def test_several_feature_layers():
    model = llava_of(CLIPVisionConfig(**VISION, **SIX), layer=[-2, -1])
    with pytest.raises(UnsupportedError, match=r"vision_feature_layer=\[-2, -1\].*another stage"):
        vtprune.wrap(model, "flowcut", keep=9)
    with vtprune.pruning(model, "uniform", keep=9) as session:
        model(**tiny_inputs())
        assert len(session.report.samples[0].kept) == 9


def test_another_feature_layer_in_the_call(model):
    vtprune.wrap(model, "flowcut", keep=9)
    with pytest.raises(UnsupportedError, match="vision_feature_layer=-3 differs"):
        model(**inputs(), vision_feature_layer=-3)
    model(**inputs(), vision_feature_layer=-2)
    assert len(vtprune.report(model).samples[0].kept) == 9


@contextmanager
def kernel(config, name: str):
    """`config` names an attention kernel that exists (sdpa under another name) and whose mask form nobody declared."""
    real, config._attn_implementation = config._attn_implementation, name
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        config._attn_implementation = real
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)


@pytest.mark.parametrize("name", ["uniform", "fastv"])
def test_an_attention_kernel_of_unknown_mask_form(model, name):
    plain = generate(model)
    vtprune.wrap(model, name, keep=20)
    with (
        kernel(model.model.language_model.config, "my_kernel"),
        pytest.raises(UnsupportedError, match=r"attention kernel 'my_kernel'.*attn_implementation='sdpa'"),
    ):
        generate(model)
    generate(model)
    vtprune.unwrap(model)
    assert generate(model) == plain


def test_an_attention_kernel_of_unknown_mask_form_in_the_encoder(model):
    vtprune.wrap(model, Ragged(keep=10))
    given = {**batch([prompt(4, "I", 5), prompt(4, "I", 3)]), "pixel_values": images(2)}
    with (
        kernel(model.model.vision_tower.config, "my_kernel"),
        pytest.raises(UnsupportedError, match=r"'my_kernel' in the vision encoder.*attn_implementation='sdpa'"),
    ):
        model(**given)
    model(**given)
    assert [len(s.kept) for s in vtprune.report(model).samples] == [9, 10]


# ---------------------------------------------------------------------- inputs


WAYS = {"forward": lambda m, given: m(**given), "generate": lambda m, given: m.generate(**given, max_new_tokens=3)}
each_way = pytest.mark.parametrize("way", sorted(WAYS))
each_strategy = pytest.mark.parametrize("name", ["uniform", "flowcut", "fastv", "evict"])


def fails_then_works(model, name: str, way: str, given: dict, match: str) -> None:
    plain = generate(model)
    fields = {"keep": 9, "layer": 1} if name == "fastv" else {"keep": 9}
    if name == "fastv":
        fields["keep"] = 20
    vtprune.wrap(model, name, **fields)
    fine = generate(model)
    with pytest.raises(ValueError, match=match):
        WAYS[way](model, given)
    assert generate(model) == fine
    vtprune.unwrap(model)
    assert generate(model) == plain


@each_way
@each_strategy
def test_placeholders_without_an_image(model, name, way):
    given = batch([prompt(4, "I", 5)])
    fails_then_works(model, name, way, given, "36 image placeholder tokens but no image was given")


@each_way
@each_strategy
def test_an_image_without_placeholders(model, name, way):
    given = {**batch([prompt(9)]), "pixel_values": images(1)}
    fails_then_works(model, name, way, given, r"(?i)(image features and image tokens do not match|0 image placeholder)")


@each_way
@each_strategy
@pytest.mark.parametrize("wrong", [-1, 1, TOKENS])
def test_a_wrong_number_of_placeholders(model, name, way, wrong):
    ids = torch.tensor([[1, 5, *[IMAGE] * (TOKENS + wrong), 6, 7]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(1)}
    match = f"(?i)(image features and image tokens do not match|{TOKENS + wrong} image placeholder)"
    fails_then_works(model, name, way, given, match)


@each_strategy
def test_an_image_spread_over_two_samples(model, name):
    ids = torch.full((2, 4 + TOKENS), 5)
    ids[0, 1 : 1 + TOKENS // 2] = IMAGE
    ids[1, 1 : 1 + TOKENS // 2] = IMAGE
    fails_then_works(model, name, "forward", {"input_ids": ids, "pixel_values": images(1)}, "spread over two samples")


def test_placeholders_without_an_image_as_embeddings(model):
    vtprune.wrap(model, "uniform", keep=9)
    embeds = model.get_input_embeddings()(torch.tensor([prompt(4, "I", 5)])).detach()
    with pytest.raises(UnsupportedError, match="36 image placeholder tokens but no image"):
        model(inputs_embeds=embeds)


def test_a_loss_that_labels_cannot_follow(model):
    """A loss put in place of the wrapped one, or a class that computes its own, would pair logits with the wrong labels."""
    vtprune.wrap(model, "uniform", keep=9)
    given, mine = inputs(), model.loss_function
    model.loss_function = model.loss_function.__wrapped__
    with pytest.raises(UnsupportedError, match=r"labels cannot follow the tokens .*unwrap the model"):
        model(**given, labels=given["input_ids"])
    model(**given)
    model.loss_function = mine
    model(**given, labels=given["input_ids"])


@pytest.mark.parametrize("name", ["uniform", "flowcut"])
def test_labels_of_text_alone(model, name):
    vtprune.wrap(model, name, keep=9)
    text = batch([prompt(8)])
    wrapped = model(**text, labels=text["input_ids"]).loss
    vtprune.unwrap(model)
    assert torch.equal(wrapped, model(**text, labels=text["input_ids"]).loss)


@each_strategy
def test_a_mask_of_four_dimensions(model, name):
    given = inputs()
    n = given["input_ids"].shape[1]
    given["attention_mask"] = torch.ones(1, 1, n, n).tril().log()
    fails_then_works(model, name, "forward", given, "4-D attention mask.*2-D padding mask")


def test_features_from_before_wrapping_and_a_strategy_of_the_encoder(model):
    given = inputs()
    features = model.model.get_image_features(pixel_values=given.pop("pixel_values"), return_dict=True)
    vtprune.wrap(model, "flowcut", keep=9)
    with pytest.raises(UnsupportedError, match=r"flowcut works inside the vision encoder.*Pass pixel_values"):
        model(**given, mm_encoder_outputs={"image": features})
    # a strategy of another stage takes them
    vtprune.wrap(model, "uniform", keep=9)
    model(**given, mm_encoder_outputs={"image": features})
    assert len(vtprune.report(model).samples[0].kept) == 9


@preencoding
def test_chunked_prefill_and_a_strategy_of_the_encoder(model):
    plain = generate(model)
    vtprune.wrap(model, "flowcut", keep=9)
    fine = generate(model)
    with pytest.raises(UnsupportedError, match="chunked prefill"):
        generate(model, prefill_chunk_size=16)
    assert generate(model) == fine
    vtprune.unwrap(model)
    assert generate(model) == plain


@pytest.mark.parametrize("name", ["uniform", "fastv", "evict"])
def test_chunked_prefill_is_refused_or_right(model, name):
    """Whatever is made of it, it may not silently be another budget."""
    fields = {"keep": 20, "layer": 1} if name == "fastv" else {"keep": 9}
    vtprune.wrap(model, name, **fields)
    fine = generate(model)
    kept = vtprune.report(model).to_dict()["samples"]
    try:
        chunked = generate(model, prefill_chunk_size=16)
    except UnsupportedError:
        return
    assert chunked == fine
    assert vtprune.report(model).to_dict()["samples"] == kept


@pytest.mark.parametrize("name", ["uniform", "flowcut", "fastv", "evict"])
def test_a_prompt_of_text_alone_is_untouched(model, name):
    given = batch([prompt(12), prompt(5)])
    plain, logits = generate(model, given), model(**given).logits
    vtprune.wrap(model, name, keep=20 if name == "fastv" else 9)
    assert torch.equal(model(**given).logits, logits)
    assert generate(model, given) == plain
    assert generate(model, given, num_beams=2)
    with pytest.raises(RuntimeError, match="no report yet"):
        vtprune.report(model)


# ---------------------------------------------------------------------- caches

CACHES = ["static", "offloaded", "offloaded_static"]


@pytest.mark.parametrize("kind", CACHES)
@each_strategy
def test_caches_that_cannot_hold_a_length_per_layer(model, name, kind, monkeypatch):
    # without a GPU there are no streams to make; the cache is refused before it would use one
    monkeypatch.setattr(torch, "Stream", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    plain = generate(model)
    vtprune.wrap(model, name, keep=20 if name == "fastv" else 9)
    fine = generate(model)
    with pytest.raises(UnsupportedError, match=r"Cache.* cannot hold a different number of tokens.*transformers\.DynamicCache"):
        generate(model, cache_implementation=kind)
    # and the one that is named works
    assert generate(model, past_key_values=DynamicCache(config=model.config.text_config)) == fine
    assert generate(model, past_key_values=DynamicCache()) == fine
    vtprune.unwrap(model)
    assert generate(model) == plain


def test_a_cache_of_unknown_layers(model):
    class SqueezedLayer(DynamicLayer):
        """Stands for quantized layers, whose packages are not here."""

    vtprune.wrap(model, "uniform", keep=9)
    with pytest.raises(UnsupportedError, match=r"a Cache \(SqueezedLayer\) cannot hold .*DynamicCache"):
        generate(model, past_key_values=Cache(layers=[SqueezedLayer() for _ in range(4)]))


def test_any_cache_will_do_while_all_is_kept(model):
    plain = generate(model, cache_implementation="static")
    vtprune.wrap(model, "uniform", keep=1.0)
    assert generate(model, cache_implementation="static") == plain


@pytest.mark.parametrize("name", ["uniform", "fastv", "evict", "flowcut"])
def test_a_pruned_cache_after_unwrap(model, name):
    cache = DynamicCache(config=model.config.text_config)
    vtprune.wrap(model, name, keep=20 if name == "fastv" else 9)
    given = inputs()
    model(**given, past_key_values=cache, use_cache=True)
    vtprune.unwrap(model)
    follow = torch.tensor([[7]])
    with pytest.raises(UnsupportedError, match=r"filled by a pruned model .*not wrapped.*Wrap the model again"):
        model(input_ids=follow, past_key_values=cache, use_cache=True)
    with pytest.raises(UnsupportedError, match="filled by a pruned model"):
        model.generate(
            input_ids=torch.cat([given["input_ids"], follow], 1), past_key_values=cache, max_new_tokens=2, do_sample=False
        )


@pytest.mark.parametrize("name", ["uniform", "fastv", "evict", "flowcut"])
def test_cropping_a_pruned_cache(model, name):
    cache = DynamicCache(config=model.config.text_config)
    vtprune.wrap(model, name, keep=20 if name == "fastv" else 9)
    given = inputs(4, "I", 5)
    fed = given["input_ids"].shape[1]
    model(**given, past_key_values=cache, use_cache=True)
    for token in (7, 8, 9):
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == fed + 3
    held = [layer.keys.clone() for layer in cache.layers]
    # what came after the images can go
    cache.crop(-2)
    assert cache.get_seq_length() == fed + 1
    assert all(torch.equal(layer.keys, old[:, :, :-2]) for layer, old in zip(cache.layers, held, strict=True))
    with pytest.raises(UnsupportedError, match=r"cannot remove the last .*pruned cache"):
        cache.crop(-(fed - 3))


# ---------------------------------------------------------------------- exceptions in the middle


class Boom(Exception):
    """Nobody else raises this."""


@pytest.mark.parametrize("name", ["uniform", "flowcut", "fastv", "evict", "flowcut+fastv+evict"])
@pytest.mark.parametrize("where", ["prefill", "decode", "encoder", "head"])
def test_an_exception_in_the_middle_of_generate(model, name, where):
    plain, before = generate(model), snapshot(model)
    fields = {"keep": 20} if name == "fastv" else {"keep": 9}
    if "+" in name:
        fields = {"keep": 20, "fastv.keep": 15, "evict.keep": 5}
    vtprune.wrap(model, name, **fields)
    fine, again = generate(model), snapshot(model)
    victim, nth = {
        "prefill": (model.model.language_model.layers[2], 1),
        "decode": (model.model.language_model.layers[2], 3),
        "encoder": (vision_blocks(model)[3], 1),
        "head": (model.lm_head, 2),
    }[where]
    calls = 0

    def explode(*_):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Boom

    hook = victim.register_forward_hook(explode)
    with pytest.raises(Boom):
        generate(model)
    hook.remove()
    assert snapshot(model) == again
    assert generate(model) == fine
    vtprune.unwrap(model)
    assert snapshot(model) == before
    assert generate(model) == plain


@pytest.mark.parametrize("stage", ["encode", "select", "prefill", "decode"])
def test_an_exception_in_the_strategy(model, stage):
    plain = generate(model)
    vtprune.wrap(model, Broken(stage, lambda view: 1 / 0))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            generate(model)
    vtprune.unwrap(model)
    assert generate(model) == plain


def test_pruning_as_a_context_unwraps_after_an_exception(model):
    before, plain = snapshot(model), generate(model)
    with pytest.raises(Boom), vtprune.pruning(model, "flowcut", keep=9):
        generate(model)
        raise Boom
    assert snapshot(model) == before
    assert generate(model) == plain


def test_a_wrap_that_fails_keeps_the_one_before(model):
    vtprune.wrap(model, "uniform", keep=9)
    fine, before = generate(model), snapshot(model)
    for bad in (lambda: vtprune.wrap(model, "nothing"), lambda: vtprune.wrap(model, "uniform", keep=0)):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(BudgetError):
        vtprune.wrap(model, FastV(layer=99))
    assert snapshot(model) == before
    assert generate(model) == fine


# ---------------------------------------------------------------------- strategies that misbehave


class Broken(vtprune.Pruner):
    """Claims one stage and answers with whatever `reply` makes of the view."""

    name = "broken"

    def __init__(self, stage: str, reply, keep=9):
        self.stage, self.reply, self.keep = stage, reply, keep

    def stages(self):
        return (self.stage,)

    def settings(self):
        return {"name": self.name, "keep": self.keep}

    def encode_needs(self, encoder):
        return {1: Needs()}

    def prefill_needs(self, depth):
        return {1: Needs()}

    def decode_needs(self, depth):
        return {0: Needs(), depth - 1: Needs()}

    def encode(self, view):
        return self.reply(view)

    select = prefill = decode = encode


class Ragged(Broken):
    """Another number of patches for each image."""

    def __init__(self, keep):
        super().__init__("encode", lambda view: Keep([torch.arange(9 + i) for i in range(len(view.index))]), keep)


BAD_INDICES = {
    "repeated": (lambda v: [[0, 1, 1]], "repeat"),
    "too large": (lambda v: [[0, v.tokens]], "0 .. 35"),
    "negative": (lambda v: [[-1, 3]], "0 .. 35"),
    "empty": (lambda v: torch.zeros(1, 0, dtype=torch.long), "kept no token"),
    "int32": (lambda v: torch.tensor([[0, 1]], dtype=torch.int32), "int64"),
    "float": (lambda v: torch.tensor([[0.0, 1.0]]), "int64"),
    "a mask": (lambda v: torch.ones(1, v.tokens, dtype=torch.bool), "int64"),
    "no batch": (lambda v: torch.arange(5), "5 of 1 items"),
    "too many items": (lambda v: torch.arange(6).view(2, 3), "2 of 1 items"),
    "too many dimensions": (lambda v: torch.zeros(1, 2, 2, dtype=torch.long), "1-D int64"),
}


@pytest.mark.parametrize("stage", ["encode", "select", "prefill", "decode"])
@pytest.mark.parametrize("bad", BAD_INDICES)
def test_bad_indices(model, stage, bad):
    make, match = BAD_INDICES[bad]

    def reply(view):
        indices = make(view)
        return Keep(indices if isinstance(indices, torch.Tensor) else torch.tensor(indices))

    vtprune.wrap(model, Broken(stage, reply))
    if bad == "empty" and stage in ("prefill", "decode"):
        generate(model)  # inside the decoder all may leave
        assert min(len(layer) for layer in vtprune.report(model).samples[0].cached) == 0
        return
    with pytest.raises(VtpruneError, match=rf"broken\.{stage}.*{re.escape(match)}"):
        model(**inputs(), use_cache=True)


@pytest.mark.parametrize("stage", ["encode", "select", "prefill"])
def test_vectors_for_other_tokens_than_the_kept(model, stage):
    vtprune.wrap(model, Broken(stage, lambda view: Keep(torch.tensor([[0, 1, 2]]), hidden=torch.zeros(1, 2, 32))))
    with pytest.raises(VtpruneError, match="2 vectors for 3 kept tokens"):
        generate(model)


@pytest.mark.parametrize("stage", ["encode", "select", "prefill", "decode"])
@pytest.mark.parametrize("reply", [lambda view: view.index, lambda view: [0, 1], lambda view: 5], ids=["tensor", "list", "int"])
def test_an_answer_that_is_no_keep(model, stage, reply):
    vtprune.wrap(model, Broken(stage, reply))
    with pytest.raises(VtpruneError, match=rf"broken\.{stage}.*Keep"):
        generate(model)


@pytest.mark.parametrize("stage", ["encode", "select", "prefill", "decode"])
@pytest.mark.parametrize("lazy", ["none", "all"])
@pytest.mark.parametrize("way", ["generate", "cached", "uncached"])
def test_a_strategy_that_prunes_nothing(model, stage, lazy, way):
    vtprune.wrap(model, Broken(stage, lambda view: None if lazy == "none" else Keep(view.index)))
    run = {
        "generate": lambda: generate(model),
        "cached": lambda: model(**inputs(), use_cache=True),
        "uncached": lambda: model(**inputs(), use_cache=False),
    }[way]
    with pytest.raises(NothingPrunedError, match=r"broken\(keep=9\) was asked to prune 36 visual tokens and dropped none"):
        run()


def test_eviction_without_a_cache_to_evict_from(model):
    vtprune.wrap(model, "evict", keep=9)
    with pytest.raises(NothingPrunedError, match=r"Without a cache \(use_cache=False\) the decode stage has nothing to cut"):
        model(**inputs(), use_cache=False)


def test_a_strategy_that_prunes_one_sample_of_two(model):
    def reply(view):
        return Keep([torch.arange(9), torch.arange(view.tokens)])

    vtprune.wrap(model, Broken("select", reply))
    given = {**batch([prompt(4, "I", 5), prompt(4, "I", 3)]), "pixel_values": images(2)}
    with pytest.raises(NothingPrunedError):
        generate(model, given)


# ---------------------------------------------------------------------- reports, budgets above the image


def test_a_report_before_any_call(model):
    vtprune.wrap(model, "uniform", keep=9)
    with pytest.raises(RuntimeError, match="no report yet: run generate"):
        vtprune.report(model)
    with vtprune.pruning(model, "flowcut", keep=9) as session, pytest.raises(RuntimeError, match="no report yet"):
        session.report


def test_what_is_not_wrapped(model):
    for call in (vtprune.unwrap, vtprune.report):
        with pytest.raises(UnsupportedError, match=r"LlavaForConditionalGeneration is not wrapped; call vtprune\.wrap"):
            call(model)
    vtprune.wrap(model, "uniform")
    vtprune.unwrap(model)
    with pytest.raises(UnsupportedError, match="not wrapped"):
        vtprune.unwrap(model)


@pytest.mark.parametrize("name", ["uniform", "random", "flowcut", "fastv", "evict"])
def test_a_budget_above_the_image_keeps_all_and_says_so_once(model, name):
    plain = generate(model)
    vtprune.wrap(model, name, keep=TOKENS + 1)
    with pytest.warns(UserWarning, match=f"{name}: keep=37 exceeds an image's 36 visual tokens; all of them are kept"):
        assert generate(model) == plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model) == plain
    report = vtprune.report(model)
    assert len(report.notes) == 1 and report.notes[0].startswith(f"{name}: keep=37")
    assert report.notes[0] in str(report) and report.to_dict()["notes"] == report.notes
    assert report.samples[0].kept.tolist() == list(range(TOKENS))


def test_a_budget_of_exactly_the_image_is_no_surprise(model):
    vtprune.wrap(model, "uniform", keep=TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model)
    assert vtprune.report(model).notes == []
