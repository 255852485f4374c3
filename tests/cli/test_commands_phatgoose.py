"""The commands and the examples on tiny adapters with gates, from discovery to a published router."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from cli.conftest import told
from datasets import Dataset
from huggingface_hub import HfApi
from quick_python import run_python
from tiny_routed import save_base, save_lora

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.results import Results

GATES = """\
import sys

from hf_fusion import push_gates, train_gates
from hf_fusion.data import load_rows

adapter, data = sys.argv[1:]
gates = train_gates(adapter, load_rows(data), steps=100, batch_size=8)
before, after = gates.facts["loss_before"], gates.facts["loss_after"]
print(f"gates of {len(gates.vectors)} linear layers, loss {before:.3f} → {after:.3f}")

pushed = push_gates(gates, adapter)
print(f"pushed to {pushed.repo_id} at {pushed.sha[:10]}")
"""
ROUTE = """\
import sys

from hf_fusion import check_compatibility, discover, fuse, publish

base, author, repo = sys.argv[1:]
found = discover(tags="phatgoose-gates", author=author, base_model=base)
verdict = check_compatibility(found, base_model=base, need_gates=True)  # reads configs and headers, no weights
for entry in verdict.rejected:
    print(f"rejected  {entry.info.id:25} {entry.reasons[0]}")

router = fuse("phatgoose", verdict.accepted, top_k=2, base_by_reference=True)  # each at the commit that was looked at
for name in router.experts:
    print(f"routed    {name}")

published = publish(router, repo)  # private; its card pins the commit
print(f"published {published.repo_id} at {published.sha[:10]}")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters with gates and one without, and a folder of test rows."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_base(folder / "base")
    for seed, name in enumerate(["foxes", "dogs"]):
        save_lora(folder / name, str(base), seed)
    save_lora(folder / "bare", str(base), seed=2, gates=False)
    (folder / "rows").mkdir()
    rows = [{"task": "foxes", "expert": "foxes", "prompt": f"the quick fox {i}", "target": "jumps"} for i in range(3)]
    rows += [{"task": "cats", "expert": None, "prompt": f"a lazy cat {i}", "target": "sleeps"} for i in range(2)]
    Dataset.from_list(rows).to_parquet(folder / "rows" / "test.parquet")
    return folder


def test_fuse_and_eval_write_everything_for_the_card(here, folders, tmp_path):
    experts = [str(folders / name) for name in ("foxes", "dogs")]
    here("fuse", "--method", "phatgoose", "--experts", *experts, "--set", "top_k=1", "--output", "fused")
    fused = tmp_path / "fused"
    assert json.loads((fused / "config.json").read_text())["num_experts_per_tok"] == 1
    said = json.loads(here("eval", "fused", "--data", str(folders / "rows"), "--format", "json"))
    results = Results.load(fused / "results.json")
    assert said == json.loads((fused / "results.json").read_text())
    assert [(task.name, task.n, task.owner) for task in results.tasks] == [("foxes", 3, "foxes"), ("cats", 2, None)]
    assert {"base", "PHATGOOSE", "merged", "uniform", "Arrow", "foxes", "dogs", "oracle"} <= {
        predictor.name for predictor in results.predictors
    }
    assert results.settings["top_k"] == 1
    routing = json.loads((fused / "routing.json").read_text())
    assert (routing["tasks"], routing["owners"]) == (["foxes", "cats"], {"foxes": "foxes"})
    assert (fused / "routing.png").stat().st_size > 10_000
    assert "mean, held-in" in here("eval", "fused", "--data", str(folders / "rows"))
    with pytest.raises(FusionError, match="fused was made by phatgoose: it has no fuser"):
        here("fit", "fuser", "fused", "--data", str(folders / "rows" / "test.parquet"))


