"""Mean and covariance of features that arrive in batches."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff._tree import dots
from jaxdiff.metrics._pair import features


class Moments(eqx.Module):
    """Count, mean and centred second moment of features, of which batches are added.

    For Frechet distances over sets that do not fit in memory:
    `frechet_distance_gaussian(a.mean, a.covariance, b.mean, b.covariance)`. Batches are centred
    before they are summed, and merged about their common mean: features far from the origin lose
    no digits. Covariances have half the digits of the factors that `frechet_distance` takes from
    samples: prefer that where they fit, or float64.

    Attributes:
        count: examples so far, a float.
        mean: (d,).
        scatter: (d, d) sum of (x - mean) (x - mean)^T.
    """

    count: Array
    mean: Float[Array, "d"]
    scatter: Float[Array, "d d"]

    @classmethod
    def of(cls, x: Float[Array, "n *event"]) -> "Moments":
        """Those of a batch; rows may be split over a mesh.

        Args:
            x: (n, *event).

        Raises:
            ValueError: for no examples, or numbers that are not finite.
        """
        x = features("x", x)
        mean = jnp.mean(x, 0)
        mean = mean + jnp.mean(x - mean, 0)
        centred = x - mean
        return cls(jnp.asarray(len(x), x.dtype), mean, dots(centred.T, centred))

    def merge(self, other: "Moments") -> "Moments":
        """Those of both together, in any order up to rounding.

        Reference: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances", 1979, eq. 2.1.
        """
        count = self.count + other.count
        gap = other.mean - self.mean
        share = other.count / count
        scatter = self.scatter + other.scatter + self.count * share * jnp.outer(gap, gap)
        return Moments(count, self.mean + share * gap, scatter)

    @property
    def covariance(self) -> Float[Array, "d d"]:
        """The unbiased covariance, for which two examples are needed."""
        return self.scatter / (self.count - 1)
