"""The command in CONTRIBUTING, added as described there: one module and one row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import hf_fusion.cli
from hf_fusion.cli import app
from hf_fusion.recipe import Recipe, RecipeExpert

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def added(tmp_path, monkeypatch) -> None:
    """Its module in a folder that counts as one of the command line's, its row in the table."""
    (block,) = re.findall(r"^```python\n(# hf_fusion/cli/origins\.py\n.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "origins.py").write_text(block, encoding="utf-8")
    monkeypatch.setattr(hf_fusion.cli, "__path__", [*hf_fusion.cli.__path__, str(tmp_path / "cli")])
    monkeypatch.setitem(app.COMMANDS, "origins", "show which experts a fused model was made of")


def test_command_lists_the_experts_of_a_recipe(added, tmp_path, capsys):
    Recipe("linear", (RecipeExpert("me/one"), RecipeExpert("me/two"))).save(tmp_path / "fusion.yaml")
    assert app.main(["origins", str(tmp_path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["expert"], row["method"]) for row in rows] == [("me/one", "linear"), ("me/two", "linear")]
    assert app.main(["origins", str(tmp_path), "--format", "quiet"]) == 0
    assert capsys.readouterr().out.split() == ["me/one", "me/two"]


def test_its_help_and_its_errors_are_like_the_others(added, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        app.main(["origins", "--help"])
    assert "hf-fusion origins fused --format quiet" in capsys.readouterr().out
    assert app.main(["origins", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("Error: ")
