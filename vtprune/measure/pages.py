"""A benchmark's rows as a Markdown table and as a picture. Knows the JSON that `vtprune bench` writes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by the colour-blind; black and grey are the bounds
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")

RowData = Mapping[str, Any]


def spent(milliseconds: float) -> str:
    """`12.42 s`, `63 ms`, `3.1 ms`."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def held(count: float) -> str:
    """`318.0 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _time(name: str) -> Callable[[RowData], str | None]:
    return lambda row: None if row.get(name) is None else spent(row[name]["median"])


def _bytes(name: str) -> Callable[[RowData], str | None]:
    return lambda row: None if row.get(name) is None else held(row[name])


def _width(row: RowData) -> str | None:
    spread = row.get("prefill")
    return None if spread is None else spent(spread["high"] - spread["low"])


def _ratio(name: str, share: str | None = None) -> Callable[[RowData], str | None]:
    def read(row: RowData) -> str | None:
        if row.get(name) is None:
            return None
        reached = "" if share is None or row.get(share) is None else f" ({row[share]:.0%})"
        return f"{row[name]:.2f}x{reached}"

    return read


def _selection(row: RowData) -> str | None:
    if row.get("selection") is None:
        return None
    share = "" if row.get("selection_share") is None else f" ({100 * row['selection_share']:.1f} %)"
    return f"{spent(row['selection']['median'])}{share}"


# heading -> what stands there; columns without any value are left out
COLUMNS: tuple[tuple[str, Callable[[RowData], str | None]], ...] = (
    ("in", lambda row: None if row.get("entered") is None else f"{row['entered']:g}"),
    ("equiv.", lambda row: None if row.get("equivalent_tokens") is None else f"{row['equivalent_tokens']:.1f}"),
    ("encoder", _time("encoder")),
    ("projector", _time("projector")),
    ("decoder", _time("decoder")),
    ("selection", _selection),
    ("prefill", _time("prefill")),
    ("IQR", _width),
    ("speed-up", _ratio("speedup")),
    ("FLOPs bound", _ratio("flops_bound", "flops_share")),
    ("measured bound", _ratio("measured_bound", "bound_share")),
    ("first token", _time("ttft")),
    ("per token", _time("decode")),
    ("end to end", _time("total")),
    ("peak memory", _bytes("peak_bytes")),
    ("KV cache", _bytes("kv_bytes")),
)
# on a terminal they stand in three narrow tables
PARTS = (
    ("in", "equiv.", "prefill", "IQR", "speed-up", "FLOPs bound", "measured bound"),
    ("encoder", "projector", "decoder", "selection"),
    ("first token", "per token", "end to end", "peak memory", "KV cache"),
)


def grid(rows: Sequence[RowData], only: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Headings (all, or those of `only`) and cells of a table of `rows`; a row that could not run has "-" throughout."""
    columns = [(h, read) for h, read in COLUMNS if (only is None or h in only) and any(read(row) for row in rows)]
    batches = len({row.get("batch", 1) for row in rows}) > 1
    headings = [*(["batch"] if batches else []), "case", *(heading for heading, _ in columns)]
    cells = [
        [*([str(row.get("batch", 1))] if batches else []), row["label"], *(read(row) or "-" for _, read in columns)]
        for row in rows
    ]
    return headings, cells


def described(setting: Mapping[str, Any]) -> str:
    """The setting in a sentence."""
    batch = setting["batch"] if isinstance(setting["batch"], list) else [setting["batch"]]
    what = f"{setting['images']} picture(s)" if setting.get("frames") is None else f"a video of {setting['frames']} frames"
    return (
        f"{setting['config']}, random weights, {setting['decoder_layers']} decoder layers, batch "
        f"{' and '.join(map(str, batch))}, {what} each, {setting['text_tokens']} text tokens, {setting['dtype']}, "
        f"{setting['attn']}; medians of {setting['repeats']} interleaved rounds after {setting['warmup']}. "
        f"{setting['device']}, {setting['threads']} threads, torch {setting['torch']}, transformers {setting['transformers']}, "
        f"vtprune {setting['vtprune']}, {setting['date']}."
    )


