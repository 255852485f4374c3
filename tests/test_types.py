"""References to models round-trip, with any characters in names."""

from __future__ import annotations

import pytest

from hf_fusion.recipe import Recipe, RecipeExpert, is_pinned
from hf_fusion.types import Adapter, ModelRef

SHA = "0123456789abcdef0123456789abcdef01234567"
CONTENT = f"sha256:{'5' * 64}"


@pytest.mark.parametrize(
    ("text", "name", "revision", "pinned", "is_repo"),
    [
        ("owner/name", "owner/name", None, False, True),
        ("gpt2", "gpt2", None, False, True),
        ("owner/name@main", "owner/name", "main", False, True),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1", False, True),
        ("owner/name@v1@2", "owner/name", "v1@2", False, True),
        (f"owner/name@{SHA}", "owner/name", SHA, True, True),
        (f"owner/name@{SHA[:7]}", "owner/name", SHA[:7], False, True),
        (f"owner/na.me_-7@{SHA}", "owner/na.me_-7", SHA, True, True),
        (f"owner/name#7@{SHA}", "owner/name#7", SHA, True, True),
        ("owner/name#7", "owner/name#7", None, False, True),
        (f"my expert@{CONTENT}", "my expert", CONTENT, True, False),
        (f"ex@pert@{CONTENT}", "ex@pert", CONTENT, True, False),
        ("expert@sha256:12", "expert", "sha256:12", False, False),
        # paths, which are not here
        (f"/models/a@{SHA}", f"/models/a@{SHA}", None, False, False),
        ("./a@b", "./a", "b", False, True),
        ("~/models/a@b/c", "~/models/a@b/c", None, False, False),
        (r"C:\models\a@b", r"C:\models\a@b", None, False, False),
        ("C:/models/a", "C:/models/a", None, False, False),
        (f"my models/a@{SHA}", f"my models/a@{SHA}", None, False, False),
        ("a/b/c", "a/b/c", None, False, False),
        ("a/b#last", "a/b#last", None, False, False),
        ("../b", "../b", None, False, False),
        ("", "", None, False, False),
    ],
)
def test_a_reference_is_read_and_written(text, name, revision, pinned, is_repo):
    ref = ModelRef.parse(text)
    assert ref == ModelRef(name, revision)
    assert str(ref) == text
    assert ModelRef.parse(str(ref)) == ref
    assert (ref.pinned, ref.is_repo) == (pinned, is_repo)
    assert ref.pinned == is_pinned(text)


def test_commits_are_lower_case_and_empty_revisions_none():
    upper = ModelRef.parse(f"a/b@{SHA.upper()}")
    assert upper == ModelRef("a/b", SHA) == ModelRef("a/b").with_revision(SHA.upper())
    assert (upper.commit, upper.pinned) == (SHA, True)
    assert ModelRef.parse("a/b@") == ModelRef("a/b") == upper.with_revision(None) == upper.with_revision("")
    assert ModelRef.parse("a/b@MAIN").revision == "MAIN"


@pytest.mark.parametrize("name", ["a@b", f"a@{SHA}", "a+b", "a+b@c", "a#7", "with space", "ü@ß+é", "%40@"])
def test_a_folder_is_taken_by_its_whole_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for text in (name, str(tmp_path / name), f"./{name}"):
        ref = ModelRef.parse(text)
        assert ref == ModelRef(text)
        assert str(ref) == text
        assert ref.is_folder
        assert not ref.pinned
        assert ModelRef.parse_pair(text) == (None, ref)
    assert ModelRef.parse_repo(f"a/b@{SHA}").pinned  # which no folder changes


@pytest.mark.parametrize(
    ("text", "base", "model"),
    [
        ("a/b", None, ModelRef("a/b")),
        (f"a/b@{SHA}+c/d@main", ModelRef("a/b", SHA), ModelRef("c/d", "main")),
        (f"a/b+c/d#2@{SHA}", ModelRef("a/b"), ModelRef("c/d#2", SHA)),
        ("/models/base+./adapter", ModelRef("/models/base"), ModelRef("./adapter")),
        ("+c/d", None, ModelRef("c/d")),
    ],
)
def test_a_base_and_an_adapter(text, base, model):
    assert ModelRef.parse_pair(text) == (base, model)


def test_an_expert_of_a_checkpoint_has_its_repo():
    ref = ModelRef.parse("a/b#12@main")
    assert (ref.repo, ref.number, str(ref)) == ("a/b", 12, "a/b#12@main")
    assert (ModelRef.parse("a/b@main").repo, ModelRef.parse("a/b@main").number) == ("a/b", None)
    assert not ModelRef.parse("../b#1").is_repo


def test_impossible_file_names_are_not_folders():
    for text in ("x" * 5000, "~nobody-of-that-name/x", "a\0b"):
        assert str(ModelRef.parse(text)) == text
        assert not ModelRef.parse(text).is_folder


def test_recipes_know_folders_of_other_machines():
    assert Recipe("linear", (RecipeExpert(f"a@{CONTENT}"),)).elsewhere
    assert Recipe("linear", (RecipeExpert(f"a/b@{SHA}+x@{CONTENT}"),)).elsewhere
    assert not Recipe("linear", (RecipeExpert(f"a/b@{SHA}"),), base="./x@sha256").elsewhere


def test_adapter_base_ref():
    assert Adapter({}).base_ref is None
    assert str(Adapter({}, base="a/b", base_revision=SHA).base_ref) == f"a/b@{SHA}"
    assert str(Adapter({}, base="/models/a@b").base_ref) == "/models/a@b"
