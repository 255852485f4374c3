"""Checks which experts are compatible, from configs and safetensors headers, without reading weights.

Everything is read first, in parallel; then a table of checks yields reasons against each expert. An expert that cannot
be read is rejected with a reason as well, not with an exception.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, first_line
from hf_fusion.extras import refuse_missing
from hf_fusion.hub.adapter_placement import match_parameters
from hf_fusion.hub.client import hub_api, in_parallel
from hf_fusion.hub.discover import html_row, info_row
from hf_fusion.hub.formats import has_processor
from hf_fusion.hub.gates_file import GATES_FILE, gate_problem
from hf_fusion.hub.headers import LoadReport, LoadReportCache, Shapes, check_load, hub_shapes, native_config
from hf_fusion.hub.licenses import forbids_derivatives
from hf_fusion.hub.lora import config_problems, shape_problems, trained_class
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.peft_names import adapter_shapes, plain_keys
from hf_fusion.hub.refs_to_files import recorded_base, resolve_repo
from hf_fusion.hub.rejection_reasons import Reason, ReasonKind
from hf_fusion.hub.remote_code import (
    MANIFESTS_OF,
    model_code,
    processor_class,
    processor_code,
    refuse_code,
    refuse_kernels,
)
from hf_fusion.hub.selection import pick_weights
from hf_fusion.hub.task_heads import (
    HEADS,
    Head,
    architectures,
    head_of_adapter,
    head_of_architecture,
    head_of_task,
    label_names,
    normalise_label,
)
from hf_fusion.models.fused_html import first_of, table_of_rows
from hf_fusion.progress import track
from hf_fusion.types import ExpertInfo, ModelRef, as_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejected:
    """An expert that is not compatible, with the reasons."""

    info: ExpertInfo
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Compatibility:
    """The result of `check_compatibility`; both lists keep the order of the experts."""

    accepted: list[ExpertInfo] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def table(self) -> list[dict[str, Any]]:
        """One row per expert, accepted ones first; column "rejected" has the reasons, "" for accepted ones."""
        rows = [(info, "") for info in self.accepted]
        rows += [(r.info, "; ".join(map(str, r.reasons))) for r in self.rejected]
        return [{**info_row(info), "rejected": reasons} for info, reasons in rows]

    def _repr_html_(self) -> str:
        """The same, with a line for each reason beside the id."""
        verdicts: list[tuple[ExpertInfo, tuple[Reason, ...]]] = [(info, ()) for info in self.accepted]
        verdicts += [(entry.info, entry.reasons) for entry in self.rejected]
        rows: list[dict[str, Any]] = []
        for info, reasons in verdicts:
            row = html_row(info)
            verdict = {"accepted": "no" if reasons else "yes", "rejected because": [str(reason) for reason in reasons]}
            rows.append({"id": row.pop("id"), **verdict, **row})
        accepted = len(self.accepted)
        shown = [*first_of(rows[:accepted], "accepted"), *first_of(rows[accepted:], "rejected")]
        return table_of_rows(shown, f"{accepted:,} accepted, {len(self.rejected):,} rejected")


@dataclass(frozen=True)
class Criteria:
    """The requirements; see the arguments of `check_compatibility`."""

    task: str | None
    base_model: str | None
    base_revision: str | None
    labels: frozenset[str] | None
    trust_remote_code: bool
    allow_pickle: bool
    need_gates: bool
    merging: bool


@dataclass
class Evidence:
    """What was read about one repo.

    Attributes:
        name: repo id.
        source: its files; None if they could not be listed.
        shapes: tensor name → shape from the safetensors headers; empty for pickles.
        gates: module path → shape of its gate, if gates were requested and exist.
        unreadable: why it could not be read, or None.
    """

    name: str
    source: Source | None = None
    shapes: Shapes = field(default_factory=dict)
    gates: Shapes = field(default_factory=dict)
    unreadable: Reason | None = None


def check_compatibility(
    experts: Sequence[ExpertInfo],
    task: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    labels: Collection[str] | None = None,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    need_gates: bool = False,
    merging: bool = False,
    api: HfApi | None = None,
) -> Compatibility:
    """Checks which experts can be fused with each other, and why others cannot.

    Args:
        experts: from `discover`.
        task: pipeline tag that the head of every expert must have.
        base_model: the base that every expert must be derived from. Adapters that record no base, or a local path, are
            checked by its shapes instead.
        base_revision: required commit of the base, for experts that record one.
        labels: allowed label names, compared without case, spaces, dashes and underscores (for output fusion).
        trust_remote_code: accept experts that need custom code.
        allow_pickle: accept experts without safetensors.
        need_gates: require PHATGOOSE gates.
        merging: require one model class, and weights that can be merged with those of `base_model` tensor by tensor.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Returns:
        The accepted experts, and the rejected ones with their reasons, including experts that cannot be read.

    Raises:
        FusionError: `task` is not supported.
    """
    api = hub_api(api)
    criteria = Criteria(
        task=task,
        base_model=base_model,
        base_revision=as_commit(base_revision) or base_revision,
        labels=frozenset(map(normalise_label, labels)) if labels is not None else None,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        need_gates=need_gates,
        merging=merging,
    )
    if task is not None:
        head_of_task(task)  # an unsupported task is an error of the caller
    gathered = in_parallel(lambda info: _gather(info.ref, api, need_gates, info.read), experts, name="Reading experts")
    names = sorted({ref for evidence in gathered if (ref := _base_of(evidence, criteria))}, key=str)
    bases = dict(zip(names, in_parallel(lambda name: _gather(name, api), names), strict=True))

    verdict, reports = Compatibility(), LoadReportCache()
    for info, evidence in track(zip(experts, gathered, strict=True), "Checking experts", len(experts)):
        reasons = _find_reasons(
            info, evidence, bases.get(_base_of(evidence, criteria) or ModelRef("")), criteria, reports
        )
        if merging and not reasons:
            reasons = _check_same_class(info, verdict.accepted)
        if reasons:
            verdict.rejected.append(Rejected(info, reasons))
        else:
            verdict.accepted.append(info)
    return verdict


def _gather(name: ModelRef, api: HfApi, gates: bool = False, known: Source | None = None) -> Evidence:
    """Reads a repo's file list, configs and headers; errors become a reason.

    Args:
        name: ``owner/name@sha``.
        api: the Hub's client.
        gates: also read the header of the gates.
        known: what `discover` has read of that commit, used if it came from the same Hub.
    """
    evidence = Evidence(name.id)
    try:
        same_hub = known and known.api and known.api.endpoint == api.endpoint
        evidence.source = source = replace(known, api=api) if known and same_hub else resolve_repo(name, api)
        for file in ("config.json", "adapter_config.json"):
            source.json(file)
        if not source.is_adapter or _brings_code(source):  # an adapter without Python files has no code to run
            for file in MANIFESTS_OF.get(processor_class(source) or "", ()):
                source.json(file)
        weights = pick_weights(source, allow_pickle=True)
        evidence.shapes = hub_shapes(source, [file for file in weights if file.endswith(".safetensors")])
        if gates and source.is_adapter and GATES_FILE in source.sizes:
            evidence.gates = hub_shapes(source, [GATES_FILE])
    except Exception as error:  # one broken repo must not affect the others
        refuse_missing(error, str(name))
        logger.debug("reading %s", name, exc_info=True)
        evidence.unreadable = _unreadable(error)
    return evidence


def _unreadable(error: Exception) -> Reason:
    from huggingface_hub.errors import GatedRepoError

    message = error.message if isinstance(error, FusionError) else first_line(error)
    hint = error.hint if isinstance(error, FusionError) else None
    kind = ReasonKind.GATED if isinstance(error.__cause__, GatedRepoError) else ReasonKind.UNREADABLE
    return Reason(kind, message, hint)


def _check_same_class(info: ExpertInfo, accepted: Sequence[ExpertInfo]) -> tuple[Reason, ...]:
    """A full model must have the class of the full models before it."""
    first = next((other for other in accepted if not other.is_adapter), None)
    if info.is_adapter or first is None or info.architecture == first.architecture:
        return ()
    return (Reason(ReasonKind.ARCHITECTURE, f"is a {info.architecture}, but {first.id} is a {first.architecture}"),)


def _base_of(evidence: Evidence, criteria: Criteria) -> ModelRef | None:
    """The base that must be read for an expert: an adapter's, or in merging also a full model's; None otherwise."""
    if evidence.source is None or evidence.unreadable:
        return None
    recorded, wanted = _recorded(evidence.source), criteria.base_model
    if recorded:  # a base other than the required one is not read
        return recorded if wanted in (None, recorded.id) else None
    is_needed = criteria.merging or evidence.source.is_adapter
    return ModelRef(wanted, criteria.base_revision) if wanted and is_needed else None


def _recorded(source: Source) -> ModelRef | None:
    """The repo that an adapter records as its base; None for a path, no record, or a full model."""
    try:
        return recorded_base(source) if source.is_adapter else None
    except FusionError:
        return None


@dataclass(frozen=True)
class Case:
    """One expert with everything that the checks use."""

    info: ExpertInfo
    source: Source
    shapes: Shapes
    gates: Shapes
    base: Evidence | None
    criteria: Criteria
    reports: LoadReportCache

    @property
    def head(self) -> Head | None:
        """The head that an adapter was trained with; else that of the architecture, or of an adapter's base."""
        if self.info.is_adapter and (head := head_of_adapter(self.source.adapter)):
            return head
        base_config = self.base.source.config if self.base and self.base.source else {}
        named = [*architectures(self.source.config), *(architectures(base_config) if self.info.is_adapter else ())]
        return next((head for name in named if (head := head_of_architecture(name))), None)

    @property
    def needs_code(self) -> bool:
        """Whether it needs custom code."""
        return bool(model_code(self.source.config))


