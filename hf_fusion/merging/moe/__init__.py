"""Dense models up-scaled to a mixture of experts."""
