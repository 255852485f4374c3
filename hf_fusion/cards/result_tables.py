"""The tables of results on a card: the fused model beside its base and its best expert, then all else, then by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_fusion.cards.markdown import NO_BREAK_DASH, NO_BREAK_SPACE, code
from hf_fusion.evaluation.harness_results import HarnessRun, HarnessScore
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import FRUGAL, FUSED, HELD_IN, HELD_OUT, MeasuredTask, PredictorScores, Results

if TYPE_CHECKING:
    from hf_fusion.cards.facts import CardFacts

NOT_MEASURED = "not measured"
OWN_EXPERT = ("oracle", "individual experts")  # predictors that are the expert of each task
EXPLAINED = {
    "base": "the model that the experts were trained from",
    "oracle": "each task's own expert: has to be told the task",
    "individual experts": "each task's own expert: has to be told the task",
    "best in hindsight": "on each task the expert that scores best there: a choice that needs the test labels",
    "oracle expert": "the right expert for each example: an upper bound, which needs the test labels",
    "mean ensemble": "the mean of all experts' probabilities",
    "max confidence": "for each example the expert that is surest",
    "retrieval": "for each input the expert whose training examples resemble it most",
    "average activation": "routing by the mean input of each expert on its training data",
    "Arrow": "routing by the adapters' weights alone",
    "merged": "all experts at once: the mean of their updates",
    "uniform": "experts drawn at random for each token",
    "simple average": "the mean of the experts' weights",
    "task arithmetic": "the base plus the experts' task vectors, all scaled by the same number",
    "WEMoE, not adapted": "this model before its routers were trained",
    "AdaMerging by layer": "one number per layer and expert, learned without labels, the same for every input",
}
"""What a predictor is, by its name in the results."""
METRICS = {
    "accuracy": "the share of right classes",
    "exact": "the share of answers that equal the target token by token",
    "exact_match": "the share of generated texts that equal the target",
    "tokens": "the share of next tokens that are right",
    "mse": "the mean squared error, of which less is better",
}
"""What a metric is, by its name in the results."""


@dataclass(frozen=True)
class Row:
    """One predictor on a card: its scores as text, one for each column, and what it is."""

    name: str
    cells: tuple[str, ...]
    cost: float | None
    about: str
    is_model: bool = False


@dataclass(frozen=True)
class ResultTables:
    """What a card says of measurements.

    Attributes:
        columns: of the scores in `rows`: the metric, or the tasks that the mean is over, and how many rows.
        rows: this model, its best expert, its base, then all others.
        costs: whether the cost of the predictors was counted.
        tasks: headers of the scores in `by_task`; empty where a single task has rows of all experts.
        by_task: name, n, metric and scores of each task.
        n: test rows in all.
        split: of the data, where a single task was measured.
        data: its name, the same.
        in_percent: whether the scores are shares.
        metrics: name of each metric, and what it is in words; "" for one without.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    costs: bool
    tasks: tuple[str, ...]
    by_task: tuple[tuple[str, int, str, tuple[str, ...]], ...]
    n: int
    split: str
    data: str
    in_percent: bool
    metrics: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HarnessTable:
    """What a card says of one run of lm-evaluation-harness.

    Attributes:
        models: names of the models, this one first.
        rows: task, metric, few-shot examples, documents, and each model's score as text.
        version: of the harness.
        command: as Markdown; "" if it is not known.
        machine: what it ran on.
    """

    models: tuple[str, ...]
    rows: tuple[tuple[str, str, int, int, tuple[str, ...]], ...]
    version: str
    command: str
    machine: str


def harness_tables(facts: CardFacts) -> tuple[HarnessTable, ...]:
    """The runs of lm-evaluation-harness on a card."""
    return tuple(_harness_table(run) for run in (facts.measured.harness if facts.measured else ()))


def _harness_table(run: HarnessRun) -> HarnessTable:
    models = {score.predictor: "this model" if score.kind == FUSED else score.predictor for score in run.scores}
    rows: dict[tuple[str, str], dict[str, HarnessScore]] = {}
    for score in run.shown():
        rows.setdefault((score.task, score.metric), {})[score.predictor] = score
    return HarnessTable(
        tuple(models.values()),
        tuple(
            (task, metric, first.shots, first.n, tuple(str(scores.get(name, "–")) for name in models))
            for (task, metric), scores in rows.items()
            for first in [next(iter(scores.values()))]
        ),
        str(run.settings.get("lm_eval", "")),
        code(run.command) if run.command else "",
        run.machine,
    )


