"""Cases for comparison: our method, the equivalent call of another library, and the tolerance.

mergekit is given a recipe; ours reads the same recipe, unchanged. fusion_bench is given an algorithm with its arguments
(or, where that needs data of its own, the function that merges); ours the parameters that reproduce its conventions.
PEFT is given adapters and how to combine them. Nothing is imported here that one of the environments lacks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from more_cases import ADAPTERS, BASIC, PEFT, TOKENS

MODELS = ("base", "one", "two", "three")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: of the case.
        method: ours, a key of MERGE_METHODS.
        peer: "mergekit", "fusion_bench" or "peft".
        theirs: mergekit's recipe, models by their names in `MODELS`; or what the peer's class or function is called,
            and its arguments.
        ours: parameters; of mergekit, what to change in our reading of its recipe (nothing, if it is faithful).
        experts: which are merged.
        base: whether the base is given.
        own: parameters of each expert.
        slices: of ours, where layers are taken: (first layer, layer after the last).
        tolerance: the largest difference that is no disagreement, as a share of the largest step from the base.
        outliers: the share of elements that may be farther off: sums of opposite entries whose sign is rounding.
        random: entries are dropped at random: those that both kept are compared, and the shares that are kept.
        stored: type of the checkpoints.
        first: the model that steps are counted from.
        differs: why a difference is right, where there is one; such a case must differ.
    """

    name: str
    method: str
    peer: str
    theirs: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = MODELS[1:]
    base: bool = True
    own: tuple[dict[str, Any], ...] = ()
    slices: tuple[tuple[int, int], ...] = ()
    tolerance: float = 2e-5
    outliers: float = 0.0
    random: bool = False
    stored: str = "float32"
    first: str = "base"
    differs: str = ""


def kit(method: str, weights: tuple[float, ...] = (), own: dict[str, Any] | None = None, **options: Any) -> dict:
    """A recipe of mergekit's: three experts (or as many as there are weights) and the base."""
    base, own = options.pop("base", True), own or {}
    experts = MODELS[1 : 1 + len(weights)] if weights else MODELS[1:]
    rows = [{"model": m, "parameters": {"weight": w, **own}} for m, w in zip(experts, weights or (1.0,) * 3)]
    recipe = {"merge_method": method, "models": rows, "parameters": options, "dtype": "float32"}
    return recipe | ({"base_model": "base"} if base else {})


def listed(method: str, *models: str, base: str | None = None, **options: Any) -> dict:
    """A recipe of mergekit's without parameters of single models."""
    recipe = {"merge_method": method, "models": [{"model": m} for m in models], "dtype": "float32"}
    return recipe | ({"base_model": base} if base else {}) | ({"parameters": options} if options else {})


def bench(algorithm: str, **arguments: Any) -> dict:
    """A call of fusion_bench's."""
    return {"algorithm": algorithm, "arguments": arguments}


GRADIENT = [{"filter": "mlp", "value": [0.1, 0.5, 1.0]}, {"filter": "self_attn", "value": 0.3}, {"value": 0.7}]
FLIPS = 2e-4  # sums that are 0 but for rounding, and ties among magnitudes

