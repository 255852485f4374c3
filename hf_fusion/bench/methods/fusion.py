"""How suites of the kind "fusion" are fused: single experts, ensembles, and FoE in its variants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.bench.methods.declaration import bench_method
from hf_fusion.bench.scoring import Answered, score
from hf_fusion.bench.setups.fusion import OUTPUT, SELECTION, FusionSetup
from hf_fusion.bench.suite import UnseenSplit
from hf_fusion.bench.systems import CLEAN, FIT, TEST, NotApplicable, System, everything
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble
from hf_fusion.models.assembly_foe import normalise
from hf_fusion.training.fuser import fit_fuser, replay

if TYPE_CHECKING:
    from datasets import Dataset


# ---------------------------------------------------------------- experts


@bench_method()
def experts(setup: FusionSetup, split: UnseenSplit, seed: int) -> dict[str, System]:
    """Every expert that is fused, for all rows."""
    costs, sizes = setup.costs(split)[0], setup.sizes(split)
    return {
        f"expert:{name}": System(partial(setup.said, number), stored=size, active=size, cost=cost)
        for name, number, size, cost in zip(split.fuse, setup.fused(split), sizes, costs, strict=True)
    }


@bench_method()
def individual(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """Every row's own expert, the oracle of FoE's paper: it is told the task."""

    def answer(task: str, condition: str, part: str) -> Answered:
        owner = setup.suite.owner(task)
        if owner is None:
            raise NotApplicable("no expert was trained on it")
        return setup.said(setup.names.index(owner), task, condition, part)

    sizes = setup.sizes(everything(setup.suite))
    return System(answer, stored=setup.everyone.num_parameters(), active=max(sizes))


# ---------------------------------------------------------------- ensembles


def _ensemble(
    setup: FusionSetup, split: UnseenSplit, combine: Callable[[torch.Tensor], torch.Tensor], **parameters: Any
) -> System:
    """One answer from the probabilities (N, K, C) of all experts."""
    if setup.speaks:
        raise NotApplicable("an ensemble of language models would have to be asked token by token")
    fused = setup.fused(split)

    def answer(task: str, condition: str, part: str) -> Answered:
        scores = combine(setup.outputs(task, condition, part)[:, fused])
        return setup.answered(scores, task, condition, part)

    size = setup.model(split, SELECTION).num_parameters()
    return System(answer, dict(parameters), stored=size, active=size, cost=setup.costs(split)[1])


@bench_method()
def simple_ensemble(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """The mean of all experts' probabilities."""
    return _ensemble(setup, split, mean_ensemble)


