"""One WEMoE used by several threads: no call sees another's state."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from models.test_wemoe import close, first, fused, shuffled
from models.test_wemoe_experts import different_labels
from threads import run_tasks, wrong_calls
from tiny import SUMS, vit
from tiny_fused import IDS, MASK, PIXELS, TARGETS, TEXT, base_expert, fine_tuned

from hf_fusion import Expert, WEMoEModel

Calls = dict[str, Callable[[], Any]]

# Rows, padding and number of samples differ: what one call takes from another is wrong or does not fit.
TEXTS = [TEXT, {"input_ids": IDS[:2].flip(0) + 7, "attention_mask": MASK[1:]}, {"input_ids": IDS[2:].repeat(4, 2)}]
PROMPTS = [
    {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)},
    {"input_ids": IDS[1:, :4] + 3},
    {"input_ids": IDS[:1].repeat(1, 2)},
]
MEMO = "_previous_max_cache_length"  # a dense model's, of static caches
WRITTEN = {"min_new_tokens": 4, "max_new_tokens": 4}


def pictures_with_heads() -> WEMoEModel:
    """A classifier of images whose tasks have 2, 3 and 1 classes: the last one's loss is that of a regression."""
    labels = (["a", "b"], ["b", "c", "d"], ["e"])
    base = vit(labels[0])
    experts = []
    for number, names in enumerate(labels):
        model = vit(names, seed=number)
        model.vit.load_state_dict(fine_tuned(base, number).vit.state_dict())
        experts.append(Expert(f"me/task-{number}", model, labels=names))
    return shuffled(WEMoEModel.from_experts(experts, base_expert(base)))


def texts_with_heads() -> WEMoEModel:
    base, experts = different_labels()
    return shuffled(WEMoEModel.from_experts(experts, base_expert(base)))


def answer(model: WEMoEModel, inputs: dict[str, Any], how: Any = None, **more: Any) -> list[torch.Tensor]:
    """Logits, and what was recorded of the routing."""
    with torch.no_grad(), nullcontext() if how is None else model.using(how):
        output = model(**inputs, **more)
        found = [first(output), *([] if output.get("loss") is None else [output.loss])]
        return found if how is not None and model.config.routing == "smile" else [*found, *recorded(model)]


def recorded(model: WEMoEModel) -> list[torch.Tensor]:
    return [model.routing_trace().coefficients()] if model.record_routing else []


def gradients(model: WEMoEModel, inputs: list[dict[str, Any]], **more: Any) -> list[torch.Tensor]:
    """Gradients of the routers from two forward passes and one backward pass in another thread."""
    losses = [first(model(**each, **more)).square().sum() for each in inputs]
    routers = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ThreadPoolExecutor(1) as pool:
        return list(pool.submit(torch.autograd.grad, losses[0] - 2 * losses[1], routers).result())


def in_tasks(model: WEMoEModel, inputs: list[dict[str, Any]], run: Any = None) -> list[Any]:
    """Of tasks of one thread, each with an expert of its own, which it uses before and after others run."""

    async def task(name: str | None, own: dict[str, Any]) -> list[Any]:
        with nullcontext() if name is None else model.using(name):
            await asyncio.sleep(0)
            logits = first((model if run is None else run)(**own))
            await asyncio.sleep(0)
            return [logits, *([] if run is not None else recorded(model))]

    async def all_tasks() -> list[Any]:
        names = [*model.experts, None]
        return await asyncio.gather(*(task(name, inputs[i % len(inputs)]) for i, name in enumerate(names)))

    with torch.no_grad():
        return run_tasks(all_tasks())


def coefficients(model: WEMoEModel, rows: int) -> Iterator[tuple[str, Any]]:
    """All ways to say which experts to use, for so many rows."""
    generator = torch.Generator().manual_seed(3)
    count, unit = len(model.experts), model.units[0].name
    yield "a name", model.experts[1]
    yield "a vector", [0.5, -0.2, 0.9][:count]
    yield "rows", torch.randn(rows, count, generator=generator)
    yield "a dict", {unit: torch.randn(rows, count, generator=generator), "": [0.1, 0.7, 0.3][:count]}


