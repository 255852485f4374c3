"""What belongs to a call of a model: several threads and asyncio tasks may use one model at once."""

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


@dataclass(eq=False)
class Scope:
    """A value between the entry to a `with` block and its exit, wherever and in whatever order blocks are left.

    Attributes:
        calls: of the model that it is for.
        value: what `Calls.scope` gives.
        outer: the scope around it, of any model.
        is_open: whether its block was not left yet.
    """

    calls: Calls
    value: Any
    outer: Scope | None
    is_open: bool = True


# Never changed but for `is_open`: who copies the context goes on from there without a word to others.
_SCOPE: ContextVar[Scope | None] = ContextVar("scope", default=None)
_KEPT: ContextVar[Mapping[ref[Any], Any]] = ContextVar("kept", default=MappingProxyType({}))


class OfThread(threading.local):
    """What each thread has for itself, there from the start: an attribute that comes later compiles a graph again."""

    __slots__ = ()  # else compiled code writes into the `__dict__` of the object, which no thread reads

    def __init__(self) -> None:
        self.state: Any = None
        self.scope: Scope | None = None
        self.kept: Any = None
        self.kept_in_graph = False


class Calls:
    """The calls of one model, held by the model and by the modules in it that read or write the state of a call.

    Three things differ in how long they live:

    - The *state* of a call that is running, `current()`, belongs to the thread that runs it: a call never awaits.
      Compiled code finds it too, since `torch.compile` guards what lies in a `threading.local` for each thread.
    - A *scope* that a user opened (``with calls.scoped(value)``) and what the last call *kept* (a trace) belong to a
      context: to the thread, or to the asyncio task, in which other tasks may run before it ends. Compiled code reads
      a context, but cannot write into it: a scope within it belongs to its thread and ends in it, and what it keeps is
      common to the tasks of its thread.

    A copy of the model (`copy.deepcopy`, pickle) has calls apart from the original's.

    Whether code is being compiled is asked by `torch.compiler.is_dynamo_compiling`, here and in all families:
    `is_compiling` is true for every thread while one of them compiles.
    """

    # torch.compile cannot call ContextVar.get, but what C code gives as an attribute it reads, and guards on: this is
    # such an attribute. Where the variable was never set, it is the argument of `get`, these calls themselves.
    _scope_of_context = property(_SCOPE.get)

    def __init__(self) -> None:
        self._thread = OfThread()
        self._key = ref(self)

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return type(self), ()

    def current(self) -> Any:
        """The state of the innermost call that this thread is running; None where it runs none."""
        return self._thread.state

    def enter(self, state: Any) -> Any:
        """Makes this the state of the running call, for hooks before and after a module; see `entered` for code.

        Returns:
            The state of before, to be entered when the call ends, whether it succeeds or fails.
        """
        before = self._thread.state
        self._thread.state = state
        return before

    @contextmanager
    def entered(self, state: Any) -> Iterator[Any]:
        """Within this context this is the state of the running call."""
        before = self.enter(state)
        try:
            yield state
        finally:
            self.enter(before)

    def scope(self) -> Any:
        """The value of the innermost open scope of this thread or task; None where there is none."""
        for scope in (self._thread.scope, self._scope_of_context):
            while isinstance(scope, Scope):
                if scope.is_open and scope.calls is self:
                    return scope.value
                scope = scope.outer
        return None

    @contextmanager
    def scoped(self, value: Any) -> Iterator[Any]:
        """Within this context `scope()` gives this value, in this thread or task and in tasks that it starts."""
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
            scope.is_open = False  # wherever it was copied to
            innermost = _SCOPE.get()
            while innermost is not None and not innermost.is_open:
                innermost = innermost.outer
            _SCOPE.set(innermost)

    def kept(self) -> Any:
        """What a call of this thread or task kept last; None where none did."""
        thread = self._thread
        if torch.compiler.is_dynamo_compiling():
            return thread.kept
        if thread.kept_in_graph:  # where it could not reach the context
            self.keep(thread.kept)
        return _KEPT.get().get(self._key)

    def keep(self, value: Any) -> None:
        """Keeps a value for `kept()`, in this thread or task, when the call has ended."""
        self._thread.kept, self._thread.kept_in_graph = value, torch.compiler.is_dynamo_compiling()
        if not torch.compiler.is_dynamo_compiling():
            _KEPT.set({**_of_others(_KEPT.get(), self._key), self._key: value})


def _of_others(values: Mapping[ref[Any], Any], key: ref[Any]) -> dict[ref[Any], Any]:
    """The values of all other models that still exist."""
    return {other: value for other, value in values.items() if other is not key and other() is not None}


__all__ = ["Calls"]
