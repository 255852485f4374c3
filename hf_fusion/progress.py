"""Progress of long work in named phases; without a reporter nothing is shown.

    with reporting(reporter):
        fit_fuser(model, rows)  # calls the reporter when a phase begins, advances and ends

A reporter is set for the code in its `with` block, in the same thread only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Phase:
    """A phase of work in progress. It may be advanced from any thread.

    Attributes:
        name: such as "Running the experts".
        total: amount of work, or None if unknown.
        unit: of `total` and `done`: "B" for bytes, "" for counts.
        done: finished amount.
        began: time of its start, by `time.monotonic`.
    """

    name: str
    total: float | None = None
    unit: str = ""
    done: float = 0
    began: float = field(default_factory=monotonic)
    _reporter: Reporter | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def advance(self, amount: float = 1) -> None:
        """Adds to the finished amount."""
        with self._lock:
            self.done += amount
        if self._reporter:
            self._reporter.moved(self)

    def reach(self, done: float, total: float | None = None) -> None:
        """Sets the finished amount, and the total if it is given."""
        with self._lock:
            self.done, self.total = done, self.total if total is None else total
        if self._reporter:
            self._reporter.moved(self)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return monotonic() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until it ends, at the average rate so far; None if unknown."""
        if not self.total or self.done <= 0:
            return None
        return self.seconds * max(0.0, self.total - self.done) / self.done


class Reporter(Protocol):
    """Receives the progress of phases, which may be nested. `moved` may be called from any thread."""

    def began(self, phase: Phase) -> None:
        """A phase has begun."""

    def moved(self, phase: Phase) -> None:
        """A phase has advanced."""

    def ended(self, phase: Phase) -> None:
        """A phase has ended, or was aborted."""


_reporter: ContextVar[Reporter | None] = ContextVar("hf_fusion_reporter", default=None)


@contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Sets the reporter for phases within this context."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def is_reported() -> bool:
    """Whether a reporter is set."""
    return _reporter.get() is not None


@contextmanager
def phase(name: str, total: float | None = None, unit: str = "") -> Iterator[Phase]:
    """Opens a phase for the duration of the context; see `Phase`."""
    reporter = _reporter.get()
    current = Phase(name, total, unit, _reporter=reporter)
    if reporter:
        reporter.began(current)
    try:
        yield current
    finally:
        if reporter:
            reporter.ended(current)


def track(items: Iterable[T], name: str, total: float | None = None) -> Iterator[T]:
    """Yields the items, as a phase that advances by one per item.

    Args:
        items: an iterable.
        name: of the phase.
        total: number of items, if `items` has no length.
    """
    with phase(name, len(items) if total is None and isinstance(items, Sized) else total) as current:
        for item in items:
            yield item
            current.advance()


__all__ = ["Phase", "Reporter", "is_reported", "phase", "reporting", "track"]
