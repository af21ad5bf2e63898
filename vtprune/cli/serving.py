"""`vtprune bench serve`. Parses, hands over to the library, prints."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from vtprune.cli.console import UserError, assignments, budget, err, mistakes, out, print_json, write_whole


def serve(
    model: Annotated[
        str | None, typer.Argument(help="What to serve. Default: random weights in the shape of --config.")
    ] = None,
    config: Annotated[str, typer.Option(help="An embedded LLaVA-1.5 configuration, or the path of one.")] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Cut its decoder to this many layers.")] = None,
    pruner: Annotated[str, typer.Option(help="A strategy that can be served.")] = "flowcut",
    keep: Annotated[str, typer.Option(help="Budget.")] = "64",
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value of the strategy. Repeatable.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable. Default: 1, 4, 16, 32.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Per concurrency and round.")] = 32,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of each request, besides its picture.")] = 60,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="The table shows medians over them.")] = 1,
    together: Annotated[bool, typer.Option("--together", help="Both servers at once, taking turns. Memory for two.")] = False,
    options: Annotated[str, typer.Option(help="Further options of `vllm serve` for both, in one string.")] = "",
    seed: Annotated[int, typer.Option(help="Of pictures and words.")] = 0,
    json_file: Annotated[str | None, typer.Option("--json", help="Write all figures to this file; - is stdout.")] = None,
) -> None:
    """Requests per second, time to first token and time per token of a pruned vLLM server and an unpruned one."""
    with mistakes():
        from vtprune import embedded
        from vtprune.vllm import bench, launch
        from vtprune.vllm.settings import Settings

        try:
            more = shlex.split(options)
        except ValueError as error:
            raise UserError(f"--options {options!r}: {error}.") from error
        settings = Settings.read({"pruner": pruner, "keep": budget(keep), **assignments(set_ or [])}).describe()
        path = None if model is not None else embedded.config(config)
        launch.check_installed()
        load = bench.Load(requests, text_tokens, output_tokens, seed=seed)
        with tempfile.TemporaryDirectory(prefix="vtprune-serve-") as folder:
            served = model
            if path is not None:
                served = str(bench.random_model(path, layers, Path(folder) / "model"))
                more = ["--load-format", "dummy", *more]
            with err().status("") as status:
                rows = bench.compare(
                    served,
                    settings,
                    concurrency or [1, 4, 16, 32],
                    load,
                    Path(folder),
                    more,
                    rounds,
                    together,
                    tell=status.update,
                )
        data: dict[str, Any] = {
            "setting": {
                "model": model or f"{config}, random weights",
                "layers": layers,
                "vtprune": settings,
                "options": more,
                "requests": requests,
                "text_tokens": text_tokens,
                "output_tokens": output_tokens,
                "rounds": rounds,
                "together": together,
                "seed": seed,
            },
            "rows": [row.as_dict() for row in rows],
        }
        if json_file == "-":
            print_json(data)
            return
        if json_file is not None:
            write_whole(Path(json_file), lambda p: p.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))
        out().print(_table(rows))


def _table(rows) -> Table:
    table = Table()
    for name in (
        "server",
        "concurrency",
        "requests/s",
        "of unpruned",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
        "failed",
    ):
        table.add_column(name, justify="left" if name == "server" else "right")

    def middle(server: str, level: int, what: str) -> float:
        return median(getattr(r, what) for r in rows if (r.server, r.concurrency) == (server, level))

    plain = rows[0].server
    for server, level in dict.fromkeys((r.server, r.concurrency) for r in rows):
        rate = middle(server, level, "per_second")
        times = [middle(server, level, f"{what}_{p}") for what in ("ttft", "tpot") for p in ("p50", "p99")]
        failed = sum(r.failed for r in rows if (r.server, r.concurrency) == (server, level))
        share = f"{rate / middle(plain, level, 'per_second'):.2f}x"
        table.add_row(server, str(level), f"{rate:.2f}", share, *(f"{t:.0f} ms" for t in times), str(failed))
    return table
