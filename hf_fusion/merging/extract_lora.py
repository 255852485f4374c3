"""Extracts a LoRA adapter from a full fine-tune: the change of each linear layer as a product of low rank."""

from __future__ import annotations

import json
import math
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch

from hf_fusion.errors import FusionError
from hf_fusion.families import STALE
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.peft_names import PREFIX
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.folders import refuse_to_replace, replace_folder
from hf_fusion.merging.engine.checkpoint import OpenFiles, read_header
from hf_fusion.merging.engine.growing_file import GrowingFile
from hf_fusion.merging.engine.open_models import Model, open_models
from hf_fusion.merging.engine.output import explain_disk_errors, output_folder
from hf_fusion.merging.engine.stream import parse_device
from hf_fusion.merging.engine.tensors import CHUNK
from hf_fusion.merging.extraction_plan import ExtractionPlan, Pair, plan_extraction
from hf_fusion.merging.extraction_report import CARD_MARK, FACTS_FILE, ExtractedPart, Extraction, card, facts_json
from hf_fusion.merging.lora import WEIGHTS, rank_config
from hf_fusion.merging.low_rank import decompose
from hf_fusion.merging.methods.lora import Factors
from hf_fusion.merging.small_files import read_small_files
from hf_fusion.progress import phase
from hf_fusion.recipe import DTYPES
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
_LINEAR_ONLY = "not a linear layer, and left out as asked"


def extract_lora(
    model: str | Path,
    base: str | Path,
    folder: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    linear_only: bool = False,
    exact: bool = False,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    api: HfApi | None = None,
) -> Extraction:
    """Extracts a LoRA adapter from a full fine-tune, so that PEFT's base with the adapter computes what it computes.

    For each linear layer, Δ = θ - θ0 becomes B A by singular value decomposition, see
    `hf_fusion.merging.low_rank.decompose`. Changed biases of these layers are stored with them (PEFT's ``lora_bias``).
    What else has changed or is new is saved in full (``modules_to_save``): norms, embeddings, convolutions, task heads.
    Tensors that no adapter can hold are named in the report. Layers are read, decomposed and written one by one; no
    model is loaded. Beside the adapter lie the fine-tune's tokenizer, a model card, and ``extraction.json`` with the
    error of each module.

    Args:
        model: the fine-tune: ``owner/name[@revision]``, a folder, or ``base+adapter``.
        base: the model that it was fine-tuned from, as PEFT will load it.
        folder: of the adapter; created if missing.
        rank: of each layer; layers with smaller dimensions get those, and are exact.
        energy: instead of a rank, the share of ‖Δ‖² that each layer keeps, above 0 and at most 1: the relative error
            of a layer is at most √(1 - energy).
        linear_only: leave out what is not a linear layer, for PHATGOOSE, whose experts must agree in it. Heads and
            other linear layers that the base does not have are still saved.
        exact: use the exact decomposition also for low ranks, where the randomised one is nearly as good and faster.
        dtype: of the factors: "float32", "float16" or "bfloat16"; tensors saved in full keep theirs.
        device: "cpu", "cuda" or "cuda:N", for the decompositions.
        overwrite: whether to replace an adapter in the folder.
        api: the Hub's client.

    Returns:
        The report, whose errors are measured on the stored factors.

    Raises:
        FusionError: an argument is invalid; the models cannot be read, have no linear layer in common, or do not
            differ in any; or the folder cannot be written.
    """
    began = time.perf_counter()
    _check_arguments(rank, energy, dtype)
    on, folder = parse_device(device), output_folder(folder)
    opened, under = open_models([str(model), str(base)], api)
    plan = plan_extraction(opened, under)
    for each in (opened, under):
        if (own := each.folder.resolve()) == folder or folder in own.parents or own in folder.parents:
            raise FusionError(f"the output {folder} overlaps the input {own}", "choose another --output")
    refuse_to_replace(folder, overwrite)
    staging = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    with explain_disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    files = OpenFiles()
    try:
        with explain_disk_errors(folder.parent):
            writer = _Writer(plan, files, staging, linear_only)

            def factors(delta: torch.Tensor, name: str) -> Factors:
                seed = zlib.crc32(name.encode())
                kind = getattr(torch, dtype)
                return decompose(delta.to(on), rank, energy, exact=exact, dtype=kind, seed=seed)

            nbytes = writer.write(factors)
            done = Extraction(folder, opened.name, under.name, writer.parts, nbytes, time.perf_counter() - began)
            writer.finish(done, folder)
            replace_folder(staging, folder, STALE)
    finally:
        files.close()
        shutil.rmtree(staging, ignore_errors=True)
    return done


