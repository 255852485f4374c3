"""`hf-fusion serve` as a process, asked by curl and by the client until a signal; and what is loaded and refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from tiny import bert, llama, make_tokenizer
from tiny_fused import fine_tuned
from tiny_routed import save_base, save_lora
from transformers import BertModel

from hf_fusion import FusionError, fuse, merge
from hf_fusion.cli import main
from hf_fusion.fusion import load_fused
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.serving import load_served

pytestmark = pytest.mark.long
CURL = shutil.which("curl")


@contextmanager
def serving(words: Sequence[str | Path]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of `hf-fusion serve`, and its process."""
    command = [sys.executable, "-m", "hf_fusion.cli", "serve", *map(str, words), "--port", "0", "--format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        shown = ""
        while not shown.rstrip().endswith("}"):
            shown += (line := process.stdout.readline())
            assert line, f"the server ended with {process.wait()}"
        yield json.loads(shown)["endpoint"], process
    finally:
        process.kill()
        process.wait()


def curl(*words: str) -> str:
    return subprocess.run([str(CURL), "-sS", *words], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="module")
def router(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    save_base(folder / "base")
    experts = [save_lora(folder / name, str(folder / "base"), seed) for seed, name in enumerate(("cats", "hens"))]
    fuse("phatgoose", list(map(str, experts))).save_pretrained(folder / "fused")
    return folder / "fused"


@pytest.mark.process
@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_a_fused_folder_is_served_until_a_signal(router):
    model, _ = load_fused(router)
    ids = model.processor("the quick fox", return_tensors="pt")["input_ids"]
    own = model.generate(ids, max_new_tokens=20, eos_token_id=None)[0, ids.shape[1] :].tolist()
    want = model.processor.decode(own[: own.index(2)] if 2 in own else own, skip_special_tokens=True)
    with serving([router, "--name", "routed"]) as (url, process):
        [listed] = json.loads(curl(f"{url}/models"))["data"]
        assert (listed["id"], listed["method"], listed["experts"]) == ("routed", "phatgoose", ["cats", "hens"])
        body = json.dumps({"model": "routed", "prompt": "the quick fox", "max_tokens": 20})
        header = ("-H", "Content-Type: application/json")
        answer = json.loads(curl(f"{url}/completions", *header, "-d", body))
        assert answer["choices"][0]["text"] == want
        streamed = curl("-N", f"{url}/completions", *header, "-d", body[:-1] + ', "stream": true}')
        parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in parts) == want
        refused = curl("-w", "%{http_code}", f"{url}/completions", *header, "-d", '{"prompt": 3}')
        assert refused.endswith("400")
        found: list[str] = []

        def ask() -> None:
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            chunks = client.completions.create(model="routed", prompt="the quick fox", max_tokens=20, stream=True)
            for chunk in chunks:
                found.append(chunk.choices[0].text)
                if len(found) == 1:
                    process.send_signal(signal.SIGTERM)

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()
        assert "".join(found) == want
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_a_static_merge_and_a_plain_model_are_served(tmp_path):
    base = llama()
    for name, model in {"base": base, "a": fine_tuned(base, 0), "b": fine_tuned(base, 1)}.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("a", "b"))
    merge(Recipe(method="linear", experts=experts), tmp_path / "merged")
    for name in ("base", "merged"):
        served = load_served(str(tmp_path / name), dtype="bfloat16")
        assert (served.name, served.kind, served.family) == (name, "answers", None)
        assert served.model.dtype == torch.bfloat16


def test_a_published_model_is_served_at_its_commit(router, owner):
    commit = owner.push("routed", router)
    served = load_served(f"{owner.name}/routed@{commit}", api=owner.api)
    model, _ = load_fused(router)
    ids = model.processor("the quick fox", return_tensors="pt")["input_ids"]
    assert served.name == f"{owner.name}/routed"
    assert served.model.generate(ids, max_new_tokens=8).equal(model.generate(ids, max_new_tokens=8))


def test_what_cannot_be_served_is_refused(tmp_path, router):
    lora = save_lora(tmp_path / "lora", str(router.parent / "base"), 3)
    with pytest.raises(FusionError, match="is an adapter"):
        load_served(str(lora))
    bert(["x", "y"]).save_pretrained(tmp_path / "silent")
    with pytest.raises(FusionError, match="has no tokenizer"):
        load_served(str(tmp_path / "silent"))
    BertModel(bert(["x", "y"]).config).save_pretrained(tmp_path / "features")
    make_tokenizer().save_pretrained(tmp_path / "features")
    assert load_served(str(tmp_path / "features")).kind == "embeddings"
    (tmp_path / "features" / "2_Dense").mkdir()
    (tmp_path / "features" / "2_Dense" / "config.json").write_text("{}")
    with pytest.raises(FusionError, match="has a module 2_Dense"):
        load_served(str(tmp_path / "features"))
    assert main(["serve", str(tmp_path / "nowhere")]) == 1
