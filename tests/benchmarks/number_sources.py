"""The manifest of `write_numbers.py`: where each figure of README, docs and cards comes from, and what measures it.

A figure stands in a block, a table between the markers ``<!-- numbers-NAME:begin -->`` and
``<!-- numbers-NAME:end -->``, or in a phrase, a piece of a sentence as it is written in the document. Both are
functions of the JSON files alone (`number_tables.py`, `number_routing.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fusion.bench.cells import read_cells
from hf_fusion.bench.pages import README_SECTION, readme_block

sys.path.append(str(Path(__file__).parent))
import number_general as general
import number_routing as routing
import number_tables as tables
from number_tables import Read

ROOT = Path(__file__).parents[2]
MEASURED = "tests/benchmarks/results"


@dataclass(frozen=True)
class Source:
    """Where some figures come from.

    Attributes:
        files: what holds them, as seen from the project's folder.
        commands: what measures them again; ``{data}`` is the folder of data sets.
        rows: what was measured on, and how far seeds or repetitions differ.
        minutes: what that takes on one quiet core.
        block: the table between the markers, or None.
        phrases: pieces of sentences with figures in them.
        section: name of the markers, where it is not ``numbers-NAME``.
    """

    files: tuple[str, ...]
    commands: tuple[str, ...]
    rows: str
    minutes: int
    block: Callable[[Read], str] | None = None
    phrases: Callable[[Read], list[str]] | None = None
    section: str = ""

    def read(self) -> Read:
        """The content of its files."""
        paths = [ROOT / name for name in self.files]
        return [path if path.is_dir() else json.loads(path.read_text(encoding="utf-8")) for path in paths]


BENCHMARKS = "{python} tests/benchmarks"
SUITES = f"{BENCHMARKS}/wemoe_suites.py --data {{data}}"
EIGHT = f"{SUITES} --suite minilm-8 --limit 500"


def demo(name: str, rows: str, minutes: int, **shown: Any) -> Source:
    """A demo with three seeds; its card is that of the first."""
    files = (f"model_cards/{name}.json", f"{MEASURED}/demo_{name}.json")
    return Source(**{"files": files, **shown}, rows=rows, minutes=minutes, commands=(f"{BENCHMARKS}/demos.py {name}",))


SOURCES = {
    "headline": Source(
        ("docs/results.json", "model_cards/phatgoose.json", f"{MEASURED}/wemoe_minilm8.json", "results"),
        (),
        "first seeds of demo-foe, demo-phatgoose, general-text and wemoe-suites, which have the commands",
        0,
        lambda read: tables.headline_table(read[:3], general.headline_row(read[3])),
    ),
    "demo-foe": demo(
        "foe",
        "1,597 test images; three seeds of the fuser",
        5,
        files=("docs/results.json", "model_cards/foe.json", f"{MEASURED}/demo_foe.json"),
        block=tables.demo_table,
        phrases=tables.demo_phrases,
    ),
    "demo-phatgoose": demo(
        "phatgoose",
        "200 test rows, 40 of each of five tasks; three seeds of the gates that it trains",
        12,
        phrases=routing.phatgoose_demo_phrases,
    ),
    "demo-wemoe": demo("wemoe", "1,600 test pictures, 400 of each of four tasks; three seeds of the routers", 8),
    "card-merge": Source(
        ("model_cards/merge.json",),
        (f"{BENCHMARKS}/merge_card.py",),
        "120 test rows, 40 of each of three tasks; nothing in it is random",
        2,
    ),
    "foe-text": Source(
        tuple(f"{MEASURED}/foe_text_{suite}.json" for suite in tables.FOE_TEXT),
        tuple(f"{BENCHMARKS}/foe_text.py --data {{data}} --suite {suite}" for suite in tables.FOE_TEXT),
        "the test rows that the table counts; the first of three seeds",
        30,
        tables.foe_text_table,
        tables.foe_text_phrases,
    ),
    "foe-forward": Source(
        (f"{MEASURED}/foe_forward.json",),
        (f"{BENCHMARKS}/foe_forward.py --output {MEASURED}/foe_forward.json",),
        "least of 7 runs",
        2,
        phrases=tables.foe_forward_phrases,
    ),
    "discovery": Source(
        (f"{MEASURED}/discovery.json",),
        (f"{BENCHMARKS}/discovery.py --output {MEASURED}/discovery.json",),
        "1,000 adapters; one run, lists the least of three",
        1,
        phrases=tables.discovery_phrases,
    ),
    "merging": Source(
        (f"{MEASURED}/merging.json",),
        (f"{BENCHMARKS}/merging.py --repeat 3 --output {MEASURED}/merging.json",),
        "least of three runs",
        10,
        tables.merging_table,
        tables.merging_phrases,
    ),
    "merging-mergekit": Source(
        (f"{MEASURED}/merging_mergekit.json",),
        (
            f"{BENCHMARKS}/merging.py --methods linear task_arithmetic ties --repeat 2 "
            f"--mergekit .venv-peers/bin/mergekit-yaml --output {MEASURED}/merging_mergekit.json",
        ),
        "one run; `make peers` installs mergekit",
        10,
        tables.mergekit_table,
    ),
    "merging-long": Source(
        (f"{MEASURED}/merging_long.json", f"{MEASURED}/merging_wudi.json"),
        (
            f"{BENCHMARKS}/merging.py --methods iso_c iso_cts tsv_m --output {MEASURED}/merging_long.json",
            f"{BENCHMARKS}/merging.py --methods wudi --output {MEASURED}/merging_wudi.json",
        ),
        "each once",
        20,
        phrases=tables.long_merging_phrases,
    ),
    "peers": Source(
        ("tests/peers/agreement.json",), ("make peers",), "every case once", 2, phrases=tables.peers_phrases
    ),
    "phatgoose-text": Source(
        tuple(f"{MEASURED}/phatgoose_text{name}.json" for name in ("", "_uniform", "_gaussian", "_paper_gates")),
        (
            "{python} examples/train_smollm2_experts.py --data {data} --gates whitened --output whitened-gates",
            f"{BENCHMARKS}/phatgoose_text.py --data {{data}} --n 40 --examples 300 --experts whitened-gates",
            f"{BENCHMARKS}/phatgoose_text.py --data {{data}} --n 40 --systems uniform "
            f"--output {MEASURED}/phatgoose_text_uniform.json",
            f"{BENCHMARKS}/phatgoose_text.py --data {{data}} --n 40 --systems PHATGOOSE "
            f"--output {MEASURED}/phatgoose_text_gaussian.json",
            "{python} examples/train_smollm2_experts.py --data {data} --gates paper --output paper-gates",
            f"{BENCHMARKS}/phatgoose_text.py --data {{data}} --n 40 --systems PHATGOOSE --experts paper-gates "
            f"--output {MEASURED}/phatgoose_text_paper_gates.json",
        ),
        "40 test rows of each task in each form; one seed",
        120,
        routing.phatgoose_table,
        routing.phatgoose_phrases,
    ),
    "general-transfer": Source(
        (f"{MEASURED}/general_transfer.json",),
        (
            "{python} examples/train_smollm2_experts.py --data {data} --suite smollm-general --gates",
            f"{BENCHMARKS}/general_transfer.py --data {{data}} --n 50",
        ),
        "50 validation rows of each candidate; one seed",
        60,
        general.transfer_table,
    ),
    "general-text": Source(
        ("results", f"{MEASURED}/general_transfer.json"),
        (),
        "16 test rows of each task in each way of asking; one seed",
        180,
        general.scores_table,
        general.phrases,
    ),
    "phatgoose-minilm": Source(
        tuple(f"{MEASURED}/phatgoose_minilm{name}.json" for name in ("", "_paper", "_whitened")),
        tuple(
            f"{BENCHMARKS}/phatgoose_minilm.py --data {{data}} --gates {kind}"
            for kind in ("gaussian", "paper", "whitened")
        ),
        "800 test rows, 200 of each of four tasks; one seed",
        5,
        phrases=routing.phatgoose_minilm_phrases,
    ),
    "phatgoose-cost": Source(
        tuple(f"{MEASURED}/phatgoose_cost{name}.json" for name in ("", "_smollm2")),
        (
            f"{BENCHMARKS}/phatgoose.py --experts 8 32 128 --repeats 5 --output {MEASURED}/phatgoose_cost.json",
            f"{BENCHMARKS}/phatgoose.py --smollm2 --output {MEASURED}/phatgoose_cost_smollm2.json",
        ),
        "least of 5 runs, with SmolLM2's shape of 7",
        15,
        routing.routing_table,
        routing.routing_phrases,
    ),
    "serve-load": Source(
        (f"{MEASURED}/serve_load.json",),
        (f"{BENCHMARKS}/serve_load.py --model demo/router --output {MEASURED}/serve_load.json",),
        "least of 3 runs; the model is what `hf-fusion demo phatgoose` leaves",
        3,
        phrases=routing.serving_phrases,
    ),
    "wemoe-suites": Source(
        (f"{MEASURED}/wemoe_minilm8.json", "results"),
        (f"{EIGHT} --learned WEMoE 'AdaMerging, by layer' --seeds 0 --output {MEASURED}/wemoe_minilm8.json",),
        "4,000 test rows, 500 of each of eight tasks; one seed of what is learned",
        30,
        tables.wemoe_table,
        tables.wemoe_phrases,
    ),
    "wemoe-unseen": Source(
        tuple(f"{MEASURED}/wemoe_{suite.replace('-', '_')}.json" for suite in tables.UNSEEN),
        tuple(
            f"{SUITES} --suite {suite} --limit 250 --seeds 0 --static --learned WEMoE 'AdaMerging, by layer' "
            f"--output {MEASURED}/wemoe_{suite.replace('-', '_')}.json"
            for suite in tables.UNSEEN
        ),
        "250 test rows of each of 16 tasks; one seed of what is learned",
        60,
        tables.unseen_table,
    ),
    "wemoe-cost": Source(
        (f"{MEASURED}/wemoe_cost.json",),
        (
            f"{BENCHMARKS}/wemoe.py --storage exact bfloat16 low-rank-bfloat16 --repeats 5 "
            f"--output {MEASURED}/wemoe_cost.json",
        ),
        "least of 5 runs",
        10,
        tables.per_input_table,
        tables.per_input_phrases,
    ),
    "bench": Source(
        ("results",),
        (),
        "250 test rows of each task, 24 on smollm-lora, 16 on smollm-general, all of rxnfp-2; seeds as the cells tell",
        600,
        lambda read: readme_block(read_cells(read[0])),
        section=README_SECTION,
    ),
}
"""Name → what its figures come from. CONTRIBUTING.md tells what takes more than one command."""
