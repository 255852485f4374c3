"""Plans a mixture of experts from dense models, such as a Mixtral from Llamas (`methods.moe.moe`)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.merging.engine.checkpoint import OpenFiles
from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.engine.output import TensorSpec
from hf_fusion.merging.engine.stream import Target
from hf_fusion.merging.engine.tensors import Chunk, Combination, MemoryReader, Tensors
from hf_fusion.merging.methods import method_named
from hf_fusion.merging.moe.mixtures import MIXTURES, Mixture
from hf_fusion.merging.moe.prompt_directions import PromptDirections
from hf_fusion.merging.plan import Plan, output_dtype
from hf_fusion.merging.settings import arguments_at
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.schema import KeyPath, read

_MLP = re.compile(r"(model\.layers\.(\d+))\.mlp\.(gate|up|down)_proj\.weight")
# stored in old checkpoints; derived from the configuration
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_DROPPED = {"attention_bias", "mlp_bias", "pretraining_tp", "auto_map", "torch_dtype", "_name_or_path"}
_DROPPED |= {"layer_types", "max_window_layers"}  # of Qwen3, whose layers are alike


def plan_moe(recipe: Recipe, base: Model | None, experts: Sequence[Model]) -> Plan:
    """Plans the tensors of a mixture.

    Args:
        recipe: of the method ``moe``, checked by `check_recipe`.
        base: provides attention, norms and embeddings; None: the first expert.
        experts: the models whose MLPs become experts.

    Raises:
        FusionError: the models are unsupported or of different sizes, there are fewer experts than per token, or
            prompts and gate do not match.
    """
    if recipe.slices or recipe.tokenizer:
        key = "slices" if recipe.slices else "tokenizer"
        raise FusionError(f"moe merges whole models: {key} is not supported", "leave it out")
    method = method_named(recipe.method)
    first = base or experts[0]
    arguments = arguments_at(method.parameters, [recipe.parameters], [[] for _ in experts], "gate", 0.0)
    if arguments["experts_per_token"] > len(experts):
        raise FusionError(
            f"each token needs {arguments['experts_per_token']} experts, the recipe has {len(experts)}",
            "set experts_per_token, or list an expert more than once",
        )
    files = OpenFiles()
    mixture = _mixture(first, arguments["architecture"])
    config = _config(mixture, first, len(experts), arguments["experts_per_token"], recipe.dtype)
    directions, seed = PromptDirections(recipe, first, arguments["gate"], files), recipe.parameters.get("seed", 0)
    kept = mixture.kept
    targets: list[Target] = []
    for name, entry in first.entries.items():
        spec = partial(TensorSpec, dtype=output_dtype(recipe.dtype, entry.dtype), shape=first.shape(name))
        if match := _MLP.fullmatch(name):
            place, kind = f"{match[1]}.{mixture.mlp}", mixture.names[match[3]]
            for number, (expert, given) in enumerate(zip(experts, recipe.experts, strict=True)):
                if name not in expert.entries or expert.shape(name) != first.shape(name):
                    found = list(expert.shape(name)) if name in expert.entries else "missing"
                    raise FusionError(f"{expert.name}: {name} is {found}, in {first.name} {list(first.shape(name))}")
                own = spec(f"{place}.experts.{number}.{kind}.weight")
                noise = _number(given, "noise_scale", 0.0)
                scale = _number(given, "residual_scale", 1.0) if match[3] == "down" else 1.0
                targets.append(_as_it_is(own, expert, name, files, noise, scale, seed))
            if match[3] == "gate":
                gate = TensorSpec(
                    f"{place}.gate.weight", spec.keywords["dtype"], (len(experts), first.config["hidden_size"])
                )
                targets.append(_gate(gate, directions, int(match[2]), method.function, arguments, seed))
        elif kept.fullmatch(name):
            targets.append(_as_it_is(spec(name), first, name, files))
        elif not _DERIVED.fullmatch(name):
            raise FusionError(f"{first.name} has {name}, which a {mixture.title} does not have")
    return Plan(recipe, method, base, list(experts), targets, files, [], config)


def _number(expert: RecipeExpert, key: str, default: float) -> float:
    return float(read(float, expert.parameters.get(key, default), KeyPath(expert.model, key)))


def _as_it_is(
    spec: TensorSpec, model: Model, name: str, files: OpenFiles, noise: float = 0.0, scale: float = 1.0, seed: int = 0
) -> Target:
    """A model's tensor in the mixture's dtype, plus Gaussian noise with standard deviation `noise`, times `scale`."""
    entry = model.entries[name]
    if model.adapter is None and entry.dtype == spec.dtype and not noise and scale == 1:
        return Target(spec, copied=entry, identity=[model.name, name])

    def noisy(chunk: Chunk) -> torch.Tensor:
        drawn = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode()), chunk.index]))
        values = torch.from_numpy(drawn.standard_normal(chunk.size, dtype=np.float32))
        return values.mul_(noise).add_(chunk.expert(0)).mul_(scale)

    def make() -> tuple[Tensors, Any]:
        tensors = Tensors(spec.name, None, [model.reader(name, files)], seed)
        return tensors, noisy if noise else Combination(0.0, [scale])

    return Target(spec, make, identity=[model.name, name, noise, scale, seed])


def _gate(
    spec: TensorSpec,
    directions: PromptDirections,
    layer: int,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    seed: int,
) -> Target:
    """A layer's router."""

    def make() -> tuple[Tensors, Any]:
        tensors = Tensors(spec.name, None, [MemoryReader(row) for row in directions.of(layer)], seed)
        return tensors, function(tensors, **arguments)

    return Target(spec, make, identity=["moe", arguments, seed, directions.described], memory=directions.held)


def _mixture(model: Model, wanted: str) -> Mixture:
    """The mixture that a model can become."""
    kind = model.config.get("model_type")
    found = {name: mixture for name, mixture in MIXTURES.items() if kind in mixture.sources}
    if not found:
        known = [source for mixture in MIXTURES.values() for source in mixture.sources]
        raise FusionError(f"{model.name} is a {shown(kind)}, for which there is no mixture", suggestion(kind, known))
    if wanted != "auto" and wanted not in found:
        raise FusionError(
            f"{model.name} is a {shown(kind)}, which cannot become a {wanted}", f"architecture: {min(found)}"
        )
    if model.config.get("use_sliding_window"):
        raise FusionError(f"{model.name}: a mixture cannot have layers with and without a sliding window")
    return next(iter(found.values()))


def _config(mixture: Mixture, model: Model, experts: int, per_token: int, dtype: str | None) -> dict[str, Any]:
    """The mixture's configuration, from the base's."""
    if missing := [key for key in _SIZES if type(model.config.get(key)) is not int]:
        raise FusionError(f"{model.name}: config.json has no {missing[0]}")
    kind = model.config["model_type"]
    config = {key: value for key, value in model.config.items() if key not in _DROPPED}
    if kind == "llama":
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if not config.get("rope_parameters"):
        config.setdefault("rope_theta", 10_000.0)
    config = {**mixture.sources[kind], **config, **mixture.more(config)}
    stored = model.config.get("dtype", model.config.get("torch_dtype"))
    return config | {
        "architectures": [mixture.architecture],
        "model_type": mixture.model_type,
        mixture.count: experts,
        "num_experts_per_tok": per_token,
        **({"dtype": dtype or stored} if dtype or stored else {}),
    }
