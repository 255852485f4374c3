"""Tasks of lm-evaluation-harness with local rows, and tiny language models of every kind to run them on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from tiny import CORPUS, llama, make_tokenizer
from tiny_fused import fine_tuned
from tiny_routed import save_lora

WORDS = CORPUS[0].split() + CORPUS[1].split()[:8]  # 17
TASKS = {
    "which": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "says": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],  # whose standard error takes the harness seconds
    },
}


def save_tasks(folder: Path, documents: int = 10) -> Path:
    """A folder with the tasks and their rows: choices of one or more tokens, answers that are written, whole texts."""
    folder.mkdir()
    rows = []
    for row in range(documents):
        letters = [" k", " q", " v", " z"]
        choices = [*letters[row % 3 :], *letters[: row % 3], " brown dog"]
        question = " ".join(WORDS[row % 7 : row % 7 + 3 + row % 4])
        rows.append({"question": question, "choices": choices, "answer": row % 4})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        files = {split: str(folder / "rows.jsonl") for split in ("train", "test")}
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        splits = {"test_split": "test", "fewshot_split": "train"}
        content = {"task": name, **source, **splits, **task, "metadata": {"version": 2.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def save_models(folder: Path) -> Path:
    """A Llama "base", fine-tunes "foxes" and "dogs" of it, and adapters of it with gates, "cats" and "hens"."""
    base = llama()
    base.config.max_position_embeddings = 64
    for name, model in {"base": base, "foxes": fine_tuned(base, 0, 0.9), "dogs": fine_tuned(base, 1, 0.9)}.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for seed, name in enumerate(("cats", "hens")):
        save_lora(folder / name, str(folder / "base"), seed)
    return folder
