"""README, CONTRIBUTING and the examples: all blocks of code run; `test_numbers.py` checks their figures."""

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
EXAMPLES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("0*.py"))}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python(*words: str | Path, cwd: Path, **env: str) -> str:
    """Runs Python in a new process and returns what it prints."""
    done = run_python(*map(str, words), cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(example: str) -> list[str]:
    """The output that an example's docstring shows: the indented lines behind its command."""
    docstring = EXAMPLES[example].split('"""')[1]
    return [line.strip() for line in re.findall(r"^    (.+)$", docstring, re.MULTILINE)][1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run, one after the other."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def fused(folder) -> tuple[Path, str]:
    """What the first example makes, and what it prints."""
    return folder / "fused", python(ROOT / "examples" / "01_fuse.py", cwd=folder)


@pytest.mark.slow
def test_the_readmes_eight_lines_make_the_model_and_the_picture(fused, folder):
    code = blocks(README, "python")[0]
    assert code in EXAMPLES["01_fuse.py"]  # which has run
    lines = [line for line in code.splitlines() if line]
    assert len([line for line in lines if not line.startswith(("from", "import"))]) <= 8
    assert (folder / "accuracy-cost.png").stat().st_size > 10_000
    assert (fused[0] / "model.safetensors").is_file()


@pytest.mark.slow
def test_published_model_loads_without_this_package(fused, folder):
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
        assert share == pytest.approx(wanted[f"me/{name}"], abs=0.02), name


@pytest.mark.process
def test_first_example_prints_its_documented_output(fused):
    said, shown = fused[1].splitlines(), expected("01_fuse.py")
    assert [line.split("  ")[0] for line in said] == [line.split("  ")[0] for line in shown]
    for line, wanted in zip(said, shown, strict=True):
        for number, other in zip(re.findall(r"([\d.]+)%", line), re.findall(r"([\d.]+)%", wanted), strict=True):
            assert abs(float(number) - float(other)) <= 5, line


@pytest.mark.slow
def test_second_example_prints_its_documented_output(folder):
    assert [line.strip() for line in python(ROOT / "examples" / "02_discover.py", cwd=folder).splitlines()] == expected(
        "02_discover.py"
    )


@pytest.mark.slow
def test_third_example_prints_its_documented_output(fused, folder):
    said = python(ROOT / "examples" / "03_use.py", fused[0], cwd=folder).splitlines()
    assert [line.rpartition(" asked ")[0].split() for line in said] == [
        line.rpartition(" asked ")[0].split() for line in expected("03_use.py")
    ]
    asked = [int(line.rpartition(" ")[2]) for line in said]
    assert asked[0] == 8 > asked[1] >= asked[2] >= 1


def test_every_example_names_its_exact_command():
    assert len(EXAMPLES) >= 3
    for name, text in EXAMPLES.items():
        assert f"\n    python examples/{name}" in text.split('"""')[1]


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
