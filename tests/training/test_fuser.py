"""Fitting a fuser: what it learns, reproducibility, unchanged experts, and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_halves import LABELS, Halves

from hf_fusion import FoEModel, FusionError, fit_fuser
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble, oracle_expert
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.evaluation.intervals import wilson
from hf_fusion.evaluation.results import Results
from hf_fusion.progress import Phase, reporting
from hf_fusion.training.outputs import collect_outputs


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


def test_fuser_exceeds_every_expert(halves):
    model = FoEModel.from_experts(halves.experts)
    fit = fit_fuser(model, halves.data.select(range(200, 400)), epochs=30)
    results = evaluate(model, halves.data.select(range(400, 600)))
    assert fit.accuracy > 0.9
    assert results.best("fused").only_score.score > results.best("expert").only_score.score + 0.3
    assert results.best("fused").only_score.score >= results.best("baseline").only_score.score
    assert results.best("oracle").only_score.score >= results.best("fused").only_score.score
    inputs = model.processor(text=halves.data["text"][400:600])
    labels = torch.tensor([LABELS.index(label) for label in halves.data["label"][400:600]])
    with torch.no_grad():
        accuracy = (model(**inputs).logits.argmax(1) == labels).float().mean()
    assert results.best("fused").only_score.score == pytest.approx(float(accuracy), abs=1e-6)


@pytest.mark.long
def test_the_same_seed_gives_the_same_weights_and_another_gives_others(halves):
    weights = []
    for seed in (1, 1, 2):
        model = FoEModel.from_experts(halves.experts)
        fit_fuser(model, halves.data, fuser="mlp", epochs=3, seed=seed, frugal=True)
        weights.append(model.fuser.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["output.weight"], weights[2]["output.weight"])


def test_expert_outputs_are_computed_once(halves, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path))
    model = FoEModel.from_experts(halves.experts)
    first = collect_outputs(model, halves.data.select(range(50)))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "outputs").iterdir()}
    assert len(files) == 1
    second = collect_outputs(model, halves.data.select(range(50)))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "outputs").iterdir()} == files
    assert torch.equal(first.features, second.features)
    other = FoEModel.from_experts(halves.experts[::-1])  # other experts must not meet these outputs
    assert not torch.equal(collect_outputs(other, halves.data.select(range(50))).features, first.features)


def test_frugal_saves_and_a_budget_is_kept(halves):
    model = FoEModel.from_experts(halves.experts, costs=[1.0, 3.0])
    fit_fuser(model, halves.data.select(range(200, 400)), epochs=30, frugal=True)
    results = evaluate(model, halves.data.select(range(400, 600)))
    frugal = results.best("frugal")
    assert frugal.cost < 1.0
    assert frugal.only_score.score >= results.best("fused").only_score.score - 0.05
    inputs = model.processor(text=halves.data["text"][400:464])
    model.record_routing = True
    for budget in (0.1, 0.3, 1.0):
        with torch.no_grad():
            logits = model(**inputs, budget=budget).logits
        trace = model.routing_trace()
        cost = ((trace["order"] > 0) * torch.tensor(trace["cost_shares"])).sum(1)
        assert cost.max() <= max(budget, 0.25) + 1e-6  # the cheapest expert is always asked
        assert (trace["order"] > 0).any(1).all()
        assert trace["outputs"][trace["order"] == 0].eq(0).all()
        # each example's answer is its own: alone it is the same
        alone = model(**model.processor(text=[halves.data["text"][400]]), budget=budget).logits
        torch.testing.assert_close(alone[0], logits[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="share of the experts' cost"):
        model(**inputs, budget=1.5)


def test_a_frugal_model_loads_in_bf16(halves, tmp_path):
    model = FoEModel.from_experts(halves.experts)
    fit_fuser(model, halves.data.select(range(200, 400)), epochs=10, frugal=True)
    model.save_pretrained(tmp_path)
    half = FoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = model.processor(text=halves.data["text"][400:440])
    with torch.no_grad():
        same = half(**inputs, budget=0.6).logits.argmax(1) == model(**inputs, budget=0.6).logits.argmax(1)
    assert same.float().mean() > 0.9


def test_policy_matches_the_formula(halves):
    """Against a plain reading of the formula: one example, every superset, the nearest points by sorting."""
    model = FoEModel.from_experts(halves.experts, costs=[1.0, 2.0])
    fit_fuser(model, halves.data.select(range(200, 400)), fuser="mlp", epochs=5, frugal=True, cost_weight=0.05)
    policy, weight = model.policy, model.config.frugal["cost_weight"]
    collected = collect_outputs(model, halves.data.select(range(400, 440)))
    costs = torch.tensor(model.config.cost_shares)
    _, order = policy.run(lambda rows, experts: collected.outputs[rows, experts], 40, costs, weight)
    for row in range(40):
        queried: set[int] = set()
        while True:
            if queried:
                near = sum((collected.outputs[row, k] - policy.outputs[:, k]).square().sum(-1) for k in queried)
                points = near.argsort()[: policy.neighbors]
            else:
                points = torch.arange(len(policy.outputs))
            value = {}
            for index, subset in enumerate(policy.subsets):
                members = set(subset.nonzero()[:, 0].tolist())
                if queried <= members:
                    value[frozenset(members)] = (
                        policy.losses[index][points].mean() + weight * costs[list(members)].sum()
                    )
            best = min(value, key=lambda members: value[members])
            if best == queried:
                break
            alone = {}
            for index, subset in enumerate(policy.subsets):
                if subset.sum() == 1 and int(subset.nonzero()) in best - queried:
                    expert = int(subset.nonzero())
                    alone[expert] = policy.losses[index][points].mean() + weight * costs[expert]
            expert = min(alone, key=lambda k: alone[k])
            queried.add(expert)
            assert order[row, expert] == len(queried)
        assert (order[row] > 0).sum() == len(queried)


def test_more_than_ten_experts_choose_among_a_sample_of_subsets():
    from hf_fusion.models.frugal_foe import candidate_subsets

    subsets = candidate_subsets(14)
    assert len(subsets) >= 1024
    assert len(subsets.unique(dim=0)) == len(subsets)
    assert {*range(1, 15)} == set(subsets.sum(1).tolist())


@pytest.mark.long
def test_selection_learns_the_domain_or_the_least_loss(halves):
    data = halves.data.add_column("expert", [int(LABELS.index(label) > 1) for label in halves.data["label"]])
    for by in ("domain", "loss"):
        model = FoEModel.from_experts(halves.experts, mode="selection", fuser_dropout=0.1)
        fit_fuser(model, data.select(range(200, 400)), by=by, epochs=30)
        results = evaluate(model, data.select(range(400, 600)))
        assert results.selection_accuracy > 0.85
        assert results.best("fused").only_score.score > results.best("expert").only_score.score + 0.3
    with pytest.raises(FusionError, match="needs the embeddings of all experts"):
        fit_fuser(model, data, fuser="mlp", frugal=True)


def test_a_class_that_the_data_lacks_is_reported(halves, caplog):
    model = FoEModel.from_experts(halves.experts)
    fit = fit_fuser(model, halves.data.filter(lambda row: row["label"] != "two"), epochs=2)
    assert fit.missing_labels == ["two"]
    assert "two" in caplog.text


def test_baselines_on_numbers_worked_out_by_hand():
    outputs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.4, 0.6], [0.3, 0.7]], [[0.6, 0.4], [0.9, 0.1]]])
    labels = torch.tensor([0, 0, 1])
    torch.testing.assert_close(mean_ensemble(outputs)[0], torch.tensor([0.55, 0.45]))
    assert max_confidence(outputs).argmax(1).tolist() == [0, 1, 0]
    assert oracle_expert(outputs, labels).tolist() == [True, False, False]
    assert oracle_expert(outputs, labels, torch.tensor([1, 0, 0])).tolist() == [False, False, False]


def test_wilson_interval_against_the_published_example():
    """Agresti & Coull (1998): 0 of 20 has the 95 % interval (0, 0.161); 15 of 50 (0.191, 0.438)."""
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.161), abs=5e-4)
    assert wilson(0.3, 50) == pytest.approx((0.191, 0.438), abs=5e-4)


def test_results_survive_a_file(halves, tmp_path):
    model = FoEModel.from_experts(halves.experts)
    results = evaluate(model, halves.data.select(range(40)), name="words", command="pytest")
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


FIT = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import torch
from tiny_halves import Halves
from hf_fusion import FoEModel, fit_fuser
halves = Halves()
model = FoEModel.from_experts(halves.experts)
print("START", flush=True)
fit = fit_fuser(model, halves.data, fuser="mlp", epochs=4, batch_size={batch})
from accelerate import PartialState
state = PartialState(cpu=True)
if state.is_main_process:
    torch.save({{**model.fuser.state_dict(), "processes": torch.tensor(state.num_processes)}}, {answer!r})
"""


