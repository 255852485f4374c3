"""An argparse parser that reports unknown options first, suggests the closest name and shows examples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hf_fusion.cli.errors import USAGE
from hf_fusion.cli.output import FORMATS, Out
from hf_fusion.errors import nearest, suggestion

Examples = Sequence[tuple[str, str]]
"""(command line, its effect) pairs."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors look like all others: what is wrong, and a hint.

    Args:
        examples: shown at the end of its ``--help``.
        deeper: returns commands of its commands, such as "serve", with the whole command, "hub serve"; called only to
            suggest them.
        more: arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: Examples = (), deeper: Callable[[], dict[str, str]] = dict, **more: Any) -> None:
        if examples:
            more |= {"epilog": examples_text(examples), "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**more)
        self.examples, self.deeper = tuple(examples), deeper

    @property
    def nested(self) -> dict[str, Parser]:
        """The parsers of its subcommands, by name."""
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: parser for action in groups for name, parser in action.choices.items()}

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """As in argparse, but an unknown option is reported before missing arguments."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown(words)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with 2."""
        self._stop(message, f"{self.prog} --help")

    def _stop(self, message: str, hint: str) -> NoReturn:
        Out().error(message, hint)
        sys.exit(USAGE)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        known, name = {str(choice): str(choice) for choice in action.choices}, str(argparse._get_action_name(action))
        if isinstance(action, argparse._SubParsersAction):
            name, known = "command", {**self.deeper(), **known}
        what = f"unknown value {value!r} of {name}" if action.option_strings else f"unknown {name.lower()} {value!r}"
        meant = next((known[near] for near in nearest(value, known)[:1] if known[near] != near), value)
        self._stop(what, suggestion(meant, known.values(), f"{self.prog} --help"))

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        nested = self.nested
        for index, word in enumerate(words):
            if word == "--":
                return
            if not _is_option(word):
                if word in nested:
                    nested[word]._refuse_unknown(words[index + 1 :])
                if nested:
                    return
                continue
            name = word.partition("=")[0]
            if self._knows(name):
                continue
            if owner := next((parser for parser in nested.values() if parser._knows(name)), None):
                self._stop(f"{self.prog} has no option {name}", f"write it after the command: {owner.prog} … {name}")
            known = [option for option in self._option_string_actions if option.startswith("--")]
            self._stop(f"unknown option {name}", suggestion(name, known, f"{self.prog} --help"))

    def _knows(self, name: str) -> bool:
        """Whether it has this option, also abbreviated (``--meth``) or with its value attached (``-oDIR``)."""
        options = self._option_string_actions
        if name.startswith("--"):
            return any(option.startswith(name) for option in options)
        return name[:2] in options


def at_least(least: float, kind: type[int] | type[float] = int, above: bool = False, most: float | None = None) -> Any:
    """The ``type=`` of an option: a number of at least `least` (greater, if `above`) and at most `most`."""

    def convert(word: str) -> float:
        value = kind(word)
        if value == float("inf"):
            raise argparse.ArgumentTypeError(f"{word} is not finite")
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"{word} must be {'greater than' if above else 'at least'} {least:g}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{word} must be at most {most:g}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # argparse puts it into its error message
    return convert


COUNT = at_least(1)
SEED = at_least(0)
POSITIVE = at_least(0, float, above=True)


def add_consent(parser: argparse.ArgumentParser, models: str) -> None:
    """Add the option by which the caller consents to custom code.

    Args:
        parser: the command's.
        models: the models whose code may run, for the help.
    """
    text = f"where transformers lacks the class, run the custom code of {models}; read it first (default: never run it)"
    parser.add_argument("--trust-remote-code", action="store_true", help=text)


def _is_option(word: str) -> bool:
    """Whether argparse reads a word as an option: numbers and words with spaces are values."""
    if not word.startswith("-") or len(word) == 1 or " " in word.partition("=")[0]:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def examples_text(examples: Examples) -> str:
    """The examples at the end of a command's --help."""
    return "examples:\n" + "\n".join(f"  # {description}\n  {line}" for line, description in examples)


def add_common(parser: Parser) -> None:
    """Add the common options to the command, or to each of its subcommands."""
    for each in parser.nested.values() or [parser]:
        group = each.add_argument_group("output")
        group.add_argument("--format", choices=FORMATS, default="human", help="format of stdout (default: human)")
        group.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' messages")
