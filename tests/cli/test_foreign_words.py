"""Untrusted files with fields of wrong types and terminal control codes: clear errors, escaped text."""

import json
import os
import shutil
import time

import pytest
from quick_python import run_python
from tiny_experts import BERT, edit_json, save_adapter, save_bert

from hf_fusion.errors import FusionError, printable
from hf_fusion.hub.compat import ReasonKind, check_compatibility
from hf_fusion.hub.discover import discover, info_row
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.readme import read_metadata
from hf_fusion.hub.rejection_reasons import Reason
from hf_fusion.io.json_files import FIELDS

ESCAPES = "\x1b[31m\x1b]0;title\x07\u202e\x9b2J\u2066\r\x00"
WRONG = (3, -1, 2.5, True, "text", "", [], [3], [[]], {}, {"a": []}, {"a": {"b": 1}}, [None], 1e308, 10**30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("experts")
    base = save_bert(place / "full")
    save_adapter(place / "adapter", base, ("a", "b", "c"), base_name=str(base))
    return place


def fields_of(folder):
    """Each field of each of an expert's small files, those that are not there but are known among them."""
    names = ("adapter_config.json", "config.json", "tokenizer_config.json", "generation_config.json")
    for name in names if (folder / "adapter_config.json").exists() else names[1:]:
        there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        yield from ((name, key) for key in sorted({*there, *FIELDS.get(name, {})}))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_fields_of_any_type(folders, tmp_path, kind):
    """Every field with a wrong type in turn: it loads, or a FusionError says why not. No other exception."""
    started, number, refused = folders / kind, 0, 0
    for name, key in fields_of(started):
        for value in (WRONG[number % len(WRONG)], WRONG[(number * 7 + 3) % len(WRONG)]):
            number += 1
            folder = tmp_path / "tried"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(started, folder)
            there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            (folder / name).write_text(json.dumps(there | {key: value}))
            try:
                load_experts([folder])
            except FusionError as error:
                refused += 1
                assert error.message.isprintable(), (name, key, value)
            except Exception as error:
                raise AssertionError(f"{name}: {key}={value!r}") from error
    assert refused > number // 10


@pytest.mark.parametrize(
    "change",
    [
        {"modules_to_save": 3},
        {"modules_to_save": [3]},
        {"bias": ["none"]},
        {"revision": 5},
        {"rank_pattern": {"a": "b"}},
        {"lora_alpha": 10**400},
        {"r": True},
        {"auto_mapping": {"base_model_class": 5}},
        {"task_type": []},
        {"peft_type": {}},
    ],
    ids=str,
)
def test_fields_of_an_adapter(folders, tmp_path, change):
    folder = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", **change)
    [key] = change
    with pytest.raises(FusionError, match=rf"adapter: adapter_config.json: {key}\S* is "):
        load_experts([folder])


@pytest.mark.parametrize(
    "labels", [{"0": 5, "1": "b", "2": "c"}, {"0": None}, {"0": ["a"]}, {"x": "a"}, [1], 3, {"-1": "a"}]
)
def test_labels_that_are_not_strings_are_refused(folders, tmp_path, labels):
    folder = shutil.copytree(folders / "full", tmp_path / "full")
    edit_json(folder / "config.json", id2label=labels)
    expected = r"config.json: id2label(\.\w+)? is .*, expected (a string|strings by class index)"
    with pytest.raises(FusionError, match=expected):
        load_experts([folder])


def test_half_characters_become_whole(folders, tmp_path):
    folder = shutil.copytree(folders / "full", tmp_path / "full")
    config = (folder / "config.json").read_text().replace('"no"', '"\\ud800no"')
    (folder / "config.json").write_text(config)
    assert load_experts([folder])[0].labels == ["\ufffdno", "yes", "maybe"]


@pytest.mark.long
@pytest.mark.parametrize(
    "head",
    ["[" * 1_000_000, "a: " + "[" * 100_000, "a: 1" + ":1" * 90_000, "license: [1]\ntags: 5\npipeline_tag: {}", "- 1"],
)
def test_a_card_hides_no_weights(folders, tmp_path, head):
    folder = shutil.copytree(folders / "full", tmp_path / "full")
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    began = time.process_time()
    [expert] = load_experts([folder])
    assert (expert.license, expert.task) == (None, "text-classification")
    assert time.process_time() - began < 5
    if not head.startswith("license"):
        with pytest.raises(FusionError):
            read_metadata((folder / "README.md").read_text())


def test_a_card_of_wrong_types_hides_no_repos(owner, tmp_path):
    """The client fails on some cards, and with them on the whole list; `discover` does not."""
    for name, card in {"one": "license: mit", "odd": "self: 1", "two": "license: mit"}.items():
        owner.push(name, save_bert(tmp_path / name, card=f"tags: [hf-fusion-expert]\n{card}"))
    found = discover(author=owner.name, api=owner.api)
    assert {info.id.partition("/")[2]: info.license for info in found} == {"one": "mit", "odd": None, "two": "mit"}
    assert [info.license for info in discover(ids=[f"{owner.name}/odd"], api=owner.api)] == [None]
    assert load_experts([f"{owner.name}/odd"], api=owner.api)[0].license is None


def test_quoted_text_is_escaped_on_construction():
    for text in (ESCAPES, "\ud800", "a\u2028b", "\u200b"):
        for shown in (printable(text), FusionError(text, text).message, FusionError(text, text).hint):
            assert shown.isprintable(), repr(shown)
        assert str(Reason(ReasonKind.LABELS, text, text)).isprintable()
        assert Reason(ReasonKind.LABELS, text, text).remedy.isprintable()
    assert printable("Größe 名前 🙂") == "Größe 名前 🙂"
    assert len(Reason(ReasonKind.LABELS, "a" * 10**6).detail) == 1_000
    assert FusionError("two\nlines").message == "two\nlines"


@pytest.fixture
def hostile(owner, tmp_path):
    """Repos whose every word steers a terminal, as the Hub and as folders have them."""
    labels = {str(number): f"{ESCAPES}{number}" for number in range(3)}
    folder = save_bert(tmp_path / "full", config=BERT)
    edit_json(folder / "config.json", id2label=labels, label2id={name: int(number) for number, name in labels.items()})
    card = {"license": ESCAPES, "pipeline_tag": ESCAPES, "base_model": ESCAPES, "tags": ["hf-fusion-expert", ESCAPES]}
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in card.items())
    (folder / "README.md").write_text(f"---\n{head}---\n{ESCAPES}")
    owner.push("full", folder)
    adapter = tmp_path / "adapter"
    save_adapter(adapter, save_bert(tmp_path / "base"), ("a", "b", "c"), base_name=ESCAPES, revision=ESCAPES)
    edit_json(adapter / "adapter_config.json", peft_type=ESCAPES, rank_pattern={ESCAPES: 3})
    (adapter / "README.md").write_text("---\ntags: [hf-fusion-expert]\n---\n")
    owner.push("adapter", adapter)
    return folder, adapter


