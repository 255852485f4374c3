"""What every training run here has in common: the Trainer's arguments, where it runs, and where it goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_fusion.errors import FusionError, disk_refusals
from hf_fusion.io.json_files import read_json
from hf_fusion.io.saving import in_folder, write_file

CHECKPOINTS = 10  # about so many are written over a run


@contextmanager
def training_arguments(
    output_dir: str | Path | None, steps: int, learning_rate: float, batch_size: int, seed: int, **more: Any
) -> Iterator[TrainingArguments]:
    """Arguments of a quiet run that keeps checkpoints only where somebody named a folder.

    Args:
        output_dir: folder of the checkpoints, or None.
        steps: optimizer steps.
        learning_rate: the highest.
        batch_size: examples a step, per process.
        seed: of the order of the examples.
        more: of transformers' `TrainingArguments`; they win.

    Raises:
        FusionError: for numbers that train nothing; or, in the block, where the folder cannot be written.
    """
    for name, value in {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}.items():
        if not value > 0:
            raise FusionError(f"{name}={value} trains nothing", hint=f"a {name} above 0")
    with tempfile.TemporaryDirectory(prefix="hf_fusion_run_") as scratch, _checkpointing(output_dir or scratch):
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
                **more,
            }
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU a process: DataParallel would not see the model
        yield arguments


@contextmanager
def on_device(model: Any, device: torch.device) -> Iterator[None]:
    """A model on a device for a while; one that is spread over several stays where it is."""
    before = next(model.parameters()).device
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1 or before == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def resumable(folder: Path, file: str, run: Mapping[str, Any], steps: int) -> str | None:
    """The newest whole checkpoint of this very run in a folder from which there is something to train, or None.

    From one that has all steps the Trainer would take one more.

    Args:
        folder: of the checkpoints; created if missing.
        file: name of the file in it that says whose they are.
        run: what decides the run, as JSON has it.
        steps: of the run.

    Raises:
        FusionError: where the folder holds the checkpoints of another run.
    """
    # the last file of each: it may be half written
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    if not whole:
        with in_folder(folder):
            write_file(folder / file, json.dumps(run))
        return None
    other = read_json(folder / file, str(folder)) if (folder / file).exists() else {}
    if other != run:
        differing = ", ".join(f"{key}={other.get(key)!r}" for key in run if other.get(key) != run[key])
        raise FusionError(
            f"{folder} holds checkpoints of another run ({differing})", hint="use another output_dir, or remove it"
        )
    found = {int(path.name.rpartition("-")[2]): str(path) for path in whole}
    return found[max(left)] if (left := [step for step in found if step < steps]) else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


@contextmanager
def _checkpointing(folder: str | Path) -> Iterator[None]:
    """Names the folder of the checkpoints where it cannot be written; what was begun there last is removed.

    Raises:
        FusionError: the disk is full, or read-only.
    """
    try:
        with disk_refusals(folder):
            yield
    except FusionError:
        for begun in Path(folder).glob("checkpoint-*"):
            if not (begun / "trainer_state.json").exists() or not _is_json(begun / "trainer_state.json"):
                shutil.rmtree(begun, ignore_errors=True)
        raise


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Trained(nn.Module):
    """What the Trainer optimises, spreads and saves: some parameters, with the loss that they have.

    The model that they belong to is reached through `loss` and is no part of this module: it stays as it is.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch

    def __init__(self, parameters: Mapping[str, nn.Parameter], loss: Any) -> None:
        super().__init__()
        self.names = list(parameters)
        self.trained = nn.ParameterList(parameters.values())  # a ParameterDict takes no dots in its keys
        self.loss = loss

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """The loss, by the name under which the Trainer looks for it."""
        return {"loss": self.loss(inputs)}


__all__ = ["Trained", "digest", "on_device", "resumable", "training_arguments"]
