"""From loaded experts to a plan: the dense model with its other tensors merged, and task vectors on demand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from .assembly_wemoe import (
    OWN_HEADS,
    ExpertSource,
    UnchangedLinearsError,
    check_experts,
    check_ties,
    find_units,
    head_paths,
    low_rank,
    merge_rest,
    part_of,
    pruned,
    renamed,
    tied_groups,
)
from .configuration_wemoe import ARITHMETIC, LOW_RANK, WEMoEConfig
from .fused_adapters import refuse_tied
from .fused_heads import head_of, labels_of
from .linears_wemoe import UpscaledLinear, rows_of_block

HEADS = ("task", "shared", "base")
WHOLE = (
    "exact",
    "bfloat16",
)  # task vectors that may be relative to any weights, as after another merge than `ARITHMETIC`

# (method, its λ or None for its default, base's tensors, each expert's) → name → merged tensor, and the λ
StaticMerge = Callable[
    [str, float | None, Mapping[str, torch.Tensor], Sequence[Mapping[str, torch.Tensor]]],
    tuple[Mapping[str, torch.Tensor], float],
]


@dataclass
class BuildPlan:
    """Everything needed to fill a model.

    Attributes:
        config: of the model.
        backbone: the dense model with its other tensors merged; linears to up-scale are still those of the base.
        base: tensors of the base by the dense model's names.
        sources: the experts.
        processor: tokenizer or image processor.
        factors: path → (A, B) of each expert, for low rank.
    """

    config: WEMoEConfig
    backbone: Any
    base: Mapping[str, torch.Tensor]
    sources: list[ExpertSource]
    processor: Any
    factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def vectors(self, path: str, conv1d: bool) -> Iterator[torch.Tensor]:
        """Yields the experts' task vectors of a linear's weight, (d_out, d_in)."""
        weight = self.base[f"{path}.weight"]
        for source in self.sources:
            vector = source.vector(f"{path}.weight", weight, conv1d)
            vector = torch.zeros_like(weight, dtype=torch.float32) if vector is None else vector
            yield vector.t() if conv1d else vector

    def fill(self, path: str, linear: UpscaledLinear) -> None:
        """Fill one linear, tensor by tensor."""
        weight = self.base[f"{path}.weight"]
        vectors: Any = self.factors.pop(path, None)
        if vectors is None:
            vectors = self.vectors(path, linear.conv1d)
        if linear.kind == "sparse":
            vectors = (pruned(vector, self.config.density) for vector in vectors)
        linear.fill(weight.t() if linear.conv1d else weight, vectors)
        if linear.biases is not None:
            bias = self.base[f"{path}.bias"]
            linear.fill_biases(bias, [source.vector(f"{path}.bias", bias) for source in self.sources])

    def check(self) -> None:
        """The checks that need all tensors read."""
        for source in self.sources:
            source.check_relation()


def check_options(experts: Sequence[Any], **options: Any) -> None:
    """Check the arguments of `from_experts` before anything is loaded.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    if not experts:
        raise ValueError("a fusion needs at least one expert; the list is empty")
    for name in ("scaling", "density", "top_k", "gate_rank"):
        value = options.get(name, 1)
        if name == "scaling" and value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, not a number")
    known = ("task_vectors", "routing", "router_layers", "density")
    WEMoEConfig(**{name: options[name] for name in known if name in options})
    if not isinstance(modules := options.get("modules", "mlp"), str):
        raise ValueError(f"modules is {modules!r}, not a name or a regular expression")
    if options.get("heads", "task") not in HEADS:
        raise ValueError(f"heads is {options['heads']!r}; it must be one of {', '.join(HEADS)}")
    kind = options.get("task_vectors", "exact")
    if (merge := options.get("merge", ARITHMETIC)) != ARITHMETIC and (
        kind not in WHOLE or options.get("routing") == "smile"
    ):
        raise ValueError(
            f"merge={merge!r} needs task_vectors={' or '.join(map(repr, WHOLE))}: relative to that merge, task vectors "
            "are neither sparse nor of low rank"
        )
    rank, energy = options.get("rank"), options.get("energy")
    if kind in LOW_RANK:
        if (rank is None) == (energy is None):
            raise ValueError(f"task_vectors={kind!r} needs either rank= or energy=")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank is {rank!r}; it must be a whole number above 0")
        if energy is not None and not (isinstance(energy, (int, float)) and 0 < energy <= 1):
            raise ValueError(f"energy is {energy!r}; it must be above 0 and at most 1")
    elif rank is not None or energy is not None:
        raise ValueError("rank and energy are for task_vectors='low-rank'")


