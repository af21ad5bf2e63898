"""The shape of the tiny LLaVA: configs, tokenizer, processor, and how its pieces are loaded and saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..worlds import GRID, PATCH, vocabulary

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "assets" / "tiny-llava"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIALS = ("<unk>", "<s>", "<pad>", "</s>", "<image>")
UNK, BOS, PAD, EOS, IMAGE = range(5)
WIDTH, HEADS, TEXT_HEADS = 192, 6, 3
ENCODER_LAYERS, DECODER_LAYERS = 8, 8
FEATURE_LAYER = -2
TEXT_WIDTH, TEXT_LAYERS, TEXT_LENGTH, SHARED = 128, 4, 64, 128
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}SYSTEM: {% elif message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over the world's words, with every printable ASCII character to fall back on."""
    chars = sorted({chr(c).lower() for c in range(33, 127)})
    pieces = list(dict.fromkeys([*SPECIALS, *vocabulary(), *chars, *("##" + c for c in chars)]))
    tok = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece(prefix="##")
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor() -> LlavaProcessor:
    size = GRID * PATCH
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=build_tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=ENCODER_LAYERS, num_attention_heads=HEADS,
        image_size=GRID * PATCH, patch_size=PATCH, projection_dim=SHARED, hidden_act="quick_gelu",
    )  # fmt: skip


def text_tower_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size(), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH,
        projection_dim=SHARED, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


def vocab_size() -> int:
    """The vocabulary, rounded up to a multiple of 8."""
    return -(-len(build_tokenizer()) // 8) * 8


def llava_config() -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=vocab_size(), hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=TEXT_HEADS, num_key_value_heads=TEXT_HEADS, max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=IMAGE, projector_hidden_act="gelu",
        vision_feature_select_strategy="default", vision_feature_layer=FEATURE_LAYER, image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )  # fmt: skip


def clip_config() -> CLIPConfig:
    return CLIPConfig(
        text_config=text_tower_config().to_dict(),
        vision_config=vision_config().to_dict(),
        projection_dim=SHARED,
    )


def sincos_positions(width: int = WIDTH, grid: int = GRID) -> Tensor:
    """2-D sine-cosine embeddings (grid * grid, width), scaled to a standard deviation of about 0.5."""
    quarter = width // 4
    omega = 1.0 / 100 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    parts = []
    for axis in (y.flatten(), x.flatten()):
        angle = axis[:, None] * omega[None]
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, 1) * 0.7


def init_encoder(vision: nn.Module) -> None:
    """Local attention from the first step: 2-D positions, and queries that start out equal to keys."""
    with torch.no_grad():
        emb = vision.embeddings
        emb.position_embedding.weight[1:] = sincos_positions()
        emb.position_embedding.weight[0] = 0
        emb.class_embedding.normal_(0, 0.5)
        emb.patch_embedding.weight.normal_(0, 0.04)
        for layer in vision.encoder.layers:
            att = layer.self_attn
            for lin in (att.q_proj, att.k_proj, att.v_proj, att.out_proj):
                lin.weight.normal_(0, 0.05)
                lin.bias.zero_()
            att.k_proj.weight.copy_(0.9 * att.q_proj.weight + 0.4 * att.k_proj.weight)
            att.out_proj.weight.mul_(0.5)
            layer.mlp.fc1.weight.normal_(0, WIDTH**-0.5)
            layer.mlp.fc2.weight.normal_(0, 0.5 * (4 * WIDTH) ** -0.5)


def init_decoder(llava: LlavaForConditionalGeneration) -> None:
    """Content matching and copying from the first step: queries near keys, value-output products near the identity."""
    with torch.no_grad():
        emb = llava.model.language_model.embed_tokens.weight
        emb.normal_(0, 0.3)
        proj = llava.model.multi_modal_projector
        for lin in (proj.linear_1, proj.linear_2):
            lin.weight.normal_(0, WIDTH**-0.5)
            lin.bias.zero_()
        for layer in llava.model.language_model.layers:
            att = layer.self_attn
            q = torch.empty_like(att.q_proj.weight).normal_(0, 0.06)
            att.q_proj.weight.copy_(q)
            att.k_proj.weight.copy_(0.8 * q + torch.empty_like(q).normal_(0, 0.036))
            v = nn.init.orthogonal_(torch.empty_like(att.v_proj.weight))
            att.v_proj.weight.copy_(0.6 * v + torch.empty_like(v).normal_(0, 0.03))
            att.o_proj.weight.copy_(0.5 * v.T + torch.empty_like(v).normal_(0, 0.02))
            for lin in (layer.mlp.gate_proj, layer.mlp.up_proj):
                lin.weight.normal_(0, WIDTH**-0.5)
            layer.mlp.down_proj.weight.normal_(0, 0.4 * 512**-0.5)


