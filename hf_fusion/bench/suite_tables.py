"""The tables of a suite: pure functions of what `report.summarise` gives for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_fusion.bench.cells import ALL, CLEAN, STATUS_WORDS
from hf_fusion.bench.methods import METHODS
from hf_fusion.bench.not_applicable import reason_of
from hf_fusion.bench.report import EXPERT, FUSED, HELD_IN, HELD_OUT, PARTS
from hf_fusion.bench.suite import LOWER
from hf_fusion.bench.summary import BenchSummary, MeanSummary, MethodSummary, SuiteSummary, TaskScore, TaskSummary
from hf_fusion.bench.tables import Section, Table, TableEntry, mark_best
from hf_fusion.evaluation.intervals import Score, mean_of


@dataclass(frozen=True)
class Column:
    """One column: its heading, what it shows of a row, and whether less is better (None: nothing is best)."""

    title: str
    make: Callable[[MethodSummary], TableEntry]
    lower: bool | None = None


def title_of(row: MethodSummary) -> str:
    """What a table calls a row: its method and, beside the default, the variant."""
    return str(row["title"]) if row["variant"] == "default" else f"{row['title']}, {row['variant']}"


def rows_of(suite: SuiteSummary, split: str = ALL, condition: str = CLEAN) -> list[MethodSummary]:
    """The rows of a split that anything was run for under a condition, in the order of tables."""
    return [row for row in suite["rows"] if row["split"] == split and condition in row["scores"]]


def group_of(suite: SuiteSummary, split: str, group: str) -> list[TaskSummary]:
    """The tasks that are held-in, or held-out, in a split."""
    return [task for task in suite["tasks"] if task["name"] in suite["groups"].get(split, {}).get(group, ())]


def tables_of(suite: SuiteSummary) -> list[Table]:
    """All tables of a suite that it has numbers for."""
    made = (make(suite) for make in (main_table, corruption_table, unseen_table, cost_table))
    return [table for table in made if table is not None]


def main_table(suite: SuiteSummary) -> Table | None:
    """Methods by tasks with means, shares of the individual experts, spread over seeds and cost.

    None where no cell is of clean rows with all experts.
    """
    rows = rows_of(suite)
    if not rows:
        return None
    groups = {group: tasks for group in (HELD_IN, HELD_OUT) if (tasks := group_of(suite, ALL, group))}
    first, every = next(iter(groups)), [task for tasks in groups.values() for task in tasks]
    columns = []
    for group, tasks in groups.items():
        columns += [_task_column(task) for task in tasks]
        title = "mean" if len(groups) == 1 else f"mean, {group}"
        columns.append(_mean_column(title, tasks, lambda row, group=group: row["means"].get(CLEAN, {}).get(group)))
    captions = [f"{_metrics(every)}; ± half the 95 % interval over the {sum(task['n'] for task in every):,} test rows."]
    if any(first in row["normalised"].get(CLEAN, {}) for row in rows):
        columns.append(Column("of experts", lambda row: _percent(row["normalised"].get(CLEAN, {}).get(first), " %")))
        captions.append("of experts: the mean as a share of the individual experts' mean.")
    if any(len(row["seeds"]) > 1 for row in rows):
        columns.append(Column("± seeds", lambda row: _spread(row["means"].get(CLEAN, {}).get(first), row, every)))
        captions.append("± seeds: half the range of the mean across seeds.")
    columns.append(Column("cost", _cost))
    captions.append("cost: multiplications per forward pass, as a multiple of the base's. Bold: the best fused model.")
    return _table(f"{suite['name']}-main", f"{suite['title']}: methods and tasks", columns, rows, " ".join(captions))


def corruption_table(suite: SuiteSummary) -> Table | None:
    """The relative drop of each method by corruption, mean over severities; None where nothing was corrupted."""
    rows = [row for row in suite["rows"] if row["split"] == ALL and row["drop"]]
    if not rows:
        return None
    kinds: dict[str, list[str]] = {}
    for condition in suite["conditions"]:
        if any(condition in row["drop"] for row in rows):
            kinds.setdefault(condition.partition(":")[0], []).append(condition)
    conditions = [condition for found in kinds.values() for condition in found]
    run = {name for row in rows for condition in conditions for name in row["scores"].get(condition, {})}
    tasks = [task for task in group_of(suite, ALL, HELD_IN) if task["name"] in run]

    def drop_column(title: str, conditions: Sequence[str]) -> Column:
        return Column(
            title, lambda row: _percent(_plain_mean([row["drop"].get(condition) for condition in conditions])), True
        )

    def corrupted(row: MethodSummary) -> MeanSummary | None:
        found = [row["means"].get(condition, {}).get(HELD_IN) for condition in conditions]
        means = [mean["score"] if mean else None for mean in found]
        return None if (mean := _plain_mean(means)) is None else {"score": mean, "ci95": None, "spread": 0.0}

    columns = [
        _mean_column("clean", tasks, lambda row: mean_entry(row["scores"].get(CLEAN, {}), tasks)),
        _mean_column("corrupted", tasks, corrupted),
        *(drop_column(name.replace("_", " "), found) for name, found in kinds.items()),
        drop_column("mean drop", conditions),
    ]
    severities = sorted({severity for condition in conditions if (severity := condition.partition(":")[2])})
    over = f", averaged over severities {', '.join(severities)}" if severities else ""
    caption = (
        f"clean, corrupted: mean of {_listed(tasks)}. Other columns: drop relative to the clean rows in %{over}. "
        "Bold: the best fused model."
    )
    return _table(f"{suite['name']}-corruption", f"{suite['title']}: corrupted rows", columns, rows, caption)


def unseen_table(suite: SuiteSummary) -> Table | None:
    """What is left on tasks whose experts were not fused, beside those that were; None without such splits.

    Floors and ceilings do not depend on what is fused: where a split lacks them, all experts' rows are taken.
    """
    splits = [split for split in suite["splits"] if split != ALL]
    if not splits:
        return None
    found: dict[tuple[str, str], dict[str, MethodSummary]] = {}
    for row in suite["rows"]:
        if not row["method"].startswith(EXPERT):
            found.setdefault((row["method"], row["variant"]), {})[row["split"]] = row
    first = [next(iter(by_split.values())) for by_split in found.values()]
    rows = [row for row in first if row["part"] != FUSED or found[row["method"], row["variant"]].keys() & set(splits)]

    def in_split(row: MethodSummary, split: str) -> MethodSummary | None:
        return found[row["method"], row["variant"]].get(split)

    def column(split: str, group: str, title: str) -> Column:
        tasks = group_of(suite, split, group)

        def mean(row: MethodSummary) -> MeanSummary | None:
            if there := in_split(row, split):
                return there["means"].get(CLEAN, {}).get(group)
            if row["part"] != FUSED and (whole := in_split(row, ALL)):
                return mean_entry(whole["scores"].get(CLEAN, {}), tasks)
            return None

        return _mean_column(title, tasks, mean, lambda row: in_split(row, split))

    columns = [
        column(split, group, f"{split}: {word}")
        for split in splits
        for group, word in ((HELD_IN, "fused"), (HELD_OUT, "unseen"))
        if group_of(suite, split, group)
    ]
    caption = " ".join(
        f"{split}: the unseen tasks are {_listed(group_of(suite, split, HELD_OUT))}." for split in splits
    )
    caption += " The experts of the other tasks are fused. Means with their 95 % interval. Bold: the best fused model."
    return _table(f"{suite['name']}-unseen", f"{suite['title']}: unseen tasks", columns, rows, caption)


def cost_table(suite: SuiteSummary) -> Table | None:
    """What each measured method takes: parameters as used, time and memory of fusing and running; None without any."""
    rows = [row for row in rows_of(suite) if not row["method"].startswith(EXPERT) and _is_measured(row)]
    if not rows:
        return None

    def number(title: str, value: Callable[[MethodSummary], float], unit: float = 1) -> Column:
        return Column(title, lambda row: TableEntry(f"{value(row) / unit:,.1f}", value(row)))

    columns = [
        Column("parameters", lambda row: TableEntry(_words(row["parameters"]), json.dumps(row["parameters"]))),
        number("fusing, CPU s", lambda row: row["fuse_cpu_seconds"]),
        number("evaluation, s", lambda row: row["seconds"]),
        number("stored, M", lambda row: row["stored"], 1e6),
        number("active, M", lambda row: row["active"], 1e6),
        number("peak, MB", lambda row: row["peak_bytes"], 1e6),
        Column("cost", _cost),
    ]
    caption = (
        "fusing: including fitting, adapting and tuning. evaluation: of the clean rows of all tasks; what several "
        "methods share, such as the experts' predictions, is computed once and counted for the first of them. stored, "
        "active: millions of parameters in the whole model, and used by one example. peak: memory of the process. "
        "cost: multiplications per forward pass, as a multiple of the base's."
    )
    return _table(f"{suite['name']}-cost", f"{suite['title']}: time, memory and parameters", columns, rows, caption)


def overview_table(summary: BenchSummary) -> Table:
    """Methods by suites: the mean of the held-in tasks on clean rows (of held-out ones where there are no others).

    Where a suite has tuned variants, these stand in a column beside the defaults.
    """
    rows: dict[str, MethodSummary] = {}
    by_column: dict[str, dict[tuple[str, str], MethodSummary]] = {}  # of each method: (suite, variant) → its row there
    columns = []
    for suite in sorted(summary["suites"], key=lambda suite: -len(suite["rows"])):  # the longest decides on the order
        for row in rows_of(suite):
            if not row["method"].startswith(EXPERT):
                rows.setdefault(row["method"], {**row, "variant": "default"})
                by_column.setdefault(row["method"], {})[suite["name"], row["variant"]] = row
    for suite in summary["suites"]:
        group = HELD_IN if group_of(suite, ALL, HELD_IN) else HELD_OUT
        for variant in dict.fromkeys(["default", *(row["variant"] for row in rows_of(suite))]):
            columns.append(_overview_column(suite, variant, group, by_column))
    ordered = sorted(rows.values(), key=lambda row: PARTS.index(row["part"]))
    caption = (
        "Mean over the tasks of a suite, with its 95 % interval. Bold: the best fused model. AdaMerging, Concrete and "
        "WEMoE learn from the experts' predictions on unlabelled rows or, where the name says entropy, from the "
        "entropy of their own predictions."
    )
    if any(variant != "default" for there in by_column.values() for _, variant in there):
        caption += " Tuned: parameters chosen on the validation splits; – without a note: there are none to tune."
    return _table("overview", "Methods and suites", columns, ordered, caption)


def mean_entry(scores: Mapping[str, TaskScore], tasks: Sequence[TaskSummary]) -> MeanSummary | None:
    """The mean of some tasks' scores of one row, each over its seeds; None where one is missing."""
    found = [scores.get(task["name"], {}) for task in tasks]
    if not found or any("score" not in score for score in found):
        return None
    known = [Score(score["score"], pair) for score in found if (pair := _pair(score["ci95"]))]
    if len(known) < len(found):
        return {"score": sum(score["score"] for score in found) / len(found), "ci95": None, "spread": 0.0}
    mean = mean_of(known)
    return {"score": mean.score, "ci95": list(mean.ci95), "spread": 0.0}


