"""Tasks of lm-evaluation-harness as what a search measures: documents of their validation or training splits."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError, first_line, suggestion
from hf_fusion.evaluation.harness import check_writes, quiet_harness, seeded_as_harness
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_fusion.search.objective import Scores

EXTRA = "lm-eval"


class HarnessObjective:
    """Scores of a language model on documents of tasks that a search may see; see `hf_fusion.search.objective`.

    A task's test split is never used: documents are those of its validation split, or else of its training split.

    Args:
        model: with its tokenizer as ``processor``. It is measured as it is at each call.
        tasks: see `hf_fusion.evaluation.harness.measure_harness`.
        held_out: share of the documents that is held out.
        seed: of their division.
        fewshot: examples before each document; default: as each task says.
        limit: documents of each task; default: all.
        metrics: task → its metric, such as "acc" or "acc,none"; default: the first that the task names.
        weights: task → weight of its score in the mean; default: 1.
        chat_template: whether prompts are messages, written by the tokenizer's template, if it has one.
        multiturn: whether examples are messages too.
        batch_size: requests per step.

    Attributes:
        tasks: see `Objective`.
        searched: see `Objective`.
        held_out: see `Objective`.
        weights: see `Objective`.
        about: see `Objective`.

    Raises:
        FusionError: the harness is not installed, a task has a test split alone, or a metric is not a mean over
            documents.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tasks: Sequence[str],
        *,
        held_out: float,
        seed: int = 0,
        fewshot: int | None = None,
        limit: int | None = None,
        metrics: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
        chat_template: bool = False,
        multiturn: bool = False,
        batch_size: int = 1,
    ) -> None:
        need(EXTRA, "a search on tasks of lm-evaluation-harness")
        check_writes(model, "the merged model")
        from hf_fusion.evaluation.harness_models import harness_model
        from hf_fusion.evaluation.harness_tasks import load_tasks

        chat = chat_template and getattr(getattr(model, "processor", None), "chat_template", None) is not None
        self._metrics, self._chat = dict(metrics or {}), (chat, multiturn and chat)
        with quiet_harness():
            self._loaded: dict[str, Any] = dict(load_tasks(tasks, fewshot)["tasks"])
            self._lm = harness_model(model, getattr(model, "processor", None), "the merged model", batch_size)
            self._search: dict[str, list[int]] = {}
            self._rest: dict[str, list[int]] = {}
            content = hashlib.sha256()
            for name, task in self._loaded.items():
                _use_other_rows(name, task)
                docs = [json.dumps(doc, sort_keys=True, default=str) for doc in task.eval_docs]
                self._search[name], self._rest[name] = _divided(name, docs, held_out, limit, seed)
                content.update("\n".join(docs[index] for index in self._search[name]).encode())
        self.tasks = [MeasuredTask(name, self._metric_of(name), len(rows)) for name, rows in self._rest.items()]
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self._loaded}
        self.searched, self.held_out = (sum(map(len, rows.values())) for rows in (self._search, self._rest))
        examples = {name: task.get_config("num_fewshot") or 0 for name, task in self._loaded.items()}
        self.about = {
            "content": content.hexdigest(),
            "weights": self.weights,
            "examples": examples,
            "chat": list(self._chat),
        }

    def scores(self, first: int, last: int) -> Scores:
        """See `Objective`."""
        chosen = {}
        for name, rows in self._search.items():
            begin, end = (-(-number * len(rows) // self.searched) for number in (first, last))
            if begin < end:
                chosen[name] = rows[begin:end]
        return self._scored(chosen)

    def held_out_scores(self) -> Scores:
        """See `Objective`."""
        return self._scored(self._rest)

    def _scored(self, chosen: Mapping[str, Sequence[int]]) -> Scores:
        """The scores of some documents of each task, in their order."""
        from lm_eval.evaluator import evaluate

        from hf_fusion.evaluation.harness_tasks import FEWSHOT_SEED

        samples = {name: sorted(rows) for name, rows in chosen.items()}
        tasks: Any = {"tasks": {name: self._loaded[name] for name in samples}, "groups": {}, "group_map": {}}
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            with quiet_harness(), seeded_as_harness():
                found: Any = evaluate(
                    self._lm, tasks, samples=samples, bootstrap_iters=0,
                    apply_chat_template=self._chat[0], fewshot_as_multiturn=self._chat[1],
                )  # fmt: skip
        except (AssertionError, ValueError, NotImplementedError) as error:  # how the harness refuses
            raise FusionError(f"lm-evaluation-harness cannot run the merged model: {first_line(error)}") from error
        return {name: self._values(name, found["samples"][name], rows) for name, rows in chosen.items()}

    def _values(self, name: str, examples: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> torch.Tensor:
        metric, _, filtered = self._metric_of(name).partition(",")
        filters = list(dict.fromkeys(example["filter"] for example in examples))
        wanted = filtered or filters[0]
        if wanted not in filters:
            raise FusionError(f"the task {name} has no filter {wanted!r}", suggestion(wanted, filters))
        by_row = {example["doc_id"]: example for example in examples if example["filter"] == wanted}
        known = [
            key for key, value in by_row[rows[0]].items() if key in by_row[rows[0]]["metrics"] and _is_number(value)
        ]
        if metric not in known:
            raise FusionError(
                f"{metric} of the task {name} is not a mean over its documents, which a search needs",
                suggestion(metric, known) if known else "choose another task",
            )
        sign = -1.0 if self._loaded[name].higher_is_better().get(metric) is False else 1.0
        return torch.tensor([sign * float(by_row[row][metric]) for row in rows], dtype=torch.float64)

    def _metric_of(self, name: str) -> str:
        if name in self._metrics:
            return self._metrics[name]
        listed = self._loaded[name].get_config("metric_list") or []
        return str(listed[0]["metric"]) if listed else next(iter(self._loaded[name].higher_is_better()), "acc")


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _use_other_rows(name: str, task: Any) -> None:
    """Makes a task measure its validation split, or else its training split, in place of its test split.

    Raises:
        FusionError: it has neither.
    """
    if task.has_validation_docs():
        changed = {"test_split": None}
    elif task.has_training_docs():
        changed = {"test_split": None, "validation_split": task.get_config("training_split")}
    else:
        raise FusionError(
            f"the task {name} has a test split alone, and test rows are not searched on",
            "name another in its YAML file: validation_split: …",
        )
    for key, value in changed.items():
        task.set_config(key=key, value=value)
    if (
        task.has_test_docs() or not task.has_validation_docs()
    ):  # a Python class of its own, which its config does not rule
        raise FusionError(f"the task {name} always measures its test split, and test rows are not searched on")


def _divided(
    name: str, contents: Sequence[str], held_out: float, limit: int | None, seed: int
) -> tuple[list[int], list[int]]:
    """Documents to search on and to hold out, in random order; those of equal content are on the same side."""
    indices = list(range(len(contents)))
    order = random.Random(seed)
    order.shuffle(indices)
    indices = indices[:limit]
    counts = Counter(contents[index] for index in indices)
    unique = list(counts)
    order.shuffle(unique)
    chosen, count = set[str](), 0
    for content in unique:
        if count < held_out * len(indices):
            chosen.add(content)
            count += counts[content]
    search = [index for index in indices if contents[index] not in chosen]
    rest = [index for index in indices if contents[index] in chosen]
    if not search or not rest:
        raise FusionError(
            f"the {len(indices)} documents of {name} cannot be divided into some to search on and some to hold out",
            "search on a task with more documents, or omit --limit",
        )
    return search, rest


__all__ = ["EXTRA", "HarnessObjective"]
