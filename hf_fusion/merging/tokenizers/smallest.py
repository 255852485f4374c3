"""The smallest vocabulary, as mergekit uses for models with different numbers of tokens without a tokenizer setting.

    tokenizer: smallest

Embeddings are matched by token id, not by token, and truncated to the smallest number of rows, as is the tokenizer.
This suits models whose vocabularies differ only in the last tokens; for others use ``union``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_fusion.errors import FusionError, shown
from hf_fusion.merging.engine.open_models import Model
from hf_fusion.merging.merged_configs import find_vocabulary_config
from hf_fusion.merging.tokenizers.token_ids import TokenIdMap, read_roles
from hf_fusion.merging.tokenizers.vocabulary import Vocabulary, embedding_rows, read_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)

Content = dict[str, Any]
_MAX_LISTED = 12  # tokens that a warning lists


def smallest_vocabulary(base: Model | None, experts: Sequence[Model]) -> Vocabulary | None:
    """The vocabulary of the token ids that all models have; None if all have the same size, or no vocabulary.

    Args:
        base: the opened base, or None.
        experts: the opened experts.

    Raises:
        FusionError: the first model's tokenizer needs a token that is cut off.
    """
    models = list({id(model): model for model in ([base] if base else []) + list(experts)}.values())
    first = models[0]
    if any(find_vocabulary_config(model.config) is None for model in models):
        return None
    limits = {id(model): embedding_rows(model) for model in models}
    rows = min(limits.values())
    if set(limits.values()) == {rows}:
        return None
    for model in models:
        if limits[id(model)] > rows:
            _warn(model, limits[id(model)], rows)
    files, id_map = tokenizer_files(first.folder), None
    tokenizer = read_tokenizer(first.folder, first.name, {})
    if tokenizer is not None and max(tokenizer.ids.values()) >= rows:
        ids = {token: token_id for token, token_id in tokenizer.ids.items() if token_id < rows}
        lost = tokenizer.ids.keys() - ids.keys()
        content = cut(tokenizer.content, rows, first.name)
        files = tokenizer_files(first.folder, json.dumps(content, ensure_ascii=False), content)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if name in files:
                kept = _without(json.loads(files[name]), lost)
                files[name] = json.dumps(kept, ensure_ascii=False, indent=2).encode()
        roles = read_roles(json.loads(files.get("tokenizer_config.json", b"{}")), ids)
        special = frozenset(token["id"] for token in tokenizer.content["added_tokens"])
        by_id = {token_id: token for token, token_id in tokenizer.ids.items()}
        size = (find_vocabulary_config(first.config) or {}).get("vocab_size", rows)
        id_map = TokenIdMap(by_id, special, ids, roles, size, f"cut to {rows} tokens")
    model_rows = {key: np.arange(rows) for key in limits}
    digest = hashlib.sha256(f"smallest {rows}".encode()).hexdigest()
    return Vocabulary(rows, rows, files, digest, model_rows, id(base) if base else None, [], id_map)


def cut(content: Content, rows: int, name: str) -> Content:
    """Removes tokens from a ``tokenizer.json``, from a token id on.

    Args:
        content: of the file.
        rows: the first token id to remove.
        name: of the model, for errors.

    Raises:
        FusionError: the post-processor or the unknown token needs a removed token.
    """
    model = dict(content["model"])
    vocabulary = model["vocab"]
    unknown = model.get("unk_token", model.get("unk_id"))
    if isinstance(vocabulary, dict):
        model["vocab"] = {piece: token_id for piece, token_id in vocabulary.items() if token_id < rows}
        needed = [unknown] if unknown in vocabulary and unknown not in model["vocab"] else []
    else:
        model["vocab"] = vocabulary[:rows]
        needed = [unknown] if isinstance(unknown, int) and unknown >= rows else []
    if "merges" in model and isinstance(model["vocab"], dict):
        model["merges"] = [merge for merge in model["merges"] if _is_whole(merge, model["vocab"])]
    added = [token for token in content["added_tokens"] if token["id"] < rows]
    removed = {token["content"] for token in content["added_tokens"]} - {token["content"] for token in added}
    post_processor = json.dumps(content.get("post_processor"), ensure_ascii=False)
    needed += sorted(token for token in removed if json.dumps(token, ensure_ascii=False) in post_processor)
    if needed:
        raise FusionError(
            f"the tokenizer of {name} cannot do without {shown(needed[0])}, which the smallest vocabulary, of {rows},"
            " lacks",
            "tokenizer: union keeps the tokens of all models",
        )
    return {**content, "model": model, "added_tokens": added}


def _is_whole(merge: str | Sequence[str], vocabulary: Mapping[str, int]) -> bool:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return all(part in vocabulary for part in (*pair, "".join(pair)))


def _without(value: object, lost: set[str]) -> Any:
    """Removes tokens from a tokenizer's configuration."""

    def is_lost(entry: object) -> bool:
        return (entry.get("content") if isinstance(entry, Mapping) else entry) in lost if _is_named(entry) else False

    if isinstance(value, dict):
        return {key: _without(inner, lost) for key, inner in value.items() if not is_lost(inner)}
    if isinstance(value, list):
        return [_without(inner, lost) for inner in value if not is_lost(inner)]
    return value


def _is_named(entry: object) -> bool:
    return isinstance(entry, str) or (isinstance(entry, Mapping) and isinstance(entry.get("content"), str))


def _warn(model: Model, limit: int, rows: int) -> None:
    tokenizer = read_tokenizer(model.folder, model.name, {})
    tokens = {} if tokenizer is None else {token_id: token for token, token_id in tokenizer.ids.items()}
    lost = [shown(tokens[token_id]) for token_id in range(rows, limit) if token_id in tokens]
    rest = f" and {len(lost) - _MAX_LISTED} more" if len(lost) > _MAX_LISTED else ""
    named = ", ".join(lost[:_MAX_LISTED]) + rest if lost else "no token of its tokenizer"
    text = "%s has %d rows of tokens, the smallest vocabulary %d: cut to that, it loses %s (tokenizer: union keeps all)"
    logger.warning(text, model.name, limit, rows, named)
