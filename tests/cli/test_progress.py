"""Progress phases: reported per thread, as bars on a terminal and as lines elsewhere."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from cli.test_output import Terminal

from hf_fusion.cli.output import Out
from hf_fusion.cli.progress import Lines, duration_line, progress_line
from hf_fusion.progress import Phase, is_reported, phase, reporting, track


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, float]] = []

    def began(self, phase: Phase) -> None:
        self.told.append(("began", phase.name, phase.done))

    def moved(self, phase: Phase) -> None:
        self.told.append(("moved", phase.name, phase.done))

    def ended(self, phase: Phase) -> None:
        self.told.append(("ended", phase.name, phase.done))


def test_reporter_receives_nested_and_failing_phases():
    heard = Heard()
    with reporting(heard):
        for _ in track([1, 2], "rows"):
            pass
        with pytest.raises(ValueError), phase("outer", 4), phase("inner") as inner:
            inner.reach(3, 9)
            assert (inner.done, inner.total) == (3, 9)
            raise ValueError
    assert heard.told == [
        ("began", "rows", 0), ("moved", "rows", 1), ("moved", "rows", 2), ("ended", "rows", 2),
        ("began", "outer", 0), ("began", "inner", 0), ("moved", "inner", 3), ("ended", "inner", 3),
        ("ended", "outer", 0),
    ]  # fmt: skip
    with phase("nobody listens") as own:
        own.advance()
    assert len(heard.told) == 9


def test_reporter_belongs_to_its_call():
    mine, other = Heard(), Heard()
    seen: list[bool] = []

    def elsewhere() -> None:
        seen.append(is_reported())
        with reporting(other), phase("theirs"):
            pass

    with reporting(mine):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with phase("mine") as own:
            for work in [threading.Thread(target=own.advance, args=(5,)) for _ in range(4)]:
                work.start()
                work.join()
        assert is_reported()
    assert not is_reported()
    assert seen == [False]
    assert {name for _, name, _ in other.told} == {"theirs"}
    assert mine.told[-1] == ("ended", "mine", 20)


def at(done: float, total: float | None, seconds: float, unit: str = "") -> Phase:
    return Phase("Working", total, unit, done, began=time.monotonic() - seconds)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ((30, 120, 20.1), "Working: 30 of 120, 25%, 60 s left"),
        ((0, 120, 20), "Working: 0 of 120, 20 s so far"),
        ((0, None, 20), "Working: 20 s so far"),
        ((7, None, 20), "Working: 7, 20 s so far"),
        ((5e6, 1e9, 1, "B"), "Working: 5 of 1,000 MB, 0%, 3 min left"),
        ((1, 1000, 12), "Working: 1 of 1,000, 0%, 3 h 20 min left"),
    ],
)
def test_line_shows_progress_and_remaining_time(own, line):
    assert progress_line(at(*own)) == line


def test_the_end_of_a_phase_says_how_long_it_took():
    assert duration_line(at(120, 120, 20)) == "Working: 20 s"
    assert duration_line(at(30, 120, 100)) == "Working: 30 of 120, 2 min"  # stopped early


def test_only_long_phases_are_printed():
    said: list[str] = []
    lines = Lines(said.append, long=0.2, interval=0.4)
    with reporting(lines):
        with phase("short"):
            pass
        with phase("long", 10) as own:
            own.reach(5)
            time.sleep(1.0)
    lines.close()
    assert not any("short" in line for line in said)
    assert 2 <= len(said) <= 4
    assert all(re.fullmatch(r"long: 5 of 10, 50%, \d+ s left", line) for line in said[:-1])
    assert said[-1] == "long: 5 of 10, 1 s"


def test_a_pipe_gets_lines_on_stderr_and_quiet_gets_none():
    for mode, there in {"human": True, "json": True, "quiet": False}.items():
        out = Out(mode, io.StringIO(), io.StringIO())
        assert (out.reporter() is not None) is there


def test_terminal_bars_give_way_to_lines():
    out = Out("human", Terminal(), Terminal())
    bars = out.reporter()
    with reporting(bars), phase("Reading models", 4) as own:
        own.advance()
        out.log("something else")
        own.advance()
    bars.close()
    shown = out.stderr.getvalue()
    assert "Reading models" in shown
    assert "1 of 4" in shown
    assert "something else" in shown
    assert out.stdout.getvalue() == ""


COMMAND = """
import time
from hf_fusion.cli import app
from hf_fusion.progress import track
class Slow:
    @staticmethod
    def run(args, out):
        for _ in track(range(5), "Working"):
            time.sleep(0.5)
        out.result("Done", folder="x")
app.command = lambda name, own=app.command: Slow if name == "publish" and hasattr(app, "ready") else own(name)
parser = app.build_parser("publish")
app.build_parser = lambda wanted: parser
app.ready = True
raise SystemExit(app.main(["publish", "a", "me/b", *__import__("sys").argv[1:]]))
"""


@pytest.mark.process
def test_a_command_keeps_stdout_clean_when_piped():
    run = [sys.executable, "-c", COMMAND]
    done = subprocess.run([*run, "--format", "json"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"folder": "x"}
    first, last = done.stderr.splitlines()
    assert re.fullmatch(r"Working: [34] of 5, [68]0%, \d s left", first)
    assert re.fullmatch(r"Working: \d s", last)
    quiet = subprocess.run([*run, "--format", "quiet"], capture_output=True, text=True, timeout=60)
    assert (quiet.stdout, quiet.stderr) == ("x\n", "")


@pytest.mark.process
def test_a_command_shows_a_bar_on_a_terminal():
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=there, env={**os.environ, "TERM": "xterm"}
    )
    os.close(there)
    seen = b""
    while True:
        try:
            part = os.read(here, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert process.wait(timeout=60) == 0
    os.close(here)
    shown = seen.decode()
    assert "Working" in shown
    assert "3 of 5" in shown
    assert "\u2501" in shown  # a bar
    assert "left" in shown
    assert re.search(r"Working: \d s", shown)  # what stays
    assert b"Done" in process.stdout.read()
