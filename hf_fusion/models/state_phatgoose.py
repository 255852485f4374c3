"""The state of one call of a router: its options, its padding and the chosen experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from .configuration_phatgoose import PhatgooseConfig
from .context_phatgoose import Context
from .fused_calls import Calls


@dataclass(eq=False)
class Routing:
    """The state that the routed modules share during a call.

    Attributes:
        top_k: `num_experts_per_tok` of `PhatgooseConfig`.
        temperature: `router_temperature` of `PhatgooseConfig`.
        rule: `routing` of `PhatgooseConfig`.
        given: (B, E) weights for all linears instead of their gates, or None.
        off: run the base alone.
        tokens: flat positions of the tokens that are not padding, or None without padding.
        shape: (B, T) of the batch of `tokens`.
        trace: of the sequences that this call reads, or of those before.
        records: whether the trace receives every choice.
        counts_for: number of experts, if heads are weighted by the linears' choices; else 0.
        tally: (B, E) weight that the linears gave each expert in this call, for these heads.
        entry: path of the module whose call it is; "" is the base.
        outer: the state of the call within which this one runs.
        version: of the modules, see `RoutingCalls`.
        shared: routed module -> the input that it read last and its routing, for its other linears.
        context: the tokens before those of the call, if decisions look at them.
        examples: B, the number of examples that the call reads; 0 if unknown.
        evidence: index of a `GatePoint` -> the experts' scores (N, E) for the input that it reads.
        decisions: index of a `GatePoint` -> the chosen experts and their weights, (N, k) each.
    """

    top_k: int
    temperature: float
    rule: str
    given: torch.Tensor | None = None
    off: bool = False
    tokens: torch.Tensor | None = None
    shape: tuple[int, ...] = ()
    trace: Any = None
    records: bool = False
    counts_for: int = 0
    tally: torch.Tensor | None = None
    entry: str | None = None
    outer: Routing | None = None
    version: int = 0
    shared: dict[Any, tuple[torch.Tensor, Any]] = field(default_factory=dict)
    context: Context | None = None
    examples: int = 0
    evidence: dict[int, torch.Tensor] = field(default_factory=dict)
    decisions: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def for_recomputing(self) -> Routing:
        """A copy for a layer that is recomputed for its gradients, and must not be counted or traced again."""
        copied = Routing(self.top_k, self.temperature, self.rule, self.given, self.off, self.tokens, self.shape)
        copied.examples, copied.evidence, copied.decisions = self.examples, {**self.evidence}, {**self.decisions}
        copied.context = None if self.context is None else self.context.again()
        return copied

    def real(self, x: torch.Tensor) -> torch.Tensor | None:
        """Positions of the tokens of `x` that are not padding, if it has the padded shape."""
        return self.tokens if self.tokens is not None and tuple(x.shape[:-1]) == self.shape else None

    def weigh(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (..., E) -> chosen experts and their weights, (..., k): softmax over all, top-k, renormalised."""
        values, choice = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        if self.temperature != 1:
            values = values / self.temperature
        return choice, values.softmax(-1)

    def count(
        self, experts: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor | None, shape: torch.Size
    ) -> None:
        """Add the choices (N, m, k) of a batch's tokens without padding to their examples' tally."""
        if self.tally is None:
            self.tally = weight.new_zeros(shape[0], self.counts_for)
        each = shape.numel() // shape[0]
        tokens = torch.arange(weight.shape[0], device=weight.device) if tokens is None else tokens
        self.tally.index_put_(((tokens // each)[:, None, None], experts), weight.detach(), accumulate=True)

    def weigh_given(self, experts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The fixed weights of some experts (E_m,) for each of N tokens: experts and weights, (N, k) each."""
        assert self.given is not None
        given = self.given.to(experts.device)[:, experts]
        most = max(1, int((given != 0).sum(1).max()))
        weight, choice = given.topk(most, dim=-1)
        each = tokens // len(given)  # examples come one after the other, beams of one example too
        return choice.repeat_interleave(each, 0), weight.repeat_interleave(each, 0)


class RoutingCalls(Calls):
    """The calls of a router, each with a `Routing`; `using` opens a scope with (weights, off).

    Args:
        config: the router's config, whose current options apply.

    Attributes:
        version: incremented when the routed modules change, which invalidates kept values.
    """

    def __init__(self, config: PhatgooseConfig) -> None:
        super().__init__()
        self.config, self.version = config, 0
        self._steps: dict[tuple[int, int], torch.Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)

    def routing(self) -> Routing:
        """The state of the running call; a module called directly continues the last call of its thread or task."""
        current: Routing | None = self.current()
        return self._by_itself() if current is None else current

    def new(self, entry: str | None = None) -> Routing:
        """The initial state of a call."""
        config, scope = self.config, self.scope()
        given, off = (None, False) if scope is None else scope
        options = config.num_experts_per_tok, config.router_temperature, config.routing
        return Routing(*options, given, off, entry=entry, version=self.version)

    def last(self) -> Routing | None:
        """The final state of the last call of this thread or task."""
        last: Routing | None = self.kept()
        return last if last is not None and last.version == self.version else None

    def _by_itself(self) -> Routing:
        routing = self.new()
        if torch.compiler.is_dynamo_compiling() or (last := self.last()) is None:
            return routing
        routing.examples, routing.evidence, routing.decisions = last.examples, {**last.evidence}, {**last.decisions}
        routing.context = last.context
        if torch._C._current_graph_task_id() != -1:  # a layer that a checkpoint outside this model recomputes
            routing.tokens, routing.shape = last.tokens, last.shape
        else:
            routing.trace, routing.records, routing.tally = last.trace, last.records, last.tally
        return routing

    def steps(self, count: int, width: int) -> torch.Tensor:
        """0, width, 2 width, …, count · width on the CPU: made once per size, since small calls live off that."""
        steps = self._steps.get((count, width))
        if steps is None:
            if len(self._steps) > 256:
                self._steps.clear()
            steps = self._steps[count, width] = torch.arange(0, count * width + 1, width, device="cpu")
        return steps


def score(
    x: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, rule: str, symmetric: torch.Tensor | None
) -> torch.Tensor:
    """Scores of experts, (N, S), from inputs (N, d_in) and gates (S, d_in).

    PHATGOOSE's gates are standardised and divided by √d_in once and for all, so that LN(x)·LN(v)/√d_in is one
    product (paper, section 3.2); whitened ones come with the bias that centres their scores. Arrow prototypes have no
    sign: |x·v|.

    Args:
        bias: (S,), `ABSENT` for an expert that does not adapt the linear.
        symmetric: (S,) whose score is an absolute value, or None where none is.
    """
    if rule == "uniform":
        return torch.rand(len(x), len(gates), dtype=x.dtype, device=x.device) + bias
    if rule == "arrow":
        return F.linear(x, gates).abs() + bias
    x = F.layer_norm(x, x.shape[-1:])
    if symmetric is None:
        return F.linear(x, gates, bias)
    scores = F.linear(x, gates)
    return torch.where(symmetric, scores.abs(), scores) + bias


__all__ = ["Routing", "RoutingCalls", "score"]
