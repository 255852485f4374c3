"""The vocabulary of a merge of models with different tokens: embeddings are aligned by token, not by token id.

    tokenizer: union | base | owner/name
    tokenizer: {source: union, tokens: {<|im_end|>: {source: owner/name, force: true}}, pad_to_multiple_of: 64}
    tokenizer: smallest     (by token id: see `smallest`)

As in mergekit, the row of a token that a model lacks is taken from the only model that has it, from the base, or else
is the mean over the models that have it. Padding rows are the mean of all rows. Unlike in mergekit, rows without a
token in the model whose tokenizer is used (``base``, or one of the merged models) are kept, by index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.hub.download import download
from hf_fusion.hub.manifests import TEMPLATES
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.selection import pick_small
from hf_fusion.io.files import own_file, read_file, read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.open_models import LAYER, Model
from hf_fusion.merging.engine.tensors import Reader
from hf_fusion.merging.merged_configs import find_vocabulary_config
from hf_fusion.merging.tokenizers.aligned_embeddings import AVERAGE, ZERO, AlignedReader, RowSources
from hf_fusion.merging.tokenizers.token_ids import TokenIdMap, read_roles
from hf_fusion.merging.tokenizers.token_sources import TokenRequest, TokenSource, tokenizer_request
from hf_fusion.merging.tokenizers.unions import add_tokens, load_tokenizer, union
from hf_fusion.schema import KeyPath

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_fusion.recipe import Recipe

TOKENIZER = "tokenizer.json"
# files that duplicate the content of tokenizer.json, and would be outdated
REDUNDANT = (
    *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    *REDUNDANT,
)
MAX_HOLES = 1_000_000  # ids without a token


@dataclass(frozen=True)
class _Rule:
    """The source of a token's row that a recipe sets: a model's row, or zeros."""

    token: int  # in the merged vocabulary
    model: int | None  # id() of it; None: zeros
    row: int
    force: bool


@dataclass
class Vocabulary:
    """The vocabulary of a merged model.

    Attributes:
        rows: number of embedding rows, including padding.
        size: number of rows with a source: those of tokens, and further rows of the tokenizer's model.
        files: of the tokenizer.
        digest: of everything that determines the embeddings.
        pinned: the tokenizer's model in the recipe -> its pinned reference, if it is not one of the merged models.
    """

    rows: int
    size: int
    files: dict[str, bytes]
    digest: str
    _rows: dict[int, np.ndarray]  # id() of a model -> its row for each token, or -1
    _base: int | None
    _rules: list[_Rule]
    _id_map: TokenIdMap | None  # from the first model's token ids to the merged ones; None: unchanged
    pinned: dict[str, str] = field(default_factory=dict)
    _tables: dict[tuple[int, ...], dict[int, RowSources]] = field(default_factory=dict)

    def covers(self, model: Model, name: str) -> bool:
        """Whether a tensor of a model has a row for each of its tokens."""
        return _covers(model, name)

    def update_ids(self, content: dict[str, Any], file: str) -> dict[str, Any]:
        """Updates token ids in a configuration of the first model; see `TokenIdMap.update_ids`."""
        return content if self._id_map is None else self._id_map.update_ids(content, file)

    def reader(self, model: Model, readers: Mapping[int, Reader]) -> Reader:
        """A reader of a model's tensor, with one row per token of the merged model.

        Args:
            model: the model.
            readers: of this tensor in every model that has it, by `id` of the model.
        """
        known = tuple(sorted(key for key in readers if key in self._rows))
        if known not in self._tables:
            self._tables[known] = self._find_sources(known)
        table = self._tables[known][id(model)]
        return AlignedReader([readers[key] for key in known], table, self.rows, self.size)

    def _find_sources(self, known: Sequence[int]) -> dict[int, RowSources]:
        """The sources of all rows, for each model."""
        model_rows = np.stack([self._rows[key] for key in known])  # (models, tokens)
        has = model_rows >= 0
        count = has.sum(0)
        donor = np.where(count == 1, has.argmax(0), np.where(count, AVERAGE, ZERO))
        if self._base in known:
            base = known.index(self._base)
            donor[has[base] & (count > 1)] = base
        rows = np.where(donor >= 0, model_rows[np.maximum(donor, 0), np.arange(self.size)], 0)
        forced = np.zeros(self.size, bool)
        for rule in self._rules:
            if rule.model is not None and rule.model not in known:
                raise FusionError("the tokenizer takes a row from a model that has no such tensor", "tie, or untie it")
            donor[rule.token] = ZERO if rule.model is None else known.index(rule.model)
            rows[rule.token], forced[rule.token] = rule.row, rule.force
        tables = {}
        for index, key in enumerate(known):
            is_kept = has[index] & ~forced
            models = np.where(is_kept, index, donor)
            averaged = {
                int(row): [(int(i), int(model_rows[i, row])) for i in has[:, row].nonzero()[0]]
                for row in (models == AVERAGE).nonzero()[0]
            }
            tables[key] = RowSources.of(models, np.where(is_kept, model_rows[index], rows), averaged)
        return tables


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model, by its path in its folder, belongs to its tokenizer."""
    return name in TOKENIZER_FILES or name.startswith(f"{TEMPLATES}/")


