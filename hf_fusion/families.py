"""The registry of families: fusion methods whose model classes travel to the Hub.

One row holds all that fusing, fitting, measuring, cards, publishing and the command line need to know about a family.
Modules that need torch or transformers are imported on use, so that a mistyped option fails at once. Static merging
methods return plain models and are listed in `hf_fusion.merging.methods.MERGE_METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_fusion import models
from hf_fusion.io.declarations import declared
from hf_fusion.io.folders import LEFTOVERS
from hf_fusion.schema import Field

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_fusion.models.fused import FusedPreTrainedModel
    from hf_fusion.types import Expert


@dataclass(frozen=True)
class Classes:
    """The public classes of a family.

    Attributes:
        model: the fused model.
        generation: the fused model with `generate`.
        config: its configuration.
        trace: what `routing_trace()` returns, if the model routes.
        processor: the class that prepares its inputs, if it is not one of transformers'.
    """

    model: type[FusedPreTrainedModel]
    generation: type[FusedPreTrainedModel]
    config: type[PreTrainedConfig]
    trace: type | None = None
    processor: type | None = None


@dataclass(frozen=True)
class FamilyMethod:
    """A way to build a family's model; its name is the ``method`` of `fuse` and of recipes.

    Attributes:
        family: name of its family.
        constructor: the classmethod of the family's model that builds it from loaded experts.
        takes_weights: whether experts can have weights in the recipe.
        takes_base: whether `fuse` passes the loaded base as ``base=``, an `Expert`, or None if the caller named none.
            Other methods find the base through their adapters.
        check: takes the constructor's arguments and raises ValueError for invalid ones, before anything is loaded.
        next_command: the command that usually follows; ``{}`` stands for the saved model's folder.
    """

    family: str
    constructor: str = "from_experts"
    takes_weights: bool = False
    takes_base: bool = False
    check: Callable[..., None] | None = None
    next_command: str = "hf-fusion eval {} --data DATA"

    def build(self, experts: Sequence[Expert], **options: Any) -> PreTrainedModel:
        """Builds a model from loaded experts.

        Raises:
            ValueError: the experts or the options are invalid.
        """
        return self.bound()(experts, **options)

    def bound(self) -> Callable[..., PreTrainedModel]:
        """The constructor as a classmethod of the imported class."""
        constructor: Callable[..., PreTrainedModel] = getattr(FAMILIES[self.family].classes().model, self.constructor)
        return constructor

    @property
    def options(self) -> dict[str, Field]:
        """Its options by name, parsed from the source file, which is not imported."""
        return {name: field for name, field in declared(self.file, self.constructor).items() if name != "base"}

    @property
    def file(self) -> Path:
        """The source file of its family's model."""
        return Path(models.__file__).with_name(f"modeling_{self.family}.py")


@dataclass(frozen=True)
class Needs:
    """What experts must have to be fused with each other, besides the same kind of head.

    Attributes:
        one_base: they must be fine-tuned from one base; otherwise they need overlapping labels.
        gates: adapters with PHATGOOSE gates.
        mergeable: weights that can be merged with those of the base, tensor by tensor.
    """

    one_base: bool = False
    gates: bool = False
    mergeable: bool = False


@dataclass(frozen=True)
class FitPart:
    """A part that can be fitted: ``hf-fusion fit NAME``.

    Attributes:
        name: on the command line.
        title: for help and messages.
        of_adapter: whether it is fitted for an adapter before fusing.
        recorded: key that fitting sets in the model's config → word for such a model, such as "fitted".
    """

    name: str
    title: str
    of_adapter: bool = False
    recorded: Mapping[str, str] = field(default_factory=dict)


class MapFiles(NamedTuple):
    """Files that measuring writes beside ``results.json``: the model's routing by task, as data and as a picture."""

    data: str
    picture: str


@dataclass(frozen=True)
class Demo:
    """The demo of a family: ``hf-fusion demo NAME``.

    Attributes:
        shows: what it shows, for help and messages.
        one_thread: whether one thread is enough, since the models are small.
    """

    shows: str
    one_thread: bool = False


@dataclass(frozen=True)
class Family:
    """A family of fused models.

    Attributes:
        name: the config's ``model_type``; its files in ``hf_fusion/models/`` end with it, and its card's template in
            ``hf_fusion/cards/model_cards/`` begins with it.
        title: in words, with an article.
        classes: imports and returns its public classes.
        methods: name → a way to build its models.
        needs: what experts must have.
        fit: parts that can be fitted.
        by_task: whether it is measured task by task; otherwise the rows of all tasks are pooled.
        map: files that measuring writes beside ``results.json``.
        processors: the file that lists the experts' processors, if each expert has its own.
        demo: its demo.
    """

    name: str
    title: str
    classes: Callable[[], Classes]
    methods: Mapping[str, FamilyMethod]
    needs: Needs
    fit: tuple[FitPart, ...] = ()
    by_task: bool = True
    map: MapFiles | None = None
    processors: str = ""
    demo: Demo | None = None


