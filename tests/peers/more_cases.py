"""The recipes of mergekit's own tests, and the cases of PEFT's tests of weighted adapters, as data.

mergekit's test_basic_merges.py and test_tokenizer.py merge in bfloat16, which both round otherwise (see `cases.py`):
here everything is in float32, but for what is copied.
"""

from __future__ import annotations

from typing import Any

# the models of mergekit's tests: "one", "two" and "base" are their three LLaMAs; these have 64 tokens and more
VOCABULARIES = ("plain", "chatml", "padded")
ADDED = {"plain": (), "chatml": ("<|im_start|>", "<|im_end|>"), "padded": tuple(f"<UNUSED_{i}>" for i in range(4))}
ROWS = {"plain": 64, "chatml": 66, "padded": 64}  # the last has no rows for its added tokens
OTHERS = ("gpt2", *VOCABULARIES)
ADAPTERS = ("one-lora", "two-lora", "three-lora")


def two(method: str, base: str | None = None, **parameters: Any) -> dict[str, Any]:
    """0.6 of one and 0.4 of two."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("one", 0.6), ("two", 0.4))]
    recipe = {"merge_method": method, "models": models, "dtype": "float32"}
    return recipe | ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {})


def tokens(*models: str, method: str = "linear", **more: Any) -> dict[str, Any]:
    """Models of unlike vocabularies, each with the weight 1; the first is the base."""
    rows = [{"model": m, "parameters": {"weight": 1.0}} for m in models]
    return {"merge_method": method, "base_model": models[0], "models": rows, "dtype": "float32", **more}


def token(**source: Any) -> dict[str, Any]:
    return {"source": {"kind": "model_token", **source}, "force": True}


STACK = {"sources": [{"model": "gpt2", "layer_range": [0, 2]}]}
NO_OUTPUT = [{"filter": "o_proj", "value": 0}, {"value": 1}]
BASIC = [
    ("GPT-2 copied", {"merge_method": "passthrough", "models": [{"model": "gpt2"}], "dtype": "bfloat16"}),
    ("GPT-2 twice", {"merge_method": "passthrough", "slices": [STACK, STACK], "dtype": "bfloat16"}),
    (
        "passthrough, some scaled by 0",
        {"merge_method": "passthrough", "models": [{"model": "one", "parameters": {"scale": NO_OUTPUT}}]},
    ),
    ("linear of two", two("linear")),
    ("slerp, weights unused", two("slerp", "one", t=0.35)),
    ("task_arithmetic of two", two("task_arithmetic", "base")),
    ("breadcrumbs, defaults", two("breadcrumbs", "base")),
    ("ties of two", two("ties", "base", density=0.3)),
    ("dare_ties of two", two("dare_ties", "base", density=0.66)),
    ("model_stock of two, weights unused", two("model_stock", "base")),
    ("model_stock of two, by rows", two("model_stock", "base", filter_wise=True)),
]
TOKENS = [
    ("no tokenizer: the smallest", tokens("plain", "padded", "chatml")),
    ("tokenizer of the base", tokens("plain", "padded", "chatml", tokenizer_source="=base")),
    ("union", tokens("plain", "padded", "chatml", tokenizer_source="=union")),
    ("tokenizer of a model", tokens("plain", "padded", "chatml", tokenizer_source="chatml")),
    ("union, slerp", tokens("plain", "chatml", method="slerp", tokenizer_source="=union", parameters={"t": 0.5})),
    (
        "tokens forced",
        tokens(
            *("plain", "chatml"),
            tokenizer={
                "source": "=union",
                "tokens": {
                    "word10": {"source": "chatml", "force": True},
                    "word11": {"source": "plain", "force": True},
                },
            },
        ),
    ),
    (
        "tokens of other tokens",
        tokens(
            *("plain", "chatml"),
            tokenizer={
                "source": "=base",
                "tokens": {"word20": token(model="chatml", token_id=64), "word21": token(model="plain", token="<s>")},
            },
        ),
    ),
    ("padded to a multiple", tokens("chatml", tokenizer={"source": "=base", "pad_to_multiple_of": 16})),
]

# name, our method and parameters, PEFT's combination_type and options, weights of the adapters
FULL = {"svd_rank": 64}  # of every matrix that is adapted: nothing is cut
PEFT: list[tuple[str, str, dict[str, Any], dict[str, Any], tuple[float, ...]]] = [
    ("cat", "lora", {}, {"combination_type": "cat"}, (0.5, 1.5, 1.5)),
    ("cat, negative weights", "lora", {}, {"combination_type": "cat"}, (-0.5, -0.8, 1.2)),
    ("svd, nothing cut", "lora", {}, {"combination_type": "svd", **FULL}, (0.5, 1.5, 1.5)),
    ("svd, cut to 5", "lora", {"rank": 5}, {"combination_type": "svd", "svd_rank": 5}, (0.5, 1.5, 1.5)),
    ("linear, one adapter", "lora", {}, {"combination_type": "linear"}, (0.5,)),
    ("linear", "lora", {}, {"combination_type": "linear"}, (0.5, 1.5, 1.5)),
    (
        "ties_svd",
        "ties",
        {"density": 0.5, "merge": "mean"},
        {"combination_type": "ties_svd", "density": 0.5, **FULL},
        (1.0, 1.0, 1.0),
    ),
    (
        "ties_svd, unlike weights",
        "ties",
        {"density": 0.5, "merge": "mean"},
        {"combination_type": "ties_svd", "density": 0.5, **FULL},
        (0.5, 1.5, 1.5),
    ),
    (
        "magnitude_prune_svd",
        "magnitude",
        {"density": 0.5, "scaling": 1.0},
        {"combination_type": "magnitude_prune_svd", "density": 0.5, **FULL},
        (0.5, 1.5, -0.8),
    ),
    (
        "dare_linear_svd, nothing dropped",
        "dare_linear",
        {"drop_rate": 0.0, "scaling": 1.0},
        {"combination_type": "dare_linear_svd", "density": 1.0, **FULL},
        (0.5, 1.5, 1.5),
    ),
    (
        "dare_ties_svd, nothing dropped",
        "dare_ties",
        {"drop_rate": 0.0, "scaling": 1.0, "density": 1.0, "merge": "mean"},
        {"combination_type": "dare_ties_svd", "density": 1.0, **FULL},
        (1.0, 1.0, 1.0),
    ),
]
