"""One FoE used by several threads and tasks: each call equals a single-threaded one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from threads import difference, run_tasks, wrong_calls
from tiny import (
    TEXTS,
    adapter,
    bert,
    distilbert,
    gpt2,
    image_processor,
    images,
    llama,
    make_tokenizer,
    resnet,
    t5,
    vit,
)
from transformers import LogitsProcessor, LogitsProcessorList

from hf_fusion import Expert, FoEModel, FoEProcessor
from hf_fusion.models.frugal_foe import FrugalPolicy, candidate_subsets

ABC = ["a", "b", "c"]
Call = Callable[[], Any]


class Draws(LogitsProcessor):
    """Samples by the call's own seed: the highest of logits plus Gumbel noise is a draw from their softmax.

    PyTorch's own generator is one for all threads, so that a seed means nothing among them, for any model.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(scores.shape, generator=self.generator).clamp(min=1e-9)
        return scores - (-uniform.log()).log()


def adapters(base: Any, tokenizer: Any, classes: list[list[str]], targets: list[list[str]]) -> list[Expert]:
    """Adapters of one base, of mixed ranks."""
    return [
        Expert(f"me/lora-{k}", base, adapter(base, rank, len(labels), k, own), tokenizer, labels)
        for k, (rank, labels, own) in enumerate(zip((4, 7, 4), classes, targets, strict=True))
    ]


def of_bert(tokenizer: Any) -> list[Expert]:
    return adapters(
        bert(["x", "y"]), tokenizer, [ABC, ["c", "a", "b"], ["b", "a"]], [["query", "value"], ["dense"], ["key"]]
    )


def of_vit(tokenizer: Any) -> list[Expert]:
    return adapters(
        vit(["x", "y"]), image_processor(16), [ABC, ABC[::-1], ABC], [["q_proj"], ["v_proj", "fc1"], ["fc2"]]
    )


def of_llama(tokenizer: Any) -> list[Expert]:
    base = llama()
    return [
        Expert(f"me/lora-{k}", base, adapter(base, 3 + k, None, k, ["q_proj", "v_proj"]), tokenizer) for k in range(3)
    ]


def of_t5(tokenizer: Any) -> list[Expert]:
    base = t5()
    return [Expert(f"me/lora-{k}", base, adapter(base, 4, None, k, ["q", "v"]), tokenizer) for k in range(3)]


def full_texts(tokenizer: Any) -> list[Expert]:
    return [
        Expert("me/bert", bert(ABC, 5), processor=tokenizer, labels=ABC),
        Expert("me/distil", distilbert(ABC), processor=make_tokenizer(330, lower=True), labels=ABC),
    ]


def full_images(tokenizer: Any) -> list[Expert]:
    return [
        Expert("me/vit", vit(ABC, 5), processor=image_processor(16), labels=ABC),
        Expert("me/resnet", resnet(ABC), processor=image_processor(24), labels=ABC),
    ]


def full_llms(tokenizer: Any) -> list[Expert]:
    return [Expert("me/llama", llama(5), processor=tokenizer), Expert("me/gpt2", gpt2(6, 300), processor=tokenizer)]


def full_t5(tokenizer: Any) -> list[Expert]:
    return [Expert(f"me/{k}", t5(k + 5), processor=tokenizer) for k in range(2)]


def frugal(experts: list[Expert]) -> FoEModel:
    """A model that keeps to a budget, by a policy that sends each example another way."""
    model = FoEModel.from_experts(experts)
    subsets = candidate_subsets(len(experts))
    torch.manual_seed(0)
    model.config.frugal = {"rows": 12, "subsets": len(subsets), "neighbors": 2, "cost_weight": 0.01}
    model.policy = FrugalPolicy(12, len(experts), model.config.num_outputs, len(subsets), 2)
    model.policy.subsets.copy_(subsets)
    model.policy.outputs.uniform_()
    model.policy.losses.uniform_()
    return model.eval()


def selection(experts: list[Expert], **options: Any) -> FoEModel:
    """A fuser that sends texts to different experts."""
    torch.manual_seed(0)
    model = FoEModel.from_experts(experts, mode="selection", fuser_hidden=[16], fuser_dropout=0.0, **options)
    torch.nn.init.normal_(model.fuser.output.weight)
    return model


def mixed(tokenizer: Any) -> list[Expert]:
    return of_bert(tokenizer) + full_texts(tokenizer)


