"""The streaming verb: from a recipe of a static method to the folder of a merged model, without holding a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError
from hf_fusion.families import STALE
from hf_fusion.hub.lora import adapter_weights_file
from hf_fusion.io.folders import refuse_to_replace, replace_folder
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import read_checkpoint
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
from hf_fusion.merging.tied_weights import align_tied_heads, untie_config
from hf_fusion.merging.tokenizers.requested import read_vocabulary
from hf_fusion.recipe import RECIPE_FILE, Recipe, RecipeExpert, Slice
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
    api: HfApi | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merges models into a folder that transformers loads: weights, configuration, tokenizer and ``fusion.yaml``.

    Values pass through memory in chunks; no model is ever held. The same recipe with the same inputs gives the same
    bytes, whatever the number of threads. Files appear in the folder when all of them are whole; a run that was killed
    goes on with its unfinished shards when it is run again. Under `accelerate launch` the processes share the shards.
    Before anything is written, and again before it appears, transformers' loader is asked whether the merged tensors
    fill the model that their ``config.json`` promises.

    Args:
        recipe: of a static method, see `hf_fusion.merging.methods.MERGE_METHODS`. One that merges adapters into one
            adapter is done by `hf_fusion.merging.lora.merge_adapters`.
        folder: created if missing. One that holds a model is refused, even if the same recipe made it.
        threads: tensors that a process merges at a time; default: one for each core.
        shard_bytes: most bytes of a file of weights.
        device: "cpu", "cuda" or "cuda:N": where methods that need whole matrices (TSV-Merge, Iso-C, Iso-CTS, WUDI,
            RegMean) multiply and decompose them, to other bytes; the others are bound by the disk, and stay on the CPU.
            Of several processes on a machine each takes its own GPU.
        overwrite: whether a merge that the folder holds may be replaced; a merge that was killed goes on without.
        api: the Hub's client.
        progress: called with the bytes that are done, and of all.

    Returns:
        The folder, its recipe, the sizes and the time, and warnings about what was left out or may not be meant.

    Raises:
        FusionError: naming what cannot be merged, and what to do.
    """
    folder = output_folder(folder)
    processes, device = Processes(), parse_device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", processes.local_rank % torch.cuda.device_count())
    if method_named(recipe.method).merges == "adapters":
        if processes.count > 1:
            raise FusionError(f"{recipe.method} is the work of one process", "run it without accelerate launch")
        return merge_adapters(recipe, folder, overwrite=overwrite, api=api)
    with processes.step():
        planned = plan_merge(recipe, api)
        refuse_inputs(planned, folder)
        refuse_to_replace(folder, overwrite)
    before, done, total = torch.get_num_threads(), 0, planned.nbytes
    torch.set_num_threads(1)  # tensors are merged side by side

    def told(more: int) -> None:
        nonlocal done
        done += more * processes.count  # the others are about as far
        progress(min(done, total), total)

    began = time.perf_counter()
    try:
        with ExitStack() as staged:
            place = staging_path(folder)
            with processes.step():
                if processes.is_main:
                    digest = compute_digest(
                        planned.targets, shard_bytes, planned.recipe.to_dict(), file_stamps(planned), device.type
                    )
                    staged.enter_context(staging(folder, digest, total))
            with processes.step():
                shards = write_tensors(
                    planned.targets,
                    place,
                    planned.files,
                    threads=threads or max(1, count_cores() // processes.local_count),
                    shard_bytes=shard_bytes,
                    process=(processes.rank, processes.count),
                    device=device,
                    progress=told,
                )
            with processes.step(), explain_disk_errors(folder.parent):
                if processes.is_main:
                    write_index(place, shards)
                    write_small(planned, place)
                    _check_written(planned, place)
                    replace_folder(place, folder, STALE)
    finally:
        planned.files.close()
        torch.set_num_threads(before)
    seconds = time.perf_counter() - began
    return MergeReport(
        folder, planned.recipe, len(planned.targets), total, seconds, facts=planned.facts, warnings=planned.warnings
    )


def plan_merge(recipe: Recipe, api: HfApi | None = None) -> Plan:
    """Opens a recipe's models, fetching what is not here, and decides what becomes of every tensor.

    Raises:
        FusionError: naming what cannot be opened or merged, or why the merged model would not load.
    """
    method = method_named(recipe.method)
    if method.merges == "adapters":
        raise FusionError(f"{recipe.method} merges adapters, at once: there is no plan of it", "fuse without --dry-run")
    check_recipe(recipe)
    names = [expert.model for expert in recipe.experts]
    merged_base = [recipe.base] if recipe.base and method.base else []  # else it is that of the adapters alone
    opened = open_models([*merged_base, *names], api, recipe.base, merges_base=bool(merged_base))
    base = opened.pop(0) if merged_base else None
    heads = align_tied_heads(recipe, base, opened)
    base, opened = heads.base, heads.experts
    if method.plans:
        planned: Plan = method.module.plan(recipe, base, opened)
    else:
        vocabulary = read_vocabulary(recipe, base, opened, api)
        if vocabulary is None and recipe.tokenizer is not None:  # the smallest, and all are of one size
            recipe = replace(recipe, tokenizer=None)
        planned = plan(recipe, base, opened, vocabulary)
    planned.recipe = _pinned(planned)
    if heads.untied:
        planned.config = untie_config(planned.config)
    if heads.note:
        planned.notes = [*planned.notes, heads.note]
    shapes = shapes_of(planned.specs)
    planned.config = fit_config(planned.config, shapes, [planned.first, *planned.experts])
    planned.unchecked = check_loads(planned.config, shapes, planned.first)
    return planned


def refuse_inputs(planned: Plan, folder: Path) -> None:
    """The output, and what is written beside it, must not be one of the inputs, nor lie in one, nor hold one."""
    written = (folder, staging_path(folder))
    for own in {file.parent.resolve() for file in input_files(planned)}:
        if any(own == place or place in own.parents for place in written) or own in folder.parents:
            raise FusionError(f"the output {folder} overlaps the input {own}", "choose another --output")


def input_files(planned: Plan) -> set[Path]:
    """All files whose weights are merged."""
    models = [*([planned.base] if planned.base else []), *planned.experts]
    adapters = (adapter_weights_file(model.folder) for model in models if model.adapter)
    return {file for file in adapters if file} | {entry.file for model in models for entry in model.entries.values()}


def file_stamps(planned: Plan) -> list[tuple[str, int, int]]:
    """By what is seen that inputs are not those of an earlier run: the sizes and times of their files."""
    stats = [(str(file), file.stat()) for file in sorted(input_files(planned))]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def write_small(planned: Plan, place: Path) -> None:
    """Configuration, tokenizer and recipe."""
    for name, raw in merged_files(planned).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(raw)
    planned.recipe.save(place / RECIPE_FILE)


def _check_written(planned: Plan, place: Path) -> None:
    """Asks once more whether the model loads, now from what lies on the disk."""
    written = read_checkpoint(place, MERGED)
    wanted = {(spec.name, spec.dtype, spec.shape) for spec in planned.specs if not spec.folder}
    if {(entry.name, entry.dtype, entry.shape) for entry in written.values()} != wanted:
        raise FusionError(f"{place} does not hold what was merged", "merge again: another process wrote there")
    check_loads(read_json(place / "config.json", MERGED), shapes_of(written.values()), planned.first)


def count_cores() -> int:
    """Cores this process may use."""
    known = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(known(0)) if known else os.cpu_count() or 1


def _base_of_all(recipe: Recipe, experts: Sequence[Model]) -> str | None:
    """The one base of all adapters that do not name their own, for a method that has no use for another; else None."""
    given = [
        m for e, m in zip(recipe.experts, experts, strict=True) if m.adapter and not ModelRef.parse_pair(e.model)[0]
    ]
    bases = {model.adapter.base for model in given if model.adapter}
    return bases.pop() if len(bases) == 1 and not method_named(recipe.method).base else None


def _pinned(planned: Plan) -> Recipe:
    """The recipe with every model by the name that finds it again."""
    recipe, base, experts = planned.recipe, planned.base, planned.experts
    known = {} if planned.vocabulary is None else dict(planned.vocabulary.pinned)
    known |= {expert.model: model.name for expert, model in zip(recipe.experts, experts, strict=True)}
    used = base.name if base else _base_of_all(recipe, experts)
    if used is not None and recipe.base is not None:
        known[recipe.base] = used

    def slice_of(own: Slice) -> Slice:
        return Slice(tuple(replace(s, model=known[s.model]) for s in own.sources), own.parameters)

    def named(value: object) -> Any:
        """The tokenizer's models, wherever it names them as a source."""
        if isinstance(value, dict):
            return {
                k: known.get(v, v) if k in ("source", "model") and isinstance(v, str) else named(v)
                for k, v in value.items()
            }
        return value

    rows = tuple(RecipeExpert(known[e.model], e.weight, e.parameters) for e in recipe.experts)
    return replace(
        recipe,
        base=used,
        experts=rows,
        slices=tuple(map(slice_of, recipe.slices)),
        tokenizer=named({"source": recipe.tokenizer})["source"] if recipe.tokenizer else None,
        chat_template=known.get(recipe.chat_template, recipe.chat_template) if recipe.chat_template else None,
    )
