"""A published WEMoE, loaded by its id and run with its routers, with one constant, or with one expert alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from coefficients import Coefficients, read_trace
from PIL import Image
from shared.errors import InputError, LoadError
from shared.experts import short_names
from shared.loading import TEXTS, Loaded, on_device, published
from shared.settings import Settings
from shared.uploads import read_picture

logger = logging.getLogger(__name__)

NEW_TOKENS = 64
LONGEST_INPUT = 1024  # tokens, if neither model nor tokenizer has a limit
MOST_CHARACTERS = 20_000
MOST_EXAMPLES = 8
TOGETHER = 16  # rows of a forward
EXAMPLES = [
    "A warm, funny film that knows exactly what it wants to be.",
    "What is the largest lake in Africa?",
    "My card was charged twice for the same purchase.",
]
# head → kind of input, and the Auto class that loads the model
HEADS = {
    "sequence-classification": ("text", "AutoModelForSequenceClassification"),
    "image-classification": ("image", "AutoModelForImageClassification"),
    "causal-lm": ("language", "AutoModelForCausalLM"),
    "seq2seq-lm": ("language", "AutoModelForSeq2SeqLM"),
}
# coefficients: the routers', one constant for all experts, or 1 for the expert of an index and 0 for the others
Weights = str | int
ROUTED, CONSTANT = "routed", "constant"


@dataclass(frozen=True)
class Example:
    """One input: a text, perhaps with a second one, or a picture with the name of its file."""

    text: str = ""
    pair: str = ""
    image: Image.Image | None = None
    name: str = ""
    task: str = ""


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one input.

    Attributes:
        text: the class, the score of a regression, or the generated text.
        labels: all classes; empty for regressions and language models.
        probabilities: of all classes, in the order of `labels`.
        coefficients: if the routers predicted them.
    """

    text: str
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    coefficients: Coefficients | None = None

    @property
    def confidence(self) -> float | None:
        """Probability of the class; None if there are no probabilities."""
        return max(self.probabilities, default=None)


