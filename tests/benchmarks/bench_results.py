"""Keeps what `hf-fusion bench run` measured: results/SUITE.jsonl, the table in docs/benchmark, its pictures in docs/.

hf-fusion bench run --suite minilm-8 --data DIR --output runs …
python tests/benchmarks/bench_results.py runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_fusion.bench.cells import read_cells, write_lines
from hf_fusion.bench.pages import README_SECTION, readme_block
from hf_fusion.bench.plots import PICTURES
from hf_fusion.bench.report import summarise
from hf_fusion.hub.readme import put_section

ROOT = Path(__file__).parents[2]
SHOWN = {"minilm-8": "cost", "vision-6": "corruption"}  # suite -> the picture of it that the README shows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of cells")
    args = parser.parse_args()
    cells = read_cells(args.runs)
    for suite in dict.fromkeys(cell.suite for cell in cells):
        path = ROOT / "results" / f"{suite}.jsonl"
        write_lines(path, [cell for cell in cells if cell.suite == suite], brief=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB")
    kept = read_cells(ROOT / "results")
    page = ROOT / "docs/benchmark/results.md"
    page.write_text(put_section(page.read_text("utf-8"), README_SECTION, readme_block(kept)), "utf-8")
    for suite in summarise(kept)["suites"]:
        name = SHOWN.get(suite["name"], "")
        if name and (figure := PICTURES[name][0](suite)):
            figure.savefig(ROOT / "docs" / f"{suite['name']}-{name}.png", facecolor="white")


if __name__ == "__main__":
    main()
