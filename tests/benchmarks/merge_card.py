"""The golden card of static merges: three adapters of SmolLM2 by TIES, on an embedded Hub, as a user does it.

    python tests/benchmarks/merge_card.py

Pushes SmolLM2 and its experts, then runs `hf-fusion fuse`, `eval` and `publish`, and renders model_cards/merge.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from datasets import concatenate_datasets

from hf_fusion.assets.language_tasks import rows
from hf_fusion.assets.smollm2 import SMOLLM2
from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.phatgoose import push_base
from hf_fusion.demo.place import Place, open_place

ROOT = Path(__file__).parents[2]
TASKS = ("word-sorting", "word-reversal", "number-sorting")
NAME, TESTED = "smollm2-ties", 40


def hf_fusion(place: Place, *words: str) -> str:
    """Runs a command of hf-fusion in the place's folder, on its Hub, and returns its JSON."""
    env = {
        **os.environ,
        "HF_ENDPOINT": place.endpoint,
        "HF_TOKEN": str(place.api.token),
        "HF_HOME": str(place.folder / "home"),
    }
    command = [sys.executable, "-m", "hf_fusion.cli", *words, "--format", "json"]
    return subprocess.run(command, cwd=place.folder, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, open_place(Path(folder)) as place:
        push_base(place)
        for task in TASKS:
            place.push(task, demo_weights("smollm2_experts") / task)
        suite = [rows(task, "test", TESTED) for task in TASKS]
        owned = [
            own.add_column("expert", [place.repo(task)] * len(own)) for task, own in zip(TASKS, suite, strict=True)
        ]
        concatenate_datasets(owned).to_parquet(place.folder / "test.parquet")
        experts = [place.repo(task) for task in TASKS]
        hf_fusion(
            place, "fuse", "--method", "ties", "--experts", *experts, "--base", SMOLLM2, "--set", "density=0.5",
            "--output", "merged",
        )  # fmt: skip
        hf_fusion(place, "eval", "merged", "--data", "test.parquet", "--split", "test")
        published = json.loads(hf_fusion(place, "publish", "merged", place.repo(NAME), "--yes"))
        pinned = f"{place.repo(NAME)}@{published['revision']}"
        env = {**os.environ, "HF_ENDPOINT": place.endpoint, "HF_HOME": str(place.folder / "home")}
        render = [sys.executable, ROOT / "model_cards" / "render.py", place.folder / "merged", pinned]
        subprocess.run(render, env=env, check=True)


if __name__ == "__main__":
    main()
