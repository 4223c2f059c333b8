"""Sections of `train.analyze`: each measures, draws, and returns rows of the table."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.denoiser import Denoiser, find_network
from jaxdiff.geometry import Spectrum, fit_gaussian, ring_frequencies
from jaxdiff.networks import tap_names
from jaxdiff.solvers import resolve_times
from train import editing, figures, geometry
from train.data import Source

if TYPE_CHECKING:
    from train.analyze import Options


class Study(NamedTuple):
    """What all measurements share.

    Attributes:
        options: with all choices made.
        folder: of the report.
        denoiser: averaged weights.
        key: typed PRNG key.
        x0: held-out examples, `(N, *event)`.
        null: the label of no class; None for a model without classes.
        grid: times from data to noise.
        states: of the inverted examples on the grid, `(N, len(grid), *event)`.
    """

    options: "Options"
    folder: Path
    denoiser: Denoiser
    key: Array
    x0: np.ndarray
    null: int | None
    grid: np.ndarray
    states: np.ndarray

    def steps(self, fractions: tuple[float, ...]) -> np.ndarray:
        """Fractions of the grid as its indices, increasing, without the first and doubles."""
        steps = np.rint(np.asarray(fractions) * self.options.inversion_steps).astype(int)
        return np.unique(np.maximum(steps, 1))

    def labels(self, count: int) -> Array | None:
        """No class, for so many examples."""
        return None if self.null is None else jnp.full(count, self.null, jnp.int32)


def prepare(
    options: "Options", held_out: Source, denoiser: Denoiser
) -> tuple[Study, list[figures.Row]]:
    """Choose held-out examples and invert them."""
    event = jnp.zeros(held_out.event_shape)
    network = find_network(denoiser)
    null = held_out.num_classes
    taps = tap_names(network.network, *network.inputs(event, jnp.ones(())), null)
    if options.tap not in taps:
        raise ValueError(f"`tap` must be one of the network's taps, {taps}, got {options.tap!r}.")
    if options.num_samples > len(held_out):
        raise ValueError(
            f"`num_samples` must be at most the {len(held_out)} held-out examples, got "
            f"{options.num_samples}."
        )
    folder = Path(options.out or Path(options.run_dir) / "geometry")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(options.seed).permutation(len(held_out))
    x0 = held_out[chosen[: options.num_samples]]["x"]
    grid = resolve_times(denoiser.process, options.inversion_steps, t_end=denoiser.process.t_min)
    grid = np.asarray(grid)[::-1]
    key = jax.random.key(options.seed)
    study = Study(options, folder, denoiser, key, x0, null, grid, None)
    cond = study.labels(len(x0))
    inverted = geometry.invert(denoiser, x0, cond, grid, options.inversion_iterations)
    rows = figures.inversion(folder, x0, inverted.errors)
    return study._replace(states=inverted.states), rows


class Bases(NamedTuple):
    """Spectra of dh/dx.

    Attributes:
        steps: of the times on the grid, increasing, `(T,)`.
        times: `(T,)`.
        values: all singular values, `(T, N, num_values)`.
        plain: leading triplets without a class, with leading axes of times and examples.
        labelled: those of times, examples and labels; None without classes.
    """

    steps: np.ndarray
    times: np.ndarray
    values: np.ndarray
    plain: Spectrum
    labelled: Spectrum | None


def local_bases(study: Study) -> Bases:
    """All spectra, in one program."""
    options = study.options
    steps = np.union1d(study.steps(options.times), study.steps(options.edit_times))
    samples, labels = range(options.num_samples), range(min(options.num_labels, study.null or 0))
    rows = [(step, i, study.null or 0) for step, i in itertools.product(steps, samples)]
    shape = (len(steps), options.label_samples, len(labels))
    rows += itertools.product(steps, range(options.label_samples), labels)
    step, i, cond = np.asarray(rows).T
    values, found = geometry.spectra(
        jax.random.fold_in(study.key, 0),
        study.denoiser,
        jnp.asarray(study.states[i, step]),
        jnp.asarray(study.grid[step]),
        None if study.null is None else jnp.asarray(cond, jnp.int32),
        options.tap,
        (options.num_values, options.rank, options.block, options.chunk, options.batch_size),
    )
    count = len(steps) * len(samples)

    def split(leaf):
        return leaf[:count].reshape(len(steps), len(samples), *leaf.shape[1:])

    labelled = None
    if len(labels) > 1:
        labelled = jax.tree.map(lambda leaf: leaf[count:].reshape(*shape, *leaf.shape[1:]), found)
    plain = jax.tree.map(split, found)
    return Bases(steps, study.grid[steps], np.asarray(split(values)), plain, labelled)


def structure(study: Study, source: Source, bases: Bases) -> list[figures.Row]:
    """Figures of the spectra, and of the score's structure."""
    options, count, times = study.options, study.options.structure_samples, bases.times
    step, i = np.asarray(list(itertools.product(bases.steps, range(count)))).T
    key = jax.random.fold_in(study.key, 1)
    settings = (
        options.num_values,
        options.block,
        options.trace_probes,
        options.num_probes,
        options.normal_bundle,
        options.chunk,
    )
    measured = geometry.structure(
        key,
        study.denoiser,
        jnp.asarray(study.states[i, step]),
        jnp.asarray(study.x0[i]),
        jnp.asarray(study.grid[step]),
        study.labels(len(i)),
        settings,
    )
    shape = (len(times), count)
    measured = {k: np.asarray(v).reshape(*shape, *v.shape[1:]) for k, v in measured.items()}
    values = {"dh/dx": bases.values, "alpha dx0_hat/dx": measured.pop("values")}
    rng = np.random.default_rng(options.seed)
    data = source[rng.permutation(len(source))[: options.num_train]]["x"]
    gaussian = fit_gaussian(study.denoiser.process, data)
    explained = geometry.explained(
        jax.random.fold_in(key, 1),
        study.denoiser,
        gaussian,
        jnp.asarray(study.x0),
        jnp.asarray(times),
        study.labels(len(study.x0)),
    )
    measured["explained_variance"] = np.asarray(explained)
    rows = figures.spectra(study.folder, times, values)
    return rows + figures.structure(study.folder, times, measured, study.x0[0].size)


