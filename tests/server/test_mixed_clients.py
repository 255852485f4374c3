"""Many real clients at once: no 500, no acknowledged push lost, each download equal to its push."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from hub_integrity import check
from huggingface_hub import HfApi
from mixed_clients import run

from hf_fusion.server import HubServer


@pytest.mark.process
@pytest.mark.parametrize(
    ("clients", "seconds", "processes"), [(8, 4, 2), pytest.param(32, 60, 4, marks=pytest.mark.slow)]
)
def test_mixed_work(tmp_path, caplog, clients, seconds, processes):
    """Client n draws with seed n: half of the work in a repo that all share, half in its own."""
    caplog.set_level(logging.DEBUG, "hf_fusion.server.app")  # it says how each request was answered
    with HubServer(tmp_path / "hub") as hub:
        expected, done, errors = run(hub, clients, seconds, processes)
        assert not errors, "\n".join(errors[:5])
        answers = [row.args[2] for row in caplog.records if row.name == "hf_fusion.server.app"]
        assert max(answers) < 500
        assert done["push"] > clients and sum(done.values()) > 8 * clients / 2, done
        api = HfApi(endpoint=hub.endpoint, token=hub.token("user0"))
        for repo, files in expected.items():
            copy = Path(api.snapshot_download(repo, local_dir=tmp_path / "copy" / repo))
            found = {path.relative_to(copy).as_posix(): path for path in copy.rglob("*/*") if path.is_file()}
            found = {path: file for path, file in found.items() if not path.startswith(".cache/")}
            assert {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in found.items()} == files
    assert check(tmp_path / "hub") > done["push"]
    with HubServer(tmp_path / "hub"):
        assert not list((tmp_path / "hub" / "tmp").iterdir())
