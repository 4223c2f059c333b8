"""Diffrax solvers that integrate a denoiser, and time grids for them."""

from jaxdiff.solvers._ancestral import Ancestral as Ancestral
from jaxdiff.solvers._ancestral import LearnedAncestral as LearnedAncestral
from jaxdiff.solvers._base import DiffusionSolver as DiffusionSolver
from jaxdiff.solvers._base import Problem as Problem
from jaxdiff.solvers._base import Step as Step
from jaxdiff.solvers._ddim import DDIM as DDIM
from jaxdiff.solvers._deis import DEIS as DEIS
from jaxdiff.solvers._dpm_solver import DPMSolver as DPMSolver
from jaxdiff.solvers._dpm_solver import DPMSolverMultistep as DPMSolverMultistep
from jaxdiff.solvers._edm_heun import EDMHeun as EDMHeun
from jaxdiff.solvers._grids import check_times as check_times
from jaxdiff.solvers._grids import karras_times as karras_times
from jaxdiff.solvers._grids import log_snr_times as log_snr_times
from jaxdiff.solvers._grids import quadratic_times as quadratic_times
from jaxdiff.solvers._grids import resolve_times as resolve_times
from jaxdiff.solvers._grids import uniform_times as uniform_times
from jaxdiff.solvers._sa_solver import SASolver as SASolver
from jaxdiff.solvers._seeds import SEEDS as SEEDS
from jaxdiff.solvers._unipc import UniPC as UniPC
