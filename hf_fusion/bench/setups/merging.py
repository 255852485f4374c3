"""Suites of the kind "merging": full models of one base with a head for each task; a row's task is known.

What fuses them is in `bench.methods.merging`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoProcessor, DataCollatorWithPadding

from hf_fusion.bench.candidates import TEST, Candidate, Prepared
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.not_applicable import NotApplicable
from hf_fusion.bench.setups.common import MAX_LENGTH, ROWS_COUNTED, TaskSetup, multiplications, on_device
from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import Holdout, Suite
from hf_fusion.bench.zero_shot import fix_classes
from hf_fusion.evaluation.choices import unchanged
from hf_fusion.evaluation.loop import TaskRows
from hf_fusion.evaluation.predictions import Predictions, from_logits
from hf_fusion.evaluation.predictors import Batch, ModelPredictor
from hf_fusion.evaluation.task_metrics import Reads
from hf_fusion.hub.download import download
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.selection import pick_small
from hf_fusion.merging.engine.tensors import clamp_variance
from hf_fusion.models.heads_wemoe import activate_heads
from hf_fusion.training.adamerging import CoefficientMerge
from hf_fusion.training.batches import Examples, image_text_examples, read_examples
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.types import ForwardModel

State = Mapping[str, torch.Tensor]


class MergingSetup(TaskSetup, kind="merging"):
    """Experts of one base, with one backbone that becomes every merge of them in turn.

    Args:
        suite: of the kind "merging".
        data_dir: see `TaskSetup`.
        limit: see `TaskSetup`.
        tuned_on: see `TaskSetup`.
        batch_size: see `TaskSetup`.
        device: see `TaskSetup`.
        allow_pickle: see `TaskSetup`.

    Attributes:
        merge: all experts' task vectors and heads; its backbone is what runs.
        base: tensors of the base.
        names: tasks that have an expert, whose names the experts bear here.
    """

    def __init__(
        self, suite: Suite, data_dir: Path | None, limit: int, tuned_on: int, batch_size: int = 16, device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(suite, data_dir, limit, tuned_on, batch_size, device, allow_pickle)
        owned = {task.name: task.expert for task in suite.tasks.values() if task.expert}
        self.names = list(owned)
        self.start: Expert | None = None
        if suite.base:
            path = expert_path(suite.base, suite.build)
            [self.start] = load_experts([path], gates=False, allow_pickle=allow_pickle)
            if suite.head == "zero-shot-image":  # it reads texts as well, which no expert does
                source = resolve(path)
                download([(source, pick_small(source, code=False))])
                processor = AutoProcessor.from_pretrained(str(source.folder), trust_remote_code=False)
                self.start = replace(self.start, processor=processor)
                self._classes = fix_classes(self.start.model, processor, suite)
        base = self.start.model if self.start else None
        sources = [expert_path(source, suite.build) for source in owned.values()]
        loaded = load_experts(sources, base=base, gates=False, allow_pickle=allow_pickle)
        shared = self.start.processor if self.start else None
        is_zero_shot = suite.head == "zero-shot-image"
        self.experts = [
            replace(expert, name=name, processor=shared if is_zero_shot else expert.processor or shared)
            for name, expert in zip(owned, loaded, strict=True)
        ]
        self.merge = CoefficientMerge(self.experts, base, "task", 0.0).to(device)
        self.backbone = self.merge.backbone
        known: dict[str, torch.Tensor] = {
            **dict(self.backbone.named_parameters()),
            **dict(self.backbone.named_buffers()),
        }
        self._targets = {name: known[name] for name in self.merge.tensors}
        self.base = {name: tensor.detach().clone() for name, tensor in self._targets.items()}
        self.states = [_ExpertState(self, number) for number in range(len(self.names))]
        self._shown: State | None = None
        self._encoded: dict[tuple[str, str, str], TaskRows] = {}
        self._embeddings: dict[tuple[str, str, str], torch.Tensor] = {}
        self._logits: dict[tuple[int, str, str, str], tuple[torch.Tensor, torch.Tensor]] = {}

    # ---------------------------------------------------------------- rows

    def task_rows(self, task: str, corruption: str = CLEAN, split: str = TEST) -> TaskRows:
        """Rows of a task as all models read them; encoded once."""
        key = (task, corruption, split)
        if key not in self._encoded:
            rows = self.sample(*key)
            encoded = self.encoded(task, rows, self.read(task, self.inputs_of(task, rows)))
            if self.reads(task) == "embeddings":
                encoded = replace(encoded, reduced=partial(self._agreement, key))
            self._encoded[key] = encoded
        return self._encoded[key]

    def read(self, task: str, rows: Dataset) -> Examples:
        """Rows as the model reads them."""
        processor = self.merge.processor
        if self.suite.head == "zero-shot-image":
            return image_text_examples(processor, rows, {"input_ids": self._classes[task]})
        if self.suite.head == "feature-extraction":
            texts = processor(list(rows["text"]), truncation=True, max_length=MAX_LENGTH)
            encoded = [{key: texts[key][number] for key in texts} for number in range(len(rows))]
            return Examples(encoded, DataCollatorWithPadding(processor), _no_loss)
        labels = list(self.merge.config.experts[self.names.index(task)]["labels"])
        return read_examples(Expert(task, self.backbone, processor=processor, labels=labels), rows, MAX_LENGTH)

    def validation_rows(self, expert: int) -> Examples:
        """The validation rows of an expert's task, encoded."""
        name = self.names[expert]
        return self.read(name, self.rows(name).fit)

    # ---------------------------------------------------------------- predicting

    def prepared(
        self, model: ForwardModel, task: str, corruption: str = CLEAN, split: str = TEST, *, state: State | None = None,
        reads: Reads | None = None,
    ) -> Prepared:  # fmt: skip
        """A model that is called with the inputs and ``task=``, and the rows that it predicts.

        Args:
            model: the backbone (`Dense`), or another.
            task: whose rows.
            corruption: of the rows.
            split: of the rows.
            state: what the backbone shows meanwhile.
            reads: what is read of the outputs instead of what the metric needs, as it is.
        """

        def inputs(batch: Batch) -> dict[str, Any]:
            if state is not None:
                self.show(state)
            return {**batch.inputs, "task": task}

        rows = self.task_rows(task, corruption, split)
        predictor = ModelPredictor("model", "baseline", model, inputs, reads=reads, tokenizer=self.merge.processor)
        return Prepared(predictor, replace(rows, reduced=unchanged) if reads else rows)

    def _agreement(self, key: tuple[str, str, str], found: Predictions) -> Predictions:
        """The cosine of each embedding with that by the task's own expert."""
        given = torch.tensor(found.predictions)
        return Predictions(torch.cosine_similarity(given, self.embeddings(*key)).tolist(), [1] * len(given))

    def embeddings(self, task: str, corruption: str, split: str) -> torch.Tensor:
        """What the task's own expert makes of its rows, (N, d); computed once, and the backbone is as before."""
        key = (task, corruption, split)
        if key not in self._embeddings:
            before, expert = self._shown, self.states[self.names.index(task)]
            found = self.predict(self.prepared(Dense(self), *key, state=expert, reads="embeddings"))
            self._embeddings[key] = torch.tensor(found.predictions)
            self.show(before or self.base)
        return self._embeddings[key]

    def check_heads(self) -> None:
        """Refuses nothing: a merge has the heads of all tasks."""

    def dense(self, state: State, **facts: Any) -> Candidate:
        """A state of the backbone as a candidate; the tensors that it lacks are the base's."""
        prepare = partial(self.prepared, Dense(self), state=state)
        return Candidate(prepare, stored=self.sizes[0], active=self.sizes[1], **facts)

    @torch.no_grad()
    def show(self, state: State) -> None:
        """Puts tensors into the backbone."""
        if self._shown is not state:
            for name, target in self._targets.items():
                target.copy_(clamp_variance(name, state[name]))
            self._shown = state

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters of the dense model with all heads, and with one of them."""
        heads = [p.numel() for path in self.merge.heads for p in self.backbone.get_submodule(path).parameters()]
        whole = sum(p.numel() for p in self.backbone.parameters())
        return whole, whole - round(sum(heads) * (1 - 1 / len(self.names)))

    def relative_cost(self, model: Callable[..., Any]) -> float:
        """Multiplications of a model's forward as a multiple of the dense one's, on the first rows there are."""
        task = self.names[0]
        rows = self.sample(task)
        read = self.read(task, self.inputs_of(task, rows.select(range(min(ROWS_COUNTED, len(rows))))))
        inputs = on_device(read.collate(list(read.rows)), self.device)
        if not getattr(self.backbone.config, "is_encoder_decoder", False):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}

        with torch.no_grad():
            counted, dense = (multiplications(partial(called, **inputs, task=task)) for called in (model, Dense(self)))
        return counted / dense

    def logits(self, expert: int, task: str, corruption: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert's logits (N, C) of the rows of a task, by this task's head, and the labels; computed once."""
        key = (expert, task, corruption, split)
        if key not in self._logits:
            prepared = self.prepared(Dense(self), task, corruption, split, state=self.states[expert], reads="logits")
            found = self.predict(prepared)
            self._logits[key] = (torch.tensor(found.predictions), torch.tensor(found.references))
        return self._logits[key]

    def prepared_expert(self, expert: int, task: str, corruption: str, split: str) -> Prepared:
        """An expert under a task's head."""
        reads = self.reads(task)
        if reads in ("classes", "numbers"):
            return self.known(task, from_logits(*self.logits(expert, task, corruption, split), reads))
        return self.prepared(Dense(self), task, corruption, split, state=self.states[expert])

    def indices(self, holdout: Holdout) -> list[int]:
        """Indices of the experts that are fused."""
        return [self.names.index(name) for name in holdout.fuse]


def _no_loss(model: object, inputs: object) -> torch.Tensor:
    raise NotApplicable("embeddings have no labels, hence no loss")


class _ExpertState(Mapping[str, torch.Tensor]):
    """An expert's tensors, computed on access: θ0 + τ_k."""

    def __init__(self, setup: MergingSetup, expert: int) -> None:
        self.setup, self.expert = setup, expert
        self.index = {name: index for index, name in enumerate(setup.merge.tensors)}

    def __getitem__(self, name: str) -> torch.Tensor:
        vectors: torch.Tensor = getattr(self.setup.merge, f"vectors_{self.index[name]}")
        return self.setup.base[name] + vectors[self.expert]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


class Dense:
    """The backbone, called with the task."""

    def __init__(self, setup: MergingSetup) -> None:
        self.setup, backbone = setup, setup.backbone
        self.config, self.forward = backbone.config, backbone.forward
        self.generate = getattr(backbone, "generate", None)

    def __call__(self, task: str, **inputs: Any) -> Any:
        """As the backbone's forward, with the head of a task."""
        merge = self.setup.merge
        activate_heads(self.setup.backbone, merge.heads, self.setup.names.index(task))
        return self.setup.backbone(**inputs)
