"""Groups compatible experts into sets that can be fused together, with the command for each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import printable
from hf_fusion.families import METHODS, family_of
from hf_fusion.hub.client import hub_api, in_parallel
from hf_fusion.hub.compat import Compatibility, Rejected
from hf_fusion.hub.download import download
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.refs_to_files import resolve_repo
from hf_fusion.hub.rejection_reasons import Reason, ReasonKind
from hf_fusion.hub.selection import safe_files
from hf_fusion.hub.task_heads import Head, head_of_architecture, head_of_task, normalise_label
from hf_fusion.types import ExpertInfo, ModelRef, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MOST_BYTES = 200_000_000
"""Weights of the proposed experts are checked for NaN and Inf up to this total size; `fuse` always checks."""
_UNNAMED = re.compile(r"LABEL_\d+")
_GENERATES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_CLASSIFIES = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")


@dataclass(frozen=True)
class Group:
    """Experts that one command fuses.

    Attributes:
        experts: in the order of discovery.
        head: name of the Auto class of their head, or "unknown".
        base: ``owner/base[@revision]``, if they share one.
        labels: names of all their classes.
        options: of ``hf-fusion fuse``; None if it cannot fuse them.
        why_not: why it cannot.
    """

    experts: tuple[ExpertInfo, ...]
    head: str
    base: str | None
    labels: tuple[str, ...]
    options: tuple[str, ...] | None
    why_not: str = ""

    @property
    def command(self) -> str | None:
        """The command that fuses them into a new folder; None for a single expert, or if they cannot be fused."""
        if self.options is None or len(self.experts) < 2:
            return None
        ids = [info.pinned for info in self.experts]
        names = ("fused", *(f"fused-{number}" for number in range(2, 100)))
        free = next((name for name in names if not Path(name).exists()), "DIR")
        return shlex.join(["hf-fusion", "fuse", *self.options, "--experts", *ids, "--output", free])


def group_experts(
    experts: Iterable[ExpertInfo], method: str = "foe", base_model: str | None = None
) -> tuple[Group, ...]:
    """Groups compatible experts into sets that can be fused, the largest first.

    FoE: classifiers with one type of head whose labels overlap, directly or through others, by output fusion; language
    models with one type of head by selection; classifiers without common labels by selection. PHATGOOSE and WEMoE:
    experts with one base and one type of head.

    Args:
        experts: accepted by `check_compatibility`.
        method: fusion method, a key of `families.METHODS`.
        base_model: the requested base, for experts that do not record theirs.
    """
    by_head: dict[str, list[ExpertInfo]] = {}
    for info in experts:
        head = _head(info)
        by_head.setdefault(head.auto if head else "unknown", []).append(info)
    groups: list[Group] = []
    for name, members in by_head.items():
        if family_of(method).needs.one_base:
            groups += _by_base(name, members, method, base_model)
        else:
            groups += _by_labels(name, members)
    return tuple(sorted(groups, key=lambda group: (group.command is None, -len(group.experts))))


def drop_broken(
    verdict: Compatibility, method: str = "foe", base_model: str | None = None, api: HfApi | None = None
) -> tuple[Group, ...]:
    """Rejects experts of the largest group that have NaN or Inf in their weights, and returns the remaining groups.

    Downloads their weights, which fusing needs anyway, unless they exceed `MOST_BYTES`.
    """
    while True:
        groups = group_experts(verdict.accepted, method, base_model)
        if not groups or groups[0].command is None or sum(info.size for info in groups[0].experts) > MOST_BYTES:
            return groups
        broken = not_finite(groups[0].experts, hub_api(api))
        if not broken:
            return groups
        for info, tensor in broken:
            verdict.accepted.remove(info)
            reason = Reason(ReasonKind.NOT_FINITE, f"has NaN or Inf in {tensor}")
            verdict.rejected.append(Rejected(info, (reason,)))


def not_finite(experts: Sequence[ExpertInfo], api: HfApi) -> list[tuple[ExpertInfo, str]]:
    """Experts with NaN or Inf in their safetensors, each with the first such tensor."""
    import torch
    from safetensors import safe_open

    sources = in_parallel(lambda info: resolve_repo(info.ref, api), experts)
    wanted = [(source, safe_files(source)) for source in sources]
    download(wanted, api)

    def first_broken(source: Source, files: Sequence[str]) -> str | None:
        for file in (own for own in files if own.endswith(".safetensors") and source.folder):
            with safe_open(Path(str(source.folder), file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                        return str(name)
        return None

    found = [first_broken(*pair) for pair in wanted]
    return [(info, name) for info, name in zip(experts, found, strict=True) if name]


def _head(info: ExpertInfo) -> Head | None:
    if head := head_of_architecture(info.architecture or ""):
        return head
    return head_of_task(info.task) if info.task else None


def _by_labels(head: str, members: list[ExpertInfo]) -> list[Group]:
    """Groups for a Fusion of Experts."""
    foe, selection = ("--method", "foe"), ("--method", "foe", "--set", "mode=selection")
    if head in _GENERATES:
        return [_group(head, members, selection)]
    if head not in _CLASSIFIES:
        return [_group(head, members, None, "a FoE does not support this head")]
    scores = [info for info in members if len(info.labels) == 1]
    unnamed = [i for i in members if i not in scores and (not i.labels or any(map(_UNNAMED.fullmatch, i.labels)))]
    named = [info for info in members if info not in scores and info not in unnamed]
    found = _overlapping(named)
    if len(found) > 1 and max(map(len, found)) == 1:  # no common labels: one expert is chosen per input
        groups = [_group(head, named, selection)]
    else:
        groups = [_group(head, own, foe) for own in found]
    if scores:
        groups.append(_group(head, scores, foe))
    if unnamed:
        groups.append(_group(head, unnamed, None, "the labels have no names: pass --set label_maps={…}"))
    return groups


def _overlapping(members: Sequence[ExpertInfo]) -> list[list[ExpertInfo]]:
    """Connected components of experts by common labels."""
    found: list[tuple[set[str], list[ExpertInfo]]] = []
    for info in members:
        labels, own = set(map(normalise_label, info.labels)), [info]
        for known, others in [entry for entry in found if entry[0] & labels]:
            found.remove((known, others))
            labels, own = labels | known, [*others, *own]
        found.append((labels, own))
    order = {info.id: number for number, info in enumerate(members)}
    return [sorted(own, key=lambda info: order[info.id]) for _, own in found]


def _by_base(head: str, members: list[ExpertInfo], method: str, base_model: str | None) -> list[Group]:
    """Groups by base, and by its commit if several are recorded."""
    commits: dict[str, set[str | None]] = {}  # of each base
    for info in members:
        base = _base_of(info, base_model)
        commits.setdefault(base.id, set()).update({base.revision} - {None})
    by_base: dict[str, list[ExpertInfo]] = {}
    for info in members:
        base = _base_of(info, base_model)
        known = commits[base.id]
        if not base.revision and len(known) == 1:
            base = base.with_revision(*known)
        by_base.setdefault(str(base), []).append(info)
    groups = []
    for whole, own in by_base.items():
        recorded = {_base(info) for info in own}
        options: tuple[str, ...] = ("--method", method)
        if whole and (METHODS[method].takes_base or recorded != {whole}):
            options = (*options, "--base", whole)
        groups.append(_group(head, own, options if whole else None, "" if whole else "the base is not known"))
    return groups


def _base_of(info: ExpertInfo, base_model: str | None) -> ModelRef:
    """The base that an expert records, else `base_model`; without an id if neither is known."""
    return ModelRef.parse_repo(_base(info) or base_model or "")


def _base(info: ExpertInfo) -> str | None:
    """The base that an expert records, if it names a repo."""
    if not info.base_model or info.base_model.count("/") != 1 or info.base_model.startswith((".", "/", "~")):
        return None
    return str(ModelRef(info.base_model, as_commit(info.base_revision)))


def _group(head: str, experts: Sequence[ExpertInfo], options: tuple[str, ...] | None, why_not: str = "") -> Group:
    bases = {_base(info) for info in experts}
    labels = {normalise_label(label): label for info in experts for label in info.labels}
    return Group(
        tuple(experts), head, bases.pop() if len(bases) == 1 else None, tuple(labels.values()), options, why_not
    )


def group_rows(groups: Sequence[Group], most: int = 6) -> list[dict[str, Any]]:
    """A table with one row per group."""
    rows = [
        {
            "group": str(number),
            "experts": str(len(group.experts)),
            "head": group.head.removeprefix("AutoModelFor"),
            "base": group.base or "",
            "labels": ", ".join(group.labels[:most])
            + (f", … ({len(group.labels)})" if len(group.labels) > most else ""),
            "fuse with": " ".join(group.options) if group.command and group.options else group.why_not,
        }
        for number, group in enumerate(groups, 1)
    ]
    return [{key: printable(text) for key, text in row.items()} for row in rows]
