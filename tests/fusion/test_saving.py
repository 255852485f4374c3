"""Each way of saving a fused model records its recipe; on the Hub without local paths."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_tokenizer
from tiny_experts import save_adapter, save_bert
from tiny_fused import bert_base, fine_tuned
from tiny_routed import save_base, save_lora
from transformers import AutoModel, Trainer, TrainingArguments

from hf_fusion import FoEModel, FusionError, Recipe, fuse, load_fused, save_fused
from hf_fusion.hub.provenance import hash_folder, read_recipe

KINDS = ("foe", "ensemble", "phatgoose", "wemoe", "linear")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Experts of every family, as folders."""
    place = tmp_path_factory.mktemp("folders")
    for seed in (0, 1):
        save_bert(place / f"bert-{seed}", seed)
        save_lora(place / f"lora-{seed}", str(place / "llama"), seed)
    save_base(place / "llama")
    base = bert_base()
    for name, model in {"base": base, "tuned-0": fine_tuned(base, 0), "tuned-1": fine_tuned(base, 1)}.items():
        model.save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
    return place


def fused(kind: str, place: Path):
    """A model of each kind, of two folders."""
    if kind == "phatgoose":
        return fuse(kind, [place / "lora-0", place / "lora-1"], top_k=1)
    if kind == "wemoe":
        return fuse(kind, [place / "tuned-0", place / "tuned-1"], place / "base", scaling=0.2)
    return fuse(kind, [place / "bert-0", place / "bert-1"], **({"weights": [1.0, 3.0]} if kind != "foe" else {}))


@pytest.fixture(scope="module")
def models(folders) -> dict:
    torch.manual_seed(0)
    return {kind: fused(kind, folders) for kind in KINDS}


def by_trainer(model, folder: Path) -> None:
    Trainer(model, TrainingArguments(str(folder / "run"), report_to="none", use_cpu=True)).save_model(str(folder))


WAYS: dict[str, Callable] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_fused": save_fused,
    "Trainer": by_trainer,
    "a copy": lambda model, folder: copy.deepcopy(model).save_pretrained(folder),
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_saving_method_writes_the_recipe(kind, way, models, tmp_path):
    WAYS[way](models[kind], tmp_path / "fused")
    recipe = Recipe.load(tmp_path / "fused")
    assert recipe == models[kind].fusion_recipe
    assert recipe.method == kind
    loaded, again = load_fused(tmp_path / "fused")
    assert again == recipe
    assert {p.name for p in (tmp_path / "fused").iterdir()} >= {"tokenizer_config.json"} or kind in ("foe", "ensemble")
    for name, tensor in models[kind].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_survives_loading_and_saving(kind, models, folders, tmp_path):
    """Also without hf_fusion: the config has the recipe, without local paths."""
    models[kind].save_pretrained(tmp_path / "fused")
    load_fused(tmp_path / "fused")[0].save_pretrained(tmp_path / "again")
    assert Recipe.load(tmp_path / "again") == models[kind].fusion_recipe
    if kind == "linear":
        return
    loaded = type(models[kind]).from_pretrained(tmp_path / "fused")
    loaded.save_pretrained(tmp_path / "alone")
    recipe = Recipe.load(tmp_path / "alone")
    assert str(folders) not in (tmp_path / "alone" / "fusion.yaml").read_text()
    names = [Path(expert.model) for expert in models[kind].fusion_recipe.experts]
    assert [expert.model for expert in recipe.experts] == [f"{path.name}@{hash_folder(path)}" for path in names]
    assert recipe.parameters == models[kind].fusion_recipe.parameters
    assert not recipe.unpinned


@pytest.mark.parametrize("kind", KINDS[:4])
def test_recipe_of_an_old_folder_is_read_from_its_config(kind, models, tmp_path):
    """As saves of before wrote it: no fusion.yaml, no recipe in the config."""
    models[kind].save_pretrained(tmp_path / "fused")
    (tmp_path / "fused" / "fusion.yaml").unlink()
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    del config["recipe"]
    (tmp_path / "fused" / "config.json").write_text(json.dumps(config))
    _, recipe = load_fused(tmp_path / "fused")
    known = models[kind].fusion_recipe
    assert recipe.method == known.method
    assert [e.model for e in recipe.experts] == [Path(e.model).name for e in known.experts]
    assert [e.weight for e in recipe.experts] == [e.weight for e in known.experts]
    assert known.parameters.items() <= recipe.parameters.items()


