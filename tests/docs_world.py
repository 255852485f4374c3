"""What a reader of the documentation has before the first step of a guide: models on a Hub, and files with rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from huggingface_hub import HfApi
from tiny_routed import save_base, save_lora

from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.digit_tasks import BASE, TASKS, task_rows
from hf_fusion.demo.digits import digit_expert

if TYPE_CHECKING:
    from hf_fusion.server import HubServer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def push(hub: HubServer, repo: str, folder: Path) -> None:
    """Pushes a folder as its owner would."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token(repo.partition("/")[0]))
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def fill_hub(hub: HubServer, folder: Path) -> None:
    """The repos that the guides name: a tiny model in place of SmolLM2 with three adapters, and those of the demos that
    are small: a base with its fine-tunes, and classifiers.
    """
    base = save_base(folder / "smollm2")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    push(hub, SMOLLM2, base)
    for seed, name in enumerate(("word-reversal", "word-sorting", "number-sorting")):
        push(hub, f"demo/{name}", save_lora(folder / name, SMOLLM2, seed=seed))
    for name in (BASE, *(f"{BASE}-{task}" for task in TASKS)):
        push(hub, f"demo/{name}", demo_weights("vit_experts") / name)
    for name in ("vit-mnist-low", "vit-tiny-digits"):
        push(hub, f"demo/{name}", digit_expert(name))


def questions() -> Dataset:
    """What `hf-fusion demo phatgoose` leaves: prompts, targets, and whose task they are."""
    words = [("a b", "b a"), ("x y z", "z y x"), ("one two", "two one"), ("up down", "down up")] * 4
    tasks = ["word-sorting", "number-sorting"] * 8
    return Dataset.from_dict(
        {
            "prompt": [f"reverse {w}" for w, _ in words],
            "target": [t for _, t in words],
            "task": tasks,
            "expert": [f"demo/{task}" for task in tasks],
        }
    )


def pictures() -> Dataset:
    """What `hf-fusion demo wemoe` leaves to adapt to: pictures, and whose task they are."""
    tasks = [task for task in TASKS for _ in range(32)]
    images = [image for task in TASKS for image in task_rows(task, "adapt", 32)["image"]]
    return Dataset.from_dict({"image": images, "task": tasks, "expert": [f"{BASE}-{task}" for task in tasks]})


def images() -> Dataset:
    """What `hf-fusion demo` leaves: pictures of digits, and which."""
    return task_rows("digit", "test", 200)


QUESTIONS = {"demo/questions/test.parquet": questions}
PICTURES = {f"demo/pictures/{split}.parquet": pictures for split in ("train", "test")}
DATA = {f"demo/data/{split}.parquet": images for split in ("train", "test")}
SORTERS = f"--experts demo/word-sorting demo/number-sorting --base {SMOLLM2}"
FINE_TUNES = f"--experts demo/{BASE}-digit demo/{BASE}-turned --base demo/{BASE}"
# page -> what a reader has done before it
BEFORE = {
    "docs/guides/serve.md": (
        f"hf-fusion fuse --method phatgoose {SORTERS} --output router",
        f"hf-fusion fuse --method wemoe {FINE_TUNES} --output many-tasks",
    ),
    "docs/guides/openai.md": (f"hf-fusion fuse --method phatgoose {SORTERS} --output router",),
}
# page -> file that lies beside the reader -> its rows
ROWS = {
    "README.md": QUESTIONS | PICTURES,
    "docs/guides/wemoe.md": PICTURES,
    "docs/guides/foe.md": DATA,
    "docs/guides/measure.md": DATA,
    "docs/guides/serve.md": PICTURES,
    "docs/guides/search.md": {"rows.parquet": questions},
}
# page -> folders of models that lie beside the reader
FOLDERS = {"docs/guides/embedded-hub.md": ("word-sorting",)}
