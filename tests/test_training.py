"""Training through a pruned model: labels, gradients, LoRA, gradient checkpointing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from models import IMAGE, TOKENS, batch, images, preencoding, prompt, tiny_llava, tiny_qwen, tiny_tiled
from oracle import Turn, oracle_logits
from transformers.modeling_layers import GradientCheckpointingLayer

import vtprune

PROMPTS = [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(9)]
PIXELS = images(3, seed=2)
# what takes part in each stage, merging apart (test_gradients_reach_what_was_merged)
STRATEGIES = {
    "random": lambda: vtprune.Random(keep=12),
    "flowcut": lambda: vtprune.FlowCut(keep=12),
    "fastv": lambda: vtprune.FastV(keep=24),
    "pyramiddrop": lambda: vtprune.PyramidDrop(keep=20),
    "flowcut+fastv+evict": lambda: vtprune.FlowCut(keep=20) + vtprune.FastV(keep=14, layer=1) + vtprune.Evict(keep=5),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
# before, layers under gradient checkpointing run their hooks again in the backward pass
recomputes_forward = pytest.mark.skipif(
    "__call__" in vars(GradientCheckpointingLayer), reason="needs a transformers whose checkpointing leaves hooks alone"
)


def labelled(prompts=PROMPTS, side: str = "left") -> dict[str, torch.Tensor]:
    """Inputs with a label on every real token, placeholders included."""
    inputs = batch(prompts, side)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def kept_pairs(ids: list[int], sample) -> list[tuple[int, int]]:
    """Each token that is left at the end with the one left after it."""
    visual = [i for i, t in enumerate(ids) if t == IMAGE]
    survivors = {visual[n] for n in sample.layers[-1].tolist()} if visual else set()
    left = [i for i, t in enumerate(ids) if t != IMAGE or i in survivors]
    return list(itertools.pairwise(left))


@every_strategy
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_loss_and_gradients_are_those_of_the_kept_sequence(strategy, side, positions):
    """Of the full model in which nothing attends to what has left, each survivor predicting the next; all parameters."""
    model = tiny_llava("sdpa").train()
    inputs = labelled(side=side)
    with vtprune.pruning(model, STRATEGIES[strategy](), positions=positions) as session:
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        loss = model(**inputs, pixel_values=PIXELS, position_ids=places).loss
        loss.backward()
        report = session.report
    found = gradients(model)
    assert float(found["model.multi_modal_projector.linear_1.weight"].abs().sum()) > 0
    assert any(name.endswith("patch_embedding.weight") and float(grad.abs().sum()) > 0 for name, grad in found.items())

    terms, first = [], 0
    for ids, sample in zip(PROMPTS, report.samples, strict=True):
        count = ids.count(IMAGE) // TOKENS
        turn = Turn(ids, [], sample, PIXELS[first : first + count] if count else None, whole=not count)
        first += count
        logits = oracle_logits(model, [turn], positions == "compact", grad=True)
        for here, after in kept_pairs(ids, sample):
            terms.append(torch.nn.functional.cross_entropy(logits[here], torch.tensor(ids[after])))
    expected = torch.stack(terms).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert_same_gradients(found, gradients(model))


def test_equals_the_bare_model_fed_the_kept_embeddings():
    """The same without an oracle: `inputs_embeds` and `labels` gathered at what was kept, then transformers' own loss."""
    model, ids = tiny_llava(), PROMPTS[1]
    given = labelled([ids])
    with vtprune.pruning(model, "random", keep=12) as session:
        loss = model(**given, pixel_values=PIXELS[1:]).loss
        loss.backward()
    found = gradients(model)
    visual = (given["input_ids"][0] == IMAGE).nonzero()[:, 0]
    stays = given["input_ids"][0] != IMAGE
    stays[visual[session.report.samples[0].kept]] = True
    embeds = model.get_input_embeddings()(given["input_ids"])
    features = torch.cat(list(model.model.get_image_features(PIXELS[1:], return_dict=True).pooler_output))
    embeds = embeds.masked_scatter((given["input_ids"] == IMAGE)[..., None], features)[:, stays]
    bare = model(
        inputs_embeds=embeds,
        labels=given["labels"][:, stays],
        attention_mask=torch.ones_like(given["labels"][:, stays]),
        position_ids=stays.nonzero().T,
    ).loss
    bare.backward()
    torch.testing.assert_close(loss, bare)
    assert_same_gradients(found, gradients(model))