def _find_reasons(
    info: ExpertInfo, evidence: Evidence, base: Evidence | None, criteria: Criteria, reports: LoadReportCache
) -> tuple[Reason, ...]:
    """All reasons against an expert."""
    if evidence.unreadable is not None or evidence.source is None:
        return (evidence.unreadable or Reason(ReasonKind.UNREADABLE, "its files could not be listed"),)
    case = Case(info, evidence.source, evidence.shapes, evidence.gates, base, criteria, reports)
    try:
        return tuple(reason for check in CHECKS for reason in check(case))
    except Exception as error:  # an unforeseen config
        refuse_missing(error, info.id)
        logger.debug("checking %s", info.id, exc_info=True)
        return (Reason(ReasonKind.UNREADABLE, first_line(error)),)


def _check_pickle(case: Case) -> Iterator[Reason]:
    if not case.shapes and not case.criteria.allow_pickle:
        yield Reason(ReasonKind.PICKLE, "has only pickle weights", "if you trust its author: allow_pickle=True")


def _check_code(case: Case) -> Iterator[Reason]:
    source = case.source
    needed, auto = model_code(source.config), processor_class(source)
    if auto and (not source.is_adapter or _brings_code(source)):
        needed += processor_code(source, auto)
    try:
        refuse_kernels(source.config, source.name)
        refuse_code(source, needed, agreed=case.criteria.trust_remote_code, pinned=True)  # as loaded: info.pinned
    except FusionError as error:
        yield Reason(ReasonKind.CUSTOM_CODE, error.message.removeprefix(f"{source.name} "), error.hint)


