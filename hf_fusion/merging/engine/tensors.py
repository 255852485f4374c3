"""One tensor of the base and of every expert, as a merging method sees it: in chunks, never whole unless asked for.

A method is a function of `Tensors` and of its own parameters. It may look at the values first (`gram`, `sums`,
`largest`: each reads them in chunks); then it returns what makes the merged values of a chunk, or the merged tensor:

    def task_arithmetic(tensors, *, weight, scaling):
        return Combination(1 - scaling * sum(weight), [scaling * w for w in weight])
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from hf_fusion.merging.engine.checkpoint import DTYPES, Entry, Files

CHUNK = 1 << 18
"""Elements that are worked on at a time: a few chunks in single precision fit into a core's cache."""

PIECE = 1 << 11
"""Elements that a sample takes from one place."""

EXACT = 1 << 16
"""Elements of each input that are in double precision at a time: few inputs of them fit into a core's cache."""

STEEP = 8.0
"""Numbers whose magnitudes have a larger sum multiply what float32 rounds off: such sums are made in float64."""

WIDE, LINE, ROWS = 1 << 19, 1 << 12, 8
"""Where inputs stay in bfloat16: elements that are worked on and that are summed at a time, and most of such inputs."""

CPU = torch.device("cpu")

Merged = Callable[["Chunk"], torch.Tensor]
"""What makes the merged values (size,) of a chunk, in single precision; called for a tensor's chunks in order."""


class Reader(Protocol):
    """A source of one tensor's values, seen flat."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""


class Stored:
    """A tensor in a file."""

    def __init__(self, entry: Entry, files: Files) -> None:
        self.entry, self.files, self.shape = entry, files, entry.shape
        self._dtype = getattr(torch, DTYPES[entry.dtype][0])

    @property
    def is_bfloat16(self) -> bool:
        """Whether its values are stored in bfloat16."""
        return self._dtype is torch.bfloat16

    def read_stored(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat tensor of the stored type with the values from `start` on."""
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


class InMemory:
    """A tensor of a loaded model."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self._flat = tuple(tensor.shape), tensor.detach().reshape(-1)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fills a flat float32 tensor with the values from `start` on."""
        out.copy_(self._flat[start : start + len(out)])


@dataclass(frozen=True)
class Statistic:
    """What was measured of an expert on its own data, for one tensor; see `hf_fusion.training.expert_statistics`.

    Attributes:
        reader: its diagonal Fisher information, in the tensor's shape; or the Gram matrix of a linear layer's inputs.
        axis: the tensor's dimension that meets a Gram matrix: 1, but for Conv1D.
        norm: of the Fisher information of all the model's tensors.
    """

    reader: Reader
    axis: int = 1
    norm: float = 0.0


