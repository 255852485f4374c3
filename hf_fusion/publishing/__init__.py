"""Publishing a fused model on the Hub: checks, plan, push."""
