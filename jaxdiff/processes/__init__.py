"""Forward noising processes; the Gaussian ones are x_t = alpha(t) x0 + sigma(t) eps."""

from jaxdiff.processes._base import GaussianProcess as GaussianProcess
from jaxdiff.processes._base import Process as Process
from jaxdiff.processes._cosine import Cosine as Cosine
from jaxdiff.processes._edm import EDM as EDM
from jaxdiff.processes._rectified_flow import RectifiedFlow as RectifiedFlow
from jaxdiff.processes._score_sde import VE as VE
from jaxdiff.processes._score_sde import VP as VP
from jaxdiff.processes._score_sde import SubVP as SubVP
from jaxdiff.processes._tabulated import Tabulated as Tabulated
from jaxdiff.processes._trigflow import TrigFlow as TrigFlow