MERGEKIT = [
    ("linear", kit("linear", (0.2, 0.5, 0.3), base=False)),
    ("linear, weights that do not sum to 1", kit("linear", (1.0, 2.0, 0.5), base=False)),
    ("linear, not normalized", kit("linear", (1.0, 2.0, -0.5), base=False, normalize=False)),
    ("linear, gradients and filters", kit("linear", (), {"weight": GRADIENT}, base=False)),
    ("slerp", listed("slerp", "one", "two", base="one", t=0.3)),
    ("slerp, gradients and filters", listed("slerp", "one", "two", base="one", t=GRADIENT)),
    ("nuslerp", kit("nuslerp", (0.3, 0.7), base=False)),
    ("nuslerp of task vectors", kit("nuslerp", (0.3, 0.7))),
    ("nuslerp by rows", kit("nuslerp", (0.3, 0.7), nuslerp_flatten=False)),
    ("nuslerp by columns", kit("nuslerp", (0.3, 0.7), nuslerp_flatten=False, nuslerp_row_wise=True)),
    ("multislerp", kit("multislerp", (0.2, 0.5, 0.3), base=False)),
    ("multislerp of task vectors", kit("multislerp", (0.2, 0.5, 0.3))),
    ("karcher", listed("karcher", "one", "two", "three")),
    ("nearswap", listed("nearswap", "base", "one", base="base", t=0.001)),
    ("arcee_fusion", listed("arcee_fusion", "base", "one", base="base")),
    ("model_stock, two", listed("model_stock", "base", "one", "two", base="base")),
    ("model_stock, three", listed("model_stock", "base", "one", "two", "three", base="base")),
    ("model_stock by rows", listed("model_stock", "base", "one", "two", "three", base="base", filter_wise=True)),
    ("task_arithmetic", kit("task_arithmetic", (0.4, 1.0, -0.2))),
    ("task_arithmetic, λ and normalized", kit("task_arithmetic", (0.4, 1.0, 0.2), normalize=True, **{"lambda": 0.7})),
    ("ties", kit("ties", (0.5, 1.0, 0.8), {"density": 0.2})),
    ("ties, sum", kit("ties", (0.5, 1.0, 0.8), {"density": 0.5}, normalize=False, **{"lambda": 0.3})),
    ("ties, gradients and filters", kit("ties", (1.0, 0.5, 0.7), {"density": [0.9, 0.2]})),
    ("ties, rescaled", kit("ties", (0.5, 1.0, 0.8), {"density": 0.3}, rescale=True)),
    ("breadcrumbs, rescaled", kit("breadcrumbs", (0.5, 1.0, 0.8), {"density": 0.6, "gamma": 0.05}, rescale=True)),
    ("breadcrumbs", kit("breadcrumbs", (0.5, 1.0, 0.8), {"density": 0.7, "gamma": 0.05})),
    ("breadcrumbs, gamma 0", kit("breadcrumbs", (0.5, 1.0, 0.8), {"density": 0.7, "gamma": 0.0})),
    ("breadcrumbs_ties", kit("breadcrumbs_ties", (0.5, 1.0, 0.8), {"density": 0.7, "gamma": 0.05})),
    ("dare_linear, nothing dropped", kit("dare_linear", (0.5, 1.0, 0.8), {"density": 1.0})),
    ("dare_linear, rescaled", kit("dare_linear", (0.6,), {"density": 0.4})),
    ("dare_linear, not rescaled", kit("dare_linear", (0.6,), {"density": 0.4}, rescale=False)),
    ("dare_ties, nothing dropped", kit("dare_ties", (0.5, 1.0, 0.8), {"density": 1.0})),
    ("dare_ties", kit("dare_ties", (0.6,), {"density": 0.4}, rescale=False)),
    ("della, nothing dropped", kit("della", (0.5, 1.0, 0.8), {"density": 1.0})),
    ("della", kit("della", (0.6,), {"density": 0.5, "epsilon": 0.2}, rescale=False)),
    ("della_linear", kit("della_linear", (0.6,), {"density": 0.5, "epsilon": 0.2}, rescale=False)),
    ("sce", listed("sce", "one", "two", "three", base="base")),
    ("sce, selecting", listed("sce", "one", "two", "three", base="base", select_topk=0.3)),
    (
        "passthrough of slices",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "one", "layer_range": [0, 2]}]},
                {"sources": [{"model": "two", "layer_range": [1, 3], "parameters": {"scale": 0.5}}]},
            ],
            "dtype": "float32",
        },
    ),
    (
        "task_arithmetic of slices",
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "slices": [
                {
                    "sources": [
                        {"model": "base", "layer_range": [0, 2]},
                        {"model": "one", "layer_range": [1, 3], "parameters": {"weight": 0.5}},
                    ]
                },
                {
                    "sources": [
                        {"model": "base", "layer_range": [2, 3]},
                        {"model": "two", "layer_range": [0, 1], "parameters": {"weight": [0.2, 0.8]}},
                    ]
                },
            ],
            "dtype": "float32",
        },
    ),
]
MIXTURE = {
    "base_model": "base",
    "gate_mode": "cheap_embed",
    "dtype": "float32",
    "experts": [
        {"source_model": "one", "positive_prompts": ["fox fox dog", "router"]},
        {"source_model": "two", "positive_prompts": ["gate"], "negative_prompts": ["dog lazy"]},
        {"source_model": "three", "positive_prompts": ["lazy", "experts are fused"]},
    ],
}
HIDDEN = {key: value for key, value in MIXTURE.items() if key != "gate_mode"} | {"dtype": "bfloat16"}
ONE_EACH = [
    {key: value[:1] if key != "source_model" else value for key, value in e.items()} for e in MIXTURE["experts"]
]
AVERAGES = HIDDEN | {"gate_mode": "hidden_avg", "experts": ONE_EACH}  # of several, mergekit's hold their padding
BEYOND = {"differs": "mergekit and fusion_bench go on beyond the base where experts point away from each other"}
HALF = {"stored": "bfloat16", "differs": "mergekit computes in bfloat16, ours in float32"}
MERGEKIT += [
    (f"{name}, bfloat16", recipe | {"dtype": "bfloat16"})
    for name, recipe in MERGEKIT
    if name in ("linear", "task_arithmetic", "ties")
]
MORE = {
    "breadcrumbs, gamma 0": {"differs": "mergekit keeps nothing, and writes the base: its slice [n:-0] is empty"},
    **{name: HALF for name, recipe in MERGEKIT if recipe["dtype"] == "bfloat16"},
    "karcher": {"tolerance": 1e-4},
    "nuslerp of task vectors": {"tolerance": 1e-4},
    **dict.fromkeys(("model_stock, two", "model_stock, three", "model_stock by rows"), {"tolerance": 1e-4} | BEYOND),
    "arcee_fusion": {
        "outliers": 1e-3
    },  # divergences of nearly equal rows: in float32 they are rounding at the threshold
    "model_stock of two, weights unused": {"tolerance": 1e-4} | BEYOND,
    "model_stock of two, by rows": {"tolerance": 1e-4} | BEYOND,
    "dare_ties of two": {
        "random": True,
        "differs": "where both of two experts are kept at random, signs are elected among others, and sums differ",
    },
    **{
        name: {"random": True}
        for name in ("dare_linear, rescaled", "dare_linear, not rescaled", "dare_ties", "della", "della_linear")
    },
}
# by how much what is left grows depends on what is drawn: a norm of 64 elements varies by a tenth
MORE["dare_linear, rescaled"] |= {"tolerance": 0.1, "outliers": 1e-3}