# ---------------------------------------------------------------- columns and entries


def _task_column(task: TaskSummary) -> Column:
    own_scale = task["metric"] in LOWER

    def make(row: MethodSummary) -> TableEntry:
        score = row["scores"][CLEAN].get(task["name"])
        if score is None or "score" not in score:
            return TableEntry(note=_reason(score))
        text = _number(score["score"], own_scale)
        if score["ci95"] is not None:
            text += f" ±{_number((score['ci95'][1] - score['ci95'][0]) / 2, own_scale)}"
        return TableEntry(text, score["score"], _pair(score["ci95"]), note=score.get("note", ""))

    return Column(task["name"], make, own_scale)


def _mean_column(
    title: str,
    tasks: Sequence[TaskSummary],
    mean: Callable[[MethodSummary], MeanSummary | None],
    source: Callable[[MethodSummary], MethodSummary | None] = lambda row: None,
    absent: Callable[[MethodSummary], str] = lambda row: "",
) -> Column:
    """Means with their intervals; where there is none, why: as the `source` row has it, or what is `absent`."""
    own_scale = any(task["metric"] in LOWER for task in tasks)

    def make(row: MethodSummary) -> TableEntry:
        found = mean(row)
        if found is None:
            there = source(row)
            scores = there["scores"].get(CLEAN, {}) if there else {}
            missing = [task["name"] for task in tasks if "score" not in scores.get(task["name"], {})]
            if not there:
                return TableEntry(note=absent(row))
            return TableEntry(note=f"{missing[0]}: {_reason(scores.get(missing[0]))}" if missing else "")
        text, ci95 = _number(found["score"], own_scale), found["ci95"]
        if ci95 is not None:
            text += f" ({_number(ci95[0], own_scale)}–{_number(ci95[1], own_scale)})"
        return TableEntry(text, found["score"], _pair(ci95))

    return Column(title, make, own_scale)


