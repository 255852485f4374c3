"""Runs the command line in a separate process."""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from quick_python import run_python

from hf_fusion.cli.app import build_parser, command
from hf_fusion.cli.output import Out

Run = Callable[..., subprocess.CompletedProcess[str]]


def told(stderr: str) -> list[str]:
    """The lines of stderr, but for those about phases that took long: on a busy machine any may."""
    return [line for line in stderr.splitlines() if not re.search(r": .*\d (s|min)( so far| left)?$", line)]


@pytest.fixture
def hf_fusion(tmp_path: Path) -> Run:
    """``hf_fusion("fuse", "x", cwd=…, HF_ENDPOINT=…)`` runs a command away from the repo, with that environment."""

    def run(*words: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "hf_fusion.cli", *words, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, cwd=cwd)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``here("eval", "fused", …)`` runs a command in this process, which is faster, and returns its stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        args = build_parser(words[0]).parse_args(words)
        out = Out(args.format, io.StringIO(), io.StringIO())
        command(args.command).run(args, out)
        return out.stdout.getvalue()

    return run
