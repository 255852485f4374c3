"""Client libraries, each in a separate process with an empty HF_HOME."""

from __future__ import annotations

import json
import subprocess

import pytest
from huggingface_hub import HfApi

MODEL = """
import torch
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                    id2label={0: "plain", 1: "ironic"}, label2id={"plain": 0, "ironic": 1})
model = BertForSequenceClassification(config).eval()
ids = torch.arange(10)[None]
"""


CUSTOM = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
class TinyConfig(PretrainedConfig):
    model_type = "tiny-test"
class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()
    def forward(self, x):
        return self.layer(x)
"""


@pytest.mark.slow
def test_transformers_push_and_load(hub, fresh_python, tmp_path):
    """A private model, and one with custom code that keeps loading at its sha after main broke."""
    token = hub.token("pusher")
    api = HfApi(endpoint=hub.endpoint, token=token)
    (tmp_path / "modeling_tiny.py").write_text(CUSTOM)
    push = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from modeling_tiny import TinyConfig, TinyModel
TinyConfig.register_for_auto_class(); TinyModel.register_for_auto_class("AutoModel")
TinyModel(TinyConfig()).push_to_hub("pusher/custom")
model.push_to_hub("pusher/m", private=True)
print(model(ids).logits.tolist())
"""
    pushed = fresh_python(MODEL + push, hub, token=token)
    pinned = api.model_info("pusher/custom").sha
    api.upload_file(repo_id="pusher/custom", path_or_fileobj=b"raise SystemExit", path_in_repo="modeling_tiny.py")
    load = f"""
import torch
from transformers import AutoModel, AutoModelForSequenceClassification
custom = AutoModel.from_pretrained("pusher/custom", revision="{pinned}", trust_remote_code=True)
assert type(custom).__name__ == "TinyModel"
model = AutoModelForSequenceClassification.from_pretrained("pusher/m")
print(model(torch.arange(10)[None]).logits.tolist())
"""
    loaded = fresh_python(load, hub, token=token)
    assert json.loads(loaded.stdout.splitlines()[-1]) == json.loads(pushed.stdout.splitlines()[-1])
    sha = api.model_info("pusher/m").sha
    assert ("GET", f"/pusher/m/resolve/{sha}/model.safetensors", 200) in hub.requests


@pytest.mark.slow
def test_peft_push_and_load_without_xet(hub, fresh_python):
    token = hub.token("adapters")
    push = (
        MODEL
        + """
from peft import LoraConfig, get_peft_model
model.push_to_hub("adapters/base")
base = type(model).from_pretrained("adapters/base")
adapter = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False))
adapter.push_to_hub("adapters/lora")
print(adapter.eval()(ids).logits.tolist())
"""
    )
    pushed = fresh_python(push, hub, token=token, HF_HUB_DISABLE_XET="1")
    load = """
import torch
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained("adapters/lora").eval()
print(model(torch.arange(10)[None]).logits.tolist())
"""
    loaded = fresh_python(load, hub)
    assert json.loads(loaded.stdout.splitlines()[-1]) == json.loads(pushed.stdout.splitlines()[-1])


@pytest.mark.slow
def test_datasets_push_load_and_stream(hub, fresh_python):
    token = hub.token("data")
    push = """
from datasets import Dataset, DatasetDict
rows = {"text": [f"row {n}" for n in range(1000)], "label": [n % 3 for n in range(1000)]}
splits = DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict({k: v[:10] for k, v in rows.items()}))
splits.push_to_hub("data/rows")
"""
    fresh_python(push, hub, token=token)
    load = """
from datasets import load_dataset
print(sum(load_dataset("data/rows", split="train")["label"]), len(load_dataset("data/rows", split="test")))
stream = load_dataset("data/rows", split="train", streaming=True)
print([row["text"] for row in stream.skip(990).take(2)])
"""
    out = fresh_python(load, hub).stdout.splitlines()
    assert out == ["999 10", "['row 990', 'row 991']"]
    assert any(s == 206 and "/datasets/data/rows/resolve/" in p for _, p, s in hub.requests)


@pytest.mark.process
def test_git_clone(hub, tmp_path):
    token = hub.token("git")
    api = HfApi(endpoint=hub.endpoint, token=token)
    api.create_repo("git/m", private=True)
    api.upload_file(repo_id="git/m", path_or_fileobj=b"text\n", path_in_repo="dir/a.txt")
    api.upload_file(repo_id="git/m", path_or_fileobj=b"\0" * 9000, path_in_repo="w.bin")
    api.create_tag("git/m", tag="v1")
    env = {"GIT_TERMINAL_PROMPT": "0", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin"}

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], env=env, capture_output=True, text=True, timeout=60)

    address = f"{hub.endpoint}/git/m"
    assert git("clone", address, str(tmp_path / "no")).returncode != 0
    copy = tmp_path / "copy"
    repo_to_clone = git("clone", address.replace("http://", f"http://git:{token}@"), str(copy))
    assert repo_to_clone.returncode == 0, repo_to_clone.stderr
    assert (copy / "dir/a.txt").read_text() == "text\n"
    assert (copy / "w.bin").read_text().startswith("version https://git-lfs")
    assert git("-C", str(copy), "rev-parse", "HEAD", "v1").stdout.split() == [api.model_info("git/m").sha] * 2
    assert git("-C", str(copy), "fsck", "--strict").returncode == 0
