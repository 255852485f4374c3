"""Exports fused models to forms that servers run without this package: a dense model, an adapter, a GGUF file."""
