"""Paths of an expert cannot leave its folder, for each family, base and loader: refused before reading."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from tiny_experts import edit_json, save_adapter, save_bert
from tiny_routed import save_base, save_lora

from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert

INDEX, SINGLE, SHARD = "model.safetensors.index.json", "model.safetensors", "model-00001-of-00001.safetensors"
BIN_INDEX, BIN_SHARD = "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A BERT, two fine-tunes and an adapter; a Llama and two adapters; a secret file."""
    place = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(("base", "one", "two", "secret")):
        save_bert(place / name, seed, card="license: mit")
    save_adapter(place / "yes-no", place / "base", ("no", "yes", "maybe"))
    llama = save_base(place / "llama")
    for seed, name in enumerate(("a", "b")):
        save_lora(place / name, str(llama), seed)
    return place


@pytest.fixture
def folders(made, tmp_path) -> Path:
    """The same, to be changed; adapters stand on the bases that lie beside them."""
    shutil.copytree(made, tmp_path / "x")
    for name, base in (("yes-no", "base"), ("a", "llama"), ("b", "llama")):
        edit_json(tmp_path / "x" / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "x" / base))
    return tmp_path / "x"


def sharded(folder: Path, place: str, pickled: bool = False) -> None:
    """The model in shards, of which one is said to lie elsewhere."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shard, index = (BIN_SHARD, BIN_INDEX) if pickled else (SHARD, INDEX)
    if pickled:
        torch.save(tensors, folder / shard)
    else:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    places = dict.fromkeys(tensors, shard) | {max(tensors): place}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def linked(name: str):
    """A file of the model as a link to that of the secret."""

    def attack(folder: Path) -> str:
        secret = folder.parent / "secret" / name
        if not secret.exists():
            secret.write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        return f"{folder / name} is a link to {secret}, outside the model's folder"

    return attack


def indexed(place: str, pickled: bool = False):
    def attack(folder: Path) -> str:
        (folder / "sub").symlink_to("../secret")
        sharded(folder, place.format(secret=folder.parent / "secret"), pickled)
        return f"{folder.name}: {BIN_INDEX if pickled else INDEX} names .*, which is not a file beside it"

    return attack


def chained(folder: Path) -> str:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("other.safetensors")
    (folder / "other.safetensors").symlink_to("../link")
    (folder.parent / "link").symlink_to("secret/model.safetensors")
    return "is a link to .*secret/model.safetensors, outside the model's folder"


def linked_shard(folder: Path) -> str:
    sharded(folder, SHARD)
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("../secret/model.safetensors")
    return f"{SHARD} is a link to .*secret/model.safetensors, outside the model's folder"


def configured(file: str, **fields):
    def attack(folder: Path) -> str:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        own = json.loads(json.dumps(fields).replace("SECRET", str(folder.parent / "secret")))
        (folder / file).write_text(json.dumps(content | own))
        shutil.copy(folder.parent / "secret" / "tokenizer.json", folder.parent / "secret" / "tokenizer.4.0.0.json")
        return f"{file} has {next(iter(fields))}: .*, which is outside the model's folder"

    return attack


def named(path: str):
    def attack(folder: Path) -> str:
        rows = [{"idx": 0, "name": "0", "path": path.format(secret=folder.parent / "secret"), "type": "x.Transformer"}]
        (folder / "modules.json").write_text(json.dumps(rows))
        return "modules.json names .*, which is not a folder inside the model"

    return attack


def linked_folder(name: str):
    def attack(folder: Path) -> str:
        (folder / name).symlink_to("../secret")
        return f"{name} is a link to another folder"

    return attack


def pipe(name: str):
    def attack(folder: Path) -> str:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return f"{folder.name}/{name} is a pipe, not a file"

    return attack


def endless(name: str):
    def attack(folder: Path) -> str:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")
        return f"{folder.name}/{name} is a device, not a file"

    return attack


def vast(name: str):
    def attack(folder: Path) -> str:
        with (folder / name).open("ab") as stream:
            stream.truncate(1 << 40)  # a hole
        return f"{folder.name}/{name} has 1,099,511,627,776 bytes"

    return attack


SMALL = {
    "card": linked("README.md"),
    "tokenizer": linked("tokenizer.json"),
    "tokenizer's configuration": linked("tokenizer_config.json"),
    "generation": linked("generation_config.json"),
    "code": linked("modeling_x.py"),
    "template": linked("chat_template.jinja"),
    "templates": linked_folder("additional_chat_templates"),
    "tokenizer elsewhere": configured("tokenizer_config.json", fast_tokenizer_files=["SECRET/tokenizer.4.0.0.json"]),
    "vocabulary elsewhere": configured("tokenizer_config.json", vocab_file="SECRET/config.json"),
    "vocabulary read as it is": configured("tokenizer_config.json", vocab="SECRET/config.json"),
    "vocabulary of special tokens": configured("special_tokens_map.json", vocab_file="SECRET/config.json"),
    "positional": configured("tokenizer_config.json", init_inputs=["../secret/config.json"]),
    "module": named("{secret}"),
    "module above": named("../secret"),
    "pipe of a tokenizer": pipe("tokenizer.json"),
    "endless words": endless("vocab.txt"),
    "vast words": vast("vocab.txt"),
}
FULL = SMALL | {
    "absolute": indexed("{secret}/model.safetensors"),
    "above": indexed("../secret/model.safetensors"),
    "above, through a file": indexed("config.json/../../secret/model.safetensors"),
    "link to a folder": indexed("sub/model.safetensors"),
    "windows": indexed("..\\secret\\model.safetensors"),
    "drive": indexed("C:\\secret\\model.safetensors"),
    "NUL": indexed("model\0.safetensors"),
    "another alphabet": indexed("mоdel.safetensors"),
    "pickled": indexed("{secret}/pytorch_model.bin", pickled=True),
    "pickled, above": indexed("../secret/pytorch_model.bin", pickled=True),
    "linked": linked(SINGLE),
    "chained": chained,
    "shard": linked_shard,
    "configuration": linked("config.json"),
    "other weights": configured("config.json", transformers_weights="../secret/model.safetensors"),
    "other weights below": configured("config.json", transformers_weights="sub/model.safetensors"),
    "pipe": pipe(SINGLE),
    "endless": endless(SINGLE),
    "endless configuration": endless("config.json"),
}
ADAPTER = SMALL | {
    "linked": linked("adapter_model.safetensors"),
    "settings": linked("adapter_config.json"),
    "labels": linked("config.json"),
    "gates": linked("phatgoose_gates.safetensors"),
    "pipe": pipe("adapter_model.safetensors"),
    "pipe of gates": pipe("phatgoose_gates.safetensors"),
    "endless": endless("adapter_model.safetensors"),
}


def merged(method, *names, base=None):
    def run(place: Path) -> None:
        experts = tuple(RecipeExpert(str(place / name)) for name in names)
        merge(Recipe(method, experts, base and str(place / base)), place / "out")

    return run


def fused(method, *names, base=None, **options):
    return lambda place: fuse(method, [place / name for name in names], base and place / base, **options)


SHORT = ("absolute", "above", "linked", "tokenizer", "pipe")

# what is done, and the model that is attacked
FULL_ROUTES = {
    "load": (lambda place: load_experts([place / "one"], allow_pickle=True), "one"),
    "foe": (fused("foe", "one", "two", allow_pickle=True), "two"),
    "foe, the base of an adapter": (fused("foe", "one", "yes-no", allow_pickle=True), "base"),
    "wemoe": (fused("wemoe", "one", "two", base="base", allow_pickle=True), "one"),
    "wemoe, its base": (fused("wemoe", "one", "two", base="base", allow_pickle=True), "base"),
    "phatgoose, its base": (fused("phatgoose", "a", "b", allow_pickle=True), "llama"),
    "merge": (merged("linear", "one", "two"), "one"),
    "merge, its base": (merged("task_arithmetic", "one", "two", base="base"), "base"),
    "merge, the base of an adapter": (merged("linear", "one", "yes-no"), "base"),
    "fuse, a merge": (fused("linear", "one", "two"), "two"),
}
ADAPTER_ROUTES = {
    "load": (lambda place: load_experts([place / "a"]), "a"),
    "foe": (fused("foe", "one", "yes-no"), "yes-no"),
    "wemoe": (fused("wemoe", "a", "b"), "b"),
    "phatgoose": (fused("phatgoose", "a", "b"), "b"),
    "merge": (merged("linear", "base", "yes-no"), "yes-no"),
    "merge of adapters": (merged("lora", "a", "b"), "b"),
}


def check(attack, run, folder: Path) -> None:
    place = folder.parent
    reason = attack(folder)
    before = sorted(place.rglob("*"))
    with pytest.raises(FusionError, match=reason) as caught:
        run(place)
    assert caught.value.hint and caught.value.message.isprintable()
    assert sorted(place.rglob("*")) == before


def crossed(routes, attacks):
    """Every attack on the first route and some on all; the rest are slow, being many."""
    first = next(iter(routes))
    return [
        pytest.param(route, attack, marks=() if route == first or attack in SHORT else pytest.mark.slow)
        for route in routes
        for attack in attacks
    ]


@pytest.mark.parametrize(("route", "attack"), crossed(FULL_ROUTES, FULL))
def test_model_with_a_link_outside(route, attack, folders):
    run, name = FULL_ROUTES[route]
    check(FULL[attack], run, folders / name)


@pytest.mark.parametrize(("route", "attack"), crossed(ADAPTER_ROUTES, ADAPTER))
def test_adapter_with_a_link_outside(route, attack, folders):
    run, name = ADAPTER_ROUTES[route]
    check(ADAPTER[attack], run, folders / name)


def test_links_within_a_folder_and_a_linked_folder_are_followed(folders):
    one = folders / "one"
    (one / "weights").mkdir()
    (one / SINGLE).rename(one / "weights" / SINGLE)
    (one / SINGLE).symlink_to("weights/model.safetensors")
    (folders / "named").symlink_to("one")
    [here], [there] = load_experts([folders / "named"]), load_experts([folders / "two"])
    assert torch.equal(here.model.state_dict()["classifier.weight"], load_file(one / SINGLE)["classifier.weight"])
    assert here.processor is not None and there.name == "two"
    merge(Recipe("linear", (RecipeExpert(str(folders / "named")), RecipeExpert(str(folders / "two")))), folders / "out")


# ---------------------------------------------------------------- over HTTP, with the unmodified client


@pytest.mark.parametrize(
    "attack",
    ["absolute", "above", "link to a folder", "windows", "pickled", "other weights", "tokenizer elsewhere", "module"],
)
def test_repo_with_a_link_outside(attack, owner, folders):
    one, repo = folders / "one", f"{owner.name}/one"
    reason = FULL[attack](one).replace("one: ", f"{repo}: ")
    (one / "sub").unlink(missing_ok=True)
    owner.push("one", one)
    with pytest.raises(FusionError, match=reason):
        load_experts([repo], allow_pickle=True, api=owner.api)
    with pytest.raises(FusionError):
        merge(
            Recipe("linear", (RecipeExpert(repo), RecipeExpert(str(folders / "two")))), folders / "out", api=owner.api
        )
    assert not (folders / "out").exists()


@pytest.mark.parametrize("base", ["{place}/secret", "../secret", "me/secret", "./me/secret", "secret"])
def test_the_base_that_an_adapter_on_the_hub_records_is_a_repo(base, owner, folders, monkeypatch):
    """A folder of this machine, absolute or from where this runs, is never read for it."""
    shutil.copytree(folders / "secret", folders / "me" / "secret")
    monkeypatch.chdir(folders)
    repo = f"{owner.name}/yes-no"
    edit_json(folders / "yes-no" / "adapter_config.json", base_model_name_or_path=base.format(place=folders))
    owner.push("yes-no", folders / "yes-no")
    for run in (
        lambda: load_experts([repo], api=owner.api),
        lambda: fuse("linear", [repo, folders / "two"], api=owner.api),
    ):
        with pytest.raises(FusionError, match="(records the base .*|me/secret was not found|secret was not found)"):
            run()


@pytest.mark.parametrize("base", ["{place}/secret", "me/secret"])
def test_the_base_that_a_card_on_the_hub_names_is_a_repo(base, owner, folders, monkeypatch):
    """An expert without a tokenizer borrows that of its base, and never that of a folder here."""
    shutil.copytree(folders / "secret", folders / "me" / "secret")
    monkeypatch.chdir(folders)
    save_bert(folders / "bare", processor=False, card=f"base_model: {base.format(place=folders)}")
    owner.push("bare", folders / "bare")
    with pytest.raises(FusionError, match="(neither a folder nor a repo id|me/secret was not found)"):
        load_experts([f"{owner.name}/bare"], api=owner.api)


def test_snapshot_of_the_client_cache_is_accepted(owner, folders, tmp_path):
    """Wherever the cache lies, and whatever links lead there."""
    owner.push("one", folders / "one")
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to("disk")
    for name in ("config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"):
        file = hf_hub_download(
            f"{owner.name}/one", name, cache_dir=tmp_path / "cache", endpoint=owner.api.endpoint, token=owner.api.token
        )
    assert Path(file).is_symlink()
    snapshot = Path(file).parent
    assert resolve(snapshot).sizes[SINGLE] == (folders / "one" / SINGLE).stat().st_size
    [expert] = load_experts([snapshot])
    assert torch.equal(
        expert.model.state_dict()["classifier.weight"], load_file(folders / "one" / SINGLE)["classifier.weight"]
    )
