"""Fusion of Experts among language models: the fuser reads the prompt and selects the expert that generates."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_foe import FoEConfig
from .experts_foe import embedding_of, repeat_rows, take_rows
from .frugal_foe import run_policy
from .options_foe import POSITIONAL, PROMPT, Arguments, changes_of, check_tokens, settings_of, shared_config
from .outputs_foe import ExpertOutput, combine


class SelectionMixin:
    """Language models among which the fuser selects one per prompt to generate.

    The features are the experts' embeddings of the prompt: of its last token for causal language models, the mean over
    the encoder's states for sequence-to-sequence models (the paper's mean over decoding steps would need every expert
    to decode).
    """

    def __init__(self: Any, config: FoEConfig, models: Sequence[PreTrainedModel] | None = None) -> None:
        super().__init__(config, models)  # type: ignore[call-arg]
        self.generation_config = shared_config(config)
        for index, backbone in enumerate([] if models else self.backbones):  # these have no generation config yet
            members = self._members(index)
            is_shared = len(members) > 1
            backbone.model.generation_config = GenerationConfig() if is_shared else settings_of(config, members[0])

    def _after_loading(self: Any, name: Any, hub: dict[str, Any]) -> None:
        super()._after_loading(name, hub)
        self.generation_config = shared_config(self.config, self.generation_config)

    def _before_saving(self: Any, kwargs: dict[str, Any]) -> None:
        """Updates the shared generation config from the experts', which may have been edited."""
        super()._before_saving(kwargs)
        self.generation_config = shared_config(self.config, self.generation_config)

    def prompt_embeddings(self: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings of prompts by all experts (or by `features_from`), (B, Σd)."""
        source = self.config.features_from
        read = range(self.config.num_experts) if source is None else [source]
        return torch.cat(self.embeddings(inputs, read, self.config.feature_depths), 1)

    def embeddings(
        self: Any, inputs: Mapping[str, Any], experts: Sequence[int], depths: Sequence[float] | None
    ) -> list[torch.Tensor]:
        """Embeddings of prompts by some experts, each (B, d_k).

        Args:
            inputs: prompts, as the processor returns them.
            experts: their indices.
            depths: see `FoEConfig.feature_depths`.
        """
        parts: dict[int, torch.Tensor] = {}
        for backbone, module in enumerate(self.backbones):
            members = [m for m in self._members(backbone) if m in experts]
            if not members:
                continue
            batch = repeat_rows(self._inputs_of(backbone, inputs), len(members))
            batch = {name: batch[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in batch}
            if "inputs_embeds" in batch:
                if len(self.backbones) > 1:
                    raise ValueError("inputs_embeds belong to one model: pass choice=, the experts that they are for")
                batch.pop("input_ids", None)
            mask = batch.get("attention_mask")
            encoder_decoder = self.config.is_encoder_decoder
            body = module.model.get_encoder() if encoder_decoder else module.model.base_model
            if mask is not None and "position_ids" in inspect.signature(body.forward).parameters:
                batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left must not shift a prompt
            with module.groups.of([self._members(backbone).index(m) for m in members]):
                output = body(**batch, **({} if depths is None else {"output_hidden_states": True}))
            states = (output.last_hidden_state,) if depths is None else output.hidden_states
            pooled = embedding_of(states, mask, depths, last=not encoder_decoder)
            parts.update(zip(members, pooled.to(self.device).chunk(len(members)), strict=True))
        return [parts[expert] for expert in experts]

    def select(self: Any, inputs: Mapping[str, Any], budget: float | None = None) -> torch.Tensor:
        """The expert chosen for each prompt, (B,).

        Args:
            inputs: prompts, as the processor returns them.
            budget: share of the cost of all experts, in (0, 1], that reading a prompt may cost: the experts read it one
                after the other, until the choice is clear. None, without ``config.budget``, has all of them read it.

        Raises:
            ValueError: a budget for a model that was not fitted frugally.
        """
        budget = self.config.budget if budget is None else budget
        count = self.config.num_experts
        if budget is None:
            scores = self.fuser(self.prompt_embeddings(inputs))
            choice = scores.argmax(1)
            self._record(choice, order=nn.functional.one_hot(choice, count), scores=scores)
            return choice
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}

        def query(rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            shown = torch.zeros(len(rows), self.fuser.shown_size, device=self.device)
            for expert in experts.unique().tolist():
                of_expert = experts == expert
                [embedding] = self.embeddings(take_rows(tensors, rows[of_expert]), [expert], self.config.feature_depths)
                shown[of_expert] = self.fuser.read_expert(expert, embedding).float()
            return shown

        batch = len(next(iter(tensors.values())))
        shown, order = run_policy(getattr(self, "policy", None), self.config, self.fuser, query, batch, budget)
        scores = self.fuser.combine(shown, order > 0)
        choice = scores.argmax(1)
        self._record(choice, order=order, scores=scores)
        return choice

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        choice: torch.Tensor | Sequence[int] | None = None,
        budget: float | None = None,
        **inputs: Any,
    ) -> CausalLMOutput:
        """Computes the logits of the expert selected for each row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T).
            labels: (B, T) token ids, -100 where no loss is wanted. A row's prompt ends before its first label.
            choice: (B,) indices of experts, in place of the fuser's selection.
            budget: see `select`.
            inputs: all else that the processor returned.

        Returns:
            The output, with logits (B, T, V) and the loss if there are labels.

        Raises:
            ValueError: the experts' tokenizers differ, so there are no common logits; use `generate()`.
        """
        if len(self.config.vocabularies or []) > 1:
            raise ValueError("experts with different tokenizers have no common logits; use generate()")
        all_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if choice is None:
            prompt = dict(all_inputs)
            if labels is not None and not self.config.is_encoder_decoder:
                unlabelled = (labels != -100).cumsum(1) == 0
                prompt["attention_mask"] = unlabelled if attention_mask is None else attention_mask * unlabelled
            choice = self.select(prompt, budget)
        choice = torch.as_tensor(choice, device=self.device)
        if labels is not None and self.config.is_encoder_decoder:
            all_inputs["labels"] = labels
        rows_of, outputs = [], []
        for expert in choice.unique().tolist():
            rows = (choice == expert).nonzero()[:, 0]
            backbone, local = self._place(expert)
            rows_of.append(rows)
            batch = take_rows(self._inputs_of(backbone, all_inputs), rows)
            outputs.append(self.backbones[backbone](batch, [local]).logits)
        width = max(
            output.shape[-1] for output in outputs
        )  # an expert may have more logits than its tokenizer has tokens
        outputs = [nn.functional.pad(each, (0, width - each.shape[-1]), value=float("-inf")) for each in outputs]
        logits = torch.cat(outputs)[torch.cat(rows_of).argsort()]
        loss = None
        if labels is not None:
            shift = 0 if self.config.is_encoder_decoder else 1
            predicted = logits[:, : logits.shape[1] - shift].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(predicted, labels[:, shift:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def _place(self: Any, expert: int) -> tuple[int, int]:
        """An expert's backbone and its index there."""
        backbone = self.config.experts[expert]["backbone"]
        return backbone, self._members(backbone).index(expert)

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        choice: torch.Tensor | Sequence[int] | None = None,
        budget: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates for each prompt with the expert selected for it, by that expert's generation config.

        The arguments are those of any model's `generate`; each expert gets its rows of them. Options of a call, and
        values of ``model.generation_config`` that were changed, override the experts'. Experts generate one after the
        other: functions and objects (logits processors, stopping criteria) see the rows and the token ids of one expert
        at a time, samples are drawn in this order, and `max_time` is the limit for all of them together.

        Args:
            inputs: (B, T) prompts.
            generation_config: its values override the experts'.
            args: other positional arguments of `generate`, in transformers' order.
            choice: (B,) indices of experts, in place of the fuser's selection.
            budget: see `select`.
            kwargs: options, and inputs as the processor returned them. With several tokenizers the inputs of tokenizer
                g end in ``_g``, as in ``decoder_input_ids_1``.

        Returns:
            Token ids (B R, T), R = `num_return_sequences`: those of a prompt are adjacent, and padded at the end with
            the padding token of the expert that generated them. With several tokenizers, ids are those of the
            concatenated vocabularies; `FoEProcessor.batch_decode` decodes them. With `return_dict_in_generate` an
            output of the experts' class: scores are -inf for tokens that an expert does not have; caches, attentions
            and hidden states are only present if one expert generated everything.

        Raises:
            ValueError: an argument or option cannot be divided among several experts; the message names it.
        """
        kwargs |= dict(zip(POSITIONAL, args, strict=False))
        if inputs is not None:
            kwargs["input_ids"] = inputs
        known = GenerationConfig()
        options = changes_of(self.config, generation_config)
        options |= {name: kwargs.pop(name) for name in list(kwargs) if hasattr(known, name)}
        check_tokens(self.config, options)
        changes = {**changes_of(self.config, self.generation_config), **options}
        prompts = [value for name, value in kwargs.items() if name.startswith(("input_ids", "inputs_embeds"))]
        if choice is None:
            if not prompts:
                raise ValueError(
                    "without input_ids or inputs_embeds no expert can be selected: pass choice=, the experts"
                )
            choice = self.select(kwargs, budget)
        choice = torch.as_tensor(choice, device=self.device).view(-1)
        batch = len(prompts[0]) if prompts else len(choice)
        if len(choice) != batch or not 0 <= int(choice.min()) <= int(choice.max()) < self.config.num_experts:
            raise ValueError(f"choice must name one of {self.config.num_experts} experts for each of {batch} prompts")
        arguments = Arguments(batch, kwargs)
        experts = choice.unique().tolist()
        settings = {expert: settings_of(self.config, expert) for expert in experts}
        not_options = {expert: config.update(**changes) for expert, config in settings.items()}
        self._check_divisible(settings, arguments)
        outputs, begin = [], time.monotonic()
        for expert, config in settings.items():
            if len(settings) > 1 and config.max_time is not None:
                config.max_time = max(config.max_time - (time.monotonic() - begin), 0.0)
            rows = (choice == expert).nonzero()[:, 0]
            backbone, local = self._place(expert)
            tokenizer = self.config.backbones[backbone]["inputs"]
            call = {**not_options[expert], **self._arguments_of(backbone, arguments, rows)}
            module: Any = self.backbones[backbone]
            sizes = self.config.vocabularies or []
            start = sum(sizes[:tokenizer])
            if start and call.get("streamer") is not None:
                call["streamer"] = ShiftedStreamer(call["streamer"], start)
            inner = module.model.generation_config  # replaces values that are None, unless None is an argument
            call |= {name: None for name in changes if changes[name] is None and getattr(inner, name, None) is not None}
            with module.groups.of([local]):
                output = module.model.generate(**call, generation_config=config)
            stop = start + sizes[tokenizer] if len(sizes) > 1 else None
            pad = self._pad_of(config, tokenizer)
            outputs.append(ExpertOutput(rows, output, config.num_beams or 1, pad, start, stop))
        return combine(outputs, sum(self.config.vocabularies or []))

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: every expert has its own cache.

        Args:
            args: ignored.
            kwargs: ignored.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__} has an expert for each prompt, not one cache: call generate()")

    def _check_divisible(self: Any, settings: Mapping[int, GenerationConfig], arguments: Arguments) -> None:
        """Raises ValueError for what several experts cannot share; makes all of them return outputs if one does."""
        names = [self.config.experts[expert]["name"] for expert in settings]
        remedy = "pass choice= with one expert for all prompts, or one prompt at a time"
        if any(config.cache_implementation == "paged" for config in settings.values()):
            raise ValueError("cache_implementation='paged' serves one model: call generate() of an expert")
        if len(settings) < 2:
            return
        if arguments.indivisible:
            raise ValueError(
                f"{arguments.indivisible[0]} cannot be divided between {' and '.join(names[:2])}: {remedy}"
            )
        tokenizers = {self.config.backbones[self.config.experts[expert]["backbone"]]["inputs"] for expert in settings}
        for name in ("tokenizer", "assistant_model") if len(tokenizers) > 1 else ():
            if name in arguments.shared and not hasattr(arguments.shared[name], "processors"):
                raise ValueError(
                    f"{name} is for one tokenizer, but {' and '.join(names[:2])} have different ones: {remedy}"
                )
        as_dict = any(config.return_dict_in_generate for config in settings.values())
        for config in settings.values():
            config.return_dict_in_generate = as_dict
        for option in ("num_return_sequences", "num_beams") if as_dict else ("num_return_sequences",):
            if len({getattr(config, option) or 1 for config in settings.values()}) > 1:
                raise ValueError(f"{' and '.join(names[:2])} differ in {option}: pass {option}=")
        for option in ("output_attentions", "output_hidden_states") if as_dict else ():
            if any(getattr(config, option) for config in settings.values()):
                raise ValueError(f"{option}: {' and '.join(names[:2])} have different states: {remedy}")

    def _arguments_of(self: Any, backbone: int, arguments: Arguments, rows: torch.Tensor) -> dict[str, Any]:
        """The arguments of one expert's `generate` besides options."""
        tokenizer = self.config.backbones[backbone]["inputs"]
        call = {**arguments.shared}
        if (by_row := call.get("prefix_allowed_tokens_fn")) is not None:
            indices = rows.tolist()
            call["prefix_allowed_tokens_fn"] = lambda row, ids: by_row(indices[row], ids)
        if hasattr(call.get("tokenizer"), "processors"):
            call["tokenizer"] = call["tokenizer"].processors[tokenizer]
        taken = arguments.take(rows)
        suffixes = tuple(f"_{index}" for index in range(1, len(self.config.vocabularies or [])))
        for name in taken if tokenizer else ():
            is_for_first = name not in PROMPT and not name.endswith(suffixes)
            if is_for_first and f"{name}_{tokenizer}" not in taken:
                raise ValueError(f"{name} is for the first tokenizer: pass {name}_{tokenizer} too")
        return {**call, **(self._inputs_of(backbone, taken) if taken else {})}

    def _pad_of(self: Any, settings: GenerationConfig, tokenizer: int) -> int:
        """The token that pads what an expert generated, as in its own `generate`."""
        if settings.pad_token_id is not None:
            return int(settings.pad_token_id)
        end = settings.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return int(end if end is not None else (self.config.pad_token_id or 0) if not tokenizer else 0)


class ShiftedStreamer:
    """Passes token ids to a streamer as ids of the fused vocabulary."""

    def __init__(self, streamer: Any, start: int) -> None:
        self.streamer, self.start = streamer, start

    def put(self, value: torch.Tensor) -> None:
        """Passes on token ids of the expert's tokenizer."""
        self.streamer.put(value + self.start)

    def end(self) -> None:
        """Marks the end of the text."""
        self.streamer.end()


__all__ = ["SelectionMixin"]
