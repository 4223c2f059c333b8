"""Write evodiff.npz: float64 runs of the EVODiff authors' code on a closed-form model.

Run by hand (README.md says how), with the folder of the authors' `samplers` package.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_diffusers import POINTS, noise_prediction

sys.path.insert(0, sys.argv[1])
from samplers.evodiff import EVODiff_edm
from samplers.utils import NoiseScheduleEDM

torch.set_default_dtype(torch.float64)


def run(steps, skip_type, start, end):
    """Two channels of three pixels; the states at all levels but the last come as the probes."""
    model = lambda x, t: torch.from_numpy(
        noise_prediction(x.numpy().reshape(-1), float(t[0])).reshape(x.shape)
    )
    x = torch.from_numpy(start * POINTS.reshape(1, 2, 3, 1))
    sampler = EVODiff_edm(NoiseScheduleEDM())
    times = sampler.get_time_steps(skip_type, start, end, steps, "cpu").double()
    sampler.get_time_steps = lambda **_: times
    final = sampler.sample(
        model, x, steps=steps, t_start=start, t_end=end, skip_type=skip_type, method="multistep"
    )
    return times.numpy(), final.numpy().reshape(2, 3, 1)


arrays = {}
for steps, skip_type, start, end in [
    (5, "edm", 80.0, 0.002),
    (10, "edm", 80.0, 0.002),
    (10, "logSNR", 20.0, 0.02),
    (25, "edm", 80.0, 0.002),
    (30, "logSNR", 20.0, 0.3),
]:
    times, final = run(steps, skip_type, start, end)
    arrays[f"{skip_type}/{steps}|times"], arrays[f"{skip_type}/{steps}|x"] = times, final
np.savez(Path(__file__).parent / "evodiff.npz", **arrays)