def _overview_column(
    suite: SuiteSummary,
    variant: str,
    group: str,
    by_column: Mapping[str, Mapping[tuple[str, str], MethodSummary]],
) -> Column:
    def source(row: MethodSummary) -> MethodSummary | None:
        return by_column[row["method"]].get((suite["name"], variant))

    def mean(row: MethodSummary) -> MeanSummary | None:
        there = source(row)
        return there["means"].get(CLEAN, {}).get(group) if there else None

    def absent(row: MethodSummary) -> str:
        """Why a row has nothing in this column."""
        method = METHODS.get(row["method"])
        if variant != "default" and (method is None or method.tune is None):
            return ""
        if method is not None and suite["kind"] and suite["kind"] not in method.entries:
            return reason_of(method, suite["kind"], suite["head"])
        return "not run"

    title = suite["name"] if variant == "default" else f"{suite['name']}, {variant}"
    return _mean_column(title, group_of(suite, ALL, group), mean, source, absent)


def _table(name: str, title: str, columns: Sequence[Column], rows: Iterable[MethodSummary], caption: str) -> Table:
    """Rows in their sections, the best fused model of each column marked."""
    rows = list(rows)
    lines = [(TableEntry(title_of(row)), *(column.make(row) for column in columns)) for row in rows]
    for index, column in enumerate(columns, 1):
        if column.lower is not None:
            fused = [k for k, row in enumerate(rows) if row["part"] == FUSED]
            for k, line in zip(fused, mark_best([lines[k] for k in fused], index, column.lower), strict=True):
                lines[k] = line
    sections: dict[str, list[tuple[TableEntry, ...]]] = {}
    for row, line in zip(rows, lines, strict=True):
        sections.setdefault(row["section"], []).append(line)
    made = tuple(Section(heading, tuple(rows)) for heading, rows in sections.items())
    return Table(name, title, ("method", *(column.title for column in columns)), made, caption)


