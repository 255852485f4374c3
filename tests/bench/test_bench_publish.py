"""Results pushed to the embedded Hub over HTTP: read by load_dataset, and shown in the cards of fused models."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from made_cells import METHODS, cell, made_cells

from hf_fusion.bench.cells import Cell, read_cells, write_lines
from hf_fusion.bench.pages import README_SECTION
from hf_fusion.bench.publish import plan_results, push_results
from hf_fusion.cli.app import main
from hf_fusion.errors import FusionError

pytestmark = pytest.mark.long  # each runs whole benchmarks

_numbers = itertools.count()
MODEL_CARD = """---
pipeline_tag: text-classification
model-index:
- name: Mine
  results:
  - task: {type: text-classification}
    dataset: {type: glue, name: SST-2}
    metrics: [{type: accuracy, value: 0.5}]
---
By hand.
"""


@pytest.fixture
def api(hub) -> HfApi:
    """A client of a user of its own."""
    return HfApi(endpoint=hub.endpoint, token=hub.token(f"bench{next(_numbers)}"))


@pytest.fixture
def me(api) -> str:
    return api.whoami()["name"]


@pytest.fixture
def cells() -> list[Cell]:
    """Cells whose parameters have keys and types of their own, one of them failed."""
    methods = {name: METHODS[name] for name in ("pretrained", "ties", "wemoe", "individual")}
    made = made_cells(tasks=2, seeds=1, tuned=("ties",), methods=methods)
    own = cell("slerp", "task-1", 0.5, parameters={"t": [0.1, 0.9], "deep": {"x": None}}, shas={"a/b": "1"})
    return [*made, own, cell("slerp", "task-2", None, parameters={"t": "one"})]


def readme(api: HfApi, repo: str, kind: str = "dataset") -> str:
    return Path(api.hf_hub_download(repo, "README.md", repo_type=kind)).read_text()


def rounded(text: str):
    """JSON with floats of nine digits: the parser that datasets uses inside of columns spares the last ones."""
    return json.loads(text, parse_float=lambda number: round(float(number), 9))


def commits(api: HfApi, repo: str, kind: str = "dataset") -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo, repo_type=kind)]


def test_command_publishes_a_dataset_that_loads(hub, api, me, cells, fresh_python, tmp_path):
    write_lines(tmp_path / "cells.jsonl", cells)
    words = ["bench", "publish", str(tmp_path / "cells.jsonl"), f"{me}/results"]
    out = fresh_python(
        "import json\nfrom hf_fusion.cli.app import main\n"
        f"assert main({[*words, '--dry-run']}) == 0\n"
        "from huggingface_hub import HfApi\n"
        f"assert not HfApi().repo_exists({words[-1]!r}, repo_type='dataset')\n"
        f"assert main({words}) == 0\n"
        "from datasets import load_dataset\n"
        f"print('rows', json.dumps(list(load_dataset({words[-1]!r}, split='train'))))",
        hub,
        api.token,
    ).stdout
    assert f"{me}/results (new)" in out
    read = rounded(out.rpartition("rows ")[2])
    ordered = sorted(cells, key=lambda one: one.path)
    assert read == [rounded(json.dumps(asdict(one))) for one in ordered]
    assert Cell.from_dict(read[0]) == ordered[0]
    local = Path(api.hf_hub_download(words[-1], "cells.jsonl", repo_type="dataset"))
    assert read_cells(local) == ordered
    summary = json.loads(Path(api.hf_hub_download(words[-1], "leaderboard.json", repo_type="dataset")).read_text())
    assert summary["suites"][0]["name"] == "made"


def test_the_card_is_a_data_sets_and_shows_the_report(api, me, cells):
    done = push_results(plan_results(cells, f"{me}/results", api=api), api)
    info = api.dataset_info(done.repo_id)
    assert info.private
    assert {"hf-fusion", "fusionbench"} <= set(info.tags)
    card = DatasetCard(readme(api, done.repo_id))
    assert card.data.license == "apache-2.0"
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "cells.jsonl"}]
    assert "| WEMoE | **" in card.text
    assert f'load_dataset("{done.repo_id}", split="train")' in card.text
    files = api.list_repo_files(done.repo_id, repo_type="dataset")
    assert "(pictures/made-cost.png)" in card.text
    assert "pictures/made-cost.png" in files


def test_second_run_keeps_other_changes(api, me, cells):
    repo = f"{me}/results"
    first = push_results(plan_results(cells, repo, api=api), api)
    before = commits(api, repo)
    again = plan_results(cells, repo, api=api)
    assert again.summary()["changed"] == []
    assert push_results(again, api) == first
    assert commits(api, repo) == before
    edited = readme(api, repo).replace("license: apache-2.0", "license: cc-by-4.0\nlanguage: de")
    edited = edited.replace(f"<!-- {README_SECTION}:begin", f"By hand.\n\n<!-- {README_SECTION}:begin")
    api.upload_file(repo_id=repo, repo_type="dataset", path_in_repo="README.md", path_or_fileobj=edited.encode())
    fewer = [one for one in cells if one.method == "ties"]  # without experts there is nothing to be normalised to
    with pytest.raises(FusionError, match=f"{repo} has {len(cells) - len(fewer)} cells that are not among these"):
        plan_results(fewer, repo, api=api)
    planned = plan_results(fewer, repo, overwrite=True, api=api)
    assert planned.stale == ("pictures/made-normalised.png",)
    push_results(planned, api)
    card = DatasetCard(readme(api, repo))
    assert (card.data.license, card.data.language) == ("cc-by-4.0", "de")
    assert "By hand." in card.text
    assert "WEMoE" not in card.text
    assert "pictures/made-normalised.png" not in api.list_repo_files(repo, repo_type="dataset")
    assert len(commits(api, repo)) == len(before) + 2  # the edit, and one commit of ours


def test_conflicting_push_changes_nothing(api, me, cells):
    repo = f"{me}/results"
    push_results(plan_results(cells, repo, api=api), api)
    planned = plan_results(cells[:8], repo, overwrite=True, api=api)
    api.upload_file(repo_id=repo, repo_type="dataset", path_in_repo="notes.txt", path_or_fileobj=b"x")
    before = commits(api, repo)
    with pytest.raises(FusionError):
        push_results(planned, api)
    assert commits(api, repo) == before


def test_unrelated_dataset_repo_is_refused(api, me, cells):
    repo = f"{me}/mine"
    api.create_repo(repo, repo_type="dataset")
    api.upload_file(repo_id=repo, repo_type="dataset", path_in_repo="pictures/cat.png", path_or_fileobj=b"png")
    with pytest.raises(FusionError, match=f"{repo} is not a data set of benchmark results"):
        plan_results(cells, repo, api=api)


def test_the_numbers_of_a_method_get_into_its_models_card_once(api, me, cells):
    for name, card in (("ties", MODEL_CARD), ("bare", "")):
        api.create_repo(f"{me}/{name}")
        if card:
            api.upload_file(repo_id=f"{me}/{name}", path_in_repo="README.md", path_or_fileobj=card.encode())
    models = {"ties:tuned": f"{me}/ties", "wemoe": f"{me}/bare"}
    done = push_results(plan_results(cells, f"{me}/results", models, api=api), api)
    card = ModelCard(readme(api, f"{me}/ties", "model"))
    assert card.text.strip() == "By hand."
    other, *own = card.data.eval_results
    assert (card.data.model_name, other.dataset_name, other.metric_value) == ("Mine", "SST-2", 0.5)
    wanted = [one for one in cells if (one.method, one.variant) == ("ties", "tuned")]
    assert [result.metric_value for result in own] == [round(one.score, 4) for one in wanted]
    assert [result.dataset_type for result in own] == ["task-1", "task-2"]
    assert {result.source_url for result in own} == {f"{api.endpoint}/datasets/{me}/results"}
    assert ModelCard(readme(api, f"{me}/bare", "model")).data.model_name == "bare"
    assert done.models[f"{me}/ties"] == api.model_info(f"{me}/ties").sha
    before = commits(api, f"{me}/ties", "model")
    assert push_results(plan_results(cells, f"{me}/results", models, api=api), api) == done
    assert commits(api, f"{me}/ties", "model") == before


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"slerp:tuned": "bare"}, "no scores for slerp:tuned"),
        ({"ties": "nowhere"}, "nowhere"),
        ({"ties": "bare", "wemoe": "bare"}, "several methods"),
        ({"ties": "odd"}, "model-index"),
    ],
)
def test_invalid_push_stops_before_any_upload(api, me, cells, models, message):
    api.create_repo(f"{me}/bare")
    api.create_repo(f"{me}/odd")
    odd = b"---\nmodel-index: [three]\n---\n"
    api.upload_file(repo_id=f"{me}/odd", path_in_repo="README.md", path_or_fileobj=odd)
    with pytest.raises(FusionError, match=message):
        plan_results(cells, f"{me}/results", {method: f"{me}/{repo}" for method, repo in models.items()}, api=api)
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(f"{me}/results")


def test_a_method_of_two_suites_is_refused(api, me, cells):
    api.create_repo(f"{me}/ties")
    more = [*cells, cell("ties", "a", 0.5, suite="other")]
    with pytest.raises(FusionError, match="made, other"):
        plan_results(more, f"{me}/results", {"ties": f"{me}/ties"}, api=api)


@pytest.mark.parametrize("word", ["ties", "=me/ties", "ties=somewhere"])
def test_words_that_name_no_method_and_model_are_refused(word, cells, tmp_path, capsys):
    write_lines(tmp_path / "cells.jsonl", cells)
    assert main(["bench", "publish", str(tmp_path / "cells.jsonl"), "me/results", "--models", word]) == 2
    assert "METHOD=OWNER/NAME" in capsys.readouterr().err
