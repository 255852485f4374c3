"""How suites of the kind "routing" are fused: routing strategies among adapters, and merges of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_fusion.bench.methods import merging
from hf_fusion.bench.methods.declaration import bench_method
from hf_fusion.bench.scoring import METRICS, Answered, answers
from hf_fusion.bench.settings.routing import HEADS, TOP_K, RoutingSetting
from hf_fusion.bench.suite import UnseenSplit
from hf_fusion.bench.systems import NotApplicable, System, everything, share_batches
from hf_fusion.evaluation.routing import (
    PHATGOOSE,
    WAYS,
    Way,
    alone,
)

if TYPE_CHECKING:
    pass


# ---------------------------------------------------------------- the methods


@bench_method()
def pretrained(setting: RoutingSetting, split: UnseenSplit, seed: int) -> System:
    """The base alone."""
    if setting.has_heads:
        raise NotApplicable(HEADS)
    way = WAYS["base"]
    return setting.system(setting.evaluation(everything(setting.suite)), way, stored=setting.size, active=setting.size)


@bench_method()
def experts(setting: RoutingSetting, split: UnseenSplit, seed: int) -> dict[str, System]:
    """Every expert that is fused, for everything: merged into the base it costs what the base does."""
    evaluation, size = setting.evaluation(split), setting.size
    return {
        f"expert:{name}": setting.system(
            evaluation, Way("expert", within=partial(alone, setting.names[number])), stored=size, active=size
        )
        for name, number in zip(split.fuse, setting.numbers(split), strict=True)
    }


@bench_method()
def individual(setting: RoutingSetting, split: UnseenSplit, seed: int) -> System:
    """Every task's own expert, of which PHATGOOSE's paper speaks as the oracle: it is told the task."""
    evaluation = setting.evaluation(everything(setting.suite))

    def answer(task: str, condition: str, part: str) -> Answered:
        owner = setting.suite.owner(task)
        if owner is None:
            raise NotApplicable("no expert was trained on it")
        return setting.ask(evaluation, Way("oracle", within=partial(alone, owner)), task, condition, part)

    return System(
        answer,
        stored=setting.size + setting.adapter_size(range(len(setting.names))),
        active=setting.size + setting.adapter_size([0]),
        cost=setting.cost(evaluation, Way("oracle", within=partial(alone, setting.names[0]))),
    )


@bench_method("PHATGOOSE", "routing", name="phatgoose", also=("fusion",), given={"way": "PHATGOOSE"})
@bench_method(
    "Retrieval of the expert",
    "routing",
    name="retrieval",
    also=("fusion",),
    given={"way": "retrieval", "examples": 1000},
    stochastic=True,
)
@bench_method(
    "Average activation",
    "routing",
    name="average_activation",
    also=("fusion",),
    given={"way": "average activation", "examples": 256},
    stochastic=True,
)
@bench_method("Arrow", "routing", name="arrow", also=("fusion",), given={"way": "Arrow"})
@bench_method("Uniform routing", "routing", name="uniform", also=("fusion",), given={"way": "uniform"}, stochastic=True)
def routed(setting: RoutingSetting, split: UnseenSplit, seed: int, way: str, examples: int = 0) -> System:
    """A way to route.

    Args:
        way: a key of `hf_fusion.evaluation.routing.WAYS`.
        examples: rows that each expert was trained on, where it looks at them.
    """
    numbers = setting.numbers(split)
    without = [setting.names[number] for number in numbers if setting.experts[number].gates is None]
    if way == PHATGOOSE and without:
        raise NotApplicable(f"{without[0]} has no gates")
    evaluation, own, retrieves = setting.evaluation(split, seed, examples), WAYS[way], way == "retrieval"
    router = evaluation.router(own.router)
    size, each = setting.size, setting.adapter_size(numbers) / len(numbers)
    gates = router.summary()["expert_parameters"] - setting.adapter_size(numbers)
    if retrieves:
        encoder: Any = evaluation.embedder
        extra = sum(parameter.numel() for parameter in encoder.embed.model.parameters())
    else:
        extra = 0 if way == "uniform" else gates
    asks = min(1 if retrieves else TOP_K, len(numbers))
    return setting.system(
        evaluation,
        own,
        parameters={"examples": examples} if examples else {"top_k": TOP_K, "temperature": 1.0},
        stored=size + round(each * len(numbers)) + extra,
        active=size + round(each * asks) + extra,
        cost=setting.cost(evaluation, own, embeds=retrieves),
    )


def _merged(
    setting: RoutingSetting, by: Callable[..., System], split: UnseenSplit, seed: int, **parameters: Any
) -> System:
    """The experts as whole models, merged by a function of `methods.merging`; what no adapter changes stays."""
    if setting.has_heads:
        raise NotApplicable(HEADS)
    return by(setting, split, seed, **parameters)


@bench_method(name="ties_sum", given={"method": "ties", "merge": "sum", "scaling": 0.3})
@bench_method(name="ties_model", given={"method": "ties", "trim": "model", "ties": "all"})
def static(setting: RoutingSetting, split: UnseenSplit, seed: int, **parameters: Any) -> System:
    """A merging method of `hf_fusion.merging`."""
    return _merged(setting, merging.static, split, seed, **parameters)


@bench_method()
def weighted_average(setting: RoutingSetting, split: UnseenSplit, seed: int) -> System:
    """The average, weighted by each expert's score on the validation split."""
    return _merged(setting, merging.weighted_average, split, seed)


@bench_method()
def regmean_pp(setting: RoutingSetting, split: UnseenSplit, seed: int) -> System:
    """RegMean++ of the experts as whole models."""
    return _merged(setting, merging.regmean_pp, split, seed)


@bench_method()
def emr(setting: RoutingSetting, split: UnseenSplit, seed: int) -> System:
    """EMR has a mask for each task.

    Raises:
        NotApplicable: always.
    """
    raise NotApplicable("it takes the mask of a row's task, which is not told here")


@bench_method(given={"rank": 32})
def smile(setting: RoutingSetting, split: UnseenSplit, seed: int, rank: int) -> System:
    """SMILE: the MLPs' updates chosen token by token without training; all else is merged.

    Args:
        rank: that is kept of an update at most.
    """
    if setting.has_heads:
        raise NotApplicable(HEADS)
    fused = [setting.experts[number] for number in setting.numbers(split)]
    options = {"routing": "smile", "task_vectors": "low-rank", "rank": rank}
    model = merging.upscaled(fused, None, **options).to(setting.device)
    evaluation, tokenizer = setting.evaluation(everything(setting.suite)), setting.experts[0].processor

    def answer(task: str, condition: str, part: str) -> Answered:
        reads = METRICS[setting.suite.tasks[task].metric].reads
        batches = setting.batches(evaluation, task, condition, part)
        found = share_batches(batches, lambda inputs: answers(model, inputs, reads, tokenizer))
        return setting.settled(found, task, setting.some(task, condition, part))

    size = sum(parameter.numel() for parameter in model.parameters())
    return System(answer, {"rank": rank}, stored=size, active=size, cost=setting.relative_cost(model))
