"""Benchmarks: ratios to hand-written code, measured in one process."""
