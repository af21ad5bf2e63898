"""Hold the committed benchmarks against the bars of docs/performance.md, and write the table there.

    python -m evaluations.bars docs/bench docs/performance.md

Reads files of `vtprune bench --json` and of `python -m evaluations.gpu`; what was not measured stays "not yet measured".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.cli.console import put_between

MARK = "bars"
GREEDY = ("divprune", "todre", "cdpruner")
EARLY = ("flowcut", "visionzip", "random", *GREEDY)  # what leaves before the decoder
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Bar:
    """One bar: what is asked for, and how a file answers.

    Parameters:
        text: what is measured; wanted: the bar in words; file: below the folder of benchmarks.
        value: the figure, of the file's rows, None if they do not have it; well: whether it reaches the bar.
        shown: the figure in words.
    """

    text: str
    wanted: str
    file: str
    value: Callable[[dict[str, Any]], float | None]
    well: Callable[[float], bool]
    shown: Callable[[float], str]


def _rows(data: dict[str, Any], names: Sequence[str] | None = None, keeps: Sequence[int] | None = None) -> Rows:
    found = []
    for row in data["rows"]:
        name, _, keep = row["label"].rpartition(" keep=")
        if row.get("error") or not name or (names is not None and name not in names):
            continue
        if keeps is None or keep in map(str, keeps):
            found.append(row)
    return found


def _least(key: str, names: Sequence[str] | None = None, keeps: Sequence[int] | None = None):
    def value(data: dict[str, Any]) -> float | None:
        return min((row[key] for row in _rows(data, names, keeps) if row.get(key) is not None), default=None)

    return value


def _most(key: str, names: Sequence[str] | None = None):
    def value(data: dict[str, Any]) -> float | None:
        return max((row[key] for row in _rows(data, names) if row.get(key) is not None), default=None)

    return value


def _scored(data: dict[str, Any]) -> list[str]:
    return sorted({row["label"].rpartition(" keep=")[0] for row in _rows(data)} - {*GREEDY, "evict", ""})


def _most_scored(data: dict[str, Any]) -> float | None:
    return _most("selection_share", _scored(data))(data)


def _all(data: dict[str, Any]) -> float | None:
    return max((abs(row["speedup"] - 1) for row in data["rows"] if row["label"].endswith(" keep=all")), default=None)


def _pruned(data: dict[str, Any]) -> float | None:
    return min((row["speedup"] for row in _rows(data) if row["flops_bound"] > 1), default=None)


def _memory_falls(data: dict[str, Any]) -> float | None:
    """Over strategies, the largest ratio of the peak at a smaller keep to that at the next larger."""
    peaks: dict[str, dict[float, int]] = {}
    for row in _rows(data, EARLY):
        if row.get("peak_bytes"):
            peaks.setdefault(row["label"].rpartition(" keep=")[0], {})[row["equivalent_tokens"]] = row["peak_bytes"]
    ratios = [mine[a] / mine[b] for mine in peaks.values() for a, b in zip(sorted(mine)[:-1], sorted(mine)[1:], strict=True)]
    return max(ratios, default=None)


def _greedy(counts: Sequence[int]):
    def value(data: dict[str, Any]) -> float | None:
        return max((r["ms"] for r in data["rows"] if r.get("k") in counts and r.get("batch") == 1 and "what" in r
                    and not r["what"].startswith(("part", "before"))), default=None)  # fmt: skip

    return value


def _score_per_image(data: dict[str, Any]) -> float | None:
    return max((r["selection"]["median"] / r["batch"] for r in _rows(data, ("random", "visionzip", "flowcut"))), default=None)


percent = lambda value: f"{100 * value:.1f} %"
times = lambda value: f"{value:.2f}x"
spent = lambda value: f"{value:.2f} ms"
CPU = (
    "cpu-llava-1.5-7b-4-layers.json",
    "cpu-llava-1.5-7b.json",
    "cpu-llava-next-7b-4-layers.json",
    "cpu-llava-1.5-7b-overhead.json",
)
GPU = "gpu-h200"
BARS = (
    Bar("encoder and select stage, keep 64, 128, 192 of 576", "at least 95 % of the measured bound", CPU[0],
        _least("bound_share", EARLY), lambda v: v >= 0.95, percent),
    Bar("encoder and select stage, keep 160, 320, 640 of 2,880", "at least 95 % of the measured bound", CPU[2],
        _least("bound_share", EARLY), lambda v: v >= 0.95, percent),
    Bar("FlowCut where its image lets it shorten the encoder", "above the measured bound", CPU[0],
        _least("bound_share", ("flowcut",)), lambda v: v > 1, percent),
    Bar("all 32 layers, keep 64, encoder included", "at least 3.9x", CPU[1], _least("speedup", None, (64,)),
        lambda v: v >= 3.9, times),
    Bar("all 32 layers, keep = all", "within 1 % of unpruned", CPU[1], _all, lambda v: v <= 0.01, percent),
    Bar("score-based strategies, 576 tokens", "overhead at most 3 % of unpruned prefill", CPU[3], _most_scored,
        lambda v: v <= 0.03, percent),
    Bar("greedy strategies, 576 tokens", "overhead at most 5 %", CPU[3], _most("selection_share", GREEDY),
        lambda v: v <= 0.05, percent),
    Bar("score-based strategies, 2,880 tokens", "overhead at most 3 % of unpruned prefill (of 32 layers)", CPU[2],
        lambda d: _of_whole(d, _most_scored), lambda v: v <= 0.03, percent),
    Bar("greedy strategies, 2,880 tokens", "overhead at most 6 % (of 32 layers)", CPU[2],
        lambda d: _of_whole(d, _most("selection_share", GREEDY)), lambda v: v <= 0.06, percent),
    Bar("no row slower than unpruned, 576 tokens", "above 1x", CPU[0], _pruned, lambda v: v > 1, times),
    Bar("no row slower than unpruned, 2,880 tokens", "above 1x", CPU[2], _pruned, lambda v: v > 1, times),
    Bar("peak memory of prefill against the next larger keep", "below 100 %", CPU[0], _memory_falls, lambda v: v < 1, percent),
    Bar("GPU: LLaVA-NeXT-7B, 160 tokens, batch 1", "at least 3.2x", f"{GPU}/llava-next-7b-batch-1.json",
        _least("speedup", EARLY, (160,)), lambda v: v >= 3.2, times),
    Bar("GPU: LLaVA-NeXT-7B, 320 tokens, batch 1", "at least 2.9x", f"{GPU}/llava-next-7b-batch-1.json",
        _least("speedup", EARLY, (320,)), lambda v: v >= 2.9, times),
    Bar("GPU: LLaVA-NeXT-7B, batch 8", "at least 70 % of the FLOPs bound", f"{GPU}/llava-next-7b-batch-8.json",
        _least("flops_share", EARLY), lambda v: v >= 0.7, percent),
    Bar("GPU: greedy selection, k <= 128", "at most 3 ms", f"{GPU}/greedy.json", _greedy((64, 128)), lambda v: v <= 3, spent),
    Bar("GPU: greedy selection, k = 320", "at most 5 ms", f"{GPU}/greedy.json", _greedy((320,)), lambda v: v <= 5, spent),
    Bar("GPU: score-based overhead, LLaVA-1.5-7B", "at most 1 ms an image", f"{GPU}/llava-1.5-7b-batch-1.json",
        _score_per_image, lambda v: v <= 1, spent),
)  # fmt: skip


def _of_whole(data: dict[str, Any], value: Callable[[dict[str, Any]], float | None]) -> float | None:
    """A share of the unpruned prefill, as a share of that of all 32 layers: encoder plus the decoder so many times."""
    share, bare = value(data), data["rows"][0]
    if share is None or bare.get("error"):
        return None
    decoder = bare["decoder"]["median"]
    whole = bare["prefill"]["median"] - decoder + decoder * 32 / data["setting"]["decoder_layers"]
    return share * bare["prefill"]["median"] / whole


def table(folder: Path) -> str:
    """Markdown: bar, figure, command."""
    lines = ["| | bar | measured | | by |", "|---|---|---:|---|---|"]
    for bar in BARS:
        path, figure, reached, command = folder / bar.file, "not yet measured", "", ""
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            value = None if "error" in data else bar.value(data)
            if value is not None:
                figure, reached = bar.shown(value), "reached" if bar.well(value) else "**missed**"
        command = f"[{Path(bar.file).stem}](bench/{bar.file})" if path.is_file() else f"`{bar.file}`"
        lines.append(f"| {bar.text} | {bar.wanted} | {figure} | {reached} | {command} |")
    return "\n".join(lines)


if __name__ == "__main__":
    put_between(Path(sys.argv[2]), MARK, table(Path(sys.argv[1])))
