"""Reads PEFT's LoRA adapters as tensors, without importing peft.

An adapter's update of a linear layer is ``scaling * B @ A``. The scaling (alpha, rank, rsLoRA and their patterns) is
folded into B here. Adapters that cannot be written as ``W + B @ A`` raise an error that names the field.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.linearized import STEM as LINEARIZED
from hf_fusion.hub.linearized import as_lora
from hf_fusion.hub.peft_names import BIAS, EMBEDDING, LORA, PREFIX, ROWS, plain_keys
from hf_fusion.hub.rank_patterns import Patterns
from hf_fusion.io.files import own_file
from hf_fusion.io.json_files import read_json
from hf_fusion.types import Adapter, as_commit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# initialisations that keep the base's weights; PiSSA, OLoRA, CorDA, LoftQ … change them
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

# field -> (whether a value is unsupported, why)
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (bool, "DoRA rescales the base's weights"),
    "lora_bias": (bool, "a bias on B cannot be expressed by B @ A"),
    "init_lora_weights": (lambda v: v not in _PLAIN_INITS, "this initialisation changes the base's weights"),
    "layer_replication": (bool, "replicated layers change the architecture"),
    "target_parameters": (bool, "LoRA on bare parameters is not supported"),
    "trainable_token_indices": (bool, "trained token embeddings are not supported"),
    "use_qalora": (bool, "QALoRA pools its inputs"),
    "alora_invocation_tokens": (bool, "activated LoRA changes with the prompt"),
    "arrow_config": (bool, "Arrow is itself a router"),
    "use_bdlora": (bool, "block-diagonal LoRA is not supported"),
    "kasa_config": (bool, "KaSA decomposes the base's weights"),
    "monteclora_config": (bool, "MonteCLoRA samples its weights"),
    "velora_config": (bool, "VeLoRA is not supported"),
}

# fields that static merges support nevertheless
_MERGEABLE = ("trainable_token_indices", "lora_bias")

# hints for adapters that can be fused once they are merged into the base
_MERGE_FIRST = "merge it into its base with PEFT, merge_and_unload() and save_pretrained(), and use that model"
_EMBEDS = "merge it into its base, and use that model: hf-fusion fuse --method linear --experts ADAPTER -o DIR"


def config_problems(config: Mapping[str, Any], *, embeddings: bool = False) -> list[str]:
    """Fields of an ``adapter_config.json`` that prevent the form ``W + B @ A``: one line per field.

    Args:
        config: content of the file.
        embeddings: whether trained rows of embeddings and changes of biases are supported.
    """
    if config.get("peft_type") != "LORA":
        return [f"peft_type={shown(config.get('peft_type'))}: only LoRA adapters can be fused"]
    problems = [
        f"{key}={shown(config.get(key))}: {why}"
        for key, (refused, why) in _REFUSED.items()
        if refused(config.get(key)) and not (embeddings and key in _MERGEABLE)
    ]
    for key, kind in (
        ("r", int),
        ("lora_alpha", (int, float)),
        ("rank_pattern", dict),
        ("alpha_pattern", dict),
    ):
        value = config.get(key) or {} if key.endswith("pattern") else config.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            problems.append(f"{key}={shown(value)}: not a valid value")
    rank = config.get("r")
    if isinstance(rank, int) and rank < 1:
        problems.append(f"r={rank}: the rank must be at least 1")
    return problems


def read_adapter(folder: str | Path, name: str, *, allow_pickle: bool = False, embeddings: bool = False) -> Adapter:
    """Reads a LoRA adapter from a folder.

    Args:
        folder: contains ``adapter_config.json`` and ``adapter_model.safetensors``, or the weights of an L-LoRA.
        name: the adapter's name, for errors.
        allow_pickle: read ``adapter_model.bin`` if there are no safetensors.
        embeddings: also read LoRA on embeddings, trained rows of embeddings and changes of biases, which static merges
            support and the families of fused models do not.

    Returns:
        The adapter: module path of the base -> ``A`` (r, d_in) and ``B`` (d_out, r), with the scaling folded into B;
        the tensors of ``modules_to_save`` by their parameter names in the base; and the base's id.

    Raises:
        FusionError: a field or tensor is unsupported; names it and the adapter.
    """
    folder = Path(folder)
    config = read_json(folder / ADAPTER_CONFIG, name)
    if problems := config_problems(config, embeddings=embeddings):
        hint = _EMBEDS if not config_problems(config, embeddings=True) else _MERGE_FIRST
        hint += (
            "; or extract it without biases: hf-fusion extract-lora … --linear-only" if config.get("lora_bias") else ""
        )
        raise FusionError(f"adapter {name} cannot be fused: {'; '.join(problems)}", hint=hint)
    stored = _tensors(folder, name, allow_pickle)
    stored = as_lora({key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}, name)
    tensors = {plain: stored[key] for key, plain in plain_keys(stored, name).items()}

    halves: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    embedded: set[str] = set()
    biases: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FusionError(f"adapter {name} has NaN or Inf in {key}")
        if match := LORA.fullmatch(key):
            halves.setdefault(match["path"], {})[match["half"]] = tensor
        elif (match := EMBEDDING.fullmatch(key)) and embeddings:
            # PEFT adds (B A)^T = A^T B^T to an embedding, which has the form of a linear layer's update
            halves.setdefault(match[1], {})["AB"[match[2] == "A"]] = tensor.t()
            embedded.add(match[1])
        elif (match := ROWS.fullmatch(key)) and embeddings:
            rows[match[1]] = (_rows_of(config, match[1], len(tensor), name), tensor)
        elif (match := BIAS.fullmatch(key)) and embeddings:
            biases[match[1]] = tensor
        elif "lora_" in key or ROWS.fullmatch(key):
            hint = _EMBEDS if EMBEDDING.fullmatch(key) or ROWS.fullmatch(key) else _MERGE_FIRST
            raise FusionError(f"adapter {name} contains {key}, but only LoRA on linear layers can be fused", hint=hint)
        else:
            saved[key.replace(".token_adapter.", ".")] = tensor
    _refuse_trained_biases(config, saved, name)
    if not halves and not rows:
        raise FusionError(f"adapter {name} contains no LoRA weights")
    if both := rows.keys() & embedded:
        raise FusionError(f"adapter {name} has LoRA on {min(both)} and also trained rows of it", hint=_MERGE_FIRST)
    patterns = Patterns(config, name)
    lora = {path: _pair(config, patterns, path, pair, name) for path, pair in halves.items()}
    return Adapter(
        lora=lora,
        saved=saved,
        base=str(config.get("base_model_name_or_path") or ""),
        base_revision=as_commit(revision := config.get("revision")) or revision or None,
        transposed=bool(config.get("fan_in_fan_out")),
        model_class=trained_class(config),
        embeddings=frozenset(embedded),
        rows=rows,
        biases={path: _bias(config, patterns, path, lora, bias, name) for path, bias in biases.items() if bias.any()},
    )


def _rows_of(config: Mapping[str, Any], path: str, count: int, name: str) -> torch.Tensor:
    """Indices of an embedding's trained rows, (n,), from ``trainable_token_indices``, which may be by module."""
    import torch

    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((own for key, own in given.items() if f".{path}".endswith(f".{key}")), None)
    if not isinstance(given, list) or len(given) != count or not all(type(n) is int and n >= 0 for n in given):
        raise FusionError(f"adapter {name} has {count} rows of {path} that trainable_token_indices does not list")
    return torch.tensor(given)


