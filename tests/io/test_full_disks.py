"""Writing to a full or read-only disk: one sentence that names the path, and nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bench.made_cells import made_cells
from datasets import Dataset
from disks import SmallDisk, contents, small_disk
from models.test_shown import FUSED
from tiny import TEXTS
from tiny_fused import save_fine_tunes
from tiny_routed import save_base, save_lora

from hf_fusion import FusionError, fuse, merge
from hf_fusion.bench import binding
from hf_fusion.bench.cells import write_cell, write_lines
from hf_fusion.bench.pages import write_report
from hf_fusion.bench.suite import load_suite
from hf_fusion.cards.card import write_card
from hf_fusion.cli.app import main
from hf_fusion.evaluation.coefficient_map import CoefficientMap
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.plots import plot_accuracy_cost, plot_coefficients, plot_routing
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results
from hf_fusion.evaluation.routing_map import RoutingMap
from hf_fusion.fusion import save_fused
from hf_fusion.hub.gates_file import save_gates
from hf_fusion.io.folders import make_once
from hf_fusion.io.saving import write_file
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.training.expert_statistics import Statistics
from hf_fusion.training.gates import train_gates
from hf_fusion.training.routers import adapt_routers
from hf_fusion.types import Gates


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What is fused: fine-tunes of a classifier, adapters of a language model."""
    folder = tmp_path_factory.mktemp("given")
    save_fine_tunes(folder)
    save_base(folder / "llama")
    for seed in range(2):
        save_lora(folder / f"lora-{seed}", str(folder / "llama"), seed)
    return folder


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("mounts") / "disk") as made:
        yield made


def recipe(place: Path, method: str = "linear") -> Recipe:
    names = ("lora-0", "lora-1") if method == "lora" else ("foxes", "dogs")
    return Recipe(method, tuple(RecipeExpert(str(place / name)) for name in names))


def cells():
    return made_cells(tasks=2, seeds=1)


def results() -> Results:
    fused = PredictorScores("FoE", "fused", {"x": Score(0.9, (0.88, 0.92))}, cost=1.0)
    return Results([MeasuredTask("x", "accuracy", 9, pooled=True)], [fused])


def routing() -> RoutingMap:
    return RoutingMap(["a", "b"], ["t"], [[0.25, 0.75]], [10], {})


def coefficients() -> CoefficientMap:
    return CoefficientMap(["a", "b"], ["0", "1"], ["t"], [[[0.1, 0.2], [0.3, 0.4]]], [5], {}, 0.3)


def fit_gates(folder: Path, place: Path) -> None:
    from hf_fusion import load_experts

    (expert,) = load_experts([place / "lora-0"], gates=False)
    rows = Dataset.from_dict({"prompt": ["the quick brown"] * 4, "target": [" fox"] * 4})
    train_gates(expert, rows, gates="paper", steps=2, batch_size=2, output_dir=folder)


def fit_routers(folder: Path, place: Path) -> None:
    model = fuse("wemoe", [place / "foxes", place / "dogs"], base=place / "base")
    rows = {name: Dataset.from_dict({"text": TEXTS * 4}) for name in ("foxes", "dogs")}
    adapt_routers(model, rows, steps=2, batch_size=2, output_dir=folder)


# name -> writes something to a path that is given, from the models of `place`
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda out, place: merge(recipe(place), out, overwrite=True),
    "merge of adapters": lambda out, place: merge(recipe(place, "lora"), out, overwrite=True),
    "a merged model, saved": lambda out, place: fuse("linear", [place / "foxes", place / "dogs"]).save_pretrained(out),
    **{
        f"{family}, {how}": lambda out, place, family=family, save=save: save(FUSED[family](), out)
        for family in FUSED
        for how, save in {
            "save_pretrained": lambda model, out: model.save_pretrained(out),
            "save_fused": lambda model, out: save_fused(
                model, out, Recipe("foe", (RecipeExpert("me/a@" + "0" * 40),)), overwrite=True
            ),
        }.items()
    },
    "gates": lambda out, place: save_gates(Gates({"x": torch.rand(4096)}), out, overwrite=True),
    "checkpoints of gates": fit_gates,
    "checkpoints of routers": fit_routers,
    "statistics": lambda out, place: Statistics("fisher", "me/a", 3, {"w": torch.rand(4096)}, {"w": ("w", 0)}).save(
        out, overwrite=True
    ),
    "recipe": lambda out, place: recipe(place).save(out),
    "results": lambda out, place: results().save(out),
    "results of a suite": lambda out, place: Results([], []).save(out),
    "routing": lambda out, place: routing().save(out),
    "coefficients": lambda out, place: coefficients().save(out),
    "plot of results": lambda out, place: plot_accuracy_cost(results(), out.with_suffix(".png")),
    "plot of routing": lambda out, place: plot_routing(routing(), out.with_suffix(".png")),
    "plot of coefficients": lambda out, place: plot_coefficients(coefficients(), out.with_suffix(".svg")),
    "card": lambda out, place: write_card(out),
    "cell": lambda out, place: write_cell(out, cells()[0]),
    "cells": lambda out, place: write_lines(out.with_suffix(".jsonl"), cells()),
    "settings of cells": lambda out, place: binding.bind(out, load_suite(place / "suite.yaml"), {"limit": 3}),
    "report": lambda out, place: write_report(cells(), out),
    "cache": lambda out, place: make_once(out, lambda folder: (folder / "weights").write_bytes(b"1" * 10_000)),
}
SMALL = {  # what they write has room in a few kilobytes
    *("recipe", "results", "results of a suite", "routing", "coefficients", "card", "cell", "cells", "cache"),
    "settings of cells",
}
FAMILY_SAVES = [name for name in WRITERS if name.endswith("save_pretrained")]


