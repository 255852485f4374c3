"""Hooks of the documentation's build: files of the project that pages link to come along, and tables are filled in.

A page links to a file outside docs/ as GitHub does (`../tests/benchmarks/results/merging.json`); the site serves a copy
of it below `files/`, and for a notebook a page with its outputs. A line `{{ name }}` alone becomes what `TABLES` gives
for the name.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from hf_fusion.cli.app import COMMANDS, build_parser
from hf_fusion.cli.parser import Parser
from hf_fusion.merging.methods import methods_table

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(\.\.?/[^)#\s]+)")


def commands() -> str:
    """Every command's `--help`, under a heading each."""
    os.environ["COLUMNS"] = "100"  # what argparse wraps at

    def sections(parser: Parser, level: int) -> str:
        own = f"{'#' * level} {parser.prog}\n\n```text\n{parser.format_help()}```\n"
        return "\n".join([own, *(sections(each, level + 1) for each in parser.nested.values())])

    return "\n".join(sections(build_parser(name).nested[name], 2) for name in COMMANDS)


TABLES = {"commands": commands, "methods": methods_table}


def notebook_page(notebook: Path) -> str:
    """A notebook's cells and outputs as a page in `notebooks/`; searches list the guides before it."""
    parts = ["---\nsearch:\n  boost: 0.5\n---"]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../").replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            shown = output.get("data", {"text": output.get("text", "")})
            kind, content = next(iter(shown.items()))
            picture = f'<img alt="What the code draws" src="data:image/png;base64,{"".join(content).strip()}">'
            texts = {"text/html": "".join(content), "image/png": picture}
            parts.append(texts.get(kind, f"```text\n{''.join(content)}\n```"))
    return "\n\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """The files, with a page for each notebook."""
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=notebook_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page's text with tables and with links to the copies."""

    def linked(match: re.Match[str]) -> str:
        path = os.path.normpath(Path("docs", page.file.src_uri).parent / match[2])
        if path.startswith("docs" + os.sep) or not Path(ROOT, path).is_file():
            return match[0]  # mkdocs says whether it exists
        if path.endswith(".ipynb"):
            return match[1] + os.path.relpath(f"notebooks/{Path(path).stem}.md", Path(page.file.src_uri).parent)
        copy = Path("files", path + ".txt" if path.endswith(".md") else path).as_posix()
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
        return match[1] + os.path.relpath(copy, Path(page.file.src_uri).parent)

    markdown = re.sub(r"^\{\{ (\w+) \}\}$", lambda match: TABLES[match[1]](), markdown, flags=re.MULTILINE)
    return LINK.sub(linked, markdown)
