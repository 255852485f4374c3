"""Parses untrusted JSON files of models, with limits on size, nesting and values, and checks the types of fields.

All JSON files of models are read here; the result can be encoded, sent and shown safely.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from hf_fusion.errors import FusionError, one_line
from hf_fusion.io.files import read_file
from hf_fusion.schema import Expected, KeyPath, read

MAX_BYTES = 32 << 20
"""Maximum size in bytes; three times the largest known index.json."""
MAX_VALUES = 2_000_000
"""Maximum values per file, at about 100 bytes each in memory; ten times those of the largest known index."""
_HALF = re.compile("[\ud800-\udfff]")  # lone surrogates cannot be encoded


def parse(text: bytes, file: str, name: str) -> Any:
    """The content of a JSON file, with lone surrogates replaced by "�".

    Args:
        text: content of the file.
        file: its name.
        name: the model's name, for errors.

    Raises:
        FusionError: it is not JSON in UTF-8, too large, or too deeply nested.
    """
    if len(text) > MAX_BYTES:
        why = f"it has {len(text):,} bytes, more than the limit of {MAX_BYTES:,}"
    elif (count := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        why = f"it has {count:,} values, more than the limit of {MAX_VALUES:,}"
    else:
        try:
            content = json.loads(text.decode())
            return _whole(content) if b"\\ud" in text or b"\\uD" in text else content
        except RecursionError:
            why = "it is nested too deeply"
        except ValueError as error:
            why = one_line(error)
    raise FusionError(f"{name}: {file} cannot be read ({why})", "download it again")


def parse_object(text: bytes, file: str, name: str) -> dict[str, Any]:
    """`parse` for a file with an object, with a check of the types of its fields.

    Raises:
        FusionError: see `parse`; or it is not an object, or a field has the wrong type.
    """
    content = parse(text, file, name)
    if not isinstance(content, dict):
        raise FusionError(f"{name}: {file} is not a JSON object", "download it again")
    where = KeyPath(f"{name}: {file}")
    for key, hint in FIELDS.get(file.rpartition("/")[2], {}).items():
        if (value := content.get(key)) is not None:
            try:
                read(hint, value, where.inner(key))
            except FusionError as error:
                raise FusionError(error.message, error.hint or f"correct it in {file}") from None
    return content


def read_json(path: Path, name: str) -> dict[str, Any]:
    """`parse_object` for a path.

    Raises:
        FusionError: see `parse_object`; names the model and the file.
    """
    return parse_object(read_file(path), path.name, name)


def _whole(value: object) -> Any:
    """Replaces lone surrogates in a value."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(key): _whole(inner) for key, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- fields


def _are_by_class(labels: dict[str, str]) -> bool:
    return all(re.fullmatch(r"\d{1,9}", key) for key in labels)


Labels = Annotated[dict[str, str], Expected("strings by class index", _are_by_class)]
Code = Annotated[list[str | None] | dict[str, str | list[str | None] | None], Expected("names of classes")]
"""``auto_map``, which for a tokenizer may also be a pair, of which one may be null."""

FIELDS: dict[str, dict[str, Any]] = {
    "config.json": {
        "architectures": list[str],
        "auto_map": Code,
        "base_by_reference": bool,
        "id2label": Labels,
        "label2id": Annotated[dict[str, int], Expected("class indices by label")],
        "model_type": str,
        "num_labels": int,
    },
    "adapter_config.json": {
        "alpha_pattern": Annotated[dict[str, float], Expected("numbers by pattern")],
        "auto_mapping": Annotated[dict[str, str | None], Expected("names of a class")],
        "base_model_name_or_path": str,
        "bias": Literal["none", "all", "lora_only"],
        "fan_in_fan_out": bool,
        "lora_alpha": float,
        "modules_to_save": list[str],
        "peft_type": str,
        "r": int,
        "rank_pattern": Annotated[dict[str, int], Expected("whole numbers by pattern")],
        "revision": str,
        "task_type": str,
        "trainable_token_indices": Annotated[list[int] | dict[str, list[int]], Expected("token indices")],
        "use_rslora": bool,
    },
    "tokenizer_config.json": {"added_tokens_decoder": dict[str, Any], "auto_map": Code, "tokenizer_class": str},
}
"""File -> field -> the type of its value; null is allowed everywhere."""
