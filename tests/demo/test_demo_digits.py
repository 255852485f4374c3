"""The digits, the committed experts, and the repos that are incompatible."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_fusion import FoEModel, FusionError, fit_fuser, load_experts
from hf_fusion.demo.digits import DIGITS, EXPERTS, LABEL_MAPS, SOURCES, SPLIT, digit_expert, digits, misfits
from hf_fusion.evaluation.evaluate import evaluate

TAGS = {"hf-fusion-expert", "digits", "image-classification"}
# expert -> (digits, sources) it was trained on
KNOWN = {
    "vit-mnist-low": ({0, 1, 2, 3, 4}, {"mnist"}),
    "resnet-mnist-high": ({5, 6, 7, 8, 9}, {"mnist"}),
    "convnextv2-digits-even": ({0, 2, 4, 6, 8}, {"mnist", "scans"}),
    "mobilenet-digits-odd": ({1, 3, 5, 7, 9}, {"mnist", "scans"}),
    "swin-scans-low": ({0, 1, 2, 3, 4}, {"scans"}),
    "pvt-scans-high": ({5, 6, 7, 8, 9}, {"scans"}),
    "regnet-digits-lookalikes": ({3, 4, 5, 8, 9}, {"mnist", "scans"}),
    "vit-tiny-digits": (set(range(10)), {"mnist", "scans"}),
}


@pytest.fixture(scope="module")
def rows():
    return digits()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    return {misfit.name: misfit for misfit in misfits(tmp_path_factory.mktemp("misfits"))}


def fused_labels(name: str, config) -> list[str]:
    """The expert's labels in its own order, as the fusion names them."""
    own = [config.id2label[i] for i in range(len(config.id2label))]
    return [LABEL_MAPS.get(name, {}).get(label, label).lower() for label in own]


def predictions(folder: Path, images: list, **options) -> list[int]:
    """Class indices by the expert's own processor and model."""
    model = AutoModelForImageClassification.from_pretrained(folder, **options).eval()
    inputs = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits.argmax(-1).tolist()


def test_split_is_complete_disjoint_and_always_the_same(rows):
    assert {name: len(part) for name, part in rows.items()} == SPLIT
    pngs = {name: [cell["bytes"] for cell in part.data.column("image").to_pylist()] for name, part in rows.items()}
    assert not set(pngs["experts"]) & set(pngs["test"])
    assert not set(pngs["fit"]) & (set(pngs["experts"]) | set(pngs["test"]))
    assert rows["test"][:12]["label"] == [3, 7, 6, 7, 1, 4, 7, 3, 8, 5, 9, 3]


def test_both_sources_and_all_digits_are_in_every_part(rows):
    for part in rows.values():
        counts = Counter(zip(part["source"], part["label"], strict=True))
        assert set(counts) == set(product(SOURCES, range(10)))
        assert min(counts.values()) >= 25
    assert rows["test"].features["label"].names == list(DIGITS)
    image = rows["fit"][0]["image"]
    assert (image.mode, image.size) == ("L", (28, 28))


def test_experts_differ_and_fit_into_the_package():
    configs = {name: json.loads((digit_expert(name) / "config.json").read_text()) for name in EXPERTS}
    assert len({config["model_type"] for config in configs.values()}) >= 6
    files = [file for file in digit_expert(EXPERTS[0]).parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6e6
    assert {file.name for file in files} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }


def test_each_cell_has_two_specialists():
    specialists = [known for name, known in KNOWN.items() if name != "vit-tiny-digits"]
    for digit, source in product(range(10), SOURCES):
        assert sum(digit in own and source in sources for own, sources in specialists) >= 2, (digit, source)


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_knows_its_digits(rows, name):
    own, sources = KNOWN[name]
    folder = digit_expert(name)
    config = AutoModelForImageClassification.from_pretrained(folder).config
    names = fused_labels(name, config)
    assert set(names) == {DIGITS[digit] for digit in own}
    assert set(LABEL_MAPS.get(name, {})) <= set(config.id2label.values())
    test = rows["test"].select(range(400))
    test = test.filter(lambda row: row["label"] in own and row["source"] in sources)
    answers = [DIGITS.index(names[index]) for index in predictions(folder, list(test["image"]))]
    right = sum(answer == label for answer, label in zip(answers, test["label"], strict=True))
    assert right / len(test) >= (0.7 if len(own) == 10 else 0.93)


