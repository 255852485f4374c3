"""Folders of models as accident or malice leaves them: every field of their JSON and YAML, the bytes of their weights.

`mutations` lists what can be done to a folder, the same list on every machine; `sample` draws from it; `mutated` is a
copy of the folder to which one of them was done.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

MOST_ENTRIES = 3  # of a long list or mapping (a vocabulary) that are changed one by one
DEEP = 900  # levels: below Python's own limit, so that parsers read it
DELETED = object()


@dataclass(frozen=True)
class Mutation:
    """One change of a folder.

    Attributes:
        name: the file and what is done to it; no two of a folder have the same.
        apply: does it to a copy of the folder, in place.
    """

    name: str
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return self.name


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# What takes the place of any value.
VALUES: dict[str, Any] = {
    "deleted": DELETED,
    "null": None,
    "true": True,
    "0": 0,
    "-1": -1,
    "3": 3,
    "a giant": 10**12,
    "a number of 400 digits": 10**400,
    "half": 0.5,
    "1e308": 1e308,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "no text": "",
    "text": "nobody",
    "a digit as text": "7",
    "a path": "../../../../etc/passwd",
    "a surrogate": "\ud800",
    "escapes": "\x1b[31m\u202egnp\u0000\n\r",
    "long text": "x" * 100_000,
    "an empty list": [],
    "a list of null": [None],
    "an empty mapping": {},
    "a strange mapping": {"": {"\u202e": [None]}},
    "deep nesting": nested(DEEP),
}
# What is made of the value that is there.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "doubled": lambda value: value * 2 if isinstance(value, (list, str)) else DELETED,
    "reversed": lambda value: value[::-1] if isinstance(value, (list, str)) else DELETED,
    "without its first": lambda value: value[1:] if isinstance(value, (list, str)) else DELETED,
    "one more": lambda value: value + 1 if type(value) in (int, float) else DELETED,
    "negative": lambda value: -value if type(value) in (int, float) else DELETED,
    "as text": lambda value: json.dumps(value),
    "in a list": lambda value: [value],
    "with an unknown key": lambda value: {**value, "unheard_of": 1} if isinstance(value, dict) else DELETED,
}


# ---------------------------------------------------------------- plain values


def fields_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested lists and mappings are, outermost first; of long ones the first and the last."""
    yield path
    keys = (
        list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    )
    if len(keys) > 60 or isinstance(content, list):
        keys = [*keys[: MOST_ENTRIES - 1], *keys[-1:]] if len(keys) > MOST_ENTRIES else keys
    for key in keys:
        yield from fields_of(content[key], (*path, key))


def changed(content: Any, path: Sequence[Any], change: Callable[[Any], Any]) -> Any:
    """A copy with one value changed; one that becomes `DELETED` goes, with its key."""
    content = copy.deepcopy(content)
    if not path:
        return change(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    value = change(place[path[-1]])
    if value is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def _of_values(file: str, content: Any, write: Callable[[Path, Any], None]) -> Iterator[Mutation]:
    ways = {name: (lambda _, value=value: value) for name, value in VALUES.items()} | CHANGES
    for path in fields_of(content):
        if file.startswith("tokenizer") and len(path) > 3:
            continue  # other people's formats
        where = "".join(f"[{key!r}]" for key in path)
        for name, way in ways.items():
            if path or name != "deleted":
                yield Mutation(f"{file}{where}: {name}", partial(_rewrite, file, path, way, content, write))


def _rewrite(file: str, path: Sequence[Any], way: Callable[[Any], Any], content: Any, write: Any, folder: Path) -> None:
    value = changed(content, path, way)
    write(folder / file, None if value is DELETED else value)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_yaml(path: Path, content: Any) -> None:
    try:
        text = yaml.safe_dump(content, sort_keys=False, width=10_000)
    except RecursionError:  # the writer is the first to give up
        text = json.dumps(content)
    path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- bytes


def _bytes(change: Callable[[bytes], bytes], file: str, folder: Path) -> None:
    path = folder / file
    path.write_bytes(change(path.read_bytes()))


def _flipped(where: float, raw: bytes) -> bytes:
    place = int(where * (len(raw) - 1))
    return raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :]


# What is done to the bytes of any file.
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda raw: b"",
    "half of it": lambda raw: raw[: len(raw) // 2],
    "without its last byte": lambda raw: raw[:-1],
    "its first 9 bytes": lambda raw: raw[:9],
    "more bytes": lambda raw: raw + b"\0" * 64,
    "zeros": lambda raw: b"\0" * len(raw),
    "no UTF-8": lambda raw: b"\xff\xfe" + raw,
    "[[[[": lambda raw: b"[" * 100_000,
    '{"a":{"a":': lambda raw: b'{"a":' * 100_000,
    **{f"a byte at {where}": partial(_flipped, where) for where in (0.0, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99)},
}


