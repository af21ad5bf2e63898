"""What pruning costs, in counts that no noise moves: reads from the device, gathers, operations, masks, bytes, FLOPs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from models import GRID, IMAGE, TOKENS, batch, images, prompt, tiny_llava
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune import select
from vtprune.measure.bench import allocated

# each of these waits for a GPU when its tensor lies there
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu", "equal", "masked_select"}
GATHERS = {"aten.gather.default", "aten.index.Tensor", "aten.index_select.default"}


class Reads(TorchFunctionMode):
    """Counts reads of tensors by the host."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.masks: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found[name] += 1
        if name == "scaled_dot_product_attention":
            self.masks.append((kwargs or {}).get("attn_mask") is not None)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations, and those of them that gather vectors of the model's width."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.found, self.gathers = width, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        if str(func) in GATHERS and args[0].ndim >= 2 and args[0].shape[-1] == self.width:
            self.gathers += 1
        return func(*args, **(kwargs or {}))


def forward(model, prompts, pruner=None, watch=None, pixels=None):
    """One prefill; the output, and what `watch` had counted when the last decoder layer was through."""
    given = batch(prompts)
    if all(len(p) == len(prompts[0]) for p in prompts):
        del given["attention_mask"]  # as generate does
    given["pixel_values"] = images(sum(p.count(IMAGE) // TOKENS for p in prompts)) if pixels is None else pixels
    counted = {}

    def snapshot(*_):
        counted.update(getattr(watch, "found", {}))

    handle = model.model.language_model.layers[-1].register_forward_hook(snapshot)
    try:
        # transformers' own recording of hidden states is outside inference mode as well
        with torch.no_grad():
            if pruner is None:
                if watch is None:
                    return model(**given, use_cache=True), counted, None
                with watch:
                    return model(**given, use_cache=True), counted, None
            with vtprune.pruning(model, pruner) as session:
                if watch is None:
                    out = model(**given, use_cache=True)
                else:
                    with watch:
                        out = model(**given, use_cache=True)
            return out, counted, session.report
    finally:
        handle.remove()


ONE = [prompt(2, "I", 5)]
EQUAL = [prompt(2, "I", 5)] * 3
# reads before the last decoder layer is launched, beyond the unpruned model's: one counts the placeholders per sample, as
# shapes follow from it; one checks the strategy's answer (at once on the CPU; on a GPU it is left for the end)
READS_OF = {
    "random": (lambda: vtprune.Random(keep=8), 3),  # and one for its seed, read from the CPU's list of ordinals
    "uniform": (lambda: vtprune.Uniform(keep=8), 2),
    "visionzip": (lambda: vtprune.VisionZip(keep=14), 2),
    "fastv": (lambda: vtprune.FastV(keep=24, layer=2), 2),
    "evict": (lambda: vtprune.Evict(keep=9), 1),
}


@pytest.mark.parametrize("strategy", READS_OF)
@pytest.mark.parametrize("prompts", [ONE, EQUAL], ids=["one", "three"])
def test_reads_before_prefill_is_launched(strategy, prompts):
    model = tiny_llava()
    make, allowed = READS_OF[strategy]
    _, bare, _ = forward(model, prompts, None, Reads())
    _, pruned, _ = forward(model, prompts, make(), Reads())
    assert sum(pruned.values()) - sum(bare.values()) == allowed, (dict(bare), dict(pruned))


@pytest.mark.parametrize("strategy", ["random", "uniform", "visionzip", "fastv"])
def test_reads_and_operations_do_not_grow_with_depth(strategy):
    added = []
    for layers in (4, 8):
        model, make = tiny_llava(layers=layers), READS_OF[strategy][0]
        reads, operations = [], []
        for pruner in (None, make()):
            watch = Reads()
            forward(model, ONE, pruner, watch)
            reads.append(sum(watch.found.values()))
            watch = Operations(32)
            _, counted, _ = forward(model, ONE, pruner, watch)
            operations.append(sum(counted.values()))
        added.append((reads[1] - reads[0], operations[1] - operations[0]))
    # a layer whose tokens are fewer runs the very operations that it runs unpruned: no mask, no position, no gather of its own
    assert added[0] == added[1], added


# one per cut; `select` is shown the features by one more, a layer that is asked ahead takes the wanted rows by one more
GATHERS_OF = {"random": 1 + 1, "uniform": 1 + 1, "fastv": 1, "pyramiddrop": 3 * (1 + 1)}


@pytest.mark.parametrize("strategy", GATHERS_OF)
def test_one_gather_per_cut(strategy):
    model = tiny_llava(layers=8)
    make = READS_OF[strategy][0] if strategy in READS_OF else lambda: vtprune.PyramidDrop(keep=20)
    counts = []
    for pruner in (None, make()):
        watch = Operations(32)
        forward(model, ONE, pruner, watch)
        counts.append(watch.gathers)
    assert counts[1] - counts[0] == GATHERS_OF[strategy], counts


def test_equal_counts_keep_the_causal_kernel_and_unequal_ones_are_masked():
    model = tiny_llava()
    for pruner in (
        vtprune.Random(keep=8),
        vtprune.DivPrune(keep=8),
        vtprune.FastV(keep=24, layer=2),
        vtprune.VisionZip(keep=14),
    ):
        watch = Reads()
        forward(model, EQUAL, pruner, watch)
        assert watch.masks and not any(watch.masks), pruner
    watch = Reads()
    forward(model, [prompt(2, "I", 5), prompt(4, "I", 3, "I", 6)], vtprune.Random(keep=8), watch)
    assert sum(watch.masks) == len(model.model.language_model.layers)


@pytest.mark.parametrize("strategy", ["random", "visionzip", "fastv", "flowcut", "divprune"])
def test_operations_do_not_grow_with_batch(strategy):
    """Views are batched: samples of equal shape cost no operation more, but for what is said per image in words."""
    model = tiny_llava()
    makers = {"flowcut": lambda: vtprune.FlowCut(keep=12), "divprune": lambda: vtprune.DivPrune(keep=8)}
    make = makers.get(strategy) or READS_OF[strategy][0]
    counts = {}
    for size in (1, 2, 4, 8):
        watch = Operations(32)
        _, counted, _ = forward(model, [prompt(2, "I", 5)] * size, make(), watch, images(1).expand(size, -1, -1, -1))
        counts[size] = sum(counted.values())
    # at most linear: eight samples add to four no more than twice what four add to two
    assert counts[8] - counts[4] <= 2 * (counts[4] - counts[2]) + 8, counts
    assert counts[8] < 2 * counts[1] or strategy == "divprune", counts  # greedy picks on a CPU go image by image


def test_operations_grow_with_images_no_faster_than_their_number():
    model = tiny_llava()
    counts = {}
    for number in (1, 2, 4, 8):
        watch = Operations(32)
        _, counted, _ = forward(model, [prompt(2, *(["I"] * number), 5)], vtprune.Random(keep=8), watch)
        counts[number] = sum(counted.values())
    assert counts[8] - counts[4] <= 2 * (counts[4] - counts[2]) + 8, counts


@pytest.mark.parametrize("strategy", ["random", "fastv", "evict", "flowcut+fastv+evict"])
def test_keys_and_values_to_the_byte_and_given_back(strategy):
    model = tiny_llava()
    make = {
        "flowcut+fastv+evict": lambda: vtprune.FlowCut(keep=20) + vtprune.FastV(keep=14, layer=1) + vtprune.Evict(keep=5),
    }.get(strategy) or READS_OF[strategy][0]
    out, _, report = forward(model, ONE, make())
    text = len(ONE[0]) - TOKENS
    config = model.config.text_config
    per_token = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    predicted = sum(text + len(layer) for layer in report.samples[0].cached) * per_token
    held = 0
    for layer in out.past_key_values.layers:
        for t in (layer.keys, layer.values):
            # nothing longer lies behind it
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
            held += t.untyped_storage().nbytes()
    assert held == predicted == report.kv_bytes


def test_flops_are_those_of_the_formula():
    model = tiny_llava()
    _, _, report = forward(model, ONE, vtprune.Random(keep=8))
    text, vision = model.config.text_config, model.config.vision_config
    head = text.hidden_size // text.num_attention_heads
    kv = text.num_key_value_heads * head

    def decoder(n: int) -> int:
        linear = 2 * text.hidden_size**2 + 2 * text.hidden_size * kv + 3 * text.hidden_size * text.intermediate_size
        return text.num_hidden_layers * (2 * n * linear + 4 * n * n * text.hidden_size)

    patches = GRID * GRID + 1
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    encoder = vision.num_hidden_layers * (2 * patches * block + 4 * patches**2 * vision.hidden_size)
    projector = 2 * TOKENS * (vision.hidden_size * text.hidden_size + text.hidden_size**2)
    length = len(ONE[0])
    assert report.flops_full == encoder + projector + decoder(length)
    assert report.flops == encoder + projector + decoder(length - TOKENS + 8)


def test_memory_of_prefill_falls_with_keep():
    model = tiny_llava(layers=8)
    prompts = [prompt(2, *(["I"] * 8), 5)]
    pixels = images(8)
    peaks = [
        allocated(lambda keep=keep: forward(model, prompts, vtprune.Random(keep=keep), pixels=pixels))
        for keep in (36, 24, 12, 4)
    ]
    with torch.no_grad():
        encoder = allocated(lambda: model.model.get_image_features(pixel_values=pixels, return_dict=True))
    # what no pruning of the decoder goes below: versions that keep the states of all encoder blocks take most of it there
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < max(0.6 * peaks[0], 1.1 * encoder), (peaks, encoder)


@pytest.mark.parametrize("choose", ["max_sum", "k_center", "dpp", "loneliest"])
def test_greedy_selections_hold_no_table_of_all_pairs(choose):
    tokens, k = 2000, 40
    x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(0))
    run = {
        "max_sum": lambda: select.max_sum(x, torch.tensor([0]), k),
        "k_center": lambda: select.k_center(x, torch.tensor([0]), k),
        "dpp": lambda: select.dpp(x, torch.ones(1, tokens), k),
        "loneliest": lambda: select.loneliest(x),
    }[choose]
    assert allocated(run) < 8 * tokens * tokens / 3


def test_greedy_selections_read_all_rows_far_less_often_than_once_a_pick(monkeypatch):
    made = []
    original = select._Table.__init__

    def noted(self, unit):
        original(self, unit)
        made.append(self)

    monkeypatch.setattr(select._Table, "__init__", noted)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, 64, generator=generator)
    x = (centres[torch.randint(30, (600,), generator=generator)] + 0.5 * torch.randn(600, 64, generator=generator))[None]
    products = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: (products.append(a.shape) if a.ndim == 2 else None, matmul(a, b))[1]
    )
    for run in (lambda: select.max_sum(x, torch.tensor([0]), 150), lambda: select.dpp(x, torch.ones(1, 600), 150)):
        products.clear()
        run()
        assert len([shape for shape in products if shape[1] == 64]) <= 150 / 3
    assert made and all(len(table.rows) <= 600 for table in made)
