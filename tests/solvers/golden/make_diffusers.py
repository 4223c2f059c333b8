"""Write diffusers.npz: float64 trajectories of the diffusers schedulers on a closed-form model.

Run by hand (README.md says how); the tests only read the result.
"""

import io
import itertools
import sys
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import torch

diffusers.utils.logging.set_verbosity_error()
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

POINTS = np.array([-1.7, -0.6, -0.2, 0.3, 0.9, 1.5])
MEANS, STDS, WEIGHTS = np.array([[-1.0, 0.8], [0.3, 0.4], [0.4, 0.6]])
BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
}


# ---------------------------------------------------------------- the model


def noise_prediction(y, kap):
    """eps = (y - E[x0 | y]) / kap, in a form that also holds at kap = 0."""
    variance = STDS**2 + kap**2
    gap = y[:, None] - MEANS
    logits = np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * gap**2 / variance
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return kap * (share * gap / variance).sum(-1)


def alpha_of(kap):
    return 1 / np.sqrt(1 + kap**2)


# ------------------------------------------------------------- the schedulers


class Double:
    """A module in which float32 means float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


def build(kind, n, schedule=None, **config):
    """The scheduler, in double precision throughout, with n steps set."""
    cls = getattr(diffusers, f"{kind}Scheduler")
    module = sys.modules[cls.__module__]
    module.torch, module.np = Double(torch), Double(np)
    scheduler = cls(**(BETAS[schedule] if schedule else {}), **config)
    scheduler.set_timesteps(n)
    return scheduler


def gaussians(count):
    return np.random.default_rng(0).standard_normal((count, 6))


def patch_noise(scheduler, noise):
    """Makes the scheduler draw the rows of noise in turn."""
    rows = iter(noise)
    module = sys.modules[type(scheduler).__module__]
    module.randn_tensor = lambda *args, **kwargs: torch.from_numpy(next(rows)[None])


def roll(scheduler, kaps, vp, y0=None, predict=None, after=None, **step):
    """States before each model evaluation, and the last: (len(kaps) + 1, 6).

    kaps[i] is the noise level of evaluation i. predict(y, kap) is what the scheduler expects of
    its network (eps by default). Each entry of step is a list with one value per evaluation.
    """
    predict = predict or noise_prediction
    y = kaps[0] * POINTS if y0 is None else y0
    x = torch.from_numpy(y * alpha_of(kaps[0]) if vp else y)[None]
    states = [x]
    assert len(scheduler.timesteps) == len(kaps)
    for i, (t, kap) in enumerate(zip(scheduler.timesteps, kaps, strict=True)):
        seen = scheduler.scale_model_input(x, t)
        y = x[0].numpy() / (alpha_of(kap) if vp else 1)
        if not isinstance(scheduler, diffusers.EDMDPMSolverMultistepScheduler):
            # The scheduler's own network input is VP at the level we believe it is at.
            np.testing.assert_allclose(seen[0].numpy(), y * alpha_of(kap), rtol=1e-12)
        out = torch.from_numpy(predict(y, kap))[None]
        x = scheduler.step(out, t, x, **{k: v[i] for k, v in step.items()}).prev_sample
        assert x.dtype == torch.float64
        assert getattr(scheduler, "step_index", None) in (None, i + 1)
        states.append(x)
        if after is not None:
            after(scheduler)
    return torch.cat(states).numpy()


def record(scheduler, kap, x, vp, **extra):
    timesteps = scheduler.timesteps.double().numpy()
    return {"kap": kap, "x": x, "vp": np.float64(vp), "timesteps": timesteps, **extra}


def single_stage(scheduler, vp, noise=None, **roll_options):
    kap = scheduler.sigmas.double().numpy()
    x = roll(scheduler, kap[:-1], vp, **roll_options)
    return record(scheduler, kap, x, vp, **({} if noise is None else {"noise": noise}))


# ------------------------------------------------------------------ the cases


def grid(**axes):
    """All combinations of the axes, as dicts."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def ddim():
    for n, spacing, offset, one, schedule, eta in [
        (10, "leading", 0, 1, "scaled_linear", 0),
        (10, "leading", 0, 0, "scaled_linear", 0),
        (10, "leading", 1, 1, "scaled_linear", 0),
        (10, "leading", 1, 0, "scaled_linear", 0),
        (10, "trailing", 0, 1, "scaled_linear", 0),
        (10, "trailing", 0, 0, "scaled_linear", 0),
        (10, "leading", 1, 0, "linear", 0),
        (20, "leading", 1, 0, "scaled_linear", 0),
        (10, "leading", 1, 0, "scaled_linear", 0.5),
        (10, "leading", 1, 0, "scaled_linear", 1),
    ]:
        scheduler = build(
            "DDIM",
            n,
            schedule,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=bool(one),
            clip_sample=False,
        )
        kap = ddim_levels(scheduler, scheduler.timesteps, scheduler.final_alpha_cumprod)
        noise = gaussians(n)
        step = {"eta": [float(eta)] * n}
        if eta:
            step["variance_noise"] = list(torch.from_numpy(noise)[:, None])
        x = roll(scheduler, kap[:-1], 1, **step)
        extra = {"noise": noise} if eta else {}
        name = f"DDIM/eta={eta}/{spacing}/offset={offset}/one={one}/n={n}/{schedule}"
        yield name, record(scheduler, kap, x, 1, **extra)


