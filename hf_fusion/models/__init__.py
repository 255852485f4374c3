"""What travels to the Hub: one flat, self-contained folder per family."""
