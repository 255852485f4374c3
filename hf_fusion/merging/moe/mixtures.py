"""Mixtures of experts that can be built from dense models, as data without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPTED = ("embedding", "hidden", "hidden_avg")
"""Gates that are computed from the experts' prompts."""

_KEPT = (
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.({})|input_layernorm|post_attention_layernorm)\.weight"
)


@dataclass(frozen=True)
class Mixture:
    """A mixture architecture, and the dense models that it can be built from.

    Attributes:
        title: its name in mergekit.
        sources: dense model type -> defaults of its configuration that differ from the mixture's.
        model_type: of the mixture.
        architecture: its class.
        mlp: path of the experts within a layer.
        names: name of a matrix in a dense MLP -> its name in an expert.
        attention: regular expression of the attention's matrices and norms.
        count: key of the number of experts in its configuration.
        more: computes further configuration values from the dense configuration.
    """

    title: str
    sources: Mapping[str, Mapping[str, Any]]
    model_type: str
    architecture: str
    mlp: str
    names: Mapping[str, str]
    attention: str
    count: str
    more: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda dense: {}

    @property
    def kept(self) -> re.Pattern[str]:
        """Pattern of the tensors that are copied from the dense model."""
        return re.compile(_KEPT.format(self.attention))


# another mixture is one more entry
MIXTURES = {
    "mixtral": Mixture(
        "Mixtral",
        {
            "llama": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "hidden_act": "silu",
                "sliding_window": None,
            },
            "mistral": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 131072,
                "hidden_act": "silu",
                "sliding_window": 4096,
                "num_key_value_heads": 8,
            },
        },
        "mixtral",
        "MixtralForCausalLM",
        "block_sparse_moe",
        {"gate": "w1", "up": "w3", "down": "w2"},
        "[qkvo]_proj",
        "num_local_experts",
    ),
    "qwen3_moe": Mixture(
        "Qwen3 MoE",
        {"qwen3": {"head_dim": 128, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}},
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "mlp",
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        "[qkvo]_proj|[qk]_norm",
        "num_experts",
        lambda dense: {
            "moe_intermediate_size": dense["intermediate_size"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "use_sliding_window": False,
            "sliding_window": None,
        },
    ),
}


__all__ = ["MIXTURES", "PROMPTED", "Mixture"]
