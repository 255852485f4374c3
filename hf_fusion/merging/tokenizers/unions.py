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
        found = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain exceptions, and panics for some files
        raise FusionError(f"{name}: tokenizer.json is not valid ({one_line(error)})", "fetch it again") from None
    for token in added:
        if (number := found.token_to_id(token["content"])) != token["id"]:
            raise FusionError(
                f"{name}: tokenizer.json numbers {shown(token['content'])} {token['id']}, and is read as {number}"
            )
    return found


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
    name, own = first
    for other, content, _ in others:
        if (here := _kind(own, name)) != (there := _kind(content, other)):
            raise FusionError(
                f"the tokenizers of {name} ({here}) and {other} ({there}) cannot be united",
                "choose one of them: tokenizer: base, or a model",
            )
    added = {token["content"] for token in own["added_tokens"]}
    known = _names(own) | added
    pieces: dict[str, tuple[Content, float]] = {}
    more: dict[str, dict[str, Any]] = {}
    for _, content, limit in others:
        theirs = {token["content"]: token for token in content["added_tokens"] if token["id"] < limit}
        new = ((number, piece, score) for piece, number, score in _pieces(content) if piece not in known)
        for number, piece, score in sorted(new):
            if piece not in theirs and number < limit:
                pieces.setdefault(piece, (content, score))
        for token in sorted(theirs.values(), key=lambda token: token["id"]):
            if token["content"] not in added:
                more.setdefault(token["content"], token)
    pieces = {piece: found for piece, found in pieces.items() if piece not in more}
    if not pieces and not more:
        return own
    merged = _copy(own)
    if pieces:
        _enter(merged, pieces)
    _append(merged, more.values())
    return merged


def add_tokens(content: Content, tokens: Iterable[str]) -> Content:
    """Adds missing tokens as added tokens; returns the same content if there are none."""
    known = _names(content) | {token["content"] for token in content["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    more = [{"content": token, **flags} for token in tokens if token not in known]
    if not more:
        return content
    merged = _copy(content)
    _append(merged, more)
    return merged


def _kind(content: Content, name: str) -> str:
    """The type of a tokenizer; tokens of different types are not comparable."""
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(content.get("added_tokens"), list):
        raise FusionError(f"{name}: tokenizer.json has no model and added_tokens")
    written = json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    prefix = f" after {model['continuing_subword_prefix']}" if model.get("continuing_subword_prefix") else ""
    return f"{'byte-level ' if 'ByteLevel' in written else ''}{model.get('type')}{prefix}"


def _pieces(content: Content) -> Iterator[tuple[str, int, float]]:
    """Tokens of the tokenizer's model with id and score (0 if it has none)."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return ((piece, number, 0.0) for piece, number in vocabulary.items())
    return ((piece, number, score) for number, (piece, score) in enumerate(vocabulary))


def _names(content: Content) -> set[str]:
    return {piece for piece, _, _ in _pieces(content)}


def _copy(content: Content) -> Content:
    """A copy whose vocabulary can be extended."""
    model = dict(content["model"])
    for key in ("vocab", "merges"):
        if key in model:
            model[key] = model[key].copy()
    return {**content, "model": model, "added_tokens": list(content["added_tokens"])}


def _enter(merged: Content, pieces: dict[str, tuple[Content, float]]) -> None:
    """Appends subwords to the tokenizer's model; added tokens are included in it, to keep their ids."""
    model = merged["model"]
    taken = {token["content"]: token["id"] for token in merged["added_tokens"]}
    new = _next(merged)
    if isinstance(model["vocab"], dict):
        model["vocab"] |= taken
        model["vocab"] |= {piece: new + number for number, piece in enumerate(pieces)}
    else:
        by_number = {number: content for content, number in taken.items()}
        for number in range(len(model["vocab"]), new):
            if number not in by_number:
                raise FusionError(f"the first model's tokenizer.json has no token {number}: it cannot be united")
            model["vocab"].append([by_number[number], 0.0])
        model["vocab"] += [[piece, score] for piece, (_, score) in pieces.items()]
    if "merges" in model:
        contents = {id(content): content for content, _ in pieces.values()}
        known = {tuple(_pair(merge)) for merge in model["merges"]}
        written = isinstance(model["merges"][0], str) if model["merges"] else False
        for content in contents.values():
            for merge in content["model"]["merges"]:
                pair = tuple(_pair(merge))
                if "".join(pair) in pieces and pair not in known and all(part in model["vocab"] for part in pair):
                    known.add(pair)
                    model["merges"].append(" ".join(pair) if written else list(pair))


def _pair(merge: object) -> list[str]:
    """The two parts of a merge: a string with a space in older files, a list in newer ones."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2:
        raise FusionError(f"tokenizer.json has the merge {shown(merge)}")
    return pair


def _append(merged: Content, tokens: Iterable[dict[str, Any]]) -> None:
    """Appends added tokens; one that is a subword of the tokenizer's model keeps its id."""
    tokens = list(tokens)
    wanted = {token["content"] for token in tokens}
    new, pieces = _next(merged), {piece: number for piece, number, _ in _pieces(merged) if piece in wanted}
    for token in tokens:
        number = pieces.get(token["content"], new)
        new += number == new
        merged["added_tokens"].append({**token, "id": number})
    merged["added_tokens"].sort(key=lambda token: token["id"])


def _next(content: Content) -> int:
    """The first unused id."""
    vocabulary = content["model"]["vocab"]
    highest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max(highest, max((token["id"] for token in content["added_tokens"]), default=-1)) + 1