def build_models(seed: int = 0) -> tuple[LlavaForConditionalGeneration, CLIPModel]:
    """A LLaVA and a CLIP that share one vision tower (the same module)."""
    torch.manual_seed(seed)
    llava = LlavaForConditionalGeneration._from_config(llava_config(), dtype=torch.float32)
    clip = CLIPModel._from_config(clip_config(), dtype=torch.float32)
    init_encoder(llava.model.vision_tower)
    init_decoder(llava)
    clip.vision_model = llava.model.vision_tower
    return llava, clip


def pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to what the image processor gives, (N, 3, H, W)."""
    x = torch.from_numpy(pictures).float().div_(255)
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def encode(vision: nn.Module, pixel_values: Tensor, offset: tuple[int, int] = (0, 0)) -> list[Tensor]:
    """Every hidden state of the tower, as in HF, but for any picture up to 336 px placed anywhere on the raster."""
    emb = vision.embeddings
    b, _, h, w = pixel_values.shape
    gh, gw = h // PATCH, w // PATCH
    x = pixel_values.reshape(b, 3, gh, PATCH, gw, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, gh * gw, -1)
    x = x @ emb.patch_embedding.weight.flatten(1).T
    rows = torch.arange(gh) + offset[0]
    cols = torch.arange(gw) + offset[1]
    pos = emb.position_embedding.weight
    x = x + pos[1 + (rows[:, None] * GRID + cols[None]).flatten()]
    cls = (emb.class_embedding + pos[0]).expand(b, 1, -1)
    x = vision.pre_layrnorm(torch.cat([cls, x], 1))
    states = [x]
    for layer in vision.encoder.layers:
        x = layer(x, None)
        states.append(x)
    return states


def save_models(
    llava: LlavaForConditionalGeneration,
    clip: CLIPModel,
    folder: Path = CHECKPOINT,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes the model, its processor and the text tower; the folder is swapped in whole."""
    folder = Path(folder)
    new, old = (
        folder.with_name(folder.name + ".new"),
        folder.with_name(folder.name + ".old"),
    )
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    fresh, _ = build_models()
    fresh.load_state_dict({k: v.detach().clone() for k, v in llava.state_dict().items()})
    fresh.to(dtype)
    fresh.config.dtype = dtype
    fresh.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    fresh.save_pretrained(new)
    _use_published_names(new / "model.safetensors")
    build_processor().save_pretrained(new)
    tower = new / "text_tower"
    tower.mkdir()
    clip.config.to_json_file(tower / "config.json")
    weights = {k: v.detach().to(dtype).contiguous() for k, v in clip.state_dict().items() if not _is_vision(k)}
    save_file(weights, tower / "text_tower.safetensors", metadata={"format": "pt"})
    if (folder / "README.md").exists():
        shutil.copy2(folder / "README.md", new / "README.md")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _use_published_names(path: Path) -> None:
    """Name the vision tower's weights as published LLaVA checkpoints do, which every transformers 5 reads.

    Those that transformers 5.23 writes leave out a level, and 5.5 would start with a random tower.
    """
    weights = load_file(path)
    short, long = "vision_tower.", "vision_tower.vision_model."
    named = {long + k.removeprefix(long).removeprefix(short) if k.startswith(short) else k: v for k, v in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


def _is_vision(key: str) -> bool:
    return key.startswith("vision_model.")


def load_llava(folder: Path = CHECKPOINT, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def load_clip(
    llava: LlavaForConditionalGeneration | None = None,
    folder: Path = CHECKPOINT,
    dtype: torch.dtype = torch.float32,
) -> CLIPModel:
    """The CLIP model whose picture side is the LLaVA's own vision tower (shared when ``llava`` is given)."""
    folder = Path(folder)
    llava = load_llava(folder, dtype) if llava is None else llava
    clip = CLIPModel(CLIPConfig.from_json_file(folder / "text_tower" / "config.json"))
    missing, unexpected = clip.load_state_dict(load_file(folder / "text_tower" / "text_tower.safetensors"), strict=False)
    if unexpected or any(not _is_vision(k) for k in missing):
        raise ValueError(f"text tower does not fit: missing {missing}, unexpected {unexpected}")
    clip.to(dtype)
    clip.vision_model = llava.model.vision_tower
    return clip.eval()


def save_state(modules: dict[str, nn.Module], path: Path, **info: object) -> None:
    """A training checkpoint in safetensors, written aside and moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{name}/{k}": v.detach().contiguous().clone() for name, m in modules.items()
            for k, v in m.state_dict().items()}  # fmt: skip
    part = path.with_name(path.name + ".part")
    save_file(flat, part, metadata={k: str(v) for k, v in info.items()})
    part.replace(path)


def load_state(modules: dict[str, nn.Module], path: Path) -> None:
    flat = load_file(path)
    for name, module in modules.items():
        state = {k.split("/", 1)[1]: v for k, v in flat.items() if k.split("/", 1)[0] == name}
        module.load_state_dict(state)
