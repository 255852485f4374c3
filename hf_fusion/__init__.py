"""hf_fusion: fine-tuned models and LoRA adapters from the Hugging Face Hub, fused into single better models.

The public names load on first use, so that `import hf_fusion` and `hf-fusion --help` stay instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "FusionError": "errors",
    "Expert": "types",
    "ExpertInfo": "types",
    "discover": "hub.discover",
    "check_compatibility": "hub.compat",
    "load_experts": "hub.load",
    "publish": "publishing.publish",
    "check_publish": "publishing.publish",
    "fuse": "fusion",
    "fuse_recipe": "fusion",
    "save_fused": "fusion",
    "load_fused": "fusion",
    "load_recipe": "merging.recipe_files",
    "merge": "merging.merge",
    "Recipe": "recipe",
    "RecipeExpert": "recipe",
    "fit_fuser": "training.fuser",
    "Gates": "types",
    "train_gates": "training.gates",
    "average_activation": "training.gates",
    "Whitening": "training.whitening",
    "fit_whitening": "training.whitening",
    "base_samples": "training.whitening",
    "arrow_prototypes": "training.gates",
    "save_gates": "hub.gates",
    "push_gates": "publishing.gates",
    "evaluate": "evaluation.evaluate",
    "SuiteResults": "evaluation.results",
    "FoEConfig": "fused_models",
    "FoEForGeneration": "fused_models",
    "FoEModel": "fused_models",
    "FoEProcessor": "fused_models",
    "PhatgooseConfig": "fused_models",
    "PhatgooseForGeneration": "fused_models",
    "PhatgooseRouter": "fused_models",
    "PhatgooseTrace": "fused_models",
    "WEMoEConfig": "fused_models",
    "WEMoEForGeneration": "fused_models",
    "WEMoEModel": "fused_models",
    "WEMoETrace": "fused_models",
    "adapt_routers": "training.routers",
    "fit_routers": "training.routers",
    "CoefficientMerge": "training.adamerging",
    "ConcreteMerge": "training.concrete",
    "merge_adapters": "merging.lora",
    "merge_states": "merging.in_memory",
    "measure_fisher": "training.measure",
    "measure_gram": "training.measure",
    "measure_gram_merged": "training.measure",
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
