"""Merges checkpoints by a recipe of a static method, streaming tensors from folder to folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError
from hf_fusion.families import STALE
from hf_fusion.hub.lora import adapter_weights_file
from hf_fusion.io.folders import refuse_to_replace, replace_folder
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import OpenFiles, read_checkpoint
from hf_fusion.merging.engine.open_models import Model, open_models
from hf_fusion.merging.engine.output import (
    SHARD_BYTES,
    explain_disk_errors,
    output_folder,
    staging,
    staging_path,
    write_index,
)
from hf_fusion.merging.engine.processes import Processes
from hf_fusion.merging.engine.stream import compute_digest, parse_device, write_tensors
from hf_fusion.merging.load_checks import MERGED, check_loads, fit_config, shapes_of
from hf_fusion.merging.lora import merge_adapters
from hf_fusion.merging.merge_report import MergeReport
from hf_fusion.merging.methods import method_named
from hf_fusion.merging.plan import Plan, plan
from hf_fusion.merging.recipe_checks import check_recipe
from hf_fusion.merging.small_files import merged_files
from hf_fusion.merging.stages import merge_stages
from hf_fusion.merging.tied_weights import align_tied_heads, untie_config
from hf_fusion.merging.tokenizers.smallest import smallest_vocabulary
from hf_fusion.merging.tokenizers.vocabulary import Vocabulary, unite_vocabularies
from hf_fusion.recipe import RECIPE_FILE, SMALLEST, Recipe
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def merge(
    recipe: Recipe,
    folder: str | Path,
    *,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    stages_folder: str | Path | None = None,
    api: HfApi | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merges models into a folder that transformers loads: weights, configuration, tokenizer and ``fusion.yaml``.

    Tensors are read, merged and written in chunks; no model is loaded. The same recipe with the same inputs gives the
    same bytes, for any number of threads. The folder appears once all files are complete; a killed run resumes with its
    unfinished shards when it is run again. Under `accelerate launch` the processes share the shards. Before writing,
    and again before the folder appears, transformers' loader checks that the merged tensors load into the model of
    their ``config.json``.

    Args:
        recipe: of a static method, see `hf_fusion.merging.methods.MERGE_METHODS`. For methods that merge adapters into
            one adapter, see `hf_fusion.merging.lora.merge_adapters`.
        folder: created if missing; must not contain a model, unless `overwrite`.
        threads: tensors that a process merges in parallel; default: one per core.
        shard_bytes: maximum bytes of a weight file.
        device: "cpu", "cuda" or "cuda:N", for methods that multiply and decompose whole matrices (TSV-Merge, Iso-C,
            Iso-CTS, WUDI, RegMean); results differ between devices in rounding. Other methods are limited by the disk
            and run on the CPU. With several processes on a machine, each uses a different GPU.
        overwrite: whether to replace a model in the folder; not needed to resume a killed merge.
        stages_folder: for a recipe of several stages, a folder in which the results of all of them are kept, each
            under its name; results of the same content are used again. Default: a hidden folder beside `folder`, from
            which each is removed after its last use; a killed run continues with what is there.
        api: the Hub's client.
        progress: called with the bytes done and the total bytes.

    Returns:
        The report: folder, recipe, sizes, duration, and warnings about tensors that were left out.

    Raises:
        FusionError: the models cannot be merged, or the folder cannot be written.
    """
    folder = output_folder(folder)
    options: dict[str, Any] = {"threads": threads, "shard_bytes": shard_bytes, "device": device, "progress": progress}

    def run(recipe: Recipe, folder: Path, overwrite: bool, record: Callable[[Recipe], Recipe]) -> MergeReport:
        return _merge(recipe, folder, overwrite=overwrite, api=api, record=record, **options)

    if recipe.stages:
        return merge_stages(recipe, folder, run, kept=stages_folder, overwrite=overwrite, device=str(device), api=api)
    return run(recipe, folder, overwrite, lambda pinned: pinned)