WHOLE = {"density": 0.2, "trim": "model", "ties": "all"}
TIES = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": []}
FUSION_BENCH = [
    Case("average", "linear", "fusion_bench", bench("SimpleAverageAlgorithm"), base=False),
    Case(
        "weighted average",
        "linear",
        "fusion_bench",
        bench("WeightedAverageAlgorithm", normalize=True, weights=[1.0, 2.0, 0.5], verbose=False),
        base=False,
        own=({"weight": 1.0}, {"weight": 2.0}, {"weight": 0.5}),
    ),
    Case(
        "task arithmetic",
        "task_arithmetic",
        "fusion_bench",
        bench("TaskArithmeticAlgorithm", scaling_factor=0.3),
        {"scaling": 0.3},
    ),
    Case(
        "TIES, sum",
        "ties",
        "fusion_bench",
        bench("TiesMergingAlgorithm", **TIES, merge_func="sum"),
        {**WHOLE, "scaling": 0.3, "merge": "sum"},
        outliers=FLIPS,
    ),
    Case(
        "TIES, mean",
        "ties",
        "fusion_bench",
        bench("TiesMergingAlgorithm", **TIES, merge_func="mean"),
        {**WHOLE, "scaling": 0.3, "merge": "mean"},
        outliers=FLIPS,
    ),
    Case(
        "TIES, defaults",
        "ties",
        "fusion_bench",
        bench("TiesMergingAlgorithm", **TIES, merge_func="sum"),
        differs="ours trims tensor by tensor, averages what agrees and adds it whole (the paper's λ = 1); fusion_bench"
        " trims the whole model, sums and takes 0.3: trim: model, ties: all, merge: sum, scaling: 0.3",
    ),
    Case(
        "DARE task arithmetic",
        "dare_linear",
        "fusion_bench",
        bench("DareTaskArithmetic", scaling_factor=0.3, sparsity_ratio=0.6, only_on_linear_weights=False),
        {"scaling": 0.3, "drop_rate": 0.6},
        experts=("one",),
        random=True,
    ),
    Case(
        "DARE average, nothing dropped",
        "dare_linear",
        "fusion_bench",
        bench("DareSimpleAverage", sparsity_ratio=0.0, only_on_linear_weights=False),
        {"scaling": 1.0, "drop_rate": 0.0, "normalize": True},
    ),
    Case(
        "DARE-TIES, nothing dropped",
        "dare_ties",
        "fusion_bench",
        bench(
            "DareTiesMerging", sparsity_ratio=0.0, only_on_linear_weights=False, rescale=True, **TIES, merge_func="sum"
        ),
        {**WHOLE, "scaling": 0.3, "drop_rate": 0.0, "merge": "sum"},
        outliers=FLIPS,
    ),
    Case(
        "DARE-TIES",
        "dare_ties",
        "fusion_bench",
        bench(
            "DareTiesMerging", sparsity_ratio=0.5, only_on_linear_weights=False, rescale=True, **TIES, merge_func="sum"
        ),
        {**WHOLE, "scaling": 0.3, "drop_rate": 0.5, "merge": "sum"},
        experts=("one",),
        random=True,
    ),
    Case(
        "magnitude pruning of a task vector",
        "magnitude",
        "fusion_bench",
        bench("MagnitudeDiffPruningAlgorithm", prune_ratio=0.7, rescale=None, extract_names=None, prune_type="minor"),
        {"scaling": 1.0, "density": [{"filter": w, "value": 0.3} for w in ("_proj", "lm_head")] + [{"value": 0.0}]},
        experts=("one",),
        differs="fusion_bench prunes every row of a linear layer alike (and takes nothing of other tensors), ours a"
        " tensor's smallest wherever they are",
    ),
    Case("SLERP", "slerp", "fusion_bench", bench("SlerpMergeAlgorithm", t=0.3), {"t": 0.3}, ("one", "two"), False),
    Case("ExPO", "expo", "fusion_bench", bench("ExPOAlgorithm", extrapolation_factor=0.5), {"scaling": 0.5}, ("one",)),
    Case(
        "model stock, two",
        "model_stock",
        "fusion_bench",
        bench("ModelStock"),
        experts=("one", "two"),
        tolerance=1e-4,
        **BEYOND,
    ),
    Case(
        "model stock, three",
        "model_stock",
        "fusion_bench",
        bench("ModelStock"),
        {"average": "angle"},
        tolerance=1e-4,
        **BEYOND,
    ),
    Case(
        "TSV-M",
        "tsv_m",
        "fusion_bench",
        bench("TaskSingularVectorMerging", alpha=0.8),
        {"scaling": 0.8},
        tolerance=1e-3,
    ),
    Case(
        "TSV-M, weights",
        "tsv_m",
        "fusion_bench",
        bench("TaskSingularVectorMerging", alpha=[0.5, 1.0, 0.8]),
        own=({"weight": 0.5}, {"weight": 1.0}, {"weight": 0.8}),
        tolerance=1e-3,
    ),
    Case("Iso-C", "iso_c", "fusion_bench", bench("ISO_C_Merge", scaling_factor=1.0), tolerance=1e-3),
    Case(
        "Iso-CTS",
        "iso_cts",
        "fusion_bench",
        bench("ISO_CTS_Merge", scaling_factor=1.0, common_space_fraction=0.8),
        {"common_space_fraction": 0.8},
        tolerance=1e-3,
    ),
    Case("WUDI", "wudi", "fusion_bench", bench("WUDIMerging", iter_num=100), {"steps": 100}, tolerance=2e-3),
    Case("EMR, shared", "emr", "fusion_bench", bench("EMR", expert=0), {"expert": 0}, outliers=FLIPS),
    Case(
        "EMR, of a task",
        "emr",
        "fusion_bench",
        bench("EMR", expert=2),
        {"expert": 2, "rescale": "tensors"},
        outliers=FLIPS,
    ),
    Case(
        "Fisher, given its weights",
        "fisher",
        "fusion_bench",
        bench("Fisher", normalize=False),
        base=False,
        own=tuple({"statistics": f"{name}-fisher"} for name in MODELS[1:]),
    ),
    Case(
        "Fisher, norms divided out",
        "fisher",
        "fusion_bench",
        bench("Fisher", normalize=True),
        {"normalize": True},
        base=False,
        own=tuple({"statistics": f"{name}-fisher"} for name in MODELS[1:]),
    ),
    Case(
        "RegMean, given its matrices",
        "regmean",
        "fusion_bench",
        bench("RegMean", ratio=0.9),
        {"off_diagonal": 0.9},
        base=False,
        own=tuple({"statistics": f"{name}-gram"} for name in MODELS[1:]),
        tolerance=1e-3,
    ),
    Case(
        "depth up-scaling",
        "passthrough",
        "fusion_bench",
        bench("DepthUpscalingForLlama", layer_indices=[0, 1, 1, 2], model_save_path=None),
        experts=("one",),
        base=False,
        slices=((0, 2), (1, 3)),
    ),
]

