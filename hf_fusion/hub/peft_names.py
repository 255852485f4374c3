"""The names that tensors have in an adapter's file, as PEFT writes them and as it reads them.

``save_pretrained`` leaves the adapter's name out (``query.lora_A.weight``). A state dict that was saved as it is has it
(``query.lora_A.default.weight``, ``classifier.modules_to_save.default.bias``), and PEFT loads that too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hf_fusion.errors import FusionError

Shapes = dict[str, tuple[int, ...]]

PREFIX = "base_model.model."
DEFAULT = "default"  # what PEFT calls an adapter that nobody named
LORA = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])\.weight")
"""A plain name of one half of a LoRA."""
EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])")
"""The same of a LoRA on an embedding, which PEFT stores the other way round."""
ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\..+)?")
"""Rows of an embedding that were trained alone."""

_NAMED = re.compile(r"(.+\.lora_(?:[AB]|magnitude_vector|embedding_[AB]))(?:\.(.+?))??(\.weight|\.bias)?")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<rest>.+)")


def plain_keys(keys: Iterable[str], name: str) -> dict[str, str]:
    """Name in an adapter's file -> the same without PEFT's wrappers and without the adapter's name.

    Halves of a LoRA become ``PATH.lora_A.weight``, see `LORA`; what the adapter saved whole becomes the parameter that
    it replaces. Copies of what was replaced (``original_module``) are left out.

    Args:
        keys: of the file, without `PREFIX` or with it.
        name: what errors call the adapter.

    Raises:
        FusionError: the file holds several adapters.
    """
    bare = {key: key.removeprefix(PREFIX) for key in keys}
    matches = {key: match for key, own in bare.items() if (match := _NAMED.fullmatch(own))}
    adapters = {match[2] for match in matches.values()}
    if len(adapters) > 1:
        told = ", ".join(sorted(adapter or "one without a name" for adapter in adapters))
        raise FusionError(f"Adapter {name} holds several adapters: {told}.", hint="save each in a folder of its own")
    called = next(iter(adapters), None) or DEFAULT
    found = {}
    for key, own in bare.items():
        if match := matches.get(key):
            found[key] = match[1] + (match[3] or "")
        elif ".original_module." not in own:  # what modules_to_save replaces: PEFT writes it beside grown embeddings
            if match := _SAVED.fullmatch(own):
                own = f"{match['path']}.{match['rest'].removeprefix(f'{called}.')}"
            found[key] = own.replace(".base_layer.", ".")
    return found


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[dict[str, tuple[int, int]], Shapes]:
    """From an adapter's tensor shapes: module path → (d_in, d_out), and the shapes of its saved tensors."""
    lora: dict[str, tuple[int, int]] = {}
    saved: Shapes = {}
    for stored, key in plain_keys(shapes, name).items():
        shape = shapes[stored]
        if match := LORA.fullmatch(key):
            d_in, d_out = lora.get(match["path"], (0, 0))
            lora[match["path"]] = (shape[-1], d_out) if match["half"] == "A" else (d_in, shape[0])
        elif "lora_" not in key:
            saved[key] = shape
    return lora, saved
