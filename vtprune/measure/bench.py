"""Timing pruned against unpruned runs of one model, interleaved in one process; also of models without weights.

Knows strategies, reports and the model's public forward. Speed does not depend on what the weights say, with one
exception: strategies whose schedule follows the attention (FlowCut's early cuts) see a flat one in a random model, and
cut later there than in a trained one.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtprune.api import pruning
from vtprune.engine.cache import cache_name
from vtprune.families import locate
from vtprune.measure.clock import Clock
from vtprune.pruner import Pruner, UnsupportedError, VtpruneError
from vtprune.reporting import Report

# standard deviation of the random weights, as Llama initialises
_STD = 0.02
# random values are made once and tiled over the weights: a 7B model's would take a minute each
_TILE = 1 << 20


@dataclass
class Everything(Pruner):
    """No stage, every token stays: how the engine counts an unpruned run."""

    keep: float = 1.0

    name = "none"
    positions = "original"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Parameters:
        label: for tables.
        pruner: the strategy, or None for the bare model.
        positions: "original", "compact", or None for the strategy's own.
    """

    label: str
    pruner: Pruner | None = None
    positions: str | None = None


@dataclass(frozen=True)
class Run:
    """One timed run, in milliseconds; `report` is None for the bare model."""

    prefill_ms: float
    encoder_ms: float
    decode_ms: float | None
    report: Report | None

    @property
    def selection_ms(self) -> float:
        return 0.0 if self.report is None else self.report.selection_ms


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of a quantity over the runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Row:
    """What one case cost, or why it could not run.

    Parameters:
        label, strategy: what ran; keep: its budget, None for the bare model.
        visual_tokens, entered, equivalent_tokens: per sample before pruning, entering the decoder, mean over layers.
        prefill, encoder, decoder, selection, decode: milliseconds; `prefill` is the whole forward up to the first
            logits, `encoder` its vision encoder and projector, `decoder` the rest, `decode` one more token.
        kv_bytes, flops: of the prefill, by count.
        flops_bound: the speed-up that the FLOPs alone would give; speedup: the one measured.
        selection_share: selection time over the bare model's prefill.
        error: why it could not run; everything measured is None then.
    """

    label: str
    strategy: str
    keep: int | float | None = None
    visual_tokens: int | None = None
    entered: float | None = None
    equivalent_tokens: float | None = None
    prefill: Spread | None = None
    encoder: Spread | None = None
    decoder: Spread | None = None
    selection: Spread | None = None
    decode: Spread | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    flops: int | None = None
    flops_full: int | None = None
    flops_bound: float | None = None
    speedup: float | None = None
    selection_share: float | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)


