"""The commands on tiny experts of the embedded Hub: discover, fuse, fit and eval."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from cli.conftest import told
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from hf_fusion import FusionError, fuse
from hf_fusion.evaluation.results import Results

WORDS = ["good", "bad", "fine", "poor", "film", "book"]
SIZES = {
    "initializer_range": 0.6,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
LABELS = ["negative", "positive"]


def save_expert(folder: Path, seed: int, labels: list[str]) -> Path:
    """A BERT of 16 dimensions with its tokenizer and a tagged card."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=5 + len(WORDS), **SIZES, id2label=dict(enumerate(labels)))
    BertForSequenceClassification(config).save_pretrained(folder)
    words = folder.parent / "words.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(vocab=str(words)).save_pretrained(folder)
    card = "tags: [hf-fusion-expert]\nlicense: mit\npipeline_tag: text-classification\nlibrary_name: transformers"
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    return [save_expert(folder / name, seed, LABELS) for seed, name in enumerate(["first", "second"])]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet and test.parquet; what is good or fine is positive."""
    folder = tmp_path_factory.mktemp("rows")
    pick = random.Random(0)
    for split, count in {"train": 80, "test": 40}.items():
        words = [pick.choice(WORDS[:4]) for _ in range(count)]
        columns = {"text": [f"{word} {pick.choice(WORDS[4:])}" for word in words]}
        Dataset.from_dict({**columns, "label": [int(word in ("good", "fine")) for word in words]}).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture
def fused(here, experts, tmp_path) -> Path:
    here("fuse", "--method", "foe", "--experts", *map(str, experts), "--output", "fused")
    return tmp_path / "fused"


@pytest.fixture(scope="module")
def shop(hub, experts) -> str:
    """An owner on the Hub with two experts that fit and one whose labels do not."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token("shop"))
    other = save_expert(experts[0].parent / "other", 2, ["spam", "ham"])
    for folder in [*experts, other]:
        api.create_repo(f"shop/{folder.name}")
        api.upload_folder(repo_id=f"shop/{folder.name}", folder_path=folder)
    return "shop"


def test_discover_lists_experts(hf_fusion, hub, shop):
    done = hf_fusion("discover", "--author", shop, "--format", "json", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert {row["id"] for row in json.loads(done.stdout)} == {"shop/first", "shop/second", "shop/other"}


@pytest.mark.slow
def test_from_discovered_experts_to_a_published_model(hf_fusion, hub, shop, tmp_path):
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token(shop)}
    words = ("discover", "--author", shop, "--check", "--labels", *LABELS, "--format", "quiet")
    ids = hf_fusion(*words, **home).stdout.split()
    assert {name.partition("@")[0] for name in ids} == {"shop/first", "shop/second"}
    done = hf_fusion("fuse", "--method", "foe", "--experts", *ids, "--output", "fused", **home)
    assert done.returncode == 0, done.stderr
    assert all(name in (tmp_path / "fused" / "fusion.yaml").read_text() for name in ids)

    plan = hf_fusion("publish", "fused", "shop/fused", "--dry-run", **home)
    assert "license: mit" in plan.stdout
    assert "shop/fused (new)" in plan.stdout
    refused = hf_fusion("publish", "fused", "shop/fused", **home)
    assert refused.returncode == 1
    assert "  → hf-fusion publish fused shop/fused --yes" in refused.stderr
    api = HfApi(endpoint=hub.endpoint, token=home["HF_TOKEN"])
    assert not api.repo_exists("shop/fused")
    done = hf_fusion("publish", "fused", "shop/fused", "--yes", "--format", "json", **home)
    assert done.returncode == 0, done.stderr
    info = api.model_info("shop/fused", revision=json.loads(done.stdout)["revision"])
    assert info.private
    assert "model.safetensors" in {file.rfilename for file in info.siblings}


def test_recipe_reproduces_the_model(here, fused, experts, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"method: foe\nexperts: [{experts[0]}, {experts[1]}]\n")
    made = json.loads(here("fuse", "recipe.yaml", "--output", "again", "--format", "json"))
    assert made["folder"] == str(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (fused / "config.json").read_text()


def test_an_option_of_the_method_reaches_it(here, experts, tmp_path):
    words = ("fuse", "--method", "foe", "--experts", *map(str, experts), "--output")
    here(*words, "fused", "--set", "mode=selection", "--set", "features_from=0")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert (config["mode"], config["features_from"]) == ("selection", 0)
    with pytest.raises(FusionError, match="has no parameter 'colour'"):
        here(*words, "other", "--set", "colour=blue")
    with pytest.raises(FusionError, match="--set mode has no value"):
        here(*words, "other", "--set", "mode")


@pytest.mark.slow
def test_fit_writes_back_and_eval_leaves_results(hf_fusion, here, fused, rows):
    before = load_file(fused / "model.safetensors")
    done = hf_fusion("fit", "fuser", "fused", "--data", str(rows), "--frugal", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert len(told(done.stderr)) <= 2, done.stderr  # a hint: no bars and no chatter where nobody watches
    fit = json.loads(done.stdout)
    assert fit["train_rows"] + fit["held_out_rows"] == 80
    after = load_file(fused / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("fuser.") for name in moved)
    results = json.loads(here("eval", "fused", "--data", str(rows), "--format", "json"))
    assert results == json.loads((fused / "results.json").read_text())
    measured = Results.load(fused / "results.json")
    assert measured.tasks[0].n == 40
    scores = {p.name.rpartition("/")[2]: p.only_score.score for p in measured.predictors}
    assert scores["FoE"] > max(scores["first"], scores["second"], 0.9)
    shown = here("eval", "fused", "--data", str(rows / "test.parquet"))
    assert "accuracy on 40 examples" in shown
    assert "mean ensemble" in shown


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere.parquet", "nowhere.parquet does not exist"),
        ("notes.txt", "notes.txt ends in '.txt'"),
        ("empty", "empty is not a file, a folder with data"),
    ],
)
def test_missing_data_is_named(here, fused, tmp_path, data, message):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FusionError, match=message) as error:
        here("fit", "fuser", "fused", "--data", data)
    assert error.value.hint


def test_a_folder_without_a_model_is_named(here, rows):
    with pytest.raises(FusionError, match="nothing"):
        here("eval", "nothing", "--data", str(rows))


def test_folder_written_by_save_pretrained_is_evaluated(here, experts, rows, tmp_path):
    """Also an old folder, whose config alone says what it is, and a plain model that says nothing."""
    model = fuse("ensemble", experts)
    model.save_pretrained(tmp_path / "fused")

    def measured(folder: str) -> Results:
        return Results.from_dict(json.loads(here("eval", folder, "--data", str(rows), "--format", "json")))

    first = measured("fused")
    (tmp_path / "fused" / "fusion.yaml").unlink()
    assert first.predictors == measured("fused").predictors and first.tasks[0].n == 40
    static = fuse("linear", experts)
    static.save_pretrained(tmp_path / "merged")
    assert [predictor.name for predictor in measured("merged").predictors] == ["merged", "first", "second"]
    (tmp_path / "merged" / "fusion.yaml").unlink()
    names = [predictor.name for predictor in measured("merged").predictors]
    assert names[0] == "merged" and "first" not in names
