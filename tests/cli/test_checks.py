"""Mistakes in arguments, folders and file headers are reported within a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_fusion import FusionError
from hf_fusion.data import load_rows, read_columns
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.schema import parameters_of

RUN = """
import sys, time
from hf_fusion.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
heavy = {"torch", "transformers", "datasets", "pandas", "lm_eval"} & set(sys.modules)
print(code, f"{time.process_time():.2f}", *sorted(heavy))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Folders with the configs of models, and files of rows."""
    folder = tmp_path_factory.mktemp("place")
    foe = {"model_type": "foe", "experts": []}
    for name, config in {
        "foe": {**foe, "head": "sequence-classification"},
        "images": {**foe, "head": "image-classification"},
        "selection": {**foe, "mode": "selection", "head": "causal-lm", "vocabularies": [300]},
        "ensemble": {**foe, "rule": "mean"},
        "router": {"model_type": "phatgoose", "head": "causal-lm"},
        "wemoe": {"model_type": "wemoe", "head": "sequence-classification"},
        "merged": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    (folder / "empty").mkdir()
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(folder / "rows.parquet")
    (folder / "rows.csv").write_text('"text","a, b",label\nx,y,0\n')
    (folder / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "label": 1}\n')
    (folder / "broken.parquet").write_text("no parquet")
    (folder / "notes.txt").write_text("words")
    (folder / "split").mkdir()
    (folder / "split" / "train.csv").write_text("text,label\na,0\n")
    (folder / "recipe.yaml").write_text("method: ties\nbase: me/base\nexperts: [me/a, ./gone]\n")
    return folder


ERRORS = {
    "eval missing --data rows.csv": "there is no folder missing",
    "eval empty --data rows.csv": "empty is not a model's folder",
    "eval foe --data gone.parquet": "gone.parquet does not exist",
    "eval foe --data notes.txt": "notes.txt ends in '.txt'",
    "eval foe --data broken.parquet": "broken.parquet cannot be read as parquet",
    "eval foe --data split": "split has no split 'test'",
    "eval foe --data rows.parquet --label-column kind": "rows.parquet has the columns text, label, but no kind",
    "eval foe --data rows.csv --label-column kind": "rows.csv has the columns text, a, b, label, but no kind",
    "eval foe --data rows.jsonl --expert-column who": "rows.jsonl has the columns text, label, but no who",
    "eval foe --data rows.csv --task-column text": "a Fusion of Experts is evaluated on one data set",
    "eval images --data rows.csv": "rows.csv has the columns text, a, b, label, but no image",
    "eval selection --data rows.csv": "rows.csv has the columns text, a, b, label, but no target",
    "eval router --data rows.csv": "rows.csv has the columns text, a, b, label, but no prompt and no target",
    "eval foe --harness x": "foe has the head sequence-classification, but lm-evaluation-harness runs language models",
    "eval merged --harness x": "merged is a BertForSequenceClassification, but lm-evaluation-harness runs language",
    "eval router --harness arc_easy,gone.yaml": "the task file gone.yaml does not exist",
    "eval router --harness rows.csv/": "rows.csv/ is neither a task's YAML file",
    "eval merged --data rows.csv --label-column kind": "but no kind",
    "eval merged --data rows.csv --task-column kind": "but no kind",
    "fit fuser missing --data rows.csv": "there is no folder missing",
    "fit fuser merged --data rows.csv": "merged was made by bert: it has no fuser",
    "fit fuser ensemble --data rows.csv": "ensemble was made by mean: it has no fuser",
    "fit fuser foe --data rows.csv --label-column kind": "but no kind",
    "fit fuser selection --data rows.csv": "but no expert",
    "fit fuser selection --data rows.csv --by loss": "but no target",
    "fit fuser selection --data rows.csv --frugal --fuser mlp": "needs another fuser than mlp",
    "fit gates adapter --data rows.csv": "but no prompt and no target",
    "fit gates me/adapter --data gone.csv --push": "gone.csv does not exist",
    "fit gates ./gone --data rows.csv --output gates": "there is no folder ./gone",
    "fit routers missing --data rows.csv": "there is no folder missing",
    "fit routers foe --data rows.csv": "foe was made by foe: it has no routers",
    "fit routers wemoe --data rows.csv": "but no task",
    "fit routers wemoe --data rows.csv --task-column label --expert-column who": "but no who",
    "fuse missing.yaml -o out": "missing.yaml cannot be read",
    "fuse recipe.yaml -o out": "there is no folder ./gone",
    "fuse --method tise --experts me/a me/b -o out": "there is no method 'tise'|did you mean ties?",
    "fuse --method feo --experts me/a me/b -o out": "there is no method 'feo'|did you mean foe?",
    "fuse --method ties --experts me/a me/b -o out": "ties needs the base of its experts",
    "fuse --method slerp --experts me/a -o out": "slerp merges 2 experts, the recipe has 1",
    "fuse --method linear --experts me/a me/b --set wieght=1 -o out": "no parameter 'wieght'|did you mean weight?",
    "fuse --method ties --base me/c --experts me/a --set density=2 -o out": "density is 2, expected a number from 0",
    "fuse --method foe --experts me/a me/b --set mod=output -o out": "no parameter 'mod'|did you mean mode?",
    "fuse --method wemoe --experts me/a me/b --set scalling=1 -o out": "'scalling'|did you mean scaling?",
    "fuse --method phatgoose --experts me/a me/b --set top_k=two -o out": "phatgoose: top_k is 'two', expected a whole",
    "fuse --method foe --experts me/a me/b --set labels=yes -o out": "foe: labels is True, expected a list of strings",
    "fuse --method ties --base me/c --experts me/a --set density=[ -o out": "--set density is not valid YAML",
    "fuse --method linear --experts me/a me/b --set weights=[1] -o out": "weights is [1], expected a list of 2 numbers",
    "fuse --method foe --experts ./gone me/b -o out": "there is no folder ./gone",
    "fuse --method foe --experts me/a me/b --base /gone -o out": "there is no folder /gone",
    "fuse --method foe --experts me/a me/b --dry-run -o out": "--dry-run works for static merges only",
    "fuse --method foe --experts me/a me/b --push fused -o out": "'fused' is not the name of a repo",
    "publish missing me/fused": "there is no folder missing",
    "publish foe fused": "'fused' is not the name of a repo",
    "bench run --suite minilm": "no suite 'minilm'|did you mean minilm-8?",
    "bench run --suite minilm-8 --methods tise": "no method 'tise'|did you mean ties?",
    "bench run --suite minilm-8 --corruptions tpyos": "no corruption 'tpyos'",
    "bench run --suite minilm-8 --unseen nearby": "no unseen split 'nearby'",
    "bench run --suite minilm-8 --data missing": "there is no folder missing",
    "bench run --suite minilm-8 --methods gone.py": "gone.py does not exist",
    "hub serve hub --port 70000": "argument --port: 70000 must be at most 65535",
    "discover --task text-clasification": "'text-clasification' is not supported|did you mean text-classification?",
    "bench check minilm": "no suite 'minilm'|did you mean minilm-8?",
    "bench report missing": "missing does not exist",
    "bench publish missing me/results": "missing does not exist",
    "demo --real-hub": "this would create about 15 public repos",
    "eval foe": "a model is evaluated on labelled rows or on tasks of the harness",
    "eval foe --data rows.csv --harness x": "a model is evaluated on labelled rows or on tasks of the harness",
    "eval foe --data rows.csv --limit 3": "--limit goes with --harness",
    "eval router --harness x --task-column y": "--task-column goes with --data",
    "eval router --harness x --fewshot -1": "argument --fewshot: -1 must be at least 0",
    "eval foe --data rows.csv --batch-size 0": "argument --batch-size: 0 must be at least 1",
    "fit gates adapter --data rows.csv --learning-rate 0": "argument --learning-rate: 0 must be greater than 0",
    "fuse recipe.yaml -o out --shard-gb inf": "argument --shard-gb: inf is not finite",
    "discover --limit many": "argument --limit: invalid whole number value: 'many'",
}


@pytest.mark.process
@pytest.mark.parametrize("words", ERRORS)
def test_errors_are_reported_before_heavy_imports(words, place):
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words.split()], cwd=place, capture_output=True, text=True, timeout=60
    )
    code, seconds, *heavy = done.stdout.split()
    assert heavy == [], done.stderr
    assert float(seconds) <= 1
    assert code in ("1", "2")
    message, _, hint = ERRORS[words].partition("|")
    error, *told = done.stderr.splitlines()
    assert message in error
    assert hint in "\n".join(told)
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_a_methods_parameters_are_the_same_whether_its_file_is_imported(name):
    method = MERGE_METHODS[name]
    assert method.parameters == parameters_of(method.function)


def test_columns_are_read_from_each_format(place, tmp_path):
    for file in ("rows.parquet", "rows.csv", "rows.jsonl"):
        assert read_columns(place / file) == load_rows(place / file).column_names
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": "b", "label": 1}]')
    assert read_columns(tmp_path / "rows.json") == ["text", "label"]
    assert read_columns(place / "split") == ["text", "label"]
    splits = DatasetDict({"train": Dataset.from_dict({"text": ["a"]}), "test": Dataset.from_dict({"image": ["b"]})})
    splits.save_to_disk(tmp_path / "both")
    splits["test"].save_to_disk(tmp_path / "one")
    assert read_columns(tmp_path / "both", "test") == read_columns(tmp_path / "one") == ["image"]
    with pytest.raises(FusionError, match="has no split 'dev'"):
        read_columns(tmp_path / "both", "dev")
    assert read_columns("me/rows") is None  # only the Hub can tell
