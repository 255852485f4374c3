"""Corrupted texts at five severities: for measuring a model's accuracy on carelessly typed text.

The counterpart of `corruptions` for words. Severities are shares of the words (or characters) that are touched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hf_fusion.errors import FusionError, suggestion

# neighbours on a QWERTY keyboard
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEAR = {
    key: "".join(row[max(0, index - 1) : index] + row[index + 1 : index + 2])
    for row in _ROWS
    for index, key in enumerate(row)
}
# words that say nothing: the commonest English ones that are no negation, judgement or question
_FILLERS = tuple(
    """
    the a an of to in on at by for with and or so then also just there here now still well about around over into
    from as that this these those it its they we you one some any each such own same other only even much many
    """.split()  # noqa: SIM905
)


def corrupt_text(text: str, name: str, severity: int, seed: int) -> str:
    """A corrupted copy of a text; the same arguments give the same text.

    Args:
        text: any; words are separated by whitespace.
        name: one of `TEXT_CORRUPTIONS`.
        severity: 1 to 5.
        seed: use a different one for every text.

    Raises:
        FusionError: no such corruption or severity.
    """
    if name not in TEXT_CORRUPTIONS:
        raise FusionError(f"there is no corruption {name!r} of texts", hint=suggestion(name, TEXT_CORRUPTIONS))
    if severity not in range(1, 6):
        raise FusionError(f"{name} has no severity {severity!r}", hint="use 1, 2, 3, 4 or 5")
    function, shares = TEXT_CORRUPTIONS[name]
    words = text.split()
    return " ".join(function(words, shares[severity - 1], random.Random(seed))) if words else text


def _typos(words: list[str], share: float, rng: random.Random) -> list[str]:
    """This share of the words lose a letter, double one, swap two, or get the neighbour on the keyboard."""
    return [_mistyped(word, rng) if rng.random() < share else word for word in words]


def _mistyped(word: str, rng: random.Random) -> str:
    if len(word) < 2:
        return word
    index = rng.randrange(len(word) - 1)
    before, one, two, after = word[:index], word[index], word[index + 1], word[index + 2 :]
    near = rng.choice(_NEAR.get(one.lower(), one))
    return before + rng.choice((two, one + one + two, two + one, near + two)) + after


def _casing(words: list[str], share: float, rng: random.Random) -> list[str]:
    """This share of the words in capitals, or with the cases of their letters turned around."""
    return [rng.choice((word.upper(), word.swapcase())) if rng.random() < share else word for word in words]


def _truncation(words: list[str], share: float, rng: random.Random) -> list[str]:
    """This share of the words is missing at the end; the first one stays."""
    return words[: max(1, round(len(words) * (1 - share)))]


def _noise_words(words: list[str], share: float, rng: random.Random) -> list[str]:
    """As many words that say nothing as this share of the text's own, anywhere among them."""
    noisy = list(words)
    for _ in range(max(1, round(len(words) * share))):
        noisy.insert(rng.randint(0, len(noisy)), rng.choice(_FILLERS))
    return noisy


TEXT_CORRUPTIONS: dict[str, tuple[Callable[[list[str], float, random.Random], list[str]], Sequence[float]]] = {
    "typos": (_typos, (0.1, 0.2, 0.3, 0.45, 0.6)),
    "casing": (_casing, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "truncation": (_truncation, (0.1, 0.2, 0.3, 0.45, 0.6)),
    "noise_words": (_noise_words, (0.1, 0.2, 0.35, 0.5, 0.8)),
}
"""Name -> what it does, and the share at each severity."""
