"""References to models, and experts before and after their weights are loaded: plain dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from hf_fusion.models.fused_html import facts_table, first_of, lines_of, table_of_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from hf_fusion.hub.model_files import Source

SHA = re.compile(r"[0-9a-f]{40}")
CONTENT = "sha256:"
"""Prefix of the revision that names a folder by its content: ``NAME@sha256:…``."""
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NUMBERED = re.compile(rf"({_REPO.pattern})#(\d+)")  # an expert of one of PHATGOOSE's authors' checkpoints
_DIGEST = re.compile(rf"{CONTENT}[0-9a-f]{{64}}")


def as_commit(revision: str | None) -> str | None:
    """The commit that a revision names, in lower case; None for branches, tags, short hashes and ``refs/pr/1``."""
    lower = (revision or "").lower()
    return lower if SHA.fullmatch(lower) else None


@dataclass(frozen=True)
class ModelRef:
    """A reference to a model, as users, recipes and adapters write it; `str` returns its text.

    ==========================  =======================================================================
    ``owner/name``, ``name``    a repo on the Hub, at its newest commit
    ``owner/name@revision``     a repo at a commit, a branch or a tag
    ``owner/name#7[@revision]`` the eighth expert of a checkpoint of PHATGOOSE's authors
    ``NAME@sha256:…``           a folder on another machine, by its content
    anything else               the path of a folder
    ==========================  =======================================================================

    Attributes:
        id: repo id, with the number of the expert if it has one; or a folder.
        revision: a commit in lower case, a branch, a tag or a digest of the content; None if not named.
    """

    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> ModelRef:
        """Parses a reference. The name of an existing folder is taken as it is, whatever characters it contains."""
        return cls(str(text)) if _is_folder(text) else cls.parse_repo(str(text))

    @classmethod
    def parse_repo(cls, text: str) -> ModelRef:
        """`parse` without checking the disk: text in the form of a repo id is a repo, even if such a folder exists."""
        name, at, content = text.rpartition("@")
        if at and content.startswith(CONTENT):
            return cls(name, content)
        name, _, revision = text.partition("@")
        if _REPO.fullmatch(name) or _NUMBERED.fullmatch(name):
            return cls(name, as_commit(revision) or revision or None)
        return cls(text)

    @classmethod
    def parse_pair(cls, text: str) -> tuple[ModelRef | None, ModelRef]:
        """(base, adapter) for ``base+adapter``; (None, model) for any other reference."""
        base, plus, adapter = text.partition("+")
        if not plus or _is_folder(text):
            return None, cls.parse(text)
        return cls.parse(base) if base else None, cls.parse(adapter)

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @property
    def repo(self) -> str:
        """The id of the repo; for an expert of a checkpoint, without its number."""
        return match[1] if (match := _NUMBERED.fullmatch(self.id)) else self.id

    @property
    def number(self) -> int | None:
        """Index of the expert in a checkpoint; None for other models."""
        return int(match[3]) if (match := _NUMBERED.fullmatch(self.id)) else None

    @property
    def is_repo(self) -> bool:
        """Whether it may be a repo on the Hub: it has the form of a repo id, and no digest of a content."""
        return bool(_REPO.fullmatch(self.repo)) and ".." not in self.id and not self.is_content

    @property
    def is_folder(self) -> bool:
        """Whether there is a folder of that name on this machine."""
        return _is_folder(str(self))

    @property
    def is_content(self) -> bool:
        """Whether it is a folder on another machine, named by its content."""
        return bool(self.revision and self.revision.startswith(CONTENT))

    @property
    def commit(self) -> str | None:
        """The revision, if it is a commit."""
        return as_commit(self.revision)

    @property
    def pinned(self) -> bool:
        """Whether it always names the same model: a repo at a commit, or a folder by its content."""
        return bool(_DIGEST.fullmatch(self.revision or "") if self.is_content else self.is_repo and self.commit)

    def with_revision(self, revision: str | None) -> ModelRef:
        """The reference with another revision."""
        return replace(self, revision=as_commit(revision) or revision or None)


def _is_folder(name: str | Path) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or in the home of an unknown user
        return False


@dataclass(frozen=True)
class ExpertInfo:
    """One expert as the Hub describes it: metadata only; no weights were read.

    Attributes:
        id: repo id, ``owner/name``.
        sha: the commit at which everything here was read.
        task: pipeline tag ("text-classification"), or None if unknown.
        architecture: class name from ``config.json``; None for an adapter, whose base names it.
        base_model: id of the model it was fine-tuned from, if known.
        base_revision: commit of that base, if recorded.
        labels: class names ordered by class index; empty if it has no such head or no names.
        license: licence id from the card, in lower case, or None.
        size: total size of its weight files in bytes.
        downloads: number of downloads, as counted by the Hub.
        tags: all tags of the repo.
        is_adapter: whether it is a PEFT adapter rather than a full model.
        has_gates: whether it has ``phatgoose_gates.safetensors``.
        gated: whether its files require accepting an agreement.
        private: whether only its owner can see it.
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

    # What `discover` has read of the repo, so that a check need not read it again; not a field, for it is not metadata.
    read: ClassVar[Source | None] = None

    def having_read(self, source: Source) -> ExpertInfo:
        """This expert, with the files that were read from its repo attached.

        Args:
            source: the repo and what was read of it.

        Returns:
            The same object.
        """
        object.__setattr__(self, "read", source)
        return self

    @property
    def pinned(self) -> str:
        """``owner/name@sha``, the form that recipes and loaders take; ``name@`` for a folder."""
        return f"{self.id}@{self.sha}"

    @property
    def ref(self) -> ModelRef:
        """The reference to the repo at this commit."""
        return ModelRef(self.id, self.sha or None)

    @property
    def base_ref(self) -> ModelRef | None:
        """The reference to the recorded base, if there is one."""
        return ModelRef(self.base_model, self.base_revision) if self.base_model else None

    def _repr_html_(self) -> str:
        shown = {"id": self.id, "commit": self.sha, "MB": round(self.size / 1e6, 1)}
        for item in fields(self)[2:]:
            shown |= {} if item.name == "size" else {item.name: getattr(self, item.name) or None}
        return facts_table(shown)