def table(data: Mapping[str, Any], raw: str | None = None, only: Sequence[str] | None = None) -> str:
    """Markdown: the table, how it was measured, what holds it back.

    Parameters:
        raw: address of the JSON, to link to; only: the columns to show, None for all.
    """
    headings, cells = grid(data["rows"], only)
    first = 2 if headings[0] == "batch" else 1
    # in: visual tokens that enter the decoder; equiv.: mean over its layers
    lines = [
        "| " + " | ".join(headings) + " |",
        "|" + "|".join("---" if at < first else "---:" for at in range(len(headings))) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        described(data["setting"])
        + (f" `{data['command']}`" if data.get("command") else "")
        + (f" ([raw]({raw}))" if raw else ""),
    ]
    failed = [row for row in data["rows"] if row.get("error")]
    if failed:
        lines += ["", *(f"- batch {row['batch']}, {row['label']} did not run: {row['error']}" for row in failed)]
    if data.get("reasons"):
        lines += ["", "Where pruning cannot help, by these numbers:", "", *(f"- {reason}" for reason in data["reasons"])]
    return "\n".join(lines)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Speed-up against tokens kept, a panel per batch size, both bounds drawn; PNG or SVG by the path's ending.

    Raises:
        ValueError: if no row has a speed-up and a budget.
    """
    from matplotlib.figure import Figure

    rows = [row for row in data["rows"] if row.get("speedup") and row.get("keep") is not None and row["flops_bound"] > 1]
    if not rows:
        raise ValueError("there is no row with a budget and a speed-up to draw.")
    batches = sorted({row.get("batch", 1) for row in rows})
    figure = Figure(figsize=(1.2 + 4.6 * len(batches), 4.4), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    names = list(dict.fromkeys(_name(row) for row in rows))
    for axis, batch in zip(axes, batches, strict=True):
        here = [row for row in rows if row.get("batch", 1) == batch]
        kept = sorted({row["equivalent_tokens"] for row in here})
        ticks = sorted({round(tokens) for tokens in kept})
        axis.set_xscale("log", base=2)
        for name, colour, style, what in (
            ("flops_bound", "black", "--", "FLOPs bound"),
            ("measured_bound", "#666666", ":", "measured bound"),
        ):
            # strategies that save encoder work have a FLOPs bound of their own; the line is that of the others
            values = [
                (tokens, min(row[name] for row in here if row["equivalent_tokens"] == tokens and row.get(name)))
                for tokens in kept
                if any(row.get(name) for row in here if row["equivalent_tokens"] == tokens)
            ]
            if values:
                axis.plot(*zip(*values, strict=True), color=colour, linestyle=style, linewidth=1.6, label=what, zorder=1)
        for at, name in enumerate(names):
            mine = sorted((row["equivalent_tokens"], row["speedup"]) for row in here if _name(row) == name)
            if mine:
                style = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}
                axis.plot(*zip(*mine, strict=True), **style, linewidth=1, markersize=6, label=name, zorder=2)
        axis.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        spaced = [ticks[0]]
        for tick in ticks[1:]:
            if tick >= 1.25 * spaced[-1]:
                spaced.append(tick)
        axis.set_xticks(spaced, [str(tick) for tick in spaced])
        axis.minorticks_off()
        axis.set_xlabel("visual tokens, mean over decoder layers")
        if axis is axes[0]:
            axis.set_ylabel("speed-up of prefill, encoder included")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#eeeeee")
        axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    setting = data["setting"]
    title = f"{setting['config']}, {setting['decoder_layers']} decoder layers, {setting['dtype']}, {setting['device']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _name(row: RowData) -> str:
    return row["label"].rpartition(" keep=")[0] or row["label"]
