"""What `train.analyze` measures of a run, without a word of how it is drawn."""

import dataclasses
import itertools
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import jaxdiff
from jaxdiff import geometry, oracles, solvers, traces
from jaxdiff.denoiser import Denoiser, find_network
from jaxdiff.geometry import Spectrum
from jaxdiff.networks import tap_names
from jaxdiff.predictions import Eps, Score
from train.core.data import Source
from train.geometry.recipe import Options

TRANSPORTS = ("own_direction", "unchanged", "transport", "pullback")


class Subject(NamedTuple):
    """What all measurements share.

    Attributes:
        options: with all choices made.
        denoiser: averaged weights.
        key: typed PRNG key.
        x0: held-out examples, `(N, *event)`.
        null: the label of no class; None for a model without classes.
        grid: times from data to noise.
        states: of the inverted examples on the grid, `(N, len(grid), *event)`.
        round_trips: method -> what inversion and sampling change, `(N, *event)`.
    """

    options: Options
    denoiser: Denoiser
    key: Array
    x0: np.ndarray
    null: int | None
    grid: np.ndarray
    states: np.ndarray
    round_trips: dict[str, np.ndarray]

    def steps(self, fractions: tuple[float, ...]) -> np.ndarray:
        """Fractions of the grid as its indices, increasing, without the first and doubles."""
        steps = np.rint(np.asarray(fractions) * self.options.inversion_steps).astype(int)
        return np.unique(np.maximum(steps, 1))

    def labels(self, count: int) -> Array | None:
        """No class, for so many examples."""
        return None if self.null is None else jnp.full(count, self.null, jnp.int32)


def prepare(options: Options, held_out: Source, denoiser: Denoiser) -> Subject:
    """Choose held-out examples and invert them.

    Raises:
        ValueError: for a tap that the network does not have, or too few examples.
    """
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
    chosen = np.random.default_rng(options.seed).permutation(len(held_out))
    x0 = held_out[chosen[: options.num_samples]]["x"]
    process = denoiser.process
    grid = solvers.resolve_times(process, options.inversion_steps, t_end=process.t_min)
    subject = Subject(
        options, denoiser, jax.random.key(options.seed), x0, null, np.asarray(grid)[::-1], x0, {}
    )
    states, errors = invert(subject)
    return subject._replace(states=states, round_trips=errors)