class _Planted:
    """Unpickled, it makes the file that says so."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ.get("PLANTED", "/tmp/planted"),))


def _removed(file: str, folder: Path) -> None:
    (folder / file).unlink()


def _folder(file: str, folder: Path) -> None:
    _removed(file, folder)
    (folder / file).mkdir()


def _to_itself(file: str, folder: Path) -> None:
    _removed(file, folder)
    (folder / file).symlink_to(file)


def _nowhere(file: str, folder: Path) -> None:
    _removed(file, folder)
    (folder / file).symlink_to("/nowhere/at/all")


def _pickled(file: str, folder: Path) -> None:
    _removed(file, folder)
    name = "adapter_model.bin" if file.startswith("adapter") else "pytorch_model.bin"
    (folder / name).write_bytes(pickle.dumps({"weight": _Planted()}))


FILES: dict[str, Callable[[str, Path], None]] = {
    "removed": _removed,
    "a folder": _folder,
    "a link to itself": _to_itself,
    "a link to nowhere": _nowhere,
}


# ---------------------------------------------------------------- safetensors


def read_safetensors(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    [length] = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def safetensors_bytes(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file of header and data; `length` is what it says of its header's length, where that is not the truth."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _header(change: Callable[[dict[str, Any], str], Any], tensor: str, raw: bytes) -> bytes:
    header, data = read_safetensors(raw)
    return safetensors_bytes(change(header, tensor), data)


def _entry(**values: Any) -> Callable[[dict[str, Any], str], Any]:
    """Changes of a tensor's own entry in the header."""

    def change(header: dict[str, Any], tensor: str) -> Any:
        own = {key: value(header[tensor][key]) if callable(value) else value for key, value in values.items()}
        return {**header, tensor: {**header[tensor], **own}}

    return change


# What is done to one tensor's entry in the header; the bytes behind it stay.
HEADERS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "has no entry": lambda header, tensor: {name: row for name, row in header.items() if name != tensor},
    "has an empty entry": lambda header, tensor: {**header, tensor: {}},
    "is a number": lambda header, tensor: {**header, tensor: 5},
    "has another name": lambda header, tensor: {
        f"{name}s" if name == tensor else name: r for name, r in header.items()
    },
    "has a strange name": lambda header, tensor: {
        "\u202e\x1b[31m" if name == tensor else name: row for name, row in header.items()
    },
    "is there under two names": lambda header, tensor: {**header, f"{tensor}.copy": header[tensor]},
    "is an integer": _entry(dtype="I32"),
    "is of 16 bits": _entry(dtype="F16"),
    "is of 64 bits": _entry(dtype="F64"),
    "is of an unknown type": _entry(dtype="F31"),
    "is transposed": _entry(shape=lambda shape: shape[::-1]),
    "is flat": _entry(shape=lambda shape: [_product(shape)]),
    "has one dimension more": _entry(shape=lambda shape: [1, *shape]),
    "is empty": _entry(shape=[0]),
    "has a negative size": _entry(shape=lambda shape: [-size for size in shape]),
    "has a giant size": _entry(shape=[2**62, 2**62]),
    "begins elsewhere": _entry(data_offsets=lambda own: [own[0] + 4, own[1] + 4]),
    "ends before it begins": _entry(data_offsets=lambda own: own[::-1]),
    "ends far behind the file": _entry(data_offsets=lambda own: [own[0], 2**60]),
}


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _with_value(value: float, tensor: str, raw: bytes) -> bytes:
    """The tensor's middle element becomes this value."""
    header, data = read_safetensors(raw)
    kind, (start, stop) = header[tensor]["dtype"], header[tensor]["data_offsets"]
    coded = {"F64": struct.pack("<d", value), "F32": struct.pack("<f", value), "F16": struct.pack("<e", value)}
    own = coded.get(kind, struct.pack("<f", value)[2:])  # bfloat16 is the front half of a float
    place = start + (stop - start) // len(own) // 2 * len(own)
    return safetensors_bytes(header, data[:place] + own + data[place + len(own) :])


def _retold(change: Callable[[Any], Any], tensor: str, raw: bytes) -> bytes:
    """A whole and valid file in which one tensor is another."""
    from safetensors.torch import load, save

    tensors = load(raw)
    made = change(tensors[tensor])
    rest = {name: own for name, own in tensors.items() if name != tensor}
    return save(rest if made is None else {**rest, tensor: made.contiguous()}, {"format": "pt"})


