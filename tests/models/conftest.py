"""Experts that several model tests fuse."""

from __future__ import annotations

import pytest
from tiny import adapter, bert, make_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_fusion import Expert


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def adapters(tokenizer) -> list[Expert]:
    """Three adapters of one BERT: mixed ranks, targets and label counts."""
    base = bert(["x", "y"])
    rows = [
        (4, ["a", "b", "c"], ["query", "value"]),
        (7, ["c", "a", "b"], ["query", "dense"]),
        (4, ["b", "a"], ["key"]),
    ]
    return [
        Expert(f"me/adapter-{i}", base, adapter(base, rank, len(labels), i, targets), tokenizer, labels)
        for i, (rank, labels, targets) in enumerate(rows)
    ]