def test_the_recipe_of_a_config_makes_the_same_model(folders, tmp_path):
    """Also labels and label maps that no recipe records: they are read from the model."""
    maps = {"bert-0": {"no": "bad", "yes": "good", "maybe": None}, "bert-1": {"no": "bad", "yes": "good"}}
    paths = [folders / "bert-0", folders / "bert-1"]
    model = FoEModel.from_experts(paths, label_maps=maps, labels=["good", "bad", "maybe"], fuser_hidden=[8])
    model.save_pretrained(tmp_path / "fused")
    recipe = Recipe.load(tmp_path / "fused")
    again = fuse(recipe.method, paths, **recipe.parameters)
    for key in ("id2label", "fuser_hidden", "fuser_dropout", "mode"):
        assert getattr(again.config, key) == getattr(model.config, key)
    assert [row["label_map"] for row in again.config.experts] == [row["label_map"] for row in model.config.experts]


def test_recipe_follows_removed_experts(models, folders, tmp_path):
    router = fused("phatgoose", folders)
    router.remove_experts(["lora-0"])
    save_fused(router, tmp_path / "fused")
    assert [expert.model for expert in Recipe.load(tmp_path / "fused").experts] == ["lora-1"]


def test_a_merge_is_pickled_and_a_plain_model_says_nothing(models, tmp_path):
    again = pickle.loads(pickle.dumps(models["linear"]))
    assert type(again) is type(models["linear"])
    assert again.fusion_recipe == models["linear"].fusion_recipe
    AutoModel.from_config(models["linear"].config).save_pretrained(tmp_path / "plain")
    with pytest.raises(FusionError, match=r"plain has no fusion.yaml, and its config.json has no recipe"):
        read_recipe(tmp_path / "plain")
    with pytest.raises(FusionError, match="nowhere cannot be read"):
        read_recipe(tmp_path / "nowhere")


PUSHES = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from huggingface_hub import HfApi, snapshot_download
from test_saving import KINDS, fused, Path
import transformers
place, api = Path({place!r}), HfApi()
for kind in KINDS:
    model = fused(kind, place)
    model.push_to_hub(f"me/by-push-{{kind}}")
    if kind in ("phatgoose", "linear"):
        model.save_pretrained(f"saved-{{kind}}", push_to_hub=True, repo_id=f"me/by-save-{{kind}}")
    del model
    if kind == "linear":
        continue
    stranger = transformers.AutoModel.from_pretrained(f"me/by-push-{{kind}}", trust_remote_code=True)
    assert type(stranger).__module__.startswith("transformers_modules"), type(stranger)
    stranger.save_pretrained(f"stranger-{{kind}}")
"""


def test_pushed_config_has_the_recipe_without_local_paths(hub, folders, fresh_python, tmp_path):
    """By transformers' `push_to_hub`, and saved again by a model that runs the repo's code."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    fresh_python(PUSHES.format(paths=paths, place=str(folders)), hub, hub.token("me"))
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub.token("me"))
    for kind in KINDS:
        told = []
        for repo in [f"me/by-push-{kind}", *([f"me/by-save-{kind}"] if kind in ("phatgoose", "linear") else [])]:
            files = [api.hf_hub_download(repo, name) for name in api.list_repo_files(repo)]
            texts = {Path(file).name: Path(file).read_bytes() for file in files}
            assert not [name for name, text in texts.items() if str(folders).encode() in text], repo
            assert any(name.startswith(("tokenizer", "processor")) for name in texts), repo
            told.append(yaml.safe_load(texts["fusion.yaml"]))
        assert told[0] == told[-1]
        assert all("@sha256:" in str(expert) for expert in told[0]["experts"])
        if len(told) > 1:  # here they are found again
            assert str(folders) in (tmp_path / f"saved-{kind}" / "fusion.yaml").read_text()
        if kind != "linear":
            assert yaml.safe_load((tmp_path / f"stranger-{kind}" / "fusion.yaml").read_text()) == told[0]


def test_adapter_on_a_local_base_records_the_hash_of_the_base(folders, tmp_path):
    save_adapter(tmp_path / "adapter", folders / "bert-0", ("no", "yes", "maybe"))
    model = fuse("foe", [tmp_path / "adapter", folders / "bert-1"])
    assert model.fusion_recipe.base == str(folders / "bert-0")
    assert model.config.recipe["base"] == f"bert-0@{hash_folder(folders / 'bert-0')}"
    assert str(tmp_path) not in model.config.to_json_string()
