"""How suites of the kind "fusion" are fused: single experts, ensembles, and FoE in its variants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hf_fusion.bench.candidates import FIT, TEST, Candidate, Prepared, everything
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.methods.declaration import bench_method
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.fusion import OUTPUT, SELECTION, FusionSetup
from hf_fusion.bench.suite import Holdout
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.task_metrics import score
from hf_fusion.models.assembly_foe import normalise
from hf_fusion.training.frugal import replay
from hf_fusion.training.fuser import fit_fuser
from hf_fusion.training.outputs import features_of

# ---------------------------------------------------------------- experts


@bench_method()
def experts(setup: FusionSetup, holdout: Holdout, seed: int) -> dict[str, Candidate]:
    """Every expert that is fused, for all rows."""
    costs, sizes = setup.costs(holdout)[0], setup.sizes(holdout)
    return {
        f"expert:{name}": Candidate(partial(setup.prepared_expert, number), stored=size, active=size, cost=cost)
        for name, number, size, cost in zip(holdout.fuse, setup.fused(holdout), sizes, costs, strict=True)
    }


@bench_method()
def individual(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """Every row's own expert, the oracle of FoE's paper, which knows the task."""

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        owner = setup.suite.owner(task)
        if owner is None:
            raise NotApplicable("no expert was trained on this task")
        return setup.prepared_expert(setup.names.index(owner), task, corruption, split)

    sizes = setup.sizes(everything(setup.suite))
    return Candidate(prepare, stored=setup.all_experts.num_parameters(), active=max(sizes))


# ---------------------------------------------------------------- ensembles


def _ensemble(
    setup: FusionSetup, holdout: Holdout, combine: Callable[[torch.Tensor], torch.Tensor], **parameters: Any
) -> Candidate:
    """One answer from the probabilities (N, K, C) of all experts."""
    if setup.is_language:
        raise NotApplicable("an ensemble of language models would have to be evaluated token by token")
    fused = setup.fused(holdout)

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        scores = combine(setup.outputs(task, corruption, split)[:, fused])
        return setup.known(task, setup.predictions(scores, task, corruption, split))

    size = setup.model(holdout, SELECTION).num_parameters()
    return Candidate(prepare, dict(parameters), stored=size, active=size, cost=setup.costs(holdout)[1])


@bench_method()
def simple_ensemble(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """The mean of all experts' probabilities."""
    return _ensemble(setup, holdout, mean_ensemble)


