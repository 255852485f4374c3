"""Invalid or unsupported recipes of mergekit: each gives one error that names the key."""

from __future__ import annotations

import re

import pytest

from hf_fusion import FusionError
from hf_fusion.merging.recipe_files import load_recipe


def read(text, tmp_path):
    """A recipe of mergekit's."""
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml")


GOOD = """
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: 1}
  - model: b
parameters: {lambda: 0.5}
dtype: float16
"""
WRONG = {
    "merge_method: ranked_ties": "merge_method 'ranked_ties' is not supported",
    "merge_method: [ties]": r"merge_method is \['ties'\], expected the name of a method",
    "out_path: ./models/x": "out_path is not a supported key",
    "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]": r"exactly one of models, slices and modules is expected",
    "dtype: int64": "dtype is 'int64', expected one of float32, float16, bfloat16",
    "dtype: 16": "dtype is 16, expected one of float32, float16, bfloat16",
    "base_model: a@b@c": "base_model is 'a@b@c', expected",
    "base_model: {path: base, override_architecture: X}": "base_model.override_architecture is not a supported key",
    "parameters: {lamda: 0.5}": "parameters.lamda is not a parameter of task_arithmetic\n  → did you mean lambda",
    "parameters: {lambda: x}": "parameters.lambda is 'x', expected a number",
    "parameters: {lambda: }": "parameters.lambda is None, expected a number",
    "parameters: {lambda: []}": r"parameters.lambda is \[\], expected a value, a gradient or filters",
    "parameters: {lambda: [0, {value: 1}]}": r"parameters.lambda\[0\] is 0, expected \{filter: …, value: …\}",
    "parameters: {lambda: [{pattern: mlp, value: 1}]}": r"parameters.lambda\[0\].pattern is not a supported key",
    "parameters: {lambda: [{filter: mlp}]}": r"parameters.lambda\[0\].value is missing",
    "parameters: {lambda: {filter: mlp, value: 1}}": "parameters.lambda is .*expected a number, a gradient or filters",
    "parameters: {lambda: .nan}": "parameters.lambda is nan, expected a number",
    "parameters: [lambda]": r"parameters is \['lambda'\], expected names and values",
    "parameters: {normalize: 2}": "parameters.normalize is 2, expected true or false",
    "models: {a: 1}": r"models is \{'a': 1\}, expected a list of \{model: …",
    "models: [a]": r"models\[0\] is 'a', expected \{model: …, parameters: …\}",
    "models: [{model: a, layer_range: [0, 2]}]": r"models\[0\].layer_range is not a supported key",
    "models: [{parameters: {weight: 1}}]": r"models\[0\].model is missing\n  → model: owner/name",
    "models: [{model: a+b+c}]": r"models\[0\].model is 'a\+b\+c', expected",
    "tokenizer_source: union\ntokenizer: {source: base}": "tokenizer_source and tokenizer mean the same: give only one",
    "tokenizer: union": "tokenizer is 'union', expected {source",
    "tokenizer: {source: union, vocab: 3}": "tokenizer.vocab is not a supported key",
    "tokenizer: {tokens: {x: union}}": "tokenizer.tokens.x is 'union', expected {source",
    "chat_template: 3": "chat_template is 3, expected a string",
    "modules: {text_decoder: {models: [{model: a}]}}": "modules.text_decoder is not a supported key",
    "modules: {default: {}}": "modules.default needs either models or slices",
}
SLICES = {
    "layer_range: [2, 2]": r"sources\[0\].layer_range is .2, 2., expected \[first layer, layer after the last\]",
    "layer_range: [0.0, 2.0]": r"layer_range\[0\] is 0.0, expected a whole number",
    "layer_range: [0, 3]": r"slices\[0\] takes different numbers of layers",
    "layer_range: [0, 2], residual: 1": r"sources\[0\].residual is not a supported key",
}


@pytest.mark.parametrize("change", WRONG)
def test_invalid_or_unsupported_keys_are_named(change, tmp_path):
    text = GOOD
    for line in change.splitlines():
        key = line.partition(":")[0]
        if key == "modules":
            text = re.sub(r"^models:(\n[ ].*)*", "", text, flags=re.M)
        text = re.sub(rf"^{key}:.*(\n[ ].*)*", "", text, flags=re.M) + f"\n{line}\n"
    with pytest.raises(FusionError, match=WRONG[change]) as error:
        read(text, tmp_path)
    assert str(tmp_path / "recipe.yaml") in error.value.message


@pytest.mark.parametrize("change", SLICES)
def test_slices_that_are_not_valid_are_named(change, tmp_path):
    text = "merge_method: slerp\nslices: [{sources: [{model: a, CHANGE}, {model: b, layer_range: [0, 2]}]}]\n"
    with pytest.raises(FusionError, match=SLICES[change]):
        read(text.replace("CHANGE", change), tmp_path)


def test_a_recipe_that_is_not_one_document(tmp_path):
    for text, message in {
        f"{GOOD}---\n{GOOD}": "two documents have no name",
        "a: 1\n---\nb: 2\n---\n": "a is not a supported key",
        f"{GOOD}dtype: float32\n": "'dtype' occurs twice",
        "merge_method: linear\nmodels: &all [*all]\n": "not valid YAML",
    }.items():
        with pytest.raises(FusionError, match=message):
            read(text, tmp_path)


def test_valid_recipe_is_read(tmp_path):
    recipe = read(GOOD, tmp_path)
    assert (recipe.method, recipe.base, recipe.dtype) == ("task_arithmetic", "base", "float16")
    assert recipe.parameters == {"scaling": 0.5, "normalize": False}
