"""Guidance: maps from denoisers to denoisers, one paper a file."""

from jaxdiff.guidance._adaptive import AdaptiveGuidance as AdaptiveGuidance
from jaxdiff.guidance._annealed import ConditionAnnealed as ConditionAnnealed
from jaxdiff.guidance._autoguidance import Autoguidance as Autoguidance
from jaxdiff.guidance._cfg_plus_plus import CFGPlusPlus as CFGPlusPlus
from jaxdiff.guidance._classifier import ClassifierGuidance as ClassifierGuidance
from jaxdiff.guidance._classifier_free import ClassifierFree as ClassifierFree
from jaxdiff.guidance._composable import Composable as Composable
from jaxdiff.guidance._composable import NegativePrompt as NegativePrompt
from jaxdiff.guidance._factorized import Factorized as Factorized
from jaxdiff.guidance._factorized import FixedPart as FixedPart
from jaxdiff.guidance._independent import IndependentCondition as IndependentCondition
from jaxdiff.guidance._independent import TimeStepGuidance as TimeStepGuidance
from jaxdiff.guidance._independent import UniformLabel as UniformLabel
from jaxdiff.guidance._interval import LimitedInterval as LimitedInterval
from jaxdiff.guidance._perturbed_attention import PerturbedAttention as PerturbedAttention
from jaxdiff.guidance._projected import AdaptiveProjected as AdaptiveProjected
from jaxdiff.guidance._rescale import RescaledClassifierFree as RescaledClassifierFree
from jaxdiff.guidance._scale import CosineScale as CosineScale
from jaxdiff.guidance._scale import LinearScale as LinearScale
from jaxdiff.guidance._scale import PairRule as PairRule
from jaxdiff.guidance._scale import ScaleSchedule as ScaleSchedule
from jaxdiff.guidance._self_attention import SelfAttention as SelfAttention
from jaxdiff.guidance._smoothed_energy import SmoothedEnergy as SmoothedEnergy
from jaxdiff.guidance._zero_star import CFGZeroStar as CFGZeroStar
