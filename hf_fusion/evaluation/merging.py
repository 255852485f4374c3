"""Measures a merged model on the tasks of its experts, beside the experts themselves and simple merges of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.data import match_experts_by_name
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.loop import TaskRows, check_names, check_suite, metric_of, score_task
from hf_fusion.evaluation.predictions import Predictions, predict_batch
from hf_fusion.evaluation.predictors import Batch, ModelPredictor
from hf_fusion.evaluation.results import FUSED, MeasuredTask, Metric, Results
from hf_fusion.evaluation.scoring import compare
from hf_fusion.evaluation.task_metrics import METRICS
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import with_adapter
from hf_fusion.hub.task_heads import head_of_architecture, normalise_label
from hf_fusion.models.configuration_wemoe import ARITHMETIC
from hf_fusion.progress import track
from hf_fusion.training.adamerging import CoefficientMerge, merged_once
from hf_fusion.training.batches import read_examples
from hf_fusion.types import Expert, ModelRef

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.training.adamerging import LearnedMerge
    from hf_fusion.types import ExpertInfo, ForwardModel

logger = logging.getLogger(__name__)

WEMOE, INDIVIDUAL, MERGED = "WEMoE", "individual experts", "merged"


@dataclass(frozen=True)
class TaskModel:
    """A predictor that needs the task: a model which is called with the expert whose task it is.

    Attributes:
        name: what tables call it.
        model: called with ``task=`` and the inputs of a batch; gives what the task's dense model gives.
        kind: see `hf_fusion.evaluation.results.PredictorScores`.
        within: the context that its forwards for one task run in, of the model.
    """

    name: str
    model: ForwardModel
    kind: str = "baseline"
    within: Callable[[Any], AbstractContextManager[Any]] = merged_once
    cost: None = None

    def predict(self, batch: Batch) -> Predictions:
        """See `Predictor`."""
        inputs = {**batch.inputs, "task": batch.task.owner}
        if hasattr(self.model, "prompt_tokens"):  # routers read the prompt alone, as when they generate
            inputs["prompt_mask"] = self.model.prompt_tokens(batch.inputs)
        return predict_batch(self.model, inputs, METRICS[batch.task.metric].reads)


DEFAULT_SCALING = 0.3  # λ of task arithmetic beside a model that starts from another merge
# What a static merge of the experts is, from λ and K: the coefficient of every task vector.
MERGES: dict[str, tuple[str, Callable[[float, int], float]]] = {
    "base": ("base", lambda scaling, count: 0.0),
    "simple average": ("baseline", lambda scaling, count: 1 / count),
    "task arithmetic": ("baseline", lambda scaling, count: scaling),
}


def measure_merged(
    model: LearnedMerge,
    suite: Mapping[str, Dataset],
    *,
    experts: Sequence[ExpertLike] = (),
    base: str | Path | PreTrainedModel | None = None,
    owners: Mapping[str, str] | None = None,
    more: Sequence[TaskModel] = (),
    metrics: Mapping[str, Metric] | None = None,
    batch_size: int = 64,
    max_length: int = 512,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> Results:
    """Measures a WEMoE or a merge with learned coefficients on each task of a suite, with the task's own head.

    It is compared with the baselines of the papers on WEMoE (Tang et al. 2024, arXiv:2402.00433) and AdaMerging (Yang
    et al. 2023, arXiv:2310.02575).

    A classifier's prediction is the likeliest class; a language model's greedy answer is its target if and only if each
    of the target's tokens is the likeliest after those before it.

    Args:
        model: a `WEMoEModel` or a `CoefficientMerge`; "WEMoE" in the results.
        suite: task → test rows; columns ``text`` (``text_pair``) or ``image`` with ``label``, or ``prompt`` and
            ``target``.
        experts: what it was made of, as `load_experts` takes them; with them the base under the experts' heads, the
            simple average, task arithmetic with the model's λ (0.3 if it starts from another merge), and each expert on
            its own task are measured too.
        base: what the experts were fine-tuned from.
        owners: task → the expert whose task it is, where `match_experts_by_name` does not find it.
        more: further predictors, with distinct names.
        metrics: task → "exact" (default), "tokens" or "ranked", for language models; see `measure_routing`.
        batch_size: rows per step, taken in order of length.
        max_length: the longest sequence, in tokens.
        trust_remote_code: of the experts, see `load_experts`.
        settings: stored in the results.
        command: stored in the results.

    Raises:
        FusionError: for an empty suite, tasks without an expert, predictors of one name, and rows that cannot be read.
    """
    check_suite(suite)
    owners = match_experts_by_name(suite, model.experts) | dict(owners or {})
    for name in suite:
        if owners.get(name) not in model.experts:
            raise FusionError(
                f"{name} is not the task of any expert", hint=f"owners={{{name!r}: one of {model.experts}}}"
            )
    predictors = [TaskModel(WEMOE, model, FUSED), *more]
    if experts:
        predictors += _beside(model, experts, base, trust_remote_code)
    check_names([predictor.name for predictor in predictors])
    tasks: list[MeasuredTask] = []
    scores: dict[str, dict[str, torch.Tensor]] = {predictor.name: {} for predictor in predictors}
    for name, rows in track(suite.items(), "Measuring tasks"):
        task = MeasuredTask(name, metric_of(model.config.head, (metrics or {}).get(name)), len(rows), owners[name])
        tasks.append(task)
        labels = list(model.config.experts[model.experts.index(owners[name])]["labels"])
        reader = Expert(name, model.backbone, processor=model.processor, labels=labels)
        read = partial(read_examples, reader, max_length=max_length)
        data = TaskRows.of(task, rows, read, model.backbone)
        for predictor in predictors:
            with torch.no_grad(), predictor.within(predictor.model):
                scores[predictor.name] |= {name: score_task([predictor], data, batch_size)[predictor.name]}
    kinds = {predictor.name: predictor.kind for predictor in predictors}
    known = {"scaling": model.config.scaling, "adaptation": model.config.adaptation}
    return compare(tasks, scores, kinds, settings={**known, **(settings or {})}, command=command)


def measure_static(
    merged: ExpertLike,
    suite: Mapping[str, Dataset],
    *,
    experts: Sequence[str | Path | ExpertInfo | PreTrainedModel] = (),
    base: str | Path | PreTrainedModel | None = None,
    owners: Mapping[str, str] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    batch_size: int = 64,
    max_length: int = 512,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
    api: HfApi | None = None,
) -> Results:
    """Measures a static merge on each task of a suite, beside its experts and their base.

    Models are loaded one after the other: no more than one, with an adapter's base two, are in memory at a time. Those
    whose head or classes differ from the merged model's are skipped, with a warning.

    Args:
        merged: its folder, its id, or the model as `fuse` returned it; "merged" in the results.
        suite: task → test rows; columns ``text`` (``text_pair``) or ``image`` with ``label``, or ``prompt`` and
            ``target``.
        experts: what it was made of; also ``base+adapter``.
        base: what they were fine-tuned from; default is the one that adapters among them record.
        owners: task → the expert whose task it is, where `match_experts_by_name` does not find it.
        metrics: task → "exact" (default), "tokens" or "ranked", for language models; see `measure_routing`.
        batch_size: rows per step, taken in order of length.
        max_length: the longest sequence, in tokens.
        trust_remote_code: see `load_experts`.
        settings: stored in the results.
        command: stored in the results.
        api: the Hub's client.

    Raises:
        FusionError: for an empty suite, models of one name or that cannot be loaded, and rows that the merged model
            cannot read.
    """
    check_suite(suite)
    options, wanted = {"trust_remote_code": trust_remote_code, "api": api}, metrics or {}
    queue: list[tuple[str, Any]] = [(FUSED, merged), *(("expert", expert) for expert in experts)]
    queue += [("base", base)] if base is not None else []
    kinds: dict[str, str] = {}
    scores: dict[str, dict[str, torch.Tensor]] = {}
    names: list[str] = []
    like: Outputs | None = None
    for kind, given in queue:  # which grows where an adapter records its base
        expert = load_whole(given, options, base if kind == "expert" else None)
        outputs = Outputs.of(expert)
        like = like or outputs
        name = {FUSED: MERGED, "base": "base"}.get(kind, expert.name)
        if name in scores and isinstance(given, (str, Path)):  # folders of one name in different places
            name = str(given)
        if kind == "expert":
            names.append(name)
            if expert.adapter and expert.adapter.base and "base" not in dict(queue):
                queue.append(("base", str(expert.adapter.base_ref)))
        if outputs != like:
            logger.warning("%s is not measured: it has %s, but the merged model has %s", expert.name, outputs, like)
            continue
        check_names([*scores, name])
        kinds[name], scores[name] = kind, {}
        predictor = ModelPredictor(name, kind, expert.model)
        for task, rows in suite.items():
            measured = MeasuredTask(task, like.metric(wanted.get(task)), len(rows))
            read = partial(read_examples, expert, max_length=max_length)
            data = TaskRows.of(measured, rows, read, expert.model)
            scores[name] |= {task: score_task([predictor], data, batch_size)[name]}
        del expert, predictor  # before the next is loaded
    assert like is not None
    known = match_experts_by_name(suite, names) | dict(owners or {})
    tasks = [MeasuredTask(t, like.metric(wanted.get(t)), len(rows), known.get(t)) for t, rows in suite.items()]
    return compare(tasks, scores, kinds, settings=dict(settings or {}), command=command)


@dataclass(frozen=True)
class Outputs:
    """What a model's outputs mean: two models are compared where it is the same."""

    head: str
    labels: tuple[str, ...]

    @classmethod
    def of(cls, expert: Expert) -> Outputs:
        """Those of a model."""
        head = head_of_architecture(type(expert.model).__name__)
        return cls(head.auto if head else type(expert.model).__name__, tuple(map(normalise_label, expert.labels)))

    def metric(self, wanted: Metric | None) -> Metric:
        """How they are scored: tokens as wanted, classes by accuracy."""
        return "accuracy" if self.labels else wanted or "exact"

    def __str__(self) -> str:
        return f"the classes {', '.join(self.labels[:6])}" if self.labels else f"the head of {self.head}"


