"""Two real fine-tunes of one base, from a wheel on PyPI: fused, adapted, saved and loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_fusion import FusionError, fuse
from hf_fusion.fusion import load_fused, save_fused

REACTION = "C C O . C C ( = O ) O >> C C O C ( C ) = O"  # an esterification, a token each
NAMES = {"base": "bert_pretrained", "fingerprints": "bert_ft", "classes": "bert_ft_10k_25s"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's three BERTs of reactions (arXiv 2012.06051); their configs are from before ``model_type``."""
    spec = find_spec("rxnfp")  # never imported: its code needs RDKit, its files do not
    assert spec is not None
    assert spec.origin is not None
    shipped = Path(spec.origin).parent / "models" / "transformers"
    folder = tmp_path_factory.mktemp("rxnfp")
    for name, source in NAMES.items():
        shutil.copytree(shipped / source, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    return folder


def fused(folders: Path, **options):
    experts = [folders / "fingerprints", folders / "classes"]
    return fuse(
        "wemoe", experts, base=folders / "base", task="feature-extraction", allow_pickle=True, **options
    )  # fmt: skip


def tokens(folders: Path) -> dict[str, torch.Tensor]:
    vocabulary = (folders / "base" / "vocab.txt").read_text().split("\n")
    words = ["[CLS]", *REACTION.split(), "[SEP]"]
    assert set(words) <= set(vocabulary)
    ids = torch.tensor([[vocabulary.index(word) for word in words]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
def test_two_independent_fine_tunes_fuse_save_and_reload(folders, tmp_path):
    model = fused(folders)
    assert model.experts == ["fingerprints", "classes"]
    assert len(model.units) == 12
    inputs = tokens(folders)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        assert want.isfinite().all()
        for name in model.experts:
            with model.using(name):  # its own MLPs, whatever the rest
                linear = model.backbone.get_submodule("encoder.layer.3.intermediate.dense")
                state = torch.load(folders / name / "pytorch_model.bin", map_location="cpu", weights_only=True)
                own = next(t for k, t in state.items() if k.endswith("encoder.layer.3.intermediate.dense.weight"))
                index = model.experts.index(name)
                torch.testing.assert_close(linear.dense(torch.eye(2)[index]).weight, own, rtol=1e-5, atol=1e-6)
    save_fused(model, tmp_path / "fused")
    with torch.no_grad():
        assert torch.equal(load_fused(tmp_path / "fused")[0](**inputs).last_hidden_state, want)
    torch.save({"inputs": inputs, "want": want}, tmp_path / "case.pt")
    script = (
        "import sys; sys.modules['hf_fusion'] = sys.modules['peft'] = None\n"
        "import torch; from transformers import AutoModel\n"
        f"case = torch.load({str(tmp_path / 'case.pt')!r})\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'fused')!r}, trust_remote_code=True).eval()\n"
        "with torch.no_grad(): print(torch.equal(model(**case['inputs']).last_hidden_state, case['want']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"task_vectors": "low-rank", "rank": 64}, {"task_vectors": "bfloat16"}, {"task_vectors": "sparse"}],
    ids=lambda options: options["task_vectors"],
)  # fmt: skip
def test_other_storages_stay_near_the_exact_one(folders, options):
    inputs = tokens(folders)
    with torch.no_grad():
        exact, other = (fused(folders, **own)(**inputs).last_hidden_state for own in ({}, options))
    near = torch.nn.functional.cosine_similarity(exact, other, dim=-1).min()
    assert near > 0.9
    assert not torch.equal(exact, other)


def test_a_classifier_beside_features_is_named(folders):
    with pytest.raises(FusionError, match="config.json names no architecture"):
        fuse("wemoe", [folders / "fingerprints"], base=folders / "base", allow_pickle=True)
