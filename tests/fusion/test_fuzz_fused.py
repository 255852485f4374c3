"""Corrupted fused folders: each gives one clear error, or the model loads and answers."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fused_kinds import KINDS
from mutations import mutated, mutations, sample

from hf_fusion import FusionError, load_fused

SEED = 16
FEW, MANY = 16, 1000
FAMILIES = [kind for kind in KINDS if kind != "static"]
SLOWEST, MOST_MEMORY = 60, 1 << 20  # seconds of a case; KiB that all cases of a kind may add to the largest
SUFFIXES = (".json", ".yaml", ".safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("fused")

    def folder(kind: str) -> Path:
        path = place / kind.replace(" ", "-")
        if not path.exists():
            KINDS[kind][0](path)
        return path

    return folder


@contextlib.contextmanager
def quiet():
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def fault_of(folder: Path, inputs: dict[str, torch.Tensor]) -> str:
    """What is wrong in how a folder is loaded; empty where it is refused clearly or answers."""
    try:
        model, _ = load_fused(folder)
    except FusionError as error:
        text = str(error)
        is_clear = all(c.isprintable() or c == "\n" for c in text) and len(text) < 3000 and "Traceback" not in text
        return "" if is_clear and folder.name in text else f"an unclear message: {text!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    except Exception as error:
        return f"loads, and then {type(error).__name__}: {error}"
    return "" if logits.isfinite().all() else "loads, and answers NaN or Inf"


def run(kind: str, count: int, folders, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original, inputs = folders(kind), KINDS[kind][1]
    load_fused(original)  # or nothing would be tried: all would be refused
    assert not fault_of(original, inputs)
    before, faults = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for mutation in sample(mutations(original, SEED, SUFFIXES), count, SEED):
        start = time.monotonic()
        with quiet():
            fault = fault_of(mutated(original, mutation, tmp_path / "copy"), inputs)
        if (seconds := time.monotonic() - start) > SLOWEST:
            fault += f" took {seconds:.0f} s"
        if fault:
            faults.append(f"{mutation.name} -> {fault[:600]}")
    assert not (tmp_path / "planted").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
    return faults


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutations(kind, folders, tmp_path, monkeypatch):
    assert "\n".join(run(kind, FEW, folders, tmp_path, monkeypatch)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations(kind, folders, tmp_path, monkeypatch):
    assert "\n".join(run(kind, MANY, folders, tmp_path, monkeypatch)) == ""


# A process in which hf_fusion is not installed: what it meets of the folder's own code has to raise ValueError.
ANYWHERE = """
import logging, sys, traceback
sys.modules["hf_fusion"] = sys.modules["peft"] = None
sys.path.insert(0, sys.argv[1])
import torch, transformers
from pathlib import Path
from mutations import mutated, mutations, sample
original, count, seed, auto = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), getattr(transformers, sys.argv[5])
suffixes = sys.argv[6].split()
inputs, wanted = (torch.load(original.with_name(name)) for name in ("inputs.pt", "answer.pt"))
logging.disable(logging.ERROR)
with torch.no_grad():
    assert torch.equal(auto.from_pretrained(original, trust_remote_code=True)(**inputs).logits, wanted)
refused = loaded = 0
for mutation in sample(mutations(original, seed, suffixes), count, seed):
    folder = mutated(original, mutation, original.with_name("copy"))
    try:
        model = auto.from_pretrained(folder, trust_remote_code=True)
    except BaseException as error:
        is_own = any("transformers_modules" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        if is_own and not (isinstance(error, ValueError) and str(error).isprintable() and len(str(error)) < 2000):
            print("FAULT", mutation.name, "->", type(error).__name__, ascii(str(error))[:500])
        refused += 1
        continue
    loaded += 1
    try:
        with torch.no_grad():
            fault = "" if model(**inputs).logits.isfinite().all() else "answers NaN or Inf"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:500]
    if fault:
        print("FAULT", mutation.name, "-> loads, and then", ascii(fault))
print("DONE", refused, loaded)
"""


def run_anywhere(kind: str, count: int, folders, tmp_path) -> None:
    """What is mutated is what the folder's own code reads: its config and its weights."""
    original, inputs = folders(kind), KINDS[kind][1]
    folder = shutil.copytree(original, tmp_path / "original")
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        torch.save(load_fused(folder)[0](**inputs).logits, tmp_path / "answer.pt")
    planted, suffixes = tmp_path / "planted", "config.json .safetensors"
    arguments = [Path(__file__).parents[1], folder, count, SEED, KINDS[kind][2], suffixes]
    env = {"PLANTED": str(planted), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ANYWHERE, *map(str, arguments)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60 + 5 * count,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    found = re.search(r"DONE (\d+) (\d+)", done.stdout)
    assert found is not None
    refused, loaded = map(int, found.groups())
    assert refused + loaded == count
    assert refused > loaded / 4
    assert not planted.exists()


@pytest.mark.process
@pytest.mark.parametrize("kind", ["phatgoose"])
def test_a_few_without_the_package(kind, folders, tmp_path):
    run_anywhere(kind, FEW, folders, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_thousand_without_the_package(kind, folders, tmp_path):
    run_anywhere(kind, MANY, folders, tmp_path)