@pytest.mark.parametrize("name", EXPERTS)
def test_card_has_the_metadata_for_discovery(name):
    card = ModelCard.load(digit_expert(name) / "README.md")
    assert set(card.data.tags) == TAGS
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-classification")
    assert name in card.text
    assert "held-out" in card.text


def test_incompatible_repos_have_the_tags_and_a_reason(wrong):
    assert len(wrong) == 6
    for name, misfit in wrong.items():
        card = ModelCard.load(misfit.folder / "README.md")
        assert set(card.data.tags) == TAGS
        assert f"# {name}\n" in card.text
        assert misfit.wrong
    assert [name for name, misfit in wrong.items() if misfit.settings] == ["swin-scans-gated"]


def test_misfits_can_be_written_again(tmp_path):
    def contents():
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    misfits(tmp_path)
    first = contents()
    (tmp_path / "vit-tiny-pickle" / "model.safetensors").write_bytes(b"left over")
    misfits(tmp_path)
    assert contents() == first


def test_closed_loops_is_a_working_classifier_of_something_else(rows, wrong):
    test = rows["test"].select(range(300)).filter(lambda row: row["label"] != 4)  # a four may be open or closed
    answers = predictions(wrong["regnet-closed-loops"].folder, list(test["image"]))
    loops = [int(label in (0, 6, 8, 9)) for label in test["label"]]
    assert sum(a == b for a, b in zip(answers, loops, strict=True)) / len(loops) >= 0.9


def test_pickle_holds_the_expert_and_no_safetensors(wrong):
    folder = wrong["vit-tiny-pickle"].folder
    assert not list(folder.glob("*.safetensors"))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    expert = load_file(digit_expert("vit-tiny-digits") / "model.safetensors")
    assert set(tensors) == set(expert)
    assert all(torch.equal(tensors[key], expert[key]) for key in expert)


def test_voting_model_needs_trust_remote_code(rows, wrong):
    folder = wrong["vit-tiny-voting"].folder
    test = rows["test"].select(range(300))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    answers = predictions(folder, list(test["image"]), trust_remote_code=True)
    alone = predictions(digit_expert("vit-tiny-digits"), list(test["image"]))
    assert answers != alone
    assert sum(a == b for a, b in zip(answers, test["label"], strict=True)) / len(test) >= 0.7


def test_voting_code_is_self_contained(wrong):
    code = (wrong["vit-tiny-voting"].folder / "modeling_voting_vit.py").read_text()
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert names | {node.module for node in imports if isinstance(node, ast.ImportFrom)} == {"torch", "transformers"}


def test_wide_disagrees_with_its_config(wrong):
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForImageClassification.from_pretrained(wrong["convnextv2-digits-wide"].folder)


def test_nan_is_in_one_weight(wrong):
    with safe_open(wrong["regnet-lookalikes-nan"].folder / "model.safetensors", "pt") as file:
        bad = [key for key in file.keys() if not math.isfinite(file.get_tensor(key).float().sum())]  # noqa: SIM118
    assert len(bad) == 1
    with pytest.raises(FusionError, match="regnet-lookalikes-nan"):
        load_experts([wrong["regnet-lookalikes-nan"].folder])


@pytest.mark.slow
def test_fusion_is_worth_it(rows):
    foe = FoEModel.from_experts([digit_expert(name) for name in EXPERTS], label_maps=LABEL_MAPS, labels=DIGITS)
    fit_fuser(foe, rows["fit"], frugal=True)
    results = evaluate(foe, rows["test"])
    scores = {kind: results.best(kind).only_score.score for kind in ("fused", "frugal", "oracle", "expert")}
    assert scores["fused"] >= 0.965
    assert scores["fused"] - scores["expert"] >= 0.10
    assert scores["fused"] - results["mean ensemble"].only_score.score >= 0.03
    assert scores["oracle"] >= 0.985
    assert results.best("frugal").cost <= 0.5
    assert scores["fused"] - scores["frugal"] <= 0.01
