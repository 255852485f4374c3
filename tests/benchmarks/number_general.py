"""What the tables about the suite `smollm-general` are made of, as in `number_tables`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from number_tables import Read, percent, scored, table, within

from hf_fusion.bench.cells import Cell, read_cells
from hf_fusion.bench.paired import leads
from hf_fusion.evaluation.intervals import Score, mean_of
from hf_fusion.evaluation.results import HELD_IN, HELD_OUT

SUITE = "smollm-general"
OURS = ("phatgoose", "default")
WAYS = ("alone", "reworded", "second", "mixed")
# (method, variant) -> what the table calls it; the static merges follow, with and without tuning
SHOWN = {
    ("pretrained", "default"): "base",
    ("individual", "default"): "each task's own expert (oracle)",
    OURS: "**PHATGOOSE**",
    ("phatgoose_paper", "default"): "PHATGOOSE, paper's gates",
    ("retrieval", "default"): "retrieval",
    ("average_activation", "default"): "average activation",
    ("arrow", "default"): "Arrow",
    ("uniform", "default"): "uniform routing",
    ("foe_selection", "default"): "FoE, selection",
    ("average", "default"): "average",
    ("task_arithmetic", "default"): "task arithmetic",
    ("task_arithmetic", "tuned"): "task arithmetic, tuned",
    ("ties", "default"): "TIES",
    ("ties", "tuned"): "TIES, tuned",
    ("tsv_m", "default"): "TSV-M",
    ("tsv_m", "tuned"): "TSV-M, tuned",
}
EXPERT = "expert:"


def general_cells(folder: Path) -> list[Cell]:
    """The measured cells of the suite."""
    path = folder / f"{SUITE}.jsonl"
    return [cell for cell in read_cells(path) if cell.status == "measured"]


def general_tasks(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Group or way of asking → its tasks."""
    groups: dict[str, list[str]] = {name: [] for name in (HELD_IN, *WAYS, HELD_OUT)}
    for task, group in {cell.task: cell.group for cell in cells if (cell.method, cell.variant) == OURS}.items():
        groups[group].append(task)
        if group == HELD_IN:
            way = task.rpartition("-")[2]
            groups[way if way in WAYS else "alone"].append(task)
    return groups


def general_means(
    cells: Sequence[Cell], groups: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], dict[str, Score]]:
    """(method, variant) → group → mean over its tasks, for the groups that the method has all tasks of."""
    scores: dict[tuple[str, str], dict[str, Score]] = {}
    for cell in cells:
        assert cell.score is not None and cell.ci95 is not None
        scores.setdefault((cell.method, cell.variant), {})[cell.task] = Score(cell.score, cell.ci95)
    return {
        key: {
            group: mean_of([found[task] for task in tasks])
            for group, tasks in groups.items()
            if found.keys() >= set(tasks)
        }
        for key, found in scores.items()
    }


def _hindsight(cells: Sequence[Cell], tasks: Sequence[str], transfer: Mapping[str, Mapping[str, str]]) -> Score:
    """On held-out tasks, the expert that is best on validation rows of each task."""
    found = {(cell.method, cell.task): cell for cell in cells}
    chosen = [found[EXPERT + transfer[task]["best"], task] for task in tasks]
    return mean_of([Score(cell.score or 0.0, cell.ci95 or (0.0, 1.0)) for cell in chosen])


def scores_table(read: Read) -> str:
    """All methods on all ways of asking, and PHATGOOSE's lead over each on the same rows."""
    cells, transfer = general_cells(Path(read[0])), read[1]["tasks"]
    groups = general_tasks(cells)
    means = general_means(cells, groups)
    ahead = {group: leads(cells, OURS[0], groups[group]) for group in (HELD_IN, HELD_OUT)}
    experts = [key for key in means if key[0].startswith(EXPERT)]
    best = max(experts, key=lambda key: means[key][HELD_IN].score)
    rows = []
    for key, name in {**SHOWN, best: f"best single expert ({best[0].removeprefix(EXPERT)})"}.items():
        if key not in means:
            continue
        mean = means[key]
        values = [scored(mean[HELD_IN]), *(percent(mean[way].score) for way in WAYS)]
        out = scored(mean[HELD_OUT]) if HELD_OUT in mean else "–"
        if key[0] == "individual":
            out = f"{scored(_hindsight(cells, groups[HELD_OUT], transfer))} (best on validation rows)"
        lead = [_lead(ahead[group][key]) if key in ahead[group] and key != OURS else "–" for group in ahead]
        if key[0] == "individual":
            lead[1] = "–"
        rows.append([name, *values, out, *lead])
    columns = ["", HELD_IN, *WAYS, HELD_OUT, "PHATGOOSE's lead, held-in", "held-out"]
    return table(columns, rows)


def _lead(lead: Score) -> str:
    low, high = lead.ci95
    return f"{100 * lead.score:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def transfer_table(read: Read) -> str:
    """The held-out tasks that an expert helps on, and those that none does."""
    rows = []
    found = sorted(read[0]["tasks"].items(), key=lambda pair: -pair[1]["lead"])
    for name, task in found:
        if task["accepted"]:
            lead = f"{percent(task['lead'])} {within(task['ci95'])}"
            rows.append([name, str(task["n"]), percent(task["base"]), task["best"], percent(task["score"]), lead])
    failed = ", ".join(f"{name} ({100 * task['lead']:+.1f})" for name, task in found if not task["accepted"])
    columns = ["held-out task", "n", "base", "best expert", "its score", "lead in points"]
    return f"{table(columns, rows)}\n\nNot accepted, with the lead of the best expert: {failed}."


def phrases(read: Read) -> list[str]:
    """How many rows there are, and how far PHATGOOSE is from the experts."""
    cells = general_cells(Path(read[0]))
    groups = general_tasks(cells)
    means = general_means(cells, groups)
    ours = [cell for cell in cells if (cell.method, cell.variant) == OURS]
    held_in, held_out = (sum(cell.n for cell in ours if cell.group == group) for group in (HELD_IN, HELD_OUT))
    routed, own = means[OURS], means["individual", "default"]
    shares = [f"{100 * routed[group].score / own[group].score:.0f}" for group in (HELD_IN, *WAYS)]
    return [
        f"{held_in:,} held-in and {held_out:,} held-out rows",
        f"{shares[0]} % of what each task's own expert has; asked alone {shares[1]} %, reworded {shares[2]} %, as a "
        f"second turn {shares[3]} %, beside another question {shares[4]} %",
    ]


def headline_row(folder: Path) -> list[str]:
    """The held-out tasks, for README's table."""
    cells = general_cells(folder)
    groups = general_tasks(cells)
    means = general_means(cells, groups)
    base, merged = (scored(means[key, "default"][HELD_OUT]) for key in ("pretrained", "average"))
    rows = sum(cell.n for cell in cells if (cell.method, cell.variant) == OURS and cell.group == HELD_OUT)
    experts = sum(key[0].startswith(EXPERT) for key in means)
    name = f"PHATGOOSE: {experts} LoRA adapters, {len(groups[HELD_OUT])} tasks that none was trained on"
    return [name, f"{rows:,}", scored(means[OURS][HELD_OUT]), f"base {base}, mean of the adapters {merged}"]
