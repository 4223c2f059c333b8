"""Networks (flax.nnx modules over one example), and taps into their activations.

Every network is called as `network(x, t, cond=None, *, key=None, tap=None)`, see `Network`: x one
example, t its scalar noise label, cond its condition or None, key for dropout or None for none.

Networks are pytrees whose leaves are the arrays of their `nnx.Param`s. What replaces a weight
must go inside, and not in place of, the Param; the tree is another one otherwise, which compiles
anew and no checkpoint fits:

    row = network.embedding.classes.embedding
    changed = eqx.tree_at(lambda n: n.embedding.classes.embedding.get_raw_value(), network, new)
"""

from jaxdiff.networks._aligner import TapAligner as TapAligner
from jaxdiff.networks._classifier import ConvClassifier as ConvClassifier
from jaxdiff.networks._classifier import Softplus as Softplus
from jaxdiff.networks._classifier import softened as softened
from jaxdiff.networks._dit import DIT_SIZES as DIT_SIZES
from jaxdiff.networks._dit import DiT as DiT
from jaxdiff.networks._inception import InceptionV3 as InceptionV3
from jaxdiff.networks._inception import load_inception as load_inception
from jaxdiff.networks._layers import Attention as Attention
from jaxdiff.networks._layers import Network as Network
from jaxdiff.networks._layers import attend as attend
from jaxdiff.networks._layers import dropout as dropout
from jaxdiff.networks._layers import timestep_embedding as timestep_embedding
from jaxdiff.networks._layers import with_attention as with_attention
from jaxdiff.networks._layers import with_scalars as with_scalars
from jaxdiff.networks._layers import without_remat as without_remat
from jaxdiff.networks._mlp import MLP as MLP
from jaxdiff.networks._rules import TENSOR_RULES as TENSOR_RULES
from jaxdiff.networks._unet import UNet as UNet
from jaxdiff.networks._unet import num_params as num_params
from jaxdiff.taps import EditedNetwork as EditedNetwork
from jaxdiff.taps import Tap as Tap
from jaxdiff.taps import read_taps as read_taps
from jaxdiff.taps import tap_names as tap_names