def unite_vocabularies(
    recipe: Recipe, base: Model | None, experts: Sequence[Model], api: HfApi | None = None
) -> Vocabulary:
    """The merged vocabulary of a recipe with a ``tokenizer``; tokens of different models are matched by their text.

    Args:
        recipe: with a ``tokenizer``.
        base: the opened base, or None.
        experts: the opened experts.
        api: the Hub's client, to download the tokenizer of a model that is not merged.

    Raises:
        FusionError: a model has no ``tokenizer.json``; the tokenizers cannot be united; the recipe's ``tokenizer`` has
            an unknown key, or a token that no model has.
    """
    assert recipe.tokenizer is not None
    request = tokenizer_request(recipe.tokenizer)
    source, tokens, multiple = request.source, request.tokens, request.pad_to_multiple_of
    first = base or experts[0]
    models = list({id(model): model for model in ([base] if base else []) + list(experts)}.values())
    named = {expert.model: model for expert, model in zip(recipe.experts, experts, strict=True)}
    named |= {model.name: model for model in models} | ({recipe.base: base} if base and recipe.base else {})
    texts: dict[str, _Tokenizer] = {}  # most fine-tunes have the tokenizer of their base, which is parsed once
    read = {id(model): read_tokenizer(model.folder, model.name, texts) for model in models}
    first_tokenizer = read[id(first)]
    if first_tokenizer is None:
        raise FusionError(f"{first.name} has no {TOKENIZER}", "load its tokenizer with transformers and save it")
    limits = {id(model): embedding_rows(model) for model in models}
    for model in models:
        if read[id(model)] is None and limits[id(model)] != limits[id(first)]:
            raise FusionError(f"{model.name} has no {TOKENIZER}, and not as many tokens as {first.name}")
    # as in mergekit, a model without a tokenizer has the first model's
    tokenizers = {key: tokenizer or first_tokenizer for key, tokenizer in read.items()}
    folder, merged_tokenizer, pinned = first.folder, first_tokenizer, {}
    if source not in ("union", "base"):
        if source in named:
            folder = named[source].folder
        else:
            folder, pinned[source] = _fetched(source, api)
        source_tokenizer = read_tokenizer(folder, source, texts)
        if source_tokenizer is None:
            raise FusionError(f"{source} has no {TOKENIZER}", "load its tokenizer with transformers and save it")
        merged_tokenizer = source_tokenizer
    content = merged_tokenizer.content
    if source == "union":
        others = [(m.name, tokenizers[id(m)].content, limits[id(m)]) for m in models if m is not first]
        content = union((first.name, content), others)
    content = add_tokens(content, tokens)
    is_new = content is not merged_tokenizer.content
    if is_new:
        merged_tokenizer = _tokenizer(json.dumps(content, ensure_ascii=False), content, f"the merged {TOKENIZER}")
    merged = merged_tokenizer.ids
    size = max(merged.values()) + 1
    if size > len(merged) + MAX_HOLES:
        raise FusionError(f"{source}: {TOKENIZER} has {len(merged)} tokens with ids up to {size - 1}")
    # rows without a token are kept of the model whose tokenizer is used: its size may suit its kernels
    owner = first if source == "base" else named.get(source)
    kept = limits[id(owner)] if owner is not None else 0
    size = max(size, kept)
    rows = -(-size // multiple) * multiple
    model_rows = {key: _rows_of(merged, tokenizers[key].ids, limits[key], size, kept) for key in tokenizers}
    rules = [_rule(token, token_request, merged, named, tokenizers, limits) for token, token_request in tokens.items()]
    files = tokenizer_files(folder, *((merged_tokenizer.text, merged_tokenizer.content) if is_new else ()))
    id_map = None
    if folder != first.folder and merged != first_tokenizer.ids:
        roles: dict[str, int] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if file in files:
                roles |= read_roles(json.loads(files[file]), merged)
        special = frozenset(token["id"] for token in first_tokenizer.content["added_tokens"])
        first_tokens = {token_id: token for token, token_id in first_tokenizer.ids.items()}
        config = find_vocabulary_config(first.config)
        first_rows = config["vocab_size"] if config else limits[id(first)]
        id_map = TokenIdMap(first_tokens, special, merged, roles, first_rows, source)
    digest = hashlib.sha256(json.dumps([rows, _plain(rules, models)]).encode())
    for token_rows in model_rows.values():
        digest.update(token_rows.tobytes())
    base_id = id(base) if base else None
    return Vocabulary(rows, size, files, digest.hexdigest(), model_rows, base_id, rules, id_map, pinned)


def _plain(rules: Sequence[_Rule], models: Sequence[Model]) -> list[Any]:
    """Rules as plain data."""
    names = {id(model): model.name for model in models}
    return [[rule.token, names.get(rule.model or 0), rule.row, rule.force] for rule in rules]


def _rule(
    token: str,
    request: TokenRequest,
    merged: Mapping[str, int],
    named: Mapping[str, Model],
    tokenizers: Mapping[int, _Tokenizer],
    limits: Mapping[int, int],
) -> _Rule:
    """The source of a token's row: a model, optionally with another token or id of it, or zeros."""
    where, source = KeyPath("", "tokenizer").inner("tokens", token, "source"), request.source
    model: str | None
    model, wanted = (
        (source, token)
        if isinstance(source, str)
        else (source.model, source.token_id if source.token is None else source.token)
    )
    if isinstance(source, TokenSource) and source.kind == "zero":
        return _Rule(merged[token], None, 0, request.force)
    if model is None or model not in named:
        raise FusionError(f"{where} is {shown(model)}, which is not one of the merged models", suggestion(model, named))
    key = id(named[model])
    row = wanted if type(wanted) is int else tokenizers[key].ids.get(str(wanted), -1)
    if not 0 <= row < limits[key]:
        raise FusionError(f"{where}: {model} has no token {shown(wanted)}")
    return _Rule(merged[token], key, row, request.force)


def _covers(model: Model, name: str) -> bool:
    config = find_vocabulary_config(model.config)
    shape = model.entries[name].shape
    if config is None or not shape or shape[0] != config["vocab_size"] or LAYER.match(name) or "position" in name:
        return False
    return len(shape) == 2 or (len(shape) == 1 and name.endswith("bias"))


def embedding_rows(model: Model) -> int:
    """Number of rows of a model's embeddings: it has no tokens with higher ids, even if its tokenizer has them."""
    rows = [model.shape(name)[0] for name in model.entries if _covers(model, name)]
    if not rows:
        raise FusionError(f"{model.name} has no embedding of its tokens: config.json and weights do not agree")
    return min(rows)


def _rows_of(merged: Mapping[str, int], ids: Mapping[str, int], limit: int, size: int, kept: int) -> np.ndarray:
    """A model's row for each token of the merged model, or -1.

    Rows below `kept` for which neither the merged model nor this one has a token keep their index.

    Args:
        merged: token -> id in the merged model.
        ids: token -> id in this model.
        limit: number of this model's rows.
        size: number of the merged model's rows, without padding.
        kept: number of rows of the model whose tokenizer is used.
    """
    rows = np.full(size, -1, np.int64)
    merged_ids = np.fromiter(merged.values(), np.int64, len(merged))
    if ids is merged:
        model_ids = merged_ids
    else:
        model_ids = np.fromiter((ids.get(token, -1) for token in merged), np.int64, len(merged))
    rows[merged_ids] = np.where(model_ids < limit, model_ids, -1)
    free = np.arange(size) < min(kept, limit)
    for taken in (merged_ids, np.fromiter(ids.values(), np.int64, len(ids))):
        free[taken[taken < size]] = False
    rows[free] = np.flatnonzero(free)
    return rows


@dataclass(frozen=True)
class _Tokenizer:
    """A ``tokenizer.json``: its text, its parsed content, and token -> id."""

    text: str
    content: dict[str, Any]
    ids: dict[str, int]


def _tokenizer(text: str, content: dict[str, Any], name: str) -> _Tokenizer:
    ids = dict(load_tokenizer(text, content["added_tokens"], name).get_vocab(with_added_tokens=True))
    if not ids:
        raise FusionError(f"{name}: {TOKENIZER} has no tokens")
    return _Tokenizer(text, content, ids)


def read_tokenizer(folder: Path, name: str, known: dict[str, _Tokenizer]) -> _Tokenizer | None:
    """Reads a folder's tokenizer; None if it has none. A text in `known` is not parsed again."""
    file = folder / TOKENIZER
    if not own_file(file):
        return None
    content = {"added_tokens": [], **read_json(file, name)}
    text = read_text(file)
    if text not in known:
        known[text] = _tokenizer(text, content, name)
    return known[text]


def _fetched(name: str, api: HfApi | None) -> tuple[Path, str]:
    """Downloads the tokenizer of a model that is not merged; returns its folder and its pinned reference."""
    source = resolve(name, api)
    download([(source, [file for file in pick_small(source, code=False) if is_tokenizer_file(file)])], api)
    if source.folder is None:
        raise FusionError(f"{name} has no {TOKENIZER}", "load its tokenizer with transformers and save it")
    return source.folder, str(source.ref)


def tokenizer_files(
    folder: Path, text: str | None = None, content: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """A tokenizer's files by name.

    Args:
        folder: the folder that contains them.
        text: text of a ``tokenizer.json`` that replaces the folder's; `REDUNDANT` files are then left out.
        content: the parsed content of `text`.
    """
    names = [*TOKENIZER_FILES, *(f"{TEMPLATES}/{file.name}" for file in sorted(folder.glob(f"{TEMPLATES}/*.jinja")))]
    files = {name: read_file(folder / name, folder) for name in names if own_file(folder / name, folder)}
    if text is not None and content is not None:
        files = {name: raw for name, raw in files.items() if name not in REDUNDANT}
        files[TOKENIZER] = text.encode()
        if "tokenizer_config.json" in files:
            config = read_json(folder / "tokenizer_config.json", str(folder))
            if isinstance(config.get("added_tokens_decoder"), dict):
                config["added_tokens_decoder"] |= {
                    str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                    for token in content["added_tokens"]
                }
                files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return files
