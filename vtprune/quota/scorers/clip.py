"""Frames compared with texts in the shared space of a CLIP or SigLIP model: cheap, and a second question costs text only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from vtprune.pruner import UnsupportedError
from vtprune.quota.query import check_objects, phrases
from vtprune.quota.score import MAPPINGS, relevance
from vtprune.quota.scorers.base import ScoreNote

# what fits any frame, for mapping="generic"
GENERIC = ("a photo", "a picture", "an image of something", "a frame of a video")

Embed = Callable[[list[Any]], Tensor]


@dataclass(frozen=True)
class _Texts:
    """Unit embeddings of all parts of all phrases [M, P], the phrase of each [M], and of the generic texts [G, P]."""

    parts: Tensor
    phrase: Tensor
    generic: Tensor | None


class ClipBackend:
    """How well each frame fits the phrase that it fits best.

    A phrase longer than the text window goes in parts, with a `ScoreNote`; its similarity is the mean over them.

    Parameters:
        pictures: n PIL pictures to [n, P]; texts: m strings to [m, P].
        length: how many tokens a text takes, start and end included; window: how many the text tower reads.
        mapping: from similarities to scores, as in `vtprune.quota.relevance`; "minmax" and "generic" suit CLIP, "sigmoid" is
            for models with a bias, as SigLIP has.
        scale, bias: the model's own logit scale and bias.
        generic: texts that fit any frame, for mapping="generic".
        source: what it is, for reports.
    """

    shared = True

    def __init__(
        self,
        pictures: Embed,
        texts: Embed,
        length: Callable[[str], int],
        window: int,
        *,
        mapping: str = "minmax",
        scale: float = 100.0,
        bias: float = 0.0,
        generic: Sequence[str] = GENERIC,
        source: str = "",
    ) -> None:
        if mapping not in MAPPINGS:
            raise UnsupportedError(f"mapping={mapping!r}: one of {', '.join(MAPPINGS)}.")
        if mapping == "generic" and not check_objects(list(generic)):
            raise UnsupportedError("mapping='generic' needs texts that fit any frame, generic=['a photo', ...].")
        self.pictures, self.texts, self.length, self.window = pictures, texts, length, window
        self.mapping, self.scale, self.bias, self.source = mapping, scale, bias, source
        self.generic = list(generic)

    def __repr__(self) -> str:
        return f"ClipBackend({self.source!r}, mapping={self.mapping!r})"

    @classmethod
    def open_clip(
        cls,
        name: str,
        pretrained: str | Path | None = None,
        device: str | torch.device | None = None,
        mapping: str | None = None,
        generic: Sequence[str] = GENERIC,
    ) -> ClipBackend:
        """A model of the open_clip library.

        Parameters:
            name: as in open_clip.list_models(), or "hf-hub:..." or "local-dir:...".
            pretrained: one of open_clip's tags for it, or the path of a checkpoint; None where the name says it.
            device: None for the GPU if there is one.
            mapping: None for "sigmoid" where the model has a bias, "generic" otherwise.
        Raises:
            UnsupportedError: if open_clip is not installed, or does not find the model or its weights.
        """
        try:
            import open_clip
        except ImportError as error:
            raise UnsupportedError('this scorer needs open_clip: pip install "vtprune[clip]"') from error
        device, weights = _device(device), None if pretrained is None else str(pretrained)
        try:
            model, prepare = open_clip.create_model_from_pretrained(name, pretrained=weights, device=device)
            tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError) as error:
            raise UnsupportedError(
                f"open_clip cannot load {name!r} with pretrained={weights!r}: {error} (open_clip.list_pretrained() lists what "
                f"it has; a path of a checkpoint will do, too.)"
            ) from error
        model.eval()

        def pictures(frames: list[Image.Image]) -> Tensor:
            return model.encode_image(torch.stack([prepare(frame) for frame in frames]).to(device))

        def texts(strings: list[str]) -> Tensor:
            return model.encode_text(tokenizer(strings).to(device))

        bias = getattr(model, "logit_bias", None)
        source = f"open_clip:{name}" + (f":{Path(weights).name}" if weights else "")
        return cls(
            pictures,
            texts,
            _open_clip_length(tokenizer),
            tokenizer.context_length,
            mapping=mapping or ("generic" if bias is None else "sigmoid"),
            scale=model.logit_scale.exp().item(),
            bias=0.0 if bias is None else bias.item(),
            generic=generic,
            source=source,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        mapping: str | None = None,
        generic: Sequence[str] = GENERIC,
        dtype: torch.dtype = torch.float32,
    ) -> ClipBackend:
        """A CLIP or SigLIP model of transformers, from safetensors.

        Parameters:
            path: folder or hub id.
            device, mapping, generic: as in `open_clip`.
            dtype: of its weights.
        Raises:
            UnsupportedError: for a model without a space shared by pictures and texts.
        """
        from transformers import AutoModel, AutoProcessor

        model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=dtype).to(_device(device)).eval()
        if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
            raise UnsupportedError(f"{path} is a {model.config.model_type!r} model; a CLIP or SigLIP one is needed.")
        processor = AutoProcessor.from_pretrained(path)
        tokenizer, window = processor.tokenizer, model.config.text_config.max_position_embeddings
        bias = getattr(model, "logit_bias", None)
        if bias is None and tokenizer.eos_token_id not in tokenizer("a").input_ids:
            raise UnsupportedError(f"the tokenizer at {path} writes no end token, off which CLIP reads a text.")

        def pictures(frames: list[Image.Image]) -> Tensor:
            inputs = processor.image_processor(images=frames, return_tensors="pt").to(model.device, dtype)
            return _pooled(model.get_image_features(**inputs))

        def texts(strings: list[str]) -> Tensor:
            # SigLIP was trained on texts filled up to its window, padding attended to
            full = {"padding": True} if bias is None else {"padding": "max_length", "max_length": window}
            inputs = tokenizer(strings, return_tensors="pt", **full).to(model.device)
            return _pooled(model.get_text_features(**inputs if bias is None else {"input_ids": inputs["input_ids"]}))

        return cls(
            pictures,
            texts,
            lambda text: len(tokenizer(text, verbose=False).input_ids),
            window,
            mapping=mapping or ("generic" if bias is None else "sigmoid"),
            scale=model.logit_scale.exp().item(),
            bias=0.0 if bias is None else bias.item(),
            generic=generic,
            source=f"{model.config.model_type}:{Path(path).name}",
        )

    @classmethod
    def embedded(
        cls,
        vision: nn.Module | None = None,
        mapping: str = "minmax",
        generic: Sequence[str] = GENERIC,
    ) -> ClipBackend:
        """The embedded models' own text tower, with the vision tower that it was trained with.

        Parameters:
            vision: a CLIP vision tower of an embedded model, of any picture size (model.model.vision_tower); None for the
                one of tiny-llava.
        Raises:
            UnsupportedError: for a vision tower of another kind or width.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessor

        from vtprune.embedded import tiny_model
        from vtprune.relevance import _TOWER, _embedded

        folder = tiny_model()
        tokenizer, clip = AutoTokenizer.from_pretrained(folder), _embedded(folder / _TOWER).eval()
        if vision is None:
            loaded = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            vision = loaded.model.vision_tower.eval()
        end = tokenizer.eos_token  # CLIP reads a text off its end token, which a decoder's tokenizer does not write
        config, width = vision.config, clip.visual_projection.in_features
        if config.model_type != "clip_vision_model" or config.hidden_size != width:
            raise UnsupportedError(
                f"a {config.model_type!r} of width {config.hidden_size} does not go with the embedded text tower, which takes "
                f"a CLIP vision tower of width {width}."
            )
        side = config.image_size
        # the defaults are CLIP's mean and standard deviation
        processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

        def pictures(frames: list[Image.Image]) -> Tensor:
            weight = next(vision.parameters())
            pixels = processor(images=frames, return_tensors="pt").pixel_values.to(weight.device, weight.dtype)
            return clip.to(weight.device).visual_projection(vision(pixel_values=pixels).pooler_output.float())

        def texts(strings: list[str]) -> Tensor:
            inputs = tokenizer([f"{text}{end}" for text in strings], padding=True, padding_side="right", return_tensors="pt")
            inputs = {name: inputs[name].to(clip.device) for name in ("input_ids", "attention_mask")}
            return _pooled(clip.get_text_features(**inputs))

        return cls(
            pictures,
            texts,
            lambda text: len(tokenizer(f"{text}{end}", verbose=False).input_ids),
            clip.config.text_config.max_position_embeddings,
            mapping=mapping,
            scale=clip.logit_scale.exp().item(),
            generic=generic,
            source="embedded",
        )

    def prepare(self, question: str, objects: list[str]) -> _Texts:
        parts, phrase = [], []
        for number, text in enumerate(phrases(question, objects)):
            found = _parts(text, self.length, self.window)
            if len(found) > 1:
                warnings.warn(
                    f"a text of {self.length(text)} tokens ({text[:40]!r} ...) is longer than the {self.window} that "
                    f"{self.source} reads: it is compared in {len(found)} parts. A list of objects is matched better.",
                    ScoreNote,
                    stacklevel=3,
                )
            parts += found
            phrase += [number] * len(found)
        generic = self._embed(self.texts, self.generic) if self.mapping == "generic" else None
        return _Texts(self._embed(self.texts, parts), torch.tensor(phrase), generic)

    def look(self, asked: _Texts, frames: list[Image.Image]) -> Tensor:
        """[n, P] unit embeddings, fp32 on the CPU; the question plays no part."""
        return self._embed(self.pictures, [frame.convert("RGB") for frame in frames])

    def finish(self, asked: _Texts, seen: Tensor) -> Tensor:
        member = nn.functional.one_hot(asked.phrase).float()
        similarity = (seen @ asked.parts.T) @ (member / member.sum(0))
        generic = None if asked.generic is None else seen @ asked.generic.T
        return relevance(similarity, self.mapping, generic=generic, scale=self.scale, bias=self.bias)

    @staticmethod
    @torch.inference_mode()
    def _embed(embed: Embed, items: list[Any]) -> Tensor:
        return normalize(embed(items).float(), dim=-1).cpu()


def _parts(text: str, length: Callable[[str], int], window: int) -> list[str]:
    """The text halved at a space, or within a word where there is none, until every part fits."""
    if length(text) <= window or len(text) < 2:
        return [text]
    split = text.split()
    if len(split) > 1:
        halves = " ".join(split[: len(split) // 2]), " ".join(split[len(split) // 2 :])
    else:
        halves = text[: len(text) // 2], text[len(text) // 2 :]
    return [part for half in halves for part in _parts(half, length, window)]


def _open_clip_length(tokenizer: Any) -> Callable[[str], int]:
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:  # CLIP's own, whose `encode` leaves out start and end
        return lambda text: len(tokenizer.encode(text)) + 2
    clean = getattr(tokenizer, "clean_fn", str)
    if getattr(tokenizer, "tokenizer_mode", "") == "clips":  # start, end and a class token
        return lambda text: len(inner(clean(text), add_special_tokens=False, verbose=False).input_ids) + 3
    return lambda text: len(inner(clean(text), verbose=False).input_ids)


def _pooled(features: Any) -> Tensor:
    """Transformers before 5 gave a tensor where later ones give an output object."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
