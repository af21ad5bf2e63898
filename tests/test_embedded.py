"""What travels with the package loads whole, on every transformers that is claimed."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import vtprune
from vtprune import embedded


def test_the_embedded_model_loads_without_a_missing_weight():
    _, info = AutoModelForImageTextToText.from_pretrained(embedded.tiny_model(), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_its_weights_have_published_names():
    """As llava-hf checkpoints have them; names that newer versions write leave older ones with a random encoder."""
    with safe_open(embedded.tiny_model() / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    vision = [name for name in names if name.startswith("vision_tower.")]
    assert vision and all(name.startswith("vision_tower.vision_model.") for name in vision)


@pytest.mark.parametrize("name", sorted(embedded.schedules()))
def test_embedded_schedules_fit_the_embedded_model(name):
    model = AutoModelForImageTextToText.from_pretrained(embedded.tiny_model())
    path = embedded.schedules()[name]
    made = vtprune.GSearch.load(path) if name == "gsearch" else vtprune.PSigmoid.load(path)
    vtprune.wrap(model, made)


@pytest.mark.parametrize("name", sorted(embedded.configs()))
def test_configurations_can_be_read(name):
    assert embedded.config(name).is_file()
    assert embedded.config(str(embedded.configs()[name])) == embedded.configs()[name]
