"""Recipes of several stages: the result is that of the merges one after the other, and nothing else is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from on_disk import NOWHERE, model, tree
from safetensors.torch import load_file
from tiny import llama

from hf_fusion import FusionError, extract_lora, load_recipe, merge
from hf_fusion.cli import main
from hf_fusion.fusion import fuse_recipe
from hf_fusion.hub.provenance import list_local_folders
from hf_fusion.recipe import Recipe

# the example of mergekit-multi's documentation, with other models, and with its last merge first
MULTI = """
merge_method: dare_ties
base_model: {0}/base
models:
  - model: second-merge
    parameters: {{density: 0.6, weight: 0.5}}
  - model: {0}/three
    parameters: {{density: 0.8, weight: 0.5}}
---
name: first-merge
merge_method: linear
models:
  - model: {0}/base
  - model: {0}/one
parameters:
  weight: 0.5
---
name: second-merge
merge_method: slerp
base_model: first-merge  # a merge above
models:
  - model: {0}/two
parameters:
  t: 0.5
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Four models in a folder of the test's."""
    for seed, name in enumerate(("base", "one", "two", "three")):
        model(tmp_path / name, seed)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def by_hand(here: Path, text: str) -> Path:
    """The folder of the last merge, of documents merged one after the other by single recipes."""
    documents = [document for document in yaml.safe_load_all(text) if document]
    documents.sort(key=lambda document: "name" not in document)
    for document in documents:
        name = document.pop("name", "last")
        single = yaml.safe_dump(document)
        for made in ("first-merge", "second-merge"):
            single = single.replace(f" {made}\n", f" {here / 'hand' / made}\n")
        (here / "single.yaml").write_text(single)
        merge(load_recipe(here / "single.yaml"), here / "hand" / name)
    return here / "hand" / name


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_recipe_of_mergekit_multi(here):
    text = MULTI.format(here)
    expected = by_hand(here, text)
    (here / "single.yaml").unlink()
    recipe = load_recipe(written(here, text))
    assert [*recipe.stages] == ["first-merge", "second-merge"] and recipe.method == "dare_ties"
    before = tree(here)
    report = merge(recipe, here / "out", api=NOWHERE)
    assert weights(here / "out") == weights(expected)
    assert tree(here).keys() - before.keys() <= {"out"} | {f"out/{p.name}" for p in (here / "out").iterdir()}
    # the saved recipe names the stage by its content, and makes the same again
    saved = Recipe.load(here / "out")
    assert saved == report.recipe
    assert saved.experts[0].model.startswith("second-merge@sha256:")
    assert [*saved.stages] == ["first-merge", "second-merge"] and not saved.elsewhere
    assert saved.stages["second-merge"].experts[0].model.startswith("first-merge@sha256:")
    assert {*list_local_folders(saved)} == {str(here / name) for name in ("base", "one", "two", "three")}
    merge(load_recipe(here / "out"), here / "again", api=NOWHERE)
    assert weights(here / "again") == weights(expected)
    assert (here / "again" / "fusion.yaml").read_bytes() == (here / "out" / "fusion.yaml").read_bytes()


def test_ours_with_names_slices_and_an_adapter(here):
    """The last document is the result, though it has a name; a stage is the base of an adapter."""
    base = llama()
    base.save_pretrained(here / "llama")
    other = llama(1)
    other.save_pretrained(here / "other")
    extract_lora(here / "other", here / "llama", here / "lora", rank=4)
    text = f"""
name: middle
method: linear
experts: [{here}/llama, {here}/other]
---
name: result
method: linear
experts: [middle+{here}/lora, middle]
"""
    merge(load_recipe(written(here, text)), here / "out", api=NOWHERE)
    merge(Recipe.from_dict({"method": "linear", "experts": [f"{here}/llama", f"{here}/other"]}), here / "m")
    merge(Recipe.from_dict({"method": "linear", "experts": [f"{here}/m+{here}/lora", f"{here}/m"]}), here / "expected")
    assert weights(here / "out") == weights(here / "expected")
    saved = Recipe.load(here / "out").experts[0].model
    assert saved.startswith("middle@sha256:") and saved.endswith(f"+{here}/lora")


def test_kept_stages_are_used_again_by_content(here):
    text = MULTI.format(here)
    recipe = load_recipe(written(here, text))
    merge(recipe, here / "out", stages_folder=here / "stages", api=NOWHERE)
    stamps = {name: (here / "stages" / name).stat().st_ino for name in recipe.stages}
    merge(recipe, here / "again", stages_folder=here / "stages", api=NOWHERE)
    assert {name: (here / "stages" / name).stat().st_ino for name in recipe.stages} == stamps
    assert weights(here / "again") == weights(here / "out")
    # another recipe, or other content of an input, is another stage
    changed = load_recipe(written(here, text.replace("  t: 0.5", "  t: 0.25")))
    with pytest.raises(FusionError, match="second-merge already contains a model"):
        merge(changed, here / "third", stages_folder=here / "stages", api=NOWHERE)
    merge(changed, here / "third", stages_folder=here / "stages", overwrite=True, api=NOWHERE)
    assert (here / "stages" / "first-merge").stat().st_ino == stamps["first-merge"]
    assert weights(here / "third") != weights(here / "out")
    for path in (here / "one").iterdir():
        path.unlink()
    (here / "one").rmdir()
    model(here / "one", 9)
    merge(changed, here / "third", stages_folder=here / "stages", overwrite=True, api=NOWHERE)
    assert (here / "stages" / "first-merge").stat().st_ino != stamps["first-merge"]


