"""The leaderboard sums up what was measured: its statistics, its marks, its page; and a small run of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from models import preencoding

from evaluations import leaderboard
from evaluations.leaderboard import Entry, interval, marked, merged, resampled, short, summarise, table
from evaluations.tiny.asking import GRADED, picture, pictures
from vtprune.pruner import BudgetError, tokens_after_cut

SETUP = {
    "model": "tiny-llava", "dtype": "float32", "attention": "sdpa", "workers": 1, "timing_pictures": 2, "minutes": 0.1,
    "date": "2026-01-01", "device": "some CPU", "threads": 1, "cores": 2, "torch": "2", "transformers": "5",
    "vtprune": "0", "python": "3",
}  # fmt: skip


def raw(name, budget, hits="", tokens=None, seeds=1, refused="", twin="", ms=10.0):
    return {
        "name": name, "strategy": name, "group": "before", "budget": budget, "fields": {}, "seeds": seeds, "towers": False,
        "twin": twin, "label": name, "settings": f"{name}(keep={budget})", "refused": refused, "hits": hits,
        "tokens": tokens or [], "prefill_ms": [ms, ms], "selection_ms": [1.0, 1.0], "of_unpruned": [ms / 20, ms / 20],
    }  # fmt: skip


@pytest.fixture
def result():
    """Three pictures of two or three questions; the last one's third is about a word."""
    late = "cannot be reached with a first cut at layer 2: the layers before it alone cost 144.0. Cut at an earlier layer."
    return {
        "pictures": [[0, "colour shape"], [1, "colour shape"], [2, "colour counting reading"]],
        "budgets": [64],
        "visual_tokens": 576,
        "depth": 8,
        "setup": SETUP,
        "command": "python -m evaluations.leaderboard",
        "raw": [
            raw("unpruned", None, "11 11 111", ms=20.0),
            raw("random", 64, "30 12 330", [64.0] * 3, seeds=3),
            raw("good", 64, "11 11 101", [64.0] * 3),
            raw("costly", 64, "11 10 100", [66.0] * 3),
            raw("good, too", 64, "11 11 101", [64.0] * 3, twin="good"),
            raw("late", 64, refused=late),
        ],
    }


def test_bootstrap_equals_drawing_pictures_one_by_one():
    rng = np.random.default_rng(3)
    counts = rng.integers(5, 9, 30)
    sums = np.stack([rng.binomial(counts, 0.6), rng.binomial(counts, 0.8)]).astype(float)
    fast = resampled(sums, counts, 4000)
    slow = np.empty((4000, 2))
    for i in range(4000):
        drawn = rng.integers(0, 30, 30)
        slow[i] = sums[:, drawn].sum(1) / counts[drawn].sum()
    # two independent sets of draws: the quantiles agree up to what 4,000 draws leave open
    for q in (2.5, 50, 97.5):
        assert np.abs(np.percentile(fast, q, axis=0) - np.percentile(slow, q, axis=0)).max() < 0.006
        difference = fast[:, 1] - fast[:, 0], slow[:, 1] - slow[:, 0]
        assert abs(np.percentile(difference[0], q) - np.percentile(difference[1], q)) < 0.008


def test_bootstrap_is_paired_seeded_and_clustered():
    counts = np.full(40, 8)
    sums = np.random.default_rng(0).binomial(8, 0.5, 40).astype(float)
    means = resampled(np.stack([sums, sums - 1]), counts, 500)
    # a row that answers one question less on every picture is so much worse in every resample
    assert np.allclose(means[:, 0] - means[:, 1], 1 / 8)
    assert np.array_equal(means, resampled(np.stack([sums, sums - 1]), counts, 500))
    # all or nothing on each picture: the spread is that of 40 pictures, not of 320 questions
    whole = resampled(np.where(np.arange(40) % 2, 8.0, 0.0)[None], counts, 4000)[:, 0]
    assert whole.std() == pytest.approx(0.5 / np.sqrt(40), rel=0.08)


def test_interval_and_p():
    found = interval(np.linspace(-0.1, 0.3, 10001), 0.1, against=True)
    assert (found.low, found.high) == (pytest.approx(-9), pytest.approx(29))
    assert found.mean == pytest.approx(10)
    assert found.p == pytest.approx(0.25, abs=1e-3)
    # never zero; a tie counts against the row
    assert interval(np.ones(999), 1.0, against=True).p == 1 / 1000
    assert interval(np.zeros(999), 0.0, against=True).p == 1
    assert interval(np.ones(999), 1.0).p is None