@pytest.mark.process
def test_no_command_prints_terminal_control_codes(hub, owner, hostile, tmp_path):
    folder, adapter = map(str, hostile)
    ids = [f"{owner.name}/full", f"{owner.name}/adapter"]
    verbs = [
        ["discover", "--id", ids[0], "--id", ids[1]],
        ["discover", "--id", ids[0], "--id", ids[1], "--check", "--labels", "a"],
        ["fuse", "--method", "foe", "--experts", *ids, "-o", "fused"],
        ["fuse", "--method", "foe", "--experts", ids[0], ids[0], "-o", "fused"],
        ["fuse", "--method", "linear", "--experts", ids[0], ids[0], "-o", "merged"],
        ["fuse", "--method", "linear", "--experts", *ids, "-o", "merged"],
        ["fuse", "--method", "foe", "--experts", folder, adapter, "-o", "folders"],
        ["publish", "merged", f"{owner.name}/published", "--dry-run"],
        ["publish", "fused", f"{owner.name}/published", "--dry-run"],
    ]
    words = [[*verb, "--format", how] for verb in verbs for how in ("human", "json", "quiet")]
    script = "import json, sys; from hf_fusion.cli.app import main; [main(words) for words in json.loads(sys.argv[1])]"
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": owner.api.token}
    done = run_python("-c", script, json.dumps(words), env=os.environ | env, cwd=tmp_path)
    for text in (done.stdout, done.stderr):
        assert not {character for character in text if not character.isprintable()} - {"\n"}, text
    assert "\\x1b[31m" in done.stdout
    assert "Traceback" not in done.stderr


def test_rows_and_reasons(hostile, owner):
    found = discover(ids=[f"{owner.name}/full", f"{owner.name}/adapter"], api=owner.api)
    verdict = check_compatibility(found, labels=["a"], api=owner.api)
    assert len(verdict.rejected) == 2
    for row in (*found.table(), *verdict.table(), *map(info_row, found)):
        assert all(value.isprintable() for value in row.values() if isinstance(value, str)), row