class Chunk:
    """Some consecutive elements of all inputs, in float32; tensors are good until the next chunk.

    Attributes:
        start: number of its first element.
        size: number of its elements.
        number: 0 for a tensor's first chunk.
    """

    def __init__(self, tensors: Tensors, number: int, start: int, size: int) -> None:
        self.tensors, self.number, self.start, self.size = tensors, number, start, size
        self._read: dict[int, torch.Tensor] = {}

    @property
    def base(self) -> torch.Tensor:
        """Values of the base."""
        return self._values(-1, self.tensors.the_base)

    def expert(self, index: int) -> torch.Tensor:
        """Values of an expert. Whoever writes into them writes into what `delta` starts from."""
        return self._values(index, self.tensors.experts[index])

    def delta(self, index: int) -> torch.Tensor:
        """The expert's values less the base's, in a tensor that the caller may write into."""
        return torch.sub(self.expert(index), self.base, out=scratch(f"delta {index}")[: self.size])

    def deltas(self) -> torch.Tensor:
        """All experts' values less the base's, (K, size), made anew in a tensor that the caller may write into."""
        out = stacked("deltas", len(self.tensors), self.size)
        for own, reader in zip(out, self.tensors.experts, strict=True):
            reader.read(self.start, own)
        return out.sub_(self.base)

    def exact(self, deltas: bool) -> Iterator[torch.Tensor]:
        """All experts' values in float64, some elements at a time, in order: for what decides something.

        Args:
            deltas: less the base's, a difference that float64 holds exactly where float32 would round it.

        Yields:
            (K, n), good until the next, which the caller may write into.
        """
        rows = [self.expert(index) for index in range(len(self.tensors))]
        for first in range(0, self.size, EXACT):
            part = slice(first, min(first + EXACT, self.size))
            out = stacked("exact", len(rows), part.stop - first, EXACT, torch.float64)
            for own, row in zip(out, rows, strict=True):
                own.copy_(row[part])
            yield out.sub_(self.base[part]) if deltas else out

    def statistic(self, index: int) -> torch.Tensor:
        """What was measured of an expert for these elements, in a tensor that the caller may write into."""
        measured = self.tensors.statistics[index]
        if measured is None:
            raise ValueError(f"of {self.tensors.name} nothing was measured for expert {index + 1}")
        return self._values(len(self.tensors) + index, measured.reader)

    def random(self, dtype: type[np.unsignedinteger[Any]] = np.uint16) -> np.ndarray:
        """Whole numbers drawn uniformly from all of a type, (K, size); the same for the same seed, tensor and chunk."""
        name = zlib.crc32(self.tensors.name.encode())
        number = self.number % (1 << 32)  # a sample's pieces have numbers below 0
        count = len(self.tensors) * self.size
        words = -(-count * np.dtype(dtype).itemsize // 8)
        drawn = np.random.SFC64([self.tensors.seed, name, number]).random_raw(words)
        return drawn.view(dtype)[:count].reshape(len(self.tensors), self.size)

    def _values(self, index: int, reader: Reader) -> torch.Tensor:
        if index not in self._read:
            values = scratch(f"values {index}")[: self.size]
            reader.read(self.start, values)
            self._read[index] = values
        return self._read[index]


Values = Callable[[Chunk], torch.Tensor]
"""One number for every expert and element of a chunk, (K, size), in a tensor that the caller may write into."""


class Tensors:
    """One tensor of the base and of every expert.

    Args:
        name: of the tensor.
        base: the base's values, or None for methods without a base.
        experts: the experts' values, all of one shape.
        seed: of what is drawn at random.
        model: all tensors of the models, for methods that look at more than one.
        statistics: what was measured of each expert, for methods that need it; None where nothing was.

    Attributes:
        shape: of each of them.
        numel: number of their elements.
    """

    def __init__(
        self,
        name: str,
        base: Reader | None,
        experts: Sequence[Reader],
        seed: int = 0,
        model: WholeModel | None = None,
        statistics: Sequence[Statistic | None] = (),
    ) -> None:
        self.name, self.base, self.experts, self.seed = name, base, list(experts), seed
        self.statistics = list(statistics)
        self.model = model or WholeModel(lambda: [self])
        self.shape: tuple[int, ...] = (base or experts[0]).shape
        self.numel = math.prod(self.shape)

    def __len__(self) -> int:
        """How many experts there are."""
        return len(self.experts)

    @property
    def the_base(self) -> Reader:
        """The base's values, where a method cannot do without."""
        if self.base is None:
            raise ValueError(f"{self.name} has no base")
        return self.base

    def chunks(self) -> Iterator[Chunk]:
        """All elements, in order."""
        for number, start in enumerate(range(0, self.numel, CHUNK)):
            yield Chunk(self, number, start, min(CHUNK, self.numel - start))

    def sample(self) -> Iterator[Chunk]:
        """Some of them, from many places."""
        return self.chunks() if self.numel <= CHUNK else _pieces([self])

    def whole(self, reader: Reader) -> torch.Tensor:
        """All values of an input, in its shape: for methods that cannot work in pieces."""
        values = torch.empty(math.prod(reader.shape))
        reader.read(0, values)
        return values.view(reader.shape)

    def whole_deltas(self) -> torch.Tensor:
        """The experts' values less the base's, all at once: (K, *shape)."""
        deltas = torch.empty(len(self), self.numel)
        base = self.whole(self.the_base).view(-1)
        for own, reader in zip(deltas, self.experts, strict=True):
            reader.read(0, own)
            own.sub_(base)
        return deltas.view(len(self), *self.shape)

    def sums(self, of: Callable[[Chunk], torch.Tensor]) -> torch.Tensor:
        """The sum over all chunks of what a function makes of each, in float64.

        A function that itself sums many elements does so in float64: see `Chunk.exact` and `magnitudes`.
        """
        return sum((of(chunk).double() for chunk in self.chunks()), start=torch.zeros((), dtype=torch.float64))

    def gram(self, deltas: bool = True) -> torch.Tensor:
        """Products of the experts with each other, (K, K), multiplied and added up in float64.

        Args:
            deltas: of their differences from the base; else of their values.
        """
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for chunk in self.chunks():
            for part in chunk.exact(deltas):
                total.addmm_(part, part.mT)
        return (total + total.mT) / 2  # which of two equal products came first does not count


class WholeModel:
    """All tensors that are merged, one after the other, as if they were one.

    Args:
        opened: makes them.
    """

    def __init__(self, opened: Callable[[], Sequence[Tensors]]) -> None:
        self._opened, self._lock = opened, threading.Lock()
        self._known: dict[Any, Any] = {}

    @cached_property
    def tensors(self) -> list[Tensors]:
        """One by one."""
        return list(self._opened())

    @property
    def numel(self) -> int:
        """Elements of one expert."""
        return sum(one.numel for one in self.tensors)

    def chunks(self) -> Iterator[Chunk]:
        """All elements, in order."""
        for one in self.tensors:
            yield from one.chunks()

    def sample(self) -> Iterator[Chunk]:
        """Some of them, from many places."""
        return _pieces(self.tensors)

    def once(self, key: Any, make: Callable[[WholeModel], Any]) -> Any:
        """What a function makes of it, made by the first tensor that asks for it."""
        with self._lock:
            if key not in self._known:
                self._known[key] = make(self)
            return self._known[key]


def _pieces(tensors: Sequence[Tensors]) -> Iterator[Chunk]:
    """Pieces of tensors at equal distances, as if they were one: few enough to be cheap, enough to tell quantiles.

    Of N elements whoever looks for one by its rank then keeps a share of about s^-1/2 for each s that were sampled: of
    all that is read and kept, least at s ~ N^2/3.
    """
    total = sum(one.numel for one in tensors)
    step = max(PIECE, total * PIECE // max(CHUNK // 4, int((3 * total) ** (2 / 3))))
    begun = number = 0
    for one in tensors:
        for start in range(-begun % step, one.numel, step):
            number -= 1
            yield Chunk(one, number, start, min(PIECE, one.numel - start))
        begun += one.numel


class Combination:
    """Merged values that are a sum of the inputs, each times a number of its own."""

    def __init__(self, base: float, experts: Sequence[float]) -> None:
        self.base, self.experts = base, experts

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        """The merged values of a chunk, (size,)."""
        if is_steep(self.base if chunk.tensors.base else 0.0, *self.experts):
            exact = torch.zeros(chunk.size, dtype=torch.float64)
            for weight, reader in self._inputs(chunk.tensors):
                values = scratch("one")[: chunk.size]
                reader.read(chunk.start, values)
                exact.add_(values.double(), alpha=weight)
            return exact.float()
        # all inputs pass through one buffer: the core's cache holds it, and would not hold one of each
        total, values = scratch("total")[: chunk.size], scratch("one")[: chunk.size]
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
        """(start, bfloat16 values) in order, where all inputs are stored in bfloat16; None where they are not.

        A sum of rows of a table, each times a number, is what `embedding_bag` computes: it reads the rows as they are
        stored, adds in float32 and rounds once, where `__call__` goes over float32 copies of each. Its numbers are
        bfloat16, and a float32 number is the sum of three such.
        """
        inputs = self._inputs(tensors)
        stored = [(weight, reader) for weight, reader in inputs if isinstance(reader, Stored) and reader.is_bfloat16]
        heard = any(torch.tensor(weight).bfloat16() for weight, _ in stored)  # or no number is left
        heard = heard and not is_steep(*(weight for weight, _ in inputs))
        return self._rows(tensors, stored) if heard and len(stored) == len(inputs) <= ROWS else None

    @staticmethod
    def _rows(tensors: Tensors, inputs: list[tuple[float, Stored]]) -> Iterator[tuple[int, torch.Tensor]]:
        count, lines = len(inputs), WIDE // LINE
        rest, parts = torch.tensor([weight for weight, _ in inputs]), []
        for _ in range(3):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        numbers = torch.cat(parts)
        used = numbers.nonzero()[:, 0]
        numbers = numbers[used].expand(lines, -1).contiguous()
        bags = used % count * lines + torch.arange(lines)[:, None]  # (lines, numbers): a line of all inputs is a bag
        table = scratch("table", torch.bfloat16, ROWS * WIDE)[: count * WIDE]
        rows = list(table.view(count, WIDE))
        for start in range(0, tensors.numel, WIDE):
            size = min(WIDE, tensors.numel - start)
            for row, (_, reader) in zip(rows, inputs, strict=True):
                reader.read_stored(start, row[:size])
            own = -(-size // LINE)
            merged = F.embedding_bag(bags[:own], table.view(-1, LINE), mode="sum", per_sample_weights=numbers[:own])
            yield start, merged.view(-1)[:size]


_local = threading.local()


def compute_on(device: torch.device) -> None:
    """From here on this thread's methods multiply and decompose matrices on a device: see `compute_device`."""
    _local.device = device


def compute_device() -> torch.device:
    """Where a method that multiplies or decomposes whole matrices does it; what it returns is on the CPU.

    Methods that go through chunks are bound by the disk, and stay on the CPU.
    """
    found: torch.device = _local.__dict__.get("device", CPU)
    return found


def scratch(name: str, dtype: torch.dtype = torch.float32, size: int = CHUNK) -> torch.Tensor:
    """This thread's buffer of that name: a chunk of a type or another size, or the bytes of the widest chunk."""
    buffers: dict[str, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    if name not in buffers:
        with torch.inference_mode(False):  # of use in that mode and outside of it
            buffers[name] = torch.empty(size * (8 if dtype is torch.uint8 else 1), dtype=dtype)
    return buffers[name]


def stacked(name: str, count: int, size: int, most: int = CHUNK, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This thread's buffer of that name for that many rows of at most a chunk's size, or of another, (count, size)."""
    return scratch(f"{name} of {count}", dtype, count * most)[: count * size].view(count, size)


def is_steep(*numbers: float) -> bool:
    """Whether a sum of inputs, each times a number, cancels out more of them than float32 can lose: see `STEEP`."""
    return sum(map(abs, numbers)) > STEEP


def magnitudes(values: torch.Tensor) -> torch.Tensor:
    """Sums of the magnitudes of rows, (K, n) float32 -> (K,) float64; what is given is overwritten."""
    return values.abs_().sum(-1, dtype=torch.float64)


def possible(name: str, values: torch.Tensor) -> torch.Tensor:
    """Merged values as they can be: a running variance of batch norm is at least 0, whatever was taken from it."""
    return values.clamp(min=0) if name.endswith("running_var") else values


def merge_tensors(
    tensors: Tensors, merged: Merged | torch.Tensor, dtype: str = "F32"
) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, values) of what a method returned, in order: in float32, or in the type that they go to, `dtype`."""
    return ((start, possible(tensors.name, values)) for start, values in _merged(tensors, merged, dtype))


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
