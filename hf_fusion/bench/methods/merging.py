"""How suites of the kind "merging" are fused: a function for each row of `methods.METHODS`.

Each takes the task setup, which experts are fused, a seed and its own parameters, and gives the candidate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.bench.candidates import FIT, Candidate, Prepared
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.methods.declaration import ENTROPY, SCALING, bench_method
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.merging import MergingSetup, State
from hf_fusion.bench.setups.routing import RoutingSetup
from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import LOWER, Holdout, same_scale
from hf_fusion.evaluation.predictions import from_logits
from hf_fusion.evaluation.task_metrics import score
from hf_fusion.fused_models import WEMoEModel
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.merging.engine.tensors import MemoryReader, Statistic
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.models.assembly_wemoe import NoLinearsError, UnchangedLinearsError
from hf_fusion.models.heads_wemoe import activate_heads
from hf_fusion.training.adamerging import CoefficientMerge
from hf_fusion.training.runs import move_to
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_fusion.training.adamerging import CoefficientMerge, LearnedMerge
    from hf_fusion.training.expert_statistics import Statistics

MergesAdapters = MergingSetup | RoutingSetup  # what has states, a base, and takes a merge of them: `dense`
STATISTICS_ROWS = 256  # of each task, that Fisher merging and RegMean look at
STATISTICS_TEXTS = 32  # of texts to write, in which every token counts


# ---------------------------------------------------------------- floors, ceilings, single experts


@bench_method("Pre-trained", "floor")
def pretrained(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """The base under every expert's head."""
    return setup.dense(setup.base)


@bench_method("Single expert", "expert")
def experts(setup: MergingSetup, holdout: Holdout, seed: int) -> dict[str, Candidate]:
    """Every expert that is fused on all tasks, under their heads."""
    whole, one = setup.sizes
    return {
        f"expert:{name}": Candidate(partial(setup.prepared_expert, setup.names.index(name)), stored=whole, active=one)
        for name in holdout.fuse
    }


