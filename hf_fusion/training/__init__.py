"""Fitting what a fused model learns: fusers, gates, routers."""
