"""Evidence in context: what the tokens before a token say of its task, beside the token itself.

One token often tells little of its task, and many tokens nearly always tell it: a decision by a decaying mean of the
scores finds the right expert in other wordings, and on tasks that only resemble an expert's. So that a generated token
is routed as it would be without a cache, the scores of the tokens before it are kept in the cache of keys and values,
as one more layer for each decision: they are reordered, repeated and cropped with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, StaticLayer

DECAY = 0.92  # of the evidence from token to token; .85 and .95 route nearly as well
CURRENT = 0.4  # weight of the token's own scores beside the mean
REACH = 64  # tokens that the mean looks back, its own included: a power of 2


class DynamicEvidence(DynamicLayer):
    """Scores (B, 1, T, E + 1) of the tokens that a growing cache holds, as keys.

    Args:
        decision: index of the `GatePoint`.
    """

    def __init__(self, decision: int) -> None:
        super().__init__()
        self.decision = decision


class StaticEvidence(StaticLayer):
    """Scores (B, 1, T, E + 1) of the tokens that a cache of fixed size T holds, as keys.

    Args:
        decision: index of the `GatePoint`.
        length: T.
    """

    def __init__(self, decision: int, length: int) -> None:
        super().__init__(length)
        self.decision = decision


@dataclass(frozen=True, eq=False)
class Pages:
    """Where the tokens of several sequences are in the pages of continuous batching.

    Attributes:
        owner: the cache, which holds the scores of each decision as long as it lives.
        written: (N,) entries of the call's tokens.
        read: for each sequence, the entries of its last tokens, with those of the call.
        lengths: for each sequence, its tokens in the call.
    """

    owner: Any
    written: torch.Tensor
    read: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Pages | None:
        """The pages that a forward is given; None if it is given none, or tables of blocks, as some kernels are."""
        written, read = arguments.get("write_index"), arguments.get("read_index")
        lengths = arguments.get("cu_seq_lens_q")
        if not written or read is None or lengths is None:
            return None
        kind = "full_attention"  # layers of other kinds forget tokens
        indices = [each.index for each in arguments["cache"].cache_allocators.values() if each.layer_type == kind]
        if not indices:
            return None
        index = indices[0]
        counts = tuple(lengths.diff().tolist())
        if len(read[index]):
            ends = arguments["cu_seq_lens_k"][kind].tolist()
            parts = tuple(
                read[index][max(start, end - count - REACH + 1) : end]
                for start, end, count in zip(ends, ends[1:], counts, strict=False)
            )
        else:
            parts = tuple(written[index][: sum(counts)].split(counts))
        return cls(arguments["cache"], written[index], parts, counts)


@dataclass(eq=False)
class Context:
    """What a call of a router knows of the tokens before its own.

    Attributes:
        decay: of the evidence.
        cache: of keys and values that the call continues, or None.
        pages: of continuous batching, or None.
        sequences: (B, T) number of the sequence that a token belongs to, where a row holds several.
        rows: index of a decision -> scores of the call's tokens, (B, T, E + 1) with a last column of 1; 0 for padding.
    """

    decay: float
    cache: Any = None
    pages: Pages | None = None
    sequences: torch.Tensor | None = None
    rows: dict[int, torch.Tensor] | None = None

    @classmethod
    def of(cls, decay: float, cache: Any, arguments: Mapping[str, Any]) -> Context:
        """The context of a call with these arguments."""
        if torch.compiler.is_dynamo_compiling():
            return cls(decay, cache)
        pages = Pages.of(arguments)
        positions = arguments.get("position_ids")
        sequences = None
        if isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[1] > 1 and pages is None:
            follows = positions.diff(dim=1) == 1
            if not follows.all():
                sequences = F.pad((~follows).long().cumsum(1), (1, 0))
        return cls(decay, None if pages else cache, pages, sequences)

    def again(self) -> Context:
        """The context of tokens that a module reads again, when nothing of a cache is left."""
        return Context(self.decay, sequences=self.sequences)

    def apply(
        self, decision: int, scores: torch.Tensor, shape: tuple[int, int], real: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores (N, E) of tokens by themselves -> (N, E) with the evidence of those before.

        Args:
            decision: index of the `GatePoint`.
            scores: of the tokens that are not padding.
            shape: (B, T) with padding.
            real: (N,) flat positions of these tokens; None without padding.
        """
        rows = F.pad(scores, (0, 1), value=1.0)
        if real is not None:
            rows = rows.new_zeros(shape[0] * shape[1], rows.shape[1]).index_copy(0, real, rows)
        rows = rows.view(*shape, -1)
        if self.pages is not None:
            mean = self._paged(decision, rows[0], self.pages)
        else:
            self.rows = {**(self.rows or {}), decision: rows}
            before, sequences, known = self._before(decision), self.sequences, rows
            if before is not None:
                known = torch.cat([before.to(rows), rows], 1)
                if sequences is not None:  # the first goes on
                    sequences = torch.cat([sequences[:, :1].expand(-1, before.shape[1]), sequences], 1)
            mean = decayed(known, self.decay, sequences)[:, -shape[1] :].flatten(0, 1)
        mean = mean if real is None else mean.index_select(0, real)
        return mean[:, :-1] / mean[:, -1:] + CURRENT * scores

    def _before(self, decision: int) -> torch.Tensor | None:
        """Scores of the last tokens that the cache holds, (B, at most REACH - 1, E + 1)."""
        for layer in _layers(self.cache):
            if layer.decision == decision and layer.keys is not None:
                if isinstance(layer, StaticEvidence):
                    places = layer.get_seq_length() + torch.arange(1 - REACH, 0, device=layer.keys.device)
                    found = layer.keys[:, 0].index_select(1, places.clamp(min=0))
                    return found * (places >= 0)[:, None]
                return layer.keys[:, 0, 1 - REACH :]
        return None

    def _paged(self, decision: int, rows: torch.Tensor, pages: Pages) -> torch.Tensor:
        kept = pages.owner.__dict__.setdefault("evidence", {})
        least = int(max(index.max() for index in (pages.written, *pages.read))) + 1
        if decision not in kept or len(kept[decision]) < least:
            grown = rows.new_zeros(2 * least, rows.shape[1])
            if decision in kept:
                grown[: len(kept[decision])] = kept[decision]
            kept[decision] = grown
        count = sum(pages.lengths)  # more are padding
        kept[decision][pages.written[:count]] = rows[:count]
        found = torch.zeros_like(rows)
        means = [
            decayed(kept[decision][index][None], self.decay)[0, -length:]
            for index, length in zip(pages.read, pages.lengths, strict=True)
            if length
        ]
        found[:count] = torch.cat(means)
        found[count:, -1] = 1
        return found

    def keep(self, output: Any) -> None:
        """Adds the call's scores to the cache that its output holds, if any."""
        cache = _cache_of(output)
        if not self.rows or cache is None:
            return
        found = {layer.decision: layer for layer in _layers(cache)}
        for decision, rows in self.rows.items():
            layer = found.get(decision)
            if layer is None:
                lengths = [each.max_cache_len for each in cache.layers if isinstance(each, StaticLayer)]
                layer = StaticEvidence(decision, max(lengths)) if lengths else DynamicEvidence(decision)
                cache.layers.append(layer)
            layer.update(rows[:, None], rows[:, None, :, :0])


def decayed(rows: torch.Tensor, decay: float, sequences: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of the last `REACH` rows (B, T, D), each row weighted by the decay to the power of its distance.

    By doubling: log2(`REACH`) sums of whole tensors, each element with the same operations wherever it stands.

    Args:
        rows: in order.
        decay: from one row to the next.
        sequences: (B, T); rows of another sequence count nothing.
    """
    reach = 1
    while reach < min(REACH, rows.shape[1]):
        earlier = rows[:, :-reach]
        if sequences is not None:
            earlier = earlier * (sequences[:, reach:] == sequences[:, :-reach])[..., None]
        rows = rows + F.pad(decay**reach * earlier, (0, 0, reach, 0))
        reach *= 2
    return rows


def _layers(cache: Any) -> Iterator[DynamicEvidence | StaticEvidence]:
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, (DynamicEvidence, StaticEvidence)):
            yield layer


def _cache_of(output: Any) -> Any:
    """The cache of keys and values in a model's output, or None."""
    values = output if isinstance(output, tuple) else (getattr(output, n, None) for n in ("past_key_values", "cache"))
    return next((value for value in values if hasattr(value, "layers") and hasattr(value, "update")), None)


__all__ = ["CURRENT", "DECAY", "Context", "decayed"]
