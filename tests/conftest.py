"""Shared set-up: the tests' own folder is importable, torch is deterministic and does not fight over cores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

# timings mean nothing on a busy machine; `--hypothesis-profile thorough` for long runs
settings.register_profile("default", deadline=None, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="print the outcomes of test_matrix.py as a table")


def pytest_terminal_summary(terminalreporter, config):
    """Family by strategy: how many tests held, or failed; nothing where none applied."""
    if not config.getoption("--table"):
        return
    cells: dict[str, dict[str, dict[str, int]]] = {}
    marks: dict[tuple[str, str], str] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            about = dict(getattr(report, "user_properties", ()))
            if "row" in about:
                row, column = about["row"], about["column"]
                found = cells.setdefault(row, {}).setdefault(column, {})
                found[outcome] = found.get(outcome, 0) + 1
                marks[row, column] = about["mark"]
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    write = terminalreporter.write_line
    write("| family | " + " | ".join(columns) + " |")
    write("|---" * (len(columns) + 1) + "|")
    for row in sorted(cells):
        told = []
        for column in columns:
            found = cells[row].get(column, {})
            bad = found.get("failed", 0) + found.get("error", 0)
            said = f"{bad} FAILED" if bad else f"{found['passed']} held" if "passed" in found else ""
            told.append(said + marks.get((row, column), "") if said else "-")
        write(f"| {row} | " + " | ".join(told) + " |")
    write("numbers: of promises by prompts by kernels")
    write("*: another form of the strategy, or what stands in for it; -: refused, with the reason")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
