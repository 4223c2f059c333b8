"""Metrics between samples: Frechet distance, MMD, sliced Wasserstein, classifier accuracy.

They couple a batch, and take samples or features with a leading axis.
"""

from jaxdiff.metrics._accuracy import accuracy as accuracy
from jaxdiff.metrics._frechet import frechet_distance as frechet_distance
from jaxdiff.metrics._frechet import frechet_distance_gaussian as frechet_distance_gaussian
from jaxdiff.metrics._mmd import RBF as RBF
from jaxdiff.metrics._mmd import Kernel as Kernel
from jaxdiff.metrics._mmd import Polynomial as Polynomial
from jaxdiff.metrics._mmd import median_bandwidth as median_bandwidth
from jaxdiff.metrics._mmd import mmd2_biased as mmd2_biased
from jaxdiff.metrics._mmd import mmd2_unbiased as mmd2_unbiased
from jaxdiff.metrics._sliced_wasserstein import sliced_wasserstein as sliced_wasserstein
from jaxdiff.metrics._sliced_wasserstein import wasserstein_1d as wasserstein_1d