@pytest.mark.parametrize(
    ("equivalent", "budget", "mark"),
    [(64, 64, False), (65.25, 64, False), (65.4, 64, True), (62.5, 64, True), (31.75, 32, False), (30, 32, True)],
)
def test_rows_more_than_two_percent_off_are_marked(equivalent, budget, mark):
    assert marked(equivalent, budget) is mark


def test_the_reason_is_read_off_the_real_message():
    with pytest.raises(BudgetError) as caught:
        tokens_after_cut(64, 576, 1, 8)
    assert short(str(caught.value), 8) == "its first cut is before layer 1; 1 of 8 layers on everything cost 72"
    late = "on 3 of 9 pictures: keep: 32, as the mean, cannot be reached: 2 layers cost 24.0, and 16 stay. Lower key_rate."
    assert short(late, 8) == "on 3 of 9 pictures: 2 layers cost 24.0, and 16 stay"
    assert short("The key set is 46 tokens. Lower key_rate.", 8) == "The key set is 46 tokens"
    assert len(short("x" * 500, 8)) == 200


def test_summary(result):
    rows = {r["name"]: r for r in summarise(result, 200)["rows"]}
    # six questions without reading; random: 3 draws, 3 + 0 + 1 + 2 + 3 + 3 of 18
    assert rows["random"]["all"]["mean"] == pytest.approx(100 * 12 / 18)
    assert rows["random"]["types"] == {
        "colour": pytest.approx(100 * 7 / 9), "shape": pytest.approx(100 * 2 / 6), "counting": 100.0, "reading": 0.0,
    }  # fmt: skip
    assert rows["random"]["against"] == {}
    assert rows["good"]["all"]["mean"] == pytest.approx(100 * 5 / 6)
    assert rows["good"]["types"]["reading"] == 100
    against = rows["good"]["against"]["64"]
    assert against["mean"] == pytest.approx(100 * 3 / 18)
    assert against["low"] <= against["mean"] <= against["high"]
    assert rows["unpruned"]["against"]["64"]["mean"] == pytest.approx(100 * 6 / 18)
    assert rows["unpruned"]["equivalent_tokens"] == 576
    assert "marked" not in rows["unpruned"]
    assert [rows[n]["marked"] for n in ("good", "costly")] == [False, True]
    assert rows["good, too"]["same_as"] == "good"
    assert "same_as" not in rows["costly"]
    assert rows["good"]["of_unpruned"] == 0.5
    assert rows["good"]["selection_share"] == 0.1
    assert "all" not in rows["late"]


def test_without_random_nothing_is_compared(result):
    result["raw"] = [r for r in result["raw"] if r["name"] != "random"]
    done = summarise(result, 50)
    assert all(r.get("against", {}) == {} for r in done["rows"])
    assert "| good | 64 | 83.3 [" in table(done, 64)


def test_page(result):
    done = summarise(result, 200)
    # what is written is all the page is made from
    page = leaderboard.markdown(json.loads(leaderboard.dumps(done)), [("a plot", "leaderboard/tokens.png")])
    assert page == leaderboard.markdown(done, [("a plot", "leaderboard/tokens.png")])
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines] == ["strategy", "---", "unpruned", "good", "random", "costly", "late"]
    assert len({line.count("|") for line in lines}) == 1
    assert "| costly | **66** † |" in page
    assert "| late | cannot reach: its first cut is before layer 2; 2 of 8 layers on everything cost 144 |" in page
    assert "+16.7 [" in lines[3]
    assert "| 10.0 | 50% | 1.0 (10%) |" in lines[3]
    assert "![a plot](leaderboard/tokens.png)" in page
    assert "6 questions about 3 held-out pictures\n(and 1 about a printed word" in page
    assert "left out where the gate never fired" in page


def test_rows_measured_anew_replace_their_own(result):
    new = {**result, "command": "again", "raw": [raw("unpruned", None, "00 00 000"), raw("good", 64, "00 00 000", [64.0] * 3)]}
    new["raw"].append(raw("other", 64, "00 00 000", [64.0] * 3))
    both = merged(result, new)
    hits = {r["name"]: r["hits"] for r in both["raw"]}
    assert hits["good"] == "00 00 000"
    assert hits["unpruned"] == "11 11 111"
    assert list(hits)[-1] == "other"
    with pytest.raises(SystemExit, match="other questions"):
        merged(result, {**new, "budgets": [32]})


