"""The commands on tiny full fine-tunes: fuse, adapt routers, eval, and one-line errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import HfApi
from quick_python import run_python
from tiny import TEXTS, bert, make_tokenizer
from tiny_fused import save_fine_tunes

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.results import Results

WAY = """\
import sys

from hf_fusion import adapt_routers, check_compatibility, discover, evaluate, fuse, publish
from hf_fusion.data import load_rows, split_tasks

base, author, data, repo = sys.argv[1:]
found = discover(author=author, base_model=base)
verdict = check_compatibility(found, base_model=base, merging=True)  # reads configs and headers, no weights
for entry in verdict.rejected:
    print(f"rejected  {entry.info.id:25} {entry.reasons[0]}")

model = fuse("wemoe", verdict.accepted, base=base)  # each at the commit that was looked at
suite, owners = split_tasks(load_rows(data, "train"), model.experts)
adapt_routers(model, {owners[task]: rows for task, rows in suite.items()}, steps=100, learning_rate=1e-3)

suite, owners = split_tasks(load_rows(data, "test"), model.experts)
results = evaluate(model, suite, experts=verdict.accepted, base=base, owners=owners)
for predictor in results.predictors:
    print(f"{predictor.name:20} {predictor.means['held-in']}")

published = publish(model, repo, results=results)  # private; its card pins the commit
print(f"published {published.repo_id} at {published.sha[:10]}")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, two fine-tunes of it, and rows of their tasks."""
    folder = tmp_path_factory.mktemp("fine-tunes")
    save_fine_tunes(folder)
    rows = [
        {"task": ("foxes", "dogs")[i % 2], "text": f"{text} {i}", "label": i % 2} for i in range(8) for text in TEXTS
    ]
    (folder / "rows").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "rows" / "test.parquet")
    Dataset.from_list([{k: v for k, v in row.items() if k != "label"} for row in rows]).to_parquet(
        folder / "rows" / "train.parquet"
    )
    return folder


def test_a_new_fit_replaces_the_earlier_one(here, folders, tmp_path):
    fused(here, folders)
    words = ("fit", "routers", "fused", "--data", str(folders / "rows"), "--steps", "4", "--batch-size", "4")
    here(*words)
    once = (tmp_path / "fused" / "model.safetensors").read_bytes()
    here(*words, "--seed", "1", "--overwrite")
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() != once
    here(*words, "--overwrite")
    assert (tmp_path / "fused" / "model.safetensors").read_bytes() == once


def fused(here, folders) -> None:
    experts = [str(folders / name) for name in ("foxes", "dogs")]
    here("fuse", "--method", "wemoe", "--experts", *experts, "--base", str(folders / "base"), "--output", "fused")


@pytest.mark.long
def test_fuse_fit_and_eval_write_everything_for_the_card(here, folders, tmp_path):
    fused(here, folders)
    words = ("--loss", "entropy", "--steps", "4", "--batch-size", "4", "--no-guard", "--diversity", "0.5")
    said = here("fit", "routers", "fused", "--data", str(folders / "rows"), *words)
    assert "beyond chance (κ)" in said
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["adaptation"] == {
        "loss": "entropy", "diversity": 0.5, "learning_rate": 0.0005, "batch_size": 4, "steps": 4,
        "rows": {"foxes": 12, "dogs": 12}, "stopped": None,
    }  # fmt: skip
    assert not list(tmp_path.glob("*checkpoints*"))
    assert not list(tmp_path.glob(".*checkpoints*"))
    here("eval", "fused", "--data", str(folders / "rows"))
    results = Results.load(tmp_path / "fused" / "results.json")
    assert [(task.name, task.n, task.owner) for task in results.tasks] == [("foxes", 16, "foxes"), ("dogs", 16, "dogs")]
    names = [predictor.name for predictor in results.predictors]
    assert names == ["WEMoE", "base", "simple average", "task arithmetic", "individual experts"]
    assert results.settings["adaptation"]["steps"] == 4
    found = json.loads((tmp_path / "fused" / "coefficients.json").read_text())
    assert (found["tasks"], found["experts"]) == (["foxes", "dogs"], ["foxes", "dogs"])
    assert (tmp_path / "fused" / "coefficients.png").stat().st_size > 5_000
    assert "deviates" not in said
    with pytest.raises(FusionError, match=r"fused was already adapted and evaluated \(results.json\)"):
        here("fit", "routers", "fused", "--data", str(folders / "rows"))
    assert (tmp_path / "fused" / "results.json").exists()
    labelled = here(
        "fit", "routers", "fused", "--data", str(folders / "rows" / "test.parquet"), "--loss", "labels", "--steps", "2",
        "--format", "json", "--overwrite",
    )  # fmt: skip
    assert json.loads(labelled)["loss"] == "labels"
    assert not (tmp_path / "fused" / "results.json").exists()  # of other routers


def test_mistakes_are_named(here, folders, tmp_path):
    fused(here, folders)
    data = ("--data", str(folders / "rows" / "test.parquet"))
    for words, message in [
        (("fused", *data, "--loss", "labels", "--diversity", "1"), "do not apply to --loss labels"),
        (("fused", *data, "--task-column", "domain"), "no domain"),
        (("fused", *data, "--task-column", "text"), "there is no expert"),
    ]:
        with pytest.raises(FusionError, match=message):
            here("fit", "routers", *words)


@pytest.fixture(scope="module")
def pack(hub, folders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An owner on the Hub with a base, two fine-tunes of it, and a model whose card only says that it is one."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token("pack"))
    made = {name: folders / name for name in ("base", "foxes", "dogs")}
    made["cats"] = tmp_path_factory.mktemp("pack") / "cats"
    bert(["no", "yes"], hidden=16).save_pretrained(made["cats"])
    make_tokenizer().save_pretrained(made["cats"])
    for name, folder in made.items():
        api.create_repo(f"pack/{name}")
        api.upload_folder(repo_id=f"pack/{name}", folder_path=folder)
        card = "---\nlicense: mit\n" + ("" if name == "base" else "base_model: pack/base\n") + "---\n"
        api.upload_file(repo_id=f"pack/{name}", path_in_repo="README.md", path_or_fileobj=card.encode())
    return "pack"


@pytest.mark.slow
def test_a_script_publishes_a_model_of_hub_fine_tunes(hub, folders, pack, tmp_path):
    rows = Dataset.from_parquet(str(folders / "rows" / "test.parquet"))
    rows = rows.add_column("expert", list(rows["task"]))
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "rows" / f"{split}.parquet")
    done = run_python(
        *("-c", WAY, "pack/base", pack, "rows", "pack/merged"),
        env={
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token(pack),
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert re.findall(r"^rejected +(\S+) +(\w+):", said, re.MULTILINE) == [("pack/cats", "shapes")]
    assert re.findall(r"^ *(\S.*?\S) +[\d.]+ \(\d+ to \d+\)$", said, re.MULTILINE) == [
        "WEMoE", "base", "simple average", "task arithmetic", "individual experts",
    ]  # fmt: skip
    api = HfApi(endpoint=hub.endpoint, token=hub.token(pack))
    tags = {"wemoe", "hf-fusion", "base_model:merge:pack/foxes", "base_model:merge:pack/dogs"}
    assert tags <= set(api.model_info("pack/merged").tags)
    published = re.search(r"^published pack/merged at ([0-9a-f]{10})$", said, re.MULTILINE)[1]
    assert published in [commit.commit_id[:10] for commit in api.list_repo_commits("pack/merged")]
