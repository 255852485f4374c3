"""Dense language models as GGUF files, which llama.cpp, Ollama and LM Studio run.

Names and metadata are those of the ``gguf`` package. What llama.cpp computes otherwise for an architecture than
transformers, and what it has no key for, is refused, so that a file gives the model's answers or does not exist.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from hf_fusion.errors import FusionError
from hf_fusion.exporting.gguf_tokenizer import add_tokenizer
from hf_fusion.extras import need
from hf_fusion.io.files import own_file
from hf_fusion.progress import track

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from numpy.typing import NDArray

EXTRA = "gguf"
OTHERWISE = "hf-fusion export … --to dense, for servers that run transformers' models"
OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""The type of weights by default: as they are."""
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_F16_MAX = 65504.0


class Source(NamedTuple):
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


Tensors = Mapping[str, Source]
"""By their names in transformers."""


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes for a class of transformers.

    Attributes:
        name: in GGUF.
        act: the activation of its MLPs.
        biased: its attention may have biases.
        interleaved: rotary embeddings turn neighbouring dimensions, where transformers turns two halves.
        shifted: norms multiply by 1 + weight in transformers.
        windowed: alternate layers have a sliding window.
        layers_of_large: number of layers by which llama.cpp knows the size whose attention is scaled by another number.
    """

    name: str
    act: str = "silu"
    biased: bool = False
    interleaved: bool = False
    shifted: bool = False
    windowed: bool = False
    layers_of_large: int = 0


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", biased=True, interleaved=True),
    "MistralForCausalLM": Architecture("llama", biased=True, interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2", biased=True),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Gemma2ForCausalLM": Architecture("gemma2", "gelu_pytorch_tanh", shifted=True, windowed=True, layers_of_large=46),
    "Gemma3ForCausalLM": Architecture("gemma3", "gelu_pytorch_tanh", shifted=True, windowed=True, layers_of_large=62),
}
"""Class of transformers → what is exported."""
_PATTERN = {"gemma2": 2, "gemma3": 6}  # every second or sixth layer attends to the whole context
_LLAMA_3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# kind of rotary embeddings -> the keys that are exported; another one would be lost without a word
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": _LLAMA_3_KEYS,
}
_LOCAL_BASE = 10000.0  # of the rotary embeddings in layers with a window


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        tensors: their number, read back and compared.
        relative_error: ‖W' - W‖ / ‖W‖ over all weights, as they are read back.
        warnings: what differs in llama.cpp.
    """

    tensors: int
    relative_error: float
    warnings: tuple[str, ...]


