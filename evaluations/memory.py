"""What a prefill allocates at most and what its cache holds, pruned and not, for every model class of every family.

    python -m evaluations.memory --markdown docs/families.md

One picture of 1,024 x 1,024 pixels, cut or scaled as the family's processor does by default, goes through models of full size.
So that a machine without an accelerator gets through them, matrix products and attention are not computed: what they
return is allocated as ever and filled with random numbers, and layers that are alike share their weights, which no figure
counts. `--computed` computes them (with `--narrow` and `--depth`, for small models). Needs timm for two families.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from vtprune import FastV, Pruner, create, pruning
from vtprune.cli.console import put_between
from vtprune.engine.cache import cache_name
from vtprune.families import FAMILIES, locate
from vtprune.measure.bench import allocated_around, machine
from vtprune.supporting import config_of

MARK = "memory"
SIDE = 1024  # of the picture
KEEP = 0.1
_SMALL = 1 << 22  # weights up to so many values are random in any case
_WORDS = 1000  # the text is of these tokens
TEXT = 16  # tokens before the picture, and after it
CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
# tokens that processors write around tiles; which ones does not matter as long as they are text
_MARK, _NEWLINE, _OVERVIEW, _TILE = 10, 11, 12, 20
Given = dict[str, Tensor]
Picture = tuple[Given, list[int]]


@dataclass(frozen=True)
class Shape:
    """A class's sizes, and its picture.

    Parameters:
        of: whose sizes these are; picture: model -> what the processor makes of the picture, and its token ids.
        text, vision, more: values in place of those of the class's default configuration; file: or all, from `assets/configs`.
    """

    of: str
    picture: Callable[[nn.Module], Picture]
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""


# pictures --------------------------------------------------------------------------------------------------------------


def _processed(processor: str, **settings: Any) -> dict[str, Any]:
    """What one of transformers' image processors makes of the picture."""
    picture = torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return dict(getattr(transformers, processor)(**settings)(images=[picture], return_tensors="pt"))


def _image(model: nn.Module) -> int:
    return locate(model).placeholder("image")


