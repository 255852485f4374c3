"""Measures a fused model beside its experts and the baselines, on one data set, in one form: `Results`."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble, oracle_expert
from hf_fusion.evaluation.loop import TaskRows, score_task
from hf_fusion.evaluation.machine import machine
from hf_fusion.evaluation.predictors import OutputPredictor, TextPredictor
from hf_fusion.evaluation.scoring import score_of
from hf_fusion.io.files import read_given
from hf_fusion.io.saving import write_file
from hf_fusion.progress import track
from hf_fusion.training.fuser import COST_WEIGHTS, replay
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs

RESULTS_FILE = "results.json"  # its name beside a model
# What experts' generation configs must not change: answers are compared, one for each prompt.
GREEDY = {"max_new_tokens": 64, "do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}


@dataclass
class System:
    """One line of a comparison.

    Attributes:
        name: what tables call it.
        kind: "foe", "frugal", "expert", "baseline" or "oracle".
        score: value of the metric.
        ci95: 95 % interval (Wilson for shares, normal for means).
        cost: mean share of the cost of querying every expert.
    """

    name: str
    kind: str
    score: float
    ci95: tuple[float, float]
    cost: float


@dataclass
class Results:
    """What was measured, on what, by what; `results.json` beside a model, and the card's tables.

    Attributes:
        dataset: name, type and split.
        n: examples.
        metric: "accuracy", "mse" or "exact_match".
        systems: the comparison.
        selection_accuracy: share of examples whose domain's expert was chosen, where domains are known.
        curve: points of the frugal variant's accuracy-cost curve: cost_weight, score, ci95, cost.
        command: what to type to measure it again.
        machine: what it ran on.
    """

    dataset: dict[str, str]
    n: int
    metric: str
    systems: list[System]
    selection_accuracy: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    machine: str = ""

    def save(self, path: str | Path) -> None:
        """Writes JSON, all of it or nothing."""
        write_file(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Reads what `save` wrote."""
        values = json.loads(read_given(Path(path)))
        systems = [System(**{**row, "ci95": tuple(row["ci95"])}) for row in values.pop("systems")]
        return cls(systems=systems, **values)

    def table(self) -> list[dict[str, str]]:
        """One row per system, for printing: score and interval as shares (or plain numbers), cost as a share."""
        score = "{:.4g}" if self.metric == "mse" else "{:.1%}"
        return [
            {
                "system": system.name,
                self.metric: score.format(system.score).rjust(5),
                "95 % interval": " – ".join(score.format(end) for end in system.ci95),
                "cost": f"{system.cost:.0%}".rjust(4),
            }
            for system in self.systems
        ]

    def best(self, kind: str) -> System:
        """The system of that kind with the best score."""
        return max(
            (s for s in self.systems if s.kind == kind), key=lambda s: -s.score if self.metric == "mse" else s.score
        )


def measure_foe(
    model: Any,
    dataset: datasets.Dataset,
    *,
    name: str = "",
    split: str = "test",
    command: str = "",
    label_column: str = "label",
    expert_column: str = "expert",
    batch_size: int = 32,
) -> Results:
    """Measures the fusion, its frugal variant, every expert, mean ensemble, max confidence and the oracle expert.

    Args:
        model: a fitted FoE of classifiers or regressors.
        dataset: labelled examples that nothing was fitted on, see `training.outputs.collect_outputs`.
        name, split, command: recorded in the results.
        label_column, expert_column: columns of `dataset`.
        batch_size: examples per step.

    Raises:
        FusionError: for data without labels.
    """
    if model.config.vocabularies:
        return _evaluate_generation(model, dataset, name, split, command, batch_size)
    if label_column not in dataset.column_names:
        raise FusionError(
            f"the data set has columns {dataset.column_names}, but no {label_column!r} to measure against",
            "name it: evaluate(..., label_column=...)",
        )
    collected = collect_outputs(
        model, dataset, label_column=label_column, expert_column=expert_column, batch_size=batch_size
    )
    assert collected.labels is not None and collected.outputs is not None  # of classifiers and regressors
    predictors = _Predictors(model, collected, collected.outputs, collected.labels)
    compared = predictors.compared()
    curve: list[dict[str, Any]] = []
    if model.config.frugal:
        weights = list(track(COST_WEIGHTS, "Measuring the frugal variant"))
        points = [predictors.frugal(f"frugal at {weight}", weight) for weight in weights]
        for weight, point in zip(weights, _systems(points, len(dataset), predictors.metric), strict=True):
            curve.append({"cost_weight": weight, "score": point.score, "ci95": point.ci95, "cost": point.cost})
    return Results(
        dataset={"name": name, "type": name, "split": split},
        n=len(collected),
        metric=predictors.metric,
        systems=_systems(compared, len(dataset), predictors.metric),
        selection_accuracy=predictors.selection_accuracy(),
        curve=curve,
        command=command,
        machine=machine(),
    )


def _systems(predictors: Sequence[OutputPredictor], count: int, metric: str) -> list[System]:
    """Predictors of collected outputs with their scores."""
    data = TaskRows("the data", metric, [{}] * count, lambda rows: {})
    found = score_task(predictors, data, count)
    return [_system(predictor, found[predictor.name], metric) for predictor in predictors]


def _system(predictor: OutputPredictor | TextPredictor, scores: torch.Tensor, metric: str) -> System:
    score = score_of(scores, metric)
    return System(predictor.name, predictor.kind, score.score, score.ci95, predictor.cost)


