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
from hf_fusion.demo.workspace import Workspace, open_workspace

ROOT = Path(__file__).parents[2]
TASKS = ("word-sorting", "word-reversal", "number-sorting")
NAME, TESTED = "smollm2-ties", 40


def hf_fusion(workspace: Workspace, *words: str) -> str:
    """Runs a command of hf-fusion in the workspace's folder, on its Hub, and returns its JSON."""
    env = {
        **os.environ,
        "HF_ENDPOINT": workspace.endpoint,
        "HF_TOKEN": str(workspace.api.token),
        "HF_HOME": str(workspace.folder / "home"),
    }
    command = [sys.executable, "-m", "hf_fusion.cli", *words, "--format", "json"]
    return subprocess.run(command, cwd=workspace.folder, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, open_workspace(Path(folder)) as workspace:
        push_base(workspace)
        for task in TASKS:
            workspace.push(task, demo_weights("smollm2_experts") / task)
        suite = [rows(task, "test", TESTED) for task in TASKS]
        owned = [
            own.add_column("expert", [workspace.repo(task)] * len(own)) for task, own in zip(TASKS, suite, strict=True)
        ]
        concatenate_datasets(owned).to_parquet(workspace.folder / "test.parquet")
        experts = [workspace.repo(task) for task in TASKS]
        hf_fusion(
            workspace, "fuse", "--method", "ties", "--experts", *experts, "--base", SMOLLM2, "--set", "density=0.5",
            "--output", "merged",
        )  # fmt: skip
        hf_fusion(workspace, "eval", "merged", "--data", "test.parquet", "--split", "test")
        published = json.loads(hf_fusion(workspace, "publish", "merged", workspace.repo(NAME), "--yes"))
        pinned = f"{workspace.repo(NAME)}@{published['revision']}"
        env = {**os.environ, "HF_ENDPOINT": workspace.endpoint, "HF_HOME": str(workspace.folder / "home")}
        render = [sys.executable, ROOT / "model_cards" / "render.py", workspace.folder / "merged", pinned]
        subprocess.run(render, env=env, check=True)


if __name__ == "__main__":
    main()
