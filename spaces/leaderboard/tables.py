"""The table of a view as plain data and as CSV: pure functions of the results."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from data import ALL, CEILING, CLEAN, FLOOR, FUSED, HELD_IN, HELD_OUT, LOWER, Row, Score, Suite, Task
from view import View, condition_title

SECTIONS = {CEILING: "Ceilings", FUSED: "Fused models", FLOOR: "Floors"}
GROUPS = {HELD_IN: "seen", HELD_OUT: "unseen"}


@dataclass(frozen=True)
class Cell:
    """A number with its interval, or the reason why there is none.

    Attributes:
        text: the number, formatted.
        value: the number; None if there is none.
        ci95: ends of its interval, in the unit of `value`.
        best: whether no fused model has a better number as formatted.
        status: why there is no number, in one or two words.
        reason: why there is no number.
        note: a remark.
    """

    text: str = ""
    value: float | None = None
    ci95: tuple[float, float] | None = None
    best: bool = False
    status: str = ""
    reason: str = ""
    note: str = ""

    @property
    def interval(self) -> str:
        """Its 95 % interval, formatted."""
        if self.ci95 is None:
            return ""
        digits = max(0, len(self.text.partition(".")[2]))
        low, high = (f"{end:.{digits}f}" for end in self.ci95)
        return f"{low} to {high}" if low.startswith("-") else f"{low}–{high}"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: in addresses.
        title: in the table's head.
        hint: tooltip of the title.
        lower: whether less is better.
        marks: whether its best number is marked.
        of: row → its cell.
    """

    key: str
    title: str
    hint: str = ""
    lower: bool = False
    marks: bool = True
    of: Callable[[Row], Cell] = lambda row: Cell()


@dataclass(frozen=True)
class Line:
    """A row of results and its cells; `number` is set if the figure shows it."""

    row: Row
    cells: tuple[Cell, ...]
    number: int | None = None


@dataclass(frozen=True)
class Table:
    """A table with sections for ceilings, fused models and floors, each sorted."""

    columns: tuple[Column, ...]
    sections: tuple[tuple[str, tuple[Line, ...]], ...]
    caption: str
    sort: str

    @property
    def lines(self) -> list[Line]:
        """The lines of all sections."""
        return [line for _, lines in self.sections for line in lines]


# ---------------------------------------------------------------- cells


def scale(tasks: Iterable[Task]) -> str:
    """The metric of some tasks if their mean is not a share; "" for shares, which are shown in percent."""
    return next((task.metric for task in tasks if task.metric in LOWER), "")


def score_cell(score: Score | None, metric: str) -> Cell:
    """A score, formatted: shares in percent, other metrics unchanged."""
    if score is None:
        return Cell(status="not run", reason="not run")
    if score.score is None:
        status = "n/a" if score.status == "left out" else score.status
        return Cell(status=status, reason=score.reason or score.status)
    factor, digits = (1, 2) if metric in LOWER else (100, 1)
    ends = score.ci95 and (factor * score.ci95[0], factor * score.ci95[1])
    return Cell(f"{factor * score.score:.{digits}f}", factor * score.score, ends, note=score.note)


def mean_cell(row: Row, suite: Suite, group: str, condition: str) -> Cell:
    """The mean of a group's tasks, or which tasks have no score."""
    tasks = suite.tasks_of(row.split, group)
    mean = row.means.get(condition, {}).get(group)
    if mean is not None:
        return score_cell(mean, scale(tasks))
    scores = row.scores.get(condition, {})
    missing = [task.name for task in tasks if scores.get(task.name, Score(None)).score is None]
    reason = (
        f"no score on {', '.join(missing)}" if missing else "these metrics cannot be averaged, or their seeds differ"
    )
    return Cell(status="no mean", reason=reason)


def plain_mean(scores: Sequence[Score | None], metric: str) -> Cell:
    """The mean of independent scores; their distances to the ends of the intervals are added in quadrature."""
    known = [score for score in scores if score is not None and score.score is not None]
    if not known or len(known) < len(scores):
        return Cell(status="not run", reason="not run on all of these tasks")
    mean, ends = sum(s.score for s in known) / len(known), [s.ci95 for s in known if s.ci95]  # type: ignore[misc]
    if len(ends) < len(known):
        return score_cell(Score(mean), metric)
    below, above = (
        math.sqrt(sum((s.ci95[side] - s.score) ** 2 for s in known)) / len(known)  # type: ignore[index,operator]
        for side in (0, 1)
    )
    return score_cell(Score(mean, (mean - below, mean + above)), metric)


