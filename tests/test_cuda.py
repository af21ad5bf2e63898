"""What only a GPU can show: the promises there, and that nothing wrong goes unnoticed where checks are read late."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from models import batch, tiny_llava
from test_promises import BATCHES, EVERYTHING, STRATEGIES, pixels_for

import vtprune
from vtprune.pruner import Keep, Needs, Pruner, VtpruneError

pytestmark = pytest.mark.cuda
STEPS = 4


@pytest.fixture(autouse=True)
def _exact():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution
    yield
    torch.backends.cudnn.allow_tf32 = before


def generate(model, prompts, pruner=None, seed: int = 0):
    """Logits [B, STEPS, V] on the CPU, the cache, and the report."""
    device = model.device
    given = {name: t.to(device) for name, t in batch(prompts).items()}
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    given["pixel_values"] = pixels_for(prompts, seed).to(device, model.dtype)

    def run():
        return model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)

    if pruner is None:
        out, report = run(), None
    else:
        with vtprune.pruning(model, pruner) as session:
            out = run()
        report = session.report
    return torch.stack(out.logits, 1).cpu(), out, report


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", EVERYTHING)
def test_nothing_kept_back(strategy, attn):
    model = tiny_llava(attn).to("cuda")
    for prompts in BATCHES.values():
        bare, _, _ = generate(model, prompts)
        whole, _, _ = generate(model, prompts, EVERYTHING[strategy]())
        assert torch.equal(bare, whole)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gpu_keeps_what_the_cpu_keeps(strategy):
    model = tiny_llava()
    for prompts in BATCHES.values():
        logits, _, report = generate(model.to("cpu"), prompts, STRATEGIES[strategy]())
        found, _, there = generate(model.to("cuda"), prompts, STRATEGIES[strategy]())
        for mine, theirs in zip(report.samples, there.samples, strict=True):
            for a, b in zip(mine.layers + mine.cached, theirs.layers + theirs.cached, strict=True):
                assert torch.equal(a, b.cpu())
            assert mine.merged == theirs.merged
        torch.testing.assert_close(found, logits, atol=2e-3, rtol=2e-3)
        assert there.kv_bytes == report.kv_bytes
        assert there.flops == report.flops


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_equals_its_samples(strategy):
    model = tiny_llava().to("cuda")
    prompts = BATCHES["padded"]
    _, _, together = generate(model, prompts, STRATEGIES[strategy]())
    pixels = pixels_for(prompts)
    start = 0
    from models import IMAGE, TOKENS

    for row, one in enumerate(prompts):
        count = one.count(IMAGE) // TOKENS
        given = {name: t.to("cuda") for name, t in batch([one]).items()}
        with vtprune.pruning(model, STRATEGIES[strategy]()) as session:
            model(**given, pixel_values=pixels[start : start + count].to("cuda"))
        start += count
        alone = session.report.samples[0]
        for a, b in zip(alone.layers, together.samples[row].layers, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strategy", ["divprune", "fastv", "visionzip", "evict", "flowcut+fastv+evict"])
def test_memory_is_given_back(strategy):
    model = tiny_llava().to("cuda")
    _, out, report = generate(model, BATCHES["single"], STRATEGIES[strategy]())
    for layer in out.past_key_values.layers:
        for t in (layer.keys, layer.values):
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    assert 0 < report.kv_bytes < report.kv_bytes_full


@dataclass
class Wrong(Pruner):
    """Answers with an index out of range, or twice the same, in one stage."""

    stage: str = "select"
    repeated: bool = False
    keep: int = 4

    name = "wrong"

    def stages(self):
        return (self.stage,)

    def _answer(self, view) -> Keep:
        bad = 0 if self.repeated else view.tokens + 1_000_000
        return Keep(torch.tensor([[0, 1, bad]] * len(view.index), device=view.index.device))

    def encode_needs(self, encoder):
        return {1: Needs()}

    def prefill_needs(self, depth):
        return {1: Needs()}

    def decode_needs(self, depth):
        return {1: Needs()}

    encode = select = prefill = decode = _answer


@pytest.mark.parametrize("stage", ["encode", "select", "prefill", "decode"])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_wrong_answer_is_told_and_the_device_lives_on(stage, repeated):
    model = tiny_llava().to("cuda")
    with pytest.raises(VtpruneError, match="repeat or lie outside"):
        generate(model, BATCHES["single"], Wrong(stage=stage, repeated=repeated))
    torch.cuda.synchronize()
    generate(model, BATCHES["single"], STRATEGIES["random"]())


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed")
@pytest.mark.parametrize("strategy", ["random", "fastv", "flowcut", "evict"])
def test_flash_equals_sdpa(strategy):
    found = {}
    for attn in ("sdpa", "flash_attention_2"):
        model = tiny_llava(attn).to("cuda", torch.bfloat16)
        found[attn], _, _ = generate(model, BATCHES["single"], STRATEGIES[strategy]())
    torch.testing.assert_close(found["sdpa"].float(), found["flash_attention_2"].float(), atol=0.1, rtol=0.1)
