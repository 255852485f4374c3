"""``hf-fusion methods``: every method that can be chosen, as its declaration describes it."""

from __future__ import annotations

import json

import pytest

from hf_fusion.bench.methods import METHODS as OF_BENCH
from hf_fusion.cli.app import main
from hf_fusion.cli.methods import all_methods
from hf_fusion.families import METHODS
from hf_fusion.merging.methods import MERGE_METHODS

ENTRIES = {entry.name: entry for entry in all_methods()}


def test_every_method_is_listed_once():
    assert len(list(all_methods())) == len(ENTRIES)
    assert set(ENTRIES) == {*METHODS, *MERGE_METHODS, *OF_BENCH}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_every_method_and_parameter_is_described(entry):
    assert entry.title and entry.summary.endswith((".", ")"))
    assert "\n" not in entry.summary
    assert [row["parameter"] for row in entry.rows if not row["description"] or not row["type"]] == []
    assert entry.command.startswith("hf-fusion ")


def test_what_methods_need():
    assert ENTRIES["ties"].needs == ("the base",)
    assert ENTRIES["nuslerp"].needs == ("2 experts", "the base, if given")
    assert ENTRIES["fisher"].needs == ("statistics of each expert's data (fisher)",)
    assert ENTRIES["lora"].needs == ("LoRA adapters of one base",)
    assert ENTRIES["phatgoose"].needs == ("adapters of one base", "gates of each (hf-fusion fit gates)")
    assert ENTRIES["wemoe"].needs == ("the base", "rows to fit on (hf-fusion fit routers)")
    assert ENTRIES["foe"].needs == ("rows to fit on (hf-fusion fit fuser)",)
    assert ENTRIES["linear"].needs == ENTRIES["ensemble"].needs == ()
    assert ENTRIES["foe_frugal"].needs == ("fusion",)


def test_one_method_in_full(capsys):
    assert main(["methods", "ties", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["paper"] == "https://arxiv.org/abs/2306.01708"
    density = next(row for row in told["parameters"] if row["parameter"] == "density")
    assert density["type"] == "a number from 0 to 1, for each expert"
    assert density["default"] == 0.2
    assert "kept" in density["description"]
    assert main(["methods", "phatgoose"]) == 0
    shown = capsys.readouterr()
    assert "gates trained post hoc" in shown.out and "top_k" in shown.out
    assert shown.err == "→ hf-fusion fuse --method phatgoose --experts A B --output fused\n"


def test_the_list_for_people_and_for_scripts(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ties = next(line for line in lines if line.startswith("ties "))
    assert "the base" in ties and "density=0.2" in ties and ties.endswith("2306.01708")
    assert main(["methods", "--format", "quiet"]) == 0
    assert capsys.readouterr().out.split() == list(ENTRIES)
    assert main(["methods", "--format", "json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(ENTRIES)


def test_an_unknown_method_ends_with_2(capsys):
    assert main(["methods", "tise"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "Error: there is no method 'tise'",
        "  → did you mean ties? hf-fusion methods lists all",
    ]
