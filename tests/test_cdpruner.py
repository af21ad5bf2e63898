"""CDPruner and its relevance: the conditional kernel, the default by text embeddings, and CLIP's."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import TOKENS, batch, images, prompt, tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel

import vtprune
from vtprune.embedded import tiny_model
from vtprune.pruner import BudgetError, Encoder, EncodeView, Needs, SelectView, UnsupportedError, budget_tokens
from vtprune.relevance import ClipRelevance
from vtprune.strategies.cdpruner import PATCHES, CDPruner, likeness, scaled

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def view_of(features: torch.Tensor, text=None, ids=None, **carry: torch.Tensor) -> SelectView:
    count, tokens, width = features.shape
    index = torch.arange(tokens).expand(count, -1)
    return SelectView(
        index,
        (tokens,),
        carry,
        features=features,
        ordinal=torch.zeros(count, dtype=torch.long),
        text=[torch.zeros(0, width)] * count if text is None else text,
        ids=[torch.arange(3)] * count if ids is None else ids,
    )


def slow(x: torch.Tensor, r: torch.Tensor, k: int, theta: float = 0.0) -> list[int]:
    """Greedy by determinants of diag(r) S diag(r), in float64."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    r = r.double()
    r = (r - r.min() + 1e-6) / (r.max() - r.min())
    if theta:
        r = torch.exp(theta / (2 * (1 - theta)) * r)
    kernel = r[:, None] * (unit @ unit.T) * r
    taken: list[int] = []
    while len(taken) < k:
        left = [i for i in range(len(x)) if i not in taken]
        taken.append(max(left, key=lambda i: float(torch.linalg.det(kernel[[*taken, i]][:, [*taken, i]]))))
    return sorted(taken)


# ---------------------------------------------------------------------- the strategy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("theta", [None, 0.5, 0.9])
def test_against_determinants(dtype, theta):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 20, 12, generator=generator).to(dtype)
    text = [torch.randn(5, 12, generator=generator).to(dtype), torch.randn(2, 12, generator=generator).to(dtype)]
    kept = CDPruner(keep=8, theta=theta).select(view_of(features, text)).indices.tolist()
    expected = []
    for x, words in zip(features.double(), text, strict=True):
        mean = words.double().mean(0)
        cosine = torch.tensor([float(v @ mean) / float(v.norm() * mean.norm()) for v in x], dtype=torch.float64)
        expected.append(slow(x, cosine, 8, theta or 0.0))
    assert kept == expected


def test_a_callable_gives_the_relevance():
    features, patches = torch.randn(2, 15, 6), torch.randn(2, 15, 4)
    ids = [torch.tensor([3, 1]), torch.tensor([2])]
    asked = []

    def relevance(patch, words):
        asked.append((patch, words))
        return patch[:, 0] * words.sum()

    strategy = CDPruner(keep=5, relevance=relevance)
    kept = strategy.select(view_of(features, ids=ids, **{PATCHES: patches})).indices.tolist()
    assert kept == [slow(features[b], patches[b, :, 0], 5) for b in range(2)]
    assert all(torch.equal(p, patches[b]) and torch.equal(w, ids[b]) for b, (p, w) in enumerate(asked))
    assert strategy.stages() == ("encode", "select")
    assert strategy.encode_needs(Encoder(5, 6, cls=True)) == {4: Needs()}


def test_the_feature_block_is_carried_only_where_it_is_needed():
    index = torch.arange(9).expand(2, -1)
    view = EncodeView(index, (9,), {}, layer=4, depth=5, hidden=torch.randn(2, 9, 4))
    assert CDPruner(keep=9, relevance=max).encode(view) is None
    assert view.carry == {}
    assert CDPruner(keep=8, relevance=max).encode(view) is None
    assert torch.equal(view.carry[PATCHES], view.hidden)


