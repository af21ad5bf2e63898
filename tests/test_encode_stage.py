"""Strategies inside vision encoders without a class token, in packed towers that join patches, and over tiles: golden
vectors of the published code, and the promises."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import transformers
from harness import ask
from models import IMAGE, preencoding, tiny_llava, tiny_qwen, tiny_tiled
from oracle import Turn, Watch, _packed_masks, _window_index, oracle_logits
from test_families import PROMPTS, besides, fed, inputs_of, run
from test_golden_flowcut import KERNELS, golden, load_weights, tensor
from transformers import DynamicCache
from zoo import glm, qwen2, qwen3
from zoo import model_of as model_of_kind

import vtprune
from vtprune.engine.attention import Request, attention_rows
from vtprune.families.base import Layout, Site
from vtprune.families.llava import LLAVA_NEXT
from vtprune.families.qwen import _by_window
from vtprune.pruner import Keep, Needs
from vtprune.reporting import SampleReport
from vtprune.strategies.flowcut import drop_count

QWEN = "flowcut_qwen_vit_d8_16x12_t8"


def golden_qwen(attn: str):
    z = golden(QWEN)
    vision = {
        "depth": int(z["depth"]),
        "embed_dim": int(z["embed_dim"]),
        "num_heads": int(z["num_heads"]),
        "hidden_size": int(z["hidden"]),
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "mlp_ratio": 2,
        "hidden_act": "quick_gelu",
    }
    text = {
        "hidden_size": int(z["hidden"]),
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "pad_token_id": 0,
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attn).eval()
    load_weights(model.model.visual, z)
    return z, model


@KERNELS
@torch.no_grad()
def test_published_pruning_inside_qwens_tower(attn):
    z, model = golden_qwen(attn)
    target = int(z["target_num"])
    joined, left = [], {}
    model.model.visual.merger.register_forward_hook(lambda module, args, output: joined.append(output))
    size = int(z["grid_thw"].prod()) // 4
    ids = torch.tensor([[1, 97, *[IMAGE] * size, 96, 5, 6]])
    given = {"pixel_values": tensor(z["pixel_values"]), "image_grid_thw": tensor(z["grid_thw"])}

    class Watched(vtprune.FlowCut):
        def encode(self, view):
            keep = super().encode(view)
            if keep is not None:
                left[view.layer] = view.index[0, keep.indices[0]]
            return keep

    strategy = Watched(keep=2 * target, decoder_keep=target, groups="survivors")
    with vtprune.pruning(model, strategy) as session:
        model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), **given)
        sample = session.report.samples[0]
    assert [len(index) for index in left.values()] == z["kept_at_prune"].tolist()
    assert left[7].tolist() == z["keep_patch_indices"].tolist()
    torch.testing.assert_close(joined[0], tensor(z["merged_features"]), atol=2e-4, rtol=0)
    assert [len(layer) for layer in sample.layers] == [2 * target, 2 * target, target]


def test_unit_scores_of_published_code_without_a_class_token():
    z, ratios = golden("flowcut_unit_score"), golden("flowcut_unit_ratio")
    for i in range(int(z["n"])):
        attention, value = tensor(z[f"c{i}.cls_attn"]), tensor(z[f"c{i}.value"])
        # the mean query's row sums to 1 in a model; here the score's formula alone is held
        torch.testing.assert_close(attention * value.abs().sum(-1), tensor(z[f"c{i}.qwen_vit_score"]), atol=1e-7, rtol=1e-5)
    for i in range(40):
        attention, target, remaining = tensor(ratios[f"c{i}.attn"]), int(ratios["target"][i]), int(ratios["remaining"][i])
        counts = drop_count(attention, target, remaining, 2.0, 0.5, 1e-7)
        assert counts.tolist() == [max(0, n) for n in ratios[f"c{i}.qwen"].tolist()]


# ---------------------------------------------------------------------- tiles


@torch.no_grad()
def test_published_tile_merging():
    """Kept tokens of the tiles in global raster order behind the whole picture's, without padding and newlines."""
    z = golden("flowcut_anyres_sq22_landscape")
    features, kept = tensor(z["tile_features"]), tensor(z["keep_indices"])
    width = features.shape[-1]
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 3}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            **sizes, num_attention_heads=1, image_size=336, patch_size=14, projection_dim=4
        ),
        text_config=transformers.LlamaConfig(**sizes, num_attention_heads=1, vocab_size=100, pad_token_id=0),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[336 * int(z["grid_h"]), 336 * int(z["grid_w"])]],
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextModel._from_config(config).eval()
    model.multi_modal_projector = torch.nn.Identity()
    model.image_newline.copy_(tensor(z["image_newline"]))
    model.get_input_embeddings().weight[: len(z["text_table"])] = tensor(z["text_table"])

    class Golden(vtprune.FlowCut):
        """Leaves the golden patches of each tile, with the golden features in place of the random tower's."""

        def encode_needs(self, encoder):
            return {encoder.depth - 1: Needs()}

        def encode(self, view):
            assert [of for _, of in view.parts] == [len(features)] * len(features)
            tiles = [which for which, _ in view.parts]
            return Keep(kept[tiles], features[tiles])

    size = torch.tensor([[int(z["orig_h"]), int(z["orig_w"])]])
    (layout,) = Site(LLAVA_NEXT, model).layouts(size)
    before, _, after = (ids := z["input_ids"][0].tolist())[:2], 0, z["input_ids"][0].tolist()[3:]
    assert ids[1] == 2 and z["visual_token_pos"] == 2
    ids = torch.tensor([[*before, *[IMAGE] * layout.placeholders, *after]])
    pixels = torch.randn(1, len(features), 3, 336, 336)
    entered = []
    model.language_model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with vtprune.pruning(model, Golden(keep=kept.shape[1], split="tile", newlines="none")) as session:
        model(input_ids=ids, pixel_values=pixels, image_sizes=size)
        sample = session.report.samples[0]
    torch.testing.assert_close(entered[0][0, 2:-3], tensor(z["visual_sequence"]), atol=0, rtol=0)
    torch.testing.assert_close(entered[0][0], tensor(z["full_embeds"]), atol=1e-6, rtol=0)
    assert len(sample.kept) == int(z["visual_token_num"])
    # one newline for each row that unpadding leaves, and all of them are gone
    assert len(sample.separators) == layout.placeholders - layout.size > 0
    with vtprune.pruning(model, Golden(keep=kept.shape[1], split="tile")) as session:
        model(input_ids=ids, pixel_values=pixels, image_sizes=size)
        assert session.report.samples[0].separators == []
    assert entered[1].shape[1] == entered[0].shape[1] + layout.placeholders - layout.size


