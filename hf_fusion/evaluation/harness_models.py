"""Language models as lm-evaluation-harness runs them. This module imports the harness: import it where tasks are run.

The harness's class for transformers runs a plain model. Fused models must be told more than it tells:

- a router may read padding, so it gets a mask; the routers of a WEMoE read the prompt alone, so that a continuation is
  scored with the weights that would generate it.
- a Fusion of Experts selects an expert by the prompt, which then reads and writes with its own tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length

from hf_fusion.errors import FusionError
from hf_fusion.models.generation_foe import SelectionMixin
from hf_fusion.models.options_foe import changes_of, settings_of
from hf_fusion.progress import Phase, phase

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""A request: context and continuation, as texts and as the token ids of each."""
Likelihood = tuple[float, bool]
"""Logarithm of a continuation's probability, and whether greedy decoding gives it."""


def harness_model(model: PreTrainedModel, tokenizer: Any, name: str, batch_size: int) -> LM:
    """A language model for the harness.

    Args:
        model: a causal or sequence-to-sequence language model, fused or not.
        tokenizer: the model's; of a Fusion of Experts its processor.
        name: for progress and errors.
        batch_size: requests per step.

    Raises:
        FusionError: a tokenizer lacks the tokens that the harness needs.
    """
    if isinstance(model, SelectionMixin):
        return SelectionLM(model, name, batch_size)
    if hasattr(model, "backbone"):
        return RoutedLM(model, tokenizer, name, batch_size)
    return FusionLM(model, tokenizer, name, batch_size)


