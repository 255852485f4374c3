"""GGUF files: read back by transformers, and by llama.cpp itself where its wheel is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import ROWS, router, saved
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hf_fusion import FusionError
from hf_fusion.cli import main
from hf_fusion.exporting.export import export
from hf_fusion.exporting.forms import QUANTIZATIONS
from hf_fusion.exporting.gguf_file import ARCHITECTURES
from hf_fusion.exporting.gguf_tokenizer import SPLITS

TEXT = "The quick brown fox can't jump over 12345 lazy dogs;\n\n\tnaïve café, 你好! It's  the   end of the text.\n"
PROMPTS = ("The quick 123 fox", "the end\n\n of café 你好", "It's  lazy")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 5e4}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    ),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA_3),
    "yarn": Qwen2Config(**{**SIZES, "hidden_size": 128}, rope_parameters=YARN),
    "linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{**SIZES, "hidden_size": 128}),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=32, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6}, query_pre_attn_scalar=32, sliding_window=8, vocab_size=0
    ),
}
# transformers' reader of GGUF ignores biases, sizes of heads, scaled rotary embeddings, windows and soft caps
NOT_READ = {"llama with biases", "llama 3", "yarn", "linear", "qwen3", "gemma2", "gemma3"}


def byte_level(split: str = "gpt-2", bos: bool = False) -> PreTrainedTokenizerFast:
    """A trained tokenizer whose text is split as one of llama.cpp's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    makers: dict[str, Any] = {
        "ByteLevel": lambda value: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=value),
        "Digits": lambda value: pre_tokenizers.Digits(individual_digits=value),
        "Split": lambda value: pre_tokenizers.Split(Regex(value), "isolated"),
    }
    steps = [makers[name](value) for name, value in {name: steps for steps, name in SPLITS.items()}[split]]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    return wrapped(tokenizer, bos)


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with the merges of SentencePiece: all pairs that give a token, the earliest token first."""
    pieces = ["▁t", "he", "▁the", "qu", "ck", "▁d", "og", "12", "▁qu", "nd", "end", "▁end"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({*"▁", *TEXT.replace(" ", "▁"), *"".join(pieces)} - {"你", "好", "é", "\n", "\t"})
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces, *letters])}
    merges = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(tokenizer, bos=True)


def wrapped(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def model_folder(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> Path:
    """A model with random weights of a size at which each of them changes the answers."""
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer) + 3  # rows without a token
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.3 if weight.dim() == 2 else 0.1)
        if name.endswith("norm.weight") and "Gemma" not in type(model).__name__:
            weight.data += 1
    for index in range(config.vocab_size):  # llama.cpp's server tells the probabilities of a token that is a text
        text = tokenizer.decode([index]) if index < len(tokenizer) else ""
        if index < 4 or not (text.isascii() and text.isprintable() and text):
            model.lm_head.weight.data[index] *= 0.01
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(CONFIGS))
def exported(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """Name of the configuration, the model's folder, and its file in F32."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = sentencepiece(prefix=False) if "gemma" in request.param else byte_level("qwen2", bos=True)
    model = model_folder(folder / "model", CONFIGS[request.param], tokenizer, torch.float32)
    done = export(model, folder / "out", "gguf", quantize="F32")
    assert done.facts["relative_error"] == 0.0 and not done.warnings
    return request.param, model, done.folder / done.file


def last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.float()


def test_transformers_reads_the_same_model(exported):
    name, folder, file = exported
    if name in NOT_READ:
        pytest.skip("transformers' reader ignores a key of the file")
    how = {"gguf_file": file.name, "dtype": torch.float32}
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(file.parent, **how),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected = last_logits(ours, ids)
        # the same weights in the same order: what differs is how a head's dimensions are summed
        assert torch.allclose(last_logits(theirs, ids), expected, atol=1e-5 * expected.abs().max())


LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 128, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server, found = xllamacpp.Server(params), []
for prompt in json.loads(sys.argv[2]):
    given = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 40, "cache_prompt": False}
    answer = server.handle_completions(given)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    found.append([answer["usage"]["prompt_tokens"], [[one["id"], one["logprob"]] for one in token["top_logprobs"]]])
