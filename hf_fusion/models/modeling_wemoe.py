"""WEMoE: a multi-task model from fine-tunes of one base, whose MLPs are merged per input (arXiv 2402.00433)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .build_wemoe import BuildPlan, StaticMerge, check_options, make_plan
from .configuration_wemoe import LOW_RANK, WEMoEConfig
from .fingerprint_wemoe import fingerprint_of, first_mismatch
from .fused import FusedPreTrainedModel
from .fused_backbone import BackboneMixin, new_backbone, with_arguments_of
from .fused_config import GENERATING
from .fused_generation import GeneratingMixin, common_generation, set_generation
from .fused_loading import explained
from .fused_summary import Summary, described
from .generation_wemoe import NO_PAGES, check_generation
from .heads_wemoe import activate_heads, fill_heads, install_heads, name_classes, with_classes, with_one_head
from .linears_wemoe import UpscaledLinear
from .recomputing_wemoe import Remembering, forget
from .routing_wemoe import Coefficients, Router, Shared, Stack, Unit, by_unit, index_of, remove_stack_hooks
from .trace_wemoe import WEMoETrace


class WEMoEModel(BackboneMixin, FusedPreTrainedModel):
    """A dense model some of whose linears are merged per sample, from a base and K task vectors.

    Build one with `from_experts`, or load a published one with ``AutoModel.from_pretrained(id,
    trust_remote_code=True)`` or the dense model's Auto class. It is used like the dense model: same inputs, same
    outputs. Only the routers' parameters require gradients.

    Args:
        config: the dense model's config, the experts and the up-scaled linears.
        backbone: the dense model; None builds an empty one, which `from_pretrained` fills.
    """

    config: WEMoEConfig
    config_class = WEMoEConfig
    static_merge: ClassVar[StaticMerge | None] = None  # set by hf_fusion
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: WEMoEConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = new_backbone(config)
        self.backbone: Any = backbone
        self.shared = Shared(config)
        self.record_routing: bool = False
        self.units: list[Unit] = []
        self.main_input_name = backbone.main_input_name
        self._install()
        self.forward = with_arguments_of(backbone, self)  # type: ignore[method-assign]
        self._activate_task(config.default_task)
        self.post_init()
        self._freeze()

    # ---------------------------------------------------------------- building

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[Any],
        base: Any = None,
        scaling: float | None = None,
        router_layers: int = 2,
        modules: str = "mlp",
        task_vectors: str = "exact",
        rank: int | None = None,
        energy: float | None = None,
        density: float = 0.1,
        routing: str = "wemoe",
        top_k: int = 1,
        gate_rank: int = 16,
        shared_router: bool = False,
        batch_reduce: bool = False,
        heads: str = "task",
        default_task: str | None = None,
        merge: str = "task_arithmetic",
    ) -> WEMoEModel:
        """Builds a model from experts of one base.

        Args:
            experts: loaded full fine-tunes and LoRA adapters, or ids ("owner/name@revision") and folders, which need
                hf_fusion installed to be resolved.
            base: the model they were fine-tuned from; adapters record theirs.
            scaling: λ of `merge`; default: 0.3 for task arithmetic, and otherwise the method's own.
            router_layers: 0, 1 or 2.
            modules: what is up-scaled: "mlp", "attention", or a regular expression for paths of linears.
            task_vectors: how they are stored: "exact", "bfloat16", "sparse" (E-WEMoE), "low-rank", or
                "low-rank-bfloat16". Those in bfloat16 take half the memory. What they add to the merged model may be
                computed in bfloat16 too where that is faster, off by 2^-9 of itself: low-rank products, the layer of
                the routers that reads every token, and the merged change where a sample is alone.
            rank: maximum rank for "low-rank".
            energy: for "low-rank", in place of `rank`: every rank is the smallest that keeps this share of ‖τ‖².
            density: share of the entries that "sparse" keeps.
            routing: "wemoe", or "smile": low-rank experts chosen token by token without any training.
            top_k: number of experts per token for "smile".
            gate_rank: number of leading singular vectors that the gates of "smile" read.
            shared_router: one router for all layers, rather than one each.
            batch_reduce: one merge per batch; outputs then depend on the other samples of the batch.
            heads: for classifiers: "task", one per expert; "shared", merged; "base", that of the base.
            default_task: the expert whose head predicts without ``task=``; default is the first.
            merge: the static merge that the model starts from: any method for whole models that needs no data. Task
                arithmetic makes λ the initial coefficient. Any other merge takes the place of the base, for "exact" and
                "bfloat16" task vectors alone, and coefficients start from 0.

        Returns:
            The model, in evaluation mode; it is the static merge until its routers are trained.

        Raises:
            ValueError: experts do not fit together; the message names the expert, the tensor and the reason.
        """
        options = {k: v for k, v in locals().items() if k not in ("cls", "experts", "base", "__class__")}
        cls.check_options(experts, **options)
        if not all(hasattr(expert, "adapter") for expert in experts) or not (base is None or hasattr(base, "adapter")):
            if cls.load_experts is None:
                raise ValueError("ids, folders and bare models need hf_fusion installed: pip install hf_fusion")
            experts, base = cls.load_experts(experts, base)
        plan = make_plan(experts, base, options, cls.static_merge)
        family = WEMoEForGeneration if plan.config.head in GENERATING else WEMoEModel
        model: Any = family(plan.config, plan.backbone)
        model._fill(plan)
        model._processor = plan.processor
        set_generation(model, common_generation(experts))
        return model.eval()

    check_options = staticmethod(check_options)

    def _install(self) -> None:
        """Inserts up-scaled linears, routers and heads as the config describes, to be filled or loaded."""
        config, backbone = self.config, self.backbone
        is_seq2seq = config.head == "seq2seq-lm"
        decoder = next(iter([backbone.get_decoder()] if is_seq2seq else []), None)
        in_decoder = {id(module) for module in decoder.modules()} if decoder is not None else set()
        stacks = {path: module for path, module in backbone.named_modules() if isinstance(module, PreTrainedModel)}
        stack_of: dict[str, Stack] = {}
        shared_router: Router | None = None
        for index, row in enumerate(config.units):
            linears = []
            for path, size in zip(row["paths"], row["sizes"], strict=True):
                old = backbone.get_submodule(path)
                d_out, d_in = old.weight.shape
                if is_conv := isinstance(old, Conv1D):
                    d_in, d_out = d_out, d_in
                like = {"dtype": old.weight.dtype, "device": old.weight.device}
                kind, has_bias = config.task_vectors, old.bias is not None
                linear = UpscaledLinear(d_in, d_out, config.num_experts, kind, has_bias, size, like, is_conv)
                backbone.set_submodule(path, linear)
                linears.append(linear)
            # the innermost stack around a unit receives its mask and its cache
            stack = max(
                (path for path in stacks if f"{row['paths'][0]}.".startswith(f"{path}." if path else "")), key=len
            )
            if stack not in stack_of:
                seq2seq_kind = "decoder" if id(stacks[stack]) in in_decoder else "encoder"
                kind = "causal" if config.head == "causal-lm" else seq2seq_kind
                stack_of[stack] = Stack(stacks[stack], kind, self.shared)
            router = None
            if config.routing == "wemoe" and (shared_router is None or not config.shared_router):
                width, weight = linears[0].in_features, linears[0].weight
                like = {"dtype": weight.dtype, "device": weight.device}
                router = Router(width, config.num_experts, config.router_layers, config.start, like, index)
                shared_router = router
                (self if config.shared_router else linears[0]).add_module("router", router)
            elif config.routing == "wemoe":
                router = shared_router
            self.units.append(Unit(index, row["name"], row["paths"], linears, router, stack_of[stack]))
        classes = [len(row["labels"]) for row in config.experts]
        install_heads(backbone, config.task_heads, classes, self.shared.calls)

    @torch.no_grad()
    def _fill(self, plan: BuildPlan) -> None:
        for unit in self.units:
            for path, linear in zip(unit.paths, unit.linears, strict=True):
                plan.fill(path, linear)
        tensors = [source.tensors for source in plan.sources]
        fill_heads(self.backbone, self.config.task_heads, tensors, self.experts)
        plan.check()

    def _freeze(self) -> None:
        """Freezes everything but the routers."""
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(".router." in f".{name}")

    def _check_resizable(self, head: nn.Module | None) -> None:
        if isinstance(head, UpscaledLinear):
            name = type(self).__name__
            raise ValueError(f"{name}: the output embeddings are up-scaled; resize base and experts before fusing")

    def _checkpoint_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return Remembering(function, self.shared.calls)

    # ---------------------------------------------------------------- running

    @property
    def task(self) -> str | None:
        """The expert whose head predicts without ``task=``; can be set. None if heads are shared."""
        return self.config.default_task

    @task.setter
    def task(self, name: str | None) -> None:
        self._activate_task(name)
        self.config.default_task = name

    def _activate_task(self, task: str | None) -> None:
        """Activates an expert's heads, and sets its classes in the configs."""
        if not self.config.task_heads or task is None:
            return
        index = index_of(task, self.experts)
        activate_heads(self.backbone, self.config.task_heads, index)
        labels = self.config.experts[index]["labels"]
        for config in (self.config, self.backbone.config):
            name_classes(config, labels)
        self.backbone.num_labels = len(labels)

    def forward(
        self,
        *args: Any,
        task: str | None = None,
        prompt_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The dense model's forward, with the same arguments and outputs.

        Args:
            args: positional arguments of the dense model.
            task: the expert whose head predicts; default is the property `task`.
            prompt_mask: (B, T), causal language models: the tokens that the routers read. Default is everything before
                the first label where labels are given with a masked start (-100), and all real tokens elsewhere. With
                it, scoring a prompt and its answer equals generating the answer.
            labels: as the dense model takes them.
            kwargs: keyword arguments of the dense model.

        Returns:
            The output of the dense model's class.

        Raises:
            ValueError: `task` is not an expert, or `prompt_mask` does not fit the inputs.
        """
        trace = self._new_trace() if self.record_routing else None
        return self._run(trace, *args, task=task, prompt_mask=prompt_mask, labels=labels, **kwargs)

    def _run(
        self,
        trace: WEMoETrace | None,
        *args: Any,
        task: str | None = None,
        prompt_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs a forward, recorded in `trace` if there is one."""
        shared, config, dense = self.shared, self.config, self.backbone
        if labels is not None:
            kwargs["labels"] = labels
        # also checked where a shared head serves every task
        index = None if task is None else index_of(task, self.experts)
        if labels is not None and config.task_heads and (head_task := task or self.task):
            dense = with_classes(dense, config.experts[self.experts.index(head_task)]["labels"])
        prompt = prompt_mask if prompt_mask is not None else self.prompt_tokens(kwargs)
        before = shared.calls.enter(shared.call(trace=trace, prompt_mask=prompt, task=index))
        try:
            return dense(*args, **kwargs)
        finally:
            shared.calls.enter(before)

    def trace_forward(self, **inputs: Any) -> WEMoETrace:
        """Runs one forward and returns its trace, whether or not `record_routing` is set.

        Args:
            inputs: see `forward`.

        Returns:
            The trace, which `routing_trace` does not return.
        """
        trace = WEMoETrace(self.experts)
        self._run(trace, **inputs)
        return trace

    def _new_trace(self) -> WEMoETrace:
        """A new trace, which `routing_trace()` returns from now on in this thread or task."""
        trace = WEMoETrace(self.experts)
        self.shared.calls.keep(trace)
        return trace

    def prompt_tokens(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The tokens of labelled rows that the routers read: those before each row's first label.

        Args:
            kwargs: of `forward`; ``labels`` (B, T) and ``attention_mask`` are used.

        Returns:
            A mask (B, T), all True for a row that is labelled from its first token on; None without labels or for a
            model that is not a causal language model.
        """
        labels = kwargs.get("labels")
        if self.config.head != "causal-lm" or labels is None:
            return None
        before = (labels != -100).cumsum(1) == 0
        mask = kwargs.get("attention_mask")
        real = before if mask is None else before & mask.bool()
        return before | ~real.any(1, keepdim=True)

    @contextmanager
    def using(self, coefficients: Coefficients) -> Iterator[WEMoEModel]:
        """Context manager that replaces the routers by coefficients, in this thread or task and tasks that it starts.

        Args:
            coefficients: an expert's name, for this expert alone; (K,) or (B, K) for every unit; or a dict of these by
                unit name (see `routing_trace`), with "" for all other units.

        Yields:
            This model.

        Raises:
            ValueError: an expert or unit is unknown, or the number of coefficients is not K.
        """
        with self.shared.calls.scoped(self._by_unit(coefficients)):
            yield self

    def _by_unit(self, coefficients: Coefficients) -> dict[str, torch.Tensor]:
        table = by_unit(coefficients, self.experts, [unit.name for unit in self.units])
        return {name: w.to(self.device) for name, w in table.items()}  # once, not in every forward

    def routing_trace(self) -> WEMoETrace:
        """The coefficients of the last forward, or of the prompts of the last `generate()`.

        Returns:
            The trace of the last call in this thread or task with ``model.record_routing = True``.

        Raises:
            ValueError: nothing was recorded.
        """
        trace: WEMoETrace | None = self.shared.calls.kept()
        if trace is None or not trace.layers:
            raise ValueError(
                "no routing was recorded: set model.record_routing = True, then run the model in this thread or task"
            )
        return trace

    @torch.no_grad()
    def merge_for(
        self,
        inputs: Mapping[str, Any] | None = None,
        coefficients: Coefficients | None = None,
        task: str | None = None,
    ) -> PreTrainedModel:
        """Merges a plain dense model, which any server can run.

        Args:
            inputs: those of one forward, whose coefficients are merged with; they are averaged over its rows.
            coefficients: in place of `inputs`, see `using`.
            task: the expert whose head the model gets; without inputs and coefficients, its up-scaled linears too.

        Returns:
            A copy of the dense model, in evaluation mode; all its parameters require gradients.

        Raises:
            ValueError: no argument determines the merge, or the routing is SMILE, which merges nothing.
        """
        if self.config.routing == "smile":
            raise ValueError("SMILE chooses experts token by token: no dense model does the same")
        if inputs is not None and coefficients is not None:
            raise ValueError("pass inputs or coefficients, not both")
        if inputs is not None:
            trace = self.trace_forward(**inputs)
            table = {name: trace.coefficients(name) for name in trace.layers}
            if unread := [unit.name for unit in self.units if unit.name not in table]:
                raise ValueError(f"these inputs do not reach {unread[0]}, so its coefficients are unknown")
        elif coefficients is not None or task is not None:
            table = self._by_unit(coefficients if coefficients is not None else str(task))
        else:
            raise ValueError("pass inputs, coefficients or task, which determine the merge")
        memo: dict[int, Any] = {}
        for unit in self.units:
            w = table.get(unit.name, table.get(""))
            assert w is not None
            for linear in unit.linears:
                memo[id(linear)] = linear.dense(w.mean(0))
        index = index_of(task or self.task or self.experts[0], self.experts)
        labels = self.config.experts[index]["labels"]
        model = with_one_head(self.backbone, self.config.task_heads, index, labels, memo)
        remove_stack_hooks(model)
        forget(model)
        return model.requires_grad_(True).eval()

    def summary(self) -> Summary:
        """Describes the model in numbers.

        Returns:
            experts and units (names), upscaled_linears (their number), the numbers of parameters: parameters (all),
            upscaled_parameters (weights of the base that are merged per sample), merged_parameters (merged once),
            head_parameters (of all tasks' heads), trainable (the routers; the rest are task vectors), task_vectors
            (how they are stored), stored_bytes (of the up-scaled linears), relative_merge (cost of merging in the
            up-scaled linears as a multiple of one token's products: divide by the tokens of a sample) and energy
            (linear -> share of ‖τ‖² that low rank keeps, averaged over the experts).
        """
        linears = [linear for unit in self.units for linear in unit.linears]
        stored = sum(
            p.numel() * p.element_size()
            for linear in linears
            for n, p in linear.named_parameters()
            if "router" not in n
        )
        heads = [p for path in self.config.task_heads for p in self.backbone.get_submodule(path).parameters()]
        not_merged = {id(p) for p in [*heads, *(p for linear in linears for p in linear.parameters())]}
        return Summary(
            experts=self.experts,
            units=[unit.name for unit in self.units],
            upscaled_linears=len(linears),
            upscaled_parameters=sum(linear.weight.numel() for linear in linears),
            merged_parameters=sum(p.numel() for p in self.backbone.parameters() if id(p) not in not_merged),
            head_parameters=sum(p.numel() for p in heads),
            parameters=self.num_parameters(),
            trainable=sum(p.numel() for p in self.parameters() if p.requires_grad),
            task_vectors=self.config.task_vectors,
            stored_bytes=stored,
            relative_merge=float(len(self.experts)) if self.config.task_vectors not in LOW_RANK else 0.0,
            energy={p: e for row in self.config.units for p, e in zip(row["paths"], row.get("energy", []))},
        )

    def __repr__(self) -> str:
        config = self.config
        names = [row["name"] for row in config.experts]
        facts = {"base": config.base.get("id"), "head": config.head, "routing": config.routing, "experts": names}
        return described(self, "backbone", **facts, units=len(config.units), task_vectors=config.task_vectors)

    # ---------------------------------------------------------------- loading, saving

    def _after_loading(self, name: Any, hub: dict[str, Any]) -> None:
        with explained(name):
            for unit in self.units:
                for path, linear in zip(unit.paths, unit.linears, strict=True):
                    linear.check(path)
        if self.config.samples and (tensor := first_mismatch(self.state_dict(), self.config.samples)):
            raise ValueError(f"{name} contains another model's weights: {tensor} is not as saved")
        self._freeze()

    def _before_saving(self, kwargs: dict[str, Any]) -> None:
        self.config.samples = fingerprint_of(kwargs.get("state_dict") or self.state_dict())


class WEMoEForGeneration(GeneratingMixin, WEMoEModel, GenerationMixin):
    """A WEMoE of language models: every sequence keeps the coefficients and merged weights of its prompt.

    Args:
        config: see `WEMoEModel`.
        backbone: see `WEMoEModel`.
    """

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generates as the dense model does, with caches, beams, sampling and streaming; routed by the prompts.

        Args:
            inputs: (B, T) prompts.
            generation_config: see the dense model's `generate()`.
            args: other positional arguments of the dense model's `generate()`.
            kwargs: keyword arguments of the dense model's `generate()`.

        Returns:
            What the dense model's `generate()` returns.

        Raises:
            ValueError: a way to generate that would mix prompts, such as paged caches.
        """
        shared = self.shared
        tokens = next(
            (v for v in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None), None
        )
        check_generation(tokens, [kwargs, *map(vars, filter(None, (generation_config, self.generation_config)))])
        trace = self._new_trace() if self.record_routing else None
        prompts = None if tokens is None else (tokens.shape[0], tokens.shape[1])
        before = shared.calls.enter(shared.call(trace=trace, prompts=prompts))
        try:
            return self.backbone.generate(inputs, generation_config, *args, **kwargs)
        finally:
            shared.calls.enter(before)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported, since a batch would mix prompts; always raises ValueError.

        Args:
            args: ignored.
            kwargs: ignored.
        """
        raise ValueError(f"{type(self).__name__} {NO_PAGES}")


__all__ = ["WEMoEForGeneration", "WEMoEModel"]
