"""The commands. Each parses, hands over to the library, and prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vtprune.cli import demoing, searching, serving, sweeping
from vtprune.cli.console import (
    UserError,
    assignments,
    budget,
    err,
    fail,
    flops,
    mistakes,
    out,
    print_json,
    put_between,
    share,
    size,
    strategy,
    write_picture,
    write_whole,
)

app = typer.Typer(
    help="Prune visual tokens in vision-language models, training-free.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(searching.app, name="search")
app.command()(sweeping.sweep)
app.command()(sweeping.report)
app.command()(demoing.demo)

Picture = Annotated[
    str,
    typer.Argument(metavar="IMAGE|VIDEO", help="A picture, video or animation, or the name of a shipped one (scene-0)."),
]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")]
Extra = Annotated[list[str] | None, typer.Option("--image", help="Another picture, after the first. Repeatable.")]
Model = Annotated[str | None, typer.Option(help="Hugging Face id or folder. Default: the embedded tiny model.")]
Keep = Annotated[
    str | None, typer.Option(help="Budget: visual tokens per image or video, or a share. Default: 64; of a video 0.25.")
]
Positions = Annotated[str | None, typer.Option(help="original or compact. Default: what the strategy's paper did.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0; auto takes CUDA where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")]
Attn = Annotated[str, typer.Option(help="Attention implementation, as transformers names it.")]
MaxNew = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")]
IsVideo = Annotated[bool, typer.Option("--video", help="Take it for a video, e.g. a folder of frames.")]
FrameCount = Annotated[int | None, typer.Option(min=2, help="Frames to look at. Default: 96, and 64 more per hour.")]
Scorer = Annotated[
    str | None,
    typer.Option(
        help="What scores frames, for quota: embedded, self (the model itself), open_clip:NAME[:PRETRAINED], clip:ID, "
        "vlm:ID or none (ids or folders). Default: embedded with the embedded model, none otherwise."
    ),
]
Objects = Annotated[str | None, typer.Option(help="What the scorer looks for, 'star, ring'. Default: the question.")]
Decouple = Annotated[
    bool, typer.Option("--decouple/--no-decouple", help="Let the model list what to look for first. Default: off.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of tables.")]


@app.command()
def ask(
    image: Picture,
    question: Question,
    pruner: Annotated[
        str | None, typer.Option(help="A strategy, several joined by +, or none. Default: flowcut; for videos quota.")
    ] = None,
    keep: Keep = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value of the strategy. Repeatable.")] = None,
    positions: Positions = None,
    model: Model = None,
    more: Extra = None,
    overlay: Annotated[Path | None, typer.Option(help="Save a picture of what each stage, or frame, kept.")] = None,
    max_new_tokens: MaxNew = 64,
    video: IsVideo = False,
    frames: FrameCount = None,
    scorer: Scorer = None,
    objects: Objects = None,
    decouple: Decouple = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Ask a question about a picture or video with a pruned model; print the answer and what pruning saved."""
    with mistakes():
        from vtprune.cli import running, watching

        options = watching.Options(video, frames, scorer, objects, decouple)
        clip = watching.open_argument(image, options)
        name = pruner or ("flowcut" if clip is None else "quota")
        share_of, fields = budget(keep or ("64" if clip is None else watching.KEEP)), assignments(set_ or [])
        schedules = _schedules(model) if clip is None else {}
        made = None if name == "none" else strategy(name, share_of, fields, schedules)
        if made is None and set_:
            raise UserError("--set needs a strategy; --pruner none has no fields.")
        options.check(clip is not None, [made] if made else [])
        if clip is not None and more:
            raise UserError("--image adds pictures to a picture; a video is asked about alone.")
        images = running.read_images([image, *(more or [])]) if clip is None else []
        with err().status("loading the model"):
            loaded = running.load(model, device, dtype, attn, trust_remote_code, clip is not None)
            if clip is None:
                inputs = running.prepare(loaded, images, question)
            else:
                seen = watching.watch(clip, frames, loaded.processor)
                inputs = watching.prepare(loaded, seen, question)
                looks = watching.scorer([made] if made else [], options, loaded, model is None)
                if looks is not None:
                    made = strategy(name, share_of, {**fields, "scorer": looks}, schedules)
        with err().status("answering"):
            text, report = running.answer(loaded, inputs, made, positions, max_new_tokens)
        if overlay is not None:
            fit = _fit(loaded.processor, clip is not None)
            picture = report.overlay(images, fit=fit) if clip is None else report.timeline(seen.frames, fit=fit)
            write_picture(overlay, picture)
        if as_json:
            settings = made.settings() if made else {"name": "none"}
            asked = {"images": [image, *(more or [])]} if clip is None else {"video": seen.to_dict(report)}
            print_json(
                {
                    "answer": text,
                    "question": question,
                    **asked,
                    "model": loaded.name,
                    "settings": settings,
                    "report": report.to_dict(),
                }
            )
            return
        console = out()
        console.print(f"[bold]{escape(text)}[/]", soft_wrap=True)
        console.print()
        console.print(_report_table(report, () if clip is None else watching.rows(report, seen)))
        for note in report.notes:
            err().print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


