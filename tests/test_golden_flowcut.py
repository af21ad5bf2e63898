"""FlowCut against its published code: kept indices exactly, features to 2e-4 (tests/golden/README.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from models import preencoding
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtprune
from vtprune.pruner import PrefillView, Rows
from vtprune.strategies import flowcut
from vtprune.strategies.flowcut import drop_count, entropy_ratio, flow_score

GOLDEN = Path(__file__).parent / "golden"
IMAGE = 9
CLIP = ("flowcut_clip_l24_n144_trace", "flowcut_clip_oddlayers_l7_n36")
KERNELS = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return dict(archive)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def load_weights(module: torch.nn.Module, z: dict[str, np.ndarray], rename=lambda name: name) -> None:
    """Load every 'W.' tensor of `z` into `module`, and nothing but those."""
    weights = {rename(key[2:]): tensor(value) for key, value in z.items() if key.startswith("W.")}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected
    # position ids are a buffer that older versions saved; the decoder file has no embedding table
    assert [name for name in missing if "position_ids" not in name and "embed_tokens" not in name] == []


def clip_llava(z: dict[str, np.ndarray], attn: str) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=int(z["cfg_hidden_size"]),
        intermediate_size=int(z["cfg_intermediate_size"]),
        num_hidden_layers=int(z["cfg_num_hidden_layers"]),
        num_attention_heads=int(z["cfg_num_attention_heads"]),
        image_size=int(z["cfg_image_size"]),
        patch_size=int(z["cfg_patch_size"]),
        layer_norm_eps=float(z["cfg_layer_norm_eps"]),
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn).eval().float()
    tower = model.model.vision_tower
    flat = not hasattr(tower, "vision_model")
    load_weights(tower, z, lambda name: name.removeprefix("vision_model.") if flat else name)
    return model


def prompt(images: int, patches: int) -> torch.Tensor:
    return torch.tensor([[1, 5, 6, *[IMAGE] * patches, 7, 8]]).repeat(images, 1)


class ProjectorInput:
    """What the projector was last fed."""

    def __init__(self, model):
        self.value = None
        model.model.multi_modal_projector.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.value = args[0].detach()


@torch.no_grad()
def encode(z, attn: str, strategy, images: slice):
    """Run the golden pictures through a wrapped model; returns its report and the projector's input."""
    model, pixels = clip_llava(z, attn), tensor(z["pixel_values"])[images]
    seen = ProjectorInput(model)
    patches = (int(z["cfg_image_size"]) // int(z["cfg_patch_size"])) ** 2
    with vtprune.pruning(model, strategy) as session:
        model(input_ids=prompt(len(pixels), patches), pixel_values=pixels)
        return session.report, seen.value


def survivors(z, target: int, image: int) -> dict[int, list[int]]:
    """Expected original patch numbers after each layer that dropped any, from the local indices of each prune."""
    found, index = {}, np.arange(z[f"t{target}.topk0.cum_score"].shape[1])
    for j, layer in enumerate(z[f"t{target}.prune_layers"].tolist()):
        local = z[f"t{target}.topk{j}.keep_local_sorted"][image]
        if len(local) < len(index):
            index = index[local]
            found[layer] = index.tolist()
    return found


def check_image(z, target: int, image: int, sample, features: torch.Tensor) -> None:
    assert sample.kept.tolist() == z[f"t{target}.keep_indices"][image].tolist()
    assert {block: index.tolist() for block, index in sample.encoded} == survivors(z, target, image)
    torch.testing.assert_close(features, tensor(z[f"t{target}.patch_features"][image]), atol=2e-4, rtol=0)


@KERNELS
@pytest.mark.parametrize("target", [48, 16])
def test_encoder_of_24_layers(attn, target):
    z = golden("flowcut_clip_l24_n144_trace")
    assert target in z["targets"]
    report, features = encode(z, attn, vtprune.FlowCut(keep=target), slice(None))
    assert features.shape == (1, target, 16)
    check_image(z, target, 0, report.samples[0], features[0])
    # the sequence that each layer leaves behind, CLS included
    lengths, left = [], 144
    cuts = {block: len(index) for block, index in report.samples[0].encoded}
    for layer in range(24):
        left = cuts.get(layer, left)
        lengths.append(1 + left)
    assert lengths == z[f"t{target}.tokens_after_layer"].tolist()


@KERNELS
def test_encoder_of_odd_depth(attn):
    z = golden("flowcut_clip_oddlayers_l7_n36")
    raw = z["t9.prune_num_raw"]
    # the first image sets the batch's drop counts, so alone it must come out the same
    assert (raw.round()[:, 0] == z["t9.prune_num_adaptive"]).all()
    report, features = encode(z, attn, vtprune.FlowCut(keep=9), slice(0, 1))
    check_image(z, 9, 0, report.samples[0], features[0])


@KERNELS
def test_encoder_batch_under_the_published_batch_rule(attn, monkeypatch):
    z = golden("flowcut_clip_oddlayers_l7_n36")

    def batch_maximum(*args):
        counts = drop_count(*args)
        return counts.max().expand_as(counts)

    monkeypatch.setattr(flowcut, "drop_count", batch_maximum)
    report, features = encode(z, attn, vtprune.FlowCut(keep=9), slice(None))
    for image in range(2):
        check_image(z, 9, image, report.samples[image], features[image])


@KERNELS
def test_encoder_batch_equals_images_alone(attn):
    # a deliberate difference from the published code: the drop count is each image's own
    z = golden("flowcut_clip_oddlayers_l7_n36")
    together, features = encode(z, attn, vtprune.FlowCut(keep=9), slice(None))
    counts = [[len(index) for _, index in s.encoded] for s in together.samples]
    assert counts == [[36 - round(float(p)), 9] for p in z["t9.prune_num_raw"][1]]
    assert counts[0] != counts[1]
    for image in range(2):
        alone, own = encode(z, attn, vtprune.FlowCut(keep=9), slice(image, image + 1))
        assert alone.samples[0].kept.tolist() == together.samples[image].kept.tolist()
        torch.testing.assert_close(own[0], features[image], atol=2e-5, rtol=0)


@KERNELS
@pytest.mark.parametrize("name", CLIP)
def test_nothing_is_pruned_at_full_budget(attn, name):
    # the published code answers with 0 .. N here, one index too many; ours with 0 .. N - 1
    z = golden(name)
    full = z["base_feat_layer_m2"][:, 1:]
    report, features = encode(z, attn, vtprune.FlowCut(keep=full.shape[1]), slice(None))
    for sample in report.samples:
        assert sample.kept.tolist() == list(range(full.shape[1]))
        assert sample.encoded == []
    torch.testing.assert_close(features, tensor(full), atol=2e-4, rtol=0)


class Traced(vtprune.FlowCut):
    """Notes what the engine hands over at each block."""

    trace: dict = {}

    def encode(self, view):
        keep = super().encode(view)
        self.trace[view.layer] = (view.rows, view.carry.get("flow"))
        return keep


@KERNELS
def test_each_layers_statistics_and_scores(attn, monkeypatch):
    z = golden("flowcut_clip_l24_n144_trace")
    monkeypatch.setattr(Traced, "trace", {})
    encode(z, attn, Traced(keep=16), slice(None))
    scored = [layer for layer in range(24) if f"t16.layer{layer}.score" in z]
    assert scored == list(range(22))
    prunes = {int(layer): j for j, layer in enumerate(z["t16.prune_layers"])}
    for layer in scored:
        rows, flow = Traced.trace[layer]
        attention, semantic, value, score = (
            tensor(z[f"t16.layer{layer}.{name}"]) for name in ("cls_attn", "sem_attn", "value", "score")
        )
        torch.testing.assert_close(rows.attention()[:, :, 0].mean(1), attention, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(rows.values.mean(1), value, atol=2e-5, rtol=0)
        torch.testing.assert_close(flow_score(attention, semantic, value), score, atol=1e-7, rtol=1e-5)
        if layer in prunes:
            j = prunes[layer]
            torch.testing.assert_close(flow, tensor(z[f"t16.topk{j}.cum_score"]), atol=1e-6, rtol=1e-4)
            if layer < 21:
                torch.testing.assert_close(entropy_ratio(attention), tensor(z["t16.entropy_ratio"][j]), atol=1e-6, rtol=0)
                assert drop_count(attention, 16, 21 - layer, 2.0, 0.5).tolist() == [int(z["t16.prune_num_adaptive"][j])]


def test_unit_score():
    z = golden("flowcut_unit_score")
    for i in range(int(z["n"])):
        attention, semantic, value = (tensor(z[f"c{i}.{name}"]) for name in ("cls_attn", "sem_attn", "value"))
        torch.testing.assert_close(flow_score(attention, semantic, value), tensor(z[f"c{i}.score"]), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("i", range(40))
def test_unit_drop_count(i):
    z = golden("flowcut_unit_ratio")
    assert int(z["n"]) == 40
    attention, target, remaining = tensor(z[f"c{i}.attn"]), int(z["target"][i]), int(z["remaining"][i])
    # the published code takes the maximum over the batch
    assert int(drop_count(attention, target, remaining, 2.0, 0.5).max()) == int(z["prune_num_f32"][i])
    for dtype in (torch.float16, torch.bfloat16):
        # the published code raises on some of these, or asks for a negative count
        half = drop_count(attention.to(dtype), target, remaining, 2.0, 0.5)
        assert half.dtype == torch.long and bool((half >= 0).all())
        # the rounding of the inputs is all that may differ, not the arithmetic
        rounded = drop_count(attention.to(dtype).float(), target, remaining, 2.0, 0.5)
        assert half.tolist() == rounded.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("patches", [2, 3, 57, 576])
def test_flat_or_absent_attention_drops_nothing(dtype, patches):
    flat = torch.full((2, patches), 1 / patches, dtype=dtype)
    assert drop_count(flat, 1, 2, 2.0, 0.5).tolist() == [0, 0]
    # CLS looks at itself alone: 0 / 0
    assert drop_count(torch.zeros(2, patches, dtype=dtype), 1, 2, 2.0, 0.5).tolist() == [0, 0]


# ---------------------------------------------------------------------- the cut inside the decoder


class DecoderStage(vtprune.FlowCut):
    """FlowCut's second stage alone: the golden file starts from projected features, so there is no encoder to prune."""

    def stages(self):
        return ("prefill",)


def llm_llava(z, attn: str) -> LlavaModel:
    text = LlamaConfig(
        hidden_size=int(z["cfg_hidden_size"]),
        intermediate_size=int(z["cfg_intermediate"]),
        num_hidden_layers=int(z["cfg_layers"]),
        num_attention_heads=int(z["cfg_num_heads"]),
        num_key_value_heads=int(z["cfg_num_kv_heads"]),
        rms_norm_eps=float(z["cfg_rms_eps"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(z["cfg_rope_theta"])},
        vocab_size=16,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_select_strategy="default")
    torch.manual_seed(0)
    model = LlavaModel._from_config(config, attn_implementation=attn).eval().float()
    load_weights(model.language_model, z)
    return model


@preencoding
@KERNELS
@torch.no_grad()
def test_decoder_cut(attn):
    z = golden("flowcut_llm_mha_v60_t20")
    model = llm_llava(z, attn)
    embeds, first, count = tensor(z["inputs_embeds"]), int(z["visual_pos"]), int(z["visual_num"])
    visual = embeds[0, first : first + count]
    fed = embeds.clone()
    fed[0, first : first + count] = model.get_input_embeddings()(torch.tensor(IMAGE))
    strategy = DecoderStage(keep=1.0, decoder_keep=int(z["target_num"]), decoder_layer=int(z["prune_layer"]))
    cache_ = DynamicCache(config=model.config.text_config)
    with vtprune.pruning(model, strategy) as session:
        out = model(
            inputs_embeds=fed,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=[visual])},
            past_key_values=cache_,
            use_cache=True,
        )
        sample = session.report.samples[0]
        kept = z["keep_local"][0]
        assert session.report.positions == "compact"
        assert [len(layer) for layer in sample.layers] == [60, 60, 20, 20]
        assert sample.layers[2].tolist() == sample.layers[3].tolist() == kept.tolist()
        assert [layer.keys.shape[-2] for layer in cache_.layers] == z["kv_len_per_layer"].tolist()

        rows = [*range(first), *(first + kept), *range(first + count, embeds.shape[1])]
        dropped = sorted(set(range(embeds.shape[1])) - set(rows))
        assert out.last_hidden_state.shape == embeds.shape
        torch.testing.assert_close(out.last_hidden_state[:, rows], tensor(z["prefill_last_hidden"]), atol=2e-4, rtol=0)
        assert not out.last_hidden_state[:, dropped].any()

        step = model(inputs_embeds=tensor(z["decode_embeds"]), past_key_values=cache_, use_cache=True)
        torch.testing.assert_close(step.last_hidden_state, tensor(z["decode_last_hidden"]), atol=2e-4, rtol=0)
        assert [layer.keys.shape[-2] for layer in cache_.layers] == [n + 1 for n in z["kv_len_per_layer"].tolist()]


@torch.no_grad()
def test_decoder_cut_is_told_apart_from_original_positions():
    # the golden decode step would also pass a method that never shifts, were the two numberings close
    z = golden("flowcut_llm_mha_v60_t20")
    model = llm_llava(z, "sdpa")
    embeds, first, count = tensor(z["inputs_embeds"]), int(z["visual_pos"]), int(z["visual_num"])
    fed = embeds.clone()
    fed[0, first : first + count] = model.get_input_embeddings()(torch.tensor(IMAGE))
    features = BaseModelOutputWithPooling(pooler_output=[embeds[0, first : first + count]])
    with vtprune.pruning(model, DecoderStage(keep=1.0, decoder_keep=20), positions="original"):
        out = model(inputs_embeds=fed, mm_encoder_outputs={"image": features})
    assert (out.last_hidden_state[:, -20:] - tensor(z["prefill_last_hidden"])[:, -20:]).abs().max() > 2e-3


def test_decoder_scores():
    z = golden("flowcut_llm_mha_v60_t20")
    query, keys, text_value, values = (tensor(z[f"b0.{n}"])[None] for n in ("text_q", "vis_k", "text_v", "vis_v"))
    logits = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    score = flow_score(tensor(z["b0.relation_attn"]), tensor(z["b0.semantic_attn"]), tensor(z["b0.value_mean"])[None])
    torch.testing.assert_close(score, tensor(z["b0.score"]), atol=1e-6, rtol=1e-5)
    view = PrefillView(
        index=torch.arange(60)[None],
        sizes=(60,),
        carry={},
        layer=2,
        depth=4,
        rows=Rows(
            # logits and lse over all keys differ by a constant, which a softmax over the visual ones must not feel
            logits,
            torch.full((1, 4, 1), 7.0),
            torch.ones(1, 1, dtype=torch.bool),
            values=values,
            query_values=text_value,
        ),
    )
    keep = vtprune.FlowCut(keep=1.0, decoder_keep=20).prefill(view)
    assert keep.indices.tolist() == z["keep_local"].tolist()
