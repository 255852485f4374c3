"""Paths of a fused model cannot leave its folder or repo: when loaded, loaded by its class, or published."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_experts import edit_json, save_bert
from tiny_routed import save_base, save_lora

from hf_fusion import FoEModel, PhatgooseRouter, WEMoEModel
from hf_fusion.cards.card import write_card
from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, load_fused, save_fused
from hf_fusion.hub.provenance import hash_folder
from hf_fusion.merging.merge import merge
from hf_fusion.models.processing_foe import FoEProcessor
from hf_fusion.publishing.publish import publish
from hf_fusion.recipe import Recipe, RecipeExpert

INDEX, SINGLE, SHARD = "model.safetensors.index.json", "model.safetensors", "model-00001-of-00001.safetensors"
CLASSES = {"foe": FoEModel, "phatgoose": PhatgooseRouter, "wemoe": WEMoEModel}
FAMILIES = (*CLASSES, "linear")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A fused model of each family and a static merge, with what they were made of."""
    place = tmp_path_factory.mktemp("fused")
    for seed, name in enumerate(("base", "one", "two", "secret")):
        save_bert(place / name, seed, card="license: mit")
    llama = save_base(place / "llama")
    for seed, name in enumerate(("a", "b")):
        save_lora(place / name, str(llama), seed)
    save_fused(fuse("foe", [place / "one", place / "two"]), place / "foe")
    save_fused(fuse("wemoe", [place / "one", place / "two"], place / "base"), place / "wemoe")
    save_fused(fuse("phatgoose", [place / "a", place / "b"]), place / "phatgoose")
    merge(Recipe("linear", (RecipeExpert(str(place / "one")), RecipeExpert(str(place / "two")))), place / "linear")
    return place


@pytest.fixture
def folders(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "x"))


def indexed(place: str):
    def attack(folder: Path) -> str:
        (folder / "sub").symlink_to("../secret")
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        save_file(tensors, folder / SHARD, metadata={"format": "pt"})
        places = dict.fromkeys(tensors, SHARD) | {max(tensors): place.format(secret=folder.parent / "secret")}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
        return f"{INDEX} names .*, which is not a file beside it"

    return attack


def linked(name: str):
    def attack(folder: Path) -> str:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "secret" / SINGLE)
        return f"{name} is a link to .*secret/{SINGLE}, outside"

    return attack


def pipe(name: str):
    def attack(folder: Path) -> str:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return f"{name}'? is a pipe"

    return attack


def weighted(folder: Path) -> str:
    edit_json(folder / "config.json", transformers_weights="../secret/model.safetensors")
    return "config.json (has transformers_weights|names the weights)"


def tokenized(folder: Path) -> str:
    shutil.copy(folder.parent / "secret" / "tokenizer.json", folder.parent / "secret" / "tokenizer.4.0.0.json")
    edit_json(
        folder / "tokenizer_config.json", fast_tokenizer_files=[str(folder.parent / "secret" / "tokenizer.4.0.0.json")]
    )
    return "tokenizer_config.json has fast_tokenizer_files: .*, which is outside the model's folder"


def worded(folder: Path) -> str:
    """A tokenizer that is made of a file's lines, and would be saved with them."""
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", vocab=str(folder.parent / "secret" / "config.json"))
    return "tokenizer_config.json has vocab: .*, which is outside the model's folder"


def mapped(folder: Path) -> str:
    """The same by the map of special tokens, which wins over the model's own files."""
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    named = {"vocab_file": str(folder.parent / "secret" / "config.json")}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    return "special_tokens_map.json has vocab_file: .*, which is outside the model's folder"


ATTACKS = {
    "words of special tokens": mapped,
    "words elsewhere": worded,
    "absolute": indexed("{secret}/model.safetensors"),
    "above": indexed("../secret/model.safetensors"),
    "link to a folder": indexed("sub/model.safetensors"),
    "windows": indexed("..\\secret\\model.safetensors"),
    "linked": linked(SINGLE),
    "configuration": linked("config.json"),
    "tokenizer": linked("tokenizer.json"),
    "pipe": pipe("vocab.txt"),
    "other weights": weighted,
    "tokenizer elsewhere": tokenized,
}


@pytest.mark.long
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_folder_with_a_link_outside(family, attack, folders):
    reason = ATTACKS[attack](folders / family)
    with pytest.raises(FusionError, match=reason):
        load_fused(folders / family)
    with pytest.raises(FusionError, match=reason):
        publish(folders / family, "me/fused")  # refused before the Hub is asked


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("family", CLASSES)
def test_family_class_refuses_it_without_this_package(family, attack, folders):
    """As where it was published to, without this package's checks."""
    reason = ATTACKS[attack](folders / family)
    with pytest.raises(ValueError, match=reason):
        _ = CLASSES[family].from_pretrained(folders / family).processor


@pytest.mark.parametrize("name", ["../secret", "{place}/secret", "processor_0/../../secret", ".."])
def test_processor_outside_the_folder_is_refused(name, folders):
    edit_json(folders / "foe" / "processor_config.json", folders=[name.format(place=folders)])
    with pytest.raises(FusionError, match="processor_config.json names .*, which is not a folder inside the model"):
        load_fused(folders / "foe")
    with pytest.raises(ValueError, match="processor_config.json (names .*not a folder within|has folders: .*outside)"):
        FoEProcessor.from_pretrained(folders / "foe")