def load_whole(given: ExpertLike | ModelRef, options: Mapping[str, Any], start: ExpertLike | None = None) -> Expert:
    """A model as it answers: an adapter in the weights of its base, the one before a plus, or what all start from."""
    base, model = ModelRef.parse_pair(given) if isinstance(given, str) else (None, given)
    name = str(model) if isinstance(model, ModelRef) else model
    [expert] = load_experts([name], str(base) if base else start, gates=False, **options)
    if expert.adapter is None:
        return expert
    return replace(expert, model=with_adapter(expert.model, expert.adapter, expert.labels))


def _beside(
    model: LearnedMerge, experts: Sequence[ExpertLike], base: ExpertLike | None, agreed: bool
) -> list[TaskModel]:
    """The experts, each on its own task, and static merges of them."""
    how: dict[str, Any] = {"gates": False, "trust_remote_code": agreed}
    start = load_experts([base], **how)[0] if base is not None else None
    loaded = load_experts(list(experts), base=start, **how)
    merge = CoefficientMerge(loaded, start.model if start else None).to(model.backbone.device)
    if merge.experts != model.experts:
        raise FusionError(f"the model was made from {model.experts}, not from {merge.experts}")
    is_arithmetic = getattr(model.config, "merge", ARITHMETIC) == ARITHMETIC and model.config.scaling
    scaling = model.config.scaling if is_arithmetic else DEFAULT_SCALING
    predictors = []
    for name, (kind, coefficient) in MERGES.items():
        given = [coefficient(scaling, len(loaded))] * len(loaded)
        predictors.append(TaskModel(name, merge, kind, partial(CoefficientMerge.using, coefficients=given)))
    return [*predictors, TaskModel(INDIVIDUAL, _Individual(merge, loaded), "oracle")]


class _Individual:
    """Each task's own expert, whole."""

    def __init__(self, merge: CoefficientMerge, experts: Sequence[Expert]) -> None:
        self.merge, self.config, self.forward = merge, merge.backbone.config, merge.backbone.forward
        self.models: dict[str, Any] = {e.name: e.model for e in experts if e.adapter is None}

    def __call__(self, task: str, **inputs: Any) -> Any:
        if task not in self.models:
            self.models = {task: self._adapted(task)}  # an adapter in its base, one at a time
        return self.models[task](**inputs)

    def _adapted(self, task: str) -> Any:
        with self.merge.using(task):
            return self.merge.dense(task)


__all__ = ["INDIVIDUAL", "MERGED", "WEMOE", "Outputs", "TaskModel", "load_whole", "measure_merged", "measure_static"]
