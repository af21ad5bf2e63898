"""A report's plots: accuracy against what a row costs, as SVG that needs nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from vtprune.sweep.report import Row, Section, Value, pareto

# Okabe and Ito's colours, told apart by the colour-blind; black is the unpruned model's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


@dataclass(frozen=True)
class Axis:
    """What a plot has on its x axis."""

    name: str
    title: str
    label: str
    read: Callable[[Row], float | None]


AXES = (
    Axis("tokens", "Against equivalent tokens", "equivalent tokens (mean over decoder layers)", lambda r: r.equivalent_tokens),
    Axis("time", "Against measured prefill", "prefill, ms (median)", lambda r: r.prefill_ms),
    Axis("cache", "Against the KV cache", "KV cache after prefill, MiB", lambda r: _mib(r.kv_bytes)),
)


@dataclass(frozen=True)
class Plot:
    """An SVG with what it shows in words."""

    axis: Axis
    svg: str
    alt: str


def draw(section: Section) -> list[Plot]:
    """The plots that a section has the numbers for."""
    return [plot for axis in AXES if (plot := _draw(section, axis)) is not None]


def gain_of(section: Section) -> tuple[str, Callable[[Row], Value | None]]:
    """What to compare rows by: mean accuracy where every metric is a share, else percent of the unpruned model."""
    if all(section.shares.values()):
        return "mean accuracy, %", lambda row: row.accuracy
    return "mean % of the unpruned model", lambda row: row.relative


def _draw(section: Section, axis: Axis) -> Plot | None:
    import matplotlib
    from matplotlib.figure import Figure

    label, gain = gain_of(section)
    points = [(row, axis.read(row), gain(row)) for row in section.rows if not row.missing]
    points = [(row, x, y) for row, x, y in points if x is not None and y is not None]
    if not points:
        return None
    # text as paths: the page then looks the same everywhere and holds no text that could be taken for markup
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": f"{section.model}{axis.name}", "font.size": 11}):
        figure = Figure(figsize=(5.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        front = pareto((x, y.value) for _, x, y in points)
        if len(front) > 1:
            xs, ys = zip(*front, strict=True)
            axes.step(xs, ys, where="post", color="#666666", linestyle="--", linewidth=1.2, label="Pareto front", zorder=1)
        names = list(dict.fromkeys(row.strategy for row, _, _ in points if not row.unpruned))
        for number, name in enumerate(names):
            own = sorted(((x, y) for row, x, y in points if row.strategy == name), key=lambda p: p[0])
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            _scatter(axes, own, name, **style)
        _scatter(axes, [(x, y) for row, x, y in points if row.unpruned], "unpruned", color="black", marker="*", size=13)
        axes.set_xlabel(axis.label)
        axes.set_ylabel(label)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2 if len(names) < 8 else 3, fontsize=9, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    best = ", ".join(f"{row.title} {y.value:.1f}" for row, _, y in sorted(points, key=lambda p: -p[2].value)[:3])
    return Plot(axis, _bare(file.getvalue()), f"{label} against {axis.label}; highest: {best}")


def _scatter(axes, points: list[tuple[float, Value]], name: str, color: str, marker: str, size: float = 8) -> None:
    if not points:
        return
    xs, ys = [x for x, _ in points], [y.value for _, y in points]
    bounds = [(0.0, 0.0) if y.low is None or y.high is None else (y.value - y.low, y.high - y.value) for _, y in points]
    # a percentile interval need not hold the value itself where few questions were asked
    below, above = ([max(0.0, pair[side]) for pair in bounds] for side in (0, 1))
    axes.errorbar(
        xs,
        ys,
        yerr=[below, above],
        color=color,
        marker=marker,
        markersize=size,
        markeredgecolor="black",
        markeredgewidth=0.6,
        linewidth=1,
        elinewidth=0.9,
        capsize=2.5,
        # a dollar sign would start a formula
        label=name.replace("$", r"\$"),
        zorder=3,
    )


def _bare(svg: str) -> str:
    """From `<svg` on, without comments and metadata, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)


def _mib(count: float | None) -> float | None:
    return None if count is None else count / 2**20
