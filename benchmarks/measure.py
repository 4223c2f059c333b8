"""Ratios of times, and how they are printed."""

import statistics
import time

import jax


def paired_ratio(ours, theirs, *, rounds: int = 15, warm: int = 2) -> tuple[float, float, float]:
    """Median of ours / theirs over alternating rounds, with the quartiles."""
    for _ in range(warm):
        jax.block_until_ready((ours(), theirs()))
    ratios = []
    for i in range(rounds):
        spent = {}
        for fn in (ours, theirs) if i % 2 else (theirs, ours):
            begun = time.perf_counter()
            jax.block_until_ready(fn())
            spent[fn] = time.perf_counter() - begun
        ratios.append(spent[ours] / spent[theirs])
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, low, high


def report(name: str, goal: str, ratio: tuple[float, float, float]) -> None:
    """One line of the table."""
    median, low, high = ratio
    print(f"{name:58s} {median:6.3f}  [{low:.3f}, {high:.3f}]  {goal}", flush=True)
