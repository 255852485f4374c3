"""The page's parts as HTML, each a pure function of plain data; `Markup.format` escapes every text that goes in."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data import ALL, HELD_IN, HELD_OUT, Row, Suite
from markupsafe import Markup
from plots import MOST_LINES, corruption_panels, cost_figure, points_of
from shared.page import count, join, message
from shared.page import header as page_header
from tables import Cell, Column, Line, Table, main_split, table_of, to_csv
from view import FILTERS, LABELS, SHOWS, View, choices

# ---------------------------------------------------------------- head and messages

TITLE_OF_PAGE = "Leaderboard of model fusion"
COMMAND = Markup(
    '<div class="lb-code"><pre tabindex="0">{text}</pre>'
    '<button type="button" class="lb-button" data-copy>{label}</button></div>'
)
HOW = """hf-fusion bench run --suite minilm-8 --data DIR --output results
hf-fusion bench report results
hf-fusion bench publish results OWNER/NAME"""


def header(suites: Sequence[Suite]) -> Markup:
    """The head of the page, with the numbers of methods, tasks and suites."""
    methods = {row.method for suite in suites for row in suite.rows if row.part == "fused"}
    tasks = sum(len(suite.tasks) for suite in suites)
    summary = (
        f"{count(len(methods), 'way')} to fuse many models into one, measured on {count(tasks, 'task')} in "
        f"{count(len(suites), 'suite')}. Every score comes with its interval, its recipe and the command that "
        "reproduces it."
    )
    return page_header("FusionBench", TITLE_OF_PAGE, summary)


def empty(why: str) -> Markup:
    """A message that there are no results yet, with the commands that make them."""
    hint = Markup(
        "<p>Run the benchmark, then put results-report/leaderboard.json beside app.py, or publish the results and "
        "set RESULTS_DATASET:</p>{}"
    )
    return page_header("FusionBench", TITLE_OF_PAGE, "") + message("No results yet", why, hint.format(command(HOW)))


def broken(why: str) -> Markup:
    """A message that the results cannot be read."""
    hint = Markup("<p>Generate the file again: <code>hf-fusion bench report results</code></p>")
    return page_header("FusionBench", TITLE_OF_PAGE, "") + message("The results cannot be read", why, hint)


def command(text: str, label: str = "Copy") -> Markup:
    """Text with a button that copies it."""
    return COMMAND.format(text=text, label=label)


# ---------------------------------------------------------------- filters

NAV = Markup('<nav class="lb-tabs" aria-label="Views">{}</nav>')
TAB = Markup('<a href="{href}" data-key="show {key}"{current}>{title}</a>')
FORM = Markup(
    '<form class="lb-filters" role="search" aria-label="Filters">{hidden}{selects}'
    '<label><span>Method</span><input type="search" name="find" value="{find}" placeholder="Part of a name" '
    'maxlength="200" autocomplete="off" data-key="find"></label>'
    '<a class="lb-reset" href="{reset}" data-key="reset">Reset</a></form>'
)
HIDDEN = Markup('<input type="hidden" name="{}" value="{}">')
SELECT = Markup('<label><span>{label}</span><select name="{name}" data-key="filter {name}">{options}</select></label>')
OPTION = Markup('<option value="{}"{}>{}</option>')


def tabs(view: View) -> Markup:
    """Links to the views of a suite."""
    current = Markup(' aria-current="page"')
    links = [
        TAB.format(
            href=view.to_query(show=key, sort="", row=""),
            key=key,
            title=title,
            current=current if key == view.show else "",
        )
        for key, title in SHOWS.items()
    ]
    return NAV.format(join(links))


def filters(view: View, suites: Sequence[Suite], suite: Suite) -> Markup:
    """The filters of a view."""
    values = {"suite": [(each.name, each.title) for each in suites], **choices(suite)}
    selected = Markup(" selected")
    selects = []
    for name in FILTERS[view.show]:
        options = [
            OPTION.format(value, selected if value == getattr(view, name) else "", text) for value, text in values[name]
        ]
        if len(options) > 1:
            selects.append(SELECT.format(label=LABELS[name], name=name, options=join(options)))
    kept = [*(name for name in LABELS if name not in FILTERS[view.show]), "show", "sort"]
    hidden = [HIDDEN.format(name, getattr(view, name)) for name in kept if getattr(view, name)]
    reset = View(view.suite, view.show).to_query()
    return FORM.format(hidden=join(hidden), selects=join(selects), find=view.find, reset=reset)


# ---------------------------------------------------------------- the table

SECTION = Markup(
    '<section class="ui-section" data-said="{said}"><div class="ui-split"><h2>{title}</h2>'
    '<a class="lb-button" download="{file}" href="data:text/csv;charset=utf-8;base64,{csv}">'
    'Download the table (CSV)</a></div><p class="ui-note">{note}</p>{figure}{table}{notes}</section>'
)
TABLE = Markup(
    '<div class="lb-scroll lb-box" tabindex="0" role="region" aria-label="{label}"><table class="lb-table">'
    '<caption class="lb-hidden">{label}. {caption}</caption><thead><tr>{head}</tr></thead>{bodies}</table></div>'
)
HEAD = Markup(
    '<th scope="col" aria-sort="{order}"{kind}><a href="{href}" title="{hint}" data-key="sort {key}">{title}'
    '<span class="lb-arrow" aria-hidden="true">{arrow}</span></a></th>'
)
BODY = Markup(
    '<tbody class="{part}"><tr class="lb-part"><th scope="rowgroup" colspan="{span}"><span>{title}</span></th></tr>'
    "{rows}</tbody>"
)
ROW = Markup(
    '<tr class="{kind}"><th scope="row">{number}<a href="{href}" aria-expanded="{open}" data-key="row {key}">{title}'
    "</a>{chip}<small>{family}</small></th>{cells}</tr>{recipe}"
)
NUMBER = Markup('<b class="lb-number" style="--c:var(--e{})">{}</b>')
CHIP = Markup('<span class="lb-chip">{}</span>')
CELL = Markup("<td{title}>{number}{star}{note}<small>{interval}</small></td>")
BEST = Markup(
    '<td class="best"{title}><span class="lb-star" aria-hidden="true">★</span><b>{number}</b>{star}{note}'
    "<small>{interval}</small></td>"
)
IS_BEST = Markup('<span class="lb-hidden"> best</span>')
MISSING = Markup('<td class="missing" title="{reason}">{status}{note}</td>')
NOTE = Markup('<sup><a href="#lb-note-{0}" aria-label="note {0}">{0}</a></sup>')
NOTES = Markup('<section class="lb-notes"><h3>Notes</h3><ol>{}</ol></section>')
NOTE_ITEM = Markup('<li id="lb-note-{}" tabindex="-1">{}</li>')
TITLE = Markup(' title="{}"')
RECIPE = Markup('<tr class="lb-open"><td colspan="{}">{}</td></tr>')
NOTHING = Markup('<p class="ui-card lb-nothing" role="status">{} <a href="{}" data-key="all">Show all</a></p>')
PLAIN = ("none", "no mean")  # their reasons are only in the tooltip and the CSV


class Notes:
    """Reasons and remarks, numbered in their order; equal texts share a number."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def mark(self, text: str) -> Markup:
        """The number to print beside a cell; empty for an empty text."""
        return NOTE.format(self.texts.setdefault(text, len(self.texts) + 1)) if text else Markup("")

    def listed(self) -> Markup:
        """The list of all notes."""
        return (
            NOTES.format(join(NOTE_ITEM.format(n, text) for text, n in self.texts.items()))
            if self.texts
            else Markup("")
        )


