"""What people do to a loaded model before, while and after it is wrapped: devices, dtypes, compilers, copies, pipelines."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from functools import lru_cache

import pytest
import torch
from models import TOKENS, batch, images, preencoding, prompt, tiny_llava
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM, TextIteratorStreamer, pipeline
from transformers.cache_utils import DynamicCache

import vtprune
from vtprune import embedded

COMPOSED = "flowcut+fastv+evict"
FIELDS = {"flowcut.keep": 20, "fastv.keep": 14, "fastv.layer": 1, "evict.keep": 5}
PROMPTS = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6)]
PIXELS = images(3, seed=2)


def wrapped(**options):
    return vtprune.wrap(tiny_llava(**options), COMPOSED, **FIELDS)


def generate(model, rows=(0, 1), **options) -> torch.Tensor:
    pixels = {(0,): PIXELS[:1], (1,): PIXELS[1:], (0, 1): PIXELS}[tuple(rows)].to(model.dtype)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**batch([PROMPTS[row] for row in rows]), pixel_values=pixels, **options)


@lru_cache
def expected(strategy: bool = True) -> torch.Tensor:
    return generate(wrapped() if strategy else tiny_llava())


# ---------------------------------------------------------------------------------------- budgets per image


BUDGETED = {
    "uniform": {},
    "divprune": {},
    "todre": {},
    "flowcut": {},
    "visionzip": {},
    "fastv": {"layer": 1},
    "pyramiddrop": {},
    "sparsevlm": {},
    "psigmoid": {},
    "evict": {},
    "flowcut+fastv+evict": {"layer": 1},
}


@pytest.mark.parametrize("strategy", BUDGETED)
@pytest.mark.parametrize("keep", [[14, 25], (0.5, 20)], ids=str)
def test_a_budget_for_each_image_of_a_prompt(strategy, keep):
    """In the order of the prompt, in every row; text alone among them is left alone. Spent as a single number is."""
    model, prompts = tiny_llava(), [prompt(2, "I", 5, "I", 3), prompt(9), prompt(4, "I", 3, "I", 6)]
    pixels = images(4, seed=5)
    pruner = vtprune.create(strategy, keep=keep, **BUDGETED[strategy])
    counts = [round(k * TOKENS) if isinstance(k, float) else k for k in keep]
    with torch.no_grad(), vtprune.pruning(model, pruner) as session:
        model(**batch(prompts), pixel_values=pixels)
    for sample in (session.report.samples[0], session.report.samples[2]):
        if "prefill" not in pruner.stages():
            left = sample.cached[0] if strategy == "evict" else sample.kept
            per_image = [int((left < TOKENS).sum()), int((left >= TOKENS).sum())]
            assert len(left) == sum(counts) and (strategy == "evict" or per_image == counts)
        if strategy != "evict":
            assert abs(sample.equivalent_tokens - sum(counts)) <= 0.5
    assert session.report.samples[1].visual_tokens == 0


def test_equal_budgets_are_one_budget():
    model, pixels = tiny_llava(), images(2, seed=5)
    given = {**batch([prompt(2, "I", 5, "I", 3)]), "pixel_values": pixels}
    logits = []
    for keep in (14, [14, 14]):
        with torch.no_grad(), vtprune.pruning(model, COMPOSED, keep=keep, layer=1):
            logits.append(model(**given).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("strategy", ["flowcut", "uniform", "fastv"])
@pytest.mark.parametrize("keep", [[24, 25, 30], [24]], ids=str)
def test_budgets_for_other_numbers_of_images(strategy, keep):
    model = tiny_llava()
    given = {**batch([prompt(2, "I", 5, "I", 3)]), "pixel_values": images(2)}
    with vtprune.pruning(model, strategy, keep=keep):
        with pytest.raises(vtprune.BudgetError, match=rf"budgets for {len(keep)} images.* 2 .*as many budgets as every prompt"):
            model(**given)
        if len(keep) == 1:
            model(**batch([prompt(2, "I", 5)]), pixel_values=PIXELS[:1])


def test_budgets_that_cannot_be_told_apart():
    with pytest.raises(vtprune.BudgetError, match=r"2 and for 3 images"):
        vtprune.wrap(tiny_llava(), "flowcut+fastv", **{"flowcut.keep": [20, 20], "fastv.keep": [14, 14, 14]})
    model = vtprune.wrap(tiny_llava(), "resolution", keep=[16, 25])
    with pytest.raises(vtprune.BudgetError, match="one size"):
        model(**batch([prompt(2, "I", 5, "I", 3)]), pixel_values=images(2))


def test_budgets_beside_a_video_and_strategies_inside_the_encoder():
    from test_videos import fed, inputs_of, model_of

    model = model_of("video-llava")
    given = fed("video-llava", *inputs_of("video-llava", [[2, "A", 3, "A", 1, "V", 4]]))
    pruner = vtprune.FlowCut(keep=[12, 30], decoder_keep=[6, 20])
    with vtprune.pruning(model, pruner), pytest.raises(vtprune.BudgetError, match="sees no videos"):
        model(**given)


def test_budgets_of_tiles_and_mixed_modalities():
    """A tiled picture's share of its own budget; a picture and a video each with theirs, in the order of the prompt."""
    from test_families import fed as tiled_fed
    from test_families import inputs_of as tiled_inputs
    from test_families import model_of as tiled_model
    from test_videos import fed, inputs_of, model_of

    model, given = tiled_model("next", "sdpa"), tiled_fed(*tiled_inputs("next", [[2, "A", 5, "B", 3]]))
    with torch.no_grad(), vtprune.pruning(model, "flowcut", keep=[21, 33]) as session:
        model(**given)
    sample = session.report.samples[0]
    first = sample.images[0]
    # a tile keeps its share; what unpadding discards of them is lost
    assert 0.5 * 21 < int((sample.kept < first).sum()) <= 21 and 0.5 * 33 < int((sample.kept >= first).sum()) <= 33
    model = model_of("onevision")
    given = fed("onevision", *inputs_of("onevision", [[2, "V", 3, "A", 4], [1, "A", 2, "V", 6]]))
    with torch.no_grad(), vtprune.pruning(model, "divprune", keep=[9, 17]) as session:
        model(**given)
    for sample in session.report.samples:
        assert [int((sample.kept < sample.images[0]).sum()), int((sample.kept >= sample.images[0]).sum())] == [9, 17]


