"""`fuse` with static methods: a plain model of the experts' class, from ids, folders or models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import gpt2, llama, make_tokenizer
from tiny_experts import edit_json, save_adapter, save_bert
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    MixtralForCausalLM,
)

import hf_fusion
from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, fuse_recipe, load_fused, save_fused
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.types import ExpertInfo

TEXTS = ["good film", "bad bad film"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier and two others of its sizes."""
    folder = tmp_path_factory.mktemp("static")
    return {name: save_bert(folder / name, seed) for seed, name in enumerate(("base", "one", "two"))}


def states(folders, *names):
    return [AutoModelForSequenceClassification.from_pretrained(folders[name]).state_dict() for name in names]


def test_from_ids_to_a_folder_that_reads_back(owner, folders, tmp_path):
    shas = {name: owner.push(name, folder) for name, folder in folders.items()}
    ids = {name: f"{owner.name}/{name}" for name in folders}
    model = fuse("task_arithmetic", [ids["one"], ids["two"]], ids["base"], scaling=0.4, api=owner.api)
    assert type(model) is BertForSequenceClassification
    assert not model.training
    recipe = model.fusion_recipe
    assert recipe.base == f"{ids['base']}@{shas['base']}"
    assert [expert.model for expert in recipe.experts] == [f"{ids[name]}@{shas[name]}" for name in ("one", "two")]
    base, one, two = states(folders, "base", "one", "two")
    for name, tensor in model.state_dict().items():
        expected = base[name] + 0.4 * (one[name] - base[name]) + 0.4 * (two[name] - base[name])
        assert torch.allclose(tensor, expected, atol=1e-6), name

    folder = save_fused(model, tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (folders["base"] / file).read_bytes()
    read, known = load_fused(folder)
    assert known == recipe == read.fusion_recipe
    with torch.no_grad():
        assert torch.equal(read(**tokens).logits, model(**tokens).logits)
    assert sorted(path.name for path in save_fused(read, tmp_path / "again").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    # the recipe makes the same again, in memory and on disk
    assert torch.equal(fuse_recipe(recipe, api=owner.api).bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    report = hf_fusion.merge(hf_fusion.Recipe.load(folder), tmp_path / "streamed", api=owner.api)
    assert (report.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (report.folder / "fusion.yaml").read_bytes() == (folder / "fusion.yaml").read_bytes()


def test_experts_of_every_kind_give_the_same_model(owner, folders):
    owner.push("one", folders["one"])
    sha = owner.api.model_info(f"{owner.name}/one").sha
    expected = fuse("linear", [folders["one"], folders["two"]], weights=[0.75, 0.25])
    assert expected.fusion_recipe.experts == (
        RecipeExpert(str(folders["one"]), 0.75),
        RecipeExpert(str(folders["two"]), 0.25),
    )
    info, loaded = ExpertInfo(f"{owner.name}/one", sha), AutoModelForSequenceClassification.from_pretrained
    [expert] = load_experts([f"{owner.name}/one@{sha}"], api=owner.api)
    for experts, weights in [
        ([info, folders["two"]], [0.75, 0.25]),
        ([expert, loaded(folders["two"])], [3, 1]),
        ([RecipeExpert(str(folders["one"]), 0.75), RecipeExpert(str(folders["two"]), 0.25)], None),
        ([RecipeExpert(str(folders[k]), parameters={"weight": w}) for k, w in {"one": 6, "two": 2}.items()], None),
    ]:
        model = fuse("linear", experts, **({"weights": weights} if weights else {}), api=owner.api)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), name
        names = [given.model for given in model.fusion_recipe.experts]
        assert names[0] in (str(folders["one"]), f"{owner.name}/one@{sha}")
        assert names[1] in (str(folders["two"]), "two")


@pytest.mark.long
@pytest.mark.parametrize("method", MERGE_METHODS)
def test_every_method_gives_a_plain_model(method, folders, tmp_path):
    row = MERGE_METHODS[method]
    if method == "moe":  # of Llamas alone
        folders = {name: tmp_path / name for name in folders}
        for seed, folder in enumerate(folders.values()):
            llama(seed).save_pretrained(folder)
    required = {name: 0.5 for name, parameter in row.parameters.items() if parameter.required}
    experts = [folders["one"], folders["two"]][: row.experts[1]]
    given = (method, experts, folders["base"] if row.base == "needed" else None)
    if row.merges == "adapters":
        with pytest.raises(FusionError, match="gives an adapter, not a model"):
            fuse(*given)
    elif row.statistics:
        with pytest.raises(FusionError, match="statistics"):
            fuse(*given)
    else:
        model = fuse(*given, **required)
        assert type(model) is (MixtralForCausalLM if method == "moe" else BertForSequenceClassification)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        assert model.fusion_recipe.method == method


def test_adapter_in_memory_equals_peft(folders, tmp_path):
    peft_model = save_adapter(tmp_path / "adapter", folders["base"], ("a", "b", "c"), base_name=str(folders["base"]))
    [expert] = load_experts([tmp_path / "adapter"])
    models = [fuse("linear", [given]) for given in (expert, tmp_path / "adapter")]
    expected = peft_model.merge_and_unload().state_dict()
    for model in models:
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert models[0].config.id2label == {0: "a", 1: "b", 2: "c"}
    # adapters that became one adapter read back in their base
    both = hf_fusion.merge(Recipe("lora", (RecipeExpert(str(tmp_path / "adapter"), 1.0),)), tmp_path / "both").folder
    read, recipe = load_fused(both)
    assert recipe.method == "lora"
    assert all(torch.allclose(t, expected[name], atol=1e-6) for name, t in read.state_dict().items())


def test_a_square_conv1d_gets_the_transposed_update(tmp_path):
    """GPT-2's attn.c_proj is as wide as it is high: its sizes do not tell that it is stored transposed."""
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["attn.c_proj", "c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    model = fuse("linear", [tmp_path / "adapter"])
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_remote_code_runs_with_consent_and_is_copied(tmp_path):
    from hf_fusion.demo.modeling_voting_vit import VotingViTConfig, VotingViTForImageClassification

    source = Path(hf_fusion.__file__).parent / "demo" / "modeling_voting_vit.py"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = VotingViTConfig(image_size=8, patch_size=4, **sizes)
        VotingViTForImageClassification(config).save_pretrained(tmp_path / name)
        shutil.copy(source, tmp_path / name)
        auto = {
            "AutoConfig": "modeling_voting_vit.VotingViTConfig",
            "AutoModelForImageClassification": "modeling_voting_vit.VotingViTForImageClassification",
        }
        edit_json(tmp_path / name / "config.json", auto_map=auto)
    experts = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(FusionError, match="one needs its own code to run"):
        fuse("linear", experts)
    model = fuse("linear", experts, trust_remote_code=True)
    assert type(model).__name__ == "VotingViTForImageClassification"
    folder = save_fused(model, tmp_path / "merged")
    assert (folder / "modeling_voting_vit.py").exists()
    with pytest.raises(FusionError, match="needs its own code to run"):
        load_fused(folder)
    read = load_fused(folder, trust_remote_code=True)[0]
    pixels = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(read(pixels).logits, model(pixels).logits)


def test_dtype_is_set_and_no_files_are_left(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = fuse("ties", [folders["one"], folders["two"]], folders["base"], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.fusion_recipe.dtype == "bfloat16"
    assert not list(tmp_path.iterdir())
    folder = save_fused(model, tmp_path / "merged")
    assert str(tmp_path) not in json.dumps(json.loads((folder / "config.json").read_text()))


def test_mistakes(folders):
    experts = [folders["one"], folders["two"]]
    with pytest.raises(FusionError, match="no method 'alchemy'") as caught:
        fuse("alchemy", experts)
    assert caught.value.hint == "hf-fusion methods lists all"
    for options, message in [
        ({"task": "text-classification"}, "without task"),
        ({"allow_pickle": True}, "safetensors files"),
        ({"weights": [1.0]}, "1 weights for 2 experts"),
        ({"colour": 1}, "linear has no parameter 'colour'"),
        ({"base": folders["base"]}, "is not needed: no expert is an adapter"),
        ({"experts": [RecipeExpert("a", 1.0), RecipeExpert("b")]}, "weights only partly"),
    ]:
        with pytest.raises(FusionError, match=message):
            fuse("linear", **{"experts": experts, **options})
    with pytest.raises(FusionError, match="slerp has no parameter 'weight'"):
        fuse("slerp", experts, t=0.5, weights=[1, 2])
    with pytest.raises(FusionError, match="foe does not take a RecipeExpert"):
        fuse("foe", [RecipeExpert(str(folder)) for folder in experts])
    # what is wrong with a recipe is said before anything is fetched
    with pytest.raises(FusionError, match="ties has no parameter 'colour'"):
        fuse_recipe(Recipe("ties", (RecipeExpert("no/where"),), "no/where", {"colour": 1}))
