"""The ten promises of docs/architecture.md over strategy x attention kernel x batch x positions."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from models import IMAGE, TOKENS, batch, images, prompt, tiny_llava, vision_blocks
from oracle import Turn, Watch, oracle_logits
from transformers import DynamicCache

import vtprune
from vtprune.pruner import Keep, Needs
from vtprune.registry import SHIPPED

# the golden schedule of these models' four decoder layers
RATES = (1.0, 0.9, 0.5, 0.25)
STRATEGIES = {
    "flowcut": lambda: vtprune.FlowCut(keep=12),
    "fastv": lambda: vtprune.FastV(keep=24, layer=2),
    "random": lambda: vtprune.Random(keep=12, seed=3),
    "uniform": lambda: vtprune.Uniform(keep=0.3),
    "evict": lambda: vtprune.Evict(keep=9),
    "resolution": lambda: vtprune.Resolution(keep=16),
    "todre": lambda: vtprune.ToDRE(keep=14, tau=0.6),
    "todre, k-center": lambda: vtprune.ToDRE(keep=0.4, variant="k_center", tau=0),
    "mustdrop": lambda: vtprune.MustDrop(keep=20, sim_thr=0.1, layers=(0, 12)),
    "mustdrop, thresholds": lambda: vtprune.MustDrop(global_thr=0.03, individual_thr=0.03, sim_thr=0.1),
    "mustdrop, no cache policy": lambda: vtprune.MustDrop(keep=20, sim_thr=0.1, layers=(0, 12)).only("encode", "prefill"),
    "visionzip": lambda: vtprune.VisionZip(keep=14),
    "divprune": lambda: vtprune.DivPrune(keep=14),
    "cdpruner": lambda: vtprune.CDPruner(keep=14),
    "pyramiddrop": lambda: vtprune.PyramidDrop(keep=20),
    "sparsevlm": lambda: vtprune.SparseVLM(keep=20),
    "gsearch": lambda: vtprune.GSearch(rates=RATES, min_layer=1),
    "psigmoid": lambda: vtprune.PSigmoid(keep=24),
    "flowcut+fastv+evict": lambda: vtprune.FlowCut(keep=20) + vtprune.FastV(keep=14, layer=1) + vtprune.Evict(keep=5),
    "mustdrop+divprune+evict": lambda: (
        vtprune.MustDrop(keep=30, sim_thr=0.1).only("encode") + vtprune.DivPrune(keep=20) + vtprune.Evict(keep=5)
    ),
}
EVERYTHING = {
    "flowcut": lambda: vtprune.FlowCut(keep=1.0),
    "fastv": lambda: vtprune.FastV(keep=1.0),
    "random": lambda: vtprune.Random(keep=TOKENS),
    "uniform": lambda: vtprune.Uniform(keep=1.0),
    "evict": lambda: vtprune.Evict(keep=TOKENS),
    "resolution": lambda: vtprune.Resolution(keep=1.0),
    "todre": lambda: vtprune.ToDRE(keep=1.0, tau=0.6),
    "todre, k-center": lambda: vtprune.ToDRE(keep=TOKENS, variant="k_center"),
    "mustdrop": lambda: vtprune.MustDrop(keep=1.0, sim_thr=0.1),
    "mustdrop, thresholds": lambda: vtprune.MustDrop(global_thr=1.0, individual_thr=0.0, merge=False),
    "mustdrop, no cache policy": lambda: vtprune.MustDrop(keep=TOKENS, sim_thr=0.1).only("encode", "prefill"),
    "visionzip": lambda: vtprune.VisionZip(keep=1.0),
    "divprune": lambda: vtprune.DivPrune(keep=TOKENS),
    "cdpruner": lambda: vtprune.CDPruner(keep=1.0),
    "pyramiddrop": lambda: vtprune.PyramidDrop(keep=1.0),
    "sparsevlm": lambda: vtprune.SparseVLM(keep=1.0),
    "gsearch": lambda: vtprune.GSearch(rates=(1.0,) * 4),
    "psigmoid": lambda: vtprune.PSigmoid(keep=1.0),
    "flowcut+fastv+evict": lambda: vtprune.FlowCut(keep=1.0) + vtprune.FastV(keep=1.0, layer=1) + vtprune.Evict(keep=1.0),
    "mustdrop+divprune+evict": lambda: (
        vtprune.MustDrop(keep=1.0).only("encode") + vtprune.DivPrune(keep=1.0) + vtprune.Evict(keep=1.0)
    ),
}
# one prompt, or a left-padded batch of unequal prompts with unequal image counts
BATCHES = {
    "single": [prompt(2, "I", 5)],
    "padded": [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6), prompt(1, "I", 9)],
}
STEPS = 8
REARRANGING = {"mustdrop", "mustdrop, thresholds", "mustdrop, no cache policy", "mustdrop+divprune+evict"}
REARRANGING |= {"visionzip", "sparsevlm"}

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_kernel = pytest.mark.parametrize("attn", ["sdpa", "eager"])
every_batch = pytest.mark.parametrize("kind", BATCHES)
every_positions = pytest.mark.parametrize("positions", ["original", "compact"])


@lru_cache
def model_of(attn: str):
    return tiny_llava(attn)


@dataclass
class Run:
    tokens: torch.Tensor
    logits: torch.Tensor  # [B, steps, vocabulary]
    report: object
    cache: object
    watch: Watch | None = None


def pixels_for(prompts: list[list[int]], seed: int = 0) -> torch.Tensor:
    return images(sum(p.count(IMAGE) // TOKENS for p in prompts), seed)


def run(model, prompts, pixels, pruner=None, positions=None, steps=STEPS + 1, **options) -> Run:
    """Greedy generation, wrapped for its length if a pruner is given."""

    def generate():
        return model.generate(
            **batch(prompts),
            **({} if pixels is None else {"pixel_values": pixels}),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    if pruner is None:
        out, report = generate(), None
    else:
        with vtprune.pruning(model, pruner, positions=positions) as session:
            watch = Watch(model, pruner)
            try:
                out = generate()
            finally:
                watch.close()
        report = session.report
    logits = torch.stack(out.logits, 1)
    return Run(out.sequences[:, -steps:], logits, report, out.past_key_values, watch if pruner else None)


# ---------------------------------------------------------------------------------------- 1 nothing kept back


@every_strategy
@every_kernel
@every_batch
@every_positions
def test_keep_all_is_bit_identical(strategy, attn, kind, positions):
    model, prompts = model_of(attn), BATCHES[kind]
    pixels = pixels_for(prompts)
    plain = run(model, prompts, pixels)
    pruned = run(model, prompts, pixels, EVERYTHING[strategy](), positions)
    assert torch.equal(plain.tokens, pruned.tokens)
    assert torch.equal(plain.logits, pruned.logits)
    assert pruned.report.equivalent_tokens == sum(s.visual_tokens for s in pruned.report.samples) / len(prompts)


# ---------------------------------------------------------------------------------------- 2 masking equals removing


def assert_oracle(model, prompts, pixels, result: Run, positions: str, tolerance: float = 1e-4) -> None:
    compact = positions == "compact"
    first = 0
    for row, ids in enumerate(prompts):
        count = ids.count(IMAGE) // TOKENS
        generated = result.tokens[row].tolist()
        turn = result.watch.turn(ids, generated, result.report.samples[row], pixels[first : first + count], row, first)
        first += count
        expected = oracle_logits(model, [turn], compact)[len(ids) - 1 : -1]
        torch.testing.assert_close(result.logits[row], expected, atol=tolerance, rtol=tolerance)


@every_strategy
@every_kernel
@every_batch
@every_positions
def test_masking_equals_removing(strategy, attn, kind, positions):
    model, prompts = model_of(attn), BATCHES[kind]
    pixels = pixels_for(prompts)
    result = run(model, prompts, pixels, STRATEGIES[strategy](), positions)
    assert_oracle(model, prompts, pixels, result, positions)


def test_the_oracle_can_fail():
    model, prompts = model_of("sdpa"), BATCHES["single"]
    pixels = pixels_for(prompts)
    result = run(model, prompts, pixels, vtprune.Random(keep=12), "original")
    sample = result.report.samples[0]
    sample.layers = [layer.clone() for layer in sample.layers]
    sample.layers[3] = sample.layers[3][1:]
    sample.cached = sample.layers
    with pytest.raises(AssertionError):
        assert_oracle(model, prompts, pixels, result, "original")


@dataclass
class Ragged(vtprune.Pruner):
    """Uses all four stages, with counts that differ per image, per sample and per layer."""

    keep: float = 0.5

    name = "ragged"
    requires = frozenset({"cls"})

    @staticmethod
    def cut(scores: torch.Tensor, least: float) -> Keep:
        """Keep what scores above the item's own mean or so: as many as it happens to be."""
        kept = []
        for row in scores:
            chosen = (row >= row.quantile(least)).nonzero()[:, 0]
            kept.append(chosen)
        return Keep(kept)

    def encode_needs(self, encoder):
        return {0: Needs("cls"), 2: Needs("cls", keys=True), 3: Needs("mean", values=True)}

    def encode(self, view):
        score = view.rows.attention()[:, :, 0].mean(1)
        if view.layer == 0:
            view.carry["first"] = score
            return self.cut(score, 0.1)
        assert view.carry["first"].shape == view.index.shape
        return self.cut(score * view.carry["first"], 0.1 + 0.2 * float(view.hidden.mean() > 0))

    def select(self, view):
        assert view.carry["first"].shape == view.index.shape
        assert all(t.shape[1] == view.features.shape[2] for t in view.text)
        return self.cut(view.features.float().norm(dim=-1), 0.15)

    def prefill_needs(self, depth):
        return {1: Needs("text", hidden=True), 3: Needs("last", keys=True, values=True)}

    def prefill(self, view):
        assert view.carry["first"].shape == view.index.shape
        assert len(view.computed) == view.layer and view.computed[-1] == view.tokens
        assert view.hidden is None or view.hidden.shape[:2] == view.index.shape
        return self.cut(view.rows.attention().sum((1, 2)), 0.25)

    def decode_needs(self, depth):
        return {1: Needs("last"), 2: Needs("text"), 3: Needs("last")}

    def decode(self, view):
        assert view.survived.shape == view.index.shape
        return self.cut(view.rows.attention().sum((1, 2)), 0.2)


