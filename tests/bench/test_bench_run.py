"""The runner on a tiny suite: its scores equal the models', and failed or killed runs resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import bert, gpt2, image_processor, images, make_tokenizer, vit
from tiny_fused import fine_tuned
from tiny_suites import (
    CLASSES,
    HEAD,
    TEST,
    as_recorded,
    check_whole,
    labelled,
    measure,
    save_suite_of_fine_tunes,
    scores,
    store,
    write_suite,
)

from hf_fusion import load_experts
from hf_fusion.bench import binding, run
from hf_fusion.bench.cells import read_cells
from hf_fusion.bench.memory import forget_peak, peak_bytes
from hf_fusion.bench.methods import METHODS, Method, chosen
from hf_fusion.bench.methods import merging as methods
from hf_fusion.bench.methods.declaration import EntryPoint
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.run import run_suite
from hf_fusion.bench.setups import merging
from hf_fusion.bench.suite import load_suite
from hf_fusion.cli.app import main
from hf_fusion.errors import FusionError
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.training.batches import class_logits, read_examples

pytestmark = pytest.mark.long  # each runs whole benchmarks


def made(name: str, function) -> Method:
    """A method for suites of the kind "merging"."""
    return Method(name, name, "merge", entries={"merging": EntryPoint(function, "merging")})


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory) -> Path:
    """A suite of three full fine-tunes."""
    return save_suite_of_fine_tunes(tmp_path_factory.mktemp("fine_tunes"))


SOME = ("floor", "ceiling", "expert", "ensemble", "average", "task_arithmetic", "dare", "slerp", "smile")


@pytest.fixture(scope="module")
def merged(fine_tunes, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("merged")
    return output, measure(fine_tunes, output, *SOME)


def test_cells_are_as_recorded(merged):
    as_recorded(merged[1], "merging")


def test_every_method_has_a_cell_per_task(merged):
    _, cells = merged
    check_whole(cells, chosen(SOME, "merging"), list(CLASSES))
    left = {key[0]: cell.reason for key, cell in cells.items() if cell.status == "left out"}
    assert left == {
        "slerp": "SLERP merges exactly 2 models; here there are 3",
        "multitask": "the suite names no model that was trained on all its tasks",
    }


@pytest.mark.slow
def test_all_techniques(fine_tunes, tmp_path):
    check_whole(measure(fine_tunes, tmp_path, "all"), chosen(["all"], "merging"), list(CLASSES))


def by_hand(folder: Path, method: str, **parameters) -> dict[str, float]:
    """Accuracy of a merge on each task: tensors merged by name, a plain model with the head of the expert."""
    states = {name: load_file(folder / name / "model.safetensors") for name in ("base", *CLASSES)}
    trunk = {
        key: {name: own for name, own in state.items() if not name.startswith(HEAD)} for key, state in states.items()
    }
    merged = merge_states(method, trunk["base"], [trunk[task] for task in CLASSES], **parameters)
    found = {}
    for task, classes in CLASSES.items():
        model = bert(classes)
        head = {name: own for name, own in states[task].items() if name.startswith(HEAD)}
        model.load_state_dict({**merged, **head})
        rows = Dataset.from_parquet(str(folder / "data" / task / "test.parquet"))
        inputs = make_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")
        with torch.no_grad():
            right = model(**inputs).logits.argmax(1) == torch.tensor(rows["label"])
        found[task] = float(right.float().mean())
    return found


def test_merge_scores_equal_those_computed_by_hand(fine_tunes, merged):
    _, cells = merged
    for task, value in by_hand(fine_tunes, "linear").items():
        assert cells["average", "default", task, "clean"].score == pytest.approx(value)
    parameters = cells["task_arithmetic", "tuned", "mood", "clean"].parameters
    for task, value in by_hand(fine_tunes, "task_arithmetic", scaling=parameters["scaling"]).items():
        assert cells["task_arithmetic", "tuned", task, "clean"].score == pytest.approx(value)


def test_expert_scores_equal_those_of_single_experts(fine_tunes, merged):
    _, cells = merged
    for task, classes in CLASSES.items():
        [expert] = load_experts([fine_tunes / task])
        rows = Dataset.from_parquet(str(fine_tunes / "data" / task / "test.parquet"))
        read = read_examples(replace(expert, labels=classes), rows, 64)
        inputs = read.collate([read.rows[n] for n in range(len(rows))])
        with torch.no_grad():
            right = class_logits(expert.model, inputs).argmax(-1) == inputs["labels"]
        value = pytest.approx(float(right.float().mean()))
        assert cells["individual", "default", task, "clean"].score == value
        assert cells[f"expert:{task}", "default", task, "clean"].score == value
        assert 0.5 < cells["individual", "default", task, "clean"].score < 1  # so that the rows can tell models apart


def test_the_same_call_measures_the_same(fine_tunes, merged, tmp_path):
    _, cells = merged
    again = measure(fine_tunes, tmp_path, "dare", "average")
    assert again and all(scores(cells)[key] == value for key, value in scores(again).items())
    other = measure(fine_tunes, tmp_path, "dare", "average", seeds=[1])
    assert {cell.seed for cell in other.values()} == {1}  # the last of each in the folder
    assert len(read_cells(tmp_path)) == 2 * len(again)


def test_measured_cells_are_not_measured_again(fine_tunes, merged, tmp_path):
    output, cells = merged
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    told = []
    again = measure(fine_tunes, output, "floor", "average", tell=told.append)
    assert told == ["tiny: 2 of 2 models have already been measured"]
    assert scores(again) == scores(cells)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == before


CHILD = """
import sys, time
from hf_fusion.bench import run
from hf_fusion.bench.cells import Cell