@dataclass
class Served(Loaded):
    """A loaded model and what its page needs.

    Attributes:
        processor: from its Auto class.
        kind: "text" or "image" for a classifier's input, "language" for a language model.
        template: a prompt's form, with {} for the prompt; None: the tokenizer's chat template.
        examples: inputs to click.
    """

    processor: Any
    kind: str
    template: str | None
    examples: list[Example]
    # A fast tokenizer stores a call's padding and truncation in itself, so calls must not overlap.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def names(self) -> list[str]:
        """The experts, by short names."""
        return short_names(self.model.experts)

    @property
    def has_heads(self) -> bool:
        """Whether every expert has a classification head, so that one has to be chosen."""
        return bool(self.model.config.task_heads)

    @property
    def smile(self) -> bool:
        """Whether experts are chosen token by token, without routers."""
        return bool(self.model.config.routing == "smile")

    @property
    def constant(self) -> float:
        """Every coefficient of the model without routers."""
        config = self.model.config
        if self.smile:
            return 1 / len(self.model.experts)
        return float(config.scaling) if config.merge == "task_arithmetic" else 0.0

    @property
    def limits(self) -> tuple[int, int]:
        """Maximum number of tokens of an input, and of generated tokens."""
        config = self.model.backbone.config.get_text_config()
        lengths = [getattr(self.processor, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
        context = min([n for n in lengths if isinstance(n, int) and 0 < n < 1_000_000], default=LONGEST_INPUT)
        new = min(NEW_TOKENS, context // 2)
        return context - (new if self.model.config.head == "causal-lm" else 0), new

    def check(self, example: Example) -> None:
        """Checks that an input can be run.

        Raises:
            InputError: the text is empty or too long, or there is no picture.
        """
        if self.kind == "image":
            if example.image is None:
                raise InputError("There is no picture yet.")
            return
        if not example.text:
            raise InputError("There is no text yet: write something first.")
        if len(example.text) + len(example.pair) > MOST_CHARACTERS:
            raise InputError(f"That text is too long: at most {MOST_CHARACTERS:,} characters are allowed.")
        tokens, most = len(self._tokens(example)["input_ids"][0]), self.limits[0]
        if tokens > most:
            raise InputError(f"That text is too long: it has {tokens:,} tokens, at most {most:,} are allowed.")

    def answer(self, examples: Sequence[Example], task: int = 0, weights: Weights = ROUTED) -> list[Answer]:
        """Answers to checked inputs.

        Args:
            task: index of the expert whose classification head is used, if each has one; an expert alone uses its own.
            weights: `ROUTED`, `CONSTANT` or the index of an expert.
        """
        if isinstance(weights, int):
            task = weights
        constant = [self.constant] * len(self.model.experts) if weights == CONSTANT else None
        coefficients = self.model.experts[weights] if isinstance(weights, int) else constant
        with nullcontext() if coefficients is None else self.model.using(coefficients):
            answers: list[Answer] = []
            size = 1 if self.kind == "language" else TOGETHER
            for start in range(0, len(examples), size):
                answers += self._answer(examples[start : start + size], task, weights == ROUTED)
        return answers

    @torch.no_grad()
    def _answer(self, examples: Sequence[Example], task: int, traced: bool) -> list[Answer]:
        pairs = [bool(example.pair) for example in examples]
        if len(set(pairs)) > 1:  # encoding an empty second text would add a separator
            return [answer for example in examples for answer in self._answer([example], task, traced)]
        outputs = self._write(examples[0]) if self.kind == "language" else self._classify(examples, task)
        trace: Sequence[Coefficients | None] = [None] * len(examples)
        if traced:
            trace = read_trace(self.model.routing_trace(), self.names, self.constant, len(examples))
        return [Answer(*output, coefficients) for output, coefficients in zip(outputs, trace, strict=True)]

    def _classify(self, examples: Sequence[Example], task: int) -> list[tuple[str, list[str], list[float]]]:
        model = self.model
        if self.kind == "image":
            mode = "L" if getattr(model.backbone.config, "num_channels", 3) == 1 else "RGB"
            images = [example.image.convert(mode) for example in examples if example.image]
            inputs = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        else:
            inputs = self._tokens(*examples)
        logits = model(**_on(inputs, model), task=model.experts[task]).logits.float().cpu()  # (B, C)
        labels = model.config.experts[task]["labels"] if self.has_heads else list(model.config.id2label.values())
        if logits.shape[1] == 1:
            return [(f"{value:.3g}", [], []) for value in logits[:, 0].tolist()]
        names = [str(label) for label in labels]
        return [(names[int(row.argmax())], names, row.tolist()) for row in logits.softmax(-1)]

    def _write(self, example: Example) -> list[tuple[str, list[str], list[float]]]:
        model, inputs = self.model, _on(self._tokens(example), self.model)
        written = model.generate(**inputs, max_new_tokens=self.limits[1], do_sample=False)[0]
        if model.config.head == "causal-lm":
            written = written[inputs["input_ids"].shape[1] :]
        return [(self.processor.decode(written, skip_special_tokens=True).strip(), [], [])]

    def _tokens(self, *examples: Example) -> dict[str, torch.Tensor]:
        """The model's inputs for texts: ids, mask, and perhaps token types."""
        texts = [example.text for example in examples]
        if self.kind == "language" and self.template is None:
            question = [{"role": "user", "content": texts[0]}]
            with self._tokenizing:
                encoded = self.processor.apply_chat_template(
                    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        else:
            form = self.template if self.kind == "language" and self.template else "{}"
            pairs = [example.pair for example in examples]
            both = ([form.replace("{}", text, 1) for text in texts], *([pairs] if any(pairs) else []))
            with self._tokenizing:
                encoded = self.processor(*both, padding=len(examples) > 1, return_tensors="pt")
        return dict(encoded)

    def parts(self) -> dict[str, int]:
        """Numbers of parameters: routed weights, their task vectors, merged weights, heads and routers."""
        facts = self.model.summary()
        linears = [linear for unit in self.model.units for linear in unit.linears if linear.biases is not None]
        others = ("merged_parameters", "head_parameters", "trainable")
        upscaled = facts["upscaled_parameters"] + sum(linear.out_features for linear in linears)
        rest = {name: facts[name] for name in others}
        vectors = facts["parameters"] - upscaled - sum(rest.values())
        return {"upscaled_parameters": upscaled, "task_vectors": vectors, **rest}


def _on(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Inputs on a model's device; pixels in its dtype."""
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


# ---------------------------------------------------------------- loading


def load(settings: Settings) -> Served:
    """Loads a published model or one in a folder, with all files from one commit.

    Raises:
        LoadError: with a message for the page.
    """
    with published(settings, _check, (*TEXTS, "examples/*")) as source:
        kind, auto = HEADS[source.read_json("config.json")["head"]]
        reader = transformers.AutoImageProcessor if kind == "image" else transformers.AutoTokenizer
        processor = reader.from_pretrained(source.id, **source.options)
        model = getattr(transformers, auto).from_pretrained(source.id, **source.options).eval()
    model.record_routing = True
    has_chat = bool(getattr(processor, "chat_template", None))
    rows = source.read_json("examples.json")
    examples = read_examples(rows, source.folder) or read_examples(source.read_widget(), source.folder)
    if kind != "image":
        examples = examples or [Example(text) for text in EXAMPLES]
    return Served(
        id=source.id,
        sha=source.sha,
        model=on_device(model),
        processor=processor,
        kind=kind,
        template=settings.template or (None if has_chat else "{}"),
        examples=[example for example in examples if bool(example.image) == (kind == "image")],
    )


def _check(model_id: str, config: Any) -> None:
    """Checks, before any weights are fetched, that a model is a WEMoE that the page can show."""
    if not isinstance(config, dict) or config.get("model_type") != "wemoe":
        raise LoadError(f"{model_id} is not a WEMoE: its config.json does not say model_type: wemoe.")
    head = config.get("head", "features")
    if head not in HEADS:
        raise LoadError(f"{model_id} is a model for {head}; this page supports {', '.join(HEADS)}.")


def read_examples(content: Any, folder: Path) -> list[Example]:
    """Inputs from the content of examples.json.

    Args:
        content: texts, or objects with ``text`` (and ``text_pair``) or ``image``, and perhaps ``task``, the expert
            whose head is used.
        folder: to which paths of pictures are relative, such as ``examples/seven.png``.
    """
    examples = []
    for row in content if isinstance(content, list) else []:
        row = row if isinstance(row, dict) else {"text": row}
        text, pair, task = (
            value if isinstance(value := row.get(k), str) else "" for k in ("text", "text_pair", "task")
        )
        path = folder / Path(str(row.get("image")))
        if "image" in row and ".." not in path.parts and path.is_relative_to(folder) and path.is_file():
            try:
                examples.append(Example(image=read_picture(path), name=path.name, task=task))
            except InputError as error:  # the others are still shown
                logger.warning("an example is left out: %s", error)
        elif text.strip():
            examples.append(Example(text, pair, task=task))
    return examples[:MOST_EXAMPLES]
