"""Real models and data that come as packages from PyPI."""
