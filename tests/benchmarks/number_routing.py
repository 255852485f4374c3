"""What the tables and phrases about PHATGOOSE are made of, as in `number_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from number_tables import Read, percent, scored, spread, table, within

from hf_fusion.evaluation.intervals import Score, mean_of
from hf_fusion.evaluation.results import HELD_IN, HELD_OUT, MeasuredTask, Results

WHITENED, PAPER = "whitened gates", "paper's gates"
PHATGOOSE_COLUMNS = (
    "base",
    "PHATGOOSE",
    PAPER,
    WHITENED,
    "retrieval",
    "average activation",
    "Arrow",
    "merged",
    "uniform",
)
SECOND = ", asked second"


def phatgoose_rows(*runs: Mapping[str, Any]) -> dict[str, tuple[int, dict[str, Score]]]:
    """Group of tasks → rows, and the mean of every predictor of runs on the same tasks, and of the best expert."""
    results = Results.from_dict(runs[0])
    results.predictors += [predictor for run in runs[1:] for predictor in Results.from_dict(run).predictors]
    predictors = results.predictors
    held_in = [task for task in results.tasks if task.owner]
    groups: dict[str, list[MeasuredTask]] = {
        HELD_IN: held_in,
        "… asked alone": [task for task in held_in if not task.name.endswith(SECOND)],
        "… asked second": [task for task in held_in if task.name.endswith(SECOND)],
        HELD_OUT: [task for task in results.tasks if not task.owner],
    }
    found = {}
    for group, tasks in groups.items():
        means = {
            p.name: mean_of([p.scores[task.name] for task in tasks]) for p in predictors if tasks[0].name in p.scores
        }
        if any(predictor.kind == "expert" for predictor in predictors):
            means["best expert"] = means[results.best("expert").name]
        found[group] = (sum(task.n for task in tasks), means)
    return found


def phatgoose_table(read: Read) -> str:
    """PHATGOOSE by each kind of gates, and every baseline of its paper, on twenty tasks."""
    whitened, uniform, gaussian, paper = read
    runs = [_renamed(whitened, WHITENED), uniform, gaussian, _renamed(paper, PAPER)]
    columns = (*PHATGOOSE_COLUMNS, "best expert", "oracle")
    intervals = ("PHATGOOSE", "retrieval", "average activation")
    rows = []
    for group, (n, means) in phatgoose_rows(*runs).items():
        out = group == HELD_OUT
        best = max(means[name].score for name in PHATGOOSE_COLUMNS if name in means)
        cells = []
        for name in columns:
            if name not in means:
                cells.append("–")
                continue
            number = percent(means[name].score)
            number = f"**{number}**" if not out and means[name].score == best else number
            shown = out and name != "oracle" or name in intervals
            cells.append(f"{number} {within(means[name].ci95)}" if shown else number)
        rows.append([group, str(n), *cells])
    return table(["", "n", *columns], rows)


def phatgoose_phrases(read: Read) -> list[str]:
    """What no routing helps with."""
    hindsight = Results.from_dict(read[0])["best in hindsight"].means[HELD_OUT].score
    return [f"chosen in hindsight for each task, comes to {percent(hindsight)}"]


def _renamed(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A run whose router has gates of another kind than the default."""
    systems = [{**row, "name": name if row["name"] == "PHATGOOSE" else row["name"]} for row in run["systems"]]
    return {**run, "systems": systems}


def phatgoose_minilm_phrases(read: Read) -> list[str]:
    """All kinds of gates on MiniLM's classifiers."""
    gaussian, plain, whitened = (scored(Results.from_dict(file)["PHATGOOSE"].means[HELD_IN]) for file in read)
    oracle = percent(Results.from_dict(read[0])["oracle"].means[HELD_IN].score)
    return [
        f"[{gaussian}](../../tests/benchmarks/results/phatgoose_minilm.json) with Gaussian gates, where the oracle "
        f"has {oracle},",
        f"[{plain}](../../tests/benchmarks/results/phatgoose_minilm_paper.json) with the paper's gates",
        f"[{whitened}](../../tests/benchmarks/results/phatgoose_minilm_whitened.json) with whitened ones, n = "
        f"{sum(task['n'] for task in read[0]['tasks'])}",
    ]


def phatgoose_demo_phrases(read: Read) -> list[str]:
    """What README says of `hf-fusion demo phatgoose`."""
    card, seeds = read
    names, owners = card["routing"]["experts"], card["routing"]["owners"]
    own = [
        row[names.index(owners[task])]
        for task, row in zip(card["routing"]["tasks"], card["routing"]["weights"], strict=True)
    ]
    results = Results.from_dict(card["results"])
    means = {predictor.name: predictor.means[HELD_IN] for predictor in results.predictors}
    n = sum(task.n for task in results.tasks)
    return [
        f"on each of five tasks {100 * min(own):.0f} to {100 * max(own):.0f} % of the routing weight",
        f"right answers to {scored(means['PHATGOOSE'])} % of {n} questions, where the experts told whose task it is "
        f"come to {percent(means['oracle'].score)} and their mean to {percent(means['merged'].score)}",
        f"with three seeds of the gates that it trains it comes to {spread(seeds, 'PHATGOOSE')}",
        f"in about {seeds['cpu_seconds']:.0f} CPU seconds",
    ]


def routing_table(read: Read) -> str:
    """What routing costs, by the number of experts."""
    rows = read[0]["rows"]
    cells = [
        [
            f"{row[f'router {job}']:.2f}" + (f" ({row[f'arrow {job}']:.2f})" if f"arrow {job}" in row else "")
            for row in rows
        ]
        for job in ("forward", "token")
    ]
    return table(
        ["experts", *(str(row["experts"]) for row in rows)],
        [["forward", *cells[0]], ["token of a generation", *cells[1]]],
    )


def routing_phrases(read: Read) -> list[str]:
    """The same with SmolLM2's shape, and the range of all forwards."""
    (row,) = read[1]["rows"]
    forwards = [row["router forward"] for content in read for row in content["rows"]]
    return [
        f"{row['experts']} experts (`--smollm2`) it is {row['router forward']:.2f} and {row['router token']:.2f}",
        f"{min(forwards):.1f} to {max(forwards):.1f} forwards of the base",
    ]


def serving_phrases(read: Read) -> list[str]:
    """What serving adds to a call of `generate`, what batches gain, and whether answers are the model's own."""
    found = read[0]
    load = found["load"]
    return [
        f"one client alone waits {found['overhead']:.2f} times as long as `generate()` takes, and 16 clients at once "
        f"get {found['throughput']:.1f} times as many answers as one after the other",
        f"For {load['seconds']:.0f} seconds {load['clients']} clients got {load['answers']:,} answers without an "
        f"error; {load['ties'] + load['wrong']} of them were not those that",
    ]