class _Predictors:
    """What is compared, from one collection of outputs (N, K, C)."""

    def __init__(self, model: Any, collected: ExpertOutputs, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.model, self.collected, self.outputs, self.labels = model, collected, outputs, labels
        self.regression = model.config.problem_type == "regression"
        self.metric = "mse" if self.regression else "accuracy"
        self._choice: torch.Tensor | None = None

    def compared(self) -> list[OutputPredictor]:
        """The fusion, its frugal variant, the experts, and baselines."""
        model, collected, shares = self.model, self.collected, self.model.config.cost_shares
        fused, cost = self._fused()
        found = [self._of(f"ensemble, {model.config.rule}" if model.config.rule else "FoE", "foe", fused, cost)]
        if model.config.frugal:
            found.append(self.frugal("FoE, frugal", model.config.frugal["cost_weight"]))
        for index, expert in enumerate(model.config.experts):
            found.append(self._of(expert["name"], "expert", self.outputs[:, index], shares[index]))
        found.append(self._of("mean ensemble", "baseline", mean_ensemble(self.outputs), 1.0))
        if not self.regression:
            found.append(self._of("max confidence", "baseline", max_confidence(self.outputs), 1.0))
            best = oracle_expert(self.outputs, self.labels, collected.experts)
            owners = collected.experts
            cost = sum(shares[int(own)] for own in owners) / len(collected) if owners is not None else 1.0
            found.append(OutputPredictor("oracle expert", "oracle", cost, best))
        return found

    def _of(self, name: str, kind: str, outputs: torch.Tensor, cost: float) -> OutputPredictor:
        """What predicts by outputs (N, C)."""
        if self.regression:
            scores = (outputs.squeeze(-1).double() - self.labels.double()).square()
        else:
            scores = outputs.argmax(1) == self.labels
        return OutputPredictor(name, kind, cost, scores)

    @torch.no_grad()
    def _fused(self) -> tuple[torch.Tensor, float]:
        """The fusion's outputs and their mean cost."""
        scores = copy.deepcopy(self.model.fuser).to("cpu")(self.collected.features)  # others may be using the model
        if self.model.config.mode == "output":
            return scores, 1.0
        self._choice = scores.argmax(1)
        shares, source = torch.tensor(self.model.config.cost_shares), self.model.config.features_from
        if source is None:
            cost = 1.0
        else:  # the source always runs; the chosen one too, unless it is the source
            cost = float((shares[source] + shares[self._choice] * (self._choice != source)).mean())
        return self.outputs[torch.arange(len(scores)), self._choice], cost

    @torch.no_grad()
    def frugal(self, name: str, cost_weight: float) -> OutputPredictor:
        """The frugal variant at some lambda."""
        shares = torch.tensor(self.model.config.cost_shares)
        outputs, order = replay(copy.deepcopy(self.model.policy).to("cpu"), self.outputs, shares, cost_weight)
        fused = self.model.fuser(outputs.flatten(1).to(self.model.device)).cpu()
        return self._of(name, "frugal", fused, float(((order > 0) * shares).sum(1).mean()))

    def selection_accuracy(self) -> float | None:
        """How often the expert of the example's domain was chosen."""
        if self._choice is None or self.collected.experts is None:
            return None
        return float((self._choice == self.collected.experts).float().mean())


def _evaluate_generation(
    model: Any, dataset: datasets.Dataset, name: str, split: str, command: str, batch_size: int
) -> Results:
    """Exact match of the fusion's and every expert's generations with column ``target``."""
    prompt = "prompt" if "prompt" in dataset.column_names else "text"

    def generate(expert: int | None, prompts: Sequence[str]) -> list[str]:
        inputs = model.processor(text=list(prompts)).to(model.device)
        rows = len(inputs["input_ids"])
        choice = model.select(inputs) if expert is None else torch.full((rows,), expert, device=model.device)
        sequences = model.generate(**inputs, choice=choice, **GREEDY)
        texts = []
        for chosen, sequence in zip(choice.tolist(), sequences, strict=True):
            answer = sequence[_prompt_length(model, inputs, chosen) :]
            texts.append(model.processor.decode(answer, skip_special_tokens=True))
        return texts

    predictors = [TextPredictor("FoE", "foe", 1.0, partial(generate, None))]
    for index, (expert, share) in enumerate(zip(model.config.experts, model.config.cost_shares, strict=True)):
        predictors.append(TextPredictor(expert["name"], "expert", share, partial(generate, index)))
    rows = dataset.select_columns([prompt, "target"])
    data = TaskRows(
        "the data",
        "exact_match",
        rows,
        lambda batch: {"prompts": [row[prompt] for row in batch], "targets": [row["target"] for row in batch]},
    )
    found = score_task(predictors, data, batch_size)
    return Results(
        {"name": name, "type": name, "split": split},
        len(dataset),
        "exact_match",
        [_system(predictor, found[predictor.name], "exact_match") for predictor in predictors],
        command=command,
        machine=machine(),
    )


def _prompt_length(model: Any, inputs: Any, expert: int) -> int:
    """Tokens that a decoder repeats before it answers."""
    if model.config.is_encoder_decoder:
        return 0
    group = model.config.backbones[model.config.experts[expert]["backbone"]]["inputs"]
    return int(inputs["input_ids" if group == 0 else f"input_ids_{group}"].shape[1])
