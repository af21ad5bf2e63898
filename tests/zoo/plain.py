"""Idefics3, SmolVLM, Aya Vision, Ovis2, PerceptionLM and FastVLM: tiles with tokens between them, patches joined before the
decoder."""

from __future__ import annotations

import importlib.util

import torch
import transformers
from models import GRID, IMAGE, TOKENS, VIDEO
from torch import Tensor

from zoo import Given, Kind, seeded

SIDE = 16 * GRID  # pixels of a tile whose 8-pixel patches are joined two by two
MARK, OVERVIEW, NEWLINE = 97, 96, 95  # Idefics3's tokens around tiles; a row-column token is 60 + 6 * row + column
WORDS = (93, 94, 95, 96, 97)  # Ovis2's indicator tokens: start, behind the overview, column, row, end
TIMM = importlib.util.find_spec("timm") is not None
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT = {
    **SIZES,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {**SIZES, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 8}
SUPPRESS = [IMAGE, VIDEO, *WORDS]


def tiles(count: int, seed: int, side: int = SIDE) -> Tensor:
    """[count, 3, side, side] random tiles with a bright region each."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, side, side, generator=generator) * 0.3
    for i in range(count):
        x, y = torch.randint(0, side // 2, (2,), generator=generator).tolist()
        pixels[i, :, y : y + side // 4, x : x + side // 4] += 2.0
    return pixels


# Idefics3 and SmolVLM --------------------------------------------------------------------------------------------------


def idefics(family: str, attn: str, vocab: int = 100, image: int = IMAGE):
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**{**TEXT, "vocab_size": vocab})
    config = getattr(transformers, f"{family}Config")(
        vision_config=dict(VISION), text_config=text, image_token_id=image, scale_factor=2
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")._from_config(config, attn_implementation=attn)
    return seeded(model, [*SUPPRESS, image])


def marked(rows: int, columns: int) -> list[int]:
    """An image's tokens, as the processor writes them: rows of tiles, then the overview; 0 x 0 is the overview alone."""
    ids = []
    for row in range(rows):
        for column in range(columns):
            ids += [MARK, 60 + 6 * row + column, *[IMAGE] * TOKENS]
        ids += [NEWLINE]
    return ids + [NEWLINE] * bool(rows) + [MARK, OVERVIEW, *[IMAGE] * TOKENS, MARK]


def idefics_picture(model, which: int) -> tuple[Given, list[int]]:
    """Two tiles and their overview, and a picture that is not cut and fills two thirds of its square; the second is padded
    with pictures of zeros to the first one's count, as processors pad a batch."""
    pixels, mask = torch.zeros(1, 3, 3, SIDE, SIDE), torch.zeros(1, 3, SIDE, SIDE, dtype=torch.long)
    if which == 0:
        pixels[0], mask[0] = tiles(3, 0), 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask}, marked(1, 2)
    pixels[0, 0, :, : SIDE * 2 // 3], mask[0, 0, : SIDE * 2 // 3] = tiles(1, 1)[0, :, : SIDE * 2 // 3], 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}, marked(0, 0)


# Aya Vision ------------------------------------------------------------------------------------------------------------


def aya(attn: str, vocab: int = 100, image: int = IMAGE, kinds: str = "ffff"):
    """`kinds`: of its decoder's layers, full or sliding attention; the former know no positions."""
    torch.manual_seed(0)
    names = {"f": "full_attention", "s": "sliding_attention"}
    text = transformers.Cohere2Config(
        **{**TEXT, "vocab_size": vocab}, logit_scale=0.25, layer_types=[names[kind] for kind in kinds], sliding_window=4096
    )
    vision = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    config = transformers.AyaVisionConfig(text_config=text, vision_config=vision, image_token_index=image, downsample_factor=2)
    model = transformers.AyaVisionForConditionalGeneration._from_config(config, attn_implementation=attn)
    return seeded(model, [*SUPPRESS, image])


def aya_picture(model, which: int) -> tuple[Given, list[int]]:
    """Two tiles and their overview, and a picture that is not cut."""
    count = (3, 1)[which]
    ids = [93]
    for at in range(count):
        ids += [96 if at == count - 1 else 60 + at, *[IMAGE] * TOKENS]
    return {"pixel_values": tiles(count, which)}, [*ids, 97]


# Ovis2 -----------------------------------------------------------------------------------------------------------------


def ovis(attn: str, vocab: int = 100, image: int = IMAGE, words: tuple[int, ...] = WORDS):
    torch.manual_seed(0)
    vision = transformers.Ovis2VisionConfig(**VISION, hidden_stride=2, vocab_size=69, num_visual_indicator_tokens=5)
    config = transformers.Ovis2Config(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**{**TEXT, "vocab_size": vocab}),
        image_token_id=image,
        visual_indicator_token_ids=list(words),
        vocab_size=vocab,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    model = transformers.Ovis2ForConditionalGeneration._from_config(config, attn_implementation=attn)
    model = seeded(model, [*SUPPRESS, image, *words])
    # probabilities of visual words near to even would make all patches one
    torch.nn.init.normal_(model.model.visual_embeddings_table.weight, std=1.0)
    return model


def worded(rows: int, columns: int) -> list[int]:
    start, behind_overview, column_end, row_end, end = WORDS
    ids = [start, *[IMAGE] * TOKENS, behind_overview]
    for row in range(rows if rows * columns > 1 else 0):
        for column in range(columns):
            ids += [IMAGE] * TOKENS + [column_end] * (column < columns - 1)
        ids += [row_end] * (row < rows - 1)
    return [*ids, end]


def ovis_picture(model, which: int) -> tuple[Given, list[int]]:
    rows, columns = ((2, 1), (1, 1))[which]
    return {"pixel_values": tiles((3, 1)[which], which)}, worded(rows, columns)


# PerceptionLM ----------------------------------------------------------------------------------------------------------

PE_SIDE = 32 * GRID  # its patches have 16 pixels and are pooled two by two


def kernels(attn: str) -> str | dict[str, str]:
    """`attn`, but eager for timm's encoders where transformers' wrapper of them has no sdpa: they bring their own attention."""
    served = attn != "sdpa" or transformers.TimmWrapperModel._supports_sdpa
    return attn if served else {"": attn, "text_config": attn, "vision_config": "eager"}


def perception(attn: str, vocab: int = 100, image: int = IMAGE, video: int = VIDEO):
    torch.manual_seed(0)
    vision = transformers.TimmWrapperConfig(
        architecture="vit_pe_core_tiny_patch16_384",
        model_args={"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": [PE_SIDE] * 2, "global_pool": ""},
    )
    config = transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**TEXT, "vocab_size": vocab}),
        image_token_id=image,
        video_token_id=video,
        projector_pooling_ratio=2,
    )
    model = transformers.PerceptionLMForConditionalGeneration._from_config(config, attn_implementation=kernels(attn))
    return seeded(model, [*SUPPRESS, image, video])


