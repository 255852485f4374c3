"""A static merge, its experts and its base: scores equal the plain models', one model in memory at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import TEXTS, bert, gpt2, make_tokenizer
from tiny_fused import bert_base, fine_tuned

from hf_fusion import FusionError, Recipe, RecipeExpert, evaluate, fuse, merge
from hf_fusion.evaluation.results import Results

ROWS = datasets.Dataset.from_dict({"text": [f"{text} {i}" for i in range(5) for text in TEXTS], "label": [0, 1] * 10})
WORDS = datasets.Dataset.from_dict({"prompt": ["the quick brown", "experts are"], "target": [" fox", " fused"]})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier, two fine-tunes of it, and one of other classes."""
    folder = tmp_path_factory.mktemp("models")
    base = bert_base()
    models = {"base": base, "foxes": fine_tuned(base, 0), "dogs": fine_tuned(base, 1), "cats": bert(["cat", "dog"], 5)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in models}


def right(model, rows=ROWS) -> float:
    tokens = make_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        return float((model(**tokens).logits.argmax(-1) == torch.tensor(rows["label"])).float().mean())


def test_scores_equal_those_of_the_plain_models(folders, tmp_path, caplog):
    experts = [folders["foxes"], folders["dogs"]]
    model = fuse("task_arithmetic", experts, folders["base"], scaling=0.5)
    suite = {"foxes": ROWS, "all": ROWS.select(range(6))}
    results = evaluate(
        model, suite, experts=[*experts, folders["cats"]], base=folders["base"], batch_size=3, settings={"method": "x"}
    )
    loaded = {name: type(model).from_pretrained(folder) for name, folder in folders.items()}
    expected = {"merged": model} | {name: loaded[name] for name in ("foxes", "dogs", "base")}
    assert [(predictor.name, predictor.kind) for predictor in results.predictors] == [
        ("merged", "fused"), ("foxes", "expert"), ("dogs", "expert"), ("base", "base"),
    ]  # fmt: skip
    for name, own in expected.items():
        assert results[name].scores["foxes"].score == pytest.approx(right(own)), name
        assert results[name].scores["all"].score == pytest.approx(right(own, ROWS.select(range(6)))), name
    assert len({predictor.scores["foxes"].score for predictor in results.predictors}) > 1
    assert [(task.name, task.owner, task.metric) for task in results.tasks] == [
        ("foxes", "foxes", "accuracy"), ("all", None, "accuracy"),
    ]  # fmt: skip
    assert "cats is not measured: it has the classes cat, dog, but the merged model has" in caplog.text
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_adapters_are_measured_in_their_base(tmp_path):
    """Language models, by their answers; the base is the one that the adapters record."""
    gpt2().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    whole = {}
    for seed, name in enumerate(("foxes", "dogs")):
        torch.manual_seed(seed)
        adapted = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM"))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / name)
        whole[name] = adapted.merge_and_unload().eval()
    recipe = Recipe("linear", tuple(RecipeExpert(str(tmp_path / name)) for name in whole))
    folder = merge(recipe, tmp_path / "merged").folder
    results = evaluate(
        folder, {"foxes": WORDS}, experts=[expert.model for expert in recipe.experts], metrics={"foxes": "tokens"}
    )
    assert [predictor.name for predictor in results.predictors] == ["merged", "foxes", "dogs", "base"]
    for name, model in {**whole, "base": gpt2()}.items():
        with torch.no_grad():
            shares = []
            for prompt, target in zip(WORDS["prompt"], WORDS["target"], strict=True):
                start = make_tokenizer()(prompt)["input_ids"]
                wanted = make_tokenizer()(target, add_special_tokens=False)["input_ids"] + [2]
                logits = model(torch.tensor([start + wanted])).logits[0, len(start) - 1 : -1]
                shares.append(float((logits.argmax(-1) == torch.tensor(wanted)).float().mean()))
        assert results[name].scores["foxes"].score == pytest.approx(sum(shares) / 2), name


def test_experts_in_folders_of_equal_names_are_distinguished(folders, tmp_path):
    twins = [tmp_path / place / "last" for place in ("first", "second")]
    for folder, name in zip(twins, ("foxes", "dogs"), strict=True):
        shutil.copytree(folders[name], folder)
    results = evaluate(folders["foxes"], {"last": ROWS}, experts=twins)
    assert [predictor.name for predictor in results.predictors] == ["merged", "last", str(twins[1])]
    alone = evaluate(folders["dogs"], {"last": ROWS})
    assert results[str(twins[1])].scores == alone["merged"].scores


def test_misfits_are_named(folders):
    with pytest.raises(FusionError, match="no tasks"):
        evaluate(folders["foxes"], {})
    with pytest.raises(FusionError, match=r"column 'label' holds \[2\], but the labels of foxes are"):
        evaluate(folders["foxes"], {"foxes": datasets.Dataset.from_dict({"text": ["a"], "label": [2]})})