def _brings_code(source: Source) -> bool:
    return any(file.endswith(".py") for file in source.sizes)


def _check_gates(case: Case) -> Iterator[Reason]:
    if not case.criteria.need_gates:
        return
    if not case.info.is_adapter:
        yield Reason(ReasonKind.GATES, "is a full model; only adapters have gates")
        return
    remedy = f"hf-fusion fit gates {case.info.id} --data … --push"
    lora, _ = adapter_shapes(case.shapes, case.info.id)
    placed, saved, _ = _rename_to_base(case, case.head)
    sizes = {path: d_in for path, (d_in, _) in placed.items()}
    if not case.info.has_gates:
        yield Reason(ReasonKind.GATES, f"has no {GATES_FILE}", remedy)
    elif problem := gate_problem(case.gates, sizes, also={name.removesuffix(".weight") for name in saved}):
        yield Reason(ReasonKind.GATES, f"{GATES_FILE} {problem}", remedy)
    for stored, key in plain_keys(case.shapes, case.info.id).items():
        path, rank = key.removesuffix(".lora_A.weight"), case.shapes[stored][0]
        if path in lora and rank > max(lora[path]):
            yield Reason(ReasonKind.LORA, f"rank {rank} of {path} is more than its width")
            return


def _check_license(case: Case) -> Iterator[Reason]:
    if case.info.license and forbids_derivatives(case.info.license):
        yield Reason(ReasonKind.LICENSE, f"{case.info.license} forbids sharing derivatives")


