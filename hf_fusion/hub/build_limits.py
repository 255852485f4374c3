"""Builds models from untrusted configurations within limits of time and memory.

A number in a ``config.json`` can stand for a million layers, a table of a billion rows, or a loop over both. Models are
therefore built on the meta device, in a thread in which

- modules, parameters and buffers are counted;
- the size of tensors that are computed anyway (tables on the CPU) is determined on the meta device first;
- CPU time and Python's allocations are monitored, so that loops are stopped.
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
"""Bytes of tensors outside of the meta device that are computed while a model is built."""
MOST_OBJECTS = 3_000_000
"""Blocks of 50 to 100 bytes each that Python may allocate while a model is built."""
MOST_SECONDS = 2.0
"""Seconds of CPU time for the building thread; a Llama of 405B parameters takes a third of them."""
_INTERVAL = 0.02  # seconds between checks


class TooMuchError(FusionError):
    """Building the model takes more than any real model does.

    Args:
        what: the limit that was exceeded.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"building the model of config.json takes {what}, which no known model needs")


class _StopError(BaseException):
    """Raised in the building thread; not an Exception, which model classes may catch."""


def build_within_limits(build: Callable[[], T]) -> T:
    """Returns ``build()``, and passes on its exceptions.

    Raises:
        TooMuchError: a limit was exceeded.
    """
    built: list[T] = []
    failed: list[BaseException] = []

    clocks: Queue[Callable[[], float]] = Queue()

    def run() -> None:
        clocks.put(_clock())
        try:
            with _limit_modules(), _limit_tensors():
                built.append(build())
        except BaseException as error:  # raised again in the caller's thread
            failed.append(error)

    worker = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    objects, imported = sys.getallocatedblocks(), len(sys.modules)
    worker.start()
    clock, why = clocks.get(), ""
    began = clock()
    while worker.is_alive():
        worker.join(_INTERVAL)
        if len(sys.modules) != imported:  # importing a library does not count
            objects, imported, began = sys.getallocatedblocks(), len(sys.modules), clock()
        if sys.getallocatedblocks() - objects > MOST_OBJECTS:
            why = "lists of more than a million entries"
        elif clock() - began > MOST_SECONDS:
            why = f"more than {MOST_SECONDS:g} s"
        if why and worker.is_alive():
            _stop(worker)
            worker.join(1)  # a thread within a long call of C code stops at its next bytecode
            raise TooMuchError(why)
    if failed:
        raise TooMuchError(str(failed[0])) if isinstance(failed[0], _StopError) else failed[0]
    return built[0]


@contextmanager
def _limit_modules() -> Iterator[None]:
    """Counts the modules, parameters and buffers that this thread registers."""
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


def _limit_tensors() -> Any:
    """A dispatch mode that limits the total size of tensors outside of the meta device."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    def to_meta(value: object) -> Any:
        return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

    class SizeLimit(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(
            self,
            func: Callable[..., Any],
            types: object,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            kwargs = dict(kwargs or {})
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            device = kwargs.get("device")
            is_real = torch.device(device).type != "meta" if device is not None else not tensors
            if is_real or any(tensor.device.type != "meta" for tensor in tensors):
                options = {**tree_map(to_meta, kwargs), **({"device": "meta"} if is_real else {})}
                with suppress(Exception):  # a size that depends on values is bounded by the inputs
                    made = func(*tree_map(to_meta, args), **options)
                    self.total += sum(
                        value.numel() * value.element_size()
                        for value in tree_leaves(made)
                        if isinstance(value, torch.Tensor)
                    )
                if self.total > MOST_BYTES:
                    raise _StopError(f"tables of more than {MOST_BYTES // 1_000_000} MB")
            return func(*args, **kwargs)

    return SizeLimit()


def _clock() -> Callable[[], float]:
    """A function that returns this thread's CPU time in seconds; wall time where it is not available."""
    try:
        clock = time.pthread_getcpuclockid(threading.get_ident())  # may crash for a thread that has ended
    except (AttributeError, OSError):
        return time.monotonic

    def seconds() -> float:
        try:
            return time.clock_gettime(clock)
        except OSError:  # it has ended
            return 0.0

    return seconds


def _stop(thread: threading.Thread) -> None:
    """Raises `_StopError` in a thread at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_StopError))