# ---------------------------------------------------------------------- the promises

# attention of random models is almost flat, and then next to nothing leaves before the last cut: the exponent changes that
FLOW = {
    "flowcut": lambda: vtprune.FlowCut(keep=11, entropy_power=60.0),
    "flowcut-twice": lambda: vtprune.FlowCut(keep=14, decoder_keep=7, every=1, entropy_power=60.0),
}
CASES = {
    ("siglip", "visionzip"): lambda: vtprune.VisionZip(keep=12),
    ("onevision", "flowcut"): lambda: vtprune.FlowCut(keep=30, entropy_power=60.0),
    ("onevision", "flowcut-bare"): lambda: vtprune.FlowCut(keep=9, decoder_keep=14, split="tile", newlines="none"),
    ("onevision", "visionzip"): lambda: vtprune.VisionZip(keep=40),
    ("next", "flowcut-bare"): lambda: vtprune.FlowCut(keep=9, decoder_keep=14, split="tile", newlines="none"),
    ("next", "bare+fastv"): lambda: vtprune.FlowCut(keep=40, newlines="none") + vtprune.FastV(keep=30, layer=1),
    ("qwen2", "flowcut-survivors"): lambda: vtprune.FlowCut(keep=14, decoder_keep=7, groups="survivors", entropy_power=60.0),
    ("qwen2.5", "flowcut-survivors"): lambda: vtprune.FlowCut(keep=14, every=1, groups="survivors"),
    ("qwen2", "flowcut+fastv+evict"): lambda: vtprune.create("flowcut+fastv+evict", keep=9, layer=1),
    **{(family, name): FLOW[name] for family in ("siglip", "qwen2", "qwen2.5") for name in FLOW},
}
every_case = pytest.mark.parametrize("family, strategy", CASES)


