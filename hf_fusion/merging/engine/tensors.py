"""The inputs of a merging method: one tensor of the base and of every expert, read in chunks.

A method is a function of `Tensors` and of its parameters. It may first compute statistics of the values (`gram`,
`sums`, `find_thresholds`: each reads them in chunks); then it returns a function of a chunk that computes the merged
values, or the merged tensor:

    def task_arithmetic(tensors, *, weight, scaling):
        return Combination(1 - scaling * sum(weight), [scaling * w for w in weight])
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from hf_fusion.merging.engine.checkpoint import DTYPES, OpenFiles, TensorEntry

CHUNK = 1 << 18
"""Elements per chunk: a few chunks in float32 fit into the cache of a core."""

SAMPLE_PIECE = 1 << 11
"""Consecutive elements in each piece of a sample."""

FLOAT64_BLOCK = 1 << 16
"""Elements of each input that are converted to float64 at once: those of a few inputs fit into the cache of a core."""

CANCELLATION_LIMIT = 8.0
"""Weighted sums whose weights have a larger L1 norm amplify float32 rounding errors: they are computed in float64."""

WIDE, LINE, MAX_ROWS = 1 << 19, 1 << 12, 8
"""For sums of bfloat16 inputs: elements per chunk, elements per line of `embedding_bag`, and maximum inputs."""

CPU = torch.device("cpu")


class Reader(Protocol):
    """Reads the values of one tensor, flattened."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""


