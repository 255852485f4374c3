"""Fuse fine-tuned models and LoRA adapters from the Hugging Face Hub into one model, measure it, and publish it.

In the order of use:

Find
    discover              experts on the Hub by tag, author, base or task, each pinned to its commit
    check_compatibility   which of them fit together, and why others do not
    load_experts          load ids, folders or models as experts; adapters of one base share it

Fuse
    fuse                  one model of several experts, by a family's method or a static merge
    merge                 a static merge from folder to folder, tensor by tensor, in little memory
    extract_lora          a full fine-tune as a LoRA adapter, with the error of each module
    search_recipe         the best numbers of a recipe with ranges, and their gain on held-out rows
    load_recipe           read fusion.yaml, or a recipe of mergekit or mergekit-moe
    save_fused            write a fused model with its processor and fusion.yaml
    load_fused            read it back

Fit
    fit_fuser             a Fusion of Experts' fuser, on labelled examples
    train_gates           an adapter's PHATGOOSE gates; save_gates writes and push_gates publishes them
    adapt_routers         a WEMoE's routers without labels; fit_routers with labels

Measure
    evaluate              a fused model beside its experts and simpler ways to use them

Export, publish
    export                a fused model as a plain dense model or a PEFT adapter, for servers without this package
    publish               push a fused model with its recipe and card, ready for from_pretrained

Example:
    >>> import hf_fusion
    >>> experts = hf_fusion.check_compatibility(hf_fusion.discover(author="me")).accepted
    >>> model = hf_fusion.fuse("foe", [expert.pinned for expert in experts])
    >>> hf_fusion.save_fused(model, "fused")
    >>> hf_fusion.publish("fused", "me/fused")

Three families of fused models travel to the Hub with their code: `FoEModel` (Fusion of Experts, arXiv 2310.01542),
`PhatgooseRouter` (arXiv 2402.05859) and `WEMoEModel` (arXiv 2402.00433). Errors that a user can act on are a
`FusionError`, which names the thing, the reason and the next step. The same on the command line: ``hf-fusion --help``.

Names load on first use, so that `import hf_fusion` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # where editors and type checkers find the names
    from hf_fusion.errors import FusionError as FusionError
    from hf_fusion.evaluation.evaluate import evaluate as evaluate
    from hf_fusion.exporting.export import export as export
    from hf_fusion.fused_models import FoEConfig as FoEConfig
    from hf_fusion.fused_models import FoEForGeneration as FoEForGeneration
    from hf_fusion.fused_models import FoEModel as FoEModel
    from hf_fusion.fused_models import FoEProcessor as FoEProcessor
    from hf_fusion.fused_models import FoETrace as FoETrace
    from hf_fusion.fused_models import PhatgooseConfig as PhatgooseConfig
    from hf_fusion.fused_models import PhatgooseForGeneration as PhatgooseForGeneration
    from hf_fusion.fused_models import PhatgooseRouter as PhatgooseRouter
    from hf_fusion.fused_models import PhatgooseTrace as PhatgooseTrace
    from hf_fusion.fused_models import WEMoEConfig as WEMoEConfig
    from hf_fusion.fused_models import WEMoEForGeneration as WEMoEForGeneration
    from hf_fusion.fused_models import WEMoEModel as WEMoEModel
    from hf_fusion.fused_models import WEMoETrace as WEMoETrace
    from hf_fusion.fusion import fuse as fuse
    from hf_fusion.fusion import load_fused as load_fused
    from hf_fusion.fusion import save_fused as save_fused
    from hf_fusion.hub.compat import check_compatibility as check_compatibility
    from hf_fusion.hub.discover import discover as discover
    from hf_fusion.hub.gates_file import save_gates as save_gates
    from hf_fusion.hub.load import load_experts as load_experts
    from hf_fusion.merging.extract_lora import extract_lora as extract_lora
    from hf_fusion.merging.merge import merge as merge
    from hf_fusion.merging.recipe_files import load_recipe as load_recipe
    from hf_fusion.publishing.publish import publish as publish
    from hf_fusion.publishing.push_gates import push_gates as push_gates
    from hf_fusion.recipe import Recipe as Recipe
    from hf_fusion.recipe import RecipeExpert as RecipeExpert
    from hf_fusion.search.run import search_recipe as search_recipe
    from hf_fusion.training.fuser import fit_fuser as fit_fuser
    from hf_fusion.training.gates import train_gates as train_gates
    from hf_fusion.training.routers import adapt_routers as adapt_routers
    from hf_fusion.training.routers import fit_routers as fit_routers
    from hf_fusion.types import Expert as Expert
    from hf_fusion.types import ExpertInfo as ExpertInfo
    from hf_fusion.types import Gates as Gates

__version__ = "0.1.0"

# module → its public names
_PUBLIC = {
    "errors": ("FusionError",),
    "types": (
        "Expert",
        "ExpertInfo",
        "Gates",
    ),
    "hub.discover": ("discover",),
    "hub.compat": ("check_compatibility",),
    "hub.load": ("load_experts",),
    "fusion": (
        "fuse",
        "load_fused",
        "save_fused",
    ),
    "merging.extract_lora": ("extract_lora",),
    "merging.merge": ("merge",),
    "merging.recipe_files": ("load_recipe",),
    "search.run": ("search_recipe",),
    "recipe": (
        "Recipe",
        "RecipeExpert",
    ),
    "training.fuser": ("fit_fuser",),
    "training.gates": ("train_gates",),
    "hub.gates_file": ("save_gates",),
    "publishing.push_gates": ("push_gates",),
    "training.routers": (
        "adapt_routers",
        "fit_routers",
    ),
    "evaluation.evaluate": ("evaluate",),
    "exporting.export": ("export",),
    "publishing.publish": ("publish",),
    "fused_models": (
        "FoEConfig",
        "FoEForGeneration",
        "FoEModel",
        "FoEProcessor",
        "FoETrace",
        "PhatgooseConfig",
        "PhatgooseForGeneration",
        "PhatgooseRouter",
        "PhatgooseTrace",
        "WEMoEConfig",
        "WEMoEForGeneration",
        "WEMoEModel",
        "WEMoETrace",
    ),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hf_fusion' has no attribute {name!r}")
    return getattr(import_module(f"hf_fusion.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
