"""Listing repos: filters, search, sorting, pages, expand, and derived tags."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import CommitOperationAdd, get_session
from huggingface_hub.errors import BadRequestError

BERT = json.dumps({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}).encode()


def push(api, repo: str, files: dict[str, bytes | str], **options) -> str:
    api.create_repo(repo, **options)
    adds = [CommitOperationAdd(p, d.encode() if isinstance(d, str) else d) for p, d in files.items()]
    return api.create_commit(repo, adds, commit_message="push", repo_type=options.get("repo_type")).oid


def card(**fields) -> str:
    return f"---\n{json.dumps(fields)}\n---\n# Card\n"


def test_tags_of_a_fine_tuned_model(alice):
    name, api = alice
    readme = card(
        license="apache-2.0",
        language=["en", "de"],
        tags=["irony", "hf-fusion-expert"],
        datasets=["glue"],
        base_model="google/bert-base",
    )
    files = {
        "README.md": readme + "See https://arxiv.org/abs/2310.01542.",
        "config.json": BERT,
        "model.safetensors": b"\0" * 20,
    }
    push(api, f"{name}/m", files)
    info = api.model_info(f"{name}/m")
    assert info.tags == [
        *("transformers", "safetensors", "bert", "text-classification", "irony", "hf-fusion-expert", "en", "de"),
        *("dataset:glue", "license:apache-2.0", "base_model:google/bert-base"),
        *("base_model:finetune:google/bert-base", "arxiv:2310.01542", "region:us"),
    ]
    assert (info.pipeline_tag, info.library_name, info.card_data.license) == (
        "text-classification",
        "transformers",
        "apache-2.0",
    )
    assert info.config == {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    assert info.base_models == {
        "relation": "finetune",
        "models": [{"_id": "google/bert-base", "id": "google/bert-base"}],
    }


@pytest.mark.parametrize(
    "fields, files, relation",
    [
        ({"base_model": "a/b", "library_name": "peft"}, {}, "adapter"),
        ({"base_model": "a/b"}, {"adapter_config.json": '{"peft_type": "LORA"}'}, "adapter"),
        ({"base_model": ["a/b", "c/d"]}, {}, "merge"),
        ({"base_model": "a/b"}, {"m-q4.gguf": "x"}, "quantized"),
        ({"base_model": "a/b", "base_model_relation": "merge"}, {}, "merge"),
        ({"base_model": "a/b"}, {}, "finetune"),
    ],
)
def test_relations_to_the_base(alice, fields, files, relation):
    name, api = alice
    push(api, f"{name}/m", {"README.md": card(**fields), **files})
    for base in [fields["base_model"]] if isinstance(fields["base_model"], str) else fields["base_model"]:
        for tag in (f"base_model:{base}", f"base_model:{relation}:{base}"):
            assert [m.id for m in api.list_models(filter=tag, author=name)] == [f"{name}/m"]


def test_adapter_without_card_metadata_stays_untagged(alice):
    name, api = alice
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "task_type": "SEQ_CLS"}
    push(api, f"{name}/m", {"adapter_config.json": json.dumps(adapter), "adapter_model.safetensors": b"\0"})
    info = api.model_info(f"{name}/m")
    assert info.tags == ["safetensors", "region:us"] and info.base_models is None
    assert info.config["peft"] == {"base_model_name_or_path": "a/b", "task_type": "SEQ_CLS"}


def test_custom_code_gguf_and_evaluations(alice):
    name, api = alice
    config = {"model_type": "foe", "auto_map": {"AutoModel": "modeling_foe.FoEModel"}}
    files = {"README.md": card(**{"model-index": [{"name": "x"}]}), "config.json": json.dumps(config), "w.gguf": "x"}
    push(api, f"{name}/m", files)
    info = api.model_info(f"{name}/m")
    assert {"custom_code", "gguf", "model-index", "foe"} <= set(info.tags)
    assert info.config["auto_map"] == config["auto_map"]


def test_tags_of_datasets_and_spaces(alice):
    name, api = alice
    readme = card(task_categories=["text-classification"], size_categories="1K<n<10K", language="en", license="mit")
    push(api, f"{name}/d", {"README.md": readme}, repo_type="dataset")
    found = api.list_datasets(author=name, task_categories="text-classification", language="en")
    assert [d.id for d in found] == [f"{name}/d"]
    push(api, f"{name}/s", {"README.md": card(models=["a/b"])}, repo_type="space", space_sdk="gradio")
    space = api.space_info(f"{name}/s")
    assert space.sdk == "gradio" and "gradio" in space.tags and space.models == ["a/b"]
    assert [s.id for s in api.list_spaces(author=name, filter="gradio")] == [f"{name}/s"]


@pytest.mark.parametrize("config", ["[1]", "{", '{"architectures": 7, "model_type": {}}', "[" * 100_000])
def test_hostile_metadata_is_harmless(alice, config):
    name, api = alice
    shapes = b'{"w": {"dtype": "F32", "shape": ["x"]}, "v": 3}'
    weights = len(shapes).to_bytes(8, "little") + shapes
    push(
        api, f"{name}/m", {"README.md": card(tags=[{"a": 1}, 5, None]), "config.json": config, "m.safetensors": weights}
    )
    info = api.model_info(f"{name}/m")
    assert "5" in info.tags and info.safetensors is None
    assert [m.id for m in api.list_models(author=name, full=True, fetch_config=True)] == [f"{name}/m"]


@pytest.fixture
def five(alice):
    """Five models of one user, made one after the other."""
    name, api = alice
    for n in range(5):
        tags = ["even" if n % 2 == 0 else "odd", "all"]
        push(api, f"{name}/model-{n}", {"README.md": card(tags=tags), "config.json": BERT})
    return name, api


def names(models) -> list[str]:
    return [model.id.split("/")[1] for model in models]


def test_filters_and_search(five, anyone):
    name, _ = five
    listed = lambda **query: sorted(names(anyone.list_models(author=name, **query)))  # noqa: E731
    assert len(listed()) == 5
    assert listed(filter="odd") == ["model-1", "model-3"]
    assert listed(filter=["all", "even"]) == ["model-0", "model-2", "model-4"]
    assert listed(filter=["odd", "even"]) == []
    assert listed(search="MODEL-3") == ["model-3"]
    assert listed(pipeline_tag="text-classification", filter="odd") == ["model-1", "model-3"]
    assert listed(pipeline_tag="fill-mask") == []
    assert list(anyone.list_models(author=name.upper(), search="model-1"))[0].id == f"{name}/model-1"


def test_sorting(five, tmp_path):
    name, api = five
    for n, downloads in ((1, 2), (3, 1)):
        for k in range(downloads):
            api.hf_hub_download(f"{name}/model-{n}", "config.json", cache_dir=tmp_path / f"{n}{k}")
    assert names(api.list_models(author=name, sort="downloads"))[:2] == ["model-1", "model-3"]
    newest = names(api.list_models(author=name, sort="created_at"))
    assert newest == [f"model-{n}" for n in reversed(range(5))]
    assert names(api.list_models(author=name, sort="created_at", limit=2)) == newest[:2]
    with pytest.raises(BadRequestError):
        list(api.list_models(author=name, sort="taste"))


def test_pages(five, hub):
    name, api = five
    url = f"{hub.endpoint}/api/models?author={name}&limit=2&sort=createdAt&filter=all"
    pages = []
    while url:
        answer = get_session().get(url)
        pages.append([row["id"] for row in answer.json()])
        url = answer.links.get("next", {}).get("url")
        if len(pages) == 1:  # one that is made meanwhile shifts nothing
            push(api, f"{name}/meanwhile", {"README.md": card(tags=["all"])})
    assert pages == [
        [f"{name}/model-4", f"{name}/model-3"],
        [f"{name}/model-2", f"{name}/model-1"],
        [f"{name}/model-0"],
    ]
    assert get_session().get(f"{hub.endpoint}/api/models?cursor=rubbish").status_code == 400


def test_expand_and_full(five):
    name, api = five
    asked = ["sha", "tags", "cardData", "baseModels", "downloads", "gated", "config", "siblings"]
    model = next(iter(api.list_models(author=name, search="model-0", expand=asked)))
    assert model.sha == api.model_info(f"{name}/model-0").sha
    assert (model.card_data.tags, model.downloads, model.gated) == (["even", "all"], 0, False)
    assert model.config["model_type"] == "bert" and len(model.siblings) == 3
    assert model.author is None and model.private is None
    short = next(iter(api.list_models(author=name, limit=1)))
    assert short.siblings is None and short.card_data is None and short.tags
    full = next(iter(api.list_models(author=name, full=True, limit=1)))
    assert full.sha and full.siblings and full.card_data