@lru_cache
def model_of(family: str, attn: str = "sdpa"):
    if family == "siglip":
        return tiny_llava(attn, siglip=True)
    return tiny_qwen(attn, version=family[4:], blocks=6) if family.startswith("qwen") else tiny_tiled(family, attn)


def inputs(family: str, prompts=PROMPTS):
    # LLaVA's pictures are those of Video-LLaVA, but for the argument's name
    ids, given = inputs_of("vipllava" if family == "siglip" else family, prompts)
    return ids, given


def oracle(model, tokens, logits, report, watch, ids, given, compact) -> None:
    first = 0
    for row, one in enumerate(given):
        turn = watch.turn(ids[row], tokens[row].tolist(), report.samples[row], one.get("pixel_values"), row, first)
        turn.extra = besides(one)
        first += len(report.samples[row].images)
        expected = oracle_logits(model, [turn], compact)[len(ids[row]) - 1 : -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@every_case
def test_keep_all_is_bit_identical(family, strategy):
    model = model_of(family)
    ids, given = inputs(family)
    everything = CASES[family, strategy]()
    for part in getattr(everything, "parts", [everything]):
        part.keep = 1.0
        if hasattr(part, "decoder_keep"):
            part.decoder_keep = None
    tokens, logits, _, _ = run(model, ids, given)
    kept, pruned, report, _ = run(model, ids, given, everything)
    assert torch.equal(tokens, kept) and torch.equal(logits, pruned)
    assert all(s.kept.tolist() == list(range(s.visual_tokens)) and s.encoded == [] for s in report.samples)
    assert report.flops == report.flops_full and report.kv_bytes == report.kv_bytes_full


@every_case
@KERNELS
def test_masking_equals_removing(family, strategy, attn):
    model = model_of(family, attn)
    ids, given = inputs(family)
    for positions in [None] if family.startswith("qwen") else ["original", "compact"]:
        tokens, logits, report, watch = run(model, ids, given, CASES[family, strategy](), positions)
        assert report.flops < report.flops_full and report.kv_bytes < report.kv_bytes_full
        if strategy in FLOW:
            blocks = [block for sample in report.samples for block, _ in sample.encoded]
            assert len(set(blocks)) > 1 and min(blocks) < 4  # of five or six
        oracle(model, tokens, logits, report, watch, ids, given, positions == "compact")


@every_case
def test_batch_equals_single(family, strategy):
    model = model_of(family)
    ids, given = inputs(family)
    tokens, logits, report, _ = run(model, ids, given, CASES[family, strategy]())
    for row, one in enumerate(given):
        alone, by_itself, single, _ = run(model, [ids[row]], [one], CASES[family, strategy]())
        assert torch.equal(tokens[row], alone[0])
        torch.testing.assert_close(logits[row], by_itself[0], atol=1e-4, rtol=1e-4)
        for a, b in zip(report.samples[row].layers, single.samples[0].layers, strict=True):
            assert torch.equal(a, b)
        assert report.samples[row].separators == single.samples[0].separators


@every_case
def test_cached_equals_uncached(family, strategy):
    model = model_of(family)
    ids, given = inputs(family)
    if "evict" in strategy:
        pytest.skip("without a cache there is nothing to evict")
    cached = run(model, ids, given, CASES[family, strategy]())
    uncached = run(model, ids, given, CASES[family, strategy](), use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], atol=1e-4, rtol=1e-4)


@every_case
@torch.no_grad()
def test_cache_holds_what_the_report_says(family, strategy):
    model = model_of(family)
    ids, given = inputs(family)
    with vtprune.pruning(model, CASES[family, strategy]()) as session:
        out = model(**fed(ids, given), use_cache=True)
        report = session.report
    held = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert held == report.kv_bytes
    for sample, row in zip(report.samples, ids, strict=True):
        assert len(sample.kept) == len(set(sample.kept.tolist()))
        text = len(row) - row.count(IMAGE)
        stay = row.count(IMAGE) - sample.visual_tokens - len(sample.separators)
        assert stay == 0 or "bare" not in strategy
        assert len(row) - sample.visual_tokens == text + stay + len(sample.separators)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen2.5", marks=preencoding)])
