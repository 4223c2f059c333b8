"""Generators and scores of Gaussian laws, for proofs of what matching of distributions does."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess


class Flat(GaussianProcess):
    """alpha and sigma that are the same at any t but 0, for values of one noise level."""

    a: float
    s: float
    t_min: float = 0.01
    t_max: float = 1.0

    def alpha(self, t):
        return self.a * jnp.ones_like(t)

    def sigma(self, t):
        return self.s * jnp.ones_like(t)


class Affine(FlowMap):
    """z -> mean_c + std_c z of unit noise z = x / sigma(t), whatever s; c a label, or 0."""

    process: GaussianProcess
    mean: Array
    std: Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        del s, key
        c = 0 if cond is None else cond
        return self.mean[c] + self.std[c] * x / self.process.sigma(t)


class Posterior(Denoiser):
    """The denoiser of N(mean_c, std_c^2) in every number: what learns an `Affine` exactly."""

    process: GaussianProcess
    mean: Array
    std: Array

    def __call__(self, x, t, cond=None, *, key=None):
        del key
        c = 0 if cond is None else cond
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        gain = alpha * self.std[c] ** 2 / (alpha**2 * self.std[c] ** 2 + sigma**2)
        return self.mean[c] + gain * (x - alpha * self.mean[c])


def learned(model):
    """For `Player(trainable=learned)`."""
    return model.mean, model.std


def law(kind, process, mean, std):
    """An `Affine` or a `Posterior` of these numbers, one for each label."""
    return kind(process, jnp.atleast_1d(jnp.asarray(mean)), jnp.atleast_1d(jnp.asarray(std)))


def counted(model):
    """The model, and a list that grows by one at each of its calls: by a pass, under vmap."""
    calls: list[int] = []

    class Counted(type(model)):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return Counted(**fields), calls


def quadrature(count=12, axes=2):
    """Nodes `(count^axes, axes)` of standard normal numbers, and their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    weights = weights / weights.sum()
    points = np.array(list(itertools.product(nodes, repeat=axes)))
    products = np.array([np.prod(w) for w in itertools.product(weights, repeat=axes)])
    return jnp.asarray(points), jnp.asarray(products)


def mean_gradient(loss, generator, fake, teacher, t, count=12):
    """d / d (mean, std) of the mean loss at one time, by quadrature over z and eps."""
    (z, eps), weights = (quadrature(count)[0].T, quadrature(count)[1])

    def mean(parameters):
        m, s = parameters

        def one(z, eps):
            return loss.per_example(fake, teacher, (m + s * z)[None], eps[None], t)[0]

        return weights @ jax.vmap(one)(z, eps)

    return np.array(jax.grad(mean)((generator.mean[0], generator.std[0])))


def noised_kl(process, t, mean, std, to_mean, to_std):
    """KL of two Gaussian laws, noised to t."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    q, p = (alpha * s**2 * alpha + sigma**2 for s in (std, to_std))
    return (q / p - 1 - jnp.log(q / p) + (alpha * (mean - to_mean)) ** 2 / p) / 2