def table(shown: Table, view: View, suite: Suite, notes: Notes) -> Markup:
    """The table, with the recipe of the open row below it."""
    span = len(shown.columns)
    bodies = []
    for title, lines in shown.sections:
        methods = [line.row.method for line in lines]
        rows = []
        for k, (method, line) in enumerate(zip(methods, lines, strict=True)):
            has_variants = methods.count(method) > 1 or line.row.variant != "default"
            rows.append(_row(line, shown, view, notes, has_variants, method in methods[k - 1 : k]))
        bodies.append(BODY.format(part=lines[0].row.part, span=span, title=title, rows=join(rows)))
    label = f"{suite.title}: {SHOWS[view.show].lower()}"
    head = join(_head(column, shown.sort, view) for column in shown.columns)
    return TABLE.format(label=label, caption=shown.caption, head=head, bodies=join(bodies))


def _head(column: Column, sort: str, view: View) -> Markup:
    """A column's title, a link that sorts: best first, and worst first when chosen again."""
    is_sorted = sort.removeprefix("-") == column.key
    rises = (column.lower or column.key == "method") != sort.startswith("-")
    return HEAD.format(
        order=("ascending" if rises else "descending") if is_sorted else "none",
        kind=Markup(' class="task"') if column.key.startswith("task.") else "",
        href=view.to_query(sort=f"-{column.key}" if sort == column.key else column.key),
        hint=f"{column.hint}; sort by it" if column.hint else "sort by it",
        key=column.key,
        title=column.title,
        arrow=("▲" if rises else "▼") if is_sorted else "",
    )


