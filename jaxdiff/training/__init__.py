"""Training: players, one compiled step, averages of weights, checkpoints, and a loop."""

from jaxdiff.training._checkpoint import CheckpointError as CheckpointError
from jaxdiff.training._checkpoint import CheckpointStore as CheckpointStore
from jaxdiff.training._checkpoint import write_json as write_json
from jaxdiff.training._ema import EMA as EMA
from jaxdiff.training._ema import ConstantEMA as ConstantEMA
from jaxdiff.training._ema import PowerEMA as PowerEMA
from jaxdiff.training._ema import reconstruct_ema as reconstruct_ema
from jaxdiff.training._ema import sigma_rel_to_gamma as sigma_rel_to_gamma
from jaxdiff.training._loop import Hook as Hook
from jaxdiff.training._loop import Interrupted as Interrupted
from jaxdiff.training._loop import NonFiniteLossError as NonFiniteLossError
from jaxdiff.training._loop import fit as fit
from jaxdiff.training._run import Run as Run
from jaxdiff.training._run import load_run as load_run
from jaxdiff.training._run import save_model as save_model
from jaxdiff.training._step import Follow as Follow
from jaxdiff.training._step import Frozen as Frozen
from jaxdiff.training._step import Player as Player
from jaxdiff.training._step import PlayerState as PlayerState
from jaxdiff.training._step import TrainState as TrainState
from jaxdiff.training._step import init_train_state as init_train_state
from jaxdiff.training._step import make_train_step as make_train_step
from jaxdiff.training._step import next_phase as next_phase
from jaxdiff.training._step import outline as outline
