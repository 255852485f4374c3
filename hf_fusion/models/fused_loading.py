"""Checked loading of untrusted weights: complete, of the shapes that the config describes, and finite."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils.hub import cached_file

from .fused_custom_code import UntrustedCodeError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
# a model may have tied weights and computed buffers beyond the tensors in its files
SPARE_ELEMENTS, SPARE_BYTES, SPARE_PARAMETERS = 1 << 20, 1 << 27, 10_000
# errors of the environment, and errors that name the folder already, pass unchanged
KEPT = (UntrustedCodeError, ImportError, MemoryError, torch.OutOfMemoryError)
DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass
class CheckpointHeaders:
    """The headers of a model's safetensors files.

    Attributes:
        files: their paths.
        shapes: name of a tensor -> its file if it is in one, shape, and whether it is of floating point.
        thread: id of the thread that reads them.
    """

    files: list[Path]
    shapes: dict[str, tuple[Path | None, tuple[int, ...], bool]] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    @property
    def elements(self) -> int:
        """Number of elements in all tensors."""
        return sum(_product(shape) for _, shape, _ in self.shapes.values())


_stored: ContextVar[CheckpointHeaders | None] = ContextVar("stored", default=None)


def weight_files(name: Any, hub: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a folder or repo.

    Args:
        name: as `from_pretrained` takes it.
        hub: where to look for it: revision, token, cache_dir, local_files_only, subfolder.

    Raises:
        ValueError: an index names files outside of its folder.
        OSError: a file does not exist.
    """
    index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **hub)
    single = cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub)
    if single is not None or index is None:
        return [Path(str(single or cached_file(name, WEIGHTS, **hub)))]
    try:
        shards = json.loads(Path(str(index)).read_text(encoding="utf-8"))["weight_map"].values()
        if not shards or any(not isinstance(shard, str) or shard != Path(shard).name for shard in shards):
            raise ValueError("its weight_map names what is not a file beside it")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} cannot be read ({_line(error)})") from None
    return [Path(str(cached_file(name, shard, **hub))) for shard in sorted(set(shards))]


def read_headers(files: list[Path]) -> CheckpointHeaders:
    """Read the headers of files, without their weights.

    Raises:
        ValueError: a file is truncated, or not in the safetensors format.
    """
    stored = CheckpointHeaders(files)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    entry = file.get_slice(name)
                    stored.shapes[name] = (path, tuple(entry.get_shape()), entry.get_dtype() in DTYPES)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read: cut off or damaged ({_line(error)})") from None
    return stored


