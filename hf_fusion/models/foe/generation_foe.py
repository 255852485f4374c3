"""Fusion of Experts among language models: the fuser reads the prompt and chooses who generates."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from .experts_foe import pool_states, repeat_rows, take_rows
from .modeling_foe import FoEModel


class FoEForGeneration(FoEModel, GenerationMixin):
    """Language models, of which the fuser chooses one per prompt to generate.

    The features are the experts' embeddings of the prompt: of its last token for causal language models, the mean over
    the encoder's states for sequence-to-sequence models (the paper's mean over decoding steps would have every expert
    decode).
    """

    def prompt_embeddings(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings of prompts by all experts (or by `features_from`), (B, Σd)."""
        source = self.config.features_from
        parts: list[tuple[int, torch.Tensor]] = []
        for backbone, module in enumerate(self.backbones):
            members = [m for m in self._members(backbone) if source in (None, m)]
            if not members:
                continue
            own = repeat_rows(self._inputs_of(backbone, inputs), len(members))
            own = {name: own[name] for name in ("input_ids", "attention_mask") if name in own}
            mask = own.get("attention_mask")
            module.groups.experts = [self._members(backbone).index(m) for m in members]
            encoder_decoder = self.config.is_encoder_decoder
            body = module.model.get_encoder() if encoder_decoder else module.model.base_model
            if mask is not None and "position_ids" in inspect.signature(body.forward).parameters:
                own["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left must not shift a prompt
            states = body(**own).last_hidden_state
            pooled = pool_states(states, mask, last=not encoder_decoder)
            parts += zip(members, pooled.to(self.device).chunk(len(members)))
        return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])], 1)

    def select(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The expert chosen for each prompt, (B,)."""
        scores = self.fuser(self.prompt_embeddings(inputs))
        choice = scores.argmax(1)
        self._record(choice, order=nn.functional.one_hot(choice, self.config.num_experts), scores=scores)
        return choice

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        choice: torch.Tensor | None = None,
        **inputs: Any,
    ) -> CausalLMOutput:
        """Logits (B, T, V) of the expert chosen for each row.

        Args:
            labels: (B, T) token ids, -100 where no loss is wanted. A row's prompt ends before its first label.
            choice: (B,) experts, to skip the choice.

        Raises:
            ValueError: where the experts' tokenizers differ: there are then no common logits, only `generate()`.
        """
        if len(self.config.vocabularies) > 1:
            raise ValueError("experts with different tokenizers have no common logits; use generate()")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if choice is None:
            prompt = dict(given)
            if labels is not None and not self.config.is_encoder_decoder:
                before_answer = (labels != -100).cumsum(1) == 0
                prompt["attention_mask"] = before_answer if attention_mask is None else attention_mask * before_answer
            choice = self.select(prompt)
        if labels is not None and self.config.is_encoder_decoder:
            given["labels"] = labels
        rows_of, answers = [], []
        for expert in choice.unique().tolist():
            rows = (choice == expert).nonzero()[:, 0]
            backbone, local = self._place(expert)
            rows_of.append(rows)
            answers.append(self.backbones[backbone](take_rows(self._inputs_of(backbone, given), rows), [local]).logits)
        logits = torch.cat(answers)[torch.cat(rows_of).argsort()]
        loss = None
        if labels is not None:
            shift = 0 if self.config.is_encoder_decoder else 1
            predicted = logits[:, : logits.shape[1] - shift].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(predicted, labels[:, shift:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def _place(self, expert: int) -> tuple[int, int]:
        """An expert's backbone and its index there."""
        backbone = self.config.experts[expert]["backbone"]
        return backbone, self._members(backbone).index(expert)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        choice: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Lets the chosen expert generate for each prompt; takes what any model's `generate` takes.

        Args:
            choice: (B,) experts, to skip the choice.

        Returns:
            Token ids (B, T), padded at the end. With several tokenizers, ids live in the concatenated vocabularies;
            `FoEProcessor.batch_decode` reads them.
        """
        suffixes = tuple(f"_{index}" for index in range(1, len(self.config.vocabularies)))
        names = [n for n in kwargs if n.endswith(suffixes) or n in ("input_ids", "attention_mask", "token_type_ids")]
        given = {name: kwargs.pop(name) for name in names}
        if inputs is not None:
            given["input_ids"] = inputs
        choice = self.select(given) if choice is None else choice
        rows_of, sequences = [], []
        for expert in choice.unique().tolist():
            rows = (choice == expert).nonzero()[:, 0]
            backbone, local = self._place(expert)
            module: Any = self.backbones[backbone]
            module.groups.experts = [local]
            own = take_rows(self._inputs_of(backbone, given), rows)
            generated = module.model.generate(**own, generation_config=generation_config, **kwargs)
            offset = sum(self.config.vocabularies[: self.config.backbones[backbone]["inputs"]])
            rows_of.append(rows)
            sequences.append(generated + offset)
        length = max(sequence.shape[1] for sequence in sequences)
        result = torch.full((len(choice), length), self.config.pad_token_id or 0, device=choice.device)
        for rows, sequence in zip(rows_of, sequences, strict=True):
            result[rows, : sequence.shape[1]] = sequence
        return result


__all__ = ["FoEForGeneration"]