@every_kernel
@every_batch
@every_positions
def test_ragged_counts_at_every_stage(attn, kind, positions):
    model, prompts = model_of(attn), BATCHES[kind]
    pixels = pixels_for(prompts, seed=5)
    result = run(model, prompts, pixels, Ragged(), positions)
    sample = result.report.samples[0]
    assert len(sample.kept) < TOKENS and len(sample.layers[3]) < len(sample.layers[1]) < len(sample.kept)
    assert len(sample.cached[2]) < len(sample.layers[2])
    assert_oracle(model, prompts, pixels, result, positions)


@dataclass
class Rearranged(vtprune.Pruner):
    """Turns tokens about and merges them at every stage, with counts that differ per image and sample."""

    keep: float = 0.5

    name = "rearranged"
    requires = frozenset({"cls"})

    @staticmethod
    def fold(scores: torch.Tensor, vectors: torch.Tensor | None, least: float) -> Keep:
        """Best first, those below the item's quantile averaged into the best."""
        kept, hidden, into = [], [], []
        for at, row in enumerate(scores):
            order = row.argsort(descending=True, stable=True)
            count = int((row >= row.quantile(least)).sum())
            kept.append(order[:count])
            into.append(torch.full_like(order, -1).index_fill(0, order[count:], int(order[0])))
            if vectors is not None:
                mine = vectors[at][order[:count]].clone()
                mine[0] = torch.cat([mine[:1], vectors[at][order[count:]]]).mean(0)
                hidden.append(mine)
        return Keep(kept, hidden or None, into if hidden else None, ordered=True)

    def encode_needs(self, encoder):
        return {1: Needs("cls"), encoder.last: Needs("cls")}

    def encode(self, view):
        score = view.rows.attention()[:, :, 0].mean(1)
        if view.layer >= view.depth:
            view.carry["last"] = score
            return None
        assert view.special.shape[:2] == (len(score), 1)
        view.note("folded")
        return self.fold(score, view.hidden, 0.2)

    def select(self, view):
        assert view.carry["last"].shape == view.index.shape
        assert [len(i) for i in view.ids] == [len(t) for t in view.text]
        return self.fold(view.features.float().norm(dim=-1), view.features, 0.2)

    def prefill_needs(self, depth):
        return {1: Needs("last", ahead=True), 2: Needs("text", hidden=True, inputs=True), 3: Needs("text", ahead=True)}

    def prefill(self, view):
        score = view.rows.attention().sum((1, 2)) * view.carry["last"]
        if view.layer != 2:
            return self.fold(score, None, 0.2)
        assert view.inputs.visual.shape[1] == view.computed[0]
        assert view.inputs.text.shape[:2] == view.rows.valid.shape
        return self.fold(score, view.hidden, 0.2)