def test_labels_on_what_was_dropped_change_nothing():
    model, inputs = tiny_llava(), labelled()
    with torch.no_grad(), vtprune.pruning(model, "random", keep=12) as session:
        loss = model(**inputs, pixel_values=PIXELS).loss
        for row, sample in enumerate(session.report.samples):
            visual = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
            gone = torch.ones(len(visual), dtype=torch.bool)
            gone[sample.kept] = False
            inputs["labels"][row, visual[gone]] = 7
        assert torch.equal(model(**inputs, pixel_values=PIXELS).loss, loss)
        inputs["labels"][:, -1] = 7
        assert not torch.equal(model(**inputs, pixel_values=PIXELS).loss, loss)


def test_losses_of_samples_add_up():
    """A batch's loss is the mean over its samples' labels, unequal prompts and padding notwithstanding."""
    model = tiny_llava()
    with torch.no_grad(), vtprune.pruning(model, "flowcut+fastv", keep=14, layer=1):
        together = model(**labelled(), pixel_values=PIXELS, num_items_in_batch=torch.tensor(1)).loss
        alone = [
            model(**labelled([ids]), **given, num_items_in_batch=torch.tensor(1)).loss
            for ids, given in zip(PROMPTS, ({"pixel_values": PIXELS[:1]}, {"pixel_values": PIXELS[1:]}, {}), strict=True)
        ]
    torch.testing.assert_close(together, sum(alone), atol=1e-4, rtol=1e-5)


def test_labels_that_are_shifted_already():
    model, inputs = tiny_llava(), labelled()
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad(), vtprune.pruning(model, "random", keep=12):
        expected = model(**inputs, pixel_values=PIXELS, labels=labels).loss
        assert torch.equal(model(**inputs, pixel_values=PIXELS, labels=labels, shift_labels=shifted).loss, expected)
        assert torch.equal(model(**inputs, pixel_values=PIXELS, labels=labels, return_dict=False)[0], expected)


def test_a_loss_of_the_users_own():
    """Set before wrapping, it is handed labels that its usual shift pairs rightly; it is back after unwrapping."""

    def smoothed(logits, labels, vocab_size, **_):
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), label_smoothing=0.1
        )

    model, inputs = tiny_llava(), labelled()
    model.loss_function = smoothed
    with torch.no_grad(), vtprune.pruning(model, "random", keep=12) as session:
        out = model(**inputs, pixel_values=PIXELS)
    terms = []
    for row, (ids, sample) in enumerate(zip(PROMPTS, session.report.samples, strict=True)):
        padding = out.logits.shape[1] - len(ids)
        for here, after in kept_pairs(ids, sample):
            terms.append(
                torch.nn.functional.cross_entropy(
                    out.logits[row, here + padding], torch.tensor(ids[after]), label_smoothing=0.1
                )
            )
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    assert model.loss_function is smoothed


def test_keep_all_is_bit_identical_in_training():
    model, inputs = tiny_llava().train(), labelled()
    bare = model(**inputs, pixel_values=PIXELS).loss
    bare.backward()
    plain = gradients(model)
    with vtprune.pruning(model, "flowcut+fastv", keep=1.0):
        loss = model(**inputs, pixel_values=PIXELS).loss
        loss.backward()
    assert torch.equal(loss, bare)
    assert all(torch.equal(plain[name], grad) for name, grad in gradients(model).items())


@pytest.mark.parametrize("strategy", ["visionzip", "mustdrop", "sparsevlm"])
def test_gradients_reach_what_was_merged(strategy):
    """Averages pass gradients to all that went into them."""
    model, inputs = tiny_llava(), labelled(PROMPTS[:1])
    fields = {"sim_thr": 0.1, "layers": (0, 12)} if strategy == "mustdrop" else {}
    with vtprune.pruning(model, strategy, keep=20, **fields) as session:
        pixels = PIXELS[:1].clone().requires_grad_()
        features = []
        hook = model.model.vision_tower.register_forward_hook(lambda module, args, out: features.append(out))
        model(**inputs, pixel_values=pixels).loss.backward()
        hook.remove()
    assert session.report.samples[0].merged
    assert float(pixels.grad.abs().sum()) > 0 and bool(torch.isfinite(pixels.grad).all())
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients(model).values())


