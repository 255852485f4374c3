"""`hf-fusion fit gates` on the adapter of a tiny Llama: saved in its folder, and pushed to its repo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.conftest import told
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import llama, make_tokenizer

from hf_fusion import FusionError, load_experts

FILE = "phatgoose_gates.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base, an adapter of it, and rows to learn from."""
    llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    rows = {"prompt": ["the quick brown", "a stitch in time"] * 4, "target": [" fox", " saves nine"] * 4}
    Dataset.from_dict(rows).to_json(tmp_path / "rows.jsonl")
    Dataset.from_dict({"text": rows["prompt"]}).to_json(tmp_path / "other.jsonl")
    return tmp_path


def save_adapter(folder: Path, base: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def test_gates_go_into_the_adapters_folder(here, place):
    words = ("fit", "gates", "adapter", "--data", "rows.jsonl", "--kind", "paper", "--steps", "12", "--batch-size", "4")
    before = {path.name: path.read_bytes() for path in (place / "adapter").iterdir()}
    done = json.loads(here(*words, "--format", "json"))
    assert done["file"] == str(place / "adapter" / FILE)
    assert (done["gates"], done["steps"], done["examples"]) == (4, 12, 8)
    after = {path.name: path.read_bytes() for path in (place / "adapter").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {FILE}
    (expert,) = load_experts([place / "adapter"])
    assert expert.gates.facts["loss_after"] == done["loss_after"]
    elsewhere = json.loads(here(*words, "--output", "out", "--format", "json"))
    assert elsewhere["loss_after"] == done["loss_after"]
    assert [path.name for path in (place / "out").iterdir()] == [FILE]


def test_gates_are_gaussian_by_default(here, place):
    done = json.loads(here("fit", "gates", "adapter", "--data", "rows.jsonl", "--format", "json"))
    assert (done["gates"], done["examples"]) == (2, 8) and "loss_after" not in done
    (expert,) = load_experts([place / "adapter"])
    assert expert.gates.kind == "gaussian" and len(expert.gates.gaussians) == 2
    here("fuse", "--method", "phatgoose", "--experts", "adapter", "--set", "top_k=1", "--output", "fused")
    config = json.loads((place / "fused" / "config.json").read_text())
    assert [row["gates"] for row in config["experts"]] == ["gaussian"] and len(config["gate_points"]) == 2


def test_average_gates_need_no_training_or_write_access(here, place):
    words = ("adapter", "--data", "rows.jsonl", "--kind", "average", "--output", "gates", "--format", "json")
    assert json.loads(here("fit", "gates", *words))["gates"] == 4
    whitened = ("--reference", "rows.jsonl", "--output", "whitened")
    assert json.loads(here("fit", "gates", *words[:-4], *whitened, "--format", "json"))["gates"] == 4
    with safe_open(place / "whitened" / FILE, "pt") as file:
        assert len(json.loads(file.metadata()["offsets"])) == 4
    assert [path.name for path in (place / "gates").iterdir()] == [FILE]
    chosen = ("--set", "top_k=1", "--set", "missing_gates={adapter: gates}", "--output", "fused")
    here("fuse", "--method", "phatgoose", "--experts", "adapter", *chosen)
    config = json.loads((place / "fused" / "config.json").read_text())
    assert [expert["gates"] for expert in config["experts"]] == ["average"]


@pytest.mark.slow
def test_gates_go_into_the_adapters_repo(hf_fusion, hub, place):
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "home"), "HF_TOKEN": hub.token("gatekeeper")}
    api = HfApi(endpoint=hub.endpoint, token=home["HF_TOKEN"])
    save_adapter(place / "adapter", "gatekeeper/base")
    for name in ("base", "adapter"):
        api.create_repo(f"gatekeeper/{name}")
        api.upload_folder(repo_id=f"gatekeeper/{name}", folder_path=place / name)
    words = ("fit", "gates", "gatekeeper/adapter", "--data", "rows.jsonl", "--push")
    done = hf_fusion(*words, "--format", "json", **home)
    assert done.returncode == 0, done.stderr
    assert len(told(done.stderr)) <= 2, done.stderr  # a hint: no bars and no chatter where nobody watches
    pushed = json.loads(done.stdout)
    assert api.file_exists("gatekeeper/adapter", FILE, revision=pushed["revision"])
    assert [model.id for model in api.list_models(filter="phatgoose-gates", author="gatekeeper")] == [pushed["repo"]]
    assert not (place / "gatekeeper").exists()
    words = (
        "discover",
        "--author",
        "gatekeeper",
        "--tag",
        "phatgoose-gates",
        "--check",
        "--gates",
        "--format",
        "quiet",
    )
    assert hf_fusion(*words, **home).stdout.split() == [f"gatekeeper/adapter@{pushed['revision']}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("me/adapter", "--data", "rows.jsonl"),
            "so the command must say where to save the gates",
        ),
        (("adapter", "--data", "rows.jsonl", "--push"), "adapter is a folder, not a repo"),
        (("adapter", "--data", "other.jsonl"), "no prompt and no target"),
        (("base", "--data", "rows.jsonl"), "base is a full model: only LoRA adapters have gates"),
        (("adapter", "--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
    ],
)
def test_invalid_arguments_are_reported(here, place, words, message):
    with pytest.raises(FusionError, match=message) as error:
        here("fit", "gates", *words)
    assert error.value.hint
    assert not (place / "adapter" / FILE).exists()


@pytest.mark.slow
def test_errors_print_no_traceback(hf_fusion, place):
    done = hf_fusion("fit", "gates", "base", "--data", "rows.jsonl", cwd=place)
    assert (done.returncode, done.stdout) == (1, "")
    assert told(done.stderr)[0] == "Error: base is a full model: only LoRA adapters have gates"
    assert len(told(done.stderr)) == 2
