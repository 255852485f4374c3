"""What travels to the Hub: flat files of each family, `*_NAME.py`, and those that all share, `fused_*.py`."""
