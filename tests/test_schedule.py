"""Schedule files: what is written is what is read, and every bad file is refused with a reason."""

from __future__ import annotations

import copy
import json
import math
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import schedule
from vtprune.pruner import Model, VtpruneError
from vtprune.schedule import Data, ScheduleError, read, write

MODEL = Model("some/model", 4, "abc123")
DATA = Data("questions", 96, "f" * 64)
VALUES = {
    "gsearch": {"rates": [1.0, 1, 0.5, 0.25], "min_layer": 2},
    "psigmoid": {"steepness": 0.7, "keep": 64, "min_layer": 1},
    "mustdrop": {"global_thr": 0.011, "individual_thr": 0.01, "keep": 0.1, "equivalent_tokens": 63.2},
}


@pytest.mark.parametrize("kind", schedule.KINDS)
def test_round_trip(tmp_path, kind):
    path = tmp_path / "found.json"
    wrote = write(path, kind, MODEL, DATA, VALUES[kind], [{"trial": 1, "ok": True}], "vtprune search")
    found = read(path, kind)
    assert found == wrote == read(path)
    assert (found.kind, found.model, found.data, found.values) == (kind, MODEL, DATA, VALUES[kind])
    assert found.trace == [{"trial": 1, "ok": True}]
    assert found.command == "vtprune search"
    assert found.date.endswith("UTC")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def content(kind: str = "gsearch", **changes) -> dict:
    made = {
        "format": "vtprune-schedule",
        "version": 1,
        "kind": kind,
        "model": {"name": "m", "depth": 4, "fingerprint": "abc"},
        "data": {"name": "d", "questions": 8, "sha256": "0"},
        "date": "2026-01-01",
        "vtprune": "0.1.0",
        "command": "",
        "values": copy.deepcopy(VALUES[kind]),
        "trace": [],
    }
    return {**made, **changes}


def refused(tmp_path, text: str | bytes, kind: str | None = None) -> str:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ScheduleError) as caught:
        read(path, kind)
    assert isinstance(caught.value, VtpruneError)
    assert isinstance(caught.value, ValueError)
    assert "bad.json" in str(caught.value)
    return str(caught.value)


def test_the_content_that_the_bad_ones_start_from_is_good(tmp_path):
    for kind in schedule.KINDS:
        (tmp_path / "good.json").write_text(json.dumps(content(kind)))
        assert read(tmp_path / "good.json", kind).values == VALUES[kind]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        ("\x80PNG", "no JSON"),
        ("[1, 2]", "no vtprune schedule"),
        ("{}", "no vtprune schedule"),
        ("null", "no vtprune schedule"),
        ('{"format": "vtprune-schedule", "format": "vtprune-schedule"}', "given twice"),
        ("[" * 100_000, "no JSON"),
        (json.dumps(content()).replace("0.25", "NaN"), "NaN"),
        (json.dumps(content()).replace("0.25", "-Infinity"), "Infinity"),
        (json.dumps(content()).replace("0.25", "1e999"), "rates[3]"),
        (json.dumps(content()).replace("0.25", "9" * 5000), "no JSON"),
        (json.dumps(content(trace=[{"x": 1}])).replace('"x": 1', '"x": 1e999'), "not finite"),
        (json.dumps(content()) + " " * schedule.MAX_BYTES, "more than"),
    ],
)
def test_damaged_files(tmp_path, text, says):
    assert says in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "vtprune-search-state"}, "no vtprune schedule"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"kind": "psearch"}, "psearch"),
        ({"kind": ["gsearch"]}, "kind"),
        ({"model": None}, "model must be an object"),
        ({"model": {"name": "m", "depth": 4}}, "lacks model.fingerprint"),
        ({"model": {"name": "m", "depth": 4, "fingerprint": ""}}, "model.fingerprint"),
        ({"model": {"name": 3, "depth": 4, "fingerprint": "a"}}, "model.name"),
        ({"model": {"name": "m", "depth": 4.0, "fingerprint": "a"}}, "model.depth"),
        ({"model": {"name": "m", "depth": True, "fingerprint": "a"}}, "model.depth"),
        ({"model": {"name": "m", "depth": 0, "fingerprint": "a"}}, "model.depth"),
        ({"model": {"name": "m", "depth": 4, "fingerprint": "a", "path": "/x"}}, "unknown fields model.path"),
        ({"data": {"name": "d", "questions": 0, "sha256": "0"}}, "data.questions"),
        ({"date": 2026}, "date"),
        ({"command": None}, "command"),
        ({"trace": {}}, "trace"),
        ({"trace": [1]}, "trace"),
        ({"values": [1]}, "values must be an object"),
        ({"values": {}}, "lacks values.rates"),
        ({"values": {"rates": [1, 1, 1, 1], "min_layer": 2, "keep": 3}}, "unknown fields values.keep"),
        ({"values": {"rates": "1111", "min_layer": 2}}, "values.rates"),
        ({"values": {"rates": {"0": 1}, "min_layer": 2}}, "values.rates"),
        ({"values": {"rates": [1, 1, 1], "min_layer": 2}}, "3 entries for 4"),
        ({"values": {"rates": [1, 1, 0.5, 0.6], "min_layer": 2}}, "above the layer before"),
        ({"values": {"rates": [1.1, 1, 1, 1], "min_layer": 2}}, "from 0 to 1"),
        ({"values": {"rates": [1, 1, 1, -0.1], "min_layer": 2}}, "from 0 to 1"),
        ({"values": {"rates": [1, 1, 1, None], "min_layer": 2}}, "rates[3]"),
        ({"values": {"rates": [1, 1, 1, "0.5"], "min_layer": 2}}, "rates[3]"),
        ({"values": {"rates": [1, 1, 1, True], "min_layer": 2}}, "rates[3]"),
        ({"values": {"rates": [1, 1, 1, 1]}}, "lacks values.min_layer"),
        ({"values": {"rates": [1, 1, 1, 1], "min_layer": 0}}, "from 1 to 3"),
        ({"values": {"rates": [1, 1, 1, 1], "min_layer": 4}}, "from 1 to 3"),
        ({"values": {"rates": [1, 1, 1, 1], "min_layer": 2.0}}, "values.min_layer"),
        ({"values": {"rates": [1, 1, 1, 1], "min_layer": True}}, "values.min_layer"),
        ({"values": {"rates": [1, 1, 1, 1], "min_layer": None}}, "values.min_layer"),
        ({"extra": 1}, "unknown fields extra"),
    ],
)
def test_bad_fields(tmp_path, changes, says):
    assert says in refused(tmp_path, json.dumps({**content(), **changes}))


