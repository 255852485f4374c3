"""Suites of the kind "fusion": experts of several domains whose rows are pooled; a row's domain is
unknown. A cell's score is that of its task's rows within the pool.

All experts predict once, and their outputs are kept: every method combines them into one prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.bench.candidates import TEST, Prepared
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.common import MAX_LENGTH, ROWS_COUNTED, TaskSetup, multiplications
from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import Holdout, Suite
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.fused_models import FoEModel
from hf_fusion.hub.load import load_experts
from hf_fusion.models.assembly_foe import GENERIC_LABEL, fuse_labels, normalise
from hf_fusion.models.options_foe import settings_of
from hf_fusion.training.batches import read_examples
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs, generates, input_columns, prepare
from hf_fusion.training.runs import move_to
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset


OUTPUT, SELECTION = "output", "selection"
FIT_ROWS = 400  # of each task, that a fuser learns from
FIT_TEXTS = 32  # of prompts, which every language model has to read
HIDDEN = {OUTPUT: (512, 512), SELECTION: (512,)}  # widths of the fuser's layers: few rows want a small one
LANGUAGE = ("causal-lm", "seq2seq-lm")


class FusionSetup(TaskSetup, kind="fusion"):
    """Experts, and their outputs for the rows of each task.

    Args:
        suite: of the kind "fusion".
        data_dir: see `TaskSetup`.
        limit: see `TaskSetup`.
        tuned_on: see `TaskSetup`.
        batch_size: see `TaskSetup`.
        device: see `TaskSetup`.
        allow_pickle: see `TaskSetup`.

    Attributes:
        experts: all of the suite, under its names.
        labels: of classifiers, all labels once, in order; and each expert's label indices.
    """

    def __init__(
        self, suite: Suite, data_dir: Path | None, limit: int, tuned_on: int, batch_size: int = 16, device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(suite, data_dir, limit, tuned_on, batch_size, device, allow_pickle)
        base = None if suite.base is None else expert_path(suite.base, suite.build)
        sources = [expert_path(source, suite.build) for source in suite.experts.values()]
        loaded = load_experts(sources, base=base, gates=False, allow_pickle=allow_pickle)
        self.experts = [replace(expert, name=name) for name, expert in zip(suite.experts, loaded, strict=True)]
        self.names = [expert.name for expert in self.experts]
        self.is_language = suite.head in LANGUAGE
        if not self.is_language:
            self.experts = [self._labelled(expert) for expert in self.experts]
            self.labels, self._places = fuse_labels(self.experts, OUTPUT)
        self._models: dict[tuple[tuple[str, ...], str], FoEModel] = {}
        self._rows: dict[tuple[str, str, str], Dataset] = {}
        self._outputs: dict[tuple[str, str, str], torch.Tensor] = {}
        self._collected: dict[Any, ExpertOutputs] = {}
        self._predictions: dict[Any, Predictions] = {}
        self._fitting: dict[tuple[str, ...], Dataset] = {}

    def _labelled(self, expert: Expert) -> Expert:
        """An expert whose classes have no names has those of its task."""
        tasks = [task for task in self.suite.tasks if self.suite.owner(task) == expert.name]
        if not tasks or not any(map(GENERIC_LABEL.fullmatch, expert.labels)):
            return expert
        names = self.rows(tasks[0]).test.features["label"].names
        return replace(expert, labels=list(names)) if len(names) == len(expert.labels) else expert

    def of_kind(self, kind: str) -> TaskSetup:
        """See `TaskSetup.of_kind`.

        Raises:
            NotApplicable: adapters of one base are needed, and the experts are not.
        """
        shared = self.experts[0].model
        if kind == "routing" and any(expert.adapter is None or expert.model is not shared for expert in self.experts):
            raise NotApplicable("routes among adapters of one base; these experts are independent models")
        return super().of_kind(kind)

    def fused(self, holdout: Holdout) -> list[int]:
        """Indices of the experts that are fused."""
        owners = (name if name in self.names else self.suite.owner(name) for name in holdout.fuse)
        return [self.names.index(owner) for owner in owners if owner]

    def model(self, holdout: Holdout, mode: str) -> FoEModel:
        """A FoE of the fused experts, whose fuser is not fitted yet."""
        key = (holdout.fuse, mode)
        if key not in self._models:
            experts = [self.experts[number] for number in self.fused(holdout)]
            try:
                model = FoEModel.from_experts(experts, mode=mode, fuser_hidden=HIDDEN[mode])
            except ValueError as error:  # a family, which knows nothing of this package, raises these
                raise FusionError(str(error)) from error
            move_to(model, self.device)
            self._models[key] = model
        return self._models[key]

    @property
    def all_experts(self) -> FoEModel:
        """A FoE of all experts, whose outputs are collected."""
        return self.model(Holdout("", tuple(self.names), ()), SELECTION)

    # ---------------------------------------------------------------- rows

    def pool(self, task: str, corruption: str = CLEAN, split: str = TEST) -> Dataset:
        """The rows of a task within the pool: labels by name, short rows first."""
        key = (task, corruption, split)
        if key not in self._rows:
            self._rows[key] = by_length(self._plain(task, self.sample(task, corruption, split)))
        return self._rows[key]

    def fitting(self, holdout: Holdout) -> Dataset:
        """Validation rows of all fused tasks, for the fuser, with the expert of each row where its task has one."""
        from datasets import concatenate_datasets

        if holdout.fuse in self._fitting:
            return self._fitting[holdout.fuse]
        fused = {self.names[number] for number in self.fused(holdout)}
        owned = [task for task in self.suite.tasks if self.suite.owner(task) in fused]
        parts, most = [], FIT_TEXTS if self.is_language else FIT_ROWS
        for task in owned or list(holdout.test):
            rows = self.rows(task).fit.shuffle(seed=0)
            rows = self._plain(task, rows.select(range(min(most, len(rows)))))
            if owned:
                rows = rows.add_column("expert", [self.suite.owner(task)] * len(rows))
            elif self.is_language and self.reads(task) in ("targets", "ranks"):
                rows = self._with_best_expert(task, rows, self.fused(holdout))
            parts.append(rows.select_columns([name for name in rows.column_names if name not in ("choices", "right")]))
        if not sum(map(len, parts)):
            raise NotApplicable("no expert predicts any of the fuser's training rows correctly")
        self._fitting[holdout.fuse] = by_length(concatenate_datasets([part for part in parts if len(part)]))
        return self._fitting[holdout.fuse]

    def _plain(self, task: str, rows: Dataset) -> Dataset:
        """Columns that the rows of all tasks have."""
        from datasets import Value

        if self.is_language:
            return rows.select_columns(
                [name for name in ("prompt", "target", "choices", "right") if name in rows.column_names]
            )
        if "image" in rows.column_names:
            kept = ["image"]
        else:
            kept = ["text", "text_pair"] if any(self._has_pairs(task) for task in self.suite.tasks) else ["text"]
            if "text_pair" in kept and "text_pair" not in rows.column_names:
                rows = rows.add_column("text_pair", [""] * len(rows))
            for name in kept:
                rows = rows.cast_column(name, Value("string"))
        names = rows.features["label"].names
        labels = [names[label] for label in rows["label"]]
        return rows.select_columns(kept).add_column("label", labels)

    def _has_pairs(self, task: str) -> bool:
        return "text_pair" in self.rows(task).test.column_names

    # ---------------------------------------------------------------- outputs of experts

    def outputs(self, task: str, corruption: str, split: str) -> torch.Tensor:
        """Probabilities of all labels by all experts, (N, K, C); what an expert does not know has 0."""
        key = (task, corruption, split)
        if key not in self._outputs:
            self._collect(key)
        return self._outputs[key]

    def collected(self, model: FoEModel, task: str, corruption: str, split: str) -> ExpertOutputs:
        """What the experts of a FoE give for a task's rows."""
        key = (id(model), task, corruption, split)
        if key not in self._collected:
            rows = self.pool(task, corruption, split)
            unlabelled = rows if self.is_language else rows.remove_columns("label")
            self._collected[key] = collect_outputs(model, unlabelled, batch_size=self.batch_size)
        return self._collected[key]

    def _collect(self, key: tuple[str, str, str]) -> None:
        collected = self.collected(self.all_experts, *key)
        assert collected.outputs is not None  # of classifiers
        # labels of one name are one label here; among experts that are chosen from, each has its own
        placed = torch.zeros(len(collected), len(self.names), len(self.labels))
        for number, (row, indices) in enumerate(zip(self.all_experts.config.experts, self._places, strict=True)):
            placed[:, number].index_add_(1, torch.tensor(indices), collected.outputs[:, number, row["label_map"]])
        self._outputs[key] = placed

    def references(self, task: str, corruption: str, split: str) -> list[int]:
        """Indices of the right labels.

        Raises:
            NotApplicable: no expert knows one of them.
        """
        known = {normalise(label): index for index, label in enumerate(self.labels)}
        names = list(self.pool(task, corruption, split)["label"])
        if unknown := sorted({name for name in names if normalise(name) not in known}):
            raise NotApplicable(f"no expert knows the class {unknown[0]!r}")
        return [known[normalise(name)] for name in names]

    def predictions(self, scores: torch.Tensor, task: str, corruption: str, split: str) -> Predictions:
        """Predictions from scores of all labels, (N, C)."""
        return Predictions(scores.argmax(1).tolist(), self.references(task, corruption, split))

    def prepared_expert(self, expert: int, task: str, corruption: str, split: str) -> Prepared:
        """One expert; what it predicts is known after the first time."""
        return self.known(task, self.expert_predictions(expert, task, corruption, split))

    def expert_predictions(self, expert: int, task: str, corruption: str, split: str) -> Predictions:
        """Predictions of one expert."""
        if not self.is_language:
            return self.predictions(self.outputs(task, corruption, split)[:, expert], task, corruption, split)
        key = (expert, task, corruption, split)
        if key not in self._predictions:
            self._predictions[key] = self._generated(expert, task, self.pool(task, corruption, split))
        return self._predictions[key]

    def _generated(self, expert: int, task: str, rows: Dataset) -> Predictions:
        """Predictions of a language model for rows of a task."""
        model, known = _ExpertModel(self.all_experts, expert), self.experts[expert]
        reader = Expert(known.name, model.model, processor=known.processor)
        predictor = ModelPredictor(known.name, "expert", model, tokenizer=known.processor)
        read = read_examples(reader, self.inputs_of(task, rows), MAX_LENGTH)
        return self.predict(Prepared(predictor, self.encoded(task, rows, read)))

    def _with_best_expert(self, task: str, rows: Dataset, fused: list[int]) -> Dataset:
        """Rows that some expert answers right, and which expert: where several do, the one that is right most often.

        Losses of different vocabularies do not compare.
        """
        found = {self.names[number]: self._generated(number, task, rows) for number in fused}
        right = {
            name: [given == wanted for given, wanted in zip(predicted.predictions, predicted.references, strict=True)]
            for name, predicted in found.items()
        }
        best_first = sorted(right, key=lambda name: -sum(right[name]))
        owners = [next((name for name in best_first if right[name][row]), None) for row in range(len(rows))]
        kept = [row for row, owner in enumerate(owners) if owner]
        return rows.select(kept).add_column("expert", [owners[row] for row in kept])

    def chosen(self, choice: Sequence[int], task: str, corruption: str, split: str) -> Predictions:
        """For each row the prediction of the expert that was chosen for it."""
        by_expert = {number: self.expert_predictions(number, task, corruption, split) for number in set(choice)}
        given = [by_expert[number].predictions[row] for row, number in enumerate(choice)]
        return Predictions(given, next(iter(by_expert.values())).references)

    # ---------------------------------------------------------------- sizes

    def sizes(self, holdout: Holdout) -> list[int]:
        """Number of parameters of each fused expert as a separate model."""
        return [
            sum(parameter.numel() for parameter in self.experts[number].model.parameters())
            for number in self.fused(holdout)
        ]

    @torch.no_grad()
    def costs(self, holdout: Holdout) -> tuple[list[float], float]:
        """Multiplications of each fused expert alone, and of all of them in one FoE, as multiples of the first one's.

        An adapter alone can be merged into its base, and costs nothing then.
        """
        model, rows = self.model(holdout, SELECTION), self.pool(holdout.test[0])
        rows = rows.select(range(min(ROWS_COUNTED, len(rows))))
        inputs = prepare(model, rows[:], input_columns(rows))
        alone = []
        for number, expert in zip(self.fused(holdout), model.config.experts, strict=True):
            inputs_alone = model._inputs_of(expert["backbone"], inputs)
            if model.config.is_encoder_decoder:
                inputs_alone = {**inputs_alone, "decoder_input_ids": inputs_alone["input_ids"][:, :1]}
            alone.append(multiplications(partial(self.experts[number].model, **inputs_alone)))
        all_of_them = partial(model.prompt_embeddings if generates(model) else model.expert_outputs, inputs)
        return [count / alone[0] for count in alone], multiplications(all_of_them) / alone[0]


class _ExpertModel:
    """One expert of a FoE of language models, as a separate model."""

    def __init__(self, foe: FoEModel, expert: int) -> None:
        backbone = foe.config.experts[expert]["backbone"]
        self.backbone, self.local = foe.backbones[backbone], foe._members(backbone).index(expert)
        self.model, self.foe, self.expert = self.backbone.model, foe, expert
        self.config, self.forward = self.model.config, self.model.forward

    def __call__(self, **inputs: Any) -> Any:
        return self.backbone(inputs, [self.local])

    def generate(self, **inputs: Any) -> Any:
        """As the model's own."""
        settings = settings_of(self.foe.config, self.expert)
        given = settings.update(**inputs)
        with self.backbone.groups.of([self.local]):
            return self.model.generate(**given, generation_config=settings)


def by_length(rows: Dataset) -> Dataset:
    """Short texts first: batches without much padding."""
    column = next((name for name in ("prompt", "text") if name in rows.column_names), None)
    if column is None:
        return rows
    lengths = [len(text) for text in rows[column]]
    return rows.select(sorted(range(len(lengths)), key=lengths.__getitem__))