def ddim_levels(scheduler, timesteps, end):
    """Levels of the timesteps, then of the step below the last one."""
    stride = 1000 // scheduler.num_inference_steps
    last = int(timesteps[-1]) - stride
    abar = [scheduler.alphas_cumprod[t] for t in timesteps]
    abar.append(scheduler.alphas_cumprod[last] if last >= 0 else end)
    abar = torch.stack(abar).numpy()
    return np.sqrt((1 - abar) / abar)


def ddim_inverse():
    for n, spacing, offset, one in [
        (10, "leading", 0, 1),
        (10, "leading", 0, 0),
        (10, "leading", 1, 0),
        (10, "trailing", 0, 0),
    ]:
        scheduler = build(
            "DDIMInverse",
            n,
            "scaled_linear",
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=bool(one),
            clip_sample=False,
        )
        kap = ddim_levels(scheduler, scheduler.timesteps.flip(0), scheduler.initial_alpha_cumprod)
        kap = kap[::-1].copy()
        x = roll(scheduler, kap[:-1], 1, y0=POINTS)
        name = f"DDIMInverse/{spacing}/offset={offset}/one={one}/n={n}/scaled_linear"
        yield name, record(scheduler, kap, x, 1)


def dpm_multistep():
    base = {
        "algorithm": "dpmsolver++",
        "order": 2,
        "kind": "midpoint",
        "lof": 1,
        "spacing": "leading",
        "karras": 0,
        "final": "zero",
        "n": 10,
        "schedule": "scaled_linear",
    }
    finals = ["zero", "sigma_min"]
    spacings = ["linspace", "leading", "trailing"]
    cases = [
        *grid(order=[2, 3], lof=[1, 0], spacing=spacings, final=finals),
        *grid(order=[2, 3], lof=[1, 0], final=finals, n=[20]),
        *grid(order=[2, 3], lof=[1, 0], karras=[1]),
        *grid(order=[2, 3], karras=[1], n=[20]),
        *grid(order=[2, 3], karras=[1], final=["sigma_min"]),
        *grid(order=[1], karras=[0, 1], final=finals),
        *grid(order=[1], n=[20]),
        *grid(kind=["heun"], lof=[1, 0], final=finals),
        *grid(kind=["heun"], n=[20], final=finals),
        *grid(kind=["heun"], karras=[1]),
        *grid(order=[1, 2, 3], schedule=["linear"]),
        *grid(order=[2, 3], lof=[0], n=[10, 20], euler=[1], final=["sigma_min"]),
        *grid(algorithm=["dpmsolver"], order=[1, 2, 3], lof=[1, 0], final=["sigma_min"]),
        *grid(algorithm=["dpmsolver"], order=[2, 3], n=[20], final=["sigma_min"]),
        *grid(algorithm=["dpmsolver"], order=[1, 2, 3], karras=[1], final=["sigma_min"]),
        *grid(algorithm=["dpmsolver"], kind=["heun"], lof=[1, 0], final=["sigma_min"]),
        *grid(algorithm=["sde-dpmsolver++"], order=[1, 2, 3], final=finals),
        *grid(algorithm=["sde-dpmsolver++"], kind=["heun"], final=finals),
        *grid(algorithm=["sde-dpmsolver++"], order=[2, 3], n=[20]),
        *grid(algorithm=["sde-dpmsolver++"], karras=[1]),
        *grid(algorithm=["sde-dpmsolver"], order=[1, 2], final=["sigma_min"]),
        *grid(algorithm=["sde-dpmsolver"], kind=["heun"], final=["sigma_min"]),
    ]
    for case in cases:
        c = {**base, **case}
        scheduler = build(
            "DPMSolverMultistep",
            c["n"],
            c["schedule"],
            algorithm_type=c["algorithm"],
            solver_order=c["order"],
            solver_type=c["kind"],
            lower_order_final=bool(c["lof"]),
            euler_at_final=bool(c.get("euler")),
            timestep_spacing=c["spacing"],
            use_karras_sigmas=bool(c["karras"]),
            final_sigmas_type=c["final"],
        )
        name = (
            f"DPMSolverMultistep/{c['algorithm']}/order={c['order']}/{c['kind']}/lof={c['lof']}/"
            f"{c['spacing']}/karras={c['karras']}/{c['final']}/n={c['n']}/{c['schedule']}"
        )
        name += "/euler_at_final" * bool(c.get("euler"))
        if c["algorithm"].startswith("sde"):
            noise = gaussians(c["n"])
            step = {"variance_noise": list(torch.from_numpy(noise)[:, None])}
            yield name, single_stage(scheduler, 1, noise, **step)
        else:
            yield name, single_stage(scheduler, 1)


