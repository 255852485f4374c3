"""Ensembles: the mean and the maximum of experts' outputs, without a fuser, as one saved model."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from tiny import TEXTS, bert, distilbert, image_processor, images, llama, make_tokenizer, resnet, vit

from hf_fusion import Expert, FoEModel, FusionError, evaluate, fit_fuser, fuse
from hf_fusion.fusion import fuse_recipe, load_fused, save_fused
from hf_fusion.recipe import Recipe

ABC, CAB = ["a", "b", "c"], ["c", "a", "b"]


@pytest.fixture
def experts(tokenizer):
    """Two text classifiers; the second has its labels in another order, and another tokenizer."""
    lower = make_tokenizer(330, lower=True)
    return [
        Expert("me/bert", bert(ABC), processor=tokenizer, labels=ABC),
        Expert("me/distil", distilbert(CAB), processor=lower, labels=CAB),
    ]


def logits_of(experts, texts=TEXTS):
    """Each expert's logits on its own, its labels in alphabetical order, (K, B, C)."""
    found = []
    for expert in experts:
        inputs = expert.processor(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            logits = expert.model(**inputs).logits
        found.append(logits[:, [expert.labels.index(label) for label in sorted(expert.labels)]])
    return torch.stack(found)


def answer(model, texts=TEXTS):
    with torch.no_grad():
        return model(**model.processor(text=texts)).logits


@pytest.mark.parametrize("over", ["logits", "probabilities"])
@pytest.mark.parametrize("rule", ["mean", "weighted", "max_model"])
def test_ensemble_rules_match_their_formulas(rule, over, experts):
    weights = [3.0, 1.0] if rule == "weighted" else None
    model = fuse("ensemble", experts, rule=rule.replace("weighted", "mean"), weights=weights, over=over)
    outputs = logits_of(experts) if over == "logits" else logits_of(experts).softmax(-1)
    wanted = {
        "mean": outputs.mean(0),
        "weighted": 0.75 * outputs[0] + 0.25 * outputs[1],
        "max_model": outputs.max(0).values,
    }[rule]
    got = answer(model) if over == "logits" else answer(model).exp()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert [model.config.id2label[i] for i in range(3)] == ABC
    assert model.summary()["trainable"] == 0
    loss = model(**model.processor(text=TEXTS), labels=torch.tensor([0, 1, 2, 0])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(answer(model), torch.tensor([0, 1, 2, 0])))


def test_distant_logits_are_unchanged(experts):
    with torch.no_grad():
        experts[0].model.classifier.bias.copy_(torch.tensor([0.0, 300.0, -300.0]))
    torch.testing.assert_close(answer(FoEModel.ensemble(experts)), logits_of(experts).mean(0), rtol=1e-5, atol=1e-4)


def test_merged_labels_and_labels_unknown_to_an_expert(tokenizer):
    wide = Expert("me/wide", bert(["a", "b", "b2", "c"]), processor=tokenizer, labels=["a", "b", "b2", "c"])
    narrow = Expert("me/narrow", bert(["a", "b"], seed=1), processor=tokenizer, labels=["a", "b"])
    maps = {"me/wide": {"b2": "b"}}
    with pytest.raises(FusionError, match=r"me/narrow does not know the label 'c'.*over='probabilities'"):
        fuse("ensemble", [wide, narrow], label_maps=maps)
    one, two = logits_of([wide])[0], logits_of([narrow])[0]
    joined = torch.stack([one[:, 0], one[:, 1:3].logsumexp(-1), one[:, 3]], 1)
    got = answer(fuse("ensemble", [wide, narrow], rule="max_model", label_maps=maps))
    wanted = torch.cat([torch.maximum(joined[:, :2], two), joined[:, 2:]], 1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got = answer(fuse("ensemble", [wide, narrow], over="probabilities", label_maps=maps)).exp()
    known = torch.cat([two.softmax(-1), torch.zeros(len(two), 1)], 1)
    torch.testing.assert_close(got, (joined.softmax(-1) + known) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("over", ["logits", "probabilities"])
@pytest.mark.parametrize("rule", ["mean", "max_model"])
def test_expert_with_nan_is_ignored(rule, over, experts):
    with torch.no_grad():
        experts[1].model.classifier.bias[0] = float("nan")
    got = answer(FoEModel.ensemble(experts, rule=rule, over=over)).softmax(-1)
    torch.testing.assert_close(got, logits_of(experts[:1])[0].softmax(-1), rtol=1e-5, atol=1e-5)


def test_regressors_are_averaged(tokenizer):
    experts = [Expert(f"me/{i}", bert(["score"], i), processor=tokenizer, labels=["score"]) for i in range(2)]
    model = fuse("ensemble", experts, weights=[1, 3], over="probabilities")
    torch.testing.assert_close(answer(model), logits_of(experts)[0] * 0.25 + logits_of(experts)[1] * 0.75)


def test_invalid_options_are_refused(experts, tokenizer):
    speakers = [Expert("me/llama", llama(), processor=tokenizer)] * 2
    for given, options, message in (
        (experts, {"rule": "median"}, "rule is 'median'; it must be one of mean, max_model"),
        (experts, {"over": "hidden"}, "over is 'hidden'; it must be one of logits, probabilities"),
        (experts, {"weights": [1.0]}, r"a share for each of the 2 experts, not \[1.0\]"),
        (experts, {"weights": [0.0, 0.0]}, "a share for each of the 2 experts"),
        (experts, {"rule": "max_model", "weights": [1.0, 2.0]}, "'max_model' has no use for weights"),
        (speakers, {}, "causal-lm.*cannot be fused in mode 'output'"),
        ([], {}, "the list is empty"),
    ):
        with pytest.raises(FusionError, match=message):
            fuse("ensemble", given, **options)


def test_recipe_evaluation_and_nothing_to_fit(experts, tmp_path):
    for expert in experts:
        expert.model.save_pretrained(tmp_path / expert.name)
        expert.processor.save_pretrained(tmp_path / expert.name)
    folders = [tmp_path / expert.name for expert in experts]
    model = fuse("ensemble", folders, weights=[1.0, 3.0])
    save_fused(model, tmp_path / "fused")
    recipe = Recipe.load(tmp_path / "fused")
    assert recipe.method == "ensemble" and [expert.weight for expert in recipe.experts] == [1.0, 3.0]
    again, _ = load_fused(tmp_path / "fused")
    assert answer(again).equal(answer(model)) and answer(fuse_recipe(recipe)).equal(answer(model))
    rows = Dataset.from_dict({"text": TEXTS, "label": ["a", "b", "c", "a"]})
    results = evaluate(model, rows)
    right = (answer(model).argmax(-1) == torch.tensor([0, 1, 2, 0])).float().mean()
    assert results.predictors[0].name == "ensemble, mean" and results.predictors[0].only_score.score == pytest.approx(
        float(right)
    )
    with pytest.raises(FusionError, match="no fuser to fit"):
        fit_fuser(model, rows)


LOAD = """
import sys
sys.modules["hf_fusion"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoProcessor, pipeline
model = AutoModelForImageClassification.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
image = Image.open("{image}")
with torch.no_grad():
    torch.save(model(**processor(images=[image])).logits, "{answer}")
pipe = pipeline("image-classification", model="{repo}", trust_remote_code=True)
print("ANSWER", {{row["label"]: row["score"] for row in pipe(image, top_k=3)}})
"""


@pytest.mark.slow  # a fresh process takes ten seconds
def test_fresh_process_without_hf_fusion_gives_equal_outputs(hub, fresh_python, tmp_path):
    experts = [
        Expert("me/vit", vit(ABC), processor=image_processor(16), labels=ABC),
        Expert("me/resnet", resnet(ABC), processor=image_processor(24), labels=ABC),
    ]
    model = fuse("ensemble", experts, rule="max_model")
    model.save_pretrained(tmp_path / "model")
    api = HfApi(endpoint=hub.endpoint, token=hub.token("ensembles"))
    api.create_repo("ensembles/max")
    api.upload_folder(repo_id="ensembles/max", folder_path=tmp_path / "model")
    [image] = images(1)
    image.save(tmp_path / "image.png")
    with torch.no_grad():
        wanted = model(**model.processor(images=[image])).logits
    names = {"repo": "ensembles/max", "image": tmp_path / "image.png", "answer": tmp_path / "answer.pt"}
    done = fresh_python(LOAD.format(**names), hub)
    assert torch.equal(torch.load(tmp_path / "answer.pt"), wanted)
    scores = eval(done.stdout.partition("ANSWER ")[2])
    assert [scores[label] for label in ABC] == pytest.approx(wanted.softmax(-1)[0].tolist(), abs=2e-5)