# ---------------------------------------------------------------------------------------- decoding


def test_sampling_with_everything_kept_is_the_bare_models():
    outs = []
    model = tiny_llava()
    for keep in (None, 1.0):
        torch.manual_seed(7)
        if keep is None:
            outs.append(generate(model, do_sample=True, temperature=1.5, num_return_sequences=2))
        else:
            with vtprune.pruning(model, "flowcut+fastv", keep=keep):
                outs.append(generate(model, do_sample=True, temperature=1.5, num_return_sequences=2))
    assert torch.equal(*outs)


@preencoding
@pytest.mark.parametrize("strategy", ["fastv", "todre", COMPOSED])
@pytest.mark.parametrize("assistant", ["lookup", "language model", "bare twin"])
def test_assisted_decoding_equals_greedy(strategy, assistant):
    """Drafts are verified by the pruned model, which decided by the prompt alone; rejected ones leave the cache again."""
    model = tiny_llava()
    if assistant == "lookup":
        options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    elif assistant == "bare twin":
        options = {"assistant_model": tiny_llava()}
    else:
        draft = LlamaForCausalLM(model.config.text_config).eval()
        draft.generation_config.pad_token_id, draft.generation_config.eos_token_id = 0, None
        options = {"assistant_model": draft}
    # the last tokens stand in the prompt before: a draft is made at once
    ids = [*PROMPTS[1], 11, 12, 13, 11]
    given = {**batch([ids]), "pixel_values": PIXELS[1:], "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    fields = FIELDS if strategy == COMPOSED else {"keep": 24}
    with vtprune.pruning(model, strategy, **fields) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        greedy = model.generate(**given)
        layers = session.report.to_dict()["samples"]
        drafted = []
        handle = model.register_forward_pre_hook(lambda m, args, kw: drafted.append(kw["input_ids"].shape[1]), with_kwargs=True)
        cache = DynamicCache(config=model.config.text_config)
        assisted = model.generate(**given, **options, past_key_values=cache)
        handle.remove()
        assert session.report.to_dict()["samples"] == layers
    assert torch.equal(assisted, greedy)
    assert drafted[0] == len(ids) and max(drafted[1:]) > 1
    assert "get_candidates" not in vars(model)


@preencoding
def test_a_wrapped_model_cannot_assist():
    """It would be asked about placeholders without their pictures."""
    model = wrapped()
    with pytest.raises(vtprune.UnsupportedError, match="placeholder tokens but no image was given"):
        generate(model, (0,), assistant_model=wrapped())


def test_drafts_from_hidden_states_are_refused(monkeypatch):
    class Heads:
        requires_model_outputs = True

    monkeypatch.setattr(type(tiny_llava()), "_get_candidate_generator", lambda self, *args, **kwargs: Heads())
    model = wrapped()
    with pytest.raises(vtprune.UnsupportedError, match=r"Heads: its drafts are made from the model's hidden states"):
        generate(model, (0,), prompt_lookup_num_tokens=3)


# ---------------------------------------------------------------------------------------- threads


class Plain:
    """A tokenizer that writes token numbers."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def test_streaming_while_other_threads_run_the_same_model():
    """Calls do not see each other: each thread's tokens are those that it gets alone."""
    model = wrapped()
    alone = {rows: generate(model, rows, max_new_tokens=12)[0, -12:].tolist() for rows in ((0,), (1,))}
    streamer, others = TextIteratorStreamer(Plain(), skip_prompt=True), []

    def stream():
        generate(model, (0,), max_new_tokens=12, streamer=streamer)

    def beside():
        for _ in range(3):
            others.append(generate(model, (1,), max_new_tokens=12)[0, -12:].tolist())

    threads = [threading.Thread(target=stream), *(threading.Thread(target=beside) for _ in range(2))]
    for thread in threads:
        thread.start()
    said = [int(word) for word in "".join(streamer).split()]
    for thread in threads:
        thread.join()
    assert said == alone[0,] and others == [alone[1,]] * 6


def test_unwrapping_under_a_running_generate_is_loud():
    """The cache that was begun pruned refuses to go on bare; nothing wrong is ever said."""
    model = wrapped()

    class Unwrap:
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 3:
                vtprune.unwrap(model)

        def end(self): ...

    with pytest.raises(vtprune.UnsupportedError, match=r"filled by a pruned model .*not wrapped"):
        generate(model, (0,), streamer=Unwrap())
    assert torch.equal(generate(model), expected(False))


# ---------------------------------------------------------------------------------------- compilers


COMPILED = {
    "decoder": lambda m: setattr(m.model, "language_model", torch.compile(m.model.language_model, backend="eager")),
    "base": lambda m: setattr(m, "model", torch.compile(m.model, backend="eager")),
    "forward": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")),
    "compile()": lambda m: m.model.language_model.compile(backend="eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("order", ["wrapped first", "compiled first"])
def test_compiled(what, order):
    """Hooks break the graph where shapes depend on data; what runs is the same."""
    torch._dynamo.reset()
    model = tiny_llava()
    if order == "compiled first":
        COMPILED[what](model)
    vtprune.wrap(model, COMPOSED, **FIELDS)
    if order == "wrapped first":
        COMPILED[what](model)
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    assert torch.equal(generate(model, (0,), **options), generate(wrapped(), (0,), **options))
    vtprune.unwrap(model)
    assert torch.equal(generate(model, (0,), **options), generate(tiny_llava(), (0,), **options))


# ---------------------------------------------------------------------------------------- devices


def dispatched(model, how: str, folder) -> None:
    import accelerate

    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        parts += [f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb")]
        places = dict.fromkeys(parts, "cpu") | {f"model.language_model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "device map"])
@pytest.mark.parametrize("order", ["wrapped first", "dispatched first"])
def test_weights_that_are_elsewhere(how, order, tmp_path):
    """accelerate fetches weights inside `forward`, vtprune's hooks come before and after it, whichever was put on first."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_llava()
    if order == "dispatched first":
        dispatched(model, how, tmp_path)
    vtprune.wrap(model, COMPOSED, **FIELDS)
    if order == "wrapped first":
        dispatched(model, how, tmp_path)
    assert torch.equal(generate(model), expected())
    assert vtprune.report(model).equivalent_tokens == 14 * 1.5
    vtprune.unwrap(model)
    assert torch.equal(generate(model), expected(False))
    hooks.remove_hook_from_submodules(model)
    assert not any("vtprune" in type(value).__module__ for m in model.modules() for value in vars(m).values())


@pytest.mark.parametrize("how", ["disk", "device map"])
def test_an_offloaded_model_is_still_known(how, tmp_path):
    """What was fitted to a model is told from other models by norm weights, wherever they are kept."""
    from vtprune.engine.identity import identify

    pytest.importorskip("accelerate")
    model = tiny_llava()
    before = identify(model)
    dispatched(model, how, tmp_path)
    assert identify(model).fingerprint == before.fingerprint


# ---------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision_before_and_after_wrapping(dtype, attn):
    later, sooner = wrapped(attn=attn).to(dtype), vtprune.wrap(tiny_llava(attn).to(dtype), COMPOSED, **FIELDS)
    first = generate(later)
    assert torch.equal(first, generate(sooner))
    report = vtprune.report(later)
    assert report.equivalent_tokens == 14 * 1.5 and report.kv_bytes == vtprune.report(sooner).kv_bytes
    later.float()
    assert vtprune.unwrap(later).dtype == torch.float32


def quantised(kind: str, folder):
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        model = tiny_llava()
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    tiny_llava().save_pretrained(folder)
    options = {"load_in_8bit": True} if kind == "8 bits" else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    loaded = LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    loaded.generation_config = tiny_llava().generation_config
    return loaded


@pytest.mark.parametrize("kind", ["torchao", "4 bits", "8 bits"])
def test_quantised_weights(kind, tmp_path):
    model = quantised(kind, tmp_path)
    bare = generate(model)
    with vtprune.pruning(model, COMPOSED, **FIELDS) as session:
        pruned = generate(model)
        assert session.report.equivalent_tokens == 14 * 1.5
        singles = [generate(model, (0,))[:, -6:], generate(model, (1,))[:, -6:]]
    assert pruned.shape == bare.shape and torch.equal(pruned[:, -6:], torch.cat(singles))
    assert torch.equal(generate(model), bare)


# ---------------------------------------------------------------------------------------- files and copies


def test_saving_a_wrapped_model_writes_the_bare_one(tmp_path):
    model = tiny_llava()
    model.save_pretrained(tmp_path / "bare")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    vtprune.wrap(model, COMPOSED, **FIELDS)
    generate(model)
    model.save_pretrained(tmp_path / "wrapped")
    files = sorted(path.name for path in (tmp_path / "bare").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "wrapped").iterdir())
    for name in files:
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_a_wrapped_model_of_its_own(way):
    model = wrapped()
    if way == "deepcopy":
        generate(model)
        twin = copy.deepcopy(model)
    elif way == "pickle":  # before its first run, after which transformers' own hooks cannot be pickled
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match="no report yet"):
        vtprune.report(twin)
    assert torch.equal(generate(twin), expected())
    mine, its = model.model._vtprune_session, twin.model._vtprune_session
    assert mine is not its and its.site.base is twin.model and mine.site.base is model.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # whatever happens to the original
    vtprune.unwrap(model)
    assert torch.equal(generate(twin), expected())
    assert vtprune.report(twin).equivalent_tokens == 14 * 1.5
    vtprune.unwrap(twin)
    assert torch.equal(generate(twin), expected(False))


# ---------------------------------------------------------------------------------------- pipelines


def test_pipeline():
    """transformers' own pipeline on a wrapped model: text, pictures, batches, and features of its processor."""
    model = AutoModelForImageTextToText.from_pretrained(embedded.tiny_model()).eval()
    processor = AutoProcessor.from_pretrained(embedded.tiny_model())
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    shown = [Image.open(path).convert("RGB") for path in list(embedded.pictures().values())[:2]]
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": one}, {"type": "text", "text": "How many objects are there?"}],
            }
        ]
        for one in shown
    ]
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    bare = [ask(text=chat, **options) for chat in chats]
    with vtprune.pruning(model, "flowcut", keep=1.0) as session:
        assert [ask(text=chat, **options) for chat in chats] == bare
    with vtprune.pruning(model, "flowcut", keep=32) as session:
        answers = [ask(text=chat, **options) for chat in chats]
        assert [len(s.kept) for s in session.report.samples] == [32]
        together = ask(text=chats, batch_size=2, **options)
        assert [len(s.kept) for s in session.report.samples] == [32, 32]
    assert [a[0]["generated_text"] for a in answers] == [a[0]["generated_text"] for a in together]
