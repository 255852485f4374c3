"""Which mixtures of experts dense models become: plain data, without torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPTED = ("embedding", "hidden", "hidden_avg")
"""Gates that are made of the experts' prompts."""

_KEPT = (
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.({})|input_layernorm|post_attention_layernorm)\.weight"
)


@dataclass(frozen=True)
class Mixture:
    """What dense models of some kinds become.

    Attributes:
        title: its name, as mergekit has it.
        sources: model type -> what its configuration means by saying nothing, where the mixture means something else.
        model_type: the mixture's.
        architecture: its class.
        mlp: where it has its experts, behind the layer's name.
        names: of an expert's matrices, by those of a dense MLP.
        attention: the matrices and norms of its attention, as alternatives.
        count: the configuration's key for the number of experts.
        more: what else its configuration says, of the dense one.
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
        """What it has in common with the dense model, by name."""
        return re.compile(_KEPT.format(self.attention))


# A new kind of mixture is one more row.
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
