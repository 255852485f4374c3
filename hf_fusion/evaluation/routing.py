"""Measures PHATGOOSE beside every baseline of its paper on a suite of tasks, without the task's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fusion.data import match_experts_by_name
from hf_fusion.errors import FusionError, suggestion
from hf_fusion.evaluation.choices import inputs_of
from hf_fusion.evaluation.loop import TaskRows, check_suite, metric_of, score_task
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.evaluation.results import FUSED, MeasuredTask, Metric, Results
from hf_fusion.evaluation.retrieval import Embedder, Retrieval, TextEmbedder
from hf_fusion.evaluation.scoring import compare
from hf_fusion.fused_models import PhatgooseRouter
from hf_fusion.hub.load import load_experts
from hf_fusion.progress import track
from hf_fusion.training.batches import Examples, read_examples
from hf_fusion.training.gates import average_activation, train_gates
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

PHATGOOSE, ORACLE, HINDSIGHT = "PHATGOOSE", "oracle", "best in hindsight"


@dataclass(frozen=True)
class RoutingStrategy:
    """How a router is set up to be one of the predictors: for `measure_routing` and for `bench.setups.routing`.

    Attributes:
        kind: see `hf_fusion.evaluation.results.PredictorScores`.
        router: whose gates and rule, a key of `ROUTERS`.
        within: (evaluation, router, task, row indices of a batch) → the context its forward runs in.
    """

    kind: str
    router: str = "phatgoose"
    within: Callable[[Evaluation, PhatgooseRouter, str, list[int]], AbstractContextManager[Any]] = (
        lambda evaluation, router, task, rows: nullcontext()
    )

    def predictor(self, name: str, evaluation: Evaluation, router: PhatgooseRouter) -> ModelPredictor:
        """A router that is set up by it."""
        return ModelPredictor(
            name,
            self.kind,
            router.backbone,
            within=lambda batch: self.within(evaluation, router, batch.task.name, batch.indices),
        )


# Gates and rule of a router -> how it is built of the experts.
ROUTERS: dict[str, Callable[[Evaluation], PhatgooseRouter]] = {
    "phatgoose": lambda evaluation: evaluation.build(evaluation.experts),
    "paper": lambda evaluation: evaluation.build(evaluation.with_paper_gates()),
    "average": lambda evaluation: evaluation.build(evaluation.with_average_gates()),
    "arrow": lambda evaluation: evaluation.build(evaluation.experts, routing="arrow"),
    "uniform": lambda evaluation: evaluation.build(evaluation.experts, routing="uniform"),
}
STRATEGIES: dict[str, RoutingStrategy] = {
    "base": RoutingStrategy("base", within=lambda evaluation, router, task, rows: router.using(None)),
    PHATGOOSE: RoutingStrategy(FUSED),
    "retrieval": RoutingStrategy(
        "baseline",
        within=lambda evaluation, router, task, rows: router.using(evaluation.retrieved(task)[rows]),
    ),
    "average activation": RoutingStrategy("baseline", "average"),
    "Arrow": RoutingStrategy("baseline", "arrow"),
    "merged": RoutingStrategy(
        "baseline",
        within=lambda evaluation, router, task, rows: router.using([1 / len(router.experts)] * len(router.experts)),
    ),
    "uniform": RoutingStrategy(
        "baseline", "uniform", lambda evaluation, router, task, rows: evaluation.drawn(task, rows)
    ),
}
TRAINED_ON = ("retrieval", "average activation")  # need rows that the experts were trained on
PREDICTORS = (*STRATEGIES, "experts", ORACLE)
"""What can be compared: "experts" are all single experts, with the best one in hindsight."""


def measure_routing(
    experts: Sequence[ExpertLike],
    suite: Mapping[str, Dataset],
    *,
    train_rows: Mapping[str, Dataset] | None = None,
    owners: Mapping[str, str] | None = None,
    predictors: Sequence[str] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    base: str | Path | PreTrainedModel | None = None,
    top_k: int = 2,
    temperature: float = 1.0,
    missing_gates: str | Mapping[str, str | Path] | None = None,
    embedder: Embedder | None = None,
    examples: int = 1000,
    batch_size: int = 32,
    max_length: int = 512,
    seed: int = 0,
    command: str = "",
) -> Results:
    """Measures PHATGOOSE, its baselines, every expert and the oracle on each task of a suite.

    The baselines are those of its paper (Muqeeth et al. 2024, arXiv:2402.05859) and Arrow (Ostapenko et al. 2024,
    arXiv:2405.11157); "merged" is the mean of all updates, "uniform" picks experts at random for each token.

    One forward per batch and predictor; blocks below all adapters run once for all. A language model's greedy
    answer is its target if and only if each of the target's tokens is the likeliest after those before it; a
    classifier's answer is the likeliest of all experts' labels. Only the oracle and the single experts know the task.

    Args:
        experts: adapters with gates, as `load_experts` takes them; where the base lies is where it runs.
        suite: task → test rows; columns ``prompt`` and ``target``, or ``text`` (or ``image``) and ``label``.
        train_rows: expert → rows it was trained on, for retrieval and average activation.
        owners: task → its expert, tasks without one are held out; default is `match_experts_by_name`.
        predictors: some of `PREDICTORS`; default is all, without the base where experts bring heads, and without
            retrieval and average activation where there are no `train_rows`.
        metrics: task → "exact" (default), "tokens" or "ranked", for language models. Rows whose answers are ranked also
            have columns ``choices``, and ``right``, a list of the indices of those that are.
        base: the adapters' base, where it is not the one they record.
        top_k: see `PhatgooseRouter.from_experts`.
        temperature: see `PhatgooseRouter.from_experts`.
        missing_gates: see `PhatgooseRouter.from_experts`.
        embedder: makes embeddings of texts for retrieval; by default all-MiniLM-L6-v2, from the Hub.
        examples: how many training rows of each expert retrieval and average activation see.
        batch_size: rows per step, taken in order of length.
        max_length: the longest sequence, in tokens.
        seed: of the rows drawn from `train_rows` and of uniform routing.
        command: recorded in the results.

    Raises:
        FusionError: for unknown predictors, tasks or experts, missing rows, and experts that do not fit together.
    """
    loaded = load_experts(list(experts), base=base)
    evaluation = Evaluation(
        loaded,
        suite,
        train_rows or {},
        match_experts_by_name(suite, [expert.name for expert in loaded]) if owners is None else owners,
        metrics or {},
        {"top_k": top_k, "temperature": temperature, "missing_gates": missing_gates},
        embedder,
        examples,
        batch_size,
        max_length,
        seed,
    )
    return evaluation.run(predictors, command)


@dataclass
class Evaluation:
    """Experts, tasks and options, as `measure_routing` takes them, and what is made of them once."""

    experts: list[Expert]
    suite: Mapping[str, Dataset]
    train_rows: Mapping[str, Dataset]
    owners: Mapping[str, str]
    metrics: Mapping[str, Metric]
    options: dict[str, Any]
    embedder: Embedder | None
    examples: int
    batch_size: int
    max_length: int
    seed: int
    _retrieval: Retrieval | None = None
    _retrieved: dict[str, torch.Tensor] = field(default_factory=dict)
    _routers: dict[str, PhatgooseRouter] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The experts' names."""
        return [expert.name for expert in self.experts]

    def run(self, predictors: Sequence[str] | None, command: str) -> Results:
        """The comparison of some predictors, see `measure_routing`."""
        wanted = self._checked(predictors)
        strategies = {name: strategy for name, strategy in STRATEGIES.items() if name in wanted}
        singles = {name: RoutingStrategy("expert", within=partial(alone, name)) for name in self.names}
        strategies |= singles if "experts" in wanted else {}
        head = self.router("phatgoose").config.head
        tasks = []
        scores: dict[str, dict[str, torch.Tensor]] = {}
        for name, rows in track(self.suite.items(), "Measuring tasks"):
            task = MeasuredTask(name, metric_of(head, self.metrics.get(name)), len(rows), self.owners.get(name))
            tasks.append(task)
            owner = task.owner if ORACLE in wanted else None
            values = self._scores(task, rows, strategies if owner is None else {**strategies, owner: singles[owner]})
            derived = {} if owner is None else {ORACLE: values[owner]}
            if "experts" in wanted:
                derived[HINDSIGHT] = values[max(self.names, key=lambda single: float(values[single].mean()))]
            for shown, found in {**{shown: values[shown] for shown in strategies}, **derived}.items():
                scores.setdefault(shown, {})[name] = found
        settings = {
            **self.options,
            "gates": sorted({expert.gates.description if expert.gates else "none" for expert in self.experts}),
            "examples": self.examples,
            "seed": self.seed,
            "dtype": str(self.experts[0].model.dtype).removeprefix("torch."),
        }
        kinds = {name: strategy.kind for name, strategy in {**singles, **STRATEGIES}.items()}
        return compare(tasks, scores, kinds, settings=settings, command=command)

    def _scores(
        self, task: MeasuredTask, rows: Dataset, strategies: Mapping[str, RoutingStrategy]
    ) -> dict[str, torch.Tensor]:
        """Every strategy's scores of one task's rows, (N,) each; a batch is prepared once for all of them."""
        routers = {kind: self.router(kind) for kind in ("phatgoose", *(s.router for s in strategies.values()))}
        router = routers["phatgoose"]
        predictors = [strategy.predictor(name, self, routers[strategy.router]) for name, strategy in strategies.items()]
        with same_start(routers.values()) as remembered:
            data = TaskRows.of(task, rows, partial(self.read, router), router.backbone)
            return score_task(predictors, data, self.batch_size, before_batch=remembered.clear)

    def read(self, router: PhatgooseRouter, rows: Dataset) -> Examples:
        """Rows as the router reads them: labels are those of all experts."""
        labels = list((router.config.id2label or {}).values()) if has_heads(self.experts) else []
        whole = Expert("the router", router.backbone, processor=self.experts[0].processor, labels=labels)
        return read_examples(whole, rows, self.max_length)

    def router(self, kind: str) -> PhatgooseRouter:
        """A router, one of `ROUTERS`; built once."""
        if kind not in self._routers:
            self._routers[kind] = ROUTERS[kind](self)
        return self._routers[kind]

    def build(self, experts: Sequence[Expert], **options: Any) -> PhatgooseRouter:
        """A router of the experts; all share the parameters of the base."""
        try:
            return PhatgooseRouter.from_experts(experts, **self.options, **options)
        except ValueError as error:
            raise FusionError(str(error)) from error

    def with_average_gates(self) -> list[Expert]:
        """The experts with average activations for gates."""
        sampled = self._sampled()
        return [
            replace(expert, gates=average_activation(expert, sampled[expert.name], max_length=self.max_length))
            for expert in self.experts
        ]

    def with_paper_gates(self) -> list[Expert]:
        """The experts with gates trained as in the paper, whatever gates they have."""
        sampled = self._sampled()
        options: dict[str, Any] = {"max_length": self.max_length, "seed": self.seed}
        options["use_cpu"] = self.experts[0].model.device.type == "cpu"
        return [
            replace(expert, gates=train_gates(expert, sampled[expert.name], gates="paper", batch_size=8, **options))
            for expert in self.experts
        ]

    def retrieved(self, task: str) -> torch.Tensor:
        """The retrieved expert of each input of a task as weights, (N, E): of each choice where they are ranked."""
        if self._retrieval is None:
            self._retrieval = Retrieval(self._sampled(), self.embedder or TextEmbedder())
        if task not in self._retrieved:
            choice = self._retrieval.choose(inputs_of(self.suite[task], self.metrics.get(task, "exact")))
            self._retrieved[task] = torch.nn.functional.one_hot(choice, len(self.experts)).float()
        return self._retrieved[task]

    def _sampled(self) -> dict[str, Dataset]:
        """Up to `examples` training rows of each expert, in the experts' order."""
        rows = {name: self.train_rows[name].shuffle(seed=self.seed) for name in self.names}
        return {name: drawn.select(range(min(self.examples, len(drawn)))) for name, drawn in rows.items()}

    def drawn(self, task: str, rows: Sequence[int]) -> AbstractContextManager[None]:
        """A seed for each batch, whatever else is measured."""
        return _seeded(hash((self.seed, list(self.suite).index(task), min(rows))))

    def _checked(self, predictors: Sequence[str] | None) -> list[str]:
        """The predictors to run, once everything that was given is known to fit."""
        heads = has_heads(self.experts)
        left_out = ["base"] * heads + list(TRAINED_ON) * (not self.train_rows)
        wanted = list(predictors) if predictors is not None else [name for name in PREDICTORS if name not in left_out]
        if unknown := [name for name in wanted if name not in PREDICTORS]:
            raise FusionError(f"there is no predictor {unknown[0]!r}", suggestion(unknown[0], PREDICTORS))
        if "base" in wanted and heads:
            raise FusionError("the base has no head: each expert brings its own, so the base alone cannot predict")
        if taken := [name for name in self.names if name in (*PREDICTORS, HINDSIGHT)]:
            raise FusionError(f"an expert cannot be named {taken[0]!r}: a predictor has this name")
        check_suite(self.suite)
        for task, owner in self.owners.items():
            if task not in self.suite:
                raise FusionError(f"the task {task!r} of {owner} is not in the suite")
            if owner not in self.names:
                raise FusionError(f"{owner!r}, the owner of {task}, is not an expert", suggestion(owner, self.names))
        needing = [name for name in TRAINED_ON if name in wanted]
        if needing and (missing := [name for name in self.names if not len(self.train_rows.get(name, ()))]):
            raise FusionError(
                f"{needing[0]} needs rows that {missing[0]} was trained on",
                hint=f"train_rows={{{missing[0]!r}: …}}, or leave {' and '.join(needing)} out of predictors",
            )
        return wanted


