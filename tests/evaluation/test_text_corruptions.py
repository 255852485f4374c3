"""Text corruptions: deterministic, stronger with severity, and of the same format."""

from __future__ import annotations

from statistics import mean

import pytest
from datasets import Dataset

from hf_fusion.bench.corruptions import SEVERITIES, corrupted, parse_corruptions
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.image_corruptions import CORRUPTIONS
from hf_fusion.evaluation.text_corruptions import TEXT_CORRUPTIONS, corrupt_text

TEXT = (
    "The committee was surprised that nobody had objected to Monday's proposal, although three members had warned "
    "their colleagues about the costs of moving all offices to another city before the end of the year."
)
WORDS = TEXT.split()
SHARES = {"typos": (0.1, 0.2, 0.3, 0.45, 0.6), "casing": (0.2, 0.4, 0.6, 0.8, 1)}


def changed(text: str) -> float:
    """Share of the words at their places that are not those of the text."""
    pairs = zip(text.split(), WORDS, strict=True)
    return mean(one != other for one, other in pairs)


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_same_arguments_give_the_same_text(name, severity):
    texts = [corrupt_text(TEXT, name, severity, seed) for seed in range(20)]
    assert texts == [corrupt_text(TEXT, name, severity, seed) for seed in range(20)]
    assert TEXT not in texts or severity == 1
    if name != "truncation":  # which has no chance in it
        assert len(set(texts)) > 3


@pytest.mark.parametrize(("name", "shares"), SHARES.items())
def test_share_of_changed_words_follows_the_severity(name, shares):
    for severity, share in zip(SEVERITIES, shares, strict=True):
        found = mean(changed(corrupt_text(TEXT, name, severity, seed)) for seed in range(200))
        # some words are too short to be mistyped, and a letter doubled or swapped for its like can stay what it was
        assert 0.8 * share <= found <= 1.05 * share, (severity, found)


def test_typos_are_small():
    for seed in range(50):
        for typed, word in zip(corrupt_text(TEXT, "typos", 5, seed).split(), WORDS, strict=True):
            assert abs(len(typed) - len(word)) <= 1
            assert sorted(typed[-1:]) == sorted(word[-1:]) or len(word) < 3 or typed[-2:] == word[-1] + word[-2]


def test_casing_changes_only_case():
    text = corrupt_text(TEXT, "casing", 5, 3)
    assert text.lower() == TEXT.lower() and text != TEXT
    assert all(word.upper() == own or word.swapcase() == own for word, own in zip(WORDS, text.split(), strict=True))


def test_truncation_keeps_the_beginning():
    lengths = []
    for severity in SEVERITIES:
        words = corrupt_text(TEXT, "truncation", severity, 0).split()
        assert words == WORDS[: len(words)]
        lengths.append(len(words))
    assert lengths == [round(len(WORDS) * (1 - share)) for share in TEXT_CORRUPTIONS["truncation"][1]]
    assert corrupt_text("word", "truncation", 5, 0) == "word"


def test_noise_words_are_put_among_the_words():
    for severity, share in zip(SEVERITIES, TEXT_CORRUPTIONS["noise_words"][1], strict=True):
        words = corrupt_text(TEXT, "noise_words", severity, 7).split()
        assert len(words) == len(WORDS) + max(1, round(len(WORDS) * share))
        rest = iter(words)
        assert all(word in rest for word in WORDS)  # all of them, in their order
    for negation in ("not", "no", "never", "very", "good", "bad"):  # nothing that would change a judgement
        assert not any(negation in corrupt_text("x", "noise_words", 5, seed).split() for seed in range(300))


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
def test_empty_texts_are_unchanged(name):
    for text in ("", " ", "\n"):
        assert corrupt_text(text, name, 5, 0) == text


def test_unknown_corruptions_and_severities_are_refused():
    with pytest.raises(FusionError, match="no corruption 'fog' of texts"):
        corrupt_text(TEXT, "fog", 1, 0)
    for severity in (0, 6, 1.5):
        with pytest.raises(FusionError, match="typos has no severity"):
            corrupt_text(TEXT, "typos", severity, 0)


# ---------------------------------------------------------------- conditions


def test_conditions_are_named_by_corruption_and_severity():
    assert parse_corruptions([], False) == []
    assert parse_corruptions(["typos:3"], False) == ["typos:3"]
    assert parse_corruptions(["typos"], False) == [f"typos:{severity}" for severity in SEVERITIES]
    assert parse_corruptions(["all:2"], False) == [f"{name}:2" for name in TEXT_CORRUPTIONS]
    assert len(parse_corruptions(["all"], False)) == 5 * len(TEXT_CORRUPTIONS)
    assert len(parse_corruptions(["all"], True)) == 5 * len(CORRUPTIONS) == 35
    assert parse_corruptions(["typos:3", "typos:3", "all:3"], False)[0] == "typos:3"
    assert len(parse_corruptions(["typos:3", "all:3"], False)) == len(TEXT_CORRUPTIONS)


@pytest.mark.parametrize(
    ("word", "is_image", "said", "hint"),
    [
        ("typos", True, "no corruption 'typos' of images", "use one of all, contrast"),
        ("jpeg_compression:1", False, "no corruption 'jpeg_compression:1' of texts", "use one of all, typos"),
        ("typos:0", False, "no corruption 'typos:0'", "typos:3"),
        ("typos:x", False, "no corruption 'typos:x'", "severities are 1 to 5: typos:3"),
        ("", False, "no corruption ''", "use one of all"),
    ],
)
def test_unknown_corruptions_are_refused(word, is_image, said, hint):
    with pytest.raises(FusionError, match=said) as told:
        parse_corruptions([word], is_image)
    assert hint in str(told.value)


def test_rows_are_corrupted_each_by_its_number():
    rows = Dataset.from_dict({"text": [TEXT, TEXT], "text_pair": [TEXT, "b c d"], "label": [0, 1]})
    assert corrupted(rows, "clean") is rows
    for name in ("typos", "noise_words"):
        found = corrupted(rows, f"{name}:4")
        assert found["text"] == [corrupt_text(TEXT, name, 4, 0), corrupt_text(TEXT, name, 4, 1)]
        assert found["text"][0] != found["text"][1] and found["label"] == rows["label"]
        assert found["text_pair"][0] == corrupt_text(TEXT, name, 4, 0)
    prompts = Dataset.from_dict({"prompt": [TEXT], "target": ["yes it is"]})
    found = corrupted(prompts, "casing:5")
    assert found["target"] == ["yes it is"] and found["prompt"] != [TEXT]


def test_the_markup_of_a_chat_stays():
    prompt = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    rows = Dataset.from_dict({"prompt": [prompt], "target": ["yes"]})
    for name in TEXT_CORRUPTIONS:
        [found] = corrupted(rows, f"{name}:5")["prompt"]
        assert found == prompt.replace(TEXT, corrupt_text(TEXT, name, 5, 0))
