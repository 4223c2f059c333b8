"""Weights and images that are made of their names, the same in every library."""

import zlib

import numpy as np


def weight(name, shape):
    """An array of the scale that keeps activations of order one."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.standard_normal(shape)
    if name.endswith("running_var"):
        return np.exp(0.2 * drawn).astype(np.float32)
    if name.endswith("bn.weight"):
        return (1 + 0.1 * drawn).astype(np.float32)
    if len(shape) > 1:
        return (drawn * (2 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
    return (0.1 * drawn).astype(np.float32)


def image(index):
    """An image of 40 x 32 in [-1, 1]."""
    return np.random.default_rng(index).uniform(-1, 1, (40, 32, 3)).astype(np.float32)
