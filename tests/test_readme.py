"""README and CONTRIBUTING: all blocks of code run; `test_numbers.py` checks their figures."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
from quick_python import run_python

from hf_fusion import fuse, save_fused
from hf_fusion.assets.smollm2 import smollm2_folder
from hf_fusion.assets.weights import demo_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python(*words: str | Path, cwd: Path, **env: str) -> str:
    """Runs Python in a new process and returns what it prints."""
    done = run_python(*map(str, words), cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where README's first block has run."""
    here = tmp_path_factory.mktemp("readme")
    (here / "block.py").write_text(blocks(README, "python")[0], encoding="utf-8")
    python("block.py", cwd=here)
    return here


@pytest.mark.slow
def test_the_readmes_eight_lines_make_the_model_and_the_picture(folder):
    lines = [line for line in blocks(README, "python")[0].splitlines() if line]
    assert len([line for line in lines if not line.startswith(("from", "import"))]) <= 8
    assert (folder / "accuracy-cost.png").stat().st_size > 10_000
    assert (folder / "fused" / "model.safetensors").is_file()


@pytest.mark.slow
def test_published_model_loads_without_this_package(folder):
    code = blocks((ROOT / "docs/quickstart.md").read_text(encoding="utf-8"), "python")[1]
    (folder / "use.py").write_text(
        f"import sys\nsys.modules['hf_fusion'] = None\n{code}\nprint(type(classify.model))\n"
    )
    assert "FoEModel" in python("use.py", cwd=folder)


@pytest.mark.slow
def test_router_of_the_demo_experts_prints_its_documented_output(tmp_path):
    """The block as it stands, in a folder where me/router is that router."""
    shown = blocks(README, "text")[0].splitlines()
    names = [name.rpartition("/")[2] for name in ast.literal_eval(shown[1])]
    experts = demo_weights("smollm2_experts")
    router = fuse("phatgoose", [experts / name for name in names], smollm2_folder(), top_k=2)
    save_fused(router, tmp_path / "me" / "router")
    (tmp_path / "block.py").write_text(
        next(code for code in blocks(README, "python") if "record_routing = 4096" in code), encoding="utf-8"
    )
    said = python("block.py", cwd=tmp_path, HF_HOME=str(tmp_path / "home")).strip().splitlines()
    assert said[0] == shown[0]
    wanted = ast.literal_eval(shown[1])
    for name, share in ast.literal_eval(said[1]).items():  # greedy tokens are the same; shares are of rounded scores
        assert share == pytest.approx(wanted[f"demo/{name}"], abs=0.02), name


def test_every_test_that_the_security_page_names_exists():
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_path_in_the_tree_exists():
    tree = re.search(r"^## Where things are\n\n```\n(.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL)[1]
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = [word for word in re.split(r"\s{2,}", line.strip())[0].split() if re.search(r"[./]", word)]
        assert names, line
        for name in names:
            assert Path(ROOT, *parents[:depth], name).exists(), line
        parents[depth:] = [names[0]]


def test_every_link_resolves():
    for text in (README, CONTRIBUTING):
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = ["#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (
                target.startswith("https://")
                or target in anchors
                or (ROOT / target.partition("#")[0] or "none").exists()
            ), target


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z-]+)", README + CONTRIBUTING))
    assert named >= {"demo", "test", "check", "test-all", "bench", "constraints"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "printed"),
    [(0, "0 [0.25, 0.25, 0.25, 0.25]"), (3, "merging cache:merging/minilm-8/cola 0.15")],
    ids=["method", "suite"],
)
def test_the_blocks_of_contributing_run(number, printed, tmp_path):
    (tmp_path / "block.py").write_text(blocks(CONTRIBUTING, "python")[number], encoding="utf-8")
    assert python("block.py", cwd=tmp_path).strip() == printed