@dataclass
class AlignedExperts:
    """Compatible experts of one base, with the same names of tensors.

    Attributes:
        template: the model whose structure a fusion of them has.
        head: of it, one of `AUTO_CLASSES`.
        paths: modules of a classifier's head, with one copy per expert.
        base: tensors of the base by the template's names.
        sources: the experts.
        row: id and revision of the base.
    """

    template: Any
    head: str
    paths: list[str]
    base: dict[str, torch.Tensor]
    sources: list[ExpertSource]
    row: dict[str, Any]


def align_experts(experts: Sequence[Any], base: Any) -> AlignedExperts:
    """Check that loaded experts have one base, and give their tensors the same names.

    Args:
        experts: each with name, model, adapter, labels, revision, license, task and processor.
        base: the loaded base; None if all experts are adapters.

    Raises:
        ValueError: experts do not fit; the message names the expert, the tensor and the reason.
    """
    base_model, config_base = _base_of(experts, base)
    template, part = _template(experts, base_model)
    head = head_of(template)
    paths = head_paths(template, head)
    state = template.state_dict()
    known = renamed(base_model.state_dict(), base_model, template)
    sources = [_source(expert, template, part, head) for expert in experts]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two experts called {twice}")
    in_heads = tuple(f"{path}." for path in paths)
    if missing := sorted(key for key in state if key not in known and not (in_heads and key.startswith(in_heads))):
        raise ValueError(
            f"the base {type(base_model).__name__} lacks {len(missing)} tensors of the experts' "
            f"{type(template).__name__}, first {missing[0]}"
        )
    known = {key: tensor for key, tensor in known.items() if key in state}
    check_experts(sources, known, paths)
    check_ties(sources, tied_groups(state if template is base_model else known))
    return AlignedExperts(template, head, paths, known, sources, config_base)


def make_plan(
    experts: Sequence[Any], base: Any, options: Mapping[str, Any], static_merge: StaticMerge | None = None
) -> BuildPlan:
    """Check loaded experts, and merge all tensors that are not up-scaled.

    Args:
        experts: each with name, model, adapter, labels, revision, license, task and processor.
        base: the loaded base; None if all experts are adapters.
        options: of `WEMoEModel.from_experts`.
        static_merge: merges by any other method than task arithmetic; needed for those alone.

    Raises:
        ValueError: experts do not fit; the message names the expert, the tensor and the reason.
    """
    aligned = align_experts(experts, base)
    template, head, paths, known, sources = aligned.template, aligned.head, aligned.paths, aligned.base, aligned.sources
    state = template.state_dict()
    units, modules = [], dict(template.named_modules())
    for name, linears in find_units(template, options["modules"]):
        if any(source.changes(path, known[f"{path}.weight"]) for source in sources for path in linears):
            units.append({"name": name, "paths": linears, "sizes": [None] * len(linears)})
    if not units:
        raise UnchangedLinearsError("no expert differs from the base in what would be up-scaled")

    heads = options["heads"] if paths else "base"
    per_task = paths if heads == "task" else []
    if heads == "shared" and len({tuple(source.row["labels"]) for source in sources}) > 1:
        raise ValueError("experts have different labels: no single head can serve them; leave heads='task'")
    if heads == "base" and paths and not all(f"{key}" in known for key in state):
        raise ValueError("heads='base', but the base has no head")
    scaling = options["scaling"]
    if options["merge"] != ARITHMETIC:
        if static_merge is None:
            raise ValueError(f"merge={options['merge']!r} needs hf_fusion installed: pip install hf_fusion")
        conv = {f"{path}.weight" for path, module in modules.items() if isinstance(module, Conv1D)}
        states = [_state(source, known, conv) for source in sources]
        merged, scaling = static_merge(options["merge"], scaling, known, states)
        known = {name: merged[name].to(tensor.dtype) for name, tensor in known.items()}
    options = {**options, "scaling": 0.3 if scaling is None else scaling}
    config = _config(template, head, aligned.row, sources, units, per_task, options)
    if options["shared_router"] and len(widths := {_sizes(modules[unit["paths"][0]])[0] for unit in units}) > 1:
        raise ValueError(f"shared_router=True, but what routers read is {sorted(widths)} wide")

    plan = BuildPlan(config, None, known, sources, experts[0].processor or getattr(base, "processor", None))
    _measure_sizes(plan, units, modules, options)
    plan.backbone = _merged_template(plan, template, units, per_task, heads, options, modules)
    return plan


