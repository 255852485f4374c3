"""Environments without some distributions: a folder with links to all others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).parents[1]


def requirements() -> list[str]:
    """What a wheel's METADATA says that this package requires, from pyproject.toml as it is now."""
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = list(project["dependencies"])
    for extra, lines in extras.items():
        for line in lines:
            name, _, marker = line.partition(";")
            found.append(f'{name} ; {f"({marker.strip()}) and " * bool(marker)}extra == "{extra}"')
    return found


def environment(folder: Path, *without: str) -> dict[str, str]:
    """The variables of a process that runs in such an environment, as ``python -S``.

    Args:
        folder: empty; the links go there.
        without: distributions that are not to be there.
    """
    left_out = {"hf_fusion"}
    for name in without:
        files = metadata.distribution(name).files or ()
        left_out |= {file.parts[0] for file in files if file.parts[0] != ".."}
    for place in filter(os.path.isdir, sys.path):
        if "site-packages" in place:
            for child in Path(place).iterdir():
                linked = folder / child.name
                if child.name not in left_out and not re.match(r"hf_fusion-|__editable__", child.name):
                    linked.exists() or linked.symlink_to(child)
    (folder / "hf_fusion").symlink_to(REPO / "hf_fusion")
    if "hf_fusion_demo" not in without:  # editable installs are left out above
        weights = folder / "hf_fusion_demo"
        weights.exists() or weights.symlink_to(REPO / "demo_weights" / "hf_fusion_demo")
    info = folder / "hf_fusion-0.1.0.dist-info"
    info.mkdir()
    lines = "".join(f"Requires-Dist: {line}\n" for line in requirements())
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: hf_fusion\nVersion: 0.1.0\n{lines}")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run_there(env: dict[str, str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python there."""
    done = [sys.executable, "-S", *words]
    return subprocess.run(done, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