def other(family: str):
    """A model, and a prompt with a picture for it."""
    from test_families import fed, inputs_of

    model = tiny_qwen(version=family[4:]) if family.startswith("qwen") else tiny_tiled(family)
    return model, fed(*inputs_of(family, [[2, "A", 5], [3, "B", 2, "A", 4]]))


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5", "next", "onevision"])
def test_other_families(family):
    """Three-axis positions, tiles and newlines: the loss is that of the logits, survivor by survivor."""
    model, inputs = other(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with vtprune.pruning(model, "divprune+fastv", keep=14, layer=1) as session:
        out = model(**inputs, labels=labels)
        out.loss.backward()
    terms = []
    for row, sample in enumerate(session.report.samples):
        places = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        visual = places if sample.slots is None else places[sample.slots]
        stays = inputs["attention_mask"][row].bool()
        stays[visual] = False
        stays[visual[sample.layers[-1]]] = True
        left = stays.nonzero()[:, 0]
        terms.append(torch.nn.functional.cross_entropy(out.logits[row, left[:-1]], labels[row, left[1:]], reduction="none"))
    torch.testing.assert_close(out.loss, torch.cat(terms).mean())
    projector = "visual.merger" if family.startswith("qwen") else "multi_modal_projector"
    assert any(projector in name and float(grad.abs().sum()) > 0 for name, grad in gradients(model).items())


@recomputes_forward
@every_strategy
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(strategy, reentrant):
    model, inputs = tiny_llava().train(), labelled()
    with vtprune.pruning(model, STRATEGIES[strategy]()) as session:
        loss = model(**inputs, pixel_values=PIXELS).loss
        loss.backward()
        plain, kept = gradients(model), session.report.to_dict()["samples"]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        out = model(**inputs, pixel_values=PIXELS)
        assert out.past_key_values is None and torch.equal(out.loss, loss)
        out.loss.backward()
        again = session.report.to_dict()["samples"]
    assert all(torch.equal(plain[name], grad) for name, grad in gradients(model).items())
    assert [s["layers"] for s in again] == [s["layers"] for s in kept]


def test_gradient_checkpointing_off_its_path(monkeypatch):
    """Switched on, but not training: nothing is recomputed, and generation prunes as ever."""
    model = tiny_llava()
    options = {"max_new_tokens": 4, "do_sample": False}
    given = {**batch(PROMPTS[:2]), "pixel_values": PIXELS}
    with vtprune.pruning(model, "flowcut+fastv+evict", keep=14, layer=1):
        expected = model.generate(**given, **options)
        model.gradient_checkpointing_enable()
        assert torch.equal(model.generate(**given, **options), expected)
        if "__call__" not in vars(GradientCheckpointingLayer):
            model.train()  # under no_grad all the same
            assert torch.equal(model.generate(**given, **options), expected)


def test_gradient_checkpointing_that_repeats_hooks_is_refused(monkeypatch):
    """As transformers did it up to 5.18 at least: the layer's hooks would run again where nothing is pruned."""

    def call(self, *args, **kwargs):
        return torch.nn.Module.__call__(self, *args, **kwargs)

    model, inputs = tiny_llava().train(), labelled()
    if "__call__" not in vars(GradientCheckpointingLayer):
        monkeypatch.setattr(type(model.model.language_model.layers[0]), "__call__", call)
    model.gradient_checkpointing_enable()
    with vtprune.pruning(model, "random", keep=12):
        with pytest.raises(
            vtprune.UnsupportedError, match=r"gradient checkpointing of LlamaDecoderLayer.*gradient_checkpointing_disable"
        ):
            model(**inputs, pixel_values=PIXELS)
        model.gradient_checkpointing_disable()
        model(**inputs, pixel_values=PIXELS).loss.backward()


@preencoding
def test_nothing_of_a_step_outlives_it():
    """Decisions that runs without a cache remember hold no graph, or each step would keep the one before alive."""

    @dataclass
    class Halves(vtprune.Pruner):
        """Averages the first half of what is left into the second, and carries what it saw."""

        keep: float = 0.5
        name = "halves"

        @staticmethod
        def fold(view, vectors):
            view.carry["seen"] = vectors.float()
            half = view.tokens // 2
            index = torch.arange(half, 2 * half).expand(len(vectors), -1)
            return vtprune.Keep(index, hidden=(vectors[:, :half] + vectors[:, half : 2 * half]) / 2)

        def select(self, view):
            return self.fold(view, view.features)

        def prefill_needs(self, depth):
            return {2: vtprune.Needs(hidden=True)}

        def prefill(self, view):
            return self.fold(view, view.hidden)

    model, inputs = tiny_llava(), labelled(PROMPTS[:1])
    with vtprune.pruning(model, Halves()):
        features = model.model.get_image_features(PIXELS[:1], return_dict=True)
        model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False).loss.backward()
    ((_, decision),) = features.pooler_output[0]._vtprune.replays
    ((item, vectors),) = decision.images
    _, later = decision.layers[2]
    assert features.pooler_output[0].requires_grad
    assert not any(t.requires_grad for t in (vectors, later, *item.carry.values()))


