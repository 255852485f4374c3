"""Deploying the project's apps to the embedded Hub."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from packaging.requirements import Requirement

from hf_fusion import FusionError
from hf_fusion.cli.app import build_parser
from hf_fusion.hub.readme import read_metadata
from hf_fusion.io.yaml_files import parse_yaml
from hf_fusion.publishing import space
from hf_fusion.publishing.space import app_names, deploy_space, pinned, plan_space

SPACES = Path(__file__).parents[2] / "spaces"
CONSTRAINTS = SPACES.parent / "constraints.txt"


@pytest.fixture
def owner(hub, request) -> tuple[str, HfApi]:
    name = f"deploy-{abs(hash(request.node.name)) % 10**8}"
    return name, HfApi(endpoint=hub.endpoint, token=hub.token(name))


@pytest.mark.parametrize("name", app_names())
def test_a_deployed_app_has_all_files_and_pinned_requirements(owner, hub, tmp_path, name):
    user, api = owner
    planned = plan_space(name, f"{user}/{name}", api=api)
    assert not api.repo_exists(f"{user}/{name}", repo_type="space")  # a plan only reads
    deployed = deploy_space(planned, api)
    info = api.space_info(f"{user}/{name}", revision=deployed.sha)
    assert info.private and info.sdk == "gradio"
    folder = Path(snapshot_download(f"{user}/{name}", repo_type="space", local_dir=tmp_path / name, token=api.token,
                                    endpoint=hub.endpoint))  # fmt: skip
    app = SPACES / name
    for path in (path for path in app.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        sent = (folder / path.relative_to(app)).read_bytes()
        assert sent == path.read_bytes() or path.name == "requirements.txt"
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines == [f"{each.name}=={metadata.version(each.name).partition('+')[0]}"
                     for each in map(Requirement, (app / "requirements.txt").read_text().splitlines())]  # fmt: skip


def test_apps_name_the_gradio_that_they_are_tested_with():
    [gradio] = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("gradio==")]
    for name in app_names():
        assert read_metadata((SPACES / name / "README.md").read_text())["sdk_version"] == gradio.removeprefix(
            "gradio=="
        ), name


def test_the_model_is_pinned_and_its_code_runs_by_consent(owner):
    user, api = owner
    api.create_repo(f"{user}/model")
    sha = api.upload_file(
        repo_id=f"{user}/model", path_in_repo="config.json", path_or_fileobj=json.dumps({"model_type": "foe"}).encode()
    ).oid
    quiet = plan_space("foe", f"{user}/quiet", model=f"{user}/model", api=api)
    assert quiet.variables == {"MODEL_ID": f"{user}/model", "MODEL_REVISION": sha}
    deploy_space(plan_space("foe", f"{user}/app", model=f"{user}/model@main", trust_remote_code=True, api=api), api)
    variables = {key: each.value for key, each in api.get_space_variables(f"{user}/app").items()}
    assert variables == {"MODEL_ID": f"{user}/model", "MODEL_REVISION": sha, "TRUST_REMOTE_CODE": "true"}
    assert api.space_info(f"{user}/app").card_data["models"] == [f"{user}/model"]
    with pytest.raises(
        FusionError, match=f"the Space wemoe shows models of type wemoe, and {user}/model is of type foe"
    ):
        plan_space("wemoe", f"{user}/app", model=f"{user}/model", api=api)
    with pytest.raises(FusionError, match="the Space leaderboard shows no model"):
        plan_space("leaderboard", f"{user}/app", model=f"{user}/model", api=api)
    with pytest.raises(FusionError, match=f"{user}/none was not found"):
        plan_space("foe", f"{user}/app", model=f"{user}/none", api=api)
    with pytest.raises(FusionError, match="none is named"):
        plan_space("foe", f"{user}/app", trust_remote_code=True, api=api)


def test_files_of_a_space_are_replaced_only_when_asked(owner):
    user, api = owner
    repo = f"{user}/app"
    api.create_repo(repo, repo_type="space", space_sdk="gradio")
    deploy_space(plan_space("leaderboard", repo, api=api), api)  # an empty Space is filled
    api.upload_file(repo_id=repo, repo_type="space", path_in_repo="mine.py", path_or_fileobj=b"x = 1\n")
    with pytest.raises(FusionError, match=f"the Space {repo} has files already") as refused:
        plan_space("leaderboard", repo, api=api)
    assert refused.value.hint == "--overwrite replaces them"
    planned = plan_space("foe", repo, overwrite=True, api=api)
    assert "mine.py" in planned.removed and "board.js" in planned.removed
    deploy_space(planned, api)
    assert set(api.list_repo_files(repo, repo_type="space")) == {".gitattributes", *planned.files}
    assert not plan_space("foe", repo, overwrite=True, api=api).removed


def test_requirements_that_this_environment_does_not_meet_are_refused():
    version = metadata.version("pyyaml")
    assert pinned("pyyaml>=5.0\n") == f"pyyaml=={version}\n"
    with pytest.raises(FusionError, match=f"the Space requires pyyaml<5, but {version} is installed"):
        pinned("pyyaml<5")
    with pytest.raises(FusionError, match="no-such-library is not installed, so it cannot be pinned"):
        pinned("no-such-library>=1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sdk_version": None}, "does not set sdk_version"),
        ({"license": ""}, "does not set license"),
        ({"sdk": "static"}, "has no app.py of gradio"),
        ({"app_file": "main.py"}, "has no main.py of gradio"),
        ({"sdk_version": 6.31}, "the sdk_version 6.31 of the Space made is not a version"),
    ],
)
def test_front_matter_is_checked(change, message):
    given = {"title": "A", "sdk": "gradio", "sdk_version": "6.31.0", "app_file": "app.py", "license": "mit"}
    space.check_front_matter("made", given, {"app.py": b""})
    with pytest.raises(FusionError, match=message):
        space.check_front_matter("made", {**given, **change}, {"app.py": b""})


def test_an_unknown_app_is_refused_with_the_nearest(owner):
    user, api = owner
    with pytest.raises(FusionError, match="there is no Space 'fo'") as refused:
        plan_space("fo", f"{user}/app", api=api)
    assert "foe" in refused.value.hint


def test_the_workflow_deploys_every_app_by_a_command_that_parses():
    workflow = parse_yaml((SPACES.parent / ".github" / "workflows" / "spaces.yml").read_text(), "spaces.yml")
    job = workflow["jobs"]["deploy"]
    assert job["strategy"]["matrix"]["space"] == app_names()
    command = job["steps"][-1]["run"].replace("${{ matrix.space }}", "foe")
    args = build_parser("spaces").parse_args(command.split()[1:])
    assert (args.app, args.repo, args.public, args.overwrite, args.yes) == ("foe", "hf-fusion/foe", True, True, True)
