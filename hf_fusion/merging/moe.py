"""Dense models side by side as one mixture of experts: Llamas or Mistrals become a Mixtral (`methods.moe.moe`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError, shown
from hf_fusion.hub.adapters import read_json
from hf_fusion.merging.checkpoint import Files, own_file
from hf_fusion.merging.engine import Target
from hf_fusion.merging.methods import method_named
from hf_fusion.merging.output import Spec
from hf_fusion.merging.plan import Plan, stored_as
from hf_fusion.merging.schema import arguments_at
from hf_fusion.merging.sources import Model
from hf_fusion.merging.tensors import Combination, InMemory, Tensors
from hf_fusion.merging.unions import tokenizer_of
from hf_fusion.recipe import DTYPES, Recipe, RecipeExpert

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# what a Mixtral has in common with a Llama, by name
_KEPT = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj|input_layernorm|post_attention_layernorm)\.weight"
)
_MLP = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.weight")
_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
# old checkpoints hold these; they follow from the configuration
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
EMBEDDING = "model.embed_tokens.weight"

# what a configuration means by saying nothing: Mixtral means something else
_SILENT: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu", "sliding_window": None},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_DROPPED = ("attention_bias", "mlp_bias", "pretraining_tp", "auto_map", "torch_dtype", "_name_or_path")


def plan_moe(recipe: Recipe, base: Model | None, experts: Sequence[Model]) -> Plan:
    """Decides what the mixture's tensors are made of.

    Args:
        recipe: of the method ``moe``, which `check_recipe` has let through.
        base: the model whose attention, norms and embeddings are taken; None: the first expert's.
        experts: the models whose MLPs become experts.

    Raises:
        FusionError: the models are no Llamas or Mistrals, or not of one size; there are fewer experts than each token
            needs; prompts are given without their gate, or missing for it.
    """
    if recipe.slices or recipe.tokenizer:
        key = "slices" if recipe.slices else "tokenizer"
        raise FusionError(f"moe makes its experts of whole models: {key} is not supported", "leave it out")
    method = method_named(recipe.method)
    first = base or experts[0]
    arguments = arguments_at(method.parameters, [recipe.parameters], [[] for _ in experts], "gate", 0.0)
    if arguments["experts_per_token"] > len(experts):
        raise FusionError(
            f"each token is answered by {arguments['experts_per_token']} experts, the recipe has {len(experts)}",
            "set experts_per_token, or list an expert more than once",
        )
    files = Files()
    config = _config(first, len(experts), arguments["experts_per_token"], recipe.dtype)
    directions = _directions(recipe, first, arguments["gate"], files)
    targets: list[Target] = []
    for name, entry in first.entries.items():
        spec = partial(Spec, dtype=stored_as(recipe.dtype, entry.dtype), shape=first.shape(name))
        if match := _MLP.fullmatch(name):
            layer, kind = match[1], _NAMES[match[2]]
            for number, expert in enumerate(experts):
                if name not in expert.entries or expert.shape(name) != first.shape(name):
                    found = list(expert.shape(name)) if name in expert.entries else "missing"
                    raise FusionError(f"{expert.name}: {name} is {found}, in {first.name} {list(first.shape(name))}")
                own = spec(f"{layer}.block_sparse_moe.experts.{number}.{kind}.weight")
                targets.append(_as_it_is(own, expert, name, files))
            if kind == "w1":
                gate = Spec(f"{layer}.block_sparse_moe.gate.weight", spec.keywords["dtype"], _shape(experts, first))
                targets.append(_gate(gate, directions, method.function, arguments, recipe.parameters.get("seed", 0)))
        elif _KEPT.fullmatch(name):
            targets.append(_as_it_is(spec(name), first, name, files))
        elif not _DERIVED.fullmatch(name):
            raise FusionError(f"{first.name} has {name}, which a Mixtral has no place for")
    return Plan(recipe, method, base, list(experts), targets, files, [], config)


def _shape(experts: Sequence[Model], first: Model) -> tuple[int, int]:
    return len(experts), first.config["hidden_size"]


def _as_it_is(spec: Spec, model: Model, name: str, files: Files) -> Target:
    """A model's tensor, in the mixture's type."""
    entry = model.entries[name]
    if model.adapter is None and entry.dtype == spec.dtype:
        return Target(spec, copied=entry, described=[model.name, name])

    def make() -> tuple[Tensors, Any]:
        return Tensors(spec.name, None, [model.reader(name, files)]), Combination(0.0, [1.0])

    return Target(spec, make, described=[model.name, name])


def _gate(spec: Spec, directions: torch.Tensor, function: Any, arguments: dict[str, Any], seed: int) -> Target:
    """A layer's router."""

    def make() -> tuple[Tensors, Any]:
        tensors = Tensors(spec.name, None, [InMemory(row) for row in directions], seed)
        return tensors, function(tensors, **arguments)

    return Target(spec, make, described=["moe", arguments, seed, directions.tolist()])