def fit_code(tmp_path: Path, batch: int, name: str) -> Path:
    here = Path(__file__).parent
    script = tmp_path / f"{name}.py"
    paths = {"tests": str(here.parent), "here": str(here), "answer": str(tmp_path / f"{name}.pt")}
    script.write_text(FIT.format(batch=batch, **paths))
    return script


@pytest.mark.slow
def test_two_processes_fit_the_same_as_one(tmp_path):
    """`accelerate launch` over two CPU processes: half the batch each, the same gradient, the same fuser."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch += [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]  # without a GPU this is torchrun on gloo
    for name, processes, batch, arguments in (("one", 1, 64, []), ("two", 2, 32, launch)):
        environment["HF_FUSION_CACHE"] = str(tmp_path / name)
        command = [sys.executable, *arguments, str(fit_code(tmp_path, batch, name))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert torch.load(tmp_path / f"{name}.pt").pop("processes") == processes
    parts = sorted(file.name[-12:] for file in (tmp_path / "two" / "outputs").iterdir())
    assert parts == ["0-of-2.arrow", "1-of-2.arrow"]
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for name in set(one) - {
        "processes"
    }:  # the processes draw their batches from other parts of the shuffle, so close, not equal
        difference = (one[name] - two[name]).norm() / one[name].norm()
        assert difference < 0.2, name


@pytest.mark.slow
def test_a_killed_fit_runs_again(tmp_path):
    """kill -9 at ten moments; the next run, on whatever the cache holds then, gives the very weights of a quiet one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_FUSION_CACHE": str(tmp_path / "quiet")}
    script = fit_code(tmp_path, 64, "fit")
    subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True, timeout=240)
    wanted = torch.load(tmp_path / "fit.pt")
    environment["HF_FUSION_CACHE"] = str(tmp_path / "killed")
    for attempt in range(10):
        (tmp_path / "fit.pt").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "START\n"
        time.sleep(0.15 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True, timeout=240)
    again = torch.load(tmp_path / "fit.pt")
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)