print(json.dumps(found))
"""


def next_tokens(file: Path, prompts: Any) -> list[tuple[int, dict[int, float]]]:
    """For each prompt its number of tokens, and the log-probabilities of the likeliest next ones, by llama.cpp."""
    if find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp has no wheel here")
    words = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(prompts)]  # it closes descriptors when it ends
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(count, dict(likeliest)) for count, likeliest in json.loads(done.stdout.splitlines()[-1])]


def test_llama_cpp_computes_the_same(exported):
    _, folder, file = exported
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for prompt, (count, likeliest) in zip(PROMPTS, next_tokens(file, PROMPTS)):
        ids = tokenizer(prompt).input_ids
        assert count == len(ids)
        logits = last_logits(model, ids)[-1]
        expected = logits.log_softmax(-1)
        furthest = max(abs(expected[token].item() - value) for token, value in likeliest.items())
        assert len(likeliest) == 40 and furthest < 1e-3 * logits.abs().max().item()


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe", "prefixed", "plain"])
def test_tokenizers_give_the_same_tokens(tmp_path, split):
    tokenizer = sentencepiece(split == "prefixed") if split in ("prefixed", "plain") else byte_level(split)
    model = model_folder(tmp_path / "model", LlamaConfig(**SIZES), tokenizer, torch.float32)
    done = export(model, tmp_path / "out", "gguf")
    theirs = AutoTokenizer.from_pretrained(done.folder, gguf_file=done.file)
    for text in (TEXT, *PROMPTS) if split != "plain" else ():  # transformers' reader always puts a space in front
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for text, (count, likeliest) in zip((TEXT, *PROMPTS), next_tokens(done.folder / done.file, (TEXT, *PROMPTS))):
        ids = tokenizer(text).input_ids
        expected = last_logits(loaded, ids)[-1].log_softmax(-1)
        assert count == len(ids)
        assert max(likeliest, key=lambda token: likeliest[token]) == int(expected.argmax())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_error_of_a_quantization_is_that_of_the_weights_read_back(tmp_path, quantization):
    model = model_folder(tmp_path / "model", LlamaConfig(**SIZES), byte_level(), torch.float32)
    done = export(model, tmp_path / "out", "gguf", quantize=quantization)
    how = {"gguf_file": done.file, "dtype": torch.float32}
    read = AutoModelForCausalLM.from_pretrained(done.folder, **how).state_dict()
    state = load_file(model / "model.safetensors")
    lost = sum(float((read[name].double() - weight.double()).square().sum()) for name, weight in state.items())
    norm = sum(float(weight.double().square().sum()) for weight in state.values())
    assert done.facts["relative_error"] == pytest.approx((lost / norm) ** 0.5, rel=1e-6, abs=1e-12)
    # a block of 32 normal values spans about 4 standard deviations: that many steps of half their width
    bits = {"F32": 40, "F16": 12, "BF16": 9}.get(quantization) or int(quantization[1])
    assert done.facts["relative_error"] < 2 ** (2 - bits)
    assert done.file == f"model-{quantization}.gguf" and done.facts["quantization"] == quantization


def test_a_router_becomes_one_file(tmp_path):
    folder = saved(router(400, byte_level()), tmp_path / "router")
    dense = export(folder, tmp_path / "dense", rows=ROWS)
    done = export(folder, tmp_path / "gguf", "gguf", rows=ROWS)
    assert done.facts["weights"] == dense.facts["weights"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file=done.file)
    ids = [3, 1, 4, 1, 5, 9]
    expected = last_logits(ours, ids)
    assert torch.allclose(last_logits(theirs, ids), expected, atol=1e-5 * expected.abs().max())


def refused(folder: Path, out: Path) -> str:
    with pytest.raises(FusionError) as raised:
        export(folder, out, "gguf")
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return str(raised.value)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    folder = model_folder(tmp_path / "model", LlamaConfig(**SIZES), byte_level(), torch.float32)
    config = json.loads((folder / "config.json").read_text())
    out = tmp_path / "out"
    for changed, message in (
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not exported to GGUF, only LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, and llama.cpp's llama has silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is dynamic, which GGUF has no key for",
        ),
        (
            {"rope_parameters": YARN | {"beta_fast": 16.0}},
            "beta_fast of the rotary embeddings is 16.0, which is not exported",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True},
            "attention_bias is True, and llama.cpp's qwen3 has False",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(config | changed))
        assert message in refused(folder, out)
    (folder / "config.json").write_text(json.dumps(config))
    other = byte_level()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save_pretrained(folder)
    assert "llama.cpp has no tokenizer like this model's: its text is split by Whitespace" in refused(folder, out)
    lower = sentencepiece(prefix=False)
    lower.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    lower.save_pretrained(folder)
    assert "SentencePiece has no step Lowercase" in refused(folder, out)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert str(folder) in refused(folder, out)
    byte_level().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file({name: tensor.half() if "q_proj" not in name else tensor for name, tensor in state.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert "exceeds the range of F16" in refused(folder, out)


def test_a_sliding_window_is_told(tmp_path):
    config = MistralConfig(**SIZES, sliding_window=16)
    folder = model_folder(tmp_path / "model", config, byte_level(), torch.bfloat16)
    done = export(folder, tmp_path / "out", "gguf")
    assert done.file == "model-BF16.gguf" and done.facts["relative_error"] == 0.0
    assert done.warnings == ("llama.cpp attends to all tokens: after 16 of them its answers differ from the model's",)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "merged", LlamaConfig(**SIZES), byte_level(), torch.float32)
    assert main(["export", "merged", "--to", "gguf", "--quantize", "Q8_0"]) == 0
    told = capsys.readouterr()
    assert "merged-Q8_0.gguf" in told.out and "relative_error" in told.out and "llama-server -m" in told.err
    assert sorted(path.name for path in (tmp_path / "merged-gguf").iterdir()) == [
        "README.md", "export.json", "merged-Q8_0.gguf",
    ]  # fmt: skip
    card = (tmp_path / "merged-gguf/README.md").read_text()
    assert "library_name: gguf" in card and "pipeline_tag: text-generation" in card and "merged-Q8_0.gguf" in card
    assert main(["export", "merged", "--to", "gguf"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", "merged", "--to", "gguf", "--task", "a", "-o", "other"]) == 1
    assert "it has no experts to choose" in capsys.readouterr().err
    assert main(["export", "merged", "--to", "dense", "--quantize", "Q8_0"]) == 2
    assert "--quantize goes with --to gguf" in capsys.readouterr().err


def test_every_architecture_is_tried():
    tried = {type(AutoModelForCausalLM.from_config(_small(config))).__name__ for config in CONFIGS.values()}
    assert tried == set(ARCHITECTURES)


def _small(config: Any) -> Any:
    config.vocab_size = 8
    return config
