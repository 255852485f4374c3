"""Phases as people see them: bars on a terminal; elsewhere a line about those that take long, every ten seconds."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any

from hf_fusion.progress import Phase, phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOON, EVERY = 2.0, 10.0  # seconds: when a phase counts as long, and between two lines about it


def start(*modules: str) -> None:
    """Imports modules of this package, as a phase: those that need torch and transformers take seconds."""
    with phase("Starting torch and transformers"):
        for name in modules:
            import_module(f"hf_fusion.{name}")


class Lines:
    """Tells of long phases in lines.

    Args:
        say: shows a line.
        soon: seconds after which a phase is told of.
        every: seconds between two lines of a phase.
    """

    def __init__(self, say: Callable[[str], None], soon: float = SOON, every: float = EVERY) -> None:
        self.say, self.soon, self.every = say, soon, every
        self._next: dict[Phase, float] = {}  # when each phase is told of
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def began(self, phase: Phase) -> None:
        """From now on it is watched."""
        with self._lock:
            self._next[phase] = phase.began + self.soon
            if self._watch is None:
                self._watch = threading.Thread(target=self._tick, daemon=True)
                self._watch.start()

    def moved(self, phase: Phase) -> None:
        """Nothing: the clock tells."""

    def ended(self, phase: Phase) -> None:
        """How long it took, where that was long."""
        with self._lock:
            self._next.pop(phase, None)
        if phase.seconds >= self.soon:
            self.say(finished(phase))

    def close(self) -> None:
        """No more lines."""
        self._over.set()
        if self._watch is not None:
            self._watch.join()

    def _tick(self) -> None:
        while not self._over.wait(min(self.soon, self.every) / 4):
            now = monotonic()
            with self._lock:
                due = [own for own, when in self._next.items() if when <= now]
                self._next |= dict.fromkeys(due, now + self.every)
            for own in due:
                self.say(described(own))


class Bars:
    """Shows phases as bars with the time left, and leaves a line of each long one.

    Args:
        stream: the terminal.
        say: shows a line, above the bars.
    """

    def __init__(self, stream: Any, say: Callable[[str], None]) -> None:
        self.stream, self.say = stream, say
        self._bars: Any = None
        self._tasks: dict[Phase, Any] = {}

    def began(self, phase: Phase) -> None:
        """A bar more."""
        bars = self._started()
        self._tasks[phase] = bars.add_task(phase.name, total=phase.total, shown=amount(phase))

    def moved(self, phase: Phase) -> None:
        """The bar grows."""
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=phase.done, total=phase.total, shown=amount(phase))

    def ended(self, phase: Phase) -> None:
        """The bar goes; of a long phase a line stays."""
        self._bars.remove_task(self._tasks.pop(phase))
        if not self._tasks:
            self._bars.stop()
        if phase.seconds >= SOON:
            self.say(finished(phase))

    def close(self) -> None:
        """No bars are left."""
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without bars for a moment, so that something can be written."""
        bars = self._bars
        if bars is None or not bars.live.is_started:
            yield
            return
        bars.stop()
        try:
            yield
        finally:
            if self._tasks:
                bars.start()

    def _started(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Left(ProgressColumn):
            """The time left, where it can be told."""

            def render(self, task: Task) -> Text:
                left = task.time_remaining
                return Text("" if left is None else f"{time(left)} left")

        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}", markup=False),
                TimeElapsedColumn(),
                Left(),
            )
            console = Console(file=self.stream, highlight=False)
            self._bars = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
        if not self._bars.live.is_started:
            self._bars.start()
        return self._bars


def described(phase: Phase) -> str:
    """What a phase has come to: "Running the experts: 120 of 780, 15 %, 1 min left"."""
    parts = [part for part in (amount(phase),) if part]
    if phase.total and phase.done:
        parts.append(f"{phase.done / phase.total:.0%}")
    left = phase.seconds_left
    parts.append(f"{time(phase.seconds)} so far" if left is None else f"{time(left)} left")
    return f"{phase.name}: {', '.join(parts)}"


def finished(phase: Phase) -> str:
    """How long a phase took."""
    whole = phase.total is None or phase.done >= phase.total
    how_much = "" if whole else f"{amount(phase)}, "
    return f"{phase.name}: {how_much}{time(phase.seconds)}"


def amount(phase: Phase) -> str:
    """How much of it is done."""
    if phase.total is None and not phase.done:
        return ""
    shown = f"{phase.done / 1e6:,.0f}" if phase.unit == "B" else f"{phase.done:,.0f}"
    if phase.total is not None:
        shown += f" of {phase.total / 1e6:,.0f}" if phase.unit == "B" else f" of {phase.total:,.0f}"
    return shown + (" MB" if phase.unit == "B" else "")


def time(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
