"""JSON of strangers as plain data: bounded in size, nesting and values, encodable, and of the types it should have.

All of it that describes a model is read here: what comes out can be written, sent and shown without a second thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError, one_line, shown
from hf_fusion.io.files import read_file

MAX_BYTES = 32 << 20
"""The largest index.json that is known has about a third of this."""
MAX_VALUES = 2_000_000
"""In one file: at about 100 bytes each in memory. The largest index that is known has 200,000."""
_HALF = re.compile("[\ud800-\udfff]")  # one half of a pair: no encoding has it


def parse(text: bytes, file: str, name: str) -> Any:
    """What a JSON file holds, with half characters as "�".

    Args:
        text: content of the file.
        file: its name.
        name: what errors call the model.

    Raises:
        FusionError: it is not JSON in UTF-8, or larger or more deeply nested than any such file.
    """
    if len(text) > MAX_BYTES:
        why = f"it has {len(text):,} bytes: no such file is larger than {MAX_BYTES:,}"
    elif (count := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        why = f"it has {count:,} values: no such file has more than {MAX_VALUES:,}"
    else:
        try:
            content = json.loads(text.decode())
            return _whole(content) if b"\\ud" in text or b"\\uD" in text else content
        except RecursionError:
            why = "it is nested too deeply"
        except ValueError as error:
            why = one_line(error)
    raise FusionError(f"{name}: {file} cannot be read ({why}).", "fetch it again")


def parse_object(text: bytes, file: str, name: str) -> dict[str, Any]:
    """`parse` of a file that holds an object, whose fields have the types that loaders expect.

    Raises:
        FusionError: as there; or it is not an object, or a field has another type.
    """
    content = parse(text, file, name)
    if not isinstance(content, dict):
        raise FusionError(f"{name}: {file} is not a JSON object.", "fetch it again")
    for key, (is_right, expected) in FIELDS.get(file.rpartition("/")[2], {}).items():
        if content.get(key) is not None and not is_right(content[key]):
            raise FusionError(
                f"{name}: {file} has {key}={shown(content[key])}, expected {expected}.", f"correct it in {file}"
            )
    return content


def read_json(path: Path, name: str) -> dict[str, Any]:
    """`parse_object` of a file.

    Raises:
        FusionError: as there, naming the model and the file.
    """
    return parse_object(read_file(path), path.name, name)


def _whole(value: object) -> Any:
    """A value without half characters."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(key): _whole(inner) for key, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- fields


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole_number(value: object) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_number(value: object) -> bool:
    return _is_whole_number(value) or type(value) is float


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(inner, str) for inner in value)


def _are(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_right, value.values()))


def _is_code(value: object) -> bool:
    """``auto_map``: of a tokenizer also a pair, of which one may be null."""
    pairs = value.values() if isinstance(value, Mapping) else [value]
    parts = [part for pair in pairs for part in (pair if isinstance(pair, list) else [pair])]
    return all(part is None or isinstance(part, str) for part in parts) and isinstance(value, (Mapping, list))


def _is_labels(value: object) -> bool:
    """``id2label``: by whole numbers, each as a text."""
    return isinstance(value, Mapping) and all(
        re.fullmatch(r"\d{1,9}", str(key)) and isinstance(label, str) for key, label in value.items()
    )


def _is_rows(value: object) -> bool:
    """Rows of an embedding: one list, or one for each module."""
    lists = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(rows, list) and all(map(_is_whole_number, rows)) for rows in lists)


_TEXT = (_is_text, "a text")
_TEXTS = (_is_texts, "a list of texts")
_FLAG = (_is_flag, "true or false")
_OBJECT = (_is_object, "an object")
_CODE = (_is_code, "names of classes")

FIELDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "config.json": {
        "architectures": _TEXTS,
        "auto_map": _CODE,
        "base_by_reference": _FLAG,
        "id2label": (_is_labels, "texts by class index"),
        "label2id": (_are(_is_whole_number), "class indices by label"),
        "model_type": _TEXT,
        "num_labels": (_is_whole_number, "a whole number"),
    },
    "adapter_config.json": {
        "alpha_pattern": (_are(_is_number), "numbers by pattern"),
        "auto_mapping": (_are(lambda value: value is None or isinstance(value, str)), "names of a class"),
        "base_model_name_or_path": _TEXT,
        "bias": (("none", "all", "lora_only").__contains__, "none, all or lora_only"),
        "fan_in_fan_out": _FLAG,
        "lora_alpha": (_is_number, "a number"),
        "modules_to_save": _TEXTS,
        "peft_type": _TEXT,
        "r": (_is_whole_number, "a whole number"),
        "rank_pattern": (_are(_is_whole_number), "whole numbers by pattern"),
        "revision": _TEXT,
        "task_type": _TEXT,
        "trainable_token_indices": (_is_rows, "numbers of tokens"),
        "use_rslora": _FLAG,
    },
    "tokenizer_config.json": {"added_tokens_decoder": _OBJECT, "auto_map": _CODE, "tokenizer_class": _TEXT},
}
"""File -> field -> (whether a value will do, what is expected); null will do everywhere."""
