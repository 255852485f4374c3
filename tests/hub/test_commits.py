"""Forty hex digits are a commit: a Hub that returns a branch of that name is refused."""

import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, hf_hub_download
from tiny_experts import save_adapter, save_bert

from hf_fusion.errors import FusionError
from hf_fusion.fusion import fuse
from hf_fusion.hub.commits import check_commit, download_file
from hf_fusion.hub.compat import check_compatibility
from hf_fusion.hub.discover import discover
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.refs_to_files import repo_ref, resolve_repo
from hf_fusion.hub.remote_files import read_json_file, read_range
from hf_fusion.merging.merge import merge
from hf_fusion.publishing.push_gates import push_gates
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.types import ModelRef, as_commit


class Mistaken:
    """A Hub where a branch that is called like one commit points to another: a proxy of the embedded Hub."""

    def __init__(self, endpoint, asked, given):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                url = endpoint + self.path.replace(asked, given)
                request = urllib.request.Request(url, method=self.command)
                for name in ("Authorization", "Range"):
                    if name in self.headers:
                        request.add_header(name, self.headers[name])
                try:
                    answer = urllib.request.urlopen(request)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    body = answer.read()
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                            self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def shadowed(hub, owner, tmp_path, monkeypatch):
    """A client of a mistaken Hub, a repo there, the commit to ask for, and what the branch of its name points to."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = owner.push("mood", save_bert(tmp_path / "mood", seed=1))
    given = owner.push("mood", save_bert(tmp_path / "mood", seed=2))
    mistaken = Mistaken(hub.endpoint, asked, given)
    yield HfApi(endpoint=mistaken.endpoint, token=owner.api.token), f"{owner.name}/mood", asked, given
    mistaken.server.shutdown()


@pytest.mark.parametrize("form", [str.lower, str.upper])
@pytest.mark.parametrize(
    "ask",
    [
        lambda api, name: resolve_repo(name, api),
        lambda api, name: load_experts([name], api=api),
        lambda api, name: discover(ids=[name], api=api),
        lambda api, name: fuse("foe", [name, name], api=api),
        lambda api, name: fuse("linear", [name, name], api=api),
        lambda api, name: merge(Recipe("linear", (RecipeExpert(name), RecipeExpert(name))), "never", api=api),
    ],
    ids=["resolve", "load", "discover", "fuse", "static", "merge"],
)
def test_branch_named_like_a_commit_is_refused(shadowed, ask, form):
    api, repo, asked, given = shadowed
    with pytest.raises(FusionError, match=f"returned commit {given} instead of {asked}"):
        ask(api, f"{repo}@{form(asked)}")


def test_the_base_that_an_adapter_records(shadowed, owner, tmp_path):
    api, repo, asked, given = shadowed
    save_adapter(
        tmp_path / "adapter", tmp_path / "mood", labels=("a", "b", "c"), base_name=repo, revision=asked.upper()
    )
    sha = owner.push("adapter", tmp_path / "adapter")
    with pytest.raises(FusionError, match=f"returned commit {given} instead of {asked}"):
        load_experts([f"{owner.name}/adapter@{sha}"], api=api)
    verdict = check_compatibility(discover(ids=[f"{owner.name}/adapter"], api=api), api=api)
    assert given in verdict.table()[0]["rejected"]


def test_files_of_another_commit(shadowed):
    """The Hub may be right about a commit, and wrong about a file of it."""
    api, repo, asked, given = shadowed
    for read in (
        lambda: download_file(api, repo, "config.json", asked),
        lambda: read_range(api, repo, "config.json", asked, 0, 10),
        lambda: read_json_file(api, repo, "config.json", asked),
    ):
        with pytest.raises(FusionError, match=f"returned commit {given} instead of {asked}"):
            read()


def test_cached_branch_named_like_a_commit_is_not_trusted(shadowed, owner):
    """The cache keeps a branch that is called like a commit as a ref: what that points to is another commit."""
    api, repo, asked, _ = shadowed
    hf_hub_download(repo, "config.json", revision=asked, endpoint=api.endpoint, token=api.token)
    with pytest.raises(FusionError, match="returned commit"):
        read_json_file(api, repo, "config.json", asked)
    assert read_json_file(owner.api, repo, "config.json", asked)  # asks the right Hub


def test_only_full_hashes_are_commits():
    sha = "0123456789abcdef" * 2 + "01234567"
    assert as_commit(sha) == as_commit(sha.upper()) == sha
    assert repo_ref(f"a/b@{sha.upper()}") == ModelRef("a/b", sha)
    for other in (None, "", "main", sha[:7], sha[:39], f"{sha}0", "refs/pr/1", f"refs/heads/{sha}", "g" * 40):
        assert as_commit(other) is None
        assert check_commit("a/b", other, sha) == sha
    for no_commit in (None, "main", sha[:39], "../../etc", 5, sha.upper()):
        with pytest.raises(FusionError, match="instead of a commit"):
            check_commit("a/b", "main", no_commit)


def test_a_commit_takes_no_gates(owner):
    with pytest.raises(FusionError, match="names a commit, but gates are pushed to a branch"):
        push_gates(None, f"{owner.name}/mood", revision="0" * 40, api=owner.api)