def share_cell(share: float | None, why: str) -> Cell:
    """A share in percent."""
    return Cell(status="none", reason=why) if share is None else Cell(f"{100 * share:.1f}", 100 * share)


def plain_cell(row: Row, number: float, digits: int = 2) -> Cell:
    """A number of a measured row."""
    return Cell(f"{number:,.{digits}f}", number) if row.is_measured else Cell(status="none", reason="not measured")


# ---------------------------------------------------------------- columns of each view

METHOD = Column("method", "Method", "grouped by family", marks=False)
COST = Column(
    "cost",
    "Cost",
    "multiplications per forward pass, as a multiple of the base’s",
    True,
    False,
    lambda r: plain_cell(r, r.cost),
)


def main_split(suite: Suite) -> str:
    """The split of views without a filter for it."""
    return ALL if ALL in suite.splits else suite.splits[0]


def _groups(suite: Suite, split: str, selected: str = "") -> dict[str, list[Task]]:
    """Group → its tasks in a split; all groups if the selected one has no tasks."""
    groups = {group: suite.tasks_of(split, group) for group in GROUPS if selected in ("", group)}
    groups = {group: tasks for group, tasks in groups.items() if tasks}
    return groups or {group: tasks for group in GROUPS if (tasks := suite.tasks_of(split, group))}


def _mean_column(suite: Suite, split: str, group: str, condition: str, title: str) -> Column:
    tasks = suite.tasks_of(split, group)
    hint = f"mean of {', '.join(task.name for task in tasks)}"
    key = "mean" if group == HELD_IN else "mean-unseen"
    return Column(key, title, hint, suite.is_lower(tasks), of=lambda row: mean_cell(row, suite, group, condition))


def _scores(suite: Suite, view: View) -> tuple[list[Row], list[Column], str]:
    groups = _groups(suite, view.split, view.tasks)
    rows = [row for row in suite.rows if row.split == view.split and view.condition in row.scores]
    columns = [METHOD]
    for group, tasks in groups.items():
        title = "Mean" if len(groups) == 1 else f"Mean, {GROUPS[group]}"
        columns.append(_mean_column(suite, view.split, group, view.condition, title))
        columns += [
            Column(
                f"task.{task.name}",
                task.name,
                f"{task.metric}, {task.n:,} test rows, {GROUPS[group]}",
                task.is_lower,
                of=lambda row, task=task: score_cell(row.scores[view.condition].get(task.name), task.metric),  # type: ignore[misc]
            )
            for task in tasks
        ]
    main = next(iter(groups), HELD_IN)
    if any(main in row.normalised.get(view.condition, {}) for row in rows):
        columns.append(
            Column(
                "experts",
                "% of experts",
                "mean as a percentage of the individual experts’ mean",
                of=lambda row: share_cell(row.normalised.get(view.condition, {}).get(main), "no mean to compare"),
            )
        )
    if any(len(row.seeds) > 1 for row in rows):
        columns.append(
            Column("seeds", "± seeds", "half the range of the mean across seeds", True, False, _spread(suite, view))
        )
    scores = "Scores in %" if not scale(suite.tasks) else "Shares in %, other metrics on their own scale"
    caption = f"{scores}, with their 95 % interval over the test rows; {condition_title(view.condition).lower()} rows."
    return rows, [*columns, COST], caption


def _spread(suite: Suite, view: View) -> Callable[[Row], Cell]:
    group = view.tasks if suite.tasks_of(view.split, view.tasks) else suite.main_group(view.split)

    def spread(row: Row) -> Cell:
        mean = row.means.get(view.condition, {}).get(group)
        if mean is None or len(row.seeds) < 2:
            why = "no mean" if mean is None else "a single seed, or a deterministic method"
            return Cell(status="none", reason=why)
        metric = scale(suite.tasks_of(view.split, group))
        value = mean.spread if metric else 100 * mean.spread
        return Cell(f"{value:.{2 if metric else 1}f}", value, note=f"seeds {', '.join(map(str, row.seeds))}")

    return spread


