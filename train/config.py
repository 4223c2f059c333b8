"""What scripts of one's own need of the recipes: configurations, and what they build."""

from train.core.building import build_average as build_average
from train.core.building import build_network as build_network
from train.core.building import build_optimizer as build_optimizer
from train.core.building import condition_arguments as condition_arguments
from train.core.config import EvaluationConfig as EvaluationConfig
from train.core.config import NetworkConfig as NetworkConfig
from train.core.config import RunConfig as RunConfig
from train.core.config import load_config as load_config
from train.core.config import save_config as save_config
from train.core.data import DataConfig as DataConfig
from train.core.data import DataInfo as DataInfo
from train.core.data import build_source as build_source
from train.core.data import build_sources as build_sources
from train.pretraining.recipe import PRESETS as PRESETS
from train.pretraining.recipe import Config as Config
from train.pretraining.recipe import build_denoiser as build_denoiser
from train.pretraining.recipe import build_loss as build_loss
from train.pretraining.recipe import build_player as build_player
