"""Publishing a fused model: uploaded files, refusals, and interrupted pushes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from tiny_experts import SIZES, save_adapter, save_bert
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTImageProcessor

import hf_fusion
from hf_fusion.cards.card import BEGIN, END
from hf_fusion.cards.facts import facts_from_json
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse, load_fused, save_fused
from hf_fusion.publishing.plan import plan
from hf_fusion.publishing.publish import publish
from hf_fusion.publishing.push import push
from hf_fusion.recipe import Recipe, RecipeExpert

TEXTS = ["good film", "bad bad film"]
RESULTS = {
    "dataset": {"name": "Moods", "type": "me/moods", "split": "test"},
    "n": 1000,
    "metric": "accuracy",
    "systems": [{"name": "FoE", "kind": "foe", "score": 0.9, "ci95": [0.88, 0.92], "cost": 1.0}],
}
WITHOUT_PACKAGE = "import sys\nsys.modules['hf_fusion'] = None\n"  # its import fails


@pytest.fixture
def ids(owner, tmp_path):
    """A full expert and an adapter, on the Hub with their licences."""
    owner.push("full", save_bert(tmp_path / "full", card="license: mit"))
    base_sha = owner.push("base", save_bert(tmp_path / "base", auto=AutoModel, card="license: apache-2.0"))
    save_adapter(tmp_path / "yes-no", tmp_path / "base", base_name=f"{owner.name}/base", revision=base_sha)
    (tmp_path / "yes-no" / "README.md").write_text("---\nlicense: mit\n---\n")
    owner.push("yes-no", tmp_path / "yes-no")
    return [f"{owner.name}/full", f"{owner.name}/yes-no"]


@pytest.fixture
def fused(owner, ids, tmp_path):
    """A folder with a fused model."""
    torch.manual_seed(0)
    return save_fused(fuse("foe", ids, api=owner.api), tmp_path / "fused")


def commits(owner, repo):
    return [commit.title for commit in owner.api.list_repo_commits(repo)]


def test_published_model_loads_anywhere(hub, owner, fused, fresh_python):
    done = publish(fused, f"{owner.name}/mood", results=RESULTS, api=owner.api)
    assert done.private
    model, recipe = load_fused(fused)
    with torch.no_grad():
        expected = model(**model.processor(TEXTS)).logits.tolist()
    out = fresh_python(
        WITHOUT_PACKAGE + "import json\nfrom transformers import AutoModelForSequenceClassification, AutoProcessor\n"
        f"where = dict(revision={done.sha!r}, trust_remote_code=True)\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({done.repo_id!r}, **where)\n"
        f"inputs = AutoProcessor.from_pretrained({done.repo_id!r}, **where)({TEXTS!r})\n"
        "print('logits', json.dumps(model(**inputs).logits.tolist()))\n",
        hub,
        hub.token(owner.name),
    ).stdout
    assert json.loads(out.rpartition("logits ")[2]) == expected  # bitwise: JSON keeps every digit
    remote = owner.api.hf_hub_download(done.repo_id, "fusion.yaml", revision=done.sha)
    assert Recipe.load(remote) == recipe


def test_card_pins_the_weights_and_its_usage_runs(hub, owner, fused, fresh_python):
    done = publish(fused, f"{owner.name}/mood", results=RESULTS, api=owner.api)
    card = ModelCard(Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text())
    assert pinned_revision(str(card)) == done.sha
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == [f"{owner.name}/{name}" for name in ("full", "yes-no", "base")]
    assert card.data.eval_results[0].metric_value == 0.9
    out = fresh_python(WITHOUT_PACKAGE + usage_code(str(card)), hub, hub.token(owner.name)).stdout
    assert out.count("\n") == 2  # the model's answer and the pipeline's
    info = owner.api.model_info(done.repo_id)
    assert {"hf-fusion", "merge", "foe", f"base_model:merge:{owner.name}/full"} <= set(info.tags)
    assert info.pipeline_tag == "text-classification"


def test_second_run_changes_nothing(owner, fused):
    repo = f"{owner.name}/mood"
    first = publish(fused, repo, api=owner.api)
    before = commits(owner, repo)
    assert before[:2] == ["Pin the card to the weights", "Publish a fused model"]
    assert publish(fused, repo, api=owner.api) == first
    model, _ = load_fused(fused)
    assert publish(model, repo, api=owner.api) == first  # the same bytes, from memory
    assert commits(owner, repo) == before


def test_a_new_version(owner, ids, fused):
    repo = f"{owner.name}/mood"
    first = publish(fused, repo, results=RESULTS, api=owner.api)
    owner.api.upload_file(repo_id=repo, path_in_repo="notes.txt", path_or_fileobj=b"mine")
    owner.api.upload_file(repo_id=repo, path_in_repo="model-00001-of-00002.safetensors", path_or_fileobj=b"stale")
    readme = Path(owner.api.hf_hub_download(repo, "README.md")).read_text()
    written = readme.replace(BEGIN, f"By hand.\n\n{BEGIN}").replace("tags:", "language: de\ntags:")
    owner.api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=written.encode())

    torch.manual_seed(1)
    save_fused(fuse("foe", ids, labels=["yes", "no", "maybe"], api=owner.api), fused, overwrite=True)
    second = publish(fused, repo, api=owner.api)
    assert second.sha != first.sha
    files = owner.api.list_repo_files(repo)
    assert "notes.txt" in files
    assert "model-00001-of-00002.safetensors" not in files
    card = ModelCard(Path(owner.api.hf_hub_download(repo, "README.md")).read_text())
    assert pinned_revision(str(card)) == second.sha
    assert card.text.lstrip().startswith("By hand.")
    assert card.data.to_dict()["language"] == "de"
    assert not card.data.eval_results  # the old results went with the old weights


def test_a_card_beside_the_model_survives(owner, fused):
    (fused / "README.md").write_text(f"---\nwidget: []\n---\nIntro.\n\n{BEGIN}\n{END}\n")
    done = publish(fused, f"{owner.name}/mood", api=owner.api)
    card = Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text()
    assert "Intro." in card
    assert "widget: []" in card
    assert (fused / "README.md").read_text().startswith("---\nwidget")  # the folder is only read


def test_plan_sends_nothing(owner, fused):
    (fused / ".env").write_text("HF_TOKEN=hf_secret")
    planned = plan(fused, f"{owner.name}/mood", api=owner.api)
    assert not owner.api.repo_exists(f"{owner.name}/mood")
    summary = planned.summary()
    assert (summary["repo"], summary["visibility"], summary["license"]) == (
        f"{owner.name}/mood (new)",
        "private",
        "apache-2.0",
    )
    assert {"model.safetensors", "config.json", "fusion.yaml", "modeling_foe.py"} <= set(planned.files)
    assert not {".env", "README.md"} & set(planned.files)
    assert planned.megabytes == pytest.approx(sum((fused / name).stat().st_size for name in planned.files) / 1e6)
    assert "An example sentence." in planned.card
    assert publish(fused, f"{owner.name}/mood", confirm=lambda planned: False, api=owner.api) is None
    assert not owner.api.repo_exists(f"{owner.name}/mood")
    assert hf_fusion.publish is publish


def test_visibility(owner, fused, anyone):
    repo = f"{owner.name}/mood"
    assert publish(fused, repo, api=owner.api).private
    assert not publish(fused, f"{repo}-open", private=False, api=owner.api).private
    assert anyone.model_info(f"{repo}-open").id == f"{repo}-open"
    assert publish(fused, repo, private=False, api=owner.api).private  # an existing repo keeps its own
    assert owner.api.model_info(repo).private


@pytest.mark.parametrize("setting", [{"private": True}, {"gated": "manual"}])
def test_closed_experts_do_not_leak(setting, owner, ids, fused):
    owner.api.update_repo_settings(ids[0], **setting)
    with pytest.raises(FusionError, match=f"is public, but .*private or gated experts: {ids[0]}"):
        plan(fused, f"{owner.name}/mood", private=False, api=owner.api)
    assert plan(fused, f"{owner.name}/mood", api=owner.api).private


def test_experts_must_be_pinned_and_there(owner, ids, fused):
    recipe = Recipe.load(fused)
    loose = Recipe("foe", (RecipeExpert(ids[0]), recipe.experts[1]), base=f"{owner.name}/base")
    loose.save(fused / "fusion.yaml")
    with pytest.raises(FusionError, match=f"not pinned to a commit on the Hub: {ids[0]}, {owner.name}/base"):
        plan(fused, f"{owner.name}/mood", api=owner.api)
    recipe.save(fused / "fusion.yaml")
    owner.api.delete_repo(ids[0])
    with pytest.raises(FusionError, match=f"{ids[0]} was not found"):
        plan(fused, f"{owner.name}/mood", api=owner.api)


def test_license_by_hand(owner, ids, fused):
    owner.api.upload_file(repo_id=ids[0], path_in_repo="README.md", path_or_fileobj=b"---\nlicense: gpl-2.0\n---\n")
    model = fuse("foe", ids, api=owner.api)
    with pytest.raises(FusionError, match=r"cannot be combined: .*full \(gpl-2.0\), .*base \(apache-2.0\)") as caught:
        plan(model, f"{owner.name}/mood", api=owner.api)
    assert "--license" in caught.value.hint
    planned = plan(model, f"{owner.name}/mood", license="other", api=owner.api)
    assert planned.license == "other"
    assert "License: other, as stated by who published it." in planned.card
    assert ModelCard(planned.card).data.license == "other"


def test_results_beside_the_model(owner, fused):
    (fused / "results.json").write_text(json.dumps(RESULTS))
    assert "90.0\u00a0(88.0–\u206092.0)" in plan(fused, f"{owner.name}/mood", api=owner.api).card
    (fused / "results.json").write_text(json.dumps({**RESULTS, "systems": [{"name": "FoE"}], "n": None, "dataset": {}}))
    with pytest.raises(FusionError, match=r"results.json: tasks\[0\].name is None, expected a string"):
        plan(fused, f"{owner.name}/mood", api=owner.api)


def test_mistakes(owner, fused, tmp_path, anyone):
    with pytest.raises(FusionError, match="'mood' is not a repo id"):
        plan(fused, "mood", api=owner.api)
    with pytest.raises(FusionError, match="contains no model"):
        plan(tmp_path, f"{owner.name}/mood", api=owner.api)
    with pytest.raises(FusionError) as caught:
        publish(fused, "somebody-else/mood", api=owner.api)
    assert "hf auth login" in caught.value.hint
    with pytest.raises(FusionError) as caught:
        publish(fused, f"{owner.name}/mood", api=anyone)
    assert "hf auth login" in caught.value.hint


def test_concurrent_pushes_lose_nothing(owner, fused):
    """Whoever planned on a state that has passed is told so, and can run it again."""
    repo = f"{owner.name}/mood"
    planned = plan(fused, repo, api=owner.api)

    class Racing(HfApi):
        """A client whose owner pushes from elsewhere between its look and its commit."""

        def create_commit(self, *args, **kwargs):
            owner.api.upload_file(repo_id=repo, path_in_repo="other.txt", path_or_fileobj=os.urandom(8))
            return super().create_commit(*args, **kwargs)

    with pytest.raises(FusionError) as caught:
        push(planned, Racing(endpoint=owner.api.endpoint, token=owner.api.token))
    assert "run the command again" in caught.value.hint
    assert push(planned, owner.api).sha
    assert "other.txt" in owner.api.list_repo_files(repo)


def test_tokens_are_not_shown(owner, fused, caplog, capfd):
    caplog.set_level("DEBUG")
    publish(fused, f"{owner.name}/mood", api=owner.api)
    shown = caplog.text + "".join(capfd.readouterr())
    assert owner.api.token not in shown


@pytest.mark.slow
def test_kill_minus_nine(hub, owner, fused, tmp_path):
    """Ten pushes killed at random moments: the repo holds a whole model or none, and the next push finishes."""
    code = (
        "import sys\nfrom huggingface_hub import HfApi\n"
        "from hf_fusion.publishing.plan import plan\nfrom hf_fusion.publishing.push import push\n"
        f"api = HfApi(endpoint={hub.endpoint!r}, token={owner.api.token!r})\n"
        "planned = plan(sys.argv[1], sys.argv[2], api=api)\nprint('ready', flush=True)\npush(planned, api)\n"
    )

    def start(repo):
        process = subprocess.Popen([sys.executable, "-c", code, str(fused), repo], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process, time.monotonic()

    process, started = start(f"{owner.name}/timed")
    assert process.wait() == 0
    duration = time.monotonic() - started
    rng = random.Random(0)
    expected = {path.name: path.read_bytes() for path in fused.iterdir() if path.is_file()}
    commits_left = []
    for attempt in range(10):
        repo = f"{owner.name}/mood-{attempt}"
        process, _ = start(repo)
        time.sleep(duration * rng.uniform(attempt, attempt + 1) / 10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found, count = "", -1
        while count != (count := len(commits(owner, repo)) if owner.api.repo_exists(repo) else 0):
            # a commit whose request had arrived in full is still finished by the Hub
            found = _state(owner.api, repo, expected, tmp_path / f"look-{attempt}")
        commits_left.append(count)
        assert found == ("whole" if commits_left[-1] > 1 else "none")  # the first commit only creates the repo
        done = publish(fused, repo, api=owner.api)
        assert _state(owner.api, repo, expected, tmp_path / f"then-{attempt}") == "whole"
        assert pinned_revision((tmp_path / f"then-{attempt}" / "README.md").read_text()) == done.sha
    assert min(commits_left) < 3, commits_left  # some were killed early enough to matter


def _state(api, repo, expected, folder):
    """ "none" where a loader finds nothing, "whole" where it finds every byte; anything else fails."""
    if not api.repo_exists(repo) or "config.json" not in api.list_repo_files(repo):
        return "none"
    snapshot_download(repo, endpoint=api.endpoint, token=api.token, local_dir=folder)
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert load_fused(folder)
    return "whole"


@pytest.mark.slow
def test_golden_usage_runs(hub, fresh_python, tmp_path):
    """The usage block of the committed card, on a model of its kind published under its name."""
    golden = (Path(__file__).parents[2] / "model_cards" / "foe.md").read_text(encoding="utf-8")
    facts = facts_from_json(Path(__file__).parents[2] / "model_cards" / "foe.json")
    user = facts.repo_id.partition("/")[0]
    api = HfApi(endpoint=hub.endpoint, token=hub.token(user))
    experts = []
    for number, labels in enumerate(expert.labels for expert in facts.experts[:2]):
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        folder = tmp_path / f"expert-{number}"
        AutoModelForImageClassification.from_config(
            ViTConfig(**SIZES, image_size=8, patch_size=4, **names)
        ).save_pretrained(folder)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        api.create_repo(f"{user}/expert-{number}")
        api.upload_folder(repo_id=f"{user}/expert-{number}", folder_path=folder)
        experts.append(f"{user}/expert-{number}")
    done = publish(fuse("foe", experts, api=api), facts.repo_id, private=False, api=api)
    code = usage_code(golden).replace(facts.revision, done.sha)
    assert f'"{done.repo_id}", "{done.sha}"' in code
    out = fresh_python(WITHOUT_PACKAGE + code, hub).stdout
    answers = {label for expert in facts.experts[:2] for label in expert.labels}
    assert any(label in out.splitlines()[0] for label in answers)
    assert "score" in out.splitlines()[1]
