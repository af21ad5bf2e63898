"""`vtprune bench serve`. Parses, hands over to the library, prints."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from vtprune.cli.console import UserError, assignments, budget, err, mistakes, out, print_json, write_whole

HEAD = ["server", "concurrency", "requests/s", "of unpruned", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "failed"]


def serve(
    model: Annotated[
        str | None, typer.Argument(help="What to serve. Default: random weights in the shape of --config.")
    ] = None,
    config: Annotated[str, typer.Option(help="An embedded LLaVA-1.5 configuration, or the path of one.")] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Cut its decoder to this many layers.")] = None,
    pruner: Annotated[str, typer.Option(help="A strategy that can be served.")] = "flowcut",
    keep: Annotated[str, typer.Option(help="Budget.")] = "64",
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value of the strategy. Repeatable.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable. Default: 1, 2, 4, 8, 16, 32.")] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Per concurrency and round; at least one for each that is in flight.")
    ] = 32,
    text_tokens: Annotated[int, typer.Option(min=1, help="Of each request, besides its picture.")] = 60,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="The table shows medians over them.")] = 1,
    together: Annotated[bool, typer.Option("--together", help="Both servers at once, taking turns. Memory for two.")] = False,
    options: Annotated[str, typer.Option(help="Further options of `vllm serve` for both, in one string.")] = "",
    seed: Annotated[int, typer.Option(help="Of pictures and words.")] = 0,
    json_file: Annotated[str | None, typer.Option("--json", help="Write all figures to this file; - is stdout.")] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Put the table into this page, between its two `vtprune bench serve` comments.")
    ] = None,
) -> None:
    """Requests per second, time to first token and time per token of a pruned vLLM server and an unpruned one."""
    with mistakes():
        import torch

        from vtprune import embedded
        from vtprune.measure.bench import machine
        from vtprune.vllm import bench, launch
        from vtprune.vllm.settings import Settings

        try:
            more = shlex.split(options)
        except ValueError as error:
            raise UserError(f"--options {options!r}: {error}.") from error
        asked = Settings.read({"pruner": pruner, "keep": budget(keep), **assignments(set_ or [])})
        settings = asked.describe()
        path = None if model is not None else embedded.config(config)
        page = None if markdown is None else _page(markdown)
        launch.check_installed()
        load = bench.Load(requests, text_tokens, output_tokens, seed=seed)
        gain = None
        with tempfile.TemporaryDirectory(prefix="vtprune-serve-") as folder:
            served = model
            if path is not None:
                served = str(bench.random_model(path, layers, Path(folder) / "model"))
                gain = bench.predicted(json.loads((Path(served) / "config.json").read_text(encoding="utf-8")), load, asked)
                more = ["--load-format", "dummy", *more]
            with err().status("") as status:
                rows = bench.compare(
                    served,
                    settings,
                    concurrency or [1, 2, 4, 8, 16, 32],
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
            "flops_predict": gain,
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
            "rows": [row.as_dict() for row in rows],
        }
        lines = _lines(rows)
        note = ""
        if gain is not None:
            note = f"FLOPs predict {gain:.2f}x; half of that gain is {bench.bar(gain):.2f}x."
        if json_file == "-":
            print_json(data)
        elif json_file is not None:
            write_whole(Path(json_file), lambda p: p.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))
        if page is not None:
            whole = bench.between_markers(page, _markdown(lines, data, note))
            write_whole(Path(markdown), lambda p: p.write_text(whole, encoding="utf-8"))
        if json_file != "-":
            table = Table(caption=note or None)
            for at, name in enumerate(HEAD):
                table.add_column(name, justify="right" if at else "left")
            for line in lines:
                table.add_row(*line)
            out().print(table)


def _page(path: str) -> str:
    """A page that takes the table, read before minutes are spent."""
    from vtprune.vllm import bench

    try:
        page = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path!r}: {error.strerror}.") from error
    bench.between_markers(page, "")
    return page


def _markdown(lines: list[list[str]], data: dict[str, Any], note: str) -> str:
    command = shlex.join(["vtprune", *sys.argv[1:]])
    place = data["machine"]
    where = f"{place['device']} ({place['cores']} cores), {place['date']}"
    rows = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"`{command}`, {where}. {note}\n\n{table}\n"


def _lines(rows) -> list[list[str]]:
    """One line for each server and concurrency, of `HEAD`'s columns."""

    def middle(server: str, level: int, what: str) -> float:
        return median(getattr(r, what) for r in rows if (r.server, r.concurrency) == (server, level))

    plain, lines = rows[0].server, []
    for server, level in dict.fromkeys((r.server, r.concurrency) for r in rows):
        rate = middle(server, level, "per_second")
        times = [middle(server, level, f"{what}_{p}") for what in ("ttft", "tpot") for p in ("p50", "p99")]
        failed = sum(r.failed for r in rows if (r.server, r.concurrency) == (server, level))
        share = f"{rate / middle(plain, level, 'per_second'):.2f}x"
        lines.append([server, str(level), f"{rate:.2f}", share, *(f"{t:.0f} ms" for t in times), str(failed)])
    return lines