@pytest.mark.parametrize("name", [n for n in content() if n not in ("format", "version", "kind")])
def test_missing_fields(tmp_path, name):
    made = content()
    del made[name]
    assert f"lacks {name}" in refused(tmp_path, json.dumps(made))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("psigmoid", "steepness", 0),
        ("psigmoid", "steepness", -1.0),
        ("psigmoid", "steepness", "1"),
        ("psigmoid", "steepness", 100.1),
        ("psigmoid", "min_layer", 0),
        ("psigmoid", "min_layer", None),
        ("psigmoid", "keep", 0),
        ("psigmoid", "keep", 1.5),
        ("psigmoid", "keep", True),
        ("psigmoid", "keep", None),
        ("mustdrop", "global_thr", -0.1),
        ("mustdrop", "individual_thr", None),
        ("mustdrop", "individual_thr", False),
        ("mustdrop", "keep", "64"),
        ("mustdrop", "equivalent_tokens", -1),
    ],
)
def test_bad_values_of_the_other_kinds(tmp_path, kind, name, value):
    assert f"values.{name}" in refused(tmp_path, json.dumps(content(kind, values={**VALUES[kind], name: value})))


def test_another_kind_than_wanted(tmp_path):
    said = refused(tmp_path, json.dumps(content("psigmoid")), "gsearch")
    assert "psigmoid" in said
    assert "vtprune search gsearch" in said


def test_places_that_hold_no_file(tmp_path):
    with pytest.raises(ScheduleError, match="no file"):
        read(tmp_path / "missing.json")
    with pytest.raises(ScheduleError, match="folder"):
        read(tmp_path)
    with pytest.raises(ScheduleError):
        read("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScheduleError, match="no regular file"):
        read(tmp_path / "pipe")


def test_nothing_bad_is_written(tmp_path):
    path = tmp_path / "found.json"
    for rates in ([1, 1, 1, math.nan], [1, 1, 0.2, 0.3], [1, 1]):
        with pytest.raises(ScheduleError, match=r"values\.rates"):
            write(path, "gsearch", MODEL, DATA, {"rates": rates, "min_layer": 2})
    with pytest.raises(ScheduleError, match="Shorten"):
        write(path, "gsearch", MODEL, DATA, VALUES["gsearch"], [{"text": "x" * schedule.MAX_BYTES}])
    with pytest.raises(ScheduleError, match="cannot write"):
        write(tmp_path / "no" / "folder.json", "gsearch", MODEL, DATA, VALUES["gsearch"])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    write(path, "gsearch", MODEL, DATA, VALUES["gsearch"])
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schedule.os, "replace", full)
    with pytest.raises(ScheduleError, match="No space left"):
        write(path, "gsearch", MODEL, DATA, {"rates": [1, 1, 1, 1], "min_layer": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(content())), value=JSON)
def test_any_field_may_hold_anything(tmp_path_factory, name, value):
    """Whatever stands in a field, reading gives a whole schedule or a ScheduleError."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({**content(), name: value}))
    try:
        found = read(path)
    except ScheduleError:
        return
    assert isinstance(found.model, Model)
    assert all(0 <= rate <= 1 for rate in found.values.get("rates", []))