@every_kernel
@every_batch
@every_positions
def test_rearranged_and_merged_at_every_stage(attn, kind, positions):
    model, prompts = model_of(attn), BATCHES[kind]
    pixels = pixels_for(prompts, seed=6)
    result = run(model, prompts, pixels, Rearranged(), positions)
    sample = result.report.samples[0]
    order = sample.layers[3].tolist()
    assert order != sorted(order) and sample.kept.tolist() == sorted(sample.layers[0].tolist())
    assert "folded" in result.report.notes and sample.merged
    assert sum(len(step.tokens) for step in sample.trail()) == TOKENS
    assert_oracle(model, prompts, pixels, result, positions)
    uncached = run(model, prompts, pixels, Rearranged(), positions, use_cache=False)
    assert torch.equal(result.tokens, uncached.tokens)
    torch.testing.assert_close(result.logits, uncached.logits, atol=1e-4, rtol=1e-4)
    assert uncached.report.samples[0].merged.keys() == sample.merged.keys()


@every_kernel
def test_rows_ahead_are_those_of_the_layer_that_runs(attn):
    """What a layer would compute on its input, asked before it runs, is what it computes when nothing is cut."""
    seen = {}

    @dataclass
    class Both(vtprune.Pruner):
        keep: float = 1.0
        name = "both"

        def prefill_needs(self, depth):
            return {2: Needs("text", keys=True, ahead=True), 3: Needs("text", keys=True)}

        def prefill(self, view):
            seen.setdefault(view.layer, view.rows)

    model, prompts = model_of(attn), BATCHES["padded"][:2]
    pixels = pixels_for(prompts)
    run(model, prompts[:1], pixels[:1], Both(), steps=1)
    for name in ("logits", "lse", "valid", "keys"):
        torch.testing.assert_close(getattr(seen[2], name), getattr(seen[3], name), atol=1e-5, rtol=1e-5)
    alone = dict(seen)
    seen.clear()
    run(model, [prompts[0], prompt(5, "I", 9)], pixels[:2], Both(), steps=1)
    count = alone[2].valid.shape[1]
    padded = seen[2].attention()[0, :, :count]
    torch.testing.assert_close(padded, alone[2].attention()[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- 3 batch equals single


@every_strategy
@every_kernel
@every_positions
def test_batch_equals_single(strategy, attn, positions):
    model, prompts = model_of(attn), [*BATCHES["padded"], prompt(3, "I", 2)]
    pixels = pixels_for(prompts)
    together = run(model, prompts, pixels, STRATEGIES[strategy](), positions)
    first = 0
    for row, ids in enumerate(prompts):
        count = ids.count(IMAGE) // TOKENS
        alone = run(model, [ids], pixels[first : first + count], STRATEGIES[strategy](), positions)
        first += count
        assert torch.equal(together.tokens[row], alone.tokens[0])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
        for a, b in zip(together.report.samples[row].layers, alone.report.samples[0].layers, strict=True):
            assert torch.equal(a, b)


@every_kernel
def test_rows_without_images_in_a_batch(attn):
    model, prompts = model_of(attn), [prompt(2, "I", 5), prompt(11)]
    pixels = pixels_for(prompts)
    together = run(model, prompts, pixels, vtprune.FlowCut(keep=8) + vtprune.FastV(keep=5, layer=1))
    plain = run(model, [prompts[1]], None)
    assert torch.equal(together.tokens[1], plain.tokens[0])
    assert together.report.samples[1].visual_tokens == 0
    assert together.report.equivalent_tokens == 5


# ---------------------------------------------------------------------------------------- 4 cached equals uncached


# a decode-stage strategy cuts the cache; without one there is nothing to cut, and test_errors.py has it refuse
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "decode" not in STRATEGIES[name]().stages()])
@every_kernel
@every_batch
@every_positions
def test_cached_equals_uncached(strategy, attn, kind, positions):
    model, prompts = model_of(attn), BATCHES[kind]
    pixels = pixels_for(prompts)
    cached = run(model, prompts, pixels, STRATEGIES[strategy](), positions)
    uncached = run(model, prompts, pixels, STRATEGIES[strategy](), positions, use_cache=False)
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.logits, uncached.logits, atol=1e-4, rtol=1e-4)
    assert uncached.report.kv_bytes == uncached.report.kv_bytes_full == 0