def trained_class(config: Mapping[str, Any]) -> str:
    """Name of the model class that an adapter was trained on, which PEFT records if there is no ``task_type``."""
    mapping = config.get("auto_mapping")
    return str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""


def _pair(
    config: Mapping[str, Any], patterns: Patterns, path: str, pair: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and scaled B of one module; B is fp32 if its dtype would round the scaled values."""
    import torch

    if set(pair) != {"A", "B"}:
        found, lacking = ("A", "B") if "A" in pair else ("B", "A")
        raise FusionError(f"adapter {name} contains lora_{found} of {path}, but not its lora_{lacking}")
    a, b = pair["A"], pair["B"]  # (r, d_in), (d_out, r)
    if a.dim() != 2 or b.dim() != 2:
        raise FusionError(f"adapter {name} adapts {path}, which is not a linear layer (A has {a.dim()} dimensions)")
    rank = patterns.value("rank_pattern", path, config["r"])
    if not a.shape[0] == b.shape[1] == rank or rank < 1:
        raise FusionError(
            f"adapter {name}: the ranks of {path} disagree: A is {list(a.shape)}, B is {list(b.shape)}, "
            f"and the config says {rank}"
        )
    alpha = patterns.value("alpha_pattern", path, config["lora_alpha"])
    scaling = _scaling(config, patterns, path)
    exact = b.float() * scaling
    if not math.isfinite(scaling) or not exact.isfinite().all():
        raise FusionError(f"adapter {name}: B times lora_alpha={alpha} of {path} is not finite")
    rounded = exact.to(b.dtype)  # PEFT scales outputs, not B: in half precision only scaling by powers of 2 is exact
    return a, rounded if torch.equal(rounded.float(), exact) else exact


def _bias(
    config: Mapping[str, Any],
    patterns: Patterns,
    path: str,
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    bias: torch.Tensor,
    name: str,
) -> torch.Tensor:
    """What an adapter adds to the bias of a layer, (d_out,) fp32: PEFT scales the outputs of B with its bias."""
    if path not in lora or bias.shape != lora[path][1].shape[:1]:
        raise FusionError(
            f"adapter {name} contains a bias of {path} of shape {[*bias.shape]}, which does not fit its B"
        )
    return bias.float() * _scaling(config, patterns, path)


def _scaling(config: Mapping[str, Any], patterns: Patterns, path: str) -> float:
    """α / r of a module, or α / √r for rsLoRA."""
    rank = patterns.value("rank_pattern", path, config["r"])
    alpha: float = patterns.value("alpha_pattern", path, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _refuse_trained_biases(config: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> None:
    """Raises for biases of the base that PEFT trained with ``bias`` other than "none"."""
    modules = tuple(config.get("modules_to_save") or ())
    biases = [key for key in saved if key.endswith(".bias") and not _under(key, modules)]
    if config.get("bias", "none") != "none" and biases:
        raise FusionError(f"adapter {name}: bias={config['bias']!r} trained {biases[0]}, which B @ A cannot express")


def _under(parameter: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of the modules, which are named by path suffixes."""
    return any(f".{module}." in f".{parameter}" for module in modules)


def fit_problems(adapter: Adapter, base: torch.nn.Module) -> list[str]:
    """Why an adapter does not fit a base, which may be on the meta device; empty if it does.

    Every adapted module must be a linear layer of the base with the sizes of A and B, and every saved tensor must have
    the shape of a parameter of the base, except for the class dimension of a head.
    """
    shapes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
    return shape_problems(shapes, {key: tuple(tensor.shape) for key, tensor in adapter.saved.items()}, base)


def shape_problems(
    lora: Mapping[str, tuple[int, int]], saved: Mapping[str, tuple[int, ...]], base: torch.nn.Module
) -> list[str]:
    """`fit_problems` from sizes: ``lora`` maps module paths to (d_in, d_out), ``saved`` maps names to shapes."""
    modules = dict(base.named_modules())
    parameters = dict(base.named_parameters(remove_duplicate=False))  # tied parameters under all their names
    classes = getattr(getattr(base, "config", None), "num_labels", None)
    stacked = _stacked(base, [path for path in lora if path not in modules])
    problems = []
    for path, sizes in lora.items():
        found = linear_sizes(modules.get(path))
        if path in stacked:
            problems.append(f"adapts {path}, which is part of {stacked[path]}: only static merges can update it")
        elif path not in modules:
            problems.append(f"adapts {path}, which the base does not have")
        elif found is None:
            problems.append(f"adapts {path}, which is not a linear layer")
        elif found != sizes:
            problems.append(
                f"{path} maps {found[0]} to {found[1]} features in the base, {sizes[0]} to {sizes[1]} in the adapter"
            )
    for key, shape in saved.items():
        if key not in parameters:
            problems.append(f"saves {key}, which the base does not have")
            continue
        expected = tuple(parameters[key].shape)
        is_head = expected[:1] == (classes,) and len(shape) == len(expected) and shape[1:] == expected[1:]
        if shape != expected and not is_head:
            problems.append(f"{key} has shape {list(expected)} in the base, but {list(shape)} in the adapter")
    return problems


def _stacked(base: torch.nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """Modules that the base lacks because transformers stacks their weights: path -> the stacked parameter."""
    from transformers import PreTrainedModel

    from hf_fusion.hub.parameter_names import filled_parameters

    names = {f"{path}.weight": path for path in paths}
    found = filled_parameters(base, names) if names and isinstance(base, PreTrainedModel) else {}
    return {names[name]: made[0] for name, made in found.items() if not made[0].endswith(".weight")}


def with_adapter(base: PreTrainedModel, adapter: Adapter, labels: Sequence[str] = ()) -> PreTrainedModel:
    """A copy of a base with an adapter merged into it, as by PEFT's ``merge_and_unload``.

    Args:
        base: with any head.
        adapter: must fit the base.
        labels: class names, if the adapter includes a head.
    """
    import torch

    model = copy.deepcopy(base)
    modules: dict[str, Any] = dict(model.named_modules())
    with torch.no_grad():
        for name, tensor in adapter.saved.items():
            path, _, own = name.rpartition(".")
            old = getattr(modules[path], own)
            setattr(modules[path], own, torch.nn.Parameter(tensor.to(old.device, old.dtype, copy=True)))
        by_name = dict(model.named_parameters(remove_duplicate=False))
        used = Counter(map(id, by_name.values()))
        for path, pair in adapter.lora.items():
            if used[id(modules[path].weight)] > 1:  # tied: PEFT changes only this one
                modules[path].weight = torch.nn.Parameter(modules[path].weight.clone())
            weight = modules[path].weight
            weight.copy_(weight.float() + _update(modules[path], pair).to(weight.device))
    _update_tying(model)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
    return model


def _update_tying(model: PreTrainedModel) -> None:
    """Ties equal weights again; if tied weights now differ, clears ``tie_word_embeddings`` in the configuration."""
    import torch

    by_name = dict(model.named_parameters(remove_duplicate=False))
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if pairs and by_name.keys() >= {*pairs, *pairs.values()}:
        if all(torch.equal(by_name[one], by_name[other]) for one, other in pairs.items()):
            model.tie_weights()
        elif not getattr(
            model.config, "is_encoder_decoder", False
        ):  # some of which scale the head's input by this setting
            model.config.tie_word_embeddings = False


def merge_saved_bases(adapter: Adapter, base: torch.nn.Module) -> Adapter:
    """Resolves linear layers that an adapter both updates and saves.

    PEFT saves the weight under a LoRA on a head or on embeddings. If it equals the base's, only the LoRA is kept; else
    the update is merged into the saved weight.

    Args:
        adapter: must fit the base.
        base: the model.
    """
    import torch

    lora, saved, modules = dict(adapter.lora), dict(adapter.saved), dict(base.named_modules())
    for path in adapter.lora:
        if (beneath := saved.pop(f"{path}.weight", None)) is None:
            continue
        weight: torch.Tensor = modules[path].weight.detach()
        if not torch.equal(beneath.to(weight.device, weight.dtype), weight):
            saved[f"{path}.weight"] = beneath.float() + _update(modules[path], lora.pop(path))
    return replace(adapter, lora=lora, saved=saved)


def _update(module: torch.nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """B A in the layout of a module's weight, (d_out, d_in), or transposed for a Conv1D; fp32."""
    import torch

    update = pair[1].float() @ pair[0].float()
    return update if isinstance(module, torch.nn.Linear) else update.T


def linear_sizes(module: torch.nn.Module | None) -> tuple[int, int] | None:
    """(d_in, d_out) of a Linear, or of GPT-2's Conv1D, whose weight is transposed; None for other modules."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def adapter_weights_file(folder: Path) -> Path | None:
    """An adapter's safetensors file, PEFT's or L-LoRA's; None if there is none."""
    names = ("adapter_model.safetensors", f"{LINEARIZED}.safetensors")
    return next((folder / name for name in names if own_file(folder / name)), None)


def _tensors(folder: Path, name: str, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """All tensors of an adapter's weight file."""
    safe, pickled = adapter_weights_file(folder), folder / "adapter_model.bin"
    if safe is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(safe)
        except SafetensorError as error:
            raise FusionError(f"adapter {name}: {safe.name} cannot be read ({error})") from None
    if not own_file(pickled):
        raise FusionError(f"adapter {name} has no adapter_model.safetensors")
    if not allow_pickle:
        raise FusionError(
            f"adapter {name} has only pickle weights (adapter_model.bin)",
            hint="if you trust its author: --allow-pickle (allow_pickle=True in Python)",
        )
    import torch

    tensors: dict[str, torch.Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
    return tensors
