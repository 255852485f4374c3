"""Where the benchmark decides that a method does not apply.

A method raises `NotApplicable` where it is fused, prepared or tuned: its cells are then "left out", with that reason. A
method that has no entry for suites of a kind is not run there at all; `reason_of` says why, for tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_fusion.bench.methods.declaration import Method


class NotApplicable(Exception):
    """A method cannot be run on this suite, split or task: its message is the cells' reason, and nothing has failed."""


_NO_LABELS = "learns from classes, and this suite has no classes"
_MERGES = ("floor", "merge", "data", "learned", "mixture", "ceiling")
NOT_FOR = {
    ("merging", "fusion"): "fuses answers over labels that all tasks share; here each task has its own, and is told",
    ("merging", "routing"): "routes among adapters where no row tells its task; here each row does",
    **{("fusion", family): "answers with one task's head, and no row tells its task" for family in _MERGES},
    ("routing", "ensemble"): "would have to ask language models together for every token",
    ("routing", "learned"): _NO_LABELS,
    ("routing", "mixture"): _NO_LABELS,
    ("routing", "fusion"): "language models are fused by choosing one of them: FoE by selection",
    **{("regression", family): "merges weights, and the experts are asked as they are" for family in _MERGES},
    ("regression", "ensemble"): "the largest of scores on different scales means nothing",
    ("regression", "routing"): "routes among adapters of one base, and these are models of their own",
    ("regression", "fusion"): "chooses whom to ask, and here all scores are weighed",
    ("routing", "ceiling"): "the suite names no model that was trained on all its tasks",
}
"""(kind of a suite, family) → why methods of the family that have no entry for such suites have none."""
_UNMERGED = "the experts are heard as they are, and nothing is merged"  # of language models, which have no heads


def reason_of(method: Method, kind: str, head: str) -> str:
    """Why a method has no entry for suites of a kind.

    Args:
        method: one without such an entry.
        kind: of the suite, see `Suite`.
        head: of the suite, see `Suite`.
    """
    if kind == "fusion" and method.family in _MERGES and head in ("causal-lm", "seq2seq-lm"):
        return _UNMERGED
    return NOT_FOR.get((kind, method.family), f"is for suites of the kind {next(iter(method.entries))}")
