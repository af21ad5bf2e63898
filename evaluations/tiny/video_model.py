"""The shape of the tiny video model: LLaVA-OneVision's classes around tiny-llava's parts, cut to frames of 168 px."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from ..worlds import CLIP_GRID, CLIP_WORDS, GRID, PATCH
from .model import (
    BOS,
    EOS,
    FEATURE_LAYER,
    IMAGE,
    MEAN,
    PAD,
    ROOT,
    STD,
    _use_published_names,
    build_tokenizer,
    llava_config,
    load_clip,
    load_llava,
    pixels,
    vision_config,
)

CHECKPOINT = ROOT / "assets" / "tiny-video"
SIDE = CLIP_GRID * PATCH
CELLS = CLIP_GRID * CLIP_GRID
POOLED = CLIP_GRID // 2  # rows and columns of a frame after the model's own pooling
CORNER = (GRID - CLIP_GRID) // 2  # frames take the middle of tiny-llava's raster, so that left and right stay themselves
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}SYSTEM: {% elif message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_video_tokenizer() -> PreTrainedTokenizerFast:
    """tiny-llava's tokenizer, its ids unchanged, with the clip world's words and ``<video>`` behind them."""
    known = build_tokenizer().get_vocab()
    pieces = sorted(known, key=known.__getitem__)
    pieces += [word for word in (*CLIP_WORDS, "<video>") if word not in known]
    tok = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece(prefix="##")
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}, padding_side="left",
        model_max_length=8192, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_video_processor() -> LlavaOnevisionProcessor:
    size = {"height": SIDE, "width": SIDE}
    shared = {"size": size, "image_mean": list(MEAN), "image_std": list(STD)}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=[[SIDE, SIDE]], **shared),
        video_processor=LlavaOnevisionVideoProcessor(**shared),
        tokenizer=build_video_tokenizer(),
        num_image_tokens=CELLS + 1,  # the class token is among them, and "default" takes it out again
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )


def video_config() -> LlavaOnevisionConfig:
    tokenizer = build_video_tokenizer()
    text, vision = llava_config().text_config, vision_config()
    text.vocab_size = -(-len(tokenizer) // 8) * 8
    text.max_position_embeddings = 8192
    vision.image_size = SIDE
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), projector_hidden_act="gelu",
        vision_feature_select_strategy="default", vision_feature_layer=FEATURE_LAYER,
        image_grid_pinpoints=[[SIDE, SIDE]], tie_word_embeddings=True,
    )  # fmt: skip


def build_video_model(
    llava: LlavaForConditionalGeneration | None = None, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """The model with tiny-llava's weights: the middle of its raster of positions, new rows for the new words.

    Parameters:
        llava: None for a model with random weights.
    """
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration._from_config(video_config(), dtype=torch.float32)
    if llava is None:
        return model
    weights = {k: v.detach().float() for k, v in llava.state_dict().items()}
    position = next(k for k in weights if k.endswith("position_embedding.weight"))
    table = weights[position]
    inner = table[1:].unflatten(0, (GRID, GRID))[CORNER:-CORNER, CORNER:-CORNER].flatten(0, 1)
    weights[position] = torch.cat([table[:1], inner])
    old = weights.pop("lm_head.weight")
    known = len(build_tokenizer())
    words = torch.randn(video_config().text_config.vocab_size, old.shape[1]) * old[:known].std()
    words[:known] = old[:known]
    weights["model.language_model.embed_tokens.weight"] = words
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight", "model.image_newline"}:
        raise ValueError(f"tiny-llava does not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


@torch.no_grad()
def frame_states(vision: nn.Module, pictures: np.ndarray, batch: int = 48) -> Tensor:
    """The class token's and the patches' features of frames, (N, 145, width) in bfloat16, off uint8 (N, H, W, 3)."""
    out = []
    for i in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            seen = vision(pixels(pictures[i : i + batch]), output_hidden_states=True)
        out.append(seen.hidden_states[FEATURE_LAYER].bfloat16())
    return torch.cat(out)


def load_video(folder: Path = CHECKPOINT, dtype: torch.dtype = torch.float32) -> LlavaOnevisionForConditionalGeneration:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def load_scorer(model: LlavaOnevisionForConditionalGeneration) -> CLIPModel:
    """tiny-llava's text tower and projections with this model's vision tower (shared) as a ``CLIPModel``."""
    clip = load_clip(load_llava())
    clip.vision_model = model.model.vision_tower
    return clip.eval()


def save_video(
    model: LlavaOnevisionForConditionalGeneration, folder: Path = CHECKPOINT, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes the model and its processor; the folder is swapped in whole."""
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    fresh = build_video_model()
    fresh.load_state_dict({k: v.detach().clone() for k, v in model.state_dict().items()})
    fresh.to(dtype)
    fresh.config.dtype = dtype
    fresh.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD
    )
    fresh.save_pretrained(new)
    _use_published_names(new / "model.safetensors")
    (new / "model.safetensors").chmod(0o644)
    build_video_processor().save_pretrained(new)
    if (folder / "README.md").exists():
        shutil.copy2(folder / "README.md", new / "README.md")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_state(path: Path, **modules: nn.Module) -> None:
    """A training checkpoint in safetensors, written aside and moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{name}/{k}": v.detach().contiguous().clone() for name, m in modules.items() for k, v in m.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(flat, part)
    part.replace(path)


def load_state(path: Path, **modules: nn.Module) -> None:
    flat = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({k.split("/", 1)[1]: v for k, v in flat.items() if k.split("/", 1)[0] == name})
