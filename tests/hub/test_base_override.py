"""A base given by the caller replaces the recorded one, which is then not requested."""

from __future__ import annotations

import io
import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_experts import BERT, edit_json, save_adapter, save_bert, save_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_fusion.cli.app import build_parser, command
from hf_fusion.cli.output import Out
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.fusion import fuse, load_fused, save_fused
from hf_fusion.hub.load import load_experts
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.merge import merge, plan_merge
from hf_fusion.publishing.publish import publish
from hf_fusion.recipe import Recipe, RecipeExpert

IDS = torch.arange(8).reshape(2, 4)
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Place:
    """Adapters on the Hub, the base that they are put on, and what is asked for meanwhile."""

    def __init__(self, hub, owner, folder):
        self.hub, self.owner, self.api, self.folder = hub, owner, owner.api, folder
        self.base = folder / "base"
        self.sha = owner.push("base", self.base)
        self.id = f"{owner.name}/base"
        self.adapters = [folder / "one", folder / "two"]

    def push(self, recorded, revision=None):
        """The adapters, recording this base; their ids."""
        for own in self.adapters:
            edit_json(own / "adapter_config.json", base_model_name_or_path=recorded, revision=revision)
            self.owner.push(own.name, own)
        self.hub.requests.clear()
        return [f"{self.owner.name}/{own.name}" for own in self.adapters]

    def asked(self, name):
        return [path for _, path, _ in self.hub.requests if f"/{name}" in path]

    def peft(self, number=0):
        base = AutoModelForSequenceClassification.from_pretrained(self.base)
        return PeftModel.from_pretrained(base, self.adapters[number]).merge_and_unload().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and two adapters of it."""
    folder = tmp_path_factory.mktemp("saved")
    save_bert(folder / "base")
    for seed, name in enumerate(("one", "two")):
        save_adapter(folder / name, folder / "base", labels=("no", "yes", "maybe"), seed=seed)
    return folder


@pytest.fixture
def place(hub, owner, saved, tmp_path):
    return Place(hub, owner, shutil.copytree(saved, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs a command in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        args = build_parser(words[0]).parse_args(words)
        command(args.command).run(args, Out(args.format, io.StringIO(), io.StringIO()))

    return run


def quantised(place, folder):
    save_bert(folder, seed=9)
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    place.owner.push("other", folder)


def gated(place, folder):
    place.owner.push("other", save_bert(folder, seed=9))
    place.api.update_repo_settings(f"{place.owner.name}/other", gated="manual")


def renamed(place, folder):
    place.owner.push("former", save_bert(folder, seed=9))
    place.api.move_repo(f"{place.owner.name}/former", f"{place.owner.name}/other")


# what adapters record -> what has to be there for that
RECORDED = {
    "missing": ("{owner}/other", lambda place, folder: None),
    "quantised": ("{owner}/other", quantised),
    "private": ("{owner}/other", lambda place, folder: place.owner.push("other", save_bert(folder, 9), private=True)),
    "gated": ("{owner}/other", gated),
    "renamed": ("{owner}/other", renamed),
    "another": ("{owner}/other", lambda place, folder: place.owner.push("other", save_bert(folder, seed=9))),
    "a path of its author": ("/home/somebody/other", lambda place, folder: None),
    "an older revision": ("{owner}/base", lambda place, folder: None),
    "nothing": ("", lambda place, folder: None),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", RECORDED)
def test_base_overrides_whatever_is_recorded(place, anyone, kind, tmp_path, caplog):
    name, make = RECORDED[kind]
    make(place, tmp_path / "other")
    revision = "0" * 40 if kind == "an older revision" else None
    ids = place.push(name.format(owner=place.owner.name), revision)
    with caplog.at_level(logging.WARNING, "hf_fusion"):
        model = fuse("linear", ids, place.id, api=anyone)
    expected = [place.peft(number).state_dict() for number in (0, 1)]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (expected[0][key] + expected[1][key]) / 2, rtol=1e-6, atol=1e-7)
    assert not place.asked("other") and not place.asked("former")
    assert model.fusion_recipe.base == f"{place.id}@{place.sha}"
    told = [record.getMessage() for record in caplog.records if "recorded base" in record.getMessage()]
    if kind == "nothing":
        assert not told
    else:  # once, for both
        [line] = told
        recorded = name.format(owner=place.owner.name) + (f"@{revision}" if revision else "")
        assert line == f"{', '.join(ids)}: the recorded base is {recorded}, but {place.id}@{place.sha} is used"
    again = fuse("linear", ids, model.fusion_recipe.base, api=anyone)  # as the recipe has it
    assert again.fusion_recipe == model.fusion_recipe
    assert not place.asked("other")


PARAMETERS = {"slerp": {"t": 0.5}, "nuslerp": {"weight": 1.0}}


@pytest.mark.long
@pytest.mark.parametrize("method", ["linear", "slerp", "karcher", "nuslerp", "task_arithmetic", "ties"])
def test_static_methods(place, method, tmp_path):
    """As if the adapters recorded it: the same bytes."""
    sources = place.push(place.id)
    parameters = PARAMETERS.get(method, {})
    needed = method in ("task_arithmetic", "ties", "nuslerp")
    recipe = Recipe(method, tuple(map(RecipeExpert, sources)), place.id if needed else None, parameters)
    expected = merge(recipe, tmp_path / "expected", api=place.api).folder
    place.push("nobody/other")
    ours = merge(Recipe(method, recipe.experts, place.id, parameters), tmp_path / "out", api=place.api)
    assert not place.asked("other")
    for file in ("model.safetensors", "config.json"):
        assert (ours.folder / file).read_bytes() == (expected / file).read_bytes()
    assert ours.recipe.base == f"{place.id}@{place.sha}" == Recipe.load(ours.folder).base


def test_checkpoint_without_adapters_is_refused_before_download(place):
    place.hub.requests.clear()
    with pytest.raises(FusionError, match="is not needed: no expert is an adapter"):
        plan_merge(Recipe("linear", (RecipeExpert(place.id),), "nobody/other"), place.api)
    assert not place.asked("other") and not [path for _, path, _ in place.hub.requests if "resolve" in path]


def test_base_before_a_plus_applies_to_that_adapter_only(place, tmp_path, caplog):
    one, two = place.push("nobody/other")
    place.owner.push("third", save_bert(tmp_path / "third", seed=5))
    experts = (RecipeExpert(f"{place.owner.name}/third+{one}"), RecipeExpert(two))
    with caplog.at_level(logging.WARNING, "hf_fusion"):
        planned = plan_merge(Recipe("linear", experts, place.id), place.api)
    planned.files.close()
    assert [model.adapter.base.partition("@")[0] for model in planned.experts] == [
        f"{place.owner.name}/third",
        place.id,
    ]
    [record] = [r for r in caplog.records if "recorded base" in r.getMessage()]  # of the other alone
    assert record.getMessage().startswith(f"{two}: the recorded base is nobody/other")


@pytest.mark.parametrize("method", ["linear", "lora", "foe"])
def test_impossible_value_is_refused_by_name(place, method, tmp_path):
    ids = place.push(place.id)
    wide = BertConfig(vocab_size=8, **WIDE, id2label=BERT.id2label, label2id=BERT.label2id)
    place.owner.push("wide", save_bert(tmp_path / "wide", config=wide))
    recipe = Recipe(method, tuple(map(RecipeExpert, ids)), f"{place.owner.name}/wide")
    with pytest.raises(FusionError, match=r"one.*query.*24.*16"):
        if method == "foe":
            fuse("foe", ids, recipe.base, api=place.api)
        else:
            merge(recipe, tmp_path / "out", api=place.api)
    assert not (tmp_path / "out").exists()


def test_adapters_as_one(place, tmp_path, caplog):
    ids = place.push("nobody/other")
    recipe = Recipe("lora", tuple(map(RecipeExpert, ids)), place.id, {"weight": 0.5})
    with caplog.at_level(logging.WARNING, "hf_fusion"):
        report = merge(recipe, tmp_path / "out", api=place.api)
    assert report.recipe.base == f"{place.id}@{place.sha}"
    assert not place.asked("other") and not [p for p in place.asked("base") if p.endswith("LFS")]
    assert "the recorded base is nobody/other, but" in caplog.text
    base = AutoModelForSequenceClassification.from_pretrained(place.base)
    ours = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    one, two = (place.peft(number).state_dict() for number in (0, 1))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, (one[key] + two[key]) / 2, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "adapter_config.json").read_text().count(place.sha) == 1


FAMILIES = {
    "foe": {"mode": "output"},
    "ensemble": {},
    "wemoe": {},
    "phatgoose": {"missing_gates": "arrow"},
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "given"),
    [*((method, "id") for method in FAMILIES), ("phatgoose", "folder"), ("wemoe", "folder"), ("foe", "model")],
)
def test_families(place, method, given, tmp_path, caplog):
    folder = str(place.base)
    base = {
        "id": f"{place.id}@{place.sha}",
        "folder": folder,
        "model": AutoModelForSequenceClassification.from_pretrained(folder),
    }[given]
    for number, own in enumerate(place.adapters):
        labels = ("no", "yes", "maybe")
        # one head for all where linears are routed; linears of an MLP where these are
        options = {"phatgoose": {"seed": 3}, "wemoe": {"target_modules": ["intermediate.dense"]}}.get(method, {})
        save_adapter(own, place.base, **{"labels": labels, "seed": number, **options})
        save_tokenizer(own)  # a base in memory has none
    ids = place.push("nobody/other")
    with caplog.at_level(logging.WARNING, "hf_fusion"):
        model = fuse(method, ids, base, api=place.api, **FAMILIES[method])
    assert not place.asked("other")
    used = f"{place.id}@{place.sha}" if given == "id" else folder
    [record] = [r for r in caplog.records if "recorded base" in r.getMessage()]
    assert record.getMessage() == f"{', '.join(ids)}: the recorded base is nobody/other, but {used} is used"
    assert model.fusion_recipe.base == used
    save_fused(model, tmp_path / "fused")
    read, recipe = load_fused(tmp_path / "fused")
    assert recipe.base == used
    if method in ("phatgoose", "wemoe"):
        assert read.config.base["id"] in (used.partition("@")[0], place.base.name)  # WEMoE: no path of this machine


def test_loaded_experts_record_their_base(place):
    ids = place.push("nobody/other", "1" * 40)
    [expert] = load_experts(ids[:1], base=place.id, api=place.api)
    assert (expert.adapter.base, expert.adapter.base_revision) == (place.id, place.sha)
    start = load_experts([place.id], api=place.api)[0]
    [expert] = load_experts(ids[:1], base=start, api=place.api)  # a base that was loaded
    assert (expert.adapter.base, expert.adapter.base_revision) == (place.id, place.sha)
    assert expert.model is start.model


@pytest.mark.long
@pytest.mark.parametrize("method", ["linear", "foe", "phatgoose"])
def test_published_with_the_base_that_was_used(place, method, tmp_path):
    """Its card names that base, and nothing that was recorded."""
    for own in place.adapters:
        save_adapter(own, place.base, labels=("no", "yes", "maybe"), seed=3)
        (own / "README.md").write_text("---\nlicense: mit\n---\n")
    ids = place.push("nobody/other")
    ids = [f"{name}@{place.api.model_info(name).sha}" for name in ids]
    options = {**FAMILIES.get(method, {}), **({"base_by_reference": True} if method == "phatgoose" else {})}
    model = fuse(method, ids, place.id, api=place.api, **options)
    folder = save_fused(model, tmp_path / "fused")
    done = publish(folder, f"{place.owner.name}/fused", api=place.api, license="mit")
    card = ModelCard.load(place.api.hf_hub_download(done.repo_id, "README.md"))
    text = json.dumps(card.data.to_dict()) + card.text
    assert place.id in card.data.to_dict()["base_model"] and "nobody/other" not in text
    assert not place.asked("other")
    if method == "phatgoose":
        assert read_json(folder / "config.json", "it")["base"] == {"id": place.id, "revision": place.sha}


def test_measured_on_the_base_that_was_used(place, tmp_path):
    ids = place.push("nobody/other")
    model = fuse("linear", ids, place.id, api=place.api)
    rows = Dataset.from_dict({"text": ["good film", "bad film"] * 4, "label": [0, 1] * 4})
    results = evaluate(model, {"mood": rows}, experts=ids, base=place.id, owners={"mood": ids[0]}, api=place.api)
    assert {predictor.kind for predictor in results.predictors} == {"fused", "expert", "base"}
    assert not place.asked("other")


def test_from_the_command_line(place, here, caplog, tmp_path):
    """Of folders, and of a recipe that names another base; what a recipe has itself is not taken from --set."""
    for own in place.adapters:
        edit_json(own / "adapter_config.json", base_model_name_or_path="nobody/other")
    names = [str(own) for own in place.adapters]
    here("fuse", "--method", "linear", "--experts", *names, "--base", str(place.base), "-o", "first")
    assert Recipe.load(tmp_path / "first").base == str(place.base)
    Recipe("linear", tuple(map(RecipeExpert, names)), "nobody/nothing").save(tmp_path / "recipe.yaml")
    here("fuse", "recipe.yaml", "--base", str(place.base), "-o", "second", "--dtype", "float32")
    for file in ("model.safetensors", "fusion.yaml"):
        ours = (tmp_path / "second" / file).read_bytes().replace(b"dtype: float32\n", b"")
        assert ours == (tmp_path / "first" / file).read_bytes()
    with pytest.raises(FusionError, match="--set needs --method"):
        here("fuse", "recipe.yaml", "--set", "normalize=false", "-o", "third")
