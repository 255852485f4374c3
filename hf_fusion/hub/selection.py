"""Selects the files of a model to read: weights, configurations, processors, and modules in subfolders."""

from __future__ import annotations

from hf_fusion.errors import FusionError
from hf_fusion.hub.formats import weight_files
from hf_fusion.hub.linearized import STEM as LINEARIZED
from hf_fusion.hub.manifests import local_files, local_named_files, module_folders, named_files, refuse_pickled
from hf_fusion.hub.model_files import Source

# files of training that no loader reads
_SKIPPED = ("trainer_state.json", "optimizer.safetensors", "results.json")


def safe_files(source: Source) -> list[str]:
    """The safetensors files of a model or adapter, by PEFT's file name or else L-LoRA's."""
    stems = ("adapter_model", LINEARIZED) if source.is_adapter else ("model",)
    return next(filter(None, (weight_files(source.sizes, stem, "safetensors") for stem in stems)), [])


def pick_weights(source: Source, *, allow_pickle: bool) -> list[str]:
    """The weight files to read; pickles only if there are no safetensors.

    Raises:
        FusionError: there are no weights, or only pickles without `allow_pickle`.
    """
    if safe := safe_files(source):
        return safe
    pickled = weight_files(source.sizes, "adapter_model" if source.is_adapter else "pytorch_model", "bin")
    if not pickled:
        raise FusionError(
            f"{source.name} has no weights (model.safetensors or adapter_model.safetensors)",
            hint="name the repo or folder of a model or an adapter",
        )
    if not allow_pickle:
        raise FusionError(
            f"{source.name} has only pickle weights ({pickled[0]})",
            hint="if you trust its author: --allow-pickle (allow_pickle=True in Python)",
        )
    return pickled


def pick_small(source: Source, *, code: bool) -> list[str]:
    """Configs and processor files, with `code` also Python files, as paths from the root.

    Includes files in the subfolders that the model's manifests name.
    """
    wanted = (".json", ".txt", ".model", ".jinja") + ((".py",) if code else ())
    at_root = [
        file
        for file in source.sizes
        if "/" not in file and file.endswith(wanted) and not file.endswith(".index.json") and file not in _SKIPPED
    ]
    return at_root + [file for file in _named(source, code) if not file.endswith(".safetensors")]


def pick_modules(source: Source) -> list[str]:
    """The weights of sentence-transformers' modules beside the model (``2_Dense/model.safetensors``).

    Raises:
        FusionError: there are only pickles.
    """
    is_here = source.is_local and source.folder is not None
    files = list(local_files(source.folder)) if is_here and source.folder else list(source.sizes)
    refuse_pickled(source.name, files, module_folders(source.name, files, source.read))
    return [file for file in _named(source, code=False) if file.endswith(".safetensors")]


def _named(source: Source, code: bool) -> list[str]:
    if source.is_local and source.folder is not None:
        return local_named_files(source.folder, source.name, code=code)
    return named_files(source.name, source.sizes, source.read, code=code)
