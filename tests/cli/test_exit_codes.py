"""Exit codes and messages: 2 for wrong arguments, 1 for what files and folders are like; each error says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fusion.cli.app import main

FUSE = "fuse --method ties --base me/base --experts me/a me/b -o out"
CASES = {
    "fuse -o out": (2, "give either a recipe"),
    "fuse --method ties -o out": (2, "must be given together"),
    FUSE.replace("ties", "tise"): (2, "no method 'tise'"),
    f"{FUSE} --set densty=0.1": (2, "'densty'"),
    f"{FUSE} --set density=3": (2, "density is 3, expected a number from 0 to 1"),
    f"{FUSE} --set density": (2, "--set density has no value"),
    f"{FUSE} --set density=[": (2, "--set density is not valid YAML"),
    f"{FUSE} --push-experts": (2, "--push-experts needs --push"),
    f"{FUSE} --push me": (2, "'me' is not the name of a repo"),
    "fuse --method ties --experts me/a me/b -o out": (2, "ties needs the base"),
    "fuse --method foe --experts me/a me/b -o out --dry-run": (2, "--dry-run works for static merges only"),
    "fuse method.yaml -o out": (1, "no method 'tise'"),
    "fuse key.yaml -o out": (1, "methd is not a supported key"),
    "fuse broken.yaml -o out": (1, "broken.yaml is not valid YAML"),
    "fuse folder -o out": (1, "folder/fusion.yaml cannot be read"),
    "fuse --method linear --experts ./gone me/b -o out": (1, "there is no folder ./gone"),
    "eval gone --data rows.csv": (1, "there is no folder gone"),
    "eval rows.csv --data rows.csv": (1, "rows.csv is a file, not a folder"),
    "eval folder --data rows.csv": (1, "folder is not a model's folder"),
    "fit gates me/a --data rows.csv": (2, "where to save the gates"),
    "bench run --suite minilm": (2, "no suite 'minilm'"),
    "bench run --suite gone.yaml": (1, "gone.yaml does not exist"),
    "bench run --suite minilm-8 --methods tise": (2, "no method 'tise'"),
    "bench run --suite minilm-8 --data rows.csv": (1, "rows.csv is a file, not a folder"),
    "bench report gone": (1, "gone does not exist"),
    "bench publish gone me/results": (1, "gone does not exist"),
    "bench publish folder me/results --models ties": (2, "--models ties"),
    "publish gone me/x": (1, "there is no folder gone"),
    "discover --task text-clasification": (2, "text-clasification"),
    "demo --real-hub": (2, ""),
}


@pytest.mark.parametrize("words", CASES)
def test_every_error_has_its_exit_code_and_a_next_step(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    contents = {"method": "method: tise\nexperts: [me/a]", "key": "methd: ties", "broken": "a: ["}
    for name, content in contents.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    Path("rows.csv").write_text("text,label\na,b\n", encoding="utf-8")
    code, message = CASES[words]
    assert main(words.split()) == code
    out, err = capsys.readouterr()
    error, hint = err.splitlines()
    assert out == ""
    assert error.startswith("Error: ") and message in error
    assert hint.startswith("  → ")
    assert "Traceback" not in err
