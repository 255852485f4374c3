"""Runs a batch of rows on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from hf_fusion.models.options_foe import changes_of, settings_of
from hf_fusion.serving.routing import recording, routing_of
from hf_fusion.serving.rows import AnswerRow, ReadRow, Row
from hf_fusion.serving.served import ANSWERS, EMBEDDINGS, ServedModel
from hf_fusion.serving.steps import Choosing, Ending

# what `generate()` must leave to the rows; all else is as the model's generation config says
FOR_ROWS: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "stop_strings", "max_time", "prompt_lookup_num_tokens")),
}


def engine_of(served: ServedModel) -> Callable[[Sequence[Row]], None]:
    """The function that runs batches; afterwards every row is done."""
    run = run_answers if served.kind == ANSWERS else run_inputs
    return partial(cast(Callable[[ServedModel, Sequence[Row]], None], run), served)


@torch.no_grad()
def run_answers(served: ServedModel, rows: Sequence[AnswerRow]) -> None:
    """Generates answers. In a Fusion of Experts, each expert writes those of the prompts that it was selected for."""
    if served.selects:
        recorded = [row for row in rows if row.sampling.routing]
        with recording(served, bool(recorded)):
            inputs = _padded(served, rows)
            for row, choice in zip(rows, served.model.select(inputs).tolist(), strict=True):
                row.choice = choice
            for index, row in enumerate(rows):
                row.routing = routing_of(served, index, None) if row.sampling.routing else None
    for choice in sorted({-1 if row.choice is None else row.choice for row in rows}):
        _generate(served, [row for row in rows if (-1 if row.choice is None else row.choice) == choice])


def _generate(served: ServedModel, rows: Sequence[AnswerRow]) -> None:
    model, choice = served.model, rows[0].choice
    tokenizer = served.tokenizer_of(choice)
    settings = model.generation_config
    if choice is not None:
        settings = settings_of(model.config, choice)
        settings.update(**changes_of(model.config, model.generation_config))
    ends = settings.eos_token_id if settings.eos_token_id is not None else []
    stops = settings.stop_strings or []
    for row in rows:
        row.begin(
            partial(tokenizer.decode, skip_special_tokens=True),
            frozenset(ends if isinstance(ends, (list, tuple)) else [ends]),
            [stops] if isinstance(stops, str) else stops,
            served.device,
        )
    inputs = _padded(served, rows)
    options = {**FOR_ROWS, "max_new_tokens": max(row.sampling.max_tokens for row in rows)}
    if choice is not None:
        options["choice"] = [choice] * len(rows)
    is_recorded = not served.selects and any(row.sampling.routing for row in rows)
    width = inputs["input_ids"].shape[1]
    with recording(served, is_recorded * len(rows) * (width + options["max_new_tokens"])):
        model.generate(
            **inputs,
            **options,
            logits_processor=LogitsProcessorList([Choosing(rows, settings, partial(served.named, tokenizer))]),
            stopping_criteria=StoppingCriteriaList([Ending(rows)]),
        )
        for index, row in enumerate(rows):
            if is_recorded and row.sampling.routing and not row.cancelled:
                row.routing = _routing(served, index, row, tokenizer, width)
    for row in rows:
        row.reason = row.reason or "length"
        row.finish()


def _routing(served: ServedModel, index: int, row: AnswerRow, tokenizer: Any, width: int) -> dict[str, Any] | None:
    """The routing of an answer: the tokens that were read are the prompt's and the answer's, all but the last."""
    if served.is_encoder_decoder:
        return routing_of(served, index, ["", *map(partial(_text_of, tokenizer), row.tokens[:-1])])
    read = [*row.prompt[0], *row.tokens[:-1]]
    return routing_of(served, index, list(map(partial(_text_of, tokenizer), read)), width - len(row.prompt[0]))


def _text_of(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def _padded(served: ServedModel, rows: Sequence[AnswerRow]) -> dict[str, torch.Tensor]:
    """The inputs of prompts of different lengths. An answer goes on at the right; an encoder reads from the left."""
    inputs = {}
    for number, tokenizer in enumerate(served.tokenizers):
        prompts = [list(row.prompt[number]) for row in rows]
        width, pad = max(map(len, prompts)), tokenizer.pad_token_id or 0
        fill = [[pad] * (width - len(prompt)) for prompt in prompts]
        marks = [[1] * len(prompt) for prompt in prompts]
        gaps = [[0] * len(each) for each in fill]
        suffix = f"_{number}" if number else ""
        for name, left, right in (("input_ids", fill, prompts), ("attention_mask", gaps, marks)):
            pairs = zip(right, left) if served.is_encoder_decoder else zip(left, right)
            inputs[name + suffix] = torch.tensor([first + second for first, second in pairs], device=served.device)
    return inputs


@torch.no_grad()
def run_inputs(served: ServedModel, rows: Sequence[ReadRow]) -> None:
    """Computes embeddings or classes; rows with another head or another kind of input are another forward."""
    parts: dict[Any, list[ReadRow]] = {}
    for row in rows:
        parts.setdefault((row.task, tuple(row.inputs)), []).append(row)
    for (task, names), part in parts.items():
        given = {name: [row.inputs[name] for row in part] for name in names}
        inputs = _processed(served, given)
        size = next(iter(inputs.values())).shape[:2].numel()
        is_recorded = any(row.routing for row in part)
        with recording(served, is_recorded * size):
            output = served.model(**inputs, **({} if task is None else {"task": task}))
            values = _pooled(output, inputs, served.pooling) if served.kind == EMBEDDINGS else output.logits
            labels = [] if served.kind == EMBEDDINGS else _labels(served, task, values.shape[-1])
            for index, (row, found) in enumerate(zip(part, values.float().cpu().tolist(), strict=True)):
                row.output, row.labels = found, labels
                if row.routing:
                    row.routing = _read_routing(served, index, inputs)
                row.finish()


def _processed(served: ServedModel, given: Mapping[str, list[Any]]) -> dict[str, torch.Tensor]:
    options = {} if "images" in given else {"padding": True, "truncation": False}
    if "text_pair" in given and not hasattr(served.processor, "processors"):
        encoded = served.processor(given["text"], given["text_pair"], return_tensors="pt", **options)
    elif "images" in given:
        encoded = served.processor(images=given["images"], return_tensors="pt")
    elif hasattr(served.processor, "processors"):
        encoded = served.processor(**given, return_tensors="pt", **options)
    else:
        encoded = served.processor(given["text"], return_tensors="pt", **options)
    dtype = served.model.dtype
    return {
        name: value.to(served.device, dtype) if value.is_floating_point() else value.to(served.device)
        for name, value in encoded.items()
    }


def _pooled(output: Any, inputs: Mapping[str, torch.Tensor], how: str) -> torch.Tensor:
    """Embeddings of unit length (B, d), as sentence-transformers computes them."""
    states = output.last_hidden_state.float()
    mask = inputs["attention_mask"].to(states)[..., None]
    if how == "mean":
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    else:
        order = torch.arange(mask.shape[1], device=mask.device)
        real = mask[..., 0].bool()
        places = torch.where(real, order, len(order)).amin(1) if how == "cls" else torch.where(real, order, -1).amax(1)
        pooled = states[torch.arange(len(states), device=states.device), places]
    return torch.nn.functional.normalize(pooled, dim=-1)


def _labels(served: ServedModel, task: str | None, count: int) -> list[str]:
    config: Any = served.model.config
    if task is not None and getattr(config, "task_heads", None):
        rows = {row["name"]: row["labels"] for row in config.experts}
        return list(rows[task])
    return [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(count)]


def _read_routing(served: ServedModel, index: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    if "input_ids" not in inputs or served.family != "phatgoose":
        return routing_of(served, index, None)
    tokenizer, real = served.tokenizers[0], inputs["attention_mask"][index].bool()
    start = int(real.long().argmax())
    tokens = inputs["input_ids"][index][real].tolist()
    return routing_of(served, index, [_text_of(tokenizer, token) for token in tokens], start)


__all__ = ["engine_of", "run_answers", "run_inputs"]
