"""hf_fusion: fine-tuned models and LoRA adapters from the Hugging Face Hub, fused into single better models.

The public names load on first use, so that `import hf_fusion` and `hf-fusion --help` stay instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "FusionError": "errors",
    "Expert": "experts",
    "ExpertInfo": "experts",
    "discover": "hub.discover",
    "check_compatibility": "hub.compat",
    "load_experts": "hub.load",
    "publish": "hub.publish",
    "check_publish": "hub.publish",
    "fuse": "fusion",
    "fuse_recipe": "fusion",
    "save_fused": "fusion",
    "load_fused": "fusion",
    "merge": "merging.merge",
    "Recipe": "recipe",
    "RecipeExpert": "recipe",
    "fit_fuser": "training.fuser",
    "Gates": "experts",
    "train_gates": "training.gates",
    "average_activation": "training.gates",
    "Whitening": "training.whitening",
    "fit_whitening": "training.whitening",
    "base_samples": "training.whitening",
    "arrow_prototypes": "training.gates",
    "save_gates": "hub.gates",
    "push_gates": "hub.publish_gates",
    "evaluate_fusion": "evaluate",
    "evaluate_routing": "evaluate_suite",
    "evaluate_merging": "evaluate_tasks",
    "evaluate_static": "evaluate_tasks",
    "SuiteResults": "suite_results",
    "FoEConfig": "models.foe",
    "FoEForGeneration": "models.foe",
    "FoEModel": "models.foe",
    "FoEProcessor": "models.foe",
    "PhatgooseConfig": "models.phatgoose",
    "PhatgooseForGeneration": "models.phatgoose",
    "PhatgooseRouter": "models.phatgoose",
    "PhatgooseTrace": "models.phatgoose",
    "WEMoEConfig": "models.wemoe",
    "WEMoEForGeneration": "models.wemoe",
    "WEMoEModel": "models.wemoe",
    "WEMoETrace": "models.wemoe",
    "adapt_routers": "training.routers",
    "fit_routers": "training.routers",
    "CoefficientMerge": "training.adamerging",
    "ConcreteMerge": "training.concrete",
    "merge_adapters": "merging.adapters",
    "merge_states": "merging.in_memory",
    "measure_fisher": "training.statistics",
    "measure_gram": "training.statistics",
    "measure_gram_merged": "training.statistics",
    "search_weights": "training.search",
    "lorahub": "training.search",
    "greedy_soup": "training.search",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_fusion' has no attribute {name!r}")
    return getattr(import_module(f"hf_fusion.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
