"""The completion scripts, in the shells themselves: commands, options, values, methods, suites, files and folders."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hf_fusion.cli.app import COMMANDS, main
from hf_fusion.cli.completion import FILES, FOLDERS, SHELLS, VALUES, _with_nested, complete_parser
from hf_fusion.families import METHODS
from hf_fusion.merging.methods import MERGE_METHODS

CASES = {
    "": [*COMMANDS],
    "fi": ["fit"],
    "fit ": ["fuser", "gates", "routers"],
    "fit fuser --fr": ["--frugal"],
    "--ver": ["--version"],
    "fuse --method ": [*METHODS, *MERGE_METHODS],
    "fuse --method breadc": ["breadcrumbs", "breadcrumbs_ties"],
    "fuse --dtype ": ["float32", "float16", "bfloat16"],
    "fuse rec": ["recipe.yaml"],
    "fuse --method ties --base x --experts a fu": ["fused"],
    "fuse -o fu": ["fused"],
    "bench run --suite minilm": ["minilm-8"],
    "bench run --methods average foe_": ["foe_selection", "foe_frugal"],
    "bench check minilm": ["minilm-8"],
    "eval fu": ["fused"],
    "eval fused --data r": ["recipe.yaml", "rows.parquet"],
    "fit gates fused --reference ro": ["rows.parquet"],
    "methods ti": ["ties", "ties_sum", "ties_model"],
    "discover --task image-c": ["image-classification"],
    "demo w": ["wemoe"],
    "discover --format ": ["human", "json", "quiet"],
}
ASK = """
source ./script
ask() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    "$(complete -p hf-fusion | sed 's/.*-F \\([^ ]*\\).*/\\1/')" 2>/dev/null
    echo "${COMPREPLY[*]}"
}
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "fused").mkdir()
    for name in ("recipe.yaml", "rows.parquet", "other"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.process
def test_bash_completes(here, capsys):
    (here / "script").write_text(script("bash", capsys), encoding="utf-8")
    asked = ["ask hf-fusion " + words + ("" if words.strip() == words != "" else '""') for words in CASES]
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join([ASK, *asked])], cwd=here, capture_output=True, text=True, timeout=60
    )
    answers = [sorted(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(CASES, answers, strict=True)) == {words: sorted(found) for words, found in CASES.items()}


@pytest.mark.process
@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_read_their_script(shell, here, capsys):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (here / ("_hf-fusion" if shell == "zsh" else "script")).write_text(script(shell, capsys), encoding="utf-8")
    read = {
        "zsh": "fpath+=$PWD; autoload -Uz compinit; compinit -D -u; echo $_comps[hf-fusion]",
        "tcsh": "source script; complete",
    }
    done = subprocess.run([shell, "-f", "-c", read[shell]], cwd=here, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert "hf_fusion" in done.stdout.replace("-", "_")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_the_same_in_every_format(shell, capsys):
    text = script(shell, capsys)
    assert main(["completion", shell, "--format", "json"]) == 0
    assert capsys.readouterr().out == text
    assert all(name in text for name in ("hf-fusion", "breadcrumbs_ties", "minilm-8", "format"))


def test_every_argument_of_a_table_exists():
    arguments = [(each.prog, action) for each in _with_nested(complete_parser()) for action in each._actions]
    assert set(VALUES) <= {(prog, action.dest) for prog, action in arguments}
    assert {*FOLDERS, *FILES} <= {action.metavar for _, action in arguments}