def test_a_killed_run_continues_and_an_error_leaves_nothing(here, monkeypatch):
    recipe = load_recipe(written(here, MULTI.format(here)))
    before = tree(here)

    def stop(done: int, total: int) -> None:
        if (here / ".out.stages" / "second-merge").is_dir():  # in the last merge
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, here / "out", progress=stop, api=NOWHERE, threads=1)
    left = {path.name for path in (here / ".out.stages").iterdir() if not path.name.startswith(".")}
    assert left == {"second-merge"}  # the first is removed after its last use
    inode = (here / ".out.stages" / "second-merge").stat().st_ino
    seen = []

    def look(done: int, total: int) -> None:
        seen.append((here / ".out.stages" / "second-merge").stat().st_ino)

    merge(recipe, here / "out", progress=look, api=NOWHERE)
    assert set(seen) == {inode} and not (here / ".out.stages").exists()
    broken = load_recipe(written(here, MULTI.format(here).replace(f"{here}/three", f"{here}/missing")))
    (here / "recipe.yaml").write_text(MULTI.format(here))
    with pytest.raises(FusionError, match="missing"):
        merge(broken, here / "other", api=NOWHERE)
    assert {name for name in tree(here) if not name.startswith("out")} == {*before}


def test_what_the_result_does_not_need(here, caplog):
    text = MULTI.format(here) + f"---\nname: lonely\nmethod: linear\nexperts: [{here}/one, first-merge]\n"
    recipe = load_recipe(written(here, text))
    merge(recipe, here / "out", api=NOWHERE)
    assert "does not use lonely" in caplog.text
    assert "lonely" not in Recipe.load(here / "out").stages
    merge(recipe, here / "more", stages_folder=here / "stages", api=NOWHERE)
    assert load_file(here / "stages" / "lonely" / "model.safetensors")
    assert weights(here / "more") == weights(here / "out")


X = "method: linear\nexperts: [x]"
AX = "method: linear\nexperts: [a, x]"
NESTED = "{a: {method: linear, experts: [x], stages: {b: {method: linear, experts: [y]}}}}"
CIRCLE = "{a: {method: linear, experts: [b, x]}, b: {method: linear, experts: [a, x]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmethod: linear\nexperts: [b, x]\n---\nname: b\n" + AX, "use each other in a circle"),
        (f"{AX}\nstages: {CIRCLE}", "circle: a → b → a"),
        (f"{X}\n---\n{AX}", "two documents have no name"),
        (f"name: a\n{X}\n---\nname: a\n{X}", "two documents are called a"),
        (f"name: ../a\n{X}\n---\n{AX}", "not the name of a stage"),
        (f"name: 3\n{X}\n---\n{AX}", "not the name of a stage"),
        (f"name: a\n{X.replace('linear', 'linaer')}\n---\n{AX}", "linaer"),
        (f"- 1\n---\n{AX}", "recipe.yaml"),
        (f"{AX}\nstages: {NESTED}", "the stage a has stages"),
        (f"name: b\n{AX}\nstages: {{a: {{method: linear, experts: [x]}}}}\n---\n{AX}", "both as documents and by"),
    ],
)
def test_wrong_recipes(text, message, here):
    before = tree(here)
    with pytest.raises(FusionError, match=message):
        merge(load_recipe(written(here, text)), here / "out", api=NOWHERE)
    assert {*tree(here)} == {*before, "recipe.yaml"}


def test_what_a_merge_of_stages_is_compared_with(here):
    """Its measurement loads the models that it was made from, not the stages, which are gone."""
    saved = merge(load_recipe(written(here, MULTI.format(here))), here / "out", api=NOWHERE).recipe
    assert saved.outer_experts == [str(here / name) for name in ("three", "one", "two")]
    assert saved.outer_base == str(here / "base") and not saved.elsewhere
    staged = Recipe.from_dict({**yaml.safe_load(AX), "base": "a", "stages": {"a": yaml.safe_load(X)}})
    assert staged.outer_base is None and staged.outer_experts == ["x"]


def test_families_take_no_stages(here):
    text = f"name: a\n{X}\n---\nmethod: foe\nexperts: [a, x]"
    with pytest.raises(FusionError, match="foe takes no stages"):
        fuse_recipe(load_recipe(written(here, text)))


def test_a_loaded_merge_of_stages(here):
    for seed, name in enumerate(("low", "high")):
        llama(seed).save_pretrained(here / name)
    last = f"method: linear\nexperts: [a, {here}/low]"
    text = f"name: a\nmethod: linear\nexperts: [{here}/low, {here}/high]\n---\n{last}"
    merged = fuse_recipe(load_recipe(written(here, text)), api=NOWHERE)
    low, high = llama(0).lm_head.weight, llama(1).lm_head.weight
    torch.testing.assert_close(merged.lm_head.weight, 0.75 * low + 0.25 * high)
    assert [*merged.fusion_recipe.stages] == ["a"]


def test_the_command(here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    written(here, MULTI.format("."))
    assert main(["fuse", "recipe.yaml", "-o", "out", "--stages", "stages"]) == 0
    assert "✓ Merged" in capsys.readouterr().out and (here / "stages" / "first-merge" / "config.json").exists()
    assert "second-merge" in (here / "out" / "README.md").read_text()
    assert main(["fuse", "recipe.yaml", "-o", "dry", "--dry-run"]) == 2
    assert "recipe of several" in capsys.readouterr().err
    assert main(["fuse", "out", "-o", "again", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 6
    assert weights(here / "again") == weights(here / "out")
    assert not [*here.glob(".*")]
