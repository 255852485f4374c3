"""Exports a fused model to a folder that servers run without this package: a dense model, an adapter, a GGUF file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_fusion.errors import FusionError, suggestion, writing
from hf_fusion.exporting.cards import Provenance, keep_hand_written, read_provenance, write_provenance
from hf_fusion.exporting.dense import Dense, dense_model, expert_weights
from hf_fusion.exporting.forms import FORMS, QUANTIZATIONS
from hf_fusion.exporting.gguf_file import (
    EXTRA,
    OF_DTYPE,
    Source,
    check_architecture,
    lazy_tensors,
    write_gguf,
)
from hf_fusion.extras import need
from hf_fusion.families import FAMILIES, STALE
from hf_fusion.fused_folders import explain_load_errors
from hf_fusion.fusion import load_fused
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.io.folders import MODEL, recover_folder, refuse_to_replace, replace_folder
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.output import explain_disk_errors
from hf_fusion.models.fused import FusedPreTrainedModel
from hf_fusion.models.fused_html import facts_table
from hf_fusion.models.modeling_phatgoose import PhatgooseRouter
from hf_fusion.progress import phase

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Export:
    """The result of `export`.

    Attributes:
        folder: what was written.
        form: one of `FORMS`.
        file: the file with the weights, or the first of several.
        tensors: their number, all of them read back and compared.
        nbytes: their size in the files.
        sentence: how the model was made.
        seconds: duration, including reading back.
        warnings: what differs where the files are used, one sentence each.
        facts: content of ``export.json``.
    """

    folder: Path
    form: str
    file: str
    tensors: int
    nbytes: int
    sentence: str
    seconds: float
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        shown = {"folder": self.folder, "what": self.sentence, "file": self.file, "tensors": self.tensors}
        return facts_table({**shown, "MB": round(self.nbytes / 1e6, 1), "warnings": list(self.warnings)})


def export(
    model: str | Path,
    folder: str | Path,
    to: str = "dense",
    *,
    task: str | None = None,
    rows: Dataset | None = None,
    rank: int | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Exports a fused model to a folder that servers run without this package and without custom code.

    - "dense": a model of a class of transformers. A WEMoE is merged with an expert's weights, or with the mean
      coefficients of rows. A PHATGOOSE router's base gets the update of one expert, the experts' mean weighted by their
      use on rows, or by default their plain mean. Of a Fusion of Experts one expert is exported.
    - "adapter": the same of a PHATGOOSE router, as a PEFT adapter; a mean has the sum of the experts' ranks.
    - "gguf": the dense model, a static merge, or any other language model in a folder, as a file for llama.cpp and what
      is built on it; classes of `hf_fusion.exporting.gguf_file.ARCHITECTURES`. Models in folders are read tensor by
      tensor.

    Files are read back before the folder appears. ``export.json`` and the card say what the model was made from, with
    commits; the licence is that of the model's card or of its experts. No code of the model's folder runs.

    Args:
        model: folder of a fused model.
        folder: where to write; created if missing.
        to: one of `FORMS`.
        task: name of an expert, with or without its owner.
        rows: instead of a task, rows with the model's inputs (``prompt``, ``text``, ``image``) that determine the
            weights of the experts. Of a WEMoE of classifiers, a task may choose the head as well.
        rank: for an adapter, the rank to which it is truncated by SVD; by default it is exact.
        quantize: for GGUF, the type of the weights, one of `hf_fusion.exporting.forms.QUANTIZATIONS`; by default
            they stay what they are.
        overwrite: whether to replace a model in the folder.

    Returns:
        What was written.

    Raises:
        FusionError: the model cannot become this form, an argument does not go with it, or a file cannot be read or
            written.
        MissingLibraryError: gguf is not installed.
    """
    began = time.perf_counter()
    source, folder = Path(model), Path(folder).resolve()
    _check_arguments(to, rank, quantize)
    recover_folder(folder)
    if folder == source.resolve() or source.resolve() in folder.parents or folder in source.resolve().parents:
        raise FusionError(f"the output {folder} overlaps the model {source}", "choose another --output")
    refuse_to_replace(folder, overwrite)
    found = _open(source, to, task, rows)
    with _staging(folder) as staging:
        given = {"task": task, "rows": rows, "rank": rank, "quantize": quantize}
        made = _WRITERS[to](found, staging, folder.name, given)
        facts = write_provenance(staging, found.provenance, to, made.sentence, made.facts, made.file)
        keep_hand_written(staging, folder)
        replace_folder(staging, folder, (*STALE, *MODEL))
    seconds = time.perf_counter() - began
    return Export(folder, to, made.file, made.tensors, made.nbytes, made.sentence, seconds, made.warnings, facts)


