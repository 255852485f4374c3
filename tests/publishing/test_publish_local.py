"""Experts in local folders: published by name and hash, or pushed first; local paths are not published."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import make_tokenizer
from tiny_experts import save_adapter, save_bert
from tiny_fused import bert_base, fine_tuned
from tiny_routed import save_base, save_lora

from hf_fusion import FusionError, Recipe, RecipeExpert, fuse, load_fused, merge, save_fused
from hf_fusion.cards.usage import usage_code
from hf_fusion.hub.provenance import hash_folder
from hf_fusion.publishing.plan import plan
from hf_fusion.publishing.publish import check_publish, publish
from hf_fusion.publishing.push import push

KINDS = ("foe", "phatgoose", "wemoe", "linear", "streamed")


@pytest.fixture
def place(tmp_path) -> Path:
    """Where the experts lie."""
    return tmp_path / "experts of mine"


def fused_from(kind: str, place: Path, out: Path) -> Path:
    """A folder with a model of each kind, made of folders that lie in another."""
    if kind == "phatgoose":
        base = save_base(place / "llama")
        folders = [save_lora(place / f"lora-{seed}", str(base), seed) for seed in (0, 1)]
        return save_fused(fuse(kind, folders), out)
    if kind == "wemoe":
        base = bert_base()
        for name, model in {"base": base, "tuned-0": fine_tuned(base, 0), "tuned-1": fine_tuned(base, 1)}.items():
            model.save_pretrained(place / name)
            make_tokenizer().save_pretrained(place / name)
            (place / name / "README.md").write_text("---\nlicense: mit\n---\n")
        model = fuse(kind, [place / "tuned-0", place / "tuned-1"], place / "base", default_task="tuned-1")
        return save_fused(model, out)
    folders = [save_bert(place / f"bert-{seed}", seed, card="license: mit") for seed in (0, 1)]
    if kind == "streamed":
        experts = tuple(RecipeExpert(str(folder), 0.5) for folder in folders)
        return merge(Recipe("linear", experts, dtype="float32"), out).folder
    maps = {"label_maps": {"bert-0": {"maybe": None}}, "labels": ["yes", "no", "maybe"]} if kind == "foe" else {}
    return save_fused(fuse(kind, folders, **maps), out)


def texts_of(owner, repo: str) -> dict[str, bytes]:
    """What a repo holds, by its names."""
    files = owner.api.list_repo_files(repo)
    return {name: Path(owner.api.hf_hub_download(repo, name)).read_bytes() for name in files}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_recorded_by_name_and_hash(kind, owner, place, tmp_path):
    folder = fused_from(kind, place, tmp_path / "fused")
    (folder / "training_args.bin").write_bytes(f"pickled {tmp_path}".encode())  # what a Trainer leaves for itself
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "trainer_state.json").write_text(f'{{"best": "{tmp_path}"}}')
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    planned = plan(folder, f"{owner.name}/mood", api=owner.api)
    done = push(planned, owner.api)
    texts = texts_of(owner, done.repo_id)
    assert not [name for name, text in texts.items() if str(tmp_path).encode() in text]
    recipe = Recipe.from_dict(yaml.safe_load(texts["fusion.yaml"]))
    names = [Path(expert.model) for expert in Recipe.load(folder).experts]
    assert [expert.model for expert in recipe.experts] == [f"{path.name}@{hash_folder(path)}" for path in names]
    card = texts["README.md"].decode()
    for path in names:
        digest = hash_folder(path).removeprefix("sha256:")
        assert f"| {path.name} | a folder, sha256 {digest[:12]}… |" in card
    assert f"/{names[0].name})" not in card
    assert "base_model" not in ModelCard(card).data.to_dict()
    compile(usage_code(card), "usage", "exec")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert publish(folder, done.repo_id, api=owner.api) == done
    if kind != "streamed":  # from memory: the same bytes
        assert publish(load_fused(folder)[0], done.repo_id, api=owner.api).sha == done.sha


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_local_experts_are_pushed_first_with_the_option(kind, owner, place, tmp_path):
    folder = fused_from(kind, place, tmp_path / "fused")
    planned = plan(folder, f"{owner.name}/mood", push_experts=True, api=owner.api)
    names = [Path(expert.model).name for expert in Recipe.load(folder).experts]
    assert not owner.api.repo_exists(f"{owner.name}/{names[0]}")
    assert f"{place / names[0]} → {owner.name}/{names[0]}" in planned.summary()["pushed first"]
    done = push(planned, owner.api)
    texts = texts_of(owner, done.repo_id)
    recipe = Recipe.from_dict(yaml.safe_load(texts["fusion.yaml"]))
    heads = {name: owner.api.model_info(f"{owner.name}/{name}") for name in names}
    assert [expert.model for expert in recipe.experts] == [f"{owner.name}/{n}@{heads[n].sha}" for n in names]
    assert all(info.private for info in heads.values())
    card = texts["README.md"].decode()
    for name in names:
        assert f"[{owner.name}/{name}](/{owner.name}/{name})" in card
        assert not [file for file, text in texts_of(owner, f"{owner.name}/{name}").items() if b"/tmp/" in text]
    assert not [name for name, text in texts.items() if str(tmp_path).encode() in text]
    config = json.loads(texts["config.json"])
    if kind not in ("linear", "streamed"):
        rows = [(row["name"], row["revision"]) for row in config["experts"]]
        assert rows == [(f"{owner.name}/{name}", heads[name].sha) for name in names]
    again = publish(folder, done.repo_id, push_experts=True, api=owner.api)
    assert again == done  # nothing was sent twice
    if kind == "phatgoose":  # an adapter's base came with it, and is what the adapter names now
        files = texts_of(owner, f"{owner.name}/lora-0")
        base = owner.api.model_info(f"{owner.name}/llama")
        adapter = json.loads(files["adapter_config.json"])
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (base.id, base.sha)
        assert config["base"] == {"id": base.id, "revision": base.sha}
    if kind == "wemoe":
        assert config["default_task"] == recipe.parameters["default_task"] == f"{owner.name}/tuned-1"
    remade = (
        fuse(recipe.method, [e.model for e in recipe.experts], recipe.base, api=owner.api, **recipe.parameters)
        if kind in ("foe", "wemoe", "phatgoose")
        else fuse(recipe.method, list(recipe.experts), api=owner.api)
    )
    assert remade.num_parameters() == load_fused(folder)[0].num_parameters()


def test_changed_expert_folder_is_detected(owner, place, tmp_path):
    repo = f"{owner.name}/mood"
    fused = fused_from("foe", place, tmp_path / "fused")
    before = hash_folder(place / "bert-0")
    save_bert(place / "bert-0", 7, card="license: mit")
    publish(fused, repo, api=owner.api)  # the content is that of then
    assert (
        before in owner.api.hf_hub_download(repo, "fusion.yaml")
        or before.encode() in texts_of(owner, repo)["fusion.yaml"]
    )
    with pytest.raises(FusionError, match="bert-0 was changed after the model was made from it"):
        publish(fused, repo, push_experts=True, api=owner.api)
    merged = fused_from("streamed", tmp_path / "others", tmp_path / "merged")
    plan(merged, f"{owner.name}/merged", api=owner.api)
    save_bert(tmp_path / "others" / "bert-1", 9, card="license: mit")
    with pytest.raises(FusionError, match="bert-1 was changed after .*merged was made from it"):
        plan(merged, f"{owner.name}/merged", api=owner.api)
    shutil.rmtree(tmp_path / "others" / "bert-1")
    with pytest.raises(FusionError, match="bert-1, which .*merged was made from, does not exist"):
        plan(merged, f"{owner.name}/merged", api=owner.api)


def test_two_folders_of_one_name_and_repos_that_hold_another(owner, place, tmp_path):
    one, two = (save_bert(tmp_path / side / "same", seed, card="license: mit") for seed, side in enumerate("ab"))
    model = fuse("linear", [one, two])
    assert publish(model, f"{owner.name}/told", api=owner.api) is not None  # contents tell them apart
    with pytest.raises(FusionError, match=f"/same and .*/same would both be pushed to {owner.name}/same"):
        plan(model, f"{owner.name}/mood", push_experts=True, api=owner.api)
    with pytest.raises(FusionError, match="would both be pushed to"):
        check_publish(model.fusion_recipe, f"{owner.name}/mood", push_experts=True, api=owner.api)
    owner.push("bert-0", save_bert(tmp_path / "else", 5))
    fused = fused_from("foe", place, tmp_path / "fused")
    with pytest.raises(
        FusionError, match=f"{owner.name}/bert-0 already contains model.safetensors, and its files differ from"
    ):
        publish(fused, f"{owner.name}/mood", push_experts=True, api=owner.api)
    assert not owner.api.repo_exists(f"{owner.name}/mood")


def test_another_model_is_not_replaced_unasked(owner, place, tmp_path):
    repo = f"{owner.name}/mood"
    fused = fused_from("foe", place, tmp_path / "fused")
    owner.push("mood", save_bert(tmp_path / "else", 5))
    with pytest.raises(
        FusionError, match=f"{repo} already contains another model, which is not a fused model"
    ) as caught:
        plan(fused, repo, api=owner.api)
    assert "--overwrite" in str(caught.value.hint)
    publish(fused, repo, overwrite=True, api=owner.api)
    publish(fused, repo, api=owner.api)
    other = save_fused(fuse("linear", [place / "bert-0", place / "bert-1"]), tmp_path / "other")
    with pytest.raises(FusionError, match="another model, which was made by foe from bert-0, bert-1"):
        plan(other, repo, api=owner.api)


def test_the_content_of_a_folder_is_that_of_sha256sum(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "README.md").write_text("my notes")
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    assert hash_folder(folder) == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    save_adapter(tmp_path / "adapter", folder, ("no", "yes", "maybe"))
    assert hash_folder(tmp_path / "adapter") != hash_folder(folder)


def test_commands_and_data_sets_lose_their_paths(owner, place, tmp_path):
    fused = fused_from("foe", place, tmp_path / "fused")
    results = {
        "dataset": {"name": str(tmp_path / "rows.parquet"), "type": str(tmp_path / "rows.parquet"), "split": "test"},
        "n": 10,
        "metric": "accuracy",
        "systems": [{"name": "FoE", "kind": "foe", "score": 0.9, "ci95": [0.8, 1.0], "cost": 1.0}],
        "command": f"hf-fusion eval {fused} --data {tmp_path}/rows.parquet --split test",
    }
    (fused / "results.json").write_text(json.dumps(results))
    card = plan(fused, f"{owner.name}/mood", api=owner.api).card
    assert "`hf-fusion eval fused --data rows.parquet --split test`" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in plan(fused, f"{owner.name}/mood", results=results, api=owner.api).card
