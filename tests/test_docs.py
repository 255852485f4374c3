"""The documentation: every block of code runs as it stands, every command parses, every public name is described."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from docs_world import BEFORE, FOLDERS, ROWS, fill_hub

import hf_fusion
from hf_fusion.cli.app import build_parser
from hf_fusion.hub.rejection_reasons import ReasonKind
from hf_fusion.merging.recipe_checks import check_recipe
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.search.space import load_space
from hf_fusion.server import HubServer

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PORT = "8765"


class Block(NamedTuple):
    """A block of code, and the file that it is, if its title names one."""

    language: str
    title: str
    code: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page that a reader types: not what is only printed."""
    found = re.findall(r"^```(\w+)(?: title=\"([^\"\n]+)\")?\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [Block(*match) for match in found if match[0] != "text"]


TYPED = [page for page in PAGES if blocks(page) and page != "docs/numbers.md"]


def script_of(page: str, port: int) -> str:
    """All that a page has its reader type, as one program of the shell."""
    steps = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *BEFORE.get(page, ())]
    for block in blocks(page):
        if block.language == "sh":  # a server that a reader has started answers before he types on
            steps.append(
                re.sub(r"(serve .*) &$", r"\1 & sleep 4", block.code, flags=re.MULTILINE).replace(PORT, str(port))
            )
        elif block.language == "python":
            steps.append(f"python - <<'END'\n{block.code}END".replace(PORT, str(port)))
        else:
            steps.append(f"cat > {block.title} <<'END'\n{block.code}END")
    return "\n".join(steps)


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("page", TYPED)
def test_a_reader_types_a_page(page, port, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name, rows in ROWS.get(page, {}).items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        rows().to_parquet(here / name)
    with HubServer(tmp_path / "hub") as hub:
        fill_hub(hub, tmp_path)
        for name in FOLDERS.get(page, ()):
            shutil.copytree(tmp_path / name, here / name)
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token("me"),
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-c", script_of(page, port)], cwd=here, env=env, capture_output=True, text=True, timeout=900
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("page", TYPED)
def test_every_command_shown_parses(page):
    shown = re.findall(r"^```(?:sh|text)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    lines = [line for block in shown for line in block.splitlines()]
    for line in lines:
        words = shlex.split(
            re.sub(r"^accelerate launch -m hf_fusion.cli ", "hf-fusion ", line).removesuffix(" &"), comments=True
        )
        if words[:1] == ["hf-fusion"]:
            assert build_parser(words[1]).parse_args(words[1:]).command == words[1], line


@pytest.mark.parametrize("page", TYPED)
def test_every_recipe_shown_is_one(page, tmp_path):
    for number, block in enumerate(blocks(page)):
        if block.language == "yaml":
            file = tmp_path / f"{number}.yaml"
            file.write_text(block.code, encoding="utf-8")
            if "search:" in block.code:
                load_space(file)  # which checks the recipe at the ends of its ranges
            else:
                check_recipe(load_recipe(file))


def test_every_public_name_is_described():
    described = re.findall(r"^::: hf_fusion\.(\w+)$", "".join(PAGES.values()), re.MULTILINE)
    assert sorted(described) == sorted(hf_fusion.__all__)


def test_every_error_described_is_raised():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_fusion").rglob("*.py"))
    described = re.findall(r"^\| `… (.+?)` \|", PAGES["docs/reference/errors.md"], re.MULTILINE)
    assert len(described) >= 6
    assert [message for message in described if message not in source] == []


def test_every_reason_to_reject_an_expert_is_described():
    described = re.findall(r"^\| (`[a-z ]+`(?:, `[a-z ]+`)*) \|", PAGES["docs/guides/find.md"], re.MULTILINE)
    assert sorted(re.findall(r"`(.+?)`", " ".join(described))) == sorted(kind.value for kind in ReasonKind)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [page for page in PAGES if page != "README.md"]
    notebooks = [f"docs/notebooks/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")]  # made by the build
    assert sorted(f"docs/{page}" for page in listed) == sorted(pages + notebooks)


def test_the_readme_fits_a_few_screens():
    assert len(PAGES["README.md"].splitlines()) <= 200
