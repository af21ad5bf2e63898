"""`vtprune search`: fit a schedule to one model on calibration questions. Parses, hands over to the library, prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vtprune.cli.console import UserError, budget, err, mistakes, out

if TYPE_CHECKING:
    from vtprune.cli.running import Loaded
    from vtprune.pruner import Model as Identity
    from vtprune.search.calibration import Calibration, Proxy
    from vtprune.search.journal import Journal
    from vtprune.search.judge import Outcome

app = typer.Typer(
    help="Fit a schedule to a model on calibration questions; a killed search goes on where it was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Where = Annotated[Path, typer.Option("--data", help="A folder with a questions.jsonl, or a JSONL file beside its pictures.")]
Out = Annotated[Path, typer.Option("--out", help="The schedule to write; OUT.state beside it while the search runs.")]
Model = Annotated[str | None, typer.Option(help="Hugging Face id or folder. Default: the embedded tiny model.")]
Keep = Annotated[str, typer.Option(help="Budget: visual tokens per image (64), or a share (0.25).")]
Most = Annotated[int | None, typer.Option("--questions", min=1, help="Use the first so many. Default: all.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions per forward.")]
MaxNew = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
MinLayer = Annotated[int, typer.Option(min=1, help="First decoder layer (from 0) that may see fewer tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the Bayesian optimisation and the bootstrap.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, whatever an earlier search left.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0; auto takes CUDA where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")]
Attn = Annotated[str, typer.Option(help="Attention implementation, as transformers names it.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")]

# fewer make one answer worth more than most tolerances
FEW = 32


@app.command()
def gsearch(
    data: Where,
    out_file: Out,
    model: Model = None,
    tolerance: Annotated[float, typer.Option(help="Relative loss allowed, of accuracy and of answer probability.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="Of the loss being within it; 0.5 looks at the mean alone.")] = 0.95,
    method: Annotated[str, typer.Option(help="bisect, or bo (Bayesian optimisation, needs optuna).")] = "bisect",
    trials: Annotated[int, typer.Option(min=1, help="Most trials per layer.")] = 8,
    grid: Annotated[int, typer.Option(min=2, help="Rates are multiples of 1/GRID.")] = 32,
    min_layer: MinLayer = 2,
    every: Annotated[int, typer.Option(min=1, help="Search every so many layers; those between copy.")] = 1,
    questions: Most = None,
    batch: Batch = 8,
    max_new_tokens: MaxNew = 16,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """Per decoder layer the least share of visual tokens that loses nothing against the full model."""
    with mistakes(), _stoppable():
        from vtprune.search import gsearch as searching
        from vtprune.search.judge import Rule

        rule = Rule(tolerance, confidence, seed=seed)
        settings = searching.Settings(rule, method, trials, grid, min_layer, every, seed)
        if method == "bo":
            searching.optuna()
        job = _Job.start(data, questions, out_file, model, device, dtype, attn, trust_remote_code)
        layers = settings.layers(job.identity.depth)
        most = min(trials, (grid - 1).bit_length()) if method == "bisect" else trials
        options = {"tolerance": tolerance, "confidence": confidence, "method": method, "trials": trials, "grid": grid}
        options |= {"min_layer": min_layer, "every": every, "seed": seed, "batch": batch, "max_new_tokens": max_new_tokens}
        journal = job.journal("gsearch", options, fresh)
        proxy = job.encode(batch, max_new_tokens)
        from vtprune.strategies.gsearch import GSearch

        def strategy(rates: tuple[float, ...]) -> GSearch:
            return GSearch(rates=rates, max_cuts=None, min_layer=min_layer)

        with _progress(len(layers) * most) as show:

            def watch(layer: int, trial: int, rates: tuple[float, ...]) -> None:
                at = layers.index(layer)
                show(at * most + trial - 1, f"layer {layer} of {job.identity.depth}, trial {trial}, keep {rates[layer]:.3f}")

            evaluate = job.remembered(journal, lambda rates: proxy.measure(strategy(rates)))
            found = searching.search(evaluate, proxy.full, job.identity.depth, settings, watch)
            show(len(layers) * most, "confirming")
            accuracy = proxy.generate(GSearch(rates=found.rates, min_layer=min_layer))[1]
        job.write("gsearch", {"rates": list(found.rates), "min_layer": min_layer}, found.trace)
        journal.remove()
        table = _table("layer", "keep")
        for layer, rate in enumerate(found.rates):
            table.add_row(str(layer), f"{rate:.3f}")
        out().print(table)
        _line(f"mean keep {100 * found.mean_keep:.1f} % over {job.identity.depth} layers, {len(found.trace)} trials")
        _line(f"accuracy {_accuracy(proxy, accuracy)}")
        if accuracy < (1 - tolerance) * proxy.full.accuracy - 1e-9:
            _note("with GSearch's own max_cuts this loses more than the tolerance; use max_cuts=None with this schedule.")
        if found.verdict is None:
            _note("no layer could do with fewer tokens; a higher --tolerance, or more questions, may help.")
        _line(f"wrote {out_file}")


@app.command()
def psigmoid(
    data: Where,
    keep: Keep,
    out_file: Out,
    model: Model = None,
    start: Annotated[Path | None, typer.Option(help="A gsearch schedule whose nearest curve is tried first.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Steepnesses to try.")] = 16,
    min_layer: MinLayer = 2,
    questions: Most = None,
    batch: Batch = 8,
    max_new_tokens: MaxNew = 16,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """The steepness of a falling curve of keep rates that does best at a fixed budget."""
    with mistakes(), _stoppable():
        from vtprune import schedule
        from vtprune.search import psigmoid as searching
        from vtprune.search.gsearch import optuna

        share = budget(keep)
        first = None if start is None else searching.fit(schedule.read(start, "gsearch").values["rates"])
        optuna()
        job = _Job.start(data, questions, out_file, model, device, dtype, attn, trust_remote_code)
        searching.check(share, job.identity.depth, min_layer)
        options = {"keep": share, "trials": trials, "start": first, "seed": seed, "min_layer": min_layer}
        options |= {"batch": batch, "max_new_tokens": max_new_tokens}
        journal = job.journal("psigmoid", options, fresh)
        proxy = job.encode(batch, max_new_tokens)
        from vtprune.strategies.psigmoid import PSigmoid

        def strategy(steepness: float) -> PSigmoid:
            return PSigmoid(keep=share, steepness=steepness, min_layer=min_layer)

        with _progress(trials) as show:
            evaluate = job.remembered(journal, lambda steepness: proxy.measure(strategy(steepness)))

            def watch(trial: int, steepness: float) -> None:
                show(trial - 1, f"trial {trial} of {trials}, steepness {steepness:g}")

            found = searching.search(evaluate, proxy.full, trials, seed, first, watch)
        job.write("psigmoid", {"steepness": found.steepness, "keep": share, "min_layer": min_layer}, found.trace)
        journal.remove()
        table = _table("steepness", "log-probability", "agreement", "accuracy")
        for trial in sorted(found.trace, key=lambda t: -t["gain"])[:5]:
            cells = (f"{trial['gain']:+.4f}", f"{100 * trial['agreement']:.1f} %", f"{100 * trial['accuracy']:.1f} %")
            table.add_row(f"{trial['steepness']:g}", *cells)
        out().print(table)
        _line(f"steepness {found.steepness:g} at keep {keep}; accuracy {_accuracy(proxy, found.outcome.accuracy)}")
        _line(f"wrote {out_file}")


@app.command()
def mustdrop(
    data: Where,
    keep: Keep,
    out_file: Out,
    model: Model = None,
    ratio: Annotated[float | None, typer.Option(help="individual_thr / global_thr. Default: the published one.")] = None,
    within: Annotated[float, typer.Option(help="Relative distance from the budget that is near enough.")] = 0.01,
    trials: Annotated[int, typer.Option(min=3, help="Most thresholds to try.")] = 20,
    questions: Most = None,
    batch: Batch = 8,
    seed: Seed = 0,
    fresh: Fresh = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """MustDrop's thresholds for a mean number of visual tokens (mean over decoder layers and questions)."""
    with mistakes(), _stoppable():
        from vtprune.search import mustdrop as searching
        from vtprune.search.judge import SearchError

        share = budget(keep)
        ratio = searching.RATIO if ratio is None else ratio
        job = _Job.start(data, questions, out_file, model, device, dtype, attn, trust_remote_code)
        options = {"keep": share, "ratio": ratio, "within": within, "trials": trials, "batch": batch}
        journal = job.journal("mustdrop", options, fresh)
        proxy = job.encode(batch, 1, answers=False)
        from vtprune.strategies.mustdrop import MustDrop

        def tokens(thresholds: tuple[float, float]) -> list[float]:
            return list(proxy.tokens(MustDrop(keep=None, global_thr=thresholds[0], individual_thr=thresholds[1])))

        with _progress(trials) as show:
            counted = job.remembered_numbers(journal, tokens)

            def watch(trial: int, global_thr: float) -> None:
                show(trial - 1, f"trial {trial}, global_thr {global_thr:g}")

            # in tokens, also where the budget is a share: counts are what the messages speak of
            full = proxy.visual_tokens
            target = float(share) if isinstance(share, int) else share * full

            def evaluate(global_thr: float, individual_thr: float) -> float:
                count, part = counted((global_thr, individual_thr))
                return count if isinstance(share, int) else part * full

            try:
                found = searching.search(evaluate, target, ratio, within, trials, watch)
            except SearchError:
                journal.remove()  # it would end the same way
                raise
        values = {"global_thr": found.global_thr, "individual_thr": found.individual_thr}
        job.write("mustdrop", {**values, "keep": share, "equivalent_tokens": found.tokens}, found.trace)
        journal.remove()
        table = _table("global_thr", "individual_thr", "tokens")
        for trial in found.trace:
            table.add_row(f"{trial['global_thr']:.6g}", f"{trial['individual_thr']:.6g}", f"{trial['tokens']:.1f}")
        out().print(table)
        _line(f"global_thr {found.global_thr:.6g} leaves {found.tokens:.1f} tokens (mean over layers and questions)")
        _line(f"wrote {out_file}")


