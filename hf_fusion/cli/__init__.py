"""The command line, ``hf-fusion``: each command parses its arguments, calls the library and prints the result."""

from hf_fusion.cli.app import main

__all__ = ["main"]