@bench_method()
def weighted_ensemble(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """Their mean, with weights by how well each does on the fused tasks' validation splits."""
    if setup.is_language:
        return simple_ensemble(setup, holdout, seed)  # which says why not
    fused = setup.fused(holdout)
    owned = [task for task in setup.suite.tasks if setup.suite.owner(task) in holdout.fuse]
    weights = []
    for number in fused:
        scores = [
            score(setup.expert_predictions(number, task, CLEAN, FIT), setup.suite.tasks[task].metric).score
            for task in owned
        ]
        weights.append(max(0.0, sum(scores) / max(len(scores), 1)))
    shares = torch.tensor(weights)[:, None] / max(sum(weights), 1e-9)
    named = dict(zip(holdout.fuse, weights, strict=True))
    return _ensemble(setup, holdout, lambda outputs: (outputs * shares).sum(1), weights=named)


@bench_method()
def max_ensemble(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """The highest probability that any expert gives a class: the class of the expert that is surest."""
    return _ensemble(setup, holdout, max_confidence)


# ---------------------------------------------------------------- FoE


@bench_method("FoE, selection", "fusion", also=("routing",), stochastic=True)
def foe_selection(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """FoE that chooses an expert for each row by the embeddings of all."""
    fused, rows = setup.fused(holdout), setup.fitting(holdout)
    by = "domain" if "expert" in rows.column_names else "loss"
    fitted = _Fitted(setup, holdout, SELECTION, seed, by=by)

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        choice = fitted.scores(task, corruption, split).argmax(1)
        chosen = [fused[index] for index in choice.tolist()]
        return setup.known(task, setup.chosen(chosen, task, corruption, split))

    alone, all_of_them = setup.costs(holdout)
    # a language model answers once more; classifiers have answered with their embeddings
    cost = all_of_them + (sum(alone) / len(alone) if setup.is_language else 0.0)
    return Candidate(prepare, fitted.parameters, stored=fitted.size, active=fitted.size, cost=cost)


@bench_method("FoE", "fusion", stochastic=True)
def foe(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """FoE that fuses the outputs of all experts."""
    fitted = _output(setup, holdout, seed)

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        return _named(setup, holdout, fitted.scores(task, corruption, split), task, corruption, split)

    cost = setup.costs(holdout)[1]
    return Candidate(prepare, fitted.parameters, stored=fitted.size, active=fitted.size, cost=cost)


@bench_method("FrugalFoE", "fusion", stochastic=True)
def foe_frugal(setup: FusionSetup, holdout: Holdout, seed: int) -> Candidate:
    """FoE that queries one expert after the other, and stops when another one is not worth its cost."""
    fitted = _output(setup, holdout, seed, frugal=True)

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        scores = fitted.frugal(task, corruption, split)[0]
        return _named(setup, holdout, scores, task, corruption, split)

    shares = torch.tensor(fitted.config.cost_shares)
    asked = torch.cat([(fitted.frugal(task, CLEAN, TEST)[1] * shares).sum(1) for task in holdout.test])
    share = float(asked.mean())
    parameters = {**fitted.parameters, "cost_weight": (fitted.config.frugal or {})["cost_weight"], "asked": share}
    cost = share * setup.costs(holdout)[1]
    return Candidate(prepare, parameters, stored=fitted.size, active=round(share * fitted.size), cost=cost)


class _Fitted:
    """A FoE's fuser, fitted; the model serves other seeds too."""

    def __init__(self, setup: FusionSetup, holdout: Holdout, mode: str, seed: int, **options: Any) -> None:
        self.setup, self.model, rows = setup, setup.model(holdout, mode), setup.fitting(holdout)
        fit = fit_fuser(self.model, rows, seed=seed, inference_batch_size=setup.batch_size, **options)
        self.config = copy.deepcopy(self.model.config)
        self.fuser = copy.deepcopy(self.model.fuser).to("cpu").eval()
        self.policy = copy.deepcopy(self.model.policy).to("cpu") if self.config.frugal else None
        self.parameters: dict[str, Any] = {"fitted_on": len(rows), "fuser": fit.fuser}
        self.size = self.model.num_parameters()

    def _features(self, *key: str) -> torch.Tensor:
        return features_of(self.model, self.setup.collected(self.model, *key), self.config)

    @torch.no_grad()
    def scores(self, *key: str) -> torch.Tensor:
        """Scores of labels or experts for the rows of (task, corruption, split)."""
        found: torch.Tensor = self.fuser(self._features(*key))
        return found

    @torch.no_grad()
    def frugal(self, *key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same after frugal queries, and which experts were queried (N, K)."""
        assert self.policy is not None and self.config.frugal is not None  # fitted with frugal=True
        shares, weight = torch.tensor(self.config.cost_shares), self.config.frugal["cost_weight"]
        shown, order = replay(self.policy, self.fuser, self.fuser.read(self._features(*key)), shares, weight)
        return self.fuser.combine(shown, order > 0), order > 0


def _output(setup: FusionSetup, holdout: Holdout, seed: int, **options: Any) -> _Fitted:
    """A FoE of outputs."""
    if setup.is_language:
        raise NotApplicable("fuses class probabilities; for language models there is FoE by selection")
    return _Fitted(setup, holdout, OUTPUT, seed, **options)


def _named(
    setup: FusionSetup, holdout: Holdout, scores: torch.Tensor, task: str, corruption: str, split: str
) -> Prepared:
    """Predictions from scores of the labels that the fused experts know."""
    known = {normalise(label): index for index, label in enumerate(setup.labels)}
    labels = [known[normalise(label)] for label in (setup.model(holdout, OUTPUT).config.id2label or {}).values()]
    predicted = [labels[label] for label in scores.argmax(1).tolist()]
    return setup.known(task, Predictions(predicted, setup.references(task, corruption, split)))
