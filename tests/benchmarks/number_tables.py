"""What the tables and phrases of README are made of: functions of the JSON files of a source, as they were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_fusion.bench.cells import read_cells
from hf_fusion.bench.report import summarise
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import HELD_IN, PredictorScores, Results

Read = Sequence[Any]
"""The content of a source's files, in their order; of a folder, its path."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right."""
    head = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def percent(share: float) -> str:
    """84.8 for 0.8479."""
    return f"{100 * share:.1f}"


def within(interval: Sequence[float], digits: int = 0) -> str:
    """(84–86) for the interval (0.8363, 0.8582)."""
    return f"({'–'.join(f'{100 * end:.{digits}f}' for end in interval)})"


def scored(score: Score) -> str:
    """84.8 (84–86)."""
    return f"{percent(score.score)} {within(score.ci95)}"


def pooled_share(results: Results, name: str) -> float:
    """What a predictor scored on the only task."""
    return results[name].only_score.score


# ---------------------------------------------------------------- README's table of headline results


def headline_table(read: Read, general: Sequence[str]) -> str:
    """One row for each family: the fused model, and what it competes with on the same rows.

    Args:
        read: the JSON files of the demos and of the suite of fine-tunes.
        general: the row of the suite with held-out tasks.
    """
    digits, phatgoose, wemoe = map(Results.from_dict, (read[0], read[1]["results"], read[2]["runs"][0]))
    fused, frugal = digits["FoE"], digits["FoE, frugal"]
    best, ensemble = digits.best("expert"), digits["mean ensemble"]
    routed = {predictor.name: predictor.means.get(HELD_IN) for predictor in phatgoose.predictors}
    merged = {predictor.name: predictor.means[HELD_IN] for predictor in wemoe.predictors}
    rows_of = [f"{sum(task.n for task in results.tasks):,}" for results in (digits, phatgoose, wemoe)]
    rows = [
        [
            "FoE: 8 digit classifiers",
            rows_of[0],
            scored(fused.only_score),
            f"best expert {scored(best.only_score)}, mean ensemble {scored(ensemble.only_score)}",
        ],
        [f"FoE, frugal, {100 * frugal.cost:.0f} % of the cost", rows_of[0], scored(frugal.only_score), "the same"],
        [
            "PHATGOOSE: 5 LoRA adapters of SmolLM2-135M, task unknown",
            rows_of[1],
            scored(routed["PHATGOOSE"]),
            f"mean of the adapters {scored(routed['merged'])}, each task's own adapter {scored(routed['oracle'])}",
        ],
        general,
        [
            "WEMoE: 8 fine-tunes of MiniLM, no labels",
            rows_of[2],
            scored(merged["WEMoE"]),
            f"TIES, tuned {scored(merged['TIES, λ tuned'])}, "
            f"each task's own expert {scored(merged['individual experts'])}",
        ],
    ]
    return table(["fused", "test rows", "accuracy", "on the same rows"], rows)


# ---------------------------------------------------------------- the demos and their cards


def demo_table(read: Read) -> str:
    """The predictors of `hf-fusion demo`, as the command prints them."""
    results = Results.from_dict(read[0])
    rows = [[row["predictor"].rpartition("/")[2], *map(str.strip, list(row.values())[1:])] for row in results.table()]
    return table(["system", "accuracy", "95 % interval", "cost"], rows)


def demo_phrases(read: Read) -> list[str]:
    """What README says of `hf-fusion demo` in words."""
    results, seeds = Results.from_dict(read[0]), read[2]
    frugal, best = results["FoE, frugal"], results.best("expert")
    machine = results.machine.replace("1 CPU threads", "1 CPU thread")
    shares = [f"{p.only_score.score:.0%}".replace("%", " %") for p in (results["FoE"], best, frugal)]
    return [
        f"is right on {shares[0]} of the digits, the best expert alone on {shares[1]}; the frugal fusion on "
        f"{shares[2]} at {100 * frugal.cost:.0f} % of the cost",
        f"by `{results.command}` on {machine}; n = {results.tasks[0].n:,} held-out images",
        f"With three seeds FoE comes to {spread(seeds, 'FoE')} and its frugal variant to "
        f"{spread(seeds, 'FoE, frugal')}",
        f"takes about {seeds['cpu_seconds']} CPU seconds after installation",
    ]


def spread(seeds: Mapping[str, Any], system: str) -> str:
    """The scores of some seeds: 67.0, 67.5 and 68.0 %."""
    scores = [own[system] for own in seeds["scores"].values()]
    *first, last = [percent(own["accuracy"] if isinstance(own, dict) else own) for own in scores]
    return f"{', '.join(first)} and {last} %"


# ---------------------------------------------------------------- FoE on text, and what its forward costs

FOE_TEXT = {
    "tasks-8": "selection over 8 tasks, pooled without saying which",
    "banking-groups": "77 intents, 7 experts of 11 each",
    "snips-specialists": "",
}


