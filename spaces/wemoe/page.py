"""The page's parts as HTML, each a pure function of plain data; `Markup.format` escapes every text that goes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batch import shown
from markupsafe import Markup
from model import Answer, Example
from shared.experts import badge, head_cell
from shared.page import count, join, link, percent
from shared.page import header as page_header

MOST_BARS = 6  # classes of the answer
FEW_BARS = 3  # classes of the answers of other merges
LONG_ANSWER = 24  # characters; longer answers have smaller letters


# ---------------------------------------------------------------- head and messages

BUSY = Markup('<section class="ui-card ui-message" aria-busy="true"><p class="ui-wait">…</p></section>')


def header(model_id: str, url: str, sha: str, experts: int, layers: int, smile: bool) -> Markup:
    """Name of the model and one sentence on what it does."""
    if smile:
        summary = (
            f"{count(experts, 'expert')}, fine-tunes of one base: in {count(layers, 'layer')} every token is"
            " routed to the nearest experts."
        )
    else:
        summary = (
            f"{count(experts, 'expert')}, fine-tunes of one base, in one model: {count(layers, 'layer')} are"
            " merged per input, with coefficients that routers predict from the input."
        )
    return page_header("SMILE" if smile else "WEMoE", link(url, model_id), summary, sha)


def busy() -> Markup:
    """A placeholder for an answer that is being computed."""
    return BUSY


# ---------------------------------------------------------------- answers

ANSWER = Markup(
    '<section class="ui-card we-answer" aria-live="polite"><div class="we-verdict">{seen}<div><p class="ui-kicker">'
    '{kicker}</p><p class="we-word{size}" data-answer>{text}</p>{sure}</div></div>{bars}</section>'
)
SEEN = Markup('<figure class="we-seen"><img src="{}" alt="The input"></figure>')
SURE = Markup('<p class="we-sure">{} confident</p>')
BARS = Markup('<ul class="we-bars">{}</ul>')
BAR = Markup(
    '<li class="{kind}"><span class="name" title="{name}">{name}</span><span class="track">'
    '<i style="width:{width:.1f}%"></i></span><span class="number">{share}</span></li>'
)
OTHERS = Markup(
    '<section class="we-others"><h2>The same input with other coefficients</h2><p class="ui-note">{note}</p>'
    '<div class="we-compare">{cards}</div></section>'
)
CARD = Markup(
    '<article class="ui-card{own}" aria-busy="{busy}"><h3>{badge}<span title="{title}">{title}</span></h3>'
    '<p class="ui-note">{note}</p>{body}</article>'
)
SAID = Markup('<p class="we-said">{}</p>{}')


def answer_panel(answer: Answer, head: str, picture: str = "") -> Markup:
    """The model's answer, with its probabilities.

    Args:
        head: the expert whose classification head is used, "" if all share one.
        picture: data URL of the input.
    """
    kicker = "Answer" if not head else f"Answer, with the head of {head}"
    return ANSWER.format(
        seen=SEEN.format(picture) if picture else "",
        kicker=kicker,
        size=" long" if len(answer.text) > LONG_ANSWER else "",
        text=answer.text or "(nothing)",
        sure="" if answer.confidence is None else SURE.format(percent(answer.confidence, 1)),
        bars=bars(answer, MOST_BARS),
    )


def bars(answer: Answer, most: int) -> Markup:
    """The most probable classes with their probabilities, then the sum of all others."""
    if not answer.probabilities:
        return Markup("")
    order = sorted(range(len(answer.labels)), key=lambda i: -answer.probabilities[i])
    rows = [_bar(answer.labels[i], answer.probabilities[i], "first" if i == order[0] else "") for i in order[:most]]
    if rest := order[most:]:
        rows.append(_bar(count(len(rest), "other"), sum(answer.probabilities[i] for i in rest), "rest"))
    return BARS.format(join(rows))


def _bar(name: str, share: float, kind: str) -> Markup:
    return BAR.format(kind=kind, name=name, width=100 * share, share=percent(share))


def others(
    names: Sequence[str],
    constant: Answer | None,
    alone: Sequence[Answer | None],
    task: int | None,
    value: float,
    smile: bool,
) -> Markup:
    """Answers with one constant, and with each expert alone.

    Args:
        names: of the experts.
        constant: the answer with the same coefficient for all experts; None while it is being computed.
        alone: the answer of each expert alone; None while it is being computed.
        task: index of the expert whose classification head is used above, if one was chosen.
        value: the constant.
        smile: whether there are no routers.
    """
    of_task = f", head of {names[task]}" if task is not None else ""
    cards = [
        _card(
            None, "Equal coefficients" if smile else "Task arithmetic", f"{value:.3g} for all{of_task}", constant, False
        )
    ]
    for expert, answer in enumerate(alone):
        is_of_task = expert == task
        note = "the expert of this task" if is_of_task else "its own head" if task is not None else "alone"
        cards.append(_card(expert, names[expert], note, answer, is_of_task))
    note = (
        "For an expert alone its coefficient is 1 and all others are 0, in every layer that is merged"
        f"{'; it predicts with its own head' if task is not None else ''}; the rest of the model is unchanged."
    )
    return OTHERS.format(note=note, cards=join(cards))


def _card(expert: int | None, title: str, note: str, answer: Answer | None, is_of_task: bool) -> Markup:
    if answer is None:
        body = Markup('<p class="we-said ui-wait">…</p>')
    else:
        body = SAID.format(answer.text or "(nothing)", bars(answer, FEW_BARS))
    return CARD.format(
        own=" own" if is_of_task else "",
        busy="true" if answer is None else "false",
        badge="" if expert is None else badge(expert),
        title=title,
        note=note,
        body=body,
    )


# ---------------------------------------------------------------- many inputs

TABLE = Markup(
    '<section class="ui-section" aria-live="polite"><div class="ui-split"><h2>{title}</h2><p class="ui-note">{note}</p>'
    '</div><div class="ui-scroll" tabindex="0" role="region" aria-label="Answers"><table class="ui-heat we-rows">'
    '<thead><tr><th scope="col">input</th><th scope="col">answer</th><th scope="col">confidence</th>{head}</tr></thead>'
    "<tbody>{rows}</tbody><tfoot>{foot}</tfoot></table></div></section>"
)
ROW = Markup(
    '<tr><th scope="row" title="{full}">{text}</th><td class="said" title="{answer}">{answer}</td>'
    "<td>{sure}</td>{cells}</tr>"
)
FOOT = Markup('<tr class="mean"><th scope="row">mean</th><td></td><td></td>{}</tr>')


def table(
    names: Sequence[str], examples: Sequence[Example], answers: Sequence[Answer], cells: Any, head: str
) -> Markup:
    """Answers to many inputs, with the mean coefficient of each expert.

    Args:
        cells: (rows of coefficients) → cells of a heat map for each, on one scale; `plots.heat_cells`.
        head: the expert whose classification head was used, "" if all share one.
    """
    means = [answer.coefficients.means() for answer in answers if answer.coefficients]
    overall = [sum(column) / len(column) for column in zip(*means, strict=True)]
    *colours, last = cells([*means, overall])
    rows = [
        ROW.format(
            full=example.name or example.text,
            text=shown(example),
            answer=answer.text or "(nothing)",
            sure="–" if answer.confidence is None else percent(answer.confidence),
            cells=row,
        )
        for example, answer, row in zip(examples, answers, colours, strict=True)
    ]
    return TABLE.format(
        title=count(len(rows), "answer"),
        note="and the mean coefficient of each expert over the layers" + (f"; with the head of {head}" if head else ""),
        head=join(head_cell(expert, name) for expert, name in enumerate(names)),
        rows=join(rows),
        foot=FOOT.format(last),
    )


# ---------------------------------------------------------------- parts of the model

PARTS = Markup(
    '<section class="ui-section ui-pair"><div class="ui-card"><h2>Routed and merged parameters</h2>'
    '<p class="ui-note">{total} parameters, {megabytes:,.1f} MB of them in the layers that are {merged}</p>'
    '<div class="we-strip" role="img" aria-label="Shares of the parameters; the table has the numbers">{strip}</div>'
    '<table class="we-table"><thead><tr><th scope="col">part</th><th scope="col">parameters</th></tr></thead>'
    '<tbody>{rows}</tbody></table></div><div class="ui-card"><h2>Routers</h2><p class="we-text">{routers}</p><h3>Layers'
    '</h3><p class="we-text">{layers}</p></div></section>'
    '<section class="ui-section ui-card"><h2>Experts</h2><ol class="we-experts">{experts}</ol><p class="ui-note">{base}'
    "</p></section>"
)
PART = Markup(
    '<tr><th scope="row"><i class="part-{key}"></i>{name}<small>{note}</small></th><td>{number:,}<small>{share}</small>'
    "</td></tr>"
)
PIECE = Markup('<i class="part-{}" style="flex-grow:{}" title="{}: {}"></i>')
EXPERT = Markup("<li>{badge}<div>{name}<small>{about}</small></div></li>")
KINDS = {  # of stored task vectors
    "exact": "in the model's own precision",
    "bfloat16": "in bfloat16",
    "sparse": "only their largest entries",
    "low-rank": "as low-rank products",
    "low-rank-bfloat16": "as low-rank products, in bfloat16",
}


def facts_panel(config: Any, summary: Mapping[str, Any], parts: Mapping[str, int], urls: Mapping[str, str]) -> Markup:
    """Numbers of parameters by part, how the routers were adapted, and the experts.

    Args:
        config: the model's.
        summary: `model.summary()`.
        parts: `Served.parts()`.
        urls: expert -> its page.
    """
    smile, total = config.routing == "smile", max(sum(parts.values()), 1)
    kept = list(summary["energy"].values())
    stored = KINDS.get(summary["task_vectors"], summary["task_vectors"])
    stored += f", which keep {percent(sum(kept) / len(kept), 1)} of their energy" if kept else ""
    how = config.merge.replace("_", " ") + ("" if config.scaling == 1 else f" with λ = {config.scaling:g}")
    start = "the base's weights" if config.merge == "task_arithmetic" else f"merged by {config.merge.replace('_', ' ')}"
    names = {
        "upscaled_parameters": (f"Routed: {start}", f"{count(summary['upscaled_linears'], 'linear layer')}"),
        "task_vectors": ("Routed: task vectors", stored),
        "merged_parameters": ("Merged once: everything else", how),
        "head_parameters": ("Heads", "one for each expert"),
        "trainable": ("Routers", "" if smile else _routers(config)),
    }
    rows = [
        PART.format(key=key, name=names[key][0], note=names[key][1], number=number, share=percent(number / total, 1))
        for key, number in parts.items()
        if number
    ]
    strip = [PIECE.format(key, number, names[key][0], percent(number / total, 1)) for key, number in parts.items()]
    experts = [
        EXPERT.format(
            badge=badge(index),
            name=link(urls.get(row["name"]), row["name"]),
            about=" · ".join([row.get("license") or "no licence given", *_labels(row)]),
        )
        for index, row in enumerate(config.experts)
    ]
    return PARTS.format(
        total=f"{total:,}",
        megabytes=summary["stored_bytes"] / 1e6,
        merged="routed" if smile else "merged per input",
        strip=join(strip),
        rows=join(rows),
        routers=adaptation(config),
        layers=", ".join(summary["units"]),
        experts=join(experts),
        base=f"All fine-tuned from {config.base['id']}" if config.base.get("id") else "",
    )


def _routers(config: Any) -> str:
    layers = ("a vector", "one linear layer", "two linear layers")[config.router_layers]
    return f"{layers}, {'one for all layers' if config.shared_router else 'one in each layer'}"


def _labels(row: Mapping[str, Any]) -> list[str]:
    labels = [str(label) for label in row.get("labels") or ()]
    shown_labels = ", ".join(labels[:FEW_BARS]) + (f", … ({len(labels)})" if len(labels) > FEW_BARS else "")
    return [shown_labels] if labels else []


# loss that was minimised → how that is said
ADAPTED = {
    "labels": "Adapted with labels",
    "expert": "Adapted without labels, by imitating each task's expert",
    "entropy": "Adapted without labels, by minimising the entropy of predictions",
}


def adaptation(config: Any) -> str:
    """How the routers were adapted, in one sentence."""
    if config.routing == "smile":
        return "None: each token goes to the experts onto whose leading singular vectors its projection is largest."
    how = getattr(config, "adaptation", None)
    if not how:
        start = config.scaling if config.merge == "task_arithmetic" else 0
        about = f"every coefficient is about {start:g} for every input"
        return f"Not adapted: {about}, so the model predicts as {config.merge.replace('_', ' ')} does."
    rows = sum(how["rows"].values())
    summary = ADAPTED.get(how["loss"], "Adapted")
    summary += f": {how['steps']:,} steps on {count(rows, 'row')} of {count(len(how['rows']), 'task')}."
    return f"{summary} Stopped early: {how['stopped']}" if how.get("stopped") else summary
