"""What a stranger's configuration describes is built within bounds of time and memory, or refused.

A number in a ``config.json`` costs its author nothing, and may mean a million layers, a table of a billion rows, or
a loop over both. So the model that it describes is built on the meta device, in a thread of which

- modules, parameters and buffers are counted;
- what is computed for real all the same (tables on the CPU) is measured on the meta device first;
- the time and what Python holds are watched, so that loops that do neither are stopped.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from queue import Queue
from typing import Any, TypeVar

from hf_fusion.errors import FusionError

T = TypeVar("T")

MOST_PARTS = 100_000
"""Modules, parameters and buffers of one model: about 150 MB of Python objects."""
MOST_BYTES = 200_000_000
"""Of tensors that are computed for real while a model is built."""
MOST_OBJECTS = 3_000_000
"""What Python may allocate meanwhile, of 50 to 100 bytes each."""
MOST_SECONDS = 2.0
"""Of the building thread's own time; a Llama of 405B parameters takes a third of it."""
_LOOK = 0.02  # seconds between looks


class TooMuchError(FusionError):
    """What is built takes more than any real model does.

    Args:
        what: there was too much of.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"what config.json describes takes {what}: no such model is known")


class _StopError(BaseException):
    """Raised in the thread that builds; not an Exception, which classes of models catch."""


def build_within_limits(build: Callable[[], T]) -> T:
    """What `build` gives, unless it takes too much; whatever it raises is raised.

    Raises:
        TooMuchError: saying what there was too much of.
    """
    given: list[T] = []
    failed: list[BaseException] = []

    clocks: Queue[Callable[[], float]] = Queue()

    def run() -> None:
        clocks.put(_clock())
        try:
            with _counted(), _measured():
                given.append(build())
        except BaseException as error:  # the caller's thread raises it
            failed.append(error)

    worker = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    objects, imported = sys.getallocatedblocks(), len(sys.modules)
    worker.start()
    clock, why = clocks.get(), ""
    began = clock()
    while worker.is_alive():
        worker.join(_LOOK)
        if len(sys.modules) != imported:  # a class's library, which takes its time once
            objects, imported, began = sys.getallocatedblocks(), len(sys.modules), clock()
        if sys.getallocatedblocks() - objects > MOST_OBJECTS:
            why = "lists of more than a million entries"
        elif clock() - began > MOST_SECONDS:
            why = f"more than {MOST_SECONDS:g} s"
        if why and worker.is_alive():
            _stop(worker)
            worker.join(1)  # in a call that does not end it is left: it stops at its next step
            raise TooMuchError(why)
    if failed:
        raise TooMuchError(str(failed[0])) if isinstance(failed[0], _StopError) else failed[0]
    return given[0]


@contextmanager
def _counted() -> Iterator[None]:
    """Counts what this thread adds to modules."""
    from torch.nn.modules import module

    thread, count = threading.get_ident(), 0

    def add(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > MOST_PARTS:
            raise _StopError(f"more than {MOST_PARTS:,} modules and parameters")

    with ExitStack() as stack:
        for register in (
            module.register_module_module_registration_hook,
            module.register_module_parameter_registration_hook,
            module.register_module_buffer_registration_hook,
        ):
            stack.callback(register(add).remove)
        yield


def _measured() -> Any:
    """A mode in which tensors with values are only made up to a size."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    def promise(value: object) -> Any:
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

    class Measured(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            device = kwargs.get("device")
            is_real = torch.device(device).type != "meta" if device is not None else not tensors
            if is_real or any(tensor.device.type != "meta" for tensor in tensors):
                promised = {**tree_map(promise, kwargs), **({"device": "meta"} if is_real else {})}
                with suppress(Exception):  # no size follows from sizes: then it is not larger than what it is made of
                    made = func(*tree_map(promise, args), **promised)
                    self.total += sum(
                        value.numel() * value.element_size()
                        for value in tree_leaves(made)
                        if isinstance(value, torch.Tensor)
                    )
                if self.total > MOST_BYTES:
                    raise _StopError(f"tables of more than {MOST_BYTES // 1_000_000} MB")
            return func(*args, **kwargs)

    return Measured()


def _clock() -> Callable[[], float]:
    """The seconds that this thread has computed, whatever else runs; where they are unknown, those on the wall."""
    try:
        clock = time.pthread_getcpuclockid(threading.get_ident())  # of a thread that has ended this may crash
    except (AttributeError, OSError):
        return time.monotonic

    def seconds() -> float:
        try:
            return time.clock_gettime(clock)
        except OSError:  # it has ended
            return 0.0

    return seconds


def _stop(thread: threading.Thread) -> None:
    """Has a thread raise an error at its next step."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_StopError))
