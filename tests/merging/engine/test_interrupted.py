"""Merges that are killed, fill the disk, or run twice: output is complete, with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from on_disk import is_clear, merge_here, model, models, recipe_of, started_quickly, weights_of

from hf_fusion import FusionError
from hf_fusion.merging.engine.checkpoint import INDEX
from hf_fusion.merging.engine.output import staging_path
from hf_fusion.merging.merge import merge
from hf_fusion.merging.recipe_files import load_recipe

LAYERS, SIZE = 16, 256  # a shard of 512 kB for each layer
OPTIONS = {"shard_bytes": 2 * SIZE * SIZE * 4, "threads": 1}
SHAPES = {f"layers.{i}.{part}.weight": (SIZE, SIZE) for i in range(LAYERS) for part in ("up", "down")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return models(tmp_path_factory.mktemp("inputs"), shapes=SHAPES)


@pytest.fixture(scope="module")
def recipe(folders):
    """A recipe with a stochastic method."""
    path = folders[0].parent / "recipe.yaml"
    recipe_of(folders, "dare_ties", seed=3).save(path)
    return path


@pytest.fixture(scope="module")
def wanted(recipe, tmp_path_factory):
    """What a merge that nothing disturbs writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    merge(load_recipe(recipe), out, **OPTIONS)
    return weights_of(out)


@pytest.fixture(scope="module")
def processes():
    return started_quickly()


def is_absent_or_whole(out: Path) -> bool:
    """Whether an output folder is what it must be at every moment; true if it is there."""
    try:
        names = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return False
    index = json.loads((out / INDEX).read_text())
    assert {*index["weight_map"].values(), "config.json", "fusion.yaml", INDEX} <= names
    assert not [name for name in names if name.endswith(".part")]
    return True


