"""Where the benchmark decides that a method does not apply.

A method raises `NotApplicable` while it is fused, prepared or tuned: its cells then have the status "left out" and that
reason. A method without an entry point for suites of a kind is not run on them; `reason_of` says why, for tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_fusion.bench.methods.declaration import Method


class NotApplicable(Exception):
    """A method cannot be run on this suite, split or task, which is not a failure; the message is the cells' reason."""


_NO_LABELS = "learns from classes, and this suite has no classes"
_MERGES = ("floor", "merge", "data", "learned", "mixture", "ceiling")
NOT_FOR = {
    ("merging", "fusion"): "fuses predictions over shared labels; here each task has its own labels and is known",
    ("merging", "routing"): "routes among adapters if the task of a row is unknown; here it is known",
    **{("fusion", family): "predicts with one task's head, and the task of a row is unknown" for family in _MERGES},
    ("routing", "ensemble"): "would have to combine language models at every token",
    ("routing", "learned"): _NO_LABELS,
    ("routing", "mixture"): _NO_LABELS,
    ("routing", "fusion"): "language models are fused by choosing one of them: FoE by selection",
    **{("regression", family): "merges weights, but the experts are used unchanged" for family in _MERGES},
    ("regression", "ensemble"): "the maximum of scores on different scales is meaningless",
    ("regression", "routing"): "routes among adapters of one base, and these are independent models",
    ("regression", "fusion"): "selects experts to query, and here all scores are used",
    ("routing", "ceiling"): "the suite names no model that was trained on all its tasks",
}
"""(kind of a suite, family) → why methods of the family without an entry point for such suites do not apply."""
_UNMERGED = "the experts are used unchanged, and nothing is merged"  # for language models, which have no heads


def reason_of(method: Method, kind: str, head: str) -> str:
    """Why a method has no entry point for suites of a kind.

    Args:
        method: one without such an entry point.
        kind: of the suite, see `Suite`.
        head: of the suite, see `Suite`.
    """
    if kind == "fusion" and method.family in _MERGES and head in ("causal-lm", "seq2seq-lm"):
        return _UNMERGED
    return NOT_FOR.get((kind, method.family), f"is for suites of the kind {next(iter(method.entries))}")