def _check_arguments(to: str, rank: int | None, quantize: str | None) -> None:
    if to not in FORMS:
        raise FusionError(f"{to!r} is not a form of export", f"one of {', '.join(FORMS)}")
    if rank is not None and to != "adapter":
        raise FusionError("a rank goes with an adapter", "omit --rank, or write --to adapter")
    if quantize is not None and to != "gguf":
        raise FusionError("a quantization goes with GGUF", "omit --quantize, or write --to gguf")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise FusionError(f"{quantize!r} is not a quantization of GGUF", suggestion(quantize, QUANTIZATIONS))
    if to == "gguf":
        need(EXTRA, "hf-fusion export --to gguf")


@dataclass
class _Source:
    """A model, and what it was made from.

    Attributes:
        model: loaded; None where a dense model is read from its folder tensor by tensor.
        provenance: of its folder.
    """

    model: PreTrainedModel | None
    provenance: Provenance


@dataclass
class _Made:
    """What a writer wrote into the staging folder and read back."""

    file: str
    tensors: int
    nbytes: int
    sentence: str
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()


def _open(source: Path, to: str, task: str | None, rows: Dataset | None) -> _Source:
    """Reads a model, and refuses what cannot become this form."""
    config = read_json(source / "config.json", str(source)) if (source / "config.json").is_file() else None
    if config is not None and config.get("model_type") not in FAMILIES:
        if to == "gguf":
            if task is not None or rows is not None:
                raise FusionError(f"{source} is a dense model: it has no experts to choose", "omit --task and --input")
            check_snapshot(source, str(source))
            return _Source(None, read_provenance(source))
        hint = f"hf-fusion extract-lora {source} --base BASE --rank 16" if to == "adapter" else "use it as it is"
        raise FusionError(f"{source} is a dense model already", hint)
    model, _ = load_fused(source)
    if to == "adapter" and not isinstance(model, PhatgooseRouter):
        what = FAMILIES[model.config.model_type].title if model.config.model_type in FAMILIES else "a static merge"
        raise FusionError(f"{source} is {what}, not a router of LoRA adapters", "write --to dense")
    if (task is not None or rows is not None) and not isinstance(model, FusedPreTrainedModel):
        raise FusionError(f"{source} is a static merge: it has no experts to choose", "omit --task and --input")
    return _Source(model, read_provenance(source))


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, removed at the end."""
    staging = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    try:
        with explain_disk_errors(folder.parent):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---------------------------------------------------------------- dense


def _dense(found: _Source, task: str | None, rows: Dataset | None) -> Dense:
    assert found.model is not None
    if isinstance(found.model, FusedPreTrainedModel):
        return dense_model(found.model, task, rows)
    processor = getattr(found.model, "processor", None)
    return Dense(found.model, processor, "An adapter, merged into its base.")


def _write_dense(found: _Source, staging: Path, name: str, given: Mapping[str, Any]) -> _Made:
    dense = _dense(found, given["task"], given["rows"])
    with phase(f"Writing {name}"):
        type(dense.model).save_pretrained(dense.model, staging)
        if dense.processor is not None:
            dense.processor.save_pretrained(staging)
    with phase("Reading back"):
        read = _read_back(dense.model, staging)
    files = sorted(path.name for path in staging.glob("*.safetensors"))
    nbytes = sum((staging / file).stat().st_size for file in files)
    return _Made(files[0], read, nbytes, dense.sentence, dense.facts)


def _read_back(model: PreTrainedModel, folder: Path) -> int:
    """Loads a saved model by its class and compares every tensor.

    Raises:
        FusionError: one differs or is missing.
    """
    how: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "use_safetensors": True}
    result: Any = type(model).from_pretrained(folder, output_loading_info=True, **how)
    loaded, info = result
    wanted, got = model.state_dict(), loaded.state_dict()
    wrong = [name for name, tensor in wanted.items() if name not in got or not _same(tensor, got[name])]
    wrong += [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise FusionError(f"{wrong[0]} is not as it was written", "export again: another process wrote there")
    return len(wanted)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.cpu(), second)


# ---------------------------------------------------------------- adapter


def _write_adapter(found: _Source, staging: Path, name: str, given: Mapping[str, Any]) -> _Made:
    from hf_fusion.exporting.dense import expert_named

    router = found.model
    assert isinstance(router, PhatgooseRouter)
    task = None if given["task"] is None else expert_named(given["task"], router)
    weights, what = expert_weights(router, task, given["rows"])
    inner = staging / "adapter"
    try:
        router.to_adapter(inner, weights, given["rank"])
    except ValueError as error:
        raise FusionError(str(error), "name one expert: --task NAME") from error
    for path in inner.iterdir():
        path.replace(staging / path.name)
    inner.rmdir()
    if router.processor is not None:
        router.processor.save_pretrained(staging)
    error = _adapter_error(router, weights, staging)
    if given["rank"] is None and error > _ROUNDING[router.dtype]:
        raise FusionError(f"the adapter differs from the experts by {error:.2g}", "export again")
    file = staging / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        count = len(opened.keys())
    sentence = f"A LoRA adapter: {what}."
    return _Made(file.name, count, file.stat().st_size, sentence, {"weights": weights, "relative_error": error})


# relative error that rounding factors to a dtype may leave: of A and of B weighted by a number, each half a step
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def _adapter_error(router: PhatgooseRouter, weights: Mapping[str, float], folder: Path) -> float:
    """‖ΔW' - ΔW‖ / ‖ΔW‖ of a written adapter over all linears."""
    lost = norm = 0.0
    entries = [(entry.lora, weights.get(entry.row["name"], 0.0)) for entry in router._entries()]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for path in dict.fromkeys(path for lora, weight in entries if weight for path in lora):
            prefix = f"base_model.model.{path}.lora_"
            a, b = (file.get_tensor(f"{prefix}{side}.weight").double() for side in "AB")
            update = torch.zeros(len(b), a.shape[1], dtype=torch.double)
            for lora, weight in entries:
                if weight and path in lora:
                    own_a, own_b = (t.cpu().double() for t in lora[path][-2:])
                    update += weight * own_b.T @ own_a
            lost += float((b @ a - update).square().sum())
            norm += float(update.square().sum())
    return (lost / norm) ** 0.5 if norm else 0.0