# ---------------------------------------------------------------------------------------- LoRA


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    targets = r".*(language_model|vision_tower).*\.(q_proj|v_proj)|.*multi_modal_projector\.linear_\d"
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["wrapped first", "adapters first"])
@pytest.mark.parametrize("strategy", ["flowcut", "flowcut+random+fastv"])
def test_loss_falls_under_lora(order, strategy):
    """Projector, decoder and encoder adapt; the frozen weights stay."""
    model = tiny_llava().train()
    inputs = labelled(PROMPTS[:2])
    inputs["labels"] = inputs["labels"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    fields = {"keep": 8, "layer": 1} if "+" in strategy else {"keep": 12}
    if order == "wrapped first":
        vtprune.wrap(model, strategy, **fields)
    tuned = with_lora(model)
    if order == "adapters first":
        vtprune.wrap(tuned, strategy, **fields)
    frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = tuned(**inputs, pixel_values=PIXELS).loss
        loss.backward()
        reached = [name for name, p in tuned.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0]
        assert all(any(part in name for name in reached) for part in ("vision_tower", "projector", "language_model"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    report = vtprune.report(tuned)
    assert [s.visual_tokens for s in report.samples] == [TOKENS, 2 * TOKENS]
    assert report.equivalent_tokens == 1.5 * fields["keep"]
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if name in frozen)
    vtprune.unwrap(tuned)
    assert "_loss_function" not in vars(model)


@preencoding
def test_adapters_merged_and_unloaded_while_wrapped():
    """The same decisions and logits whether the adapter is beside the weights or in them; without it, as before."""
    model = tiny_llava()
    given = {**batch(PROMPTS[:2]), "pixel_values": PIXELS}
    with torch.no_grad(), vtprune.pruning(model, "flowcut+fastv+evict", keep=14, layer=1) as session:
        before = model(**given).logits
        tuned = with_lora(model)
        adapted = tuned(**given).logits
        layers = session.report.to_dict()["samples"]
        assert not torch.allclose(adapted, before)
        tokens = tuned.generate(**given, max_new_tokens=4, do_sample=False)
        tuned.merge_adapter()
        torch.testing.assert_close(tuned(**given).logits, adapted, atol=1e-3, rtol=1e-3)
        assert [s["layers"] for s in session.report.to_dict()["samples"]] == [s["layers"] for s in layers]
        tuned.unmerge_adapter()
        with tuned.disable_adapter():
            torch.testing.assert_close(tuned(**given).logits, before, atol=1e-4, rtol=1e-4)
        merged = tuned.merge_and_unload()
        assert torch.equal(merged.generate(**given, max_new_tokens=4, do_sample=False), tokens)
        assert vtprune.report(merged) is session.report
