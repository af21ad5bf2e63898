"""Small pieces of HTML for the page. Everything that a visitor, a model or a strategy wrote goes through `escape`."""

from __future__ import annotations

from html import escape

from vtprune.reporting import SampleReport, describe_trail

from .asking import Answer
from .depth import Place, left
from .finding import Search
from .patch import Story
from .watching import ATTENTION


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _flops(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count < 1e12 else f"{count / 1e12:.2f} T"


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.0f}\u202f%" if part is not None and whole else "\u2013"


def figures(answer: Answer, unpruned: Answer | None) -> str:
    """The table under a column; its last column is the share of the unpruned run.

    Parameters:
        unpruned: the run that times are compared with, if there is one on the page.
    """
    found = answer.figures()
    if not found:
        return ""
    base = unpruned.figures() if unpruned is not None else {}
    ms = lambda value: "\u2013" if value is None else f"{value:.1f} ms"
    rate = found["tokens_per_second"]
    rows = [
        (
            "Tokens in",
            f"{found['entered']} of {found['visual_tokens']}",
            found["entered"],
            found["visual_tokens"],
        ),
        ("Equivalent tokens", f"{found['equivalent_tokens']:.1f}", found["equivalent_tokens"], found["visual_tokens"]),
        ("Prefill", ms(found["prefill_ms"]), found["prefill_ms"], base.get("prefill_ms")),
        ("First token", ms(found["ttft_ms"]), found["ttft_ms"], base.get("ttft_ms")),
        ("Tokens / s", "\u2013" if rate is None else f"{rate:.1f}", rate, base.get("tokens_per_second")),
        ("KV cache", _mib(found["kv_bytes"]), found["kv_bytes"], found["kv_bytes_full"]),
        ("FLOPs", _flops(found["flops"]), found["flops"], found["flops_full"]),
        ("Selection", ms(found["selection_ms"]), found["selection_ms"], base.get("prefill_ms")),
    ]
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td><td>{_share(part, whole)}</td></tr>"
        for name, value, part, whole in rows
    )
    head = "".join(f"<th scope='col'>{h}</th>" for h in ("<span class='vt-hide'>Figure</span>", "here", "of\u202funpruned"))
    notes = "".join(f"<p class='vt-note'>{escape(note)}</p>" for note in answer.report.notes)
    trail = escape(describe_trail(answer.report.samples[0].trail()))
    return f"<table class='vt-figures'><tr>{head}</tr>{cells}</table><p class='vt-note'>Where they went: {trail}.</p>{notes}"


def error(text: str) -> str:
    """A column that did not run."""
    return f"<p class='vt-error' role='alert'><strong>Did not run.</strong> {escape(text)}</p>"


def status(text: str, kind: str = "") -> str:
    """The page's one line of news, read out by screen readers."""
    return f"<p class='vt-status {escape(kind)}' role='status' aria-live='polite'>{escape(text)}</p>"


def busy(text: str) -> str:
    """News of something that goes on."""
    return (
        f"<div class='vt-status' role='status' aria-live='polite'>{escape(text)}<progress aria-hidden='true'></progress></div>"
    )


def waiting(ahead: int) -> str:
    """A run's place in the line."""
    return busy(f"Waiting: {ahead} other run{' is' if ahead == 1 else 's are'} before yours.")


def searching(search: Search) -> str:
    """How far the search for a budget is, or what it found."""
    if search.error:
        return status(search.error, "vt-bad")
    return (status if search.done or search.stopped else busy)(search.in_words())


def loading(share: float, doing: str, failed: str = "") -> str:
    """How far the model's loading is."""
    if failed:
        return status(failed, "vt-bad")
    if share >= 1:
        return ""
    return (
        f"<div class='vt-loading' role='status'><label>Loading the model: {escape(doing)}"
        f"<progress max='100' value='{100 * share:.0f}'>{100 * share:.0f} %</progress></label></div>"
    )


def caption(text: str) -> str:
    """The line under an overlay."""
    return f"<p class='vt-caption'>{escape(text)}</p>"


def seen_alt(answer: Answer, sample: SampleReport, place: Place, heat: bool) -> str:
    """What an overlay shows, for those who do not see it."""
    if heat:
        return f"Map of the scores that {answer.column.pruner} saw, {place.title}"
    count = len(left(sample, place))
    return f"{count} of {sample.visual_tokens} patches kept by {answer.column.pruner} {place.title}"


def stories(told: list[tuple[Answer, Story]]) -> str:
    """One patch under every strategy: what became of it, and its score and rank at each stage."""
    if not told:
        return "<p class='vt-note'>Click a patch of a picture above, or give its row and column.</p>"
    first = told[0][1]
    parts = [f"<h3>Patch in row {first.row}, column {first.column} (token {first.token})</h3>"]
    for answer, story in told:
        name = "unpruned" if answer.column.pruner == "none" else f"{answer.column.pruner}, budget {answer.column.keep}"
        group = f" {len(story.group)} others live on in it." if story.group else ""
        parts.append(f"<h4>{escape(name)}: {escape(story.fate)}.{escape(group)}</h4>")
        if not story.visits:
            parts.append("<p class='vt-note'>This strategy gives single patches no score that could be shown.</p>")
            continue
        rows = "".join(
            f"<tr><th scope='row'>{escape(v.where)}</th><td>{escape(_name(v.name))}</td><td>{v.score:.3g}</td>"
            f"<td>{v.rank} of {v.of}</td><td>{'went on' if v.kept else 'left'}</td></tr>"
            for v in story.visits
        )
        head = "".join(f"<th scope='col'>{h}</th>" for h in ("Stage", "Score", "Value", "Rank", "Then"))
        parts.append(f"<div class='vt-wide'><table class='vt-figures vt-story'><tr>{head}</tr>{rows}</table></div>")
    return "".join(parts)


def _name(score: str) -> str:
    return "attention of the needed rows" if score == ATTENTION else f"{score} (carried by the strategy)"