def foe_text_table(read: Read) -> str:
    """FoE and its rivals on three suites of text."""
    rows = []
    for (suite, said), content in zip(FOE_TEXT.items(), read, strict=True):
        results = Results.from_dict(content)
        if not said:
            share = pooled_share(results, "FoE, frugal")
            said = f"frugal {percent(share)}% at {results['FoE, frugal'].cost:.0%} of the cost"
        others = ("mean ensemble", "max confidence", results.best("expert").name, "oracle expert")
        cells = [f"{percent(pooled_share(results, name))}%" for name in ("FoE", *others)]
        cells[0] += f" {within(results['FoE'].only_score.ci95, 1)}"
        rows.append([f"{suite}: {said}", f"{results.tasks[0].n:,}", *cells])
    return table(["suite", "n", "FoE", "mean ensemble", "max confidence", "best expert", "oracle"], rows)


def foe_text_phrases(read: Read) -> list[str]:
    """How far three seeds differ."""
    seeds = [
        [score if isinstance(score, float) else score[0] for score in own["seeds"]["foe"].values()] for own in read
    ]
    return [f"FoE on three seeds differs by up to {100 * max(max(own) - min(own) for own in seeds):.1f} points"]


def foe_forward_phrases(read: Read) -> list[str]:
    """What FoE's forward costs, of its experts' own."""
    text, images, adapters = (f"{row['ratio']:.2f}" for row in read[0]["rows"].values())
    batch, experts, repeats = (read[0][name] for name in ("batch", "experts", "repeats"))
    return [
        f"A forward costs {text} (text) and {images} (images) of the experts' own forwards one after the other, "
        f"{adapters} with adapters of one base, against PEFT",
        f"batch {batch}, {experts} experts, one thread, least of {repeats}",
    ]


def discovery_phrases(read: Read) -> list[str]:
    """What finding and checking many adapters of one base takes, and lists of the embedded Hub."""
    content = read[0]
    fast, slow = content["fast"], content["slow"]
    lists = {name: min(run[name] for run in content["lists"]) for name in content["lists"][0]}
    cold, page = lists.pop("cold_cpu_s"), 1000 * max(lists.values())
    each, seconds = fast["requests"] / fast["found"], slow["discover_s"] + slow["check_s"]
    return [
        f"{content['experts']:,} adapters of one base are found and checked with {each:.0f} requests each: "
        f"{fast['discover_cpu_s']:.1f} CPU s to find them, {fast['check_cpu_s']:.1f} to check them, and "
        f"{seconds:.0f} s in all where every answer takes {1000 * slow['delay_s']:.0f} ms",
        f"lists as many repos {cold:.1f} CPU s after a start, and a page in at most {page:.0f} ms",
    ]


# ---------------------------------------------------------------- static merging


def merging_table(read: Read) -> str:
    """What a merge takes, by method."""
    rows = [
        [
            f"`{row['method']}`",
            f"{row['ratio']:.2f}",
            f"{row['seconds'] / row['floor']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['process_seconds']:.1f}",
            str(row["mb"]),
        ]
        for row in read[0]["rows"]
    ]
    return table(["", "÷ safetensors", "÷ fastest", "merge, CPU s", "whole command, CPU s", "peak MB"], rows)


def merging_phrases(read: Read) -> list[str]:
    """How long the two floors take."""
    rows = read[0]["rows"]
    copied = [row["safetensors"] for row in rows]
    five = [row["floor"] for row in rows if row["method"] != "slerp"]  # which merges two
    return [
        f"as many saved ({min(copied):.1f} to {max(copied):.1f} s)",
        f"the fastest way that was found ({sum(five) / len(five):.1f} s for five models)",
    ]


def mergekit_table(read: Read) -> str:
    """The same beside mergekit."""
    rows = [
        [
            f"`{row['method']}`",
            f"{row['process_seconds']:.1f}",
            f"{row['peer_seconds']:.1f}",
            str(row["mb"]),
            f"{row['peer_mb']:,}",
        ]
        for row in read[0]["rows"]
    ]
    return table(["", "whole command, CPU s", "mergekit's", "peak MB", "mergekit's"], rows)


def long_merging_phrases(read: Read) -> list[str]:
    """Methods that decompose every matrix."""
    rows = [row for content in read for row in content["rows"]]
    times = {row["method"]: (f"{row['seconds']:.0f}", f"{row['mb']} MB") for row in rows}
    (c, tsv, cts, wudi) = (times[name] for name in ("iso_c", "tsv_m", "iso_cts", "wudi"))
    return [
        f"`iso_c` {c[0]} CPU s and {c[1]}, `tsv_m` {tsv[0]} s and {tsv[1]}, `iso_cts` {cts[0]} s and {cts[1]}",
        f"`wudi`, 300 steps of Adam, {wudi[0]} s and {wudi[1]}",
    ]


def peers_phrases(read: Read) -> list[str]:
    """How many cases agree with the peers'."""
    agree = [case for case in read[0] if case["agrees"]]
    rounded = [case for case in agree if case["case"] in ("gates from hidden states", "gates from averages")]
    return [
        f"[{len(agree) - len(rounded)} of {len(read[0])} cases](../../tests/peers/agreement.json) agree to the "
        "rounding of float32",
        f"[the other {len(read[0]) - len(agree)}](../../tests/peers/README.md)",
    ]


