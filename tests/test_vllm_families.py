"""Serving families other than LLaVA-1.5: tiny random models in a vLLM of this process, where vLLM is installed."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_vllm import LENGTH, QUESTIONS, STRATEGIES, pictures

import vtprune
from vtprune import embedded
from vtprune.pruner import SelectView, UnsupportedError
from vtprune.vllm.positions import BASE, parted, written


def slow_in_vllm(test):
    return pytest.mark.slow(pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")(test))


# Positions that travel behind features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly_in_every_dtype(dtype):
    positions = torch.cat([torch.arange(600), torch.tensor([BASE * BASE - 1])])[:, None].expand(-1, 3)
    features = torch.zeros(len(positions), 4, dtype=dtype)
    known = written(None, features)
    plain, places = parted([torch.cat([features, written(positions, features)], dim=1), torch.cat([features, known], dim=1)])
    assert torch.equal(places, torch.cat([positions.T, torch.zeros_like(positions.T)], dim=1))
    assert all(torch.equal(p, features) for p in plain)


# In this process


PLACEHOLDER = 4  # the embedded tokenizer's <image>
VIDEO = 243  # the first that it does not have


class Engine:
    """vLLM in this process, which is quicker to start than a server."""

    def __init__(self, folder, settings, **options):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        from vllm import LLM

        self.llm = LLM(
            str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2000,
            max_num_seqs=8,
            hf_overrides={} if settings is None else {"vtprune": settings},
            **options,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.llm
        cleanup_dist_env_and_memory()

    def answers(self, prompts, kind: str = "image", never=(PLACEHOLDER, VIDEO), **more) -> list[list[int]]:
        """Prompts are (text with placeholders, pictures or whatever else of the kind); some tokens are never said."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, logit_bias={t: -100.0 for t in never})
        asked = [{"prompt": text, "multi_modal_data": {kind: shown}, **more} for text, shown in prompts]
        return [list(answer.outputs[0].token_ids) for answer in self.llm.generate(asked, how, use_tqdm=False)]


def tiled_checkpoint(folder, family: str):
    """A tiny random LLaVA-NeXT (CLIP) or LLaVA-OneVision (SigLIP) of 36 patches a tile, with the embedded tokenizer."""
    import transformers

    torch.manual_seed(0)
    side, clip = 48, family == "next"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"image_size": side, "patch_size": 8}
    text = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=248,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=2,
    )
    if clip:
        vision = transformers.CLIPVisionConfig(**sizes, projection_dim=16)
    else:
        vision = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    kind = "LlavaNext" if clip else "LlavaOnevision"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=PLACEHOLDER,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
        **({} if clip else {"video_token_id": VIDEO}),
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "newline" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.suppress_tokens = [PLACEHOLDER, VIDEO]
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.tiny_model())
    tokenizer.add_tokens([transformers.AddedToken("<video>", special=True)])
    shape = {"height": side, "width": side}
    if clip:
        pictures = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size=shape, image_grid_pinpoints=pinpoints
        )
        processor = transformers.LlavaNextProcessor(
            pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    else:
        pictures = transformers.LlavaOnevisionImageProcessor(size=shape, image_grid_pinpoints=pinpoints)
        processor = transformers.LlavaOnevisionProcessor(
            pictures,
            tokenizer,
            transformers.LlavaOnevisionVideoProcessor(size=shape),
            num_image_tokens=36,
            vision_feature_select_strategy="full",
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@slow_in_vllm
@pytest.mark.parametrize("family", ["next", "onevision"])
def test_tiled_pictures_are_pruned_as_on_transformers(tmp_path, family):
    model, processor = tiled_checkpoint(tmp_path, family)
    shown = pictures()
    # of several shapes, so that pictures have other numbers of tiles, rows and tokens
    prompts = [(f"USER: <image>\n{q} ASSISTANT:", p) for q, p in zip([*QUESTIONS, QUESTIONS[0]], shown, strict=True)]

    def reference(settings) -> list[list[int]]:
        answers = []
        for text, picture in prompts:
            inputs = processor(text=text, images=[picture], return_tensors="pt")
            with torch.no_grad(), vtprune.pruning(model, settings["pruner"], positions="compact", keep=settings["keep"]):
                out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1)
            answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        return answers

    settings = {"pruner": "divprune", "keep": 20}
    with Engine(tmp_path, settings, limit_mm_per_prompt={"image": 4, "video": 1}) as engine:
        assert engine.answers(prompts) == reference(settings)
        other = engine.answers(prompts, mm_processor_kwargs={"vtprune": {"keep": 0.5}})
        assert other == reference(settings | {"keep": 0.5})
    with (
        pytest.raises(Exception, match=r"cannot be served here|class token"),
        Engine(tmp_path, {"pruner": "flowcut", "keep": 20}),
    ):
        pass


@slow_in_vllm
def test_onevision_videos_are_pruned_as_on_transformers(tmp_path):
    model, processor = tiled_checkpoint(tmp_path, "onevision")
    text = f"USER: <video>\n{QUESTIONS[0]} ASSISTANT:"
    # of unequal length
    given = [clips()[0], clips()[1][:5]]

    def reference(settings) -> list[list[int]]:
        answers = []
        for clip in given:
            inputs = processor(text=text, videos=[clip], return_tensors="pt", do_sample_frames=False)
            with torch.no_grad(), vtprune.pruning(model, settings["pruner"], positions="compact", keep=settings["keep"]):
                out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1)
            answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        return answers

    settings = {"pruner": "divprune", "keep": 15}
    with Engine(tmp_path, settings, limit_mm_per_prompt={"image": 1, "video": 1}) as engine:
        assert engine.answers([(text, [clip]) for clip in given], kind="video") == reference(settings)


