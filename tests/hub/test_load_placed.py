"""Adapters whose paths differ from the loaded base's, in experts and in each family, compared with PEFT."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import llama, make_tokenizer, vit
from tiny_experts import edit_json, save_adapter, save_bert
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_fusion.fusion import fuse
from hf_fusion.hub.compat import check_compatibility
from hf_fusion.hub.discover import discover
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import with_adapter
from hf_fusion.merging.merge import merge
from hf_fusion.publishing.push_gates import push_gates
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.training.gates import average_activation

IDS = torch.arange(3, 15).reshape(2, 6)
OLD_VIT = {  # as transformers before 5 called them
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.v_proj": "attention.attention.value",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def train(folder, base, seed, base_name, **options):
    """A PEFT adapter of a model, with random weights in all that it trains; gives back PEFT's own merge."""
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **options))
    torch.manual_seed(seed)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base_name))
    return theirs.merge_and_unload().eval()


@pytest.fixture(scope="module")
def old_vits(tmp_path_factory):
    """A ViT, two adapters by its names and by those of an older transformers, and what PEFT makes of them."""
    folder = tmp_path_factory.mktemp("vits")
    base = vit(["cat", "dog"])
    base.save_pretrained(folder / "base")
    size = {"height": base.config.image_size, "width": base.config.image_size}
    ViTImageProcessorPil(size=size).save_pretrained(folder / "base")
    merged = []
    for number in (0, 1):
        options = {"target_modules": ["q_proj", "fc1", "fc2"], "modules_to_save": ["classifier"]}
        merged.append(train(folder / str(number), base, number, folder / "base", **options))
        (folder / str(number) / "config.json").write_text('{"id2label": {"0": "cat", "1": "dog"}}')
        shutil.copytree(folder / str(number), folder / f"old-{number}")
        file = folder / f"old-{number}" / "adapter_model.safetensors"
        tensors = {}
        for key, tensor in load_file(file).items():
            for new, old in OLD_VIT.items():
                key = key.replace(new, old)
            tensors[key] = tensor
        save_file(tensors, file)
    return folder / "base", [folder / "0", folder / "1"], [folder / "old-0", folder / "old-1"], merged


def pixels(base):
    size = ViTConfig.from_pretrained(base).image_size
    return torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)


FAMILIES = {
    "foe": {"mode": "output"},
    "ensemble": {},
    "wemoe": {},
    "phatgoose": {"missing_gates": "arrow", "top_k": 1},
    "linear": {},
    "ties": {},
}


@pytest.mark.parametrize("method", FAMILIES)
def test_layers_that_were_renamed(old_vits, method):
    """As the same adapters by today's names, which PEFT writes."""
    base, new, old, _ = old_vits
    options = {**FAMILIES[method], **({"base": base} if method == "ties" else {})}
    if method == "phatgoose":  # it has one head for all
        new, old = new[:1], old[:1]
    models = []
    for folders in (new, old):
        torch.manual_seed(0)
        models.append(fuse(method, folders, **options).eval())
    inputs = pixels(base)
    with torch.no_grad():
        expected, ours = (model(pixel_values=inputs).logits for model in models)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("is_named", [True, False])
def test_one_of_each_layout_as_one_adapter(old_vits, is_named, tmp_path):
    """Which PEFT loads: it would leave out modules by their old names without a word."""
    base, new, old, merged = old_vits
    experts = (RecipeExpert(str(new[0]), 0.5), RecipeExpert(str(old[1]), 0.5))
    recipe = Recipe("lora", experts, str(base) if is_named else None)
    merge(recipe, tmp_path / "out")
    ours = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), tmp_path / "out")
    state, (one, two) = ours.merge_and_unload().state_dict(), (model.state_dict() for model in merged)
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, (one[key] + two[key]) / 2, rtol=1e-5, atol=1e-6)


def test_layers_that_were_renamed_in_experts(old_vits):
    base, _, old, merged = old_vits
    inputs = pixels(base)
    for expert, theirs in zip(load_experts(old), merged, strict=True):
        with torch.no_grad():
            ours = with_adapter(expert.model, expert.adapter).eval()(inputs).logits
            torch.testing.assert_close(ours, theirs(inputs).logits, rtol=1e-5, atol=1e-5)


def test_gates_of_renamed_layers_are_pushed_found_and_routed_by(old_vits, owner, tmp_path):
    base, _, old, _ = old_vits
    sha = owner.push("base", base)
    rows = Dataset.from_dict(
        {"image": [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(4)], "label": [0, 1, 0, 1]}
    )
    for number, folder in enumerate(old):
        shutil.copytree(folder, tmp_path / str(number))
        settings = {"base_model_name_or_path": f"{owner.name}/base", "revision": sha}
        edit_json(tmp_path / str(number) / "adapter_config.json", **settings)
        owner.push(f"old-{number}", tmp_path / str(number))
        [expert] = load_experts([f"{owner.name}/old-{number}"], api=owner.api)
        push_gates(average_activation(expert, rows), f"{owner.name}/old-{number}", api=owner.api)
    found = discover(tags="phatgoose-gates", author=owner.name, api=owner.api)
    verdict = check_compatibility(found, base_model=f"{owner.name}/base", need_gates=True, api=owner.api)
    assert [info.id for info in verdict.accepted] == [info.id for info in found] and len(found) == 2
    router = fuse("phatgoose", list(verdict.accepted), api=owner.api)
    assert router.summary()["routed_linears"] == 6  # three linears of each of two layers


def test_a_classifier_on_a_body(tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    theirs = save_adapter(tmp_path / "one", base)
    [expert] = load_experts([tmp_path / "one"])
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    assert plain.bert.encoder.layer[0].attention.self.query.weight.equal(
        expert.model.bert.encoder.layer[0].attention.self.query.weight
    )
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        ours = with_adapter(expert.model, expert.adapter, expert.labels).eval()(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beneath", ["the base's", "its own"])
def test_a_head_that_is_updated_and_saved(tmp_path, beneath):
    """PEFT saves what lies beneath a LoRA on the head: both count."""
    base: LlamaForCausalLM = llama()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    expected = []
    for number in (0, 1):
        trained = copy.deepcopy(base)
        if beneath == "its own":
            torch.nn.init.normal_(trained.lm_head.weight, std=0.2)
        options = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
        theirs = train(tmp_path / str(number), trained, number, tmp_path / "base", **options)
        stored = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        assert "base_model.model.lm_head.base_layer.weight" in stored
        with torch.no_grad():
            expected.append(theirs(IDS).logits)
    folders = [tmp_path / "0", tmp_path / "1"]
    for expert, wanted in zip(load_experts(folders), expected, strict=True):
        assert ("lm_head" in expert.adapter.lora) == (beneath == "the base's")
        assert ("lm_head.weight" in expert.adapter.saved) == (beneath == "its own")
        with torch.no_grad():
            ours = with_adapter(expert.model, expert.adapter).eval()(IDS).logits
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        static = fuse("linear", folders[:1]).eval()(IDS).logits
    torch.testing.assert_close(static, expected[0], rtol=1e-4, atol=1e-4)
    fuse("foe", folders, mode="selection")  # each linear is wrapped once