@bench_method("Multitask-trained", "ceiling")
def multitask(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """One model that was trained on all tasks at once."""
    source = setup.suite.multitask
    if source is None:
        raise NotApplicable("the suite names no model that was trained on all its tasks")
    if holdout.fuse != tuple(setup.names):
        raise NotApplicable("the multitask model was trained on the tasks that are unseen in this split")
    from safetensors.torch import load_file

    state = load_file(Path(expert_path(source, setup.suite.build)) / "model.safetensors")
    model = copy.deepcopy(setup.backbone)
    pairs = model.all_tied_weights_keys.items()  # a checkpoint stores tied weights once
    model.load_state_dict({tied: state[name] for tied, name in pairs if name in state} | state)

    def called(task: str, **inputs: Any) -> Any:
        activate_heads(model, setup.merge.heads, setup.names.index(task))
        return model(**inputs)

    whole, one = setup.sizes
    with_task = _Called(called, model, getattr(model, "generate", None))
    return Candidate(partial(setup.prepared, with_task), stored=whole, active=one)


@bench_method("Individual experts", "ceiling")
def individual(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """Every task's own expert."""
    one = setup.sizes[1]
    return Candidate(
        lambda task, corruption, split: setup.prepared_expert(setup.names.index(task), task, corruption, split),
        stored=one * len(setup.names),
        active=one,
    )


# ---------------------------------------------------------------- static merging


@bench_method(
    "TIES, sum (fusion_bench)",
    "merge",
    name="ties_sum",
    tune=SCALING,
    alike=("routing",),
    given={"method": "ties", "merge": "sum", "scaling": 0.3},
)
@bench_method(
    "TIES, trimmed over the model",
    "merge",
    name="ties_model",
    tune=SCALING,
    alike=("routing",),
    given={"method": "ties", "trim": "model", "ties": "all"},
)
def static(setup: MergesAdapters, holdout: Holdout, seed: int, method: str, **parameters: Any) -> Candidate:
    """A merging method of `hf_fusion.merging`."""
    fused = _states(setup, holdout)
    row, count = MERGE_METHODS[method], len(holdout.fuse)
    least, most = row.experts
    if count < least or most is not None and count > most:
        wanted = f"{'exactly' if most == least else 'at least'} {least}"
        raise NotApplicable(f"{row.title} merges {wanted} models; here there are {count}")
    if row.matrices_only and not any(tensor.dim() == 2 for tensor in setup.base.values()):
        raise NotApplicable(
            f"{row.title} decomposes matrices and averages all other weights; these models have no matrices"
        )
    given: dict[str, Any] = {"statistics": _statistics(setup, holdout, row.statistics, seed)} if row.statistics else {}
    state = merge_states(method, setup.base, fused, seed=seed, **given, **parameters)
    return _scalable(setup, state, {name: row.parameters[name].default for name in row.parameters} | parameters)


def _states(setup: MergesAdapters, holdout: Holdout) -> list[State]:
    """The tensors of every fused expert.

    Raises:
        NotApplicable: merged they would have no head.
    """
    setup.check_heads()
    return [setup.states[number] for number in setup.indices(holdout)]


def _scalable(setup: MergesAdapters, state: State, parameters: dict[str, Any]) -> Candidate:
    """A merge that can be rescaled: in every method `scaling` multiplies what is added to the base."""

    def retuned(changes: Mapping[str, Any]) -> Candidate:
        factor = changes["scaling"] / parameters["scaling"]
        other = {name: torch.lerp(setup.base[name].float(), tensor, factor) for name, tensor in state.items()}
        return _scalable(setup, other, {**parameters, **changes})

    shown = {name: value for name, value in parameters.items() if value is not None}
    return setup.dense(state, parameters=shown, retuned=retuned if "scaling" in parameters else None)


@bench_method("Weighted average", "merge", alike=("routing",))
def weighted_average(setup: MergesAdapters, holdout: Holdout, seed: int) -> Candidate:
    """The average with weights by how well each expert does on all fused tasks, on their validation splits."""
    fused, weights = _states(setup, holdout), _weights(setup, holdout)
    if not any(weights):
        raise NotApplicable("no expert predicts any validation row correctly")
    by_expert = [{"weight": weight} for weight in weights]
    fused = [setup.states[number] for number in setup.indices(holdout)]
    state = merge_states("linear", None, fused, by_expert=by_expert)
    return setup.dense(state, parameters={"weights": dict(zip(holdout.fuse, weights, strict=True))})


def _weights(setup: MergesAdapters, holdout: Holdout) -> list[float]:
    """The mean score of every fused expert on the fused tasks' validation splits; 1 / score where less is better.

    Where metrics have different scales, scores are divided by the best expert's.
    """
    suite = setup.suite
    tasks = [task for task in suite.tasks if suite.is_fused(task, holdout)]
    if not tasks:
        raise NotApplicable("no task of the suite has an expert, so there are no rows to weight the experts by")

    def worth(number: int, task: str) -> float:
        metric = suite.tasks[task].metric
        value = score(setup.expert_predictions(number, task, CLEAN, FIT), metric).score
        return 1 / value if metric in LOWER else value

    worths = [[worth(number, task) for number in setup.indices(holdout)] for task in tasks]
    if not same_scale(suite.tasks[task].metric for task in tasks):
        worths = [[value / max(max(task_worths), 1e-9) for value in task_worths] for task_worths in worths]
    return [max(0.0, sum(task_worths) / len(tasks)) for task_worths in zip(*worths, strict=True)]


@bench_method("EMR, a mask for each task", "mixture")
def emr(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """EMR: the mask and the rescaler of a row's task; a task without an expert gets the unified model."""
    fused, unified = _states(setup, holdout), setup.dense(setup.base)
    merged: dict[int, Candidate] = {}

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        number = holdout.fuse.index(task) + 1 if task in holdout.fuse else 0
        if number not in merged:
            merged.clear()  # one at a time
            merged[number] = setup.dense(merge_states("emr", setup.base, fused, expert=number))
        return merged[number].prepare(task, corruption, split)

    masks = sum(tensor.numel() for tensor in setup.base.values()) * len(fused) // 32  # a bit each
    return Candidate(prepare, stored=unified.stored + masks, active=unified.active)


def _statistics(setup: MergesAdapters, holdout: Holdout, kind: str, seed: int) -> list[dict[str, Statistic]]:
    """What Fisher merging and RegMean need of every fused expert, on rows that it was not trained on."""
    from hf_fusion.training.fisher import measure_fisher
    from hf_fusion.training.gram import measure_gram

    if kind == "fisher" and setup.suite.head == "feature-extraction":
        raise NotApplicable("Fisher information needs class predictions; this suite has embeddings")
    if kind == "fisher" and setup.suite.head == "dense-prediction":
        raise NotApplicable("Fisher information is measured for one prediction per row; here there is one per pixel")
    if kind == "gram":
        _check_linear(setup)
    measures: dict[str, Callable[..., Any]] = {"fisher": measure_fisher, "gram": measure_gram}
    found = []
    for number in setup.indices(holdout):
        rows = setup.validation_rows(number)
        found.append(_readers(measures[kind](setup.experts[number], rows, examples=_examples(setup), seed=seed)))
    return found


def _check_linear(setup: MergesAdapters) -> None:
    if not any(map(linear_sizes, setup.experts[0].model.modules())):
        raise NotApplicable("RegMean solves for the weights of linear layers; these models have none")


def _examples(setup: MergesAdapters) -> int:
    return STATISTICS_TEXTS if setup.suite.head in ("causal-lm", "seq2seq-lm") else STATISTICS_ROWS


def _readers(measured: Statistics) -> dict[str, Statistic]:
    tensors = {key: MemoryReader(tensor) for key, tensor in measured.tensors.items()}
    return {name: Statistic(tensors[key], axis, measured.norm) for name, (key, axis) in measured.lookup.items()}


@bench_method("RegMean++", "data", alike=("routing",), stochastic=True)
def regmean_pp(setup: MergesAdapters, holdout: Holdout, seed: int) -> Candidate:
    """RegMean++: layer by layer, with what the merged layers before hand on."""
    from hf_fusion.training.gram import measure_gram_merged

    fused = _states(setup, holdout)
    _check_linear(setup)
    rows = [setup.validation_rows(number) for number in setup.indices(holdout)]
    measured = measure_gram_merged(_fused(setup, holdout), rows, examples=_examples(setup), seed=seed)
    return setup.dense(merge_states("regmean", None, fused, statistics=list(map(_readers, measured))))


# ---------------------------------------------------------------- learned


@bench_method("AdaMerging, by task", "learned", name="adamerging_task", given={"granularity": "task"}, stochastic=True)
@bench_method(
    "AdaMerging, by layer",
    "learned",
    name="adamerging_layer",
    given={"granularity": "layer"},
    stochastic=True,
)
@bench_method(
    "AdaMerging, by layer, entropy",
    "learned",
    name="adamerging_entropy",
    given={"granularity": "layer", **ENTROPY},
    stochastic=True,
)
def adamerging(setup: MergingSetup, holdout: Holdout, seed: int, granularity: str, **options: Any) -> Candidate:
    """AdaMerging: coefficients learned without labels, on the validation splits."""
    merge = CoefficientMerge(_fused(setup, holdout), _base(setup), granularity)
    return _learned(setup, holdout, seed, merge, **options)


@bench_method("Concrete task arithmetic", "learned", stochastic=True)
def concrete(setup: MergingSetup, holdout: Holdout, seed: int, **options: Any) -> Candidate:
    """Concrete task arithmetic: one mask for all task vectors, learned without labels."""
    from hf_fusion.training.concrete import ConcreteMerge

    merge = ConcreteMerge(_fused(setup, holdout), _base(setup))
    return _learned(setup, holdout, seed, merge, **options)


def _learned(setup: MergingSetup, holdout: Holdout, seed: int, merge: CoefficientMerge, **options: Any) -> Candidate:
    facts = _adapt(setup, holdout, merge, seed, **options)
    with torch.no_grad():
        tensors = merge.tensors_now()
    state = {name: tensors.get(name, own).detach().clone() for name, own in setup.base.items()}
    return setup.dense(state, parameters=facts)


def _adapt(setup: MergingSetup, holdout: Holdout, model: LearnedMerge, seed: int, **options: Any) -> dict[str, Any]:
    """Adapts a model on the fused tasks' unlabelled validation splits; returns the parameters for the cell."""
    from hf_fusion.training.routers import adapt_routers

    if setup.suite.head == "dense-prediction":
        raise NotApplicable("learning without labels needs class predictions; depths and normals are not classes")
    if setup.suite.head in ("feature-extraction", "causal-lm", "seq2seq-lm"):
        raise NotApplicable("learning without labels needs class predictions; this suite has no classes")
    move_to(model, setup.backbone.device)
    rows = {task: _unlabelled(setup, task) for task in holdout.fuse}
    if not isinstance(model, CoefficientMerge):
        options |= {"experts": _fused(setup, holdout), "base": setup.start}
    adapted = adapt_routers(model, rows, seed=seed, **options)
    shown = ("merge", "scaling", "loss", "learning_rate", "batch_size", "steps", "stopped")
    return {name: getattr(adapted, name) for name in shown}


def _unlabelled(setup: MergingSetup, task: str) -> Any:
    rows = setup.rows(task).fit
    return setup.read(task, rows) if setup.suite.head == "zero-shot-image" else rows


def _fused(setup: MergesAdapters, holdout: Holdout) -> list[Expert]:
    return [setup.experts[number] for number in setup.indices(holdout)]


def _base(setup: MergingSetup) -> Any:
    return setup.start and setup.start.model


# ---------------------------------------------------------------- mixtures


@bench_method("WEMoE", "mixture", stochastic=True)
@bench_method("WEMoE, entropy", "mixture", name="wemoe_entropy", given=ENTROPY, stochastic=True)
@bench_method(
    "E-WEMoE, 90 % sparse",
    "mixture",
    name="wemoe_sparse",
    given={"task_vectors": "sparse", "shared_router": True},
    stochastic=True,
)
def wemoe(
    setup: MergingSetup, holdout: Holdout, seed: int, loss: str = "expert", diversity: float = 1.0, steps: int = 100,
    **options: Any,
) -> Candidate:  # fmt: skip
    """WEMoE: MLPs merged per input, routers adapted without labels on the validation splits."""
    model = upscaled(_fused(setup, holdout), setup.start, **options)
    facts = _adapt(setup, holdout, model, seed, loss=loss, diversity=diversity, steps=steps)
    return _mixture(setup, model, {**options, **facts})


@bench_method("SMILE", "mixture", given={"rank": 32})
def smile(setup: MergingSetup, holdout: Holdout, seed: int, rank: int) -> Candidate:
    """SMILE: low-rank experts chosen token by token, without training."""
    model = upscaled(_fused(setup, holdout), setup.start, routing="smile", task_vectors="low-rank", rank=rank)
    return _mixture(setup, model, {"rank": rank})


def upscaled(experts: list[Expert], base: Expert | None, **options: Any) -> WEMoEModel:
    """A `WEMoEModel` of experts.

    Raises:
        NotApplicable: there is nothing to up-scale.
    """
    try:
        return WEMoEModel.from_experts(experts, base=base, **options)
    except UnchangedLinearsError as error:
        raise NotApplicable("WEMoE up-scales MLPs, which the experts did not change") from error
    except NoLinearsError as error:
        raise NotApplicable("WEMoE up-scales MLPs, and found none that it supports in these models") from error


def _mixture(setup: MergingSetup, model: WEMoEModel, parameters: dict[str, Any]) -> Candidate:
    """A WEMoE with the heads of all tasks: those that it lacks are the experts'."""
    heads = setup.merge.heads
    for path in heads:
        model.backbone.set_submodule(path, setup.backbone.get_submodule(path))

    def called(task: str, **inputs: Any) -> Any:
        activate_heads(model.backbone, heads, setup.names.index(task))
        if setup.suite.head == "causal-lm":
            inputs["prompt_mask"] = model.prompt_tokens(inputs)
        return model(**inputs)

    model.config.default_task = None
    stored = sum(p.numel() for p in model.parameters())
    active = stored - (setup.sizes[0] - setup.sizes[1])
    with_task = _Called(called, model.backbone, getattr(model, "generate", None))
    return Candidate(
        partial(setup.prepared, with_task), parameters=parameters, stored=stored, active=active,
        cost=setup.relative_cost(with_task),
    )  # fmt: skip


class _Called:
    """A function in the place of a model."""

    def __init__(
        self, function: Callable[..., Any], dense: PreTrainedModel, generate: Callable[..., Any] | None
    ) -> None:
        self.function, self.config, self.forward = function, dense.config, dense.forward
        self.generate = generate

    def __call__(self, **inputs: Any) -> Any:
        return self.function(**inputs)


# ---------------------------------------------------------------- ensembles

Combine = Callable[[torch.Tensor], torch.Tensor]  # logits (K, N, C) → scores (N, C)


def _ensemble(setup: MergingSetup, holdout: Holdout, combine: Combine, **parameters: Any) -> Candidate:
    if setup.suite.head in ("causal-lm", "seq2seq-lm"):
        raise NotApplicable("an ensemble of language models would have to be evaluated token by token")
    if setup.suite.head == "dense-prediction":
        raise NotApplicable("an ensemble combines class logits; depths and normals are not classes")
    if setup.suite.head == "feature-extraction":
        raise NotApplicable("embeddings of different models lie in different spaces, so they cannot be averaged")

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        found = [setup.logits(number, task, corruption, split) for number in setup.indices(holdout)]
        logits = combine(torch.stack([own for own, _ in found]))
        return setup.known(task, from_logits(logits, found[0][1], setup.reads(task)))

    one, count = setup.sizes[1], len(holdout.fuse)
    return Candidate(prepare, dict(parameters), stored=one * count, active=one * count, cost=float(count))


@bench_method("Simple ensemble", "ensemble")
def simple_ensemble(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """The mean of all experts' logits under the task's head."""
    return _ensemble(setup, holdout, lambda logits: logits.mean(0))


@bench_method("Weighted ensemble", "ensemble")
def weighted_ensemble(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """Their mean, with weights by how well each does on all fused tasks, on their validation splits."""
    weights = _weights(setup, holdout)
    shares = torch.tensor(weights)[:, None, None] / max(sum(weights), 1e-9)
    named = dict(zip(holdout.fuse, weights, strict=True))
    return _ensemble(setup, holdout, lambda logits: (logits * shares).sum(0), weights=named)


@bench_method("Max-model predictor", "ensemble")
def max_ensemble(setup: MergingSetup, holdout: Holdout, seed: int) -> Candidate:
    """The highest logit that any expert gives a class (FusionBench's max-model predictor)."""
    return _ensemble(setup, holdout, lambda logits: logits.amax(0))