def perception_picture(model, which: int) -> tuple[Given, list[int]]:
    """An overview and a tile each: its processor puts only pictures of equally many tiles into one batch."""
    return {"pixel_values": tiles(2, which, PE_SIDE)[None]}, [IMAGE] * (2 * TOKENS)


def perception_video(model, which: int) -> tuple[Given, list[int]]:
    return {"pixel_values_videos": tiles(3, 5 + which, PE_SIDE)[None]}, [VIDEO] * (3 * TOKENS)


# FastVLM ---------------------------------------------------------------------------------------------------------------

FAST_SIDE = 32 * GRID


def fast(attn: str):
    torch.manual_seed(0)
    vision = transformers.TimmWrapperConfig(
        architecture="fastvit_mci0",
        model_args={"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64), "inference_mode": True},
        do_pooling=False,
    )
    vision.hidden_size = 128
    config = transformers.FastVlmConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_index=IMAGE, image_seq_length=TOKENS
    )
    model = transformers.FastVlmForConditionalGeneration._from_config(config, attn_implementation=kernels(attn))
    model = seeded(model, SUPPRESS)
    for name, parameter in model.model.vision_tower.named_parameters():
        if parameter.ndim > 1:  # convolutions of one channel each would leave nothing of the picture
            torch.nn.init.normal_(parameter, std=1.0 if "gamma" in name else parameter[0].numel() ** -0.5)
    with torch.no_grad():
        patches = model.model.vision_tower(tiles(1, 0, FAST_SIDE)).last_hidden_state
        model.model.multi_modal_projector.linear_1.weight /= patches.flatten(2).std(-1).mean()
    return model


def fast_picture(model, which: int) -> tuple[Given, list[int]]:
    return {"pixel_values": tiles(1, which, FAST_SIDE)}, [IMAGE] * TOKENS


KINDS = [
    Kind("idefics3", lambda attn: idefics("Idefics3", attn), idefics_picture),
    Kind("smolvlm", lambda attn: idefics("SmolVLM", attn), idefics_picture),
    Kind("aya", aya, aya_picture),
    Kind("ovis2", ovis, ovis_picture),
]
if TIMM:
    KINDS += [
        Kind("perception_lm", perception, perception_picture, perception_video),
        Kind("fast_vlm", fast, fast_picture, patch_pixels=32),
    ]
