"""The real processors of families whose prompts say more than how many tokens a picture has, made without a checkpoint."""

from __future__ import annotations

import pytest
import transformers
import zoo.plain as zoo_plain
from models import GRID, IMAGE, TOKENS, VIDEO
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from zoo import glm, qwen2

SIDE = zoo_plain.SIDE


def tokenizer(special: list[str], **named: str):
    """Bytes, and special tokens as one id each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named or None
    )
    text.add_special_tokens({"additional_special_tokens": special})
    text.padding_side = "left"
    return text


IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
IDEFICS += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]


def idefics_processor(family: str):
    size = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    image, text = getattr(transformers, f"{family}ImageProcessor")(**size), tokenizer(IDEFICS)
    if family == "Idefics3":
        processor = transformers.Idefics3Processor(image, text, image_seq_len=TOKENS)
    else:
        pytest.importorskip("num2words")
        video = transformers.SmolVLMVideoProcessor(
            size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, num_frames=4
        )
        processor = transformers.SmolVLMProcessor(image, text, video, image_seq_len=TOKENS)
    token = text.convert_tokens_to_ids("<image>")
    return processor, "<image>", token, lambda: zoo_plain.idefics(family, "sdpa", len(text), token)


def aya_processor():
    text = tokenizer(
        ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL", *[f"TILE_{n}" for n in range(1, 13)]]
    )
    image = transformers.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6)
    processor = transformers.AyaVisionProcessor(image, text, patch_size=8, img_size=SIDE, downsample_factor=2)
    token = text.convert_tokens_to_ids("<|IMG_PATCH|>")
    return processor, "<image>", token, lambda: zoo_plain.aya("sdpa", len(text), token)


def ovis_processor():
    words = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    text = tokenizer(["<image>", "<IMG_ATOM>", *words])
    image = transformers.Ovis2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6)
    processor = transformers.Ovis2Processor(image, text, image_seq_length=TOKENS)
    token, ids = text.convert_tokens_to_ids("<IMG_ATOM>"), tuple(text.convert_tokens_to_ids(words))
    return processor, "<image>", token, lambda: zoo_plain.ovis("sdpa", len(text), token, ids)


def perception_processor():
    pytest.importorskip("timm")
    text = tokenizer([], image_token="<|image|>", video_token="<|video|>")
    side = zoo_plain.PE_SIDE
    image = transformers.PerceptionLMImageProcessor(tile_size=side, max_num_tiles=4)
    video = transformers.PerceptionLMVideoProcessor(size={"height": side, "width": side})
    processor = transformers.PerceptionLMProcessor(video, image, text, patch_size=16, pooling_ratio=2)
    token, frame = text.convert_tokens_to_ids(["<|image|>", "<|video|>"])
    return processor, "<|image|>", token, lambda: zoo_plain.perception("sdpa", len(text), token, frame)


PROCESSORS = {
    "idefics3": lambda: idefics_processor("Idefics3"),
    "smolvlm": lambda: idefics_processor("SmolVLM"),
    "aya": aya_processor,
    "ovis2": ovis_processor,
    "perception_lm": perception_processor,
}


def characters(special: dict[str, int], **named: str):
    """One token a character, and special tokens of these ids, all below a hundred, as the zoo's models have them."""
    words = {c: 3 + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789.<> ")}
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 2, **words, **special}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        **({"extra_special_tokens": named} if named else {}),
        padding_side="left",
    )
    text.add_special_tokens({"additional_special_tokens": list(special)})
    return text


def processor_of(name: str):
    """Of Qwen3-VL and its like, or GLM-V: at the tiny models' patch size."""
    glm_like = name.startswith("glm")
    start, end = ("<|begin_of_image|>", "<|end_of_image|>") if glm_like else ("<|vision_start|>", "<|vision_end|>")
    picture, video = ("<|image|>", "<|video|>") if glm_like else ("<|image_pad|>", "<|video_pad|>")
    special = {picture: IMAGE, video: VIDEO, start: qwen2.START, end: qwen2.END}
    if glm_like:
        special |= {"<|begin_of_video|>": glm.VIDEO_START, "<|end_of_video|>": glm.VIDEO_END}
    tokenizer = characters(special)
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": 16 * 16 * 2, "longest_edge": 96 * 96 * 8}}
    if not glm_like:
        return transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(**sizes), tokenizer, transformers.Qwen3VLVideoProcessor(**sizes)
        )
    family = "Glm46V" if name in ("glm46v", "glm-ocr") else "Glm4v"
    image, video, both = (getattr(transformers, f"{family}{kind}Processor") for kind in ("Image", "Video", ""))
    return both(image(**sizes), tokenizer, video(**sizes))


def gemma_processor(**crops):
    """Gemma 3's; with `crops`, it shows parts of a long picture beside the whole (pan and scan)."""
    special = {"<image_soft_token>": IMAGE, "<start_of_image>": 97, "<end_of_image>": 96}
    named = dict(zip(("image_token", "boi_token", "eoi_token"), special, strict=True))
    side = 8 * GRID
    image = transformers.Gemma3ImageProcessor(size={"height": side, "width": side}, **crops)
    return transformers.Gemma3Processor(image, characters(special, **named), image_seq_length=TOKENS)
