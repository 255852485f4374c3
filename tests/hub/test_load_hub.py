"""Loading from the embedded Hub: pinned, only the needed files, resumed, and without implicit trust."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny_experts import BERT, edit_json, save_adapter, save_bert
from transformers import AutoModel, BertConfig

from hf_fusion.errors import FusionError
from hf_fusion.hub.discover import discover
from hf_fusion.hub.load import load_experts


def weights(expert):
    return expert.model.state_dict()["classifier.weight"]


def test_pinned_and_newest(owner, tmp_path):
    repo = f"{owner.name}/mood"
    first = owner.push("mood", save_bert(tmp_path / "mood", seed=1, card="license: MIT"))
    infos = discover(ids=[repo], api=owner.api)
    second = owner.push("mood", save_bert(tmp_path / "mood", seed=2, card="license: MIT"))
    by_info, by_sha, newest = load_experts([infos[0], f"{repo}@{first}", repo], api=owner.api)
    assert [expert.revision for expert in (by_info, by_sha, newest)] == [first, first, second]
    assert torch.equal(weights(by_info), weights(by_sha))
    assert not torch.equal(weights(by_sha), weights(newest))
    assert (newest.name, newest.license, newest.task) == (repo, "mit", "text-classification")


def test_adapters_bring_their_base_once(hub, owner, tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    sha = owner.push("base", base)
    for name in ("one", "two"):
        save_adapter(tmp_path / name, base, base_name=f"{owner.name}/base", revision=sha, seed=len(name))
        owner.push(name, tmp_path / name)
    owner.push("base", save_bert(tmp_path / "base", seed=5, auto=AutoModel))  # moved on; the adapters did not
    hub.requests.clear()
    one, two = load_experts([f"{owner.name}/one", f"{owner.name}/two"], api=owner.api)
    assert one.model is two.model
    assert (one.adapter.base, one.adapter.base_revision) == (f"{owner.name}/base", sha)
    assert one.processor is not None  # the base's
    reads = [path for method, path, _ in hub.requests if method == "GET" and "base/resolve" in path]
    assert len([path for path in reads if path.endswith("model.safetensors")]) == 1
    assert all(sha in path for path in reads)


def test_a_base_named_with_and_without_its_commit_is_one(owner, tmp_path):
    base = save_bert(tmp_path / "base", auto=AutoModel)
    sha = owner.push("base", base)
    for name, revision in (("one", sha), ("two", None)):
        save_adapter(tmp_path / name, base, base_name=f"{owner.name}/base", revision=revision)
        owner.push(name, tmp_path / name)
    one, two = load_experts([f"{owner.name}/one", f"{owner.name}/two"], api=owner.api)
    assert one.model is two.model
    assert two.adapter.base_revision == sha


def test_a_full_expert_borrows_its_processor(hub, owner, tmp_path):
    owner.push("base", save_bert(tmp_path / "base"))
    owner.push("mood", save_bert(tmp_path / "mood", processor=False, card=f"base_model: {owner.name}/base"))
    hub.requests.clear()
    (expert,) = load_experts([f"{owner.name}/mood"], api=owner.api)
    assert expert.processor(["good film"], return_tensors="pt")["input_ids"].shape == (1, 4)
    assert not [path for _, path, _ in hub.requests if "base/resolve" in path and path.endswith(".safetensors")]


def test_only_needed_tensors_are_read(hub, owner, tmp_path):
    folder = save_bert(tmp_path / "mood")
    for extra in ("pytorch_model.bin", "training_args.bin", "odd.py", "onnx/model.onnx", "old/model.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    owner.push("mood", folder)
    hub.requests.clear()
    load_experts([f"{owner.name}/mood"], api=owner.api)
    read = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert read == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_remote_code_needs_a_pinned_commit(owner, tmp_path):
    folder = save_bert(tmp_path / "odd")
    (folder / "odd.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OddConfig(BertConfig):\n    model_type = 'odd'\n"
        "class OddForSequenceClassification(BertForSequenceClassification):\n    config_class = OddConfig\n"
    )
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForSequenceClassification": "odd.OddForSequenceClassification"}
    edit_json(folder / "config.json", model_type="odd", architectures=["OddForX"], auto_map=auto_map)
    edit_json(folder / "config.json", architectures=["OddForSequenceClassification"])
    sha = owner.push("odd", folder)
    repo = f"{owner.name}/odd"
    for name in (repo, f"{repo}@main"):
        with pytest.raises(FusionError, match=f"{repo} needs its own code to run, and no commit is named") as caught:
            load_experts([name], trust_remote_code=True, api=owner.api)
        assert f"{repo}@<" in caught.value.hint
    with pytest.raises(FusionError, match="needs its own code"):
        load_experts([f"{repo}@{sha}"], api=owner.api)
    (expert,) = load_experts([f"{repo}@{sha}"], trust_remote_code=True, api=owner.api)
    assert type(expert.model).__name__ == "OddForSequenceClassification"


def test_pickles_stay_on_the_hub(hub, owner, tmp_path):
    folder = save_bert(tmp_path / "mood")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    owner.push("mood", folder)
    hub.requests.clear()
    with pytest.raises(FusionError, match="only pickle weights"):
        load_experts([f"{owner.name}/mood"], api=owner.api)
    assert not [path for _, path, _ in hub.requests if path.endswith(".bin")]
    (expert,) = load_experts([f"{owner.name}/mood"], allow_pickle=True, api=owner.api)
    assert expert.labels == ["no", "yes", "maybe"]


def test_local_base_path_of_a_hub_adapter_is_not_opened(owner, tmp_path):
    """A local path that an adapter on the Hub records must not be read on this machine."""
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    owner.push("irony", tmp_path / "irony")
    with pytest.raises(FusionError, match=rf"irony records the base '{base}', which is neither") as caught:
        load_experts([f"{owner.name}/irony"], api=owner.api)
    assert "base=" in caught.value.hint
    (expert,) = load_experts([f"{owner.name}/irony"], base=base, api=owner.api)
    assert expert.labels == ["no", "yes"]


def test_refusals_of_the_hub_are_explained(owner, anyone, tmp_path):
    owner.push("mood", save_bert(tmp_path / "mood"))
    repo = f"{owner.name}/mood"
    owner.api.update_repo_settings(repo, gated="manual")
    for name, api, reason in [
        (repo, anyone, f"{repo} is gated"),
        ("nobody/nothing", owner.api, "nobody/nothing was not found"),
        (f"{repo}@{'0' * 40}", owner.api, f"{repo} has no such revision"),
        (repo, HfApi(endpoint="http://127.0.0.1:9", token=False), f"{repo} cannot be reached"),
    ]:
        with pytest.raises(FusionError, match=reason) as caught:
            load_experts([name], api=api)
        assert caught.value.hint


LOAD = """
import sys
from huggingface_hub import HfApi
from hf_fusion.hub.load import load_experts
experts = load_experts(sys.argv[2:], api=HfApi(endpoint=sys.argv[1], token=False))
print([expert.name for expert in experts])
"""


def start(hub, home, *names, **options):
    env = {**os.environ, "HF_HOME": str(home)}
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS")
    command = [sys.executable, "-c", LOAD, hub.endpoint, *names]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_one_progress_bar(hub, owner, tmp_path):
    """On a terminal one bar over all experts; into a pipe nothing."""
    names = [f"{owner.name}/{name}" for name in ("one", "two")]
    for name in names:
        owner.push(name.partition("/")[2], save_bert(tmp_path / "mood", seed=len(name)))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = start(hub, tmp_path / "home", *names, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end has closed
            break
    assert process.wait() == 0
    lines = {line.partition(":")[0].strip() for line in shown.decode().replace("\r", "\n").splitlines() if "%" in line}
    assert lines == {"Downloading experts"}
    assert "100%" in shown.decode()
    piped = start(hub, tmp_path / "home-2", *names, stderr=subprocess.PIPE)
    assert "Downloading" not in piped.communicate()[1]


@pytest.mark.slow
def test_killed_download_resumes(hub, owner, tmp_path):
    """Complete files are not downloaded again. (The client restarts incomplete ones.)"""
    big = BertConfig(**{**BERT.to_dict(), "vocab_size": 200_000, "hidden_size": 64})
    names = [f"{owner.name}/big-{number}" for number in range(12)]
    for name in names:
        owner.push(name.partition("/")[2], save_bert(tmp_path / name, seed=len(name), config=big))
    process = start(hub, tmp_path / "home", *names)
    while process.poll() is None and not _complete(tmp_path / "home"):
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = _complete(tmp_path / "home")
    assert 0 < len(before) < len(names)
    hub.requests.clear()
    again = start(hub, tmp_path / "home", *names)
    assert again.communicate()[0].strip() == str(names)
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "model.safetensors" in path]
    assert len(fetched) == len(names) - len(before)


def _complete(home):
    """Weight files that arrived in full."""
    return list(Path(home).glob("hub/models--*/snapshots/*/model.safetensors"))


def test_bad_weights_are_named(owner, tmp_path):
    folder = save_bert(tmp_path / "mood")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    owner.push("mood", folder)
    with pytest.raises(FusionError, match=f"{owner.name}/mood has NaN or Inf in classifier.bias"):
        load_experts([f"{owner.name}/mood"], api=owner.api)