class FusionLM(HFLM):
    """A language model as the harness runs it, with progress as a phase of `hf_fusion.progress`.

    Args:
        model: called and asked to generate as a model of transformers.
        tokenizer: the model's; a copy is used, since the harness may give it a padding token.
        name: for progress and errors.
        batch_size: requests per step.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, batch_size: int) -> None:
        _check_tokenizer(tokenizer, name)
        backend: Any = "seq2seq" if model.config.is_encoder_decoder else "causal"
        config = getattr(model, "backbone", model).config  # a fused config has no length
        super().__init__(
            model,
            backend=backend,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=resolve_max_length(config, tokenizer, default=self._DEFAULT_MAX_LENGTH),
        )
        self.name = name
        self._phase: Phase | None = None

    @contextmanager
    def _shown(self, requests: Sequence[Instance]) -> Iterator[None]:
        with phase(f"Running {len(requests):,} requests on {self.name}", len(requests)) as self._phase:
            yield

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Likelihood]:
        """See `lm_eval.api.model.LM`."""
        with self._shown(requests):
            likelihoods: list[Likelihood] = super().loglikelihood(requests, disable_tqdm=True)
        return likelihoods

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See `lm_eval.api.model.LM`."""
        with self._shown(requests):
            totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See `lm_eval.api.model.LM`."""
        with self._shown(requests):
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Likelihood]:
        found: list[Likelihood] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        return found

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sequences: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return sequences

    def _advance(self, rows: int) -> None:
        if self._phase is not None:
            self._phase.advance(rows)


class RoutedLM(FusionLM):
    """A model with routers: they get a mask of the padding, and those that read prompts a mask of the prompt."""

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Likelihood]:
        if self.backend != "causal":  # the encoder reads the prompt alone, with a mask
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # Continuations that differ in their last token alone are scored by one forward, if their prompt is the same.
        sharing: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            sharing.setdefault((tuple(context), tuple(continuation[:-1])), []).append(index)
        ordered = sorted(sharing, key=lambda pair: -len(pair[0]) - len(pair[1]))
        answers: list[Likelihood] = [(0.0, False)] * len(requests)
        size = override_bs or int(self.batch_size)
        for start in range(0, len(ordered), size):
            pairs = ordered[start : start + size]
            rows = [(*context, *read)[-self.max_length :] for context, read in pairs]
            logits = self._prompted(rows, [len(read) for _, read in pairs])
            for pair, row, output in zip(pairs, rows, logits, strict=True):
                scored = output[len(row) - len(pair[1]) - 1 : len(row)].log_softmax(-1)  # (continuation, vocabulary)
                for index in sharing[pair]:
                    wanted = torch.tensor(requests[index][2], device=scored.device)
                    total = scored.gather(1, wanted[:, None]).sum()
                    answers[index] = float(total), bool((scored.argmax(-1) == wanted).all())
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
            self._advance(sum(len(sharing[pair]) for pair in pairs))
        return answers

    @torch.no_grad()
    def _prompted(self, rows: Sequence[Sequence[int]], read: Sequence[int]) -> torch.Tensor:
        """Logits (B, T, V) of rows of token ids, padded on the right; the last `read` of each follow its prompt."""
        if any(count >= len(row) for row, count in zip(rows, read, strict=True)):
            raise FusionError(
                f"a task has a continuation of more than {self.max_length} tokens, all that {self.name} reads",
                "run the task on a model with a longer context",
            )
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        place = torch.arange(width, device=self.device)[None]
        lengths = torch.tensor([list(map(len, rows)), read], device=self.device)[..., None]
        inputs = {"input_ids": ids, "attention_mask": (place < lengths[0]).long()}
        if hasattr(self.model, "prompt_tokens"):
            inputs["prompt_mask"] = place < lengths[0] - lengths[1]
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


class SelectionLM(LM):
    """A Fusion of Experts: each request goes to the expert that the fuser selects by its context.

    Args:
        model: experts that write.
        name: for progress and errors.
        batch_size: requests per step.
    """

    def __init__(self, model: Any, name: str, batch_size: int) -> None:
        super().__init__()
        self.model, self.size = model, batch_size
        self.experts = []
        for index, row in enumerate(model.config.experts):
            expert = _SelectedExpert(model, index)
            self.experts.append(FusionLM(expert, expert.tokenizer, f"{name}, {row['name']}", batch_size))

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """See `lm_eval.api.model.LM`."""
        return self._divided("loglikelihood", requests, [request.args[0] for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See `lm_eval.api.model.LM`; a document without a prompt goes to the expert selected for its first token."""
        return self._divided("loglikelihood_rolling", requests, [""] * len(requests))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See `lm_eval.api.model.LM`."""
        return self._divided("generate_until", requests, [request.args[0] for request in requests])

    def _divided(self, method: str, requests: list[Instance], contexts: Sequence[str]) -> list[Any]:
        """Runs a method of each selected expert on its requests; answers in the order of all requests."""
        chosen = self.select(contexts)
        answers: list[Any] = [None] * len(requests)
        for number in sorted({*chosen}):
            rows = [row for row, expert in enumerate(chosen) if expert == number]
            found = getattr(self.experts[number], method)([requests[row] for row in rows])
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    @torch.no_grad()
    def select(self, contexts: Sequence[str]) -> list[int]:
        """The index of the expert for each context."""
        texts = sorted({text for text in contexts if text}, key=len, reverse=True)
        chosen: dict[str, int] = {}
        for start in range(0, len(texts), self.size):
            batch = texts[start : start + self.size]
            chosen |= zip(batch, self.model.select(self.model.processor(text=batch).to(self.model.device)).tolist())
        if "" in contexts:
            chosen[""] = int(self.model.select(self._first_tokens()))
        return [chosen[text] for text in contexts]

    def _first_tokens(self) -> dict[str, torch.Tensor]:
        """The inputs of an empty context: for each tokenizer the token that stands before a text."""
        inputs = {}
        for index, tokenizer in enumerate(self.model.processor.processors):
            suffix = f"_{index}" if index else ""
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            inputs[f"input_ids{suffix}"] = torch.tensor([[first]], device=self.model.device)
            inputs[f"attention_mask{suffix}"] = torch.ones(1, 1, dtype=torch.long, device=self.model.device)
        return inputs


class _SelectedExpert:
    """One expert of a Fusion of Experts, as a model of transformers: called, and asked to generate."""

    def __init__(self, model: Any, index: int) -> None:
        number = model.config.experts[index]["backbone"]
        self.fusion, self.index, self.backbone_of = model, index, model.backbones[number]
        self.local = model._members(number).index(index)
        self.tokenizer = model.processor.processors[model.config.backbones[number]["inputs"]]
        self.config, self.device = self.backbone_of.model.config, model.device

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        return self.backbone_of({"input_ids": input_ids, **inputs}, [self.local])

    def generate(self, **options: Any) -> Any:
        """With the generation config of the expert, and what was changed in that of the fusion."""
        settings = settings_of(self.fusion.config, self.index)
        settings.update(**changes_of(self.fusion.config, self.fusion.generation_config))
        with self.backbone_of.groups.of([self.local]):
            return self.backbone_of.model.generate(**options, generation_config=settings)


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises for a tokenizer with which the harness cannot end an answer or begin a text."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise FusionError(
            f"{name} has no tokenizer, without which lm-evaluation-harness cannot run it",
            "pass the folder in which both are saved: model.save_pretrained(FOLDER); tokenizer.save_pretrained(FOLDER)",
        )
    if tokenizer.eos_token_id is None:
        raise FusionError(
            f"the tokenizer of {name} has no end-of-sequence token, which ends answers in lm-evaluation-harness",
            "name one in Python, and save it: tokenizer.eos_token = '…'; tokenizer.save_pretrained(FOLDER)",
        )


__all__ = ["FusionLM", "RoutedLM", "SelectionLM", "harness_model"]
