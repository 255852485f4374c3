"""Adapters extracted from fine-tunes: PEFT's base with the adapter computes what the fine-tune computes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from on_disk import tree
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import CORPUS, bert, distilbert, gpt2, llama, make_tokenizer, resnet, t5, vit
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_fusion import FusionError, extract_lora, fuse, load_experts, merge, save_gates, train_gates
from hf_fusion.cli import main
from hf_fusion.merging.merge import plan_merge
from hf_fusion.recipe import Recipe, RecipeExpert

IDS = torch.arange(3, 15).reshape(2, 6)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FULL = 10_000  # as many as a layer has
EXACT = 1e-5  # the bar for what full rank may lose in float32


def tuned(model, seed=1, std=0.02):
    """A fine-tune in which every parameter has changed."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in changed.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * std
    return changed.eval()


def tied_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(type(llama().config)(**{**llama().config.to_dict(), "tie_word_embeddings": True})).eval()


def llama_body():
    """Its final norm is called "norm", with which PEFT also matches "input_layernorm"."""
    torch.manual_seed(0)
    return LlamaModel(llama().config).eval()


def qwen():
    """Only some of its linear layers have a bias."""
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=300, pad_token_id=0, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config).eval()


def roberta():
    """Its head has two layers, in one module that PEFT saves by itself."""
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL, vocab_size=300, pad_token_id=1, num_labels=3)
    return RobertaForSequenceClassification(config).eval()


MODELS = {
    "llama": llama,
    "tied llama": tied_llama,
    "llama without a head": llama_body,
    "qwen": qwen,
    "bert": lambda: bert(["no", "yes", "perhaps"]),
    "roberta": roberta,
    "distilbert": lambda: distilbert(["no", "yes"]),
    "gpt2": gpt2,
    "t5": t5,
    "vit": lambda: vit(["no", "yes"]),
}


def outputs(model):
    with torch.no_grad():
        if model.config.model_type == "vit":
            found = model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        else:
            decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
            found = model(input_ids=IDS, **decoder)
    return found["logits"] if "logits" in found else found[0]


def difference(one, other) -> float:
    """Relative difference of the outputs of two models."""
    one, other = outputs(one), outputs(other)
    return float((one - other).norm() / other.norm())


def save_pair(tmp_path: Path, base, fine_tune) -> tuple[Path, Path]:
    base.save_pretrained(tmp_path / "base")
    fine_tune.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", tmp_path / "base"


