"""Statistics of an expert on its data: their file format, and the rows, inputs and parameters they are computed from.

Written by `fisher` and `gram`, read by merging methods that weigh parameters by them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_fusion.errors import FusionError
from hf_fusion.io.saving import in_folder, replacing
from hf_fusion.training.batches import Examples, equal_length_batches, read_examples, to_model, unlabelled
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@dataclass
class Statistics:
    """Statistics of one expert on its data.

    Attributes:
        kind: "fisher" or "gram".
        expert: its name.
        examples: number of rows that were used.
        tensors: the statistics, fp32.
        lookup: parameter of the model -> its key in `tensors`, and the dimension of the parameter that it describes.
        facts: further settings, stored with it: "labels" (how labels were chosen for Fisher information), "tokens"
            (number of tokens per Gram matrix), "seed".
    """

    kind: Literal["fisher", "gram"]
    expert: str
    examples: int
    tensors: dict[str, torch.Tensor]
    lookup: dict[str, tuple[str, int]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Euclidean norm over all tensors."""
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in self.tensors.values()))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes ``KIND.safetensors`` and ``KIND.json`` for a recipe's ``statistics: FOLDER``.

        Args:
            folder: created if missing.
            overwrite: whether to replace statistics of this kind in the folder.

        Raises:
            FusionError: the folder holds statistics of this kind, or cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if not overwrite and (folder / f"{self.kind}.json").exists():
            raise FusionError(f"{folder} holds {self.kind}.json already", "choose another folder, or overwrite=True")
        content = {
            "expert": self.expert,
            "examples": self.examples,
            "norm": self.norm,
            **self.facts,
            "tensors": {name: list(entry) for name, entry in self.lookup.items()},
        }
        facts, weights = folder / f"{self.kind}.json", folder / f"{self.kind}.safetensors"
        with in_folder(folder), replacing(facts) as text, replacing(weights) as tensors:
            save_file(self.tensors, tensors, metadata={"format": "pt"})
            text.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            facts.unlink(missing_ok=True)  # never leaves the tensors of one measurement beside the facts of another
        return folder


def read_rows(expert: Expert, rows: Dataset | Examples, max_length: int, labelled: bool = False) -> Examples:
    """Encodes rows for an expert; `Examples` are encoded already."""
    if isinstance(rows, Examples):
        return rows
    return read_examples(expert, rows if labelled else unlabelled(rows), max_length)


def sample_rows(read: Examples, examples: int, seed: int) -> list[Any]:
    """Samples rows without replacement; all of them if there are no more than `examples`."""
    if examples < 1:
        raise FusionError(f"examples={examples}: it must be greater than 0", "examples=256")
    order = torch.randperm(len(read.rows), generator=torch.Generator().manual_seed(seed))
    return [read.rows[index] for index in order[:examples].tolist()]


def make_batches(
    expert: Expert, rows: Dataset | Examples, examples: int, batch_size: int, max_length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of model inputs from sampled rows, without padding."""
    read = read_rows(expert, rows, max_length)
    batches = equal_length_batches(sample_rows(read, examples, seed), batch_size)
    return [make_inputs(read, batch, expert.model) for batch in batches]


def make_inputs(read: Examples, rows: list[Any], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Collates rows to model inputs, floating-point values as fp32."""
    inputs = to_model(read.collate(rows), model)
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def read_parameters(expert: Expert) -> dict[str, torch.Tensor]:
    """An expert's parameters in fp32, with an adapter merged into those of its base.

    Raises:
        FusionError: the adapter changes a tensor that is not a parameter of the base.
    """
    model, adapter = expert.model, expert.adapter
    found = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    if adapter is None:
        return found
    changed = [*adapter.saved, *(f"{path}.weight" for path in adapter.lora)]
    if missing := [name for name in changed if name not in found]:
        raise FusionError(f"{expert.name} changes {missing[0]}, which is a tied weight, or not a parameter of its base")
    for path, (a, b) in adapter.lora.items():
        weight = found[f"{path}.weight"]
        update = b.to(weight) @ a.to(weight)  # (d_out, d_in)
        found[f"{path}.weight"] = weight + (update.T if isinstance(model.get_submodule(path), Conv1D) else update)
    return found | {name: tensor.to(model.device, torch.float32) for name, tensor in adapter.saved.items()}


def run_with(model: nn.Module, tensors: Mapping[str, torch.Tensor], **inputs: Any) -> Any:
    """Runs a model with replaced parameters, and with its floating-point buffers as fp32."""
    buffers = {name: buffer.float() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return functional_call(model, {**buffers, **tensors}, kwargs=inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context a model is in evaluation mode, and its embeddings have sparse gradients."""
    was_training, dense = model.training, [m for m in model.modules() if isinstance(m, nn.Embedding) and not m.sparse]
    model.eval()
    for module in dense:
        module.sparse = True
    try:
        yield
    finally:
        model.train(was_training)
        for module in dense:
            module.sparse = False


__all__ = [
    "Statistics",
    "evaluating",
    "make_batches",
    "make_inputs",
    "read_parameters",
    "read_rows",
    "run_with",
    "sample_rows",
]
