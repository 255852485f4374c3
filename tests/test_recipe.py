"""fusion.yaml: its content, and errors that name file, key and reason."""

import pytest
import yaml

from hf_fusion.errors import FusionError
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import Recipe, RecipeExpert

SHA = "0123456789abcdef0123456789abcdef01234567"
TEXT = f"""\
method: wemoe
base: owner/base@{SHA}
experts:
- owner/expert-a@{SHA}
- model: owner/expert-b@{SHA}
  weight: 0.5
parameters:
  scaling: 0.3
  router_layers: 2
dtype: bfloat16
"""


def write(folder, text):
    path = folder / "fusion.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_example_recipe_is_read(tmp_path):
    text = TEXT.replace(f"- owner/expert-a@{SHA}\n", f"- {{model: owner/expert-a@{SHA}, weight: 0.25}}\n")
    recipe = Recipe.load(write(tmp_path, text))
    assert recipe == Recipe(
        method="wemoe",
        base=f"owner/base@{SHA}",
        experts=(RecipeExpert(f"owner/expert-a@{SHA}", 0.25), RecipeExpert(f"owner/expert-b@{SHA}", 0.5)),
        parameters={"scaling": 0.3, "router_layers": 2},
        dtype="bfloat16",
    )
    assert recipe.unpinned == []


def test_round_trip_is_stable(tmp_path):
    recipe = Recipe("foe", (RecipeExpert(f"a/b@{SHA}"),), parameters={"label_maps": {"a/b": {"nö": "no", "x": None}}})
    recipe.save(tmp_path / "fusion.yaml")
    text = (tmp_path / "fusion.yaml").read_text(encoding="utf-8")
    assert Recipe.load(tmp_path) == recipe
    assert Recipe.load(tmp_path).to_yaml() == text
    assert list(yaml.safe_load(text)) == ["method", "experts", "parameters"]  # nothing that is not set


def test_unpinned_models_are_listed():
    experts = tuple(map(RecipeExpert, (f"a/b@{SHA}", "a/b", "a/b@main", "./folder", f"a/b@{SHA[:7]}")))
    assert Recipe("foe", experts, base="a/base").unpinned == [*(e.model for e in experts[1:]), "a/base"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("method: wemoe\n", ""), "method is missing\n  → method: the name of a method"),
        (("method: wemoe", "method: [foe]"), "method is \\['foe'\\]"),
        (("method: wemoe", "methode: wemoe"), "methode is not a supported key\n  → did you mean method"),
        (("experts:", "experts: []\nslices:"), "experts is \\[\\], expected a list of at least one expert"),
        ((f"- owner/expert-a@{SHA}", "- 7"), r"experts\[0\] is 7, expected owner/name@sha"),
        (("weight: 0.5", "wait: 0.5"), r"experts\[1\].wait is not a supported key\n  → did you mean weight"),
        (("weight: 0.5", "weight: half"), r"experts\[1\].weight is 'half', expected a number"),
        (("weight: 0.5", "weight: .nan"), r"experts\[1\].weight is nan"),
        (("weight: 0.5", "weight: 0.5"), "only some of the experts have a weight"),
        (("dtype: bfloat16", "dtype: int3"), "dtype is 'int3', expected one of float32, float16, bfloat16"),
        (("parameters:\n  scaling: 0.3\n  router_layers: 2", "parameters: [1]"), r"parameters is \[1\]"),
        ((f"base: owner/base@{SHA}", "base: 3"), "base is 3, expected owner/name@sha"),
        (("method: wemoe", "method: ["), "is not valid YAML"),
        (("dtype: bfloat16", "base: other"), "not valid YAML: the key 'base' occurs twice, the second time in line 10"),
        ((TEXT, "just a word"), "holds 'just a word', expected {method: …, experts: …}\n  → use method, experts, base"),
        ((TEXT, ""), "holds None, expected {method: …, experts: …}"),
    ],
)
def test_mistakes_are_named(change, reason, tmp_path):
    assert change[0] in TEXT
    path = write(tmp_path, TEXT.replace(*change))
    with pytest.raises(FusionError, match=f"{path}.*{reason}"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("method: wemeo", "there is no method 'wemeo'\n  → did you mean wemoe?"),
        ("method: wemoe\nparameters: {scalin: 1}", "method wemoe has no parameter 'scalin'\n  → did you mean scaling?"),
        ("method: wemoe\nparameters: {scaling: high}", "parameters.scaling is 'high', expected a number"),
    ],
)
def test_mistakes_in_methods_name_the_file(text, reason, tmp_path):
    path = write(tmp_path, f"{text}\nexperts: [a/b, a/c]\n")
    with pytest.raises(FusionError) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"{path}: {reason}")


def test_missing_file(tmp_path):
    with pytest.raises(FusionError, match="fusion.yaml cannot be read"):
        Recipe.load(tmp_path)


def test_never_builds_python_objects(tmp_path):
    text = TEXT.replace("dtype: bfloat16", f"dtype: !!python/object/apply:os.mkdir ['{tmp_path}/ran']")
    with pytest.raises(FusionError, match="not valid YAML"):
        Recipe.load(write(tmp_path, text))
    assert not (tmp_path / "ran").exists()