def turn_inputs(history: list[list[int]], addition: list[list[int]]) -> dict[str, torch.Tensor]:
    """The whole conversation so far plus the next prompt, left-padded once at its very beginning, as chat code feeds it."""
    return batch([h + a for h, a in zip(history, addition, strict=True)])


@every_strategy
@every_kernel
@every_positions
@pytest.mark.parametrize("second", ["text", "image"])
def test_second_turn_over_the_same_cache(strategy, attn, positions, second):
    model = model_of(attn)
    first = prompt(2, "I", 5)
    follow = prompt(4) if second == "text" else prompt(2, "I", 3)
    pixels = images(2, seed=8)
    more = {"pixel_values": pixels[1:]} if second == "image" else {}
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    pruner = STRATEGIES[strategy]()
    with vtprune.pruning(model, pruner, positions=positions) as session:
        watch = Watch(model, pruner)
        cache = DynamicCache(config=model.config.text_config)
        one = model.generate(input_ids=torch.tensor([first]), pixel_values=pixels[:1], past_key_values=cache, **options)
        report_one = session.report
        said = one.sequences[0, len(first) :].tolist()
        # the last token of turn one is fed by turn two, before its own prompt
        turns = [watch.turn(first, said[:-1], report_one.samples[0], pixels[:1], 0, 0)]
        watch.close()
        watch = Watch(model, pruner)
        whole = torch.tensor([first + said + follow])
        two = model.generate(input_ids=whole, past_key_values=one.past_key_values, **more, **options)
        watch.close()
    answer = two.sequences[0, whole.shape[1] :].tolist()
    if second == "image":
        turns.append(watch.turn(said[-1:] + follow, answer, session.report.samples[0], pixels[1:], 0, 0))
    else:
        nothing = copy.copy(report_one.samples[0])
        nothing.images, nothing.encoded = [], []
        turns.append(Turn(said[-1:] + follow, answer, nothing, None))
    expected = oracle_logits(model, turns, positions == "compact")[whole.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(two.logits, 1)[0], expected, atol=1e-4, rtol=1e-4)
    assert two.past_key_values.get_seq_length() == whole.shape[1] + 4


