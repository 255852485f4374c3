"""The page's parts as HTML, each a pure function of plain data; `Markup.format` escapes every text that goes in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup
from routing import HEAD, Routing, kind_of
from shared.experts import MOST_COLOURED, badge, head_cell, look
from shared.page import count, join, link, percent
from shared.page import header as page_header
from shared.plots import FEW_LAYERS, axis_labels

MOST_COLUMNS = MOST_COLOURED  # experts with their own column in a heat map

# ---------------------------------------------------------------- head


def header(model_id: str, url: str, sha: str, experts: int, linears: int, top_k: int) -> Markup:
    """Name of the model and one sentence on what it does."""
    does = (
        f"{count(experts, 'expert')} of one language model: every token is routed at each of"
        f" {count(linears, 'linear layer')} to the {count(top_k, 'expert')} whose gates match it best."
    )
    return page_header("PHATGOOSE", link(url, model_id), does, sha)


# ---------------------------------------------------------------- the answer

ANSWER = Markup(
    '<section class="ui-card pg-answer" aria-busy="{busy}"><p class="ui-kicker">Prompt, as the model reads it</p>'
    '<p class="pg-text pg-prompt">{prompt}</p><p class="ui-kicker">Answer</p>'
    '<p class="pg-text" data-answer>{answer}</p>{legend}</section>'
)
CURSOR = Markup('<i class="pg-cursor" aria-hidden="true"></i>')
TOKEN = Markup(
    '<span role="button" tabindex="{tab}" data-token="{index}" data-number="{number}" title="{title}" {look}>'
    "{piece}</span>{end}"
)
SILENT = Markup('<span title="{title}" {look}>{piece}</span>{end}')
BREAK = Markup('<i class="pg-break"></i>')
LEGEND = Markup(
    '<div class="pg-legend"><ul>{rows}</ul><p class="ui-note">Colour: the expert with the most weight over'
    " all linear layers, stronger for a larger weight"
    ' <label><input type="checkbox">Show the experts\' numbers</label></p></div>'
)
LEGEND_ROW = Markup("<li>{badge}{name}</li>")


def streaming(prompt: str, answer: str) -> Markup:
    """The answer while it is generated, not yet coloured."""
    return ANSWER.format(busy="true", prompt=prompt, answer=Markup("{}{}").format(answer, CURSOR), legend="")


def answer(routing: Routing, names: Sequence[str], chosen: int) -> Markup:
    """Prompt and answer; each token has the colour of its dominant expert and is a button that shows its routing.

    Args:
        names: of the experts, for display.
        chosen: index of the token whose routing is shown initially.
    """
    tops = routing.dominant()
    tokens = [_token(routing, index, top, names, chosen) for index, top in enumerate(tops)]
    dominant = sorted({top[0] for top in tops if top})
    rows = [LEGEND_ROW.format(badge=badge(expert), name=names[expert]) for expert in dominant]
    if None in tops:
        rows.append(Markup('<li><b class="ui-expert none">–</b>not read by the model, so not routed</li>'))
    return ANSWER.format(
        busy="false",
        prompt=join(tokens[: routing.prompt]),
        answer=join(tokens[routing.prompt :]),
        legend=LEGEND.format(rows=join(rows)),
    )


def _token(routing: Routing, index: int, top: tuple[int, float] | None, names: Sequence[str], chosen: int) -> Markup:
    text = routing.pieces[index]
    end = "\n" if text.endswith("\n") else ""  # after the element, so that this ends with its line
    piece = (BREAK + "\n").join(text.removesuffix("\n").split("\n")) + (BREAK if end else "")
    if not text:
        piece = Markup('<i class="pg-part"></i>')
    elif routing.special[index]:
        piece = Markup("<small>{}</small>").format(piece)
    if top is None:
        return SILENT.format(
            title="the last token: generated, but not read by the model",
            look=look(None),
            piece=piece,
            end=end,
        )
    expert, share = top
    title = f"{expert + 1} {names[expert]}, {percent(share)} of the weight"
    return TOKEN.format(
        tab=0 if index == chosen else -1,
        index=index,
        number=expert + 1,
        title=title,
        look=look(expert, share),
        piece=piece,
        end=end,
    )


def first_choice(routing: Routing) -> int:
    """The token that is shown initially: the last one of the prompt, from which the answer begins."""
    return max(routing.prompt - 1, 0)


# ---------------------------------------------------------------- one token

INSPECTOR = Markup(
    '<section class="ui-section" aria-live="polite"><div class="ui-split"><h2>Token <q>{text}</q></h2>'
    '<p class="ui-note">{where}</p></div><div class="ui-card"><h3>Dominant expert by layer</h3>{mosaic}'
    '<h3>Weights by linear layer</h3><div class="ui-scroll" tabindex="0" role="region" aria-label="Weights of this '
    'token">{table}</div></div></section>'
)
MOSAIC = Markup(
    '<div class="pg-mosaic{many}" role="img"'
    ' aria-label="Dominant expert at every linear layer; the table below has the numbers"'
    ' style="--columns:{columns}">{rows}<span class="kind">layer</span>{axis}</div>'
)
CELL = Markup('<i title="{title}" {look}>{number}</i>')
KIND = Markup('<span class="kind" title="{0}">{0}</span>')
TABLE = Markup('<table class="ui-heat"><thead><tr><th scope="col">module</th>{head}</tr></thead>{bodies}</table>')
LAYER_ROW = Markup('<tr class="layer"><th scope="rowgroup">{name}</th>{cells}</tr>')
ROW = Markup('<tr><th scope="row">{name}</th>{cells}</tr>')
WEIGHT = Markup("<td {look}>{number}</td>")
NOTHING = Markup("<td>·</td>")


def inspector(routing: Routing, names: Sequence[str], token: int) -> Markup:
    """The routing of one token: the dominant expert of every linear layer, and a heat map of layers × experts."""
    part = "prompt" if token < routing.prompt else "answer"
    tops = routing.dominant()[token]
    where = f"token {token + 1} of {len(routing.pieces)}, in the {part}"
    if token == routing.prompt - 1:
        where += ", from which the answer begins"
    if tops:
        where += f" · most weight: {tops[0] + 1} {names[tops[0]]}, {percent(tops[1])}"
    return INSPECTOR.format(
        text=routing.pieces[token].replace("\n", "↵") or "…",
        where=where,
        mosaic=mosaic(routing, names, token),
        table=heat_map(routing, names, token),
    )


def mosaic(routing: Routing, names: Sequence[str], token: int) -> Markup:
    """Kinds of linear layers × layers; each cell has the dominant expert's colour."""
    weights, layers = routing.at(token), routing.layers()
    kinds = list(dict.fromkeys(kind_of(module) for module in routing.modules))
    short = kind_names(kinds)
    rows = []
    for kind in kinds:
        rows.append(KIND.format(short[kind]))
        for layer, indices in layers.items():
            index = next((i for i in indices if kind_of(routing.modules[i]) == kind), None)
            share, expert = (0.0, 0) if index is None else (float(x) for x in weights[index].max(0))
            if share == 0:
                rows.append(Markup("<i></i>"))
                continue
            title = f"{_layer_name(layer)}, {short[kind]}: {int(expert) + 1} {names[int(expert)]} {share:.2f}"
            rows.append(CELL.format(title=title, look=look(int(expert), share), number=int(expert) + 1))
    axis = join(Markup("<span>{}</span>").format(label) for label in axis_labels(list(layers)))
    many = " many" if len(layers) > FEW_LAYERS else ""
    return MOSAIC.format(many=many, columns=len(layers), rows=join(rows), axis=axis)


