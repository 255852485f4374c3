"""What a reader of the documentation has before the first step of a guide: models on a Hub, and files with rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from huggingface_hub import HfApi
from tiny import make_tokenizer
from tiny_fused import bert_base, fine_tuned
from tiny_routed import save_base, save_lora

if TYPE_CHECKING:
    from hf_fusion.server import HubServer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def push(hub: HubServer, repo: str, folder: Path) -> None:
    """Pushes a folder as its owner would."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token(repo.partition("/")[0]))
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def fill_hub(hub: HubServer, folder: Path) -> None:
    """The repos that the guides name, under their ids, as tiny models: a base with three adapters, two of which have
    gates, and a base with two fine-tunes.
    """
    base = save_base(folder / "smollm2")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    push(hub, SMOLLM2, base)
    for seed, (name, gates) in enumerate(
        {"word-reversal": False, "word-sorting": True, "number-sorting": True}.items()
    ):
        push(hub, f"me/{name}", save_lora(folder / name, SMOLLM2, seed=seed, gates=gates))
    encoder = bert_base()
    for repo, model in {MINILM: encoder, "me/sst2": fine_tuned(encoder, 0), "me/trec": fine_tuned(encoder, 1)}.items():
        saved = folder / repo.rpartition("/")[2]
        model.save_pretrained(saved)
        make_tokenizer().save_pretrained(saved)
        made_of = "" if repo == MINILM else f"base_model: {MINILM}\n"
        (saved / "README.md").write_text(f"---\n{made_of}license: apache-2.0\n---\n")
        push(hub, repo, saved)


def chat_rows() -> Dataset:
    """Rows of a language model: prompt and target."""
    words = [("a b", "b a"), ("x y z", "z y x"), ("one two", "two one"), ("up down", "down up")] * 4
    return Dataset.from_dict({"prompt": [f"reverse {w}" for w, _ in words], "target": [t for _, t in words]})


def task_rows() -> Dataset:
    """Rows of two classifiers: text, label and whose task it is."""
    texts = ["a fine film", "what a bore", "how far is the moon", "who wrote it"] * 8
    tasks = ["me/sst2", "me/sst2", "me/trec", "me/trec"] * 8
    return Dataset.from_dict({"text": texts, "label": ["x", "y", "x", "y"] * 8, "task": tasks, "expert": tasks})


SORTERS = f"--experts me/word-sorting me/number-sorting --base {SMOLLM2}"
ROUTER = f"hf-fusion fuse --method phatgoose {SORTERS} --output router"
MANY_TASKS = f"hf-fusion fuse --method wemoe --experts me/sst2 me/trec --base {MINILM} --output many-tasks"
MERGED = f"hf-fusion fuse --method linear {SORTERS} --output merged"
# page -> what a reader has done before it
BEFORE = {
    "docs/guides/measure.md": ("hf-fusion fuse --method ensemble --experts me/sst2 me/trec --output fused",),
    "docs/guides/publish.md": (MERGED,),
    "docs/guides/serve.md": (ROUTER, MANY_TASKS),
}
# page -> file that lies beside the reader -> its rows
ROWS = {
    "README.md": {"test.parquet": chat_rows},
    "docs/guides/phatgoose.md": {"train.parquet": chat_rows},
    "docs/guides/wemoe.md": {"rows.parquet": task_rows},
    "docs/guides/foe.md": {"labelled.parquet": task_rows},
    "docs/guides/measure.md": {"test.parquet": task_rows},
}
# page -> folders of models that lie beside the reader
FOLDERS = {"docs/guides/embedded-hub.md": ("word-sorting",)}