@app.command()
def compare(
    image: Picture,
    question: Question,
    pruner: Annotated[list[str] | None, typer.Option(help="A strategy. Repeatable. Default: all.")] = None,
    keep: Keep = None,
    positions: Positions = None,
    model: Model = None,
    sheet: Annotated[Path | None, typer.Option("--out", help="Save one picture of what each kept.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills per strategy; the median is shown.")] = 3,
    max_new_tokens: MaxNew = 64,
    video: IsVideo = False,
    frames: FrameCount = None,
    scorer: Scorer = None,
    objects: Objects = None,
    decouple: Decouple = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Ask several strategies the same question: answer, tokens, time, cache and picture side by side."""
    with mistakes():
        from vtprune.cli import comparing, running, watching
        from vtprune.cli.listing import serves
        from vtprune.registry import available

        options = watching.Options(video, frames, scorer, objects, decouple)
        clip = watching.open_argument(image, options)
        keep = keep or ("64" if clip is None else watching.KEEP)
        share_of, other = budget(keep), "videos" if clip is None else "pictures"
        names = list(dict.fromkeys(pruner or (name for name, cls in available().items() if serves(cls) != other)))
        schedules = _schedules(model) if clip is None else {}
        made = {name: strategy(name, share_of, {}, schedules) for name in names if name != "none"}
        options.check(clip is not None, made.values())
        images = running.read_images([image]) if clip is None else []
        with err().status("loading the model"):
            loaded = running.load(model, device, dtype, attn, trust_remote_code, clip is not None)
            if clip is None:
                inputs = running.prepare(loaded, images, question)
            else:
                seen = watching.watch(clip, frames, loaded.processor)
                inputs = watching.prepare(loaded, seen, question)
                looks = watching.scorer(made.values(), options, loaded, model is None)
                takers = [name for name in made if looks is not None and watching.takes_scorer(made[name])]
                made |= {name: strategy(name, share_of, {"scorer": looks}, schedules) for name in takers}
        with err().status("") as status:
            rows = comparing.run(
                loaded,
                inputs,
                made,
                positions,
                max_new_tokens,
                repeats,
                lambda label: status.update(escape(label)),
            )
        if sheet is not None:
            shown = images[0] if clip is None else seen.frames
            fit = _fit(loaded.processor, clip is not None)
            write_picture(sheet, comparing.draw(rows, shown, f"{question}  (keep {keep})", fit))
        if as_json:
            print_json(
                {
                    "question": question,
                    "image" if clip is None else "video": image,
                    "model": loaded.name,
                    "keep": share_of,
                    "rows": [row.to_dict() for row in rows],
                }
            )
        else:
            out().print(_compare_table(rows))
            for row in rows:
                if row.error:
                    err().print(f"[yellow]{escape(row.name)} did not run:[/] {escape(row.error)}", soft_wrap=True)
        if made and all(row.error for row in rows[1:]):
            raise fail("no strategy could run; see the reasons above.")


@app.command("list")
def list_(
    model: Annotated[
        str | None, typer.Option(help="Hugging Face id or folder: what works on this model, and why the rest does not.")
    ] = None,
    families: Annotated[bool, typer.Option("--families", help="What works on which model family.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="With --families: put the table between this page's families marks.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """The strategies: what they serve, their stages, what they need, their papers."""
    with mistakes():
        from vtprune.cli.listing import describe_all, for_families, for_model, table_of_families, verdict

        if families or markdown is not None:
            if model is not None:
                raise UserError("--families asks about all families, --model about one model; give one of them.")
            found = for_families()
            if markdown is not None:
                put_between(markdown, "families", table_of_families(found))
            if as_json:
                print_json({title: of if isinstance(of, str) else _plain(of) for title, of in found.items()})
            elif markdown is None:
                out().print(table_of_families(found), soft_wrap=True, markup=False)
            return
        if model is not None:
            asked = for_model(model, trust_remote_code)
            if as_json:
                print_json(_plain(asked))
                return
            table = Table(box=None, pad_edge=False, header_style="bold")
            for column in ("name", "works", "pictures", "videos", "remarks"):
                table.add_column(column, no_wrap=column == "name")
            for name, one in asked.items():
                why = (
                    one.reason or one.note or "; ".join(f"{stage}: {reason}" for stage, reason in one.stages.items() if reason)
                )
                yes = ["yes" if it else "-" for it in (one.pictures, one.videos)]
                table.add_row(escape(name), verdict(one), *yes, escape(why))
            out().print(table)
            return
        rows = describe_all()
        if as_json:
            print_json(rows)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("name", no_wrap=True)
        for column in ("for", "stages", "positions", "needs", "paper", "year"):
            table.add_column(column)
        for row in rows:
            name = row["name"] + (f" ({row['package']})" if row["package"] else "")
            needs, year = ", ".join(row["needs"]) or "-", str(row["year"] or "-")
            paper = row["paper"].replace(f" {year})", ")")
            stages = ", ".join(row["stages"])
            table.add_row(escape(name), row["serves"], stages, row["positions"], needs, escape(paper), year)
        out().print(table)


def _plain(asked: dict) -> dict[str, Any]:
    """What `supports` says, JSON-ready."""
    return {name: {**dataclasses.asdict(one), "works": one.works} for name, one in asked.items()}


bench_app = typer.Typer()
app.add_typer(bench_app, name="bench")
bench_app.command()(serving.serve)


@bench_app.callback(invoke_without_command=True)
def bench(
    ctx: typer.Context,
    config: Annotated[str, typer.Option(help="An embedded configuration, or the path of a config.json.")] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(help="Cut the decoder to this many layers. Default: all.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Budget. Repeatable. Default: 64 and 128.")] = None,
    pruner: Annotated[list[str] | None, typer.Option(help="A strategy. Repeatable. Default: flowcut.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="field=value of all strategies. Repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Pictures per sample; a budget is per picture.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=2, help="Prompt tokens besides the picture's.")] = 60,
    decode_steps: Annotated[int, typer.Option(min=0, help="Decode steps to time after each prefill.")] = 4,
    all_: Annotated[bool, typer.Option("--all/--no-all", help="Also time each strategy keeping everything.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; every case runs once a round.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them that do not count.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, pictures and prompts.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    attn: Attn = "sdpa",
    json_file: Annotated[str | None, typer.Option("--json", help="Write all figures to this file; - is stdout.")] = None,
) -> None:
    """Time strategies on a model with random weights: encoder, prefill, selection, cache, decode."""
    if ctx.invoked_subcommand is not None:
        return
    with mistakes():
        from vtprune import embedded

        path = embedded.config(config)
        keeps = [budget(text) for text in keep or ["64", "128"]]
        fields = assignments(set_ or [])
        from vtprune.measure.bench import cases_for

        cases = cases_for(pruner or ["flowcut"], keeps, lambda name, keep: strategy(name, keep, fields), all_)
        import torch

        from vtprune.cli import running
        from vtprune.measure import bench as benching

        place = running.pick_device(device)
        kind = running.pick_dtype(dtype, place)
        if threads:
            torch.set_num_threads(threads)
        with err().status("making random weights"):
            model = benching.build(path, layers, kind, place, attn, seed)
        inputs = benching.make_inputs(model, batch, text_tokens, seed, images)
        rows = _timed_rows(model, inputs, cases, repeats, warmup, decode_steps)
        depth = model.config.text_config.num_hidden_layers
        setting = {
            "config": config,
            "decoder_layers": depth,
            "batch": batch,
            "images": images,
            "text_tokens": text_tokens,
            "dtype": str(kind).removeprefix("torch."),
            "attn": attn,
            "repeats": repeats,
            "warmup": warmup,
            "decode_steps": decode_steps,
            **benching.machine(place),
        }
        data = {"setting": setting, "rows": [_row_dict(row) for row in rows]}
        if json_file == "-":
            print_json(data)
        else:
            if json_file is not None:
                write_whole(Path(json_file), lambda p: p.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))
            out().print(_bench_table(rows))
            out().print(_setting_line(setting), soft_wrap=True)
        for row in rows:
            if row.error:
                err().print(f"[yellow]{escape(row.label)} did not run:[/] {escape(row.error)}", soft_wrap=True)
        if cases and all(row.error for row in rows[1:]):
            raise fail("no strategy could run; see the reasons above.")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        import vtprune

        typer.echo(vtprune.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `vtprune` command."""
    app()


def _timed_rows(model, inputs, cases, repeats: int, warmup: int, decode_steps: int):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vtprune.measure.bench import measure

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("", total=(len(cases) + 1) * (repeats + warmup))

        def tick(label: str) -> None:
            progress.update(task, description=escape(label))
            progress.advance(task)

        return measure(model, inputs, cases, repeats, warmup, decode_steps, tick)


def _schedules(model: str | None) -> dict[str, Path]:
    """What was searched on the model to be loaded, as far as it travels with vtprune."""
    from vtprune import embedded

    return embedded.schedules() if model is None else {}


def _fit(processor, video: bool) -> str:
    """How the processor makes pictures, or a video's frames, square, for overlays."""
    part = getattr(processor, "video_processor" if video else "image_processor", None)
    return "crop" if getattr(part, "do_center_crop", False) else "stretch"


def _report_table(report, more=()) -> Table:
    from vtprune.reporting import describe_trail

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    tokens = sum(s.visual_tokens for s in report.samples)
    table.add_row("strategy", escape(report.strategy))
    table.add_row("positions", report.positions)
    table.add_row("visual tokens", str(tokens))
    table.add_row("entering the decoder", str(sum(len(s.kept) for s in report.samples)))
    table.add_row("equivalent tokens", f"{report.equivalent_tokens:.1f} (mean over decoder layers)")
    cache = f"{size(report.kv_bytes)}, {share(report.kv_bytes, report.kv_bytes_full)} of {size(report.kv_bytes_full)} unpruned"
    table.add_row("where they went", describe_trail(report.samples[0].trail()))
    table.add_row("KV cache", cache)
    work = f"{flops(report.flops)}, {share(report.flops, report.flops_full)} of {flops(report.flops_full)} unpruned"
    table.add_row("FLOPs to first token", work)
    table.add_row("prefill", f"{report.prefill_ms:.1f} ms, first run, not warmed up")
    table.add_row("of which selection", f"{report.selection_ms:.1f} ms")
    for name, text in more:
        table.add_row(name, escape(text))
    return table


def _compare_table(rows) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("strategy")
    table.add_column("answer", overflow="fold", max_width=40)
    for column in ("tokens in", "equivalent", "prefill ms", "selection ms", "KV", "FLOPs"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.error:
            table.add_row(escape(row.name), "[yellow]did not run[/]", *["-"] * 6)
            continue
        table.add_row(
            escape(row.name),
            escape(row.answer),
            str(row.entered),
            f"{row.equivalent_tokens:.1f}",
            f"{row.prefill_ms:.1f}",
            f"{row.selection_ms:.1f}",
            size(row.kv_bytes),
            flops(row.flops),
        )
    return table


def _bench_table(rows) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("case")
    heads = ("tokens in", "equiv.", "encoder ms", "decoder ms", "prefill ms (IQR)", "speed-up", "FLOPs bound")
    for column in (*heads, "selection ms", "KV", "decode ms/token"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.error:
            table.add_row(escape(row.label), *["-"] * 10)
            continue
        table.add_row(
            escape(row.label),
            f"{row.entered:g}",
            f"{row.equivalent_tokens:.1f}",
            f"{row.encoder.median:.1f}",
            f"{row.decoder.median:.1f}",
            f"{row.prefill.median:.1f} ({row.prefill.low:.1f}-{row.prefill.high:.1f})",
            f"{row.speedup:.2f}x",
            f"{row.flops_bound:.2f}x",
            f"{row.selection.median:.1f} ({100 * row.selection_share:.1f} %)",
            size(row.kv_bytes),
            f"{row.decode.median:.1f}" if row.decode else "-",
        )
    return table


def _setting_line(setting: dict[str, Any]) -> str:
    s = setting
    parts = (
        f"{s['config']}, random weights, {s['decoder_layers']} decoder layers, batch {s['batch']}, "
        f"{s['images']} picture(s) each, {s['text_tokens']} text tokens, {s['dtype']}, {s['attn']};",
        f"medians of {s['repeats']} interleaved rounds; selection as share of unpruned prefill.",
        f"{s['device']}, {s['threads']} threads, torch {s['torch']}, transformers {s['transformers']}, vtprune {s['vtprune']},",
        f"{s['date']}.",
    )
    return escape(" ".join(parts))


def _row_dict(row) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(row)