@pytest.mark.parametrize("strategy", ["flowcut+fastv+evict", "mustdrop", "evict"])
@every_kernel
def test_rows_that_all_share_padding(strategy, attn):
    """One left-padded row, or several padded alike: the padding is dropped with the tokens, and changes nothing."""
    model, ids = model_of(attn), prompt(2, "I", 5)
    pixels = images(1, seed=4)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    padded = {"input_ids": torch.tensor([[0] * 5 + ids]), "attention_mask": torch.tensor([[0] * 5 + [1] * len(ids)])}
    with vtprune.pruning(model, STRATEGIES[strategy]()):
        plain = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, **options)
        shifted = model.generate(**padded, pixel_values=pixels, **options)
    torch.testing.assert_close(torch.stack(shifted.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


@every_kernel
def test_second_turn_of_a_padded_batch(attn):
    """Left-padded rows of unequal length, chat going on over the same pruned cache."""
    model = model_of(attn)
    firsts, follow = [prompt(2, "I", 5), prompt(6, "I", 2)], [7, 8, 9]
    pixels = images(2, seed=4)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def talk(prompts, pix):
        with vtprune.pruning(model, STRATEGIES["flowcut+fastv+evict"]()):
            inputs = batch(prompts)
            one = model.generate(**inputs, pixel_values=pix, past_key_values=DynamicCache(config=model.config), **options)
            said = one.sequences[:, inputs["input_ids"].shape[1] :]
            added = torch.cat([said, torch.tensor([follow]).expand(len(prompts), -1)], 1)
            ids = torch.cat([inputs["input_ids"], added], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(added)], 1)
            two = model.generate(input_ids=ids, attention_mask=mask, past_key_values=one.past_key_values, **options)
        return torch.stack(two.logits, 1)

    together = talk(firsts, pixels)
    for row in range(2):
        alone = talk([firsts[row]], pixels[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------- 5 no eager attention


def test_never_a_full_attention_map(monkeypatch):
    """Under sdpa no softmax over n x n runs anywhere, and nothing asks for attentions."""
    model, prompts = model_of("sdpa"), BATCHES["padded"]
    largest = 0
    softmax = torch.nn.functional.softmax

    def watched(x, *args, **kwargs):
        nonlocal largest
        largest = max(largest, x.shape[-2])
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", watched)
    calls = []
    forward = type(model.model).forward

    @functools.wraps(forward)
    def watched_forward(self, *args, **kwargs):
        calls.append(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", watched_forward)
    pruner = STRATEGIES["flowcut+fastv+evict"]()
    run(model, prompts, pixels_for(prompts), pruner)
    assert largest <= 1
    assert calls and not any(k.get("output_attentions") for k in calls)
    assert model.config.text_config._attn_implementation == "sdpa"


@every_kernel
def test_rows_equal_eager_attention(attn):
    """The rows a strategy sees are those of the eager kernel's own maps, under any kernel, with grouped heads."""
    seen = {}

    @dataclass
    class Spy(vtprune.Pruner):
        keep: float = 0.5
        name = "spy"

        def promises_to_prune(self, sizes):
            return False

        def encode_needs(self, encoder):
            return {2: Needs("cls")}

        def encode(self, view):
            seen["encoder"] = view.rows.attention()

        def prefill_needs(self, depth):
            return {2: Needs("last"), 3: Needs("text")}

        def prefill(self, view):
            seen[view.layer] = view.rows.attention()

    prompts = BATCHES["single"]
    pixels = pixels_for(prompts)
    run(model_of(attn), prompts, pixels, Spy(), steps=1)
    eager = model_of("eager")
    inputs = {"input_ids": torch.tensor(prompts), "pixel_values": pixels}
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions
        vision = eager.model.vision_tower(pixels, output_attentions=True).attentions
    visual = [i for i, t in enumerate(prompts[0]) if t == IMAGE]
    text = list(range(visual[-1] + 1, len(prompts[0])))
    torch.testing.assert_close(seen["encoder"][:, :, 0], vision[2][:, :, 0, 1:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen[2][:, :, 0], maps[1][:, :, -1, visual], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen[3], maps[2][:, :, text][..., visual], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------- 6 exact budgets


@every_strategy
@every_batch
def test_exact_budgets_and_bytes(strategy, kind):
    model, prompts = model_of("sdpa"), BATCHES[kind]
    pixels = pixels_for(prompts)
    pruner = STRATEGIES[strategy]()
    result = run(model, prompts, pixels, pruner, steps=1)
    depth = len(model.model.language_model.layers)
    for ids, sample in zip(prompts, result.report.samples, strict=True):
        count = ids.count(IMAGE) // TOKENS
        assert sample.visual_tokens == count * TOKENS and sample.images == [TOKENS] * count
        previous = set(range(sample.visual_tokens))
        for kept in [index for _, index in sample.encoded] + [sample.kept] + sample.layers:
            assert len(kept) == len(set(kept.tolist())) and set(kept.tolist()) <= previous
            assert strategy in REARRANGING or kept.tolist() == sorted(kept.tolist())
            previous = set(kept.tolist())
        for held, computed in zip(sample.cached, sample.layers, strict=True):
            assert set(held.tolist()) <= set(computed.tolist())
        assert sample.kept.tolist() == sorted(sample.kept.tolist())
        expected = {
            "uniform": round(0.3 * TOKENS) * count,
            "evict": TOKENS * count,
            "todre, k-center": round(0.4 * TOKENS) * count,
            "gsearch": sum(round(r * TOKENS * count) for r in RATES) / depth,
            "flowcut+fastv+evict": 14 * count,
            "mustdrop+divprune+evict": 20 * count,
        }.get(strategy)
        if expected is None and pruner.keep is not None:
            expected = pruner.keep * count
        if strategy == "todre":  # its gate may drop all that is left, from the last layer on
            assert len(sample.kept) == expected and len(sample.layers[3]) in (0, expected)
        elif expected is not None:
            # a mean over layers is met to within half a token
            assert abs(sample.equivalent_tokens - expected) <= (0.5 if pruner.part("prefill") else 0)
        cached = {"evict": 9, "flowcut+fastv+evict": 5, "mustdrop+divprune+evict": 5}.get(strategy)
        if cached:
            assert [len(c) for c in sample.cached] == [cached * count] * depth
    held = 0
    for at, layer in enumerate(result.cache.layers):
        text = [len(ids) - s.visual_tokens for ids, s in zip(prompts, result.report.samples, strict=True)]
        longest = max(t + len(s.cached[at]) for t, s in zip(text, result.report.samples, strict=True))
        assert layer.keys.shape[-2] == layer.values.shape[-2] == longest
        held += layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
    assert result.report.kv_bytes == held
    longest = max(map(len, prompts))
    assert result.report.kv_bytes_full == depth * 2 * len(prompts) * 2 * longest * 8 * 4
    assert result.report.kv_bytes < result.report.kv_bytes_full


# ---------------------------------------------------------------------------------------- 7 reversible


def fingerprint(model):
    """Everything that wrapping might touch."""
    if not getattr(model.model.vision_tower, "_output_capturing_hooks_installed", False):
        run(model, BATCHES["single"], pixels_for(BATCHES["single"]), steps=1)  # transformers installs its own, lazily
    return {
        name: (
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_always_called),
            len(module._forward_pre_hooks_with_kwargs),
            id(module.__dict__.get("config")),
            type(module.__dict__.get("config")),
        )
        for name, module in model.named_modules()
    }


@every_strategy
@every_kernel
def test_unwrap_restores_everything(strategy, attn):
    model, prompts = tiny_llava(attn), BATCHES["single"]
    pixels = pixels_for(prompts)
    plain = run(model, prompts, pixels)
    before, config = fingerprint(model), copy.deepcopy(model.config.to_dict())
    vtprune.wrap(model, STRATEGIES[strategy]())
    assert not torch.equal(run(model, prompts, pixels).logits, plain.logits)
    vtprune.unwrap(model)
    assert fingerprint(model) == before
    assert model.config.to_dict() == config
    assert torch.equal(run(model, prompts, pixels).logits, plain.logits)


@every_strategy
@pytest.mark.parametrize("place", ["encoder", "decoder", "step"])
def test_an_exception_leaves_nothing_behind(strategy, place):
    model, prompts = tiny_llava(), BATCHES["padded"]
    pixels = pixels_for(prompts)
    before = fingerprint(model)
    vtprune.wrap(model, STRATEGIES[strategy]())
    good = run(model, prompts, pixels)
    wrapped = fingerprint(model)
    where = vision_blocks(model)[3] if place == "encoder" else model.model.language_model.layers[2]
    calls = []

    def fail(module, args):
        calls.append(1)
        if place != "step" or len(calls) == 3:
            raise KeyError("in the middle")

    handle = where.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        run(model, prompts, pixels)
    handle.remove()
    assert fingerprint(model) == wrapped
    assert torch.equal(run(model, prompts, pixels).logits, good.logits)
    vtprune.unwrap(model)
    assert fingerprint(model) == before


def test_wrapping_twice_replaces_and_scopes_nest():
    model, prompts = tiny_llava(), BATCHES["single"]
    pixels = pixels_for(prompts)
    before = fingerprint(model)
    vtprune.wrap(model, "random", keep=20)
    vtprune.wrap(model, "uniform", keep=10)
    run(model, prompts, pixels)
    assert vtprune.report(model).strategy.startswith("uniform") and vtprune.report(model).equivalent_tokens == 10
    inner = run(model, prompts, pixels, vtprune.Random(keep=5))
    assert inner.report.equivalent_tokens == 5
    run(model, prompts, pixels)
    assert vtprune.report(model).equivalent_tokens == 10
    vtprune.unwrap(model)
    assert fingerprint(model) == before


def test_two_models_do_not_touch_each_other():
    one, two = tiny_llava(), tiny_llava(seed=1)
    prompts = BATCHES["single"]
    pixels = pixels_for(prompts)
    plain = run(two, prompts, pixels)
    vtprune.wrap(one, "flowcut", keep=6)
    assert torch.equal(run(two, prompts, pixels).logits, plain.logits)
    vtprune.wrap(two, "fastv", keep=30)
    run(one, prompts, pixels)
    run(two, prompts, pixels)
    assert vtprune.report(one).equivalent_tokens == 6 and vtprune.report(two).equivalent_tokens == 30


def test_a_wrapped_model_can_be_freed():
    model = tiny_llava()
    vtprune.wrap(model, "flowcut", keep=6)
    run(model, BATCHES["single"], pixels_for(BATCHES["single"]))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------------------------------- 8 no state between calls


@every_strategy
def test_no_state_on_the_strategy(strategy):
    model, prompts = model_of("sdpa"), BATCHES["padded"]
    pruner, pixels = STRATEGIES[strategy](), pixels_for(BATCHES["padded"])
    parts = getattr(pruner, "parts", [pruner])
    before = [copy.deepcopy(vars(p)) for p in parts]
    first = run(model, prompts, pixels, pruner)
    run(model, BATCHES["single"], pixels[1:2], pruner)
    again = run(model, prompts, pixels, pruner)
    assert [vars(p) for p in parts] == before
    assert torch.equal(first.logits, again.logits)


def test_threads_on_one_model_do_not_mix():
    model = model_of("sdpa")
    jobs = [[prompt(2, "I", 5)], [prompt(4, "I", 3, "I", 6)], [prompt(1, "I", 9)]]
    pix = [pixels_for(job, seed) for seed, job in enumerate(jobs)]
    results: dict[int, torch.Tensor] = {}
    vtprune.wrap(model, STRATEGIES["flowcut+fastv+evict"]())
    try:
        alone = [run(model, job, p).logits for job, p in zip(jobs, pix, strict=True)]

        def work(i):
            for _ in range(3):
                results[i] = run(model, jobs[i], pix[i]).logits

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        vtprune.unwrap(model)
    assert all(torch.equal(results[i], alone[i]) for i in range(3))


# ---------------------------------------------------------------------------------------- 10 no import side effects


def test_import_has_no_side_effects():
    import subprocess
    import sys

    code = (
        "import sys, vtprune; assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A; before = set(A.keys())\n"
        "import vtprune.api, vtprune.engine.session; vtprune.available(); assert set(A.keys()) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_shipped_strategy_is_in_the_matrix():
    assert STRATEGIES.keys() == EVERYTHING.keys()
    videos = {name for name, cls in vtprune.available().items() if cls.modality == "video"}  # test_videos.py
    assert {part.name for make in STRATEGIES.values() for part in getattr(make(), "parts", [make()])} == set(SHIPPED) - videos
