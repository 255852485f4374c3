"""What the benchmark compares: one row for each technique, and how it is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError, shown, suggestion

# family -> what tables call it; in the order in which tables show them
FAMILIES = {
    "floor": "Floors",
    "expert": "Single experts",
    "ensemble": "Ensembles",
    "merge": "Static merging",
    "data": "Merging with statistics of the data",
    "learned": "Learned coefficients",
    "routing": "Routing among adapters",
    "fusion": "Fusion of outputs",
    "mixture": "Mixtures",
    "ceiling": "Ceilings",
}


@dataclass(frozen=True)
class Method:
    """A technique.

    Attributes:
        place: the function that fuses, or "module:function" in `hf_fusion.bench.settings`: (what `run` made ready, the split,
            the seed, parameters) → `bench.systems.System`, or several of them by name.
        title: what tables call it.
        family: a key of `FAMILIES`.
        kind: of the suites that it is for.
        also: other kinds of suites that it is for, and its function there.
        given: parameters that are not the defaults of the function.
        tune: the parameter whose best value is looked for on rows kept apart, and its values.
        chance: whether another seed gives another model.
        paper: arXiv number.
    """

    place: str | Callable[..., Any]
    title: str
    family: str
    kind: str = "merging"
    given: Mapping[str, Any] = field(default_factory=dict)
    tune: tuple[str, tuple[Any, ...]] | None = None
    chance: bool = False
    paper: str = ""
    also: Mapping[str, str] = field(default_factory=dict)

    def at(self, kind: str) -> str | Callable[..., Any] | None:
        """`place` for suites of a kind; None where it is not for them."""
        return self.place if kind == self.kind else self.also.get(kind)


SCALING = ("scaling", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0))


def _static(merge: str, title: str, paper: str, tuned: bool = True, **options: Any) -> Method:
    """A merging method of `hf_fusion.merging`."""
    given = {"method": merge, **options.pop("given", {})}
    family = options.pop("family", "merge")
    return Method("merging_methods:static", title, family, given=given, paper=paper, also={"routing": "routing:static"},
                  tune=SCALING if tuned else None, **options)  # fmt: skip


def _routed(way: str, title: str, paper: str = "", examples: int = 0, **options: Any) -> Method:
    """A way of `hf_fusion.evaluation.routing` to route among adapters; it may look at examples of what they know."""
    given = {"way": way, "examples": examples}
    also = {"fusion": "fusion:routed"}
    return Method("routing:routed", title, "routing", "routing", given, paper=paper, also=also, **options)


# what routers and coefficients learn with, where nothing else is said: chosen on minilm-8's rows kept apart
_LEARNS = {"steps": 80, "batch_size": 8, "scaling": 0.1}
_ENTROPY = {"loss": "entropy", "diversity": 0.0}

# A new method is one more row.
METHODS = {
    "pretrained": Method(
        "merging_methods:pretrained", "Pre-trained", "floor", also={"routing": "routing:pretrained"}
    ),
    "experts": Method(
        "merging_methods:experts", "Single expert", "expert",
        also={"routing": "routing:experts", "fusion": "fusion:experts", "regression": "regression:experts"},
    ),
    **{
        name: Method(f"merging_methods:{name}", title, "ensemble", also={kind: f"{kind}:{name}" for kind in kinds})
        for name, title, *kinds in (
            ("simple_ensemble", "Simple ensemble", "fusion", "regression"),
            ("weighted_ensemble", "Weighted ensemble", "fusion", "regression"),
            ("max_ensemble", "Max-model predictor", "fusion"),
        )
    },
    "average": _static("linear", "Simple average", "2203.05482", tuned=False),
    "weighted_average": Method(
        "merging_methods:weighted_average", "Weighted average", "merge", paper="2203.05482",
        also={"routing": "routing:weighted_average"},
    ),
    "task_arithmetic": _static("task_arithmetic", "Task arithmetic", "2212.04089"),
    "magnitude": _static("magnitude", "Magnitude pruning", "2306.01708"),
    "ties": _static("ties", "TIES", "2306.01708"),
    "ties_sum": _static(
        "ties", "TIES, sum (fusion_bench)", "2306.01708", given={"merge": "sum", "scaling": 0.3}
    ),
    "ties_model": _static("ties", "TIES, trimmed over the model", "2306.01708", given={"trim": "model", "ties": "all"}),
    "dare": _static("dare_linear", "DARE task arithmetic", "2311.03099", chance=True),
    "dare_ties": _static("dare_ties", "DARE-TIES", "2311.03099", chance=True),
    "della": _static("della", "DELLA", "2406.11617", chance=True),
    "breadcrumbs": _static("breadcrumbs", "Breadcrumbs", "2312.06795"),
    "slerp": _static("slerp", "SLERP", "", tuned=False),
    "nuslerp": _static("nuslerp", "NuSLERP", "", tuned=False),
    "multislerp": _static("multislerp", "Multi-SLERP", "", tuned=False),
    "karcher": _static("karcher", "Karcher mean", "", tuned=False),
    "model_stock": _static("model_stock", "Model stock", "2403.19522", tuned=False),
    "sce": _static("sce", "SCE", "2408.07990", tuned=False),
    "tsv_m": _static("tsv_m", "TSV-Merge", "2412.00081"),
    "iso_c": _static("iso_c", "Iso-C", "2502.04959"),
    "iso_cts": _static("iso_cts", "Iso-CTS", "2502.04959"),
    "wudi": _static("wudi", "WUDI", "2503.08099"),
    "recombination": _static("recombination", "Model recombination", "2406.03280", tuned=False, chance=True),
    "emr": Method(
        "merging_methods:emr", "EMR, a mask for each task", "mixture", paper="2405.17461",
        also={"routing": "routing:emr"},
    ),
    "fisher": _static("fisher", "Fisher", "2111.09832", tuned=False, chance=True, family="data"),
    "regmean": _static("regmean", "RegMean", "2212.09849", tuned=False, chance=True, family="data"),
    "regmean_pp": Method(
        "merging_methods:regmean_pp", "RegMean++", "data", chance=True, paper="2508.03121",
        also={"routing": "routing:regmean_pp"},
    ),
    "adamerging_task": Method(
        "merging_methods:adamerging", "AdaMerging, by task", "learned",
        given={"granularity": "task", **_LEARNS}, chance=True, paper="2310.02575",
    ),
    "adamerging_layer": Method(
        "merging_methods:adamerging", "AdaMerging, by layer", "learned",
        given={"granularity": "layer", **_LEARNS}, chance=True, paper="2310.02575",
    ),
    "adamerging_entropy": Method(
        "merging_methods:adamerging", "AdaMerging, by layer, entropy", "learned",
        given={"granularity": "layer", **_LEARNS, **_ENTROPY}, chance=True, paper="2310.02575",
    ),
    "concrete": Method(
        "merging_methods:concrete", "Concrete task arithmetic", "learned",
        given={**_LEARNS, "scaling": 0.3}, chance=True, paper="2312.06173",
    ),
    "smile": Method("merging_methods:smile", "SMILE", "mixture", given={"rank": 32}, also={"routing": "routing:smile"}),
    "wemoe": Method(
        "merging_methods:wemoe", "WEMoE", "mixture", given=_LEARNS, chance=True, paper="2402.00433"
    ),
    "wemoe_entropy": Method(
        "merging_methods:wemoe", "WEMoE, entropy", "mixture",
        given={**_LEARNS, **_ENTROPY}, chance=True, paper="2402.00433",
    ),
    "wemoe_sparse": Method(
        "merging_methods:wemoe", "E-WEMoE, 90 % sparse", "mixture",
        given={**_LEARNS, "task_vectors": "sparse", "shared_router": True}, chance=True, paper="2410.21804",
    ),
    "phatgoose": _routed("PHATGOOSE", "PHATGOOSE", "2402.05859"),
    "retrieval": _routed("retrieval", "Retrieval of the expert", "2302.03202", examples=1000, chance=True),
    "average_activation": _routed(
        "average activation", "Average activation", "2402.05859", examples=256, chance=True
    ),
    "arrow": _routed("Arrow", "Arrow", "2405.11157"),
    "uniform": _routed("uniform", "Uniform routing", chance=True),
    "foe": Method(
        "fusion:foe", "FoE", "fusion", "fusion", chance=True, paper="2310.01542", also={"regression": "regression:foe"}
    ),
    "foe_selection": Method(
        "fusion:foe_selection", "FoE, selection", "fusion", "fusion", chance=True, paper="2310.01542",
        also={"routing": "routing:foe_selection"},
    ),
    "foe_frugal": Method("fusion:foe_frugal", "FrugalFoE", "fusion", "fusion", chance=True, paper="2310.01542"),
    "multitask": Method("merging_methods:multitask", "Multitask-trained", "ceiling"),
    "individual": Method(
        "merging_methods:individual", "Individual experts", "ceiling",
        also={"routing": "routing:individual", "fusion": "fusion:individual"},
    ),
}  # fmt: skip

STATIC = tuple(name for name, row in METHODS.items() if row.family in ("merge", "data"))


def chosen(words: Sequence[str], kind: str) -> list[str]:
    """The methods that words ask for, in the table's order.

    Args:
        words: names of methods or families, "static" for all static merging, "all", or the path of a Python file with
            METHODS of its own, name → `Method`, which are added to the table.
        kind: of the suite.

    Raises:
        FusionError: nothing is called like that, or it is for suites of another kind.
    """
    added = {word: _read(Path(word)) for word in words if word.endswith(".py")}
    words = [name for word in words for name in added.get(word, [word])]
    known = {name: row for name, row in METHODS.items() if row.at(kind)}
    wanted: set[str] = set()
    for word in words:
        found: Iterable[str] = (
            known if word == "all" else [name for name in STATIC if name in known] if word == "static" else
            [name for name, row in known.items() if word in (name, row.family)]
        )  # fmt: skip
        if word in METHODS and word not in known:
            raise FusionError(f"{word} is for suites of the kind {METHODS[word].kind}, this one is for {kind}")
        if not found:
            families = dict.fromkeys(row.family for row in known.values())
            raise FusionError(f"no method {shown(word)}", hint=suggestion(word, ["all", "static", *families, *known]))
        wanted |= set(found)
    return [name for name in known if name in wanted]


def _read(path: Path) -> list[str]:
    """Adds the methods of a file to the table; their names.

    Raises:
        FusionError: there is no such file, it has no methods, or one that is there already.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FusionError(f"{path} is not there", hint="--methods FILE.py, or the name of a method")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Method] = getattr(module, "METHODS", {})
    if not found or not all(isinstance(row, Method) for row in found.values()):
        raise FusionError(f"{path} has no METHODS", hint='METHODS = {"mine": Method(mine, "Mine", "merge")}')
    for name, row in found.items():
        if name in METHODS and METHODS[name].title != row.title:
            raise FusionError(f"{path}: there is a method {name} already", hint="give yours another name")
        if row.family not in FAMILIES:
            raise FusionError(f"{path}: {name} is of no family {shown(row.family)}", hint=", ".join(FAMILIES))
        METHODS[name] = row
    return list(found)
