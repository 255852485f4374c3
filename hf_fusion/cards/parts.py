"""What the cards of all families share: the type of their contents, usage blocks, and results on suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.io.json_files import read_json

if TYPE_CHECKING:
    from hf_fusion.cards.card import CardFacts


@dataclass(frozen=True)
class Measured:
    """One score of the model itself, as the Hub indexes it."""

    dataset: str
    kind: str  # of the data set: its id, or its name again
    split: str
    n: int
    metric: str
    system: str
    score: float


@dataclass(frozen=True)
class CardContents:
    """What the card of one family's models says, beside its template, ``model_cards/NAME.md.j2``.

    Attributes:
        options: (config, folder) → the settings that the template shows.
        lacking: results → names of the fields without which they cannot be shown.
        measured: results → the model's own scores.
        usage: facts → the usage block: what a reader copies, and what a test runs.
        view: facts → further variables of the template.
    """

    options: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    lacking: Callable[[Mapping[str, Any]], list[str]]
    measured: Callable[[Mapping[str, Any]], list[Measured]]
    usage: Callable[[CardFacts], str]
    view: Callable[[CardFacts], dict[str, Any]] = lambda facts: {}


@dataclass(frozen=True)
class Usage:
    """How one kind of model is called: lines of Python. ``{text}`` is an example."""

    inputs: str
    answer: str
    imports: str = ""
    processor: str = "AutoTokenizer"
    pipeline: bool = True


def usage_row(table: Mapping[str, Usage], auto_class: str) -> Usage:
    """How a model is called.

    Raises:
        FusionError: there is no row for its Auto class.
    """
    if auto_class not in table:
        raise FusionError(f"There is no usage block for {auto_class}.")
    return table[auto_class]


def chats(folder: Path) -> bool:
    """Whether a model's tokenizer has a chat template."""
    if any(folder.glob("chat_template.*")):
        return True
    file = folder / "tokenizer_config.json"
    return file.exists() and bool(read_json(file, str(folder)).get("chat_template"))


PICTURE = 'example = Image.new("RGB", (64, 64))  # your picture\n'
IMAGE_IMPORT = "from PIL import Image\n"
CLASSES = "print([model.config.id2label[i] for i in model(**inputs).logits.argmax(-1).tolist()])"

# how a model with one head is called, by its Auto class
GENERATION = Usage(
    'example = {text}\ninputs = processor(example, return_tensors="pt")',
    "answer = model.generate(**inputs, max_new_tokens=20)\n"
    "print(processor.decode(answer[0], skip_special_tokens=True))",
)
# a language model that was taught a chat's markup answers nonsense without it
CHAT = Usage(
    'example = [{{"role": "user", "content": {text}}}]\n'
    "inputs = processor.apply_chat_template(\n"
    '    example, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)',
    "answer = model.generate(**inputs, max_new_tokens=20)\n"
    'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
)
TEXT = Usage('example = {text}\ninputs = processor(example, return_tensors="pt")', CLASSES)
PLAIN_USAGE = {
    "AutoModelForCausalLM": GENERATION,
    "AutoModelForSeq2SeqLM": GENERATION,
    "AutoModelForSequenceClassification": TEXT,
    "AutoModelForTokenClassification": Usage(TEXT.inputs, CLASSES.replace(".tolist()", "[0].tolist()")),
    "AutoModelForImageClassification": Usage(
        f'{PICTURE}inputs = processor(images=[example], return_tensors="pt")',
        CLASSES,
        imports=IMAGE_IMPORT,
        processor="AutoImageProcessor",
    ),
}
# what a router of features reads -> how it is called
FEATURES = {
    "texts": Usage(TEXT.inputs, "print(model(**inputs).last_hidden_state.shape)"),
    "images": Usage(
        PLAIN_USAGE["AutoModelForImageClassification"].inputs,
        "print(model(**inputs).last_hidden_state.shape)",
        imports=IMAGE_IMPORT,
        processor="AutoImageProcessor",
    ),
    "texts and images": Usage(TEXT.inputs, "print(model.backbone.get_text_features(**inputs).pooler_output.shape)"),
}

# ---------------------------------------------------------------- results on suites of tasks


def suite_lacking(results: Mapping[str, Any]) -> list[str]:
    """The fields without which a suite's results cannot be shown."""
    lacking = [key for key in ("tasks", "systems") if results.get(key) is None]
    lacking += lacking_each(results, "tasks", ("name", "metric", "n", "owner"))
    return lacking + lacking_each(results, "systems", ("name", "kind", "scores", "means"))


# a task's metric in results → its name on the Hub
_METRICS = {"exact": "exact_match", "tokens": "token_accuracy", "accuracy": "accuracy"}


def suite_measured(results: Mapping[str, Any]) -> list[Measured]:
    """The model's own scores among a suite's, task by task."""
    found = []
    for system in (system for system in results["systems"] if system["kind"] in ("router", "merged")):
        for task in (task for task in results["tasks"] if task["name"] in system["scores"]):
            name, metric = str(task["name"]), _METRICS[task["metric"]]
            score = system["scores"][name]["score"]
            found.append(Measured(name, name, "test", task["n"], metric, str(system["name"]), score))
    return found


def suite_view(facts: CardFacts) -> dict[str, Any]:
    """Groups of tasks, the systems that are compared by task, and whether experts have labels."""
    results = facts.results or {"tasks": [], "systems": []}
    groups: dict[str, list[Any]] = {"held-in": [], "held-out": []}
    for task in results["tasks"]:
        groups["held-out" if task["owner"] is None else "held-in"].append(task)
    return {
        "groups": [
            {"name": name, "tasks": tasks, "n": sum(task["n"] for task in tasks)}
            for name, tasks in groups.items()
            if tasks
        ],
        "compared": [system for system in results["systems"] if system["kind"] in ("base", "router", "baseline")],
        "labelled": any(expert.labels for expert in facts.experts),
    }


def lacking_each(results: Mapping[str, Any], key: str, names: tuple[str, ...]) -> list[str]:
    """The names that some entry of a list lacks."""
    return [f"{key}[].{name}" for name in names if any(name not in entry for entry in results.get(key) or ())]