def invert(subject: Subject) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Invert by fixed points, and by DDIM for comparison; both are sampled back by DDIM.

    Returns:
        States of the first on the whole grid, `(N, num_steps + 1, *event)`, and for each method
        what its round trip changes, `(N, *event)`.
    """
    methods = {
        "fixed point": solvers.FixedPointInversion(subject.options.inversion_iterations),
        "DDIM": solvers.DDIM(),
    }
    denoiser, x0, grid = subject.denoiser, subject.x0, subject.grid
    cond = subject.labels(len(x0))
    saveat = diffrax.SaveAt(t0=True, steps=True)
    errors, states = {}, []
    for name, solver in methods.items():
        out = jaxdiff.invert(denoiser, x0, cond=cond, solver=solver, times=grid, saveat=saveat)
        states.append(np.asarray(out.trajectory.x))
        back = jaxdiff.denoise(jax.random.key(0), denoiser, out.x, cond=cond, times=grid[::-1])
        errors[name] = np.asarray(back.x - x0)
    return states[0], errors


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


def local_bases(subject: Subject) -> Bases:
    """All spectra, in one program."""
    options = subject.options
    steps = np.union1d(subject.steps(options.times), subject.steps(options.edit_times))
    samples, labels = range(options.num_samples), range(min(options.num_labels, subject.null or 0))
    rows = [(step, i, subject.null or 0) for step, i in itertools.product(steps, samples)]
    shape = (len(steps), options.label_samples, len(labels))
    rows += itertools.product(steps, range(options.label_samples), labels)
    step, i, cond = np.asarray(rows).T
    values, found = _spectra(
        jax.random.fold_in(subject.key, 0),
        subject.denoiser,
        jnp.asarray(subject.states[i, step]),
        jnp.asarray(subject.grid[step]),
        None if subject.null is None else jnp.asarray(cond, jnp.int32),
        options,
    )
    count = len(steps) * len(samples)

    def split(leaf):
        return leaf[:count].reshape(len(steps), len(samples), *leaf.shape[1:])

    labelled = None
    if len(labels) > 1:
        labelled = jax.tree.map(lambda leaf: leaf[count:].reshape(*shape, *leaf.shape[1:]), found)
    plain = jax.tree.map(split, found)
    return Bases(steps, subject.grid[steps], np.asarray(split(values)), plain, labelled)


@eqx.filter_jit
def _spectra(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: Array | None,
    options: Options,
) -> tuple[Array, Spectrum]:
    """Singular values and leading triplets of dh/dx at rows of (x, t, cond).

    Args:
        key: typed PRNG key.
        denoiser: the denoiser.
        x: `(M, *event)`.
        t: `(M,)`.
        cond: `(M,)`, or None.
        options: tap, number of values, rank of the bases, block of the Lanczos method, chunk, and
            rows at a time.

    Returns:
        All values, `(M, num_values)`, and the leading triplets with an axis of rows.
    """

    def at(row):
        i, x, t, cond = row
        found = geometry.jacobian_svd(
            jax.random.fold_in(key, i),
            geometry.TapFeature(denoiser, t, cond, options.tap),
            x,
            options.num_values,
            method=geometry.GolubKahanLanczos(options.block),
            chunk=options.chunk or None,
        )
        leading = {
            name: getattr(found, name)[: options.rank]
            for name in ("values", "right", "left", "residuals")
        }
        return found.values, dataclasses.replace(found, **leading)

    return jax.lax.map(at, (jnp.arange(len(x)), x, t, cond), batch_size=options.batch_size)


class Structure(NamedTuple):
    """The denoiser's Jacobian and score.

    Attributes:
        values: singular values of alpha dx0_hat/dx, `(T, S, num_values)`.
        measures: name -> `(T, S)`.
        explained: share of the score's variance that a Gaussian explains, `(T,)`.
    """

    values: np.ndarray
    measures: dict[str, np.ndarray]
    explained: np.ndarray


def structure(subject: Subject, source: Source, bases: Bases) -> Structure:
    """The structure of the denoiser's Jacobian and of the score at the times of the bases."""
    options, count, times = subject.options, subject.options.structure_samples, bases.times
    step, i = np.asarray(list(itertools.product(bases.steps, range(count)))).T
    key = jax.random.fold_in(subject.key, 1)
    measured = _structure(
        key,
        subject.denoiser,
        jnp.asarray(subject.states[i, step]),
        jnp.asarray(subject.x0[i]),
        jnp.asarray(subject.grid[step]),
        subject.labels(len(i)),
        options,
    )
    shape = (len(times), count)
    measured = {k: np.asarray(v).reshape(*shape, *v.shape[1:]) for k, v in measured.items()}
    rng = np.random.default_rng(options.seed)
    data = source[rng.permutation(len(source))[: options.num_train]]["x"]
    explained = _explained(
        jax.random.fold_in(key, 1),
        subject.denoiser,
        geometry.fit_gaussian(subject.denoiser.process, data),
        jnp.asarray(subject.x0),
        jnp.asarray(times),
        subject.labels(len(subject.x0)),
    )
    return Structure(measured.pop("values"), measured, np.asarray(explained))


@eqx.filter_jit
def _structure(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    x0: Array,
    t: Array,
    cond: Array | None,
    options: Options,
) -> dict[str, Array]:
    """The denoiser's Jacobian and score at rows of (x, x0, t, cond); each with an axis of rows.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser.
        x: noisy, `(M, *event)`.
        x0: clean, `(M, *event)`.
        t: `(M,)`.
        cond: `(M,)`, or None.
        options: number of singular values, block of the Lanczos method, probes, whether to fit the
            normal bundle, and evaluations at a time.
    """
    chunk, num_probes = options.chunk or None, options.num_probes
    exact = options.trace_probes == 0
    trace = traces.ExactTrace(chunk) if exact else traces.Hutchinson(options.trace_probes)
    method = geometry.GolubKahanLanczos(options.block)

    def at(row):
        i, x, x0, t, cond = row
        keys = jax.random.split(jax.random.fold_in(key, i), 7)
        field = geometry.ScaledDenoiser(denoiser, t, cond)
        ranks = geometry.denoiser_rank(
            keys[0], denoiser, x, t, options.num_values, cond=cond, method=method
        )
        asymmetry = geometry.asymmetry(keys[1], field, x, num_probes=num_probes, chunk=chunk)
        residual = geometry.fokker_planck_residual(denoiser, x, t, cond, key=keys[2], trace=trace)
        change = jax.jvp(lambda t: denoiser.predict(Score(), x, t, cond), (t,), (jnp.ones(()),))[1]
        found = {
            "values": ranks.values,
            "numerical_rank": ranks.rank,
            "participation_ratio": geometry.participation_ratio(
                keys[3], denoiser, x, t, cond=cond, num_probes=2 * num_probes
            ),
            "asymmetry": asymmetry.value,
            "asymmetry_standard_error": asymmetry.standard_error,
            "fokker_planck_residual": jnp.sqrt(jnp.mean(residual**2)),
            "score_change": jnp.sqrt(jnp.mean(change**2)),
            "dimension_jacobian": jnp.sum(ranks.values > 0.5),
            "dimension_trace": geometry.effective_dimension(
                denoiser, x, t, cond, key=keys[4], trace=trace
            ).value,
            "dimension_density": geometry.density_dimension(
                denoiser, x0, t, cond, key=keys[5], trace=trace
            ).value,
        }
        if options.normal_bundle:
            found["dimension_normal_bundle"] = geometry.normal_bundle(
                keys[6], denoiser, x0, t, cond, chunk=chunk
            ).dimension
        return found

    return jax.lax.map(at, (jnp.arange(len(x)), x, x0, t, cond))


