"""`hf-fusion fuse` for static merges, interactive and in scripts, and `eval` of the merged models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.conftest import told
from datasets import Dataset
from huggingface_hub import HfApi
from quick_python import run_python
from safetensors.torch import load_file, save_file
from tiny import TEXTS
from tiny_fused import fine_tuned, save_fine_tunes

from hf_fusion import FusionError, Recipe
from hf_fusion.cards.usage import pinned_revision
from hf_fusion.cli.app import main
from hf_fusion.evaluation.results import Results

DOWNLOAD = f"{sys.executable} -m huggingface_hub.cli.hf download"
WAY = """\
import sys

from hf_fusion import check_compatibility, discover, evaluate, fuse, publish
from hf_fusion.data import load_rows, split_tasks

base, author, data, repo = sys.argv[1:]
experts = check_compatibility(discover(author=author, base_model=base), base_model=base).accepted  # each at its commit
for expert in experts:
    print(f"merged    {expert.id}")
model = fuse("ties", experts, base, density=0.5)  # `hf-fusion fuse` writes the same to a folder, whatever its size

suite, owners = split_tasks(load_rows(data, "test"), [expert.id for expert in experts])
results = evaluate(model, suite, experts=experts, base=base, owners=owners)
single = results.best("expert")
for name, scores in {"merged": results["merged"], "best single": single, "base": results["base"]}.items():
    print(f"{name:20} {scores.means['held-in']}")

