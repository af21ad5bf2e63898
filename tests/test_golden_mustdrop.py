"""MustDrop against its published code: indices exactly, floats to 1e-4 (tests/golden/README.md)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_golden_flowcut import KERNELS, ProjectorInput, golden, tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

import vtprune
from vtprune.merge import window_similarity, windows
from vtprune.pruner import EncodeView, PrefillView, Rows
from vtprune.strategies.mustdrop import MustDrop, dual_attention

PATCHES = 144
IMAGE = 63  # a word of the golden vocabulary that the prompt does not use; its embedding is replaced


# ---------------------------------------------------------------------- the stages alone


def encode_view(hidden: torch.Tensor, grid: tuple[int, int], layer: int = 0, rows: Rows | None = None) -> EncodeView:
    """Block `layer` of 24, of which 23 feed the projector; `hidden` starts with CLS."""
    index = torch.arange(hidden.shape[1] - 1)[None]
    sizes = (grid[0] * grid[1],)
    return EncodeView(
        index, sizes, {}, layer=layer, depth=23, hidden=hidden[:, 1:], special=hidden[:, :1], rows=rows, grid=grid
    )


def merged_order(similarity: np.ndarray, grid: int, w: int, threshold: float) -> list[int]:
    """Patch numbers in the published order after merging, a window by its first patch; in plain loops."""
    side = grid // w
    first = [(i // side) * w * grid + (i % side) * w for i in range(side * side)]
    chosen = [i for i in np.argsort(-similarity, kind="stable") if similarity[i] >= threshold]
    inside = {first[i] + y * grid + x for i in chosen for y in range(w) for x in range(w)}
    return [first[i] for i in chosen] + [j for j in range(grid * grid) if j not in inside]


def test_merging():
    z = golden("mustdrop_merge_w3_b1")
    hidden, grid, w = tensor(z["hidden"]), int(z["grid"]), int(z["window"])
    strategy = MustDrop(window=w, sim_thr=float(z["threshold"]))
    similarity = window_similarity(hidden[:, 1:], windows((grid, grid), w))
    torch.testing.assert_close(similarity, tensor(z["window_similarity"]), atol=1e-5, rtol=0)
    answer = strategy.encode(encode_view(hidden, (grid, grid)))
    order = merged_order(z["window_similarity"][0], grid, w, float(z["threshold"]))
    assert order[int(z["r"]) :] == z["unmerged_patch_ids"][0].tolist()
    assert answer.ordered and answer.indices[0].tolist() == order
    torch.testing.assert_close(answer.hidden[0], tensor(z["merged_hidden"])[0, 1:], atol=1e-5, rtol=0)
    sizes = 1 + (answer.into[0][None] == answer.indices[0][:, None]).sum(1)
    assert sizes.tolist() == z["size"][0, 1:, 0].tolist()


def test_merging_in_the_tower():
    z = golden("mustdrop_keyset_b1")
    answer = MustDrop().encode(encode_view(tensor(z["layer0_out"]), (12, 12)))
    torch.testing.assert_close(answer.hidden[0], tensor(z["layer1_in"])[0, 1:], atol=1e-5, rtol=0)
    assert answer.indices[0].tolist() == merged_order(z["window_similarity"][0], 12, 3, 0.8)


def test_key_set():
    z = golden("mustdrop_keyset_b1")
    attention = tensor(z["cls_attn_layer23"])
    rows = Rows(attention[:, :, None].log(), torch.zeros(1, 2, 1), torch.ones(1, 1, dtype=torch.bool))
    view = encode_view(torch.zeros(1, 97, 16), (12, 12), layer=23, rows=rows)
    assert MustDrop(key_rate=float(z["key_rate"])).encode(view) is None
    assert view.carry["key"].nonzero()[:, 1].tolist() == sorted(z["key_idx"][0].tolist())


@pytest.mark.parametrize("name", ["64", "noop_defaults"])
def test_dual_attention(name):
    z = golden(f"mustdrop_dualattn_{name}")
    attention = tensor(z["attn_text_to_vis"])[None]
    total, highest = dual_attention(attention)
    torch.testing.assert_close(total[0], tensor(z["colsum"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(highest[0], tensor(z["colmax"]), atol=1e-5, rtol=0)

    tokens = attention.shape[-1]
    strategy = MustDrop(global_thr=float(z["global_thr"]), individual_thr=float(z["individual_thr"]))
    key = torch.zeros(1, tokens, dtype=torch.bool).index_fill_(1, tensor(z["key_set_in"]), True)
    for carry, expected in (({}, z["filter_keep"]), ({"key": key}, z["union_keep"])):
        heads, text = attention.shape[1:3]
        rows = Rows(attention.log(), torch.zeros(1, heads, text), torch.ones(1, text, dtype=torch.bool))
        index = torch.arange(tokens)[None]
        view = PrefillView(index, (tokens,), carry, layer=3, depth=32, rows=rows, computed=(tokens,) * 3)
        answer = strategy.prefill(view)
        kept = index[0] if answer is None else answer.indices[0]
        assert kept.tolist() == expected.tolist()
        assert (answer is None) == (name == "noop_defaults")
    assert torch.isin(tensor(z["union_keep"]), tensor(z["key_set_in"])).nonzero()[:, 0].tolist() == z["key_set_out"].tolist()


# ---------------------------------------------------------------------- the whole method on the published weights


def golden_llava(attn: str) -> LlavaForConditionalGeneration:
    z = golden("mustdrop_e2e_weights")
    vision, text = json.loads(str(z["vision_config"])), json.loads(str(z["llm_config"]))
    theta = text.pop("rope_theta")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(
            **text,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn).eval().float()
    flat = not hasattr(model.model.vision_tower, "vision_model")
    weights = {}
    for name, value in z.items():
        part, _, rest = name.partition("/")
        if not rest:
            continue
        if part == "vision":
            inner = "model.vision_tower." + (rest.removeprefix("vision_model.") if flat else rest)
        elif part == "projector":
            layer, kind = rest.split(".")
            inner = f"model.multi_modal_projector.linear_{1 + int(layer) // 2}.{kind}"
        else:
            inner = rest if rest.startswith("lm_head") else rest.replace("model.", "model.language_model.", 1)
        weights[inner] = tensor(value)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and [name for name in missing if "position_ids" not in name] == []
    model.generation_config.eos_token_id = None
    return model


class Traced(MustDrop):
    """Notes the filter's statistics and choices, and the numbers of the tokens it chose from."""

    seen: dict = {}

    def prefill(self, view):
        total, highest = dual_attention(view.rows.attention())
        keep = super().prefill(view)
        self.seen[view.layer] = (view.index[0].clone(), total[0], highest[0], keep.indices[0])
        return keep


