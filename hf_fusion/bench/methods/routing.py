"""How suites of the kind "routing" are fused: routing strategies among adapters, and merges of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_fusion.bench.candidates import Candidate, Prepared, everything
from hf_fusion.bench.methods import merging
from hf_fusion.bench.methods.declaration import bench_method
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.routing import TOP_K, RoutingSetup
from hf_fusion.bench.suite import Holdout
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.evaluation.results import FUSED
from hf_fusion.evaluation.routing import PHATGOOSE, STRATEGIES, RoutingStrategy, alone
from hf_fusion.training.runs import move_to

ROUTED = {**STRATEGIES, "paper's gates": RoutingStrategy(FUSED, "paper")}

# ---------------------------------------------------------------- the methods


@bench_method()
def pretrained(setup: RoutingSetup, holdout: Holdout, seed: int) -> Candidate:
    """The base alone."""
    setup.check_heads()
    evaluation = setup.evaluation(everything(setup.suite))
    return setup.candidate(evaluation, STRATEGIES["base"], stored=setup.size, active=setup.size)


@bench_method()
def experts(setup: RoutingSetup, holdout: Holdout, seed: int) -> dict[str, Candidate]:
    """Every expert that is fused, for everything: merged into the base it costs what the base does."""
    evaluation, size = setup.evaluation(holdout), setup.size
    return {
        f"expert:{name}": setup.candidate(
            evaluation, RoutingStrategy("expert", within=partial(alone, setup.names[number])), stored=size, active=size
        )
        for name, number in zip(holdout.fuse, setup.indices(holdout), strict=True)
    }


@bench_method()
def individual(setup: RoutingSetup, holdout: Holdout, seed: int) -> Candidate:
    """Every task's own expert, which PHATGOOSE's paper calls the oracle: it knows the task."""
    evaluation = setup.evaluation(everything(setup.suite))

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        owner = setup.suite.owner(task)
        if owner is None:
            raise NotApplicable("no expert was trained on this task")
        return setup.prepared_expert(setup.names.index(owner), task, corruption, split)

    return Candidate(
        prepare,
        stored=setup.size + setup.adapter_size(range(len(setup.names))),
        active=setup.size + setup.adapter_size([0]),
        cost=setup.cost(evaluation, RoutingStrategy("oracle", within=partial(alone, setup.names[0]))),
    )


@bench_method("PHATGOOSE", "routing", name="phatgoose", also=("fusion",), given={"strategy": "PHATGOOSE"})
@bench_method(
    "PHATGOOSE, paper's gates",
    "routing",
    name="phatgoose_paper",
    also=("fusion",),
    given={"strategy": "paper's gates", "examples": 800},
    stochastic=True,
)
@bench_method(
    "Retrieval of the expert",
    "routing",
    name="retrieval",
    also=("fusion",),
    given={"strategy": "retrieval", "examples": 1000},
    stochastic=True,
)
@bench_method(
    "Average activation",
    "routing",
    name="average_activation",
    also=("fusion",),
    given={"strategy": "average activation", "examples": 256},
    stochastic=True,
)
@bench_method("Arrow", "routing", name="arrow", also=("fusion",), given={"strategy": "Arrow"})
@bench_method(
    "Uniform routing", "routing", name="uniform", also=("fusion",), given={"strategy": "uniform"}, stochastic=True
)
def routed(setup: RoutingSetup, holdout: Holdout, seed: int, strategy: str, examples: int = 0) -> Candidate:
    """A routing strategy.

    Args:
        strategy: a key of `ROUTED`.
        examples: rows that each expert was trained on, where it looks at them or trains gates on them.
    """
    numbers = setup.indices(holdout)
    without = [setup.names[number] for number in numbers if setup.experts[number].gates is None]
    if strategy == PHATGOOSE and without:
        raise NotApplicable(f"{without[0]} has no gates")
    evaluation, routing = setup.evaluation(holdout, seed, examples), ROUTED[strategy]
    retrieves = strategy == "retrieval"
    router = evaluation.router(routing.router)
    size, each = setup.size, setup.adapter_size(numbers) / len(numbers)
    gates = router.summary()["expert_parameters"] - setup.adapter_size(numbers)
    if retrieves:
        encoder: Any = evaluation.embedder
        extra = sum(parameter.numel() for parameter in encoder.embed.model.parameters())
    else:
        extra = 0 if strategy == "uniform" else gates
    asks = min(1 if retrieves else TOP_K, len(numbers))
    return setup.candidate(
        evaluation,
        routing,
        parameters={"examples": examples} if examples else {"top_k": TOP_K, "temperature": 1.0},
        stored=size + round(each * len(numbers)) + extra,
        active=size + round(each * asks) + extra,
        cost=setup.cost(evaluation, routing, embeds=retrieves),
    )


@bench_method()
def emr(setup: RoutingSetup, holdout: Holdout, seed: int) -> Candidate:
    """EMR has a mask for each task.

    Raises:
        NotApplicable: always.
    """
    raise NotApplicable("EMR selects a mask by the task of a row; here the task is unknown")


@bench_method(given={"rank": 32})
def smile(setup: RoutingSetup, holdout: Holdout, seed: int, rank: int) -> Candidate:
    """SMILE: the MLPs' updates chosen token by token without training; all else is merged.

    Args:
        rank: that is kept of an update at most.
    """
    setup.check_heads()
    fused = [setup.experts[number] for number in setup.indices(holdout)]
    options = {"routing": "smile", "task_vectors": "low-rank", "rank": rank}
    model = merging.upscaled(fused, None, **options)
    move_to(model, setup.device)
    evaluation = setup.evaluation(everything(setup.suite))
    predictor = ModelPredictor("SMILE", "baseline", model, tokenizer=setup.experts[0].processor)

    def prepare(task: str, corruption: str, split: str) -> Prepared:
        return Prepared(predictor, setup.task_rows(evaluation, task, corruption, split))

    size = sum(parameter.numel() for parameter in model.parameters())
    return Candidate(prepare, {"rank": rank}, stored=size, active=size, cost=setup.relative_cost(model))
