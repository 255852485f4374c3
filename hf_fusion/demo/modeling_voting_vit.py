"""A ViT that looks at an image five times, shifted by one pixel, and averages its answers.

The demo publishes it as a repo that runs only with its own code; nothing else uses it.
"""

import torch
from transformers import ViTConfig, ViTForImageClassification

SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


class VotingViTConfig(ViTConfig):
    """A ViT's config under a name that transformers does not know."""

    model_type = "voting_vit"


class VotingViTForImageClassification(ViTForImageClassification):
    """The mean of a ViT's logits over shifted images."""

    config_class = VotingViTConfig

    def forward(self, pixel_values: torch.Tensor, **kwargs):  # noqa: ANN201
        """(B, channels, height, width) -> output with logits (B, labels)."""
        shifted = torch.cat([pixel_values.roll(shift, (2, 3)) for shift in SHIFTS])  # (5 B, C, H, W)
        output = super().forward(shifted, **kwargs)
        output.logits = output.logits.view(len(SHIFTS), len(pixel_values), -1).mean(0)
        return output
