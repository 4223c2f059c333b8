"""Write k_diffusion.npz: float64 runs of k-diffusion's samplers on a closed-form model.

Run by hand (README.md says how), with the folder of a checkout of k-diffusion.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from make_diffusers import POINTS, gaussians, noise_prediction

torch.set_default_dtype(torch.float64)


def load(folder):
    """The module of samplers alone; the package imports much that they do not need."""
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    package.utils, package.__path__ = utils, [str(folder)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", folder / "sampling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sampling = load(Path(sys.argv[1]) / "k_diffusion")
arrays = {}


def denoiser(x, sigma):
    kap = float(sigma[0])
    return x - torch.from_numpy(kap * noise_prediction(x.numpy()[0], kap))[None]


def record(name, function, sigmas, **options):
    """All states of a run, the last included."""
    noise, used = gaussians(len(sigmas)), []

    def draw(*_):
        used.append(noise[len(used)])
        return torch.from_numpy(used[-1])[None]

    sampling.torch.randn_like = lambda x: draw()
    if "ancestral" in name or "sde" in name:
        options["noise_sampler"] = draw
    states = []
    x = sigmas[0] * torch.from_numpy(POINTS)[None]
    callback = lambda info: states.append(info["x"].numpy()[0])
    final = function(denoiser, x, sigmas, disable=True, callback=callback, **options)
    arrays[f"{name}|kap"], arrays[f"{name}|x"] = sigmas.numpy(), np.stack([*states, final[0]])
    arrays[f"{name}|noise"] = np.asarray(used)


karras = sampling.get_sigmas_karras(10, 0.03, 15.0).double()
for eta in (0.5, 1.0):
    for kind in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_3m_sde"):
        record(f"{kind}/eta={eta}", getattr(sampling, f"sample_{kind}"), karras, eta=eta)
    for kind in ("midpoint", "heun"):
        record(
            f"dpmpp_2m_sde/{kind}/eta={eta}",
            sampling.sample_dpmpp_2m_sde,
            karras,
            eta=eta,
            solver_type=kind,
        )
record("dpmpp_2m", sampling.sample_dpmpp_2m, karras)
record("lms", sampling.sample_lms, karras)
sampling.torch.randn_like = torch.zeros_like  # drawn, and multiplied by zero
for nfe in (9, 10, 11):
    x = 15.0 * torch.from_numpy(POINTS)[None]
    x = sampling.sample_dpm_fast(denoiser, x, 0.03, 15.0, nfe, disable=True)
    arrays[f"dpm_fast/nfe={nfe}|x"] = x.numpy()
np.savez(Path(__file__).parent / "k_diffusion.npz", **arrays)
