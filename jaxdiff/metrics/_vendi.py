"""The Vendi score: how many different examples there are, in effect."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import is_known
from jaxdiff.metrics._kernels import Kernel, Polynomial
from jaxdiff.metrics._pair import features


def vendi_score(
    x: Float[Array, "n *event"],
    kernel: Kernel = Polynomial(1, 1.0, 0.0),
    *,
    order: float = 1.0,
) -> Scalar:
    """The effective number of different examples: 1 if all are alike, n if none are.

    exp(-sum_i l_i log l_i) of the eigenvalues of K / n, K_ij = k_ij / sqrt(k_ii k_jj); of another
    order q, (sum_i l_i^q)^(1 / (1 - q)). It knows nothing of fidelity: noise scores high.

    Args:
        x: (n, *event) samples or features.
        kernel: positive definite; by default the cosine.
        order: q >= 0; 1 is Shannon's entropy, 2 needs no eigenvalues and is cheap and
            differentiable, infinity looks at the largest eigenvalue.

    Returns:
        The score, a scalar in [1, n]. It grows with n: compare figures of equal n alone.

    Raises:
        ValueError: for no examples, numbers that are not finite, or an example that has no
            similarity with itself, as a vector of zeros with the cosine.

    Reference: Friedman, Dieng, "The Vendi Score", 2022, arXiv 2210.02410, definition 3.1; orders:
    Pasarkar, Dieng, "Cousins of the Vendi Score", 2023, arXiv 2310.12952, eq. 2.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial(1, 1.0, 0.0)")
    check_number("order", order, least=0.0, finite=False)
    x = features("x", x)
    gram = kernel(x, x)
    own = jnp.diag(gram)
    if is_known(own) and not (own > 0).all():
        raise ValueError(
            "`kernel` must be positive for every example with itself, got "
            f"{float(jnp.min(own)):.3g}. Leave out examples of zeros, or take an RBF()."
        )
    norms = jnp.sqrt(own)
    gram = gram / norms[:, None] / norms / len(x)
    if order == 2:
        return 1 / jnp.sum(gram**2)
    values = jnp.linalg.eigvalsh(gram)
    if math.isinf(order):
        return 1 / values[-1]
    # Eigenvalues that are 0 come out as rounding errors of either sign.
    there = values > len(x) * jnp.finfo(x.dtype).eps * values[-1]
    values = jnp.where(there, values, 1.0)
    logs = jnp.log(values)
    if order == 1:
        return jnp.exp(-jnp.sum(jnp.where(there, values * logs, 0)))
    # sum l = 1, so that sum l^q - 1 = sum l (l^(q - 1) - 1), which keeps its digits near q = 1.
    excess = jnp.sum(jnp.where(there, values * jnp.expm1((order - 1) * logs), 0))
    return jnp.exp(jnp.log1p(excess) / (1 - order))