def test_scaled():
    r = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [math.nan, 1.0, 2.0], [math.nan] * 3, [math.inf, 0.0, 1.0]])
    low, high = 5e-7, 1 + 5e-7
    expected = [[low, high, 0.5 + 5e-7], [1, 1, 1], [1e-6, 1e-6, 1 + 1e-6], [1, 1, 1], [1e-6, 1e-6, 1 + 1e-6]]
    torch.testing.assert_close(scaled(r), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)


def test_no_text_means_equal_relevance():
    features = torch.randn(1, 12, 5)
    flat = torch.full((1, 12), 0.3)
    bare = CDPruner(keep=4).select(view_of(features)).indices
    assert torch.equal(scaled(likeness(features, [torch.zeros(0, 5)])), torch.ones(1, 12, dtype=torch.float64))
    given_flat = CDPruner(keep=4, relevance=lambda p, i: flat[0]).select(view_of(features, **{PATCHES: features})).indices
    no_ids = [torch.zeros(0, dtype=torch.long)]
    # the callable is not asked about nothing
    unasked = CDPruner(keep=4, relevance=pytest.fail).select(view_of(features, ids=no_ids, **{PATCHES: features})).indices
    assert torch.equal(bare, given_flat) and torch.equal(bare, unasked)


def test_what_a_relevance_cannot_work_with_is_refused():
    features = torch.randn(1, 12, 5)
    strategy = CDPruner(keep=4, relevance=lambda patches, ids: patches)
    with pytest.raises(UnsupportedError, match="pixel_values"):
        strategy.select(view_of(features))
    with pytest.raises(UnsupportedError, match="input_ids"):
        strategy.select(view_of(features, ids=[], **{PATCHES: features}))
    with pytest.raises(UnsupportedError, match=r"\(12, 5\) for 12 tokens"):
        strategy.select(view_of(features, **{PATCHES: features}))
    for fields in ({"relevance": "clip"}, {"theta": 1.0}, {"theta": -0.1}, {"theta": math.nan}, {"keep": 0}):
        with pytest.raises(BudgetError):
            CDPruner(**fields)


@quick
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.one_of(st.integers(1, 25), st.floats(0.01, 1.0)),
    st.sampled_from([0.0, 1.0, math.nan, None]),
    st.integers(0, 2),
)
def test_exact_budget(count, tokens, keep, constant, words):
    features = torch.randn(count, tokens, 5) if constant is None else torch.full((count, tokens, 5), constant)
    text = [torch.randn(words, 5)] * count
    chosen, k = CDPruner(keep=keep).select(view_of(features.bfloat16(), text)), budget_tokens(keep, tokens)
    if k == tokens:
        assert chosen is None
        return
    for row in chosen.indices.tolist():
        assert row == sorted(set(row)) and len(row) == k and row[0] >= 0 and row[-1] < tokens
        assert constant is None or row == list(range(k))


def test_settings_are_json_ready():
    assert CDPruner().settings() == {"name": "cdpruner", "keep": 0.25, "relevance": None, "theta": None}

    def by_colour(patches, ids):
        return patches[:, 0]

    assert json.loads(json.dumps(CDPruner(relevance=by_colour).settings()))["relevance"] == "by_colour"
    assert "by_colour" in CDPruner(relevance=by_colour).describe()
    assert CDPruner().stages() == ("select",) and CDPruner().positions == "compact"


PROMPTS = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I")]


@pytest.mark.parametrize("relevance", [None, lambda patches, ids: patches.float().mean(-1) * (1 + ids[0])])
def test_on_a_model(relevance):
    model, pixels = tiny_llava(), images(4)

    def last(prompts, pictures, pruner):
        with torch.no_grad(), vtprune.pruning(model, pruner) as session:
            return model(**batch(prompts), pixel_values=pictures).logits[:, -1], session.report

    together, report = last(PROMPTS, pixels, CDPruner(keep=9, relevance=relevance))
    assert [len(s.kept) for s in report.samples] == [9, 18, 9]
    for row, at in enumerate([slice(0, 1), slice(1, 3), slice(3, 4)]):
        alone, single = last([PROMPTS[row]], pixels[at], CDPruner(keep=9, relevance=relevance))
        assert torch.equal(single.samples[0].kept, report.samples[row].kept)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        plain = model(**batch(PROMPTS), pixel_values=pixels).logits[:, -1]
    assert torch.equal(last(PROMPTS, pixels, CDPruner(keep=TOKENS, relevance=relevance))[0], plain)


