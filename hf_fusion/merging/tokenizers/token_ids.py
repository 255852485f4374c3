"""Updates token ids in configurations for a merged model with another tokenizer.

Values are recognised as token ids by unambiguous keys (``image_token_id``, ``suppress_tokens``); for other keys
(``pad_index``, ``im_start_id``) by their value, if it is the id of a special or added token of the model's tokenizer.
Nested configurations with another vocabulary size, such as of an audio codec, are unchanged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_fusion.errors import FusionError, shown

logger = logging.getLogger(__name__)

_SURE = re.compile(
    r"(.*_)?tokens?_(id|ids|index|idx|indices)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_decoder_ids"
    r"|sequence_bias|(lang|task)_to_id"
)
_PERHAPS = re.compile(
    r"(.*_)?(bos|eos|pad|sep|cls|mask|unk|bo[aiv]|eo[aiv]|im|img|image|video|audio|vision|newline|patch|slice|frame|start|end)"
    r"_(id|ids|index|idx|token|tokens)"
)
# words in keys that denote counts, or another vocabulary
_OTHERS = {
    *(
        "num",
        "n",
        "max",
        "min",
        "per",
        "layer",
        "layers",
        "block",
        "blocks",
        "out",
        "hidden",
        "expert",
        "experts",
        "head",
    ),
    *("ignore", "label", "labels", "window", "attn", "codec", "codebook", "stream", "t2u", "tag", "subs"),
}
# roles of special tokens
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_ROLE = re.compile(rf"({'|'.join(ROLES)})_(token_ids?|index)")
# preferences for generation, which may be dropped with their token
_OPTIONAL = re.compile(
    r"(begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_.*|sequence_bias|.*_to_id|decoder_.*"
)
_OTHER_PARTS = re.compile(r".*(vision|audio|speech|image|vq|codec|depth|t2u).*|id2label|label2id|rope_.*")


@dataclass(frozen=True)
class TokenIdMap:
    """Maps token ids of the first model to those of the merged model.

    Attributes:
        old: id -> token, of the first model's tokenizer.
        special: ids of its special and added tokens.
        new: token -> id, of the merged model's tokenizer.
        roles: role such as "eos" -> id in the merged model.
        rows: vocabulary size in the first model's configuration.
        name: of the merged model's tokenizer, for errors.
    """

    old: Mapping[int, str]
    special: frozenset[int]
    new: Mapping[str, int]
    roles: Mapping[str, int]
    rows: int
    name: str

    def update_ids(self, content: Mapping[str, Any], file: str) -> dict[str, Any]:
        """Updates the token ids in a configuration.

        If a token no longer exists, preferences for generation are dropped with a warning, and ``eos_token_id`` and
        similar keys get the merged tokenizer's token.

        Args:
            content: of a JSON file.
            file: its name, for errors.

        Raises:
            FusionError: another token that it names no longer exists.
        """
        return {key: self._entry(key, value, file) for key, value in content.items()}

    def _entry(self, key: str, value: object, file: str) -> Any:
        if isinstance(value, Mapping) and not _SURE.fullmatch(key):
            is_other = _OTHER_PARTS.fullmatch(key) or value.get("vocab_size", self.rows) != self.rows
            return dict(value) if is_other else self.update_ids(value, f"{file}: {key}")
        if not self._is_token(key, value):
            return value
        lost = sorted({token_id for token_id in self._tokens(key, value) if self._new_id(token_id) is None})
        if not lost:
            return self._updated(key, value)
        listed = ", ".join(shown(self.old.get(token_id, token_id)) for token_id in lost[:8])
        role = _ROLE.fullmatch(key)
        if not role and not _OPTIONAL.fullmatch(key) and not isinstance(value, list):
            raise FusionError(
                f"{file}: {key} is {listed}, which the tokenizer {self.name} does not have",
                f"keep it: tokenizer: {{source: …, tokens: {{{listed}: {{source: a model that has it}}}}}}",
            )
        updated = self._updated(key, value)
        if role and updated in (None, []):
            updated = self.roles.get(role[1])
        what = (
            "left out"
            if updated is None or isinstance(updated, (list, dict))
            else f"it is now {shown(self.token(updated))}"
        )
        logger.warning("%s: %s names %s, which the tokenizer %s does not have: %s", file, key, listed, self.name, what)
        return updated if updated != [] else None

    def token(self, token_id: object) -> Any:
        """The merged model's token for an id."""
        return next((token for token, new_id in self.new.items() if new_id == token_id), token_id)

    def _is_token(self, key: str, value: object) -> bool:
        if _OTHERS & set(key.split("_")):
            return False
        if _SURE.fullmatch(key):
            return True
        ids = value if isinstance(value, list) else [value]
        return bool(_PERHAPS.fullmatch(key)) and bool(ids) and all(_is_id(n) and n in self.special for n in ids)

    def _new_id(self, token_id: int) -> int | None:
        token = self.old.get(token_id)
        return None if token is None else self.new.get(token)

    def _tokens(self, key: str, value: object) -> Iterator[int]:
        """All token ids in a value."""
        match value:
            case Mapping():
                yield from (token_id for token_id in value.values() if _is_id(token_id))
            case list() if key == "forced_decoder_ids":  # positions and tokens
                yield from (pair[1] for pair in _pairs(value) if _is_id(pair[1]))
            case list() if key == "sequence_bias":  # sequences and biases
                yield from (token_id for pair in _pairs(value) for token_id in self._tokens("", pair[0]))
            case list():
                yield from (token_id for inner in value for token_id in self._tokens("", inner))
            case int() if _is_id(value):
                yield value

    def _updated(self, key: str, value: object) -> Any:
        """A value with updated ids; sequences with a missing token are dropped."""
        match value:
            case Mapping():
                updated = {
                    name: self._new_id(token_id) if _is_id(token_id) else token_id for name, token_id in value.items()
                }
                return {name: token_id for name, token_id in updated.items() if token_id is not None}
            case list() if key == "forced_decoder_ids":
                pairs = [
                    [at, self._new_id(token_id) if _is_id(token_id) else token_id] for at, token_id in _pairs(value)
                ]
                return [
                    pair
                    for pair, (_, before) in zip(pairs, _pairs(value), strict=True)
                    if pair[1] is not None or before is None
                ]
            case list() if key == "sequence_bias":
                updated_pairs = ([self._whole(sequence), bias] for sequence, bias in _pairs(value))
                return [pair for pair in updated_pairs if pair[0] is not None]
            case list() if any(isinstance(inner, list) for inner in value):
                return [updated for updated in map(self._nested, value) if updated]
            case list():
                return [updated for updated in (self._updated("", inner) for inner in value) if updated is not None]
            case int() if _is_id(value):
                return self._new_id(value)
        return value

    def _nested(self, value: object) -> Any:
        """Updates a sequence, or nested lists of sequences."""
        if isinstance(value, list) and any(isinstance(inner, list) for inner in value):
            return [updated for updated in map(self._nested, value) if updated]
        return self._whole(value)

    def _whole(self, sequence: object) -> list[Any] | None:
        updated = [self._updated("", token_id) for token_id in sequence] if isinstance(sequence, list) else [None]
        return None if None in updated else updated


def read_roles(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """The ids of a tokenizer's special tokens by role.

    Args:
        config: content of ``tokenizer_config.json`` or ``special_tokens_map.json``.
        ids: token -> id.
    """
    roles = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str) and token in ids:
            roles[role] = ids[token]
    return roles


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0


def _pairs(value: Iterable[Any]) -> list[Any]:
    return [pair for pair in value if isinstance(pair, list) and len(pair) == 2]