def directions(study: Study, bases: Bases) -> list[figures.Row]:
    """Figure of the frequencies of directions."""
    options, shape = study.options, study.x0.shape[1:]
    measured = geometry.frequencies(bases.plain.right, options.cut)
    noise = jax.random.normal(jax.random.fold_in(study.key, 2), (1000, *shape))
    white = [float(jnp.mean(value)) for value in geometry.frequencies(noise, options.cut)[1:]]
    ring = ring_frequencies(*shape[:2])
    return figures.directions(
        study.folder, bases.times, ring, *map(np.asarray, measured), tuple(white), options.cut
    )


def tangent_spaces(study: Study, bases: Bases) -> list[figures.Row]:
    """Figures of distances between times, between samples, and between labels."""
    key, folder, times = jax.random.fold_in(study.key, 3), study.folder, bases.times
    between_times, between_samples, between_labels, random = {}, {}, {}, {}
    for space, name in (("H", "left"), ("X", "right")):
        plain = getattr(bases.plain, name)
        between_samples[space] = np.asarray(geometry.distances(plain))
        between_times[space] = np.asarray(geometry.distances(jnp.swapaxes(plain, 0, 1)))
        random[space] = geometry.random_distance(key, plain.shape[2], plain[0, 0, 0].size)
        if bases.labelled is not None:
            labelled = getattr(bases.labelled, name)
            pairs = geometry.distances(labelled.reshape(-1, *labelled.shape[2:]))
            between_labels[space] = np.asarray(pairs).reshape(*labelled.shape[:2], *pairs.shape[1:])
    rows = figures.distances_times(folder, times, between_times, random)
    rows += figures.distances_samples(folder, times, between_samples, random)
    if between_labels:
        rows += figures.conditions(folder, times, between_labels, between_samples, random)
    return rows


def edited(study: Study, bases: Bases) -> list[figures.Row]:
    """Figures of edits, and of directions carried from the first example to others."""
    options = study.options
    guidance = editing.Guidance(
        options.edit_scale, options.num_edit_steps, options.edit_samples, options.num_directions
    )
    results = {}
    for step in study.steps(options.edit_times)[::-1]:
        here = int(np.searchsorted(bases.steps, step))
        spectrum = jax.tree.map(lambda leaf, here=here: leaf[here], bases.plain)
        results[float(study.grid[step])] = editing.edit(
            study.denoiser,
            jnp.asarray(study.states[:, step]),
            spectrum,
            None if study.null is None else jnp.asarray(study.null, jnp.int32),
            jnp.asarray(study.grid[: step + 1][::-1]),
            options.tap,
            guidance,
        )
    return figures.edits(study.folder, results) + figures.transport(study.folder, results)


def curves(study: Study) -> list[figures.Row]:
    """Figure of curves between examples."""
    options = study.options
    steps = study.steps(options.curve_times)
    pairs = list(itertools.combinations(range(options.num_samples), 2))
    # Spread over all examples, and the same for equal seeds.
    pairs = [pairs[i] for i in np.random.default_rng(options.seed).permutation(len(pairs))]
    rows = [(step, *pair) for step in steps for pair in pairs[: options.num_pairs]]
    step, first, second = np.asarray(rows).T
    found = geometry.curves(
        study.denoiser,
        jnp.asarray(study.states[first, step]),
        jnp.asarray(study.states[second, step]),
        jnp.asarray(study.grid[step]),
        study.labels(len(step)),
        options.tap,
        (options.curve_steps, options.geodesic_iterations),
    )
    shape = (len(steps), -1)
    found = {kind: [np.asarray(v).reshape(shape) for v in pair] for kind, pair in found.items()}
    return figures.curves(study.folder, study.grid[steps], found)
