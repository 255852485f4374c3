"""Whatever the small files of a repo say, judging it takes little memory and time, and no exception.

Each hostile repo is judged in a process of its own (forked after the imports), which measures its peak memory beyond
what it had, and the processor's time: that does not depend on what else the machine does.
"""

import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from tiny_experts import edit_json, save_adapter, save_bert
from torch import nn

from hf_fusion.errors import FusionError
from hf_fusion.hub.build_limits import TooMuchError, build_within_limits
from hf_fusion.hub.compat import check_compatibility
from hf_fusion.hub.discover import discover
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.rank_patterns import Patterns
from hf_fusion.io.json_files import parse_object

MOST_MB, MOST_SECONDS = 500, 5

NUMBERS = (10**4, 10**5, 10**6, 10**7, 1 << 24, 10**9, 10**12, 10**30, -1, 0)
TYPES = (
    "albert", "bart", "bert", "bloom", "clip", "codegen", "convnext", "deberta-v2", "deepseek_v3", "dinov2",
    "distilbert", "electra", "falcon", "flaubert", "fnet", "funnel", "gemma2", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gptj", "hubert", "levit", "llama", "longformer", "longt5", "m2m_100", "mamba", "marian", "mistral",
    "mixtral", "mpnet", "mpt", "opt", "pegasus", "phi3", "pvt", "qwen2", "qwen3_moe", "reformer", "regnet",
    "roberta", "roformer", "segformer", "swin", "swinv2", "switch_transformers", "t5", "vit", "wav2vec2", "whisper",
    "xlm", "xlnet", "yoso",
)  # fmt: skip
NAMED = {
    "bert": [
        {"max_position_embeddings": 10**9},
        {"num_labels": 10**8},
        {"id2label": {str(i): "a" for i in range(99_999)}},
    ],
    "llama": [
        {"layer_types": ["full_attention"] * 100_000, "num_hidden_layers": 100_000},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e300}},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 10**5, "long_factor": [1.0] * 10**5}},
        {"head_dim": 10**7},
    ],
    "gpt_neo": [{"attention_types": [[["global", "local"], 10**9]], "num_layers": 4}],
    "swin": [{"depths": [10**6] * 4}, {"image_size": 10**6, "window_size": 10**4}],
    "regnet": [{"depths": [400, 400, 400, 400], "hidden_sizes": [10**7] * 4}],
    "xlm": [{"max_position_embeddings": 10**7, "sinusoidal_embeddings": True}],
    "distilbert": [{"max_position_embeddings": 10**7, "sinusoidal_pos_embds": True}],
    "qwen3_moe": [{"num_experts": 10**5}],
    "switch_transformers": [{"num_experts": 10**5, "num_layers": 400, "num_sparse_encoder_layers": 400}],
}

FEW = ("bert", "llama", "gpt_neo", "swin")  # tables, lists, patterns of layers, products of sizes