@slow_in_vllm
def test_models_that_are_not_served_refuse_settings_and_nothing_else():
    from vtprune.vllm import REFUSED, refused

    assert set(REFUSED) == set(refused.REASONS)
    for name in REFUSED:
        made = getattr(refused, name)
        assert made.__name__ == name and made.__mro__[1].__module__.startswith("vllm.")
        plain = SimpleNamespace(hf_config=SimpleNamespace(), multimodal_config=None)
        refused.check(name, plain)
        asked = SimpleNamespace(hf_config=SimpleNamespace(vtprune=STRATEGIES["flowcut"]), multimodal_config=None)
        with pytest.raises(UnsupportedError, match=f"{name} cannot be served"):
            refused.check(name, asked)


# Qwen-VL


def qwen_checkpoint(folder, version: str):
    """A tiny random Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with the embedded tokenizer and more of Qwen's signs."""
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.tiny_model())
    signs = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_tokens([transformers.AddedToken(sign, special=True) for sign in signs])
    start, end, video = tokenizer.convert_tokens_to_ids(signs)
    text = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 32}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048, "pad_token_id": 2}
    text |= {"bos_token_id": 1, "eos_token_id": 3}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    vision = {"depth": 3, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if version == "2":
        vision |= {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128}
    if version == "2.5":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    if version == "3":
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
        text["rope_parameters"] |= {"mrope_interleaved": True}
    kind = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=PLACEHOLDER,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    never = [PLACEHOLDER, start, end, video]
    model.generation_config.suppress_tokens = never
    patches = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    processor = getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**patches, size=size),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**patches, size=size, min_frames=2, max_frames=8)
        if version != "3"
        else transformers.Qwen3VLVideoProcessor(**patches, size=size, min_frames=2, max_frames=8),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, never


