"""Timing pruned against unpruned runs of one model, interleaved in one process; also of models without weights.

Knows strategies, reports and the model's public forward. Speed does not depend on what the weights say, with one
exception: strategies whose schedule follows the attention (FlowCut's early cuts) see a flat one in a random model, and
cut later there than in a trained one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import json
import os
import platform
import statistics
import time
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
    """One timed run, in milliseconds.

    Parameters:
        prefill_ms: the whole forward up to the first logits; encoder_ms: of it, the vision encoder and what packs its
            features; projector_ms: the projector.
        ttft_ms: wall clock until the first token is known to the caller.
        decode: each further token; total_ms: wall clock of all of it.
        peak_bytes: what the prefill held at most above what was there before it, on an accelerator.
        report: None for the bare model.
    """

    prefill_ms: float
    encoder_ms: float
    projector_ms: float
    ttft_ms: float
    total_ms: float
    decode: tuple[float, ...] = ()
    peak_bytes: int | None = None
    report: Report | None = None

    @property
    def decode_ms(self) -> float | None:
        return statistics.median(self.decode) if self.decode else None

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
        label, strategy: what ran; keep: its budget, None for the bare model; batch: samples.
        visual_tokens, entered, equivalent_tokens: per sample before pruning, entering the decoder, mean over layers.
        prefill, encoder, projector, decoder, selection, decode: milliseconds; `prefill` is the whole forward up to the
            first logits, `encoder` its vision encoder, `decoder` all but encoder and projector, `decode` one more token.
        ttft, total: milliseconds of wall clock until the first token is known, and until all decode steps are done.
        peak_bytes: the most that prefill held above the weights; on the CPU as torch's allocator counts it.
        kv_bytes, flops: of the prefill, by count.
        flops_bound: the speed-up that the FLOPs alone would give (encoder, projector, decoder); speedup: the one measured.
        bound: milliseconds of the unpruned encoder and the bare decoder on a sequence of the pruned length (equivalent
            tokens), in the same process; measured_bound: the speed-up that this would be.
        flops_share, bound_share: how much of either bound was reached.
        selection_share: selection time over the bare model's prefill.
        error: why it could not run; everything measured is None then.
    """

    label: str
    strategy: str
    keep: int | float | None = None
    batch: int = 1
    visual_tokens: int | None = None
    entered: float | None = None
    equivalent_tokens: float | None = None
    prefill: Spread | None = None
    encoder: Spread | None = None
    projector: Spread | None = None
    decoder: Spread | None = None
    selection: Spread | None = None
    ttft: Spread | None = None
    decode: Spread | None = None
    total: Spread | None = None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    flops: int | None = None
    flops_full: int | None = None
    flops_bound: float | None = None
    bound: Spread | None = None
    measured_bound: float | None = None
    speedup: float | None = None
    flops_share: float | None = None
    bound_share: float | None = None
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
        stack.enter_context(_spans(model, clock))
        mask = inputs.get("attention_mask")
        if mask is not None and bool(mask.all()):
            mask = None  # as `generate` does in decode steps
        before = _settled(clock)
        begin = time.perf_counter()
        with clock.span("prefill"):
            output = model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        token.tolist()  # a caller waits for it, too
        ttft = time.perf_counter() - begin
        peak = None if clock.module is None else clock.module.max_memory_allocated() - before
        name = cache_name(model)
        for _ in range(decode_steps):
            more = {name: getattr(output, name)}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                more["attention_mask"] = mask
            with clock.span("decode"):
                output = model(input_ids=token, use_cache=True, **more)
                token = output.logits[:, -1:].argmax(-1)
        if clock.module is not None:
            clock.module.synchronize()
        whole = time.perf_counter() - begin
        projector = clock.total("projector")
        return Run(
            clock.total("prefill"),
            clock.total("encoder") - projector,
            projector,
            1e3 * ttft,
            1e3 * whole,
            tuple(clock.each("decode")),
            peak,
            session.report if session else None,
        )


def timed_bound(model: nn.Module, inputs: dict[str, Any], embeds: torch.Tensor) -> float:
    """Milliseconds of the unpruned vision encoder and then the bare decoder on `embeds` [B, n, D], up to the first logits."""
    site = locate(model)
    video = inputs.get("pixel_values_videos") is not None
    encode = site.base.get_video_features if video else site.base.get_image_features
    known = inspect.signature(encode).parameters
    vision = {name: value for name, value in inputs.items() if name in known and name not in ("input_ids", "attention_mask")}
    if video and "pixel_values_videos" not in known:  # its name there before transformers 5.18
        vision["pixel_values"] = inputs["pixel_values_videos"]
    with torch.inference_mode():
        clock = Clock(model.device)
        _settled(clock)
        with clock.span("prefill"):
            encode(**vision, return_dict=True)
            output = site.decoder(inputs_embeds=embeds, use_cache=True)
            model.get_output_embeddings()(output.last_hidden_state[:, -1:])
        return clock.total("prefill")