@eqx.filter_jit
def _explained(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    approximation: oracles.GaussianMixture,
    x0: Array,
    times: Array,
    cond: Array | None,
) -> Array:
    """Share of the score's variance that an approximation explains at each time, `(T,)`."""

    def at(t):
        return geometry.explained_variance(key, denoiser, approximation, x0, t, cond=cond)

    return jax.lax.map(at, times)


class Frequencies(NamedTuple):
    """Of the right singular vectors.

    Attributes:
        ring: frequencies, `(K,)`.
        density: power spectral density, `(T, N, r, K)`.
        mean: mean frequency, `(T, N, r)`.
        low: share of energy below the cut, `(T, N, r)`.
        white: mean frequency of white noise, and its share below the cut.
    """

    ring: np.ndarray
    density: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    white: tuple[float, float]


def frequencies(subject: Subject, bases: Bases) -> Frequencies:
    """Frequencies of the directions in X, and of white noise."""
    cut, shape = subject.options.cut, subject.x0.shape[1:]
    density, mean, low = map(np.asarray, _frequencies(bases.plain.right, cut))
    noise = jax.random.normal(jax.random.fold_in(subject.key, 2), (1000, *shape))
    _, white_mean, white_low = _frequencies(noise, cut)
    ring = np.asarray(geometry.ring_frequencies(*shape[:2]))
    return Frequencies(
        ring, density, mean, low, (float(jnp.mean(white_mean)), float(jnp.mean(white_low)))
    )


@eqx.filter_jit
def _frequencies(directions: Array, cut: float) -> tuple[Array, Array, Array]:
    return (
        geometry.power_spectral_density(directions),
        geometry.mean_frequency(directions),
        geometry.low_frequency_fraction(directions, cut),
    )


class Distances(NamedTuple):
    """Geodesic distances between subspaces; all by space, "H" or "X".

    Attributes:
        times: of one sample at two times, `(N, T, T)`.
        samples: of two samples at one time, `(T, N, N)`.
        labels: of one sample under two labels, `(T, S, L, L)`; empty without classes.
        random: mean and standard deviation for random subspaces.
    """

    times: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    random: dict[str, tuple[float, float]]


def distances(subject: Subject, bases: Bases) -> Distances:
    """Distances between the subspaces of times, of samples, and of labels."""
    key, found = jax.random.fold_in(subject.key, 3), Distances({}, {}, {}, {})
    for space, name in (("H", "left"), ("X", "right")):
        plain = getattr(bases.plain, name)
        found.samples[space] = np.asarray(_distances(plain))
        found.times[space] = np.asarray(_distances(jnp.swapaxes(plain, 0, 1)))
        mean, deviation = geometry.random_distance(key, plain.shape[2], plain[0, 0, 0].size)
        found.random[space] = float(mean), float(deviation)
        if bases.labelled is not None:
            labelled = getattr(bases.labelled, name)
            pairs = _distances(labelled.reshape(-1, *labelled.shape[2:]))
            shape = (*labelled.shape[:2], *pairs.shape[1:])
            found.labels[space] = np.asarray(pairs).reshape(shape)
    return found


@eqx.filter_jit
def _distances(bases: Array) -> Array:
    """Within each of several families of bases, `(A, N, r, *shape)` to `(A, N, N)`."""
    return jax.lax.map(geometry.pairwise_distances, bases)


class Curves(NamedTuple):
    """Curves between two inverted examples, seen in H.

    Attributes:
        times: `(C,)`.
        lengths: kind -> `(C, P)`.
        curvedness: kind -> `(C, P)`.
    """

    times: np.ndarray
    lengths: dict[str, np.ndarray]
    curvedness: dict[str, np.ndarray]


