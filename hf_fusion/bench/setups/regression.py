"""Suites of the kind "regression": language models that score texts, and a fuser that weighs their scores, so that
they agree with people (the automatic evaluation of text in FoE's paper, arXiv 2310.01542).

The suite's `Question` says how a model scores a row. Every expert scores a text once; people's judgements differ by
task, and each task has its own fuser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorForSeq2Seq

from hf_fusion.bench.candidates import Candidate, Prepared
from hf_fusion.bench.setups.common import ROWS_COUNTED, TaskSetup, multiplications, on_device
from hf_fusion.bench.sources import expert_path
from hf_fusion.bench.suite import Suite
from hf_fusion.evaluation.loop import TaskRows
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.hub.load import load_experts
from hf_fusion.training.batches import Examples
from hf_fusion.training.runs import move_to

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST = 1024  # tokens of a prompt, as BARTScore and UniEval have them, or what the model takes; the end is cut off
FIT_ROWS = 400  # that a fuser learns from
HIDDEN = (32,)  # widths of the fuser: a handful of scores go in
LEARNING_RATE = 1e-2  # of a fuser so small


class RegressionSetup(TaskSetup, kind="regression"):
    """Encoder-decoders that score rows.

    Args:
        suite: of the kind "regression".
        data_dir: see `TaskSetup`.
        limit: see `TaskSetup`.
        tuned_on: see `TaskSetup`.
        batch_size: see `TaskSetup`.
        device: see `TaskSetup`.
        allow_pickle: see `TaskSetup`.

    Attributes:
        experts: one for each question; questions to the same model share it.
    """

    def __init__(
        self, suite: Suite, data_dir: Path | None, limit: int, tuned_on: int, batch_size: int = 16, device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(suite, data_dir, limit, tuned_on, batch_size, device, allow_pickle)
        sources = list(dict.fromkeys(suite.experts.values()))
        paths = [expert_path(source, suite.build) for source in sources]
        loaded = dict(zip(sources, load_experts(paths, gates=False, allow_pickle=allow_pickle), strict=True))
        for expert in loaded.values():
            move_to(expert.model, device)
            expert.model.eval()
        self.experts = [replace(loaded[source], name=name) for name, source in suite.experts.items()]
        self._scores: dict[tuple[int, tuple[str, str]], float] = {}

    def fitting(self, task: str) -> Dataset:
        """Validation rows of a task, for its fuser."""
        rows = self.rows(task).fit.shuffle(seed=0)
        return rows.select(range(min(FIT_ROWS, len(rows))))

    def scores(self, rows: Dataset) -> torch.Tensor:
        """Scores of rows by all experts, (N, K); each text is scored once, whatever the task."""
        texts = list(zip(rows["text"], rows["text_pair"], strict=True))
        for number in range(len(self.experts)):
            new = [row for row, pair in enumerate(texts) if (number, pair) not in self._scores]
            if new:
                found = self._scored(number, rows.select(new)).tolist()
                self._scores |= {(number, texts[row]): score for row, score in zip(new, found, strict=True)}
        return torch.tensor([[self._scores[number, pair] for number in range(len(self.experts))] for pair in texts])

    def _scored(self, number: int, rows: Dataset) -> torch.Tensor:
        expert = self.experts[number]
        words = self.suite.ask[expert.name].words
        read = self._read(number, rows)
        data = TaskRows(MeasuredTask(expert.name, "perplexity", len(read.rows)), read.rows, self.collate(read))
        predictor = ModelPredictor(expert.name, "expert", expert.model)
        found = self.predict(Prepared(predictor, data))
        losses, tokens = torch.tensor(found.predictions), torch.tensor(found.references)
        if not words:
            return -losses  # mean log-likelihood of a token
        likelihoods = -(losses * tokens).view(len(rows), len(words))
        return likelihoods.softmax(1)[:, 0]

    def _read(self, number: int, rows: Dataset) -> Examples:
        """Each row with each text whose likelihood is wanted. A long prompt loses its end: the question is in front."""
        expert = self.experts[number]
        question = self.suite.ask[expert.name]
        tokenizer: Any = expert.processor
        # not the tokenizer's own limit: T5's says 512, though its positions are relative
        longest = min(LONGEST, getattr(expert.model.config, "max_position_embeddings", LONGEST))
        read = []
        for row in rows:
            prompt = tokenizer(question.prompt.format(**row), truncation=True, max_length=longest)
            for text in question.words or (question.target or "",):
                labels = tokenizer(text_target=text.format(**row), truncation=True, max_length=longest)
                read.append({**prompt, "labels": labels["input_ids"]})
        return Examples(read, DataCollatorForSeq2Seq(tokenizer, model=expert.model), _own_loss)

    def candidate(self, combine: Callable[[torch.Tensor, str], torch.Tensor], **facts: Any) -> Candidate:
        """All experts as a candidate; `combine` makes a score for each row, (N,), of scores (N, K) and the task."""

        def prepare(task: str, corruption: str, split: str) -> Prepared:
            rows = self.sample(task, corruption, split)
            return self.known(task, Predictions(combine(self.scores(rows), task).tolist(), list(rows["label"])))

        size = sum(
            model.num_parameters() for model in {id(expert.model): expert.model for expert in self.experts}.values()
        )
        return Candidate(prepare, **{"stored": size, "active": size, "cost": sum(self.costs), **facts})

    @cached_property
    @torch.no_grad()
    def costs(self) -> list[float]:
        """Multiplications of each expert for a few rows, as multiples of the first one's."""
        rows = self.sample(next(iter(self.suite.tasks)))
        rows = rows.select(range(min(ROWS_COUNTED, len(rows))))
        found = []
        for number, expert in enumerate(self.experts):
            read = self._read(number, rows)
            inputs = on_device(read.collate(list(read.rows)), self.device)
            found.append(multiplications(partial(expert.model, **inputs)))
        return [count / found[0] for count in found]


def _own_loss(model: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**inputs, use_cache=False).loss
    return loss
