"""Shared by all training runs: the Trainer's arguments, device placement, and resuming from checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_fusion.errors import FusionError, disk_refusals
from hf_fusion.io.json_files import read_json
from hf_fusion.io.saving import in_folder, write_file

CHECKPOINTS = 10  # per run, approximately


@contextmanager
def training_arguments(
    output_dir: str | Path | None, steps: int, learning_rate: float, batch_size: int, seed: int, **more: Any
) -> Iterator[TrainingArguments]:
    """Arguments of a run without logging, which saves checkpoints only if a folder is given.

    Args:
        output_dir: folder for checkpoints, or None.
        steps: optimizer steps.
        learning_rate: peak learning rate.
        batch_size: examples per step and process.
        seed: for the order of the examples.
        more: of transformers' `TrainingArguments`; they take precedence.

    Raises:
        FusionError: `steps`, `learning_rate` or `batch_size` is not positive; or, within the context, the folder
            cannot be written.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}.items():
        if not value > 0:
            raise FusionError(f"{name}={value}: it must be greater than 0", hint=f"a positive {name}")
    with tempfile.TemporaryDirectory(prefix="hf_fusion_run_") as scratch, _explain_full_disk(output_dir or scratch):
        arguments = TrainingArguments(
            **{
                "output_dir": str(output_dir or scratch),
                "max_steps": steps,
                "learning_rate": learning_rate,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "per_device_train_batch_size": batch_size,
                "save_strategy": "steps" if output_dir else "no",
                "save_steps": max(1, steps // CHECKPOINTS),
                "save_total_limit": 2,
                "logging_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": seed,
                "data_seed": seed,
                "remove_unused_columns": False,
                "dataloader_pin_memory": False,
                "use_cpu": not torch.accelerator.is_available(),  # or transformers refuses bf16=True there
                **more,
            }
        )
        arguments._n_gpu = min(
            1, arguments.n_gpu
        )  # one GPU per process: DataParallel does not replicate the base model
        yield arguments


def move_to(model: nn.Module, device: str | torch.device) -> None:
    """`model.to(device)`, which transformers wraps so that its type is lost."""
    model.to(device)


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model to a device for the context; a model that is dispatched to several devices stays there."""
    before = next(model.parameters()).device
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 or before == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def find_checkpoint(folder: Path, file: str, run: Mapping[str, Any], steps: int) -> str | None:
    """The newest complete checkpoint of this run with steps left to train, or None.

    A checkpoint of the last step is skipped: from it the Trainer would take one more step.

    Args:
        folder: holds the checkpoints; created if missing.
        file: name of the file in it that identifies the run.
        run: the settings that identify the run, as JSON values.
        steps: total steps of the run.

    Raises:
        FusionError: the folder holds checkpoints of another run.
    """
    # trainer_state.json is written last: a checkpoint is complete if it can be read
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    if not complete:
        with in_folder(folder):
            write_file(folder / file, json.dumps(run))
        return None
    other = read_json(folder / file, str(folder)) if (folder / file).exists() else {}
    if other != run:
        differing = ", ".join(f"{key}={other.get(key)!r}" for key in run if other.get(key) != run[key])
        raise FusionError(
            f"{folder} holds checkpoints of another run ({differing})", hint="use another output_dir, or remove it"
        )
    found = {int(path.name.rpartition("-")[2]): str(path) for path in complete}
    return found[max(unfinished)] if (unfinished := [step for step in found if step < steps]) else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


@contextmanager
def _explain_full_disk(folder: str | Path) -> Iterator[None]:
    """Names the checkpoint folder if it cannot be written, and removes incomplete checkpoints from it.

    Raises:
        FusionError: the disk is full, or read-only.
    """
    try:
        with disk_refusals(folder):
            yield
    except FusionError:
        for checkpoint in Path(folder).glob("checkpoint-*"):
            if not (checkpoint / "trainer_state.json").exists() or not _is_json(checkpoint / "trainer_state.json"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class TrainedParameters(nn.Module):
    """The module that the Trainer optimises, distributes and saves: some parameters of a model, and their loss.

    The model itself is only reached through `loss`, so that the Trainer neither wraps nor saves it.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch

    def __init__(self, parameters: Mapping[str, nn.Parameter], loss: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.trained = nn.ParameterList(parameters.values())  # a ParameterDict takes no dots in its keys
        self.loss = loss

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """The loss, under the key that the Trainer reads."""
        return {"loss": self.loss(inputs)}


__all__ = ["TrainedParameters", "digest", "find_checkpoint", "on_device", "training_arguments"]
