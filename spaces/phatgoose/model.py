"""A published router of language models, loaded by its id; it streams an answer and returns its routing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from routing import Routing, read_trace, split_text
from shared.errors import InputError, LoadError
from shared.experts import short_names
from shared.loading import Loaded, on_device, published
from shared.settings import Settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

NEW_TOKENS = 64
LONGEST_PROMPT = 1024  # tokens
MOST_CHARACTERS = 20_000
MOST_EXAMPLES = 8
EXAMPLES = [
    "Sort these words alphabetically: pear, fig, apple",
    "What is 17 + 25?",
    "Tell me in one sentence what a router is.",
]
# Marker in a tokenizer's chat template → the form of a prompt. It has no system message, as in the adapters' training;
# SmolLM2's template would add one.
DIALECTS = {"<|im_start|>": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"}
# what generates: the router, the base alone, the mean of all experts, or the expert of an index alone
Writer = str | int
ROUTED, BASE, MERGED = "routed", "base", "merged"


@dataclass(frozen=True)
class Answer:
    """An answer so far.

    Attributes:
        prompt: of the visitor.
        text: of the answer.
        done: whether it is complete.
        routing: of prompt and answer, once a routed answer is complete.
    """

    prompt: str
    text: str = ""
    done: bool = False
    routing: Routing | None = None


@dataclass
class Served(Loaded):
    """A loaded router and what its page needs.

    Attributes:
        tokenizer: from `AutoTokenizer`.
        template: the prompt's form, with {} for the prompt; None: the tokenizer's chat template.
        examples: prompts to click.
        best: index of the expert with the best measured score; 0 if none was measured.
        measured: whether scores of experts were measured.
    """

    tokenizer: Any
    template: str | None
    examples: list[str]
    best: int
    measured: bool

    @property
    def names(self) -> list[str]:
        """The experts, by short names."""
        return short_names(self.model.experts)

    @property
    def limits(self) -> tuple[int, int]:
        """Maximum number of tokens of a prompt, and of generated tokens."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_PROMPT * 2
        new = min(NEW_TOKENS, context // 2)
        return min(LONGEST_PROMPT, context - new), new

    def read(self, prompt: str | None) -> torch.Tensor:
        """The token ids of a prompt in the model's template, (1, T).

        Raises:
            InputError: the prompt is empty or too long.
        """
        prompt, tokenizer, most = (prompt or "").strip(), self.tokenizer, self.limits[0]
        if not prompt:
            raise InputError("There is no prompt yet: write something first.")
        if len(prompt) > MOST_CHARACTERS:
            raise InputError(f"That prompt is too long: at most {MOST_CHARACTERS:,} characters are allowed.")
        if self.template is None:
            question = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(
                question, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(self.template.replace("{}", prompt, 1), return_tensors="pt")
        ids = encoded["input_ids"]
        if ids.shape[1] > most:
            raise InputError(f"That prompt is too long: it has {ids.shape[1]:,} tokens, at most {most:,} are allowed.")
        return ids

    def ask(self, prompt: str, writer: Writer = ROUTED) -> Iterator[Answer]:
        """Yields a growing answer; the last one is complete.

        Args:
            writer: `ROUTED`, `BASE`, `MERGED` or the index of an expert.

        Raises:
            InputError: see `read`.
        """
        ids = self.read(prompt)
        stopped = threading.Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        done: dict[str, Any] = {}

        def write() -> None:
            try:
                done.update(self._write(ids, writer, streamer, stopped))
            except BaseException as error:
                done["error"] = error
            finally:
                streamer.end()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        text = ""
        try:
            for part in streamer:
                text += part
                yield Answer(prompt, text)
        finally:  # also when the visitor leaves
            stopped.set()
            thread.join()
        if "error" in done:
            raise done["error"]
        yield Answer(prompt, text, done=True, routing=done["routing"])

    @torch.no_grad()
    def _write(self, ids: torch.Tensor, writer: Writer, streamer: Any, stopped: threading.Event) -> dict[str, Any]:
        model, count = self.model, len(self.model.experts)
        settings = copy.deepcopy(model.generation_config)
        settings.update(max_new_tokens=self.limits[1], do_sample=False)
        stop = StoppingCriteriaList([_Stopped(stopped)])
        options = {"generation_config": settings, "streamer": streamer, "stopping_criteria": stop}
        input_ids = ids.to(model.device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if writer != ROUTED:
            mean = [1 / count] * count
            with model.using({BASE: None, MERGED: mean}[writer] if isinstance(writer, str) else model.experts[writer]):
                model.generate(**inputs, **options)
            return {"routing": None}
        written = model.generate(**inputs, **options)[0].tolist()
        trace = model.routing_trace()  # of this thread
        tokenizer = self.tokenizer
        markup = set(tokenizer.all_special_ids)
        pieces = split_text(written, lambda part: tokenizer.decode(part, clean_up_tokenization_spaces=False))
        return {"routing": read_trace(trace, pieces, [token in markup for token in written], ids.shape[1])}


class _Stopped(StoppingCriteria):
    """Stops generating after the visitor has left."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def load(settings: Settings) -> Served:
    """Loads a published router or one in a folder, with all files from one commit.

    Raises:
        LoadError: with a message for the page.
    """
    with published(settings, _check) as source:
        tokenizer = AutoTokenizer.from_pretrained(source.id, **source.options)
        model = AutoModelForCausalLM.from_pretrained(source.id, **source.options).eval()
    best = best_expert(source.read_json("results.json"), model.experts)
    served = Served(
        id=source.id,
        sha=source.sha,
        model=on_device(model),
        tokenizer=tokenizer,
        template=settings.template or _template(tokenizer.chat_template),
        examples=read_examples(source.read_json("examples.json")) or read_examples(source.read_widget()) or EXAMPLES,
        best=best or 0,
        measured=best is not None,
    )
    model.record_routing = sum(served.limits)  # set once, since visitors share the model; each thread has its own trace
    return served


def _check(model_id: str, config: Any) -> None:
    """Checks, before any weights are fetched, that a model is a router of a causal language model."""
    if not isinstance(config, dict) or config.get("model_type") != "phatgoose":
        raise LoadError(f"{model_id} is not a PHATGOOSE router: its config.json does not say model_type: phatgoose.")
    if (head := config.get("head", "causal-lm")) != "causal-lm":
        raise LoadError(f"{model_id} has a head for {head}; this page needs a causal language model.")


def _template(chat_template: str | None) -> str | None:
    """The default form of a prompt: the prompt alone without a chat template; None to use the tokenizer's template."""
    if not chat_template:
        return "{}"
    return next((form for mark, form in DIALECTS.items() if mark in chat_template), None)


def best_expert(results: Any, experts: list[str]) -> int | None:
    """Index of the expert with the best score, from the content of results.json; None if none was measured.

    Args:
        results: contains `predictors` (in earlier files `systems`), each with a name and either a score or the means
            over groups of tasks.
    """
    rows = results.get("predictors", results.get("systems")) if isinstance(results, dict) else None
    names = {**{name: i for i, name in enumerate(short_names(experts))}, **{n: i for i, n in enumerate(experts)}}
    scores = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("name") in names:
            means = row.get("means")
            mean = means.get("held-in") if isinstance(means, dict) else None
            score = mean.get("score") if isinstance(mean, dict) else row.get("score")
            if isinstance(score, (int, float)):
                scores[names[row["name"]]] = score
    return max(scores, key=lambda expert: scores[expert]) if scores else None


def read_examples(content: Any) -> list[str]:
    """Prompts from the content of examples.json: texts, or objects with a "prompt" or "text"."""
    rows = content if isinstance(content, list) else []
    texts = [row.get("prompt", row.get("text")) if isinstance(row, dict) else row for row in rows]
    return [text for text in texts if isinstance(text, str) and text.strip()][:MOST_EXAMPLES]