@pytest.mark.parametrize("strategy", ["flowcut-twice", "flowcut-survivors"])
def test_chat_goes_on_over_the_same_cache(family, strategy):
    model = model_of(family)
    ids, given = inputs(family, PROMPTS[1:2])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    pruner = CASES[family, strategy]()
    with vtprune.pruning(model, pruner) as session:
        watch = Watch(model, pruner)
        one = model.generate(**fed(ids, given), past_key_values=DynamicCache(config=model.config.text_config), **options)
        said = [*one.sequences[0, len(ids[0]) :].tolist(), 7, 8, 9]
        turn = watch.turn(ids[0], said, session.report.samples[0], given[0]["pixel_values"], 0, 0)
        watch.close()
        whole = torch.tensor([ids[0] + said])
        two = model.generate(input_ids=whole, past_key_values=one.past_key_values, **options)
    turn.generated = said + two.sequences[0, whole.shape[1] :].tolist()
    turn.extra = besides(given[0])
    expected = oracle_logits(model, [turn], compact=False)[whole.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(two.logits, 1)[0], expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- towers that join patches

JOINING = {kind.name: kind for kind in [*qwen2.KINDS, *qwen3.KINDS, *glm.KINDS] if kind.available}
every_tower = pytest.mark.parametrize("name", JOINING)
DEEP = [name for name in JOINING if name.startswith("qwen3-vl")]


@dataclass
class Fixed(vtprune.Pruner):
    """Keeps given cells of each picture, after a given block; `odd` drops one patch of them besides."""

    keep: float = 0.5
    block: int | None = None
    odd: bool = False
    name = "fixed"
    cells = True

    def encode_needs(self, encoder):
        return {encoder.last if self.block is None else self.block: Needs()}

    def encode(self, view):
        assert view.cell == 4 and view.tokens == 4 * view.total and view.target(self.keep) == round(self.keep * view.total)
        assert view.index.tolist() == [list(range(view.tokens))] * len(view.index) and view.grid[0] * view.grid[1] == view.total
        patches = torch.arange(view.tokens).view(-1, 4)[::3].flatten()
        return Keep([patches[self.odd :]] * len(view.index))


def tower_of(name: str, pictures=("A", "B", "A")):
    """A family's model, what goes into its tower, and for the cells of all pictures together whether `Fixed` keeps them."""
    asked = ask(JOINING[name], [[1, *pictures]])
    sizes = (asked.given[0]["image_grid_thw"].prod(-1) // 4).tolist()
    return model_of_kind(JOINING[name]), asked.given[0], torch.cat([torch.arange(n) % 3 == 0 for n in sizes])


def features_of(model, given):
    """Features of all pictures, and those of inner blocks."""
    output = model.model.get_image_features(**given, return_dict=True)
    levels = output.get("deepstack_features", ())
    # newer versions split these by picture as well
    inner = [level if isinstance(level, torch.Tensor) else torch.cat(list(level)) for level in levels]
    return torch.cat(list(output.pooler_output)), inner


@every_tower
@torch.no_grad()
def test_cells_are_where_they_were(name):
    model, given, kept = tower_of(name)
    whole, _ = features_of(model, given)
    with vtprune.pruning(model, Fixed()):
        features, _ = features_of(model, given)
        pictures = model.model.get_image_features(**given, return_dict=True).pooler_output
    for picture, mine in zip(pictures, kept.split([24, 30, 24]), strict=True):
        assert picture._vtprune.item.index.tolist() == mine.nonzero()[:, 0].tolist()
    # after the last block nothing attends any more, so they are what they were
    torch.testing.assert_close(features[kept], whole[kept], atol=1e-5, rtol=1e-5)
    assert not features[~kept].any() and whole[~kept].any(-1).all()


@every_tower
@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_features_are_those_of_a_tower_that_attends_to_what_is_left(name, block):
    """Also of inner blocks, those before the cut and those behind it."""
    model, given, kept = tower_of(name)
    whole, inner = features_of(model, given)
    cut = [(block, kept.nonzero()[:, 0])]
    sample = SampleReport(len(kept), cut[0][1], [], encoded=cut, images=[24, 30, 24], frames=[1] * 3)
    (undo,) = _packed_masks(model, [Turn([], [], sample, None, given)])
    try:
        masked, inner_masked = features_of(model, given)
    finally:
        undo.remove()
    with vtprune.pruning(model, Fixed(block=block)):
        left, inner_left = features_of(model, given)
    assert not left[~kept].any()
    torch.testing.assert_close(left[kept], masked[kept], atol=1e-5, rtol=1e-5)
    last = block + 1 == len(model.model.visual.blocks)
    assert torch.allclose(masked[kept], whole[kept], atol=1e-3) == last, "blocks that follow miss what was cut"
    joined = getattr(model.model.visual, "deepstack_visual_indexes", [])
    assert len(inner_left) == len(inner_masked) == len(joined)
    for at, less, mask, full in zip(joined, inner_left, inner_masked, inner, strict=True):
        torch.testing.assert_close(less[kept], mask[kept], atol=1e-5, rtol=1e-5)
        if at < block:
            assert torch.equal(less, full)
        else:
            assert not less[~kept].any()
    again, _ = features_of(model, given)
    assert torch.equal(again, whole)


@every_tower
@torch.no_grad()
def test_patches_that_make_no_whole_token_are_refused(name):
    model, given, _ = tower_of(name, "A")
    with vtprune.pruning(model, Fixed(odd=True)), pytest.raises(vtprune.VtpruneError, match="joins 4 at a time"):
        features_of(model, given)
    # and nothing of that run is left behind
    assert not model.model.visual.blocks[0]._forward_pre_hooks and "get_image_features" not in vars(model.model)


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_patches_joined_between_blocks_leave_by_whole_cells(name):
    model, given, _ = tower_of(name, "A")
    with vtprune.pruning(model, Fixed(block=0, odd=True)), pytest.raises(vtprune.UnsupportedError, match="whole cells of 4"):
        features_of(model, given)
    with pytest.raises(vtprune.UnsupportedError, match=r"inner blocks as well.*groups='cells'"):
        vtprune.wrap(model, vtprune.FlowCut(keep=8, groups="survivors"))


def test_the_order_of_windows_is_the_towers():
    visual = model_of("qwen2.5").model.visual
    for grids in ([[1, 8, 12]], [[1, 12, 10], [1, 8, 8], [2, 4, 14]]):
        layouts = [Layout(t * h * w // 4, grid=(h // 2, w // 2), frames=t) for t, h, w in grids]
        side = visual.window_size // 2 // visual.patch_size
        assert side == 2
        assert _by_window(side, layouts).tolist() == _window_index(visual, torch.tensor(grids)).tolist()


@torch.no_grad()
def test_windows_close_up():
    """Blocks run on what is left of each window or picture, and are counted so."""
    model, lengths = model_of("qwen2.5"), []
    _, given = inputs("qwen2.5", [[1, "A", "B"]])
    for block in model.model.visual.blocks:
        block.register_forward_pre_hook(
            lambda m, args, kwargs: lengths.append(kwargs["cu_seqlens"].diff().tolist()), with_kwargs=True
        )
    model.model.get_image_features(**given[0], return_dict=True)
    full, lengths[:] = list(lengths), []
    with vtprune.pruning(model, Fixed(block=1)):
        features = model.model.get_image_features(**given[0], return_dict=True).pooler_output
    for block in model.model.visual.blocks:
        block._forward_pre_hooks.clear()
    encoding = features[0]._vtprune.encoding
    # hooks that were there before see what the tower hands to a block, the engine's what is left of it
    assert lengths == full == encoding.unpruned() and encoding.lengths[:2] == full[:2]
    assert encoding.lengths[3] == encoding.lengths[5] == [4 * 8, 4 * 10]
    assert all(sum(n) == 4 * 18 and min(n) > 0 and max(n) <= 16 for n in (encoding.lengths[2], encoding.lengths[4]))


@every_tower
def test_pictures_beside_videos(name):
    """Inside the tower only pictures lose patches; a later stage cuts both."""
    kind = JOINING[name]
    model, prompt = model_of_kind(kind), [[2, "A", 3, "V", 4]] if kind.mixes else [[2, "V", 4]]
    given = ask(kind, prompt).inputs()
    with pytest.raises(vtprune.UnsupportedError, match="video"), vtprune.pruning(model, "flowcut", keep=8):
        model(**given)
    with torch.no_grad(), vtprune.pruning(model, vtprune.FlowCut(keep=8, decoder_keep=6)) as session:
        model(**given)
        sample = session.report.samples[0]
    assert sample.frames == [1, 4][-len(sample.images) :] and len(sample.kept) == (8 + 24 if kind.mixes else 24)
    assert len(sample.layers[-1]) == 6 * len(sample.images)
    notes = session.report.notes
    assert any("no videos" in note for note in notes) and any("mean query" in note for note in notes) == kind.mixes


# ---------------------------------------------------------------------- rows, notes and refusals


@pytest.mark.parametrize("queries", ["mean", "patches"])
@pytest.mark.parametrize("special", [0, 1])
def test_rows_of_all_patches_leave_padding_out(queries, special, monkeypatch):
    monkeypatch.setattr("vtprune.engine.attention.CHUNK", 3)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, special + 7, 8) for _ in range(3))
    counts = [7, 5]
    valid = torch.arange(special + 7) < special + torch.tensor(counts)[:, None]
    columns = torch.arange(special, special + 7).expand(2, -1)
    rows = attention_rows(
        q, k, v, 0.3, Request(Needs(queries=queries, keys=True, values=True), None, None, columns, valid, None)
    )
    for item, n in enumerate(counts):
        s = slice(special, special + n)
        query = q[item, :, s].mean(1, keepdim=True) if queries == "mean" else q[item, :, s]
        weights = (query @ k[item, :, : special + n].mT * 0.3).softmax(-1)[..., special:].mean(1)
        torch.testing.assert_close(rows.attention()[item, :, 0, :n], weights, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(rows.query_values[item, :, 0], v[item, :, s].mean(1), atol=1e-6, rtol=1e-5)
        assert not rows.attention()[item, :, :, n:].any()
        torch.testing.assert_close(rows.keys[item, :, :n], k[item, :, s])


@torch.no_grad()
def test_substitutes_are_noted():
    model = model_of("siglip")
    ids, given = inputs("siglip", PROMPTS[:1])
    for strategy, note in (("flowcut", "mean query"), ("visionzip", "attention that they get")):
        with vtprune.pruning(model, strategy, keep=9) as session:
            model(**fed(ids, given))
        assert any(note in line for line in session.report.notes)


@pytest.mark.parametrize("strategy", ["visionzip", "mustdrop"])
def test_what_cannot_choose_among_cells_is_refused(strategy):
    match = "cls" if strategy == "mustdrop" else "merges patches two by two"
    with pytest.raises(vtprune.UnsupportedError, match=match):
        vtprune.wrap(model_of("qwen2"), strategy, keep=8)


def test_rows_that_an_encoder_does_not_have_are_refused():
    class Cls(Fixed):
        def encode_needs(self, encoder):
            return {1: Needs(queries="cls")}

    class Windowed(Fixed):
        def encode_needs(self, encoder):
            return {2: Needs(queries="mean")}

    with pytest.raises(vtprune.VtpruneError, match="class token"):
        vtprune.wrap(model_of("qwen2"), Cls())
    with pytest.raises(vtprune.VtpruneError, match="within windows"):
        vtprune.wrap(model_of("qwen2.5"), Windowed())


@pytest.mark.parametrize("field", ["split", "newlines", "groups"])
def test_fields_without_meaning(field):
    with pytest.raises(vtprune.BudgetError, match=f"{field}='other'"):
        vtprune.FlowCut(**{field: "other"})
