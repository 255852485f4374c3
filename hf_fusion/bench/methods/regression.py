"""How suites of the kind "regression" are fused: single scorers, ensembles of them, and FoE."""

from __future__ import annotations

import torch
from transformers import set_seed

from hf_fusion.bench.candidates import FIT, Candidate
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.methods.declaration import bench_method
from hf_fusion.bench.setups.regression import HIDDEN, LEARNING_RATE, RegressionSetup
from hf_fusion.bench.suite import Holdout
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.task_metrics import score
from hf_fusion.models.fuser_foe import Fuser
from hf_fusion.training.fuser import train_fuser


@bench_method()
def experts(setup: RegressionSetup, holdout: Holdout, seed: int) -> dict[str, Candidate]:
    """Every expert's own scores."""

    def alone(number: int) -> Candidate:
        size = setup.experts[number].model.num_parameters()
        facts = {"stored": size, "active": size, "cost": setup.costs[number]}
        return setup.candidate(lambda scores, task: scores[:, number], **facts)

    return {f"expert:{expert.name}": alone(number) for number, expert in enumerate(setup.experts)}


@bench_method()
def simple_ensemble(setup: RegressionSetup, holdout: Holdout, seed: int) -> Candidate:
    """The mean of all scores, each with mean 0 and variance 1 over the validation split."""
    return setup.candidate(lambda scores, task: _standard(setup, scores, task).mean(1))


@bench_method()
def weighted_ensemble(setup: RegressionSetup, holdout: Holdout, seed: int) -> Candidate:
    """The same, with weights by how well each expert agrees with people on the validation split."""
    weights = {
        task: [max(0.0, _agreement(setup, task, number)) for number in range(len(setup.experts))]
        for task in setup.suite.tasks
    }

    def combine(scores: torch.Tensor, task: str) -> torch.Tensor:
        return _standard(setup, scores, task) @ torch.tensor(weights[task])

    return setup.candidate(combine, parameters={f"weights, {task}": own for task, own in weights.items()})


@bench_method()
def foe(setup: RegressionSetup, holdout: Holdout, seed: int) -> Candidate:
    """FoE for regression: for each task a fuser of all scores."""
    fusers: dict[str, Fuser] = {}
    rows = 0
    for task in setup.suite.tasks:
        fit = setup.fitting(task)
        rows = len(fit)
        set_seed(seed)
        fuser = Fuser(len(setup.experts), HIDDEN, 1, 0.0)
        read, wanted = _standard(setup, setup.scores(fit), task), torch.tensor(fit["label"]).float()
        on_cpu = torch.device(setup.device).type == "cpu"
        train_fuser(fuser, read, wanted, learning_rate=LEARNING_RATE, batch_size=16, seed=seed, use_cpu=on_cpu)
        fusers[task] = fuser

    @torch.no_grad()
    def combine(scores: torch.Tensor, task: str) -> torch.Tensor:
        fused: torch.Tensor = fusers[task](_standard(setup, scores, task))
        return fused.squeeze(1)

    return setup.candidate(combine, parameters={"fitted_on": rows})


def _agreement(setup: RegressionSetup, task: str, number: int) -> float:
    """An expert's rank correlation with people on the rows that parameters are tuned on."""
    rows = setup.sample(task, CLEAN, FIT)
    given = Predictions(setup.scores(rows)[:, number].tolist(), list(rows["label"]))
    return score(given, setup.suite.tasks[task].metric).score


def _standard(setup: RegressionSetup, scores: torch.Tensor, task: str) -> torch.Tensor:
    """Scores (N, K) on a common scale, by their mean and deviation over the rows that may be learned from."""
    known = setup.scores(setup.fitting(task))
    return (scores - known.mean(0)) / known.std(0).clamp_min(1e-9)
