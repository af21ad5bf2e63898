"""Put what `python -m evaluations.gpu --out FOLDER` found into docs/performance.md, between its marks.

python -m evaluations.gpu.pages docs/bench/FOLDER docs/performance.md
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtprune.cli.console import UserError, put_between
from vtprune.measure import pages

BENCHES = ("llava-next-7b-batch-1", "llava-next-7b-batch-8", "llava-1.5-7b-batch-1")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(headings) + " |",
        "|---|" + "---:|" * (len(headings) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def greedy(data: dict[str, Any]) -> str:
    """Times of the greedy selections, best shape of their parts, and of the loop before."""
    whole = [row for row in data["rows"] if not row["what"].startswith(("part", "before"))]
    lines = _table(
        ("selection", "batch", "tokens", "kept", "time", "host"),
        [
            (r["what"], str(r["batch"]), str(r["tokens"]), str(r["k"]), pages.spent(r["ms"]), pages.spent(r["host_ms"]))
            for r in whole
        ],
    )
    rest = [row for row in data["rows"] if row not in whole]
    told = [
        (
            row["what"],
            *(str(row.get(name, "-")) for name in ("batch", "tokens", "k", "warps", "span")),
            pages.spent(row["ms"]),
        )
        for row in rest
    ]
    return "\n".join([*lines, "", *_table(("part", "batch", "tokens", "kept", "warps", "span", "time"), told)])


def stalls(data: dict[str, Any]) -> str:
    """Waits, launches and time on the host of one prefill per strategy."""
    rows = []
    for row in data["rows"]:
        if row.get("error"):
            rows.append((row["strategy"], *["-"] * 5))
            continue
        launches = sum(row["launches"].values())
        times = (pages.spent(row["host_ms"]), pages.spent(row["wall_ms"]))
        rows.append((row["strategy"], str(row["synchronisations"]), str(row["of_vtprune"]), str(launches), *times))
    lines = _table(("strategy", "waits for the device", "of them vtprune's", "launches", "host", "until done"), rows)
    places = {p for row in data["rows"] for p in row.get("where", {}) if "vtprune/" in p}
    if places:
        lines += ["", "vtprune waits at " + ", ".join(f"`{place}`" for place in sorted(places)) + "."]
    return "\n".join(lines)


def profile(data: dict[str, Any]) -> str:
    """The profiler's own tables, operations that cost most first."""
    parts = []
    for name, text in data["tables"].items():
        if text:
            # the columns that say nothing here are many
            parts += [f"{name}:", "", "```text", re.sub(r"[ ]+$", "", text.strip(), flags=re.MULTILINE), "```", ""]
    return "\n".join(parts)


def main(folder: Path, page: Path) -> None:
    def data(name: str) -> dict[str, Any] | None:
        path = folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def put(name: str, mark: str, made: Callable[[dict[str, Any]], str]) -> None:
        found = data(name)
        if found is None or "error" in found:
            print(f"{name}: {'not there' if found is None else 'failed, see its file'}; {mark} stays as it is")
            return
        raw = Path(os.path.relpath(folder / f"{name}.json", page.parent)).as_posix()
        try:
            put_between(page, mark, f"{made(found)}\n\n([raw]({raw}))")
        except UserError as error:
            print(f"{name}: {error}")

    for name in BENCHES:
        put(name, f"gpu-{name}", pages.table)
    put("greedy", "gpu-greedy", greedy)
    put("llava-next-7b-stalls", "gpu-stalls", stalls)
    put("llava-1.5-7b-stalls", "cpu-profile", profile)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