def readings(model: WEMoEModel, inputs: list[dict[str, Any]], **more: Any) -> Calls:
    """Forwards, by routers and `using()`, of the whole model, the dense one in it and its stacks."""
    calls: Calls = {}
    for number, each in enumerate(inputs):
        calls[f"forward {number}"] = partial(answer, model, each, **more)
        rows = len(next(iter(each.values())))
        for name, how in coefficients(model, rows) if number < 2 else ():
            calls[f"using {name} {number}"] = partial(answer, model, each, how, **more)

        def dense(each: dict[str, Any] = each) -> torch.Tensor:
            with torch.no_grad():
                return first(model.backbone(**each))

        calls[f"dense {number}"] = dense
    if any(parameter.requires_grad for parameter in model.parameters()):  # SMILE has no routers
        calls["gradients"] = partial(gradients, model, inputs[:2], **more)
    calls["tasks"] = partial(in_tasks, model, inputs)
    if model.config.routing != "smile":
        calls["merged"] = lambda: list(model.merge_for(inputs[1]).state_dict().values())
    return calls


def of_heads(model: WEMoEModel, inputs: list[dict[str, Any]]) -> Calls:
    """What every task answers, and its loss."""
    calls: Calls = {}
    for number, each in enumerate(inputs):
        rows = len(next(iter(each.values())))
        for name, expert in zip(model.experts, model.config.experts, strict=True):
            classes = len(expert["labels"])
            labels = torch.arange(rows) % classes if classes > 1 else torch.arange(rows).float()
            calls[f"{name} of {number}"] = partial(answer, model, each, task=name)
            calls[f"loss of {name} of {number}"] = partial(answer, model, each, task=name, labels=labels)
    return calls


def of_language(model: WEMoEModel, inputs: list[dict[str, Any]]) -> Calls:
    """Generation in all manners; caches that are continued later, and in another thread."""

    def written(each: dict[str, Any], how: Any = None, **options: Any) -> Any:
        with nullcontext() if how is None else model.using(how):
            return [model.generate(**each, **WRITTEN, **options, do_sample=False), *recorded(model)]

    calls: Calls = {}
    for number, each in enumerate(inputs):
        rows = len(each["input_ids"])
        calls[f"greedy {number}"] = partial(written, each)
        calls[f"beams {number}"] = partial(written, each, num_beams=3)
        calls[f"no cache {number}"] = partial(written, each, use_cache=False)
        if number < 2:
            calls[f"static cache {number}"] = partial(written, each, cache_implementation="static")
            given = torch.randn(rows, 3, generator=torch.Generator().manual_seed(number))
            calls[f"greedy, using rows {number}"] = partial(written, each, given)
    if model.config.head == "causal-lm":
        for number, each in enumerate(inputs):
            ids = each["input_ids"]
            prompt = (torch.arange(ids.shape[1]) < 2).expand_as(ids)
            calls[f"prompt {number}"] = partial(answer, model, each, prompt_mask=prompt)
            calls[f"labels {number}"] = partial(answer, model, each, labels=ids.masked_fill(prompt, -100))
            calls[f"cache {number}"] = partial(continued, model, ids)
    return calls


