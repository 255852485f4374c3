"""`hf-fusion bench check` on suites of the Hub, against stand-ins, and on suites that are built locally."""

from __future__ import annotations

import json
import os

import pytest
from huggingface_hub import HfApi
from quick_python import run_python
from standins import fill

from hf_fusion.bench.check import check_suite
from hf_fusion.bench.suite import load_suite
from hf_fusion.server import HubServer

ONLY = ("cola", "rte")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub of its own: the ids are the real ones."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        fill(server, "gpt2-glue", ONLY)
        yield server


def api(hub, user: str | None = None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token(user) if user else False)


def by_source(found) -> dict:
    return {row.source: row for row in found}


def test_every_id_is_there_or_missing(hub):
    found = check_suite(load_suite("gpt2-glue"), api=api(hub))
    assert [row.what for row in found] == ["base"] + ["expert"] * 7 + ["data"]
    rows = by_source(found)
    for source in ("openai-community/gpt2", "tanganke/gpt2_cola", "tanganke/gpt2_rte", "nyu-mll/glue"):
        assert rows[source].status == "there"
        assert len(rows[source].sha) == 40
        assert not rows[source].pinned
    absent = rows["tanganke/gpt2_mnli"]
    assert absent.status == "missing"
    assert "tanganke/gpt2_mnli was not found" in absent.reason
    assert "hf auth login" in absent.hint
    assert [row.status for row in found].count("missing") == 5


def test_checkpoint_shared_by_experts_is_requested_once(hub):
    hub.requests.clear()
    found = check_suite(load_suite("phatgoose-t0"), api=api(hub))
    experts = [row for row in found if row.what == "expert"]
    assert [row.source for row in experts] == [f"r-three/P3_Phatgoose#{number}" for number in range(36)]
    assert {row.status for row in experts} == {"missing"}
    assert len([path for _, path, _ in hub.requests if "P3_Phatgoose" in path]) == 1


def suite_of(tmp_path, **sources):
    experts = "\n".join(f"  {name}: {source}" for name, source in sources.items())
    tasks = "\n".join(f"  {name}: {{data: nyu-mll/glue}}" for name in sources)
    text = f"title: t\nkind: merging\nhead: sequence-classification\nexperts:\n{experts}\ntasks:\n{tasks}\n"
    (tmp_path / "mine.yaml").write_text(text)
    return load_suite(tmp_path / "mine.yaml")


def test_pinned_commits(hub, tmp_path):
    sha = api(hub).model_info("tanganke/gpt2_cola").sha
    suite = suite_of(tmp_path, here=f"tanganke/gpt2_cola@{sha}", gone=f"tanganke/gpt2_rte@{'0' * 40}")
    here, gone, _ = check_suite(suite, api=api(hub))
    assert (here.status, here.sha, here.pinned) == ("there", sha, True)
    assert gone.status == "missing"
    assert "no such revision" in gone.reason
    assert f"tanganke/gpt2_rte@{api(hub).model_info('tanganke/gpt2_rte').sha}" in gone.hint


def test_gated_repos_and_who_may_read_them(hub, tmp_path):
    owner = api(hub, "someone")
    owner.create_repo("someone/gated")
    owner.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="someone/gated")
    owner.update_repo_settings("someone/gated", gated="manual")
    suite = suite_of(tmp_path, gated="someone/gated")
    assert by_source(check_suite(suite, api=owner))["someone/gated"].status == "there"
    refused = by_source(check_suite(suite, api=api(hub, "else")))["someone/gated"]
    assert refused.status == "gated"
    assert "accept the terms" in refused.hint


def test_unreachable_hub(tmp_path):
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=False)
    found = check_suite(suite_of(tmp_path, one="me/one"), api=nowhere)
    assert {row.status for row in found} == {"unreachable"}
    assert "cannot be reached" in found[0].reason
    assert "HF_ENDPOINT" in found[0].hint


def test_missing_cache_entries_name_the_command_that_builds_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path))
    (tmp_path / "merging" / "vision-6" / "mnist").mkdir(parents=True)
    rows = by_source(check_suite(load_suite("vision-6"), tmp_path))
    assert rows["cache:merging/vision-6/mnist"].status == "there"
    assert rows["package:digits"].status == "there"
    base = rows["cache:merging/vision-6/base"]
    assert base.status == "missing"
    assert base.hint.startswith("python examples/train_experts.py --data DIR --suite vision-6")
    assert "--data DIR" in rows["data:mnist"].hint


@pytest.mark.process
def test_the_command(hub, tmp_path):
    def run(*words: str):
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "OMP_NUM_THREADS": "1"}
        return run_python("-m", "hf_fusion.cli", "bench", "check", *words, env=environment, cwd=tmp_path)

    done = run("gpt2-glue", "--format", "json")
    assert done.returncode == 1
    rows = json.loads(done.stdout)
    assert len(rows) == 9
    assert {row["status"] for row in rows} == {"there", "missing"}
    assert "5 of the 9 models and data sets of gpt2-glue are not available" in done.stderr