def _state(source: ExpertSource, base: Mapping[str, torch.Tensor], conv: Collection[str]) -> dict[str, torch.Tensor]:
    """All tensors of an expert, by the names of the base; a linear in `conv` is stored transposed."""
    state = {}
    for name, tensor in base.items():
        vector = source.vector(name, tensor, name in conv) if tensor.is_floating_point() else None
        state[name] = tensor if vector is None else tensor.float() + vector
    return state


def _base_of(experts: Sequence[Any], base: Any) -> tuple[Any, dict[str, Any]]:
    """The base's model, its id and revision."""
    if base is not None:
        return base.model, {"id": base.name, "revision": base.revision}
    adapters = [expert for expert in experts if expert.adapter is not None]
    for expert in adapters[1:]:
        first, adapter = adapters[0].adapter, expert.adapter
        if adapter.base and first.base and adapter.base != first.base:
            raise ValueError(f"{expert.name} adapts {adapter.base}, the others {first.base}")
        if adapter.base_revision and first.base_revision and adapter.base_revision != first.base_revision:
            raise ValueError(
                f"{expert.name} adapts {adapter.base} at {adapter.base_revision}, not at {first.base_revision}"
            )
    if len(adapters) < len(experts):
        full = next(expert.name for expert in experts if expert.adapter is None)
        raise ValueError(f"{full} is a full model: pass base=, the model that it was fine-tuned from")
    adapter = adapters[0].adapter
    return adapters[0].model, {"id": adapter.base, "revision": adapter.base_revision}


def _template(experts: Sequence[Any], base: Any) -> tuple[Any, str]:
    """The model whose structure the fusion has, and where in it the experts are."""
    models = [expert.model for expert in experts]
    for expert in experts[1:]:
        if type(expert.model) is not type(models[0]):
            raise ValueError(
                f"{expert.name} is a {type(expert.model).__name__}, {experts[0].name} a {type(models[0]).__name__}"
            )
    part = part_of(base, models[0])
    same = type(base) is type(models[0]) and not head_of(base).endswith(OWN_HEADS)
    return (base if part or same else models[0]), part


def _source(expert: Any, template: Any, part: str, head: str) -> ExpertSource:
    model, adapter = expert.model, expert.adapter
    labels = list(expert.labels)
    if head.endswith(OWN_HEADS) and not labels:
        labels = labels_of(model)
    row = {
        "name": expert.name,
        "revision": expert.revision,
        "license": expert.license,
        "task": expert.task,
        "labels": labels,
        "adapter": adapter is not None,
        "part": part,
    }
    if adapter is None:
        return ExpertSource(row, renamed(model.state_dict(), model, template, part))
    refuse_tied(expert)
    in_heads = tuple(f"{path}." for path in head_paths(model, head))
    heads = {key: tensor for key, tensor in model.state_dict().items() if in_heads and key.startswith(in_heads)}
    heads |= adapter.saved
    lora = {f"{path}.weight": pair for path, pair in adapter.lora.items()}
    for key in [key for key in lora if key in heads]:  # its own copy of the module takes the update
        a, b = lora.pop(key)
        heads[key] = (heads[key].float() + b.float() @ a.float()).to(heads[key].dtype)
    pairs = renamed(lora, model, template, part)
    return ExpertSource(
        row, renamed(heads, model, template, part), {key.removesuffix(".weight"): pair for key, pair in pairs.items()}
    )