def launch_floor(model: nn.Module, repeats: int = 10) -> Spread:
    """Milliseconds of a forward over one token, which no pruning can go below: launches and one read of the weights."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    found = []
    with torch.inference_mode():
        for turn in range(repeats + 2):
            clock = Clock(model.device)
            _settled(clock)
            with clock.span("prefill"):
                model(input_ids=ids, use_cache=True, logits_to_keep=1)
            if turn >= 2:
                found.append(clock.total("prefill"))
    return Spread.of(found)


def allocated(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held at a time during `run`, above what it held before.

    Counted from the allocations themselves (the profiler's memory events), as a process's resident size also shows what
    the C library has not yet given back, and what other threads do. Scratch memory inside kernels' libraries is not in it.
    """
    return max(allocated_around(run, None))


def allocated_around(run: Callable[[], Any], module: nn.Module | None) -> tuple[int, int]:
    """As `allocated`, until `run` first calls `module`, and from then on (0 if it does not)."""
    from torch.profiler import ProfilerActivity, profile, record_function

    name = "vtprune: called"

    def called(*_: Any) -> None:
        with record_function(name):
            pass

    hook = None if module is None else module.register_forward_pre_hook(called, prepend=True)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        if hook is not None:
            hook.remove()
    held, most, phase = 0, [0, 0], 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == name:
            phase = 1
        elif event.name() == "[memory]":
            held += event.nbytes()
        most[phase] = max(most[phase], held)
    return most[0], most[1]


def measure(
    model: nn.Module,
    inputs: dict[str, Any],
    cases: Sequence[Case],
    repeats: int = 5,
    warmup: int = 1,
    decode_steps: int = 0,
    tick: Callable[[str], None] = lambda label: None,
    bounds: bool = False,
    memory: bool = False,
) -> list[Row]:
    """Time the bare model and all `cases` in turn, `warmup` + `repeats` times over; medians of the last `repeats`.

    A case that cannot run (its strategy does not serve it, memory runs out) gets a row with the reason, and the others go
    on. The first row is the bare model.

    Parameters:
        tick: called with a case's label before each run, for a progress bar.
        bounds: also time what each case could reach at best, in the same rounds (`Row.bound`).
        memory: on the CPU, also count allocations, in one more run of each case.
    """
    every = [Case("unpruned"), *cases]
    batch = len(inputs["input_ids"])
    runs: dict[int, list[Run]] = {i: [] for i in range(len(every))}
    errors: dict[int, str] = {}
    lengths: dict[int, int] = {}
    ideal: dict[int, list[float]] = {}
    # counted by the engine on a run in which everything stays
    count, _ = attempt(lambda: timed(model, inputs, Case("", Everything())).report)
    for turn in range(warmup + repeats):
        for i, case in enumerate(every):
            tick(case.label)
            if i in errors:
                continue
            run, error = attempt(lambda case=case: timed(model, inputs, case, decode_steps))
            if error is not None:
                errors[i] = error
                continue
            if turn >= warmup:
                runs[i].append(run)
            # where nothing was pruned, the bare model is the bound
            if bounds and run.report is not None and run.report.flops < run.report.flops_full:
                lengths[i] = round(run.report.equivalent_tokens)
        for length in sorted(set(lengths.values())):
            text = inputs["input_ids"].shape[1] - count.samples[0].visual_tokens if count else 0
            found, error = attempt(lambda n=length + text: timed_bound(model, inputs, _embeds(model, batch, n)))
            if error is None and turn >= warmup:
                ideal.setdefault(length, []).append(found)
    peaks: dict[int, int] = {}
    if memory and model.device.type == "cpu":
        for i, case in enumerate(every):
            if i not in errors:
                found, error = attempt(lambda case=case: allocated(lambda: timed(model, inputs, case)))
                if error is None:
                    peaks[i] = found
    full = statistics.median(run.prefill_ms for run in runs[0]) if runs[0] else None
    rows = []
    for i, case in enumerate(every):
        strategy = case.pruner.describe() if case.pruner else "unpruned"
        keep = getattr(case.pruner, "keep", None)
        if i in errors:
            rows.append(Row(case.label, strategy, keep, batch, error=errors[i]))
            continue
        row = _row(case.label, strategy, keep, batch, runs[i], full, count)
        row.peak_bytes = peaks.get(i, row.peak_bytes)
        best = ideal.get(lengths.get(i, -1))
        if best:
            row.bound = Spread.of(best)
            row.measured_bound = full / row.bound.median if full else None
            row.bound_share = row.bound.median / row.prefill.median
        rows.append(row)
    return rows


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `run` gives, or the reason why it could not: a strategy's refusal, or too little memory."""
    try:
        return run(), None
    except VtpruneError as error:
        return None, str(error)
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {str(error).splitlines()[0]}"
    except (RuntimeError, MemoryError) as error:
        # the CPU's allocator has no exception of its own
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        reason = f"out of memory: {str(error).splitlines()[0] if str(error) else 'the allocation failed'}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason


def _row(
    label: str, strategy: str, keep: int | float | None, batch: int, runs: list[Run], full: float | None, count: Report | None
) -> Row:
    # the engine's count of a run where everything stays is the bare model's
    report = runs[-1].report or count
    prefill = Spread.of([run.prefill_ms for run in runs])
    selection = Spread.of([run.selection_ms for run in runs])
    decode = [step for run in runs for step in run.decode]
    row = Row(
        label,
        strategy,
        keep,
        batch,
        prefill=prefill,
        encoder=Spread.of([run.encoder_ms for run in runs]),
        projector=Spread.of([run.projector_ms for run in runs]),
        decoder=Spread.of([run.prefill_ms - run.encoder_ms - run.projector_ms for run in runs]),
        selection=selection,
        ttft=Spread.of([run.ttft_ms for run in runs]),
        decode=Spread.of(decode) if decode else None,
        total=Spread.of([run.total_ms for run in runs]),
        peak_bytes=max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        speedup=full / prefill.median if full else None,
        selection_share=selection.median / full if full else None,
    )
    if report is None:
        return row
    samples = report.samples
    row.visual_tokens = samples[0].visual_tokens
    row.entered = sum(len(s.kept) for s in samples) / len(samples)
    row.equivalent_tokens = report.equivalent_tokens
    row.kv_bytes, row.kv_bytes_full = report.kv_bytes, report.kv_bytes_full
    row.flops, row.flops_full = report.flops, report.flops_full
    row.flops_bound = report.flops_full / report.flops
    row.flops_share = row.speedup / row.flops_bound if full else None
    row.notes = list(report.notes)
    return row


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


def setting(
    config: str,
    model: nn.Module,
    batches: Sequence[int],
    text_tokens: int,
    repeats: int,
    warmup: int,
    decode_steps: int,
    images: int = 1,
    frames: int | None = None,
) -> dict[str, Any]:
    """How rows were measured, JSON-ready; the `setting` of a file of `vtprune bench`."""
    return {
        "config": config,
        "decoder_layers": model.config.text_config.num_hidden_layers,
        "batch": list(batches),
        "images": images,
        "frames": frames,
        "text_tokens": text_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn": model.config._attn_implementation,
        "repeats": repeats,
        "warmup": warmup,
        "decode_steps": decode_steps,
        **machine(model.device),
    }


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


def _settled(clock: Clock) -> int:
    """Wait for the device; bytes that it holds. Peaks count from here on."""
    if clock.module is None:
        return 0
    clock.module.synchronize()
    clock.module.reset_peak_memory_stats()
    return clock.module.memory_allocated()


def _embeds(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    """[batch, length, D] random embeddings of about the size of the model's own."""
    generator = torch.Generator(model.device).manual_seed(length)
    width = model.config.text_config.hidden_size
    return (_STD * torch.randn(batch, length, width, generator=generator, device=model.device)).to(model.dtype)


@contextlib.contextmanager
def _spans(model: nn.Module, clock: Clock):
    """Count the model's `get_image_features` and `get_video_features` (pruned or not) under "encoder", its projector apart."""
    site = locate(model)
    base, undo = site.base, []
    for name in ("get_image_features", "get_video_features"):
        if not hasattr(base, name):
            continue
        original, mine = getattr(base, name), name in base.__dict__

        def features(*args, original=original, **kwargs):
            with clock.span("encoder"):
                return original(*args, **kwargs)

        # the engine asks a method for its parameters
        setattr(base, name, functools.wraps(original)(features))
        undo.append(functools.partial(setattr, base, name, original) if mine else functools.partial(delattr, base, name))
    marks = []
    undo.append(site.projector.register_forward_pre_hook(lambda *_: marks.append(clock.start("projector"))).remove)
    undo.append(site.projector.register_forward_hook(lambda *_: clock.stop(marks.pop())).remove)
    try:
        yield
    finally:
        for back in reversed(undo):
            back()


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