class ForwardModel(Protocol):
    """Anything that is called like a `PreTrainedModel`, such as an expert with other weights."""

    @property
    def config(self) -> Any:
        """The configuration, which says whether the model is an encoder-decoder."""
        ...

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward function, whose parameters are the model's inputs."""
        ...

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The outputs for a batch, with ``logits``."""
        ...


@dataclass
class Adapter:
    """A LoRA adapter as tensors on its base, with alpha, rsLoRA and rank patterns already folded in.

    Attributes:
        lora: module path in the base -> (A of (r, d_in), B of (d_out, r)); the update is ``B @ A``, scaling folded in.
        saved: parameter name in the base -> the tensor that replaces it (PEFT's ``modules_to_save``).
        base: id or folder of the base model.
        base_revision: commit of the base, if the adapter records one.
        transposed: whether the base stores these weights as (d_in, d_out), as GPT-2's Conv1D does.
        model_class: name of the model class that it was trained on, if recorded.
        embeddings: paths in `lora` that are embeddings; there A is (r, width) and B is (tokens, r).
        rows: module path of an embedding -> indices of its rows (n,) and their replacements (n, width): PEFT's
            ``trainable_token_indices``. Weights that are tied to the embedding get these rows as well.
        biases: module path in `lora` -> what is added to the layer's bias (d_out,): PEFT's ``lora_bias``.
    """

    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
    saved: dict[str, torch.Tensor] = field(default_factory=dict)
    base: str = ""
    base_revision: str | None = None
    transposed: bool = False
    model_class: str = ""
    embeddings: frozenset[str] = frozenset()
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def base_ref(self) -> ModelRef | None:
        """The reference to the base, if it is known."""
        return ModelRef(self.base, self.base_revision) if self.base else None


class Gaussian(NamedTuple):
    """Mean and principal directions of an input; other directions have the variance `NOISE` of `models`.

    Attributes:
        mean: (d_in,).
        directions: (r, d_in), orthonormal.
        variances: (r,), along the directions.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor


@dataclass
class Gates:
    """The gates by which PHATGOOSE routes: Gaussians at a few inputs of the base, or a vector per adapted linear layer.

    Attributes:
        vectors: module path in the base -> gate vector (d_in,); empty if the gates are Gaussian.
        kind: how they were made: "gaussian" or "trained" (`train_gates`), "average" (`average_activation`) or "arrow"
            (`arrow_prototypes`).
        offsets: for whitened gates, module path -> what is subtracted from the gate's product with LN(x), so that the
            score is a log-likelihood ratio. The router standardises gates without offsets, as in the paper.
        facts: facts about their training, as far as known: "steps", "examples", "loss_before", "loss_after".
        gaussians: path of a linear in the base -> the expert's density of LN(x), x the linear's input.
    """

    vectors: dict[str, torch.Tensor]
    kind: str = "trained"
    offsets: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    gaussians: dict[str, Gaussian] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """Their name in cards and tables: the kind, and whether they read whitened inputs."""
        return f"whitened {self.kind}" if self.offsets else self.kind

    def _repr_html_(self) -> str:
        return facts_table({"gates": self.description, "linears": list(self.vectors or self.gaussians), **self.facts})


@dataclass
class Expert:
    """A loaded expert.

    Attributes:
        name: repo id or folder name, as shown in cards, tables and traces.
        model: the full model, or for an adapter its base (one shared object for all adapters of that base).
        adapter: the LoRA adapter, or None for a full model.
        processor: tokenizer or image processor, or None.
        labels: class names ordered by class index; empty for experts without a classification head.
        revision: commit sha on the Hub; None for folders and models in memory.
        license: licence id from its card, if any.
        task: pipeline tag, if known.
        gates: the adapter's gates, or None.
        generation: content of the adapter's ``generation_config.json``, or None.
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

    @property
    def ref(self) -> ModelRef:
        """The reference to the repo at its commit; for a folder or a model in memory, its name."""
        return ModelRef(self.name, self.revision)

    def _row(self) -> dict[str, Any]:
        """What tables of notebooks show of it: no weights."""
        parts = "" if self.adapter is None else f" + LoRA on {len(self.adapter.lora)} modules"
        return {
            "name": self.name,
            "commit": (self.revision or "")[:7],
            "model": f"{type(self.model).__name__}{parts}",
            "task": self.task or "",
            "labels": ", ".join(lines_of(self.labels)),
            "gates": self.gates.description if self.gates else "",
            "license": self.license or "",
        }

    def _repr_html_(self) -> str:
        return facts_table(self._row())


class ExpertList(list[Expert]):
    """The result of `load_experts`: a list that notebooks show as a table."""

    def _repr_html_(self) -> str:
        return table_of_rows(first_of([expert._row() for expert in self], "experts"))
