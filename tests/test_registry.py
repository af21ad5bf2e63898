"""Strategies by name: what is shipped, compositions, and fields that find their owner."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import vtprune
from vtprune.pruner import STAGES, Pipeline, Pruner
from vtprune.registry import SHIPPED, UnknownStrategyError, available, create, strategy_class


def test_shipped_strategies_are_available_under_their_own_name():
    found = available()
    assert set(SHIPPED) <= set(found)
    for name in SHIPPED:
        cls = found[name]
        assert issubclass(cls, Pruner) and dataclasses.is_dataclass(cls)
        assert cls.name == name and cls.paper and cls.__doc__
        assert cls is getattr(vtprune, cls.__name__)
        # a strategy with nothing but its defaults is a strategy that works
        assert set(cls().stages()) <= set(STAGES) and cls().stages()


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_docstrings_name_every_field(name):
    cls = strategy_class(name)
    for field in dataclasses.fields(cls):
        assert field.name in cls.__doc__, f"{name}.{field.name}"


def test_create_takes_defaults_and_fields():
    assert create("uniform") == vtprune.Uniform()
    assert create("random", keep=7, seed=3) == vtprune.Random(keep=7, seed=3)
    assert create("flowcut", keep=0.1, every=3) == vtprune.FlowCut(keep=0.1, every=3)


def test_composition_by_name():
    made = create(" flowcut + fastv+evict", keep=8)
    assert isinstance(made, Pipeline)
    assert made.parts == [vtprune.FlowCut(keep=16), vtprune.FastV(keep=8), vtprune.Evict(keep=4)]
    assert made.settings() == {"name": "pipeline", "parts": [p.settings() for p in made.parts]}
    assert made.describe().count(" + ") == 2


@pytest.mark.parametrize(
    ("name", "keep", "budgets"),
    [
        ("fastv+flowcut", 64, [64, 128]),
        ("flowcut+divprune+fastv+evict", 50, [200, 100, 50, 25]),
        ("resolution+flowcut", 0.6, [1.0, 0.6]),
        ("uniform+evict", 0.3, [0.3, 0.15]),
        ("random+evict", 1, [1, 1]),
        ("todre+evict", 64, [64, 32]),
    ],
)
def test_one_budget_is_divided_among_the_parts(name, keep, budgets):
    """The last part that shortens prefill gets the budget, those before it twice as much each, the cache half."""
    assert [part.keep for part in create(name, keep=keep).parts] == budgets


@pytest.mark.parametrize("key", ["fastv__keep", "fastv.keep"])
@pytest.mark.parametrize("last", [False, True])
def test_an_addressed_field_wins_over_a_general_one(key, last):
    fields = {"keep": 8, key: 5} if last else {key: 5, "keep": 8}
    flow, fast = create("flowcut+fastv", **fields).parts
    assert (flow.keep, fast.keep) == (8, 5)


def test_a_field_goes_to_every_part_that_has_it():
    flow, fast = create("flowcut+fastv", layer=3, momentum=0.2).parts
    assert fast.layer == 3 and flow.momentum == 0.2


@pytest.mark.parametrize(
    ("name", "field", "near"),
    [
        ("uniform", "kepe", "keep"),
        ("flowcut", "momentun", "momentum"),
        ("flowcut+evict", "decoder_kep", "decoder_keep"),
        ("fastv", "evict__keep", "keep"),
        ("random", "sead", "seed"),
    ],
)
def test_unknown_fields_offer_the_nearest(name, field, near):
    with pytest.raises(TypeError) as caught:
        create(name, **{field: 1})
    message = str(caught.value)
    assert repr(field) in message and "Did you mean" in message and repr(near) in message
    assert "Fields: " in message and message.startswith(name)


def test_a_field_of_no_strategy_lists_what_there_is():
    with pytest.raises(TypeError, match=r"^uniform has no field 'xyzzy'\. Fields: keep\.$"):
        create("uniform", xyzzy=1)


@pytest.mark.parametrize("name", ["flowcat", "Flowcut", "flow", "FASTV", "evict+unifrom"])
def test_unknown_names(name):
    with pytest.raises(UnknownStrategyError, match=r"unknown .*Available: cdpruner, .*, evict, evs, .*, visionzip"):
        create(name)


def test_public_names_resolve():
    for name in vtprune.__all__:
        assert getattr(vtprune, name) is not None
        assert name in dir(vtprune)
    with pytest.raises(AttributeError, match="no attribute 'flowcutt'"):
        vtprune.flowcutt


def test_import_costs_neither_torch_nor_transformers():
    code = "import sys, vtprune; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
