"""Custom code that a repo's configurations name: removed from configs, and run only if needed and trusted.

transformers has classes for most tokenizers and image processors; custom code for those never runs. Other custom
code runs only with ``trust_remote_code=True``, and only if it is in the repo itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils.hub import cached_file

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
KERNELS = tuple(f"{start}{name}" for name in _IMPLEMENTATIONS for start in ("", "_")) + tuple(
    f"_{name}_internal" for name in _IMPLEMENTATIONS
)
"""Keys of a config whose value may be ``owner/name``: a kernel that transformers fetches from the Hub and runs."""
MANIFESTS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")

Read = Callable[[str], dict[str, Any]]


class UntrustedCodeError(ValueError):
    """A tokenizer or image processor needs custom code that is not trusted."""


def without_code(config: Any) -> Any:
    """A plain config without the keys, at any depth, that make transformers run custom code."""
    if isinstance(config, dict):
        return {key: without_code(inner) for key, inner in config.items() if key not in ("auto_map", *KERNELS)}
    return [without_code(inner) for inner in config] if isinstance(config, list) else config


def code_in(content: Any, file: str) -> Iterator[tuple[str, str, str]]:
    """All code that a configuration names, at any depth: (file, key, reference to the class)."""
    stack = [("", content)]
    while stack:
        path, value = stack.pop()
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in entries:
            place = f"{path}.{key}" if path else str(key)
            if key == "auto_map":
                named = inner if isinstance(inner, dict) else {"": inner}
                for auto, references in named.items():
                    for reference in references if isinstance(references, (list, tuple)) else [references]:
                        if isinstance(reference, str):
                            yield file, f"{place}.{auto}".rstrip("."), reference
            else:
                stack.append((place, inner))


def needed_code(auto: str, read: Read) -> list[tuple[str, str, str]]:
    """The custom code that a tokenizer or image processor needs, as returned by `code_in`.

    Args:
        auto: "AutoTokenizer" or "AutoImageProcessor".
        read: returns the content of a JSON file of the repo by its name; empty if it does not exist.

    Returns:
        An empty list if transformers has a class for it.
    """
    is_tokenizer = auto == "AutoTokenizer"
    file, content = _processor_config(is_tokenizer, read)
    declared = content.get("tokenizer_class" if is_tokenizer else "image_processor_type")
    declared = declared or (None if is_tokenizer else content.get("feature_extractor_type"))
    keys = ("auto_map", f"auto_map.{auto}") if is_tokenizer else (f"auto_map.{auto}", "auto_map.AutoFeatureExtractor")
    maps = [(file, content)]
    if not is_tokenizer and not declared:  # transformers then asks the model's config
        maps.append(("config.json", read("config.json")))
    found = [
        code for name, config in maps for code in code_in({"auto_map": config.get("auto_map")}, name) if code[1] in keys
    ]
    if not found:
        return []
    if isinstance(declared, str):
        plain = declared.replace("FeatureExtractor", "ImageProcessor")  # what they were called before
        classes = [getattr(transformers, name, None) for name in (plain, plain.removesuffix("Fast"))]
        native = any(isinstance(found, type) for found in classes)
    else:
        known = TOKENIZER_MAPPING_NAMES if is_tokenizer else IMAGE_PROCESSOR_MAPPING_NAMES
        native = str(read("config.json").get("model_type")) in known
    return [] if native else found


def _processor_config(is_tokenizer: bool, read: Read) -> tuple[str, dict[str, Any]]:
    """The file that names the class of a tokenizer or image processor, and its content."""
    if is_tokenizer:
        return "tokenizer_config.json", read("tokenizer_config.json")
    nested = read("processor_config.json").get("image_processor")  # it wins over a file of its own
    if isinstance(nested, dict):
        return "processor_config.json", nested
    return "preprocessor_config.json", read("preprocessor_config.json")


def load_processor(auto: Any, source: str, hub: dict[str, Any], *, trusted: bool, **more: Any) -> Any:
    """Load a tokenizer or image processor, by a class of transformers or else by the repo's custom code.

    Args:
        auto: `AutoTokenizer` or `AutoImageProcessor`.
        source: id or folder.
        hub: revision, subfolder and other Hub arguments.
        trusted: whether the caller passed ``trust_remote_code=True``.
        more: further arguments of `from_pretrained`.

    Raises:
        UntrustedCodeError: it needs custom code that is not trusted, or is in another repo.
    """

    def read(file: str) -> dict[str, Any]:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        path = cached_file(source, file, **quiet, **hub)
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
        return content if isinstance(content, dict) else {}

    code = needed_code(auto.__name__, read)
    if code and not trusted:
        file, key, reference = code[0]
        raise UntrustedCodeError(
            f"{source} needs its own code to run ({file}: {key} is {reference!r}): read it, then pass "
            "trust_remote_code=True"
        )
    foreign = [named for file in MANIFESTS for named in code_in(read(file), file) if "--" in named[2]] if code else []
    if foreign:
        file, key, reference = foreign[0]
        raise UntrustedCodeError(f"{source} takes its code from another repo ({file}: {key} is {reference!r})")
    return auto.from_pretrained(source, trust_remote_code=bool(code), **hub, **more)


__all__ = ["KERNELS", "MANIFESTS", "UntrustedCodeError", "code_in", "load_processor", "needed_code", "without_code"]
