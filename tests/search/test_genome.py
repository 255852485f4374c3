"""mergekit-evolve's recipes: the ranges are where mergekit's genes are, and what cannot be done names its key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import llama

from hf_fusion import FusionError, load_recipe
from hf_fusion.search.space import load_space

GENOME = {
    "models": ["a", "b"],
    "merge_method": "dare_ties",
    "base_model": "base",
    "layer_granularity": 1,
    "filters": ["self_attn"],
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a genome beside the folders of its models, of two layers; only their configs matter."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "base"):
        llama().config.save_pretrained(tmp_path / name)

    def write(changed: dict | None = None, **more) -> Path:
        genome = {key: value for key, value in {**GENOME, **(changed or {})}.items() if value is not None}
        file = tmp_path / "genome.yaml"
        file.write_text(yaml.safe_dump({"genome": genome, "tasks": [{"name": "arc", "weight": 2.0}, "mine"], **more}))
        return file

    return write


def test_layer_groups_and_filters_become_slices(written):
    space = load_space(written(limit=100))
    names = [dimension.name for dimension in space.dimensions]
    assert len(names) == 2 * 2 * 2 * 2  # groups, models, weight and density, filter and the rest
    assert names[0] == "slices[0].sources[0].parameters.weight[0].value"
    assert {(d.low, d.high, d.start) for d in space.dimensions} == {(0, 1, 0.5), (0, 1, 1.0)}
    recipe = space.recipe([index / 100 for index in range(16)])
    assert [[source.layers for source in part.sources] for part in recipe.slices] == [[(0, 1)] * 3, [(1, 2)] * 3]
    assert [source.model for source in recipe.slices[1].sources] == ["a", "b", "base"]
    assert recipe.slices[0].sources[1].parameters["weight"] == [
        {"filter": "self_attn", "value": 0.04}, {"value": 0.05},
    ]  # fmt: skip
    assert recipe.base == "base" and recipe.dtype == "bfloat16" and recipe.parameters["merge"] == "mean"
    assert [(task.name, task.weight, task.metric) for task in space.tasks] == [
        ("arc", 2.0, "acc,none"), ("mine", 1.0, "acc,none"),
    ]  # fmt: skip
    assert space.genome is not None and space.genome.limit == 100


def test_smooth_genomes_are_gradients(written):
    changed = {"merge_method": "task_arithmetic", "smooth": True, "filters": None, "allow_negative_weights": True}
    space = load_space(written(changed))
    assert [d.name for d in space.dimensions] == [f"models[{m}].parameters.weight[{g}]" for m in (0, 1) for g in (0, 1)]
    assert {(d.low, d.high, d.start) for d in space.dimensions} == {(-1, 1, 0.5)}
    recipe = space.recipe([0.1, 0.2, 0.3, 0.4])
    assert [expert.settings["weight"] for expert in recipe.experts] == [[0.1, 0.2], [0.3, 0.4]]
    assert recipe.parameters["normalize"] is False


def test_a_genome_without_layer_groups_reads_no_config(written):
    changed = {"merge_method": "linear", "models": ["a", "b", "x/y"], "layer_granularity": 0}
    space = load_space(written({**changed, "filters": None, "base_model": None}))
    assert [d.start for d in space.dimensions] == pytest.approx([1 / 3] * 3, rel=1e-5)
    assert space.recipe([0.1, 0.2, 0.3]).parameters["normalize"] is True


def test_slerp_is_searched_between_two_models(written):
    space = load_space(written({"merge_method": "slerp", "filters": None, "base_model": None}))
    assert [(d.name, d.start) for d in space.dimensions] == [(f"slices[{i}].parameters.t", 0.5) for i in (0, 1)]
    assert space.recipe([0.2, 0.3]).slices[1].parameters == {"t": 0.3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"merge_method": "della"}, "genome.merge_method 'della' is not one of mergekit-evolve's"),
        ({"base_model": None}, "genome.base_model is missing: dare_ties needs it"),
        ({"layer_granularity": 3}, "genome.layer_granularity is 3, which does not divide the 2 layers of a"),
        ({"merge_method": "slerp"}, "genome.filters is not for slerp"),
        ({"merge_method": "slerp", "filters": None, "models": ["a", "b", "c"]}, "genome.models has 3 models"),
        ({"merge_method": "slerp", "filters": None}, "genome.base_model is not one of the two"),
        ({"crossover": 1}, "genome.*crossover"),
        ({"models": []}, "genome.models is"),
    ],
)
def test_what_cannot_be_done_names_its_key(written, changed, message):
    with pytest.raises(FusionError, match=message):
        load_space(written(changed))


def test_unused_keys_are_named_and_a_genome_is_not_fused(written, caplog):
    file = written(shuffle=True)
    load_space(file)
    assert "shuffle is not used" in caplog.text
    with pytest.raises(FusionError, match="has ranges to search") as raised:
        load_recipe(file)
    assert "hf-fusion search" in str(raised.value.hint)