def heat_map(routing: Routing, names: Sequence[str], token: int) -> Markup:
    """Linear layers × experts with the weights as numbers, and each layer's mean above its rows.

    Experts without weight are left out; if there are many, those with the least weight are summed in one column.
    """
    weights = routing.at(token)
    ranked = [e for e in weights.sum(0).argsort(descending=True).tolist() if weights[:, e].any()]
    shown = sorted(ranked[:MOST_COLUMNS])
    has_rest = len(ranked) > len(shown)
    head = [head_cell(expert, names[expert]) for expert in shown]
    if has_rest:
        head.append(Markup('<th scope="col">{} others</th>').format(len(ranked) - len(shown)))
    short = kind_names(kind_of(module) for module in routing.modules)

    def cells(row: Any) -> Markup:
        weights = [_weight(float(row[expert]), expert) for expert in shown]
        return join([*weights, _weight(float(row.sum() - row[shown].sum()), None)] if has_rest else weights)

    bodies = []
    for layer, indices in routing.layers().items():
        rows = [ROW.format(name=short[kind_of(routing.modules[i])], cells=cells(weights[i])) for i in indices]
        mean = LAYER_ROW.format(name=f"{_layer_name(layer)}, mean", cells=cells(weights[indices].mean(0)))
        bodies.append(Markup("<tbody>{}{}</tbody>").format(mean, join(rows)))
    return TABLE.format(head=join(head), bodies=join(bodies))


def _weight(weight: float, expert: int | None) -> Markup:
    if weight < 0.005:
        return NOTHING
    return WEIGHT.format(look=look(expert, weight), number=f"{weight:.2f}".removeprefix("0"))


def _layer_name(layer: str) -> str:
    return layer if layer == HEAD else f"layer {layer}"


