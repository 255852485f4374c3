"""Runs calls of one model on several threads at once, and compares them with single-threaded calls."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

# Python goes on with another thread after so many seconds, not after 5 ms: calls of tiny models take about as long.
SWITCH = 1e-5

Result = TypeVar("Result")


def wrong_calls(calls: Mapping[str, Callable[[], Any]], count: int, threads: int = 4, seed: int = 0) -> list[str]:
    """Runs every call alone, then `count` calls at random on threads that start together.

    Args:
        calls: by name, functions that give tensors, or lists, tuples and dicts of them and of plain values. A call that
            shall be the same every time sets no global state, such as seeds or gradients of parameters.
        count: calls in all, each name about equally often.

    Returns:
        One line for each call that raised or gave something else than alone; empty where all are right.
    """
    alone = {name: call() for name, call in calls.items()}
    names = [name for _ in range(-(-count // len(calls))) for name in calls][:count]
    random.Random(seed).shuffle(names)
    waiting: SimpleQueue[str] = SimpleQueue()
    for name in names:
        waiting.put(name)
    wrong: list[str] = []
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait()
        while True:
            try:
                name = waiting.get_nowait()
            except Empty:
                return
            try:
                if found := difference(calls[name](), alone[name]):
                    wrong.append(f"{name}: {found}")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")

    workers = [threading.Thread(target=work) for _ in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    return wrong


def run_tasks(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` in another thread, with this context: Playwright keeps an event loop in the thread of the tests."""
    found: list[Result] = []
    context = copy_context()
    worker = threading.Thread(target=lambda: found.append(context.run(asyncio.run, coroutine)))
    worker.start()
    worker.join()
    return found[0]


def difference(got: Any, want: Any) -> str:
    """How an answer differs from what it should be; "" where it does not.

    Floating-point numbers and tensors may differ by √ε of their dtype, relative to their norm: kernels may add in
    another order.
    """
    if isinstance(want, torch.Tensor):
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
        if not want.is_floating_point():
            return "" if torch.equal(got, want) else f"{int((got != want).sum())} of {want.numel()} values differ"
        got, want = got.detach(), want.detach()
        error = float((got - want).norm() / want.norm().clamp(min=torch.finfo(want.dtype).tiny))
        return "" if error <= torch.finfo(want.dtype).eps ** 0.5 else f"differs by {error:.1e} of its norm"
    if isinstance(want, Mapping):
        if got.keys() != want.keys():
            return f"has {', '.join(map(str, got))} for {', '.join(map(str, want))}"
        return next((f"{key}: {found}" for key in want if (found := difference(got[key], want[key]))), "")
    if isinstance(want, (list, tuple)):
        if len(got) != len(want):
            return f"{len(got)} values for {len(want)}"
        return next((found for pair in zip(got, want, strict=True) if (found := difference(*pair))), "")
    if isinstance(got, float) and isinstance(want, float):
        return difference(torch.tensor(got), torch.tensor(want))
    return "" if got == want else f"{got!r} for {want!r}"