# One tensor of a file that stays whole and valid.
TENSORS: dict[str, Callable[[Any], Any]] = {
    "is missing": lambda tensor: None,
    "has one row more": lambda tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1))[: len(tensor) + 1],
    "has one row less": lambda tensor: tensor[:-1],
    "has no rows": lambda tensor: tensor[:0],
    "is a scalar": lambda tensor: tensor.flatten()[0],
    "is half as exact": lambda tensor: tensor.half(),
    "is twice as exact": lambda tensor: tensor.double(),
    "holds integers": lambda tensor: tensor.int(),
    "holds yes and no": lambda tensor: tensor.bool(),
}


def _of_weights(file: str, raw: bytes, seed: int) -> Iterator[Mutation]:
    header, _ = read_safetensors(raw)
    names = sorted(name for name in header if name != "__metadata__")
    random.Random(f"{seed} {file}").shuffle(names)
    for tensor in names[:40]:
        for name, change in HEADERS.items():
            yield Mutation(f"{file}: {tensor} {name}", partial(_bytes, partial(_header, change, tensor), file))
        if header[tensor]["shape"] and header[tensor]["dtype"] in ("F64", "F32", "F16", "BF16"):
            for value in (float("nan"), float("inf"), float("-inf")):
                change_bytes = partial(_with_value, value, tensor)
                yield Mutation(f"{file}: {tensor} holds {value}", partial(_bytes, change_bytes, file))
            for name, retold in TENSORS.items():
                yield Mutation(
                    f"{file}: valid, {tensor} {name}", partial(_bytes, partial(_retold, retold, tensor), file)
                )
    for length in (0, 1, len(raw), 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        change_bytes = partial(_with_length, length)
        yield Mutation(f"{file}: header of {length} bytes", partial(_bytes, change_bytes, file))
    for metadata in (None, 5, {"format": 5}, {"format": "tf"}, {"format": "\u202e"}):
        change_bytes = partial(_with_metadata, metadata)
        yield Mutation(f"{file}: metadata {metadata!r}", partial(_bytes, change_bytes, file))
    yield Mutation(f"{file}: no tensors", partial(_bytes, lambda raw: safetensors_bytes({}, b""), file))
    yield Mutation(f"{file}: a pickle in its place", partial(_pickled, file))


def _with_length(length: int, raw: bytes) -> bytes:
    return safetensors_bytes(*read_safetensors(raw), length)


def _with_metadata(metadata: Any, raw: bytes) -> bytes:
    header, data = read_safetensors(raw)
    return safetensors_bytes({**header, "__metadata__": metadata}, data)


# ---------------------------------------------------------------- the whole


def mutations(folder: Path, seed: int = 0, only: Sequence[str] = ()) -> list[Mutation]:
    """All that is done to a folder's files, in a fixed order.

    Args:
        folder: a model, as it was saved.
        seed: of the choice of tensors, where a file has many.
        only: names of files, or ends of names (".json"); all files by default.
    """
    found: list[Mutation] = []
    for path in sorted(folder.rglob("*")):
        file = path.relative_to(folder).as_posix()
        if not path.is_file() or (only and not file.endswith(tuple(only))):
            continue
        found += [Mutation(f"{file}: {name}", partial(_bytes, change, file)) for name, change in BYTES.items()]
        found += [Mutation(f"{file}: {name}", partial(change, file)) for name, change in FILES.items()]
        if path.suffix == ".json":
            found += _of_values(file, json.loads(path.read_text(encoding="utf-8")), _write_json)
        elif path.suffix in (".yaml", ".yml"):
            found += _of_values(file, yaml.safe_load(path.read_text(encoding="utf-8")), _write_yaml)
        elif path.suffix == ".safetensors":
            found += _of_weights(file, path.read_bytes(), seed)
    return found


def sample(found: Sequence[Mutation], count: int, seed: int = 0) -> list[Mutation]:
    """Some of them: of every file alike many, as far as it has them."""
    by_file: dict[str, list[Mutation]] = {}
    for mutation in found:
        by_file.setdefault(mutation.name.partition(":")[0].partition("[")[0], []).append(mutation)
    chance = random.Random(seed)
    for own in by_file.values():
        chance.shuffle(own)
    drawn: list[Mutation] = []
    while len(drawn) < count and any(by_file.values()):
        drawn += [own.pop() for own in by_file.values() if own]
    return drawn[:count]


def mutated(folder: Path, mutation: Mutation, target: Path) -> Path:
    """A copy of a folder to which one thing was done; what was at the target goes."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, symlinks=True)
    mutation.apply(target)
    return target
