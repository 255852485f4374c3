"""Runs a router: the state of each call of its base, fixed weights set by users, and the trace of the last call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .assembly_phatgoose import readers_of
from .context_phatgoose import Context
from .fused_calls import cache_in
from .routing_phatgoose import RoutedHead
from .state_phatgoose import Routing, RoutingCalls
from .trace_phatgoose import PhatgooseTrace


class RunningMixin:
    """Hooks that set a `Routing` in `self.calls` for each call of `self.backbone` and of its encoder or towers."""

    def _find_calls(self: Any) -> None:
        """Register the hooks."""
        readers = readers_of(self.backbone, self.config.is_encoder_decoder)
        for path in dict.fromkeys(["", *readers]):
            module = self.backbone.get_submodule(path)
            names = list(inspect.signature(module.forward).parameters)
            module.register_forward_pre_hook(partial(self._begin, path, names, path in readers), with_kwargs=True)
            module.register_forward_hook(partial(self._end, path), always_call=True)

    def _begin(
        self: Any,
        path: str,
        names: list[str],
        reads: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Set the state of a call: options, padding, and whether it starts a new sequence."""
        state, records = self.calls.current(), bool(self.record_routing)
        if state is None or not path:  # otherwise the base has called one of its modules
            state = self.calls.new(path)
            state.outer = self.calls.enter(state)
            if (records or not torch.compiler.is_dynamo_compiling()) and (last := self.calls.last()) is not None:
                state.trace, state.records = last.trace, records and last.trace is not None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache, mask, encoded = cache_in(given), given.get("attention_mask"), given.get("encoder_outputs")
        if reads:
            state.tally = None
            state.counts_for = self.config.num_experts if self._heads else 0
            inputs = (given.get(name) for name in ("input_ids", "inputs_embeds", self.main_input_name))
            read = next((value for value in inputs if value is not None), None)
            state.examples = 0 if read is None else read.shape[0]
            if decay := self.config.gate_decay:
                state.context = Context.of(decay, cache, given)
            self._prepare(state, mask, read)
            trace = state.trace
            if records and (trace is None or not trace.modules or not _continues(cache) and trace.has_seen(path)):
                paths = {id(group): paths for paths, group in self._groups}
                state.trace = PhatgooseTrace(self.experts, paths, int(self.record_routing))
            state.records = records
        elif encoded is not None and not _continues(
            cache
        ):  # read earlier: its padding, before cross-attention looks at it
            self._prepare(state, mask, encoded[0])

    def _prepare(self: Any, state: Routing, mask: Any, inputs: Any) -> None:
        """Set which tokens of inputs (B, T, …) are not padding."""
        state.tokens = None
        is_padded_batch = isinstance(mask, torch.Tensor) and mask.dim() == 2 and inputs is not None
        if (
            is_padded_batch
            and not torch.compiler.is_dynamo_compiling()
            and inputs.shape[:2] == mask.shape
            and not mask.all()
        ):
            state.tokens, state.shape = mask.flatten().nonzero()[:, 0], tuple(mask.shape)

    def _end(self: Any, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Restore the outer state after a call, also after an error."""
        state = self.calls.current()
        if state is None or state.entry != path:
            return
        self.calls.enter(state.outer)
        if state.context is not None:
            state.context.keep(output)
            state.context = state.context.again()
        if state.records or not torch.compiler.is_dynamo_compiling():
            state.outer, state.given = None, None
            state.shared.clear()
            state.evidence.clear()
            self.calls.keep(state)

    def _check_resizable(self: Any, head: nn.Module | None) -> None:
        name = type(self).__name__
        if isinstance(head, RoutedHead) or hasattr(head, "experts"):
            raise ValueError(f"{name}: its experts adapt the output of tokens; resize base and experts before fusing")
        if self.config.base_by_reference:
            raise ValueError(
                f"{name} fetches its base from {self.config.base['id']}, where it keeps its size: "
                "set model.config.base_by_reference = False, so that the base is saved too, and resize then"
            )

    def _checkpoint_function(self: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_remembering, self.calls, function)

    @contextmanager
    def using(self: Any, weights: torch.Tensor | Sequence[float] | str | None) -> Iterator[Any]:
        """Context manager that replaces the gates by fixed weights, for calls of this thread or asyncio task.

        A thread started within it is not affected, unless it runs in a copy of the context:
        ``Thread(target=contextvars.copy_context().run, args=(router.generate, ids))``.

        Args:
            weights: an expert's name for this expert alone; (E,) or (B, E) weights for all linears and tokens;
                None for the base alone (its heads are still routed if experts have heads).
        """
        if isinstance(weights, str):
            if weights not in self.experts:
                raise ValueError(f"there is no expert {weights!r}; there are {', '.join(self.experts)}")
            weights = [float(weights == name) for name in self.experts]
        given = None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=self.device)
        if given is not None and given.shape[-1] != len(self.experts):
            raise ValueError(f"{given.shape[-1]} weights were given, but there are {len(self.experts)} experts")
        with self.calls.scoped((None if given is None else given.view(-1, given.shape[-1]), weights is None)):
            yield self

    def routing_trace(self: Any) -> PhatgooseTrace:
        """The routing of the last sequences of this thread or task; set ``model.record_routing = 4096`` (tokens) first.

        A forward without a cache starts a new trace, and one with a cache continues it: after `generate()` the trace
        has the prompt and each generated token that was read. With beam search, rows are the current beams.

        Returns:
            The trace.

        Raises:
            ValueError: nothing was recorded.
        """
        state = self.calls.current() or self.calls.last()
        if state is None or state.trace is None or not state.trace.modules:
            raise ValueError(
                "no routing was recorded in this thread: set model.record_routing = 4096, then run the model"
            )
        trace: PhatgooseTrace = state.trace
        return trace


class _Layer:
    """A layer's function that restores the routing of its first call when it is recomputed, in any thread."""

    def __init__(self, calls: RoutingCalls, function: Callable[..., Any]) -> None:
        self.calls, self.function = calls, function
        self.remembered: Routing | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.remembered is None:
            self.remembered = self.calls.routing().for_recomputing()
            return self.function(*args, **kwargs)
        with self.calls.entered(self.remembered):
            return self.function(*args, **kwargs)


def _remembering(
    calls: RoutingCalls, func: Callable[..., Any], function: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    return func(_Layer(calls, function), *args, **kw)


def _continues(cache: Any) -> bool:
    """Whether a forward continues the sequences of a cache."""
    return cache is not None and bool(cache.get_seq_length())


__all__ = ["RunningMixin"]
