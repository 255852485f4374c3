"""Commands that are killed at any moment: nothing half-written loads, nothing is lost, and a second run succeeds."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kills
import pytest
from bench.tiny_suites import save_suite_of_fine_tunes
from datasets import Dataset
from disks import contents
from hub_integrity import check
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny import TEXTS
from tiny_fused import save_fine_tunes
from tiny_routed import save_base, save_lora

from hf_fusion.bench.cells import read_cells
from hf_fusion.fusion import load_fused
from hf_fusion.hub.gates_file import GATES_FILE
from hf_fusion.server import HubServer


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The first of them waits for the imports of all, which is no part of a command's time."""
    context = kills.quick_processes()
    assert run(context, kills.command, str(tmp_path_factory.mktemp("first")), ["bench", "suites"])[0] == 0
    return context


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Models, adapters and rows, as a user has them."""
    folder = tmp_path_factory.mktemp("given")
    save_fine_tunes(folder)
    save_base(folder / "llama")
    for seed in range(2):
        save_lora(folder / f"lora-{seed}", "llama", seed)
    rows = [{"task": ("foxes", "dogs")[i % 2], "text": f"{t} {i}", "label": i % 2} for i in range(12) for t in TEXTS]
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    pairs = {"prompt": ["the quick brown", "a stitch in time"] * 4, "target": [" fox", " saves nine"] * 4}
    Dataset.from_dict(pairs).to_json(folder / "pairs.jsonl")
    save_suite_of_fine_tunes(folder / "suite")
    text = (folder / "suite" / "tiny.yaml").read_text().replace(str(folder / "suite"), "./suite")
    (folder / "suite" / "tiny.yaml").write_text(text)
    return folder


def loads(folder: Path) -> str:
    """A fused model's folder is there as a whole, or it is not there."""
    if not folder.exists():
        return "absent"
    load_fused(folder)
    return "whole"


def cells(folder: Path) -> dict[str, Any]:
    written = [path for path in folder.glob("results/**/*.json") if not path.name.startswith(".")]
    found = read_cells(folder / "results") if written else []
    return {cell.path.as_posix(): (cell.status, cell.score, cell.n, cell.parameters) for cell in found}


def learned(folder: Path) -> dict[str, Any]:
    """All weights, and what the config says of them; the rest is as it was."""
    fused = folder / "fused"
    files = {path.name: load_file(path) for path in fused.glob("*.safetensors")}
    return {
        "config": json.loads((fused / "config.json").read_text()),
        **{f"{file} {name}": tensor.tolist() for file, own in files.items() for name, tensor in own.items()},
    }


def gates(folder: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "gates" / GATES_FILE).items()}


def bytes_of(name: str) -> Callable[[Path], Any]:
    return lambda folder: contents(folder / name)


@dataclass(frozen=True)
class Verb:
    """A command, and what must be so after it was killed.

    Attributes:
        words: of the command, which runs in a copy of `given`.
        result: what it leaves, to be compared with that of a run that nothing disturbed.
        whole: fails where something half-written would be read.
        before: a command that makes what this one changes.
    """

    words: str
    result: Callable[[Path], Any]
    whole: Callable[[Path], Any]
    before: str = ""


FUSED = bytes_of("fused")
FOXES = "--experts foxes dogs --output fused"
VERBS = {
    "merge": Verb(f"fuse --method ties --base base {FOXES}", FUSED, lambda f: loads(f / "fused")),
    "fuse foe": Verb(f"fuse --method foe {FOXES}", FUSED, lambda f: loads(f / "fused")),
    "fuse wemoe": Verb(f"fuse --method wemoe --base base {FOXES}", FUSED, lambda f: loads(f / "fused")),
    "fuse phatgoose": Verb(
        "fuse --method phatgoose --experts lora-0 lora-1 --base llama --output fused",
        FUSED,
        lambda f: loads(f / "fused"),
    ),
    "fit gates": Verb(
        "fit gates lora-0 --base llama --data pairs.jsonl --steps 20 --batch-size 4 --overwrite --output gates",
        gates,
        lambda f: [json.loads(path.read_text()) for path in (f / "gates").glob("*.json")],
    ),
    "fit fuser": Verb(
        "fit fuser fused --data rows.jsonl --expert-column task --overwrite",
        learned,
        lambda f: loads(f / "fused") == "whole" or recovered(f / "fused"),
        f"fuse --method foe {FOXES}",
    ),
    "fit routers": Verb(
        "fit routers fused --data rows.jsonl --steps 10 --batch-size 2 --overwrite",
        learned,
        lambda f: loads(f / "fused") == "whole" or recovered(f / "fused"),
        f"fuse --method wemoe --base base {FOXES}",
    ),
    "bench run": Verb(
        "bench run --suite suite/tiny.yaml --methods average task_arithmetic individual --data suite/data --limit 24",
        cells,
        cells,
    ),
}


