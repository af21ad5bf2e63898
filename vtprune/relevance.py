"""How relevant each patch is to a sample's text, from the CLIP model that a vision encoder was taken from.

Knows CLIP and tokenizers; no strategy, no engine. Imports transformers only when a model is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vtprune.prompts import ROLES, words
from vtprune.pruner import UnsupportedError

_TOWER = "text_tower"


class ClipRelevance(nn.Module):
    """CDPruner's relevance (arXiv 2506.10967): cosine of patches and text in CLIP's shared space.

    The sample's token ids are decoded with the language model's tokenizer without special tokens, what `strip` matches is
    cut out, and the rest is embedded by CLIP's text tower: a whole conversation counts, a system prompt included. Text
    beyond CLIP's context goes in chunks, each with its own start and end token (the published code cuts one long sequence).
    A patch is the feature block's hidden state under CLIP's last norm and visual projection, fp32 throughout.

        CDPruner(relevance=ClipRelevance.from_pretrained("openai/clip-vit-large-patch14-336", processor.tokenizer))

    Parameters:
        clip: a CLIPModel; only its text side and the two projections are kept.
        clip_tokenizer: of the CLIP text tower.
        tokenizer: of the language model.
        norm: the vision tower's last norm.
        sign: -1 as in the paper, as CLIP's patches lie *away* from the words that describe them; +1 for encoders trained
            patch by patch.
        strip: regular expression of what the chat template adds to the text.
        source: where it came from, for reports.
    """

    def __init__(
        self,
        clip: nn.Module,
        clip_tokenizer: Any,
        tokenizer: Any,
        norm: nn.Module,
        sign: int = -1,
        strip: str = ROLES,
        source: str = "",
    ) -> None:
        super().__init__()
        if sign not in (-1, 1):
            raise ValueError(f"sign={sign!r}: give -1 (the paper's, for CLIP) or 1.")
        missing = [side for side in ("bos", "eos") if getattr(clip_tokenizer, f"{side}_token_id") is None]
        if missing:
            raise UnsupportedError(f"the CLIP tokenizer has no {' and no '.join(missing)} token.")
        config = clip.config.text_config
        # CLIP reads its text off the end token; 2 is the id of configs written before that was settled, served by the model
        if config.eos_token_id not in (2, clip_tokenizer.eos_token_id):
            raise UnsupportedError(
                f"the CLIP model ends its texts with token {config.eos_token_id}, its tokenizer with "
                f"{clip_tokenizer.eos_token_id}; give the tokenizer that belongs to the text tower."
            )
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.visual_projection, self.norm = clip.visual_projection, norm
        self.clip_tokenizer, self.tokenizer = clip_tokenizer, tokenizer
        self.sign, self.strip, self.source = sign, re.compile(strip, re.MULTILINE), source
        self.context = config.max_position_embeddings
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer: Any,
        vision: nn.Module | None = None,
        sign: int | None = None,
        strip: str = ROLES,
    ) -> ClipRelevance:
        """Load from a CLIP checkpoint (safetensors), or from the embedded tiny model's folder.

        Parameters:
            path: folder or hub id of the CLIP model that the vision encoder comes from.
            tokenizer: of the language model.
            vision: the model's own vision tower, for its last norm; needed for the embedded model, whose folder holds the
                text side alone. None: the checkpoint's.
            sign: None for the paper's -1, and +1 for the embedded model, whose patches were trained to point at the words
                that name them (there, a patch of the object asked about outranks background in 99.9 % of pairs).
        Raises:
            UnsupportedError: for a checkpoint that is not CLIP, or a vision tower that does not fit it.
        """
        folder = Path(path) / _TOWER if (Path(path) / _TOWER).is_dir() else Path(path)
        embedded = (folder / f"{_TOWER}.safetensors").is_file()
        clip, clip_tokenizer = (_embedded(folder), tokenizer) if embedded else _checkpoint(path)
        if vision is None and embedded:
            raise UnsupportedError(f"{folder} holds no vision tower; give the model's own, vision=model.model.vision_tower.")
        norm = _last_norm(clip.vision_model if vision is None else vision)
        if norm.weight.shape[0] != clip.visual_projection.in_features:
            raise UnsupportedError(
                f"the vision tower is {norm.weight.shape[0]} wide, the CLIP model at {path} takes "
                f"{clip.visual_projection.in_features}; give the CLIP model that the vision tower comes from."
            )
        if sign is None:
            sign = 1 if embedded else -1
        return cls(clip, clip_tokenizer, tokenizer, norm, sign, strip, str(path))

    def __repr__(self) -> str:
        return f"ClipRelevance({self.source!r}, sign={self.sign})"

    def words(self, ids: Tensor) -> str:
        """The text behind token ids, without special tokens and role words."""
        return words(self.tokenizer, ids, self.strip)

    @torch.no_grad()
    def text(self, words: str) -> Tensor:
        """[M, P] fp32, CLIP's embedding of every chunk of the text; M is 0 for no words."""
        device = self.visual_projection.weight.device
        body = self.clip_tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        chunks = []
        for at in range(0, len(body), self.context - 2):
            chunk = [self.clip_tokenizer.bos_token_id, *body[at : at + self.context - 2], self.clip_tokenizer.eos_token_id]
            pooled = self.text_model(input_ids=torch.tensor([chunk], device=device)).pooler_output
            chunks.append(self.text_projection(pooled)[0])
        return torch.stack(chunks) if chunks else torch.zeros(0, self.visual_projection.out_features, device=device)

    @torch.no_grad()
    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        """[N] fp32 relevance, the mean over chunks of sign * cosine; all zero where the ids hold no words.

        Parameters:
            patches: [N, C] hidden states of the feature block, any float dtype.
            ids: LongTensor [T].
        Raises:
            UnsupportedError: if the patches are not as wide as CLIP's vision tower.
        """
        weight = self.visual_projection.weight
        if patches.shape[-1] != weight.shape[1]:
            raise UnsupportedError(
                f"patches are {patches.shape[-1]} wide, the CLIP model at {self.source!r} takes {weight.shape[1]}; give the "
                f"CLIP model that the vision tower comes from."
            )
        text = self.text(self.words(ids))
        if not len(text):
            return torch.zeros(len(patches), device=patches.device)
        shared = self.visual_projection(self.norm(patches.to(weight.device, weight.dtype)))
        cosine = normalize(shared, dim=-1) @ normalize(text, dim=-1).T
        return (self.sign * cosine.mean(-1)).to(patches.device)


