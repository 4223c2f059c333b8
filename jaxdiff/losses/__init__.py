"""Training losses: weighted denoising, its weightings and time laws, and variational bounds."""

from jaxdiff.losses._batch import drop_cond as drop_cond
from jaxdiff.losses._batch import each_example as each_example
from jaxdiff.losses._batch import stratified_uniform as stratified_uniform
from jaxdiff.losses._denoising import DenoisingLoss as DenoisingLoss
from jaxdiff.losses._denoising import denoising_error as denoising_error
from jaxdiff.losses._iddpm import HybridLoss as HybridLoss
from jaxdiff.losses._iddpm import reverse_step_nll as reverse_step_nll
from jaxdiff.losses._noisy_classifier import NoisyClassifierLoss as NoisyClassifierLoss
from jaxdiff.losses._time_laws import Karras as Karras
from jaxdiff.losses._time_laws import LogitNormal as LogitNormal
from jaxdiff.losses._time_laws import LogNormal as LogNormal
from jaxdiff.losses._time_laws import TimeLaw as TimeLaw
from jaxdiff.losses._time_laws import UniformLogSNR as UniformLogSNR
from jaxdiff.losses._time_laws import UniformTime as UniformTime
from jaxdiff.losses._vlb import discrete_reconstruction as discrete_reconstruction
from jaxdiff.losses._vlb import gaussian_reconstruction as gaussian_reconstruction
from jaxdiff.losses._vlb import prior_kl as prior_kl
from jaxdiff.losses._vlb import variational_bound as variational_bound
from jaxdiff.losses._weightings import ELBO as ELBO
from jaxdiff.losses._weightings import P2 as P2
from jaxdiff.losses._weightings import MinSNR as MinSNR
from jaxdiff.losses._weightings import Sigmoid as Sigmoid
from jaxdiff.losses._weightings import TruncatedSNR as TruncatedSNR
from jaxdiff.losses._weightings import Uniform as Uniform
from jaxdiff.losses._weightings import Weighting as Weighting
