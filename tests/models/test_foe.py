"""FoEModel compared with a plain loop over experts and examples."""

from __future__ import annotations

import copy
from functools import partial

import datasets
import pytest
import torch
from threads import wrong_calls
from tiny import (
    SUMS,
    TEXTS,
    bert,
    distilbert,
    image_processor,
    images,
    make_tokenizer,
    merged,
    resnet,
    vit,
)

from hf_fusion import Expert, FoEModel, FusionError, fit_fuser

ABC = ["a", "b", "c"]


def to_fused(probabilities: torch.Tensor, labels: list[str], order: list[str]) -> torch.Tensor:
    """Probabilities over an expert's labels, put where the fused labels want them."""
    fused = torch.zeros(len(probabilities), len(order))
    for index, label in enumerate(labels):
        fused[:, order.index(label)] += probabilities[:, index]
    return fused


def test_adapters_of_one_base_equal_merged_models(adapters, tokenizer):
    model = FoEModel.from_experts(adapters)
    outputs, embeddings = model.expert_outputs(model.processor(text=TEXTS), embed=True)
    assert outputs.shape == (4, 3, 3)
    assert len(model.backbones) == 1
    for index, expert in enumerate(adapters):
        plain = merged(expert.model, expert.adapter, expert.labels)
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = plain(**inputs, output_hidden_states=True)
        wanted = to_fused(out.logits.softmax(-1), expert.labels, ABC)
        torch.testing.assert_close(outputs[:, index], wanted, rtol=SUMS, atol=SUMS)
        mask = inputs["attention_mask"][..., None]
        mean = (out.hidden_states[-1] * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(embeddings[index], mean, rtol=1e-5, atol=1e-5)


def test_querying_single_rows_equals_querying_everyone(adapters):
    model = FoEModel.from_experts(adapters)
    inputs = model.processor(text=TEXTS)
    everyone, _ = model.expert_outputs(inputs)
    rows, experts = torch.tensor([3, 0, 2, 1, 0]), torch.tensor([1, 2, 0, 1, 0])
    torch.testing.assert_close(
        model._query(inputs, rows, experts).outputs, everyone[rows, experts], rtol=SUMS, atol=SUMS
    )


def test_the_experts_are_neither_copied_nor_changed(adapters):
    full = Expert("me/full", bert(ABC, seed=3), processor=adapters[0].processor, labels=ABC)
    before = copy.deepcopy(adapters[0].model.state_dict())
    model = FoEModel.from_experts([full, *adapters])
    assert model.backbone_0 is full.model
    after = adapters[0].model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fusion_of_adapters_is_base_plus_adapters_plus_fuser(adapters, tmp_path):
    model = FoEModel.from_experts(adapters, fuser_hidden=[8])
    model.save_pretrained(tmp_path)
    numbers = sum(p.numel() for p in adapters[0].model.parameters()) + sum(p.numel() for p in model.fuser.parameters())
    for expert in adapters:
        numbers += sum(a.numel() + b.numel() for a, b in expert.adapter.lora.values())
        numbers += sum(t.numel() for t in expert.adapter.saved.values())
    assert (tmp_path / "model.safetensors").stat().st_size <= 1.05 * 4 * numbers


def test_experts_with_different_tokenizers_and_architectures(tmp_path):
    experts = [
        Expert("me/bert", bert(ABC), processor=make_tokenizer(), labels=ABC),
        Expert("me/lower", distilbert(["C", "A"]), processor=make_tokenizer(330, lower=True), labels=["C", "A"]),
    ]
    model = FoEModel.from_experts(experts)
    inputs = model.processor(text=TEXTS)
    assert {"input_ids", "input_ids_1", "attention_mask_1"} <= set(inputs)
    outputs, _ = model.expert_outputs(inputs)
    for index, expert in enumerate(experts):
        own = expert.processor(TEXTS, padding=True, return_tensors="pt")
        own = {name: own[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = to_fused(expert.model(**own).logits.softmax(-1), [x.lower() for x in expert.labels], ABC)
        torch.testing.assert_close(outputs[:, index], wanted, rtol=SUMS, atol=SUMS)
    model.save_pretrained(tmp_path)
    again = FoEModel.from_pretrained(tmp_path)
    assert torch.equal(again(**again.processor(text=TEXTS)).logits, model(**inputs).logits)


def test_images_and_text_in_one_fusion(tmp_path):
    experts = [
        Expert("me/vit", vit(ABC), processor=image_processor(16), labels=ABC),
        Expert("me/resnet", resnet(ABC), processor=image_processor(24), labels=ABC),
        Expert("me/bert", bert(ABC), processor=make_tokenizer(), labels=ABC),
    ]
    model = FoEModel.from_experts(experts)
    inputs = model.processor(text=TEXTS, images=images())
    assert model.processor.kinds == ["image", "image", "text"]
    outputs, _ = model.expert_outputs(inputs)
    with torch.no_grad():
        wanted = experts[1].model(**experts[1].processor(images(), return_tensors="pt")).logits.softmax(-1)
    torch.testing.assert_close(outputs[:, 1], wanted, rtol=SUMS, atol=SUMS)
    with pytest.raises(ValueError, match="takes text, but none was given"):
        model.processor(images=images())
    model.save_pretrained(tmp_path)
    again = FoEModel.from_pretrained(tmp_path)
    assert torch.equal(again(**again.processor(text=TEXTS, images=images())).logits, model(**inputs).logits)


def test_labels_are_mapped_renamed_merged_and_dropped(tokenizer):
    experts = [
        Expert("me/one", bert(["good", "bad", "spam"]), processor=tokenizer, labels=["good", "bad", "spam"]),
        Expert(
            "me/two",
            bert(["LABEL_0", "LABEL_1", "LABEL_2"], seed=1),
            processor=tokenizer,
            labels=["LABEL_0", "LABEL_1", "LABEL_2"],
        ),
    ]
    with pytest.raises(ValueError, match="me/two has no names for its labels"):
        FoEModel.from_experts(experts)
    maps = {"me/one": {"spam": None}, "me/two": {"LABEL_0": "bad", "LABEL_1": "good", "LABEL_2": "good"}}
    model = FoEModel.from_experts(experts, label_maps=maps)
    assert model.config.id2label == {0: "good", 1: "bad"}
    inputs = model.processor(text=TEXTS)
    outputs, _ = model.expert_outputs(inputs)
    own = experts[1].model(**inputs).logits.softmax(-1)
    torch.testing.assert_close(outputs[:, 1], torch.stack([own[:, 1] + own[:, 2], own[:, 0]], 1))
    with pytest.raises(ValueError, match=r"outside|not among the fused labels"):
        FoEModel.from_experts(experts, label_maps=maps, labels=["good"])
    with pytest.raises(ValueError, match="label_maps names"):
        FoEModel.from_experts(experts, label_maps={"me/three": {}})


def test_selection_separates_label_spaces(tokenizer):
    experts = [
        Expert("me/mood", bert(["yes", "no"]), processor=tokenizer, labels=["yes", "no"]),
        Expert("me/topic", bert(["no", "sport", "art"], seed=1), processor=tokenizer, labels=["no", "sport", "art"]),
    ]
    model = FoEModel.from_experts(experts, mode="selection")
    assert list(model.config.id2label.values()) == ["yes", "me/mood/no", "me/topic/no", "sport", "art"]
    inputs = model.processor(text=TEXTS)
    model.record_routing = True
    with torch.no_grad():
        model.fuser.output.bias.copy_(torch.tensor([-100.0, 100.0]))
        probabilities = model(**inputs).logits.softmax(-1)
        wanted = experts[1].model(**inputs).logits.softmax(-1)
    torch.testing.assert_close(probabilities[:, 2:], wanted, rtol=1e-4, atol=SUMS)
    assert model.routing_trace()["order"].tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("source", [0, 1, 2])
def test_features_from_one_expert_run_the_others_only_where_chosen(adapters, source):
    for expert in adapters:
        expert.labels = [f"{expert.name}-{label}" for label in expert.labels]
    model = FoEModel.from_experts(adapters, mode="selection", features_from=source)
    inputs = model.processor(text=TEXTS)
    _, embeddings = model.expert_outputs(inputs, embed=True)
    with torch.no_grad():
        choice = model.fuser(embeddings[source]).argmax(1)
        answers, _ = model.expert_outputs(inputs)
        logits = model(**inputs).logits
    torch.testing.assert_close(logits.exp(), answers[torch.arange(4), choice].clamp(min=1e-8), rtol=1e-4, atol=SUMS)


def test_an_expert_that_answers_nan_counts_as_not_queried(adapters, tokenizer):
    broken = bert(ABC, seed=5)
    with torch.no_grad():
        broken.classifier.bias[0] = float("nan")
    model = FoEModel.from_experts([*adapters, Expert("me/broken", broken, processor=tokenizer, labels=ABC)])
    inputs = model.processor(text=TEXTS)
    outputs, _ = model.expert_outputs(inputs)
    assert outputs[:, 3].eq(0).all()
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.long
def test_scores_are_fused_by_regression(tokenizer):
    experts = [
        Expert(f"me/{i}", bert(["score"], seed=i, problem_type="regression"), processor=tokenizer, labels=["score"])
        for i in range(2)
    ]
    model = FoEModel.from_experts(experts)
    inputs = model.processor(text=TEXTS)
    targets = torch.tensor([0.1, 0.5, 0.3, 0.9])
    out = model(**inputs, labels=targets)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - targets) ** 2).mean())
    data = datasets.Dataset.from_dict({"text": TEXTS * 20, "label": targets.tolist() * 20})
    assert fit_fuser(model, data, epochs=60, patience=60, batch_size=8).loss < 0.02
    with pytest.raises(ValueError, match="regression and classification"):
        FoEModel.from_experts([experts[0], Expert("me/c", bert(ABC), processor=tokenizer, labels=ABC)])


