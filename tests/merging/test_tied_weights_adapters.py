"""Adapters that train embeddings and heads, merged into one adapter that PEFT loads."""

import pytest
import torch
from peft import PeftModel
from peft_adapters import CLOSE, KINDS, loaded, logits, save_adapter, save_llama
from transformers import AutoModelForCausalLM

from hf_fusion import FusionError, Recipe
from hf_fusion.merging.lora import merge_adapters
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import RecipeExpert

ROWS = [kind for kind, (options, _) in KINDS.items() if "trainable_token_indices" in options]
OTHERS = [kind for kind in KINDS if kind not in ROWS]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request, tmp_path_factory):
    """A base, and two adapters of each kind with what PEFT makes of the first."""
    folder = tmp_path_factory.mktemp("made")
    save_llama(folder / "base", tied=request.param)
    models = {}
    for seed, (name, (options, _)) in enumerate(KINDS.items(), 1):
        models[name] = save_adapter(folder / name, folder / "base", seed, **options)
        save_adapter(folder / f"{name} again", folder / "base", seed + 50, **options)
    return folder, models


def with_peft(base, folder, rows=None):
    """The merged adapter on its base, by PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        torch.manual_seed(9)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, folder).eval()


def recipe_of(*folders, method="lora"):
    return Recipe(method, tuple(RecipeExpert(str(folder), 1 / len(folders)) for folder in folders))


@pytest.mark.parametrize("kind", OTHERS)
def test_single_adapter_is_unchanged(kind, made, tmp_path):
    folder, models = made
    merge_adapters(recipe_of(folder / kind), tmp_path / "out")
    found = with_peft(folder / "base", tmp_path / "out", KINDS[kind][0].get("rows"))
    torch.testing.assert_close(logits(found), logits(models[kind]), **CLOSE)


@pytest.mark.parametrize("kind", OTHERS)
def test_two_adapters_are_the_mean_of_their_models(kind, made, tmp_path):
    folder, _ = made
    pair = (folder / kind, folder / f"{kind} again")
    merge_adapters(recipe_of(*pair), tmp_path / "out")
    found = with_peft(folder / "base", tmp_path / "out", KINDS[kind][0].get("rows"))
    merge(recipe_of(*pair, method="linear"), tmp_path / "whole")
    torch.testing.assert_close(logits(found), logits(loaded(tmp_path / "whole")), **CLOSE)


def test_one_that_adapts_embeddings_and_one_that_does_not(made, tmp_path):
    folder, _ = made
    pair = (folder / "LoRA on embeddings", folder / "LoRA on the head")
    merge_adapters(recipe_of(*pair), tmp_path / "out")
    merge(recipe_of(*pair, method="linear"), tmp_path / "whole")
    found = with_peft(folder / "base", tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(loaded(tmp_path / "whole")), **CLOSE)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_refused_with_a_way_on(kind, made, tmp_path):
    folder, _ = made
    with pytest.raises(FusionError, match="replaces rows of model.embed_tokens") as caught:
        merge_adapters(recipe_of(folder / kind, folder / "neither"), tmp_path / "out")
    assert "method: linear" in caught.value.hint
    merge(recipe_of(folder / kind, folder / "neither", method="linear"), tmp_path / "out")