def _row(line: Line, shown: Table, view: View, notes: Notes, has_variants: bool, is_second: bool) -> Markup:
    row, is_open = line.row, line.row.key == view.row
    return ROW.format(
        kind=" ".join(["second"] * is_second + ["open"] * is_open),
        number=NUMBER.format(line.number - 1, line.number) if line.number else "",
        href=view.to_query(row="" if is_open else row.key),
        open="true" if is_open else "false",
        key=row.key,
        title=row.title,
        chip=CHIP.format(row.variant) if has_variants else "",
        family=row.section if row.part == "fused" and not is_second else "",
        cells=join(_cell(cell, notes) for cell in line.cells[1:]),
        recipe=RECIPE.format(len(shown.columns), recipe(row)) if is_open else "",
    )


def _cell(cell: Cell, notes: Notes) -> Markup:
    if cell.value is None:
        is_plain = cell.status in PLAIN
        note = "" if is_plain or cell.reason == cell.status else notes.mark(cell.reason)
        return MISSING.format(reason=cell.reason, status="–" if is_plain else cell.status, note=note)
    return (BEST if cell.best else CELL).format(
        number=cell.text,
        star=IS_BEST if cell.best else "",
        note=notes.mark(cell.note) if not cell.note.startswith("seeds ") else "",
        title=TITLE.format(cell.note) if cell.note else "",
        interval=cell.interval,
    )


# ---------------------------------------------------------------- a row's recipe

PANEL = Markup(
    '<div class="lb-recipe"><div><h3>Recipe</h3>{recipe}</div><div><h3>Reproduce it</h3>{command}'
    "<dl>{facts}</dl></div></div>"
)
FACT = Markup("<div><dt>{}</dt><dd>{}</dd></div>")
_PLAIN_WORD = re.compile(r"[A-Za-z_][\w.-]*( [\w.-]+)*\Z")
_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def recipe(row: Row) -> Markup:
    """A row's recipe, its command, and facts about its measurement."""
    facts = {
        "Seeds": ", ".join(map(str, row.seeds)),
        "Fusing": f"{row.fuse_cpu_seconds:,.1f} s of CPU time, including fitting, adapting and tuning",
        "Testing": f"{row.seconds:,.1f} s on the clean rows of all tasks",
        "Parameters": f"{row.stored / 1e6:,.1f} million stored, {row.active / 1e6:,.1f} million active per example",
        "Peak memory": f"{row.peak_bytes / 1e6:,.0f} MB, of the whole process",
        "Machine": row.machine,
        "Versions": ", ".join(f"{name} {version}" for name, version in row.versions.items()),
    }
    return PANEL.format(
        recipe=command(recipe_text(row), "Copy the recipe"),
        command=command(row.command or "The command was not recorded.", "Copy the command"),
        facts=join(FACT.format(name, text) for name, text in facts.items() if text),
    )


def recipe_text(row: Row) -> str:
    """A row in the form of fusion.yaml."""
    lines = [f"method: {_scalar(row.method)}", f"variant: {_scalar(row.variant)}", f"fused: {_scalar(row.split)}"]
    lines += _block("parameters", row.parameters)
    if row.shas:
        lines.append("sources:")
        lines += [f"  - {_scalar(f'{name}@{sha}' if sha else name)}" for name, sha in row.shas.items()]
    return "\n".join(lines)