def _plain(model: nn.Module, name: str = "pixel_values", side: int = 0, tokens: int = 0) -> Picture:
    """A picture scaled to the encoder's one size."""
    vision = model.config.vision_config
    side = side or vision.image_size
    tokens = tokens or (side // vision.patch_size) ** 2
    return {name: torch.randn(1, 3, side, side)}, [_image(model)] * tokens


def _pooled(model: nn.Module) -> Picture:
    return _plain(model, tokens=model.config.mm_tokens_per_image)


def _packed(model: nn.Module, processor: str) -> Picture:
    """LLaVA-NeXT's and LLaVA-OneVision's tiles."""
    side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    sizes = {"size": {"height": side, "width": side}, "image_grid_pinpoints": [list(point) for point in pinpoints]}
    if processor.startswith("LlavaNext"):
        sizes |= {"size": {"shortest_edge": side}, "crop_size": sizes["size"]}
    made = _processed(processor, **sizes)
    given = {name: made[name] for name in ("pixel_values", "image_sizes")}
    return given, [_image(model)] * locate(model).layouts(given["image_sizes"])[0].placeholders


def _patches(model: nn.Module, processor: str = "Qwen2VLImageProcessor") -> Picture:
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    made = _processed(processor, patch_size=vision.patch_size, merge_size=merge, temporal_patch_size=vision.temporal_patch_size)
    given = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
    return given, [_image(model)] * int(given["image_grid_thw"].prod() // merge**2)


def _cut(model: nn.Module, processor: str = "GotOcr2ImageProcessor") -> Tensor:
    """[tiles, 3, H, W] of the encoder's size."""
    side = model.config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    made = _processed(processor, size={"height": side, "width": side}, crop_to_patches=True)
    return made["pixel_values"]


def _internvl(model: nn.Module) -> Picture:
    pixels = _cut(model)
    return {"pixel_values": pixels}, [_image(model)] * len(pixels) * model.config.image_seq_length


def _aya(model: nn.Module) -> Picture:
    pixels, vision = _cut(model), model.config.vision_config
    tokens = (vision.image_size // vision.patch_size // model.config.downsample_factor) ** 2
    ids = []
    for tile in range(len(pixels)):
        ids += [_TILE + tile, *[_image(model)] * tokens]
    return {"pixel_values": pixels}, ids


def _ovis(model: nn.Module) -> Picture:
    pixels, vision = _cut(model, "Ovis2ImageProcessor"), model.config.vision_config
    tokens = (vision.image_size // vision.patch_size // vision.hidden_stride) ** 2
    start, behind, column, row, end = model.config.visual_indicator_token_ids
    across = round((len(pixels) - 1) ** 0.5)  # the picture is square
    ids = [start, *[_image(model)] * tokens, behind]
    for tile in range(1, len(pixels)):
        ids += [_image(model)] * tokens
        if tile < len(pixels) - 1:
            ids += [column if tile % across else row]
    return {"pixel_values": pixels}, [*ids, end]


def _idefics(model: nn.Module, processor: str) -> Picture:
    side, tokens = model.config.vision_config.image_size, model.model.image_seq_len
    sizes = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    made = _processed(processor, **sizes, return_row_col_info=True)
    rows, columns = int(made["rows"][0][0]), int(made["cols"][0][0])
    ids = []
    for row in range(rows):
        for column in range(columns):
            ids += [_MARK, _TILE + row * columns + column, *[_image(model)] * tokens]
        ids += [_NEWLINE]
    ids += [_NEWLINE, _MARK, _OVERVIEW, *[_image(model)] * tokens, _MARK]
    return {name: made[name] for name in ("pixel_values", "pixel_attention_mask")}, ids


def _pixtral(model: nn.Module) -> Picture:
    side = model.config.vision_config.patch_size * model.config.spatial_merge_size
    made = _processed("PixtralImageProcessor", patch_size={"height": side, "width": side})
    given = {"pixel_values": made["pixel_values"], "image_sizes": torch.as_tensor(made["image_sizes"])}
    rows, columns = (given["image_sizes"][0] // side).tolist()
    return given, ([_image(model)] * columns + [_NEWLINE]) * rows


def _perception(model: nn.Module) -> Picture:
    pixels = _processed("PerceptionLMImageProcessor")["pixel_values"]
    grid = pixels.shape[-1] // 14 // model.config.projector_pooling_ratio
    return {"pixel_values": pixels}, [_image(model)] * pixels.shape[1] * grid**2


# sizes -----------------------------------------------------------------------------------------------------------------

_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
_QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_LLAMA3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}


def _axes(section: list[int], **more: Any) -> dict[str, Any]:
    """Three-axis positions, which default configurations leave to the model."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, **more}}


_GLM = _axes([8, 12, 12], partial_rotary_factor=0.5)
_QWEN3 = _axes([24, 20, 20], mrope_interleaved=True)
_QWEN3_5 = _axes([11, 11, 10], mrope_interleaved=True, partial_rotary_factor=0.25)
_next = functools.partial(_packed, processor="LlavaNextImageProcessor")
_glm = functools.partial(_patches, processor="Glm4vImageProcessor")
_glm46 = functools.partial(_patches, processor="Glm46VImageProcessor")
SHAPES = {
    "LlavaModel": Shape("LLaVA-1.5-7B", _plain, file="llava-1.5-7b"),
    "LlavaNextModel": Shape("LLaVA-NeXT-7B", _next, file="llava-next-7b"),
    "LlavaNextVideoModel": Shape("default", _next),
    "LlavaOnevisionModel": Shape(
        "LLaVA-OneVision-7B", functools.partial(_packed, processor="LlavaOnevisionImageProcessor"), file="llava-onevision-7b"
    ),
    "VideoLlavaModel": Shape("default", functools.partial(_plain, name="pixel_values_images")),
    "VipLlavaModel": Shape("default", _plain),
    "Qwen2VLModel": Shape(
        "Qwen2-VL-7B", _patches, {**_QWEN2_7B, **_axes([16, 24, 24])}, {"embed_dim": 1280, "hidden_size": 3584}
    ),
    "Qwen2_5_VLModel": Shape("Qwen2.5-VL-7B", _patches, file="qwen2.5-vl-7b"),
    "Qwen3VLModel": Shape(
        "Qwen3-VL-8B",
        _patches,
        {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8, **_QWEN3},
    ),
    "Qwen3VLMoeModel": Shape(
        "Qwen3-VL-30B-A3B",
        _patches,
        {
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            **_QWEN3,
        },
    ),
    "Qwen3_5Model": Shape("default", _patches, _QWEN3_5),
    "Qwen3_5MoeModel": Shape("default", _patches, _QWEN3_5),
    "Glm4vModel": Shape("default", _glm, _GLM),
    "Glm4vMoeModel": Shape("GLM-4.5V", _glm, {**_GLM, "head_dim": 128}),
    "Glm46VModel": Shape("default", _glm46, _GLM),
    "GlmOcrModel": Shape("default", _glm46, _axes([8, 12, 12])),
    "InternVLModel": Shape("InternVL3-8B", _internvl, file="internvl3-8b"),
    "Mistral3Model": Shape("default", _pixtral),
    "Gemma3Model": Shape(
        "gemma-3-4b",
        _pooled,
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
         "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5 + ["sliding_attention"] * 4},
        {**_SO400M, "image_size": 896, "vision_use_head": False},
    ),
    "PaliGemmaModel": Shape("default", _plain),
    "Idefics3Model": Shape(
        "Idefics3-8B-Llama3", functools.partial(_idefics, processor="Idefics3ImageProcessor"), _LLAMA3_8B,
        {**_SO400M, "image_size": 364},
    ),
    "SmolVLMModel": Shape(
        "SmolVLM-Instruct",
        functools.partial(_idefics, processor="SmolVLMImageProcessor"),
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "head_dim": 64},
        {**_SO400M, "image_size": 384},
        {"scale_factor": 3},
    ),
    "AyaVisionModel": Shape("aya-vision-8b", _aya),
    "Ovis2Model": Shape(
        "Ovis2-2B",
        _ovis,
        {**_QWEN2_7B, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
        {"image_size": 448, "hidden_stride": 2, "vocab_size": 65536},
    ),
    "PerceptionLMModel": Shape("Perception-LM-1B", _perception),
    "FastVlmModel": Shape("default", functools.partial(_plain, side=SIDE, tokens=(SIDE // 64) ** 2)),
}  # fmt: skip


def configuration(name: str, narrow: int, depth: int | None) -> Any:
    """The class's configuration by `SHAPES`, widths divided by `narrow`, and at most `depth` layers in encoder and decoder."""
    shape = SHAPES[name]
    if shape.file:
        values = json.loads((CONFIGS / f"{shape.file}.json").read_text(encoding="utf-8"))
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        config = config_of(name)
    text, vision = config.get_text_config(), config.vision_config
    for part, values in ((text, shape.text), (vision, shape.vision), (config, shape.more)):
        for key, value in values.items():
            setattr(part, key, copy.deepcopy(value))
    # defaults do not always have room for their own placeholders
    ids = [getattr(config, key, 0) for key in ("image_token_id", "image_token_index", "video_token_id", "video_token_index")]
    ids += list(getattr(config, "visual_indicator_token_ids", ()))
    text.vocab_size = max(text.vocab_size, *(one + 1 for one in ids if isinstance(one, int)))
    _narrow_text(text, narrow)
    _narrow_vision(vision, narrow)
    # what the encoder hands over has the decoder's width
    for part, key in (
        (config, "hidden_size"),
        (config, "projection_dim"),
        (vision, "projection_dim"),
        (vision, "out_hidden_size"),
    ):
        if key in part.__dict__:
            setattr(part, key, text.hidden_size)
    if "vocab_size" in config.__dict__:
        config.vocab_size = text.vocab_size
    if hasattr(vision, "embed_dim") and "spatial_merge_size" in vision.__dict__:
        vision.hidden_size = text.hidden_size  # Qwen2-VL's name for it
    if depth is not None:
        _shallow(config, depth)
    return config


def _narrow_text(text: Any, by: int) -> None:
    """Heads stay as many and become narrower, so that few heads of keys and values are no hindrance."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for key in (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "linear_key_head_dim",
        "linear_value_head_dim",
    ):
        if isinstance(getattr(text, key, None), int):
            setattr(text, key, getattr(text, key) // by)
    text.head_dim = head // by
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        # frequencies are spread over the three axes as evenly as before
        section = rope["mrope_section"]
        total, parts = sum(section) // by, [n // by for n in section]
        parts[0] += total - sum(parts)
        text.rope_parameters = {**rope, "mrope_section": parts}


def _narrow_vision(vision: Any, by: int) -> None:
    """Heads become fewer: position embeddings in two directions want their width."""
    arguments = getattr(vision, "model_args", None)
    if arguments is not None:  # timm's
        if "embed_dim" in arguments:
            arguments = {**arguments, "embed_dim": arguments["embed_dim"] // by, "num_heads": 16 // by}
        else:
            widths = (96, 192, 384, 768, 1536)  # fastvit_mci3
            arguments = {**arguments, "embed_dims": tuple(n // by for n in widths)}
            vision.hidden_size //= by
        vision.model_args = arguments
        return
    for key in ("hidden_size", "embed_dim", "intermediate_size", "num_attention_heads", "num_heads", "vocab_size"):
        value = vision.__dict__.get(key)
        if isinstance(value, int):
            setattr(vision, key, value // by)


def _shallow(config: Any, depth: int) -> None:
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers = min(text.num_hidden_layers, depth)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    # VipLLaVA reads several blocks; the first of them is counted from the encoder's end
    read = getattr(config, "vision_feature_layer", None)
    blocks = max([depth, *(abs(layer) + 1 for layer in read)] if isinstance(read, (list, tuple)) else [depth])
    for key in ("num_hidden_layers", "depth"):
        if key in vision.__dict__:
            setattr(vision, key, min(getattr(vision, key), blocks))


# measuring -------------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """One prefill, in bytes.

    Parameters:
        encoder, decoder: the most that was allocated above the weights until the decoder was first called, and from then on.
        kv: keys and values in the cache; reported: as the report has it, None for the bare model.
        entered: visual tokens that entered the decoder; tokens: before pruning.
    """

    strategy: str
    encoder: int
    decoder: int
    kv: int
    reported: int | None = None
    reported_full: int | None = None
    entered: int | None = None
    tokens: int | None = None

    @property
    def whole(self) -> int:
        return max(self.encoder, self.decoder)


class Uncomputed(TorchDispatchMode):
    """Matrix products and attention that allocate what they return, and fill it with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        # a prime length, so that rows of a result differ
        self.tile = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0)) / 2
        self.tiles = {dtype: self.tile.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            return self._made(args[0], (*args[0].shape[:-1], args[1].shape[-1]))
        if func in (aten.addmm.default, aten.baddbmm.default):
            return self._made(args[1], (*args[1].shape[:-1], args[2].shape[-1]))
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, _, value = args[:3]
            batch, heads, length, _ = query.shape
            out = self._made(query, (batch, length, heads, value.shape[-1])).transpose(1, 2)
            return out, query.new_zeros((batch, length, heads), dtype=torch.float32).transpose(1, 2)
        return func(*args, **(kwargs or {}))

    def _made(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape; in pieces, so that nothing but itself is allocated."""
        out, tile = like.new_empty(shape), self.tiles.get(like.dtype, self.tile)
        for piece in out.view(-1).split(len(tile)):
            piece.copy_(tile[: len(piece)])
        return out


def build(
    name: str, narrow: int = 1, depth: int | None = None, computed: bool = False, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """The class with its language-modelling head and random weights.

    Parameters:
        narrow, depth: as in `configuration`.
        computed: False leaves large matrices without values, so that they take no memory; `Uncomputed` does not read them.
    """
    cls = getattr(transformers, name.removesuffix("Model") + "ForConditionalGeneration")
    config = configuration(name, narrow, depth)
    with no_init_weights():
        model = cls._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    _share(model)
    generator, words = torch.Generator().manual_seed(0), model.get_input_embeddings().weight
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "norm" in part:
                weight.fill_(1.0)
            elif weight is words:
                weight[:_WORDS].normal_(generator=generator)
                weight[_image(model)] = 0
            elif computed or weight.numel() <= _SMALL or "embed" in part:
                weight.normal_(std=0.02, generator=generator)
    return model


def _share(model: nn.Module) -> None:
    """Give the modules of each list that have the same parameters, by name and shape, those of the first of them."""
    for modules in [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]:
        first: dict[tuple, nn.Module] = {}
        for module in modules:
            mine = dict(module.named_parameters())
            other = first.setdefault((type(module), *((name, weight.shape) for name, weight in mine.items())), module)
            for name, weight in other.named_parameters() if other is not module else ():
                holder, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(holder), leaf, weight)


def inputs_of(name: str, model: nn.Module) -> Given:
    """The picture between a few tokens of text."""
    given, ids = SHAPES[name].picture(model)
    text = torch.randint(100, _WORDS, (2 * TEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    row = torch.tensor([[*text[:TEXT], *ids, *text[TEXT:]]])
    given = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in given.items()}
    inputs = {**given, "input_ids": row, "attention_mask": torch.ones_like(row)}
    known, seen = inspect.signature(type(model).forward).parameters, (row == _image(model)).long()
    if "mm_token_type_ids" in known:
        inputs["mm_token_type_ids"] = seen
    elif "token_type_ids" in known:
        # Gemma 3 marks pictures, PaliGemma the answer
        inputs["token_type_ids"] = seen if "mm_tokens_per_image" in model.config.__dict__ else torch.zeros_like(seen)
    return inputs


def strategies(model: nn.Module) -> list[Pruner]:
    """One that selects before the decoder, one that cuts inside it."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    # FastV's cut is before layer 2; a decoder of linear attention has rows to cut by later on
    layer = max(2, types.index("full_attention") + 1) if "linear_attention" in types else 2
    return [create("random", keep=KEEP), FastV(layer=layer, after=KEEP)]


def prefill(model: nn.Module, inputs: Given, pruner: Pruner | None, computed: bool = False) -> Peak:
    """Run it once. The cache is weighed by itself, not as the report has it."""
    decoder, found = locate(model).decoder, {}
    mode = contextlib.nullcontext() if computed else Uncomputed()

    def run() -> None:
        with torch.no_grad(), mode:
            output = model(**inputs, use_cache=True, logits_to_keep=1)
        if not bool(output.logits.isfinite().all()):
            raise RuntimeError(f"{type(model).__name__}: its logits are not finite.")
        cache = getattr(output, cache_name(model))
        held = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
        found["kv"] = sum(tensor.numel() * tensor.element_size() for tensor in held if isinstance(tensor, Tensor))

    if pruner is None:
        encoder, rest = allocated_around(run, decoder)
        return Peak("unpruned", encoder, rest, found["kv"])
    with pruning(model, pruner) as session:
        encoder, rest = allocated_around(run, decoder)
        report = session.report
    sample = report.samples[0]
    return Peak(
        pruner.name, encoder, rest, found["kv"], report.kv_bytes, report.kv_bytes_full, len(sample.kept), sample.visual_tokens
    )


def measure(name: str, narrow: int = 1, depth: int | None = None, computed: bool = False) -> list[Peak]:
    """The bare model, then each of `strategies`."""
    model = build(name, narrow, depth, computed)
    inputs = inputs_of(name, model)
    return [prefill(model, inputs, pruner, computed) for pruner in (None, *strategies(model))]


def classes() -> list[str]:
    """Every model class of every family that the installed transformers has."""
    return [name for family in FAMILIES for name in family.base_classes if hasattr(transformers, name)]


# the page --------------------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]], setting: Mapping[str, Any]) -> str:
    """Markdown: a line per class; then whose peak the encoder sets, and whether the reports are right about the cache."""
    size = lambda count: f"{count / 2**20:,.1f}"
    share = lambda part, whole: f"{100 * part / whole:.0f} %"
    whole = lambda row: max(row["encoder"], row["decoder"])
    names = [row["strategy"] for row in next(iter(rows.values()))[1:]]
    headings = ["class", "sizes of", "visual tokens", "encoder", "decoder", *names, *(f"{name}, decoder" for name in names)]
    headings += ["KV cache", *(f"{name}, KV" for name in names)]
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    first, unequal = [], []
    for name, (bare, *pruned) in rows.items():
        title = name.removesuffix("Model")
        cells = [title, SHAPES[name].of, f"{pruned[0]['tokens']:,}", size(bare["encoder"]), size(bare["decoder"])]
        cells += [share(whole(row), whole(bare)) for row in pruned]
        cells += [share(row["decoder"], bare["decoder"]) for row in pruned]
        cells += [size(bare["kv"]), *(share(row["kv"], bare["kv"]) for row in pruned)]
        lines.append("| " + " | ".join(cells) + " |")
        if bare["encoder"] >= bare["decoder"]:
            first.append(title)
        for row in pruned:
            if (row["kv"], bare["kv"]) != (row["reported"], row["reported_full"]):
                unequal.append(f"{title} ({row['strategy']})")
    lines += ["", "KV bytes equal the report's to the byte, pruned and unpruned, in every run."]
    if unequal:
        lines[-1] = f"KV bytes are not the report's: {', '.join(unequal)}."
    if first:
        lines[-1] += (
            f" Of {', '.join(first)} the encoder sets the peak of the whole call, which pruning behind it cannot lower; the "
            f"decoder's falls all the same."
        )
    made = f"`{setting['command']}`, {setting['device']}, {setting['cores']} cores, torch {setting['torch']}, "
    return "\n".join([*lines, "", f"{made}transformers {setting['transformers']}, {setting['date']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of model classes; all by default")
    parser.add_argument("--narrow", type=int, default=1, help="divide all widths by so much")
    parser.add_argument("--depth", type=int, help="at most so many layers in encoder and decoder; all by default")
    parser.add_argument("--computed", action="store_true", help="compute matrix products and attention")
    parser.add_argument("--json", type=Path, help="write the numbers there; classes that the file has are not measured again")
    parser.add_argument("--markdown", type=Path, help="write the table into this page, between its marks")
    args = parser.parse_args()
    if unknown := [name for name in args.only or () if name not in classes()]:
        parser.error(f"no model class {unknown[0]!r} of a family here; there are {', '.join(classes())}.")
    if args.narrow < 1 or (args.depth is not None and args.depth < 2):
        parser.error("--narrow is at least 1, --depth at least 2.")
    options = [
        f"--{name} {value}" for name, value in (("narrow", args.narrow), ("depth", args.depth)) if value not in (1, None)
    ]
    options += ["--computed"] * args.computed
    setting = {**machine("cpu"), "command": " ".join(["python -m evaluations.memory", *options])}
    rows: dict[str, Any] = {}
    if args.json and args.json.is_file():
        known = json.loads(args.json.read_text(encoding="utf-8"))
        if known["setting"]["command"] != setting["command"]:
            parser.error(f"{args.json} was made by `{known['setting']['command']}`; give another file.")
        rows, setting = known["rows"], setting if set(args.only or classes()) - set(known["rows"]) else known["setting"]
    for name in args.only or classes():
        if name not in rows:
            rows[name] = [asdict(peak) for peak in measure(name, args.narrow, args.depth, args.computed)]
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    made = table({name: rows[name] for name in classes() if name in rows}, setting)
    print(made)
    if args.markdown:
        put_between(args.markdown, MARK, made)


if __name__ == "__main__":
    main()
