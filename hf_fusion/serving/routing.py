"""The routing of one row of a batch, for answers in JSON: which expert its tokens met."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_fusion.models.assembly_phatgoose import module_sets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_fusion.serving.served import ServedModel

DIGITS = 4


@contextmanager
def recording(served: ServedModel, tokens: int) -> Iterator[None]:
    """Has a model record its routing; the thread of the model is the only one that uses it.

    Args:
        served: the model.
        tokens: all tokens of the batch, with the padding; 0 records nothing.
    """
    model = served.model
    if not tokens or served.family is None:
        yield
        return
    before = model.record_routing
    model.record_routing = tokens if served.family == "phatgoose" else True
    try:
        yield
    finally:
        model.record_routing = before


def routing_of(served: ServedModel, row: int, tokens: Sequence[str] | None, start: int = 0) -> dict[str, Any] | None:
    """The routing of a row in the last batch of this thread.

    Args:
        served: the model.
        row: index in the batch.
        tokens: texts of the tokens that were read; None where they are not known.
        start: index of the row's first token in the batch.

    Returns:
        "experts" (names), and by family: PHATGOOSE "tokens", for each its text, the expert with the largest weight and
        the mean weights over the linears, and "usage", the means over tokens; WEMoE "layers", the coefficients of each;
        a Fusion of Experts "scores" and "expert", the selected one, or the experts that were queried. None for a plain
        model.
    """
    if served.family is None:
        return None
    trace = served.model.routing_trace()
    if served.family == "phatgoose":
        return _of_tokens(trace, _readers(served), row, tokens, start)
    return {"wemoe": _of_layers, "foe": _of_experts}[served.family](trace, row)


def _readers(served: ServedModel) -> set[str]:
    """The linears that read the tokens of an answer; with an encoder and a decoder, those of the decoder."""
    wanted = not served.is_encoder_decoder
    return {
        path for paths, reads_encoder in module_sets(served.model.config) if reads_encoder == wanted for path in paths
    }


def _of_tokens(trace: Any, readers: set[str], row: int, tokens: Sequence[str] | None, start: int) -> dict[str, Any]:
    shapes = {module: trace.choices(module)[0].shape[1] for module in trace.modules if module in readers}
    longest = max(shapes.values(), default=0)  # an output layer does not read all of the prompt
    if not longest:
        return {"experts": trace.experts, "usage": {}, "tokens": []}
    weights = trace.mean_weights([module for module, length in shapes.items() if length == longest])[row]
    weights = weights[start:] if tokens is None else weights[start : start + len(tokens)]
    shown = []
    for place, token_weights in enumerate(weights):
        best = trace.experts[int(token_weights.argmax())] if float(token_weights.max()) else None
        text = {} if tokens is None else {"token": tokens[place]}
        shown.append({**text, "expert": best, "weights": _rounded(token_weights)})
    usage = dict(zip(trace.experts, _rounded(weights.mean(0)), strict=True)) if len(weights) else {}
    return {"experts": trace.experts, "usage": usage, "tokens": shown}


def _of_layers(trace: Any, row: int) -> dict[str, Any]:
    layers = {name: _rounded(trace.coefficients(name)[row]) for name in trace.layers}
    means = dict(zip(trace.experts, _rounded(trace.coefficients()[row].mean(0)), strict=True))
    return {"experts": trace.experts, "means": means, "layers": layers}


def _of_experts(trace: Any, row: int) -> dict[str, Any]:
    places = trace["order"][row].tolist()
    queried = [trace["experts"][expert] for place, expert in sorted((p, e) for e, p in enumerate(places) if p > 0)]
    found: dict[str, Any] = {"experts": trace["experts"], "queried": queried}
    if "scores" in trace:
        found["scores"] = _rounded(trace["scores"][row])
        found["expert"] = trace["experts"][int(trace["scores"][row].argmax())]
    return found


def _rounded(values: Any) -> list[float]:
    rounded: list[float] = values.float().cpu().round(decimals=DIGITS).tolist()
    return rounded


__all__ = ["recording", "routing_of"]
