"""Two real fine-tunes of one base, from a wheel on PyPI, merged by static methods."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertModel

from hf_fusion import FusionError, Recipe, RecipeExpert, merge

NAMES = {"base": "bert_pretrained", "fingerprints": "bert_ft", "classes": "bert_ft_10k_25s"}
METHODS = {
    "linear": (False, {}),
    "task_arithmetic": (True, {"scaling": 0.5}),
    "slerp": (False, {}),
    "ties": (True, {}),
    "dare_ties": (True, {"seed": 3, "drop_rate": 0.1}),
    "model_stock": (True, {}),
    "karcher": (False, {}),
    "emr": (True, {}),
}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's BERTs of reactions (arXiv 2012.06051), as they are but for the ``model_type`` of their configs."""
    spec = find_spec("rxnfp")  # never imported: its code needs RDKit, its files do not
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path_factory.mktemp("shipped")
    for name, source in NAMES.items():
        shutil.copytree(Path(spec.origin).parent / "models" / "transformers" / source, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    return folder


@pytest.fixture(scope="module")
def folders(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as safetensors: what they ship are pickles."""
    place = tmp_path_factory.mktemp("rxnfp")
    for name in NAMES:
        BertModel.from_pretrained(shipped / name).save_pretrained(place / name)
    return {name: place / name for name in NAMES}


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_merged_without_being_loaded(method, folders, tmp_path):
    takes_base, parameters = METHODS[method]
    experts = tuple(RecipeExpert(str(folders[name])) for name in ("fingerprints", "classes"))
    merge(Recipe(method, experts, str(folders["base"]) if takes_base else None, parameters), tmp_path / "out")
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == weights["base"].keys()
    moved = {name: sum(float((merged[k] - w[k]).square().sum()) for k in merged) ** 0.5 for name, w in weights.items()}
    apart = sum(float((weights["fingerprints"][k] - weights["classes"][k]).square().sum()) for k in merged) ** 0.5
    assert all(0 < distance < apart for name, distance in moved.items() if name != "base"), moved
    model = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert model(torch.arange(12)[None]).last_hidden_state.isfinite().all()


def test_pickles_are_refused_and_heads_are_listed(shipped, tmp_path):
    experts = (RecipeExpert(str(shipped / "fingerprints")), RecipeExpert(str(shipped / "classes")))
    with pytest.raises(FusionError, match="only safetensors are merged"):
        merge(Recipe("linear", experts), tmp_path / "out")
