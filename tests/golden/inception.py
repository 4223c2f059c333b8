"""Makes inception.npz: what PyTorch's InceptionV3 for FID gives with weights made of their names.

    python tests/golden/inception.py

Needs torch, torchvision and pytorch-fid; the weights are `weight` of `inception_weights.py`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from pytorch_fid import inception
from pytorch_fid.inception import InceptionV3

sys.path.insert(0, str(Path(__file__).parent))
from inception_weights import image, weight

# The published file is not downloaded: every array is made of its name.
inception.load_state_dict_from_url = lambda *args, **kwargs: {
    name: torch.tensor(weight(name, tuple(value.shape)))
    for name, value in inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    .state_dict()
    .items()
    if "num_batches" not in name
}
# Counters of batches are left out.
load = torch.nn.Module.load_state_dict
torch.nn.Module.load_state_dict = lambda self, state, **kwargs: load(self, state, strict=False)
network = InceptionV3([3], use_fid_inception=True).eval()
x = torch.tensor(np.stack([image(0), image(1)])).permute(0, 3, 1, 2)
with torch.no_grad():
    pooled = network((x + 1) / 2)[0][:, :, 0, 0].numpy()
np.savez_compressed(Path(__file__).with_name("inception.npz"), pooled=pooled)
print(pooled.shape, pooled.mean(), pooled.std())
