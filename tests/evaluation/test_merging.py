"""A merged model and its experts: scores equal the plain models', and mismatches are reported."""

from __future__ import annotations

import datasets
import pytest
import torch
from tiny import TEXTS, gpt2, image_processor, images, make_tokenizer, vit
from tiny_fused import base_expert, bert_base, experts_of

from hf_fusion import FusionError, WEMoEModel, evaluate
from hf_fusion.evaluation.merging import TaskModel
from hf_fusion.evaluation.results import Results
from hf_fusion.training.adamerging import CoefficientMerge

ROWS = datasets.Dataset.from_dict({"text": [f"{text} {i}" for i in range(5) for text in TEXTS], "label": [0, 1] * 10})
WORDS = datasets.Dataset.from_dict({"prompt": ["the quick brown", "experts are"], "target": [" fox", " fused"]})


def made(base, **options):
    experts = experts_of(base(), 3, scale=0.5, **options)
    for expert in experts:
        expert.processor = make_tokenizer()
    return experts, WEMoEModel.from_experts(experts, base=base_expert(base()), scaling=0.4)


def test_scores_equal_those_of_the_plain_models(tmp_path):
    experts, model = made(bert_base, labels=["no", "yes"])
    names = [expert.name for expert in experts]
    results = evaluate(model, dict.fromkeys(names[:2], ROWS), experts=experts, base=bert_base(), batch_size=3)
    tokens = make_tokenizer()(list(ROWS["text"]), padding=True, return_tensors="pt")
    truth = torch.tensor(ROWS["label"])
    start, fine = bert_base().state_dict(), [expert.model.state_dict() for expert in experts]
    merges = {"base": 0, "simple average": 1 / 3, "task arithmetic": 0.4}
    for index, name in enumerate(names[:2]):
        plain = bert_base()
        found = {}
        for system, scaling in merges.items():
            state = {k: t + scaling * sum(f[k] - t for f in fine) for k, t in start.items() if t.is_floating_point()}
            plain.load_state_dict(
                state | {k: fine[index][k] for k in start if "classifier" in k or "pooler" in k}, strict=False
            )
            with torch.no_grad():
                found[system] = plain(**tokens).logits
        with torch.no_grad():
            found["individual experts"] = experts[index].model(**tokens).logits
            found["WEMoE"] = model(**tokens, task=name).logits
        for system, logits in found.items():
            right = float((logits.argmax(-1) == truth).float().mean())
            assert results[system].scores[name].score == pytest.approx(right), system
    assert len({results[system].means["held-in"].score for system in results_names(results)}) > 1
    assert results["task arithmetic"].lead["held-in"].score == pytest.approx(
        results["WEMoE"].means["held-in"].score - results["task arithmetic"].means["held-in"].score
    )
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def results_names(results) -> list[str]:
    return [predictor.name for predictor in results.predictors]


def test_language_models_are_scored_by_their_targets():
    experts, model = made(gpt2)
    owners = {"foxes": experts[1].name}
    results = evaluate(model, {"foxes": WORDS}, experts=experts, base=gpt2(), owners=owners)
    assert {predictor.kind for predictor in results.predictors} == {"fused", "base", "baseline", "oracle"}
    with torch.no_grad():
        right = 0
        for prompt, target in zip(WORDS["prompt"], WORDS["target"], strict=True):
            tokens = make_tokenizer()(prompt, return_tensors="pt")
            wanted = make_tokenizer()(target, add_special_tokens=False)["input_ids"] + [2]
            answer = experts[1].model.generate(**tokens, max_new_tokens=len(wanted), do_sample=False)
            right += answer[0, tokens["input_ids"].shape[1] :].tolist() == wanted
    assert results["individual experts"].scores["foxes"].score == right / 2


def test_learned_coefficients_of_language_models_are_measured():
    experts, _ = made(gpt2)
    merge = CoefficientMerge(experts, gpt2(), "task", scaling=0.4)
    owners, metrics = {"foxes": experts[1].name}, {"foxes": "tokens"}
    results = evaluate(merge, {"foxes": WORDS}, experts=experts, base=gpt2(), owners=owners, metrics=metrics)
    assert results.predictors[0].scores == results["task arithmetic"].scores  # λ is the same for all


def test_pictures_are_measured_in_the_models_precision():
    labels = ["no", "yes"]
    experts = experts_of(vit(labels), 2, labels=labels, scale=0.5)
    for expert in experts:
        expert.model, expert.processor = expert.model.to(torch.bfloat16), image_processor(16)
    model = WEMoEModel.from_experts(experts, base=base_expert(vit(labels).to(torch.bfloat16)), scaling=0.4)
    rows = datasets.Dataset.from_dict({"image": images(4), "label": [0, 1, 1, 0]})
    results = evaluate(model, {experts[0].name: rows})
    pixels = image_processor(16)(images=images(4), return_tensors="pt")["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        right = model(pixel_values=pixels, task=experts[0].name).logits.argmax(-1) == torch.tensor(rows["label"])
    assert results["WEMoE"].scores[experts[0].name].score == float(right.float().mean())


def test_misfits_are_named():
    experts, model = made(bert_base, labels=["no", "yes"])
    with pytest.raises(FusionError, match="no tasks"):
        evaluate(model, {})
    with pytest.raises(FusionError, match="sst2 is not the task of any expert"):
        evaluate(model, {"sst2": ROWS})
    with pytest.raises(FusionError, match="the model was made from"):
        evaluate(model, {experts[0].name: ROWS}, experts=experts[:2], base=bert_base())
    with pytest.raises(FusionError, match="two predictors have the name 'WEMoE'"):
        evaluate(model, {experts[0].name: ROWS}, more=[TaskModel("WEMoE", model)])
