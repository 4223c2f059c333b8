"""What `train.analyze` measures of edits: arrays in, arrays out."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxdiff
from jaxdiff import geometry
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry import Spectrum
from jaxdiff.predictions import Eps

KINDS = ("own direction", "unchanged", "transport", "pullback")
"""A direction at another example: its own of the same index, that of the first example unchanged,
and `parallel_transport` with powers 0 and 1."""


class Guidance(NamedTuple):
    """How examples are edited.

    Attributes:
        scale: size of a move.
        num_steps: moves.
        num_samples: examples edited, and to which directions are carried.
        num_directions: first directions, either way.
    """

    scale: float
    num_steps: int
    num_samples: int
    num_directions: int


class Edits(NamedTuple):
    """Edits of examples at one time.

    Attributes:
        columns: of the table of edits: method, sample, direction, sign, part of the way, and the
            measures `distance` (of the noisy examples), `image_change` (2-norms),
            `norm_change` (relative), `noise_energy` and `noise_energy_change`.
        images: method -> denoised examples, `(samples, directions, 5, *event)`, from one end
            over the unedited one to the other.
        carried: kind -> denoised examples, `(samples - 1, 3, *event)`, from the unedited one on.
        source: the first example's own edit, `(3, *event)`.
        cosines: with u of moves in H, `(kinds, samples - 1, directions)`.
        lengths: of u projected on the other tangent spaces, `(samples - 1, directions)`.
    """

    columns: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    carried: dict[str, np.ndarray]
    source: np.ndarray
    cosines: np.ndarray
    lengths: np.ndarray


@eqx.filter_jit
def guide(
    denoiser: Denoiser, x: Array, t: Array, cond: Array | None, directions: Array, options: Guidance
) -> Array:
    """x-space guidance of many examples at one time: the states at half and at all of the way.

    Args:
        denoiser: the denoiser.
        x: `(B, *event)`.
        t: scalar time.
        cond: label of all, or None.
        directions: unit vectors, `(B, *event)`.
        options: scale and number of moves.

    Returns:
        `(B, 2, *event)`.
    """
    count = options.num_steps

    def one(x, direction):
        path = geometry.x_space_guidance(
            denoiser, x, t, direction, cond=cond, scale=options.scale, num_steps=count
        )
        return path[np.asarray([(count + 1) // 2, count])]

    return jax.vmap(one)(x, directions)


@eqx.filter_jit
def noise_energy(denoiser: Denoiser, x: Array, t: Array, cond: Array | None) -> Array:
    """||eps_hat(x)||^2 / d of many examples at one time: 1 on average where x is typical."""
    eps = jax.vmap(lambda x: denoiser.predict(Eps(), x, t, cond))(x)
    return jnp.mean(eps.reshape(len(x), -1) ** 2, 1)


@eqx.filter_jit
def transport(
    f: Callable[[Array], Array], x: Array, source: Spectrum, targets: Spectrum, count: int
) -> tuple[Array, Array, Array]:
    """The first directions of one example, carried to others; and the others' own.

    Args:
        f: x -> h.
        x: the other examples, `(N, *event)`.
        source: spectrum of df/dx at the example whose u = `left[k]` are carried.
        targets: spectra at the others, with a leading axis of N.
        count: K, how many directions.

    Returns:
        Directions `(kinds, N, K, *event)`, own ones with the sign of u; cosines `(kinds, N, K)`
        of their moves J v in H with u; and lengths `(N, K)` of u projected on the tangent space
        there, the largest cosine of a direction in the span of that spectrum.
    """
    rank = source.values.shape[0]

    def one(x, target, k):
        tangent = source.left[k]
        inner = target.left.reshape(rank, -1) @ tangent.ravel()
        own = target.right[k] * jnp.where(inner[k] < 0, -1, 1)
        moved = [geometry.parallel_transport(tangent, target, power=p) for p in (0.0, 1.0)]
        found = jnp.stack([own, source.right[k], *moved])
        # Products, because the unchanged direction is not in the span of the target's.
        moves = geometry.Jacobian(f, x).forward(found.reshape(len(found), -1).T).T
        cosines = moves @ tangent.ravel() / jnp.linalg.norm(moves, axis=1)
        return found, cosines, jnp.linalg.norm(inner)

    over = jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))
    found, cosines, lengths = over(x, targets, jnp.arange(count))
    return jnp.moveaxis(found, 2, 0), jnp.moveaxis(cosines, 2, 0), lengths


def edit(
    denoiser: Denoiser,
    x: Array,
    spectrum: Spectrum,
    cond: Array | None,
    grid: Array,
    tap: str,
    options: Guidance,
) -> Edits:
    """Edit examples along their first directions, and along those of the first example.

    Args:
        denoiser: the denoiser.
        x: noisy examples at the first time of the grid, `(N, *event)`.
        spectrum: of the tap's Jacobian there, with a leading axis of N.
        cond: label of all, or None.
        grid: times from that of the edit down.
        tap: the activation h.
        options: how to edit.
    """
    count, rank = options.num_samples, options.num_directions
    x, spectrum = x[:count], jax.tree.map(lambda leaf: leaf[:count], spectrum)
    rows = np.asarray(list(itertools.product(range(count), range(rank), (-1, 1))))
    sample, k, sign = rows.T
    event = x.shape[1:]
    lift = (slice(None), *(None,) * len(event))
    directions = spectrum.right[sample, k] * sign[lift].astype(x.dtype)

    source = jax.tree.map(lambda leaf: leaf[0], spectrum)
    others = jax.tree.map(lambda leaf: leaf[1:], spectrum)
    feature = geometry.TapFeature(denoiser, grid[0], cond, tap)
    carried, cosines, lengths = transport(feature, x[1:], source, others, rank)
    starts = jnp.concatenate([x[sample], *([x[1:]] * len(KINDS))])
    along = jnp.concatenate([directions, carried[:, :, 0].reshape(-1, *event)])
    moved = guide(denoiser, starts, grid[0], cond, along, options)
    guided = moved[: len(rows)]
    distance = jnp.linalg.norm((guided - x[sample][:, None]).reshape(len(rows), 2, -1), axis=-1)
    straight = jax.vmap(geometry.straight_edit)(x[sample], directions, distance)

    states = jnp.concatenate([x, *(s.reshape(-1, *event) for s in (moved, straight))])
    labels = None if cond is None else jnp.full(len(states), cond)
    images = jaxdiff.denoise(jax.random.key(0), denoiser, states, cond=labels, times=grid).x
    energy = noise_energy(denoiser, states, grid[0], cond)
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
    ends = rest[split:-split].reshape(len(KINDS), count - 1, 2, *event)
    shown = {
        kind: np.concatenate([plain[1:, None], pair], 1)
        for kind, pair in zip(KINDS, ends, strict=True)
    }
    return Edits(
        columns, own, shown, own["guidance"][0, 0, 2:], np.asarray(cosines), np.asarray(lengths)
    )


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
