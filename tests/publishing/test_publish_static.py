"""Publishing static merges: from ids on the Hub to a repo with a card that documents the merge."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from tiny import gpt2, make_tokenizer, vit
from tiny_experts import BERT, save_adapter, save_bert
from transformers import AutoModel, AutoModelForMaskedLM, ViTImageProcessor

import hf_fusion
from hf_fusion.cards.card import BEGIN, write_card
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, load_fused
from hf_fusion.merging.merge import merge
from hf_fusion.publishing.plan import plan
from hf_fusion.publishing.publish import check_publish, publish
from hf_fusion.recipe import Recipe, RecipeExpert

TEXTS = ["good film", "bad bad film"]
WITHOUT_PACKAGE = "import sys\nsys.modules['hf_fusion'] = None\n"  # its import fails
RESULTS = {
    "tasks": [{"name": "moods", "metric": "accuracy", "n": 1000, "owner": "me/one"}],
    "systems": [
        {"name": "merged", "kind": "merged", "scores": {"moods": {"score": 0.9, "ci95": [0.88, 0.92]}}, "means": {}},
        {"name": "me/one", "kind": "expert", "scores": {"moods": {"score": 0.95, "ci95": [0.93, 0.96]}}, "means": {}},
        {"name": "base", "kind": "base", "scores": {}, "means": {}},
    ],
    "command": "hf-fusion eval merged --data moods.parquet",
}


@pytest.fixture
def ids(owner, tmp_path):
    """A base and two fine-tunes of it on the Hub, with their licences."""
    licenses = {"base": "apache-2.0", "one": "mit", "two": "apache-2.0"}
    for seed, (name, license_id) in enumerate(licenses.items()):
        owner.push(name, save_bert(tmp_path / name, seed, card=f"license: {license_id}"))
    return [f"{owner.name}/{name}" for name in licenses]


@pytest.fixture
def recipe(ids):
    base, one, two = ids
    experts = (RecipeExpert(one, 1.0, {"density": 0.4}), RecipeExpert(two, 0.5, {"density": 0.6}))
    return Recipe("ties", experts, base, {"scaling": 0.8})


def test_published_merge_loads_anywhere_and_its_recipe_makes_the_same_bytes(hub, owner, recipe, tmp_path, fresh_python):
    merge(recipe, tmp_path / "merged", api=owner.api)
    done = publish(tmp_path / "merged", f"{owner.name}/mood", api=owner.api)
    usage = usage_code(Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text())
    assert f'"{done.repo_id}", "{done.sha}"' in usage
    assert "trust_remote_code" not in usage
    out = fresh_python(
        f"{WITHOUT_PACKAGE}{usage}\nimport json\n"
        f"inputs = processor({TEXTS!r}, return_tensors='pt', padding=True)\n"
        "print(json.dumps([inputs['input_ids'].tolist(), model(**inputs).logits.tolist()]))\n",
        hub,
        hub.token(owner.name),
    ).stdout
    answer, found = out.strip().splitlines()[-2:]
    assert answer in ("['no']", "['yes']", "['maybe']")
    tokens, logits = json.loads(found)
    model, _ = load_fused(tmp_path / "merged")
    with torch.no_grad():
        assert model(torch.tensor(tokens), torch.tensor(tokens) > 0).logits.tolist() == logits  # bitwise
    remote = owner.api.hf_hub_download(done.repo_id, "fusion.yaml", revision=done.sha)
    again = merge(Recipe.load(remote), tmp_path / "again", api=owner.api)
    for file in again.folder.iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes(), file.name
        assert file.read_bytes() == Path(owner.api.hf_hub_download(done.repo_id, file.name)).read_bytes(), file.name


def test_card_shows_experts_method_and_results(owner, ids, recipe, tmp_path):
    folder = merge(recipe, tmp_path / "merged", api=owner.api).folder
    done = publish(folder, f"{owner.name}/mood", results=RESULTS, api=owner.api)
    text = Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text()
    card = ModelCard(text)
    assert pinned_revision(text) == done.sha
    assert card.data.tags == ["hf-fusion", "merge", "ties"]
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-classification")
    assert card.data.base_model == [ids[1], ids[2], ids[0]]
    assert (card.data.eval_results[0].metric_value, len(card.data.eval_results)) == (0.9, 1)
    shas = [owner.api.model_info(name).sha for name in ids]
    for name, sha, own in zip(ids[1:], shas[1:], ("1.0 | 0.4", "0.5 | 0.6"), strict=True):
        line = rf"^\| \[{name}\]\(/{name}\) \| \[{sha[:7]}\]\(/{name}/tree/{sha}\) \|.*\| {own} \|$"
        assert re.search(line, text, re.MULTILINE), line
    assert f"(/{ids[0]}/tree/{shas[0]})" in text
    assert "The method is called [TIES](https://arxiv.org/abs/2306.01708); as a formula: θ0 + λ" in text
    assert "| scaling | 0.8 |  |" in text
    assert "| merge | mean | default |" in text
    assert re.search(r"^\| moods \| 1,000 \| 90.0\W+88.0\W+92.0\) \| 95.0\W+93.0\W+96.0\)", text, re.MULTILINE)
    assert "density: 0.6" in text
    assert "trust_remote_code" not in usage_code(text)
    assert "**No code of this repo runs.** transformers has all that this model needs" in text
    tags = owner.api.model_info(done.repo_id).tags
    assert {"hf-fusion", "merge", "ties", f"base_model:merge:{ids[1]}"} <= set(tags)


def test_merge_in_memory_is_published(owner, ids, tmp_path):
    model = fuse("linear", ids[1:], weights=[1, 3], api=owner.api)
    done = publish(model, f"{owner.name}/mood", api=owner.api)
    files = owner.api.list_repo_files(done.repo_id)
    assert {"config.json", "model.safetensors", "tokenizer.json", "fusion.yaml", "README.md"} <= set(files)
    assert not [file for file in files if file.endswith(".py")]
    streamed = merge(Recipe.load(owner.api.hf_hub_download(done.repo_id, "fusion.yaml")), tmp_path / "m", api=owner.api)
    weights = Path(owner.api.hf_hub_download(done.repo_id, "model.safetensors")).read_bytes()
    assert weights == (streamed.folder / "model.safetensors").read_bytes()
    assert publish(streamed.folder, done.repo_id, api=owner.api).repo_id == done.repo_id
    loose = fuse("linear", [load_fused(streamed.folder)[0], ids[1]], api=owner.api)
    with pytest.raises(FusionError, match="not pinned to a commit on the Hub: expert-0"):
        publish(loose, f"{owner.name}/loose", api=owner.api)


def test_a_base_with_an_adapter_counts_with_both(owner, ids, tmp_path):
    three = ("a", "b", "c")
    save_adapter(tmp_path / "adapter", tmp_path / "base", three, base_name="elsewhere/base")
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    owner.push("adapter", tmp_path / "adapter")
    recipe = Recipe("linear", (RecipeExpert(f"{ids[0]}+{owner.name}/adapter"), RecipeExpert(ids[1])))
    merged = merge(recipe, tmp_path / "merged", api=owner.api)
    planned = plan(merged.folder, f"{owner.name}/mood", api=owner.api)
    assert planned.license == "gpl-3.0"
    assert [info.id for info in planned.experts] == [f"{owner.name}/adapter", ids[1]]
    owner.api.update_repo_settings(ids[0], private=True)
    with pytest.raises(FusionError, match=f"private or gated experts: {ids[0]}"):
        plan(merged.folder, f"{owner.name}/open", private=False, api=owner.api)


def test_unpublishable_recipe_is_refused_before_the_merge(hub, owner, anyone, ids, recipe, tmp_path):
    mine = f"{owner.name}/mood"
    check_publish(recipe, mine, api=owner.api)
    check_publish(recipe, ids[0], overwrite=True, api=owner.api)  # a repo that is there
    check_publish(replace(recipe, base=str(tmp_path / "base")), mine, api=owner.api)
    assert not owner.api.repo_exists(mine)
    stranger = HfApi(endpoint=hub.endpoint, token=hub.token(f"not-{owner.name}"))
    owner.api.create_repo(f"{owner.name}/shown", private=False)
    owner.push("closed", save_bert(tmp_path / "closed", card="license: mit"), private=True)
    owner.push("silent", save_bert(tmp_path / "silent"))
    closed = replace(recipe, base=f"{owner.name}/closed")
    check_publish(closed, mine, api=owner.api)
    for of, where, api, message in [
        (recipe, mine, anyone, "needs a token"),
        (recipe, mine, HfApi(endpoint=hub.endpoint, token="hf_nobody"), "was refused by the Hub"),
        (recipe, mine, stranger, f"{mine} cannot be created by not-{owner.name}"),
        (recipe, ids[0], stranger, f"{ids[0]} was refused by the Hub .*no write access"),
        (recipe, "mood", owner.api, "'mood' is not a repo id"),
        (recipe, f"{owner.name}/-mood--", owner.api, "is not a valid repo id"),
        (closed, f"{owner.name}/shown", owner.api, "shown is public.*/closed"),
        (replace(recipe, base=f"{owner.name}/silent"), mine, owner.api, "cannot be determined from: .*silent"),
        (recipe, ids[0], owner.api, f"{ids[0]} already contains another model, which is not a fused model"),
        (replace(recipe, base=f"{owner.name}/gone"), mine, owner.api, "gone was not found"),
    ]:
        with pytest.raises(FusionError, match=message):
            check_publish(of, where, api=api)
    check_publish(replace(recipe, base=f"{owner.name}/silent"), mine, license="mit", api=owner.api)


@pytest.mark.slow
def test_merged_adapter_is_published_as_an_adapter(hub, owner, ids, tmp_path, fresh_python):
    names = []
    for seed, name in enumerate(("first", "second")):
        base = {"base_name": ids[0], "revision": owner.api.model_info(ids[0]).sha}
        save_adapter(tmp_path / name, tmp_path / "base", ("no", "yes", "maybe"), seed, **base)
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
        owner.push(name, tmp_path / name)
        names.append(f"{owner.name}/{name}")
    recipe = Recipe("lora", tuple(RecipeExpert(name, 0.5) for name in names))
    folder = merge(recipe, tmp_path / "both", api=owner.api).folder
    done = publish(folder, f"{owner.name}/both", api=owner.api)
    text = Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text()
    assert ModelCard(text).data.library_name == "peft"
    assert ModelCard(text).data.tags == ["hf-fusion", "merge", "lora"]
    out = fresh_python(WITHOUT_PACKAGE + usage_code(text), hub, hub.token(owner.name)).stdout
    assert out.startswith("PeftModelForSequenceClassification")


def test_a_card_beside_a_merge(owner, ids, recipe, tmp_path):
    """`write_card` says of ids what publishing will, and of folders what they are called."""
    folder = merge(recipe, tmp_path / "merged", api=owner.api).folder
    card = write_card(folder, owner.api).read_text()
    for name in ids:
        assert f"](/{name}/tree/" in card
    assert ModelCard(card).data.license == "apache-2.0"
    planned = plan(folder, f"{owner.name}/merged", api=owner.api)
    here = planned.card.replace(f'"{owner.name}/merged"', '"merged"').replace(f"hf download {owner.name}/merged", "#")
    assert re.sub(r"^# .*--local-dir .*\n", "", here, flags=re.MULTILINE) == card.replace("fuse merged/", "fuse ")
    (folder / "README.md").write_text(card.replace(BEGIN, f"By hand.\n\n{BEGIN}"))
    assert "By hand." in write_card(folder, owner.api).read_text()

    local = Recipe("linear", tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two")))
    save_bert(tmp_path / "two", 2, card="license: other")
    card = write_card(merge(local, tmp_path / "local").folder).read_text()
    assert "](/" not in card
    assert "| one |  | text-classification | mit |" in card
    assert "License: it could not be computed from" in card
    assert "base_model" not in ModelCard(card).data.to_dict()
    compile(usage_code(card), "usage", "exec")


@pytest.mark.parametrize("kind", ["images", "features", "masked", "chat"])
def test_usage_block_of_other_heads_runs(kind, tmp_path, monkeypatch, capsys):
    """In this process, from the folder beside the merge: the block is the same."""
    for seed, name in enumerate(("one", "two")):
        folder = tmp_path / name
        if kind == "images":
            vit(["cat", "dog"], seed).save_pretrained(folder)
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        elif kind == "chat":
            gpt2(seed).save_pretrained(folder)
            tokenizer = make_tokenizer()
            tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
            tokenizer.save_pretrained(folder)
        else:
            save_bert(folder, seed, auto=AutoModel if kind == "features" else AutoModelForMaskedLM, config=BERT)
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two"))
    recipe = Recipe("slerp", experts, parameters={"t": 0.5})
    code = usage_code(write_card(hf_fusion.merge(recipe, tmp_path / "merged").folder).read_text())
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    said = capsys.readouterr().out
    features, masked = r"torch.Size\(\[1, \d+, 16\]\)", r"BertForMaskedLM \d+"
    if kind == "chat":  # the answer alone, in the chat's markup
        assert "apply_chat_template" in code and said and "Some text" not in said
        return
    assert re.search({"images": r"\['(cat|dog)'\]", "features": features, "masked": masked}[kind], said), said


def test_a_merge_of_several_stages(owner, ids, tmp_path):
    """Its recipe pins what the stages were merged from, and makes the same again; its card names them."""
    base, one, two = ids
    stage = Recipe("linear", (RecipeExpert(one), RecipeExpert(two)))
    recipe = Recipe("task_arithmetic", (RecipeExpert("both"), RecipeExpert(two)), base, stages={"both": stage})
    merge(recipe, tmp_path / "merged", api=owner.api)
    done = publish(tmp_path / "merged", f"{owner.name}/mood", api=owner.api)
    remote = Path(owner.api.hf_hub_download(done.repo_id, "fusion.yaml", revision=done.sha))
    shas = {name: owner.api.model_info(name).sha for name in ids}
    saved = Recipe.load(remote)
    assert [expert.model for expert in saved.stages["both"].experts] == [f"{name}@{shas[name]}" for name in (one, two)]
    assert saved.base == f"{base}@{shas[base]}" and saved.unpinned == [] and str(tmp_path) not in remote.read_text()
    card = ModelCard(Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text())
    assert card.data.base_model == [two, base, one]
    assert card.data.license == "apache-2.0"
    owner.api.update_repo_settings(one, private=True)  # it is in the stage alone
    with pytest.raises(FusionError, match=f"would contain the weights of private or gated experts: {one}"):
        publish(tmp_path / "merged", f"{owner.name}/other", private=False, api=owner.api)
    owner.api.update_repo_settings(one, private=False)
    again = merge(saved, tmp_path / "again", api=owner.api)
    for file in again.folder.iterdir():
        assert file.read_bytes() == Path(owner.api.hf_hub_download(done.repo_id, file.name)).read_bytes(), file.name