def _sizes(linear: Any) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _config(
    template: Any,
    head: str,
    base: dict[str, Any],
    sources: Sequence[ExpertSource],
    units: list[dict[str, Any]],
    per_task: list[str],
    options: Mapping[str, Any],
) -> WEMoEConfig:
    names = [source.name for source in sources]
    default = options["default_task"] or names[0]
    if default not in names:
        raise ValueError(f"default_task is {default!r}; it must be one of {', '.join(names)}")
    passed = (
        "task_vectors",
        "density",
        "routing",
        "router_layers",
        "shared_router",
        "batch_reduce",
        "scaling",
        "merge",
    )
    config = WEMoEConfig(
        head=head,
        backbone={k: v for k, v in template.config.to_dict().items() if k not in ("dtype", "_name_or_path")},
        base=base,
        experts=[{k: v for k, v in source.row.items() if k != "part"} for source in sources],
        units=units,
        task_heads=per_task,
        default_task=default if per_task else None,
        num_experts_per_tok=options["top_k"],
        gate_rank=options["gate_rank"],
        is_encoder_decoder=bool(getattr(template.config, "is_encoder_decoder", False)),
        **{name: options[name] for name in passed},
    )
    if head.endswith(OWN_HEADS):
        config.id2label, config.label2id = template.config.id2label, template.config.label2id
    return config


def _measure_sizes(
    plan: BuildPlan, units: list[dict[str, Any]], modules: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Sizes needed to create each linear: ranks (and the energy kept), numbers of entries or rows."""
    kind = plan.config.task_vectors
    for unit in units:
        for index, path in enumerate(unit["paths"]):
            if kind == "sparse":
                size = modules[path].weight.numel()
                unit["sizes"][index] = len(plan.sources) * max(1, round(options["density"] * size))
            elif kind == "bfloat16":
                unit["sizes"][index] = rows_of_block(*_sizes(modules[path]))
            elif kind in LOW_RANK:
                vectors = plan.vectors(path, isinstance(modules[path], Conv1D))
                parts = [low_rank(vector, options["rank"], options["energy"]) for vector in vectors]
                plan.factors[path] = [(a, b) for a, b, _ in parts]
                unit["sizes"][index] = [len(a) for a, _, _ in parts]
                unit.setdefault("energy", []).append(sum(energy for _, _, energy in parts) / len(parts))


def _merged_template(
    plan: BuildPlan,
    template: Any,
    units: Sequence[Mapping[str, Any]],
    per_task: Sequence[str],
    heads: str,
    options: Mapping[str, Any],
    modules: Mapping[str, Any],
) -> Any:
    """A copy of the template with merged tensors; unchanged tensors are shared with it."""
    upscaled = {f"{path}.{leaf}" for unit in units for path in unit["paths"] for leaf in ("weight", "bias")}
    in_heads = tuple(f"{path}." for path in per_task)
    tensors = {**dict(template.named_parameters()), **dict(template.named_buffers())}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors.values()}
    saved = template.state_dict(keep_vars=True)
    rest = [k for k in tensors if k in saved and k not in upscaled and not (in_heads and k.startswith(in_heads))]
    sources = plan.sources if heads != "base" else [_without_heads(s, template, plan.config.head) for s in plan.sources]
    transposed = lambda key: isinstance(modules.get(key.rpartition(".")[0]), Conv1D)  # noqa: E731
    absent = {
        key: torch.stack([s.tensors[key].float() for s in sources]).mean(0) for key in rest if key not in plan.base
    }
    known = {**plan.base, **{key: mean.to(saved[key].dtype) for key, mean in absent.items()}}
    merged = merge_rest(rest, known, sources, plan.config.start, transposed)
    for key, tensor in merged:
        tensor = tensor.to(tensors[key].dtype)
        is_parameter = isinstance(tensors[key], torch.nn.Parameter)
        memo[id(tensors[key])] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    return copy.deepcopy(template, memo)


def _without_heads(source: ExpertSource, template: Any, head: str) -> ExpertSource:
    in_heads = tuple(f"{path}." for path in head_paths(template, head))
    kept = {key: tensor for key, tensor in source.tensors.items() if not (in_heads and key.startswith(in_heads))}
    return ExpertSource(source.row, kept, source.lora)


__all__ = ["AlignedExperts", "BuildPlan", "check_options", "make_plan", "align_experts"]
