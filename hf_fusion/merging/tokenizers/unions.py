"""Unites the tokens of several models in one ``tokenizer.json``: the base's keep their ids, others are appended.

mergekit appends all of them as added tokens, which are matched before tokenization, so that subwords of other models
split words of the base. Here subwords are added to the tokenizer's model, with their merges or scores; only added
tokens stay added tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, one_line, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Content = dict[str, Any]


def load_tokenizer(text: str, added: Iterable[dict[str, Any]], name: str) -> Tokenizer:
    """Loads a ``tokenizer.json`` with the `tokenizers` library.

    Args:
        text: of the file.
        added: its ``added_tokens``.
        name: of the model, for errors.

    Raises:
        FusionError: it is invalid, or an added token gets another id than stored.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain exceptions, and panics for some files
        raise FusionError(f"{name}: tokenizer.json is not valid ({one_line(error)})", "download it again") from None
    for token in added:
        if (token_id := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise FusionError(
                f"{name}: tokenizer.json gives {shown(token['content'])} the id {token['id']},"
                f" but it is loaded as {token_id}"
            )
    return tokenizer


def union(first: tuple[str, Content], others: Sequence[tuple[str, Content, int]]) -> Content:
    """Appends other tokenizers' tokens to the first.

    Args:
        first: name and ``tokenizer.json`` of the first model.
        others: the same for other models, and their number of embedding rows, which limits their token ids.

    Returns:
        The united content; the first's, unchanged, if it has all tokens.

    Raises:
        FusionError: the tokenizers are of different types.
    """
    name, first_content = first
    for other, content, _ in others:
        if (first_kind := _kind(first_content, name)) != (kind := _kind(content, other)):
            raise FusionError(
                f"the tokenizers of {name} ({first_kind}) and {other} ({kind}) cannot be united",
                "choose one of them: tokenizer: base, or a model",
            )
    added = {token["content"] for token in first_content["added_tokens"]}
    known = _names(first_content) | added
    pieces: dict[str, tuple[Content, float]] = {}
    new_added: dict[str, dict[str, Any]] = {}
    for _, content, limit in others:
        other_added = {token["content"]: token for token in content["added_tokens"] if token["id"] < limit}
        new = ((token_id, piece, score) for piece, token_id, score in _pieces(content) if piece not in known)
        for token_id, piece, score in sorted(new):
            if piece not in other_added and token_id < limit:
                pieces.setdefault(piece, (content, score))
        for token in sorted(other_added.values(), key=lambda token: token["id"]):
            if token["content"] not in added:
                new_added.setdefault(token["content"], token)
    pieces = {piece: source for piece, source in pieces.items() if piece not in new_added}
    if not pieces and not new_added:
        return first_content
    merged = _copy(first_content)
    if pieces:
        _append_pieces(merged, pieces)
    _append_added(merged, new_added.values())
    return merged


def add_tokens(content: Content, tokens: Iterable[str]) -> Content:
    """Adds missing tokens as added tokens; returns the same content if there are none."""
    known = _names(content) | {token["content"] for token in content["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    new_added = [{"content": token, **flags} for token in tokens if token not in known]
    if not new_added:
        return content
    merged = _copy(content)
    _append_added(merged, new_added)
    return merged


def _kind(content: Content, name: str) -> str:
    """The type of a tokenizer; tokens of different types are not comparable."""
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(content.get("added_tokens"), list):
        raise FusionError(f"{name}: tokenizer.json has no model and added_tokens")
    steps = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    prefix = f" after {model['continuing_subword_prefix']}" if model.get("continuing_subword_prefix") else ""
    return f"{'byte-level ' if 'ByteLevel' in steps else ''}{model.get('type')}{prefix}"


def _pieces(content: Content) -> Iterator[tuple[str, int, float]]:
    """Tokens of the tokenizer's model with id and score (0 if it has none)."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return ((piece, token_id, 0.0) for piece, token_id in vocabulary.items())
    return ((piece, token_id, score) for token_id, (piece, score) in enumerate(vocabulary))


def _names(content: Content) -> set[str]:
    return {piece for piece, _, _ in _pieces(content)}


def _copy(content: Content) -> Content:
    """A copy whose vocabulary can be extended."""
    model = dict(content["model"])
    for key in ("vocab", "merges"):
        if key in model:
            model[key] = model[key].copy()
    return {**content, "model": model, "added_tokens": list(content["added_tokens"])}


def _append_pieces(merged: Content, pieces: dict[str, tuple[Content, float]]) -> None:
    """Appends subwords to the tokenizer's model; added tokens are included in it, to keep their ids."""
    model = merged["model"]
    added = {token["content"]: token["id"] for token in merged["added_tokens"]}
    first_new = _next_id(merged)
    if isinstance(model["vocab"], dict):
        model["vocab"] |= added
        model["vocab"] |= {piece: token_id for token_id, piece in enumerate(pieces, first_new)}
    else:
        by_id = {token_id: content for content, token_id in added.items()}
        for token_id in range(len(model["vocab"]), first_new):
            if token_id not in by_id:
                raise FusionError(f"the first model's tokenizer.json has no token {token_id}: it cannot be united")
            model["vocab"].append([by_id[token_id], 0.0])
        model["vocab"] += [[piece, score] for piece, (_, score) in pieces.items()]
    if "merges" in model:
        contents = {id(content): content for content, _ in pieces.values()}
        known = {tuple(_pair(merge)) for merge in model["merges"]}
        as_text = isinstance(model["merges"][0], str) if model["merges"] else False
        for content in contents.values():
            for merge in content["model"]["merges"]:
                pair = tuple(_pair(merge))
                if "".join(pair) in pieces and pair not in known and all(part in model["vocab"] for part in pair):
                    known.add(pair)
                    model["merges"].append(" ".join(pair) if as_text else list(pair))


def _pair(merge: object) -> list[str]:
    """The two parts of a merge: a string with a space in older files, a list in newer ones."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2:
        raise FusionError(f"tokenizer.json has the merge {shown(merge)}")
    return pair


def _append_added(merged: Content, tokens: Iterable[dict[str, Any]]) -> None:
    """Appends added tokens; one that is a subword of the tokenizer's model keeps its id."""
    tokens = list(tokens)
    contents = {token["content"] for token in tokens}
    pieces = {piece: token_id for piece, token_id, _ in _pieces(merged) if piece in contents}
    next_id = _next_id(merged)
    for token in tokens:
        token_id = pieces.get(token["content"], next_id)
        next_id += token_id == next_id
        merged["added_tokens"].append({**token, "id": token_id})
    merged["added_tokens"].sort(key=lambda token: token["id"])


def _next_id(content: Content) -> int:
    """The first unused id."""
    vocabulary = content["model"]["vocab"]
    highest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max(highest, max((token["id"] for token in content["added_tokens"]), default=-1)) + 1
