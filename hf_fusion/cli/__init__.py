"""The command line, ``hf-fusion``: it parses, calls the library and shows; it holds no logic of its own."""

from hf_fusion.cli.app import main

__all__ = ["main"]