def dpm_inverse():
    for c in [
        *grid(algorithm=["dpmsolver++"], order=[1, 2, 3], kind=["midpoint"], n=[10]),
        *grid(algorithm=["dpmsolver++"], order=[2, 3], kind=["midpoint"], n=[20]),
        *grid(algorithm=["dpmsolver++"], order=[2], kind=["heun"], n=[10]),
        *grid(algorithm=["dpmsolver"], order=[1, 2], kind=["midpoint"], n=[10]),
    ]:
        scheduler = build(
            "DPMSolverMultistepInverse",
            c["n"],
            "scaled_linear",
            algorithm_type=c["algorithm"],
            solver_order=c["order"],
            solver_type=c["kind"],
        )
        name = (
            f"DPMSolverMultistepInverse/{c['algorithm']}/order={c['order']}/{c['kind']}/lof=1/"
            f"linspace/n={c['n']}/scaled_linear"
        )
        yield name, single_stage(scheduler, 1, y0=POINTS)


def dpm_singlestep():
    for c in [
        *grid(
            algorithm=["dpmsolver++"],
            order=[1, 2, 3],
            kind=["midpoint"],
            lof=[1],
            final=["zero", "sigma_min"],
        ),
        *grid(algorithm=["dpmsolver++"], order=[2, 3], kind=["heun"], lof=[1], final=["sigma_min"]),
        *grid(
            algorithm=["dpmsolver"],
            order=[1, 2, 3],
            kind=["midpoint"],
            lof=[1],
            final=["sigma_min"],
        ),
        *grid(
            algorithm=["dpmsolver++", "dpmsolver"],
            order=[2, 3],
            kind=["midpoint"],
            lof=[0],
            final=["sigma_min"],
        ),
    ]:
        scheduler = build(
            "DPMSolverSinglestep",
            12,
            "scaled_linear",
            algorithm_type=c["algorithm"],
            solver_order=c["order"],
            solver_type=c["kind"],
            lower_order_final=bool(c["lof"]),
            final_sigmas_type=c["final"],
        )
        name = (
            f"DPMSolverSinglestep/{c['algorithm']}/order={c['order']}/{c['kind']}/lof={c['lof']}/"
            f"linspace/{c['final']}/n=12/scaled_linear"
        )
        case = single_stage(scheduler, 1)
        yield name, {**case, "orders": np.array(scheduler.order_list, np.float64)}


def unipc():
    base = {
        "kind": "bh2",
        "order": 2,
        "x0": 1,
        "corrector": 1,
        "karras": 0,
        "final": "zero",
        "n": 10,
        "schedule": "scaled_linear",
    }
    # diffusers gives nan at a final zero with bh1 (0 * inf) and with predict_x0=False (log 0).
    for c in [
        *grid(kind=["bh2"], order=[1, 2, 3], n=[10, 20]),
        *grid(kind=["bh1", "bh2"], order=[1, 2, 3], x0=[1, 0], final=["sigma_min"]),
        *grid(kind=["bh1", "bh2"], order=[2, 3], final=["sigma_min"], n=[20]),
        *grid(order=[1, 2, 3], corrector=[0]),
        *grid(order=[2, 3], karras=[1]),
        *grid(order=[2, 3], schedule=["linear"]),
    ]:
        c = {**base, **c}
        scheduler = build(
            "UniPCMultistep",
            c["n"],
            c["schedule"],
            solver_type=c["kind"],
            solver_order=c["order"],
            predict_x0=bool(c["x0"]),
            lower_order_final=True,
            disable_corrector=[] if c["corrector"] else list(range(c["n"])),
            timestep_spacing="linspace",
            use_karras_sigmas=bool(c["karras"]),
            final_sigmas_type=c["final"],
        )
        name = (
            f"UniPCMultistep/{c['kind']}/order={c['order']}/predict_x0={c['x0']}/"
            f"corrector={c['corrector']}/linspace/karras={c['karras']}/{c['final']}/"
            f"n={c['n']}/{c['schedule']}"
        )
        yield name, corrected(scheduler)