write = run.write_cell
def slowly(folder, cell):
    path = write(folder, cell)
    print(cell.path, flush=True)
    time.sleep(0.05)
    return path
run.write_cell = slowly
run.run_suite(sys.argv[1], ["average", "task_arithmetic", "individual"], output=sys.argv[2], data_dir=sys.argv[3],
              limit={limit}, tuned_on=16)
""".replace("{limit}", str(TEST))


@pytest.mark.process
def test_killed_run_resumes(fine_tunes, merged, tmp_path):
    _, cells = merged
    arguments = [str(fine_tunes / "tiny.yaml"), str(tmp_path / "out"), str(fine_tunes / "data")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    done = [child.stdout.readline().strip() for _ in range(4)]
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and all(done)
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done}
    (tmp_path / "out" / done[0]).with_name(".half.json.1").write_text("{")  # what a write leaves that was cut off
    after = measure(fine_tunes, tmp_path / "out", "average", "task_arithmetic", "individual")
    assert len(after) == 4 * len(CLASSES)
    assert scores(after) == {key: value for key, value in scores(cells).items() if key in after}
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done}


def test_failing_method_is_reported_and_others_continue(fine_tunes, tmp_path, monkeypatch):
    def breaks(setup, holdout, seed):
        raise ValueError("no\nmemory")

    def breaks_on_topic(setup, holdout, seed):
        candidate = setup.dense(setup.base)

        def picky(task, corruption, split):
            if task == "topic":
                raise ZeroDivisionError("not this one")
            return candidate.prepare(task, corruption, split)

        return replace(candidate, prepare=picky)

    monkeypatch.setitem(METHODS, "broken", made("broken", breaks))
    monkeypatch.setitem(METHODS, "picky", made("picky", breaks_on_topic))
    told = []
    cells = measure(fine_tunes, tmp_path, "broken", "picky", "average", tell=told.append)
    assert {cells["broken", "default", task, "clean"].reason for task in CLASSES} == {"ValueError: no memory"}
    assert all(cells["average", "default", task, "clean"].score is not None for task in CLASSES)
    picky = {task: cells["picky", "default", task, "clean"] for task in CLASSES}
    assert (picky["topic"].status, picky["topic"].reason) == ("failed", "ZeroDivisionError: not this one")
    assert picky["mood"].score is not None and picky["kind"].score is not None
    assert any("failed: ValueError: no memory" in line for line in told)
    monkeypatch.setitem(METHODS, "broken", made("broken", methods.pretrained))
    mended = measure(fine_tunes, tmp_path, "broken", "average")  # what failed is tried again
    assert all(mended["broken", "default", task, "clean"].score is not None for task in CLASSES)


def test_an_expert_with_nan_is_named(fine_tunes, tmp_path):
    for name in ("base", *CLASSES):
        (tmp_path / name).mkdir()
        for file in (fine_tunes / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "topic" / "model.safetensors")
    state["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "topic" / "model.safetensors", metadata={"format": "pt"})
    write_suite(tmp_path, "merging", "sequence-classification", "".join(f"  {task}:\n" for task in CLASSES))
    with pytest.raises(FusionError, match=r"topic.*NaN"):
        measure(tmp_path, tmp_path / "out", "average", data_dir=fine_tunes / "data")


def test_parameters_are_tuned_on_the_validation_split(fine_tunes, merged, tmp_path, monkeypatch):
    _, cells = merged
    suite, asked = load_suite(fine_tunes / "tiny.yaml"), []
    original = merging.MergingSetup.task_rows

    def spied(self, task, corruption="clean", split="test"):
        asked.append(split)
        return original(self, task, corruption, split)

    monkeypatch.setattr(merging.MergingSetup, "task_rows", spied)
    tune = run._Runner.tune

    def tuned(*given):
        asked.clear()
        found = tune(*given)
        assert set(asked) == {"fit"}
        return found

    monkeypatch.setattr(run._Runner, "tune", tuned)
    again = measure(fine_tunes, tmp_path, "task_arithmetic")
    assert all(scores(cells)[key] == value for key, value in scores(again).items())
    for task in CLASSES:
        rows = task_rows(suite, task, fine_tunes / "data")
        fit, test, train = (set(own["text"]) for own in (rows.fit, rows.test, rows.train))
        assert fit and not fit & test and not fit & train
    # and the value is one that no neighbour on the grid beats there
    setup = merging.MergingSetup(suite, fine_tunes / "data", TEST, 16)
    runner = run._Runner(suite, tmp_path, ["clean"], "", False)
    runner.setup = setup
    job = run.Job("task_arithmetic", run.everything(suite), 0)
    row = METHODS["task_arithmetic"]
    grid = row.tune[1]
    best = again["task_arithmetic", "tuned", "mood", "clean"].parameters["scaling"]
    heights = {
        value: runner.validation(job, row.entries["merging"](setup, job.holdout, 0, scaling=value))
        for value in grid[max(0, grid.index(best) - 1) : grid.index(best) + 2]
    }
    assert heights[best] == max(heights.values())


def test_conditions_are_measured_on_corrupted_rows(fine_tunes, merged, tmp_path):
    _, clean = merged
    cells = measure(fine_tunes, tmp_path, "individual", corruptions=["truncation:5", "casing:1"])
    assert {key[3] for key in cells} == {"clean", "truncation:5", "casing:1"}
    for task in CLASSES:
        assert (
            cells["individual", "default", task, "clean"].score == clean["individual", "default", task, "clean"].score
        )
    differ = [
        cells["individual", "default", task, "clean"].score
        != cells["individual", "default", task, "truncation:5"].score
        for task in CLASSES
    ]
    assert any(differ)


def test_unseen_splits_fuse_some_and_test_the_others(fine_tunes, merged, tmp_path):
    cells = run_suite(
        fine_tunes / "tiny.yaml", ["average", "experts", "slerp"], output=tmp_path, data_dir=fine_tunes / "data",
        unseen=["last"], limit=TEST, tuned_on=16,
    )  # fmt: skip
    last = {(cell.method, cell.task): cell for cell in cells if cell.split == "last"}
    assert set(last) == {(name, "kind") for name in ("average", "slerp", "expert:mood", "expert:topic")}
    assert {cell.group for cell in last.values()} == {"held-out"}
    assert {cell.group for cell in cells if cell.split == "all"} == {"held-in"}
    assert last["slerp", "kind"].score is not None  # of two it can be made
    states = {name: load_file(fine_tunes / name / "model.safetensors") for name in ("mood", "topic", "kind")}
    model = bert(CLASSES["kind"])
    halves = {
        name: (own + states["topic"][name]) / 2 for name, own in states["mood"].items() if not name.startswith(HEAD)
    }
    model.load_state_dict({**states["kind"], **halves})
    rows = Dataset.from_parquet(str(fine_tunes / "data" / "kind" / "test.parquet"))
    with torch.no_grad():
        said = model(**make_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")).logits.argmax(1)
    assert last["average", "kind"].score == pytest.approx(float((said == torch.tensor(rows["label"])).float().mean()))


def test_experts_with_the_mlps_of_their_base_are_not_upscaled(fine_tunes):
    base, *same = load_experts([fine_tunes / "mood"] * 3, gates=False)
    with pytest.raises(NotApplicable, match="which the experts did not change"):
        methods.upscaled([replace(own, name=name) for name, own in zip("ab", same, strict=True)], base)


def test_a_multitask_trained_model_is_a_ceiling(fine_tunes, tmp_path):
    suite = load_suite(fine_tunes / "tiny.yaml")
    setup = merging.MergingSetup(suite, fine_tunes / "data", TEST, 16)
    setup.show(setup.states[0])  # the trunk of one expert with all heads
    (tmp_path / "multitask").mkdir()
    save_file(
        {name: own.clone() for name, own in setup.backbone.state_dict().items()},
        tmp_path / "multitask" / "model.safetensors",
    )
    suite = replace(suite, multitask=str(tmp_path / "multitask"))
    options = {"output": tmp_path / "out", "data_dir": fine_tunes / "data", "limit": TEST, "tuned_on": 16}
    cells = run_suite(suite, ["multitask", "experts"], unseen=["last"], **options)
    found = {(cell.method, cell.task): cell for cell in cells if cell.split == "all"}
    for task in CLASSES:
        assert found["multitask", task].score == found["expert:mood", task].score
    [unseen] = [cell for cell in cells if cell.split == "last" and cell.method == "multitask"]
    assert unseen.status == "left out"


def test_a_multitask_language_model_is_a_ceiling(tmp_path):
    base = gpt2()
    for name, model in (("base", base), ("one", fine_tuned(base, 1)), ("two", fine_tuned(base, 2))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for task in ("one", "two"):
        rows = Dataset.from_dict({"prompt": ["the quick brown", "experts are"] * 4, "target": [" fox", " fused"] * 4})
        store(tmp_path, task, {"train": rows, "test": rows})
    tasks = "  one: {metric: tokens}\n  two: {metric: tokens}\n"
    path = write_suite(tmp_path, "merging", "causal-lm", tasks, more=f"multitask: {tmp_path / 'one'}\n")
    options = {"output": tmp_path / "out", "data_dir": tmp_path / "data", "limit": 8, "tuned_on": 4}
    cells = run_suite(load_suite(path), ["multitask", "experts"], **options)
    assert [cell.reason for cell in cells if cell.status != "measured"] == []
    found = {(cell.method, cell.task): cell.score for cell in cells}
    assert found["multitask", "one"] == found["expert:one", "one"]


def test_pictures(tmp_path):
    base = vit(["x", "y"])
    for name, model in (("base", base), ("dots", fine_tuned(base, 1, scale=0.5)), ("lines", fine_tuned(base, 2))):
        model.save_pretrained(tmp_path / name)
        image_processor(16).save_pretrained(tmp_path / name)
    for seed, task in enumerate(("dots", "lines")):
        given = images(40)
        store(tmp_path, task, {
            part: labelled(own, [n % 2 for n in range(len(own))], ["x", "y"], "image", seed)
            for part, own in (("train", given[:30]), ("test", given[30:]))
        })  # fmt: skip
    write_suite(tmp_path, "merging", "image-classification", "  dots:\n  lines:\n")
    cells = measure(tmp_path, tmp_path / "out", "average", "individual", corruptions=["gaussian_noise:5"])
    assert {cell.status for cell in cells.values()} == {"measured"}
    assert {cell.n for cell in cells.values()} == {10}


# ---------------------------------------------------------------- what is refused

BAD = {
    "no such method": (["--methods", "magic"], "no method 'magic'"),
    "a method of another kind": (["--methods", "phatgoose"], "phatgoose is for suites of the kind routing"),
    "no such corruption": (["--corruptions", "fog"], "no corruption 'fog' of texts"),
    "no such severity": (["--corruptions", "typos:9"], "no corruption 'typos:9' of texts"),
    "no such split": (["--unseen", "first"], "no unseen split 'first'"),
    "no data": (["--data", "/"], "no data set 'mood' in /"),
    "no such suite": (["--suite", "nothing"], "no suite 'nothing'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_invalid_arguments_are_reported_in_one_error(fault, fine_tunes, tmp_path, capsys):
    given, said = BAD[fault]
    words = ["bench", "run", "--suite", str(fine_tunes / "tiny.yaml"), "--data", str(fine_tunes / "data"),
             "--output", str(tmp_path), "--methods", "individual", *given]  # fmt: skip
    assert main(words) != 0
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_other_settings_are_refused_in_the_same_folder(fine_tunes, merged):
    output, _ = merged
    with pytest.raises(FusionError, match=r"with --limit 24, not 5"):
        measure(fine_tunes, output, "average", limit=5)


def test_other_weights_and_tasks_do_not_either(fine_tunes, tmp_path):
    """Also where everything is measured already: that was of others."""
    work, output = tmp_path / "work", tmp_path / "out"
    shutil.copytree(fine_tunes, work)
    path = work / "tiny.yaml"
    path.write_text(path.read_text().replace(str(fine_tunes), str(work)))
    measured = measure(work, output, "average")
    assert scores(measure(work, output, "average")) == scores(measured)
    usual = path.read_text()
    path.write_text(usual.replace("  mood:", "  mood: {metric: f1}"))
    with pytest.raises(FusionError, match="has cells of a suite tiny with other tasks"):
        measure(work, output, "average")
    path.write_text(usual)
    state = load_file(work / "mood" / "model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in state.items()}, work / "mood" / "model.safetensors", {"format": "pt"}
    )
    binding._sha.cache_clear()  # another day, another process
    with pytest.raises(FusionError, match=r"has cells measured with .*/mood at \w{12}; it is now at \w{12}"):
        measure(work, output, "average")
    (output / "tiny" / binding.FILE).write_text("{")
    with pytest.raises(FusionError, match="settings.json cannot be read"):
        measure(work, output, "average")


def test_refused_run_does_not_fix_the_settings(fine_tunes, tmp_path):
    with pytest.raises(FusionError, match="no folder was given"):
        measure(fine_tunes, tmp_path, "average", data_dir=None)
    assert measure(fine_tunes, tmp_path, "average", limit=5)["average", "default", "mood", "clean"].n == 5


def test_named_experts_and_pickles_on_demand(fine_tunes, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    for file in (fine_tunes / "mood").iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, tmp_path / "old")
    torch.save(load_file(fine_tunes / "mood" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "tiny.yaml").write_text(
        f"title: t\nkind: merging\nhead: sequence-classification\nbase: {fine_tunes}/base\n"
        f"experts: {{a: {tmp_path}/old, b: {fine_tunes}/topic}}\n"
        "defaults: {data: 'data:{task}', fitting: {split: train, share: 0.5}}\n"
        "tasks:\n  mood: {expert: a}\n  topic: {expert: b}\n"
    )
    words = ["bench", "run", "--suite", str(tmp_path / "tiny.yaml"), "--data", str(fine_tunes / "data")]
    words += ["--methods", "task_arithmetic", "individual", "--limit", "8", "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert "has only pickle weights" in capsys.readouterr().err
    assert main([*words, "--allow-pickle"]) == 0
    cells = read_cells(tmp_path / "out")
    assert {(cell.status, cell.group) for cell in cells} == {("measured", "held-in")}
    assert {cell.variant for cell in cells} == {"default", "tuned"}
    assert all(cell.command.endswith("--allow-pickle") for cell in cells)

    emr = []  # each task's mask, whatever its expert is called
    for experts in (f"{{a: {fine_tunes}/mood, b: {fine_tunes}/topic}}", f"'{fine_tunes}/{{task}}'"):
        text = (tmp_path / "tiny.yaml").read_text().replace(f"{{a: {tmp_path}/old, b: {fine_tunes}/topic}}", experts)
        where = tmp_path / str(len(emr))
        where.mkdir()
        if not experts.startswith("{"):
            text = text.replace(" {expert: a}", "").replace(" {expert: b}", "")
        (where / "tiny.yaml").write_text(text)
        emr.append(scores(measure(where, where / "out", "emr", data_dir=fine_tunes / "data")))
    assert emr[0] == emr[1]


def test_peak_memory_excludes_what_was_freed_before():
    """Memory that was freed before is not counted; half a gigabyte is."""
    big = torch.ones(2**27)
    forget_peak(on_gpu=False)
    before = peak_bytes(on_gpu=False)
    assert before > big.nbytes
    del big
    forget_peak(on_gpu=False)
    assert peak_bytes(on_gpu=False) < before - 2**28
    more = torch.ones(2**27)
    assert peak_bytes(on_gpu=False) > more.nbytes


@pytest.mark.slow
def test_processes_share_the_rows_and_score_the_same(fine_tunes, merged, tmp_path):
    _, cells = merged
    words = ["bench", "run", "--suite", str(fine_tunes / "tiny.yaml"), "--data", str(fine_tunes / "data"), "--output",
             str(tmp_path), "--methods", "average", "individual", "task_arithmetic", "experts", "--limit", str(TEST),
             "--tuned-on", "16", "--batch-size", "5"]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    code = tmp_path / "go.py"
    code.write_text("import sys\nfrom hf_fusion.cli.app import main\nsys.exit(main(sys.argv[1:]))\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(code), *words], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = {(c.method, c.variant, c.task, c.condition): c for c in read_cells(tmp_path)}
    assert len(shared) == 7 * len(CLASSES)
    assert all(scores(cells)[key] == value for key, value in scores(shared).items())
