"""The argument parser, the help texts and the output of errors."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from hf_fusion.cli.app import COMMANDS, build_parser, command, main
from hf_fusion.cli.errors import explain
from hf_fusion.cli.parser import Parser
from hf_fusion.errors import FusionError

HEAVY = ("torch", "transformers", "datasets", "huggingface_hub", "rich", "fastapi")


def cpu_of_children() -> float:
    """Seconds: what else the machine does takes none of them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.process
def test_help_is_instant():
    words = [sys.executable, "-m", "hf_fusion.cli", "--help"]
    began = cpu_of_children()
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert cpu_of_children() - began < 0.5
    assert done.returncode == 0
    for name, line in COMMANDS.items():
        assert name in done.stdout
        assert line in " ".join(done.stdout.split())


@pytest.mark.process
@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_no_help_imports_anything_heavy(words):
    code = (
        f"import sys\ntry:\n import hf_fusion.cli; hf_fusion.cli.main({words})\nfinally:\n print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "usage: hf-fusion" in done.stdout
    loaded = set(re.findall(r"'([^']+)'", done.stdout.splitlines()[-1]))
    assert loaded.isdisjoint(HEAVY)


def leaves(parser: Parser) -> list[Parser]:
    """The parsers of what can be run: a command's own, or those of its commands."""
    return [leaf for each in parser.nested.values() for leaf in leaves(each)] or [parser]


COMMAND_PARSERS = [leaf for name in COMMANDS for leaf in leaves(build_parser(name).nested[name])]


@pytest.mark.parametrize("parser", COMMAND_PARSERS, ids=lambda parser: parser.prog)
def test_each_command_shows_two_examples_that_parse(parser, capsys):
    words = parser.prog.split()[1:]
    assert len(parser.examples) >= 2
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert parser.description in text
    for line, what in parser.examples:
        assert f"  # {what}\n  {line}\n" in text
        given = shlex.split(re.sub(r"export \w+=\$\((.*)\)", r"\1", line))
        assert given[: len(words) + 1] == ["hf-fusion", *words]
        assert build_parser(words[0]).parse_args(given[1:]).command == words[0]
    assert text.count("\n  hf-fusion ") + text.count("=$(hf-fusion ") == len(parser.examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_group_shows_examples(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert len(command(name).EXAMPLES) >= 2
    assert all(line in text for line, _ in command(name).EXAMPLES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fuse --methd ties --experts a b", "unknown option --methd|did you mean --method?"),
        ("fuse recipe.yaml --outptu=x", "unknown option --outptu|did you mean --output?"),
        ("fit fuser fused --dta x", "unknown option --dta|did you mean --data?"),
        ("bench run --sutie minilm-8", "unknown option --sutie|did you mean --suite?"),
        ("hub serve hub --prot 1", "unknown option --prot|did you mean --port?"),
        ("eval fused --zzz", "unknown option --zzz|hf-fusion eval --help lists all"),
        ("--format json discover", "hf-fusion has no option --format|write it after the command: hf-fusion discover …"),
        ("bench --suite x", "hf-fusion bench has no option --suite|write it after the command: hf-fusion bench run …"),
        ("fues recipe.yaml --methd x", "unknown command 'fues'|did you mean fuse? hf-fusion --help lists all"),
        ("FUSE recipe.yaml", "unknown command 'FUSE'|did you mean fuse?"),
        ("user hub", "unknown command 'user'|did you mean hub user?"),
        ("reprot results", "unknown command 'reprot'|did you mean bench report?"),
        ("bench reprot results", "unknown command 'reprot'|did you mean report?"),
        ("fit gate adapter --data x", "unknown command 'gate'|did you mean gates?"),
        ("hub severe hub", "unknown command 'severe'|did you mean serve?"),
        ("demo phatgose", "unknown demo 'phatgose'|did you mean phatgoose?"),
        ("discover --format jsn", "unknown value 'jsn' of --format|did you mean json?"),
        (
            "fuse r.yaml -o x --dtype float",
            "unknown value 'float' of --dtype|did you mean float32, float16 or bfloat16?",
        ),
        ("fuse r.yaml -o x --dtype half", "unknown value 'half' of --dtype|use one of float32, float16, bfloat16"),
    ],
)
def test_mistyped_word_suggests_the_closest_match(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"Error: {message.split('|')[0]}"
    assert hint.startswith(f"  → {message.split('|')[1]}")


@pytest.mark.parametrize("parser", COMMAND_PARSERS, ids=lambda parser: parser.prog)
def test_every_command_suggests_every_one_of_its_options(parser, capsys):
    for option in (name for name in parser._option_string_actions if len(name) > 5):
        mistyped = f"{option[:-2]}{option[-1]}{option[-2]}q"
        with pytest.raises(SystemExit):
            main([*parser.prog.split()[1:], mistyped])
        error, hint = capsys.readouterr().err.splitlines()
        assert error == f"Error: unknown option {mistyped}"
        assert hint == f"  → did you mean {option}? {parser.prog} --help lists all"


@pytest.mark.parametrize("words", ["-oDIR", "-o DIR", "--outp DIR", "--output=DIR", "--output -1", "--output 'a -b'"])
def test_ways_to_write_a_known_option_are_let_through(words):
    args = build_parser("fuse").parse_args(["fuse", "r.yaml", *shlex.split(words)])
    assert args.output in ("DIR", "-1", "a -b")


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "usage: hf-fusion" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["bench"], ["fuse"], ["hub", "serve"], ["discover", "--limit", "many"]], ids=" ".join
)
def test_words_that_cannot_be_parsed_end_with_the_help_to_read(words, hf_fusion):
    done = hf_fusion(*words)
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert re.fullmatch(r"  → hf-fusion( \w+)* --help", hint)


def test_an_error_is_one_line_with_a_hint_and_debug_shows_the_traceback(hf_fusion):
    words = ("fuse", "nowhere.yaml", "--output", "fused")
    done = hf_fusion(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: nowhere.yaml cannot be read")
    assert "Traceback" not in done.stderr
    debugged = hf_fusion(*words, "--debug")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr
    assert "Error: nowhere.yaml cannot be read" in debugged.stderr


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_named(hf_fusion):
    done = hf_fusion("discover", "--author", "me", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "cannot be reached" in done.stderr
    assert "  → " in done.stderr
    assert "Traceback" not in done.stderr


def test_every_exception_becomes_a_message_with_a_hint():
    missing = FileNotFoundError(2, "No such file or directory", "x.csv")
    for error, expected in {
        FusionError("it is so", "do this"): "it is so",
        ValueError("bad\nworse"): "bad\nworse",
        missing: "x.csv: No such file or directory",
        ModuleNotFoundError("No module named 'no_such'", name="no_such"): "fit needs no_such, which is not installed",
        KeyError("x"): "unexpected KeyError: 'x'",
        RuntimeError(): "unexpected RuntimeError: RuntimeError",
    }.items():
        problem = explain(error, "fit")
        assert problem.message == expected
        assert problem.hint


@pytest.mark.process
def test_interrupting_ends_with_130():
    with socket.create_server(("127.0.0.1", 0)) as server:  # a Hub that never answers
        server.settimeout(60)
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_fusion.cli", "discover", "--author", "me"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"},
            # A shell's background job ignores this signal, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        connection, _ = server.accept()
        with connection:
            connection.recv(1)  # the command has asked, and waits for us
            process.send_signal(signal.SIGINT)
            text, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (text, rest) == ("", "Interrupted.\n")


def test_recipe_that_is_a_pipe_is_refused_at_once(hf_fusion, tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    done = hf_fusion("fuse", str(tmp_path / "recipe.yaml"), "--output", "fused")
    assert done.returncode == 1 and "recipe.yaml is a pipe, not a file" in done.stderr


@pytest.mark.process
def test_the_hub_serves_until_interrupted(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_fusion.cli", "hub", "serve", str(tmp_path / "hub"), "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    endpoint = json.loads(process.stdout.readline())["endpoint"]
    with urllib.request.urlopen(f"{endpoint}/api/models") as answer:
        assert json.load(answer) == []
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_a_token_for_a_user_of_the_hub(hf_fusion):
    done = hf_fusion("hub", "user", "hub", "me", "--format", "quiet")
    assert done.returncode == 0
    assert re.fullmatch(r"hf_\w{30,}\n", done.stdout)
    assert done.stderr == ""
