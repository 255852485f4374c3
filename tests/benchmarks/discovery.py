"""What finding and checking many experts costs, and how fast the embedded Hub lists many repos.

    python tests/benchmarks/discovery.py                            # 1,000 adapters of one base
    python tests/benchmarks/discovery.py --experts 100 --delay 0    # a small variant
    python tests/benchmarks/discovery.py --output tests/benchmarks/results/discovery.json

Adapters of a MiniLM-sized BERT, each with its configuration, the names of its classes and a card, lie in an embedded
Hub. `discover` and `check_compatibility` run in a process of their own, in front of a server in another one: once at
full speed, for CPU seconds and requests, and once with a server that waits before each answer, for seconds of wall
clock. Last, the Hub is opened again, as after a restart, and lists the repos: the first page, and pages with filters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
OWNER, BASE, TAG = "many", "many/base", "hf-fusion-expert"
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
RANK, VOCABULARY = 4, 1000
# what a page is asked for -> the query of the client
PAGES = {
    "first page": "limit=1000",
    "one author": f"author={OWNER}&limit=1000&sort=downloads",
    "one tag": f"filter={TAG}&limit=1000&expand=sha&expand=siblings&expand=cardData&expand=tags",
    "two tags": f"filter={TAG}&filter=license:mit&limit=100",
    "a word": "search=expert-99&limit=1000",
    "nothing": "filter=no-such-tag",
}


def fill(root: Path, count: int) -> None:
    """A Hub folder with a base and `count` adapters of it, as pushes leave it."""
    import torch
    from safetensors.torch import save
    from transformers import AutoModel, BertConfig

    from hf_fusion.server.files import IncomingFile
    from hf_fusion.server.repo import Change, pointer
    from hf_fusion.server.store import Store

    store = Store(root)

    def push(name: str, files: dict[str, bytes]) -> None:
        import hashlib

        repo = store.create("models", name, OWNER, {"private": False, "gated": False})
        change = Change()
        for path, data in files.items():
            if path.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                incoming = IncomingFile(store.scratch)
                incoming.write(data)
                repo.add_large(incoming, digest, len(data))
                data = pointer(digest, len(data))
            change.files[path] = repo.add_blob(data)
        repo.commit("main", change, "push", author=OWNER)

    config = BertConfig(vocab_size=VOCABULARY, **SIZES)
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        push(BASE, {path.name: path.read_bytes() for path in Path(folder).iterdir()} | {"tokenizer.json": b"{}"})
    width = SIZES["hidden_size"]
    tensors = {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{part}.lora_{half}.weight": torch.zeros(shape)
        for layer in range(SIZES["num_hidden_layers"])
        for part in ("query", "value")
        for half, shape in (("A", (RANK, width)), ("B", (width, RANK)))
    }
    tensors["base_model.model.classifier.weight"] = torch.zeros(2, width)
    tensors["base_model.model.classifier.bias"] = torch.zeros(2)
    weights = save(tensors)
    adapter = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": BASE,
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
    }
    card = (
        f"---\nlicense: mit\ntags: [{TAG}]\nbase_model: {BASE}\npipeline_tag: text-classification\n---\n# An expert\n"
    )
    for number in range(count):
        labels = {"id2label": {0: f"no-{number}", 1: f"yes-{number}"}}
        push(
            f"{OWNER}/expert-{number:05}",
            {
                "adapter_config.json": json.dumps(adapter).encode(),
                "config.json": json.dumps(labels).encode(),
                "adapter_model.safetensors": weights,
                "README.md": card.encode(),
            },
        )
    store.close()


def serve(root: Path, delay: float, ready: Any, done: Any, answers: Any) -> None:
    """An embedded Hub that waits before each answer, until it is told to stop; then its requests and CPU seconds."""
    import socket

    import uvicorn

    from hf_fusion.server.app import build_app
    from hf_fusion.server.store import Store

    store, requests = Store(root), deque(maxlen=1_000_000)
    app = build_app(store, requests)

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(delay)
        await app(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(waiting, log_config=None, access_log=False, lifespan="off"))

    async def run() -> None:
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        ready.put(listener.getsockname()[1])
        while not done.is_set():
            await asyncio.sleep(0.05)
        server.should_exit = True
        await task

    asyncio.run(run())
    answers.put((Counter(path.rsplit("/", 1)[-1].split("?")[0] for _, path, _ in requests), len(requests)))


def judge(port: int, results: Any) -> None:
    """Discovers and checks, and tells what each took."""
    import torch  # noqa: F401  imported by the check; its import is not what is measured
    import transformers.models.bert.modeling_bert  # noqa: F401
    from huggingface_hub import HfApi

    from hf_fusion.hub.compat import check_compatibility
    from hf_fusion.hub.discover import discover

    api = HfApi(endpoint=f"http://127.0.0.1:{port}", token=False)
    cpu, wall = time.process_time(), time.perf_counter()
    found = discover(author=OWNER, api=api)
    middle_cpu, middle_wall = time.process_time(), time.perf_counter()
    verdict = check_compatibility(found, base_model=BASE, api=api)
    end_cpu, end_wall = time.process_time(), time.perf_counter()
    results.put(
        {
            "found": len(found),
            "accepted": len(verdict.accepted),
            "discover_cpu_s": middle_cpu - cpu,
            "discover_s": middle_wall - wall,
            "check_cpu_s": end_cpu - middle_cpu,
            "check_s": end_wall - middle_wall,
        }
    )


def measure_check(root: Path, delay: float) -> dict[str, Any]:
    """One run of both, each in its process, in front of a server that waits `delay` seconds."""
    context = multiprocessing.get_context("spawn")
    ready, answers, results, done = context.Queue(), context.Queue(), context.Queue(), context.Event()
    server = context.Process(target=serve, args=(root, delay, ready, done, answers))
    server.start()
    with tempfile.TemporaryDirectory() as home:
        os.environ["HF_HOME"] = home
        client = context.Process(target=judge, args=(ready.get(timeout=600), results))
        client.start()
        measured = results.get(timeout=3600)
        client.join()
    done.set()
    kinds, total = answers.get(timeout=600)
    server.join()
    return {**measured, "delay_s": delay, "requests": total, "most_requested": dict(kinds.most_common(6))}


def list_repos(root: Path, results: Any) -> None:
    """Opens the Hub and answers lists as after a restart; CPU seconds, without the imports."""
    from starlette.testclient import TestClient

    from hf_fusion.server.app import build_app
    from hf_fusion.server.store import Store

    cpu = time.process_time()
    client = TestClient(build_app(Store(root), deque()))
    assert client.get(f"/api/models?{PAGES['first page']}").status_code == 200
    measured = {"cold_cpu_s": time.process_time() - cpu}
    for name, query in PAGES.items():
        times = []
        for _ in range(7):
            cpu = time.process_time()
            assert client.get(f"/api/models?{query}").status_code == 200
            times.append(time.process_time() - cpu)
        measured[name] = min(times)
    results.put(measured)


def measure_lists(root: Path) -> dict[str, float]:
    """`list_repos` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=list_repos, args=(root, results))
    process.start()
    measured = results.get(timeout=600)
    process.join()
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures beside their bars, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--delay", type=float, default=100, metavar="MS", help="of each answer in the slow run")
    parser.add_argument(
        "--folder", type=Path, help="a Hub folder to fill once and use again (default: a temporary one)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary) / "hub"
        if not root.is_dir():
            fill(root, options.experts)
        fast = measure_check(root, 0)
        slow = measure_check(root, options.delay / 1000) if options.delay else None
        lists = [measure_lists(root) for _ in range(3)]
    best = {name: min(run[name] for run in lists) for name in lists[0]}
    for run in filter(None, (fast, slow)):
        print(
            f"{run['found']} found, {run['accepted']} accepted, answers after {run['delay_s'] * 1000:.0f} ms:"
            f" discover {run['discover_cpu_s']:.2f} CPU s, {run['discover_s']:.1f} s;"
            f" check {run['check_cpu_s']:.2f} CPU s, {run['check_s']:.1f} s;"
            f" {run['requests'] / max(run['found'], 1):.2f} requests an expert"
        )
    print(f"the Hub lists {options.experts} repos cold in {best.pop('cold_cpu_s'):.2f} CPU s; then:")
    for name, seconds in best.items():
        print(f"  {name:12} {seconds * 1000:6.1f} CPU ms")
    if options.output:
        from hf_fusion.evaluation.machine import machine

        content = {
            "machine": machine(),
            "experts": options.experts,
            "fast": fast,
            "slow": slow,
            "lists": lists,
            "cold_cpu_s": statistics.median(r["cold_cpu_s"] for r in lists),
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if fast["found"] == fast["accepted"] == options.experts else 1


if __name__ == "__main__":
    sys.exit(main())
