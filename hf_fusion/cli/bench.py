"""FusionBench: run fusion methods on suites of tasks; report and publish the results."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from hf_fusion.cli.output import Out

EXAMPLES = (
    ("hf-fusion bench suites", "all suites"),
    ("hf-fusion bench run --suite minilm-8 --data DIR --output results", "all methods on one suite"),
    (
        "hf-fusion bench run --suite vision-6 --methods static wemoe --seeds 0 1 2 --corruptions all:3",
        "some methods, with three seeds and corrupted inputs",
    ),
    ("hf-fusion bench report results", "tables and figures of the results"),
)
# action → its help; its module in this folder, bench_ACTION, has EXAMPLES, add_arguments(parser) and
# run(args, out)
ACTIONS = {
    "suites": "list the suites",
    "check": "check which models and data sets of a suite are available",
    "run": "evaluate methods on a suite's tasks; resumes after an interruption",
    "report": "write tables and figures of the results",
    "publish": "push the results as a data set, and add the scores to the cards of fused models",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with its arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for name, line in ACTIONS.items():
        if find_spec(f"{__package__}.bench_{name}"):
            module = _module(name)
            action = actions.add_parser(name, help=line, description=module.__doc__, examples=module.EXAMPLES)
            module.add_arguments(action)


def run(args: argparse.Namespace, out: Out) -> None:
    """Run the action."""
    _module(args.action).run(args, out)


def _module(name: str) -> ModuleType:
    return import_module(f"{__package__}.bench_{name}")