def _check_arguments(rank: int | None, energy: float | None, dtype: str) -> None:
    if (rank is None) == (energy is None):
        raise FusionError("give either a rank or an energy", "--rank 16, or --energy 0.9")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise FusionError(f"rank is {rank!r}, not a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise FusionError(f"energy is {energy!r}, which must be above 0 and at most 1")
    if dtype not in DTYPES:
        raise FusionError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")


class _Writer:
    """Compares two models and writes what differs.

    Attributes:
        parts: what has been found, in the order of writing.
    """

    def __init__(self, plan: ExtractionPlan, files: OpenFiles, staging: Path, linear_only: bool) -> None:
        self.plan, self.files, self.staging = plan, files, staging
        self._parts: list[ExtractedPart] = []
        changed = self._changed_others(linear_only)
        self.saved = plan.wrapped(changed)
        within = tuple(f"{path}." for path in self.saved)
        self.linears = {path: pair for path, pair in plan.linears.items() if not f"{path}.".startswith(within)}
        self.biases = {} if linear_only else self._changed_biases()
        if linear_only:
            for pair in (pair for path, pair in plan.biases.items() if path in self.linears):
                self._leave_out(pair, _LINEAR_ONLY)
        self.ranks: dict[str, int] = {}
        self.written: set[str] = set()

    @property
    def parts(self) -> tuple[ExtractedPart, ...]:
        """All parts: adapted layers, then those saved in full, then those left out."""
        order = ("lora", "bias", "saved", "left out")
        return tuple(sorted(self._parts, key=lambda part: order.index(part.kind)))

    def _changed_others(self, linear_only: bool) -> set[str]:
        """Modules to save in full."""
        plan, changed = self.plan, set()
        for pair, why in plan.unplaced.values():
            self._leave_out(pair, f"cannot be stored ({why})")
        for name, pair in plan.others.items():
            module = plan.owner(name)
            assert module is not None  # `plan_extraction` has sorted out the others
            is_linear = isinstance(plan.model.get_submodule(module), torch.nn.Linear) and not _is_tied(name, plan.tied)
            if linear_only and not is_linear:
                self._leave_out(pair, _LINEAR_ONLY)
            elif pair.base is None or self._compare(pair)[0] > 0:
                changed.add(module)
        return changed

    def _changed_biases(self) -> dict[str, Pair]:
        """The biases of adapted layers that have changed."""
        given = {path: pair for path, pair in self.plan.biases.items() if path in self.linears}
        return {path: pair for path, pair in given.items() if self._compare(pair)[0] > 0}

    def _leave_out(self, pair: Pair, why: str) -> None:
        """Names a tensor that has changed and is not stored."""
        tuned = self.plan.tuned.entries[pair.tuned]
        if not tuned.is_float:
            return
        if pair.base is None:
            self._parts.append(ExtractedPart(pair.name, "left out", tuned.numel, 0, None, 1.0, 0.0, why))
            return
        lost, norm = self._compare(pair)
        if lost > 0:
            part = ExtractedPart(pair.name, "left out", tuned.numel, 0, _relative(lost, norm), 1.0, lost, why)
            self._parts.append(part)

    # ------------------------------------------------------------ reading

    def _read(self, model: Model, name: str, start: int, size: int) -> torch.Tensor:
        """Values of a tensor, (size,) fp32.

        Raises:
            FusionError: one of them is NaN or infinite.
        """
        values = torch.empty(size)
        model.reader(name, self.files).read(start, values)
        if not bool(values.isfinite().all()):
            raise FusionError(f"{model.name} has NaN or Inf in {name}", "use another checkpoint")
        return values

    def _compare(self, pair: Pair) -> tuple[float, float]:
        """‖Δ‖² and ‖θ0‖² of a tensor that both models have."""
        assert pair.base is not None
        lost = norm = 0.0
        numel = math.prod(self.plan.tuned.shape(pair.tuned))
        for start in range(0, numel, CHUNK):
            size = min(CHUNK, numel - start)
            before = self._read(self.plan.base, pair.base, start, size)
            delta = self._read(self.plan.tuned, pair.tuned, start, size).sub_(before)
            lost += float(delta.double().square().sum())
            norm += float(before.double().square().sum())
        return lost, norm

    def _delta(self, pair: Pair) -> tuple[torch.Tensor, float]:
        """Δ in the shape of the tensor, fp32, and ‖θ0‖²."""
        assert pair.base is not None
        shape = self.plan.tuned.shape(pair.tuned)
        before = self._read(self.plan.base, pair.base, 0, math.prod(shape))
        delta = self._read(self.plan.tuned, pair.tuned, 0, math.prod(shape)).sub_(before)
        return delta.view(shape), float(before.double().square().sum())

    # ------------------------------------------------------------ writing

    def write(self, factors: Any) -> int:
        """Writes the weights; returns their bytes.

        Args:
            factors: (Δ of (d_out, d_in), name) -> its `Factors`.

        Raises:
            FusionError: no linear layer has changed.
        """
        saved = [pair for module in sorted(self.saved) for pair in self.plan.tensors_of(module)]
        names = [f"{PREFIX}{path}.lora_{end}" for path in self.linears for end in ("A.weight", "B.weight", "B.bias")]
        names += [f"{PREFIX}{pair.name}" for pair in saved]
        weights = sum(self.plan.tuned.entries[pair.tuned].numel for pair in self.linears.values())
        with phase("Decomposing", weights) as progress, GrowingFile(self.staging / WEIGHTS, names) as file:
            for path, pair in self.linears.items():
                self._write_linear(file, path, pair, factors)
                progress.advance(self.plan.tuned.entries[pair.tuned].numel)
            if not self.ranks:
                raise FusionError(
                    f"{self.plan.tuned.name} and {self.plan.base.name} are equal in every linear layer they share",
                    "check the names: is this the fine-tune, and this its base?",
                )
            for module in sorted(self.saved):
                self._write_saved(file, module)
            self.written = set(file.names)
            return file.nbytes

    def _write_linear(self, file: GrowingFile, path: str, pair: Pair, factors: Any) -> None:
        delta, norm = self._delta(pair)
        if not isinstance(self.plan.model.get_submodule(path), torch.nn.Linear):
            delta = delta.T  # a Conv1D stores (d_in, d_out)
        if not bool(delta.any()) and path not in self.biases:
            return
        found: Factors = factors(delta.contiguous(), pair.name)
        if not bool(found.a.isfinite().all() and found.b.isfinite().all()):
            raise FusionError(f"the factors of {path} are too large for their dtype", "--dtype float32")
        self.ranks[path] = len(found.a)
        file.add(f"{PREFIX}{path}.lora_A.weight", found.a)
        file.add(f"{PREFIX}{path}.lora_B.weight", found.b)
        error = math.sqrt(found.lost / found.norm) if found.norm else 0.0
        change = _relative(found.norm, norm)
        self._parts.append(ExtractedPart(path, "lora", delta.numel(), len(found.a), change, error, found.norm))
        if not self.biases:
            return
        moved, square = torch.zeros(len(delta)), 0.0
        if path in self.biases:
            moved, square = self._delta(self.biases[path])
            squared = float(moved.double().square().sum())
            self._parts.append(
                ExtractedPart(f"{path}.bias", "bias", len(moved), 0, _relative(squared, square), 0.0, squared)
            )
        file.add(f"{PREFIX}{path}.lora_B.bias", moved)  # fp32: an exact difference

    def _write_saved(self, file: GrowingFile, module: str) -> None:
        """Writes all tensors of a module, which PEFT replaces as a whole."""
        lost = norm = 0.0
        size, note, is_new = 0, "", False
        for pair in self.plan.tensors_of(module):
            model, entry = self.plan.tuned, self.plan.tuned.entries[pair.tuned]
            name = f"{PREFIX}{pair.name}"
            if model.adapter is None:
                file.copy(name, entry, self.files)
            else:
                shape = model.shape(pair.tuned)
                file.add(name, self._read(model, pair.tuned, 0, math.prod(shape)).view(shape))
            size += math.prod(model.shape(pair.tuned))
            if pair.resized and "embed" in type(self.plan.model.get_submodule(module)).__name__.lower():
                rows = model.shape(pair.tuned)[0]
                note = f"first resize the base's embeddings to {rows:,} rows (resize_token_embeddings)"
            if pair.base is None:
                is_new = is_new or entry.is_float
            else:
                more = self._compare(pair)
                lost, norm = lost + more[0], norm + more[1]
        change = None if is_new else _relative(lost, norm)
        self._parts.append(ExtractedPart(module, "saved", size, 0, change, 0.0, lost, note))

    def finish(self, extraction: Extraction, folder: Path) -> None:
        """Writes the configuration, the fine-tune's tokenizer, the card and the facts, and checks the weights."""
        plan, head = self.plan, self.plan.head
        for name, raw in read_small_files(plan.tuned.folder, plan.tuned.name).items():
            is_wanted = name != "config.json" or (head is not None and head.has_labels)  # which has the label names
            if is_wanted and "/" not in name and not name.endswith(".py") and name != "fusion.yaml":
                (self.staging / name).write_bytes(raw)
        config = _config(plan, self.ranks, sorted(self.saved), bool(self.biases))
        (self.staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (self.staging / FACTS_FILE).write_text(facts_json(extraction), encoding="utf-8")
        old = folder / README
        if not own_file(old) or CARD_MARK in read_text(old):
            text = card(extraction, plan.tuned.license, head.tasks[0] if head else None)
            (self.staging / README).write_text(text, encoding="utf-8")
        if read_header(self.staging / WEIGHTS).keys() != self.written:
            raise FusionError(f"{self.staging / WEIGHTS} lacks tensors", "extract again: another process wrote there")


def _config(plan: ExtractionPlan, ranks: Mapping[str, int], saved: list[str], has_biases: bool) -> dict[str, Any]:
    """``adapter_config.json``."""
    base, kind = ModelRef.parse(plan.base.name), type(plan.model)
    trained = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "peft_type": "LORA",
        "task_type": plan.task_type,
        "auto_mapping": None if plan.task_type else trained,
        "base_model_name_or_path": base.id,
        "revision": base.revision,
        "inference_mode": True,
        **rank_config(ranks),
        "modules_to_save": saved or None,
        "fan_in_fan_out": plan.transposed,
        "lora_bias": has_biases,
        "ensure_weight_tying": _stays_tied(plan, saved),
    }


def _stays_tied(plan: ExtractionPlan, saved: list[str]) -> bool:
    """Whether PEFT keeps saved heads and embeddings tied: it takes all but the first for linear layers."""
    tied = {name.rpartition(".")[0] for name in plan.tied}.intersection(saved)
    return bool(tied) and all(isinstance(plan.model.get_submodule(path), torch.nn.Linear) for path in tied)


def _is_tied(name: str, tied: Mapping[str, str]) -> bool:
    return name in tied or name in tied.values()


def _relative(lost: float, norm: float) -> float | None:
    return math.sqrt(lost / norm) if norm else None


__all__ = ["extract_lora"]