@torch.no_grad()
def continued(model: WEMoEModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits token by token; the cache goes on in this thread and then in another one."""
    output = model(input_ids=ids[:, :2], use_cache=True)
    copied = copy.deepcopy(output.past_key_values)

    def rest(cache: Any) -> torch.Tensor:
        return torch.cat([model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in (2, 3)], 1)

    with ThreadPoolExecutor(1) as pool:
        return [output.logits, rest(output.past_key_values), pool.submit(rest, copied).result()]


def compiled(model: WEMoEModel, inputs: list[dict[str, Any]]) -> Calls:
    """One graph of the whole model and one of the dense model in it, with and without `using()`."""
    more = {} if model.config.head == "image-classification" else {"use_cache": False}
    whole, dense = (torch.compile(m, backend="eager", fullgraph=True) for m in (model, model.backbone))

    def run(call: Any, each: dict[str, Any], how: Any = None) -> torch.Tensor:
        with torch.no_grad(), nullcontext() if how is None else model.using(how):
            return first(call(**each, **more))

    calls: Calls = {}
    for number, each in enumerate(inputs):
        for name, call in (("whole", whole), ("dense", dense)):
            calls[f"compiled {name} {number}"] = partial(run, call, each)
            calls[f"compiled {name} using {number}"] = partial(run, call, each, model.experts[number % 2])
    if not more:
        calls["compiled tasks"] = partial(in_tasks, model, inputs, dense)
    return calls


SEQ2SEQ = [{**each, "decoder_input_ids": TARGETS[: len(each["input_ids"])]} for each in TEXTS[:2]]
PICTURES = [{"pixel_values": PIXELS}, {"pixel_values": PIXELS[1:].flip(0) * 2}]


def language(kind: str = "llama", layers: int = 2, **options: Any) -> tuple[WEMoEModel, Calls]:
    model = fused(kind, layers, **options)[0]
    inputs = PROMPTS if model.config.head == "causal-lm" else SEQ2SEQ
    prompts = PROMPTS if model.config.head == "causal-lm" else TEXTS[:2]
    return model, {**readings(model, inputs), **of_language(model, prompts)}


def classes(build: Callable[[], WEMoEModel], inputs: list[dict[str, Any]]) -> tuple[WEMoEModel, Calls]:
    model = build()
    return model, {**readings(model, inputs), **of_heads(model, inputs)}


def reads(kind: str, layers: int = 2, **options: Any) -> tuple[WEMoEModel, Calls]:
    model = fused(kind, layers, **options)[0]
    return model, readings(model, PICTURES if kind == "vit" else TEXTS)


# name -> a model and its calls
MODELS: dict[str, Callable[[], tuple[WEMoEModel, Calls]]] = {
    "texts": partial(classes, texts_with_heads, TEXTS),
    "pictures": partial(classes, pictures_with_heads, PICTURES),
    "language": language,
    "sequence to sequence": partial(language, "t5"),
    "smile": partial(language, task_vectors="low-rank", energy=0.6, routing="smile"),
    "one layer": partial(reads, "bert", 1, task_vectors="sparse"),
    "constant": partial(language, layers=0),
    "batch_reduce": partial(language, batch_reduce=True, shared_router=True),
    "attention": partial(language, modules="attention", task_vectors="bfloat16"),
    "bart": partial(language, "bart", task_vectors="low-rank", rank=5),
    "opt": partial(language, "opt"),
}
ALWAYS = ("texts", "pictures", "language", "sequence to sequence", "smile")


def settings(model: WEMoEModel) -> list[Any]:
    """What a model has besides tensors: all of it must be as before when calls have ended."""
    modules = [{k: v for k, v in vars(m).items() if type(v) in (bool, int) and k != MEMO} for m in model.modules()]
    return [copy.deepcopy(config.to_dict()) for config in (model.config, model.backbone.config)] + [modules]


def check(kind: str, count: int) -> None:
    model, calls = MODELS[kind]()
    model.record_routing = True
    before, tensors = settings(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert wrong_calls(calls, count) == []
    assert settings(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert (model.shared.calls.current(), model.shared.calls.scope()) == (None, None)


def for_training(kind: str, enable: Callable[[Any], None]) -> WEMoEModel:
    """A model that computes its layers again, without dropout: a pass is then the same every time."""
    model = fused(kind)[0].train()
    enable(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    return model


CHECKPOINTING: dict[str, Callable[[Any], None]] = {
    "model": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "dense": lambda model: model.backbone.gradient_checkpointing_enable({"use_reentrant": False}),
}


def trained(kind: str, enable: Callable[[Any], None]) -> Calls:
    """Gradients of all ways to run a model, two forwards to a backward pass, made in yet another thread."""
    model = for_training(kind, enable)
    inputs, more = (SEQ2SEQ, {"use_cache": False}) if kind == "t5" else (TEXTS, {})
    if kind == "llama":
        more = {"use_cache": False}

    def backward(one: int, two: int, how: Any = None) -> list[torch.Tensor]:
        # The first forward reads what `using` says, the second the routers; both end before the backward pass.
        with nullcontext() if how is None else model.using(how):
            kept = first(model(**inputs[one], **more)).square().sum()
        loss = kept - 2 * first(model.backbone(**inputs[two], **more)).square().sum()
        routers = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with ThreadPoolExecutor(1) as pool:
            return list(pool.submit(torch.autograd.grad, loss, routers).result())

    calls: Calls = {f"{one} and {two}": partial(backward, one, two) for one, two in ((0, 1), (1, 0))}
    return {**calls, "using": partial(backward, 1, 0, model.experts[1])}


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("llama", "model"),
        ("t5", "dense"),
        pytest.param("bert", "dense", marks=pytest.mark.slow),
        pytest.param("llama", "dense", marks=pytest.mark.slow),
        pytest.param("t5", "model", marks=pytest.mark.slow),
    ],
)
def test_recomputed_layers_find_their_call(kind, where):
    again = trained(kind, CHECKPOINTING[where])
    for name, call in trained(kind, lambda model: None).items():
        for got, want in zip(again[name](), call(), strict=True):
            assert close(got, want) <= SUMS, name
    assert wrong_calls(again, 12) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_compiled_threaded_calls_equal_single_calls(kind):
    model = fused(kind)[0]
    inputs = PICTURES if kind == "vit" else PROMPTS[:2]
    calls = {**compiled(model, inputs), **readings(model, inputs)}
    assert wrong_calls(calls, 60) == []
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.parametrize("kind", ALWAYS)
def test_threaded_calls_equal_single_calls(kind):
    check(kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_thousand_threaded_calls_equal_single_threaded_calls(kind):
    check(kind, 1000)
