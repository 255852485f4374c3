"""Copies into each Space the modules of spaces/_shared that it imports, since Spaces are uploaded one by one.

Run by `make spaces`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

SPACES = Path(__file__).parent
SHARED = SPACES / "_shared"
PICTURES = SPACES.parent / "hf_fusion" / "io" / "pictures.py"  # needs nothing of hf_fusion
ALWAYS = ("__init__.py", "style.css")
IMPORT = re.compile(r"^from shared\.(\w+) import", re.MULTILINE)


def sources() -> dict[str, Path]:
    """The files that can be copied, by name."""
    return {path.name: path for path in SHARED.iterdir() if path.is_file()} | {PICTURES.name: PICTURES}


def spaces() -> list[Path]:
    """The folders that are uploaded."""
    return sorted(path.parent for path in SPACES.glob("*/app.py"))


def needed(space: Path) -> set[str]:
    """Names of the files that a Space imports, directly or through another one."""
    names, known = set(ALWAYS), sources()
    waiting = list(space.glob("*.py"))
    while waiting:
        for name in IMPORT.findall(waiting.pop().read_text(encoding="utf-8")):
            if (file := f"{name}.py") not in names:
                names.add(file)
                waiting.append(known[file])
    return names


def main() -> None:
    """Writes every Space's folder `shared`."""
    for space in spaces():
        names = sorted(needed(space))
        shutil.rmtree(space / "shared", ignore_errors=True)
        (space / "shared").mkdir()
        for name in names:
            shutil.copyfile(sources()[name], space / "shared" / name)
        print(f"{space.name}/shared: {', '.join(names)}")


if __name__ == "__main__":
    main()
