"""Parses the tensor names in an adapter's file, in all forms that PEFT reads.

``save_pretrained`` leaves the adapter's name out (``query.lora_A.weight``). A state dict that was saved directly
contains it (``query.lora_A.default.weight``, ``classifier.modules_to_save.default.bias``), and PEFT loads that too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hf_fusion.errors import FusionError

Shapes = dict[str, tuple[int, ...]]

PREFIX = "base_model.model."
DEFAULT = "default"  # PEFT's default name of an adapter
LORA = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])\.weight")
"""Name of one factor of a LoRA."""
EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])")
"""Name of one factor of a LoRA on an embedding, which PEFT stores transposed."""
BIAS = re.compile(r"(.+)\.lora_B\.bias")
"""Name of the change of a linear layer's bias, which PEFT stores beside B."""
ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\..+)?")
"""Name of the trained rows of an embedding."""

_NAMED = re.compile(r"(.+\.lora_(?:[AB]|magnitude_vector|embedding_[AB]))(?:\.(.+?))??(\.weight|\.bias)?")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<rest>.+)")


def plain_keys(keys: Iterable[str], name: str) -> dict[str, str]:
    """Name in an adapter's file -> the same without PEFT's wrappers and without the adapter's name.

    Factors of a LoRA become ``PATH.lora_A.weight``, see `LORA`; tensors saved in full get the name of the
    parameter that they replace. Copies of replaced parameters (``original_module``) are left out.

    Args:
        keys: of the file, with or without `PREFIX`.
        name: the adapter's name, for errors.

    Raises:
        FusionError: the file contains several adapters.
    """
    bare = {key: key.removeprefix(PREFIX) for key in keys}
    matches = {key: match for key, own in bare.items() if (match := _NAMED.fullmatch(own))}
    adapters = {match[2] for match in matches.values()}
    if len(adapters) > 1:
        listed = ", ".join(sorted(adapter or "an unnamed one" for adapter in adapters))
        raise FusionError(f"adapter {name} contains several adapters: {listed}", hint="save each in a separate folder")
    called = next(iter(adapters), None) or DEFAULT
    found = {}
    for key, own in bare.items():
        if match := matches.get(key):
            found[key] = match[1] + (match[3] or "")
        elif ".original_module." not in own:  # PEFT also saves the replaced module of resized embeddings
            if match := _SAVED.fullmatch(own):
                own = f"{match['path']}.{match['rest'].removeprefix(f'{called}.')}"
            found[key] = own.replace(".base_layer.", ".")
    return found


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[dict[str, tuple[int, int]], Shapes]:
    """Module path → (d_in, d_out), and name → shape of the tensors saved in full, from an adapter's tensor shapes."""
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
