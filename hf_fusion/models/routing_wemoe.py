"""Merging coefficients: the routers, the tokens that they read, and the state kept per prompt for decoding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .fused_calls import Calls, cache_in
from .recomputing_wemoe import remember

Coefficients = torch.Tensor | Sequence[float] | Mapping[str, torch.Tensor | Sequence[float]] | str

PIN = "_wemoe_pin"  # attribute of a cache: the coefficients of its prompts


def index_of(name: str, experts: Sequence[str]) -> int:
    """The index of an expert.

    Raises:
        ValueError: no expert has this name.
    """
    if name not in experts:
        raise ValueError(f"there is no expert {name!r}; there are {', '.join(experts)}")
    return experts.index(name)


def by_unit(coefficients: Coefficients, experts: Sequence[str], units: Sequence[str]) -> dict[str, torch.Tensor]:
    """Coefficients of `using` as rows (B, K) or (1, K) by unit name, "" for all others.

    Args:
        coefficients: an expert's name for it alone; (K,) or (B, K) for every unit; or a dict of these by unit name.
        experts: names.
        units: names.

    Raises:
        ValueError: a name is unknown, a unit has no coefficients, or their number is not K.
    """
    if isinstance(coefficients, str):
        coefficients = torch.eye(len(experts))[index_of(coefficients, experts)]
    table = coefficients if isinstance(coefficients, Mapping) else {"": coefficients}
    if unknown := [name for name in table if name and name not in units]:
        raise ValueError(f"there is no unit {unknown[0]!r}; there are {', '.join(units)}")
    if missing := [name for name in units if name not in table and "" not in table]:
        raise ValueError(f"no coefficients for {missing[0]}, and none for all others ('')")
    by_name = {}
    for name, value in table.items():
        w = torch.as_tensor(value, dtype=torch.float32)
        if w.shape[-1] != len(experts):
            raise ValueError(f"{w.shape[-1]} coefficients were given, but there are {len(experts)} experts")
        by_name[name] = w.view(-1, w.shape[-1])
    return by_name


class Router(nn.Module):
    """Coefficients of K experts from the tokens of each sample (paper, section 3.2); they are not clamped.

    0 layers: a vector, all λ. 1: Linear(d, K). 2: Linear(d, d), ReLU, Linear(d, K). The last bias is initialised to λ.

    The router's output is averaged over a sample's tokens. Its last layer is linear, so it is applied to the mean.

    Args:
        width: d, width of the tokens.
        experts: K.
        layers: 0, 1 or 2.
        scaling: λ.
        like: dtype and device.
        seed: for the initial weights.
    """

    def __init__(
        self, width: int, experts: int, layers: int, scaling: float, like: dict[str, Any], seed: int = 0
    ) -> None:
        super().__init__()
        sizes = ((), (experts,), (width, experts))[layers]
        self.layers = nn.ModuleList(nn.Linear(width, size, **like) for size in sizes)
        self.constant = None if layers else nn.Parameter(torch.empty(experts, **like))
        self.seed = seed
        if like["device"].type != "meta":
            self.reset(scaling)
        for module in self.modules():  # otherwise transformers would initialise them again
            module._is_hf_initialized = True  # type: ignore[assignment]

    @torch.no_grad()
    def reset(self, scaling: float) -> None:
        """Sets the initial weights, which are random, but always the same: so a recipe always makes the same model."""
        if self.constant is not None:
            self.constant.fill_(scaling)
        generator = torch.Generator().manual_seed(self.seed)
        for linear in self.layers:
            weight, bias = linear.weight, linear.bias
            weight.copy_(0.01 * torch.randn(weight.shape, generator=generator))  # type: ignore[operator, arg-type]
            bias.fill_(scaling if linear is self.layers[-1] else 0.0)  # type: ignore[operator]

    def forward(self, x: torch.Tensor, share: torch.Tensor | None = None, rounded: bool = False) -> torch.Tensor:
        """(B, T, d) and each token's share (B, T), or None for equal shares → (B, K); (1, K) for 0 layers.

        With `rounded`, the layer that reads every token, nearly all of a router's cost, may be computed in bfloat16.
        """
        if self.constant is not None:
            return self.constant[None]
        if len(self.layers) == 2:
            first: Any = self.layers[0]
            if rounded and not torch.is_grad_enabled():
                narrow = [tensor.bfloat16() for tensor in (x, first.weight, first.bias)]
                x = F.linear(*narrow).relu_().to(x.dtype)
            else:
                x = first(x)
                x = F.relu(x) if x.requires_grad else x.relu_()
        mean = x.mean(1) if share is None else torch.bmm(share[:, None].to(x.dtype), x)[:, 0]  # (B, d)
        return self.layers[-1](mean)


@dataclass
class Pin:
    """The routing of the sequences in a cache.

    Attributes:
        coefficients: index of a unit → (B, K).
        merged: path of a linear → its merged weights (B, R, C).
    """

    coefficients: dict[int, torch.Tensor] = field(default_factory=dict)
    merged: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Reading:
    """What a transformer stack reads in one forward.

    Attributes:
        share: (B, T), which sums to 1 over a sample's tokens; None for equal shares.
        rows: B, if known.
        pin: the routing of the sequences in its cache; None for encoders.
        decodes: whether the cache already has tokens, so that `pin` applies.
    """

    share: torch.Tensor | None = None
    rows: int | None = None
    pin: Pin | None = None
    decodes: bool = False


@dataclass
class Call:
    """The state of one forward or one `generate()`; it belongs to the thread that runs it.

    Attributes:
        replacements: unit name → coefficients that replace the router's, "" for all others; None for routers.
        batch_reduce: see `WEMoEConfig`.
        top_k: `num_experts_per_tok` of `WEMoEConfig`.
        gate_rank: see `WEMoEConfig`.
        readings: the reading of each stack, by its index.
        w: the coefficients (B, K) of each unit, by its index, while its linears run; else None.
        trace: records the coefficients, if set.
        prompt_mask: (B, T) of the tokens that routers read; None for all.
        prompts: (sequences, tokens) of the prompts of `generate()`.
        task: index of the expert whose head predicts; None for the default.
        part: the stack or unit that was called directly; None for the whole model.
        before: the call that was running before that of a part.
    """

    replacements: Mapping[str, torch.Tensor] | None
    batch_reduce: bool
    top_k: int
    gate_rank: int
    readings: list[Reading]
    w: list[torch.Tensor | None]
    trace: Any = None
    prompt_mask: torch.Tensor | None = None
    prompts: tuple[int, int] | None = None
    task: int | None = None
    part: Stack | Unit | None = None
    before: Call | None = None

    def for_recomputing(self) -> Call:
        """A copy of the current call for a recomputed layer, which is not traced again."""
        return replace(self, readings=list(self.readings), w=[None] * len(self.w), trace=None, before=None)


class Shared:
    """What all units of one model share: its calls and their initial state.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.calls = Calls()
        self.stacks = 0

    def call(self, **attributes: Any) -> Call:
        """A new call with the coefficients of `using()` in this thread or task; `attributes` are its others."""
        config = self.config
        options = config.batch_reduce, config.num_experts_per_tok, config.gate_rank
        readings = [Reading()] * self.stacks
        return Call(self.calls.scope(), *options, readings, [None] * len(config.units), **attributes)


