"""Computes the rows of a mixture's routers from the experts' prompts.

As in mergekit-moe: every prompt, with a beginning-of-text token and no other special tokens, gives a vector; an
expert's direction is that of its prompts minus that of its negative prompts, with unit norm.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from hf_fusion.errors import FusionError, shown
from hf_fusion.hub.remote_code import refuse_kernels
from hf_fusion.hub.silence import quiet_transformers
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import OpenFiles
from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.moe.mixtures import PROMPTED
from hf_fusion.merging.tokenizers.unions import load_tokenizer
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.schema import KeyPath, read

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EMBEDDING = "model.embed_tokens.weight"
Prompts = list[list[int]]
"""Token ids of several texts."""


class PromptDirections:
    """The directions of all experts in every layer, computed when the first router is merged.

    Args:
        recipe: its experts have ``prompts``.
        model: the base, which provides tokenizer and weights.
        gate: see `hf_fusion.merging.methods.moe`.
        files: reads the base.

    Attributes:
        described: everything that determines them, besides the base.
        held: bytes of memory that computing them takes.

    Raises:
        FusionError: prompts and gate do not match, or a prompt cannot be tokenized.
    """

    def __init__(self, recipe: Recipe, model: Model, gate: str, files: OpenFiles) -> None:
        self._model, self._gate, self._files = model, gate, files
        self._size = model.config["hidden_size"]
        self._lock, self._made = threading.Lock(), torch.empty(0)
        texts = [tuple(_texts(expert, key) for key in ("prompts", "negative_prompts")) for expert in recipe.experts]
        self._count, self.held = len(texts), 0
        self._tokens: list[tuple[Prompts, ...]] = []
        self.described: list[object] = [*texts]
        if gate not in PROMPTED:
            if any(any(own) for own in texts):
                raise FusionError(
                    f"gate: {gate} does not use prompts", f"set gate: {' or '.join(PROMPTED)}, or leave them out"
                )
            return
        for expert, (positive, _) in zip(recipe.experts, texts, strict=True):
            if not positive:
                raise FusionError(
                    f"{expert.model} has no prompts, which gate: {gate} needs", "prompts: [a text like …]"
                )
        if len(texts) > 1 and all(own == texts[0] for own in texts):
            raise FusionError("all experts have the same prompts, so the router could not distinguish them")
        if gate != "embedding":
            if model.adapter is not None:
                raise FusionError(f"gate: {gate} runs the base, and {model.name} is an adapter", "merge it first")
            self.held = sum(entry.nbytes for entry in model.entries.values())
        cut, begin = _tokenizer(model)
        self._tokens = [tuple([_cut(cut, begin + text, model) for text in prompts] for prompts in own) for own in texts]

    def of(self, layer: int) -> torch.Tensor:
        """The directions of one layer, (K, d) float32."""
        if self._gate not in PROMPTED:
            return torch.zeros(self._count, self._size)
        with self._lock:
            if not len(self._made):
                self._made = self._make()
        return self._made[min(layer, len(self._made) - 1)]

    def _make(self) -> torch.Tensor:
        """The directions of every layer, or one for all layers, (L, K, d)."""
        if self._gate == "embedding":
            table, row = self._model.reader(EMBEDDING, self._files), torch.empty(self._size)

            def vector(prompts: Prompts) -> torch.Tensor:
                total = torch.zeros(1, self._size, dtype=torch.float64)
                for token in (token for prompt in prompts for token in prompt):
                    table.read(token * self._size, row)
                    total += row
                return _normal(total)

        else:
            vector = _Runs(self._model, average=self._gate == "hidden_avg")
        rows = [_normal(vector(yes) - (vector(no) if no else 0)) for yes, no in self._tokens]  # (L, d) of each expert
        return torch.stack(rows, 1).float()


class _Runs:
    """Computes the mean input of each layer at the last token of several texts, (L, d).

    Args:
        model: loaded completely, in its stored dtype.
        average: average over each text's tokens, instead of using the last one.
    """

    def __init__(self, model: Model, average: bool) -> None:
        from transformers import AutoModel

        refuse_kernels(model.config, model.name)
        check_snapshot(model.folder, model.name)
        with quiet_transformers():
            self._loaded = AutoModel.from_pretrained(
                model.folder, dtype="auto", local_files_only=True, trust_remote_code=False
            ).eval()
        self._average = average

    def __call__(self, prompts: Prompts) -> torch.Tensor:
        rows = []
        for prompt in prompts:  # one at a time, without padding, which mergekit's averages include
            output = self._loaded(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
            states: tuple[torch.Tensor, ...] = output.hidden_states
            layers = torch.cat(states[:-1]).double()  # (L, tokens, d)
            rows.append(layers.mean(1) if self._average else layers[:, -1])
        return torch.stack(rows).mean(0)


def _normal(rows: torch.Tensor) -> torch.Tensor:
    """Normalises rows; those with a norm below 1e-8 are divided by 1e-8."""
    lengths: torch.Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths.clamp(min=1e-8)


def _texts(expert: RecipeExpert, key: str) -> list[str]:
    texts: list[str] = read(list[str], expert.parameters.get(key) or [], KeyPath(expert.model, key))
    return texts


def _cut(tokenizer: Tokenizer, text: str, model: Model) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    if not tokens:
        raise FusionError(f"the prompt {shown(text)} has no tokens")
    if max(tokens) >= model.shape(EMBEDDING)[0]:
        raise FusionError(f"{model.name} has no embedding of token {max(tokens)}, which its tokenizer produces")
    return tokens


def _tokenizer(model: Model) -> tuple[Tokenizer, str]:
    """A model's tokenizer, and its beginning-of-text token."""
    file = model.folder / "tokenizer.json"
    if not own_file(file):
        raise FusionError(f"{model.name} has no tokenizer.json", "load its tokenizer with transformers and save it")
    added = read_json(file, model.name).get("added_tokens") or []
    found = load_tokenizer(read_text(file), added, model.name)
    found.no_padding()
    found.no_truncation()
    settings = model.folder / "tokenizer_config.json"
    begin = read_json(settings, model.name).get("bos_token") if own_file(settings) else None
    begin = begin.get("content") if isinstance(begin, dict) else begin
    return found, begin if isinstance(begin, str) else ""
