"""Measuring a fused model beside its experts and baselines."""