def corrected(scheduler, noise=None):
    """A predictor-corrector: also the states that the predictor started from."""
    starts = []
    case = single_stage(scheduler, 1, noise, after=lambda s: starts.append(s.last_sample))
    return {**case, "corrected": torch.cat(starts).numpy()}


def sa_solver():
    for (predictor, corrector), tau, kind in itertools.product(
        [(1, 1), (2, 2), (3, 4)], [0, 1], ["data_prediction", "noise_prediction"]
    ):
        if kind == "noise_prediction" and (tau or predictor == 1):
            continue
        scheduler = build(
            "SASolver",
            10,
            "scaled_linear",
            predictor_order=predictor,
            corrector_order=corrector,
            tau_func=lambda t, tau=tau: tau,
            algorithm_type=kind,
        )
        noise = gaussians(10)
        patch_noise(scheduler, noise)
        name = f"SASolver/{kind}/predictor={predictor}/corrector={corrector}/tau={tau}"
        case = corrected(scheduler, noise if tau else None)
        yield f"{name}/linspace/n=10/scaled_linear", case


def deis():
    for c in [
        *grid(order=[1, 2, 3], n=[10, 20], lof=[1], karras=[0]),
        *grid(order=[2, 3], n=[10], lof=[0], karras=[0]),
        *grid(order=[3], n=[10], lof=[1], karras=[1]),
    ]:
        scheduler = build(
            "DEISMultistep",
            c["n"],
            "scaled_linear",
            solver_order=c["order"],
            lower_order_final=bool(c["lof"]),
            use_karras_sigmas=bool(c["karras"]),
        )
        name = (
            f"DEISMultistep/order={c['order']}/lof={c['lof']}/linspace/karras={c['karras']}/"
            f"n={c['n']}/scaled_linear"
        )
        yield name, single_stage(scheduler, 1)


def staged(scheduler, kaps, rows, end, vp):
    """A scheduler with several evaluations per step: whole steps begin at evaluations rows."""
    states = roll(scheduler, kaps, vp)
    kap = np.append(kaps[rows], end)
    x = np.concatenate([states[rows], states[-1:]])
    return record(scheduler, kap, x, vp, eval_kap=kaps, eval_x=states[:-1])


def pndm():
    for skip, offset, one, n, schedule in [
        (1, 0, 0, 10, "scaled_linear"),
        (1, 1, 0, 10, "scaled_linear"),
        (1, 1, 0, 20, "scaled_linear"),
        (1, 0, 1, 10, "scaled_linear"),
        (1, 1, 0, 10, "linear"),
        (0, 0, 0, 10, "scaled_linear"),
        (0, 1, 0, 10, "scaled_linear"),
        (0, 0, 1, 10, "linear"),
    ]:
        scheduler = build(
            "PNDM",
            n,
            schedule,
            skip_prk_steps=bool(skip),
            steps_offset=offset,
            set_alpha_to_one=bool(one),
        )
        # With PRK the first three steps take four evaluations; without, the first takes two.
        rows = [0, *range(2, n + 1)] if skip else [0, 4, 8, *range(12, 12 + n - 3)]
        levels = ddim_levels(scheduler, scheduler.timesteps, scheduler.final_alpha_cumprod)
        case = staged(scheduler, levels[:-1], rows, levels[-1], 1)
        name = f"PNDM/skip_prk={skip}/leading/offset={offset}/one={one}/n={n}/{schedule}"
        yield name, case


def heun_and_kdpm2():
    for kind, spacing, karras, n in [
        ("Heun", "linspace", 0, 10),
        ("Heun", "leading", 0, 10),
        ("Heun", "leading", 1, 10),
        ("KDPM2", "linspace", 0, 10),
        ("KDPM2", "leading", 0, 10),
        ("KDPM2", "leading", 1, 10),
    ]:
        scheduler = build(
            f"{kind}Discrete",
            n,
            "scaled_linear",
            timestep_spacing=spacing,
            use_karras_sigmas=bool(karras),
        )
        kaps = scheduler.sigmas.numpy()[: 2 * n - 1].copy()
        if kind == "KDPM2":
            kaps[1::2] = scheduler.sigmas_interpol.numpy()[1 : 2 * n - 1 : 2]
        case = staged(scheduler, kaps, list(range(0, 2 * n - 1, 2)), 0.0, 0)
        yield f"{kind}Discrete/{spacing}/karras={karras}/zero/n={n}/scaled_linear", case