def with_peft(kind, folder: Path, adapter: Path, **options):
    return PeftModel.from_pretrained(kind.from_pretrained(folder, **options), adapter).eval()


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_gives_the_fine_tune_back(name, tmp_path):
    base = MODELS[name]()
    fine_tune = tuned(base)
    folders = save_pair(tmp_path, base, fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", rank=FULL)
    loaded = with_peft(type(base), folders[1], tmp_path / "adapter")
    assert difference(base, fine_tune) > 0.1
    assert difference(loaded, fine_tune) < EXACT
    assert done.error < EXACT and not done.left_out and not done.warnings
    with loaded.disable_adapter():
        assert difference(loaded, base) == 0
    if name != "qwen":  # PEFT refuses: not all of its layers have a bias
        assert difference(loaded.merge_and_unload(), fine_tune) < EXACT


@pytest.mark.parametrize("name", ["qwen", "bert", "gpt2"])
def test_a_static_merge_takes_changed_biases(name, tmp_path):
    base = MODELS[name]()
    fine_tune = tuned(base)
    folders = save_pair(tmp_path, base, fine_tune)
    extract_lora(*folders, tmp_path / "adapter", rank=FULL)
    recipe = Recipe("linear", (RecipeExpert(str(tmp_path / "adapter")),))
    planned = plan_merge(recipe)
    planned.files.close()
    assert [share.parameters for share in planned.shares] == [base.num_parameters()]
    merge(recipe, tmp_path / "merged")
    assert difference(type(base).from_pretrained(tmp_path / "merged").eval(), fine_tune) < EXACT
    if name == "bert":
        with pytest.raises(FusionError, match="changes the bias of .*, which merged adapters cannot express"):
            merge(Recipe("lora", recipe.experts), tmp_path / "one")


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_low_rank_reports_its_error_truly(name, tmp_path):
    base = MODELS[name]()
    fine_tune = tuned(base)
    folders = save_pair(tmp_path, base, fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", rank=6)
    kept = with_peft(type(base), folders[1], tmp_path / "adapter").merge_and_unload().state_dict()
    before, after = base.state_dict(), fine_tune.state_dict()
    lost = norm = 0.0
    for key in before.keys() - {"lm_head.weight"} if name == "gpt2" else before.keys():  # which is tied
        change, rest = (after[key] - before[key]).double(), (after[key] - kept[key]).double()
        lost, norm = lost + float(rest.square().sum()), norm + float(change.square().sum())
        path = key.removesuffix(".weight")
        if key.endswith(".weight") and path in done.errors:
            sigma = torch.linalg.svdvals(change)
            assert done.ranks[path] == 6
            # the kept weights were rounded after adding the base's: relative to their norm, not to the change's
            slack = 2 * torch.finfo(torch.float32).eps * float(after[key].norm() / change.norm())
            assert done.errors[path] == pytest.approx(float(rest.norm() / change.norm()), abs=slack)
            best = float(sigma[6:].norm() / sigma.norm())
            assert best * (1 - 1e-5) <= done.errors[path] <= 1.02 * best
            part = next(part for part in done.parts if part.name == path)
            assert part.change == pytest.approx(float(change.norm() / before[key].norm()), rel=1e-5)
    twice = 1 if name != "gpt2" else 2  # the tied embeddings count twice, as they are stored
    assert done.error == pytest.approx(math.sqrt(lost / norm), rel=1e-4 if twice == 1 else 0.3)
    assert 0.3 < done.error < 1


def test_the_report_lies_beside_the_adapter(tmp_path):
    base = bert(["no", "yes"])
    base.config.id2label = {0: "rotten", 1: "fresh"}
    folders = save_pair(tmp_path, base, tuned(base))
    make_tokenizer().save_pretrained(folders[0])
    done = extract_lora(*folders, tmp_path / "adapter", energy=0.5)
    facts = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert facts["relative_error"] == done.error and facts["base"] == str(folders[1])
    rows = {row["name"]: row for row in facts["modules"]}
    assert {name: row["error"] for name, row in rows.items() if row["kind"] == "lora"} == done.errors
    assert all(error <= math.sqrt(0.5) + 1e-6 for error in done.errors.values()) and len({*done.ranks.values()}) > 1
    assert rows["classifier"]["kind"] == rows["bert.embeddings.LayerNorm"]["kind"] == "saved"
    assert rows["bert.encoder.layer.0.output.dense.bias"]["kind"] == "bias"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"**{done.error:.4g}**" in card and str(tmp_path) not in card
    for path, error in done.errors.items():
        assert f"{error:.3g} |" in next(line for line in card.splitlines() if line.startswith(f"| {path} |"))
    assert "relative error" in done._repr_html_()
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").vocab_size == make_tokenizer().vocab_size


def test_what_is_equal_is_not_stored(tmp_path):
    base = llama()
    fine_tune = copy.deepcopy(base)
    fine_tune.model.layers[1].mlp.up_proj.weight.data[3] += 1  # of rank 1
    folders = save_pair(tmp_path, base, fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", energy=0.999999)
    assert done.ranks == {"model.layers.1.mlp.up_proj": 1} and len(done.parts) == 1
    assert difference(with_peft(type(base), folders[1], tmp_path / "adapter"), fine_tune) < EXACT
    with pytest.raises(FusionError, match="equal in every linear layer"):
        extract_lora(folders[1], folders[1], tmp_path / "same", rank=4)
    assert not (tmp_path / "same").exists()


def test_a_bias_alone(tmp_path):
    base = gpt2()
    fine_tune = copy.deepcopy(base)
    fine_tune.transformer.h[0].attn.c_attn.bias.data += torch.randn(144)
    folders = save_pair(tmp_path, base, fine_tune)
    extract_lora(*folders, tmp_path / "adapter", rank=4)
    assert difference(with_peft(type(base), folders[1], tmp_path / "adapter"), fine_tune) < EXACT


def test_a_head_that_the_base_does_not_have(tmp_path):
    """The base is BERT as it was pre-trained, with another head and without a pooler."""
    fine_tune = bert(["no", "yes", "perhaps"], layer_norm_eps=1e-12)
    config = BertConfig(**{**fine_tune.config.to_dict(), "architectures": None})
    torch.manual_seed(3)
    base = BertForMaskedLM(config)
    body = {key: tensor for key, tensor in fine_tune.bert.state_dict().items() if not key.startswith("pooler")}
    base.bert.load_state_dict(body)
    for parameter in base.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    folders = save_pair(tmp_path, base, fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", rank=FULL)
    new = {part.name for part in done.parts if part.kind == "saved" and part.change is None}
    assert new == {"classifier", "bert.pooler.dense"}
    loaded = with_peft(type(fine_tune), folders[1], tmp_path / "adapter", num_labels=3)
    assert difference(loaded, fine_tune) < EXACT


def test_more_tokens_than_the_base(tmp_path):
    base = llama()
    fine_tune = tuned(base)
    fine_tune.resize_token_embeddings(310)
    folders = save_pair(tmp_path, base, fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", rank=FULL)
    assert any("resize the base's embeddings to 310 rows" in warning for warning in done.warnings)
    grown = LlamaForCausalLM.from_pretrained(folders[1])
    grown.resize_token_embeddings(310)
    assert difference(PeftModel.from_pretrained(grown, tmp_path / "adapter").eval(), fine_tune) < EXACT


def test_old_names_in_the_files_and_shards(tmp_path):
    """A base in shards, and a fine-tune whose file lacks the prefix of the body."""
    base = llama_body()
    fine_tune = tuned(base)
    fine_tune.save_pretrained(tmp_path / "tuned")
    whole = llama()
    whole.model.load_state_dict(base.state_dict())
    whole.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len([*(tmp_path / "base").glob("model-*.safetensors")]) > 3
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=FULL)
    assert difference(with_peft(LlamaModel, tmp_path / "base", tmp_path / "adapter"), fine_tune) < EXACT


def test_convolutions_are_saved_in_full(tmp_path):
    base = resnet(["no", "yes"])
    folders = save_pair(tmp_path, base, tuned(base))
    with pytest.raises(FusionError, match="no linear layer"):  # the only one is the head
        extract_lora(*folders, tmp_path / "adapter", rank=4)


def test_parameters_beside_linear_layers_are_named(tmp_path):
    """A parameter of a model itself cannot be saved without saving all of the model."""
    from transformers import CLIPConfig, CLIPModel

    towers = {
        "text_config": {**SMALL, "vocab_size": 300},
        "vision_config": {**SMALL, "image_size": 16, "patch_size": 8},
    }
    torch.manual_seed(0)
    base = CLIPModel(CLIPConfig(projection_dim=16, **towers))
    folders = save_pair(tmp_path, base, tuned(base))
    done = extract_lora(*folders, tmp_path / "adapter", rank=FULL)
    assert done.left_out == ["logit_scale"]
    assert done.warnings == ["cannot be stored (a parameter of a module with linear layers): logit_scale"]
    assert done.error == pytest.approx(
        math.sqrt(next(p.squared for p in done.parts if p.name == "logit_scale") / sum(p.squared for p in done.parts)),
        rel=1e-3,
    )


def test_linear_layers_alone_are_routed_by_phatgoose(tmp_path):
    base = llama()
    experts = []
    for seed in (1, 2):
        fine_tune = tuned(base, seed)
        folder = tmp_path / str(seed)
        folders = save_pair(folder, base, fine_tune)
        make_tokenizer(300).save_pretrained(folders[0])
        done = extract_lora(folders[0], tmp_path / "1" / "base", folder / f"lora-{seed}", rank=FULL, linear_only=True)
        assert {*done.left_out} == {
            f"{path}.weight"
            for path, module in base.named_modules()
            if path == "model.embed_tokens" or "norm" in path.rpartition(".")[2]
        }
        assert "left out as asked" in done.warnings[0] and not any(part.kind == "saved" for part in done.parts)
        # what remains is the fine-tune with the norms and embeddings of the base
        for name, parameter in fine_tune.named_parameters():
            if name in done.left_out:
                parameter.data.copy_(base.get_parameter(name))
        loaded = with_peft(LlamaForCausalLM, tmp_path / "1" / "base", folder / f"lora-{seed}")
        assert difference(loaded, fine_tune) < EXACT
        experts.append((folder / f"lora-{seed}", fine_tune))
    rows = datasets.Dataset.from_dict({"prompt": [text[:9] for text in CORPUS], "target": [t[9:] for t in CORPUS]})
    for folder, _ in experts:
        [expert] = load_experts([folder], base=tmp_path / "1" / "base", gates=False)
        save_gates(train_gates(expert, rows, steps=2), folder)
    alone = fuse("phatgoose", [experts[0][0]], tmp_path / "1" / "base", top_k=1)
    assert difference(alone, experts[0][1]) < EXACT  # a router of one expert is that expert
    both = fuse("phatgoose", [folder for folder, _ in experts], tmp_path / "1" / "base", top_k=2)
    assert difference(both, base) > 0.01 and outputs(both).isfinite().all()


def test_heads_of_linear_only_adapters_are_kept(tmp_path):
    base = bert(["no", "yes"])
    fine_tune = tuned(base)
    folders = save_pair(tmp_path, base, fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", rank=FULL, linear_only=True)
    assert [part.name for part in done.parts if part.kind == "saved"] == ["classifier"]
    assert "bert.encoder.layer.0.attention.self.query.bias" in done.left_out
    [expert] = load_experts([tmp_path / "adapter"], base=folders[1], gates=False)
    assert expert.labels == ["no", "yes"]
    assert torch.equal(expert.adapter.saved["classifier.weight"], fine_tune.classifier.weight)


def test_families_refuse_changed_biases_by_name(tmp_path):
    base = bert(["no", "yes"])
    folders = save_pair(tmp_path, base, tuned(base))
    extract_lora(*folders, tmp_path / "adapter", rank=4)
    with pytest.raises(FusionError, match=r"lora_bias=True(.|\n)*--linear-only"):
        load_experts([tmp_path / "adapter"], base=folders[1])


def test_half_precision(tmp_path):
    base = llama().bfloat16()
    fine_tune = tuned(base.float(), std=0.05).bfloat16()
    folders = save_pair(tmp_path, base.bfloat16(), fine_tune)
    done = extract_lora(*folders, tmp_path / "adapter", rank=FULL, dtype="bfloat16")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    eps = torch.finfo(torch.bfloat16).eps
    assert 0.01 * eps < done.error < 2 * eps


def test_an_adapter_can_be_extracted_again_with_a_smaller_rank(tmp_path):
    base = llama()
    folders = save_pair(tmp_path, base, tuned(base))
    extract_lora(*folders, tmp_path / "one", rank=FULL)
    again = extract_lora(f"{folders[1]}+{tmp_path / 'one'}", folders[1], tmp_path / "two", rank=5, exact=True)
    direct = extract_lora(*folders, tmp_path / "three", rank=5, exact=True)
    assert again.errors == pytest.approx(direct.errors, rel=1e-4)
    with pytest.raises(FusionError, match="one is an adapter, not the base"):
        extract_lora(folders[0], tmp_path / "one", tmp_path / "four", rank=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 4, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"energy": 0.0}, r"energy is 0\.0"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"rank": 4, "dtype": "int8"}, "dtype is 'int8'"),
        ({"rank": 4, "device": "tpu"}, "tpu"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    base = llama()
    folders = save_pair(tmp_path, base, tuned(base))
    before = tree(tmp_path)
    with pytest.raises(FusionError, match=message):
        extract_lora(*folders, tmp_path / "adapter", **options)
    assert tree(tmp_path) == before


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    base = llama()
    folders = save_pair(tmp_path, base, tuned(base))
    extract_lora(*folders, tmp_path / "adapter", rank=2)
    before = tree(tmp_path)
    for folder, message in ((tmp_path / "adapter", "already contains a model"), (folders[0], "overlaps the input")):
        with pytest.raises(FusionError, match=message):
            extract_lora(*folders, folder, rank=3)
    weights = load_file(folders[0] / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(weights, tmp_path / "broken.safetensors", metadata={"format": "pt"})
    (tmp_path / "broken.safetensors").rename(folders[0] / "model.safetensors")
    with pytest.raises(FusionError, match=r"NaN or Inf in model\.layers\.1\.mlp\.down_proj"):
        extract_lora(*folders, tmp_path / "adapter", rank=3, overwrite=True)
    after = tree(tmp_path)
    assert {name: content for name, content in after.items() if not name.startswith("tuned/")} == {
        name: content for name, content in before.items() if not name.startswith("tuned/")
    }


def test_other_models_are_refused(tmp_path):
    folders = save_pair(tmp_path, llama(), gpt2())
    with pytest.raises(FusionError, match="no linear layer of the name and shape"):
        extract_lora(*folders, tmp_path / "adapter", rank=2)
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "model_type": "own", "architectures": ["Own"]}))
    with pytest.raises(FusionError, match="does not know model_type"):
        extract_lora(*folders, tmp_path / "adapter", rank=2)


def test_a_card_of_ones_own_survives(tmp_path):
    base = llama()
    folders = save_pair(tmp_path, base, tuned(base))
    extract_lora(*folders, tmp_path / "adapter", rank=2)
    extract_lora(*folders, tmp_path / "adapter", rank=3, overwrite=True)
    card = tmp_path / "adapter" / "README.md"
    assert "| 3 |" in card.read_text()
    card.write_text("# Mine\n")
    extract_lora(*folders, tmp_path / "adapter", rank=2, overwrite=True)
    assert card.read_text() == "# Mine\n"


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = llama()
    save_pair(tmp_path, base, tuned(base))
    assert main(["extract-lora", "tuned", "--base", "base", "--rank", "4"]) == 0
    shown = capsys.readouterr().out
    assert "✓ Extracted" in shown and "model.layers.0.mlp.up_proj" in shown and "tuned-lora" in shown
    assert (tmp_path / "tuned-lora" / "adapter_model.safetensors").exists()
    assert main(["extract-lora", "tuned", "--base", "base", "--rank", "4"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    words = ["extract-lora", "tuned", "--base", "base", "--energy", "0.5", "-o", "lora", "--format", "json"]
    assert main([*words, "--linear-only"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert 0 < facts["relative_error"] < 1 and len(facts["modules"]) == 21
    assert "left out as asked" in captured.err and "fit gates lora" in captured.err
    for wrong in (["--energy", "1.5"], ["--rank", "0"], [], ["--rank", "1", "--energy", "1"]):
        with pytest.raises(SystemExit) as stopped:
            main(["extract-lora", "tuned", "--base", "base", *wrong])
        assert stopped.value.code == 2
