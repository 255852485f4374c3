"""Where the tokens of each task go: tasks × experts, measured on a router, as data for pictures and cards."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from hf_fusion.io.files import read_given
from hf_fusion.io.json_files import parse
from hf_fusion.io.saving import write_file
from hf_fusion.progress import track
from hf_fusion.schema import KeyPath, read_class
from hf_fusion.training.batches import Examples, read_examples, to_model
from hf_fusion.training.prompts import IGNORED
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter
    from hf_fusion.models.modeling_wemoe import WEMoEModel

ROUTING_FILE, ROUTING_PICTURE = "routing.json", "routing.png"  # their names beside a model


class JsonFile:
    """A dataclass that is kept as JSON."""

    def save(self, path: str | Path) -> None:
        """Writes JSON, all of it or nothing."""
        content: Any = self
        write_file(path, json.dumps(asdict(content), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            FusionError: the file cannot be read, or holds something else.
        """
        path = Path(path)
        return read_class(cls, parse(read_given(path), path.name, str(path.parent)), KeyPath(str(path)))


@dataclass
class RoutingMap(JsonFile):
    """Mean routing weight of every expert on every task, over all linears and some tokens.

    Attributes:
        experts: names, E of them.
        tasks: names, T of them.
        weights: T rows of E shares, each row adds up to 1.
        n: examples of each task.
        owners: task → the expert that was trained on it, where there is one.
        tokens: which ones were counted: those of the "answers" (where each of them was decided on), or "all".
        example: a prompt of the first task, or None where tasks have no prompts.
    """

    experts: list[str]
    tasks: list[str]
    weights: list[list[float]]
    n: list[int]
    owners: dict[str, str]
    tokens: str = "all"
    example: str | None = None

    def owner_weight(self) -> float | None:
        """Mean weight that a task's own expert gets, over the tasks that have one; 1/E with uniform routing."""
        weights = [
            row[self.experts.index(self.owners[task])]
            for task, row in zip(self.tasks, self.weights, strict=True)
            if task in self.owners
        ]
        return sum(weights) / len(weights) if weights else None


@torch.no_grad()
def map_routing(
    router: PhatgooseRouter,
    suite: Mapping[str, Dataset],
    *,
    owners: Mapping[str, str] | None = None,
    batch_size: int = 16,
    max_length: int = 512,
) -> RoutingMap:
    """Runs a router over tasks and adds up the routing weights of each expert.

    In a causal language model the tokens that predict the target's count; in any other model all but padding.

    Args:
        router: a `PhatgooseRouter`.
        suite: task → rows, as `measure_routing` takes them; the targets are read along with the prompts.
        owners: task → the expert that was trained on it.
        batch_size: rows per step.
        max_length: the longest sequence, in tokens.

    Raises:
        FusionError: for rows that the router cannot read.
    """
    labels = list((router.config.id2label or {}).values())
    writes = router.config.head == "causal-lm"
    can_skip = "logits_to_keep" in inspect.signature(router.backbone.forward).parameters
    unread = {"logits_to_keep": 1, "use_cache": False} if can_skip else {}  # the logits are not used
    before, router.record_routing = router.record_routing, sys.maxsize
    weights = []
    try:
        for rows in track(suite.values(), "Tracing the routing of tasks"):
            total = torch.zeros(len(router.experts))
            for batch in read_batches(router, rows, labels, batch_size, max_length):
                targets = batch.pop("labels").cpu()
                router(**batch, **unread)
                trace = router.routing_trace()
                # (B, T): the next token is one of the target's
                counted = F.pad(targets[:, 1:] != IGNORED, (0, 1)) if writes else ...
                for module in trace.modules:
                    total += trace.expert_weights(module)[counted].flatten(0, -2).sum(0)
            weights.append((total / total.sum()).tolist())
    finally:
        router.record_routing = before
    first = next(iter(suite.values()))
    return RoutingMap(
        experts=list(router.experts),
        tasks=list(suite),
        weights=weights,
        n=[len(rows) for rows in suite.values()],
        owners=dict(owners or {}),
        tokens="answers" if writes else "all",
        example=first[0]["prompt"] if "prompt" in first.column_names else None,
    )


def read_batches(
    model: WEMoEModel | PhatgooseRouter,
    rows: Dataset | Examples,
    labels: Sequence[str],
    batch_size: int,
    max_length: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of a task as inputs of a fused model, with ``labels``, on its device.

    Args:
        model: with ``backbone`` and ``processor``.
        rows: as `read_examples` takes them, or what it made of them.
        labels: the classes of the head that reads them.
        batch_size: rows per step.
        max_length: the longest sequence, in tokens.

    Raises:
        FusionError: for rows that the model cannot read.
    """
    if not isinstance(rows, Examples):
        reader = Expert("the fused model", model.backbone, processor=model.processor, labels=list(labels))
        rows = read_examples(reader, rows, max_length)
    for start in range(0, len(rows.rows), batch_size):
        indices = range(start, min(start + batch_size, len(rows.rows)))
        yield to_model(rows.collate([rows.rows[i] for i in indices]), model)
