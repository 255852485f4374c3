"""Which vocabulary a recipe asks for: the first model's, the smallest, or one united from several tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_fusion.merging.tokenizers.smallest import smallest
from hf_fusion.merging.tokenizers.vocabulary import unite_vocabularies
from hf_fusion.recipe import SMALLEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_fusion.merging.engine.open_models import Model
    from hf_fusion.merging.tokenizers.vocabulary import Vocabulary
    from hf_fusion.recipe import Recipe


def read_vocabulary(
    recipe: Recipe, base: Model | None, experts: Sequence[Model], api: HfApi | None = None
) -> Vocabulary | None:
    """The vocabulary that a recipe asks for, or None: that of its base, or first expert, by token id.

    Args:
        recipe: see its ``tokenizer``.
        base: the opened base, where there is one.
        experts: the opened experts.
        api: the Hub's client, for a tokenizer of another model than these.

    Raises:
        FusionError: a model has no ``tokenizer.json``; their tokenizers cannot be united; the recipe's ``tokenizer``
            has an unknown key, or a token that no model has.
    """
    if recipe.tokenizer is None:
        return None
    return smallest(base, experts) if recipe.tokenizer == SMALLEST else unite_vocabularies(recipe, base, experts, api)
