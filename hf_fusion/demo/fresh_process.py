"""Loads and runs a published model without hf_fusion. The demo runs this file in a fresh process:

    python -I fresh_process.py REPO REVISION FOLDER

FOLDER has PNG images, with tasks.json if they belong to tasks, or prompts.json. The logits are written to
FOLDER/logits.safetensors, the predictions to stdout as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = ("hf_fusion", "peft")
PROMPTS, TASKS = "prompts.json", "tasks.json"


def main(repo: str, revision: str, folder: Path) -> None:
    """Load the model by its id, and predict."""
    from safetensors.torch import save_file

    where = {"revision": revision, "trust_remote_code": True}
    known = {PROMPTS: _ask_prompts, TASKS: _ask_tasks}
    ask = next((known[name] for name in known if (folder / name).is_file()), _ask_images)
    model, logits, answers = ask(repo, where, folder)
    save_file(logits, folder / "logits.safetensors")
    sys.stdout.write(json.dumps({"class": type(model).__name__, "module": type(model).__module__, "answers": answers}))


def _ask_images(repo: str, where: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any], list[Any]]:
    """Two Auto classes and a pipeline, on all images."""
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline

    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    processor = AutoProcessor.from_pretrained(repo, **where)
    inputs = processor(images=images, return_tensors="pt")
    logits = {}
    for auto in (AutoModel, AutoModelForImageClassification):
        model = auto.from_pretrained(repo, **where)
        with torch.no_grad():
            logits[auto.__name__] = model(**inputs).logits
    classify = pipeline("image-classification", model=repo, **where)
    return model, logits, [classify(image, top_k=1)[0] for image in images]


def _ask_tasks(repo: str, where: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any], list[Any]]:
    """An Auto class and a pipeline, on the images of each task with the task's own head."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    processor = AutoImageProcessor.from_pretrained(repo, revision=where["revision"])
    model = AutoModelForImageClassification.from_pretrained(repo, **where)
    classify = pipeline("image-classification", model=repo, **where)
    logits, answers = {}, []
    for task, names in json.loads((folder / TASKS).read_text(encoding="utf-8")).items():
        images = [Image.open(folder / name) for name in names]
        with torch.no_grad():
            logits[task] = model(**processor(images=images, return_tensors="pt"), task=task).logits
        classify.model.task = task
        answers += [classify(image, top_k=1)[0] for image in images]
    return model, logits, answers


def _ask_prompts(repo: str, where: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any], list[Any]]:
    """The logits of every prompt, and what the model writes behind it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(repo, **where)
    model = AutoModelForCausalLM.from_pretrained(repo, **where)
    logits, answers = {}, []
    for number, prompt in enumerate(asked["prompts"]):
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits[str(number)] = model(**inputs).logits
        written = model.generate(**inputs, max_new_tokens=asked["max_new_tokens"], do_sample=False)
        answers.append(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return model, logits, answers


if __name__ == "__main__":
    for name in FORBIDDEN:  # impossible to import, as where they are not installed
        sys.modules[name] = None  # type: ignore[assignment]
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
