"""Adapters merged into one: PEFT computes the same as with all of them, within the reported error."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import bert, gpt2, llama, t5

from hf_fusion import FusionError
from hf_fusion.cli import main
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert

IDS = torch.arange(3, 15).reshape(2, 6)
LLAMA = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 3},
        "alpha_pattern": {"v_proj": 11},
    },
]


def save(folder, model, number=0, base_name="me/base", **options):
    """A PEFT adapter of a model, with random weights in all that it trains."""
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    torch.manual_seed(100 + number)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft_model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base_name}))
    return folder


def logits(model):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def peft_sum(model, folders, weights):
    """The base with Σ w_i ΔW_i, each ΔW_i as PEFT itself computes it."""
    summed = copy.deepcopy(model)
    state, base = summed.state_dict(), model.state_dict()
    for folder, weight in zip(folders, weights, strict=True):
        alone = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict()
        for key, tensor in alone.items():
            state[key] += weight * (tensor - base[key])
    return summed


def recipe_of(folders, weights=None, dtype=None, **parameters):
    experts = [RecipeExpert(str(f), w) for f, w in zip(folders, weights or [None] * len(folders), strict=True)]
    return Recipe("lora", tuple(experts), parameters=parameters, dtype=dtype)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.25, 2.0]])
def test_concatenation_is_exact_for_mixed_ranks_alphas_and_modules(weights, tmp_path):
    model = llama()
    folders = [save(tmp_path / str(i), model, i, **options) for i, options in enumerate(LLAMA)]
    report = merge(recipe_of(folders, weights), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    wanted = logits(peft_sum(model, folders, weights))
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(model)).abs().max() > 0.1
    assert report.error == 0 and not report.errors
    ranks = {path.partition("layers.")[2]: rank for path, rank in report.ranks.items()}
    assert ranks["0.self_attn.q_proj"] == 4 + 8 + 2 and ranks["1.self_attn.q_proj"] == 4 + 8 + 6
    assert ranks["0.self_attn.v_proj"] == 4 + 2 and ranks["0.mlp.up_proj"] == 8 and ranks["0.mlp.down_proj"] == 3
    assert Recipe.load(tmp_path / "out") == report.recipe and report.recipe.base == "me/base"
    assert loaded.peft_config["default"].base_model_name_or_path == "me/base"


@pytest.mark.parametrize("build", [gpt2, t5])
def test_other_architectures(build, tmp_path):
    model = build()
    targets = ["c_attn", "c_proj"] if build is gpt2 else ["q", "v", "wi", "wo"]
    folders = [save(tmp_path / str(i), model, i, r=2 + i, lora_alpha=7, target_modules=targets) for i in range(2)]
    merge(recipe_of(folders, [0.75, 0.5]), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(peft_sum(model, folders, [0.75, 0.5])), rtol=1e-5, atol=1e-5)


def test_svd_is_optimal_for_its_rank_and_reports_its_error(tmp_path):
    model = llama()
    folders = [save(tmp_path / str(i), model, i, **options) for i, options in enumerate(LLAMA)]
    report = merge(recipe_of(folders, rank=5), tmp_path / "out")
    base, summed = model.state_dict(), peft_sum(model, folders, [1, 1, 1]).state_dict()
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").merge_and_unload().state_dict()
    lost, norm = 0.0, 0.0
    for path, rank in report.ranks.items():
        update = (summed[f"{path}.weight"] - base[f"{path}.weight"]).double()
        got = (loaded[f"{path}.weight"] - base[f"{path}.weight"]).double()
        sigma = torch.linalg.svdvals(update)
        best = float(sigma[rank:].norm() / sigma.norm())
        assert float((update - got).norm() / update.norm()) == pytest.approx(best, abs=1e-5)
        if path in report.errors:
            assert rank == 5 and report.errors[path] == pytest.approx(best, abs=1e-5)
            lost, norm = lost + float(sigma[rank:].square().sum()), norm + float(sigma.square().sum())
        else:
            assert rank <= 5 and best < 1e-5
    assert report.error == pytest.approx((lost / norm) ** 0.5, abs=1e-5) and report.error > 0.1


def test_full_rank_has_no_error(tmp_path):
    """Two copies of one adapter have the rank of one."""
    model = llama()
    one = save(tmp_path / "one", model, r=4, lora_alpha=4, target_modules=["q_proj"])
    report = merge(recipe_of([one, one], rank=4, normalize=True), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(peft_sum(model, [one], [1])), rtol=1e-5, atol=1e-5)
    assert report.error < 1e-6


def test_weights_and_ranks_by_module_and_layer(tmp_path):
    model = llama()
    folders = [save(tmp_path / str(i), model, i, r=4, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    ranks = [{"filter": "q_proj", "value": 3}, {"value": 0}]
    experts = (
        RecipeExpert(str(folders[0]), parameters={"weight": [0.0, 1.0]}),
        RecipeExpert(str(folders[1]), parameters={"weight": [{"filter": "v_proj", "value": 2.0}, {"value": 1.0}]}),
    )
    report = merge(Recipe("lora", experts, parameters={"rank": ranks}), tmp_path / "out")
    assert set(report.ranks.values()) == {3, 8}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    name = "base_model.model.model.layers.{}.self_attn.v_proj.lora_B.weight"
    scaling = 8 / 4  # PEFT's default alpha is 8
    for layer, weight in enumerate((0.0, 1.0)):
        wanted = torch.cat([one[name.format(layer)] * scaling * weight, two[name.format(layer)] * scaling * 2], 1)
        torch.testing.assert_close(tensors[name.format(layer)], wanted)


def test_heads_are_averaged_where_the_weights_sum_to_one(tmp_path):
    model = bert(["no", "yes"])
    options = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    folders = [save(tmp_path / str(i), model, i, **options) for i in range(2)]
    merge(recipe_of(folders, [3.0, 1.0], normalize=True), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    wanted = peft_sum(model, folders, [0.75, 0.25])
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=1e-5, atol=1e-5)
    with pytest.raises(FusionError, match="classifier.bias, .*weights sum to 2(.|\n)*normalize: true"):
        merge(recipe_of(folders), tmp_path / "other")
    bare = save(tmp_path / "bare", model, 2, r=2, target_modules=["query"])
    with pytest.raises(FusionError, match=r"0 saves .*classifier.* in full, .*bare does not"):
        merge(recipe_of([folders[0], bare]), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # one head for all is kept, whatever the weights
    merge(recipe_of([folders[0], folders[0]]), tmp_path / "same")
    kept = load_file(tmp_path / "same" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert kept.equal(load_file(folders[0] / "adapter_model.safetensors")["base_model.model.classifier.weight"])


def test_a_lora_on_the_head_that_is_saved_beside_it(tmp_path):
    """PEFT saves the weights of a head (or embedding) that it adapts, under base_layer."""
    model = llama()
    folders = [save(tmp_path / str(i), model, i, r=2, target_modules=["lm_head", "q_proj"]) for i in range(2)]
    assert any("base_layer" in key for key in load_file(folders[0] / "adapter_model.safetensors"))
    merge(recipe_of(folders), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(peft_sum(model, folders, [1, 1])), rtol=1e-5, atol=1e-5)


def test_unmergeable_adapters_are_named(tmp_path):
    model = llama()
    one = save(tmp_path / "one", model, r=2, target_modules=["q_proj"])
    wide = save(tmp_path / "wide", llama(hidden=64), 1, r=2, target_modules=["q_proj"])
    other = save(tmp_path / "other", model, 1, base_name="you/base", r=2, target_modules=["q_proj"])
    dora = save(tmp_path / "dora", model, 1, r=2, target_modules=["q_proj"], use_dora=True)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    for folders, parameters, message in (
        ([one, wide], {}, r"q_proj has different sizes.*\[32, 32\] in .*one, \[64, 64\] in .*wide"),
        ([one, other], {}, "several bases: .*one of me/base, .*other of you/base"),
        ([one, dora], {}, "dora cannot be fused: use_dora"),
        ([one, tmp_path / "model"], {}, "model is not an adapter"),
        ([one, one], {"rank": -1}, "rank is -1, expected a whole number at least 0"),
        ([one, one], {"density": 0.5}, "lora has no parameter 'density'"),
    ):
        with pytest.raises(FusionError, match=message):
            merge(recipe_of(folders, **parameters), out)
    with pytest.raises(FusionError, match="becomes NaN or Inf"):
        merge(recipe_of([one, one], [1e30, 1e30], dtype="float16"), out)
    with pytest.raises(FusionError, match="overlaps the input"):
        merge(recipe_of([one, one]), one)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_command_reports_the_error_of_a_rank(tmp_path, capsys):
    model = llama()
    folders = [str(save(tmp_path / str(i), model, i, r=4, target_modules=["q_proj"])) for i in range(2)]
    given = ["fuse", "--method", "lora", "--experts", *folders, "--set", "rank=4", "--set", "normalize=true"]
    assert main([*given, "-o", str(tmp_path / "out"), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    report = merge(recipe_of(map(str, folders), [None, None], rank=4, normalize=True), tmp_path / "again")
    assert told["relative_error"] == pytest.approx(report.error, abs=1e-6) and report.error > 0
    assert main([*given, "-o", str(tmp_path / "dry"), "--dry-run"]) == 1
    assert "lora merges adapters" in capsys.readouterr().err