def test_one_expert_alone_is_a_fusion_too(tokenizer):
    model = FoEModel.from_experts([Expert("me/one", bert(ABC), processor=tokenizer, labels=ABC)])
    assert model(**model.processor(text=TEXTS)).logits.shape == (4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "must be one of output, selection"),
        ({"costs": [1.0, 2.0]}, "one positive number for each of the 3 experts"),
        ({"features_from": 1}, "in mode='selection'"),
        ({"mode": "selection", "features_from": 9}, "index of an expert"),
    ],
)
def test_options_that_make_no_sense_are_named(adapters, change, message):
    with pytest.raises(ValueError, match=message):
        FoEModel.from_experts(adapters, **change)


def test_a_wrong_adapter_is_named(adapters):
    path, (a, b) = next(iter(adapters[1].adapter.lora.items()))
    adapters[1].adapter.lora[path] = (a[:, :-1], b)
    with pytest.raises(ValueError, match=f"me/adapter-1: LoRA on {path}"):
        FoEModel.from_experts(adapters)


def test_no_experts_and_missing_inputs(adapters):
    with pytest.raises(ValueError, match="at least one expert"):
        FoEModel.from_experts([])
    experts = [Expert("me/a", bert(ABC), processor=make_tokenizer(), labels=ABC)]
    experts.append(Expert("me/b", bert(ABC, seed=1), processor=make_tokenizer(330, lower=True), labels=ABC))
    model = FoEModel.from_experts(experts)
    with pytest.raises(ValueError, match="me/b got no inputs: prepare them with AutoProcessor"):
        model(**make_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    with pytest.raises(ValueError, match="fitted without frugal=True"):
        model(**model.processor(text=TEXTS), budget=0.5)


@pytest.mark.long
def test_bf16_and_compile(adapters):
    model = FoEModel.from_experts(adapters)
    inputs = model.processor(text=TEXTS)
    wanted = model(**inputs).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a break would raise
    torch.testing.assert_close(compiled(**inputs).logits, wanted)
    upside_down = {name: value.flip(0) for name, value in inputs.items()}
    assert wrong_calls({"a": partial(compiled, **inputs), "b": partial(compiled, **upside_down)}, 20) == []
    half = model.to(torch.bfloat16)(**inputs).logits
    torch.testing.assert_close(half.float(), wanted, rtol=0.1, atol=0.1)


def test_experts_of_different_precision_become_one_dtype(tokenizer):
    experts = [
        Expert("me/half", bert(ABC).half(), processor=tokenizer, labels=ABC),
        Expert("me/full", bert(ABC, seed=1), processor=tokenizer, labels=ABC),
    ]
    assert {p.dtype for p in FoEModel.from_experts(experts).parameters()} == {torch.float32}


def test_unknown_labels_and_empty_data_are_refused(adapters):
    model = FoEModel.from_experts(adapters)
    cases = [
        ({"text": [], "label": []}, "data set is empty"),
        ({"text": ["x"] * 4, "label": ["a", "b", "z", "q"]}, "does not know"),
        ({"text": ["x"] * 4, "label": [0, 1, 2, 7]}, "the model has 3 labels"),
        ({"sentence": ["x"] * 4, "label": [0, 1, 2, 0]}, "none of"),
        ({"text": ["x"] * 4}, "no 'label' to learn from"),
        ({"text": ["x"], "label": [0]}, "too few"),
    ]
    for columns, message in cases:
        with pytest.raises(FusionError, match=message):
            fit_fuser(model, datasets.Dataset.from_dict(columns))


def test_only_the_fuser_trains(adapters, tmp_path):
    FoEModel.from_experts(adapters).save_pretrained(tmp_path)
    model = FoEModel.from_pretrained(tmp_path).train()
    assert model.fuser.training
    assert not any(module.training for module in model.backbone_0.modules())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == model.summary()["trainable"] == sum(p.numel() for p in model.fuser.parameters())
