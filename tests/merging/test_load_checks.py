"""The merged config matches the merged tensors, and transformers' loader checks them before "✓"."""

import json
import re
import time

import pytest
import torch
from on_disk import OF_MODELS, model, models, recipe_for, recipe_of, tree
from peft_adapters import IDS, SIZES, loaded, logits, save_adapter, save_bert, save_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_fusion import FusionError, Recipe, fuse
from hf_fusion.cli.app import main
from hf_fusion.merging.load_checks import check_loads, fit_config
from hf_fusion.merging.merge import _check_written, merge, plan_merge


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A base of 40 tokens, and adapters that were trained on it with 42."""
    folder = tmp_path_factory.mktemp("grown")
    save_llama(folder / "base")
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(folder / name, folder / "base", seed, rows=42)
    return folder


@pytest.mark.parametrize("method", [name for name, row in OF_MODELS.items() if row.base != "needed"])
def test_embeddings_that_grew(method, grown, tmp_path):
    merge(recipe_for(method, [grown / "one", grown / "two"]), tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.config.vocab_size == len(found.lm_head.weight) == 42
    assert found.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 8)
    if method == "linear":
        rows = [load_file(grown / name / "adapter_model.safetensors") for name in ("one", "two")]
        key = "base_model.model.model.embed_tokens.weight"
        torch.testing.assert_close(found.model.embed_tokens.weight, (rows[0][key] + rows[1][key]) / 2)


@pytest.mark.long
@pytest.mark.parametrize("method", [name for name, row in OF_MODELS.items() if row.base])
@pytest.mark.parametrize("mismatch", ["base", "skip", "resize"])
def test_embeddings_that_grew_beside_a_base_that_did_not(method, mismatch, grown, tmp_path):
    recipe = recipe_for(method, [grown / "one", grown / "two"], grown / "base")
    if method != "moe":  # which takes the base's embeddings
        with pytest.raises(FusionError, match=r"embed_tokens.*\[42, 16\] against \[40, 16\]") as caught:
            plan_merge(recipe)
        assert "base or skip or resize" in caught.value.hint
    elif mismatch != "base":
        return
    merge(Recipe(method, recipe.experts, recipe.base, {**recipe.parameters, "mismatch": mismatch}), tmp_path / "out")
    assert loaded(tmp_path / "out").config.vocab_size == 40


FOUR = ("north", "east", "south", "west")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A base of two classes, adapters of four, and full fine-tunes of four."""
    folder = tmp_path_factory.mktemp("classes")
    save_bert(folder / "base")
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(folder / name, folder / "base", seed, labels=FOUR)
        save_bert(folder / f"full-{name}", FOUR, seed)
    return folder


@pytest.mark.parametrize("method", [name for name, row in OF_MODELS.items() if row.base != "needed" and name != "moe"])
def test_classes_of_adapters(method, classes, tmp_path):
    recipe = recipe_for(method, [classes / "one", classes / "two"])
    merge(recipe, tmp_path / "out")
    found = loaded(tmp_path / "out", AutoModelForSequenceClassification)
    assert found.config.id2label == dict(enumerate(FOUR))
    assert found.config.label2id == {name: i for i, name in enumerate(FOUR)}
    assert logits(found).shape == (1, 4)


def test_classes_of_adapters_in_memory(classes):
    found = fuse("linear", [classes / "one", classes / "two"])
    assert found.config.num_labels == 4
    assert found.config.id2label[3] == "west"
    torch.testing.assert_close(
        logits(found), logits(loaded_linear(classes)), rtol=1e-5, atol=1e-5
    )  # float32, 2 layers of 16


def loaded_linear(classes):
    """The mean of what PEFT makes of both adapters."""
    made = []
    for seed, name in enumerate(("one", "two"), 1):
        folder = classes / f"again-{name}"
        made.append(save_adapter(folder, classes / "base", seed, labels=FOUR).merge_and_unload())
    states = [own.state_dict() for own in made]
    made[0].load_state_dict({key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
    return made[0].eval()


def test_classes_without_names(classes, tmp_path):
    for name in ("one", "two"):
        target = tmp_path / name
        target.mkdir()
        for file in (classes / name).iterdir():
            if file.name != "config.json":
                (target / file.name).write_bytes(file.read_bytes())
    merge(recipe_for("linear", [tmp_path / "one", tmp_path / "two"]), tmp_path / "out")
    assert loaded(tmp_path / "out", AutoModelForSequenceClassification).config.num_labels == 4


def test_names_that_the_base_lacks(classes, tmp_path):
    save_bert(tmp_path / "base", tuple(f"LABEL_{i}" for i in range(4)), seed=5)
    experts = [classes / "full-one", classes / "full-two"]
    merge(recipe_for("task_arithmetic", experts, tmp_path / "base"), tmp_path / "out")
    assert loaded(tmp_path / "out", AutoModelForSequenceClassification).config.id2label == dict(enumerate(FOUR))


def shapes_of(found):
    return {name: tuple(tensor.shape) for name, tensor in found.state_dict().items()}


def test_sizes_in_nested_parts():
    parts = {"text_config": LlamaConfig(**SIZES, vocab_size=40).to_dict()}
    parts["vision_config"] = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4).to_dict()
    config = LlavaConfig(**parts, image_token_index=5)
    content = {**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"]}
    with torch.device("meta"):
        found = LlavaForConditionalGeneration(config)
        found.resize_token_embeddings(42, mean_resizing=False)
        found.model.vision_tower.embeddings.patch_embedding = torch.nn.Conv2d(1, 16, 4, 4, bias=False)
    fitted = fit_config(content, shapes_of(found), [])
    assert fitted["text_config"]["vocab_size"] == 42
    assert fitted["vision_config"] == {**content["vision_config"], "num_channels": 1}
    assert fitted["image_token_index"] == 5


def test_positions():
    content = {**GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8).to_dict()}
    content["architectures"] = ["GPT2LMHeadModel"]
    with torch.device("meta"):
        shapes = shapes_of(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=12)))
    assert fit_config(content, shapes, []) == {**content, "n_positions": 12}


