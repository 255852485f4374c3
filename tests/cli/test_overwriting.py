"""User data is not overwritten without consent: models, fits, measurements, gates, Hubs, datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from tiny import bert, make_tokenizer
from tiny_routed import save_base, save_lora

from hf_fusion import FusionError, Recipe, RecipeExpert, fit_fuser, fuse, merge, save_fused
from hf_fusion.demo.workspace import open_workspace
from hf_fusion.merging.lora import merge_adapters
from hf_fusion.server import HubServer, add_user


def save_classifier(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    bert(["poor", "fine"], seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("loras")
    base = save_base(place / "llama")
    return [base, *(save_lora(place / f"lora-{seed}", str(base), seed) for seed in (0, 1))]


@pytest.fixture
def rows(tmp_path) -> Path:
    texts = [f"{word} number {number}" for number in range(20) for word in ("fine", "poor")]
    Dataset.from_dict({"text": texts, "label": [0, 1] * 20}).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.parametrize("method", ["phatgoose", "linear", "lora"])
def test_fuse_overwrites_only_with_the_option(method, here, loras, tmp_path):
    experts = list(map(str, loras[1:]))
    words = ["fuse", "--method", method, "--experts", *experts, "-o", "out"]
    here(*words)
    (tmp_path / "out" / "results.json").write_text("{}")
    before = content(tmp_path / "out")
    for again in (words, [*words, "--dtype", "float16"]):  # the same recipe, and another
        with pytest.raises(FusionError, match="out already contains a model: .*results.json") as caught:
            here(*again)
        assert "--overwrite" in str(caught.value.hint)
    assert content(tmp_path / "out") == before
    here(*words, "--overwrite")
    assert "results.json" not in content(tmp_path / "out")


def test_api_overwrites_only_with_the_argument(loras, tmp_path):
    model = fuse("phatgoose", loras[1:])
    recipe = Recipe("linear", tuple(RecipeExpert(str(path)) for path in loras[1:]))
    adapters = Recipe("lora", recipe.experts)
    for name, write in {
        "saved": lambda **how: save_fused(model, tmp_path / "saved", **how),
        "merged": lambda **how: merge(recipe, tmp_path / "merged", **how),
        "adapter": lambda **how: merge_adapters(adapters, tmp_path / "adapter", **how),
    }.items():
        write()
        (tmp_path / name / "README.md").write_text("mine")
        before = content(tmp_path / name)
        with pytest.raises(FusionError, match=f"{name} already contains a model"):
            write()
        assert content(tmp_path / name) == before
        write(overwrite=True)
        assert (tmp_path / name / "README.md").read_text() == "mine"
    model.to_adapter(tmp_path / "one")
    with pytest.raises(ValueError, match="one exists already"):
        model.to_adapter(tmp_path / "one")


def test_fitted_fuser_is_refitted_only_with_the_option(here, rows, tmp_path):
    folders = [save_classifier(tmp_path / f"bert-{seed}", seed) for seed in (0, 1)]
    here("fuse", "--method", "foe", "--experts", *map(str, folders), "-o", "fused")
    words = ("fit", "fuser", "fused", "--data", str(rows))
    here(*words)
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["fitted"]
    before = content(tmp_path / "fused")
    with pytest.raises(FusionError, match="fused was already fitted, and fitting would replace that"):
        here(*words)
    here("eval", "fused", "--data", str(rows), "--split", "train")
    with pytest.raises(FusionError, match=r"fused was already fitted and evaluated \(results.json\)"):
        here(*words)
    assert before.items() <= content(tmp_path / "fused").items()
    here(*words, "--overwrite")
    with pytest.raises(FusionError, match="fused already contains a model"):
        here("fuse", "--method", "foe", "--experts", *map(str, folders), "-o", "fused")


def test_gates_are_overwritten_only_with_the_option(hub, here, hf_fusion, loras, tmp_path):
    Dataset.from_dict({"prompt": ["Say a", "Say b"], "target": ["a", "b"]}).to_parquet(tmp_path / "rows.parquet")
    words = ("fit", "gates", str(loras[1]), "--data", "rows.parquet", "--kind", "average")
    before = content(loras[1])
    with pytest.raises(FusionError, match="lora-0 already contains gates: phatgoose_gates.safetensors"):
        here(*words)
    here(*words, "--output", "gates")
    with pytest.raises(FusionError, match="gates already contains gates"):
        here(*words, "--output", "gates")
    here(*words, "--output", "gates", "--overwrite")
    assert content(loras[1]) == before
    api = HfApi(endpoint=hub.endpoint, token=hub.token("keeper"))
    for path in loras[:2]:
        api.create_repo(f"keeper/{path.name}")
        api.upload_folder(repo_id=f"keeper/{path.name}", folder_path=path)
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token("keeper")}
    done = hf_fusion("fit", "gates", "keeper/lora-0", "--base", "keeper/llama", *words[3:], "--push", **home)
    assert done.returncode == 1
    assert "keeper/lora-0 already has gates" in done.stderr


def test_unrelated_folder_is_refused_by_hub_and_demo(tmp_path):
    (tmp_path / "work" / "tmp").mkdir(parents=True)
    (tmp_path / "work" / "tmp" / "thesis.txt").write_text("mine")
    before = content(tmp_path / "work")
    for attempt in (
        lambda: HubServer(tmp_path / "work").__enter__(),
        lambda: add_user(tmp_path / "work", "me"),
        lambda: open_workspace(tmp_path / "work").__enter__(),
    ):
        with pytest.raises(
            FusionError, match=r"work (contains files, but is not a Hub's folder|contains files that are not a demo's)"
        ):
            attempt()
        assert content(tmp_path / "work") == before
    with open_workspace(tmp_path / "demo"):
        pass
    (tmp_path / "demo" / "foe").mkdir()
    with open_workspace(tmp_path / "demo"):  # runs again freely
        pass


def test_fitted_fuser_records_that_it_was_fitted(tmp_path):
    torch.manual_seed(0)
    model = fuse("foe", [save_classifier(tmp_path / f"bert-{seed}", seed) for seed in (0, 1)])
    assert not model.config.fitted
    rows = Dataset.from_dict({"text": ["fine", "poor"] * 10, "label": [0, 1] * 10})
    fit_fuser(model, rows, epochs=1)
    assert model.config.fitted