def test_costs_are_measured_or_given(halves):
    model = FoEModel.from_experts(halves.experts)
    data = halves.data.select(range(60))
    fit_fuser(model, data, epochs=1, costs=[1.0, 3.0])
    assert model.config.cost_shares == [0.25, 0.75]
    fit_fuser(model, data, epochs=1, costs="latency")
    seconds = [expert["cost"] for expert in model.config.experts]
    assert all(0 < cost < 1 for cost in seconds)
    for wrong in ([1.0], [1.0, -1.0], "money"):
        with pytest.raises(FusionError, match="one positive number for each"):
            fit_fuser(model, data, costs=wrong)


class Heard:
    """A reporter that keeps how far each phase came."""

    def __init__(self) -> None:
        self.ended_at: dict[str, tuple[float, float | None]] = {}

    def began(self, phase: Phase) -> None:
        """Nothing."""

    def moved(self, phase: Phase) -> None:
        """Nothing."""

    def ended(self, phase: Phase) -> None:
        self.ended_at[phase.name] = (phase.done, phase.total)


def test_fit_reports_its_phases(halves):
    model, heard = FoEModel.from_experts(halves.experts), Heard()
    with reporting(heard):
        fit_fuser(model, halves.data.select(range(203)), fuser="mlp", epochs=2, batch_size=32)
    assert heard.ended_at["Running 2 experts"] == (203, 203)
    steps, total = heard.ended_at["Training the fuser"]
    assert steps == total == 2 * 5  # of the 152 rows that are not held out


@pytest.mark.parametrize(
    ("label", "column", "message"),
    [("seven", "label", "holds labels .*'seven'"), ("one", "kind", "but no 'kind' to learn from")],
)
def test_unusable_rows_are_refused_before_any_expert_runs(halves, label, column, message):
    rows = halves.data.select(range(40)).remove_columns("label").add_column("label", [label] * 40)
    model, heard = FoEModel.from_experts(halves.experts), Heard()
    with reporting(heard), pytest.raises(FusionError, match=message):
        fit_fuser(model, rows, label_column=column)
    with reporting(heard), pytest.raises(FusionError, match=message.partition(" to")[0]):
        evaluate(model, rows, label_column=column)
    assert heard.ended_at == {}