def euler():
    for n, spacing, karras, final, schedule in [
        (10, "linspace", 0, "zero", "scaled_linear"),
        (10, "leading", 0, "zero", "scaled_linear"),
        (10, "trailing", 0, "zero", "scaled_linear"),
        (10, "leading", 1, "zero", "scaled_linear"),
        (10, "leading", 0, "sigma_min", "scaled_linear"),
        (10, "leading", 0, "zero", "linear"),
    ]:
        scheduler = build(
            "EulerDiscrete",
            n,
            schedule,
            timestep_spacing=spacing,
            use_karras_sigmas=bool(karras),
            final_sigmas_type=final,
        )
        name = f"EulerDiscrete/{spacing}/karras={karras}/{final}/n={n}/{schedule}"
        yield name, single_stage(scheduler, 0)


def euler_ancestral():
    for n, spacing in [(10, "linspace"), (10, "leading"), (20, "leading")]:
        scheduler = build("EulerAncestralDiscrete", n, "scaled_linear", timestep_spacing=spacing)
        noise = gaussians(n)
        patch_noise(scheduler, noise)
        name = f"EulerAncestralDiscrete/{spacing}/zero/n={n}/scaled_linear"
        yield name, single_stage(scheduler, 0, noise)


def lms():
    for n, order, spacing, karras in [
        (10, 4, "linspace", 0),
        (10, 4, "leading", 0),
        (10, 4, "leading", 1),
        (10, 2, "leading", 0),
        (20, 4, "leading", 0),
    ]:
        scheduler = build(
            "LMSDiscrete",
            n,
            "scaled_linear",
            timestep_spacing=spacing,
            use_karras_sigmas=bool(karras),
        )
        name = f"LMSDiscrete/order={order}/{spacing}/karras={karras}/zero/n={n}/scaled_linear"
        yield name, single_stage(scheduler, 0, order=[order] * n)


def ipndm():
    for n in [10, 20]:
        # The scheduler has a schedule of its own; trained_betas are its VP sigmas.
        donor = build("DPMSolverMultistep", n, "scaled_linear", timestep_spacing="leading")
        kap = donor.sigmas.numpy()
        scheduler = build("IPNDM", n, trained_betas=(kap * alpha_of(kap)).tolist())

        def velocity(y, kap):
            eps = noise_prediction(y, kap)
            return alpha_of(kap) * (eps - kap * (y - kap * eps))

        x = roll(scheduler, kap[:-1], 1, predict=velocity)
        yield f"IPNDM/leading/zero/n={n}/scaled_linear", record(scheduler, kap, x, 1)


def edm():
    data = 0.5

    def raw_network(y, kap):
        x0 = y - kap * noise_prediction(y, kap)
        total = kap**2 + data**2
        return (x0 - data**2 / total * y) * np.sqrt(total) / (kap * data)

    for order, final in itertools.product([1, 2, 3], ["zero", "sigma_min"]):
        if order == 1 and final == "sigma_min":
            continue
        scheduler = build(
            "EDMDPMSolverMultistep",
            10,
            sigma_data=data,
            solver_order=order,
            final_sigmas_type=final,
        )
        name = f"EDMDPMSolverMultistep/dpmsolver++/order={order}/midpoint/lof=1/{final}/n=10/karras"
        yield name, single_stage(scheduler, 0, predict=raw_network)


# ------------------------------------------------------------------- the file


def write(path, arrays):
    """An npz whose bytes depend on the arrays alone."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array))
            member = zipfile.ZipInfo(f"{key}.npy")
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


def main():
    arrays = {}
    for family in (
        ddim,
        ddim_inverse,
        dpm_multistep,
        dpm_inverse,
        dpm_singlestep,
        unipc,
        sa_solver,
        deis,
        pndm,
        heun_and_kdpm2,
        euler,
        euler_ancestral,
        lms,
        ipndm,
        edm,
    ):
        for name, case in family():
            if not all(np.isfinite(v).all() for v in case.values()):
                print("not finite, left out:", name)
                continue
            assert len(case["kap"]) == len(case["x"])
            assert f"{name}|x" not in arrays, name
            arrays |= {f"{name}|{field}": value for field, value in case.items()}
    path = Path(__file__).with_name("diffusers.npz")
    write(path, arrays)
    count = len({key.split("|")[0] for key in arrays})
    print(f"{count} cases, {len(arrays)} arrays, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
