"""Hundreds of seeded mutations of all files that a merge reads: each gives a model or a clear error."""

from __future__ import annotations

import json
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from on_disk import NOWHERE, header_of, model, recipe_of, tree
from safetensors import safe_open
from safetensors.torch import save_file

from hf_fusion import FusionError
from hf_fusion.merging.engine.checkpoint import INDEX, SINGLE
from hf_fusion.merging.merge import merge
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.merging.tensor_origins import MismatchError

EACH = 75  # mutations of each of the seven files
SECONDS = 10  # that one of them may take
ODD = (
    b"",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b".inf",
    b"true",
    b"null",
    b'""',
    b"[]",
    b"{}",
    b"[[[",
    b"*a",
    b"&a ",
    b"\0",
    b"\xff",
)
ODD += (
    b"9" * 40,
    b"1" * 5000,
    b"18446744073709551616",
    b"../",
    b"/etc/passwd",
    b"\\ud800",
    b"\n",
    b"\x1b[2J",
    b"A" * 300,
)


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, or a word, a number or a stretch of them."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice((1, 1, 4, 16, 64)))
        words = list(re.finditer(rb"-?[0-9.]+|\w+", raw)) or [re.match(b"", raw)]
        word = rng.choice(words)
        match rng.randrange(6):
            case 0 if raw:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            case 1:
                del raw[start:end]
            case 2:
                raw[start:start] = raw[start:end]
            case 3:
                raw[start:start] = rng.choice(ODD)
            case 4:
                raw[word.start() : word.end()] = rng.choice(ODD)
            case 5:
                raw[word.start() : word.end()] = rng.choice(words)[0]
    return bytes(raw)


def mutated_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file's header changed, mostly with a length that fits: else nothing but the length is seen."""
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    if rng.random() < 0.1:
        return mutated(raw[:8], rng) + text + data
    if rng.random() < 0.1:
        return raw[: rng.randrange(len(raw))]
    text = mutated(text, rng)
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """What is mutated: a sharded base, a model in one file, an adapter, and the recipe of them."""
    base, one = model(tmp_path / "base", 0, shards=2), model(tmp_path / "one", 1)
    own = tmp_path / "adapter"
    own.mkdir()
    pair = {"head.lora_A.weight": torch.ones(2, 4), "head.lora_B.weight": torch.ones(3, 2)}
    save_file({f"base_model.model.{name}": tensor for name, tensor in pair.items()}, own / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), "rank_pattern": {}}
    (own / "adapter_config.json").write_text(json.dumps(config))
    recipe = recipe_of([base, one, own], scaling=[0.1, 0.4], weight=[{"filter": "mlp", "value": 0.5}, {"value": 1.0}])
    recipe.save(tmp_path / "recipe.yaml")
    return {
        "header": one / SINGLE,
        "shard": base / "model-00001-of-00002.safetensors",
        "index": base / INDEX,
        "config": base / "config.json",
        "adapter": own / "adapter_config.json",
        "adapter header": own / "adapter_model.safetensors",
        "recipe": tmp_path / "recipe.yaml",
    }


def too_long(*_):
    raise TimeoutError(f"took more than {SECONDS} seconds")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["header", "shard", "index", "config", "adapter", "adapter header", "recipe"])
def test_mutations(kind, inputs, tmp_path):
    file, out = inputs[kind], tmp_path / "out"
    raw = file.read_bytes()
    change = mutated_header if file.suffix == ".safetensors" else mutated
    ends = {"merged": 0, "refused": 0}
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for seed in range(EACH):
            file.write_bytes(change(raw, random.Random(f"{kind} {seed}")))
            there = tree(tmp_path)
            signal.alarm(SECONDS)
            try:
                merge(load_recipe(tmp_path / "recipe.yaml"), out, api=NOWHERE, threads=1)
            except FusionError as error:
                ends["refused"] += 1
                assert isinstance(error, MismatchError) or error.message.isprintable(), (seed, error.message)
                assert tree(tmp_path) == there, f"seed {seed} left something"
            else:
                ends["merged"] += 1
                is_whole(out)
                assert {k: v for k, v in tree(tmp_path).items() if k.split("/")[0] != "out"} == there
                for path in out.iterdir():
                    path.unlink()
                out.rmdir()
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ends["refused"] > EACH / 20, ends  # mutations that change nothing test nothing


def is_whole(out: Path) -> None:
    """What was merged is what safetensors, JSON and recipes read."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert isinstance(config, dict) and load_recipe(out)
    with safe_open(out / SINGLE, "pt") as merged:
        assert all(merged.get_tensor(name).isfinite().all() for name in merged.keys())  # noqa: SIM118
    header, data = header_of(out / SINGLE)
    assert max(row["data_offsets"][1] for name, row in header.items() if name != "__metadata__") == len(data)
