"""Random rows with the real columns, classes, splits and types of the datasets that the Hub suites name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, Sequence, Value, disable_progress_bars
from PIL import Image as Pillow

disable_progress_bars()

ROWS = 40

TEXT, NUMBER, FRACTION, PICTURE, FOUR, WORTH = "text", "number", "fraction", "picture", "four", "worth"
PIXELS, SEGMENTS, DEPTHS, NORMALS, GRADES = "pixels", "segments", "depths", "normals", "grades"
HEIGHT, WIDTH = 32, 48  # of maps
Column = str | list[str] | tuple[str, ...]  # a kind, the names of classes, or plain values


@dataclass(frozen=True)
class Stored:
    """One configuration of a data set as it is on the Hub: its columns in order, and its splits."""

    columns: dict[str, Column]
    splits: tuple[str, ...] = ("train", "test")


def _glue(classes: list[str] | str, *texts: str, validation: tuple[str, ...] = ("validation",)) -> Stored:
    return Stored({**dict.fromkeys(texts, TEXT), "label": classes, "idx": NUMBER}, ("train", *validation))


def _superglue(*texts: str, classes: list[str]) -> Stored:
    return Stored({**dict.fromkeys(texts, TEXT), "idx": NUMBER, "label": classes}, ("train", "validation", "test"))


def numbered(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


_DIGITS = [str(number) for number in range(10)]
_ENTAILED = ["entailment", "not_entailment"]
_SUMMARY = ("train", "validation", "test")
# id -> configuration -> what it holds; "*": any
# fmt: off
DATA: dict[str, dict[str, Stored]] = {
    **{
        f"tanganke/{name}": {"default": Stored({"image": PICTURE, "label": numbered(count)})}
        for name, count in (("sun397", 397), ("stanford_cars", 196), ("resisc45", 45), ("eurosat", 10), ("gtsrb", 43))
    },
    "tanganke/dtd": {"default": Stored({"image": PICTURE, "label": numbered(47)})},
    "ufldl-stanford/svhn": {"cropped_digits": Stored({"image": PICTURE, "label": _DIGITS}, ("train", "test", "extra"))},
    "ylecun/mnist": {"mnist": Stored({"image": PICTURE, "label": _DIGITS})},
    "nyu-mll/glue": {
        "cola": _glue(["unacceptable", "acceptable"], "sentence"),
        "mnli": _glue(
            ["entailment", "neutral", "contradiction"],
            *("premise", "hypothesis"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        "mrpc": _glue(["not_equivalent", "equivalent"], "sentence1", "sentence2"),
        "qnli": _glue(_ENTAILED, "question", "sentence"),
        "qqp": _glue(["not_duplicate", "duplicate"], "question1", "question2"),
        "rte": _glue(_ENTAILED, "sentence1", "sentence2"),
        "sst2": _glue(["negative", "positive"], "sentence"),
        "stsb": _glue(FRACTION, "sentence1", "sentence2"),
    },
    "lukaemon/bbh": {
        "boolean_expressions": Stored({"input": TEXT, "target": ("True", "False")}, ("test",)),
        "web_of_lies": Stored({"input": TEXT, "target": ("Yes", "No")}, ("test",)),
        "*": Stored({"input": TEXT, "target": TEXT}, ("test",)),
    },
    "cais/mmlu": {
        "*": Stored(
            {"question": TEXT, "subject": TEXT, "choices": FOUR, "answer": list("ABCD")},
            ("test", "validation", "dev"),
        )
    },
    "zeroshot/twitter-financial-news-sentiment": {
        "default": Stored({"text": TEXT, "label": NUMBER}, ("train", "validation"))
    },
    "google-research-datasets/poem_sentiment": {
        "default": Stored(
            {"id": NUMBER, "verse_text": TEXT, "label": ["negative", "positive", "no_impact", "mixed"]}, _SUMMARY
        )
    },
    "FinanceInc/auditor_sentiment": {
        "default": Stored({"sentence": TEXT, "label": ["negative", "neutral", "positive"]})
    },
    "Kaludi/data-reviews-sentiment-analysis": {
        "default": Stored({"text": TEXT, "target": ["Negative", "Positive"]}, ("train", "validation"))
    },
    "abisee/cnn_dailymail": {"3.0.0": Stored({"article": TEXT, "highlights": TEXT, "id": TEXT}, _SUMMARY)},
    "EdinburghNLP/xsum": {"default": Stored({"document": TEXT, "summary": TEXT, "id": TEXT}, _SUMMARY)},
    "alexfabbri/multi_news": {"default": Stored({"document": TEXT, "summary": TEXT}, _SUMMARY)},
    "FiscalNote/billsum": {
        "default": Stored({"text": TEXT, "summary": TEXT, "title": TEXT}, ("train", "test", "ca_test"))
    },
    "NortheasternUniversity/big_patent": {"all": Stored({"description": TEXT, "abstract": TEXT}, _SUMMARY)},
    "cornell-movie-review-data/rotten_tomatoes": {
        "default": Stored({"text": TEXT, "label": ["neg", "pos"]}, _SUMMARY)
    },
    "fancyzhx/ag_news": {"default": Stored({"text": TEXT, "label": ["World", "Sports", "Business", "Sci/Tech"]})},
    "google-research-datasets/paws": {
        "labeled_final": Stored({"id": NUMBER, "sentence1": TEXT, "sentence2": TEXT, "label": ["0", "1"]}, _SUMMARY)
    },
    "facebook/anli": {
        "plain_text": Stored(
            {"uid": TEXT, "premise": TEXT, "hypothesis": TEXT, "label": ["entailment", "neutral", "contradiction"],
             "reason": TEXT},
            tuple(f"{part}_r{number}" for number in (1, 2, 3) for part in ("train", "dev", "test")),
        )
    },
    "aps/super_glue": {
        "cb": _superglue("premise", "hypothesis", classes=["entailment", "contradiction", "neutral"]),
        "copa": _superglue("premise", "choice1", "choice2", "question", classes=["choice1", "choice2"]),
        "rte": _superglue("premise", "hypothesis", classes=_ENTAILED),
        "wic": _superglue("word", "sentence1", "sentence2", classes=["False", "True"]),
        "wsc.fixed": _superglue("text", "span1_text", "span2_text", classes=["False", "True"]),
    },
    "allenai/winogrande": {
        "winogrande_xl": Stored(
            {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": ("1", "2")}, ("train", "test", "validation")
        )
    },
    "Rowan/hellaswag": {
        "default": Stored(
            {"ind": NUMBER, "activity_label": TEXT, "ctx": TEXT, "endings": FOUR, "label": tuple("0123")},
            ("train", "test", "validation"),
        )
    },
    "tasksource/bigbench": {
        "*": Stored({"inputs": TEXT, "targets": FOUR, "multiple_choice_targets": FOUR,
                     "multiple_choice_scores": WORTH, "idx": NUMBER}, ("train", "validation"))
    },
    "uoft-cs/cifar100": {
        "cifar100": Stored({"img": PICTURE, "fine_label": numbered(100), "coarse_label": numbered(20)})
    },
    "mteb/summeval": {
        "default": Stored(
            {"machine_summaries": FOUR, "human_summaries": FOUR, **dict.fromkeys(
                ("relevance", "coherence", "fluency", "consistency"), GRADES), "text": TEXT, "id": TEXT},
            ("test",),
        )
    },
    "tanganke/nyuv2": {
        "default": Stored(
            {"image": PIXELS, "segmentation": SEGMENTS, "depth": DEPTHS, "normal": NORMALS, "noise": DEPTHS},
            ("train", "val"),
        )
    },
    "Yale-LILY/aeslc": {"default": Stored({"email_body": TEXT, "subject_line": TEXT}, _SUMMARY)},
}
# fmt: on
_WORDS = ["fused", "experts", "answer", "better", "than", "any", "of", "them", "alone", "the", "router", "said"]


def _maps(chance: np.random.Generator) -> dict[str, Callable[[int], Any]]:
    """A scene whose left half is black and far, the right one bright and near; a strip of it was not measured."""
    left = np.arange(WIDTH) < WIDTH // 2

    def half(row: int, black: float, bright: float, channels: int, blank: float) -> np.ndarray:
        found = np.full((channels, HEIGHT, WIDTH), bright, dtype=np.float32)
        found[..., left] = black
        found[:, row % HEIGHT] = blank
        return found

    def normals(row: int) -> np.ndarray:
        found = half(row, 0.6, 0.8, 3, 0)
        found[0] = half(row, 0.8, 0.6, 1, 0)
        found[2] = 0
        return found

    return {
        PIXELS: lambda row: chance.uniform(0, 0.5, (3, HEIGHT, WIDTH)).astype("float32") + half(row, 0, 0.5, 3, 0),
        SEGMENTS: lambda row: half(row, 2, 7, 1, -1)[0].astype("int64"),
        DEPTHS: lambda row: half(row, 4, 1.5, 1, 0),
        NORMALS: normals,
    }


def rows(stored: Stored, split: str) -> Dataset:
    """`ROWS` rows of chance, others for each split; no two have the same texts or pictures."""
    chance = np.random.default_rng(sum(split.encode()))
    makers: dict[str, Callable[[int], Any]] = {
        TEXT: lambda row: " ".join(chance.choice(_WORDS, 5)) + f" {split} {row}",
        NUMBER: lambda row: row % 2,
        FRACTION: lambda row: round(float(chance.uniform(0, 5)), 1),
        PICTURE: lambda row: Pillow.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
        FOUR: lambda row: [f"{word} {row}" for word in chance.choice(_WORDS, 4)],
        WORTH: lambda row: [1, row % 2, 0, 0],
        GRADES: lambda row: [round(float(grade), 2) for grade in chance.uniform(1, 5, 4)],
        **_maps(chance),
    }
    kinds = {TEXT: Value("string"), NUMBER: Value("int32"), FRACTION: Value("float32"), PICTURE: Image()}
    kinds |= {FOUR: Sequence(Value("string")), WORTH: Sequence(Value("int32"))}
    kinds |= {SEGMENTS: Array2D((HEIGHT, WIDTH), "int64"), DEPTHS: Array3D((1, HEIGHT, WIDTH), "float32")}
    kinds |= dict.fromkeys((PIXELS, NORMALS), Array3D((3, HEIGHT, WIDTH), "float32"))
    kinds |= {GRADES: Sequence(Value("float64"))}
    columns, features = {}, {}
    for name, kind in stored.columns.items():
        if isinstance(kind, list):
            features[name] = ClassLabel(names=kind)
            columns[name] = [int(chance.integers(len(kind))) for _ in range(ROWS)]
        elif isinstance(kind, tuple):
            features[name] = Value("string")
            columns[name] = [kind[int(chance.integers(len(kind)))] for _ in range(ROWS)]
        else:
            features[name] = kinds[kind]
            columns[name] = [makers[kind](row) for row in range(ROWS)]
    return Dataset.from_dict(columns, Features(features))


def save_data(name: str, configs: list[str], folder: Path) -> None:
    """A data set's repo: parquet for each configuration and split, and the README that lists them."""
    known, listed = DATA[name], []
    for config in configs:
        stored = known.get(config) or known["*"]
        (folder / config).mkdir(parents=True)
        for split in stored.splits:
            rows(stored, split).to_parquet(folder / config / f"{split}.parquet")
        files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in stored.splits]
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