def hostile_configs(types, count, seed=0):
    """Oversized configurations: selected ones of these types, then random ones."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in types:
        for change in NAMED[model_type]:
            yield {"model_type": model_type, **change}
    draw = random.Random(seed)
    for number in range(count):
        model_type = TYPES[number % len(TYPES)]
        own = CONFIG_MAPPING[model_type]().to_dict()
        keys = [key for key, value in own.items() if type(value) is int or isinstance(value, list)]
        chosen = {}
        for key in draw.sample(keys, min(len(keys), draw.choice((1, 1, 2, 3)))):
            value = draw.choice(NUMBERS)
            chosen[key] = [value] * draw.choice((2, len(own[key]), 1000)) if isinstance(own[key], list) else value
        yield {"model_type": model_type, **chosen}


def judged(config):
    """Memory in MB and seconds that judging a configuration takes, and what was said of it."""
    from hf_fusion.hub.headers import check_load, native_config
    from hf_fusion.hub.parameter_names import build_meta_model
    from hf_fusion.hub.task_heads import HEADS

    before, began = resident(), time.process_time()
    try:
        check_load(native_config(config, "it", 300), HEADS[-1], {"a": (64, 64)}, "it")
        said = build_meta_model(config, "it", 300).why
    except FusionError as error:
        said = error.message
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before, time.process_time() - began, said


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(types, count):
    """Judges configurations, each in a fork of this process: one line of JSON for each."""
    from transformers import AutoModel, BertConfig

    from hf_fusion.hub.silence import quiet_transformers

    with quiet_transformers():
        AutoModel.from_config(BertConfig(num_hidden_layers=1))  # imports
        judged({"model_type": "bert"})
        for config in hostile_configs(types, count):
            sys.stdout.flush()
            if not os.fork():
                try:
                    memory, seconds, said = judged(config)
                except BaseException as error:
                    memory, seconds, said = 0, 0, f"!!! {error!r}"
                told = {key: str(value)[:60] for key, value in config.items()}
                say([told, memory, seconds, said])
                os._exit(0)
            _, status = os.wait()
            if status:
                say([config["model_type"], 0, 0, f"!!! status {status}"])


def say(row):
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def check(types, count):
    done = subprocess.run(
        [sys.executable, __file__, str(count), *types],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows) == count + sum(len(NAMED[model_type]) for model_type in types)
    wrong = [row for row in rows if row[1] > MOST_MB or row[2] > MOST_SECONDS or row[3].startswith("!!!")]
    assert not wrong, "\n".join(map(str, wrong))
    return rows


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured as Linux tells it")
def test_oversized_configurations():
    said = [row[3] for row in check(FEW, 0)]
    assert "it: config.json has max_position_embeddings=1000000000, implausible for 300 tensors" in said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured as Linux tells it")
def test_more_oversized_configurations():
    check(NAMED, 500)


@pytest.mark.long
@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: nn.ModuleList([nn.Linear(1, 1, device="meta") for _ in range(10**7)]), "more than"),
        (lambda: {i: f"LABEL_{i}" for i in range(10**9)}, "lists of"),
        (lambda: sum(1 for _ in range(10**12)), "more than 2 s"),
        (lambda: torch.arange(10**9), "tables"),
        (lambda: torch.arange(10**5, device="cpu")[:, None] * torch.arange(10**5, device="cpu"), "tables"),
    ],
    ids=["modules", "list", "loop", "table", "product"],
)
def test_builds_beyond_the_limits_are_refused(build, why):
    began = time.process_time()
    with pytest.raises(TooMuchError, match=why):
        build_within_limits(build)
    assert time.process_time() - began < MOST_SECONDS


def test_builds_within_the_limits_return_their_result():
    def build():
        with torch.device("meta"):
            return nn.Linear(10**6, 10**6), torch.linspace(0, 1, 3, device="cpu").tolist(), threading.get_ident()

    linear, rates, thread = build_within_limits(build)
    assert (linear.weight.numel(), rates) == (10**12, [0, 0.5, 1])
    assert thread != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        build_within_limits(lambda: 1 / 0)


@pytest.mark.long
def test_time_of_imports_does_not_count(tmp_path, monkeypatch):
    for name in ("first_slow_library", "second_slow_library"):
        burn = "import time\nwhile time.thread_time() < began + 1.2: pass"
        (tmp_path / f"{name}.py").write_text(burn.replace("while", "began = time.thread_time()\nwhile"))
    monkeypatch.syspath_prepend(tmp_path)
    assert build_within_limits(lambda: [import_module("first_slow_library"), import_module("second_slow_library")])


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(?R)", "(?:(?R)|a)*", "(a{1000}){1000}", "(" * 400 + ")" * 400, "a{e<=50}"]
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_for_ever(key, pattern):
    began = time.process_time()
    with pytest.raises(FusionError, match=f"it: {key} has "):
        Patterns({key: {pattern: 2}}, "it").value(key, "layer." + "a" * 5_000, 1)
    assert time.process_time() - began < MOST_SECONDS


def test_many_patterns_share_their_time():
    patterns = Patterns({"rank_pattern": {"a*" * 10 + f"[xy]{{{number}}}": 2 for number in range(1, 100)}}, "it")
    began = time.process_time()
    with pytest.raises(FusionError, match="may take too long"):
        patterns.value("rank_pattern", "a" * 1_000, 1)
    assert time.process_time() - began < MOST_SECONDS


@pytest.mark.parametrize(
    "pattern, matches",
    [
        ("q_proj", True),
        ("proj", False),
        (r"layers\.[0-9]{1,2}\.q_proj", True),
        (".*(?:k|q)_proj", True),
        ("layers.0", False),
    ],
)
def test_patterns_as_peft_reads_them(pattern, matches):
    path = "model.layers.0.q_proj"
    assert Patterns({"rank_pattern": {pattern: 7}}, "it").value("rank_pattern", path, 1) == (7 if matches else 1)
    assert (get_pattern_key([pattern], path) == pattern) is matches


@pytest.mark.parametrize(
    "text, why",
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a": ' * 1_000_000, "nested too deeply"),
        (b"[" + b"0," * 3_000_000 + b"0]", "3,000,001 values"),
        (b'"' + b"a" * (40 << 20) + b'"', "more than the limit"),
        (b"1" * 5_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_json_is_bounded(text, why):
    began = time.process_time()
    with pytest.raises(FusionError, match=rf"it: config\.json cannot be read \(.*{why}" if "read" not in why else why):
        parse_object(text, "config.json", "it")
    assert time.process_time() - began < MOST_SECONDS


def test_a_header_larger_than_its_file(owner, tmp_path):
    """Of 10 MB, all header: naming tensors costs nothing, reading of them does."""
    folder = save_bert(tmp_path / "mood")
    save_file(
        {}, folder / "model.safetensors", metadata={"format": "pt", **{str(i): "a" * 1_000 for i in range(10_000)}}
    )
    owner.push("mood", folder)
    [reason] = (
        check_compatibility(discover(ids=[f"{owner.name}/mood"], api=owner.api), api=owner.api).rejected[0].reasons
    )
    assert "implausibly long for a file" in reason.detail
    with pytest.raises(FusionError, match="implausibly long for a file"):
        load_experts([folder])


def test_tokenizers_of_many_tokens(tmp_path):
    folder = save_bert(tmp_path / "mood")
    text = (folder / "tokenizer.json").read_text()
    token = {"id": 8, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = [{**token, "id": number, "content": f"x{number}"} for number in range(8, 100_010)]
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(text), "added_tokens": tokens}))
    with pytest.raises(FusionError, match="mood: its tokenizer has 100,002 tokens beside its vocabulary"):
        load_experts([folder])
    (folder / "tokenizer.json").write_text(text)
    edit_json(folder / "tokenizer_config.json", extra_special_tokens={f"t{number}": "x" for number in range(10_001)})
    with pytest.raises(FusionError, match="mood: its tokenizer has 10,001 tokens beside its vocabulary"):
        load_experts([folder])


def test_experts_of_hostile_repos(owner, tmp_path):
    """All the way from the Hub, full models and adapters on a hostile base: each has its reason."""
    folder, names = save_bert(tmp_path / "mood"), []
    changes = [
        {"max_position_embeddings": 10**9},
        {"vocab_size": 10**7},
        {"num_hidden_layers": 10**7},
        {"num_labels": 10**8},
    ]
    plain = (folder / "config.json").read_text()
    save_adapter(tmp_path / "adapter", folder, ("a", "b", "c"))
    for number, change in enumerate(changes):
        edit_json(folder / "config.json", **change)
        owner.push(f"mood{number}", folder)
        (folder / "config.json").write_text(plain)
        edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=f"{owner.name}/mood{number}")
        owner.push(f"adapter{number}", tmp_path / "adapter")
        names += [f"{owner.name}/mood{number}", f"{owner.name}/adapter{number}"]
    before, began = resident(), time.process_time()
    verdict = check_compatibility(discover(ids=names, api=owner.api), api=owner.api)
    assert len(verdict.rejected) == len(names)
    for name in names:
        with pytest.raises(FusionError, match="mood"):
            load_experts([name], api=owner.api)
    assert resident() - before < MOST_MB
    assert time.process_time() - began < MOST_SECONDS * len(names)


if __name__ == "__main__":
    measure(sys.argv[2:], int(sys.argv[1]))