# name -> model
CLASSIFIERS: dict[str, Callable[[Any], FoEModel]] = {
    "adapters": lambda tokenizer: FoEModel.from_experts(of_bert(tokenizer)),
    "full models": lambda tokenizer: FoEModel.from_experts(full_texts(tokenizer)),
    "adapters and full models": lambda tokenizer: FoEModel.from_experts(mixed(tokenizer)),
    "frugal": lambda tokenizer: frugal(mixed(tokenizer)),
    "selection": lambda tokenizer: selection(mixed(tokenizer)),
    "selection by one expert": lambda tokenizer: selection(of_bert(tokenizer), features_from=1),
    "mean": lambda tokenizer: FoEModel.ensemble(mixed(tokenizer), over="probabilities"),
    "maximum": lambda tokenizer: FoEModel.ensemble(mixed(tokenizer), rule="max_model"),
    "images": lambda tokenizer: FoEModel.from_experts(of_vit(tokenizer) + full_images(tokenizer)),
    "frugal images": lambda tokenizer: frugal(of_vit(tokenizer) + full_images(tokenizer)),
    "images by selection": lambda tokenizer: selection(of_vit(tokenizer), features_from=0),
    "images by their mean": lambda tokenizer: FoEModel.ensemble(of_vit(tokenizer)),
}
WRITERS: dict[str, Callable[[Any], FoEModel]] = {
    "causal adapters": lambda tokenizer: selection(of_llama(tokenizer)),
    "causal, adapters and full models": lambda tokenizer: selection(of_llama(tokenizer) + full_llms(tokenizer)),
    "causal, by one expert": lambda tokenizer: selection(of_llama(tokenizer), features_from=1),
    "seq2seq adapters": lambda tokenizer: selection(of_t5(tokenizer)),
    "seq2seq, adapters and full models": lambda tokenizer: selection(of_t5(tokenizer) + full_t5(tokenizer)),
}
GENERATION: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"do_sample": False},
    "no cache": lambda: {"do_sample": False, "use_cache": False},
    "beams": lambda: {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "draws": lambda: {"do_sample": False, "logits_processor": LogitsProcessorList([Draws(3)])},
    "scores": lambda: {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
}


def batches(model: FoEModel) -> list[Any]:
    """One input, several of one length, and padded ones."""
    if "image" in model.processor.kinds:
        pictures = images(5)
        return [model.processor(images=given) for given in (pictures[:1], pictures[1:3], pictures)]
    return [model.processor(text=given) for given in (TEXTS[:1], [TEXTS[2], TEXTS[2]], TEXTS)]


def classifying(model: FoEModel) -> list[Call]:
    """Calls of every kind."""
    calls: list[Call] = []
    for inputs in batches(model):
        budgets = (None, 0.3, 0.7) if model.config.frugal else (None,)
        calls += [partial(traced, model, inputs, budget=budget) for budget in budgets]
        if model.config.mode == "output":
            calls.append(partial(asked, model, inputs))
    return calls


def writing(model: FoEModel) -> list[Call]:
    """The same of language models: logits, choices, generation in every way."""
    calls: list[Call] = []
    experts = model.config.num_experts
    for inputs in batches(model):
        count = len(inputs["input_ids"])
        answer = {"decoder_input_ids": torch.full((count, 3), 7)} if model.config.is_encoder_decoder else {}
        calls += [partial(model.select, inputs), partial(traced, model, {**inputs, **answer})]
        for shift in range(2):
            choice = [(row + shift) % experts for row in range(count)]
            calls.append(partial(traced, model, {**inputs, **answer, "choice": choice}))
            calls += [partial(written, model, inputs, make, choice) for make in GENERATION.values()]
        calls += [partial(written, model, inputs, make) for make in GENERATION.values()]
    return calls


def asked(model: FoEModel, inputs: Any) -> list[Any]:
    """What two experts say, and their embeddings."""
    with torch.no_grad():
        outputs, embeddings = model.expert_outputs(inputs, embed=True, experts=[1, 0])
    return [outputs, *embeddings]


def traced(model: FoEModel, inputs: Any, **options: Any) -> list[Any]:
    """Logits, and the routing of the same call."""
    with torch.no_grad():
        logits = model(**inputs, **options).logits
    return [comparable(logits), None if "choice" in inputs else routing(model)]


def written(model: FoEModel, inputs: Any, make: Callable[[], dict[str, Any]], choice: Any = None) -> list[Any]:
    """What is generated, and the routing of the same call."""
    found = model.generate(**inputs, choice=choice, max_new_tokens=4, **make())
    if not torch.is_tensor(found):
        found = [found.sequences, *map(comparable, found.scores)]
    return [found, routing(model) if choice is None else None]


def routing(model: FoEModel) -> list[torch.Tensor]:
    return [comparable(value) for value in model.routing_trace().values() if torch.is_tensor(value)]


def comparable(values: torch.Tensor) -> torch.Tensor:
    """Far from all values instead of -inf, which has no distance from itself."""
    return values.masked_fill(values == float("-inf"), -1e3)


def faults(model: FoEModel, make: Callable[[FoEModel], list[Call]], count: int) -> list[str]:
    model.record_routing = True
    calls = {str(number): call for number, call in enumerate(make(model))}
    some = random.Random(0).sample(sorted(calls), min(count, len(calls)))
    return wrong_calls({name: calls[name] for name in some}, count)


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_threaded_calls_equal_single_calls(name, tokenizer):
    assert faults(CLASSIFIERS[name](tokenizer), classifying, 40) == []


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_threaded_generation_equals_single_calls(name, tokenizer):
    assert faults(WRITERS[name](tokenizer), writing, 24) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSIFIERS, *WRITERS])
