"""Hints for what does not exist: the nearest of the known words, and of the names in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fusion.data import load_rows, read_columns
from hf_fusion.errors import FusionError, listed, nearest, path_suggestion, suggestion
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.recipe import Recipe

MANY = [*"abcdefghij"]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("tise", ["ties"]),
        ("TIES", ["ties"]),
        ("ties-merging", ["ties"]),
        ("dare", ["dare_ties", "dare_linear"]),
        ("dare-ties", ["dare_ties"]),
        ("iso", ["iso_c", "iso_cts"]),
        ("task", ["task_arithmetic"]),
        ("xyz", []),
        ("", []),
    ],
)
def test_the_nearest_methods(word, found):
    assert nearest(word, MERGE_METHODS) == found


def test_a_word_of_any_length_is_compared_at_once():
    assert nearest("x" * 1_000_000, ["x" * 1_000_000, "y"]) == ["x" * 1_000_000]


@pytest.mark.parametrize(
    ("word", "known", "listing", "hint"),
    [
        ("jsn", ["human", "json"], "", "did you mean json?"),
        ("jsn", ["human", "json"], "list", "did you mean json? list lists all"),
        ("sum", ["sums", "sumo"], "", "did you mean sums or sumo?"),
        ("sum", ["sum1", "sum2", "sum3", "sum4"], "", "did you mean sum1, sum2 or sum3?"),
        ("zzz", ["a", "b"], "list", "use one of a, b"),
        ("zzz", MANY, "list", "list lists all"),
        ("zzz", MANY, "", "use one of a, b, c, d, e, f, g, h and 2 more"),
        ("zzz", [], "", "there are none"),
    ],
)
def test_a_hint_names_few_words(word, known, listing, hint):
    assert suggestion(word, known, listing) == hint


def test_a_list_in_a_message_is_short():
    assert listed(MANY[:8]) == "a, b, c, d, e, f, g, h"
    assert listed(MANY) == "a, b, c, d, e, f, g, h and 2 more"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "runs/minilm/config.json", "rows.parquet", ".hidden"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("recipe.yml", "did you mean recipe.yaml?"),
        ("recipe", "did you mean recipe.yaml?"),
        ("Recipe.yaml", "did you mean recipe.yaml?"),
        ("rusn/minilm", "did you mean runs/minilm?"),
        ("runs/minlim", "did you mean runs/minilm?"),
        ("rusn/other", "did you mean runs?"),
        (".hiden", "otherwise"),
        ("zzz", "otherwise"),
        ("zzz/recipe.yaml", "otherwise"),
        ("zzz.yaml", "otherwise"),
        ("receipe.yaml", "did you mean recipe.yaml?"),
        ("recipe.yaml/zzz", "otherwise"),
        ("x" * 5_000, "otherwise"),
        ("\0", "otherwise"),
    ],
)
def test_the_nearest_path(path, hint, here):
    assert path_suggestion(path, "otherwise") == hint


def test_the_nearest_absolute_path(here):
    assert path_suggestion(here / "recipe.yml", "otherwise") == f"did you mean {here / 'recipe.yaml'}?"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recipe.load("recipe.yml"), "recipe.yml cannot be read .*\n.*did you mean recipe.yaml"),
        (lambda: read_columns("row.parquet"), "row.parquet does not exist\n.*did you mean rows.parquet"),
        (lambda: load_rows(Path("row.parquet").resolve()), "row.parquet does not exist\n.*did you mean .*rows.parquet"),
    ],
    ids=["recipe", "columns", "rows"],
)
def test_files_that_do_not_exist_have_near_names(call, message, here):
    with pytest.raises(FusionError, match=message):
        call()
