"""FusionBench: measure every fusion technique on a suite of tasks, report it, publish it."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from hf_fusion.cli.output import Out

EXAMPLES = (
    ("hf-fusion bench suites", "which suites there are"),
    ("hf-fusion bench run --suite minilm-8 --data DIR --output results", "every method on one of them"),
    ("hf-fusion bench run --suite vision-6 --methods static wemoe --seeds 0 1 2 --corruptions all:3 …", "some of it"),
    ("hf-fusion bench report results", "tables and pictures of what was measured"),
)
# action -> what it does; its module in this folder, bench_ACTION, has EXAMPLES, add_arguments(parser) and
# run(args, out)
ACTIONS = {
    "suites": "which suites there are",
    "check": "which models and data sets of a suite can be reached",
    "run": "measure methods on a suite's tasks; goes on where it was interrupted",
    "report": "tables and pictures of what was measured",
    "publish": "push results as a data set, and into the cards of fused models",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions, each with its own arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    for name, line in ACTIONS.items():
        if find_spec(f"{__package__}.bench_{name}"):
            module = _module(name)
            own = actions.add_parser(name, help=line, description=module.__doc__, examples=module.EXAMPLES)
            module.add_arguments(own)


def run(args: argparse.Namespace, out: Out) -> None:
    """What the action does."""
    _module(args.action).run(args, out)


def _module(name: str) -> ModuleType:
    return import_module(f"{__package__}.bench_{name}")
