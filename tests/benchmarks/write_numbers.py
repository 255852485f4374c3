"""The figures of README, docs and cards: measured by the commands of `number_sources.SOURCES`, written from their JSON.

    make numbers-render                      # write README, docs and cards from the JSON that is there
    make numbers ONLY=foe-forward            # measure one source first
    make numbers DATA=DIR                    # measure all of them: hours; DIR holds the data sets, one folder each

No figure is edited by hand: `tests/test_numbers.py` writes all of it again and compares.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from number_sources import ROOT, SOURCES, Source

from hf_fusion.cards.card import render_card
from hf_fusion.cards.facts import facts_from_json
from hf_fusion.hub.readme import put_section

LIST = "docs/numbers.md"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
UNLINKED = re.compile(r"\[([^]]*)\]\([^)]*\)")
INTRODUCTION = """# Source of each figure

Every figure in README, on these pages and in the cards of `model_cards/` is written from a JSON file by
`tests/benchmarks/write_numbers.py`: `make numbers ONLY=NAME` measures a source again and updates the documents,
`make numbers-render` only updates them. A table stands between markers that name its source; the quotations are the
sentences that hold figures. Times are for one quiet core.
"""


def pattern(phrase: str) -> re.Pattern[str]:
    """Finds a phrase whatever its figures are and wherever its lines are broken; each figure is a group."""
    parts: list[str] = []
    end = 0
    for number in NUMBER.finditer(phrase):
        parts += [_loose(phrase[end : number.start()]), f"({NUMBER.pattern})"]
        end = number.end()
    return re.compile("".join([*parts, _loose(phrase[end:])]))


def _loose(text: str) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


def find(phrase: str, text: str) -> re.Match[str] | None:
    """Where a document has a phrase.

    Raises:
        ValueError: more than once.
    """
    found = list(pattern(phrase).finditer(text))
    if len(found) > 1:
        raise ValueError(f"{len(found)} times instead of once, whatever its figures: {phrase!r}")
    return found[0] if found else None


def put_phrase(phrase: str, text: str) -> str | None:
    """A document with the figures of a phrase in it; line breaks stay. None where it does not have the phrase."""
    match = find(phrase, text)
    if match is None:
        return None
    for group, number in reversed(list(enumerate(NUMBER.findall(phrase), 1))):
        text = text[: match.start(group)] + number + text[match.end(group) :]
    return text


def put_block(section: str, block: str, text: str) -> str | None:
    """A document with a table between its markers; None where it has no such markers."""
    return put_section(text, section, block) if f"<!-- {section}:begin -->" in text else None


def put_source(name: str, source: Source, texts: dict[str, str]) -> None:
    """Write the block and the phrases of a source into every document that has them.

    Raises:
        ValueError: no document has one of them.
    """
    read = source.read()
    puts = [partial(put_phrase, phrase) for phrase in source.phrases(read)] if source.phrases else []
    if source.block:
        puts.append(partial(put_block, section_of(name, source), source.block(read)))
    for put in puts:
        written = {path: text for path, old in texts.items() if (text := put(old)) is not None}
        if not written:
            raise ValueError(f"no document has what {name} measured: {put.args[0]!r}")
        texts.update(written)


def section_of(name: str, source: Source) -> str:
    """Name of the markers around a source's block."""
    return source.section or f"numbers-{name}"


def documents() -> list[str]:
    """README and the pages of the documentation, which may hold figures."""
    pages = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))
    return ["README.md", *(page for page in pages if page != LIST)]


def rendered() -> dict[str, str]:
    """Every document with figures, as it is to be: path → text."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in documents()}
    for name, source in SOURCES.items():
        put_source(name, source, texts)
    for path in sorted((ROOT / "model_cards").glob("*.json")):
        texts[f"model_cards/{path.stem}.md"] = render_card(facts_from_json(path))
    return {**texts, LIST: list_of_sources()}


def list_of_sources() -> str:
    """`docs/numbers.md`: what is in the manifest, for people."""
    parts = [INTRODUCTION]
    for name, source in SOURCES.items():
        read = source.read()
        links = ", ".join(linked(file) for file in source.files)
        machines = ", ".join(dict.fromkeys(found for content in read for found in machines_of(content)))
        about = [f"Figures: {links}.", f"Measured on: {source.rows}; {source.minutes} minutes."]
        parts.append("\n".join([f"## {name}\n", *about, *([f"Machine: {machines}."] if machines else [])]) + "\n")
        if source.commands:
            parts.append("```sh\n" + "\n".join(shown(command) for command in source.commands) + "\n```\n")
        if source.phrases:
            phrases = [UNLINKED.sub(r"\1", phrase) for phrase in source.phrases(read)]
            parts.append("\n".join(f"- “{phrase}”" for phrase in phrases) + "\n")
    return "\n".join(parts)


def linked(file: str) -> str:
    """A link to a file as seen from `docs/numbers.md`; folders are only named."""
    if (ROOT / file).is_dir():
        return f"`{file}/`"
    return f"[{file}]({os.path.relpath(file, 'docs')})"


def machines_of(content: Any) -> Iterator[str]:
    """The machines that a JSON file names."""
    if isinstance(content, dict):
        if isinstance(content.get("machine"), str):
            yield content["machine"]
        if isinstance(content.get("results"), dict):
            yield from machines_of(content["results"])


def shown(command: str) -> str:
    """A command as one types it."""
    return command.format(python="python", data="DIR")


def measure(name: str, data: str | None) -> None:
    """Run the commands of a source."""
    source = SOURCES[name]
    if not source.commands:
        print(f"{name}: not measured by one command, see CONTRIBUTING.md", flush=True)
    for command in source.commands:
        if "{data}" in command and data is None:
            raise SystemExit(f"{name} reads data sets: make numbers ONLY={name} DATA=DIR")
        words = command.format(python=shlex.quote(sys.executable), data=shlex.quote(str(Path(data or "").resolve())))
        print(f"{name}: {shown(command)}", flush=True)
        subprocess.run(shlex.split(words), cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SOURCES, help="measure only these sources (default: all)")
    parser.add_argument("--data", help="folder with one folder per data set")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.render:
        for name in args.only or SOURCES:
            measure(name, args.data)
    for name, text in rendered().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written: {name}")


if __name__ == "__main__":
    main()