class Stack:
    """One transformer stack (encoder or decoder): the tokens that its routers read, and the routing in its cache.

    Which tokens routers read depends on the kind of stack:

    - encoder: every token that is not padding.
    - causal language model: the prompt, that is `Call.prompt_mask`, or the prompts of `generate()`, or else all tokens
      of a sequence's first forward.
    - sequence-to-sequence decoder: the first token, which depends on the encoder's output and not on later tokens.

    Args:
        module: the stack.
        kind: "encoder", "causal" or "decoder".
        shared: what all units share.
    """

    def __init__(self, module: nn.Module, kind: str, shared: Shared) -> None:
        self.kind, self.shared = kind, shared
        self.index = shared.stacks
        shared.stacks += 1
        self.argument_names = list(inspect.signature(module.forward).parameters)
        self.layers = [layer for layer in module.modules() if hasattr(layer, "gradient_checkpointing")]
        module.register_forward_pre_hook(self.begin, with_kwargs=True)
        module.register_forward_hook(self.end, always_call=True)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the stack, which may be called directly."""
        calls = self.shared.calls
        call: Call | None = calls.current()
        if call is None or call.part is not None:
            call = self.shared.call(part=self, before=call)
        call.readings[self.index] = self._read({**dict(zip(self.argument_names, args)), **kwargs}, call)
        if call.part is self:
            calls.enter(call)
        if module.training:
            remember(self.layers, calls)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the stack, also after errors: attaches the routing to a cache that the stack created."""
        calls = self.shared.calls
        call: Call | None = calls.current()
        if call is None:  # the pre-hook raised an error
            return
        name = "cache" if hasattr(output, "cache") else "past_key_values"  # transformers 5.24 renamed it
        cache, pin = getattr(output, name, None), call.readings[self.index].pin
        if cache is not None and pin is not None:
            setattr(cache, PIN, pin)
        if call.part is self:
            calls.enter(call.before)

    def _read(self, arguments: Mapping[str, Any], call: Call) -> Reading:
        """What the stack reads, from the arguments of its forward.

        Raises:
            ValueError: another model filled the cache.
        """
        pin = None
        if self.kind != "encoder":
            cache = cache_in(arguments)
            if cache is not None and int(cache.get_seq_length()) > 0:
                pin = getattr(cache, PIN, None)
                if pin is None:
                    raise ValueError("the cache was not filled by this model, so its routing is unknown")
                return Reading(pin=pin, decodes=True)
            pin = Pin()
            if cache is not None:
                setattr(cache, PIN, pin)
        inputs = next((arguments[k] for k in ("inputs_embeds", "input_ids") if arguments.get(k) is not None), None)
        if inputs is None:
            return Reading(pin=pin)
        return Reading(self._share(inputs, arguments.get("attention_mask"), call), inputs.shape[0], pin)

    def _share(self, inputs: torch.Tensor, mask: Any, call: Call) -> torch.Tensor | None:
        """The weight of each token in the mean, (B, T); None for equal weights."""
        rows, tokens = inputs.shape[:2]
        real = _real_tokens(mask, tokens)  # (B, T) or None
        if self.kind == "decoder":
            first = torch.zeros(rows, dtype=torch.long, device=inputs.device) if real is None else real.int().argmax(1)
            return (torch.arange(tokens, device=inputs.device) == first[:, None]).to(torch.float32)
        prompt = None
        if self.kind == "causal":
            if call.prompt_mask is not None:
                prompt = call.prompt_mask.to(inputs.device).bool()
                if tuple(prompt.shape) != (rows, tokens):
                    raise ValueError(f"prompt_mask is {list(prompt.shape)}, the inputs are {[rows, tokens]}")
            elif call.prompts is not None and call.prompts[1] < tokens:
                prompt = (torch.arange(tokens, device=inputs.device) < call.prompts[1]).expand(rows, tokens)
        if prompt is not None:
            real = prompt if real is None else real & prompt
        if real is None:
            return None
        share = real.to(torch.float32)
        return share / share.sum(1, keepdim=True).clamp(min=1)


