"""Files of untrusted folders: links outside and special files are refused at once, without opening them."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import hf_fusion
from hf_fusion.errors import FusionError
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.io.files import open_file, open_given, own_file, read_file, read_text
from hf_fusion.recipe import Recipe

HASH = "ab" + "0" * 62


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    return made


@contextmanager
def soon(seconds=5.0):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@contextmanager
def growing(file: Path, most: int = 200_000_000):
    """A file that another thread appends to."""
    done = threading.Event()

    def write():
        with file.open("ab", buffering=0) as stream:
            written = 0
            while not done.is_set() and written < most:
                written += stream.write(b" " * 65536)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        file.unlink()


# ---------------------------------------------------------------- links


def test_link_is_followed_only_within_its_folder(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.json").write_text("{}")
    (folder / "beside.json").symlink_to("config.json")
    (folder / "below.json").symlink_to("sub/deep.json")
    (folder / "chain.json").symlink_to("beside.json")
    (folder / "out.json").symlink_to("../secret.json")
    (folder / "far.json").symlink_to("out.json")
    (folder / "circle.json").symlink_to("circle.json")
    assert all(own_file(folder / name, folder) for name in ("config.json", "beside.json", "below.json", "chain.json"))
    assert not own_file(folder / "circle.json", folder) and not own_file(folder / "none.json", folder)
    for name in ("out.json", "far.json"):
        what = f"{folder / name} is a link to {folder.parent / 'secret.json'}, outside the model's folder"
        for read in (own_file, open_file, read_file, read_text):
            with pytest.raises(FusionError, match=what):
                read(folder / name, folder)
    assert read_text(folder / "chain.json", folder) == "{}"


def test_link_to_a_folder_outside_is_refused(folder):
    (folder.parent / "others").mkdir()
    (folder.parent / "others" / "x.json").write_text("{}")
    (folder / "inside").symlink_to("../others")
    with pytest.raises(FusionError, match=r"is a link to .*others/x.json, outside"):
        read_file(folder / "inside" / "x.json", folder)


def cache(place: Path, *, shared: bool) -> Path:
    """A snapshot as huggingface_hub keeps it, of one file at its root and one below."""
    snapshot = place / "models--me--one" / "snapshots" / ("0" * 40)
    blobs = snapshot.parent.parent / "blobs"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    if shared:  # content that several repos have: blobs/ETAG is a link itself
        (place / "blobs" / "ab").mkdir(parents=True)
        (place / "blobs" / "ab" / HASH).write_text("{}")
        (blobs / "etag").symlink_to(f"../../blobs/ab/{HASH}")
    else:
        (blobs / "etag").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/etag")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/etag")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_the_hubs_cache_may_link_to_its_blobs(shared, linked, tmp_path):
    (tmp_path / "disk").mkdir()
    place = tmp_path / "disk"
    if linked:  # a cache that lies on another disk
        place = tmp_path / "cache"
        place.symlink_to("disk")
    snapshot = cache(place, shared=shared)
    check_snapshot(snapshot, "me/one")
    assert read_file(snapshot / "config.json") == b"{}"
    assert read_file(snapshot / "sub" / "config.json") == read_file(snapshot / "sub" / "config.json", snapshot) == b"{}"


@pytest.mark.parametrize(
    "target", ["../../secret", "../secret", f"../../blobs/ab/{HASH[:-1]}", f"../../blobs/cd/{HASH}"]
)
def test_cache_blob_that_links_outside_is_refused(target, tmp_path):
    place = tmp_path / "cache"
    snapshot = cache(place, shared=False)
    etag = snapshot.parent.parent / "blobs" / "etag"
    etag.unlink()
    etag.symlink_to(target)
    (etag.parent / target).parent.mkdir(parents=True, exist_ok=True)
    (etag.parent / target).resolve().write_text("secret")
    with pytest.raises(FusionError, match="is a link to .*, outside the model's folder"):
        check_snapshot(snapshot, "me/one")


def test_blobs_folder_that_links_outside_is_refused(tmp_path):
    snapshot = cache(tmp_path / "cache", shared=False)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FusionError, match="outside the model's folder"):
        read_file(snapshot / "config.json")


# ---------------------------------------------------------------- what is no file


@pytest.fixture(params=["pipe", "socket", "zero", "link to a pipe"])
def special(request, folder):
    file = folder / "vocab.json"
    match request.param:
        case "pipe":
            os.mkfifo(file)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(file))  # a socket's path is short
        case "zero":
            file.symlink_to("/dev/zero")
        case "link to a pipe":
            os.mkfifo(folder.parent / "pipe")
            file.symlink_to("../pipe")
    return file


def test_pipes_sockets_and_devices_are_refused_at_once(special, folder):
    for read in (read_file, open_file, open_given, Recipe.load):
        with soon(), pytest.raises(FusionError, match=r"vocab.json is a (pipe|socket|device), not a file"):
            read(special)
    assert not own_file(special)
    with soon(), pytest.raises(FusionError, match=r"vocab.json is a (pipe|socket|device), not a file"):
        check_snapshot(folder, "model")


def test_growing_file(folder):
    file = folder / "vocab.json"
    file.write_text("{}")
    with growing(file), soon(20), pytest.raises(FusionError, match=r"vocab.json (grew while it was read|has .* bytes)"):
        while True:
            read_file(file)


def test_file_with_a_wrong_reported_size():
    with pytest.raises(FusionError, match="grew while it was read"):
        read_file(Path("/proc/self/status"), Path("/proc"))


def test_folder_that_is_being_written(folder):
    for number in range(20):
        (folder / f"tokenizer{number}.index.json").write_text('{"weight_map": {"a": "b"}}')
    file = folder / "vocab.json"
    file.write_text("{}")
    with growing(file), soon(20), pytest.raises(FusionError, match=r"vocab.json (changed while|has .* bytes)"):
        while True:
            check_snapshot(folder, "model")


def test_a_file_larger_than_any(folder):
    with (folder / "tokenizer.json").open("wb") as stream:
        stream.truncate(1 << 40)  # a hole
    with soon(), pytest.raises(FusionError, match=r"tokenizer.json has 1,099,511,627,776 bytes"):
        read_file(folder / "tokenizer.json")
    with soon(), pytest.raises(FusionError, match=r"tokenizer.json has 1,099,511,627,776 bytes, but only weights"):
        check_snapshot(folder, "model")


def test_a_file_that_is_replaced_by_a_link_while_it_is_opened(folder):
    """A thread swaps the file and a link to the secret: the secret is never read, whatever happens in between."""
    file, swap = folder / "config.json", folder / "swap.json"
    done = threading.Event()

    def swapping():
        while not done.is_set():
            swap.symlink_to("../secret.json")
            swap.replace(file)
            swap.write_text("{}")
            swap.replace(file)

    thread = threading.Thread(target=swapping)
    thread.start()
    read = set()
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            try:
                read.add(read_file(file))
            except FusionError as error:
                assert "secret" not in error.message or "outside the model's folder" in error.message
    finally:
        done.set()
        thread.join()
    assert read <= {b"{}", b""}  # the second while it is written


# ---------------------------------------------------------------- whole folders


def test_odd_names_are_shown_and_do_not_write_to_the_terminal(folder):
    (folder / "a\x1b[2J\u202e.json").symlink_to("../secret.json")
    with pytest.raises(FusionError) as caught:
        check_snapshot(folder, "model")
    assert caught.value.message.isprintable()


def test_links_that_no_loader_reads_are_allowed(folder):
    (folder / ".cache").symlink_to("/")
    (folder / "runs").symlink_to("/tmp")
    (folder / "data").mkdir()
    (folder / "data" / "rows.json").symlink_to("../../secret.json")
    (folder / "gone.json").symlink_to("nowhere")
    check_snapshot(folder, "model")


OUTSIDE = ["{root}/secret.json", "../secret.json", "sub/../../secret.json"]
KEYS = (
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "fast_tokenizer_files",
    "preset_file",
    "class_info_file",
    "vocab",
    "x",
)


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"])
def test_a_configuration_that_names_a_file_outside(file, key, value, folder):
    (folder / "sub").mkdir()
    path = value.format(root=folder.parent)
    value = [path] if key.endswith("s") else path
    content = {"nested": [{key: value}]}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(FusionError, match=f"model: {file} has {key}: .*, which is outside the model's folder"):
        check_snapshot(folder, "model")


@pytest.mark.parametrize(
    "value", ["{root}/gone.json", "/home/me/.cache/x/vocab.json", "vocab.txt", "C:\\x\\vocab.txt", "a\0b"]
)
def test_paths_of_other_machines_are_often_recorded(value, folder):
    path = value.format(root=folder.parent)
    (folder / "vocab.txt").write_text("a")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"vocab_file": path, "name_or_path": str(folder.parent), "_name_or_path": "/", "x_file": 3})
    )
    check_snapshot(folder, "model")


def test_config_texts_that_look_like_paths_are_allowed(folder):
    here = str(folder.parent / "secret.json")
    content = {"chat_template": here, "unk_token": here, "added_tokens_decoder": {"0": {"content": here}}}
    content |= {
        "extra_special_tokens": [here],
        "id2label": {"0": here},
        "vocab": [[here, 0.5]],
        "about": "a/b",
        "x": "/",
    }
    for file in ("tokenizer_config.json", "config.json"):
        (folder / file).write_text(json.dumps(content))
    check_snapshot(folder, "model")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
        ({"transformers_weights": "sub/other.safetensors"}, "transformers_weights"),
        ({"auto_map": {"AutoConfig": "../other.Class"}}, "auto_map"),
        ({"auto_map": {"AutoConfig": "/tmp/other.Class"}}, "auto_map"),
    ],
)
def test_a_configuration_that_names_other_weights_or_code(content, reason, folder):
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(FusionError, match=f"model: config.json has {reason}"):
        check_snapshot(folder, "model")


# ---------------------------------------------------------------- one place

PACKAGE = Path(hf_fusion.__file__).parent
# what reads files otherwise, and whose these are
OTHERWISE = {
    "cards/facts.py": "facts of a golden card",
    "hub/client.py": "the bytes of a plan that was checked, to compare them with the Hub's",
    "merging/engine/growing_file.py": "what it writes",
    "merging/engine/output.py": "what it writes, and its lock",
    "publishing/push_gates.py": "a README that the client has fetched",
    "publishing/plan.py": "a README that the client has fetched",
    "publishing/space.py": "the apps that come with the package",
}


def test_files_of_models_are_opened_in_one_place():
    """Another module that opens files by itself goes through `hf_fusion.io.files`, or is listed with its reason."""
    folders = ("cards", "hub", "merging", "publishing")
    modules = [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]
    modules += [PACKAGE / "fusion.py", PACKAGE / "recipe.py"]
    opened = re.compile(r"\.read_(text|bytes)\(|\.open\(|(?<![\w.])open\(")
    found = {path.relative_to(PACKAGE).as_posix() for path in modules if opened.search(path.read_text())}
    assert found == set(OTHERWISE)
