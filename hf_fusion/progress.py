"""Long work in named phases, for whoever wants to show them: silent unless a reporter is set for the call.

    with reporting(reporter):
        fit_fuser(model, rows)  # tells the reporter of each phase, how far it is and when it is over

A reporter is known to what its `with` runs in the same thread, and to nothing else.
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
    """A part of the work that is under way. It may be advanced from any thread.

    Attributes:
        name: what is done, "Running the experts".
        total: how much there is of it; None where nobody knows.
        unit: "B" for bytes; "" for things that are counted.
        done: how much of it is done.
        began: when, by `time.monotonic`.
    """

    name: str
    total: float | None = None
    unit: str = ""
    done: float = 0
    began: float = field(default_factory=monotonic)
    _reporter: Reporter | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        with self._lock:
            self.done += amount
        if self._reporter:
            self._reporter.moved(self)

    def reach(self, done: float, total: float | None = None) -> None:
        """So much is done by now, of so much in all where that has only been found out."""
        with self._lock:
            self.done, self.total = done, self.total if total is None else total
        if self._reporter:
            self._reporter.moved(self)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return monotonic() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Until it ends, if it goes on as it went; None where that cannot be told."""
        if not self.total or self.done <= 0:
            return None
        return self.seconds * max(0.0, self.total - self.done) / self.done


class Reporter(Protocol):
    """What is told of phases; they may be nested. `moved` may be called from any thread."""

    def began(self, phase: Phase) -> None:
        """A phase has begun."""

    def moved(self, phase: Phase) -> None:
        """A phase has come further."""

    def ended(self, phase: Phase) -> None:
        """A phase is over, or was given up."""


_reporter: ContextVar[Reporter | None] = ContextVar("hf_fusion_reporter", default=None)


@contextmanager
def reporting(reporter: Reporter | None) -> Iterator[None]:
    """Has a reporter told of the phases of what runs within."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


def is_reported() -> bool:
    """Whether somebody is told of phases here."""
    return _reporter.get() is not None


@contextmanager
def phase(name: str, total: float | None = None, unit: str = "") -> Iterator[Phase]:
    """A phase that lasts as long as the context; see `Phase`."""
    reporter = _reporter.get()
    own = Phase(name, total, unit, _reporter=reporter)
    if reporter:
        reporter.began(own)
    try:
        yield own
    finally:
        if reporter:
            reporter.ended(own)


def track(items: Iterable[T], name: str, total: float | None = None) -> Iterator[T]:
    """The items, as a phase that advances by one with each.

    Args:
        items: anything that can be iterated over.
        name: of the phase.
        total: how many there are, where they have no length.
    """
    with phase(name, len(items) if total is None and isinstance(items, Sized) else total) as own:
        for item in items:
            yield item
            own.advance()


__all__ = ["Phase", "Reporter", "is_reported", "phase", "reporting", "track"]
