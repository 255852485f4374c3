"""State of a call: visible only to its thread or task, and gone when it ends."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from pathlib import Path
from weakref import ref

import pytest
import torch
from threads import run_tasks, wrong_calls
from transformers import DynamicCache

from hf_fusion.models import fused_calls
from hf_fusion.models.fused_calls import _SCOPE, Calls, cache_in


def test_state_ends_with_its_call():
    calls = Calls()
    with calls.entered("outer"):
        with pytest.raises(ValueError, match="inner"), calls.entered("inner"):
            assert calls.current() == "inner"
            raise ValueError("inner")
        assert calls.current() == "outer"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(calls.current).result() is None
        assert Calls().current() is None
    assert calls.current() is None


@pytest.mark.parametrize("first", [0, 1])
def test_scopes_may_be_left_in_any_order(first):
    calls = Calls()
    scopes = [ExitStack(), ExitStack()]
    for value, scope in enumerate(scopes):
        scope.enter_context(calls.scoped(value))
        assert calls.scope() == value
    scopes[first].close()
    assert calls.scope() == 1 - first
    scopes[1 - first].close()
    assert calls.scope() is None


def test_scope_ends_for_all_copies():
    calls = Calls()
    scope = ExitStack()
    scope.enter_context(calls.scoped("open"))
    context = copy_context()
    assert context.run(calls.scope) == "open"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(calls.scope).result() is None
        pool.submit(scope.close).result()
    assert calls.scope() is None
    assert context.run(calls.scope) is None


def test_tasks_have_separate_scopes_and_kept_values():
    calls = Calls()

    async def task(value: int) -> list[object]:
        seen = [calls.scope(), calls.kept()]
        with calls.scoped(value):
            calls.keep(value)
            await asyncio.sleep(0)
            seen += [calls.scope(), calls.kept()]
        return [*seen, calls.scope()]

    async def all_tasks() -> list[list[object]]:
        with calls.scoped("outer"):
            return await asyncio.gather(*map(task, range(4)))

    assert run_tasks(all_tasks()) == [["outer", None, value, value, "outer"] for value in range(4)]
    assert calls.scope() is None
    assert calls.kept() is None


def test_copies_have_separate_calls_that_end_with_them():
    calls = Calls()
    holder = {"model": calls, "module": calls}
    with calls.scoped(1), calls.entered(1):
        calls.keep(torch.ones(1))
        for copied in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
            own = copied["model"]
            assert own is copied["module"] is not calls
            assert (own.current(), own.scope(), own.kept()) == (None, None, None)
    kept = ref(calls.kept())
    key = ref(calls)
    del calls, holder, copied, own
    gc.collect()
    Calls().keep(None)  # the next call clears it
    assert key() is None
    assert kept() is None
    assert _SCOPE.get() is None


class Adds(torch.nn.Module):
    """Adds what the call found, by hooks as the fused models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()
        self.register_forward_pre_hook(self._begin)
        self.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        self.calls.enter([self.calls.scope(), args[0].sum(), self.calls.current()])

    def _end(self, module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.calls.enter(self.calls.current()[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scope, total, _ = self.calls.current()
        return x + total if scope is None else x * scope


def test_compiled_code_reads_the_values_of_its_thread():
    model = Adds()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.ones(2)

    def within(value: float) -> torch.Tensor:
        with model.calls.scoped(torch.tensor(value)):
            return compiled(x)

    @torch.compile(backend="eager", fullgraph=True)
    def whole(x: torch.Tensor, value: float) -> torch.Tensor:
        with model.calls.scoped(value):
            return model(x)

    calls = {"none": partial(compiled, x), "in the graph": partial(whole, x, 5.0)}
    calls |= {f"{value}": partial(within, value) for value in (3.0, 4.0)}
    assert [call()[0] for call in calls.values()] == [3, 5, 3, 4]
    assert wrong_calls(calls, 100) == []
    torch._dynamo.reset()
    assert model.calls.current() is None


def test_values_kept_by_compiled_code_are_per_thread():
    calls = Calls()

    @torch.compile(backend="eager", fullgraph=True)
    def call(x: torch.Tensor) -> torch.Tensor:
        before = calls.kept()
        calls.keep([x + 1])
        return x if before is None else before[0]

    x = torch.ones(1)
    assert (call(x).item(), call(x + 1).item()) == (1, 2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(calls.kept).result() is None
    assert calls.kept()[0].item() == 3
    calls.keep([x])
    assert call(x).item() == 1
    torch._dynamo.reset()


def test_compiled_code_reads_the_scopes_of_its_task():
    model, other = Adds(), Calls()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    async def task(value: float) -> float:
        with model.calls.scoped(torch.tensor(value)), other.scoped("another model's"):
            await asyncio.sleep(0)
            return compiled(torch.ones(2))[0].item()

    async def all_tasks() -> list[float]:
        return await asyncio.gather(*map(task, (2.0, 3.0, 4.0)))

    assert run_tasks(all_tasks()) == [2, 3, 4]
    torch._dynamo.reset()


def test_no_family_uses_the_global_is_compiling_flag():
    """`torch.compiler.is_compiling` is one flag for all threads; a call would take another way for what others do."""
    files = list(Path(fused_calls.__file__).parent.glob("*.py"))
    assert [file.name for file in files if "compiler.is_compiling()" in file.read_text(encoding="utf-8")] == []
    assert any("is_dynamo_compiling()" in file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # since transformers 5.24, and before
def test_a_cache_is_found_under_either_name(name):
    cache = DynamicCache()
    assert cache_in({"input_ids": None, "cache": None, name: cache}) is cache
    assert cache_in({"input_ids": None}) is None