SINGULAR = {"tolerance": 1e-4}  # PEFT decomposes in float32 what it has summed
PEFTS = {
    "svd, nothing cut": SINGULAR,
    "svd, cut to 5": SINGULAR,
    "linear": {"differs": "PEFT sums A and B apart, √w of each: their product has terms of two adapters, B_i A_j"},
    "ties_svd": {**SINGULAR, "outliers": FLIPS},
    "ties_svd, unlike weights": {
        **SINGULAR,
        "differs": "PEFT elects signs without the weights and divides by how many agree; ours, as mergekit, elects with"
        " the weights and divides by their sum",
    },
    "magnitude_prune_svd": SINGULAR,
    "dare_linear_svd, nothing dropped": SINGULAR,
    "dare_ties_svd, nothing dropped": {**SINGULAR, "outliers": FLIPS},
}

CASES = [
    *(Case(name, recipe["merge_method"], "mergekit", recipe, **MORE.get(name, {})) for name, recipe in MERGEKIT),
    Case("a mixture of experts, gates from embeddings", "moe", "mergekit", MIXTURE),
    # both run the base in bfloat16, which rounds alike only where a batch is the same
    Case("gates from hidden states", "moe", "mergekit", HIDDEN, stored="bfloat16", tolerance=0.02),
    Case("gates from averages", "moe", "mergekit", AVERAGES, stored="bfloat16", tolerance=0.02),
    *(
        Case(f"tests: {name}", recipe["merge_method"], "mergekit", recipe, **MORE.get(name, {}))
        for name, recipe in BASIC
    ),
    *(Case(f"tests: {name}", recipe["merge_method"], "mergekit", recipe, first="plain") for name, recipe in TOKENS),
    *(
        Case(
            f"add_weighted_adapter: {name}",
            method,
            "peft",
            {"arguments": arguments, "weights": weights},
            ours,
            ADAPTERS[: len(weights)],
            own=tuple({"weight": weight} for weight in weights),
            **PEFTS.get(name, {}),
        )
        for name, method, ours, arguments, weights in PEFT
    ),
    *FUSION_BENCH,
]