def test_a_processors_folder_that_is_a_link(folders):
    (folders / "foe" / "processor_0").symlink_to("../secret")
    edit_json(folders / "foe" / "processor_config.json", folders=["processor_0"])
    with pytest.raises(FusionError, match="processor_0 is a link to another folder"):
        load_fused(folders / "foe")
    with pytest.raises(ValueError, match="processor_0 is a link to another folder"):
        FoEProcessor.from_pretrained(folders / "foe")


# ---------------------------------------------------------------- what is published


@pytest.mark.parametrize("name", ["README.md", "notes.bin", "pictures/one.png", "fusion.yaml", "results.json"])
@pytest.mark.parametrize("family", ["foe", "linear"])
def test_a_link_out_of_a_folder_is_not_published(family, name, owner, folders):
    file = folders / family / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    (folders / "secret.txt").write_text("secret")
    file.symlink_to(folders / "secret.txt")
    for model in (folders / family, str(folders / family)):
        with pytest.raises(FusionError, match=f"{name} is a link to .*secret.txt, outside"):
            publish(model, f"{owner.name}/fused", api=owner.api)
    assert not owner.api.repo_exists(f"{owner.name}/fused")


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "extra.txt"])
def test_a_link_out_of_an_expert_is_not_pushed_with_it(name, owner, folders):
    """It was made a link after the model was fused."""
    model = fuse("foe", [folders / "one", folders / "two"])
    (folders / "secret.txt").write_text("secret")
    (folders / "one" / name).unlink(missing_ok=True)
    (folders / "one" / name).symlink_to(folders / "secret.txt")
    with pytest.raises(FusionError, match=f"{name} is a link to .*secret.txt, outside"):
        publish(model, f"{owner.name}/fused", push_experts=True, api=owner.api)
    assert not owner.api.repo_exists(f"{owner.name}/fused") and not owner.api.repo_exists(f"{owner.name}/one")


def test_a_folder_without_a_model_is_not_pushed(owner, folders):
    """A recipe that came with a model may name any folder of this machine."""
    private = folders / "private"
    private.mkdir()
    (private / "notes.txt").write_text("secret")
    recipe = Recipe.load(folders / "linear")
    Recipe("linear", (*recipe.experts[:1], RecipeExpert(str(private)))).save(folders / "linear" / "fusion.yaml")
    with pytest.raises(FusionError, match="private has no weights"):
        publish(folders / "linear", f"{owner.name}/fused", push_experts=True, license="mit", api=owner.api)
    assert not list(owner.api.list_models(author=owner.name))


def test_a_folders_content_is_not_that_of_a_link(folders):
    (folders / "one" / SINGLE).unlink()
    (folders / "one" / SINGLE).symlink_to("../secret/model.safetensors")
    with pytest.raises(FusionError, match="outside the model's folder"):
        hash_folder(folders / "one")


def test_card_is_not_written_through_a_link(folders):
    (folders / "secret.txt").write_text("secret")
    (folders / "linear" / "README.md").symlink_to("../secret.txt")
    with pytest.raises(FusionError, match="README.md is a link to .*secret.txt, outside"):
        write_card(folders / "linear")
    assert (folders / "secret.txt").read_text() == "secret"


# ---------------------------------------------------------------- from the Hub, without this package's checks

LOADED = """
import sys
from transformers import AutoModel, AutoProcessor
for _ in range(2):  # from the Hub, and from its cache
    try:
        model = AutoModel.from_pretrained(sys.argv[1], revision=sys.argv[2], trust_remote_code=True)
        model.save_pretrained("saved")
        print("LOADED")
    except ValueError as error:
        print("REFUSED", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
def test_published_model_with_a_link_outside(family, hub, owner, folders, fresh_python, tmp_path):
    """A pinned revision is looked for in the cache first, where a path that is absolute leads anywhere."""
    indexed("{secret}/model.safetensors")(folders / family)
    (folders / family / "sub").unlink()
    owner.push("fused", folders / family)
    sha = owner.api.model_info(f"{owner.name}/fused").sha
    code = LOADED.replace("sys.argv[1]", f'"{owner.name}/fused"').replace("sys.argv[2]", f'"{sha}"')
    done = fresh_python(code, hub)
    assert done.stdout.count("REFUSED") == 2 and "which is not a file beside it" in done.stdout, done.stdout
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("base", ["{place}/llama", "../x/llama", "me/llama", "./me/llama", 3])
def test_a_base_by_reference_is_a_repo(base, folders, monkeypatch):
    """What is held by reference lies on the Hub: it is not read from a folder here."""
    monkeypatch.chdir(folders)
    shutil.copytree(folders / "llama", folders / "me" / "llama")
    named = base.format(place=folders) if isinstance(base, str) else base
    edit_json(folders / "phatgoose" / "config.json", base_by_reference=True, base={"id": named, "revision": "0" * 40})
    for load in (load_fused, PhatgooseRouter.from_pretrained):
        with pytest.raises((FusionError, ValueError), match=r"(no id on the Hub|here is a folder of that name|base)"):
            load(folders / "phatgoose")


def test_a_base_that_cannot_be_reached_is_told(folders, hub, fresh_python):
    """The folder is whole: making it again would not help."""
    edit_json(folders / "phatgoose" / "config.json", base_by_reference=True, base={"id": "a/b", "revision": "0" * 40})
    code = f"""
from hf_fusion import FusionError
from hf_fusion.fusion import load_fused
try:
    load_fused({str(folders / "phatgoose")!r})
except FusionError as error:
    print(error.message, "|", error.hint)
"""
    told = fresh_python(code, hub, HF_HUB_OFFLINE="1").stdout
    assert "phatgoose cannot be loaded: " in told
    assert told.endswith("| its base is downloaded from the Hub: check the network and HF_ENDPOINT\n")