def test_plots(result, tmp_path):
    pytest.importorskip("matplotlib")
    made = leaderboard.draw(summarise(result, 50), tmp_path)
    for _, path in made:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert [Path(path).name for _, path in made] == ["tokens.png", "time.png"]


def test_pictures_are_asked_until_there_are_enough():
    found = pictures(17)
    graded = [sum(q.type in GRADED for q in one.questions) for one in found]
    assert sum(graded) >= 17 > sum(graded[:-1])
    assert [q.text for q in found[1].questions] == [q.text for q in picture(1).questions]


def test_entries_name_each_row_once(tmp_path):
    made = leaderboard.entries(tmp_path, 64)
    names = [entry.name for entry in made]
    assert len(set(names)) == len(names)
    assert {entry.rescue or entry.twin or "random" for entry in made} <= set(names)
    assert {entry.group for entry in made} == {"reference", *leaderboard.PANELS}


@pytest.fixture(scope="module")
def bench():
    return leaderboard.Bench(leaderboard.CHECKPOINT)


@preencoding  # questions about one picture share its features
def test_a_run(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "Bench", lambda folder: bench)
    partial = tmp_path / "partial.json"
    asked: list[int] = []
    about = bench.about
    monkeypatch.setattr(bench, "about", lambda rows, seed: asked.append(seed) or about(rows, seed))

    def measure():
        return leaderboard.measure(
            leaderboard.CHECKPOINT, 4, [64], tmp_path, ["random", "fastv", "flowcut"], workers=1, turns=1, partial=partial
        )

    done = measure()
    rows = {r["name"]: r for r in summarise(done, 100)["rows"]}
    assert list(rows) == ["unpruned", "random", "flowcut", "fastv"]
    assert "with a first cut at layer 1" in rows["fastv"]["refused"]
    assert rows["flowcut"]["equivalent_tokens"] == 64
    assert rows["flowcut"]["settings"].startswith("flowcut(keep=64, ")
    assert rows["flowcut"]["all"]["mean"] > 50
    assert 0 < rows["flowcut"]["selection_ms"] < rows["flowcut"]["prefill_ms"]
    assert rows["unpruned"]["of_unpruned"] == 1
    digits = next(r for r in done["raw"] if r["name"] == "random")["hits"]
    assert set(digits) <= set("0123")
    # what a killed run has saved is not asked again, and gives the same answers
    again = measure()
    assert asked == [0]
    assert [r["hits"] for r in again["raw"]] == [r["hits"] for r in done["raw"]]


def test_the_first_choice_that_reaches_the_budget_is_taken_and_named(bench):
    asked, inputs = bench.single(0)
    entry = Entry("fastv", "fastv", "inside", ({"layer": 2}, {"layer": 1}))
    found = {b: leaderboard._fitting(bench, entry, b, asked, inputs) for b in (192, 128, 64)}
    assert [(row.label, bool(row.refused)) for row in found.values()] == [
        ("fastv", False), ("fastv, layer=1", False), ("fastv, layer=1", True),
    ]  # fmt: skip
    assert "layer=1" in found[128].settings


def test_unknown_rows_are_refused_by_name(bench, tmp_path):
    with pytest.raises(SystemExit, match="'flowcat'"):
        leaderboard.plan(bench, [64], tmp_path, ["flowcat"])


def test_a_budget_that_some_picture_forbids_is_refused_and_rescued(bench, tmp_path, monkeypatch):
    """MustDrop's least cost follows from what it merges, so that only the run tells what it can reach."""
    monkeypatch.setattr(leaderboard, "Bench", lambda folder: bench)
    made = leaderboard.entries(tmp_path, 192)
    few = [entry for entry in made if entry.strategy == "mustdrop"]
    monkeypatch.setattr(leaderboard, "entries", lambda folder, budget: few)

    def measure(forbidden):
        def on_one(rows, seed):
            said = {row.key: ("1" * len(picture(seed).questions), 192.0) for row in rows}
            return {**said, "mustdrop @ 192": "it cannot be reached: too few merged."} if seed == forbidden else said

        monkeypatch.setattr(bench, "about", on_one)
        done = leaderboard.measure(leaderboard.CHECKPOINT, 9, [192], tmp_path, workers=1, turns=1)
        return {row["name"]: row["refused"] for row in done["raw"]}

    refused = "on 1 of 2 pictures: it cannot be reached: too few merged."
    assert measure(1) == {"unpruned": "", "mustdrop": refused, "mustdrop, key_rate=0.02": ""}
    assert measure(None) == {"unpruned": "", "mustdrop": ""}