# ---------------------------------------------------------------- Fusion of Experts


def _foe_classes() -> Classes:
    from hf_fusion.models.configuration_foe import FoEConfig
    from hf_fusion.models.modeling_foe import FoEForGeneration, FoEModel
    from hf_fusion.models.processing_foe import FoEProcessor
    from hf_fusion.models.trace_foe import FoETrace

    return Classes(FoEModel, FoEForGeneration, FoEConfig, FoETrace, FoEProcessor)


FOE = Family(
    "foe",
    "a Fusion of Experts",
    _foe_classes,
    methods={
        "foe": FamilyMethod("foe", next_command="hf-fusion fit fuser {} --data DATA"),
        "ensemble": FamilyMethod("foe", constructor="ensemble", takes_weights=True),
    },
    needs=Needs(),
    fit=(FitPart("fuser", "the fuser of a Fusion of Experts", recorded={"fitted": "fitted", "frugal": "fitted"}),),
    by_task=False,
    processors="processor_config.json",
    demo=Demo("eight digit classifiers fused into one model", one_thread=True),
)

# ---------------------------------------------------------------- PHATGOOSE


def _phatgoose_classes() -> Classes:
    from hf_fusion.models.configuration_phatgoose import PhatgooseConfig
    from hf_fusion.models.modeling_phatgoose import PhatgooseForGeneration, PhatgooseRouter
    from hf_fusion.models.trace_phatgoose import PhatgooseTrace

    return Classes(PhatgooseRouter, PhatgooseForGeneration, PhatgooseConfig, PhatgooseTrace)


def _check_phatgoose(experts: Sequence[object], **options: Any) -> None:
    from hf_fusion.models.assembly_phatgoose import check_options

    check_options(experts, **options)


PHATGOOSE = Family(
    "phatgoose",
    "a PHATGOOSE router",
    _phatgoose_classes,
    methods={"phatgoose": FamilyMethod("phatgoose", check=_check_phatgoose)},
    needs=Needs(one_base=True, gates=True),
    fit=(FitPart("gates", "the PHATGOOSE gates of one LoRA adapter", of_adapter=True),),
    map=MapFiles("routing.json", "routing.png"),
    demo=Demo("adapters of SmolLM2 among which every token is routed"),
)

# ---------------------------------------------------------------- WEMoE


def _wemoe_classes() -> Classes:
    from hf_fusion.models.configuration_wemoe import WEMoEConfig
    from hf_fusion.models.modeling_wemoe import WEMoEForGeneration, WEMoEModel
    from hf_fusion.models.trace_wemoe import WEMoETrace

    return Classes(WEMoEModel, WEMoEForGeneration, WEMoEConfig, WEMoETrace)


def _check_wemoe(experts: Sequence[object], **options: Any) -> None:
    from hf_fusion.models.build_wemoe import check_options

    check_options(experts, **options)


WEMOE = Family(
    "wemoe",
    "a WEMoE",
    _wemoe_classes,
    methods={"wemoe": FamilyMethod("wemoe", takes_base=True, check=_check_wemoe)},
    needs=Needs(one_base=True, mergeable=True),
    fit=(
        FitPart(
            "routers", "the routers of a WEMoE, on rows with or without labels", recorded={"adaptation": "adapted"}
        ),
    ),
    map=MapFiles("coefficients.json", "coefficients.png"),
    demo=Demo("fine-tunes of a ViT, merged per input", one_thread=True),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (FOE, PHATGOOSE, WEMOE)}
"""Each family by its name; a new family is one more entry."""
METHODS: dict[str, FamilyMethod] = {
    name: method for family in FAMILIES.values() for name, method in family.methods.items()
}
"""All ways to build a family's model, by their name in recipes."""
FIT_PARTS: dict[str, FitPart] = {part.name: part for family in FAMILIES.values() for part in family.fit}
"""All parts that can be fitted, by their name on the command line."""
FITTED_BY: dict[str, Family] = {part.name: family for family in FAMILIES.values() for part in family.fit}
"""The family to whose models, or adapters, a part belongs, by the part's name."""
MAPS = tuple(family.map for family in FAMILIES.values() if family.map)
STALE = (*LEFTOVERS, *(name for files in MAPS for name in (files.data, files.picture)))
"""Patterns of files that an earlier save may have left in a folder and that do not belong to a new model."""
MEASURED = ("results.json", *(files.data for files in MAPS))
"""The JSON files that measuring writes beside a model."""


def family_of(method: str) -> Family:
    """The family whose models a method builds."""
    return FAMILIES[METHODS[method].family]


def method_needing(*, gates: bool = False, mergeable: bool = False) -> str:
    """The first method that fits what was checked: one that needs gates, else mergeable weights, else neither.

    Args:
        gates: whether adapters' gates were required.
        mergeable: whether weights that can be merged with those of the base were required.
    """
    required = (gates, mergeable and not gates)
    rows = ((name, family_of(name).needs) for name in METHODS)
    return next(name for name, needs in rows if (needs.gates, needs.mergeable) == required)