def _merge(
    recipe: Recipe,
    folder: Path,
    *,
    threads: int | None,
    shard_bytes: int,
    device: str | torch.device,
    overwrite: bool,
    api: HfApi | None,
    progress: Callable[[int, int], None],
    record: Callable[[Recipe], Recipe],
) -> MergeReport:
    """A merge of one stage; see `merge`. `record` gives the recipe that is saved, from the one with pinned models."""
    processes, device = Processes(), parse_device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", processes.local_rank % torch.cuda.device_count())
    if method_named(recipe.method).merges == "adapters":
        if processes.count > 1:
            raise FusionError(f"{recipe.method} runs in a single process", "run it without accelerate launch")
        return merge_adapters(recipe, folder, overwrite=overwrite, api=api, record=record)
    with processes.step():
        planned = plan_merge(recipe, api)
        planned.recipe = record(planned.recipe)
        refuse_inputs(planned, folder)
        refuse_to_replace(folder, overwrite)
    before, done, total = torch.get_num_threads(), 0, planned.nbytes
    torch.set_num_threads(1)  # tensors are merged in parallel threads

    def report(more: int) -> None:
        nonlocal done
        done += more * processes.count  # assumes that other processes are equally fast
        progress(min(done, total), total)

    began = time.perf_counter()
    try:
        with ExitStack() as staged:
            staging_folder = staging_path(folder)
            with processes.step():
                if processes.is_main:
                    digest = compute_digest(
                        planned.targets, shard_bytes, planned.recipe.to_dict(), file_stamps(planned), device.type
                    )
                    staged.enter_context(staging(folder, digest, total))
            with processes.step():
                shards = write_tensors(
                    planned.targets,
                    staging_folder,
                    planned.files,
                    threads=threads or max(1, count_cores() // processes.local_count),
                    shard_bytes=shard_bytes,
                    process=(processes.rank, processes.count),
                    device=device,
                    progress=report,
                )
            with processes.step(), explain_disk_errors(folder.parent):
                if processes.is_main:
                    write_index(staging_folder, shards)
                    write_small(planned, staging_folder)
                    _check_written(planned, staging_folder)
                    replace_folder(staging_folder, folder, STALE)
    finally:
        planned.files.close()
        torch.set_num_threads(before)
    seconds = time.perf_counter() - began
    return MergeReport(
        folder, planned.recipe, len(planned.targets), total, seconds, facts=planned.facts, warnings=planned.warnings
    )


def plan_merge(recipe: Recipe, api: HfApi | None = None) -> Plan:
    """Opens a recipe's models, downloading missing files, and plans every tensor of the merge.

    Raises:
        FusionError: a model cannot be opened or merged, or the merged model would not load.
    """
    opened = open_merge(recipe, api)
    planned = opened.plan(opened.recipe)
    planned.unchecked = check_loads(planned.config, shapes_of(planned.specs), planned.first)
    return planned


@dataclass(frozen=True)
class OpenedMerge:
    """The opened models of a recipe, which can be merged with other parameters as well.

    Attributes:
        recipe: as it is planned.
        base: the base, or None.
        experts: in the recipe's order.
        vocabulary: of the merged model, or None if its tokenizer is the first model's.
        untied: whether the merged model gets a separate head.
        notes: see `Plan`.
    """

    recipe: Recipe
    base: Model | None
    experts: list[Model]
    vocabulary: Vocabulary | None
    untied: bool
    notes: list[str]

    def plan(self, recipe: Recipe, files: OpenFiles | None = None) -> Plan:
        """Plans every tensor of a merge; whether the merged model loads is not checked.

        Args:
            recipe: the opened one, or one that differs from it in parameters and weights.
            files: reads the tensors; default: from the disk, when they are merged.
        """
        method = method_named(recipe.method)
        if method.plans:
            planned: Plan = method.module.plan(recipe, self.base, self.experts)
        else:
            planned = plan(recipe, self.base, self.experts, self.vocabulary, files)
        planned.recipe = _pinned(planned)
        if self.untied:
            planned.config = untie_config(planned.config)
        planned.notes = [*planned.notes, *self.notes]
        planned.config = fit_config(planned.config, shapes_of(planned.specs), [planned.first, *planned.experts])
        return planned


def open_merge(recipe: Recipe, api: HfApi | None = None) -> OpenedMerge:
    """Opens a recipe's models, downloading missing files.

    Raises:
        FusionError: a model cannot be opened, or their tokenizers cannot be united.
    """
    method = method_named(recipe.method)
    if recipe.stages:
        raise FusionError("a recipe of several stages has no dry run", "fuse without --dry-run")
    if method.merges == "adapters":
        raise FusionError(f"{recipe.method} merges adapters, which has no dry run", "fuse without --dry-run")
    check_recipe(recipe)
    names = [expert.model for expert in recipe.experts]
    merged_base = [recipe.base] if recipe.base and method.base else []  # else it is only the base of adapters
    opened = open_models([*merged_base, *names], api, recipe.base, merges_base=bool(merged_base))
    base = opened.pop(0) if merged_base else None
    heads = align_tied_heads(recipe, base, opened)
    base, opened = heads.base, heads.experts
    vocabulary = None
    if recipe.tokenizer == SMALLEST and not method.plans:
        vocabulary = smallest_vocabulary(base, opened)
    elif recipe.tokenizer is not None and not method.plans:
        vocabulary = unite_vocabularies(recipe, base, opened, api)
    if vocabulary is None and recipe.tokenizer is not None and not method.plans:
        recipe = replace(recipe, tokenizer=None)  # smallest, with vocabularies of equal size
    return OpenedMerge(recipe, base, opened, vocabulary, heads.untied, [heads.note] if heads.note else [])


def refuse_inputs(planned: Plan, folder: Path) -> None:
    """Raises if the output or the staging folder overlaps an input."""
    written = (folder, staging_path(folder))
    for own in {file.parent.resolve() for file in input_files(planned)}:
        if any(own == output or output in own.parents for output in written) or own in folder.parents:
            raise FusionError(f"the output {folder} overlaps the input {own}", "choose another --output")


def input_files(planned: Plan) -> set[Path]:
    """All weight files of the inputs."""
    models = [*([planned.base] if planned.base else []), *planned.experts]
    adapters = (adapter_weights_file(model.folder) for model in models if model.adapter)
    return {file for file in adapters if file} | {entry.file for model in models for entry in model.entries.values()}


def file_stamps(planned: Plan) -> list[tuple[str, int, int]]:
    """Path, size and modification time of all input files, to detect changes between runs."""
    stats = [(str(file), file.stat()) for file in sorted(input_files(planned))]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def write_small(planned: Plan, staging_folder: Path) -> None:
    """Writes configuration, tokenizer and recipe."""
    for name, raw in merged_files(planned).items():
        (staging_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staging_folder / name).write_bytes(raw)
    planned.recipe.save(staging_folder / RECIPE_FILE)


def _check_written(planned: Plan, staging_folder: Path) -> None:
    """Checks again that the model loads, now from the written files."""
    written = read_checkpoint(staging_folder, MERGED)
    wanted = {(spec.name, spec.dtype, spec.shape) for spec in planned.specs if not spec.folder}
    if {(entry.name, entry.dtype, entry.shape) for entry in written.values()} != wanted:
        raise FusionError(
            f"{staging_folder} does not contain the merged tensors", "merge again: another process wrote there"
        )
    check_loads(read_json(staging_folder / "config.json", MERGED), shapes_of(written.values()), planned.first)


def count_cores() -> int:
    """Number of cores that this process may use."""
    known = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(known(0)) if known else os.cpu_count() or 1


def _base_of_all(recipe: Recipe, experts: Sequence[Model]) -> str | None:
    """The common recorded base of adapters, for a method without a base; None otherwise."""
    given = [
        m for e, m in zip(recipe.experts, experts, strict=True) if m.adapter and not ModelRef.parse_pair(e.model)[0]
    ]
    bases = {model.adapter.base for model in given if model.adapter}
    return bases.pop() if len(bases) == 1 and not method_named(recipe.method).base else None


def _pinned(planned: Plan) -> Recipe:
    """The recipe with reproducible references to all models."""
    recipe, base, experts = planned.recipe, planned.base, planned.experts
    known = {} if planned.vocabulary is None else dict(planned.vocabulary.pinned)
    known |= {expert.model: model.name for expert, model in zip(recipe.experts, experts, strict=True)}
    used = base.name if base else _base_of_all(recipe, experts)
    if used is not None and recipe.base is not None:
        known[recipe.base] = used

    return replace(recipe.renamed(lambda name: known.get(name, name)), base=used)
