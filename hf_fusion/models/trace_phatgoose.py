"""The routing of tokens as data: the chosen experts and their weights at each linear."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from .fused_html import MOST_ROWS, heat_table


class PhatgooseTrace:
    """The routing of a router's last sequences; returned by `PhatgooseRouter.routing_trace`.

    Tokens of the encoder (also as read by cross-attention) and tokens of the decoder are counted separately:
    linears differ in how many tokens they saw.

    Args:
        experts: names.
        paths: id of a routed module -> the module paths of its linears.
        max_tokens: tokens (rows times positions) kept per linear; the oldest positions are dropped first, all but one.

    Attributes:
        dropped: number of tokens dropped because of `max_tokens`, per linear.
    """

    def __init__(self, experts: Sequence[str], paths: dict[int, list[str]], max_tokens: int) -> None:
        self.experts, self.max_tokens = list(experts), max_tokens
        self._paths = paths
        self._parts: dict[str, deque[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._positions: dict[str, int] = {}
        self.dropped: dict[str, int] = {}

    def add(
        self,
        group: Any,
        members: slice,
        choice: torch.Tensor,
        weight: torch.Tensor,
        real: torch.Tensor | None,
        shape: Sequence[int],
    ) -> None:
        """Adds the routing of a batch by some linears of a routed module; called by the module.

        Args:
            group: the `RoutedLinears`.
            members: which of its m linears.
            choice: (N, m, k), positions in ``group.experts``, for the N tokens that are not padding.
            weight: (N, m, k).
            real: (N,) flat positions of these tokens in the batch; None without padding.
            shape: (B, T) of the batch.
        """
        indices = torch.tensor(group.experts, device=choice.device)
        choice, weight = indices[choice].to(torch.int16), weight.detach().to(torch.float32)
        if real is not None:  # padding is not routed
            full_shape = (int(torch.tensor(shape).prod()), *choice.shape[1:])
            choice = choice.new_full(full_shape, -1).index_copy_(0, real, choice)
            weight = weight.new_zeros(full_shape).index_copy_(0, real, weight)
        rows = shape[0] if len(shape) > 1 else choice.shape[0]
        most = max(1, self.max_tokens // rows)
        for index, path in enumerate(self._paths[id(group)][members]):
            chosen = choice[:, index].cpu().view(rows, -1, choice.shape[-1])
            part, unseen = (chosen, weight[:, index].cpu().view_as(chosen)), max(0, chosen.shape[1] - most)
            if unseen:  # copies: a view would keep the whole tensor alive
                part = part[0][:, unseen:].clone(), part[1][:, unseen:].clone()
            parts = self._parts.setdefault(path, deque())
            if parts and parts[-1][0].shape[0] != rows:
                parts.clear()  # another batch
                self._positions[path] = 0
            parts.append(part)
            surplus = max(0, self._positions.get(path, 0) + part[0].shape[1] - most)
            self._positions[path] = self._positions.get(path, 0) + part[0].shape[1] - surplus
            if unseen + surplus:
                self.dropped[path] = self.dropped.get(path, 0) + (unseen + surplus) * rows
            while surplus > 0:
                choice_before, weight_before = parts.popleft()
                if surplus < choice_before.shape[1]:
                    parts.appendleft((choice_before[:, surplus:], weight_before[:, surplus:]))
                surplus -= choice_before.shape[1]

    def has_seen(self, path: str) -> bool:
        """Whether linears of a module have routed tokens.

        Args:
            path: module path in the base; "" is the whole model.

        Returns:
            True if at least one of them has.
        """
        return any(f".{module}".startswith(f".{path}." if path else ".") for module in self._parts)

    @property
    def modules(self) -> list[str]:
        """Module paths of the linears that have routed tokens."""
        return list(self._parts)

    def choices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that one linear chose.

        Args:
            module: path of the linear, one of `modules`.

        Returns:
            Indices of the experts (B, T, k), -1 on padding, and their weights (B, T, k), 0 on padding.

        Raises:
            KeyError: the linear has routed no tokens.
        """
        choice, weight = zip(*self._parts[module], strict=True)
        width = max(part.shape[-1] for part in choice)
        pad = [(0, width - part.shape[-1]) for part in choice]
        return (
            torch.cat([torch.nn.functional.pad(part, p, value=-1) for part, p in zip(choice, pad, strict=True)], 1),
            torch.cat([torch.nn.functional.pad(part, p) for part, p in zip(weight, pad, strict=True)], 1),
        )

    def expert_weights(self, module: str) -> torch.Tensor:
        """Weights of all experts at one linear.

        Args:
            module: path of the linear, one of `modules`.

        Returns:
            (B, T, E), zeros on padding and for experts that were not chosen.

        Raises:
            KeyError: the linear has routed no tokens.
        """
        choice, weight = self.choices(module)
        dense = torch.zeros(*choice.shape[:2], len(self.experts))
        return dense.scatter_add_(2, choice.long().clamp(min=0), weight.masked_fill(choice < 0, 0))

    def mean_weights(self, modules: Sequence[str] | None = None) -> torch.Tensor:
        """Mean weights of the experts over linears, for each token.

        Args:
            modules: linears that saw the same tokens; default is all with as many tokens as the last one.

        Returns:
            (B, T, E), zeros on padding.
        """
        if modules is None:
            last = self.choices(self.modules[-1])[0].shape[:2]
            modules = [module for module in self.modules if self.choices(module)[0].shape[:2] == last]
        return torch.stack([self.expert_weights(module) for module in modules]).mean(0)

    def usage(self) -> dict[str, float]:
        """How much each expert was used.

        Returns:
            Expert name -> its share of all routing weight; sums to 1.
        """
        total = sum(self.expert_weights(module).sum((0, 1)) for module in self.modules)
        assert isinstance(total, torch.Tensor)
        return dict(zip(self.experts, (total / total.sum().clamp(min=1e-9)).tolist(), strict=True))

    def entropy(self) -> dict[str, float]:
        """How evenly each linear uses the experts.

        Returns:
            Module path -> entropy in nats of the experts' mean weights over tokens; 0 if one expert gets all weight.
        """
        shares = {module: self.expert_weights(module).sum((0, 1)) for module in self.modules}
        return {module: float(torch.special.entr(share / share.sum()).sum()) for module, share in shares.items()}

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain lists, for JSON.

        Returns:
            "experts" (names), "modules" (module path -> "experts" and "weights", see `choices`) and "dropped".
        """
        choices = {module: self.choices(module) for module in self.modules}
        return {
            "experts": self.experts,
            "modules": {
                module: {"experts": choice.tolist(), "weights": weight.round(decimals=4).tolist()}
                for module, (choice, weight) in choices.items()
            },
            "dropped": self.dropped,
        }

    def _repr_html_(self) -> str:
        """Tables of the experts' weights: by linear, and by token of the first sequence."""
        totals = {module: self.expert_weights(module).sum((0, 1)) for module in self.modules}
        if not totals:
            return "<p>No tokens were routed.</p>"
        shares = {module: (total / total.sum().clamp(min=1e-9)).tolist() for module, total in totals.items()}
        usage = list(self.usage().values())
        last = self.choices(self.modules[-1])[0]
        rows, tokens = last.shape[:2]
        read = (last[0] >= 0).any(-1).nonzero().flatten().tolist()  # not padding
        shown = read[-MOST_ROWS:]
        seen = f"{rows:,} × {tokens:,} tokens" if rows > 1 else f"{tokens:,} tokens"
        which = " of the first sequence" if rows > 1 else ""
        cut = f", the last {len(shown)} of {len(read):,}" if len(shown) < len(read) else ""
        return heat_table(
            self.experts,
            [("all", usage), *shares.items()],
            f"Share of the routing weight: {seen}, {len(shares):,} linears",
            first="linear",
            order=usage,
            rest="linears",
        ) + heat_table(
            self.experts,
            list(zip(shown, self._mean_weights_of(shown).tolist(), strict=True)),
            f"Mean over linears, by token{which}{cut}",
            first="token",
            order=usage,
            rest="tokens",
        )

    def _mean_weights_of(self, positions: Sequence[int]) -> torch.Tensor:
        """`mean_weights` of some tokens of the first sequence alone, (T, E): a trace may have thousands of tokens."""
        kept = [self.choices(module) for module in self.modules]
        kept = [(choice, weight) for choice, weight in kept if choice.shape[:2] == kept[-1][0].shape[:2]]
        mean = torch.zeros(len(positions), len(self.experts))
        for choice, weight in kept:
            choice, weight = choice[0, positions].long(), weight[0, positions]
            mean.scatter_add_(1, choice.clamp(min=0), weight.masked_fill(choice < 0, 0))
        return mean / len(kept)


__all__ = ["PhatgooseTrace"]
