"""Print a script that completes commands, options, their values and files for the Tab key of a shell.

The script is static: it starts no Python when Tab is pressed. Print it again after an update.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import Parser

EXAMPLES = (
    ("hf-fusion completion bash", "for bash; write it to ~/.local/share/bash-completion/completions/hf-fusion"),
    ("hf-fusion completion zsh", "for zsh; write it to _hf-fusion in a folder of $fpath"),
    ("hf-fusion completion tcsh", "for tcsh; write it to a file that ~/.tcshrc sources"),
)
SHELLS = ("bash", "zsh", "tcsh")


def _methods() -> Sequence[str]:
    from hf_fusion.families import METHODS
    from hf_fusion.merging.methods import MERGE_METHODS

    return [*METHODS, *MERGE_METHODS]


def _all_methods() -> Sequence[str]:
    from hf_fusion.cli.methods import all_methods

    return [entry.name for entry in all_methods()]


def _bench_methods() -> Sequence[str]:
    from hf_fusion.bench.methods import FAMILIES, METHODS

    return ["all", "static", *dict.fromkeys([*METHODS, *FAMILIES])]


def _suites() -> Sequence[str]:
    from hf_fusion.bench.suite import suite_names

    return suite_names()


def _tasks() -> Sequence[str]:
    from hf_fusion.hub.task_heads import TASKS

    return list(dict.fromkeys(TASKS))


# (command, attribute of its arguments) → the values that it completes
VALUES: dict[tuple[str, str], Callable[[], Sequence[str]]] = {
    ("hf-fusion fuse", "method"): _methods,
    ("hf-fusion methods", "method"): _all_methods,
    ("hf-fusion bench run", "methods"): _bench_methods,
    ("hf-fusion bench run", "suite"): _suites,
    ("hf-fusion bench check", "suite"): _suites,
    ("hf-fusion discover", "task"): _tasks,
}
FOLDERS = ("DIR", "MODEL_DIR", "ADAPTER", "ID")
"""Metavars of folders, and of models that may be folders."""
HUB = ("hf-fusion discover",)
"""Commands whose ids are always those of the Hub, which cannot be completed."""
FILES = ("RECIPE", "DATA")
"""Metavars of files and folders."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace, out: Out) -> None:
    """Print the script."""
    import shtab

    out.script(shtab.complete(complete_parser(), args.shell))


def complete_parser() -> Parser:
    """The parser with all arguments of all commands, and what each of them completes."""
    import shtab

    from hf_fusion.cli.app import COMMANDS, build_parser

    parser = build_parser(*COMMANDS)
    for each in _with_nested(parser):
        for action in each._actions:
            if known := VALUES.get((each.prog, action.dest)):
                action.choices = known()
            elif action.metavar in FOLDERS and each.prog not in HUB:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in FILES or action.dest == "data":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _with_nested(parser: Parser) -> Iterator[Parser]:
    yield parser
    for each in parser.nested.values():
        yield from _with_nested(each)