def _check_task(case: Case) -> Iterator[Reason]:
    if case.head is None and not case.needs_code:
        named = case.info.architecture
        detail = f"no model class is known for {named}" if named else "names no architecture"
        yield Reason(ReasonKind.ARCHITECTURE, detail)
    elif case.criteria.task and case.head and case.head is not head_of_task(case.criteria.task):
        found = case.info.architecture or case.head.tasks[0]
        yield Reason(ReasonKind.ARCHITECTURE, f"{found} does not support {case.criteria.task}")


def _check_base(case: Case) -> Iterator[Reason]:
    wanted, recorded = case.criteria.base_model, case.info.base_model
    is_unknown = case.info.is_adapter and _recorded(case.source) is None  # then its shapes are checked
    if wanted and recorded != wanted and not is_unknown:
        remedy = f"to use {wanted} anyway: fuse with base={wanted}" if case.info.is_adapter else None
        yield Reason(ReasonKind.BASE, f"was made from {recorded or 'an unknown base'}, not {wanted}", remedy)
        return
    commit, found = case.criteria.base_revision, case.info.base_revision
    if commit and found and found != commit:
        yield Reason(ReasonKind.BASE_REVISION, f"was made from commit {found[:7]} of its base, not {commit[:7]}")
    if not case.info.is_adapter and not case.criteria.merging:
        return
    if case.base is None and not case.info.is_adapter:
        yield Reason(
            ReasonKind.BASE,
            "is a full model of unknown base",
            "pass base_model=, the model that it was fine-tuned from",
        )
    elif case.base is None:
        detail = f"records the base {recorded!r}, which is not a repo" if recorded else "records no base"
        yield Reason(ReasonKind.BASE, detail, "pass base=owner/name")
    elif case.base.unreadable is not None:
        yield Reason(ReasonKind.BASE, f"its base: {case.base.unreadable.detail}", case.base.unreadable.remedy)


def _check_lora(case: Case) -> Iterator[Reason]:
    if case.info.is_adapter:
        for problem in config_problems(case.source.adapter):
            yield Reason(ReasonKind.LORA, problem)


def _check_labels(case: Case) -> Iterator[Reason]:
    if case.criteria.labels is None:
        return
    names = label_names(case.source.config)
    if not names:
        yield Reason(ReasonKind.LABELS, "names no labels", "add id2label to its config.json")
    elif other := [name for name in names if normalise_label(name) not in case.criteria.labels]:
        shown = ", ".join(other[:5]) + (", …" if len(other) > 5 else "")
        yield Reason(ReasonKind.LABELS, f"has other labels: {shown}", "pass a label map, or leave the expert out")


