"""Loads experts from ids, folders or models: at pinned commits, from safetensors, with every weight accounted for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from safetensors import SafetensorError

from hf_fusion.errors import FusionError, first_line, is_fault
from hf_fusion.extras import MissingLibraryError, missing_library, refuse_missing
from hf_fusion.hub.adapter_placement import rename_to_base
from hf_fusion.hub.bases import base_ref, warn_of_other_bases
from hf_fusion.hub.client import hub_api, in_parallel
from hf_fusion.hub.download import download
from hf_fusion.hub.formats import has_processor
from hf_fusion.hub.gates_file import GATES_FILE, read_gates
from hf_fusion.hub.headers import LoadReport, Shapes, check_load, checked_config, local_shapes, native_config
from hf_fusion.hub.lora import fit_problems, merge_saved_bases, read_adapter
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.refs_to_files import recorded_base, resolve, resolve_repo
from hf_fusion.hub.remote_code import model_code, processor_class, processor_code, refuse_code, refuse_kernels
from hf_fusion.hub.selection import pick_small, pick_weights
from hf_fusion.hub.silence import quiet_transformers
from hf_fusion.hub.snapshot_checks import check_snapshot
from hf_fusion.hub.task_heads import (
    Head,
    architectures,
    default_task,
    head_of_adapter,
    head_of_architecture,
    head_of_task,
    label_names,
)
from hf_fusion.io.files import own_file, read_file
from hf_fusion.progress import phase
from hf_fusion.types import Adapter, Expert, ExpertInfo, ExpertList, ModelRef

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    ExpertLike: TypeAlias = str | Path | ExpertInfo | PreTrainedModel | Expert

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_MOST_SPECIAL, _MOST_ADDED = 10_000, 100_000  # tokens of a tokenizer, which take a few seconds to add
LARGEST_HEAD = 100_000_000  # parameters that a small base may lack


def load_experts(
    experts: Sequence[ExpertLike],
    base: str | Path | ExpertInfo | PreTrainedModel | Expert | None = None,
    task: str | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    gates: bool = True,
    api: HfApi | None = None,
) -> list[Expert]:
    """Loads experts; adapters of one base share one base model object.

    Args:
        experts: each an ``owner/name@revision``, ``owner/name`` (the newest commit), a folder, an `ExpertInfo`, a
            loaded model or an `Expert`.
        base: the base of all adapters, instead of the recorded ones, which are not resolved then; a warning is logged
            if it differs.
        task: pipeline tag that selects the model class; default: each checkpoint's architecture. "feature-extraction"
            drops the head.
        allow_pickle: read ``.bin`` weights if there are no safetensors.
        trust_remote_code: run custom code if transformers has no class for an expert. Only for ids with a full commit
            sha and for folders; for a base only if ``base`` names it that way.
        dtype: of all weights; default: each checkpoint's.
        gates: also read the adapters' PHATGOOSE gates, if they have any.
        api: the Hub's client; default honours ``HF_ENDPOINT`` and the stored token.

    Returns:
        One `Expert` each, in order, in a list that notebooks show as a table. Adapters carry their base in ``model``
        and their tensors in ``adapter``.

    Raises:
        FusionError: naming the expert and what is wrong with it.
    """
    loader = _Loader(hub_api(api), base, task, allow_pickle, trust_remote_code, dtype, gates)
    return loader.load(list(experts))


class _Loader:
    """One call of `load_experts`: resolves all experts, downloads their files, then reads them."""

    def __init__(
        self,
        api: HfApi,
        base: str | Path | ExpertInfo | PreTrainedModel | Expert | None,
        task: str | None,
        allow_pickle: bool,
        trust_remote_code: bool,
        dtype: torch.dtype | str | None,
        gates: bool,
    ) -> None:
        self.api, self.task, self.gates = api, task, gates
        self.base = base.model if isinstance(base, Expert) else base.pinned if isinstance(base, ExpertInfo) else base
        self.loaded_base = _loaded_base(base)
        self.allow_pickle, self.trust_remote_code = allow_pickle, trust_remote_code
        self.dtype = dtype or "auto"

    def load(self, experts: list[ExpertLike]) -> list[Expert]:
        """See `load_experts`."""
        ids = {i: _name_of(e) for i, e in enumerate(experts) if isinstance(e, (str, Path, ExpertInfo))}
        sources = dict(zip(ids, in_parallel(lambda name: resolve(name, self.api), ids.values()), strict=True))
        bases = self._resolve_bases(sources)
        adapters = [(i, source) for i, source in sources.items() if source.is_adapter]
        warn_of_other_bases((s, base_ref(bases[i]) if i in bases else self.loaded_base) for i, s in adapters)

        # for adapters the whole base is downloaded; for full experts without a processor, only the base's
        wanted = [(source, self._files(source)) for source in sources.values()]
        with_adapters = {id(bases[i]) for i, source in sources.items() if source.is_adapter and i in bases}
        for source in {id(source): source for source in bases.values()}.values():
            small = pick_small(source, code=self._may_run_code(source))
            wanted.append((source, self._files(source) if id(source) in with_adapters else small))
        download(wanted, self.api)

        loaded: list[Expert | None] = [
            None if i in sources else in_memory(expert, i) for i, expert in enumerate(experts)
        ]
        with quiet_transformers(), phase("Reading models", len(sources)) as progress:
            for i, source in sources.items():
                if not source.is_adapter:
                    loaded[i] = self._full(source, bases.get(i))
                    progress.advance()
            for group in _groups(sources, bases, self._head):
                for i, expert in self._adapters({i: sources[i] for i in group}, bases.get(group[0])).items():
                    loaded[i] = expert
                    progress.advance()
        return ExpertList(expert for expert in loaded if expert is not None)

    def _files(self, source: Source) -> list[str]:
        small = pick_small(source, code=self._may_run_code(source))
        gates = [GATES_FILE] if self.gates and source.is_adapter and GATES_FILE in source.sizes else []
        return pick_weights(source, allow_pickle=self.allow_pickle) + small + gates

    def _may_run_code(self, source: Source) -> bool:
        return self.trust_remote_code and source.pinned

    def _resolve_bases(self, sources: dict[int, Source]) -> dict[int, Source]:
        """The base of each adapter, and of each full expert without a processor, whose base's is used."""
        names: dict[int, tuple[ModelRef, bool]] = {}  # with whether it must be a repo, not a folder
        for i, source in sources.items():
            if source.is_adapter and not _is_model(self.base):
                recorded = (recorded_base(source), not source.is_local) if self.base is None else None
                names[i] = recorded or (ModelRef.parse(str(self.base)), False)
            elif not source.is_adapter and not has_processor(source.sizes):
                card_base = source.card.get("base_model")
                card_base = card_base[0] if isinstance(card_base, list) and card_base else card_base
                if isinstance(card_base, str):
                    names[i] = (ModelRef.parse_repo(card_base), not source.is_local)
        unique = sorted(set(names.values()), key=str)
        found = in_parallel(lambda name: (resolve_repo if name[1] else resolve)(name[0], self.api), unique)
        resolved = dict(zip(unique, found, strict=True))
        for (name, _), source in resolved.items():
            if source.is_adapter:
                raise FusionError(f"the base {name} is itself an adapter", hint="pass base= with a full model")
            source.pinned &= self.base is not None  # consent does not extend to a base that an expert names
        # references with and without a commit may denote the same base, which is loaded once
        distinct = {(source.name, source.revision, source.folder): source for source in resolved.values()}
        sources_of = {name: distinct[s.name, s.revision, s.folder] for name, s in resolved.items()}
        return {i: sources_of[name] for i, name in names.items()}

    def _head(self, source: Source, base_config: dict[str, Any]) -> Head:
        """The head to load a source with: that of the task, else the one its files name."""
        if self.task is not None:
            return head_of_task(self.task)
        config = source.config
        if source.is_adapter and (head := head_of_adapter(source.adapter)):
            return head
        loaded = [type(self.base).__name__] if source.is_adapter and _is_model(self.base) else []
        for architecture in architectures(config) + architectures(base_config) + loaded:
            if head := head_of_architecture(architecture):
                return head
        if "config.json" not in source.sizes and not source.is_adapter:
            raise FusionError(f"{source.name} has no config.json", hint="name the repo or folder of a model")
        found = ", ".join(architectures(config))
        why = f"no model class is known for the architecture {found}" if found else "config.json names no architecture"
        raise FusionError(f"{source.name}: {why}", hint="pass task=, such as text-classification")

    def _full(self, source: Source, base: Source | None) -> Expert:
        head = self._head(source, {})
        model, info = self._model(source, head)
        # only AutoModel (features) may leave tensors, those of the head, unused
        keeps_all = head.auto != "AutoModel"
        refuse_keys(source.name, "missing", info["missing_keys"])
        refuse_keys(source.name, "unexpected", info["unexpected_keys"] if keeps_all else ())
        _refuse_not_finite(model, source.name)
        labels = _labels(model) if head.has_labels else []
        return self._expert(source, base, model, head, labels)

    def _adapters(self, sources: dict[int, Source], base: Source | None) -> dict[int, Expert]:
        """Loads the adapters of one base and one head onto one model object."""
        first = next(iter(sources.values()))
        adapters = {i: read_adapter(_folder(s), s.name, allow_pickle=self.allow_pickle) for i, s in sources.items()}
        base_config = base.config if base else {}
        head = self._head(first, base_config)
        unfilled: set[str] = set()
        if base is None:
            assert _is_model(self.base)
            model = self.base
        else:
            model, info = self._model(
                base,
                head,
                num_labels=_common(_label_count(s, adapters[i]) for i, s in sources.items()),
                adapters={source.name: adapters[i] for i, source in sources.items()},
            )
            unfilled = set(info["missing_keys"])
        _refuse_not_finite(model, base.name if base else "the base", skip=unfilled)

        experts = {}
        for i, source in sources.items():
            adapter = rename_to_base(self._cast(adapters[i]), model)
            _refuse_misfits({source.name: adapter}, model)
            adapter = merge_saved_bases(adapter, model)
            refuse_keys(source.name, "missing in both the adapter and its base", unfilled - set(adapter.saved))
            labels = _adapter_labels(source, adapter) if head.has_labels else []
            expert = self._expert(source, base, model, head, labels, adapter)
            gates = read_gates(_folder(source), source.name, adapter, model) if self.gates else None
            experts[i] = replace(expert, gates=gates)
        return experts

    def _cast(self, adapter: Adapter) -> Adapter:
        """The adapter in the requested dtype, if any."""
        import torch

        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype):
            return adapter
        lora = {path: (a.to(dtype), b.to(dtype)) for path, (a, b) in adapter.lora.items()}
        return replace(adapter, lora=lora, saved={k: v.to(dtype) for k, v in adapter.saved.items()})

    def _model(
        self, source: Source, head: Head, num_labels: int | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Loads the model of a folder, and returns it with transformers' loading info; `adapters` must fit it."""
        refuse_kernels(source.config, source.name)
        code = self._code_to_run(source)
        options: dict[str, Any] = {}
        safe = [file for file in pick_weights(source, allow_pickle=self.allow_pickle) if file.endswith(".safetensors")]
        if safe and not code:
            options["config"] = self._checked_config(source, head, safe, num_labels, adapters or {})
        elif num_labels is not None:
            options["num_labels"] = num_labels
        check_snapshot(_folder(source), source.name)  # transformers opens files that indexes and configurations name
        try:
            loaded: tuple[PreTrainedModel, dict[str, Any]] = head.auto_class().from_pretrained(
                _folder(source),
                dtype=self.dtype,
                use_safetensors=bool(safe),
                trust_remote_code=code,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
            return loaded
        except Exception as error:  # transformers raises many types
            refuse_missing(error, source.name)
            logger.debug("loading %s", source.name, exc_info=True)
            raise FusionError(f"{source.name} cannot be loaded as {head.auto}: {first_line(error)}") from error

    def _checked_config(
        self, source: Source, head: Head, files: list[str], num_labels: int | None, adapters: Mapping[str, Adapter]
    ) -> Any:
        """The config, once the headers' shapes and the adapters match it, before memory is allocated."""
        try:
            shapes = local_shapes(_folder(source), files)
        except SafetensorError as error:
            raise FusionError(f"{source.name}: the weights cannot be read ({error})") from error
        content = dict(source.config)
        if num_labels is not None:  # the adapters' number of classes, not the base's
            content |= {"num_labels": num_labels, "id2label": None, "label2id": None}
        config = native_config(content, source.name, len(shapes))
        report = check_load(config, head, shapes, source.name)
        if report.mismatched:
            raise FusionError(f"{source.name}: weights do not match config.json: {'; '.join(report.mismatched[:5])}")
        _refuse_unfilled(source.name, report, shapes)
        _refuse_misfits(adapters, report.model)
        return config

    def _code_to_run(self, source: Source) -> bool:
        """Whether custom code is required; raises if it may not run."""
        needed = model_code(source.config)
        refuse_code(source, needed, agreed=self.trust_remote_code)
        return bool(needed)

    def _expert(
        self,
        source: Source,
        base: Source | None,
        model: PreTrainedModel,
        head: Head,
        labels: list[str],
        adapter: Adapter | None = None,
    ) -> Expert:
        processor = processor_of(source, agreed=self.trust_remote_code)
        if processor is None and base is not None:
            processor = processor_of(base, agreed=self.trust_remote_code)
        license_id = source.card.get("license")
        if adapter is not None and (used := base_ref(base) if base else self.loaded_base).id:
            adapter.base, adapter.base_revision = used.id, used.revision
        return Expert(
            name=source.name,
            model=model,
            adapter=adapter,
            processor=processor,
            labels=labels,
            revision=source.revision,
            license=str(license_id).lower() if license_id else None,
            task=self.task or source.card.get("pipeline_tag") or default_task(type(model).__name__) or head.tasks[0],
            generation=source.json(GENERATION) or None if adapter is not None else None,
        )


def _name_of(expert: str | Path | ExpertInfo) -> str | Path:
    return expert.pinned if isinstance(expert, ExpertInfo) else expert


def _loaded_base(base: ExpertLike | None) -> ModelRef:
    """The reference of a base in memory, from where it was loaded; "" if unknown, and for other bases."""
    if isinstance(base, Expert) and base.revision:
        return base.ref
    model = base.model if isinstance(base, Expert) else base
    if not _is_model(model):
        return ModelRef("")
    config = model.config
    return ModelRef(str(config.name_or_path or ""), getattr(config, "_commit_hash", None))


def _is_model(base: str | Path | ExpertInfo | PreTrainedModel | None) -> TypeGuard[PreTrainedModel]:
    return base is not None and not isinstance(base, (str, Path, ExpertInfo))


def _groups(
    sources: dict[int, Source], bases: dict[int, Source], head: Callable[[Source, dict[str, Any]], Head]
) -> list[list[int]]:
    """Indices of adapters that share a base at one commit and a head."""
    groups: dict[tuple[int, str], list[int]] = {}
    for i, source in sources.items():
        if source.is_adapter:
            base = bases.get(i)
            key = (id(base), head(source, base.config if base else {}).auto)
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def _folder(source: Source) -> Path:
    assert source.folder is not None, f"{source.name} was not downloaded"
    return source.folder


def _label_count(source: Source, adapter: Adapter) -> int | None:
    """Number of classes of an adapter's head: of its label names, else the size of a saved bias."""
    if names := label_names(source.config):
        return len(names)
    biases = [tensor for key, tensor in adapter.saved.items() if key.endswith(".bias")]
    return len(biases[-1]) if biases else None


def _adapter_labels(source: Source, adapter: Adapter) -> list[str]:
    """Class names from the adapter repo's ``config.json`` (PEFT stores none), else ``LABEL_0``, …"""
    names = label_names(source.config)
    return list(names) or [f"LABEL_{i}" for i in range(_label_count(source, adapter) or 0)]


def _common(values: Iterator[int | None]) -> int | None:
    """The common value, or None if values differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def processor_of(source: Source, *, agreed: bool) -> Any:
    """Loads the tokenizer or image processor of a folder; None if it has neither.

    Args:
        source: the model's files, downloaded.
        agreed: whether custom code may run, if transformers has no class for it.

    Raises:
        FusionError: it cannot be loaded, or its code may not run.
    """
    import transformers

    if (auto := processor_class(source)) is None:
        return None
    needed = processor_code(source, auto)
    refuse_code(source, needed, agreed=agreed)
    checked_config(source.config, source.name)  # which tokenizers and processors read as well
    _refuse_many_tokens(source)
    check_snapshot(_folder(source), source.name)
    try:
        reader = getattr(transformers, auto)
        return reader.from_pretrained(_folder(source), trust_remote_code=bool(needed), local_files_only=True)
    except BaseException as error:  # as for models, any type
        if not is_fault(error):
            raise
        if missing_library(error) == "tiktoken" and "tiktoken.model" not in source.sizes:
            # transformers falls back to tiktoken if sentencepiece, or protobuf, is not installed
            raise MissingLibraryError(
                f"{source.name} needs sentencepiece and protobuf, at least one of which is not installed",
                "pip install sentencepiece protobuf",
            ) from error
        refuse_missing(error, source.name)
        raise FusionError(f"the processor of {source.name} cannot be loaded: {first_line(error)}") from error


def _refuse_many_tokens(source: Source) -> None:
    """Raises for an implausible number of tokens beside the vocabulary, which are added one by one."""
    settings, file = source.json("tokenizer_config.json"), _folder(source) / "tokenizer.json"
    lists = (settings.get("extra_special_tokens"), settings.get("additional_special_tokens"))
    special = sum(len(tokens) for tokens in lists if isinstance(tokens, (list, dict)))
    added = read_file(file).count(b'"single_word"') if own_file(file) else 0
    if special > _MOST_SPECIAL or added > _MOST_ADDED:
        raise FusionError(f"{source.name}: its tokenizer has {max(special, added):,} tokens beside its vocabulary")


def in_memory(expert: object, index: int) -> Expert:
    """Converts a loaded model to an `Expert`, which is returned unchanged; `index` is its name in errors."""
    from transformers import PreTrainedModel

    if isinstance(expert, Expert):
        return expert
    if not isinstance(expert, PreTrainedModel):
        raise FusionError(
            f"expert {index} is a {type(expert).__name__}, not an id, folder, ExpertInfo or transformers model"
        )
    name = Path(expert.config.name_or_path or f"expert-{index}")
    name_or_id = str(name) if name.as_posix().count("/") == 1 and not name.is_dir() else name.name
    _refuse_not_finite(expert, name_or_id)
    head = head_of_architecture(type(expert).__name__)
    return Expert(
        name=name_or_id,
        model=expert,
        processor=getattr(expert, "processor", None),
        labels=_labels(expert) if head and head.has_labels else [],
        task=head.tasks[0] if head else None,
    )


def _labels(model: PreTrainedModel) -> list[str]:
    """The names of a model's classes by index."""
    id2label: dict[Any, str] = model.config.id2label or {}
    return [id2label[index] for index in sorted(id2label)]


def _refuse_misfits(adapters: Mapping[str, Adapter], base: PreTrainedModel) -> None:
    for name, adapter in adapters.items():
        if problems := fit_problems(rename_to_base(adapter, base), base):
            raise FusionError(f"adapter {name} does not fit its base: {'; '.join(problems[:5])}")


def _refuse_unfilled(name: str, report: LoadReport, shapes: Shapes) -> None:
    """Raises if more than a head, which an adapter may have, is missing: it would be allocated in full."""
    state = report.model.state_dict()
    unfilled = sum(state[key].numel() for key in report.missing if key in state)
    found = sum(math.prod(shape) for shape in shapes.values())
    if unfilled > max(found, LARGEST_HEAD):
        raise FusionError(f"{name}: config.json describes {unfilled:,} parameters that the checkpoint lacks")


def refuse_keys(name: str, what: str, keys: Collection[str]) -> None:
    """Raises for missing keys, which would be initialised at random, and for unexpected ones, which would be lost."""
    if keys:
        shown = ", ".join(sorted(map(str, keys))[:5])
        raise FusionError(
            f"{name}: {len(keys)} weights are {what}: {shown}", hint="check the checkpoint, and task= if you passed it"
        )


def _refuse_not_finite(model: PreTrainedModel, name: str, skip: Collection[str] = ()) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and key not in skip and not tensor.isfinite().all():
            raise FusionError(f"{name} has NaN or Inf in {key}", hint=f"leave {name} out, and fuse the other experts")