def recovered(folder: Path) -> bool:
    """Between two renames: the next command brings it back."""
    load_fused(folder)
    return True


def run(processes, target: Callable[..., None], *args: Any, after: float | None = None) -> tuple[int, float]:
    """Exit code and seconds; killed after so many seconds where that is said."""
    process = processes.Process(target=target, args=args)
    began = time.monotonic()
    process.start()
    process.join(after)
    if process.is_alive():
        if after is None:
            raise AssertionError("it does not end")
        process.kill()
        process.join(30)
    return process.exitcode, time.monotonic() - began


def fresh(given: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(given, place)
    return place


ROUNDS = [1, pytest.param(20, marks=pytest.mark.slow)]
QUICK = ("merge", "fit gates", "bench run")  # of which one kill is always tried


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "rounds"),
    [(name, 1) for name in QUICK] + [pytest.param(name, 20, marks=pytest.mark.slow) for name in VERBS],
)
def test_killed_command(name, rounds, processes, given, tmp_path):
    """Seed 0: a moment at random of the time that the command takes, 20 times."""
    verb, work, randomness = VERBS[name], tmp_path / "work", random.Random(0)

    def begun() -> dict[str, str]:
        fresh(given, work)
        if verb.before:
            assert run(processes, kills.command, str(work), verb.before.split())[0] == 0
        return contents(work)

    before = begun()
    code, seconds = run(processes, kills.command, str(work), verb.words.split())
    assert code == 0, (work / "said.txt").read_text()
    wanted = verb.result(work)
    names = {path.name for path in work.iterdir()}
    killed = 0
    for _ in range(rounds):
        begun()
        code, _ = run(processes, kills.command, str(work), verb.words.split(), after=randomness.uniform(0, seconds))
        killed += code == -signal.SIGKILL
        found = contents(work)
        inputs = [file for file in before if not file.startswith("fused")]
        assert {file: found.get(file) for file in inputs} == {file: before[file] for file in inputs}
        verb.whole(work)
        again = run(processes, kills.command, str(work), verb.words.split())
        if again[0] and "--overwrite" in (work / "said.txt").read_text():  # it had been done when it was killed
            (work / "said.txt").unlink()  # but perhaps its card, which comes last
            assert run(processes, kills.command, str(work), [*verb.words.split(), "--overwrite"])[0] == 0
        else:
            assert again[0] == 0, (work / "said.txt").read_text()
        assert verb.result(work) == wanted
        # what a killed save leaves is hidden, and nothing reads it
        assert {path.name for path in work.iterdir() if not path.name.startswith(".")} == names
    assert killed or rounds == 1


@pytest.mark.process
@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("how", ["publish", "upload"])
def test_a_push_whose_client_is_killed(how, rounds, processes, given, tmp_path):
    """Seed 0. The Hub has the old commit or the new one, and the second push leaves what the undisturbed one does."""
    work, randomness = fresh(given, tmp_path / "work"), random.Random(0)
    assert run(processes, kills.command, str(work), VERBS["fuse wemoe"].words.split())[0] == 0
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token("me"))

        def push(repo: str, after: float | None = None) -> tuple[int, float]:
            args = (str(work), hub.endpoint, api.token, "fused", repo)
            return run(processes, getattr(kills, how), *args, after=after)

        def files(repo: str) -> dict[str, str]:
            tree = api.list_repo_tree(repo, recursive=True)
            return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if f.path != "README.md"}

        if how == "upload":
            api.create_repo("me/first")
        code, seconds = push("me/first")
        assert code == 0
        wanted = files("me/first")
        killed = 0
        for number in range(rounds):
            repo = f"me/again-{number}"
            if how == "upload":
                api.create_repo(repo)
            killed += push(repo, randomness.uniform(0, seconds))[0] == -signal.SIGKILL
            there = files(repo) if api.repo_exists(repo) else {}
            assert there.keys() <= {".gitattributes"} or there == wanted
            assert push(repo)[0] == 0
            assert files(repo) == wanted
        assert killed or rounds == 1
        assert max(status for *_, status in hub.requests) < 500
    assert check(tmp_path / "hub") > rounds


@pytest.mark.process
def test_a_folder_between_two_renames_is_found_again(processes, given, tmp_path):
    """The moment between moving the old folder away and the new one there, which no kill hits by chance."""
    work = fresh(given, tmp_path / "work")
    assert run(processes, kills.command, str(work), VERBS["fuse foe"].words.split())[0] == 0
    before = contents(work / "fused")
    (work / "fused").rename(work / ".fused-0123abcd-old")
    words = ["fit", "fuser", "fused", "--data", "rows.jsonl", "--expert-column", "task"]
    assert run(processes, kills.command, str(work), words)[0] == 0
    assert before != contents(work / "fused")
    load_fused(work / "fused")
    assert not list(work.glob(".fused*"))
