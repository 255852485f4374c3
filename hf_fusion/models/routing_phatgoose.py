"""The routed linears of PHATGOOSE: the choice of experts per token, and their updates.

Linears that read the same input (query, key and value; gate and up) form one `RoutedLinears`: their scores are one
product, and so are their first halves. Its experts lie side by side without padding, so mixed ranks cost nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .points_phatgoose import decided
from .state_phatgoose import Routing, RoutingCalls, score

ABSENT = -1e4  # score of an expert that does not adapt a linear: its weight is exactly 0 in any dtype
SPARSE_DTYPES = (torch.float32, torch.float64)  # what sampled_addmm computes on a CPU
FEW = 64  # up to this number (token, expert) pairs are gathered; more are grouped by expert


class Routed(NamedTuple):
    """The routing of N tokens at m linears that read the same input."""

    first: int  # the first of these linears
    x: torch.Tensor  # (N, d_in)
    choice: torch.Tensor  # (N, m, k), an index into the experts of these linears
    weight: torch.Tensor  # (N, m, k), sums to 1 over the experts that adapt the linear
    # Where A x is made for all m at once: per linear (N·k·r,), rows of its B and A x times the weight.
    rows: tuple[torch.Tensor, ...] = ()
    hidden: tuple[torch.Tensor, ...] = ()
    bags: torch.Tensor | None = None  # (N,), where each token's part of these begins


class RoutedLinears(nn.Module):
    """LoRA experts and gates of linears that read the same input.

    Parameters:
        gates: (M·E, d_in), the M linears' gates one after the other.
        gate_bias: (M·E,), added to their scores: 0, less for whitened gates, `ABSENT` where there is no expert.
        lora_A: (ΣR, d_in), the rows of all linears' experts side by side, R the rank.
        lora_B: per linear (ΣR_m, d_out), the scaling folded in.

    Args:
        d_in: width of the input.
        d_out: width of each linear's output.
        experts: the experts that adapt at least one of these linears, as indices into the model's.
        ranks: (M, E) rank of each expert at each linear, 0 where it does not adapt it.
        symmetric: for each expert, whether its gate is an Arrow prototype.
        calls: the router's calls, with the routing of the running call.
        reads_encoder: whether `Routing.tokens` applies to the input.
        like: dtype and device.
        decision: index of the `GatePoint` that chooses experts for these linears, and whether it pools an example's
            tokens; None if they have gates themselves.
    """

    def __init__(
        self,
        d_in: int,
        d_out: Sequence[int],
        experts: Sequence[int],
        ranks: Sequence[Sequence[int]],
        symmetric: Sequence[bool],
        calls: RoutingCalls,
        reads_encoder: bool = True,
        like: Mapping[str, Any] | None = None,
        decision: tuple[int, bool] | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.ranks, self.calls, self.reads_encoder = list(experts), ranks, calls, reads_encoder
        self.decision = decision
        self.symmetric = list(symmetric)
        like = like or {}
        gates = 0 if decision else len(ranks) * len(experts)
        self.gates = nn.Parameter(torch.zeros(gates, d_in, **like)) if gates else None
        self.gate_bias = nn.Parameter(torch.zeros(gates, **like)) if gates else None
        self.lora_A = nn.Parameter(torch.zeros(sum(map(sum, ranks)), d_in, **like))
        self.lora_B = nn.ParameterList(
            torch.zeros(sum(each), width, **like) for each, width in zip(ranks, d_out, strict=True)
        )
        flat = [rank for each in ranks for rank in each]
        self.widest = max(flat)
        self.even = min(flat) == self.widest  # every expert adapts every linear with the same rank
        self.starts = list(accumulate(flat, initial=0))[:-1]
        self._tables: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}

    def slot(self, member: int, expert: int) -> tuple[torch.Tensor, ...]:
        """Views of one expert (by its index here) at one linear: gate (d_in,), bias (), A (r, d_in), B (r, d_out).

        Without the first two, if a decision was taken before.
        """
        index, rank = member * len(self.experts) + expert, self.ranks[member][expert]
        start = self.starts[index]
        start_b = start - self.starts[member * len(self.experts)]
        lora = self.lora_A[start : start + rank], self.lora_B[member][start_b : start_b + rank]
        if self.gates is None or self.gate_bias is None:
            return lora
        return self.gates[index], self.gate_bias[index], *lora

    def tables(self, like: torch.Tensor) -> dict[str, Any]:
        """Constant index tensors, built once per device and dtype."""
        key = (like.device, like.dtype)
        if key not in self._tables:  # two threads may both make them: they are the same
            flat = [rank for each in self.ranks for rank in each]
            where: dict[str, Any] = {"device": like.device}
            symmetric = self.symmetric * len(self.ranks)
            ranks, within = torch.tensor(flat, **where)[:, None], torch.arange(self.widest, **where)
            rows = torch.tensor(self.starts, **where)[:, None] + within
            position = torch.full((self.calls.config.num_experts,), -1, **where)
            position[self.experts] = torch.arange(len(self.experts), **where)
            self._tables[key] = {
                # Rows of A of each pair of linear and expert; one of a lower rank borrows some, which `own` cancels.
                "rows": rows.clamp_(max=sum(flat) - 1),
                "own": (within < ranks).to(like.dtype),
                "offset": torch.arange(0, len(flat), len(self.experts), **where)[:, None],
                "experts": torch.tensor(self.experts, **where),
                "position": position,  # of an expert of the model here; -1 if it adapts none of these linears
                "symmetric": torch.tensor(symmetric, **where) if any(symmetric) else None,
            }
        return self._tables[key]

    def forward(self, member: int, x: torch.Tensor, state: Routing) -> torch.Tensor:
        """The update of one linear for its input (..., d_in): (N, d_out), N the real tokens."""
        routed = self.route(member, x, state)
        index = member - routed.first
        if routed.bags is not None:
            rows, hidden = routed.rows[index], routed.hidden[index]
            return torch.embedding_bag(self.lora_B[member], rows, routed.bags, False, 0, False, hidden)[0]
        choice, weight = routed.choice[:, index], routed.weight[:, index]
        if torch.compiler.is_dynamo_compiling() or choice.numel() <= FEW:  # a size that depends on data is no guard
            return self._gathered(member, routed.x, choice, weight)
        return self._grouped(member, routed.x, choice, weight)

    def route(self, member: int, x: torch.Tensor, state: Routing) -> Routed:
        """Scores and choices for an input, shared among the linears that read it."""
        # A graph is not kept beyond the linear it belongs to, and a compiled graph shares products by itself.
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or len(self.ranks) == 1:
            return self._route(slice(member, member + 1), x, state)
        shared = state.shared.get(self)
        if shared is not None and shared[0] is x:
            if member == len(self.ranks) - 1:
                del state.shared[self]
            return shared[1]
        routed = self._route(slice(member, len(self.ranks)), x, state)
        if member < len(self.ranks) - 1:
            state.shared[self] = x, routed
        return routed

    def _route(self, members: slice, x: torch.Tensor, state: Routing) -> Routed:
        count, experts = members.stop - members.start, len(self.experts)
        flat = x.reshape(-1, x.shape[-1]).to(self.lora_A.dtype)
        real = state.real(x) if self.reads_encoder else None
        if real is not None:
            flat = flat.index_select(0, real)
        tables = self.tables(flat)
        if state.given is not None:
            choice, weight = (
                part[:, None].expand(-1, count, -1) for part in self._fixed_weights(x, real, tables, state)
            )
        elif self.gates is None or self.gate_bias is None:
            choice, weight = (part[:, None].expand(-1, count, -1) for part in self._decided(x, real, tables, state))
        else:
            slots = slice(members.start * experts, members.stop * experts)
            symmetric = tables["symmetric"] if tables["symmetric"] is None else tables["symmetric"][slots]
            scores = score(flat, self.gates[slots], self.gate_bias[slots], state.rule, symmetric)
            choice, weight = state.weigh(scores.view(-1, count, experts))
        if state.counts_for:
            state.count(tables["experts"][choice], weight, real, x.shape[:-1])
        if state.records:
            state.trace.add(self, members, choice, weight, real, x.shape[:-1])
        eager = not (torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling())
        # sampled_addmm refuses a row that wants more entries than it has (experts of few rows that borrow many).
        each = count * choice.shape[-1] * self.widest
        fits = each * flat.shape[0] > 0 and each <= self.lora_A.shape[0]
        if eager and fits and flat.device.type == "cpu" and flat.dtype in SPARSE_DTYPES:
            return Routed(members.start, flat, choice, weight, *self._hidden(members, flat, choice, weight))
        return Routed(members.start, flat, choice, weight)

    def _fixed_weights(
        self, x: torch.Tensor, real: torch.Tensor | None, tables: Mapping[str, Any], state: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The given weights of each real token: experts and weights, (N, k)."""
        tokens = x.shape[:-1].numel()
        choice, weight = state.weigh_given(tables["experts"], tokens)
        if real is not None:
            choice, weight = choice[real], weight[real]
        return choice, weight.to(self.lora_A.dtype)

    def _decided(
        self, x: torch.Tensor, real: torch.Tensor | None, tables: Mapping[str, Any], state: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A decision taken before: experts and weights, (N, k); one that adapts none of these linears has weight 0."""
        assert self.decision is not None
        choice, weight = decided(state, *self.decision, x, real)
        position = tables["position"][choice]
        return position.clamp(min=0), (weight * (position >= 0)).to(self.lora_A.dtype)

    def _slots(self, choice: torch.Tensor, first: int) -> torch.Tensor:
        """Experts chosen at m linears from `first` on, (N, m, k), as indices into all pairs of linear and expert."""
        if len(self.ranks) == 1:
            return choice
        return choice + self.tables(self.lora_A)["offset"][first : first + choice.shape[1]]

    def _weighted(self, product: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A x, (..., k, r), times the experts' weights (..., k); rows that were borrowed become 0."""
        hidden = product * weight.unsqueeze(-1)
        return hidden if self.even else hidden * self.tables(product)["own"][slots]

    def _rows_of_b(self, rows: torch.Tensor, member: int) -> torch.Tensor:
        """Rows of A as rows of one linear's B."""
        if member:
            rows = rows - self.starts[member * len(self.experts)]
        return rows if self.even else rows.clamp(0, self.lora_B[member].shape[0] - 1)

    def _hidden(self, members: slice, x: torch.Tensor, choice: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
        """A x of the chosen experts alone, times their weights: a product computed where it is wanted (SDDMM).

        Returns:
            The last three fields of `Routed`.
        """
        slots = self._slots(choice, members.start)
        rows = torch.embedding(self.tables(x)["rows"], slots)  # (N, m, k, r)
        tokens, count = choice.shape[:2]
        values = x.new_zeros(rows.numel())
        each = self.calls.steps(tokens, values.shape[0] // tokens)
        lora_A = self.lora_A
        size = (tokens, lora_A.shape[0])
        wanted = torch.sparse_csr_tensor(each, rows.view(-1), values, size, check_invariants=False)
        product = torch.sparse.sampled_addmm(wanted, x, lora_A.t(), beta=0).values()
        hidden = self._weighted(product.view(rows.shape), slots, weight)
        if len(self.ranks) == 1:
            return (self._rows_of_b(rows.view(-1), 0),), (hidden.view(-1),), each[:-1]
        rows_of, hidden_of = (part.transpose(0, 1).reshape(count, -1).unbind() for part in (rows, hidden))
        rows_of = tuple(self._rows_of_b(part, members.start + index) for index, part in enumerate(rows_of))
        return rows_of, hidden_of, self.calls.steps(tokens, values.shape[0] // (tokens * count))[:-1]

    def _gathered(self, member: int, x: torch.Tensor, choice: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """For few tokens: each pair of token and expert fetches its own A and B."""
        slots = self._slots(choice[:, None], member)[:, 0]  # (N, k)
        rows = self.tables(x)["rows"][slots].flatten(1)
        product = torch.bmm(self.lora_A[rows], x[..., None]).view(*choice.shape, self.widest)
        hidden = self._weighted(product, slots, weight).flatten(1)
        return torch.bmm(hidden[:, None], self.lora_B[member][self._rows_of_b(rows, member)])[:, 0]

    def _grouped(self, member: int, x: torch.Tensor, choice: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """For many tokens: pairs are sorted by expert, and each active expert is one product."""
        k, experts = choice.shape[1], len(self.experts)
        order = choice.flatten().argsort(stable=True)
        token = order // k
        counts = choice.flatten().bincount(minlength=experts)
        weight = weight.flatten()[order, None]
        x = x[token]
        if x.is_cuda and self.even and x.dtype is torch.bfloat16:
            until = counts.cumsum(0).int()
            a = self.lora_A.view(len(self.ranks), experts, self.widest, -1)[member]
            b = self.lora_B[member].view(experts, self.widest, -1)
            update = F.grouped_mm(F.grouped_mm(x, a.mT, offs=until) * weight, b, offs=until)
        else:
            slots = (self.slot(member, expert)[-2:] for expert in range(experts))
            parts = zip(x.split(counts.tolist()), slots, strict=True)
            update = torch.cat([part @ a.t() @ b for part, (a, b) in parts if len(part)]) * weight
        return update.new_zeros(len(choice), update.shape[1]).index_add(0, token, update)

    def add_update(self, member: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """A linear's output with the update of its experts added."""
        state = self.calls.routing()
        if state.off:
            return output
        update = self(member, x, state).to(output.dtype)
        real = state.real(x) if self.reads_encoder else None
        if real is None:
            return output.add_(update.view_as(output))
        output.view(-1, output.shape[-1]).index_add_(0, real, update)
        return output


class RoutedHead(nn.Module):
    """Complete heads of the experts (PEFT's ``modules_to_save``).

    A head serves an example as its expert served the example's tokens: its weight is the expert's share of all the
    weight that the linears gave, among the top-k. A gate of its own would decide by one vector where they decide by
    many. With one label space the heads' outputs are weighted; with several, the experts' probabilities are, in the
    union of the labels: a class that an expert does not know gets nothing from it.

    Parameters:
        weight: (E, C, d_in).
        bias: (E, C); `ABSENT` for a class that an expert does not know.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        experts: int,
        calls: RoutingCalls,
        mixes_probabilities: bool,
        like: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        like = like or {}
        self.experts, self.calls, self.mixes_probabilities = list(range(experts)), calls, mixes_probabilities
        self.weight = nn.Parameter(torch.zeros(experts, d_out, d_in, **like))
        self.bias = nn.Parameter(torch.zeros(experts, d_out, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., d_in) -> (B, ..., C)."""
        state, experts = self.calls.routing(), len(self.experts)
        flat = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        weights = state.given if state.given is not None and not state.off else state.tally
        if weights is None:  # the base alone: no expert was chosen
            weights = flat.new_ones(1, experts)
        weight, choice = weights.topk(min(state.top_k, experts) if weights is state.tally else experts, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        dense = torch.zeros_like(weights, dtype=flat.dtype).scatter(-1, choice, weight.to(flat.dtype))
        dense = dense.repeat_interleave(flat.shape[0] // dense.shape[0], 0)  # (N, E)
        outputs = torch.einsum("nd,ecd->nec", flat, self.weight) + self.bias
        if self.mixes_probabilities:
            outputs = torch.einsum("nec,ne->nc", outputs.softmax(-1), dense).clamp(min=1e-30).log()
        else:
            outputs = torch.einsum("nec,ne->nc", outputs, dense)
        return outputs.view(*x.shape[:-1], -1)


with warnings.catch_warnings():  # sparse CSR tensors warn once that they are in beta: here, and nowhere else
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1), check_invariants=False)


__all__ = ["Routed", "RoutedHead", "RoutedLinears"]
