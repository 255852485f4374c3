"""A recipe merged again and again with other parameters: its models are read once and held in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.hub.silence import quiet_transformers
from hf_fusion.merging.engine.checkpoint import DTYPES, HeldFiles
from hf_fusion.merging.engine.output import SHARD_BYTES, TensorSpec, write_index
from hf_fusion.merging.engine.stream import Target, explain_merge_errors, merged_values, write_tensors
from hf_fusion.merging.load_checks import check_loads, shapes_of
from hf_fusion.merging.loaded_merges import load_merged
from hf_fusion.merging.merge import count_cores, open_merge, write_small
from hf_fusion.merging.plan import Plan

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.recipe import Recipe


class HeldMerge:
    """A merged model whose weights follow the parameters of its recipe.

    Every tensor of the inputs is read from the disk once. A change of parameters merges again the tensors that it
    changes, from memory: each is then what `hf_fusion.merge` writes.

    Needs the memory of all inputs, as they are stored, and of the merged model.

    Args:
        recipe: of a static method that merges models.
        trust_remote_code: see `load_merged`.
        api: the Hub's client.

    Attributes:
        model: the merged model, with its tokenizer or image processor as ``processor``; on the accelerator, if there is
            one.
        recipe: the recipe of the model as it is, with pinned models.

    Raises:
        FusionError: the models cannot be merged, or the merged model cannot be loaded.
    """

    def __init__(self, recipe: Recipe, *, trust_remote_code: bool = False, api: HfApi | None = None) -> None:
        self._opened, self._files = open_merge(recipe, api), HeldFiles()
        planned = self._plan(recipe)
        check_loads(planned.config, shapes_of(planned.specs), planned.first)
        with TemporaryDirectory(prefix="hf-fusion-") as folder:
            _write(planned, Path(folder))
            self.model: PreTrainedModel = load_merged(folder, trust_remote_code=trust_remote_code)
        device: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model.to(device)
        self.recipe = planned.recipe
        self._shown = {target.spec.name: target.identity for target in planned.targets}
        stored = self.model.state_dict()
        inner = [target for target in planned.targets if not target.spec.folder]
        fits = all(
            target.spec.name in stored and stored[target.spec.name].shape == target.spec.shape for target in inner
        )
        self._places = {target.spec.name: stored[target.spec.name] for target in inner} if fits else None

    def show(self, recipe: Recipe) -> int:
        """Gives the model the weights of the recipe with other parameters.

        Args:
            recipe: differs from the first in parameters and weights of experts alone.

        Returns:
            The number of tensors that were merged again.

        Raises:
            FusionError: a merged tensor has NaN or Inf, or the method cannot merge it. The model is then a mixture,
                until it is given other weights.
        """
        planned = self._plan(recipe)
        changed = [target for target in planned.targets if self._shown.get(target.spec.name) != target.identity]
        for target in changed:
            self._shown.pop(target.spec.name, None)  # unknown until all are merged
        if (places := self._places) is not None:
            _merge(changed, lambda spec: places.get(spec.name), self._files)
        elif changed:  # transformers renames or joins tensors of this architecture when it loads them
            inner = [target for target in planned.targets if not target.spec.folder]
            tensors = {t.spec.name: torch.empty(t.spec.shape, dtype=_dtype(t.spec)) for t in inner}
            _merge(inner, lambda spec: tensors[spec.name], self._files)
            self._load(tensors)
        self._shown |= {target.spec.name: target.identity for target in changed}
        self.recipe = planned.recipe
        return len(changed)

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        config: Any = self.model.config
        with quiet_transformers():
            loaded = type(self.model).from_pretrained(None, config=config, state_dict=tensors, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())

    def _plan(self, recipe: Recipe) -> Plan:
        recipe = replace(recipe, tokenizer=self._opened.recipe.tokenizer)
        return self._opened.plan(recipe, self._files)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within this context torch computes each tensor in one thread, as tensors are merged in parallel ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(planned: Plan, folder: Path) -> None:
    """Writes a merged model; its inputs are held from then on."""
    with _one_thread_each():
        shards = write_tensors(planned.targets, folder, planned.files, threads=count_cores(), shard_bytes=SHARD_BYTES)
    write_index(folder, shards)
    write_small(planned, folder)


def _merge(targets: Sequence[Target], place: Callable[[TensorSpec], torch.Tensor | None], files: HeldFiles) -> None:
    """Merges tensors in parallel threads, each into its place; those without one are left out."""

    @torch.inference_mode()
    def run(target: Target) -> None:
        spec = target.spec
        if (own := place(spec)) is None:
            return
        merged = torch.empty(math.prod(spec.shape), dtype=_dtype(spec))
        if target.make is None:
            assert target.copied is not None
            files.read(target.copied, 0, merged.view(torch.uint8).numpy())
        else:
            with explain_merge_errors(spec.name):
                for start, values in merged_values(target.make, spec):
                    merged[start : start + len(values)] = values
        own.copy_(merged.view(spec.shape))

    with _one_thread_each(), ThreadPoolExecutor(count_cores()) as pool:
        list(pool.map(run, sorted(targets, key=lambda target: -target.spec.nbytes)))


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[spec.dtype][0])
    return dtype


__all__ = ["HeldMerge"]