@dataclass
class _Job:
    """What every search has: its questions, its model, where the result goes."""

    calibration: Calibration
    loaded: Loaded
    identity: Identity
    out: Path
    setting: dict[str, Any]

    @classmethod
    def start(
        cls, data: Path, questions: int | None, path: Path, model: str | None, device: str, dtype: str, attn: str, trust: bool
    ) -> _Job:
        from vtprune.cli import running
        from vtprune.engine.identity import identify
        from vtprune.search.calibration import Calibration

        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder; give a file" if path.is_dir() else "lies in no existing folder; make it first"
            raise UserError(f"--out {str(path)!r} {what}.")
        calibration = Calibration.load(data, questions)
        if len(calibration.questions) < FEW:
            count = len(calibration.questions)
            _note(f"{count} questions: one answer is {100 / count:.1f} % of the accuracy. 64 or more are better.")
        with err().status("loading the model"):
            loaded = running.load(model, device, dtype, attn, trust)
        from vtprune import embedded

        name = embedded.TINY if model is None else Path(model).resolve().name if Path(model).exists() else model
        where = {"dtype": str(loaded.model.dtype).removeprefix("torch."), "device": loaded.model.device.type, "attn": attn}
        return cls(calibration, loaded, replace(identify(loaded.model), name=name), path, where)

    def journal(self, kind: str, options: dict[str, Any], fresh: bool) -> Journal:
        """The state file beside the result, for exactly this search."""
        import vtprune
        from vtprune.search.journal import Journal

        settings = {"kind": kind, **options, "model": self.identity.fingerprint, "data": self.calibration.sha256}
        settings |= {"vtprune": vtprune.__version__, **self.setting}
        journal = Journal(self.out.with_name(self.out.name + ".state"), settings, fresh)
        if journal.resumed:
            _note(f"going on with an earlier search: {journal.resumed} trials are known.")
        return journal

    def encode(self, batch: int, max_new_tokens: int, answers: bool = True) -> Proxy:
        with err().status("") as status:
            total = len(self.calibration.questions)

            def tick(done: int) -> None:
                status.update(f"the full model answers: {done} of {total}")

            status.update("reading pictures")
            return self.calibration.encode(
                self.loaded.model, self.loaded.processor, batch, max_new_tokens, tick, answers=answers
            )

    def remembered(self, journal: Journal, measure: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
        """`measure` with the journal's memory."""
        from vtprune.search.judge import Outcome

        def read(stored: Any) -> Outcome:
            outcome = Outcome.from_dict(stored)
            if len(outcome.same) != len(self.calibration.questions):
                raise ValueError("another number of questions")
            return outcome

        return journal.memory(measure, Outcome.to_dict, read)

    @staticmethod
    def remembered_numbers(journal: Journal, measure: Callable[[Any], list[float]]) -> Callable[[Any], list[float]]:
        return journal.memory(measure, list, lambda stored: [float(stored[0]), float(stored[1])])

    def write(self, kind: str, values: dict[str, Any], trace: list[dict[str, Any]]) -> None:
        from vtprune import schedule

        command = shlex.join(["vtprune", *sys.argv[1:]])
        # more digits than questions can tell apart make a file that nobody reads
        short = [{k: round(v, 6) if isinstance(v, float) else v for k, v in trial.items()} for trial in trace]
        schedule.write(self.out, kind, self.identity, self.calibration.data, values, short, command)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Control-C leaves by the front door; the state on disk is whole after every trial."""
    try:
        yield
    except KeyboardInterrupt:
        _note("stopped; the same command goes on where it was.")
        raise typer.Exit(130) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar; the function that it yields says how far and with what."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, label: progress.update(task, completed=done, description=escape(label))


def _accuracy(proxy: Proxy, accuracy: float) -> str:
    full = proxy.full
    return f"{100 * accuracy:.1f} %, unpruned {100 * full.accuracy:.1f} %, of {len(full.right)} questions"


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _line(text: str) -> None:
    out().print(escape(text), soft_wrap=True)


def _note(text: str) -> None:
    err().print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
