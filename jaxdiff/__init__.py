"""jaxdiff: diffusion, score-based and flow models in JAX.

One idea carries the library: a denoiser is a pure function (x, t, cond) -> E[x0 | x_t]. Networks
become denoisers, guidance maps denoisers to denoisers, solvers integrate denoisers, losses
train them, and oracles are denoisers known in closed form.

Conventions:

* x_t = alpha(t) x0 + sigma(t) eps. Time t grows with noise; t near 0 is data. Processes live on
  [0, 1], except that EDM's time is its sigma and TrigFlow's its angle.
* log_snr(t) = log(alpha^2 / sigma^2); DPM-Solver's lambda is half of it.
* Guidance `scale = 1` is the plain conditional model, 0 the unconditional one.
* Denoisers, networks and per-example losses take one example, x of shape `(*event)` and a scalar
  t; batches are `jax.vmap` outside. Images are `(H, W, C)`, scaled to [-1, 1].
* Keys are typed (`jax.random.key`), explicit and per example: example i draws from
  `fold_in(key, i)` with its global index i, and is the same in any batch.
* Everything is an immutable pytree and crosses `jax.jit` as an argument. A number that may be
  swept is a leaf; a choice of structure is static.
"""

from jaxdiff import conditions as conditions
from jaxdiff import data as data
from jaxdiff import distillation as distillation
from jaxdiff import finetuning as finetuning
from jaxdiff import geometry as geometry
from jaxdiff import guidance as guidance
from jaxdiff import losses as losses
from jaxdiff import metrics as metrics
from jaxdiff import networks as networks
from jaxdiff import oracles as oracles
from jaxdiff import parallel as parallel
from jaxdiff import predictions as predictions
from jaxdiff import processes as processes
from jaxdiff import solvers as solvers
from jaxdiff import training as training
from jaxdiff._tree import Number as Number
from jaxdiff._tree import number as number
from jaxdiff.denoiser import Clipped as Clipped
from jaxdiff.denoiser import Denoiser as Denoiser
from jaxdiff.denoiser import DenoiserMap as DenoiserMap
from jaxdiff.denoiser import DynamicThresholding as DynamicThresholding
from jaxdiff.denoiser import Estimate as Estimate
from jaxdiff.denoiser import LearnedVarianceDenoiser as LearnedVarianceDenoiser
from jaxdiff.denoiser import LogNoiseLabel as LogNoiseLabel
from jaxdiff.denoiser import NetworkDenoiser as NetworkDenoiser
from jaxdiff.denoiser import Preconditioning as Preconditioning
from jaxdiff.denoiser import TimeLabel as TimeLabel
from jaxdiff.denoiser import edit_taps as edit_taps
from jaxdiff.denoiser import find_network as find_network
from jaxdiff.denoiser import reading as reading
from jaxdiff.energy import EnergyDenoiser as EnergyDenoiser
from jaxdiff.flow_map import FlowMap as FlowMap
from jaxdiff.host import HostFunction as HostFunction
from jaxdiff.likelihood import LogLikelihood as LogLikelihood
from jaxdiff.likelihood import bits_per_dim as bits_per_dim
from jaxdiff.likelihood import dequantize as dequantize
from jaxdiff.likelihood import log_likelihood as log_likelihood
from jaxdiff.sampling import Solution as Solution
from jaxdiff.sampling import Trajectory as Trajectory
from jaxdiff.sampling import denoise as denoise
from jaxdiff.sampling import invert as invert
from jaxdiff.sampling import sample as sample
from jaxdiff.stepwise import Step as Step
from jaxdiff.stepwise import Stepwise as Stepwise
from jaxdiff.traces import ExactTrace as ExactTrace
from jaxdiff.traces import Hutchinson as Hutchinson
from jaxdiff.traces import HutchPlusPlus as HutchPlusPlus

__version__ = "0.3.0"
