"""Fine-tuning: adapters, losses through the sampler, adaptation to few images, ensembles."""

from jaxdiff._tree import straight_through_clip as straight_through_clip
from jaxdiff.finetuning._domain_studio import DomainStudioLoss as DomainStudioLoss
from jaxdiff.finetuning._domain_studio import haar_details as haar_details
from jaxdiff.finetuning._draft import RewardLoss as RewardLoss
from jaxdiff.finetuning._feature_ensemble import FeatureEnsemble as FeatureEnsemble
from jaxdiff.finetuning._feature_ensemble import Gate as Gate
from jaxdiff.finetuning._lora import AdaptedNetwork as AdaptedNetwork
from jaxdiff.finetuning._lora import Adapter as Adapter
from jaxdiff.finetuning._lora import LowRank as LowRank
from jaxdiff.finetuning._lora import adapt as adapt
from jaxdiff.finetuning._lora import adapter_weights as adapter_weights
from jaxdiff.finetuning._lora import load_adapter as load_adapter
from jaxdiff.finetuning._lora import make_adapter as make_adapter
from jaxdiff.finetuning._lora import make_orthogonal_adapter as make_orthogonal_adapter
from jaxdiff.finetuning._lora import merge as merge
from jaxdiff.finetuning._lora import merged as merged
from jaxdiff.finetuning._lora import save_adapter as save_adapter
from jaxdiff.finetuning._mmd import MMDLoss as MMDLoss
from jaxdiff.finetuning._through_sampler import ThroughSampler as ThroughSampler