def kind_names(kinds: Iterable[str]) -> dict[str, str]:
    """Kinds of linear layers by their last part if that is unique: "self_attn.q_proj" as "q_proj"."""
    kinds = list(dict.fromkeys(kinds))
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if last.count(end) == 1 else kind for kind, end in zip(kinds, last, strict=True)}


# ---------------------------------------------------------------- usage and entropy

OVERVIEW = Markup(
    '<section class="ui-section ui-pair"><div class="ui-card"><h2>Expert usage</h2><p class="ui-note">Share of all'
    ' routing weight, over prompt and answer</p><ul class="pg-bars">{usage}</ul></div>'
    '<div class="ui-card"><h2>Entropy by layer</h2><p class="ui-note">How evenly a layer spreads these tokens over the'
    " experts, in nats: 0 means one expert for all tokens, {most:.2f} all {experts} equally</p>{plot}</div></section>"
)
BAR = Markup(
    '<li>{badge}<span class="name" title="{name}">{name}</span>'
    '<span class="track" style="--w:{width:.1f}%"><i {look}></i></span>'
    '<span class="number">{share}</span></li>'
)
PLOT = Markup(
    '<div class="pg-plot" role="img" aria-label="Entropy by layer; the table has the numbers">'
    '<div class="columns">{columns}</div>'
    '<div class="axis"><span>{most:.2f}</span><span>{half:.2f}</span><span>0</span></div></div>'
    '<details><summary>As a table</summary><table class="pg-table"><thead><tr><th scope="col">layer</th>'
    '<th scope="col">entropy</th></tr></thead><tbody>{rows}</tbody></table></details>'
)
COLUMN = Markup('<span title="{name}: {value:.2f}"><i style="height:{height:.1f}%"></i><em>{label}</em></span>')
TABLE_ROW = Markup('<tr><th scope="row">{}</th><td>{:.2f}</td></tr>')


def overview(routing: Routing, names: Sequence[str]) -> Markup:
    """How much each expert was used, and how evenly each layer used them."""
    most = math.log(max(len(names), 2))
    order = sorted(range(len(names)), key=lambda expert: -routing.usage[expert])
    shown, rest = order[:MOST_COLUMNS], order[MOST_COLUMNS:]
    longest = max(routing.usage)
    bars = [_bar(badge(e), names[e], routing.usage[e], longest, e) for e in shown]
    if rest:
        bars.append(
            _bar(Markup("<b></b>"), f"{len(rest)} other experts", sum(routing.usage[e] for e in rest), longest, None)
        )
    entropy = routing.layer_entropy()
    columns = [
        COLUMN.format(name=_layer_name(layer), label=label, value=value, height=100 * min(value / most, 1))
        for (layer, value), label in zip(entropy.items(), axis_labels(list(entropy)), strict=True)
    ]
    rows = join(TABLE_ROW.format(_layer_name(layer), value) for layer, value in entropy.items())
    plot = PLOT.format(columns=join(columns), most=most, half=most / 2, rows=rows)
    return OVERVIEW.format(usage=join(bars), most=most, experts=len(names), plot=plot)


def _bar(mark: Markup, name: str, share: float, longest: float, expert: int | None) -> Markup:
    width = 100 * min(share / max(longest, 1e-9), 1.0)
    return BAR.format(badge=mark, name=name, look=look(expert), width=width, share=percent(share, 1))


# ---------------------------------------------------------------- the same prompt, other weights

COMPARISON_HEAD = Markup(
    '<section class="ui-section"><h2>The same prompt, side by side</h2><p class="ui-note">The answers of the router,'
    " the base, all experts merged, and one expert alone</p></section>"
)
COMPARISON = Markup('<div class="pg-compare">{}</div>')
CARD = Markup(
    '<article class="ui-card" aria-busy="{busy}"><h3>{title}</h3><p class="ui-note">{note}</p>'
    '<p class="pg-text">{text}</p></article>'
)


def comparison_head() -> Markup:
    """The head of the comparison."""
    return COMPARISON_HEAD


def comparison(rows: Iterable[tuple[str, str, str | None, bool]]) -> Markup:
    """Answers side by side.

    Args:
        rows: title, note, text (None before it begins) and whether it is complete.
    """
    return COMPARISON.format(join(_card(*row) for row in rows))


def _card(title: str, note: str, text: str | None, done: bool) -> Markup:
    if text is None:
        shown = Markup('<span class="ui-wait">…</span>')
    elif done and not text.strip():
        shown = Markup('<span class="ui-wait">(nothing)</span>')
    else:
        shown = Markup("{}{}").format(text.strip(), "" if done else CURSOR)
    return CARD.format(busy="false" if done else "true", title=title, note=note, text=shown)
