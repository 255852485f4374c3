"""The cost of a forward pass: in-place products and attention on the CPU are counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_fusion.bench.setups.common import multiplications

LEFT, RIGHT = torch.zeros(2, 3, 5), torch.zeros(2, 5, 7)
QUERY, KEY = torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 9, 8)


@pytest.mark.parametrize(
    ("call", "pairs"),
    [
        (lambda: LEFT @ RIGHT, 2 * 3 * 5 * 7),
        (lambda: torch.zeros(2, 3, 7).baddbmm_(LEFT, RIGHT), 2 * 3 * 5 * 7),
        (lambda: torch.zeros(3, 7).addmm_(LEFT[0], RIGHT[0]), 3 * 5 * 7),
        (lambda: scaled_dot_product_attention(QUERY, KEY, KEY), 2 * 4 * 6 * 9 * 8),
        (lambda: LEFT + 1, 0),
    ],
    ids=["bmm", "baddbmm_", "addmm_", "attention", "sum"],
)
def test_products_are_counted(call, pairs):
    assert multiplications(call) == 2 * pairs