def test_recipe_reproduces_the_model(here, folders, tmp_path):
    experts = [str(folders / name) for name in ("foxes", "bare")]
    words = ("--set", "missing_gates=arrow", "--set", "temperature=0.5")
    here("fuse", "--method", "phatgoose", "--experts", *experts, *words, "--output", "first")
    recipe = (tmp_path / "first" / "fusion.yaml").read_text()
    assert "missing_gates: arrow" in recipe
    here("fuse", "first", "--output", "second")
    assert (tmp_path / "second" / "fusion.yaml").read_text() == recipe
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_mistake_gives_one_line_and_a_hint(hf_fusion, folders):
    words = ("fuse", "--method", "phatgoose", "--output", "fused", "--experts", str(folders / "foxes"))
    done = hf_fusion(*words, str(folders / "bare"))
    assert done.returncode == 1
    assert done.stdout == ""
    line, hint = told(done.stderr)
    assert line.startswith("Error: bare has no gates: train them with hf_fusion.train_gates, or pass missing_gates=")
    assert hint == "  → hf-fusion fuse --help"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "top_k=3"), "top_k=3, but there are only 2 experts"),
        (("--set", "top_k=many"), "top_k is 'many', expected a whole number"),
        (("--set", "weights=[1, 1]"), "has no parameter 'weights'"),
        (("--set", "base_by_reference=true"), "base_by_reference needs a base with a pinned revision"),
    ],
)
def test_options_are_checked(here, folders, words, message):
    experts = [str(folders / name) for name in ("foxes", "dogs")]
    with pytest.raises(FusionError, match=message):
        here("fuse", "--method", "phatgoose", "--experts", *experts, "--output", "fused", *words)


def test_a_recipe_without_experts_is_named(here, tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: phatgoose\nexperts: []\n")
    with pytest.raises(FusionError, match=r"experts is \[\], expected a list of at least one expert"):
        here("fuse", "recipe.yaml", "--output", "fused")


@pytest.fixture(scope="module")
def kennel(hub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An owner on the Hub with a base, two adapters with gates, one without, and one of an absurd rank."""
    folder = tmp_path_factory.mktemp("kennel")
    api = HfApi(endpoint=hub.endpoint, token=hub.token("kennel"))
    made = [save_base(folder / "base")]
    made += [save_lora(folder / name, "kennel/base", seed) for seed, name in enumerate(["foxes", "dogs"])]
    made += [save_lora(folder / "bare", "kennel/base", seed=2, gates=False)]
    made += [save_lora(folder / "huge", "kennel/base", seed=3, rank=500)]
    for each in made:
        api.create_repo(f"kennel/{each.name}")
        api.upload_folder(repo_id=f"kennel/{each.name}", folder_path=each)
    return "kennel"


def run(hub, tmp_path: Path, *words: str) -> str:
    """What a script prints, run as the owner."""
    done = run_python(
        *words,
        env={
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token("kennel"),
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_scripts_publish_a_router_from_adapters_without_gates(hub, kennel, tmp_path):
    rows = [{"prompt": f"the quick fox {i}", "target": "jumps"} for i in range(8)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    said = run(hub, tmp_path, "-c", GATES, "kennel/bare", "train.parquet")
    assert re.match(r"gates of 4 linear layers, loss [\d.]+ → [\d.]+\npushed to kennel/bare at [0-9a-f]{10}\n", said)

    said = run(hub, tmp_path, "-c", ROUTE, "kennel/base", kennel, "kennel/router")
    assert re.findall(r"^rejected +(\S+) +(\w+): rank 500", said, re.MULTILINE) == [("kennel/huge", "lora")]
    routed = {"kennel/foxes", "kennel/dogs", "kennel/bare"}
    assert set(re.findall(r"^routed +(\S+)$", said, re.MULTILINE)) == routed
    api = HfApi(endpoint=hub.endpoint, token=hub.token("kennel"))
    info = api.model_info("kennel/router")
    assert {"phatgoose", "hf-fusion", *(f"base_model:merge:{name}" for name in routed)} <= set(info.tags)
    published = re.search(r"^published kennel/router at ([0-9a-f]{10})$", said, re.MULTILINE)[1]
    assert published in [commit.commit_id[:10] for commit in api.list_repo_commits("kennel/router")]