def test_a_thousand_calls(name, tokenizer):
    if name in CLASSIFIERS:
        assert faults(CLASSIFIERS[name](tokenizer), classifying, 1000) == []
    else:
        assert faults(WRITERS[name](tokenizer), writing, 1000) == []


def test_calls_of_several_models_at_once(tokenizer):
    """An expert may be part of two models, one of which meets it among others."""
    experts = mixed(tokenizer)
    models = [FoEModel.from_experts(experts), FoEModel.ensemble(experts[3:]), selection(experts[:4])]
    for model in models:
        model.record_routing = True
    calls = [call for model in models for call in classifying(model)]
    assert wrong_calls({str(number): call for number, call in enumerate(calls)}, 80) == []


def test_tasks_read_the_routing_of_their_call(tokenizer):
    model = frugal(mixed(tokenizer))
    model.record_routing = True
    every = batches(model)
    wanted = [traced(model, inputs, budget=0.4)[1] for inputs in every]

    async def task(number: int) -> list[torch.Tensor]:
        with torch.no_grad():
            model(**every[number], budget=0.4)
        await asyncio.sleep(0)  # the other tasks run the model
        return routing(model)

    async def elsewhere(number: int) -> list[torch.Tensor]:
        return (await asyncio.to_thread(traced, model, every[number], budget=0.4))[1]

    async def together() -> list[list[torch.Tensor]]:
        numbers = range(len(every))
        return await asyncio.gather(*map(task, numbers), *map(elsewhere, numbers))

    for found, want in zip(run_tasks(together()), wanted * 2, strict=True):
        assert difference(found, want) == ""


def test_thread_without_a_call_has_no_routing(tokenizer):
    model = CLASSIFIERS["full models"](tokenizer)
    model.record_routing = True
    model(**batches(model)[0])
    assert routing(model)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="read its routing in the same thread or task"):
        pool.submit(model.routing_trace).result()


def test_nested_call(tokenizer):
    """What writes may ask the same model meanwhile: here a processor of logits, at every token."""
    model = WRITERS["causal adapters"](tokenizer)
    inputs = batches(model)[1]
    options = {"choice": [2, 2], "max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(**inputs, **options)

    def asks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        model.select(inputs)
        with pytest.raises(ValueError, match="choice must name"):
            model.generate(**inputs, choice=[0])
        return scores

    assert torch.equal(model.generate(**inputs, **options, logits_processor=LogitsProcessorList([asks])), wanted)


def test_threads_share_a_processor(tokenizer):
    """A fast tokenizer keeps on itself how it pads and truncates."""
    given: list[dict[str, Any]] = [
        {"text": TEXTS},
        {"text": TEXTS[1]},
        {"text": TEXTS, "text_pair": ["a", None, "a dog", "c"]},
        {"text": TEXTS, "max_length": 3},
        {"text": TEXTS, "padding": "max_length", "max_length": 20},
    ]
    lower = make_tokenizer(330, lower=True)
    for processor in (FoEProcessor([tokenizer]), FoEProcessor([tokenizer, lower])):
        assert wrong_calls({str(row): partial(prepared, processor, **row) for row in given}, 400) == []
    seeing = CLASSIFIERS["images"](tokenizer).processor
    assert wrong_calls({str(n): partial(prepared, seeing, images=images(n)) for n in (1, 3, 5)}, 40) == []


def prepared(processor: FoEProcessor, **given: Any) -> dict[str, torch.Tensor]:
    return dict(processor(**given))