def on_transformers(model, processor, never, settings, text: str, shown, kind: str = "images") -> list[int]:
    """vtprune on transformers, survivors at their own positions."""
    more = {} if kind == "images" else {"video_metadata": [METADATA] * len(shown), "do_sample_frames": False}
    inputs = processor(text=text, **{kind: list(shown)}, return_tensors="pt", **more)

    def generate():
        with torch.no_grad():
            return model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1)

    if settings is None:
        out = generate()
    else:
        fields = {k: v for k, v in settings.items() if k != "pruner"}
        with vtprune.pruning(model, settings["pruner"], positions="original", **fields):
            out = generate()
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def by_hand(model, processor, never, settings, text: str, shown) -> list[int]:
    """transformers alone, its embeddings, positions and features for later layers cut by hand; no cache."""
    inputs = processor(text=text, images=list(shown), return_tensors="pt")
    base, ids = model.model, inputs["input_ids"]
    with torch.no_grad():
        found = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        positions, _ = base.get_rope_index(ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"])
        visual = ids[0] == model.config.image_token_id
        stays, start = torch.ones_like(visual), 0
        for features, (_, rows, columns) in zip(found.pooler_output, inputs["image_grid_thw"].tolist(), strict=True):
            index = torch.arange(len(features))[None]
            view = SelectView(
                index,
                (len(features),),
                {},
                features=features[None],
                grid=(rows // 2, columns // 2),
                ordinal=torch.zeros(1).long(),
            )
            if settings is not None:
                fields = {k: v for k, v in settings.items() if k != "pruner"}
                keep = vtprune.create(settings["pruner"], **fields).select(view)
                index = index if keep is None else keep.indices
            places = visual.nonzero()[start : start + len(features), 0]
            stays[places] = False
            stays[places[index[0]]] = True
            start += len(features)
        embeds = base.get_input_embeddings()(ids)
        embeds[0, visual] = torch.cat(found.pooler_output)
        later = [torch.cat(level)[stays[visual]] for level in found.deepstack_features]
        embeds, positions, visual = embeds[:, stays], positions[:, :, stays], visual[stays][None]
        said = []
        for _ in range(LENGTH):
            out = base.language_model(
                inputs_embeds=embeds,
                position_ids=positions,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                visual_pos_masks=visual,
                deepstack_visual_embeds=later,
                use_cache=False,
            )
            logits = model.lm_head(out.last_hidden_state[0, -1])
            logits[never] = -torch.inf
            said.append(int(logits.argmax()))
            embeds = torch.cat([embeds, base.get_input_embeddings()(torch.tensor([[said[-1]]]))], dim=1)
            positions = torch.cat([positions, positions[:, :, -1:] + 1], dim=2)
            visual = torch.cat([visual, torch.tensor([[False]])], dim=1)
    return said


SHOWN = "<|vision_start|><image><|vision_end|>"


def asked_of_qwen():
    """One picture of each shape, two in one prompt, and one again behind another text."""
    shown = pictures()
    shown = [shown[0], shown[1], shown[2], shown[3].resize((96, 64))]
    prompts = [(f"USER: {SHOWN}\n{q} ASSISTANT:", [p]) for q, p in zip([*QUESTIONS, QUESTIONS[0]], shown, strict=True)]
    prompts.append((f"USER: {SHOWN}\n{SHOWN} {QUESTIONS[1]} ASSISTANT:", [shown[3], shown[1]]))
    prompts.append((f"{QUESTIONS[2]} {SHOWN} ASSISTANT:", [shown[0]]))
    return prompts


@slow_in_vllm
@pytest.mark.parametrize("version", ["2", "2.5", "3"])
def test_qwen_pictures_are_pruned_as_on_transformers(tmp_path, version):
    made = qwen_checkpoint(tmp_path, version)
    reference, prompts = by_hand if version == "3" else on_transformers, asked_of_qwen()

    def expected(settings):
        return [reference(*made, settings, *prompt) for prompt in prompts]

    # pieces of 24 tokens cut through pictures
    options = {"max_num_batched_tokens": 24, "enable_prefix_caching": True, "limit_mm_per_prompt": {"image": 2, "video": 1}}
    settings = {"pruner": "divprune", "keep": 12}
    with Engine(tmp_path, settings, **options) as engine:
        assert engine.answers(prompts, never=made[2]) == expected(settings)
        # from the caches
        assert engine.answers(prompts[:2], never=made[2]) == expected(settings)[:2]
        more = engine.answers(prompts, never=made[2], mm_processor_kwargs={"vtprune": {"keep": 0.5}})
        assert more == expected(settings | {"keep": 0.5})
        whole = engine.answers(prompts, never=made[2], mm_processor_kwargs={"vtprune": {"keep": 1.0}})
        assert whole == expected(None)
        assert whole != more
    with Engine(tmp_path, None, **options) as engine:
        assert engine.answers(prompts, never=made[2]) == expected(None)


# wide, as vLLM counts on after a video's last frame and transformers after its longer side, whichever is farther
CLIP = (8, 48, 128, 3)
METADATA = {"fps": 2.0, "total_num_frames": 8, "duration": 4.0, "frames_indices": list(range(8)), "height": 48, "width": 128}


def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, CLIP, dtype=np.uint8) for _ in range(2)]


@slow_in_vllm
@pytest.mark.parametrize("version", ["2", "2.5"])
def test_qwen_videos_are_pruned_as_on_transformers(tmp_path, version):
    made, settings = qwen_checkpoint(tmp_path, version), {"pruner": "divprune", "keep": 10}
    texts = [f"USER: {SHOWN.replace('<image>', '<|video_pad|>')}\n{q} ASSISTANT:" for q in QUESTIONS[:2]]
    given = clips()
    if version == "2.5":
        given = [(clip, METADATA | {"do_sample_frames": False}) for clip in given]
    prompts = [(text, [clip]) for text, clip in zip(texts, given, strict=True)]
    asked = list(zip(texts, clips(), strict=True))
    with Engine(tmp_path, settings, max_num_batched_tokens=24, limit_mm_per_prompt={"image": 1, "video": 1}) as engine:
        found = engine.answers(prompts, kind="video", never=made[2])
        assert found == [on_transformers(*made, settings, text, [clip], kind="videos") for text, clip in asked]
        whole = engine.answers(prompts, kind="video", never=made[2], mm_processor_kwargs={"vtprune": {"keep": 1.0}})
        assert whole == [on_transformers(*made, None, text, [clip], kind="videos") for text, clip in asked]
        assert whole != found


@slow_in_vllm
def test_qwen3_refuses_videos_alone(tmp_path):
    qwen_checkpoint(tmp_path, "3")
    prompt = f"USER: {SHOWN.replace('<image>', '<|video_pad|>')}\n{QUESTIONS[0]} ASSISTANT:"
    with Engine(tmp_path, {"pruner": "uniform", "keep": 8}) as engine:
        with pytest.raises(UnsupportedError, match="stand apart in the prompt"):
            engine.answers([(prompt, [(clips()[0], METADATA)])], kind="video")
        assert len(engine.answers([(f"{SHOWN} {QUESTIONS[0]}", pictures()[:1])])[0]) == LENGTH