def _is_measured(row: MethodSummary) -> bool:
    return any("score" in score for scores in row["scores"].values() for score in scores.values())


def _cost(row: MethodSummary) -> TableEntry:
    return TableEntry(f"{row['cost']:.2f}", row["cost"]) if _is_measured(row) else TableEntry()


def _spread(mean: MeanSummary | None, row: MethodSummary, tasks: Sequence[TaskSummary]) -> TableEntry:
    """Half the range over seeds; nothing of one seed."""
    if mean is None or len(row["seeds"]) < 2:
        return TableEntry()
    return TableEntry(_number(mean["spread"], any(task["metric"] in LOWER for task in tasks)), mean["spread"])


def _percent(share: float | None, unit: str = "") -> TableEntry:
    return TableEntry() if share is None else TableEntry(f"{100 * share:.1f}{unit}", share)


def _number(value: float, own_scale: bool) -> str:
    """A share in percent, or a number on its own scale."""
    text = f"{value:.2f}" if own_scale else f"{100 * value:.1f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _pair(ci95: Sequence[float] | None) -> tuple[float, float] | None:
    return None if ci95 is None else (ci95[0], ci95[1])


def _plain_mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _reason(score: TaskScore | None) -> str:
    if score is None:
        return "not run"
    status, reason = score["status"], score["reason"]
    return reason if reason.startswith(status) else f"{STATUS_WORDS.get(status, status)}: {reason}"


def _listed(tasks: Iterable[TaskSummary]) -> str:
    return ", ".join(task["name"] for task in tasks)


def _metrics(tasks: Sequence[TaskSummary]) -> str:
    """What the numbers are: "accuracy, matthews (cola) in %"."""
    by_metric: dict[str, list[str]] = {}
    for task in tasks:
        by_metric.setdefault(task["metric"], []).append(task["name"])
    common = max(by_metric, key=lambda metric: len(by_metric[metric]))
    names = [f"{metric.replace('_', ' ')}{'' if metric in LOWER else ' in %'}" for metric in by_metric]
    listed = [f" ({', '.join(by_metric[metric])})" if metric != common else "" for metric in by_metric]
    return ", ".join(f"{name}{which}" for name, which in zip(names, listed, strict=True))


def _words(parameters: Mapping[str, Any]) -> str:
    """Parameters on a line; of long lists the first values."""

    def word(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, Mapping):
            return f"({_words(value)})"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(word, value[:3]))}{', …' if len(value) > 3 else ''}]"
        return str(value)

    return ", ".join(f"{name} {word(value)}" for name, value in parameters.items())
