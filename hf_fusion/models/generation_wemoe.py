"""Options of `generate()` that are incompatible with routing by the whole prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

NO_PAGES = (
    "merges weights for every sequence, but pages hold the tokens of several: call generate(), "
    "without cache_implementation='paged'"
)


def check_generation(prompts: torch.Tensor | None, options: Sequence[Mapping[str, Any]]) -> None:
    """Check that options of `generate()` let routers read whole prompts.

    Args:
        prompts: (B, T, ...).
        options: arguments of the call, and values of the generation configs.

    Raises:
        ValueError: an option does not; the message names it.
    """
    if any(each.get("prefill_chunk_size") for each in options):
        raise ValueError("a prompt read in chunks cannot be routed as a whole: leave prefill_chunk_size out")
    if any(each.get("cache_implementation") == "paged" for each in options):
        raise ValueError(f"this model {NO_PAGES}")
    scale = next((each["guidance_scale"] for each in options if each.get("guidance_scale") is not None), 1)
    if scale == 1:
        return
    if any(each.get("use_cache") is False for each in options):
        raise ValueError(
            "guidance_scale: without a cache nothing says where a negative prompt ends; set use_cache=True"
        )
    negative = options[0].get("negative_prompt_ids")
    if prompts is not None and negative is not None and negative.shape[1] > prompts.shape[1]:
        raise ValueError("negative_prompt_ids are longer than the prompts: pad these on the left to the same length")


__all__ = ["NO_PAGES", "check_generation"]