@bench_method()
def weighted_ensemble(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """Their mean, with weights by how well each does on all fused tasks, on rows kept apart."""
    if setup.speaks:
        return simple_ensemble(setup, split, seed)  # which says why not
    fused = setup.fused(split)
    owned = [task for task in setup.suite.tasks if setup.suite.owner(task) in split.fuse]
    weights = []
    for number in fused:
        scores = [score(setup.said(number, task, CLEAN, FIT), setup.suite.tasks[task].metric).score for task in owned]
        weights.append(max(0.0, sum(scores) / max(len(scores), 1)))
    shares = torch.tensor(weights)[:, None] / max(sum(weights), 1e-9)
    named = dict(zip(split.fuse, weights, strict=True))
    return _ensemble(setup, split, lambda outputs: (outputs * shares).sum(1), weights=named)


@bench_method()
def max_ensemble(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """The highest probability that any expert gives a class: the class of the expert that is surest."""
    return _ensemble(setup, split, max_confidence)


# ---------------------------------------------------------------- FoE


@bench_method("FoE, selection", "fusion", also=("routing",), stochastic=True)
def foe_selection(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """FoE that chooses an expert for each row by the embeddings of all."""
    model, fused = setup.model(split, SELECTION), setup.fused(split)
    rows = setup.fitting(split)
    by = "domain" if "expert" in rows.column_names else "loss"
    fuser = _fitted(setup, model, rows, seed, by=by)

    @torch.no_grad()
    def answer(task: str, condition: str, part: str) -> Answered:
        choice = fuser(setup.features(split, task, condition, part)).argmax(1)
        return setup.chosen([fused[place] for place in choice.tolist()], task, condition, part)

    alone, all_of_them = setup.costs(split)
    size = model.num_parameters()
    # a language model answers once more; classifiers have answered with their embeddings
    cost = all_of_them + (sum(alone) / len(alone) if setup.speaks else 0.0)
    return System(answer, {"fitted_on": len(rows)}, stored=size, active=size, cost=cost)


@bench_method("FoE", "fusion", stochastic=True)
def foe(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """FoE that fuses the outputs of all experts."""
    model, rows, fuser = _output(setup, split, seed)

    @torch.no_grad()
    def answer(task: str, condition: str, part: str) -> Answered:
        scores = fuser(_own_outputs(setup, split, task, condition, part).flatten(1))
        return _named(setup, split, scores, task, condition, part)

    size = model.num_parameters()
    return System(answer, {"fitted_on": len(rows)}, stored=size, active=size, cost=setup.costs(split)[1])


@bench_method("FrugalFoE", "fusion", stochastic=True)
def foe_frugal(setup: FusionSetup, split: UnseenSplit, seed: int) -> System:
    """FoE that asks one expert after the other, and stops when another one is not worth its cost."""
    model, rows, fuser = _output(setup, split, seed, frugal=True)
    policy, weight = copy.deepcopy(model.policy).to("cpu"), model.config.frugal["cost_weight"]
    shares = torch.tensor(model.config.cost_shares)

    @torch.no_grad()
    def ask(task: str, condition: str, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        return replay(policy, _own_outputs(setup, split, task, condition, part), shares, weight)

    @torch.no_grad()
    def answer(task: str, condition: str, part: str) -> Answered:
        scores = fuser(ask(task, condition, part)[0].flatten(1))
        return _named(setup, split, scores, task, condition, part)

    asked = torch.cat([((ask(task, CLEAN, TEST)[1] > 0) * shares).sum(1) for task in split.test])
    share, size = float(asked.mean()), model.num_parameters()
    parameters = {"fitted_on": len(rows), "cost_weight": weight, "asked": share}
    cost = share * setup.costs(split)[1]
    return System(answer, parameters, stored=size, active=round(share * size), cost=cost)


def _output(setup: FusionSetup, split: UnseenSplit, seed: int, **options: Any) -> tuple[Any, Dataset, Any]:
    """A FoE of outputs, what it was fitted on, and its fuser."""
    if setup.speaks:
        raise NotApplicable("language models are fused by choosing among them")
    model, rows = setup.model(split, OUTPUT), setup.fitting(split)
    return model, rows, _fitted(setup, model, rows, seed, **options)


def _fitted(setup: FusionSetup, model: Any, rows: Dataset, seed: int, **options: Any) -> Any:
    """The fuser of a model, fitted on rows; the model serves other seeds too."""
    fit_fuser(model, rows, seed=seed, inference_batch_size=setup.batch_size, **options)
    return copy.deepcopy(model.fuser).to("cpu").eval()


def _own_outputs(setup: FusionSetup, split: UnseenSplit, task: str, condition: str, part: str) -> torch.Tensor:
    """The fused experts' probabilities of the labels that they know, (N, K, C)."""
    outputs = setup.outputs(task, condition, part)[:, setup.fused(split)]
    return outputs[:, :, _places(setup, split)]


def _named(
    setup: FusionSetup, split: UnseenSplit, scores: torch.Tensor, task: str, condition: str, part: str
) -> Answered:
    """Answers from scores of the labels that the fused experts know."""
    places = _places(setup, split)
    return Answered([places[own] for own in scores.argmax(1).tolist()], setup.right(task, condition, part))


def _places(setup: FusionSetup, split: UnseenSplit) -> list[int]:
    """Where the labels that the fused experts know lie among all."""
    known = {normalise(label): place for place, label in enumerate(setup.labels)}
    return [known[normalise(label)] for label in setup.model(split, OUTPUT).config.id2label.values()]
