"""The state of a call of a model: several threads and asyncio tasks may use one model at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import ref

import torch


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache of keys and values among a forward's arguments, or None; transformers 5.24 renamed the argument."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


@dataclass(eq=False)
class Scope:
    """A value that is valid from the entry to the exit of a `with` block; blocks may be left in any order.

    Attributes:
        calls: of the model it belongs to.
        value: what `Calls.scope` returns.
        outer: the enclosing scope, of any model.
        is_open: whether its block is still running.
    """

    calls: Calls
    value: Any
    outer: Scope | None
    is_open: bool = True


# Scopes are immutable but for `is_open`, so that a copied context does not affect the original.
_SCOPE: ContextVar[Scope | None] = ContextVar("scope", default=None)
_KEPT: ContextVar[Mapping[ref[Any], Any]] = ContextVar("kept", default=MappingProxyType({}))


class ThreadState(threading.local):
    """The state of each thread. All attributes exist from the start: a later one would recompile graphs."""

    __slots__ = ()  # otherwise compiled code writes into the object's `__dict__`, which no thread reads

    def __init__(self) -> None:
        self.state: Any = None
        self.scope: Scope | None = None
        self.kept: Any = None
        self.kept_in_graph = False


class Calls:
    """The calls of one model, shared by the model and its modules that read or write the state of a call.

    Three kinds of values differ in their lifetime:

    - The *state* of a running call, `current()`, belongs to the thread that runs it: a call never awaits. Compiled code
      finds it too, since `torch.compile` guards values in a `threading.local` for each thread.
    - A *scope* opened by a user (``with calls.scoped(value)``) and the value *kept* by the last call (a trace) belong
      to a context: to the thread, or to the asyncio task, in which other tasks may run before it ends. Compiled code
      reads a context, but cannot write into it: a scope within it belongs to its thread and ends in it, and what it
      keeps is shared by the tasks of its thread.

    A copy of the model (`copy.deepcopy`, pickle) has calls separate from the original's.

    All families use `torch.compiler.is_dynamo_compiling` to tell whether code is being compiled, since
    `is_compiling` is true in every thread while one of them compiles.
    """

    # torch.compile cannot call ContextVar.get, but it reads and guards attributes implemented in C, such as this one.
    # If the variable was never set, the value is the argument of `get`, which is this object.
    _scope_of_context = property(_SCOPE.get)

    def __init__(self) -> None:
        self._thread = ThreadState()
        self._key = ref(self)

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return type(self), ()

    def current(self) -> Any:
        """The state of the innermost running call of this thread; None if there is none."""
        return self._thread.state

    def enter(self, state: Any) -> Any:
        """Set the state of the running call, for forward hooks; see `entered` for a context manager.

        Returns:
            The previous state, to be entered again when the call ends or fails.
        """
        before = self._thread.state
        self._thread.state = state
        return before

    @contextmanager
    def entered(self, state: Any) -> Iterator[Any]:
        """Context manager that sets the state of the running call."""
        before = self.enter(state)
        try:
            yield state
        finally:
            self.enter(before)

    def scope(self) -> Any:
        """The value of the innermost open scope of this thread or task; None if there is none."""
        for scope in (self._thread.scope, self._scope_of_context):
            while isinstance(scope, Scope):
                if scope.is_open and scope.calls is self:
                    return scope.value
                scope = scope.outer
        return None

    @contextmanager
    def scoped(self, value: Any) -> Iterator[Any]:
        """Context manager in which `scope()` returns the value, in this thread or task and in tasks that it starts."""
        if torch.compiler.is_dynamo_compiling():
            before = self._thread.scope
            self._thread.scope = Scope(self, value, before)
            try:
                yield value
            finally:
                self._thread.scope = before
            return
        scope = Scope(self, value, _SCOPE.get())
        _SCOPE.set(scope)
        try:
            yield value
        finally:
            scope.is_open = False  # also in copies of the context
            innermost = _SCOPE.get()
            while innermost is not None and not innermost.is_open:
                innermost = innermost.outer
            _SCOPE.set(innermost)

    def kept(self) -> Any:
        """The value last kept by a call of this thread or task; None if there is none."""
        thread = self._thread
        if torch.compiler.is_dynamo_compiling():
            return thread.kept
        if thread.kept_in_graph:  # a compiled graph cannot write into the context
            self.keep(thread.kept)
        return _KEPT.get().get(self._key)

    def keep(self, value: Any) -> None:
        """Keep a value for `kept()` in this thread or task, beyond the end of the call."""
        self._thread.kept, self._thread.kept_in_graph = value, torch.compiler.is_dynamo_compiling()
        if not torch.compiler.is_dynamo_compiling():
            _KEPT.set({**_live_others(_KEPT.get(), self._key), self._key: value})


def _live_others(values: Mapping[ref[Any], Any], key: ref[Any]) -> dict[ref[Any], Any]:
    """The values of other models that still exist."""
    return {other: value for other, value in values.items() if other is not key and other() is not None}


__all__ = ["Calls"]
