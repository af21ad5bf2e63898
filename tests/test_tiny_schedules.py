"""The page on searched schedules: its baselines spend what they should, its numbers add up, its text by hand stays."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from models import preencoding

import vtprune
from evaluations.tiny import schedules
from evaluations.tiny.schedules import BEGIN, DEPTH, END, TOKENS, holm, line, ramp
from vtprune import embedded
from vtprune.schedule import read

SHARES = [(0.5, 2), (0.25, 1), (0.15, 1), (0.9, 3), (0.7, 1)]


@pytest.mark.parametrize(("share", "first"), SHARES)
def test_lines_are_straight_and_spend_the_share(share, first):
    for rates in (line(share, first, 8), ramp(share, first, 8)):
        assert sum(rates) == pytest.approx(8 * share)
        assert rates[:first] == (1.0,) * first and all(0 <= rate <= 1 for rate in rates)
        positive = [rate for rate in rates[first:] if rate > 1e-12]
        steps = -np.diff(positive)
        assert (steps > 0).all() and steps == pytest.approx(steps[:1].repeat(len(steps)))
    straight = line(share, first, 8)
    assert 1 - straight[first] >= straight[first] - straight[first + 1] - 1e-9  # the first step, too


def test_holm_against_a_table():
    # Holm 1979: the k-th least of n times n - k + 1, never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def shipped():
    return sorted((embedded.assets() / "schedules").glob("tiny-llava.*.json"))


def test_the_shipped_schedules_are_the_tiny_models():
    from transformers import AutoModelForImageTextToText

    from vtprune.engine.identity import identify

    model = identify(AutoModelForImageTextToText.from_pretrained(embedded.tiny_model()))
    kinds = []
    for path in shipped():
        found = read(path)
        kinds.append(found.kind)
        assert (found.model.name, found.model.fingerprint) == (embedded.TINY, model.fingerprint)
        assert found.data.questions >= 64 and found.command.startswith("vtprune search ")
        assert path.stat().st_size < 20_000
        strategy = {"gsearch": vtprune.GSearch, "psigmoid": vtprune.PSigmoid}[found.kind].load(path)
        strategy.check_model(model)
        assert strategy.min_layer == found.values["min_layer"]
    assert kinds.count("gsearch") == 1 and kinds.count("psigmoid") == 3


def test_every_row_is_at_the_budget_of_its_group():
    made = schedules.rows()
    assert len({row.name for row in made}) == len(made)
    by_budget = {}
    for row in made[1:]:
        pruner = row.build()
        counts = np.full(DEPTH, TOKENS)
        if isinstance(pruner, vtprune.FastV):
            assert pruner.keep in (row.budget, row.budget / TOKENS, np.ceil(row.budget))
        elif pruner.keep is None:
            counts = np.maximum(1, np.round(np.multiply(pruner.rates, TOKENS)))
            assert counts.mean() == pytest.approx(row.budget)
        else:
            assert pruner.keep in (row.budget, row.budget / TOKENS, np.ceil(row.budget))
        by_budget.setdefault((row.group, row.budget), []).append(row.name)
    assert {len(names) for names in by_budget.values()} == {2, 4, 5}
    for one in schedules.comparisons([row.name for row in made]):
        assert {one.better, one.other} <= {row.name for row in made}


def measured():
    names = ["unpruned", "G-Search 100", "G-Search 100, last token's score", "FastV 100, text's score", "FastV 100"]
    right = [[8] * 30, [8] * 29 + [7], [7, 8] * 15, [6, 7] * 15, [4, 6] * 15]
    rows = [
        {"name": n, "group": "gsearch" if at else "", "budget": 100, "equivalent_tokens": 100.0, "right": r, "read": [1] * 30}
        for at, (n, r) in enumerate(zip(names, right, strict=True))
    ]
    setup = dict.fromkeys(("date", "minutes", "device", "workers", "cores", "torch", "transformers", "vtprune"), "x")
    return {"questions": [8] * 30, "readings": [1] * 30, "rows": rows, "setup": setup, "command": "made up"}


def test_the_summary_is_of_the_counts():
    found = schedules.summarise(measured(), resamples=2000)
    full, searched, *_, fastv = found["rows"]
    assert full["accuracy"] == full["low"] == full["high"] == 100 and full["reading"] == 100
    assert searched["accuracy"] == pytest.approx(100 * 239 / 240)
    assert fastv["accuracy"] == pytest.approx(62.5)
    assert fastv["low"] < 62 < 63 < fastv["high"]
    pairs = {(one["better"], one["other"]): one for one in found["comparisons"]}
    assert len(pairs) == 5
    assert pairs["G-Search 100", "FastV 100"]["gain"] == pytest.approx(100 * 239 / 240 - 62.5)
    assert pairs["G-Search 100", "FastV 100"]["p"] == pytest.approx(1 / 2001)
    assert pairs["G-Search 100", "unpruned"]["gain"] == pytest.approx(100 * 239 / 240 - 99)
    assert all(one["holm"] >= one["p"] for one in pairs.values())
    worse = schedules.summarise({**measured(), "rows": [{**r, "right": r["right"][::-1]} for r in measured()["rows"]]})
    assert [r["accuracy"] for r in worse["rows"]] == pytest.approx([r["accuracy"] for r in found["rows"]])
    assert json.loads(schedules.dumps(found)) == found


def test_only_what_is_between_the_markers_is_written(tmp_path):
    page = tmp_path / "page.md"
    text = schedules.section(schedules.summarise(measured(), resamples=50), {path.name: read(path) for path in shipped()})
    assert text.startswith(BEGIN) and text.endswith(END) and "0.99 x unpruned" in text
    page.write_text(f"# By hand\n\nabove\n\n{BEGIN}\nold\n{END}\n\nbelow\n")
    schedules.write_page(page, text)
    first = page.read_text()
    assert first == f"# By hand\n\nabove\n\n{text}\n\nbelow\n"
    schedules.write_page(page, text)
    assert page.read_text() == first
    schedules.write_page(tmp_path / "new.md", text)
    assert (tmp_path / "new.md").read_text().count(BEGIN) == 1


@preencoding  # it has pictures encoded once for all budgets
@pytest.mark.slow
def test_the_command_measures(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "evaluations.tiny.schedules", "--questions", "8", "--workers", "1", "--scaled"]
    subprocess.run([*command, "--json", out, "--markdown", tmp_path / "page.md"], check=True, capture_output=True)
    found = json.loads(out.read_text())
    for row in found["rows"]:
        assert row["equivalent_tokens"] == pytest.approx(row["budget"], abs=0.5)
        assert len(row["right"]) == len(found["questions"])
    assert BEGIN in (tmp_path / "page.md").read_text()
