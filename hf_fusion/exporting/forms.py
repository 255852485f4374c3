"""What can be exported, in names that the command line shows without importing torch."""

from __future__ import annotations

FORMS = ("dense", "adapter", "gguf")
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that the ``gguf`` package can write, from the most exact to the smallest."""

__all__ = ["FORMS", "QUANTIZATIONS"]
