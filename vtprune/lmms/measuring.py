"""What each sample cost, and the means of it: the figures that lmms-eval's own backends do not give."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts
from transformers import StoppingCriteria

from vtprune.cli.console import UserError, write_whole
from vtprune.measure.clock import Clock
from vtprune.reporting import Report

SCHEMA = 1
MEASURED = "VTPRUNE_MEASURED"


@dataclass
class Sample:
    """What one request cost. Of a batch, times that it shares are divided among its samples where they are work (prefill,
    selection) and whole where each of them waited for it (first token, later tokens); bytes and FLOPs are divided.

    Parameters:
        task, doc_id: of lmms-eval; batch: samples that ran together.
        visual_tokens, entered, equivalent_tokens: of this very sample, before pruning, entering the decoder, mean over
            decoder layers.
        prefill_ms: vision encoder, projector and decoder up to the first logits, over the batch's samples.
        selection_ms: vtprune's own share of that.
        ttft_ms: from the call of generate to the first new token; tpot_ms: each further token. None where there is none.
        kv_bytes, kv_bytes_full: of the cache after prefill, held and unpruned, padding included, over the batch's samples.
        flops, flops_full: to the first token, with and without pruning, over the batch's samples.
        peak_bytes: most memory in use meanwhile, the whole batch's, weights included: allocated on CUDA; on a CPU the most
            that the process ever had resident.
        input_tokens, output_tokens: of this sample, as the language model would see them unpruned.
    """

    task: str
    doc_id: int | str
    batch: int
    visual_tokens: int | None = None
    entered: int | None = None
    equivalent_tokens: float | None = None
    prefill_ms: float | None = None
    selection_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    kv_bytes: float | None = None
    kv_bytes_full: float | None = None
    flops: float | None = None
    flops_full: float | None = None
    peak_bytes: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


MEANS = tuple(f.name for f in fields(Sample) if f.name not in ("task", "doc_id", "batch", "input_tokens", "output_tokens"))


@dataclass
class Counted(TokenCounts):
    """lmms-eval's token counts with what was measured, which so stands beside the answer in its samples file."""

    measured: Sample | None = None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {k: v for k, v in asdict(self.measured).items() if k not in ("task", "doc_id")}


class Ticks(StoppingCriteria):
    """Notes when tokens come out of generate; stops nothing."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.begin = clock.start("first")
        self.after = None
        self.steps = 0

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        if self.after is None:
            self.clock.stop(self.begin)
            self.after = self.clock.start("rest")
        else:
            # the interval from the first token to this one takes the place of the one before
            self.clock.intervals.pop("rest", None)
            self.clock.stop(self.after)
            self.steps += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def first_ms(self) -> float:
        """Milliseconds to the first token."""
        return self.clock.total("first")

    def each_ms(self) -> float | None:
        """Milliseconds per further token, or None if there was none."""
        return self.clock.total("rest") / self.steps if self.steps else None


class Memory:
    """Most memory in use since `reset`: allocated on CUDA, the process's high-water mark elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # kilobytes, except on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(asked: Sequence[tuple[str, Any]], report: Report | None, peak: int, **more: Any) -> list[Sample]:
    """One entry per sample of a batch.

    Parameters:
        asked: (task, doc_id) of each; report: of the batch's prefill, None if it had nothing to see; more: ttft_ms, tpot_ms.
    """
    count = len(asked)
    made = [Sample(task, doc_id, count, peak_bytes=peak, **more) for task, doc_id in asked]
    if report is None:
        return made
    for sample, seen in zip(made, report.samples, strict=True):
        sample.visual_tokens, sample.entered = seen.visual_tokens, len(seen.kept)
        sample.equivalent_tokens = seen.equivalent_tokens
        for name in ("prefill_ms", "selection_ms", "kv_bytes", "kv_bytes_full", "flops", "flops_full"):
            setattr(sample, name, getattr(report, name) / count)
    return made


def summary(samples: Iterable[Sample]) -> dict[str, dict[str, Any]]:
    """By task, how many samples were measured and the means of what was; None for what no sample had."""
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    tasks = {}
    for task, found in sorted(by_task.items()):
        values = {name: [v for s in found if (v := getattr(s, name)) is not None] for name in MEANS}
        means: dict[str, Any] = {name: statistics.fmean(v) if v else None for name, v in values.items()}
        means["prefill_ms_median"] = statistics.median(values["prefill_ms"]) if values["prefill_ms"] else None
        tasks[task] = {"samples": len(found), **means}
    return tasks


def place() -> Path | None:
    """Where the user wants the measurements, or None.

    Raises:
        UserError: if that is no place for a file.
    """
    name = os.environ.get(MEASURED)
    if not name:
        return None
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{MEASURED}={name!r}: give the path of a file in a folder that is there.")
    return path


def write(path: Path, about: dict[str, Any], samples: Sequence[Sample]) -> None:
    """The measurements as JSON, whole or not at all.

    Parameters:
        about: the run: model, pruner, settings, attn, dtype, device, batch_size.
    Raises:
        UserError: if the place cannot be written.
    """
    import vtprune

    ordered = sorted(samples, key=lambda s: (s.task, str(s.doc_id).zfill(12)))
    content = {
        "schema": SCHEMA,
        "vtprune": vtprune.__version__,
        **about,
        "tasks": summary(ordered),
        "per_sample": [asdict(sample) for sample in ordered],
    }
    text = json.dumps(content, indent=1, default=str, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