def curves(subject: Subject) -> Curves:
    """Lines, arcs and geodesics between pairs of examples."""
    options = subject.options
    steps = subject.steps(options.curve_times)
    pairs = list(itertools.combinations(range(options.num_samples), 2))
    # Spread over all examples, and the same for equal seeds.
    pairs = [pairs[i] for i in np.random.default_rng(options.seed).permutation(len(pairs))]
    rows = [(step, *pair) for step in steps for pair in pairs[: options.num_pairs]]
    step, first, second = np.asarray(rows).T
    found = _curves(
        subject.denoiser,
        jnp.asarray(subject.states[first, step]),
        jnp.asarray(subject.states[second, step]),
        jnp.asarray(subject.grid[step]),
        subject.labels(len(step)),
        options,
    )
    lengths, curvedness = (
        {kind: np.asarray(value).reshape(len(steps), -1) for kind, value in part.items()}
        for part in found
    )
    return Curves(subject.grid[steps], lengths, curvedness)


@eqx.filter_jit
def _curves(
    denoiser: Denoiser, start: Array, end: Array, t: Array, cond: Array | None, options: Options
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Lengths and curvedness of each kind at rows of (start, end, t, cond)."""

    def one(row):
        start, end, t, cond = row
        f = geometry.TapFeature(denoiser, t, cond, options.tap)
        found = {
            "line": geometry.lerp(start, end, options.curve_steps),
            "arc": geometry.slerp(start, end, options.curve_steps),
        }
        if options.geodesic_iterations:
            found["geodesic"] = geometry.geodesic(
                f, found["arc"], num_iterations=options.geodesic_iterations
            ).curve
        return (
            {name: geometry.curve_length(f, curve) for name, curve in found.items()},
            {name: geometry.curvedness(f, curve) for name, curve in found.items()},
        )

    return jax.lax.map(one, (start, end, t, cond))


class Edits(NamedTuple):
    """Edits of examples at one time.

    Attributes:
        columns: of the table of edits: method, sample, direction, sign, part of the way, and the
            measures `distance` (of the noisy examples), `image_change` (2-norms),
            `norm_change` (relative), `noise_energy` and `noise_energy_change`.
        images: method -> denoised examples, `(samples, directions, 5, *event)`, from one end
            over the unedited one to the other.
        carried: kind of `TRANSPORTS` -> denoised examples, `(samples - 1, 3, *event)`, from the
            unedited one on.
        source: the first example's own edit, `(3, *event)`.
        transport: of the first example's directions to the others, with a leading axis of them.
    """

    columns: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    carried: dict[str, np.ndarray]
    source: np.ndarray
    transport: geometry.Transport


def edits(subject: Subject, bases: Bases) -> dict[float, Edits]:
    """Edits at each time: examples along their first directions, and along the first example's."""
    results = {}
    for step in subject.steps(subject.options.edit_times)[::-1]:
        here = int(np.searchsorted(bases.steps, step))
        spectrum = jax.tree.map(lambda leaf, here=here: leaf[here], bases.plain)
        results[float(subject.grid[step])] = edit(subject, int(step), spectrum)
    return results


def edit(subject: Subject, step: int, spectrum: Spectrum) -> Edits:
    """Edits at one step of the grid, with the spectra of the examples there."""
    options, denoiser = subject.options, subject.denoiser
    grid = jnp.asarray(subject.grid[: step + 1][::-1])
    cond = None if subject.null is None else jnp.asarray(subject.null, jnp.int32)
    count, rank = options.edit_samples, options.num_directions
    x = jnp.asarray(subject.states[:count, step])
    spectrum = jax.tree.map(lambda leaf: leaf[:count], spectrum)
    rows = np.asarray(list(itertools.product(range(count), range(rank), (-1, 1))))
    sample, k, sign = rows.T
    event = x.shape[1:]
    lift = (slice(None), *(None,) * len(event))
    directions = spectrum.right[sample, k] * sign[lift].astype(x.dtype)

    source = jax.tree.map(lambda leaf: leaf[0], spectrum)
    others = jax.tree.map(lambda leaf: leaf[1:], spectrum)
    feature = geometry.TapFeature(denoiser, grid[0], cond, options.tap)
    transport = _transport(feature, x[1:], source, others, rank)
    first = [transport.directions[kind][:, 0] for kind in TRANSPORTS]
    starts = jnp.concatenate([x[sample], *([x[1:]] * len(TRANSPORTS))])
    along = jnp.concatenate([directions, *first])
    moved = _guide(denoiser, starts, grid[0], cond, along, options.edit_scale, options)
    guided = moved[: len(rows)]
    distance = jnp.linalg.norm((guided - x[sample][:, None]).reshape(len(rows), 2, -1), axis=-1)
    straight = jax.vmap(geometry.straight_edit)(x[sample], directions, distance)

    states = jnp.concatenate([x, *(s.reshape(-1, *event) for s in (moved, straight))])
    labels = None if cond is None else jnp.full(len(states), cond)
    images = jaxdiff.denoise(jax.random.key(0), denoiser, states, cond=labels, times=grid).x
    energy = _noise_energy(denoiser, states, grid[0], cond)
    plain, rest = np.asarray(images[:count]), np.asarray(images[count:])
    split = 2 * len(rows)
    denoised = {"guidance": rest[:split], "straight": rest[-split:]}
    own, tables = {}, []
    for name, noisy in (("guidance", guided), ("straight", straight)):
        pairs = denoised[name].reshape(count, rank, 2, 2, *event)
        middle = np.broadcast_to(plain[:, None, None], (count, rank, 1, *event))
        own[name] = np.concatenate([pairs[:, :, 0, ::-1], middle, pairs[:, :, 1]], 2)
        part = energy[count : count + split] if name == "guidance" else energy[-split:]
        measures = _measures(x[sample], noisy, plain[sample], denoised[name], energy[sample], part)
        tables.append(_table(name, rows, measures))
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    ends = rest[split:-split].reshape(len(TRANSPORTS), count - 1, 2, *event)
    shown = {
        kind: np.concatenate([plain[1:, None], pair], 1)
        for kind, pair in zip(TRANSPORTS, ends, strict=True)
    }
    transport = jax.tree.map(np.asarray, transport)
    return Edits(columns, own, shown, own["guidance"][0, 0, 2:], transport)


@eqx.filter_jit
def _transport(f, x, source: Spectrum, targets: Spectrum, count: int) -> geometry.Transport:
    return jax.vmap(lambda x, target: geometry.compare_transport(f, x, source, target, count))(
        x, targets
    )


@eqx.filter_jit
def _guide(
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: Array | None,
    directions: Array,
    scale: float,
    options: Options,
) -> Array:
    """x-space guidance of many examples at one time: the states at half and at all of the way.

    Args:
        denoiser: the denoiser.
        x: `(B, *event)`.
        t: scalar time.
        cond: label of all, or None.
        directions: unit vectors, `(B, *event)`.
        scale: size of a move.
        options: number of moves.

    Returns:
        `(B, 2, *event)`.
    """
    count = options.num_edit_steps

    def one(x, direction):
        path = geometry.x_space_guidance(
            denoiser, x, t, direction, cond=cond, scale=scale, num_steps=count
        )
        return path[np.asarray([(count + 1) // 2, count])]

    return jax.vmap(one)(x, directions)


@eqx.filter_jit
def _noise_energy(denoiser: Denoiser, x: Array, t: Array, cond: Array | None) -> Array:
    """||eps_hat(x)||^2 / d of many examples at one time: 1 on average where x is typical."""
    eps = jax.vmap(lambda x: denoiser.predict(Eps(), x, t, cond))(x)
    return jnp.mean(eps.reshape(len(x), -1) ** 2, 1)


def _measures(x, noisy, plain, images, energy, edited_energy) -> dict[str, np.ndarray]:
    """Of B edits with two parts each, `(B, 2)`."""
    noisy = np.asarray(noisy).reshape(len(x), 2, -1)
    x, plain = (np.asarray(a).reshape(len(x), 1, -1) for a in (x, plain))
    norms, edited_norms = (np.linalg.norm(a, axis=-1) for a in (x, noisy))
    edited_energy = np.asarray(edited_energy).reshape(-1, 2)
    return {
        "distance": np.linalg.norm(noisy - x, axis=-1),
        "image_change": np.linalg.norm(images.reshape(noisy.shape) - plain, axis=-1),
        "norm_change": np.abs(edited_norms - norms) / norms,
        "noise_energy": edited_energy,
        "noise_energy_change": edited_energy - np.asarray(energy)[:, None],
    }


def _table(method: str, rows: np.ndarray, measures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sample, k, sign = np.repeat(rows, 2, axis=0).T
    columns = {
        "method": np.full(len(sample), method),
        "sample": sample,
        "direction": k + 1,
        "sign": sign,
        "part": np.tile([0.5, 1.0], len(rows)),
    }
    return columns | {name: value.ravel() for name, value in measures.items()}
