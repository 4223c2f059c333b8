"""Diffrax solvers that integrate a denoiser, and time grids for them."""

from jaxdiff.solvers._align_your_steps import STABLE_DIFFUSION_STEPS as STABLE_DIFFUSION_STEPS
from jaxdiff.solvers._align_your_steps import (
    STABLE_DIFFUSION_XL_STEPS as STABLE_DIFFUSION_XL_STEPS,
)
from jaxdiff.solvers._align_your_steps import align_your_steps as align_your_steps
from jaxdiff.solvers._align_your_steps import kl_upper_bound as kl_upper_bound
from jaxdiff.solvers._ancestral import Ancestral as Ancestral
from jaxdiff.solvers._ancestral import LearnedAncestral as LearnedAncestral
from jaxdiff.solvers._ancestral_noise import AncestralNoise as AncestralNoise
from jaxdiff.solvers._auto_diffusion import optimise_times as optimise_times
from jaxdiff.solvers._auto_diffusion import search_times as search_times
from jaxdiff.solvers._base import DiffusionSolver as DiffusionSolver
from jaxdiff.solvers._base import Problem as Problem
from jaxdiff.solvers._base import Step as Step
from jaxdiff.solvers._bdia import BDIA as BDIA
from jaxdiff.solvers._ddim import DDIM as DDIM
from jaxdiff.solvers._deis import DEIS as DEIS
from jaxdiff.solvers._dmcmc import ChainStates as ChainStates
from jaxdiff.solvers._dmcmc import OracleNoisePosterior as OracleNoisePosterior
from jaxdiff.solvers._dmcmc import langevin_gibbs as langevin_gibbs
from jaxdiff.solvers._dpm_solver import DPMSolver as DPMSolver
from jaxdiff.solvers._dpm_solver import DPMSolverMultistep as DPMSolverMultistep
from jaxdiff.solvers._edict import EDICT as EDICT
from jaxdiff.solvers._edm_heun import EDMHeun as EDMHeun
from jaxdiff.solvers._euler_maruyama import EulerMaruyama as EulerMaruyama
from jaxdiff.solvers._evodiff import EVODiff as EVODiff
from jaxdiff.solvers._fixed_point import FixedPointInversion as FixedPointInversion
from jaxdiff.solvers._grids import Schedule as Schedule
from jaxdiff.solvers._grids import cosine_times as cosine_times
from jaxdiff.solvers._grids import interpolate_times as interpolate_times
from jaxdiff.solvers._grids import karras_times as karras_times
from jaxdiff.solvers._grids import log_snr_times as log_snr_times
from jaxdiff.solvers._grids import polyexponential_times as polyexponential_times
from jaxdiff.solvers._grids import quadratic_times as quadratic_times
from jaxdiff.solvers._grids import shifted_times as shifted_times
from jaxdiff.solvers._grids import uniform_times as uniform_times
from jaxdiff.solvers._pndm import PNDM as PNDM
from jaxdiff.solvers._predictor_corrector import PredictorCorrector as PredictorCorrector
from jaxdiff.solvers._reflected import Reflected as Reflected
from jaxdiff.solvers._reflected import reflect as reflect
from jaxdiff.solvers._reflected import reflected_kernel_score as reflected_kernel_score
from jaxdiff.solvers._reflected import reflected_log_kernel as reflected_log_kernel
from jaxdiff.solvers._reflected import reflected_marginal as reflected_marginal
from jaxdiff.solvers._restart import Restart as Restart
from jaxdiff.solvers._restart import RestartInterval as RestartInterval
from jaxdiff.solvers._rnri import RNRI as RNRI
from jaxdiff.solvers._sa_solver import SASolver as SASolver
from jaxdiff.solvers._seeds import SEEDS as SEEDS
from jaxdiff.solvers._stock import ReverseSDE as ReverseSDE
from jaxdiff.solvers._table_times import discrete_times as discrete_times
from jaxdiff.solvers._table_times import table_times as table_times
from jaxdiff.solvers._time_sharing import SharedTimes as SharedTimes
from jaxdiff.solvers._times import check_times as check_times
from jaxdiff.solvers._times import resolve_times as resolve_times
from jaxdiff.solvers._unipc import UniPC as UniPC