def alone(
    name: str, evaluation: Evaluation, router: PhatgooseRouter, task: str, rows: list[int]
) -> AbstractContextManager[Any]:
    """One expert for everything."""
    return router.using(name)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers start from this seed, and go on as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def same_start(routers: Iterable[PhatgooseRouter]) -> Iterator[dict[Any, Any]]:
    """Blocks before the first that an expert adapts give every predictor the same: here they run once for all of them.

    Gaussian gates decide within these blocks, so a router with such gates runs them once for itself.

    Yields:
        What the blocks gave, by their index, and what each router decided in them, by router. To be cleared before
        the next batch.
    """
    remembered: dict[Any, Any] = {}

    def run(
        router: PhatgooseRouter, index: int, count: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        last = index == count - 1
        state = router.calls.routing()
        if index in remembered and (router in remembered or not router.config.gate_points):
            if last and router.config.gate_points:
                evidence, decisions = remembered[router]
                state.evidence.update(evidence)
                state.decisions.update(decisions)
            return remembered[index]
        given = forward(*args, **kwargs)
        if last:  # what the others gave is not looked at again
            remembered.update(dict.fromkeys(range(count), given))
            remembered[router] = {**state.evidence}, {**state.decisions}
        return given

    blocks = []
    for router in routers:
        unchanged = unchanged_blocks(router)
        blocks += unchanged
        for index, block in enumerate(unchanged):
            block.forward = partial(run, router, index, len(unchanged), block.forward)
    try:
        yield remembered
    finally:
        for block in blocks:
            del block.forward


def unchanged_blocks(router: PhatgooseRouter) -> list[Any]:
    """The blocks of a router before the first that an expert adapts, where nothing before them is adapted either."""
    paths = {path for profile in router.config.profiles for path in profile["ranks"]}
    if router.config.is_encoder_decoder:  # its decoder reads what an adapted encoder gave
        return []
    for name, module in router.backbone.named_modules():
        inside = [path.removeprefix(f"{name}.") for path in paths if path.startswith(f"{name}.")]
        if isinstance(module, nn.ModuleList) and inside:
            first = min(int(path.split(".")[0]) for path in inside)
            return list(module[:first]) if len(inside) == len(paths) else []
    return []


def has_heads(experts: Sequence[Expert]) -> bool:
    """Whether experts bring modules of their own, such as the head of a classifier."""
    return any(expert.adapter is not None and expert.adapter.saved for expert in experts)
