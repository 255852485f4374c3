"""One router used by several threads and tasks: each call equals a single-threaded one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

import pytest
import torch
from models.test_phatgoose import IDS, MASK, SHAPES, T5, experts_of
from models.test_phatgoose_gaussian import with_gaussians
from models.test_phatgoose_published import heads_of_different_labels
from threads import difference, run_tasks, wrong_calls
from tiny import llama, t5
from torch.utils.checkpoint import checkpoint
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_fusion import Expert, PhatgooseRouter

LONG = torch.arange(5, 41).view(3, 12) * 7 % 290 + 3
LENGTHS = torch.tensor([12, 7, 4])
AFTER = (torch.arange(12) < LENGTHS[:, None]).long()  # padded at the end
BEFORE = AFTER.flip(1)  # at the beginning, as generation wants it
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

Calls = dict[str, Callable[[], Any]]


def logits(router: PhatgooseRouter, *, using: Any = "", mask: torch.Tensor | None = None, **inputs: Any) -> Any:
    """The logits of real tokens; those of padding are of no use to anyone."""
    with torch.no_grad(), router.using(using) if using != "" else nullcontext():
        got = router(**inputs, attention_mask=mask, use_cache=False).logits
    return got if mask is None or got.shape[:2] != mask.shape else got[mask.bool()]


def generated(router: PhatgooseRouter, *, using: Any = "", **options: Any) -> torch.Tensor:
    with router.using(using) if using != "" else nullcontext():
        return router.generate(**{**GREEDY, **options})


def refused(router: PhatgooseRouter) -> str:
    """A call that fails within the router, which others do not notice."""
    with torch.no_grad(), router.using("me/expert-1"):
        try:
            router(input_ids=IDS + 1000)
        except IndexError as error:
            return type(error).__name__
    return "no error"


def experts(router: PhatgooseRouter) -> dict[str, Any]:
    """What `using` takes, by name."""
    count = len(router.experts)
    even = [1 / count] * count
    return {"one": router.experts[1], "even": even, "each": torch.eye(count)[[1, 0, 1]], "base": None}


def causal(gates: Callable[[list[Expert]], list[Expert]] = list) -> Calls:
    router = PhatgooseRouter.from_experts(gates(experts_of(llama(), SHAPES["llama mixed"][1])))
    run, write = partial(logits, router), partial(generated, router)
    calls: Calls = {
        "plain": partial(run, input_ids=LONG),
        "short": partial(run, input_ids=IDS),
        "padded": partial(run, input_ids=LONG, mask=AFTER),
        "padded before": partial(run, input_ids=LONG, mask=BEFORE),
        "short padded": partial(run, input_ids=IDS, mask=MASK),
        "through the backbone": lambda: router.backbone(input_ids=LONG, attention_mask=AFTER).logits[AFTER.bool()],
        "fails": partial(refused, router),
        "greedy": partial(write, input_ids=LONG, attention_mask=BEFORE),
        "beams": partial(write, input_ids=IDS, num_beams=3),
        "static cache": partial(write, input_ids=IDS, cache_implementation="static"),
        "without a cache": partial(write, input_ids=LONG, attention_mask=BEFORE, use_cache=False),
        "by the backbone": lambda: router.backbone.generate(input_ids=LONG, attention_mask=BEFORE, **GREEDY),
    }
    for name, weights in experts(router).items():
        calls[f"using {name}"] = partial(run, input_ids=LONG, mask=AFTER, using=weights)
    for name in ("one", "base"):
        calls[f"greedy using {name}"] = partial(write, input_ids=IDS, using=experts(router)[name])
    return calls


def encoder_decoder() -> Calls:
    router = PhatgooseRouter.from_experts(experts_of(t5(), [(4, T5), (4, T5), (8, (".q", ".v"))]))
    run, write = partial(logits, router), partial(generated, router)
    calls: Calls = {
        "plain": partial(run, input_ids=LONG, decoder_input_ids=LONG[:, :5]),
        "padded": partial(run, input_ids=LONG, mask=AFTER, decoder_input_ids=LONG[:, :5]),
        "as long": partial(run, input_ids=LONG, mask=AFTER, decoder_input_ids=LONG),
        "short": partial(run, input_ids=IDS, mask=MASK, decoder_input_ids=IDS[:, :4]),
        "greedy": partial(write, input_ids=LONG, attention_mask=AFTER),
        "beams": partial(write, input_ids=IDS, attention_mask=MASK, num_beams=2),
        "without a cache": partial(write, input_ids=LONG, attention_mask=AFTER, use_cache=False),
    }
    for name, weights in experts(router).items():
        calls[f"using {name}"] = partial(run, input_ids=LONG, mask=AFTER, decoder_input_ids=LONG[:, :5], using=weights)
    return calls


def heads() -> Calls:
    """Heads of different labels, which follow what the linears chose."""
    router = PhatgooseRouter.from_experts(heads_of_different_labels()[1])

    def run(using: Any = "", **inputs: Any) -> torch.Tensor:
        with torch.no_grad(), router.using(using) if using != "" else nullcontext():
            return router(**inputs).logits

    calls: Calls = {
        "plain": partial(run, input_ids=LONG),
        "padded": partial(run, input_ids=LONG, attention_mask=AFTER),
        "short": partial(run, input_ids=IDS),
        "short padded": partial(run, input_ids=IDS, attention_mask=MASK),
        "fails": partial(refused, router),
    }
    for name, weights in experts(router).items():
        calls[f"using {name}"] = partial(run, input_ids=LONG, attention_mask=AFTER, using=weights)
    return calls


def recorded() -> Calls:
    """Each call reads its own trace."""
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama mixed"][1]))
    router.record_routing = 4096

    def traced(call: Callable[..., Any], **inputs: Any) -> Any:
        call(**inputs)
        return {path: router.routing_trace().expert_weights(path) for path in router.routing_trace().modules}

    run, write = partial(traced, partial(logits, router)), partial(traced, partial(generated, router))
    return {
        "plain": partial(run, input_ids=LONG),
        "padded": partial(run, input_ids=LONG, mask=AFTER),
        "short": partial(run, input_ids=IDS, mask=MASK),
        "using": partial(run, input_ids=IDS, mask=MASK, using="me/expert-0"),
        "greedy": partial(write, input_ids=LONG, attention_mask=BEFORE),
        "beams": partial(write, input_ids=IDS, num_beams=2),
    }


def trained(
    checkpointing: bool, reentrant: bool = False, gates: Callable[[list[Expert]], list[Expert]] = list
) -> Calls:
    """Gradients, also of a backward pass that another thread makes, as autograd does on a GPU."""
    router = PhatgooseRouter.from_experts(gates(experts_of(llama(), SHAPES["llama mixed"][1])))
    router.train()
    if checkpointing:
        router.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wanted = [p for name, p in router.named_parameters() if ".experts." in name]

    def loss(using: Any, **inputs: Any) -> torch.Tensor:
        with router.using(using) if using != "" else nullcontext():
            return router(**inputs, labels=inputs["input_ids"], use_cache=False).loss

    def backward(total: torch.Tensor) -> list[torch.Tensor]:
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True)]

    def there(total: torch.Tensor) -> list[torch.Tensor]:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(backward(total)))
        thread.start()
        thread.join()
        return found

    padded, short = {"input_ids": LONG, "attention_mask": AFTER}, {"input_ids": IDS, "attention_mask": MASK}
    return {
        "padded": lambda: backward(loss("", **padded)),
        "plain": lambda: backward(loss("", input_ids=LONG)),
        "two forwards": lambda: backward(loss("", **short) + 2 * loss("me/expert-2", **padded)),
        "elsewhere": lambda: there(loss("me/expert-1", **padded)),
        "two elsewhere": lambda: there(loss("", **padded) - loss([0.1, 0.2, 0.3, 0.4], **short)),
        "base": lambda: backward(loss(None, **padded) + loss("", **short)),
    }


KINDS: dict[str, Callable[[], Calls]] = {
    "causal": causal,
    "causal, Gaussian gates": partial(causal, with_gaussians),
    "encoder-decoder": encoder_decoder,
    "heads": heads,
    "recorded": recorded,
    "trained": partial(trained, False),
    "trained with checkpoints": partial(trained, True),
    "trained with checkpoints, Gaussian gates": partial(trained, True, gates=with_gaussians),
}


@pytest.mark.long
@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_on_four_threads_equal_single_calls(kind, count):
    assert wrong_calls(KINDS[kind](), count) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "forward of the base"])
def test_compiled_calls_on_four_threads(part):
    """Without `fullgraph`: on several threads PyTorch 2.13 at times finds no compiled frame, even of a plain BERT."""
    router = PhatgooseRouter.from_experts(heads_of_different_labels()[1])
    graph: Any = router
    if part == "model":
        graph = torch.compile(router, backend="eager", dynamic=False)
    else:
        router.backbone.forward = torch.compile(router.backbone.forward, backend="eager", dynamic=False)

    def run(using: Any = "", **inputs: Any) -> torch.Tensor:
        with torch.no_grad(), router.using(using) if using != "" else nullcontext():
            return graph(**inputs).logits

    calls: Calls = {"plain": partial(run, input_ids=LONG), "other": partial(run, input_ids=LONG.flip(1))}
    calls |= {f"using {name}": partial(run, input_ids=LONG, using=own) for name, own in experts(router).items()}
    with torch.compiler.set_stance("force_eager"):
        want = {name: call() for name, call in calls.items()}
    try:
        assert difference({name: call() for name, call in calls.items()}, want) == ""
        assert wrong_calls(calls, 200) == []
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_call_is_traced():
    router = PhatgooseRouter.from_experts(heads_of_different_labels()[1])
    router.record_routing = 4096
    logits(router, input_ids=LONG)
    want = router.routing_trace().to_dict()
    graph = torch.compile(router, backend="eager", fullgraph=True)
    try:
        for inputs in (IDS, LONG):  # the second finds a trace of before
            with torch.no_grad():
                graph(input_ids=inputs)
        assert router.routing_trace().to_dict() == want
    finally:
        torch._dynamo.reset()


def test_tasks_that_take_turns():
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama mixed"][1]))
    router.record_routing = 4096

    async def task(using: Any, mask: torch.Tensor | None) -> Any:
        with router.using(using) if using != "" else nullcontext():
            await asyncio.sleep(0)
            got = logits(router, input_ids=LONG, mask=mask)
            await asyncio.sleep(0)
        return [got] if using is None else [got, router.routing_trace().usage()]

    async def all_at_once(rows: list[tuple[Any, Any]]) -> list[Any]:
        return await asyncio.gather(*(task(*row) for row in rows))

    rows = [(using, mask) for using in ("", *experts(router).values()) for mask in (None, AFTER)]
    alone = [run_tasks(task(*row)) for row in rows]
    assert difference(run_tasks(all_at_once(rows * 3)), alone * 3) == ""


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_contexts_of_threads_may_be_left_in_any_order(order):
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama"][1]))
    want = logits(router, input_ids=IDS)
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    stacks = [ExitStack() for _ in pools]
    answers = []
    for pool, stack, using in zip(pools, stacks, ("me/expert-1", None, [0.1, 0.2, 0.3, 0.4]), strict=True):
        pool.submit(stack.enter_context, router.using(using)).result()
        answers.append(logits(router, input_ids=IDS, using=using))
    for index in order:
        assert torch.equal(pools[index].submit(logits, router, input_ids=IDS).result(), answers[index])
        assert torch.equal(logits(router, input_ids=IDS), want)
        pools[index].submit(stacks[index].close).result()
        assert torch.equal(pools[index].submit(logits, router, input_ids=IDS).result(), want)
    for pool in pools:
        pool.shutdown()


def test_a_trace_is_read_where_it_was_made():
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama"][1]))
    router.record_routing = 4096
    logits(router, input_ids=IDS)
    usage = router.routing_trace().usage()
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="no routing was recorded in this thread"):
            pool.submit(router.routing_trace).result()
        pool.submit(logits, router, input_ids=LONG).result()
        assert pool.submit(router.routing_trace).result().usage() != usage
        copied = copy_context()
        assert pool.submit(copied.run, router.routing_trace).result().usage() == usage
    assert router.routing_trace().usage() == usage
    router.remove_experts(["me/expert-3"])
    with pytest.raises(ValueError, match="no routing was recorded"):
        router.routing_trace()


def test_thread_in_a_copied_context_sees_the_scope():
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama"][1]))
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    write = partial(router.generate, IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    routed = write()
    with router.using("me/expert-2"), ThreadPoolExecutor(1) as pool:
        want = write()
        assert not torch.equal(want, routed)
        assert torch.equal(pool.submit(write).result(), routed)
        assert torch.equal(pool.submit(copy_context().run, write).result(), want)
        pages = ContinuousBatchingConfig(num_blocks=8, block_size=16, max_batch_tokens=64)
        rows = [IDS[0].tolist()]  # in a thread that transformers starts
        batch = router.generate_batch(rows, settings, continuous_batching_config=pages, warmup=False)
    (output,) = batch.values()
    assert output.generated_tokens == want[0, IDS.shape[1] :].tolist()


def test_head_called_alone_follows_the_last_call_of_its_thread():
    router = PhatgooseRouter.from_experts(heads_of_different_labels()[1])
    head, read = router.backbone.classifier, []
    head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        want = router(input_ids=LONG, attention_mask=AFTER).logits
        with ThreadPoolExecutor(1) as pool:
            pool.submit(logits, router, input_ids=IDS).result()
        assert torch.equal(head(read[0]), want)


def test_nested_call_leaves_the_outer_call_unchanged():
    router = PhatgooseRouter.from_experts(heads_of_different_labels()[1])
    with torch.no_grad():
        want = router(input_ids=LONG, attention_mask=AFTER).logits
        inner = []

        def call_again(module: Any, args: Any) -> None:
            if not inner:
                inner.append(None)
                with router.using(None):
                    inner[0] = router(input_ids=IDS, attention_mask=MASK).logits

        layer = router.backbone.bert.encoder.layer[1]
        handle = layer.register_forward_pre_hook(call_again)
        assert torch.equal(router(input_ids=LONG, attention_mask=AFTER).logits, want)
        handle.remove()
        with router.using(None):
            assert torch.equal(inner[0], router(input_ids=IDS, attention_mask=MASK).logits)
    assert router.calls.current() is None


def test_layers_recomputed_by_a_wrapper():
    """Wrappers of layers, as FSDP and accelerate have them, know nothing of the router."""
    router = PhatgooseRouter.from_experts(experts_of(llama(), SHAPES["llama mixed"][1]))
    wanted = [p for name, p in router.named_parameters() if ".experts." in name]

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = router(input_ids=LONG, attention_mask=AFTER, labels=LONG, use_cache=False).loss
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    want = gradients()
    for layer in router.backbone.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for got, gradient in zip(gradients(), want, strict=True):
        assert (got is None and gradient is None) or difference(got, gradient) == ""
