"""Errors of WEMoE: mismatched experts and invalid options, each named."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import bert, gpt2, llama, names
from tiny_fused import (
    base_expert,
    bert_base,
    experts_of,
    fine_tuned,
)
from torch import nn

from hf_fusion import Expert, WEMoEModel
from hf_fusion.errors import FusionError


def narrower(expert: Expert) -> Expert:
    return replace(expert, model=bert(["x", "y"], hidden=16))


def spoiled(expert: Expert, name: str) -> Expert:
    with torch.no_grad():
        expert.model.get_parameter(name).view(-1)[3] = float("nan")
    return expert


def other_vocabulary(expert: Expert) -> Expert:
    expert.model.resize_token_embeddings(410, mean_resizing=False)
    return expert


def deeper(expert: Expert) -> Expert:
    config = type(expert.model.config).from_dict({**expert.model.config.to_dict(), "num_hidden_layers": 3})
    return replace(expert, model=type(expert.model)(config).eval())


def shallower(expert: Expert) -> Expert:
    config = type(expert.model.config).from_dict({**expert.model.config.to_dict(), "num_hidden_layers": 1})
    return replace(expert, model=type(expert.model)(config).eval())


DENSE = "bert.encoder.layer.1.output.dense.weight"
EMBEDDING = "bert.embeddings.word_embeddings.weight"
MISFITS = {
    "other sizes": (narrower, r"me/expert-1: .* is \[.*\], in the base \["),
    "other vocabulary": (
        other_vocabulary,
        f"me/expert-1: {EMBEDDING} is .410, 32., in the base .400, 32.: another voc",
    ),
    "NaN in an MLP": (lambda e: spoiled(e, DENSE), f"me/expert-1 has NaN or Inf in {DENSE}"),
    "NaN in the rest": (lambda e: spoiled(e, EMBEDDING), f"me/expert-1 has NaN or Inf in {EMBEDDING}"),
    "NaN in a head": (lambda e: spoiled(e, "classifier.weight"), "me/expert-1 has NaN or Inf in weight of its head"),
    "another base": (
        lambda e: replace(e, model=bert(["x", "y"], seed=77)),
        "me/expert-1 is too far from the base to be a fine-tune of it .1.3",
    ),
    "more layers": (deeper, "me/expert-1 has 16 tensors that the base does not have, first bert.encoder.layer.2"),
    "fewer layers": (shallower, "me/expert-1 lacks 16 tensors of the base, first bert.encoder.layer.1"),
    "other architecture": (
        lambda e: replace(e, model=llama()),
        "me/expert-1 is a LlamaForCausalLM, me/expert-0 a Bert",
    ),
    "twice": (lambda e: replace(e, name="me/expert-0"), "there are two experts called me/expert-0"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_mismatched_experts_are_refused(name):
    base = bert_base()
    experts = experts_of(base)
    spoil, message = MISFITS[name]
    experts[1] = spoil(experts[1])
    with pytest.raises(ValueError, match=message):
        WEMoEModel.from_experts(experts, base_expert(base))


def test_tied_and_untied_heads():
    tied = gpt2()
    untied = copy.deepcopy(fine_tuned(tied, 0))
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 0.01)
    experts = [Expert("me/tied", fine_tuned(tied, 1)), Expert("me/untied", untied)]
    with pytest.raises(
        ValueError, match="me/untied has lm_head.weight apart from transformer.wte.weight; the base ties"
    ):
        WEMoEModel.from_experts(experts, base_expert(tied))
    fused_tied = WEMoEModel.from_experts(experts[:1], base_expert(tied)).backbone
    assert fused_tied.lm_head.weight is fused_tied.transformer.wte.weight
    torch.manual_seed(0)
    base = type(tied)(type(tied.config).from_dict({**tied.config.to_dict(), "tie_word_embeddings": False})).eval()
    model = WEMoEModel.from_experts([Expert("me/0", fine_tuned(base, 2))], base_expert(base), router_layers=0).backbone
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


OPTIONS = {
    "no experts": ({"experts": []}, "at least one expert; the list is empty"),
    "no base": ({"base": None}, "me/expert-0 is a full model: pass base="),
    "wrong base": (
        {"base": base_expert(llama())},
        "the base LlamaForCausalLM lacks .* tensors of the experts' BertFor",
    ),
    "router_layers": ({"router_layers": 3}, "router_layers is 3; it must be one of 0, 1, 2"),
    "task_vectors": ({"task_vectors": "int4"}, "task_vectors is 'int4'; it must be one of exact"),
    "low rank without a rank": ({"task_vectors": "low-rank"}, "needs either rank= or energy="),
    "rank": ({"task_vectors": "low-rank", "rank": 0}, "rank is 0; it must be a whole number above 0"),
    "energy": ({"task_vectors": "low-rank", "energy": 2}, "energy is 2; it must be above 0"),
    "a rank for nothing": ({"rank": 4}, "rank and energy are for task_vectors='low-rank'"),
    "density": ({"task_vectors": "sparse", "density": 0}, "density is 0; it must be a number above 0 and at most 1"),
    "smile": ({"routing": "smile"}, "it needs task_vectors='low-rank'"),
    "merge": ({"merge": "magic"}, "'magic' is not a static method"),
    "heads": ({"heads": "magic"}, "heads is 'magic'; it must be one of task"),
    "modules": ({"modules": "nothing"}, "no linear that modules='nothing' finds"),
    "pattern": ({"modules": "("}, r"modules='\('.*not a regular expression"),
    "scaling": ({"scaling": "much"}, "scaling is 'much', not a number"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_are_named(name):
    base = bert_base()
    options, message = OPTIONS[name]
    given = {"experts": experts_of(base), "base": base_expert(base), **options}
    with pytest.raises((ValueError, FusionError), match=message):
        WEMoEModel.from_experts(**given)


def test_labels_of_bare_models_are_their_configs():
    base = bert(["x", "y"])
    model = fine_tuned(base, 0)
    model.config.id2label = names(["p", "q"])["id2label"]
    fused_model = WEMoEModel.from_experts([model], base)  # bare models: hf_fusion makes experts of them
    assert fused_model.config.experts[0]["labels"] == ["p", "q"]
