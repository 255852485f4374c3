"""Suites of the kind "routing": LoRA adapters of one base, among which a router chooses without knowing the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.bench.candidates import TEST, Candidate, Prepared, everything, seeded
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.common import MAX_LENGTH, ROWS_COUNTED, TaskSetup, multiplications
from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import Holdout, Suite
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.loop import TaskRows
from hf_fusion.evaluation.predictors import Batch, ModelPredictor
from hf_fusion.evaluation.retrieval import MINILM, TextEmbedder, texts_of
from hf_fusion.evaluation.routing import (
    STRATEGIES,
    Evaluation,
    RoutingStrategy,
    alone,
    has_heads,
    same_start,
    unchanged_blocks,
)
from hf_fusion.hub.load import load_experts
from hf_fusion.training.batches import Examples, batch_indices_by_length, read_examples
from hf_fusion.training.runs import move_to
from hf_fusion.types import Adapter

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from datasets import Dataset

    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter

TOP_K = 2
HEADS = "the base has no head: each expert brings its own"


class RoutingSetup(TaskSetup, kind="routing"):
    """Adapters of one base, which all candidates share.

    Args:
        suite: of the kind "routing".
        data_dir: see `TaskSetup`.
        limit: see `TaskSetup`.
        tuned_on: see `TaskSetup`.
        batch_size: see `TaskSetup`.
        device: see `TaskSetup`.
        allow_pickle: see `TaskSetup`.

    Attributes:
        experts: all of the suite, under its names.
        base: the tensors that an adapter changes, by name, as they are without it.
        states: the same tensors of every expert, computed on access.
    """

    def __init__(
        self, suite: Suite, data_dir: Path | None, limit: int, tuned_on: int, batch_size: int = 16, device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(suite, data_dir, limit, tuned_on, batch_size, device, allow_pickle)
        start = None if suite.base is None else expert_path(suite.base, suite.build)
        sources = [expert_path(source, suite.build) for source in suite.experts.values()]
        loaded = load_experts(sources, base=start, allow_pickle=allow_pickle)
        if full := [name for name, expert in zip(suite.experts, loaded, strict=True) if expert.adapter is None]:
            raise FusionError(f"{full[0]} is a full model; suites of the kind routing need adapters", "kind: merging")
        self.experts = [replace(expert, name=name) for name, expert in zip(suite.experts, loaded, strict=True)]
        self.model = self.experts[0].model
        move_to(self.model, device)
        self.names = [expert.name for expert in self.experts]
        self.adapters: list[Adapter] = [expert.adapter for expert in self.experts if expert.adapter]
        paths = dict.fromkeys(path for adapter in self.adapters for path in adapter.lora)
        self._targets = {f"{path}.weight": self.model.get_parameter(f"{path}.weight") for path in paths}
        self.base = {name: tensor.detach().clone() for name, tensor in self._targets.items()}
        self.states = [_Adapted(self.base, adapter) for adapter in self.adapters]
        self.has_heads = has_heads(self.experts)
        self._evaluations: dict[Any, _Evaluation] = {}
        self._encoded: dict[Any, TaskRows] = {}
        self._started: dict[Any, dict[Any, Any]] = {}

    def indices(self, holdout: Holdout) -> list[int]:
        """Indices of the experts that are fused."""
        owners = (name if name in self.names else self.suite.owner(name) for name in holdout.fuse)
        return [self.names.index(owner) for owner in owners if owner]

    def evaluation(self, holdout: Holdout, seed: int = 0, examples: int = 0) -> _Evaluation:
        """The fused experts, as `evaluate` takes them.

        Args:
            examples: rows that each of them was trained on, for what looks at these.

        Raises:
            NotApplicable: the method needs such rows, and the suite has none.
        """
        key = (holdout.fuse, seed, examples)
        if key not in self._evaluations:
            fused = [self.experts[number] for number in self.indices(holdout)]
            missing = "arrow" if any(expert.gates is None for expert in fused) else None
            options = {"top_k": TOP_K, "temperature": 1.0, "missing_gates": missing}
            trained = {expert.name: self._split_of(expert.name, "train") for expert in fused} if examples else {}
            embedder = _Unframed(self.device) if examples else None
            self._evaluations[key] = _Evaluation(
                fused, {}, trained, {}, {}, options, embedder, examples, self.batch_size, MAX_LENGTH, seed
            )
        return self._evaluations[key]

    def _split_of(self, expert: str, split: str) -> Dataset:
        for task in self.suite.tasks:
            if self.suite.owner(task) == expert and (rows := getattr(self.rows(task), split)) is not None:
                return rows
        raise NotApplicable(f"the suite has no {'training' if split == 'train' else 'validation'} rows of {expert}")

    def validation_rows(self, expert: int) -> Examples:
        """The validation rows of an expert's task, encoded."""
        loaded = self.experts[expert]
        return read_examples(loaded, self._split_of(loaded.name, "fit"), MAX_LENGTH)

    def task_rows(self, evaluation: Evaluation, task: str, corruption: str = CLEAN, split: str = TEST) -> TaskRows:
        """Rows of a task as a router reads them; encoded once."""
        key = (task, corruption, split, tuple(evaluation.names) if self.has_heads else ())  # labels are those of all
        if key not in self._encoded:
            rows = self.sample(task, corruption, split)
            read = evaluation.read(evaluation.router("phatgoose"), self.inputs_of(task, rows))
            self._encoded[key] = self.encoded(task, rows, read)
        return self._encoded[key]

    def prepared(
        self, evaluation: _Evaluation, strategy: RoutingStrategy, task: str, corruption: str, split: str
    ) -> Prepared:
        """A router with a routing strategy, and the rows that it predicts."""
        router = evaluation.router(strategy.router)
        rows, skipped = evaluation.add(task, corruption, split, self), len(unchanged_blocks(router))
        starts = nullcontext if self.reads(task) == "texts" else partial(self._started_once, router)

        @contextmanager
        def within(batch: Batch) -> Iterator[None]:
            # generation restarts at each step, and then nothing is remembered
            key = (skipped, rows, batch.indices[0])
            with starts(key), strategy.within(evaluation, router, rows, batch.indices):
                yield

        predictor = ModelPredictor(
            "router", "baseline", router.backbone, within=within,
            tokenizer=self.experts[0].processor,
        )  # fmt: skip
        return Prepared(predictor, self.task_rows(evaluation, task, corruption, split))

    @contextmanager
    def _started_once(self, router: PhatgooseRouter, key: tuple[int, str, int]) -> Iterator[None]:
        """Blocks before the first that an expert adapts run once for a batch of clean rows, whatever routes after."""
        with same_start([router]) as remembered:
            remembered.update(self._started.get(key, {}))
            yield
            if f"/{CLEAN}/" in key[1]:
                self._started[key] = dict(remembered)

    def prepared_expert(self, expert: int, task: str, corruption: str, split: str) -> Prepared:
        """One expert, for rows of any task."""
        strategy = RoutingStrategy("expert", within=partial(alone, self.names[expert]))
        return self.prepared(self.evaluation(everything(self.suite)), strategy, task, corruption, split)

    def check_heads(self) -> None:
        """Refuses what has the base's head, where experts bring heads.

        Raises:
            NotApplicable: they do.
        """
        if self.has_heads:
            raise NotApplicable(HEADS)

    def candidate(self, evaluation: _Evaluation, strategy: RoutingStrategy, **facts: Any) -> Candidate:
        """A router with a routing strategy, as a candidate."""
        return Candidate(partial(self.prepared, evaluation, strategy), **facts)

    def dense(self, state: Mapping[str, torch.Tensor], **facts: Any) -> Candidate:
        """The base with other weights.

        Raises:
            NotApplicable: the base has no head.
        """
        self.check_heads()
        evaluation = self.evaluation(everything(self.suite))

        def prepare(task: str, corruption: str, split: str) -> Prepared:
            prepared = self.prepared(evaluation, STRATEGIES["base"], task, corruption, split)
            return prepared._replace(within=partial(self._showing, state))

        return Candidate(prepare, stored=self.size, active=self.size, **facts)

    @contextmanager
    def _showing(self, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context the shared base has other weights."""
        try:
            with torch.no_grad():
                for name, target in self._targets.items():
                    target.copy_(state[name])
            yield
        finally:
            with torch.no_grad():
                for name, target in self._targets.items():
                    target.copy_(self.base[name])

    @property
    def size(self) -> int:
        """Parameters of the base."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def adapter_size(self, numbers: Sequence[int]) -> int:
        """Parameters of some adapters."""
        halves = (half for number in numbers for pair in self.adapters[number].lora.values() for half in pair)
        saved = (tensor for number in numbers for tensor in self.adapters[number].saved.values())
        return sum(tensor.numel() for tensor in (*halves, *saved))

    def _counted(self, evaluation: _Evaluation) -> tuple[str, list[int], dict[str, Any]]:
        """The first rows, on which multiplications are counted: their name, indices and inputs."""
        task = next(iter(self.suite.tasks))
        rows = self.task_rows(evaluation, task)
        numbers = next(batch_indices_by_length(rows.rows, self.batch_size))
        given = {name: value[:ROWS_COUNTED] for name, value in rows.inputs(numbers).items()}
        if not self.model.config.is_encoder_decoder:
            given.pop("labels")
        return evaluation.add(task, CLEAN, TEST, self), numbers[:ROWS_COUNTED], given

    @torch.no_grad()
    def relative_cost(self, model: Callable[..., Any]) -> float:
        """Multiplications of a model's forward as a multiple of the base's."""
        _, _, given = self._counted(self.evaluation(everything(self.suite)))
        return multiplications(partial(model, **given)) / multiplications(partial(self.model, **given))

    def cost(self, evaluation: _Evaluation, strategy: RoutingStrategy, embeds: bool = False) -> float:
        """Multiplications of a forward as a multiple of the base's, on the first rows there are."""
        router = evaluation.router(strategy.router)
        rows, numbers, given = self._counted(evaluation)

        def count(routing: RoutingStrategy) -> int:
            # with gradients, since without them what adapters multiply is not seen: sampled products of sparse matrices
            with torch.enable_grad(), routing.within(evaluation, router, rows, numbers):
                return multiplications(lambda: router.backbone(**given))

        base, total = count(STRATEGIES["base"]), count(strategy)
        if embeds:
            assert evaluation.embedder is not None
            total += multiplications(partial(evaluation.embedder, texts_of(evaluation.suite[rows].select(numbers))))
        return total / base


@dataclass
class _Evaluation(Evaluation):
    """Rows are added on first use, and what is random does not depend on their order."""

    def add(self, task: str, corruption: str, split: str, setup: RoutingSetup) -> str:
        """The name of rows here."""
        name = f"{task}/{corruption}/{split}"
        if name not in self.suite:
            self.suite = {**self.suite, name: setup.inputs_of(task, setup.sample(task, corruption, split))}
        return name

    def drawn(self, task: str, rows: Sequence[int]) -> AbstractContextManager[None]:
        """A seed for each batch."""
        return seeded(self.seed, task, min(rows))


class _Adapted(Mapping[str, torch.Tensor]):
    """What an adapter makes of its base's tensors: W + BA, float32."""

    def __init__(self, base: Mapping[str, torch.Tensor], adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, pair = self.base[name].float(), self.adapter.lora.get(name.removesuffix(".weight"))
        if pair is None:
            return weight
        update = pair[1].float() @ pair[0].float()
        return weight + (update.t() if self.adapter.transposed else update).to(weight.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class _Unframed:
    """Embeds what stands between the beginning and the end that all texts of the first call share: a chat's markup."""

    def __init__(self, device: str) -> None:
        from hf_fusion.assets.minilm import minilm_folder

        try:
            encoder: str | Path = minilm_folder()
        except FusionError:  # its wheel is not installed
            encoder = MINILM
        self.embed = TextEmbedder(encoder)
        self.embed.model.to(device)
        self._frame: tuple[str, str] | None = None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Embeddings of texts, (N, d)."""
        if self._frame is None:
            self._frame = commonprefix(texts), commonprefix([text[::-1] for text in texts])[::-1]
        before, after = self._frame
        return self.embed([text.removeprefix(before).removesuffix(after) for text in texts])