@contextmanager
def explained(name: Any) -> Iterator[None]:
    """Context manager that turns errors of reading a folder or repo into a ValueError that names it.

    What the environment lacks, and what a Hub answers (OSError for what it does not have), stays what it is.
    """
    try:
        yield
    except KEPT:
        raise
    except BaseException as error:  # transformers raises various errors; Rust's panics are not an `Exception`
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        is_elsewhere = not Path(str(name)).exists()
        if is_elsewhere and (isinstance(error, OSError) or "httpx" in type(error).__module__):
            raise
        text = _line(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {_line(error)}"
        prefix = "" if text.startswith(str(name)) else f"{name} cannot be loaded: "
        raise ValueError(prefix + text) from error


def load_checked(
    load: Callable[..., Any],
    name: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    hub: Mapping[str, Any],
    may_hold_more: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Load a model, and check that every weight is in its safetensors files and finite.

    Args:
        load: `from_pretrained` of `PreTrainedModel`.
        name: what is loaded, as `from_pretrained` takes it.
        args: positional arguments of `from_pretrained`.
        kwargs: keyword arguments of `from_pretrained`; with a ``state_dict`` no file is read.
        hub: where to look for files, see `weight_files`.
        may_hold_more: whether the files may have weights that the model does not use.

    Returns:
        The model and the loading info of `from_pretrained`.

    Raises:
        ValueError: a file or tensor is invalid; the message names it and the folder.
        OSError: the repo or a file of it does not exist.
    """
    options = {"use_safetensors": True, **kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    given = options.get("state_dict")
    with explained(name):
        if given is not None:
            stored = CheckpointHeaders(
                [], {key: (None, tuple(tensor.shape), tensor.is_floating_point()) for key, tensor in given.items()}
            )
        elif options.get("variant") or options.get("gguf_file"):
            stored = None
        else:
            stored = read_headers(weight_files(name, hub))
        with bounded(stored):
            model, info = load(name if given is None else None, *args, **options)
        allowed = {"mismatched_keys": kwargs.get("ignore_mismatched_sizes"), "unexpected_keys": may_hold_more}
        info = {what: set() if allowed.get(what) else keys for what, keys in info.items()}
        check_loaded(model, info, stored)
    return model, info


@contextmanager
def bounded(stored: CheckpointHeaders | None) -> Iterator[None]:
    """Context manager in which building a model larger than its files raises an error: see `check_size`."""
    if stored is None:
        yield
        return
    most, most_parameters, count = stored.elements + SPARE_ELEMENTS, 100 * len(stored.shapes) + SPARE_PARAMETERS, 0

    def check(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        if threading.get_ident() != stored.thread:
            return
        count += 1
        if count > most_parameters or (parameter is not None and parameter.numel() > most):
            size = "" if parameter is None else f" ({type(module).__name__}.{name} is {list(parameter.shape)})"
            raise ValueError(f"config.json describes a larger model than the files hold{size}")

    handle, token = register_module_parameter_registration_hook(check), _stored.set(stored)
    try:
        yield
    finally:
        handle.remove()
        _stored.reset(token)


def check_size(model: nn.Module) -> None:
    """Check that a model just built on the meta device is not larger than the files it is loaded from.

    Raises:
        ValueError: its weights or its computed buffers are much larger.
    """
    stored = _stored.get()
    if stored is None:
        return
    state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    wanted, there = sum(tensor.numel() for tensor in state.values()), stored.elements
    if wanted > 2 * there + SPARE_ELEMENTS:
        raise ValueError(f"config.json describes {wanted:,} weights, the files hold {there:,}")
    computed = sum(tensor.nbytes for tensor in model.buffers() if id(tensor) not in state)
    if computed > 8 * there + SPARE_BYTES:
        raise ValueError(f"config.json describes computed buffers of {computed:,} bytes beside {there:,} weights")


def check_loaded(model: nn.Module, info: Mapping[str, Any], stored: CheckpointHeaders | None) -> None:
    """Check that every weight of a loaded model came from its files unchanged, and is finite.

    Args:
        model: after loading; offloaded weights are read from disk.
        info: the loading info of `from_pretrained`.
        stored: headers of the files; None for another source.

    Raises:
        ValueError: a weight is missing, changed or not finite; the message names it.
    """
    for what, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            raise ValueError(f"it {what} weights, {len(keys)}, first {min(keys)}")
    for name, in_file, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{name} is {list(in_file)} in the files, {list(wanted)} by config.json")
    is_offloaded = "disk" in getattr(model, "hf_device_map", {}).values()
    for name, tensor in model.state_dict().items():
        if stored and tensor.is_meta and name not in stored.shapes and not is_offloaded:
            raise ValueError(f"it lacks weights, first {name}")  # transformers does not report all of them
        path, _, is_float = stored.shapes.get(name, (None, (), None)) if stored else (None, (), None)
        if is_float is not None and is_float != tensor.is_floating_point():
            raise ValueError(f"{name} is not of the type that config.json describes ({tensor.dtype})")
        if tensor.is_meta and path is not None:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        if not is_finite(tensor):
            raise ValueError(f"{name} holds NaN or Inf, as {tensor.dtype}")


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite, by one pass for their sum. An int16 tensor is read as the bits of bfloat16."""
    if tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    # Large finite numbers may add up to Inf: then the extremes decide, which take longer and propagate NaN too.
    return bool(tensor.sum().isfinite()) or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _line(error: object) -> str:
    line = " ".join(str(error).split())[:400]
    return "".join(character if character.isprintable() else "?" for character in line)


__all__ = ["check_size", "explained", "is_finite", "load_checked", "read_headers", "weight_files"]