def build(
    config: str | Path, layers: int | None, dtype: torch.dtype, device: str | torch.device, attn: str, seed: int = 0
) -> nn.Module:
    """A model with random weights from a configuration file, its decoder cut to `layers` (the encoder stays whole).

    Parameters:
        config: path of a `config.json`; layers: decoder layers, None for all.
        dtype, device, attn: as `from_pretrained` takes them; seed: of the weights.
    Raises:
        UnsupportedError: if the file holds no configuration of a vision-language model, or `layers` exceeds it.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    try:
        values = json.loads(Path(config).read_text(encoding="utf-8"))
        model_type = values.pop("model_type")
        made = AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # JSON and Unicode errors are ValueErrors
        raise UnsupportedError(f"{Path(config).name} is no usable model configuration: {error}") from error
    if not hasattr(made, "text_config") or not hasattr(made, "vision_config"):
        raise UnsupportedError(
            f"{Path(config).name} (model_type {model_type!r}) is not a vision-language model's configuration."
        )
    depth = made.text_config.num_hidden_layers
    if layers is not None:
        if not 1 <= layers <= depth:
            raise UnsupportedError(f"layers={layers}: this decoder has 1 .. {depth}.")
        made.text_config.num_hidden_layers = layers
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(made, dtype=dtype, attn_implementation=attn)
    _randomise(model, seed)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_inputs(model: nn.Module, batch: int, text_tokens: int, seed: int = 0, images: int = 1) -> dict[str, torch.Tensor]:
    """Random pictures and prompts for `model`: half the text before the images, half after.

    Parameters:
        images: pictures per sample; a tiled model gets the largest picture that it takes.
    Raises:
        UnsupportedError: if text_tokens is below 2, batch or images below 1, or the prompt exceeds the decoder's positions.
    """
    if text_tokens < 2 or batch < 1 or images < 1:
        raise UnsupportedError(f"batch={batch}, images={images}, text_tokens={text_tokens}: at least 1, 1 and 2.")
    config, device, site = model.config, model.device, locate(model)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    shape, more, image = (3, side, side), {}, images * (side // patch) ** 2
    if site.family.tiles is not None:
        # the largest picture that the model takes
        largest = max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
        sizes = torch.tensor([largest]).repeat(batch * images, 1)
        layout = site.layouts(sizes[:1])[0]
        shape, more, image = (layout.tiles, *shape), {"image_sizes": sizes.to(device)}, images * layout.placeholders
    limit = config.text_config.max_position_embeddings
    if image + text_tokens >= limit:
        raise UnsupportedError(f"{image} visual + {text_tokens} text tokens do not fit the decoder's {limit} positions.")
    generator = torch.Generator().manual_seed(seed)
    token = config.image_token_id
    text = torch.randint(0, min(token, config.text_config.vocab_size), (batch, text_tokens), generator=generator)
    before = text_tokens // 2
    ids = torch.cat([text[:, :before], torch.full((batch, image), token), text[:, before:]], 1)
    pixels = torch.randn(batch * images, *shape, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, model.dtype),
        **more,
    }


def timed(model: nn.Module, inputs: dict[str, Any], case: Case, decode_steps: int = 0) -> Run:
    """Run `case` once: forward up to the first logits with a cache, then `decode_steps` greedy steps.

    Parameters:
        model: bare; it is wrapped for the length of the run. inputs: what the processor made.
    Raises:
        VtpruneError: if the strategy cannot serve the model or the budget.
    """
    with contextlib.ExitStack() as stack:
        session = None
        if case.pruner is not None:
            session = stack.enter_context(pruning(model, case.pruner, positions=case.positions))
        stack.enter_context(torch.inference_mode())
        clock = Clock(model.device)
        stack.enter_context(_encoder_span(model, clock))
        with clock.span("prefill"):
            output = model(**inputs, use_cache=True, logits_to_keep=1)
        decode = None
        if decode_steps:
            name = cache_name(model)
            token = output.logits[:, -1:].argmax(-1)
            mask = inputs.get("attention_mask")
            for _ in range(decode_steps):
                more = {name: getattr(output, name)}
                if mask is not None:
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                    more["attention_mask"] = mask
                with clock.span("decode"):
                    output = model(input_ids=token, use_cache=True, **more)
                token = output.logits[:, -1:].argmax(-1)
            decode = clock.total("decode") / decode_steps
        return Run(clock.total("prefill"), clock.total("encoder"), decode, session.report if session else None)


def measure(
    model: nn.Module,
    inputs: dict[str, Any],
    cases: Sequence[Case],
    repeats: int = 5,
    warmup: int = 1,
    decode_steps: int = 0,
    tick: Callable[[str], None] = lambda label: None,
) -> list[Row]:
    """Time the bare model and all `cases` in turn, `warmup` + `repeats` times over; medians of the last `repeats`.

    A case that its strategy cannot serve gets a row with the reason. The first row is the bare model.

    Parameters:
        tick: called with a case's label before each run, for a progress bar.
    """
    bare = Case("unpruned")
    count = timed(model, inputs, Case("", Everything())).report
    runs: dict[int, list[Run]] = {i: [] for i in range(len(cases) + 1)}
    errors: dict[int, str] = {}
    for turn in range(warmup + repeats):
        for i, case in enumerate([bare, *cases]):
            tick(case.label)
            if i in errors:
                continue
            try:
                run = timed(model, inputs, case, decode_steps)
            except VtpruneError as error:
                errors[i] = str(error)
                continue
            if turn >= warmup:
                runs[i].append(run)
    full = statistics.median(run.prefill_ms for run in runs[0])
    rows = []
    for i, case in enumerate([bare, *cases]):
        strategy = case.pruner.describe() if case.pruner else "unpruned"
        keep = getattr(case.pruner, "keep", None)
        if i in errors:
            rows.append(Row(case.label, strategy, keep, error=errors[i]))
            continue
        rows.append(_row(case.label, strategy, keep, runs[i], full, count))
    return rows


def _row(label: str, strategy: str, keep: int | float | None, runs: list[Run], full: float, count: Report) -> Row:
    # the engine's count of a run where everything stays is the bare model's
    report = runs[-1].report or count
    prefill = Spread.of([run.prefill_ms for run in runs])
    selection = Spread.of([run.selection_ms for run in runs])
    decode = [run.decode_ms for run in runs if run.decode_ms is not None]
    samples = report.samples
    return Row(
        label,
        strategy,
        keep,
        visual_tokens=samples[0].visual_tokens,
        entered=sum(len(s.kept) for s in samples) / len(samples),
        equivalent_tokens=report.equivalent_tokens,
        prefill=prefill,
        encoder=Spread.of([run.encoder_ms for run in runs]),
        decoder=Spread.of([run.prefill_ms - run.encoder_ms for run in runs]),
        selection=selection,
        decode=Spread.of(decode) if decode else None,
        kv_bytes=report.kv_bytes,
        kv_bytes_full=count.kv_bytes,
        flops=report.flops,
        flops_full=report.flops_full,
        flops_bound=report.flops_full / report.flops,
        speedup=full / prefill.median,
        selection_share=selection.median / full,
        notes=list(report.notes),
    )


def cases_for(
    names: Sequence[str], keeps: Sequence[int | float], create: Callable[..., Pruner], everything: bool = True
) -> list[Case]:
    """Each strategy keeping everything, then at each budget.

    Parameters:
        create: (name, keep=...) -> strategy, as `vtprune.create`; everything: False leaves the first case out.
    """
    return [
        Case(f"{name} keep={'all' if keep is None else keep}", create(name, keep=1.0 if keep is None else keep))
        for name in names
        for keep in ((None, *keeps) if everything else keeps)
    ]


def machine(device: str | torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    import transformers

    import vtprune

    device = torch.device(device)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtprune": vtprune.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """The processor's name where the system tells, its architecture otherwise."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _encoder_span(model: nn.Module, clock: Clock):
    """Count the model's `get_image_features` (pruned or not) under "encoder"."""
    base = locate(model).base
    original, mine = base.get_image_features, "get_image_features" in base.__dict__

    def get_image_features(*args, **kwargs):
        with clock.span("encoder"):
            return original(*args, **kwargs)

    base.get_image_features = get_image_features
    try:
        yield
    finally:
        if mine:
            base.get_image_features = original
        else:
            del base.get_image_features


def _randomise(model: nn.Module, seed: int) -> None:
    """Fill uninitialised weights: norms with one, biases with zero, the rest with small random values."""
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(seed)
    tile = torch.randn(_TILE, generator=generator, device=parameter.device, dtype=torch.float32) * _STD
    tiles = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                source = tiles.setdefault(weight.dtype, tile.to(weight.dtype))
                flat = weight.view(-1)
                for start in range(0, flat.numel(), _TILE):
                    piece = flat[start : start + _TILE]
                    # shifted, so that the rows of a power-of-two matrix are not copies of each other
                    shift = (start // _TILE * 7919 + 104729 * len(name)) % _TILE
                    piece.copy_(source.roll(shift)[: piece.numel()])
