"""Loading a model by name and asking it a question, pruned or not; nothing here prints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune import embedded
from vtprune.cli.console import UserError
from vtprune.images import open_image
from vtprune.pruner import Pruner

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from vtprune.reporting import Report

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Loaded:
    """A model ready to be asked: itself, its processor, and what the user called it."""

    model: nn.Module
    processor: Any
    name: str


def pick_device(name: str):
    """A torch device; "auto" is CUDA where there is one.

    Raises:
        UserError: if there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r} is not there; try cpu, cuda, cuda:0 or auto.") from error
    if device.type == "meta":
        raise UserError("--device meta holds no values; try cpu or cuda.")
    return device


def pick_dtype(name: str, device):
    """A torch dtype; "auto" is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        UserError: for another name.
    """
    import torch

    if name not in DTYPES:
        raise UserError(f"--dtype {name!r}: one of {', '.join(DTYPES)}.")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def load(model: str | None, device: str, dtype: str, attn: str, trust_remote_code: bool, video: bool = False) -> Loaded:
    """Model and processor by Hugging Face id or folder.

    Parameters:
        model: None for the embedded tiny model, of videos if `video`.
    Raises:
        UserError: if they cannot be loaded.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source, name = model, model
    if model is None:
        source = str(embedded.tiny_video() if video else embedded.tiny_model())
        name = f"the embedded tiny {'video ' if video else ''}model"
    if model is not None and Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model!r} is a folder without a config.json.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        loaded = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=kind,
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"cannot load {name}: {reason.replace(source, name)}") from error
    return Loaded(loaded.to(place).eval(), processor, name)


def read_images(names: Sequence[str]) -> list[Image.Image]:
    """Pictures by path, or by the name of an embedded one where no such file is.

    Raises:
        ImageError: if one cannot be read.
    """
    shipped = embedded.pictures()
    return [open_image(shipped[n] if n in shipped and not Path(n).exists() else n) for n in names]


def prepare(loaded: Loaded, images: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """Model inputs for the pictures followed by the question.

    Raises:
        UserError: if the question is empty or holds the image placeholder, or the processor refuses.
    """
    return encode(loaded, "image", len(images), question, {"images": list(images)})


def encode(loaded: Loaded, kind: str, count: int, question: str, given: dict[str, Any]) -> dict[str, Any]:
    """Model inputs for a prompt of `count` pictures or videos followed by the question.

    Parameters:
        kind: "image" or "video"; given: what the processor takes of them.
    Raises:
        UserError: if the question is empty or holds a placeholder, or the processor refuses.
    """
    what = {"image": "picture", "video": "video"}[kind]
    token = getattr(loaded.processor, f"{kind}_token", f"<{kind}>")
    if not question.strip():
        raise UserError("the question is empty.")
    if token in question:
        raise UserError(f"the question holds {token!r}, which marks a {what}'s place; the {what}s come first by themselves.")
    if getattr(loaded.processor, "chat_template", None):
        content = [{"type": kind} for _ in range(count)] + [{"type": "text", "text": question}]
        text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        places = f"{token}\n" * count
        text = f"USER: {places}{question} ASSISTANT:"
    try:
        inputs = loaded.processor(text=text, return_tensors="pt", **given)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{loaded.name} has a processor that cannot take {what}s with a question: {error}") from error
    return dict(inputs.to(loaded.model.device, loaded.model.dtype))


def answer(
    loaded: Loaded, inputs: dict[str, Any], pruner: Pruner | None, positions: str | None, tokens: int
) -> tuple[str, Report]:
    """Generate greedily; the answer's text and the report of its prefill.

    Parameters:
        pruner: None to keep everything (counted by the engine, which then changes nothing).
        tokens: most tokens to generate.
    """
    import torch

    from vtprune.api import pruning
    from vtprune.measure.bench import Everything

    with pruning(loaded.model, pruner or Everything(), positions=positions) as session, torch.inference_mode():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
            made = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        report = session.report
    text = loaded.processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), report