def _last_norm(vision: nn.Module) -> nn.Module:
    """A copy in fp32 of a CLIP vision tower's last norm, so that the model's own dtype and device stay its own."""
    norm = getattr(getattr(vision, "vision_model", vision), "post_layernorm", None)
    if not isinstance(norm, nn.LayerNorm):
        raise UnsupportedError(f"{type(vision).__name__} has no post_layernorm; vision= takes a CLIP vision tower.")
    copy = nn.LayerNorm(norm.normalized_shape, norm.eps)
    with torch.no_grad():
        copy.weight.copy_(norm.weight)
        copy.bias.copy_(norm.bias)
    return copy


def _checkpoint(path: str | Path) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    config = AutoConfig.from_pretrained(path)
    if config.model_type != "clip":
        raise UnsupportedError(f"{path} is a {config.model_type!r} model; relevance needs a 'clip' one.")
    clip = CLIPModel.from_pretrained(path, config=config, use_safetensors=True, dtype=torch.float32)
    return clip, AutoTokenizer.from_pretrained(path)


def _embedded(folder: Path) -> nn.Module:
    """A CLIP text tower and both projections, saved without the vision tower, which the embedded LLaVA holds."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng(devices=[]):  # the random weights that are about to be replaced cost the caller no draws
        clip = CLIPModel(CLIPConfig.from_json_file(folder / "config.json"))
    missing, unexpected = clip.load_state_dict(load_file(folder / f"{_TOWER}.safetensors"), strict=False)
    if unexpected or any(not name.startswith("vision_model.") for name in missing):
        raise UnsupportedError(
            f"{folder}: the text tower does not fit its config (missing {missing}, unexpected {unexpected})."
        )
    return clip.float()