# ---------------------------------------------------------------- WEMoE

WEMOE_NAMES = {
    "individual experts": "individual experts",
    "WEMoE": "WEMoE",
    "AdaMerging by layer, taught by the experts": "AdaMerging, by layer",
    "TIES": "TIES, λ tuned",
    "task arithmetic": "task arithmetic, λ tuned",
    "WEMoE, not adapted": "WEMoE, not adapted",
    "base under the experts' heads": "base",
    "simple average": "simple average",
}


def wemoe_table(read: Read) -> str:
    """WEMoE and what it is compared with on eight fine-tunes."""
    first, means = Results.from_dict(read[0]["runs"][0]), read[0]["conditions"]["clean"]
    best = max(row["mean"] for name, row in means.items() if name != "individual experts")
    rows = []
    for shown, name in WEMOE_NAMES.items():
        if (tuned := first.settings["adaptations"].get(name, {}).get("scaling")) is not None:
            shown = f"{shown}, λ tuned: {tuned:g}".replace("0.", ".")
        mean = means[name]["mean"]
        number = f"**{percent(mean)}**" if mean == best else percent(mean)
        rows.append([shown, f"{number} {within(first[name].means[HELD_IN].ci95)}", percent(means[name]["normalised"])])
    return table(["", "mean", "of the experts'"], rows)


def wemoe_phrases(read: Read) -> list[str]:
    """What README says of the table in words."""
    found, results = read
    first = Results.from_dict(found["runs"][0])
    lead = {name: first[name].lead[HELD_IN] for name in ("AdaMerging, by layer", "TIES, λ tuned")}
    (suite,) = summarise(cell for cell in read_cells(results) if cell.suite == "minilm-8")["suites"]
    overshot = next(
        row
        for row in suite["rows"]
        if (row["method"], row["variant"], row["split"]) == ("task_arithmetic", "default", "all")
    )
    ahead = [percent(score.score) for score in lead.values()]
    return [
        f"n = {sum(task.n for task in first.tasks):,} test rows",
        f"WEMoE is {ahead[0]} points {within(lead['AdaMerging, by layer'].ci95, 1)} above AdaMerging and {ahead[1]} "
        f"{within(lead['TIES, λ tuned'].ci95, 1)} above TIES",
        f"at the usual .3 task arithmetic has {percent(overshot['means']['clean'][HELD_IN]['score'])}",
    ]


UNSEEN = ("unseen-skewed", "unseen-wide", "unseen-few")


def unseen_table(read: Read) -> str:
    """What defaults come to on suites that none was chosen on, and the best static merge of each."""
    runs = [Results.from_dict(found["runs"][0]) for found in read]
    experts = [run["individual experts"].means[HELD_IN].score for run in runs]
    learned = ("WEMoE", "AdaMerging, by layer", "WEMoE, not adapted")
    best = [
        max(
            (p for p in run.predictors if p.kind == "baseline" and p.name not in learned),
            key=lambda p: p.means[HELD_IN].score,
        )
        for run in runs
    ]

    def cell(found: PredictorScores, expert: float) -> str:
        mean = found.means[HELD_IN]
        return f"{percent(mean.score)} {within(mean.ci95)}, {percent(mean.score / expert)}"

    rows = [["individual experts", *(percent(own) for own in experts)]]
    for name, shown in {
        "WEMoE": "**WEMoE**",
        "AdaMerging, by layer": "AdaMerging by layer",
        "WEMoE, not adapted": "WEMoE, not adapted",
        "Task arithmetic": "task arithmetic",
        "TIES": "TIES",
        "base": "base under the experts' heads",
    }.items():
        rows.append([shown, *(cell(run[name], own) for run, own in zip(runs, experts, strict=True))])
    rows.insert(
        3, ["best of all static merges", *(f"{cell(p, own)} ({p.name})" for p, own in zip(best, experts, strict=True))]
    )
    return table(["", *(f"`{suite}`" for suite in UNSEEN)], rows)


def per_input_table(read: Read) -> str:
    """What merging for every input costs, by batch."""
    rows = read[0]["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = {"exact": "exact", "bfloat16": "bfloat16", "low-rank-bfloat16": "rank 32, factors in bfloat16"}
    cells = {(row["what"], row["batch"]): f"{row['ratio']:.2f}" for row in rows}
    shown = [
        [names[name], *(cells[name, batch] for batch in batches)]
        for name in dict.fromkeys(r["what"] for r in rows)
        if name in names
    ]
    return table(["task vectors, batch", *map(str, batches)], shown)


def per_input_phrases(read: Read) -> list[str]:
    """What a step of adaptation costs, and the range of all forwards."""
    forwards = [row["ratio"] for row in read[0]["rows"] if "step" not in row["what"]]
    steps = [f"{row['ratio']:.2f} (batch {row['batch']})" for row in read[0]["rows"] if row["what"] == "exact step"]
    return [
        f"A step of adaptation takes {' and '.join(steps)} times a forward and backward of the dense model",
        f"{min(forwards):.1f} to {max(forwards):.1f} forwards of the dense model",
    ]
