"""A demo with three seeds of what it trains: its card and pictures from the first, the spread from all.

    python tests/benchmarks/demos.py phatgoose

Writes results/demo_NAME.json (every system's score by seed, CPU seconds of the first run), model_cards/NAME.json and
what README shows. Each run is a whole one, in another folder, in a process with one thread; the three run side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hf_fusion.demo import DEMOS

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
# what the README shows of a demo: file beside the model -> its place here
SHOWN = {"foe": {"results.json": "docs/results.json", "accuracy-cost.png": "docs/accuracy-cost.png"}}
RUN = """
import json, sys
from pathlib import Path
from hf_fusion.cli.output import Out
from hf_fusion.demo import DEMOS
from hf_fusion.demo.workspace import open_workspace
with open_workspace(Path("demo")) as workspace:
    print(json.dumps(DEMOS[sys.argv[1]](workspace, Out("json"), int(sys.argv[2]))))
"""


def start(name: str, seed: int, folder: Path) -> subprocess.Popen[str]:
    """A demo with a seed, in a folder that it makes."""
    folder.mkdir()
    env = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with (folder / "summary.json").open("w") as summary:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, name, str(seed)],
            cwd=folder,
            env={**os.environ, **env},
            stdout=summary,
        )


def finish(run: subprocess.Popen[str], folder: Path) -> tuple[dict[str, Any], float]:
    """A demo's summary, and the CPU seconds that it and its children took."""
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"the demo in {folder} failed")
    lines = (folder / "summary.json").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1]), usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DEMOS)
    name = parser.parse_args().name
    found: dict[str, Any] = {"command": f"python tests/benchmarks/demos.py {name}", "machine": "", "scores": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {seed: Path(temporary, str(seed)) for seed in SEEDS}
        runs = {seed: start(name, seed, folder) for seed, folder in folders.items()}
        for seed, folder in folders.items():
            summary, seconds = finish(runs[seed], folder)
            print(f"{name}, seed {seed}: {summary['measured']}", flush=True)
            found["scores"][str(seed)] = summary["measured"]
            if seed == SEEDS[0]:
                found["cpu_seconds"] = round(seconds)
                made = Path(summary["folder"])
                found["machine"] = json.loads((made / "results.json").read_text(encoding="utf-8"))["machine"]
                keep(name, made, f"{summary['model']}@{summary['revision']}")
    (RESULTS / f"demo_{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def keep(name: str, made: Path, pinned: str) -> None:
    """A model's card, and what the README shows of it."""
    subprocess.run([sys.executable, ROOT / "model_cards" / "render.py", made, pinned], check=True)
    for file, place in SHOWN.get(name, {}).items():
        shutil.copy(made / file, ROOT / place)


if __name__ == "__main__":
    main()