# ---------------------------------------------------------------- GGUF


def _write_gguf(found: _Source, staging: Path, name: str, given: Mapping[str, Any]) -> _Made:
    if found.model is None:
        source = found.provenance.folder
        with explain_load_errors(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
            check_architecture(next(iter(config.architectures or ["a model without a class"])))
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        tensors, sentence, facts = lazy_tensors(source), "The weights of a dense model.", dict[str, Any]()
    else:
        dense = _dense(found, given["task"], given["rows"])
        config, tokenizer, sentence, facts = dense.model.config, dense.processor, dense.sentence, dense.facts
        check_architecture(type(dense.model).__name__)
        config.architectures = [type(dense.model).__name__]
        state = dense.model.state_dict()
        tensors = {key: Source(tuple(tensor.shape), partial(_given, tensor)) for key, tensor in state.items()}
    quantization = given["quantize"] or OF_DTYPE.get(next(iter(tensors.values())).read().dtype, "F32")
    name = found.provenance.folder.resolve().name
    file = staging / f"{name}-{quantization}.gguf"
    license = found.provenance.metadata.get("license")
    about = {"name": name, "description": sentence} | ({"license": license} if isinstance(license, str) else {})
    written = write_gguf(file, config, tensors, tokenizer, quantization, about)
    facts = {**facts, "quantization": quantization, "relative_error": written.relative_error}
    return _Made(file.name, written.tensors, file.stat().st_size, sentence, facts, written.warnings)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_WRITERS = {"dense": _write_dense, "adapter": _write_adapter, "gguf": _write_gguf}

__all__ = ["FORMS", "Export", "export"]
