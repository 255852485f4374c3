"""Progress of phases: bars on a terminal; elsewhere a line about each long phase, every ten seconds."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from hf_fusion.progress import Phase, phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO


LONG, INTERVAL = 2.0, 10.0  # seconds: the least duration of a long phase, and between two lines about it


@contextmanager
def loading_libraries() -> Iterator[None]:
    """A phase around imports of modules that need torch and transformers, which takes seconds."""
    with phase("Loading torch and transformers"):
        yield


class Lines:
    """Reports long phases in lines.

    Args:
        say: prints a line.
        long: seconds after which a phase is reported.
        interval: seconds between two lines about a phase.
    """

    def __init__(self, say: Callable[[str], None], long: float = LONG, interval: float = INTERVAL) -> None:
        self.say, self.long, self.interval = say, long, interval
        self._next: dict[Phase, float] = {}  # when each phase is reported next
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._timer: threading.Thread | None = None

    def began(self, phase: Phase) -> None:
        """Start to report the phase."""
        with self._lock:
            self._next[phase] = phase.began + self.long
            if self._timer is None:
                self._timer = threading.Thread(target=self._tick, daemon=True)
                self._timer.start()

    def moved(self, phase: Phase) -> None:
        """Nothing: lines are printed by the timer."""

    def ended(self, phase: Phase) -> None:
        """Report the duration of a long phase."""
        with self._lock:
            self._next.pop(phase, None)
        if phase.seconds >= self.long:
            self.say(duration_line(phase))

    def close(self) -> None:
        """Stop the timer."""
        self._closed.set()
        if self._timer is not None:
            self._timer.join()

    def _tick(self) -> None:
        while not self._closed.wait(min(self.long, self.interval) / 4):
            now = monotonic()
            with self._lock:
                due = [each for each, when in self._next.items() if when <= now]
                self._next |= dict.fromkeys(due, now + self.interval)
            for each in due:
                self.say(progress_line(each))


class Bars:
    """Shows phases as bars with the time left; a line about each long phase remains.

    Args:
        stream: the terminal.
        say: prints a line above the bars.
    """

    def __init__(self, stream: TextIO, say: Callable[[str], None]) -> None:
        self.stream, self.say = stream, say
        self._bars: Any = None
        self._tasks: dict[Phase, Any] = {}

    def began(self, phase: Phase) -> None:
        """Add a bar."""
        bars = self._started()
        self._tasks[phase] = bars.add_task(phase.name, total=phase.total, shown=done_text(phase))

    def moved(self, phase: Phase) -> None:
        """Update the bar."""
        if phase in self._tasks:
            self._bars.update(self._tasks[phase], completed=phase.done, total=phase.total, shown=done_text(phase))

    def ended(self, phase: Phase) -> None:
        """Remove the bar, and report the duration of a long phase."""
        self._bars.remove_task(self._tasks.pop(phase))
        if not self._tasks:
            self._bars.stop()
        if phase.seconds >= LONG:
            self.say(duration_line(phase))

    def close(self) -> None:
        """Remove all bars."""
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bars while something else is written."""
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

        class TimeLeft(ProgressColumn):
            """The time left, if it can be estimated."""

            def render(self, task: Task) -> Text:
                left = task.time_remaining
                return Text("" if left is None else f"{duration(left)} left")

        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}", markup=False),
                TimeElapsedColumn(),
                TimeLeft(),
            )
            console = Console(file=self.stream, highlight=False)
            self._bars = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
        if not self._bars.live.is_started:
            self._bars.start()
        return self._bars


def progress_line(phase: Phase) -> str:
    """The state of a phase: "Running the experts: 120 of 780, 15 %, 1 min left"."""
    parts = [part for part in (done_text(phase),) if part]
    if phase.total and phase.done:
        parts.append(f"{phase.done / phase.total:.0%}")
    left = phase.seconds_left
    parts.append(f"{duration(phase.seconds)} so far" if left is None else f"{duration(left)} left")
    return f"{phase.name}: {', '.join(parts)}"


def duration_line(phase: Phase) -> str:
    """The duration of a phase, and what it has done if it did not complete."""
    complete = phase.total is None or phase.done >= phase.total
    done = "" if complete else f"{done_text(phase)}, "
    return f"{phase.name}: {done}{duration(phase.seconds)}"


def done_text(phase: Phase) -> str:
    """How much of a phase is done, "120 of 780" or "3 of 5 MB"; empty if nothing is known."""
    if phase.total is None and not phase.done:
        return ""
    shown = f"{phase.done / 1e6:,.0f}" if phase.unit == "B" else f"{phase.done:,.0f}"
    if phase.total is not None:
        shown += f" of {phase.total / 1e6:,.0f}" if phase.unit == "B" else f" of {phase.total:,.0f}"
    return shown + (" MB" if phase.unit == "B" else "")


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
