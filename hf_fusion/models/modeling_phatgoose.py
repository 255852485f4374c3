"""PHATGOOSE: routes each token, at each linear, among LoRA experts by gates trained post hoc (arXiv 2402.05859)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .assembly_phatgoose import (
    PreparedExpert,
    check_options,
    complete_heads,
    fill_head,
    fill_linears,
    fill_point,
    label_union,
    linear_sizes,
    module_sets,
    plan_profiles,
    prepare_experts,
)
from .configuration_phatgoose import HEADS, PhatgooseConfig
from .context_phatgoose import DECAY
from .export_phatgoose import save_merged_adapter
from .fused import FusedPreTrainedModel
from .fused_backbone import BackboneMixin, new_backbone, with_arguments_of
from .fused_config import GENERATING
from .fused_generation import GeneratingMixin, common_generation, set_generation
from .fused_heads import head_of
from .fused_loading import explained
from .fused_summary import Summary, described
from .points_phatgoose import POOLED_HEADS, GatePoint, gate_points
from .reference_phatgoose import generation_of, load_by_reference
from .routing_phatgoose import RoutedHead, RoutedLinears
from .running_phatgoose import RunningMixin
from .state_phatgoose import RoutingCalls


class PhatgooseRouter(RunningMixin, BackboneMixin, FusedPreTrainedModel):
    """A base with LoRA experts, among which each token is routed at each linear.

    Build one with `from_experts`, or load a published one with ``AutoModel.from_pretrained(id,
    trust_remote_code=True)`` or the base's Auto class. Inputs and outputs are those of the base.

    `torch.compile` takes its forward as one graph, in training too, and `generate` with a static cache. A compiled
    graph computes padding as well and fetches the A and B of each token's experts: memory grows with tokens times
    top_k times rank. Where experts bring heads, padding counts in their shares.

    Args:
        config: the base's config, the experts and the routing.
        backbone: the base; None builds an empty one, which `from_pretrained` fills.
    """

    config: PhatgooseConfig
    config_class = PhatgooseConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: PhatgooseConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = new_backbone(config)
        self.backbone: Any = backbone
        self.calls = RoutingCalls(config)
        self.record_routing: int = 0
        self._handles: list[Any] = []
        self._groups: list[tuple[list[str], RoutedLinears]] = []
        self._points: dict[str, GatePoint] = {}
        self._heads: dict[str, RoutedHead] = {}
        self.main_input_name = backbone.main_input_name
        self.forward = with_arguments_of(backbone, self)  # type: ignore[method-assign]
        self._install(None)
        self._find_calls()
        self.post_init()

    # ---------------------------------------------------------------- building

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[Any],
        base: Any = None,
        top_k: int = 2,
        temperature: float = 1.0,
        routing: str = "phatgoose",
        missing_gates: str | Mapping[str, str | Path] | None = None,
        base_by_reference: bool = False,
    ) -> PhatgooseRouter:
        """Builds a router of LoRA adapters of one base.

        Args:
            experts: loaded adapters with gates, or ids ("owner/name@revision") and folders, which need hf_fusion
                installed to be resolved.
            base: the adapters' base, if not the recorded one. Its weights are shared, not copied.
            top_k: number of experts per token at each linear.
            temperature: divides the scores before the softmax.
            routing: see `PhatgooseConfig`. "arrow" replaces all gates by Arrow prototypes.
            missing_gates: substitutes for experts without gates, which are refused by default. "arrow": Arrow
                prototypes for all of them, and where the others' gates are Gaussian for these too, since their scores
                cannot be compared; {name of an expert: "arrow", or a folder that `save_gates` wrote}: for
                these alone, for example the average activations that `average_activation` computes from an expert's
                data. The config and the card record where each expert's gates come from.
            base_by_reference: save experts and gates only; the base is fetched at its pinned revision.

        Returns:
            The router, in evaluation mode.

        Raises:
            ValueError: experts do not fit together; the message names the expert and the reason.
        """
        check_options(experts, top_k, temperature, routing, missing_gates)
        resolved = base is None and all(getattr(expert, "adapter", None) is not None for expert in experts)
        if not resolved or missing_gates or routing == "arrow":
            if cls.load_experts is None:
                raise ValueError("ids, folders and missing gates need hf_fusion installed: pip install hf_fusion")
            experts = cls.load_experts(experts, base, missing_gates, routing == "arrow")
        if full := [expert.name for expert in experts if expert.adapter is None]:
            raise ValueError(f"{full[0]} is a full model; PHATGOOSE routes among LoRA adapters")
        model = experts[0].model
        head = head_of(model, HEADS, "routed")
        config = PhatgooseConfig(
            head=head,
            backbone={k: v for k, v in model.config.to_dict().items() if k not in ("dtype", "_name_or_path")},
            base={"id": experts[0].adapter.base, "revision": experts[0].adapter.base_revision},
            base_by_reference=base_by_reference,
            num_experts_per_tok=top_k,
            router_temperature=temperature,
            routing=routing,
            is_encoder_decoder=bool(model.config.is_encoder_decoder),
        )
        gates = [expert.gates for expert in experts if expert.gates is not None]
        if routing == "phatgoose" and gates and all(found.gaussians for found in gates):
            config.gate_points = gate_points(model)
            config.gate_decay = DECAY if head in GENERATING else 0.0
        if head.endswith("classification"):  # the base's classes, if experts have none
            config.id2label, config.label2id = model.config.id2label, model.config.label2id
        if base_by_reference and not (config.base["id"] and config.base["revision"]):
            raise ValueError("base_by_reference needs a base with a pinned revision: base='owner/name@<commit sha>'")
        family = PhatgooseForGeneration if head in GENERATING else PhatgooseRouter
        # The structure is copied, the parameters are shared: a base may be larger than the free memory.
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        router: Any = family(config, copy.deepcopy(model, tensors))
        router.add_experts(experts)
        set_generation(router, common_generation(experts))
        router._processor = experts[0].processor
        return router.eval()

    def add_experts(self, experts: Sequence[Any]) -> None:
        """Adds experts; the router is then the same as one built from all of them at once.

        Args:
            experts: adapters with gates, as `hf_fusion.load_experts` returns them.

        Raises:
            ValueError: an expert does not fit, or its name is taken; the router is then unchanged.
        """
        entries = self._entries() + prepare_experts(experts, self.backbone, self.config, self.experts)
        self._rebuild(entries)

    def remove_experts(self, names: Sequence[str]) -> None:
        """Removes experts; the others keep their order.

        Args:
            names: of the experts to remove.

        Raises:
            ValueError: a name is unknown, or no expert would be left.
        """
        if unknown := [name for name in names if name not in self.experts]:
            raise ValueError(f"there is no expert {unknown[0]!r}; there are {', '.join(self.experts)}")
        entries = [entry for entry in self._entries() if entry.row["name"] not in names]
        if not entries:
            raise ValueError("a router needs at least one expert")
        self._rebuild(entries)

    def _entries(self) -> list[PreparedExpert]:
        """The experts of this model, as views of their tensors."""
        entries = [PreparedExpert({**row}) for row in self.config.experts]
        for paths, group in self._groups:
            for index, expert in enumerate(group.experts):
                for member, path in enumerate(paths):
                    if group.ranks[member][index]:
                        entries[expert].lora[path] = tuple(t.detach() for t in group.slot(member, index))
        for path, point in self._points.items():
            for expert, entry in enumerate(entries):
                entry.points[path] = tuple(t.detach() for t in point.slot(expert))
        for path, head in self._heads.items():
            for index, expert in enumerate(head.experts):
                rows = self._rows_of(expert, path, head.bias.shape[1])
                weights = (head.weight[index, rows], head.bias[index, rows])
                entries[expert].heads[path] = tuple(t.detach() for t in weights)
        for entry in entries:
            entry.replaced = {name: self.backbone.get_parameter(name).detach() for name in self.config.replaced}
        return entries

    def _rows_of(self, expert: int, path: str, width: int) -> list[int]:
        """The rows of a fused head that belong to an expert's labels, in the order of the expert's head."""
        labels, union = self.config.experts[expert]["labels"], label_union(self.config.experts)
        outputs = self.config.profile(expert)["saved"][path]
        return [union.index(label) for label in labels] if len(labels) == outputs <= width else list(range(outputs))

    def _rebuild(self, entries: Sequence[PreparedExpert]) -> None:
        """Replace the experts of this router."""
        self.fusion_recipe = self.config.recipe = None  # they describe the experts before
        with torch.no_grad():
            complete_heads(entries, self.backbone)
            rows, profiles = plan_profiles(entries)
            self.config.experts, self.config.profiles = rows, profiles
            replaced = {name: tensor for entry in entries for name, tensor in entry.replaced.items()}
            for name, tensor in replaced.items():
                owner, _, leaf = name.rpartition(".")
                setattr(self.backbone.get_submodule(owner), leaf, nn.Parameter(tensor.clone()))
            self.config.replaced = sorted({*self.config.replaced, *replaced})
            if union := label_union(rows):
                names = dict(enumerate(union))
                for config in (self.config, self.backbone.config):
                    config.id2label, config.label2id = names, {label: i for i, label in names.items()}
                self.config.backbone |= {"id2label": names, "label2id": self.config.label2id}
                self.backbone.num_labels = len(union)
            self._install(entries)

    def _install(self, entries: Sequence[PreparedExpert] | None) -> None:
        """Insert routed modules as the config describes, filled from `entries`, or empty before loading."""
        self.calls.version += 1
        for handle in self._handles:
            handle.remove()
        for paths, _ in self._groups:
            del self.backbone.get_submodule(paths[0]).experts
        for path in self._points:
            del self.backbone.get_submodule(path).gate_point
        self._handles, self._groups, self._points = [], [], {}
        config, backbone = self.config, self.backbone
        like = {"dtype": backbone.dtype}
        symmetric = [row["gates"] == "arrow" for row in config.experts]
        decisions = self._install_points(entries)
        ranks_of = [config.profile(expert)["ranks"] for expert in range(config.num_experts)]
        for paths, reads_encoder in module_sets(config):
            ranks = [[row.get(path, 0) for row in ranks_of] for path in paths]
            members = [expert for expert, row in enumerate(zip(*ranks, strict=True)) if any(row)]
            linears = [backbone.get_submodule(path) for path in paths]
            sizes = [linear_sizes(linear) for linear in linears]
            group = RoutedLinears(
                sizes[0][0],
                [d_out for _, d_out in sizes],
                members,
                [[row[e] for e in members] for row in ranks],
                [symmetric[e] for e in members],
                self.calls,
                reads_encoder,
                {**like, "device": linears[0].weight.device},
                decisions.get(paths[0]),
            )
            if entries is not None:
                fill_linears(group, paths, [entries[e] for e in members])
            linears[0].add_module("experts", group)
            for member, linear in enumerate(linears):
                self._handles.append(linear.register_forward_hook(partial(_add_update, group, member)))
            self._groups.append((paths, group))
        self._heads = {}
        for path in dict.fromkeys(path for profile in config.profiles for path in profile["saved"]):
            self._heads[path] = head = self._head(path, like)
            if entries is not None:
                fill_head(head, path, entries, self._rows_of)
            backbone.set_submodule(path, head)

    def _install_points(self, entries: Sequence[PreparedExpert] | None) -> dict[str, tuple[int, bool]]:
        """Insert the config's gate points.

        Returns:
            Path of each linear that follows -> index of the last gate point until then, and whether it pools.
        """
        config, backbone = self.config, self.backbone
        pools = config.head in POOLED_HEADS
        indices = {path: index for index, path in enumerate(config.gate_points)}
        # The first input is that of the first block: alone it tells little of a token, but much of an example.
        summed = {index: range(0 if pools else min(index, 1), index + 1) for index in indices.values()}
        last, found = None, {}
        for path, _ in backbone.named_modules():
            last = indices.get(path, last)
            if last is not None:
                found[path] = (last, pools)
        routed = {path for profile in config.profiles for path in profile["ranks"]}
        needed = {other for path in routed & found.keys() for other in summed[found[path][0]]}
        for path, index in indices.items():
            linear = backbone.get_submodule(path)
            ranks = [len(entry.points[path][2]) for entry in entries or []] or [config.gate_rank]
            where = {"dtype": backbone.dtype, "device": linear.weight.device}
            width = linear_sizes(linear)[0]
            point = GatePoint(index, summed[index], width, config.num_experts, max(ranks), pools, self.calls, where)
            if entries is not None:
                fill_point(point, path, entries)
                config.gate_rank = max(ranks)
            linear.add_module("gate_point", point)
            self._points[path] = point
            if index in needed:
                self._handles.append(linear.register_forward_pre_hook(partial(_decide, point)))
        return found

    def _head(self, path: str, like: Mapping[str, Any]) -> RoutedHead:
        """An empty routed head that replaces a base's head."""
        config, old = self.config, self.backbone.get_submodule(path)
        d_in = old.weight.shape[2] if isinstance(old, RoutedHead) else linear_sizes(old)[0]
        widths = {config.profile(e)["saved"].get(path) for e in range(config.num_experts)}
        labels = [row["labels"] for row in config.experts]
        is_final = widths <= {len(names) for names in labels}
        mixes = is_final and any(names != labels[0] for names in labels)
        width = len(label_union(config.experts)) if is_final else max(width for width in widths if width)
        where = {**like, "device": next(old.parameters()).device}
        return RoutedHead(d_in, width, config.num_experts, self.calls, mixes, where)

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with routed updates.

        Args:
            args: positional arguments of the base's forward.
            kwargs: keyword arguments of the base's forward.

        Returns:
            The output of the base's class.
        """
        return self.backbone(*args, **kwargs)

    def summary(self) -> Summary:
        """Describes the router in numbers.

        Returns:
            experts, gates (where each expert's come from), top_k, parameters (all), expert_parameters, routed_linears
            and relative_cost: of the routed linears, per token, as a multiple of the base's.
        """
        base = extra = 0
        top_k = min(self.config.num_experts_per_tok, len(self.experts))
        for paths, group in self._groups:
            sizes = [linear_sizes(self.backbone.get_submodule(path)) for path in paths]
            base += sum(d_in * d_out for d_in, d_out in sizes)
            gates = 0 if group.gates is None else group.gates.numel()
            extra += gates + top_k * group.widest * sum(map(sum, sizes))
        hooked = [p for path, p in self._points.items() if self.backbone.get_submodule(path)._forward_pre_hooks]
        extra += sum(point.mean.numel() + point.directions.numel() for point in hooked)
        routed = [*(group for _, group in self._groups), *self._points.values(), *self._heads.values()]
        return Summary(
            experts=self.experts,
            gates=[row["gates"] for row in self.config.experts],
            top_k=top_k,
            parameters=self.num_parameters(),
            expert_parameters=sum(p.numel() for module in routed for p in module.parameters()),
            routed_linears=sum(len(paths) for paths, _ in self._groups),
            relative_cost=1 + extra / max(base, 1),
        )

    def __repr__(self) -> str:
        config = self.config
        names = [row["name"] for row in config.experts]
        facts = {"base": config.base.get("id"), "head": config.head, "routing": config.routing, "experts": names}
        return described(self, "backbone", **facts, top_k=config.num_experts_per_tok)

    # ---------------------------------------------------------------- loading, saving

    @classmethod
    def _before_loading(cls, name: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """For a base by reference, add the weights of the base at its pinned revision."""
        config = kwargs.get("config")
        if not isinstance(config, PhatgooseConfig):
            config = PhatgooseConfig.from_pretrained(name, **hub)
        if not config.base_by_reference:
            return kwargs
        with explained(name):
            return load_by_reference(name, config, hub, kwargs)

    def _after_loading(self, name: Any, hub: dict[str, Any]) -> None:
        if self.config.base_by_reference and self.can_generate():
            self.generation_config = generation_of(name, hub) or self.generation_config

    def _before_saving(self, kwargs: dict[str, Any]) -> None:
        if self.config.base_by_reference and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = {
                key: tensor for key, tensor in self.state_dict().items() if self._is_of_experts(key)
            }

    def _is_of_experts(self, key: str) -> bool:
        """Whether a tensor belongs to the experts, and not to the base."""
        path = key.removeprefix("backbone.")
        is_inserted = ".experts." in path or ".gate_point." in path
        return is_inserted or path in self.config.replaced or path.rpartition(".")[0] in self._heads

    def to_adapter(
        self, folder: str | Path, weights: Mapping[str, float] | None = None, rank: int | None = None
    ) -> Path:
        """Writes one PEFT adapter, the weighted mean of the experts, for servers without routing.

        Args:
            folder: written atomically.
            weights: expert name -> weight, such as `PhatgooseTrace.usage()`; default is 1/E each, and 0 for an expert
                that is not named.
            rank: truncates the mean to this rank by SVD; by default it is exact, with the sum of the experts' ranks.

        Returns:
            The folder.

        Raises:
            ValueError: a name in `weights` is unknown, or the experts cannot be written as one adapter.
        """
        weights = weights if weights is not None else dict.fromkeys(self.experts, 1 / len(self.experts))
        if unknown := [name for name in weights if name not in self.experts]:
            raise ValueError(f"there is no expert {unknown[0]!r}; there are {', '.join(self.experts)}")
        entries = self._entries()
        generation = self.generation_config if self.can_generate() else None
        shares = [weights.get(name, 0.0) for name in self.experts]
        return save_merged_adapter(Path(folder), entries, shares, self.config, rank, generation)


class PhatgooseForGeneration(GeneratingMixin, PhatgooseRouter, GenerationMixin):
    """A router of language models: `generate()` of the base, with each step routed.

    Args:
        config: see `PhatgooseRouter`.
        backbone: see `PhatgooseRouter`.
    """

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as the base does, with caches, beams, sampling and streaming.

        Args:
            args: positional arguments of the base's `generate()`.
            kwargs: keyword arguments of the base's `generate()`.

        Returns:
            What the base's `generate()` returns.
        """
        return self.backbone.generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching as in the base: tokens are routed independently of other sequences in the batch.

        Gaussian gates look at the tokens before as in `generate()`, but for bases whose layers all have a sliding
        window, and kernels that are given tables of blocks: there only at those of the same step.

        Args:
            args: positional arguments of the base's method.
            kwargs: keyword arguments of the base's method.

        Returns:
            The base's manager of continuous batching.
        """
        manager = self.backbone.init_continuous_batching(*args, **kwargs)
        # generation runs in a new thread, in the context of `using` here
        manager._run_generation_loop = partial(copy_context().run, manager._run_generation_loop)
        return manager


def _add_update(
    group: RoutedLinears, member: int, linear: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook of a routed linear."""
    return group.add_update(member, args[0], output)


def _decide(point: GatePoint, linear: nn.Module, args: tuple[torch.Tensor]) -> None:
    """Forward pre-hook of a linear whose input a gate point reads."""
    point.decide(args[0])


__all__ = ["PhatgooseForGeneration", "PhatgooseRouter"]