def _real_tokens(mask: Any, tokens: int) -> torch.Tensor | None:
    """Mask (B, T) of tokens without padding, from a mask (B, S) or the last query of a mask (B, 1, T, S)."""
    if isinstance(mask, dict):  # one per kind of attention
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype is torch.bool else mask == 0
    return mask[:, :tokens].bool() if mask.dim() == 2 and mask.shape[1] >= tokens else None


def remove_stack_hooks(model: nn.Module) -> None:
    """Removes the hooks of all stacks from a copy of their model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Stack)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


class Unit:
    """Linears that share a router: an MLP or an attention block.

    Args:
        index: in the config.
        name: module path.
        paths: module paths of its linears, in the order in which they run; the first one reads what the router reads.
        linears: the `UpscaledLinear`s.
        router: its router; None for SMILE.
        stack: the stack that it is part of.
    """

    def __init__(
        self, index: int, name: str, paths: list[str], linears: list[Any], router: Router | None, stack: Stack
    ) -> None:
        self.index, self.name, self.paths, self.linears = index, name, paths, linears
        self.routers = (router,)  # in a tuple, so that it is not registered as a child here
        self.stack, self.shared = stack, stack.shared
        for linear in linears:
            linear.unit = self

    def coefficients(self, linear: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Coefficients (B, K) for one of the linears, B a divisor of the rows of `x`; None for SMILE."""
        calls = self.shared.calls
        call: Call | None = calls.current()
        if self.routers[0] is None and (calls.scope() if call is None else call.replacements) is None:
            return None
        if linear is self.linears[0]:
            if call is None or isinstance(call.part, Unit):  # a layer was called directly
                call = self.shared.call(part=self, before=call)
                call.w[self.index] = self._route(x, linear, call)
                calls.enter(call)
            else:
                call.w[self.index] = self._route(x, linear, call)
        w = None if call is None else call.w[self.index]
        if call is None or w is None:
            raise ValueError(
                f"{self.paths[self.linears.index(linear)]} ran before {self.paths[0]}, whose input the router reads"
            )
        if linear is self.linears[-1]:
            call.w[self.index] = None
            if call.part is self:
                calls.enter(call.before)
        return w

    def _route(self, x: torch.Tensor, linear: Any, call: Call) -> torch.Tensor:
        """Coefficients (B, K) for the unit's input, recorded in the trace and in the cache's pin."""
        reading = call.readings[self.stack.index]
        if reading.decodes and call.replacements is None:
            assert reading.pin is not None
            w = reading.pin.coefficients[self.index]
            return w if x.shape[0] % w.shape[0] == 0 else w.repeat_interleave(x.shape[0] // w.shape[0], 0)
        rows = reading.rows if x.dim() == 2 and reading.rows else x.shape[0]  # OPT flattens batch and tokens
        if call.replacements is not None:
            w = call.replacements[self.name if self.name in call.replacements else ""].to(x.device)
        else:
            router = self.routers[0]
            assert router is not None
            tokens = x if x.dim() == 3 else x.reshape(rows, -1, x.shape[-1])
            share = reading.share
            share = share if share is not None and share.shape == tokens.shape[:2] else None
            w = router(tokens, share, linear.multiplies_bfloat16(tokens))
            if call.prompts is not None and w.shape[0] > call.prompts[0]:
                w = w[:: w.shape[0] // call.prompts[0]]  # beams of one prompt are routed and merged once
            if call.batch_reduce:
                w = w.mean(0, keepdim=True)
        if len(w) > 1 and not (w.requires_grad or torch.compiler.is_dynamo_compiling()) and w.device.type == "cpu":
            w = w[:1] if bool((w == w[:1]).all()) else w
        if call.trace is not None:
            call.trace.add(self.name, w.detach(), rows if call.prompts is None else call.prompts[0])
        if reading.pin is not None:
            reading.pin.coefficients[self.index] = w.detach()
        return w

    def kept(self, linear: Any, w: torch.Tensor) -> torch.Tensor | None:
        """Merged weights (B, R, C) while decoding with a cache, computed once per prompt."""
        call: Call | None = self.shared.calls.current()
        if call is None or call.replacements is not None:
            return None
        reading = call.readings[self.stack.index]
        if not reading.decodes or reading.pin is None:
            return None
        path, merged = self.paths[self.linears.index(linear)], reading.pin.merged
        if path not in merged:
            merged[path] = linear.merge(w.to(linear.base.dtype))
        return merged[path]

    def gates(self, hidden: torch.Tensor, ranks: list[int]) -> torch.Tensor:
        """SMILE's weights (..., K) of each token, from the concatenated V_iᵀ x, (..., ΣR)."""
        call: Call = self.shared.calls.current() or self.shared.call()
        leading = [part[..., : call.gate_rank] for part in hidden.split(ranks, -1)]
        scores = torch.stack([part.float().norm(dim=-1) for part in leading], -1)
        values, choice = scores.softmax(-1).topk(min(call.top_k, len(ranks)), dim=-1)
        values = values / values.sum(-1, keepdim=True)
        w = torch.zeros_like(scores).scatter(-1, choice, values)
        if call.trace is not None:
            call.trace.add(self.name, w.detach().flatten(1, -2).mean(1), hidden.shape[0])
        return w.to(hidden.dtype)


__all__ = [
    "Coefficients",
    "Pin",
    "Router",
    "Shared",
    "Stack",
    "Unit",
    "by_unit",
    "index_of",
    "remove_stack_hooks",
]