def golden_prompt(z) -> torch.Tensor:
    ids = z["input_ids"][0].tolist()
    at = ids.index(int(z["image_token_id"]))
    assert at == int(z["v_start"]) and IMAGE not in ids
    return torch.tensor([[*ids[:at], *[IMAGE] * PATCHES, *ids[at + 1 :]]])


def strategy_of(z, kind: type[MustDrop] = MustDrop) -> MustDrop:
    return kind(
        global_thr=float(z["global_thr"]),
        individual_thr=float(z["individual_thr"]),
        window=int(z["window"]),
        sim_thr=float(z["sim_thr"]),
        key_rate=float(z["key_rate"]),
        layers=tuple(z["prune_layers"].tolist()),
    )


@KERNELS
@torch.no_grad()
def test_end_to_end(attn, monkeypatch):
    z = golden("mustdrop_e2e_a_single")
    monkeypatch.setattr(Traced, "seen", {})
    model, ids, pixels = golden_llava(attn), golden_prompt(z), tensor(z["pixel_values"])
    order = np.array(merged_order(z["window_similarity"][0], 12, 3, float(z["sim_thr"])))
    assert len(order) == int(z["V0"])
    text = ids.shape[1] - PATCHES
    projected = ProjectorInput(model)
    cache = DynamicCache(config=model.config.text_config)
    with vtprune.pruning(model, strategy_of(z, Traced)) as session:
        out = model(input_ids=ids, pixel_values=pixels, past_key_values=cache, use_cache=True)
        sample = session.report.samples[0]

        torch.testing.assert_close(projected.value, tensor(z["vision_features"]), atol=1e-4, rtol=0)
        assert sample.kept.tolist() == sorted(order.tolist())
        assert [text + len(layer) for layer in sample.layers] == z["prefill_len_per_layer"].tolist()
        # each filter: what it saw, in order; what it chose
        alive = order
        for stage, layer in enumerate(z["prune_layers"].tolist()):
            index, total, highest, kept = Traced.seen[layer + 1]
            assert index.tolist() == alive.tolist()
            torch.testing.assert_close(total, tensor(z[f"stage{stage}_colsum"]), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(highest, tensor(z[f"stage{stage}_colmax"]), atol=1e-4, rtol=1e-4)
            alive = order[z[f"stage{stage}_img_keep_abs"]]
            assert index[kept].tolist() == alive.tolist()
            assert sample.layers[layer + 1].tolist() == alive.tolist()
        # key tokens are never dropped
        assert set(order[z["key_set_flat"]].tolist()) <= set(alive.tolist())

        torch.testing.assert_close(out.logits[0, -1], tensor(z["prefill_last_logits"]), atol=1e-4, rtol=0)
        assert int(out.logits[0, -1].argmax()) == int(z["generated"][0])

        assert [layer.keys.shape[-2] for layer in cache.layers] == z["kv_len_after_prefill"].tolist()
        for layer in (0, 2, 5, 9, 13, 20):
            torch.testing.assert_close(cache.layers[layer].keys[0], tensor(z[f"kv{layer}_k"]), atol=1e-4, rtol=0)
            torch.testing.assert_close(cache.layers[layer].values[0], tensor(z[f"kv{layer}_v"]), atol=1e-4, rtol=0)
        assert [len(layer) for layer in sample.cached] == [n - text for n in z["kv_len_after_prefill"].tolist()]


@KERNELS
@torch.no_grad()
def test_final_hidden_states(attn):
    z = golden("mustdrop_e2e_a_single")
    model, ids = golden_llava(attn), golden_prompt(z)
    with vtprune.pruning(model, strategy_of(z)):
        hidden = model.model(input_ids=ids, pixel_values=tensor(z["pixel_values"])).last_hidden_state[0]
    # rows of dropped tokens are zero; the others come in the order in which the tokens flow
    assert len(hidden) == ids.shape[1]
    torch.testing.assert_close(hidden[hidden.any(-1)], tensor(z["prefill_final_hidden"]), atol=1e-4, rtol=0)


@KERNELS
@torch.no_grad()
def test_generation_starts_as_published(attn):
    # later steps differ on purpose: the published code puts a new token where that layer's cache ends, which in the
    # layers that the third stage cut lies before the text that the token follows
    z = golden("mustdrop_e2e_a_single")
    model, ids = golden_llava(attn), golden_prompt(z)
    mask = torch.ones_like(ids)
    with vtprune.pruning(model, strategy_of(z)) as session:
        out = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=tensor(z["pixel_values"]), max_new_tokens=4, do_sample=False
        )
        assert session.report.equivalent_tokens == pytest.approx(
            np.mean(z["prefill_len_per_layer"]) - len(z["input_ids"][0]) + 1
        )
    assert out.shape[1] == ids.shape[1] + 4
    assert int(out[0, ids.shape[1]]) == int(z["generated"][0])
