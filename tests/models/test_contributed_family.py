"""The family in CONTRIBUTING: two files beside the shared ones, saved, pushed, and loaded elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from tiny import TEXTS, bert

import hf_fusion.models
from hf_fusion import Expert

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = re.search(r"## A family\n(.*?)\n## ", CONTRIBUTING, re.DOTALL)
ABC = ["a", "b", "c"]
LOAD = """
import sys
sys.modules["hf_fusion"] = sys.modules["peft"] = None  # as if they were not installed
import torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained("me/soup", trust_remote_code=True)
inputs = transformers.AutoTokenizer.from_pretrained("me/soup")({texts}, return_tensors="pt", padding=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, "{answer}")
model.push_to_hub("me/again")
"""


@pytest.fixture
def soup(tmp_path):
    """The module `modeling_soup`, in a folder with the shared files of `hf_fusion/models`."""
    folder = tmp_path / "kitchen"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for shared in Path(hf_fusion.models.__file__).parent.glob("fused*.py"):
        shutil.copy(shared, folder)
    for name in ("configuration_soup.py", "modeling_soup.py"):
        content = re.search(rf"```python\n(# {name}\n.*?)```", SECTION[1], re.DOTALL)[1]
        (folder / name).write_text(content, encoding="utf-8")
    sys.path.insert(0, str(tmp_path))
    try:
        yield import_module("kitchen.modeling_soup")
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "kitchen"]:
            del sys.modules[name]


@pytest.fixture
def experts(tokenizer) -> list[Expert]:
    return [Expert(f"me/{seed}", bert(ABC, seed=seed), processor=tokenizer, labels=ABC) for seed in range(3)]


def test_equals_the_mean_of_experts_and_round_trips(soup, experts, tokenizer, tmp_path):
    model = soup.SoupModel.from_experts(experts)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    plain = bert(ABC)
    states = [expert.model.state_dict() for expert in experts]
    plain.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    wanted = plain.eval()(**inputs).logits
    assert torch.equal(model(**inputs).logits, wanted)

    model.save_pretrained(tmp_path / "saved")
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert {"configuration_soup.py", "modeling_soup.py", "fused.py", "fused_config.py"} <= code
    assert not any(
        re.search(r"^\s*(from|import) hf_fusion", (tmp_path / "saved" / name).read_text(), re.M) for name in code
    )
    recipe = yaml.safe_load((tmp_path / "saved" / "fusion.yaml").read_text())
    assert recipe == {"method": "soup", "experts": ["me/0", "me/1", "me/2"], "parameters": {}}
    loaded = soup.SoupModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(**inputs).logits, wanted)
    assert loaded.processor(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert loaded.summary()["experts"] == ["me/0", "me/1", "me/2"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("head", "causal-lm", r"head is 'causal-lm'; it must be one of sequence-classification, image-classification"),
        ("experts", [{"name": "me/0", "labels": []}] * 2, r"experts\[0\].name is 'me/0'; .*another name for each"),
        ("format_version", 2, "saved by a newer hf_fusion"),
        ("backbone", {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 10**6}, "num_hidden_layers is"),
    ],
)
def test_a_wrong_config_is_refused_by_name(field, value, reason, soup, experts, tmp_path):
    soup.SoupModel.from_experts(experts).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(ValueError, match=reason):
        soup.SoupModel.from_pretrained(tmp_path / "saved")


def test_experts_that_differ_are_refused_by_name(soup, experts):
    other = Expert("me/wide", bert([*ABC, "d"]), labels=[*ABC, "d"])
    with pytest.raises(ValueError, match="me/wide is not a full model like me/0"):
        soup.SoupModel.from_experts([*experts, other])


@pytest.mark.slow  # a fresh process takes ten seconds
def test_fresh_process_gives_bitwise_equal_outputs(soup, experts, tokenizer, hub, fresh_python, tmp_path):
    model = soup.SoupModel.from_experts(experts)
    with torch.no_grad():
        wanted = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    api = HfApi(endpoint=hub.endpoint, token=hub.token("me"))
    model.save_pretrained(tmp_path / "saved")
    api.create_repo("me/soup")
    api.upload_folder(repo_id="me/soup", folder_path=tmp_path / "saved")
    code = LOAD.format(texts=TEXTS, answer=tmp_path / "answer.pt")
    fresh_python(code, hub, token=api.token)
    assert torch.equal(torch.load(tmp_path / "answer.pt"), wanted)
    (tmp_path / "answer.pt").unlink()
    fresh_python(code.replace("me/soup", "me/again"), hub, token=api.token)  # its code and tokenizer travelled on
    assert torch.equal(torch.load(tmp_path / "answer.pt"), wanted)
