"""A tokenizer's vocabulary and rules in the terms of GGUF, as llama.cpp reads them.

llama.cpp has its own tokenizers, and names the way in which text is split before byte pairs are merged. A tokenizer
that splits otherwise would give other tokens than the model was trained with, so it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS: dict[tuple[tuple[str, object], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _QWEN), ("ByteLevel", False)): "qwen2",
    (("Split", _LLAMA_3), ("ByteLevel", False)): "llama-bpe",
}
"""How text is split before byte pairs are merged → what llama.cpp calls it (``llama_vocab::impl::load``)."""
_SETTING = {"ByteLevel": "use_regex", "Digits": "individual_digits"}
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, rows: int) -> None:
    """Adds a tokenizer to a GGUF file.

    Args:
        writer: of the file.
        tokenizer: a fast one of transformers.
        rows: of the embeddings; rows without a token get an unused one.

    Raises:
        FusionError: llama.cpp has no tokenizer that gives the same tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FusionError("the tokenizer has no tokenizer.json, which its vocabulary is read from", "save a fast one")
    if len(tokenizer) > rows:
        raise FusionError(f"the tokenizer has {len(tokenizer)} tokens, but the model has {rows} embeddings")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, not BPE")
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, content, merges)
        scores = _scores(model["vocab"], merges)
    else:
        _add_byte_level(writer, content)
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
        scores = None
    _add_tokens(writer, content, tokenizer, rows, scores)
    _add_special(writer, tokenizer)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _refused(reason: str) -> FusionError:
    return FusionError(f"llama.cpp has no tokenizer like this model's: {reason}", "hf-fusion export … --to dense")


def _add_byte_level(writer: GGUFWriter, content: Mapping[str, Any]) -> None:
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")  # llama.cpp does not normalise to NFC
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    found = tuple((step.get("type", ""), _setting(step)) for step in steps)
    if normalizer != "NFC" or found not in SPLITS or any(step.get("add_prefix_space") for step in steps):
        raise _refused(f"its text is split by {' and '.join(name or 'nothing' for name, _ in found)} in another way")
    name = SPLITS[found]
    if bool(content["model"].get("ignore_merges")) != (name == "llama-bpe"):
        raise _refused(f"ignore_merges is {bool(content['model'].get('ignore_merges'))}, unlike {name}'s")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_add_space_prefix(False)


def _setting(step: Mapping[str, Any]) -> object:
    """What tells two steps of one type apart."""
    if step.get("type") != "Split":
        return step.get(_SETTING.get(step.get("type", ""), ""))
    plain = step["behavior"] == "Isolated" and not step["invert"]
    return step["pattern"].get("Regex") if plain else None


def _add_sentencepiece(writer: GGUFWriter, content: Mapping[str, Any], merges: list[tuple[str, ...]]) -> None:
    known, pairs = content["model"]["vocab"], set(merges)
    for token in {left + right for left, right in merges}:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in known and pair[1] in known and pair not in pairs:
                raise _refused(f"it does not merge {pair[0]!r} and {pair[1]!r}, as SentencePiece does")
    steps = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    steps = [inner for step in steps for inner in step.get("normalizers", step.get("pretokenizers", [step]))]
    for step in steps:
        if step and not _is_sentencepiece(step):
            raise _refused(f"SentencePiece has no step {step['type']}")
    first = any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(first)


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    """Whether a step only writes spaces as ▁, or splits at them, which SentencePiece's pieces imply."""
    if step["type"] in ("Replace", "Split"):
        return bool(step["pattern"].get("String") == " " and step.get("content", _SPACE) == _SPACE)
    return step["type"] in ("Prepend", "Metaspace")


def _scores(known: Mapping[str, int], merges: list[tuple[str, ...]]) -> dict[str, float]:
    """SentencePiece merges the pair whose token has the highest score; here, the pair that is listed first."""
    ranks: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, -float(rank))
    return {token: ranks.get(token, -float(len(merges))) for token in known}


def _add_tokens(
    writer: GGUFWriter, content: Mapping[str, Any], tokenizer: Any, rows: int, scores: Mapping[str, float] | None
) -> None:
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    values = [0.0] * rows
    for token, index in content["model"]["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
        if scores is not None:
            values[index] = scores[token]
            if _BYTE.fullmatch(token):
                kinds[index] = TokenType.BYTE
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if scores is not None and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores is not None:
        writer.add_token_scores(values)


def _add_special(writer: GGUFWriter, tokenizer: Any) -> None:
    for name in _SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = list(tokenizer("a").input_ids)
    writer.add_add_bos_token(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)


__all__ = ["SPLITS", "add_tokenizer"]
