"""The page's parts as HTML, each a pure function of plain data; `Markup.format` escapes every text that goes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from processing import Routing, shown_labels
from shared.page import count, join, link, percent
from shared.page import header as page_header

LABEL_WIDTHS = (4, 16)  # minimum and maximum width of a column of names, in characters
LONG_ANSWER = 24  # characters; longer answers have smaller letters
NUMBERED = 0.03  # minimum share of the cost strip for a piece to show its number
TIGHT_LABEL = 6  # characters; with labels up to this length two experts fit side by side on a phone


def short(name: str) -> str:
    """A repo id without its owner."""
    return name.rpartition("/")[2] or name


# ---------------------------------------------------------------- head


def header(model_id: str, url: str, sha: str, experts: int, labels: int, mode: str, frugal: bool) -> Markup:
    """Name of the model and one sentence on what it does."""
    who = count(experts, "expert")
    if mode == "selection":
        does = f"A small network reads the input and selects one of {who} to answer it."
    else:
        does = f"{who} and {count(labels, 'label')}: a small network fuses the experts' predictions into one"
        does += "; with a budget, it queries only the experts that are worth their cost." if frugal else "."
    return page_header("Fusion of Experts", link(url, model_id, "the model on the Hub"), does, sha)


# ---------------------------------------------------------------- bars

ROW = Markup(
    '<li class="{kind}"><span class="name" title="{name}">{name}</span>'
    '<span class="track"><i style="width:{length:.1f}%"></i></span><span class="number">{number}</span></li>'
)
CHART = Markup(
    '<div class="foe-chart" style="--label:{width}ch;--rows:{count}"><ul class="foe-bars">{rows}</ul>'
    '<div class="foe-axis" aria-hidden="true">{ticks}</div></div>'
)


def bars(routing: Routing, probabilities: Sequence[float | None], digits: int = 2) -> Markup:
    """One row per label: name, bar on the common axis, number; a dash for a label that the expert does not know.

    The bar of the fused prediction is blue; the longest one, if it is another, is orange.

    Args:
        probabilities: one per label of the routing.
    """
    shown, others = shown_labels(routing)
    low, high = routing["axis"]
    top = max((value for value in probabilities if value is not None), default=low)
    rows = []
    for index in shown:
        label, value = routing["labels"][index], probabilities[index]
        if value is None:
            rows.append(bar(label, None, 0.0, "unknown"))
        else:
            # a regression has one score, which cannot differ from the answer
            same = label == routing["answer"] or len(routing["labels"]) == 1
            kind = "same" if same else "differs" if value == top > low else ""
            rows.append(bar(label, value, (value - low) / (high - low), kind, digits))
    if others:
        rest = sum(value or 0.0 for index, value in enumerate(probabilities) if index not in set(shown))
        rows.append(bar(f"{others} other labels", rest, rest, "", digits))
    return chart(rows, [routing["labels"][index] for index in shown], (low, (low + high) / 2, high))


def bar(name: str, value: float | None, length: float, kind: str = "", digits: int = 2) -> Markup:
    """One row of a chart; `length` is the bar's share of the axis."""
    number = "–" if value is None else f"{value:.{digits}f}"
    return ROW.format(kind=kind, name=name, length=100 * min(max(length, 0.0), 1.0), number=number)


def chart(rows: Sequence[Markup], names: Sequence[str], ticks: Sequence[float]) -> Markup:
    """Rows of bars over their axis; the column of names has the same width in all charts with the same names."""
    width = min(max([LABEL_WIDTHS[0], *map(len, names)]), LABEL_WIDTHS[1])
    marks = join(Markup("<span>{:.3g}</span>").format(tick) for tick in ticks)
    return CHART.format(width=width, count=len(rows), rows=join(rows), ticks=marks)


# ---------------------------------------------------------------- the answer

ANSWER = Markup(
    '<section class="ui-card foe-answer" aria-live="polite"><div class="foe-verdict">{seen}'
    '<div><p class="ui-kicker">{kicker}</p><p class="foe-word{size}" data-answer>{answer}</p>{sure}</div></div>'
    "{chart}{cost}</section>"
)
SEEN = Markup(
    '<figure class="foe-seen"><img src="{}" alt="The input as the experts see it">'
    "<figcaption>as the experts<br>see it</figcaption></figure>"
)
COST = Markup(
    '<div class="foe-cost"><div class="ui-split"><h3>{title}</h3>'
    "<p data-cost><b>{cost}</b> of the cost of querying all experts</p></div>{body}</div>"
)
PIECE = Markup('<span class="{}" style="flex-grow:{:.4f}" title="{}: {}">{}</span>')
STEP = Markup("<li><b>{}</b>{} <span>{}</span></li>")


def answer_panel(routing: Routing, picture: str | None = None) -> Markup:
    """The fused prediction with its confidence, bars and cost.

    Args:
        picture: data URL of the picture as the experts saw it.
    """
    answer, confidence = routing["answer"] or "", routing["confidence"]
    sure = "" if confidence is None else Markup('<p class="foe-sure">{} confident</p>').format(percent(confidence, 1))
    selection = routing["mode"] == "selection"
    return ANSWER.format(
        seen=SEEN.format(picture) if picture else "",
        kicker="Answer" if selection else "Fused answer",
        size=" long" if len(answer) > LONG_ANSWER else "",
        answer=answer,
        sure=sure,
        chart=bars(routing, routing["probabilities"], 3) if routing["labels"] else "",
        cost=fit_bars(routing) if selection else cost_strip(routing),
    )