class FileReader:
    """Reads a tensor from a safetensors file."""

    def __init__(self, entry: TensorEntry, files: OpenFiles) -> None:
        self.entry, self.files, self.shape = entry, files, entry.shape
        self._dtype = getattr(torch, DTYPES[entry.dtype][0])

    @property
    def is_bfloat16(self) -> bool:
        """Whether the stored dtype is bfloat16."""
        return self._dtype is torch.bfloat16

    def read_stored(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat tensor of the stored dtype with the values from `start` on."""
        self.files.read(self.entry, start, out.view(torch.uint8).numpy())

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        size = len(out)
        if self._dtype is torch.float32:
            self.files.read(self.entry, start, out.numpy().view(np.uint8))
            return
        for first in range(0, size, CHUNK):
            raw = scratch("raw", torch.uint8)[: min(CHUNK, size - first) * self.entry.itemsize]
            self.files.read(self.entry, start + first, raw.numpy())
            out[first : first + CHUNK].copy_(raw.view(self._dtype))


class MemoryReader:
    """Reads a tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self._flat = tuple(tensor.shape), tensor.detach().reshape(-1)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        out.copy_(self._flat[start : start + len(out)])


T = TypeVar("T")


@dataclass(frozen=True)
class Statistic:
    """A statistic of an expert on its data, for one tensor; see `hf_fusion.training.expert_statistics`.

    Attributes:
        reader: its diagonal Fisher information, in the tensor's shape; or the Gram matrix of a linear layer's inputs.
        axis: the tensor's input dimension, which a Gram matrix refers to: 1, or 0 for Conv1D.
        norm: of the Fisher information of all tensors of the model.
    """

    reader: Reader
    axis: int = 1
    norm: float = 0.0


class Chunk:
    """Consecutive elements of all inputs, in float32; its tensors are valid until the next chunk.

    Attributes:
        start: index of its first element.
        size: number of elements.
        index: 0 for the first chunk of a tensor; negative for pieces of a sample.
    """

    def __init__(self, tensors: Tensors, index: int, start: int, size: int) -> None:
        self.tensors, self.index, self.start, self.size = tensors, index, start, size
        self._read: dict[int, torch.Tensor] = {}

    @property
    def base(self) -> torch.Tensor:
        """Values of the base, (size,)."""
        return self._values(-1, self.tensors.required_base)

    def expert(self, index: int) -> torch.Tensor:
        """Values of an expert, (size,). Read-only: `delta` is computed from them."""
        return self._values(index, self.tensors.experts[index])

    def delta(self, index: int) -> torch.Tensor:
        """Task vector of an expert, θ_i - θ0, (size,); may be overwritten."""
        return torch.sub(self.expert(index), self.base, out=scratch(f"delta {index}")[: self.size])

    def deltas(self) -> torch.Tensor:
        """Task vectors of all experts, (K, size), computed at each call; may be overwritten."""
        out = stacked("deltas", len(self.tensors), self.size)
        for row, reader in zip(out, self.tensors.experts, strict=True):
            reader.read(self.start, row)
        return out.sub_(self.base)

    def float64_blocks(self, deltas: bool) -> Iterator[torch.Tensor]:
        """Values of all experts in float64, in blocks of consecutive elements: for decisions that rounding may change.

        Args:
            deltas: task vectors, whose differences are exact in float64 but not in float32; else the values.

        Yields:
            (K, n), valid until the next block; may be overwritten.
        """
        rows = [self.expert(index) for index in range(len(self.tensors))]
        for first in range(0, self.size, FLOAT64_BLOCK):
            block = slice(first, min(first + FLOAT64_BLOCK, self.size))
            out = stacked("float64", len(rows), block.stop - first, FLOAT64_BLOCK, torch.float64)
            for target, row in zip(out, rows, strict=True):
                target.copy_(row[block])
            yield out.sub_(self.base[block]) if deltas else out

    def statistic(self, index: int) -> torch.Tensor:
        """The statistic of an expert for these elements, (size,); may be overwritten."""
        statistic = self.tensors.statistics[index]
        if statistic is None:
            raise ValueError(f"expert {index + 1} has no statistics of {self.tensors.name}")
        return self._values(len(self.tensors) + index, statistic.reader)

    def random(self, dtype: type[np.unsignedinteger[Any]] = np.uint16) -> np.ndarray:
        """Uniform random integers of `dtype`, (K, size); determined by the seed, the tensor's name and the chunk."""
        name = zlib.crc32(self.tensors.name.encode())
        index = self.index % (1 << 32)  # pieces of a sample have negative indices
        count = len(self.tensors) * self.size
        words = -(-count * np.dtype(dtype).itemsize // 8)
        drawn = np.random.SFC64([self.tensors.seed, name, index]).random_raw(words)
        return drawn.view(dtype)[:count].reshape(len(self.tensors), self.size)

    def _values(self, index: int, reader: Reader) -> torch.Tensor:
        if index not in self._read:
            values = scratch(f"values {index}")[: self.size]
            reader.read(self.start, values)
            self._read[index] = values
        return self._read[index]


Merged = Callable[[Chunk], torch.Tensor]
"""Computes the merged values (size,) of a chunk, fp32; called for a tensor's chunks in order."""
Values = Callable[[Chunk], torch.Tensor]
"""Computes a value for every expert and element of a chunk, (K, size); the result may be overwritten."""


class Tensors:
    """One tensor of the base and of every expert.

    Args:
        name: of the tensor.
        base: the base's values, or None for methods without a base.
        experts: the experts' values, all of one shape.
        seed: for random draws.
        model: all tensors of the models, for methods that need more than one.
        statistics: of each expert, for data-dependent methods; None for an expert without.
        memory: keeps what methods compute of the inputs alone, for merges of the same inputs with other parameters.

    Attributes:
        shape: of each input.
        numel: number of elements of each input.
    """

    def __init__(
        self,
        name: str,
        base: Reader | None,
        experts: Sequence[Reader],
        seed: int = 0,
        model: WholeModel | None = None,
        statistics: Sequence[Statistic | None] = (),
        memory: dict[Any, Any] | None = None,
    ) -> None:
        self.memory = memory
        self.name, self.base, self.experts, self.seed = name, base, list(experts), seed
        self.statistics = list(statistics)
        self.model = model or WholeModel(lambda: [self])
        self.shape: tuple[int, ...] = (base or experts[0]).shape
        self.numel = math.prod(self.shape)

    def __len__(self) -> int:
        """Number of experts."""
        return len(self.experts)

    @property
    def required_base(self) -> Reader:
        """The base's values, for methods that need a base."""
        if self.base is None:
            raise ValueError(f"{self.name} has no base")
        return self.base

    def chunks(self) -> Iterator[Chunk]:
        """All elements, in order."""
        for index, start in enumerate(range(0, self.numel, CHUNK)):
            yield Chunk(self, index, start, min(CHUNK, self.numel - start))

    def sample(self) -> Iterator[Chunk]:
        """A sample of the elements, in equally spaced pieces."""
        return self.chunks() if self.numel <= CHUNK else _sample_pieces([self])

    def whole(self, reader: Reader) -> torch.Tensor:
        """All values of an input, in its shape: for methods that cannot work in chunks."""
        values = torch.empty(math.prod(reader.shape))
        reader.read(0, values)
        return values.view(reader.shape)

    def whole_deltas(self) -> torch.Tensor:
        """The task vectors of all experts, (K, *shape)."""
        deltas = torch.empty(len(self), self.numel)
        base = self.whole(self.required_base).view(-1)
        for delta, reader in zip(deltas, self.experts, strict=True):
            reader.read(0, delta)
            delta.sub_(base)
        return deltas.view(len(self), *self.shape)

    def sums(self, of: Callable[[Chunk], torch.Tensor]) -> torch.Tensor:
        """Sums a function of a chunk over all chunks, in float64.

        The function should also sum in float64 if it reduces many elements: see `Chunk.float64_blocks`, `magnitudes`.
        """
        return sum((of(chunk).double() for chunk in self.chunks()), start=torch.zeros((), dtype=torch.float64))

    def gram(self, deltas: bool = True) -> torch.Tensor:
        """Inner products of the experts, (K, K), computed in float64.

        Args:
            deltas: of their task vectors; else of their values.
        """
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for chunk in self.chunks():
            for block in chunk.float64_blocks(deltas):
                total.addmm_(block, block.mT)
        return (total + total.mT) / 2  # exactly symmetric


class WholeModel:
    """All merged tensors in sequence, as if they were one.

    Args:
        opened: opens them.
    """

    def __init__(self, opened: Callable[[], Sequence[Tensors]]) -> None:
        self._opened, self._lock = opened, threading.Lock()
        self._known: dict[Any, Any] = {}

    @cached_property
    def tensors(self) -> list[Tensors]:
        """The tensors, in order."""
        return list(self._opened())

    @property
    def numel(self) -> int:
        """Elements of one expert."""
        return sum(tensors.numel for tensors in self.tensors)

    def chunks(self) -> Iterator[Chunk]:
        """All elements, in order."""
        for tensors in self.tensors:
            yield from tensors.chunks()

    def sample(self) -> Iterator[Chunk]:
        """A sample of the elements, in equally spaced pieces."""
        return _sample_pieces(self.tensors)

    def compute_once(self, key: Hashable, make: Callable[[WholeModel], T]) -> T:
        """The result of `make`, computed at the first call with this key and cached."""
        with self._lock:
            if key not in self._known:
                self._known[key] = make(self)
            known: T = self._known[key]
            return known


def _sample_pieces(tensors: Sequence[Tensors]) -> Iterator[Chunk]:
    """Equally spaced pieces of tensors, as if they were one: a sample to bracket quantiles with.

    With a sample of s of N elements, a search for a rank keeps about N s^-1/2 elements; the sum of sampled and kept
    elements is minimal at s ~ N^2/3.
    """
    total = sum(each.numel for each in tensors)
    step = max(SAMPLE_PIECE, total * SAMPLE_PIECE // max(CHUNK // 4, int((3 * total) ** (2 / 3))))
    before = index = 0
    for each in tensors:
        for start in range(-before % step, each.numel, step):
            index -= 1
            yield Chunk(each, index, start, min(SAMPLE_PIECE, each.numel - start))
        before += each.numel


class Combination:
    """A weighted sum of the inputs: base · θ0 + Σ experts_i · θ_i."""

    def __init__(self, base: float, experts: Sequence[float]) -> None:
        self.base, self.experts = base, experts

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        """The merged values of a chunk, (size,)."""
        if loses_precision(self.base if chunk.tensors.base else 0.0, *self.experts):
            wide = torch.zeros(chunk.size, dtype=torch.float64)
            for weight, reader in self._inputs(chunk.tensors):
                values = scratch("input")[: chunk.size]
                reader.read(chunk.start, values)
                wide.add_(values.double(), alpha=weight)
            return wide.float()
        # one buffer for all inputs stays in the cache of a core; one per input would not
        total, values = scratch("total")[: chunk.size], scratch("input")[: chunk.size]
        is_first = True
        for weight, reader in self._inputs(chunk.tensors):
            reader.read(chunk.start, values)
            torch.mul(values, weight, out=total) if is_first else total.add_(values, alpha=weight)
            is_first = False
        return total.zero_() if is_first else total

    def _inputs(self, tensors: Tensors) -> list[tuple[float, Reader]]:
        rows = [(self.base, tensors.base), *zip(self.experts, tensors.experts, strict=True)]
        return [(weight, reader) for weight, reader in rows if reader is not None and weight]

    def in_bfloat16(self, tensors: Tensors) -> Iterator[tuple[int, torch.Tensor]] | None:
        """(start, bfloat16 values) in order, if all inputs are stored in bfloat16; else None.

        `embedding_bag` computes weighted sums of rows of a table: it reads bfloat16 rows, adds in float32 and rounds
        once, while `__call__` converts every input to float32. Its weights are bfloat16, too; a float32 weight is
        the sum of three of them.
        """
        inputs = self._inputs(tensors)
        stored = [
            (weight, reader) for weight, reader in inputs if isinstance(reader, FileReader) and reader.is_bfloat16
        ]
        nonzero = any(torch.tensor(weight).bfloat16() for weight, _ in stored)  # after rounding
        is_safe = nonzero and not loses_precision(*(weight for weight, _ in inputs))
        return self._sum_rows(tensors, stored) if is_safe and len(stored) == len(inputs) <= MAX_ROWS else None

    @staticmethod
    def _sum_rows(tensors: Tensors, inputs: list[tuple[float, FileReader]]) -> Iterator[tuple[int, torch.Tensor]]:
        count, lines = len(inputs), WIDE // LINE
        rest, parts = torch.tensor([weight for weight, _ in inputs]), []
        for _ in range(3):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        weights = torch.cat(parts)
        used = weights.nonzero()[:, 0]
        weights = weights[used].expand(lines, -1).contiguous()
        bags = used % count * lines + torch.arange(lines)[:, None]  # (lines, weights): the same line of all inputs
        table = scratch("table", torch.bfloat16, MAX_ROWS * WIDE)[: count * WIDE]
        rows = list(table.view(count, WIDE))
        for start in range(0, tensors.numel, WIDE):
            size = min(WIDE, tensors.numel - start)
            for row, (_, reader) in zip(rows, inputs, strict=True):
                reader.read_stored(start, row[:size])
            used_lines = -(-size // LINE)
            merged = F.embedding_bag(
                bags[:used_lines], table.view(-1, LINE), mode="sum", per_sample_weights=weights[:used_lines]
            )
            yield start, merged.view(-1)[:size]


_local = threading.local()


def compute_on(device: torch.device) -> None:
    """Sets the device on which methods in this thread multiply and decompose matrices: see `compute_device`."""
    _local.device = device


def compute_device() -> torch.device:
    """The device for products and decompositions of whole matrices; methods return CPU tensors.

    Methods that work in chunks are limited by the disk and stay on the CPU.
    """
    found: torch.device = _local.__dict__.get("device", CPU)
    return found


def scratch(name: str, dtype: torch.dtype = torch.float32, size: int = CHUNK) -> torch.Tensor:
    """This thread's buffer `name` of `size` elements; for uint8, room for a chunk of 8-byte elements."""
    buffers: dict[str, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    if name not in buffers:
        with torch.inference_mode(False):  # usable within and outside of that mode
            buffers[name] = torch.empty(size * (8 if dtype is torch.uint8 else 1), dtype=dtype)
    return buffers[name]


def stacked(name: str, count: int, size: int, most: int = CHUNK, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This thread's buffer `name` for `count` rows of at most `most` elements, as (count, size)."""
    return scratch(f"{name} of {count}", dtype, count * most)[: count * size].view(count, size)


def loses_precision(*weights: float) -> bool:
    """Whether a weighted sum may amplify float32 rounding errors: see `CANCELLATION_LIMIT`."""
    return sum(map(abs, weights)) > CANCELLATION_LIMIT


def magnitudes(values: torch.Tensor) -> torch.Tensor:
    """L1 norms of rows, (K, n) float32 -> (K,) float64; overwrites its argument."""
    return values.abs_().sum(-1, dtype=torch.float64)


def clamp_variance(name: str, values: torch.Tensor) -> torch.Tensor:
    """Clamps the running variances of batch norms, which a merge can make negative, to at least 0."""
    return values.clamp(min=0) if name.endswith("running_var") else values


def merge_tensors(
    tensors: Tensors, merged: Merged | torch.Tensor, dtype: str = "F32"
) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, values) of what a method returned, in order; in float32, or in the output `dtype`."""
    return ((start, clamp_variance(tensors.name, values)) for start, values in _merged(tensors, merged, dtype))


def _merged(tensors: Tensors, merged: Merged | torch.Tensor, dtype: str) -> Iterator[tuple[int, torch.Tensor]]:
    if dtype == "BF16" and isinstance(merged, Combination) and (narrow := merged.in_bfloat16(tensors)) is not None:
        yield from narrow
        return
    if isinstance(merged, torch.Tensor):
        flat = merged.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            yield start, flat[start : start + CHUNK]
        return
    for chunk in tensors.chunks():
        yield chunk.start, merged(chunk)
