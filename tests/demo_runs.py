"""Runs `hf-fusion demo` and the commands that it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import Results
from hf_fusion.server import HubServer

CARDS = Path(__file__).parents[1] / "model_cards"


def run_demo(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The demo's summary, and what it said on the way."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_fusion.cli", "demo", *words, "--folder", "demo", "--format", "json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def assert_progress(said: str, steps: int) -> None:
    """Every step is named, and nothing else chatters."""
    assert re.findall(rf"^\[(\d)/{steps}\]", said, re.MULTILINE) == [str(step) for step in range(1, steps + 1)]
    assert not [line for line in said.splitlines() if re.search(r"%\||WARNING|Warning|\[transformers\]", line)]


def departures_from_card(model: Path, family: str) -> list[str]:
    """Where the scores of a demo's model lie outside the intervals that its family's card states; see `departures`."""
    measured = json.loads((model / "results.json").read_text(encoding="utf-8"))
    return departures(measured, json.loads((CARDS / f"{family}.json").read_text(encoding="utf-8"))["results"])


def departures(measured: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """Where a run's scores lie outside the 95 % intervals that a card states: predictor, what, both figures.

    Args:
        measured: content of a ``results.json``.
        published: the same of the card, under ``results`` of its JSON.
    """
    found = dict(_scores(measured))
    stated = dict(_scores(published))
    assert stated, "the card states no scores"
    told = []
    for key, score in stated.items():
        low, high = score.ci95
        if key not in found:
            told.append(f"{' '.join(key)}: not measured")
        elif not low <= found[key].score <= high:
            told.append(f"{' '.join(key)}: {found[key].score:.3f}, stated {low:.3f} to {high:.3f}")
    return told


def _scores(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Score]]:
    """(Predictor, task or group of tasks) -> its score."""
    for predictor in Results.from_dict(content).predictors:
        for name, score in {**predictor.scores, **predictor.means}.items():
            yield (predictor.name, name), score


def commits(folder: Path, owner: str = "demo") -> dict[str, list[str]]:
    """The history of every repo that a demo left behind."""
    with HubServer(folder / "demo" / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token(owner))
        return {m.id: [c.commit_id for c in api.list_repo_commits(m.id)] for m in api.list_models(author=owner)}


def printed_lines(said: str) -> list[str]:
    """The commands that a demo ends with."""
    return [line.removeprefix("→ ") for line in said.splitlines() if line.startswith("→ ")]


def run_lines(lines: list[str], folder: Path) -> str:
    """Runs shell commands where the demo ran; the line that serves its Hub is taken over by this process."""
    serve = next(line for line in lines if line.startswith("hf-fusion hub serve demo/hub "))
    port = re.search(r" --port (\d+) &$", serve)[1]
    with HubServer(folder / "demo" / "hub") as hub:
        done = subprocess.run(
            ["bash", "-ec", "\n".join(line for line in lines if line != serve).replace(f":{port}", f":{hub.port}")],
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HF_HOME": str(folder / "home"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout
