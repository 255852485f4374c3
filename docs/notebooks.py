"""Makes the notebooks: executes the percent scripts `examples/0*.py` and keeps their outputs in `examples/0*.ipynb`.

    python docs/notebooks.py            # `make notebooks`: all of them, in a few minutes
    python docs/notebooks.py 04_foe     # one

Progress bars, warnings, times and paths of the machine are not kept: a notebook changes with its results, and with the
commits of the Hub that it makes.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("0*.py"))
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS = 1800  # the longest that a cell may take


def read(script: Path) -> Any:
    """A percent script as a notebook without outputs; always the same, byte for byte."""
    notebook = jupytext.read(script, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(script: Path) -> Any:
    """Runs a script as a notebook in a new kernel and an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = read(script)
    with tempfile.TemporaryDirectory() as folder:
        # a kernel of this interpreter, whatever kernels the machine has
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        manager = client.create_kernel_manager()
        manager.kernel_spec.argv[0] = sys.executable
        client.execute(env={**os.environ, **QUIET})
    for cell in notebook.cells:
        cell["metadata"] = {}
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _scrubbed(output)) is not None]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _scrubbed(output: Any) -> Any:
    """An output without what differs from run to run; None if nothing is left."""
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        output.text = _without_places(output.text)
    elif "data" in output:
        if WIDGET in output.data:
            return None
        output.metadata = {}
        if output.data.keys() & {"text/html", "image/png"}:  # which every viewer shows
            output.data.pop("text/plain", None)
        output.data.pop("image/jpeg", None)  # a picture comes as PNG as well
        for kind, text in output.data.items():
            if kind.startswith("text/"):
                output.data[kind] = _without_places(text)
    return output


def _without_places(text: str) -> str:
    """Text without folders of this machine and addresses in its memory."""
    for folder in (tempfile.gettempdir(), str(ROOT), str(Path.home())):
        text = re.sub(rf"{re.escape(folder)}/\S*?([\w.-]*)(?=[\s'\"<)]|$)", r"…/\1", text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def main() -> None:
    """Executes the scripts that the command line names, or all."""
    for script in SCRIPTS:
        if script.stem in (sys.argv[1:] or [script.stem]):
            print(script.stem, flush=True)
            nbformat.write(execute(script), script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