def lazy_tensors(folder: Path) -> dict[str, Source]:
    """The tensors of a model's safetensors files, each read when it is asked for.

    Args:
        folder: of the model.

    Raises:
        FusionError: the folder has none.
    """
    found: dict[str, Source] = {}
    for path in filter(own_file, sorted(folder.glob("*.safetensors"))):
        file = safe_open(path, framework="pt")
        for name in list(file.keys()):
            found[name] = Source(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
    if not found:
        raise FusionError(f"{folder} has no safetensors files", "save the model with save_pretrained")
    return found


def check_architecture(name: str) -> None:
    """Raises for a class that is not exported.

    Args:
        name: of the class of transformers, as in ``architectures`` of its config.

    Raises:
        MissingLibraryError: gguf is not installed.
        FusionError: the class is not one of `ARCHITECTURES`.
    """
    need(EXTRA, "hf-fusion export --to gguf")
    if name not in ARCHITECTURES:
        raise FusionError(
            f"{name} is not exported to GGUF, only {', '.join(ARCHITECTURES)}",
            "hf-fusion export … --to dense, and llama.cpp's convert_hf_to_gguf.py",
        )


def write_gguf(
    path: Path, config: Any, tensors: Tensors, tokenizer: Any, quantization: str, about: Mapping[str, str]
) -> Written:
    """Writes a language model, tensor by tensor, and reads it back.

    Norms and biases are stored as F32, as llama.cpp does; so are rows whose length the type's blocks do not divide, as
    F16. Types of 4 and 5 bits keep embeddings and the output in 8.

    Args:
        path: of the file.
        config: of transformers.
        tensors: the weights.
        tokenizer: a fast one of transformers.
        quantization: one of `hf_fusion.exporting.forms.QUANTIZATIONS`.
        about: further metadata: ``name``, ``license``, ``description``.

    Returns:
        What was written.

    Raises:
        FusionError: the architecture, a value of the config or the tokenizer has no counterpart in llama.cpp.
    """
    class_name = next(iter(config.architectures or [""]))
    check_architecture(class_name)
    import gguf

    kind = ARCHITECTURES[class_name]
    writer = gguf.GGUFWriter(path, kind.name)
    for key, value in about.items():
        getattr(writer, f"add_{key}")(value)
    warnings = _add_config(writer, kind, config)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if quantization == 'F32' else 'MOSTLY'}_{quantization}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = _gguf_names(kind, config, tensors)
    [rows] = [tensors[name].shape[0] for name, own in names.items() if own == _EMBEDDINGS[0]]
    add_tokenizer(writer, tokenizer, rows)
    plan = {own: (name, _stored(own, tensors[name].shape, quantization)) for name, own in names.items()}
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for own, (name, stored) in plan.items():
        shape = tensors[name].shape
        nbytes = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(own, shape, np.dtype(np.float32), math.prod(nbytes), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sums, lost, norm = {}, 0.0, 0.0
    if factors is not None:
        writer.write_tensor_data(factors)
        sums["rope_freqs.weight"] = zlib.crc32(factors.tobytes())
    for own, (name, stored) in track(plan.items(), f"Writing {path.name}", len(plan)):
        values = _converted(own, tensors[name].read(), kind, config)
        if stored is gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > _F16_MAX:
            raise FusionError(f"{name} exceeds the range of F16", "--quantize BF16")
        data = np.ascontiguousarray(gguf.quantize(values, stored))
        difference = gguf.dequantize(data, stored).astype(np.float64) - values
        lost, norm = lost + float((difference**2).sum()), norm + float((values.astype(np.float64) ** 2).sum())
        writer.write_tensor_data(data)
        sums[own] = zlib.crc32(data.tobytes())
    writer.close()
    _read_back(path, sums)
    return Written(len(sums), math.sqrt(lost / norm) if norm else 0.0, tuple(warnings))


def _read_back(path: Path, sums: Mapping[str, int]) -> None:
    from gguf import GGUFReader

    found = {
        tensor.name: zlib.crc32(np.ascontiguousarray(tensor.data).tobytes()) for tensor in GGUFReader(path).tensors
    }
    if wrong := sorted(name for name in sums.keys() | found.keys() if sums.get(name) != found.get(name)):
        raise FusionError(f"{path.name} has {wrong[0]} otherwise than it was written", "export again")


# ---------------------------------------------------------------- weights


def _gguf_names(kind: Architecture, config: Any, tensors: Tensors) -> dict[str, str]:
    """Name in transformers → name in GGUF."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name in tensors:
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # llama.cpp reads the embeddings again
        own = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise FusionError(f"llama.cpp's {kind.name} has no tensor {name}", OTHERWISE)
        found[name] = own
    return found


def _stored(own: str, shape: Sequence[int], quantization: str) -> GGMLQuantizationType:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    wanted = kinds[quantization]
    if own in _EMBEDDINGS and quantization[:2] in ("Q4", "Q5"):
        wanted = kinds.Q8_0
    return kinds.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _converted(own: str, tensor: torch.Tensor, kind: Architecture, config: Any) -> NDArray[np.float32]:
    """A tensor as llama.cpp reads it."""
    values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    if kind.shifted and own.endswith("norm.weight"):
        return values + 1
    for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
        if kind.interleaved and own.split(".")[-2] == part:
            # the two halves of a head, which transformers turns against each other, become neighbours
            turned = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            return turned.swapaxes(1, 2).reshape(values.shape)
    return values


def _rope_factors(config: Any) -> NDArray[np.float32] | None:
    """By how much Llama 3 slows each rotary frequency; llama.cpp reads it as a tensor."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors: NDArray[np.float32] = (plain / slowed.double()).float().numpy()
    return factors


# ---------------------------------------------------------------- metadata


def _add_config(writer: GGUFWriter, kind: Architecture, config: Any) -> list[str]:
    """Adds the values of a config, and returns what llama.cpp does otherwise.

    Raises:
        FusionError: llama.cpp cannot do what the config says.
    """
    for key, found, wanted in _fixed(kind, config):
        if found != wanted:
            raise FusionError(
                f"{key} is {found}, and llama.cpp's {kind.name} has {wanted}", "hf-fusion export … --to dense"
            )
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, config)
    if kind.windowed:
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        return []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < config.max_position_embeddings:
        return [f"llama.cpp attends to all tokens: after {window} of them its answers differ from the model's"]
    return []


def _fixed(kind: Architecture, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """What llama.cpp computes whatever the file says: key of the config, its value, llama.cpp's."""
    yield "hidden_act", getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None), kind.act
    if not kind.biased:
        yield "attention_bias", bool(getattr(config, "attention_bias", False)), False
    if not kind.windowed:
        return
    count, step = config.num_hidden_layers, _PATTERN[kind.name]
    wanted = ["full_attention" if (index + 1) % step == 0 else "sliding_attention" for index in range(count)]
    yield "layer_types", list(config.layer_types), wanted
    large = count == kind.layers_of_large
    scale = config.hidden_size // config.num_attention_heads if large else _head_dim(config)
    yield "query_pre_attn_scalar", config.query_pre_attn_scalar, scale
    yield "use_bidirectional_attention", bool(config.use_bidirectional_attention), False
    if "sliding_attention" in config.rope_parameters:
        local = config.rope_parameters["sliding_attention"]
        yield "rope_parameters.sliding_attention", (local["rope_type"], local["rope_theta"]), ("default", _LOCAL_BASE)


def _head_dim(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _rope(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.rope_parameters
    inner: Mapping[str, Any] = found.get("full_attention", found)
    return inner


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    name = rope["rope_type"]
    if name not in _ROPE_KEYS:
        raise FusionError(f"rope_type is {name}, which GGUF has no key for", OTHERWISE)
    for key in rope.keys() - {"rope_type", "rope_theta", *_ROPE_KEYS[name]}:
        if rope[key] is not None and (key, rope[key]) != ("partial_rotary_factor", 1.0):
            raise FusionError(f"{key} of the rotary embeddings is {rope[key]}, which is not exported", OTHERWISE)
    writer.add_rope_freq_base(rope["rope_theta"])
    if name in ("default", "llama3"):
        return
    writer.add_rope_scaling_type(RopeScalingType[name.upper()])
    writer.add_rope_scaling_factor(rope["factor"])
    if name == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


__all__ = [
    "ARCHITECTURES",
    "EXTRA",
    "OF_DTYPE",
    "Source",
    "Written",
    "check_architecture",
    "lazy_tensors",
    "write_gguf",
]