def _cost(suite: Suite, view: View) -> tuple[list[Row], list[Column], str]:
    split = main_split(suite)
    group = suite.main_group(split)
    rows = [row for row in suite.rows if row.split == split and view.condition in row.scores]
    rows = [row for row in rows if not row.method.startswith("expert:")]
    millions = "millions of parameters"
    columns = [
        METHOD,
        _mean_column(suite, split, group, view.condition, "Mean"),
        COST,
        Column("active", "Active, M", f"{millions} active per example", True, False,
               lambda r: plain_cell(r, r.active / 1e6, 1)),
        Column("stored", "Stored, M", f"{millions} in the whole model", True, False,
               lambda r: plain_cell(r, r.stored / 1e6, 1)),
        Column("fusing", "Fusing, s", "CPU time of fusing, fitting, adapting and tuning", True, False,
               lambda r: plain_cell(r, r.fuse_cpu_seconds, 1)),
        Column("running", "Testing, s", "time to evaluate the clean rows of all tasks", True, False,
               lambda r: plain_cell(r, r.seconds, 1)),
        Column("peak", "Peak, MB", "peak memory of the process", True, False,
               lambda r: plain_cell(r, r.peak_bytes / 1e6, 0)),
    ]  # fmt: skip
    caption = (
        f"Mean of {condition_title(view.condition).lower()} rows; cost: multiplications per forward pass, base = 1."
    )
    return rows, columns, caption


def corruptions_of(suite: Suite) -> dict[str, list[str]]:
    """Corruption → its conditions, by severity."""
    kinds: dict[str, list[str]] = {}
    for condition in suite.conditions:
        if condition != CLEAN:
            kinds.setdefault(condition.partition(":")[0], []).append(condition)
    return kinds


def _corruptions(suite: Suite, view: View) -> tuple[list[Row], list[Column], str]:
    split = main_split(suite)
    rows = [row for row in suite.rows if row.split == split and row.drop]
    kinds = corruptions_of(suite)

    def drop(conditions: Sequence[str]) -> Callable[[Row], Cell]:
        def mean(row: Row) -> Cell:
            known = [row.drop[condition] for condition in conditions if condition in row.drop]
            if len(known) < len(conditions):
                return Cell(status="none", reason=f"{len(known)} of {len(conditions)} conditions were measured")
            return share_cell(sum(known) / len(known), "")

        return mean

    every = [condition for conditions in kinds.values() for condition in conditions]
    columns = [METHOD]
    columns.append(Column("drop", "Mean drop", "mean over all corruptions and severities, in %", True, of=drop(every)))
    for name, conditions in kinds.items():
        title = name.replace("_", " ")
        columns.append(Column(f"drop.{name}", title, "mean over severities, in %", True, of=drop(conditions)))
    columns.append(_mean_column(suite, split, HELD_IN, CLEAN, "Clean"))
    caption = "Drop relative to the clean rows of the same tasks, in %, averaged over severities; lower is better."
    return rows, columns, caption


def _unseen(suite: Suite, view: View) -> tuple[list[Row], list[Column], str]:
    splits = [split for split in suite.splits if split != ALL]
    by_key: dict[str, dict[str, Row]] = {}
    for row in suite.rows:
        by_key.setdefault(row.key, {})[row.split] = row
    rows = []
    for by_split in by_key.values():
        first = next((by_split[split] for split in splits if split in by_split), None)
        if first is None and (by_split[ALL].part == FUSED or by_split[ALL].method.startswith("expert:")):
            continue
        rows.append(first or by_split[ALL])
    columns = [METHOD]

    def mean(split: str, group: str) -> Callable[[Row], Cell]:
        tasks = suite.tasks_of(split, group)

        def cell(row: Row) -> Cell:
            by_split = by_key[row.key]
            if split in by_split:
                return mean_cell(by_split[split], suite, group, CLEAN)
            if ALL in by_split and row.part != FUSED:  # it does not depend on what is fused
                scores = by_split[ALL].scores.get(CLEAN, {})
                return plain_mean([scores.get(task.name) for task in tasks], scale(tasks))
            return Cell(status="not run", reason="not run on this split")

        return cell

    for split in splits:
        for group in GROUPS:
            tasks = suite.tasks_of(split, group)
            if tasks and view.tasks in ("", group):
                hint = f"mean of {', '.join(task.name for task in tasks)}, {GROUPS[group]}"
                key = f"{split}.{GROUPS[group]}"
                title = f"{split}: {GROUPS[group]}"
                columns.append(Column(key, title, hint, suite.is_lower(tasks), of=mean(split, group)))
    caption = "Means with their 95 % interval, on clean rows. Seen: tasks whose experts were fused; unseen: all others."
    caption += " Floors and ceilings do not depend on what is fused."
    return rows, columns, caption


