"""File names of models, adapters and their processors."""

from __future__ import annotations

import re
from collections.abc import Mapping

ADAPTER_CONFIG = "adapter_config.json"
PROCESSOR_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def weight_files(sizes: Mapping[str, int], stem: str, suffix: str) -> list[str]:
    """The weight files at a repo's root: one ``stem.suffix``, or its index and shards; empty if none."""
    if f"{stem}.{suffix}" in sizes:
        return [f"{stem}.{suffix}"]
    index = f"{stem}.{suffix}.index.json"
    if index not in sizes:
        return []
    shard = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    return [index, *sorted(file for file in sizes if shard.fullmatch(file))]


def has_processor(sizes: Mapping[str, int]) -> bool:
    """Whether tokenizer or image processor files are among a repo's files."""
    return any(file in sizes for file in PROCESSOR_FILES + IMAGE_FILES)
