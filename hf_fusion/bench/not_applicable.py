"""Where the benchmark decides that a method does not apply.

A method raises `NotApplicable` while it is fused, prepared or tuned; its cells then have the status "left out" and this
reason. A method without an entry point for suites of a kind is not run on them; `reason_of` says why, for tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_fusion.bench.methods.declaration import Method


class NotApplicable(Exception):
    """A method cannot be run on this suite, split or task, which is not a failure; the message is the cells' reason."""


_NO_LABELS = "learns from class predictions, and this suite has no classes"
_MERGES = ("floor", "merge", "data", "learned", "mixture", "ceiling")
NOT_FOR = {
    ("merging", "fusion"): "fuses predictions over shared labels; here the task is known and has its own labels",
    ("merging", "routing"): "routes among adapters when the task of a row is unknown; here it is known",
    **{
        ("fusion", family): "predicts with the head of a known task; here the task of a row is unknown"
        for family in _MERGES
    },
    ("routing", "ensemble"): "would have to combine the language models' predictions at every token",
    ("routing", "learned"): _NO_LABELS,
    ("routing", "mixture"): _NO_LABELS,
    ("routing", "fusion"): "fuses class probabilities; for language models there is FoE by selection",
    **{("regression", family): "merges weights; here the experts are used unchanged" for family in _MERGES},
    ("regression", "ensemble"): "the maximum of scores on different scales is meaningless",
    ("regression", "routing"): "routes among adapters of one base; these experts are independent models",
    ("regression", "fusion"): "selects which experts to query; here the scores of all are used",
    ("routing", "ceiling"): "the suite names no model that was trained on all its tasks",
}
"""(kind of a suite, family) → why methods of the family without an entry point for such suites do not apply."""
_UNMERGED = "merges weights; here the experts are used unchanged"  # for language models, which have no heads


def reason_of(method: Method, kind: str, head: str) -> str:
    """Why a method has no entry point for suites of a kind.

    Args:
        method: one without such an entry point.
        kind: of the suite, see `Suite`.
        head: of the suite, see `Suite`.
    """
    if kind == "fusion" and method.family in _MERGES and head in ("causal-lm", "seq2seq-lm"):
        return _UNMERGED
    return NOT_FOR.get((kind, method.family), f"applies only to suites of the kind {next(iter(method.entries))}")
