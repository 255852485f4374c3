"""List the suites."""

from __future__ import annotations

import argparse

from hf_fusion.cli.output import Out

EXAMPLES = (
    ("hf-fusion bench suites", "a table of all suites"),
    ("hf-fusion bench suites --format quiet", "only their names"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace, out: Out) -> None:
    """Print one row for each suite."""
    from hf_fusion.bench.suite import load_suite, suite_names

    suites = [load_suite(name) for name in suite_names()]
    rows = [
        {
            "suite": suite.name,
            "kind": suite.kind,
            "tasks": str(len(suite.tasks)),
            "experts": str(len(suite.experts)),
            "from": "here" if suite.is_local else "Hub",
            "title": suite.title,
        }
        for suite in suites
    ]
    out.table(rows, title=f"{len(rows)} suites", key="suite")
    out.hint("hf-fusion bench check SUITE, then hf-fusion bench run --suite SUITE --output results")
