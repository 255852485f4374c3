"""From a fused model to a repository on the Hub: plan, checks, upload."""
