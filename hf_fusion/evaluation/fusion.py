"""Measures a Fusion of Experts beside its experts, ensembles of them and the oracle, on one data set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets
import torch

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble, oracle_expert
from hf_fusion.evaluation.loop import TaskRows, check_suite, score_task
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.predictors import OutputPredictor, TextPredictor
from hf_fusion.evaluation.results import FRUGAL, FUSED, MeasuredTask, Results
from hf_fusion.evaluation.scoring import compare
from hf_fusion.evaluation.task_metrics import row_scores, score_of
from hf_fusion.progress import track
from hf_fusion.training.frugal import COST_WEIGHTS, replay
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs, generates, input_columns

if TYPE_CHECKING:
    from hf_fusion.models.modeling_foe import FoEForGeneration, FoEModel

# What experts' generation configs must not change: answers are compared, one for each prompt.
GREEDY: dict[str, Any] = {
    "max_new_tokens": 64,
    "do_sample": False,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}


def measure_foe(
    model: FoEModel,
    dataset: datasets.Dataset,
    *,
    name: str = "data",
    split: str = "test",
    command: str = "",
    label_column: str = "label",
    expert_column: str = "expert",
    batch_size: int = 32,
) -> Results:
    """Measures a Fusion of Experts and what its paper compares it with (Wang et al. 2023, arXiv:2310.01542).

    Beside the fusion: its frugal variant at the fitted cost weight and, as `Results.curve`, at every other; each expert
    alone; the mean ensemble; the most confident expert; and the oracle expert, which is the one of the row's domain
    if there is a column `expert_column`, else any that is right. Language models: the fusion and each expert, greedy,
    up to 64 new tokens, by exact match with column ``target``. Costs are shares of what querying every expert costs.

    Args:
        model: a fitted `FoEModel`, whose experts are classifiers, regressors (metric "mse") or language models.
        dataset: N labelled rows that nothing was fitted on, see `training.outputs.collect_outputs`.
        name: of the data set, for the results.
        split: of the data set, for the results.
        command: the command that repeats the measurement; stored in the results.
        label_column: column with the class, by name or index, or with the number to predict.
        expert_column: column with the expert whose domain the row is from, by name or index.
        batch_size: rows per step.

    Raises:
        FusionError: the data is empty, has no such labels, or rows that the experts cannot read.
    """
    check_suite({name: dataset})
    needed = "target" if generates(model) else label_column
    if needed not in dataset.column_names:
        rename = f"dataset.rename_column('answer', {needed!r})"
        raise FusionError(
            f"the data set has columns {dataset.column_names}, but no {needed!r} to measure against",
            rename if generates(model) else "name it: evaluate(..., label_column=...)",
        )
    measured = partial(MeasuredTask, name, n=len(dataset), split=split, pooled=True)
    if generates(model):
        task = measured("exact_match")
        return _results(task, _generating(model), _prompts(task, dataset), batch_size, command=command)
    collected = collect_outputs(
        model, dataset, label_column=label_column, expert_column=expert_column, batch_size=batch_size
    )
    assert collected.labels is not None and collected.outputs is not None  # of classifiers and regressors
    predictors = _Predictors(model, collected, collected.outputs, collected.labels)
    task = measured(predictors.metric)
    compared, curve = predictors.compared(), []
    if model.config.frugal:
        for weight in track(COST_WEIGHTS, "Measuring the frugal variant"):
            point = predictors.frugal(f"frugal at {weight}", weight)
            found = score_of(row_scores(point.found, task.metric), task.metric)
            curve.append({"cost_weight": weight, **asdict(found), "cost": point.cost})
    return _results(
        task,
        compared,
        TaskRows(task, [{}] * len(dataset), lambda rows: {}),
        len(dataset),
        selection_accuracy=predictors.selection_accuracy(),
        curve=curve,
        command=command,
    )


def _results(
    task: MeasuredTask,
    predictors: Sequence[OutputPredictor | TextPredictor],
    data: TaskRows,
    batch_size: int,
    **about: Any,
) -> Results:
    """Predictors of one task with their scores."""
    found = {name: {task.name: rows} for name, rows in score_task(predictors, data, batch_size).items()}
    kinds, costs = ({p.name: getattr(p, key) for p in predictors} for key in ("kind", "cost"))
    return compare([task], found, kinds, costs, **about)


class _Predictors:
    """What is compared, from one collection of outputs (N, K, C)."""

    def __init__(self, model: FoEModel, collected: ExpertOutputs, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.model, self.collected, self.outputs, self.labels = model, collected, outputs, labels
        self.regression = model.config.problem_type == "regression"
        self.metric = "mse" if self.regression else "accuracy"
        self._choice: torch.Tensor | None = None

    def compared(self) -> list[OutputPredictor]:
        """The fusion, its frugal variant, the experts, and baselines."""
        model, collected, shares = self.model, self.collected, self.model.config.cost_shares
        fused, cost = self._fused()
        found = [self._of(f"ensemble, {model.config.rule}" if model.config.rule else "FoE", FUSED, fused, cost)]
        if model.config.frugal:
            found.append(self.frugal("FoE, frugal", model.config.frugal["cost_weight"]))
        for index, expert in enumerate(model.config.experts):
            found.append(self._of(expert["name"], "expert", self.outputs[:, index], shares[index]))
        found.append(self._of("mean ensemble", "baseline", mean_ensemble(self.outputs), 1.0))
        if not self.regression:
            found.append(self._of("max confidence", "baseline", max_confidence(self.outputs), 1.0))
            best = oracle_expert(self.outputs, self.labels, collected.experts)
            owners = collected.experts
            cost = sum(shares[int(owner)] for owner in owners) / len(collected) if owners is not None else 1.0
            right = Predictions(best.tolist(), [True] * len(best))
            found.append(OutputPredictor("oracle expert", "oracle", cost, right))
        return found

    def _of(self, name: str, kind: str, outputs: torch.Tensor, cost: float) -> OutputPredictor:
        """What predicts by outputs (N, C)."""
        values = outputs.squeeze(-1).double() if self.regression else outputs.argmax(1)
        return OutputPredictor(name, kind, cost, Predictions(values.tolist(), self.labels.tolist()))

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
        policy, fuser = copy.deepcopy(self.model.policy).to("cpu"), copy.deepcopy(self.model.fuser).to("cpu")
        shown, order = replay(policy, fuser, fuser.read(self.collected.features), shares, cost_weight)
        fused, queried = fuser.combine(shown, order > 0), order > 0
        if self.model.config.mode == "selection":  # the chosen expert runs too
            choice = fused.argmax(1)
            queried[torch.arange(len(choice)), choice] = True
            fused = self.outputs[torch.arange(len(choice)), choice]
        return self._of(name, FRUGAL, fused, float((queried * shares).sum(1).mean()))

    def selection_accuracy(self) -> float | None:
        """How often the expert of the example's domain was chosen."""
        if self._choice is None or self.collected.experts is None:
            return None
        return float((self._choice == self.collected.experts).float().mean())


def _generating(model: FoEForGeneration) -> list[TextPredictor]:
    """The fusion and every expert, by what they generate."""

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

    experts = enumerate(zip(model.config.experts, model.config.cost_shares, strict=True))
    return [
        TextPredictor("FoE", FUSED, 1.0, partial(generate, None)),
        *(TextPredictor(row["name"], "expert", share, partial(generate, index)) for index, (row, share) in experts),
    ]


def _prompts(task: MeasuredTask, dataset: datasets.Dataset) -> TaskRows:
    """Prompts with the texts that should follow, column ``target``."""
    prompt = next(column for column in ("prompt", *input_columns(dataset)) if column in dataset.column_names)
    return TaskRows(
        task,
        dataset.select_columns([prompt, "target"]),
        lambda batch: {"prompts": [row[prompt] for row in batch], "targets": [row["target"] for row in batch]},
    )


def _prompt_length(model: FoEModel, inputs: Mapping[str, torch.Tensor], expert: int) -> int:
    """Tokens that a decoder repeats before it answers."""
    if model.config.is_encoder_decoder:
        return 0
    group = model.config.backbones[model.config.experts[expert]["backbone"]]["inputs"]
    return int(inputs["input_ids" if group == 0 else f"input_ids_{group}"].shape[1])