def result_tables(facts: CardFacts) -> ResultTables | None:
    """The tables of a card's results; None where nothing was measured."""
    results = facts.measured
    if results is None or not results.tasks:
        return None
    named = {task.metric: METRICS.get(task.metric, "") for task in results.tasks}
    first = results.tasks[0]
    columns = (
        [(first.metric, count(first.n))]
        if results.pooled
        else [_group_name(*item) for item in results.groups().items()]
    )
    best = _best_expert(results)
    by_task = () if results.pooled else _columns_by_task(results, best)
    return ResultTables(
        tuple(columns),
        tuple(_rows(results, best, bool(facts.base) and not results.pooled)),
        any(predictor.cost is not None for predictor in results.predictors),
        tuple(name for name, _ in by_task),
        tuple(
            (task.name, task.n, task.metric, tuple(cell(scores.get(task.name), task.metric) for _, scores in by_task))
            for task in results.tasks
            if by_task
        ),
        sum(task.n for task in results.tasks),
        first.split,
        first.name,
        first.metric != "mse",
        tuple(named.items()),
    )


def _group_name(group: str, tasks: Sequence[MeasuredTask]) -> tuple[str, str]:
    """The header of a mean over tasks, and how many rows."""
    n = count(sum(task.n for task in tasks))
    if len(tasks) == 1:
        return tasks[0].name, n
    whose = {HELD_IN: "of the experts", HELD_OUT: "that no expert was trained on"}[group]
    return f"mean of {len(tasks)} tasks {whose}", n


def _best_expert(results: Results) -> PredictorScores | None:
    """The best single expert on the first group of tasks that experts were measured on."""
    for group in (None,) if results.pooled else results.groups():
        try:
            return results.best("expert", group or HELD_IN)
        except ValueError:  # no expert was measured on all of its tasks
            continue
    return None


def _rows(results: Results, best: PredictorScores | None, has_base: bool) -> list[Row]:
    groups = list(results.groups())
    metric = results.tasks[0].metric

    def row(predictor: PredictorScores, about: str) -> Row:
        found = [predictor.only_score] if results.pooled else [predictor.means.get(group) for group in groups]
        cells = tuple(cell(score, metric if results.pooled else "") if score else NOT_MEASURED for score in found)
        return Row(predictor.name, cells, predictor.cost, about, predictor.kind in (FUSED, FRUGAL))

    def missing(name: str, about: str) -> Row:
        return Row(name, (NOT_MEASURED,) * max(len(groups), 1), None, about)

    fused = [predictor for predictor in results.predictors if predictor.kind in (FUSED, FRUGAL)]
    bases = [predictor for predictor in results.predictors if predictor.kind == "base"]
    others = [p for p in results.predictors if p.kind not in (FUSED, FRUGAL, "base") and p is not best]
    others.sort(key=lambda predictor: predictor.kind == "expert")  # stable: single experts last
    rows = [
        row(p, "this model" if p.kind == FUSED else "this model, with no more experts than it needs") for p in fused
    ]
    rows.append(
        row(best, "the best single expert") if best else missing("best single expert", "one expert for all tasks")
    )
    rows += [row(predictor, EXPLAINED["base"]) for predictor in bases]
    if has_base and not bases:
        rows.append(missing("base", EXPLAINED["base"]))
    return rows + [row(p, "" if p.kind == "expert" else EXPLAINED.get(p.name, "")) for p in others]


def _columns_by_task(results: Results, best: PredictorScores | None) -> tuple[tuple[str, dict[str, Score]], ...]:
    """What the table by task compares: this model, the task's own expert, the best single expert, the base."""
    by_kind: dict[str, dict[str, Score]] = {}
    for predictor in results.predictors:
        by_kind.setdefault(predictor.kind, predictor.scores)
    told = next((p.scores for p in results.predictors if p.name in OWN_EXPERT and p.kind == "oracle"), {})
    experts = {p.name: p.scores for p in results.predictors if p.kind == "expert"}
    own = {task.name: experts.get(task.owner, told).get(task.name) for task in results.tasks if task.owner}
    columns = {
        "this model": by_kind.get(FUSED, {}),
        "its own expert": {name: score for name, score in own.items() if score},
        "best single expert": best.scores if best else {},
        "base": by_kind.get("base", {}),
    }
    return tuple((name, scores) for name, scores in columns.items() if scores)


def count(rows: int) -> str:
    """How many rows, on one line."""
    return f"n = {rows:,}".replace(" ", NO_BREAK_SPACE)


def cell(score: Score | None, metric: str = "") -> str:
    """A score with its interval, on one line: in percent, or as it is for the mean squared error."""
    if score is None:
        return "–"
    form, factor = ("{:.4g}", 1) if metric == "mse" else ("{:.1f}", 100)
    low, high = (form.format(factor * end) for end in score.ci95)
    return f"{form.format(factor * score.score)}{NO_BREAK_SPACE}({low}{NO_BREAK_DASH}{high})"
