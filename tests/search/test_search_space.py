"""Recipes with ranges: what is searched for, where it starts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fusion import FusionError, load_recipe
from hf_fusion.search.space import Dimension, load_space

OURS = """\
method: ties
base: me/base
experts:
  - {model: me/a, weight: {search: [0, 2]}}
  - {model: me/b, weight: {search: [0.5, 0.7]}}
parameters:
  scaling: {search: [0.1, 0.9], gradient: 3, start: 0.4}
  density:
    - {filter: mlp, value: {search: [0.1, 0.9]}}
    - {value: [0.2, {search: [0.3, 0.5]}]}
"""
MERGEKIT = """\
merge_method: dare_ties
base_model: me/base
models:
  - {model: me/a, parameters: {weight: {search: [-1, 1]}, density: {search: [0.2, 0.8]}}}
  - {model: me/b, parameters: {weight: 0.5}}
parameters: {lambda: {search: [0.5, 1.5]}}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_every_number_may_be_a_range(tmp_path):
    space = load_space(written(tmp_path, OURS))
    assert [(d.name, d.low, d.high, d.start) for d in space.dimensions] == [
        ("experts[0].weight", 0, 2, 1.0),  # the method's default
        ("experts[1].weight", 0.5, 0.7, 0.6),  # the middle: the default is outside
        ("parameters.scaling[0]", 0.1, 0.9, 0.4),
        ("parameters.scaling[1]", 0.1, 0.9, 0.4),
        ("parameters.scaling[2]", 0.1, 0.9, 0.4),
        ("parameters.density[0].value", 0.1, 0.9, 0.2),
        ("parameters.density[1].value[1]", 0.3, 0.5, 0.4),
    ]
    recipe = space.recipe([1.5, 0.5, 0.1, 0.2, 0.3, 0.25, 0.35])
    assert [expert.weight for expert in recipe.experts] == [1.5, 0.5]
    assert recipe.parameters == {
        "scaling": [0.1, 0.2, 0.3],
        "density": [{"filter": "mlp", "value": 0.25}, {"value": [0.2, 0.35]}],
    }
    assert space.recipe(space.start).parameters["scaling"] == [0.4] * 3


def test_mergekits_recipes_may_have_ranges(tmp_path):
    space = load_space(written(tmp_path, MERGEKIT))
    assert [(d.name, d.start) for d in space.dimensions] == [
        ("models[0].parameters.weight", 1.0),
        ("models[0].parameters.density", 0.5),
        ("parameters.lambda", 1.0),
    ]
    recipe = space.recipe([0.25, 0.75, 1.25])
    assert recipe.parameters["scaling"] == 1.25
    assert recipe.experts[0].settings == {"weight": 0.25, "drop_rate": 0.25}


def test_whole_numbers_stay_whole(tmp_path):
    text = "method: ties\nbase: b\nexperts: [a, c]\nparameters: {seed: 1, density: {search: [0.1, 0.2]}}\n"
    assert load_space(written(tmp_path, text)).dimensions[0].whole is False
    text = "method: recombination\nexperts: [a, c]\nparameters: {number: {search: [1, 4]}, seed: {search: [0, 9]}}\n"
    dimension, seed = load_space(written(tmp_path, text)).dimensions
    assert dimension.whole and dimension.start == 1 and seed.whole
    assert [dimension.value(share) for share in (0, 0.3, 0.6, 1)] == [1, 2, 3, 4]
    assert load_space(written(tmp_path, text)).recipe([3, 7]).parameters == {"number": 3, "seed": 7}
    with pytest.raises(FusionError, match=r"number.search is \[1, 1.5\], expected whole numbers"):
        load_space(written(tmp_path, text.replace("[1, 4]", "[1, 1.5]")))


def test_values_have_six_digits_and_keep_to_their_range(tmp_path):
    text = "method: linear\nexperts: [{model: a, weight: {search: [0.1, 0.30000001]}}, {model: b, weight: 1}]\n"
    [dimension] = load_space(written(tmp_path, text)).dimensions
    assert dimension.value(1 / 3) == 0.166667
    assert dimension.value(2) == 0.3 and dimension.value(-1) == 0.1
    assert Dimension("x", ("x",), 0.12345612, 1, 0.5).value(0) == 0.12345612


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0.1, 0.9], gradient", "[0.9, 0.1], gradient", r"parameters.scaling.search is \[0.9, 0.1\], expected \[low"),
        ("gradient: 3", "gradient: 1", "parameters.scaling.gradient is 1, expected a whole number from 2"),
        ("start: 0.4", "start: 2", r"parameters.scaling.start is 2, outside of \[0.1, 0.9\]"),
        ("start: 0.4", "begin: 0.4", "begin"),
        ("mlp, value: {search: [0.1, 0.9]}", "mlp, value: {search: [0.1, 2]}", r"density\[0\].value is 2"),
        ("parameters:", "parameters:\n  merge: {search: [0, 1]}", "parameters.merge is a range, but merge of ties"),
        ("base: me/base", "base: {search: [0, 1]}", "base is 0"),
        ("method: ties", "method: foe", "cannot be searched: its method is not a static merge|scaling"),
        ("{model: me/b, weight: {search: [0.5, 0.7]}}", "me/b", "only some of the experts have a weight"),
    ],
)
def test_errors_name_the_key(tmp_path, old, new, message):
    assert old in OURS
    with pytest.raises(FusionError, match=message):
        load_space(written(tmp_path, OURS.replace(old, new, 1)))


def test_a_recipe_without_ranges_or_of_stages_is_refused(tmp_path):
    with pytest.raises(FusionError, match="has no range to search") as raised:
        load_space(written(tmp_path, "method: linear\nexperts: [a, b]\n"))
    assert "{search: [0.1, 1.0]}" in str(raised.value.hint)
    with pytest.raises(FusionError, match="2 documents"):
        load_space(written(tmp_path, f"name: x\n{OURS}---\nmethod: linear\nexperts: [x, b]\n"))
    with pytest.raises(FusionError, match="it merges adapters into an adapter"):
        load_space(written(tmp_path, "method: lora\nexperts: [{model: a, weight: {search: [0, 1]}}]\n"))


def test_a_recipe_with_ranges_is_not_fused(tmp_path):
    with pytest.raises(FusionError, match="has ranges to search, not numbers") as raised:
        load_recipe(written(tmp_path, OURS))
    assert "hf-fusion search" in str(raised.value.hint)
