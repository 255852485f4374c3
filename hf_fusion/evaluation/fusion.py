"""Measures a fused model beside its experts and the baselines, on one data set, in one form: `Results`."""

from __future__ import annotations

import copy
import json
import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble, oracle_expert
from hf_fusion.evaluation.metrics import load_metric
from hf_fusion.io.files import read_given
from hf_fusion.io.saving import write_file
from hf_fusion.progress import track
from hf_fusion.training.fuser import COST_WEIGHTS, replay
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs

Z95 = 1.959963984540054
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


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share measured on n examples (Wilson, 1927)."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate_fusion(
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
            "name it: evaluate_fusion(..., label_column=...)",
        )
    collected = collect_outputs(
        model, dataset, label_column=label_column, expert_column=expert_column, batch_size=batch_size
    )
    assert collected.labels is not None and collected.outputs is not None  # of classifiers and regressors
    scorer = _Scorer(model, collected, collected.outputs, collected.labels)
    shares = model.config.cost_shares
    name_of_it = f"ensemble, {model.config.rule}" if model.config.rule else "FoE"
    systems = [scorer.system(name_of_it, "foe", *scorer.fused())]
    curve: list[dict[str, Any]] = []
    if model.config.frugal:
        systems.append(scorer.system("FoE, frugal", "frugal", *scorer.frugal(model.config.frugal["cost_weight"])))
        for weight in track(COST_WEIGHTS, "Measuring the frugal variant"):
            point = scorer.system("", "frugal", *scorer.frugal(weight))
            curve.append({"cost_weight": weight, "score": point.score, "ci95": point.ci95, "cost": point.cost})
    for index, expert in enumerate(model.config.experts):
        systems.append(scorer.system(expert["name"], "expert", collected.outputs[:, index], shares[index]))
    systems.append(scorer.system("mean ensemble", "baseline", mean_ensemble(collected.outputs), 1.0))
    if not scorer.regression:
        systems.append(scorer.system("max confidence", "baseline", max_confidence(collected.outputs), 1.0))
        oracle = oracle_expert(collected.outputs, collected.labels, collected.experts)
        cost = sum(shares[int(e)] for e in collected.experts) / len(collected) if collected.experts is not None else 1.0
        systems.append(scorer.rate("oracle expert", "oracle", oracle, cost))
    return Results(
        dataset={"name": name, "type": name, "split": split},
        n=len(collected),
        metric=scorer.metric,
        systems=systems,
        selection_accuracy=scorer.selection_accuracy(),
        curve=curve,
        command=command,
        machine=machine(),
    )


class _Scorer:
    """Scores answers (N, C) of one collection of outputs."""

    def __init__(self, model: Any, collected: ExpertOutputs, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.model, self.collected, self.outputs, self.labels = model, collected, outputs, labels
        self.regression = model.config.problem_type == "regression"
        self.metric = "mse" if self.regression else "accuracy"
        self._compute = load_metric(self.metric)
        self._choice: torch.Tensor | None = None

    def system(self, name: str, kind: str, answers: torch.Tensor, cost: float) -> System:
        """Scores (N, C) answers by the metric."""
        labels = self.labels
        if self.regression:
            predictions = answers.squeeze(-1)
            score = self._compute.compute(predictions=predictions.tolist(), references=labels.tolist())[self.metric]
            half = Z95 * float((predictions - labels).square().std()) / math.sqrt(len(labels))
            return System(name, kind, score, (score - half, score + half), cost)
        predictions = answers.argmax(1)
        score = self._compute.compute(predictions=predictions.tolist(), references=labels.tolist())[self.metric]
        return System(name, kind, score, wilson(score, len(labels)), cost)

    def rate(self, name: str, kind: str, right: torch.Tensor, cost: float) -> System:
        """Scores which examples are right, (N,) bool."""
        score = float(right.float().mean())
        return System(name, kind, score, wilson(score, len(right)), cost)

    @torch.no_grad()
    def fused(self) -> tuple[torch.Tensor, float]:
        """The fusion's answers and their mean cost, from the collected outputs."""
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
    def frugal(self, cost_weight: float) -> tuple[torch.Tensor, float]:
        """The frugal variant's answers and their mean cost at some lambda."""
        shares = torch.tensor(self.model.config.cost_shares)
        outputs, order = replay(copy.deepcopy(self.model.policy).to("cpu"), self.outputs, shares, cost_weight)
        return self.model.fuser(outputs.flatten(1).to(self.model.device)).cpu(), float(
            ((order > 0) * shares).sum(1).mean()
        )

    def selection_accuracy(self) -> float | None:
        """How often the expert of the example's domain was chosen."""
        if self._choice is None or self.collected.experts is None:
            return None
        return float((self._choice == self.collected.experts).float().mean())


def _evaluate_generation(
    model: Any, dataset: datasets.Dataset, name: str, split: str, command: str, batch_size: int
) -> Results:
    """Exact match of the fusion's and every expert's generations with column ``target``."""
    metric = load_metric("exact_match")
    shares = model.config.cost_shares
    prompt = "prompt" if "prompt" in dataset.column_names else "text"

    def generate(expert: int | None) -> list[str]:
        texts: list[str] = []
        who = "the fusion" if expert is None else model.config.experts[expert]["name"]
        for start in track(range(0, len(dataset), batch_size), f"Generating with {who}"):
            inputs = model.processor(text=dataset[prompt][start : start + batch_size]).to(model.device)
            rows = len(inputs["input_ids"])
            choice = model.select(inputs) if expert is None else torch.full((rows,), expert, device=model.device)
            sequences = model.generate(**inputs, choice=choice, **GREEDY)
            for chosen, sequence in zip(choice.tolist(), sequences, strict=True):
                answer = sequence[_prompt_length(model, inputs, chosen) :]
                texts.append(model.processor.decode(answer, skip_special_tokens=True))
        return texts

    systems = []
    for index, label, kind in [
        (None, "FoE", "foe"),
        *((i, e["name"], "expert") for i, e in enumerate(model.config.experts)),
    ]:
        score = metric.compute(predictions=generate(index), references=list(dataset["target"]))["exact_match"]
        cost = 1.0 if index is None else shares[index]
        systems.append(System(label, kind, score, wilson(score, len(dataset)), cost))
    return Results(
        {"name": name, "type": name, "split": split},
        len(dataset),
        "exact_match",
        systems,
        command=command,
        machine=machine(),
    )


def _prompt_length(model: Any, inputs: Any, expert: int) -> int:
    """Tokens that a decoder repeats before it answers."""
    if model.config.is_encoder_decoder:
        return 0
    group = model.config.backbones[model.config.experts[expert]["backbone"]]["inputs"]
    return inputs["input_ids" if group == 0 else f"input_ids_{group}"].shape[1]


def machine() -> str:
    """One line on what this runs on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {device}, Python {platform.python_version()}, torch {torch.__version__}"
