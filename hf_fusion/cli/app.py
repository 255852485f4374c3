"""The entry point of ``hf-fusion``: parses the command line, runs one command, turns exceptions into exit codes."""

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
from hf_fusion.cli.errors import BROKEN_PIPE, FAILURE, INTERRUPTED, USAGE, UsageError, explain
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import Parser, add_common
from hf_fusion.extras import need_for
from hf_fusion.progress import reporting

# command → its help; its module in this folder has add_arguments(parser), run(args, out) and EXAMPLES
COMMANDS = {
    "discover": "find experts on the Hub and check which are compatible",
    "fuse": "fuse several experts into one model",
    "search": "search for the best numbers of a recipe",
    "extract-lora": "turn a full fine-tune into a LoRA adapter",
    "methods": "list the fusion methods, or describe one",
    "fit": "train the fuser or routers of a fused model, or the gates of an adapter",
    "eval": "evaluate a fused model beside its experts and baselines",
    "bench": "benchmark fusion methods on suites of tasks",
    "export": "turn a fused model into a dense model or an adapter",
    "publish": "push a fused model and its card to the Hub",
    "spaces": "deploy the project's Gradio apps",
    "serve": "serve a model by OpenAI's API",
    "hub": "run a Hub on this machine",
    "completion": "print a script by which a shell completes commands",
    "demo": "run the whole pipeline once, on real models and data",
}
SUBCOMMANDS = ("action", "target", "demo")  # attributes of the arguments that name a command's subcommand

# Keeps the libraries' messages off the terminal; they read these variables when they are imported.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Turns off their progress bars too: `hf_fusion.progress` reports phases instead.
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``hf-fusion``; default is ``sys.argv[1:]``.

    Returns:
        The exit code: 0; 1 for an error; 2 for arguments that are wrong; 130 when interrupted; 141 when stdout was
        closed. Arguments that cannot be parsed exit the process with 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(next((word for word in words if word in COMMANDS), None))
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    out = Out(args.format)
    _silence_libraries(out, args.debug)
    reporter = out.reporter() if os.environ.get("RANK", "0") == "0" else None  # only the first of several processes
    try:
        need_for(args.command, next((getattr(args, name) for name in SUBCOMMANDS if hasattr(args, name)), ""))
        with reporting(reporter):
            command(args.command).run(args, out)
    except KeyboardInterrupt:
        out.log("Interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has exited, as in `hf-fusion discover | head -1`
        _discard_stdout()
        return BROKEN_PIPE
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        problem = explain(error, args.command)
        out.error(problem.message, problem.hint)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: Python would flush again at exit, and exit with 120
            _discard_stdout()
        return USAGE if isinstance(problem, UsageError) else FAILURE
    finally:  # restore the logger for callers in the same process
        if reporter is not None:
            reporter.close()
        logger = logging.getLogger("hf_fusion")
        logger.handlers, logger.propagate = [], True
    return 0


def _discard_stdout() -> None:
    """Redirect buffered output to the null device, so that flushing it at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"{__package__}.{name.replace('-', '_')}")


def build_parser(*wanted: str | None) -> Parser:
    """The parser: all commands with their help line, and the arguments of the commands `wanted`."""
    parser = Parser(
        prog="hf-fusion",
        description="Fuse fine-tuned models and LoRA adapters from the Hugging Face Hub into one better model.",
        epilog="Start here:  hf-fusion demo",
        deeper=_deeper_commands,
    )
    parser.add_argument("--version", action="version", version=f"hf_fusion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, line in COMMANDS.items():
        if name in wanted:
            module = command(name)
            chosen = commands.add_parser(name, help=line, description=module.__doc__, examples=module.EXAMPLES)
            module.add_arguments(chosen)
            add_common(chosen)
        else:  # its module is not imported, so that the command starts fast
            commands.add_parser(name, help=line)
    return parser


def _deeper_commands() -> dict[str, str]:
    """The commands of commands, "run": "bench run" …"""
    return {inner: f"{name} {inner}" for name in COMMANDS for inner in build_parser(name).nested[name].nested}


class _Forward(logging.Handler):
    """Shows the package's log records as warnings."""

    def __init__(self, out: Out) -> None:
        super().__init__(logging.WARNING)
        self.out = out

    def emit(self, record: logging.LogRecord) -> None:
        self.out.warning(record.getMessage())


def _silence_libraries(out: Out, debug: bool) -> None:
    """Turn off messages and progress bars of other libraries; with `debug`, log them all instead."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("hf_fusion").setLevel(logging.DEBUG)
        return
    logger = logging.getLogger("hf_fusion")
    logger.handlers, logger.propagate = [_Forward(out)], False
    warnings.filterwarnings("ignore")
    for name, value in {**QUIET, **NO_BARS}.items():
        os.environ.setdefault(name, value)
