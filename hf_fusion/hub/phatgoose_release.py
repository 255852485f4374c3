"""Reads the checkpoints of PHATGOOSE's authors (github.com/r-three/phatgoose): all experts and gates in one file.

``owner/name#7`` is the expert with index 7 of such a repo, ``owner/name#7@sha`` the same at a commit. It is converted
once to a PEFT adapter with gates, in the cache. In the file, an expert of rank r changes a linear layer to
W x + x L₁ L₂ / r, which is PEFT's α = 1. Its gate v reads the same x.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.gates_file import save_gates
from hf_fusion.io.cache import cache_folder
from hf_fusion.io.folders import make_once
from hf_fusion.types import Gates

if TYPE_CHECKING:
    import torch

    from hf_fusion.hub.model_files import Source

_KEY = re.compile(r"(.+)\._addons\.(?:expert_lora|router)\.(layer1|layer2|expert_embeddings)__(\d+)")
_LOCK = Lock()

Layers = dict[str, dict[str, "torch.Tensor"]]  # module path → layer1 (d_in, r), layer2 (r, d_out), expert_embeddings


def write_expert(source: Source, file: Path, number: int) -> Path:
    """Writes one expert as a PEFT adapter with gates, and returns its folder in the cache.

    Args:
        source: the repo.
        file: its checkpoint, downloaded.
        number: index of the expert.

    Raises:
        FusionError: the file is not such a checkpoint, or has no such expert.
    """

    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        with _LOCK:  # several threads may read experts; the file is indexed once
            experts = _experts(file, source.name)
        if number not in experts:
            raise FusionError(f"{source.name} has the experts #{min(experts)} to #{max(experts)}, but no #{number}")
        layers = experts[number]
        tensors = {}
        for path, own in layers.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = own["layer1"].T.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = own["layer2"].T.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if all("expert_embeddings" in own for own in layers.values()):
            save_gates(Gates({path: own["expert_embeddings"] for path, own in layers.items()}), folder)
        base = source.card.get("base_model") or ""
        config = {
            "peft_type": "LORA",
            "task_type": "SEQ_2_SEQ_LM",
            "base_model_name_or_path": base[0] if isinstance(base, list) else base,
            "r": next(iter(layers.values()))["layer1"].shape[1],
            "lora_alpha": 1,
            "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
            "inference_mode": True,
        }
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))

    repo = source.name.replace("/", "--")
    return make_once(cache_folder() / "phatgoose" / f"{repo}-{source.revision}" / str(number), make)


def _is_low_rank(own: Mapping[str, torch.Tensor]) -> bool:
    """Whether a layer's tensors are (d_in, r) and (r, d_out)."""
    first, second = own.get("layer1"), own.get("layer2")
    if first is None or second is None:
        return False
    return first.dim() == second.dim() == 2 and first.shape[1] == second.shape[0]


@cache
def _experts(file: Path, name: str) -> dict[int, Layers]:
    """All experts of a checkpoint; tensors are memory-mapped."""
    import torch

    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}  # no code of a pickle runs
    try:
        try:
            stored = torch.load(file, mmap=True, **options)
        except RuntimeError:  # torch's older format cannot be mapped
            stored = torch.load(file, **options)
    except Exception as error:  # an untrusted file may raise anything
        reason = f"{name}: {file.name} cannot be read ({type(error).__name__})"
        raise FusionError(reason, hint="download it again") from error
    experts: dict[int, Layers] = {}
    for key, tensor in stored.items() if isinstance(stored, dict) else ():
        if (match := _KEY.fullmatch(str(key))) and isinstance(tensor, torch.Tensor):
            experts.setdefault(int(match[3]), {}).setdefault(match[1], {})[match[2]] = tensor
    experts = {
        number: found
        for number, layers in sorted(experts.items())
        if (found := {path: own for path, own in layers.items() if _is_low_rank(own)})
    }
    if not experts:
        raise FusionError(f"{name}: {file.name} is not a checkpoint in the format of PHATGOOSE's authors")
    return experts