MAKERS = {"scores": _scores, "cost": _cost, "corruptions": _corruptions, "unseen": _unseen}


# ---------------------------------------------------------------- the table


def table_of(suite: Suite, view: View) -> Table:
    """The rows that pass the view's filters, sorted; best numbers are those among all fused models, filtered or not."""
    rows, columns, caption = MAKERS[view.show](suite, view)
    lines = [Line(row, tuple(column.of(row) for column in columns)) for row in rows]
    for index, column in enumerate(columns):
        if column.marks:
            lines = _mark_best(lines, index, column.lower)
    shown = [line for line in lines if view.has(line.row)]
    keys = [column.key for column in columns]
    sort = view.sort if view.sort.removeprefix("-") in keys else _main_sort(columns, view.show)
    sections = []
    for part, title in SECTIONS.items():
        ranked = _sorted(
            [line for line in shown if line.row.part == part], keys.index(sort.removeprefix("-")), columns, sort
        )
        if ranked:
            sections.append((title, tuple(ranked)))
    return Table(tuple(columns), tuple(sections), caption, sort)


def _main_sort(columns: Sequence[Column], show: str) -> str:
    """The main column: the first after the method; in the view of unseen tasks the first mean over these."""
    keys = [column.key for column in columns[1:]]
    unseen = [key for key in keys if show == "unseen" and key.endswith(f".{GROUPS[HELD_OUT]}")]
    return (unseen or keys or ["method"])[0]


def _mark_best(lines: list[Line], index: int, lower: bool) -> list[Line]:
    """Marks the best fused model of a column, and all whose number looks the same."""
    fused = [line for line in lines if line.row.part == FUSED and line.cells[index].value is not None]
    if len(fused) < 2:
        return lines
    values = [line.cells[index].value for line in fused]
    best = min(values) if lower else max(values)  # type: ignore[type-var]
    text = next(line.cells[index].text for line in fused if line.cells[index].value == best)

    def marked(line: Line) -> Line:
        cell = line.cells[index]
        if line.row.part != FUSED or cell.text != text:
            return line
        return replace(line, cells=(*line.cells[:index], replace(cell, best=True), *line.cells[index + 1 :]))

    # no mark if all look the same
    return [marked(line) for line in lines] if any(line.cells[index].text != text for line in fused) else lines


def _sorted(lines: Sequence[Line], index: int, columns: Sequence[Column], sort: str) -> list[Line]:
    """Best first, or worst first with a minus; missing numbers last; the variants of a method stay adjacent."""
    worst_first = sort.startswith("-")
    methods: dict[str, list[Line]] = {}
    for line in lines:
        methods.setdefault(line.row.method, []).append(line)
    variants = list(methods.values())
    if index == 0:
        return [line for group in (reversed(variants) if worst_first else variants) for line in group]
    descending = not columns[index].lower

    def best(group: list[Line]) -> float | None:
        values = [value for line in group if (value := line.cells[index].value) is not None]
        return (max(values) if descending else min(values)) if values else None

    known = [group for group in variants if best(group) is not None]
    known.sort(key=lambda group: best(group) or 0.0, reverse=descending != worst_first)
    return [line for group in [*known, *(group for group in variants if best(group) is None)] for line in group]


# ---------------------------------------------------------------- CSV


def to_csv(table: Table) -> str:
    """A table as CSV, with all digits, the ends of intervals in two further columns, and notes in the last one."""
    columns = table.columns[1:]
    has_interval = [any(line.cells[k].ci95 for line in table.lines) for k in range(1, len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = [
        name
        for column, ranged in zip(columns, has_interval, strict=True)
        for name in ([column.title, f"{column.title} low", f"{column.title} high"] if ranged else [column.title])
    ]
    writer.writerow(map(_harmless, ["section", "method", "variant", "family", "split", *head, "notes"]))
    for title, lines in table.sections:
        for line in lines:
            values: list[float | str | None] = []
            notes = []
            for column, cell, ranged in zip(columns, line.cells[1:], has_interval, strict=True):
                values += [cell.value, *((cell.ci95 or (None, None)) if ranged else ())]
                if remark := cell.note or cell.reason:
                    notes.append(f"{column.title}: {remark}")
            row = line.row
            record = [title, row.title, row.variant, row.family, row.split, *values, "; ".join(notes)]
            writer.writerow(map(_harmless, record))
    return buffer.getvalue()


def _harmless(value: float | str | None) -> float | str | None:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