def test_model_unknown_to_transformers(tmp_path, capsys):
    folders = models(tmp_path)
    for name, rows in (("first", 9), ("second", 9)):
        (tmp_path / name).mkdir()
        save_file(
            {
                "base_model.model.layers.0.mlp.lora_A.weight": torch.ones(1, 4),
                "base_model.model.layers.0.mlp.lora_B.weight": torch.ones(6, 1),
                "base_model.model.embed.weight": torch.ones(rows, 4),
            },
            tmp_path / name / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(folders[0])}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    report = merge(recipe_for("linear", [tmp_path / "first", tmp_path / "second"]), tmp_path / "out")
    [told] = report.warnings
    assert told.startswith("whether the merged model loads was not checked: transformers does not know")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 9
    words = ("fuse", "--method", "linear", "--experts", str(folders[1]), str(folders[2]), "-o", str(tmp_path / "told"))
    for more in ((), ("--dry-run",)):
        assert main((*words, *more)) == 0
        said = capsys.readouterr().err
        assert "Warning: whether the merged model loads was not checked: transformers does not know" in said


# ---------------------------------------------------------------- what would not load


@pytest.fixture
def one_side(tmp_path):
    """Adapters that grew their embeddings, and left the head of an untied base as it was."""
    save_llama(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(tmp_path / name, tmp_path / "base", seed, rows=42, modules_to_save=["embed_tokens"])
        file = tmp_path / name / "adapter_model.safetensors"
        save_file({key: own for key, own in load_file(file).items() if "lm_head" not in key}, file)
    return tmp_path


def test_unloadable_merge_leaves_no_output(one_side, capsys):
    experts = [one_side / "one", one_side / "two"]
    before = tree(one_side)
    told = r"would not load: model.embed_tokens.weight is \[42, 16\], config.json promises \[40, 16\]"
    with pytest.raises(FusionError, match=told) as caught:
        merge(recipe_for("linear", experts), one_side / "out")
    assert tree(one_side) == before
    words = ["fuse", "--method", "linear", "--experts", *map(str, experts), "-o", str(one_side / "out"), "--dry-run"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert re.search(told, said.err)
    assert "\u2713" not in said.out
    with pytest.raises(FusionError, match=told):
        fuse("linear", experts)
    # the way on that it names
    assert "resize_token_embeddings" in caught.value.hint
    base = AutoModelForCausalLM.from_pretrained(one_side / "base")
    base.resize_token_embeddings(42, mean_resizing=False)
    base.save_pretrained(one_side / "grown")
    merge(recipe_for("linear", [f"{one_side / 'grown'}+{expert}" for expert in experts]), one_side / "out")
    assert loaded(one_side / "out").config.vocab_size == 42


def test_faults_of_the_inputs_are_tolerated(tmp_path):
    for seed, name in enumerate(("base", "one", "two")):
        file = save_llama(tmp_path / name, seed) / "model.safetensors"
        tensors = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        del tensors["lm_head.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    report = merge(
        recipe_for("task_arithmetic", [tmp_path / "one", tmp_path / "two"], tmp_path / "base"), tmp_path / "o"
    )
    assert report.warnings == []


def test_written_files_match_the_plan(tmp_path):
    folders = models(tmp_path)
    planned = plan_merge(recipe_of(folders))
    merge(recipe_of(folders), tmp_path / "out")
    _check_written(planned, tmp_path / "out")
    model(tmp_path / "other", 5, {"embed.weight": (7, 4)})
    with pytest.raises(FusionError, match="does not contain the merged tensors"):
        _check_written(planned, tmp_path / "other")


def test_config_corrupted_by_another_process(grown, tmp_path):
    planned = plan_merge(recipe_for("linear", [grown / "one", grown / "two"]))
    merge(planned.recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "vocab_size": 41}))
    with pytest.raises(FusionError, match="would not load: lm_head.weight is"):
        _check_written(planned, tmp_path / "out")


def test_check_takes_little_time_and_memory(grown):
    """Without the imports, which are done once: a second of one core, on any machine."""
    recipe = recipe_for("linear", [grown / "one", grown / "two"])
    planned = plan_merge(recipe)
    began = time.process_time()
    check_loads({**planned.config, "rms_norm_eps": 1e-4}, {s.name: s.shape for s in planned.specs}, planned.first)
    assert time.process_time() - began < 1


def test_body_of_a_model(tmp_path):
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        BertModel(BertConfig(**SIZES, vocab_size=40)).save_pretrained(tmp_path / name)
    report = merge(recipe_for("task_arithmetic", [tmp_path / "one"], tmp_path / "base"), tmp_path / "out")
    assert report.warnings == []
    loaded(tmp_path / "out", AutoModel)