def _check_tokenizer(case: Case) -> Iterator[Reason]:
    base = case.base.source if case.base else None
    if not has_processor(case.source.sizes) and not (base and has_processor(base.sizes)) and not case.info.base_model:
        yield Reason(ReasonKind.TOKENIZER, "has no tokenizer or image processor, and its base has none either")


def _check_shapes(case: Case) -> Iterator[Reason]:
    if case.head is None or case.needs_code or not case.shapes:
        return
    head, compare = case.head, _adapter_shapes if case.info.is_adapter else _full_shapes
    base = case.base.name if case.base else None
    try:  # most experts of one base have the same shapes: the result is cached
        config = {} if case.info.is_adapter else case.source.config
        trained = trained_class(case.source.adapter)
        details = case.reports.get((base, head.auto, trained), config, case.shapes, lambda: compare(case, head))
    except FusionError as error:
        refuse_missing(error, case.info.id)
        yield Reason(ReasonKind.ARCHITECTURE, error.message, error.hint)
        return
    if details:
        more = f" and {len(details) - 3} more" if len(details) > 3 else ""
        yield Reason(ReasonKind.SHAPES, "; ".join(details[:3]) + more)


def _full_shapes(case: Case, head: Head) -> list[str]:
    """Problems of a full model: missing, unexpected and mismatched tensors; in merging also against the base."""
    from hf_fusion.hub.mergeable import merge_problems  # torch

    config = native_config(case.source.config, case.info.id, len(case.shapes))
    result = check_load(config, head, case.shapes, case.info.id)
    unexpected = result.unexpected if head.auto != "AutoModel" else ()
    base = _base_report(case) if case.criteria.merging else None
    return [
        *(merge_problems(result.model, base.model) if base else ()),
        *result.mismatched,
        *(f"{key} is missing" for key in sorted(result.missing)),
        *(f"{key} is not part of the model" for key in sorted(unexpected)),
    ]


def _base_report(case: Case, head: Head | None = None) -> LoadReport | None:
    """The load report of the base with a head (default: the base's); None if it could not be read."""
    base = case.base
    if base is None or base.source is None or base.unreadable is not None:
        return None
    found = head or next(filter(None, map(head_of_architecture, architectures(base.source.config))), HEADS[-1])
    name, config, shapes = base.name, base.source.config, base.shapes
    return case.reports.get(
        (name, found.auto),
        config,
        shapes,
        lambda: check_load(native_config(config, name, len(shapes)), found, shapes, name),
    )


def _rename_to_base(case: Case, head: Head | None) -> tuple[dict[str, tuple[int, int]], Shapes, LoadReport | None]:
    """`adapter_shapes` by the base's parameter names, and the base's load report; by stored names without a base."""
    lora, saved = adapter_shapes(case.shapes, case.info.id)
    result = _base_report(case, head) if head else None
    if result is None:
        return lora, saved, None
    names = match_parameters(lora, saved, result.model, trained_class(case.source.adapter))
    lora = {names[f"{path}.weight"].removesuffix(".weight"): sizes for path, sizes in lora.items()}
    return lora, {names[key]: shape for key, shape in saved.items()}, result


def _adapter_shapes(case: Case, head: Head) -> list[str]:
    """Problems of an adapter against its base's shapes; the head must be in one of them."""
    lora, saved, result = _rename_to_base(case, head)
    if result is None:
        return []
    unfilled = sorted(result.missing - set(saved))
    return [
        *shape_problems(lora, saved, result.model),
        *(f"in its base, {line}" for line in result.mismatched),
        *(f"{key} is in neither the adapter nor its base" for key in unfilled),
    ]


# reasons are listed in this order
CHECKS: tuple[Callable[[Case], Iterator[Reason]], ...] = (
    _check_pickle,
    _check_code,
    _check_license,
    _check_task,
    _check_base,
    _check_lora,
    _check_gates,
    _check_labels,
    _check_tokenizer,
    _check_shapes,
)
