"""A strategy from another package, tests/plugin: built, installed and found by its entry point."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from models import TOKENS, batch, images, prompt, tiny_llava

import vtprune

HERE = Path(__file__).parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package installed: its wheel, built by its declared backend and unpacked, as installers do."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    shutil.copytree(HERE / "plugin", source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    # no pip: it may be missing, and would fetch the backend from the network
    subprocess.run([sys.executable, "-c", BUILD, str(wheels)], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture
def installed(site, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("vtprune_loudest", None)


def announce(folder: Path, name: str, value: str) -> Path:
    """Another package that announces one entry point."""
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vtprune.strategies]\n{name} = {value}\n")
    return folder


def test_it_is_small():
    lines = (HERE / "plugin" / "vtprune_loudest.py").read_text().splitlines()
    assert len(lines) <= 30
    assert sorted(p.name for p in (HERE / "plugin").iterdir() if p.suffix in (".py", ".toml")) == [
        "pyproject.toml",
        "vtprune_loudest.py",
    ]


def test_it_is_listed_once_installed(installed):
    assert version("vtprune-loudest") == "0.1.0"
    found = vtprune.available()
    assert found["loudest"].__module__ == "vtprune_loudest"
    assert found["uniform"] is vtprune.Uniform


def test_it_is_not_listed_before():
    assert "loudest" not in vtprune.available()
    with pytest.raises(vtprune.UnknownStrategyError):
        vtprune.create("loudest")


def test_a_misspelt_name_offers_it(installed):
    with pytest.raises(vtprune.UnknownStrategyError, match=r"'loudset'\. Did you mean 'loudest'.*Available: .*loudest"):
        vtprune.create("loudset")
    with pytest.raises(TypeError, match="Did you mean 'keep'"):
        vtprune.create("loudest", kep=3)


@torch.no_grad()
def test_it_prunes_by_name_and_composes(installed):
    model = tiny_llava()
    given = {**batch([prompt(4, "I", 5)]), "pixel_values": images(1)}
    norms = model.model.get_image_features(pixel_values=given["pixel_values"]).pooler_output[0].norm(dim=-1)
    plain = model.generate(**given, max_new_tokens=4, do_sample=False)
    with vtprune.pruning(model, "loudest", keep=9) as session:
        model.generate(**given, max_new_tokens=4, do_sample=False)
        assert session.report.samples[0].kept.tolist() == sorted(norms.topk(9).indices.tolist())
        assert session.report.strategy == "loudest(keep=9)"
    with vtprune.pruning(model, "loudest+evict", keep=20, evict__keep=5) as session:
        model.generate(**given, max_new_tokens=4, do_sample=False)
        assert [len(c) for c in session.report.samples[0].cached] == [5] * 4
    with pytest.raises(ValueError, match="'select' stage"):
        vtprune.wrap(model, "loudest+uniform")
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), plain)
    assert TOKENS == 36


def test_a_taken_name_raises(installed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(announce(tmp_path, "uniform", "vtprune_loudest:Loudest")))
    with pytest.raises(ValueError, match=r"'uniform' \(vtprune_loudest:Loudest\) takes the name of an existing strategy"):
        vtprune.available()


def test_two_packages_that_take_one_name_raise(installed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(announce(tmp_path, "loudest", "vtprune.strategies.uniform:Uniform")))
    with pytest.raises(ValueError, match=r"'loudest' .*takes the name"):
        vtprune.available()


@pytest.mark.parametrize("value", ["vtprune.select:top", "vtprune.pruner:Keep"])
def test_what_is_no_strategy_raises(tmp_path, monkeypatch, value):
    monkeypatch.syspath_prepend(str(announce(tmp_path, "odd", value)))
    with pytest.raises(TypeError, match=rf"entry point 'odd' \({value}\) .*no Pruner dataclass"):
        vtprune.available()


SCRIPT = """
import torch, vtprune
from models import batch, images, prompt, tiny_llava
assert "loudest" in vtprune.available()
model = vtprune.wrap(tiny_llava(), "loudest", keep=9)
model.generate(**batch([prompt(4, "I", 5)]), pixel_values=images(1), max_new_tokens=2, do_sample=False)
print(len(vtprune.report(model).samples[0].kept))
try:
    vtprune.wrap(model, "lowdest")
except vtprune.UnknownStrategyError as error:
    print(error)
"""


@pytest.mark.slow
def test_in_a_fresh_process(site):
    path = os.pathsep.join([str(site), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == "9"
    assert "unknown strategy 'lowdest'. Did you mean 'loudest'" in second