def _config(model: Model, experts: int, per_token: int, dtype: str | None) -> dict[str, Any]:
    """The base's configuration as a Mixtral's."""
    kind = model.config.get("model_type")
    if kind not in _SILENT:
        raise FusionError(f"{model.name} is a {shown(kind)}: only {' and '.join(_SILENT)} become a Mixtral")
    if missing := [key for key in _SIZES if type(model.config.get(key)) is not int]:
        raise FusionError(f"{model.name}: config.json has no {missing[0]}")
    config = {key: value for key, value in model.config.items() if key not in _DROPPED}
    if kind == "llama":
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if not config.get("rope_parameters"):
        config.setdefault("rope_theta", 10_000.0)
    config = _SILENT[kind] | config
    stored = model.config.get("dtype", model.config.get("torch_dtype"))
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        **({"dtype": dtype or stored} if dtype or stored else {}),
    }


# ---------------------------------------------------------------- prompts


def _directions(recipe: Recipe, first: Model, gate: str, files: Files) -> torch.Tensor:
    """What each expert is chosen for, (K, d): by its prompts, or nothing."""
    prompts = [[_texts(expert, key) for key in ("prompts", "negative_prompts")] for expert in recipe.experts]
    directions = torch.zeros(len(recipe.experts), first.config["hidden_size"])
    if gate != "embedding":
        if any(texts for own in prompts for texts in own):
            raise FusionError(f"prompts are of no use to gate: {gate}", "set gate: embedding, or leave them out")
        return directions
    cut, begin = _tokenizer(first)
    table = first.reader(EMBEDDING, files)

    def direction(texts: Sequence[str]) -> torch.Tensor:
        total = torch.zeros(directions.shape[1])
        row = torch.empty_like(total)
        for text in texts:
            for token in cut.encode(begin + text, add_special_tokens=False).ids:
                if token >= table.shape[0]:
                    raise FusionError(f"{first.name} has no embedding of token {token}, which its tokenizer makes")
                table.read(token * len(row), row)
                total += row
        return total / total.norm().clamp(min=1e-8)

    for expert, own, (positive, negative) in zip(recipe.experts, directions, prompts, strict=True):
        if not positive:
            raise FusionError(f"{expert.model} has no prompts, which gate: embedding needs", "prompts: [a text like …]")
        own.copy_(direction(positive) - (direction(negative) if negative else 0))
        own.div_(own.norm().clamp(min=1e-8))
    return directions


def _texts(expert: RecipeExpert, key: str) -> list[str]:
    texts = expert.parameters.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FusionError(f"{expert.model}: {key} is {shown(texts)}, expected texts")
    return texts


def _tokenizer(model: Model) -> tuple[Tokenizer, str]:
    """A model's tokenizer, and what texts begin with."""
    file = model.folder / "tokenizer.json"
    if not own_file(file):
        raise FusionError(f"{model.name} has no tokenizer.json", "load its tokenizer with transformers and save it")
    added = read_json(file, model.name).get("added_tokens") or []
    found = tokenizer_of(file.read_text(encoding="utf-8"), added, model.name)
    found.no_padding()
    found.no_truncation()
    settings = model.folder / "tokenizer_config.json"
    begin = read_json(settings, model.name).get("bos_token") if own_file(settings) else None
    begin = begin.get("content") if isinstance(begin, dict) else begin
    return found, begin if isinstance(begin, str) else ""


# ---------------------------------------------------------------- mergekit-moe

_GATES = {"cheap_embed": "embedding", "random": "random", "uniform_random": "uniform"}
_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts")


def from_mergekit_moe(content: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of mergekit-moe's as one of ours.

    Args:
        content: as YAML gives it.
        name: what errors call the file.

    Raises:
        FusionError: naming the file and the key that is wrong or not supported.
    """
    from hf_fusion.merging.mergekit import model_name

    def refuse(key: str, expected: str) -> FusionError:
        return FusionError(f"{name}: {key} is not supported", expected)

    if unknown := [key for key in content if key not in _KEYS]:
        raise refuse(str(unknown[0]), f"use {', '.join(_KEYS)}")
    if content.get("architecture") not in (None, "mixtral"):
        raise refuse(f"architecture: {shown(content['architecture'])}", "architecture: mixtral")
    gate = content.get("gate_mode", "hidden")
    if not isinstance(gate, str) or gate not in _GATES:
        raise refuse(f"gate_mode: {shown(gate)}", f"no model is run here: use {', '.join(_GATES)}")
    dtype = content.get("dtype")
    dtype = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if dtype not in (None, *DTYPES):
        raise FusionError(f"{name}: dtype is {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(content["experts"], list) or not content["experts"]:
        raise FusionError(f"{name}: experts is {shown(content['experts'])}, expected a list")
    experts = []
    for number, entry in enumerate(content["experts"]):
        key = f"experts[{number}]"
        if not isinstance(entry, Mapping):
            raise FusionError(f"{name}: {key} is {shown(entry)}, expected {{source_model: …}}")
        if unknown := [own for own in entry if own not in _EXPERT]:
            raise refuse(f"{key}.{unknown[0]}", f"use {', '.join(_EXPERT)}")
        # prompts are of no use to random gates: mergekit does not look at them
        own = {"prompts": entry.get("positive_prompts"), "negative_prompts": entry.get("negative_prompts")}
        own = {k: v for k, v in own.items() if v and _GATES[gate] == "embedding"}
        experts.append(RecipeExpert(model_name(entry.get("source_model"), f"{name}: {key}.source_model"), None, own))
    parameters = {"gate": _GATES[gate], "experts_per_token": content.get("experts_per_token", 2)}
    base = model_name(content.get("base_model"), f"{name}: base_model")
    return Recipe("moe", tuple(experts), base, parameters, dtype)