def shards_in(place: Path) -> dict[str, tuple[int, int]]:
    """Finished shards: their inodes and times."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in place.glob("*.safetensors")}


def begun(processes, recipe: Path, out: Path, finished: int, how: int) -> dict[str, tuple[int, int]]:
    """What a merge leaves that a signal ends when so many shards are finished, and another is begun."""
    process = processes.Process(target=merge_here, args=(str(recipe), str(out), OPTIONS))
    process.start()
    place = staging_path(out)
    while process.is_alive() and len(list(place.glob("*.safetensors"))) < finished:
        assert not is_absent_or_whole(out)
    while process.is_alive() and not list(place.glob("*.part")):
        pass
    os.kill(process.pid, how)
    process.join(30)
    assert process.exitcode, "it was done before it could be killed"
    assert not out.exists()
    return shards_in(place)


@pytest.mark.process
@pytest.mark.parametrize(
    ("finished", "how"),
    [(0, signal.SIGKILL), (5, signal.SIGKILL), (12, signal.SIGKILL), (6, signal.SIGINT)]
    + [pytest.param(3, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_killed_and_run_again(finished, how, processes, recipe, wanted, tmp_path):
    out = tmp_path / "out"
    kept = begun(processes, recipe, out, finished, how)
    assert finished <= len(kept) < LAYERS
    merge(load_recipe(recipe), out, **OPTIONS)
    assert kept.items() <= shards_in(out).items()  # the files themselves
    assert weights_of(out) == wanted
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_killed_again_and_again(processes, recipe, wanted, tmp_path):
    out = tmp_path / "out"
    kept = {}
    for finished in (2, 4, 7, 9):
        found = begun(processes, recipe, out, finished, signal.SIGKILL)
        assert kept.items() <= found.items()
        kept = found
    merge(load_recipe(recipe), out, **OPTIONS)
    assert weights_of(out) == wanted


@pytest.mark.process
def test_output_is_absent_or_complete_at_every_moment(processes, recipe, wanted, tmp_path):
    out = tmp_path / "out"
    process = processes.Process(target=merge_here, args=(str(recipe), str(out), OPTIONS))
    process.start()
    looks = {False: 0, True: 0}
    while process.is_alive():
        looks[is_absent_or_whole(out)] += 1
    assert process.exitcode == 0 and looks[False] > 10 and is_absent_or_whole(out)
    assert weights_of(out) == wanted


@pytest.mark.process
@pytest.mark.parametrize(
    "change", ["seed", "input", *(pytest.param(c, marks=pytest.mark.slow) for c in ("method", "shards"))]
)
def test_leftovers_of_another_merge_are_not_reused(change, processes, folders, recipe, tmp_path):
    out, options = tmp_path / "out", dict(OPTIONS)
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    own = [tmp_path / folder.name for folder in folders]
    recipe_of(own, "dare_ties", seed=3).save(tmp_path / "recipe.yaml")
    begun(processes, tmp_path / "recipe.yaml", out, 3, signal.SIGKILL)
    after = recipe_of(own, "dare_ties", seed=3)
    match change:
        case "method":
            after = recipe_of(own, "task_arithmetic")
        case "seed":
            after = recipe_of(own, "dare_ties", seed=4)
        case "shards":
            options["shard_bytes"] //= 2
        case "input":  # trained on: the same name, sizes and shapes
            shutil.rmtree(own[1])
            model(own[1], 77, SHAPES)
    merge(after, out, **options)
    merge(after, tmp_path / "undisturbed", **options)
    assert weights_of(out) == weights_of(tmp_path / "undisturbed")


def test_killed_while_an_earlier_merge_is_replaced(recipe, wanted, tmp_path):
    """Between the two renames: the earlier merge has been moved away, the new one not yet moved there."""
    out = tmp_path / "out"
    merge(load_recipe(recipe), out, **OPTIONS)
    (out / "notes.txt").write_text("mine")
    old = staging_path(out).with_name(f"{staging_path(out).name}-old")
    out.rename(old)
    merge(load_recipe(recipe), out, **OPTIONS)
    assert (out / "notes.txt").read_text() == "mine"
    shutil.copytree(out, old)  # and after them: it had not yet been removed
    merge(load_recipe(recipe), out, overwrite=True, **OPTIONS)
    (out / "notes.txt").unlink()
    assert weights_of(out) == wanted and list(tmp_path.iterdir()) == [out]


# ---------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; a merge of this file takes 8."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, leave: int) -> None:
    """What another program writes: all that is left, but so many bytes."""
    with (disk / "other").open("wb") as other:
        while (size := min(1 << 16, shutil.disk_usage(disk).free - leave)) > 0:
            other.write(b"\1" * size)
            other.flush()


@pytest.mark.process
def test_too_small_disk_is_detected_at_once(recipe, small_disk):
    fill(small_disk, 3_000_000)
    with pytest.raises(FusionError, match="out needs 8.4 MB, the disk has [0-9.]+ MB left") as caught:
        merge(load_recipe(recipe), small_disk / "out", **OPTIONS)
    is_clear(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.process
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99], ids=["the first shard", "a later shard", "the small files"])
def test_disk_that_fills_up(share, recipe, wanted, small_disk):
    """Something else fills the disk when so much of the merge is done."""
    free = shutil.disk_usage(small_disk).free

    def meanwhile(done, total):
        if done >= share * total and not (small_disk / "other").exists():
            fill(small_disk, 0)

    with pytest.raises(FusionError, match="cannot be written: the disk is full .No space left on device") as caught:
        merge(load_recipe(recipe), small_disk / "out", progress=meanwhile, **OPTIONS)
    is_clear(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    (small_disk / "other").unlink()
    assert shutil.disk_usage(small_disk).free == free  # no open file keeps what was removed
    merge(load_recipe(recipe), small_disk / "out", **OPTIONS)
    assert weights_of(small_disk / "out") == wanted


@pytest.mark.process
def test_files_that_may_not_grow(processes, recipe, tmp_path):
    """A quota for single files, as of some clusters: asked for as a whole, before anything is computed."""
    ours, theirs = multiprocessing.Pipe()
    args = (str(recipe), str(tmp_path / "out"), OPTIONS, 200_000, theirs)
    process = processes.Process(target=merge_here, args=args)
    process.start()
    assert ours.poll(60)
    message, hint = ours.recv()
    process.join(30)
    assert (
        "cannot be written: the file is larger than the file system or the limit of this process allows"
        " (File too large)"
        in message
        and "choose another --output" in hint
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the same bytes


@pytest.mark.process
def test_same_bytes_in_any_process(folders, tmp_path):
    """Whatever the number of threads, the hash seed of Python and the time of day."""
    methods = ("dare_ties", "della", "dare_linear")
    for method in methods:
        recipe_of(folders, method, seed=11).save(tmp_path / f"{method}.yaml")
    code = """
import sys
folder, *sys.path[:0] = sys.argv[1:]
from on_disk import merge_here
for method in ("dare_ties", "della", "dare_linear"):
    merge_here(f"{folder}/{method}.yaml", f"{folder}/a {method}", {"shard_bytes": 3_000_000, "threads": 3})
"""
    subprocess.run(
        [sys.executable, "-c", code, tmp_path, *filter(None, sys.path)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        timeout=120,
    )
    for method in methods:
        merge(load_recipe(tmp_path / f"{method}.yaml"), tmp_path / f"b {method}", shard_bytes=3_000_000, threads=1)
        assert weights_of(tmp_path / f"a {method}") == weights_of(tmp_path / f"b {method}")
        other = tmp_path / f"other {method}"
        merge(recipe_of(folders, method, seed=12), other, shard_bytes=3_000_000, threads=1)
        first = "model-00001-of-00003.safetensors"
        assert weights_of(other)[first] != weights_of(tmp_path / f"b {method}")[first]
