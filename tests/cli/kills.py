"""Commands that `test_kills` runs in processes and kills."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

PRELOADED = [
    *("torch", "datasets", "sklearn", "matplotlib.figure", "transformers.trainer", "peft", "safetensors.torch"),
    *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
    *("hf_fusion.cli.app", "hf_fusion.fusion", "hf_fusion.merging.merge", "hf_fusion.training.gates"),
    *("hf_fusion.training.routers", "hf_fusion.training.fuser", "hf_fusion.bench.run", "hf_fusion.publishing.publish"),
    *("hf_fusion.models.modeling_foe", "hf_fusion.models.modeling_wemoe"),
    "hf_fusion.models.modeling_phatgoose",
]


def quick_processes() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported already what commands need: they are killed at work, not at imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def command(folder: str, words: list[str]) -> None:
    """`hf-fusion` with these words, in a folder."""
    from hf_fusion.cli.app import main

    _begin(folder)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(words)
    if code:
        Path(folder, "said.txt").write_text(said.getvalue())
    sys.exit(code)


def publish(folder: str, endpoint: str, token: str, model: str, repo: str) -> None:
    """Publishes a fused model and its experts."""
    from huggingface_hub import HfApi

    from hf_fusion.publishing.publish import publish as push

    _begin(folder)
    push(model, repo, license="mit", push_experts=True, overwrite=True, api=HfApi(endpoint=endpoint, token=token))


def upload(folder: str, endpoint: str, token: str, source: str, repo: str) -> None:
    """Pushes a folder as one commit."""
    from huggingface_hub import HfApi

    _begin(folder)
    HfApi(endpoint=endpoint, token=token).upload_folder(repo_id=repo, folder_path=source, commit_message="all of it")


def _begin(folder: str) -> None:
    import torch

    os.chdir(folder)
    torch.set_num_threads(1)