# ---------------------------------------------------------------------- CLIP's relevance


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A CLIP of random weights as a checkpoint on disk, context 12, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 248, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 2}
    vision = {**sizes, "hidden_size": 32, "image_size": 48, "patch_size": 8}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for parameter in clip.parameters():  # norms too, so that one left out shows
        torch.nn.init.normal_(parameter, std=0.3)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, clip


QUESTION = "USER: <image>\nWhat color is the star? ASSISTANT:"


@torch.no_grad()
def test_a_clip_checkpoint_gives_the_papers_relevance(checkpoint, tokenizer):
    folder, clip = checkpoint
    relevance = ClipRelevance.from_pretrained(folder, tokenizer)
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids[0]
    assert relevance.words(ids) == "what color is the star?"
    patches = torch.randn(7, 32)

    words = torch.tensor([[1, *tokenizer("what color is the star?", add_special_tokens=False).input_ids, 3]])
    text = clip.text_projection(clip.text_model(input_ids=words).pooler_output)[0]
    shared = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    expected = -torch.nn.functional.cosine_similarity(shared, text[None])
    torch.testing.assert_close(relevance(patches, ids), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(relevance(patches.bfloat16(), ids), expected, atol=2e-2, rtol=2e-2)
    up = ClipRelevance.from_pretrained(folder, tokenizer, sign=1)
    torch.testing.assert_close(up(patches, ids), -expected, atol=1e-5, rtol=1e-5)
    assert repr(up) == f"ClipRelevance({str(folder)!r}, sign=1)"
    assert json.dumps(CDPruner(relevance=up).settings())
    # another vision tower's norm, where one is given
    tower = CLIPModel(clip.config).vision_model
    other = ClipRelevance.from_pretrained(folder, tokenizer, vision=tower)
    shared = clip.visual_projection(tower.post_layernorm(patches))
    expected = -torch.nn.functional.cosine_similarity(shared, text[None])
    torch.testing.assert_close(other(patches, ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_long_text_goes_in_chunks(checkpoint, tokenizer):
    folder, _ = checkpoint
    relevance = ClipRelevance.from_pretrained(folder, tokenizer)
    long = "what color is the star left of the ring and the square above it and below the ring?"
    body = tokenizer(long, add_special_tokens=False).input_ids
    assert 10 < len(body) <= 20
    patches = torch.randn(5, 32)
    parts = [relevance(patches, torch.tensor(part)) for part in (body[:10], body[10:])]
    # the parts are tokenised as the whole is: every word of it stands in the vocabulary
    torch.testing.assert_close(relevance(patches, torch.tensor(body)), (parts[0] + parts[1]) / 2, atol=1e-5, rtol=1e-5)
    assert relevance.text(long).shape == (2, 8)


def test_no_words_no_relevance(checkpoint, tokenizer):
    relevance = ClipRelevance.from_pretrained(checkpoint[0], tokenizer)
    for text in ("", "USER: <image>\n ASSISTANT:"):
        ids = tokenizer(text, return_tensors="pt").input_ids[0].long()
        assert relevance.words(ids) == ""
        assert relevance(torch.randn(4, 32), ids).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("system\nBe brief.\nuser\nIs the user here?\nassistant\n", "Be brief. Is the user here?"),
        ("USER: <image>\nWho is the user? ASSISTANT: A cat. USER: Why?", "Who is the user? A cat. Why?"),
        ("user : which model ?\nmodel\n", "which model ?"),
    ],
)
def test_roles_go_and_words_stay(checkpoint, tokenizer, text, words):
    relevance = ClipRelevance.from_pretrained(checkpoint[0], tokenizer)

    class Codepoints:
        """The embedded tokenizer knows neither capitals nor line ends."""

        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

    relevance.tokenizer = Codepoints()
    assert relevance.words(torch.tensor([ord(c) for c in text])) == words


def test_what_does_not_fit_is_refused(checkpoint, tokenizer, tmp_path):
    folder, clip = checkpoint
    relevance = ClipRelevance.from_pretrained(folder, tokenizer)
    with pytest.raises(UnsupportedError, match="patches are 31 wide"):
        relevance(torch.randn(4, 31), torch.tensor([9]))
    with pytest.raises(UnsupportedError, match=r"vision=model\.model\.vision_tower"):
        ClipRelevance.from_pretrained(tiny_model(), tokenizer)
    with pytest.raises(UnsupportedError, match="post_layernorm"):
        ClipRelevance.from_pretrained(folder, tokenizer, vision=torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="wide"):
        ClipRelevance.from_pretrained(tiny_model(), tokenizer, vision=clip.vision_model)
    with pytest.raises(UnsupportedError, match="'llava' model"):
        tiny_llava().config.save_pretrained(tmp_path)
        ClipRelevance.from_pretrained(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="sign=0"):
        ClipRelevance.from_pretrained(folder, tokenizer, sign=0)


# ---------------------------------------------------------------------- on the embedded model


@pytest.fixture(scope="module")
def embedded():
    processor = AutoProcessor.from_pretrained(tiny_model())
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_model(), dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        pytest.skip("this transformers names the vision tower's weights otherwise and leaves it untrained")
    return processor, model.eval()


@torch.no_grad()
def test_the_embedded_tower_prefers_the_patches_of_what_is_named(embedded):
    from evaluations.worlds import make_scene

    processor, model = embedded
    state = torch.random.get_rng_state()
    relevance = ClipRelevance.from_pretrained(tiny_model(), processor.tokenizer, vision=model.model.vision_tower)
    assert torch.equal(state, torch.random.get_rng_state())
    assert relevance.sign == 1 and relevance.context == 64
    shares = []
    for seed in range(3):
        scene = make_scene(seed)
        pixels = processor.image_processor(scene.image(), return_tensors="pt").pixel_values
        patches = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        objects = {int(p) for i in range(len(scene.objects)) for p in scene.patches_of(i)}
        for at, thing in enumerate(scene.objects):
            ids = processor.tokenizer(f"USER: What color is the {thing.shape}? ASSISTANT:", return_tensors="pt").input_ids[0]
            score = relevance(patches, ids)
            mine = torch.tensor([int(p) for p in scene.patches_of(at)])
            rest = torch.tensor([p for p in range(576) if p not in objects])
            shares.append((score[mine][:, None] > score[rest]).float().mean())
    # where it was measured on 40 pictures, 99.9 %; with the paper's sign this would be next to nothing
    assert torch.stack(shares).mean() > 0.98


@torch.no_grad()
@pytest.mark.parametrize("paired", [False, True])
def test_the_embedded_model_keeps_what_it_is_asked_about(embedded, paired):
    from evaluations.worlds import make_scene

    processor, model = embedded
    relevance = ClipRelevance.from_pretrained(tiny_model(), processor.tokenizer, vision=model.model.vision_tower)
    scene = make_scene(0)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": f"What color is the {scene.objects[0].shape}?"}],
        }
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=scene.image(), text=text, return_tensors="pt")
    objects = {int(p) for i in range(len(scene.objects)) for p in scene.patches_of(i)}
    with vtprune.pruning(model, CDPruner(keep=64, relevance=relevance if paired else None)) as session:
        model(**inputs)
    kept = set(session.report.samples[0].kept.tolist())
    # far more of them than 64 of 576 drawn at random would hold
    assert len(kept) == 64 and len(kept & objects) / len(objects) > 3 * 64 / 576