def cost_strip(routing: Routing) -> Markup:
    """The cost of all experts as a strip with a piece for each: queried ones first, in their order, and filled."""
    experts = routing["experts"]
    one_by_one = routing["budget"] is not None
    queried = sorted((e for e in experts if e["order"]), key=lambda e: e["order"])
    pieces = [
        PIECE.format(
            "queried" if expert["order"] else "idle",
            expert["cost_share"],
            expert["name"],
            percent(expert["cost_share"]),
            expert["order"] if one_by_one and expert["order"] and expert["cost_share"] >= NUMBERED else "",
        )
        for expert in [*queried, *(e for e in experts if not e["order"])]
    ]
    if one_by_one:
        title = f"{len(queried)} of {count(len(experts), 'expert')} queried"
        note = f"one after the other, within a budget of {percent(routing['budget'])}"
        steps = join(STEP.format(e["order"], short(e["name"]), percent(e["cost_share"])) for e in queried)
    else:
        title, note, steps = f"All {count(len(experts), 'expert')} queried", "at once: no budget was set", Markup("")
    body = Markup(
        '<div class="foe-strip" role="img" aria-label="{} of the cost">{}</div><p class="ui-note">{}</p>'
        '<ol class="foe-chain" aria-label="Query order">{}</ol>'
    ).format(percent(routing["cost"]), join(pieces), note, steps)
    return COST.format(title=title, cost=percent(routing["cost"]), body=body)


def fit_bars(routing: Routing) -> Markup:
    """In selection: the chosen expert, and the fuser's score of each expert."""
    ranked = sorted(routing["experts"], key=lambda expert: -expert["score"])
    rows = [bar(short(e["name"]), e["score"], e["score"], "same" if e["order"] else "", 3) for e in ranked]
    body = Markup('<p class="ui-note">Scores of the experts on this input, by the fuser</p>{}').format(
        chart(rows, [short(expert["name"]) for expert in ranked], (0, 0.5, 1))
    )
    title = f"{short(next(e['name'] for e in ranked if e['order']))} was chosen"
    return COST.format(title=title, cost=percent(routing["cost"]), body=body)


# ---------------------------------------------------------------- the experts

EXPERTS = Markup(
    '<section class="ui-section"><div class="ui-split"><h2>{title}</h2><p class="foe-key">{key}</p></div>'
    '<div class="foe-experts{tight}">{cards}</div></section>'
)
EXPERT = Markup(
    '<article class="ui-card foe-expert{idle}"><header>{badge}<h3>{name}</h3><p title="{about}">{about}</p></header>'
    "{body}</article>"
)
KEYS = {"same": "the answer", "differs": "a different first choice", "unknown": "not among its labels"}


def experts_panel(routing: Routing, urls: Mapping[str, str]) -> Markup:
    """One card per expert on equal axes: those queried first, in order, then those not queried.

    Args:
        urls: expert -> its page on the Hub.
    """
    selection = routing["mode"] == "selection"
    cards = sorted(routing["experts"], key=lambda expert: expert["order"] or len(routing["experts"]) + 1)
    longest = max((len(routing["labels"][index]) for index in shown_labels(routing)[0]), default=0)
    return EXPERTS.format(
        title="Candidate experts" if selection else "Each expert's prediction",
        key=join(
            Markup('<span class="{}">{}</span>').format(kind, text)
            for kind, text in KEYS.items()
            if kind == "same" or not selection
        ),
        tight=" tight" if 0 < longest <= TIGHT_LABEL else "",
        cards=join(_expert(expert, routing, urls.get(expert["name"])) for expert in cards),
    )


def _expert(expert: Mapping[str, Any], routing: Routing, url: str | None) -> Markup:
    selection, queried = routing["mode"] == "selection", bool(expert["order"])
    if selection:
        about = " · ".join([f"fits {percent(expert['score'], 1)}", ", ".join(expert["labels"])]).removesuffix(" · ")
    else:
        known = f"{len(expert['labels'])} of {count(len(routing['labels']), 'label')}"
        about = f"{percent(expert['cost_share'])} of the cost · knows {known}"
    numbered = queried and not selection and routing["budget"] is not None
    if expert["probabilities"] is not None:
        body = bars(routing, expert["probabilities"])
    elif queried and not routing["labels"]:
        body = Markup('<p class="ui-note">chosen</p>')
    else:
        word = "output is not finite" if queried else "not chosen" if selection else "not queried"
        body = Markup('<p class="foe-idle">{}</p>').format(word)
    return EXPERT.format(
        idle="" if queried else " idle",
        badge=Markup('<b class="foe-badge">{}</b>').format(expert["order"]) if numbered else "",
        name=link(url, short(expert["name"]), expert["name"]),
        about=about,
        body=body,
    )