def _block(name: str, values: Mapping[str, Any]) -> list[str]:
    if not values:
        return [f"{name}: {{}}"]
    return [f"{name}:", *(f"  {_scalar(key)}: {_scalar(value)}" for key, value in values.items())]


def _scalar(value: Any) -> str:
    """A value as YAML: as JSON, or a plain word without quotes."""
    if isinstance(value, str) and (_PLAIN_WORD.match(value) and value.casefold() not in _YAML_WORDS):
        return value
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- the page

BOARD = Markup('<div class="lb-board" data-query="{}" data-address="{}">{}{}{}</div>')
SPLITS = Markup('<div class="lb-splits">{}</div>')
SPLIT = Markup(
    '<article class="ui-card"><h3>{}</h3><p><b>Fused:</b> {}</p><p><b>Tested but not fused:</b> {}</p></article>'
)
NO_MEAN = ("No mean to compare", "The metrics of this suite cannot be averaged, or no row shown has a mean.")
NOT_MEASURED = {  # view → title where a suite was not measured for it, and the option that measures it
    "corruptions": ("Corruptions were not measured", "--corruptions all"),
    "unseen": ("Unseen tasks were not measured", "--unseen all"),
}


def board(suites: Sequence[Suite], query: str) -> Markup:
    """The page of an address, with this address and its shortest form as attributes for board.js."""
    view, suite = View.from_query(query, suites)
    return BOARD.format(query, view.to_query(), tabs(view), filters(view, suites, suite), section(view, suite))


def section(view: View, suite: Suite) -> Markup:
    """The section of a view: its figure, table and notes."""
    is_measured = {
        "corruptions": any(row.drop for row in suite.rows),
        "unseen": any(split != ALL for split in suite.splits),
    }
    if not is_measured.get(view.show, True):
        title, option = NOT_MEASURED[view.show]
        command_line = f"hf-fusion bench run --suite {shlex.quote(suite.name)} --data DIR --output results {option}"
        return message(
            title,
            "Measure them with this command, then generate the report again:",
            command(command_line),
        )
    shown, notes = table_of(suite, view), Notes()
    figure = Markup("")
    if view.show == "corruptions":
        shown = numbered(shown)
        figure = corruption_panels(shown, suite, main_split(suite))
    elif view.show == "unseen":
        figure = SPLITS.format(join(_split(suite, split) for split in suite.splits if split != ALL))
    elif view.show == "cost":
        figure = cost_figure(shown, view) if points_of(shown) else message(*NO_MEAN)
    table_html = table(shown, view, suite, notes)
    if not shown.lines:
        figure, table_html = (
            Markup(""),
            NOTHING.format("No method matches these filters.", View(view.suite, view.show).to_query()),
        )
    return SECTION.format(
        said=f"{count(len(shown.lines), 'row')}: {shown.caption}",
        title=suite.title,
        file=f"{suite.name}-{view.show}.csv",
        csv=base64.b64encode(to_csv(shown).encode()).decode(),
        note=f"{shown.caption} ★ marks the best fused model; "
        "variants of a method are adjacent and ranked by the better one. Select a method to see its recipe.",
        figure=figure,
        table=table_html,
        notes=notes.listed(),
    )


def numbered(shown: Table) -> Table:
    """The table with numbers for the first fused models, which the figure shows."""
    numbers = iter(range(1, MOST_LINES + 1))
    sections = tuple(
        (
            title,
            tuple(replace(line, number=next(numbers, None)) if line.row.part == "fused" else line for line in lines),
        )
        for title, lines in shown.sections
    )
    return replace(shown, sections=sections)


def _split(suite: Suite, split: str) -> Markup:
    fused, tested = (", ".join(task.name for task in suite.tasks_of(split, group)) for group in (HELD_IN, HELD_OUT))
    return SPLIT.format(split.capitalize() if split.isascii() else split, fused or "–", tested or "–")
