"""Retrieval among experts: the one whose training examples hold the most similar one serves the whole input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from hf_fusion.errors import FusionError
from hf_fusion.hub.snapshot_checks import check_snapshot

if TYPE_CHECKING:
    from datasets import Dataset

Embedder: TypeAlias = Callable[[list[str]], torch.Tensor]
"""Texts → embeddings (N, d)."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


class TextEmbedder:
    """Sentence embeddings: the mean of an encoder's last states over real tokens, of unit length.

    Args:
        name: id or folder of the encoder; the default is the one of PHATGOOSE's paper.
        batch_size: texts per step, taken in order of length.
        max_length: tokens kept of a text, from its beginning.
    """

    def __init__(self, name: str | Path = MINILM, batch_size: int = 64, max_length: int = 256) -> None:
        from transformers import AutoModel, AutoTokenizer

        if Path(name).is_dir():
            check_snapshot(Path(name), str(name))
        self.model = AutoModel.from_pretrained(name, trust_remote_code=False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.batch_size, self.max_length = batch_size, max_length

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Embeddings of texts, (N, d)."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeddings = torch.zeros(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model(**inputs).last_hidden_state.float()  # (B, T, d)
            mask = inputs["attention_mask"][..., None]
            embeddings[rows] = ((states * mask).sum(1) / mask.sum(1)).cpu()
        return torch.nn.functional.normalize(embeddings, dim=-1)


class Retrieval:
    """Chooses an expert for an input by its nearest training example (PHATGOOSE's baseline).

    Args:
        train_rows: expert → rows it was trained on, at least one.
        embed: makes embeddings of texts.
    """

    def __init__(self, train_rows: Mapping[str, Dataset], embed: Embedder) -> None:
        self.embed = embed
        texts = {name: texts_of(rows) for name, rows in train_rows.items()}
        # (ΣN, d), and whose each of them is
        self.examples = _unit(embed([text for examples in texts.values() for text in examples]))
        self.owners = torch.cat([torch.full((len(examples),), index) for index, examples in enumerate(texts.values())])

    def choose(self, rows: Dataset) -> torch.Tensor:
        """The expert of each row, as an index into `train_rows`, (N,)."""
        nearest = (_unit(self.embed(texts_of(rows))) @ self.examples.t()).argmax(1)
        return self.owners[nearest]


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def texts_of(rows: Dataset) -> list[str]:
    """The text of each input: column ``prompt``, or ``text`` with its ``text_pair``.

    Raises:
        FusionError: for rows without text.
    """
    for names in (("prompt",), ("text", "text_pair"), ("text",)):
        if set(names) <= set(rows.column_names):
            return [" ".join(filter(None, parts)) for parts in zip(*(rows[name] for name in names), strict=True)]
    raise FusionError(
        f"retrieval reads columns prompt or text, but the data set has {rows.column_names}",
        hint="leave 'retrieval' out of predictors",
    )
