"""Time-dependent composition: each condition where its resolution is generated."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.geometry import chromatogram
from jaxdiff.guidance._scale import ScaleSchedule
from jaxdiff.processes import GaussianProcess


class ResolutionShares(ScaleSchedule):
    """scale times the share of each group of frequencies in what is generated at t.

    A scale of `Composable`, of k numbers that add up to `scale`: the first condition may speak of
    what is coarse, and guides while that is made, the last of what is fine.

    Args:
        power: variance of the data in each band, `(num_bands,)`, > 0; `geometry.band_power`.
        groups: share of each condition in each band, `(k, num_bands)`; columns that add up to 1
            keep the sum.
        scale: sum over conditions.

    Reference: Hwang, Park, Jo, "Resolution Chromatography of Diffusion Models", 2023, arXiv
    2401.10247; there for resolutions, here for any bands.
    """

    power: Array
    groups: Array
    scale: Number = number(1.0)

    def __check_init__(self):
        check_number("scale", self.scale)
        if jnp.ndim(self.groups) != 2 or jnp.shape(self.groups)[1:] != jnp.shape(self.power):
            raise ValueError(
                f"`groups` must have a row for each condition and a column for each of the "
                f"{jnp.shape(self.power)} bands, got shape {jnp.shape(self.groups)}."
            )

    def __call__(self, process: GaussianProcess, t: Array) -> Array:
        """See `ScaleSchedule`; of every condition, `(k,)`."""
        return self.scale * (self.groups @ chromatogram(process, self.power, t))
