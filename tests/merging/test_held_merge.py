"""Merges in memory: the weights are those that `merge` writes, for any parameters, and files are read once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import gpt2, make_tokenizer
from tiny_fused import bert_base, fine_tuned
from transformers import MixtralConfig, MixtralForCausalLM

from hf_fusion import FusionError, Recipe, RecipeExpert, merge
from hf_fusion.merging.held_merge import HeldMerge
from hf_fusion.merging.in_memory import merge_states


def mixtral(seed: int) -> MixtralForCausalLM:
    """transformers joins the experts' matrices, which its files have one by one."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    base = bert_base()
    for name, model in {"base": base, "a": fine_tuned(base, 0), "b": fine_tuned(base, 1)}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def assert_merged(held: HeldMerge, recipe: Recipe, folder: Path) -> None:
    """The model has exactly the weights of the merge, and saves to the same file."""
    merge(recipe, folder)
    held.model.save_pretrained(folder.with_name(f"{folder.name}-held"))
    wanted, found = (load_file(f / "model.safetensors") for f in (folder, folder.with_name(f"{folder.name}-held")))
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert torch.equal(wanted[name], found[name]), name


def recipe_of(folder: Path, method: str, weights=(None, None), **parameters) -> Recipe:
    experts = [RecipeExpert(str(folder / name), weight) for name, weight in zip("ab", weights, strict=True)]
    return Recipe(method, tuple(experts), None if method == "linear" else str(folder / "base"), parameters)


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        ("task_arithmetic", {"scaling": 0.3}, {"scaling": [0.1, 0.9]}),
        ("ties", {"density": 0.2}, {"density": 0.7, "scaling": 0.5}),
        ("dare_ties", {"drop_rate": 0.5}, {"drop_rate": [{"filter": "attention", "value": 0.2}, {"value": 0.8}]}),
        ("linear", {"weights": (0.5, 0.5)}, {"weights": (0.9, 0.1)}),
    ],
)
def test_weights_are_those_of_a_merge(folders, method, first, then):
    held = HeldMerge(recipe_of(folders, method, **first))
    wanted = recipe_of(folders, method, **then)
    merge(wanted, folders / "merged")
    assert_merged(held, recipe_of(folders, method, **first), folders / "first")
    assert held.show(wanted) > 0
    assert held.recipe == Recipe.load(folders / "merged")
    assert_merged(held, wanted, folders / "then")


def test_files_are_read_once_and_unchanged_tensors_are_kept(folders):
    held = HeldMerge(recipe_of(folders, "ties", scaling=1.0))
    wanted = recipe_of(folders, "ties", scaling=[{"filter": "layer.1.output", "value": 0.5}, {"value": 1.0}])
    merge(wanted, folders / "merged")
    for name in ("base", "a", "b"):
        shutil.rmtree(folders / name)
    changed = [name for name in held.model.state_dict() if "layer.1.output" in name]
    assert held.show(wanted) == len(changed) > 0
    assert held.show(wanted) == 0
    for name, tensor in load_file(folders / "merged" / "model.safetensors").items():
        assert torch.equal(held.model.state_dict()[name], tensor), name


def test_tied_and_joined_tensors(tmp_path):
    """GPT-2's head is its embeddings; Mixtral's experts are joined when they are loaded, so that no name fits."""
    for kind, make in (("gpt2", gpt2), ("mixtral", mixtral)):
        for seed, name in enumerate(("base", "a", "b")):
            make(seed).save_pretrained(tmp_path / kind / name)
            make_tokenizer().save_pretrained(tmp_path / kind / name)
        first, then = (recipe_of(tmp_path / kind, "task_arithmetic", scaling=scaling) for scaling in (0.2, 0.7))
        held = HeldMerge(replace(first, dtype="bfloat16"))
        assert held.model.dtype == torch.bfloat16
        held.show(replace(then, dtype="bfloat16"))
        assert_merged(held, replace(then, dtype="bfloat16"), tmp_path / kind / "merged")


def test_a_merge_that_is_not_finite_is_an_error_and_the_next_is_right(folders):
    held = HeldMerge(recipe_of(folders, "task_arithmetic", scaling=0.3))
    with pytest.raises(FusionError, match="becomes NaN or Inf"):
        held.show(recipe_of(folders, "task_arithmetic", scaling=1e60))
    wanted = recipe_of(folders, "task_arithmetic", scaling=0.3)
    assert held.show(wanted) > 0
    assert_merged(held, wanted, folders / "merged")


@pytest.mark.parametrize(
    ("method", "name"), [("ties", "density"), ("breadcrumbs", "density"), ("magnitude", "density")]
)
def test_samples_that_are_kept_change_nothing(method, name):
    """Thresholds are exact, whatever sample they are bracketed with; tensors of several chunks, with equal values."""
    torch.manual_seed(0)
    base = {"a": torch.randn(600, 700), "b": torch.randn(50)}
    experts = [
        {key: value + torch.randn_like(value).mul(8).round() / 64 for key, value in base.items()} for _ in range(2)
    ]
    memory: dict = {}
    for share in (0.3, 0.9, 0.001, 1.0, 0.3):
        plain = merge_states(method, base, experts, **{name: share})
        kept = merge_states(method, base, experts, memory=memory, **{name: share})
        assert all(torch.equal(plain[key], kept[key]) for key in base), share
    assert memory["a"]
