"""From words on a command line to one command's `run`, and from any exception to one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from hf_fusion import __version__
from hf_fusion.cli.errors import explain
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import Parser, add_common
from hf_fusion.extras import need_for
from hf_fusion.progress import reporting

# command -> what it does; the command's module in this folder has add_arguments(parser), run(args, out) and EXAMPLES
COMMANDS = {
    "discover": "find experts on the Hub and see which of them fit together",
    "fuse": "make one model of several experts",
    "fit": "teach a fused model on labelled examples",
    "eval": "measure a fused model beside its experts",
    "bench": "measure fusion techniques on suites of tasks",
    "publish": "push a fused model with its card to the Hub",
    "hub": "run a Hub of your own on this machine",
    "demo": "see the whole way once, on real models and data",
}
INTERRUPTED, BROKEN_PIPE = 130, 141
NAMES = ("action", "part", "demo")  # where the arguments say which of a command's own is meant

# How the libraries below are told to leave the terminal to us; they read it when they are imported.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Their bars as well: phases are ours to show, see `hf_fusion.progress`.
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words behind ``hf-fusion``; those of this process by default.

    Returns:
        The exit code: 0, 1 for an error, 130 when interrupted. Words that cannot be parsed exit with 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(next((word for word in words if word in COMMANDS), None))
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    out = Out(args.format)
    _hush(out, args.debug)
    shown = out.reporter() if os.environ.get("RANK", "0") == "0" else None  # of several processes the first tells
    try:
        need_for(args.command, next((getattr(args, name) for name in NAMES if hasattr(args, name)), ""))
        with reporting(shown):
            command(args.command).run(args, out)
    except KeyboardInterrupt:
        out.log("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as in `hf-fusion discover | head -1`
        _forget_output()
        return BROKEN_PIPE
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        problem = explain(error, args.command)
        out.error(problem.message, problem.hint)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: Python would try again when it ends, and exit with 120
            _forget_output()
        return 1
    finally:  # whoever called us from Python has its own way with our log, and closes our stream
        if shown is not None:
            shown.close()
        logger = logging.getLogger("hf_fusion")
        logger.handlers, logger.propagate = [], True
    return 0


def _forget_output() -> None:
    """Sends what is still to be written on stdout nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"{__package__}.{name}")


def build_parser(wanted: str | None = None) -> Parser:
    """The parser: all commands with their one line, and the arguments of the one that is wanted."""
    parser = Parser(
        prog="hf-fusion",
        description="Turns experts from the Hugging Face Hub into single models better than any of their parts.",
        epilog="Start here:  hf-fusion demo",
    )
    parser.add_argument("--version", action="version", version=f"hf_fusion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, line in COMMANDS.items():
        if name == wanted:
            module = command(name)
            chosen = commands.add_parser(name, help=line, description=module.__doc__, examples=module.EXAMPLES)
            module.add_arguments(chosen)
            add_common(chosen)
        else:  # its module is not even imported, so that every answer is instant
            commands.add_parser(name, help=line)
    return parser


class _Forward(logging.Handler):
    """Shows the library's own log as warnings."""

    def __init__(self, out: Out) -> None:
        super().__init__(logging.WARNING)
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        self.out.warning(record.getMessage())


def _hush(out: Out, debug: bool) -> None:
    """Leaves the terminal to `out`: other libraries' chatter and bars are off."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("hf_fusion").setLevel(logging.DEBUG)
        return
    logger = logging.getLogger("hf_fusion")
    logger.handlers, logger.propagate = [_Forward(out)], False
    warnings.filterwarnings("ignore")
    for name, value in {**QUIET, **NO_BARS}.items():
        os.environ.setdefault(name, value)