def refused(write: Callable[[], object], name: str, reason: str, place: Path) -> None:
    """The families know no FusionError where they arrive: they raise the system's own."""
    kind = OSError if name in FAMILY_SAVES else FusionError
    with pytest.raises(kind) as caught:
        write()
    said = str(caught.value)
    if name == "merge" and "needs" in said:  # it looks before it begins
        reason = "MB left"
    assert str(place) in said and reason in said, said
    assert len(said) < 500 and "Traceback" not in said
    if kind is FusionError:
        assert caught.value.hint


@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_and_a_read_only_disk(name, disk, place, tmp_path):
    if name == "settings of cells":
        (place / "suite.yaml").write_text(SUITE.format(folder=place))
    out = disk.path / "out"
    write = lambda: WRITERS[name](out, place)  # noqa: E731 - a name for what is tried again and again
    if name == "card":
        merge(recipe(place), out)
    before = contents(disk.path)
    used = len(before)
    try:
        for leave in (0,) if name in SMALL else (0, 12_000):  # nothing can be begun; or something, and not finished
            with disk.full(leave):
                refused(write, name, "No space left on device", disk.path)
            left = contents(disk.path)
            if name.startswith("checkpoints"):  # it may say whose checkpoints lie there
                assert {Path(file).suffix for file in left} <= {"", ".json"} and len(left) <= 2
                clear(disk.path)
            else:
                assert left == before
        with disk.read_only():
            refused(write, name, "Read-only file system", disk.path)
        assert contents(disk.path) == before
        if name in ("cache",):  # made once: there is no second time
            return
        write()
        whole = contents(disk.path)
        assert len(whole) > used or name == "card"
        if name.startswith("checkpoints"):
            return  # a run that is done has nothing left to write
        with disk.full():
            refused(write, name, "No space left on device", disk.path)
        assert contents(disk.path) == whole
        with disk.read_only():
            refused(write, name, "Read-only file system", disk.path)
        assert contents(disk.path) == whole
    finally:
        clear(disk.path)


SUITE = (
    "title: Tiny\nkind: merging\nhead: sequence-classification\nbase: {folder}/base\nexperts: '{folder}/{{task}}'\n"
    "defaults: {{data: 'data:{{task}}'}}\ntasks:\n  foxes:\n  dogs:\n"
)


def clear(folder: Path) -> None:
    import shutil

    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_error_is_one_line(disk, place, capsys):
    """Exit code 1, no traceback; nothing is left."""
    words = ["fuse", "--method", "linear", "--experts", str(place / "foxes"), str(place / "dogs"), "--output"]
    before = contents(disk.path)
    for state, reason in ((disk.full(), "the disk has 0.0 MB left"), (disk.read_only(), "the disk is read-only")):
        with state:
            assert main([*words, str(disk.path / "out")]) == 1
        said = capsys.readouterr().err
        assert reason in said and str(disk.path) in said and "Traceback" not in said and "→" in said
        assert contents(disk.path) == before


@pytest.mark.process
def test_stdout_on_a_full_disk():
    import subprocess
    import sys

    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "hf_fusion.cli", "bench", "suites"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 1
    assert "the disk is full (No space left on device)" in done.stderr and "Traceback" not in done.stderr


def test_a_file_is_replaced_as_a_whole_and_a_device_is_written_to(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    file.chmod(0o640)
    write_file(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o640)
    assert list(tmp_path.iterdir()) == [file]
    write_file("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
    with pytest.raises(FusionError, match="/dev/full cannot be written: the disk is full"):
        write_file("/dev/full", "x")
    with pytest.raises(FusionError, match="nowhere/b.json cannot be written .No such file or directory"):
        write_file(tmp_path / "nowhere" / "b.json", "x")
    link = tmp_path / "link.json"
    link.symlink_to(file)
    write_file(link, "mine")  # such as the links of the Hub's cache: what they lead to is not ours
    assert (link.read_text(), file.read_text()) == ("mine", "new")
