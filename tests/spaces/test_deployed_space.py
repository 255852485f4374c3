"""A Space as `hf-fusion spaces deploy` leaves it on the Hub: cloned and run with the variables that it has there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from gradio_client import Client
from huggingface_hub import HfApi, snapshot_download
from quick_python import run_python
from spaces.test_foe_space import publish
from tiny import bert, make_tokenizer

from hf_fusion import FoEModel
from hf_fusion.types import Expert


@pytest.mark.slow
def test_a_deployed_space_runs_from_what_the_hub_has(hub, tmp_path, run_space, visit):
    labels = ["glad", "sad"]
    experts = [
        Expert(f"me/{seed}", bert(labels, seed=seed), processor=make_tokenizer(), labels=labels) for seed in (0, 1)
    ]
    published = publish(hub, FoEModel.from_experts(experts), "space-deployed/foe", tmp_path / "model")
    token = hub.token("space-deployed")
    words = ["spaces", "deploy", "foe", "--repo", "space-deployed/app", "--model", published.id, "--trust-remote-code"]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}

    def deploy(*more: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "hf_fusion.cli", *words, *more, env=environment, cwd=tmp_path)

    unconfirmed = deploy()
    assert unconfirmed.returncode == 1 and "needs confirmation" in unconfirmed.stderr
    done = deploy("--yes")
    assert done.returncode == 0 and "Deployed" in done.stdout, done.stderr
    api = HfApi(endpoint=hub.endpoint, token=token)
    folder = Path(snapshot_download("space-deployed/app", repo_type="space", local_dir=tmp_path / "app",
                                    endpoint=hub.endpoint, token=token))  # fmt: skip
    variables = {key: each.value for key, each in api.get_space_variables("space-deployed/app").items()}
    assert variables["MODEL_REVISION"] == published.sha
    url = run_space(folder, SPACE_ID="space-deployed/app", **variables)  # as the Hub sets it
    client = Client(url, verbose=False)
    routing = client.predict("a lazy dog", None, api_name="/predict")
    assert routing["answer"] in labels and len(routing["experts"]) == 2
    foot = {each.inner_text(): each.get_attribute("href") for each in visit(url).locator(".ui-about a").all()}
    page = f"{hub.endpoint}/spaces/space-deployed/app"
    assert foot == {
        "Paper: Fusing Models with Complementary Expertise": "https://arxiv.org/abs/2310.01542",
        "Model": f"{hub.endpoint}/{published.id}",
        "Documentation": f"{page}/blob/main/README.md",
        "Duplicate this Space": f"{page}?duplicate=true",
    }
    assert api.file_exists("space-deployed/app", "README.md", repo_type="space")