published = publish(model, repo, results=results)  # private; loads with transformers, runs no code of its repo
print(f"published {published.repo_id} at {published.sha[:10]}")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, two fine-tunes of it, one with another vocabulary, a recipe and rows."""
    folder = tmp_path_factory.mktemp("fine-tunes")
    base = save_fine_tunes(folder, "---\nlicense: mit\n---\n")
    fine_tuned(base, 2).save_pretrained(folder / "wider")
    tensors = load_file(folder / "wider" / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, folder / "wider" / "model.safetensors", metadata={"format": "pt"})
    text = f"method: ties\nbase: {folder / 'base'}\nexperts: [{folder / 'foxes'}, {folder / 'dogs'}]\n"
    (folder / "recipe.yaml").write_text(f"{text}parameters: {{density: 0.5}}\n")
    rows = [
        {"task": ("foxes", "dogs")[i % 2], "text": f"{text} {i}", "label": i % 2} for i in range(8) for text in TEXTS
    ]
    Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    return folder


@pytest.mark.process
def test_a_recipe_of_folders_imports_neither_peft_nor_datasets(folders, tmp_path):
    """In a real process: what it takes and says, what lies there afterwards, and what was not imported for it."""
    code = (
        "import sys\nfrom hf_fusion.cli.app import main\n"
        "for words in (['--dry-run'], ['--dry-run', '--format', 'json'], []):\n"
        f"    assert main(['fuse', {str(folders / 'recipe.yaml')!r}, '-o', 'merged', *words]) == 0\n"
        "print(sorted(m for m in sys.modules if m in ('peft', 'datasets')))\n"
    )
    done = run_python("-c", code, env=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dry, report, merged = re.split(r"^(\{.*\})$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^Inputs\nmodel +as +tensors +MB\n", dry)
    assert len(re.findall(rf"^{folders}/(base|foxes|dogs) +(base|expert) +\d+ +[\d.]+$", dry, re.MULTILINE)) == 3
    for name in ("method +TIES", r"read_mb +[\d.]+", r"written_mb +[\d.]+", r"peak_memory_mb +\d+", r"seconds +[\d.]+"):
        assert re.search(rf"^  {name}$", dry, re.MULTILINE), name
    facts = json.loads(report)
    assert [row["as"] for row in facts["inputs"]] == ["base", "expert", "expert"]
    assert facts["read_mb"] == pytest.approx(3 * facts["written_mb"], abs=0.2)
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert facts["written_mb"] == pytest.approx(size / 1e6, abs=0.1)
    assert merged.splitlines()[1].startswith("✓ Merged")
    assert merged.splitlines()[-1] == "[]"
    assert "hf-fusion eval merged --data DATA" in done.stderr
    assert "Traceback" not in done.stderr
    assert Recipe.load(tmp_path / "merged").method == "ties"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| density | 0.5 |  |" in card
    assert "license: mit" in card


def test_mismatch_table_names_the_resolving_option(here, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "bert.embeddings.word_embeddings.weight"
    words = ("fuse", "--method", "ties", "--base", str(folders / "base"), "-o", "merged")
    words += ("--experts", str(folders / "foxes"), str(folders / "wider"))
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    lines = told(said.err)
    assert lines[0] == "Error: the models' tensors do not match:"
    assert lines[1].split() == ["tensor", "count", "model", "what", "resolved", "by"]
    row = rf"{name} +1 +{folders}/wider +\[800, 32\] against \[400, 32\] +base \| skip \| resize"
    assert re.fullmatch(row, lines[2])
    assert lines[3].startswith("  → set the parameter mismatch to base or skip or resize")
    assert len(lines) == 4
    assert not list(tmp_path.iterdir())
    here(*words, "--set", "mismatch=resize")
    assert load_file(tmp_path / "merged" / "model.safetensors")[name].shape == (400, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "colour=1"), "ties has no parameter 'colour'"),
        (("--set", "density=2"), "density is 2, expected a number from 0 to 1"),
    ],
)
def test_mistakes_are_named(here, folders, tmp_path, words, message):
    experts = [str(folders / name) for name in ("foxes", "dogs")]
    with pytest.raises(FusionError, match=message):
        here("fuse", "--method", "ties", "--base", str(folders / "base"), "--experts", *experts, "-o", "out", *words)
    with pytest.raises(FusionError, match="no method 'alchemy'") as caught:
        here("fuse", "--method", "alchemy", "--experts", *experts, "-o", "out")
    assert caught.value.hint == "hf-fusion methods lists all"
    with pytest.raises(FusionError, match=r"--set: weights is \[1\], expected a list of 2 numbers"):
        here("fuse", "--method", "linear", "--experts", *experts, "-o", "out", "--set", "weights=[1]")
    assert not list(tmp_path.iterdir())


def test_weights_from_the_command_line(here, folders, tmp_path):
    experts = [str(folders / name) for name in ("foxes", "dogs")]
    here("fuse", "--method", "linear", "--experts", *experts, "-o", "out", "--set", "weights=[1, 3]")
    assert [expert.weight for expert in Recipe.load(tmp_path / "out").experts] == [1.0, 3.0]
    foxes, dogs, out = (load_file(Path(f) / "model.safetensors") for f in (*experts, tmp_path / "out"))
    assert all(torch.allclose(t, 0.25 * foxes[name] + 0.75 * dogs[name], atol=1e-6) for name, t in out.items())


def test_eval_compares_the_merge_to_its_experts(here, folders, tmp_path):
    here("fuse", str(folders / "recipe.yaml"), "-o", "merged")
    shown = here("eval", "merged", "--data", str(folders / "test.parquet"))
    assert "right answers in % on 32 examples" in shown
    results = Results.load(tmp_path / "merged" / "results.json")
    assert [predictor.name for predictor in results.predictors] == ["merged", "foxes", "dogs", "base"]
    assert [(task.name, task.n, task.owner) for task in results.tasks] == [("foxes", 16, "foxes"), ("dogs", 16, "dogs")]
    assert results.settings == {"method": "ties", "density": 0.5}
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| task | n | this model | its own expert | best single expert | base |" in card
    assert "| **merged**: this model |" in card and "| foxes" in card and "| dogs" in card
    assert f"Measured by `hf-fusion eval merged --data {folders}/test.parquet --split test`" in card
    renamed = Dataset.from_parquet(str(folders / "test.parquet")).rename_columns({"label": "kind", "task": "of"})
    renamed.to_parquet(tmp_path / "renamed.parquet")
    here("eval", "merged", "--data", "renamed.parquet", "--label-column", "kind", "--task-column", "of")
    again = Results.load(tmp_path / "merged" / "results.json")
    assert (again.tasks, again.predictors) == (results.tasks, results.predictors)
    assert again.command.endswith("--data renamed.parquet --split test --label-column kind --task-column of")
    results = again
    with pytest.raises(FusionError, match="merged already contains a model: .*results.json"):
        here("fuse", str(folders / "recipe.yaml"), "-o", "merged")
    assert Results.load(tmp_path / "merged" / "results.json") == results
    here("fuse", str(folders / "recipe.yaml"), "-o", "merged", "--overwrite")
    assert not (tmp_path / "merged" / "results.json").exists()  # of another merge
    assert "Not measured: neither" in (tmp_path / "merged" / "README.md").read_text()


def test_pushed_with_its_card(hf_fusion, hub, folders, tmp_path):
    api = HfApi(endpoint=hub.endpoint, token=hub.token("mixer"))
    for name in ("base", "foxes", "dogs"):
        api.create_repo(f"mixer/{name}")
        api.upload_folder(repo_id=f"mixer/{name}", folder_path=folders / name)
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token("mixer")}
    words = ("--base", "mixer/base", "--experts", "mixer/foxes", "mixer/dogs", "-o", "merged", "--push", "mixer/merged")
    refused = hf_fusion("fuse", "--method", "breadcrumbs", *words[:-1], "other/merged", **home)
    assert refused.returncode == 1
    assert "Error: other/merged cannot be created by mixer" in refused.stderr
    assert "without --push, then: hf-fusion publish merged other/merged" in refused.stderr
    assert not (tmp_path / "merged").exists()  # before anything was merged
    done = hf_fusion("fuse", "--method", "breadcrumbs", *words, "--format", "json", **home)
    assert done.returncode == 0, done.stderr
    merged, pushed = map(json.loads, done.stdout.splitlines())
    assert merged["folder"] == str(tmp_path / "merged")
    assert Recipe.load(tmp_path / "merged").unpinned == []
    card = Path(api.hf_hub_download("mixer/merged", "README.md")).read_text()
    assert pinned_revision(card) == pushed["revision"]
    assert "breadcrumbs" in api.model_info("mixer/merged").tags
    assert api.model_info("mixer/merged").private
    typed = "".join(re.findall(r"^```sh\n(.*?)^```", card, re.MULTILINE | re.DOTALL)).replace("\n", " && ")
    typed = typed.partition(" && ")[2].removesuffix(" && ")  # all but what to install
    typed = typed.replace("hf-fusion ", f"{sys.executable} -m hf_fusion.cli ").replace("hf download", DOWNLOAD)
    shutil.rmtree(tmp_path / "merged")
    shutil.copy(folders / "test.parquet", tmp_path / "ROWS.parquet")
    environment = {**os.environ, **home, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", typed], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    again, published = tmp_path / "merged-again", tmp_path / "merged"
    assert (again / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert Results.load(published / "results.json")["merged"].scores


@pytest.mark.slow
def test_a_script_publishes_a_merge_of_hub_fine_tunes(hub, folders, tmp_path):
    api = HfApi(endpoint=hub.endpoint, token=hub.token("blender"))
    for name in ("base", "foxes", "dogs"):
        made_of = "" if name == "base" else "base_model: blender/base\ntags: [hf-fusion-expert]\n"
        api.create_repo(f"blender/{name}")
        api.upload_folder(repo_id=f"blender/{name}", folder_path=folders / name)
        card = f"---\n{made_of}license: mit\n---\n".encode()
        api.upload_file(repo_id=f"blender/{name}", path_in_repo="README.md", path_or_fileobj=card)
    rows = Dataset.from_parquet(str(folders / "test.parquet"))
    rows.add_column("expert", list(rows["task"])).to_parquet(tmp_path / "rows" / "test.parquet")
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token("blender")}
    words = ("blender/base", "blender", "rows", "blender/ties")
    done = run_python("-c", WAY, *words, env={**os.environ, "OMP_NUM_THREADS": "1", **home}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^merged +(blender/\w+)$", done.stdout, re.MULTILINE)) == {"blender/foxes", "blender/dogs"}
    scored = re.compile(r"^ *(\S.*?\S) +[\d.]+ \(\d+ to \d+\)$", re.MULTILINE)
    assert scored.findall(done.stdout) == ["merged", "best single", "base"]
    published = re.search(r"^published blender/ties at ([0-9a-f]{10})$", done.stdout, re.MULTILINE)[1]
    assert published in [commit.commit_id[:10] for commit in api.list_repo_commits("blender/ties")]
    assert "base_model:merge:blender/foxes" in api.model_info("blender/ties").tags
