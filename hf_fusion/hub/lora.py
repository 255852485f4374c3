"""PEFT LoRA adapters read as plain tensors, without importing peft.

An adapter's update of a linear layer is ``scaling * B @ A``. The scaling (alpha, rank, rsLoRA and their
patterns) is folded into B here, so that nothing downstream has to know how PEFT computes it.
What cannot be written as ``W + B @ A`` is refused by the name of the adapter and of the field.
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
from hf_fusion.hub.peft_names import EMBEDDING, LORA, PREFIX, ROWS, plain_keys
from hf_fusion.hub.rank_patterns import Patterns
from hf_fusion.io.files import own_file
from hf_fusion.io.json_files import read_json
from hf_fusion.types import Adapter, as_commit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# These initialisations leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoftQ … rewrite them.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

# field -> (whether its value cannot be expressed, why)
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (bool, "DoRA rescales the base's weights"),
    "lora_bias": (bool, "a bias on B has no place in B @ A"),
    "init_lora_weights": (lambda v: v not in _PLAIN_INITS, "this initialisation changes the base's weights"),
    "layer_replication": (bool, "replicated layers are another architecture"),
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


# what stands for itself once it is in the base's weights
_MERGE_FIRST = "make a model of it with PEFT: merge_and_unload(), save_pretrained(), and take that"
_EMBEDS = "make a model of it, and take that: hf-fusion fuse --method linear --experts ADAPTER -o DIR"


def config_problems(config: Mapping[str, Any], *, embeddings: bool = False) -> list[str]:
    """What in an ``adapter_config.json`` cannot be written as ``W + B @ A``: one line per field, or none.

    Args:
        config: content of the file.
        embeddings: whether rows of embeddings may be replaced as well.
    """
    if config.get("peft_type") != "LORA":
        return [f"peft_type={shown(config.get('peft_type'))}: only LoRA adapters can be fused"]
    problems = [
        f"{key}={shown(config.get(key))}: {why}"
        for key, (refused, why) in _REFUSED.items()
        if refused(config.get(key)) and not (embeddings and key == "trainable_token_indices")
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
        problems.append(f"r={rank}: a rank below 1 adapts nothing")
    return problems


def read_adapter(folder: str | Path, name: str, *, allow_pickle: bool = False, embeddings: bool = False) -> Adapter:
    """Read a LoRA adapter from a folder.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``, or the weights of an L-LoRA.
        name: what errors call it.
        allow_pickle: also read ``adapter_model.bin`` where there are no safetensors.
        embeddings: also read LoRA on embeddings and trained rows of them, which static merges express and families
            of models do not.

    Returns:
        The adapter: per module path of the base ``A`` (r, d_in) and ``B`` (d_out, r) with the scaling folded
        into B, the tensors of ``modules_to_save`` by their parameter names in the base, and the base's id.

    Raises:
        FusionError: naming the adapter and the field or tensor that cannot be expressed.
    """
    folder = Path(folder)
    config = read_json(folder / ADAPTER_CONFIG, name)
    if problems := config_problems(config, embeddings=embeddings):
        hint = _EMBEDS if not config_problems(config, embeddings=True) else _MERGE_FIRST
        raise FusionError(f"Adapter {name} cannot be fused: {'; '.join(problems)}.", hint=hint)
    stored = _tensors(folder, name, allow_pickle)
    stored = as_lora({key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}, name)
    tensors = {plain: stored[key] for key, plain in plain_keys(stored, name).items()}

    halves: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    embedded: set[str] = set()
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FusionError(f"Adapter {name} has NaN or Inf in {key}.")
        if match := LORA.fullmatch(key):
            halves.setdefault(match["path"], {})[match["half"]] = tensor
        elif (match := EMBEDDING.fullmatch(key)) and embeddings:
            # PEFT adds (B A)^T to an embedding: as A^T B^T it is an update like those of linear layers
            halves.setdefault(match[1], {})["AB"[match[2] == "A"]] = tensor.t()
            embedded.add(match[1])
        elif (match := ROWS.fullmatch(key)) and embeddings:
            rows[match[1]] = (_rows_of(config, match[1], len(tensor), name), tensor)
        elif "lora_" in key or ROWS.fullmatch(key):
            hint = _EMBEDS if EMBEDDING.fullmatch(key) or ROWS.fullmatch(key) else _MERGE_FIRST
            raise FusionError(f"Adapter {name} holds {key}: only LoRA on linear layers can be fused.", hint=hint)
        else:
            saved[key.replace(".token_adapter.", ".")] = tensor
    _refuse_trained_biases(config, saved, name)
    if not halves and not rows:
        raise FusionError(f"Adapter {name} holds no LoRA weights.")
    if both := rows.keys() & embedded:
        raise FusionError(f"Adapter {name} has LoRA on {min(both)} and trained rows of it.", hint=_MERGE_FIRST)
    patterns = Patterns(config, name)
    return Adapter(
        lora={path: _pair(config, patterns, path, pair, name) for path, pair in halves.items()},
        saved=saved,
        base=str(config.get("base_model_name_or_path") or ""),
        base_revision=as_commit(revision := config.get("revision")) or revision or None,
        transposed=bool(config.get("fan_in_fan_out")),
        model_class=trained_class(config),
        embeddings=frozenset(embedded),
        rows=rows,
    )


def _rows_of(config: Mapping[str, Any], path: str, count: int, name: str) -> torch.Tensor:
    """Which rows of an embedding ``trainable_token_indices`` names, (n,): for all embeddings, or by module."""
    import torch

    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((own for key, own in given.items() if f".{path}".endswith(f".{key}")), None)
    if not isinstance(given, list) or len(given) != count or not all(type(n) is int and n >= 0 for n in given):
        raise FusionError(f"Adapter {name} has {count} rows of {path}, which trainable_token_indices does not name.")
    return torch.tensor(given)


def trained_class(config: Mapping[str, Any]) -> str:
    """Name of the class that an adapter was trained on, which PEFT records where no ``task_type`` was given."""
    mapping = config.get("auto_mapping")
    return str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""


def _pair(
    config: Mapping[str, Any], patterns: Patterns, path: str, pair: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and scaled B of one module; B in single precision where its own dtype would round the scaling."""
    import torch

    if set(pair) != {"A", "B"}:
        raise FusionError(f"Adapter {name} holds lora_{next(iter(pair))} of {path} without its other half.")
    a, b = pair["A"], pair["B"]  # (r, d_in), (d_out, r)
    if a.dim() != 2 or b.dim() != 2:
        raise FusionError(f"Adapter {name} adapts {path}, which is not a linear layer (A has {a.dim()} dimensions).")
    rank = patterns.value("rank_pattern", path, config["r"])
    if not a.shape[0] == b.shape[1] == rank or rank < 1:
        raise FusionError(
            f"Adapter {name}: ranks of {path} disagree: A {list(a.shape)}, B {list(b.shape)}, config {rank}."
        )
    alpha = patterns.value("alpha_pattern", path, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    exact = b.float() * scaling
    if not math.isfinite(scaling) or not exact.isfinite().all():
        raise FusionError(f"Adapter {name}: B times lora_alpha={alpha} of {path} is not finite.")
    rounded = exact.to(b.dtype)  # half precision holds powers of 2 alone: PEFT scales outputs, which loses nothing in B
    return a, rounded if torch.equal(rounded.float(), exact) else exact


def _refuse_trained_biases(config: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> None:
    """With ``bias`` other than "none" PEFT also saves biases of the base, which B @ A cannot carry."""
    modules = tuple(config.get("modules_to_save") or ())
    biases = [key for key in saved if key.endswith(".bias") and not _under(key, modules)]
    if config.get("bias", "none") != "none" and biases:
        raise FusionError(f"Adapter {name}: bias={config['bias']!r} trained {biases[0]}, which B @ A cannot carry.")


def _under(parameter: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter lies in one of the modules, each named by the end of its path."""
    return any(f".{module}." in f".{parameter}" for module in modules)


def fit_problems(adapter: Adapter, base: torch.nn.Module) -> list[str]:
    """Why an adapter does not fit a base (which may be on the meta device); empty if it does.

    Every adapted module must be a linear layer of the base with A's and B's sizes, and every saved tensor one
    of its parameters in the same shape. Only the class dimension of a head may differ.
    """
    shapes = {path: (a.shape[1], b.shape[0]) for path, (a, b) in adapter.lora.items()}
    return shape_problems(shapes, {key: tuple(tensor.shape) for key, tensor in adapter.saved.items()}, base)


def shape_problems(
    lora: Mapping[str, tuple[int, int]], saved: Mapping[str, tuple[int, ...]], base: torch.nn.Module
) -> list[str]:
    """`fit_problems` from sizes: ``lora`` maps a module path to (d_in, d_out), ``saved`` a name to its shape."""
    modules = dict(base.named_modules())
    parameters = dict(base.named_parameters(remove_duplicate=False))  # tied ones by each of their names
    classes = getattr(getattr(base, "config", None), "num_labels", None)
    stacked = _stacked(base, [path for path in lora if path not in modules])
    problems = []
    for path, sizes in lora.items():
        found = linear_sizes(modules.get(path))
        if path in stacked:
            problems.append(f"adapts {path}, which is a part of {stacked[path]}: only a static merge updates it")
        elif path not in modules:
            problems.append(f"adapts {path}, which the base does not have")
        elif found is None:
            problems.append(f"adapts {path}, which is not a linear layer")
        elif found != sizes:
            problems.append(f"{path} is {found[0]}→{found[1]} in the base, {sizes[0]}→{sizes[1]} in the adapter")
    for key, shape in saved.items():
        if key not in parameters:
            problems.append(f"saves {key}, which the base does not have")
            continue
        expected = tuple(parameters[key].shape)
        is_head = expected[:1] == (classes,) and len(shape) == len(expected) and shape[1:] == expected[1:]
        if shape != expected and not is_head:
            problems.append(f"{key} is {list(expected)} in the base, {list(shape)} in the adapter")
    return problems


def _stacked(base: torch.nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """The modules a base lacks because transformers stacks their weights in one parameter: path -> that parameter."""
    from transformers import PreTrainedModel

    from hf_fusion.hub.parameter_names import filled_parameters

    names = {f"{path}.weight": path for path in paths}
    found = filled_parameters(base, names) if names and isinstance(base, PreTrainedModel) else {}
    return {names[name]: made[0] for name, made in found.items() if not made[0].endswith(".weight")}


def with_adapter(base: PreTrainedModel, adapter: Adapter, labels: Sequence[str] = ()) -> PreTrainedModel:
    """A copy of a base with an adapter in its weights, as PEFT's ``merge_and_unload`` makes it.

    Args:
        base: of any head.
        adapter: must fit it.
        labels: names of the classes, where the adapter brings a head of its own.
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
            if used[id(modules[path].weight)] > 1:  # tied to another, which PEFT leaves as it is
                modules[path].weight = torch.nn.Parameter(modules[path].weight.clone())
            weight = modules[path].weight
            weight.copy_(weight.float() + _update(modules[path], pair).to(weight.device))
    _say_what_is_tied(model)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
    return model


def _say_what_is_tied(model: PreTrainedModel) -> None:
    """Ties again what is the same, and has the configuration say where something tied is not any more."""
    import torch

    by_name = dict(model.named_parameters(remove_duplicate=False))
    pairs = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if pairs and by_name.keys() >= {*pairs, *pairs.values()}:
        if all(torch.equal(by_name[one], by_name[other]) for one, other in pairs.items()):
            model.tie_weights()
        elif not getattr(model.config, "is_encoder_decoder", False):  # of these, some scale by it what the head gets
            model.config.tie_word_embeddings = False


def merge_saved_bases(adapter: Adapter, base: torch.nn.Module) -> Adapter:
    """An adapter of which no linear is both updated and saved whole.

    PEFT saves what lies beneath a LoRA on a head or on embeddings: where that is as the base has it, the LoRA alone is
    left; else the saved linear takes the update.

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
    """B A as a module stores its weight: (d_out, d_in), or transposed in a Conv1D; in single precision."""
    import torch

    update = pair[1].float() @ pair[0].float()
    return update if isinstance(module, torch.nn.Linear) else update.T


def linear_sizes(module: torch.nn.Module | None) -> tuple[int, int] | None:
    """(d_in, d_out) of a Linear or of GPT-2's Conv1D, which stores its weight transposed; else None."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def adapter_weights_file(folder: Path) -> Path | None:
    """An adapter's safetensors, PEFT's or L-LoRA's; None where there are none."""
    names = ("adapter_model.safetensors", f"{LINEARIZED}.safetensors")
    return next((folder / name for name in names if own_file(folder / name)), None)


def _tensors(folder: Path, name: str, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """All tensors of the adapter's one weight file."""
    safe, pickled = adapter_weights_file(folder), folder / "adapter_model.bin"
    if safe is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(safe)
        except SafetensorError as error:
            raise FusionError(f"Adapter {name}: {safe.name} cannot be read ({error}).") from None
    if not own_file(pickled):
        raise FusionError(f"Adapter {name} has no adapter_model.safetensors.")
    if not allow_pickle:
        raise FusionError(
            f"Adapter {name} has only pickle weights (adapter_model.bin).",
            hint="pass allow_pickle=True if you trust its author",
        )
    import torch

    tensors: dict[str, torch.Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
    return tensors
