"""What an expert is, before and after its weights are loaded: plain dataclasses every other part speaks in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from hf_fusion.hub.source import Source


@dataclass(frozen=True)
class ExpertInfo:
    """One expert as the Hub describes it: metadata only, no weights were read.

    Attributes:
        id: repo id, ``owner/name``.
        sha: the commit everything else here was read at.
        task: pipeline tag ("text-classification"), or None where nothing tells it.
        architecture: class name from ``config.json``; for an adapter, None (its base tells).
        base_model: id of the model it was fine-tuned from, if known.
        base_revision: commit of that base, if recorded.
        labels: class names ordered by class index; empty where it has no head or no names.
        license: licence id of the card, lower case, or None.
        size: bytes of its weight files.
        downloads: as counted by the Hub.
        tags: all tags of the repo.
        is_adapter: a PEFT adapter rather than a full model.
        has_gates: carries ``phatgoose_gates.safetensors``.
        gated: files need an accepted agreement.
        private: only its owner sees it.
    """

    id: str
    sha: str
    task: str | None = None
    architecture: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    labels: tuple[str, ...] = ()
    license: str | None = None
    size: int = 0
    downloads: int = 0
    tags: tuple[str, ...] = ()
    is_adapter: bool = False
    has_gates: bool = False
    gated: bool = False
    private: bool = False

    # What `discover` read of the repo, so that a check does not ask again; not a field, since it describes no expert.
    read: ClassVar[Source | None] = None

    def having_read(self, source: Source) -> ExpertInfo:
        """This, with what was read of the repo kept on it."""
        object.__setattr__(self, "read", source)
        return self

    @property
    def pinned(self) -> str:
        """``owner/name@sha``, the form every recipe and every loader takes."""
        return f"{self.id}@{self.sha}"


@dataclass
class Adapter:
    """A LoRA adapter as tensors on its base, with alpha, rsLoRA and rank patterns already folded in.

    Attributes:
        lora: module path in the base -> (A of (r, d_in), B of (d_out, r)); the update is ``B @ A``, scaling folded in.
        saved: parameter name in the base -> the tensor that replaces it (PEFT's ``modules_to_save``).
        base: id or folder of the base model.
        base_revision: commit of the base, if the adapter records one.
        transposed: whether the base stores these weights as (d_in, d_out), as GPT-2's Conv1D does.
        model_class: name of the class that it was trained on, if it records one.
        embeddings: paths in `lora` that are embeddings: A is of (r, width) and B of (tokens, r).
        rows: module path of an embedding -> numbers of its rows (n,) and what they are replaced by (n, width): PEFT's
            ``trainable_token_indices``. What is tied to the embedding has these rows as well.
    """

    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
    saved: dict[str, torch.Tensor] = field(default_factory=dict)
    base: str = ""
    base_revision: str | None = None
    transposed: bool = False
    model_class: str = ""
    embeddings: frozenset[str] = frozenset()
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class Gates:
    """What PHATGOOSE routes by: one vector per linear that an expert adapts.

    Attributes:
        vectors: module path in the base -> gate vector (d_in,).
        kind: where they come from: "trained" (`train_gates`), "average" (`average_activation`) or "arrow"
            (`arrow_prototypes`).
        offsets: of whitened gates, by module path: what is subtracted from their product with LN(x) to make the score
            a log-likelihood ratio. Gates without are standardised by the router, as in the paper.
        facts: what is known of their training: "steps", "examples", "loss_before", "loss_after".
    """

    vectors: dict[str, torch.Tensor]
    kind: str = "trained"
    offsets: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """What cards and tables call them: the kind, and whether they read whitened inputs."""
        return f"whitened {self.kind}" if self.offsets else self.kind


@dataclass
class Expert:
    """A loaded expert.

    Attributes:
        name: repo id or folder name; what cards, tables and traces call it.
        model: the full model, or for an adapter its base (one shared object for all adapters of that base).
        adapter: the LoRA adapter, or None for a full model.
        processor: tokenizer or image processor, or None.
        labels: class names ordered by class index; empty for experts without a classification head.
        revision: commit sha on the Hub, None for folders and in-memory models.
        license: licence id of its card, if any.
        task: pipeline tag, if known.
        gates: the adapter's gates, or None where it has none.
        generation: what an adapter's own ``generation_config.json`` says, or None where it has none.
    """

    name: str
    model: PreTrainedModel
    adapter: Adapter | None = None
    processor: Any = None
    labels: list[str] = field(default_factory=list)
    revision: str | None = None
    license: str | None = None
    task: str | None = None
    gates: Gates | None = None
    generation: dict[str, Any] | None = None
