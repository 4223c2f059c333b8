"""Metrics between samples: MMD, Frechet distance, neighbours, diversity, tests, and their errors.

They couple a batch, and take samples or features with a leading axis.
"""

from jaxdiff.metrics._accuracy import accuracy as accuracy
from jaxdiff.metrics._c2st import TwoSampleTest as TwoSampleTest
from jaxdiff.metrics._c2st import c2st as c2st
from jaxdiff.metrics._calibration import TrajectoryCalibration as TrajectoryCalibration
from jaxdiff.metrics._calibration import brier_score as brier_score
from jaxdiff.metrics._calibration import calibration_error as calibration_error
from jaxdiff.metrics._calibration import negative_log_likelihood as negative_log_likelihood
from jaxdiff.metrics._calibration import trajectory_calibration as trajectory_calibration
from jaxdiff.metrics._embeddings import ClassEmbedding as ClassEmbedding
from jaxdiff.metrics._embeddings import Embedding as Embedding
from jaxdiff.metrics._embeddings import MeanEmbedding as MeanEmbedding
from jaxdiff.metrics._embeddings import SampleEmbedding as SampleEmbedding
from jaxdiff.metrics._embeddings import class_embedding as class_embedding
from jaxdiff.metrics._embeddings import mean_embedding as mean_embedding
from jaxdiff.metrics._embeddings import mmd2_to_classes as mmd2_to_classes
from jaxdiff.metrics._embeddings import mmd2_to_embedding as mmd2_to_embedding
from jaxdiff.metrics._embeddings import sample_embedding as sample_embedding
from jaxdiff.metrics._errors import FrechetLimit as FrechetLimit
from jaxdiff.metrics._errors import bootstrap as bootstrap
from jaxdiff.metrics._errors import bootstrap_error as bootstrap_error
from jaxdiff.metrics._errors import frechet_limit as frechet_limit
from jaxdiff.metrics._features import features_of as features_of
from jaxdiff.metrics._frechet import frechet_distance as frechet_distance
from jaxdiff.metrics._frechet import frechet_distance_gaussian as frechet_distance_gaussian
from jaxdiff.metrics._kernels import RBF as RBF
from jaxdiff.metrics._kernels import Energy as Energy
from jaxdiff.metrics._kernels import FiniteKernel as FiniteKernel
from jaxdiff.metrics._kernels import Kernel as Kernel
from jaxdiff.metrics._kernels import Mixture as Mixture
from jaxdiff.metrics._kernels import Polynomial as Polynomial
from jaxdiff.metrics._kernels import RandomFeatures as RandomFeatures
from jaxdiff.metrics._kernels import RationalQuadratic as RationalQuadratic
from jaxdiff.metrics._kernels import median_bandwidth as median_bandwidth
from jaxdiff.metrics._kernels import multi_rbf as multi_rbf
from jaxdiff.metrics._mmd import conditional_mmd2 as conditional_mmd2
from jaxdiff.metrics._mmd import mmd2_biased as mmd2_biased
from jaxdiff.metrics._mmd import mmd2_linear as mmd2_linear
from jaxdiff.metrics._mmd import mmd2_unbiased as mmd2_unbiased
from jaxdiff.metrics._mmd import mmd2_variance as mmd2_variance
from jaxdiff.metrics._mmd import permutation_test as permutation_test
from jaxdiff.metrics._moments import Moments as Moments
from jaxdiff.metrics._neighbours import DensityCoverage as DensityCoverage
from jaxdiff.metrics._neighbours import PrecisionRecall as PrecisionRecall
from jaxdiff.metrics._neighbours import copied_share as copied_share
from jaxdiff.metrics._neighbours import density_coverage as density_coverage
from jaxdiff.metrics._neighbours import precision_recall as precision_recall
from jaxdiff.metrics._scores import classifier_score as classifier_score
from jaxdiff.metrics._sliced_wasserstein import sliced_wasserstein as sliced_wasserstein
from jaxdiff.metrics._sliced_wasserstein import wasserstein_1d as wasserstein_1d
from jaxdiff.metrics._vendi import vendi_score as vendi_score
