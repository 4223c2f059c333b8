"""Every kind of solver against a hand-written `lax.scan` of the same algorithm.

The loops below know their algorithm and nothing else: no diffrax, no general state, tables of
coefficients as inputs of the scan. Noise comes from `fold_in(key, n)`, as in the library.
"""

from collections.abc import Iterator
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, paired
from jaxdiff import networks, processes, solvers
from jaxdiff.predictions import X0

PROCESS = processes.VP()


def x0_of(network, x, t):
    """x0_hat of a network that predicts noise."""
    return (x - PROCESS.sigma(t) * network(x, 1000 * t, None)) / PROCESS.alpha(t)


def eps_of(network, x, t):
    """What the network predicts."""
    return network(x, 1000 * t, None)


def scanned(step, start, shape, batch):
    """A sampler from one example's `step((x, *memory), row)`."""

    @jax.jit
    def run(network, key, times, tables):
        def one(i):
            prior, path = jax.random.split(jax.random.fold_in(key, i))
            x = PROCESS.sigma(times[0]) * jax.random.normal(prior, shape)
            rows = times[:-1], times[1:], jnp.arange(len(times) - 1), tables
            carry = (x, *start(x))
            return jax.lax.scan(partial(step, network, path), carry, rows)[0][0]

        return jax.vmap(one)(jnp.arange(batch))

    return run


def noise(path, n, x):
    """The draw of step n."""
    return jax.random.normal(jax.random.fold_in(path, n), x.shape)


def ddim(network, path, carry, row):
    """x_s = alpha_s x0 + sigma_s eps."""
    (x,), (t, s, _, _) = carry, row
    eps = eps_of(network, x, t)
    x0 = (x - PROCESS.sigma(t) * eps) / PROCESS.alpha(t)
    return (PROCESS.alpha(s) * x0 + PROCESS.sigma(s) * eps,), None


def ancestral(network, path, carry, row):
    """DDPM's posterior."""
    (x,), (t, s, n, _) = carry, row
    a, b, c, d = PROCESS.alpha(t), PROCESS.sigma(t), PROCESS.alpha(s), PROCESS.sigma(s)
    eps = eps_of(network, x, t)
    decay = a * d / (c * b)
    mean = c * (x - b * eps) / a + d * decay * eps
    return (mean + d * jnp.sqrt(1 - decay**2) * noise(path, n, x),), None


def churned(network, path, carry, row):
    """DDIM with eta = 1/2."""
    (x,), (t, s, n, _) = carry, row
    a, b, c, d = PROCESS.alpha(t), PROCESS.sigma(t), PROCESS.alpha(s), PROCESS.sigma(s)
    eps = eps_of(network, x, t)
    std = d * jnp.sqrt(1 - (a * d / (c * b)) ** 2) / 2
    mean = c * (x - b * eps) / a + jnp.sqrt(d**2 - std**2) * eps
    return (mean + std * noise(path, n, x),), None


def euler_maruyama(network, path, carry, row):
    """The reverse SDE; the last step draws nothing."""
    (x,), (t, s, n, _) = carry, row
    score, g, h = -eps_of(network, x, t) / PROCESS.sigma(t), PROCESS.diffusion(t), s - t
    std = jnp.where(s == 0, 0.0, g * jnp.sqrt(-h))
    mean = x + h * (PROCESS.drift(t) * x - g**2 * score)
    return (mean + std * noise(path, n, x),), None


def langevin(network, path, carry, row):
    """One Langevin step, then DDPM's."""
    (x,), (t, s, n, _) = carry, row
    predictor, corrector = jax.random.split(jax.random.fold_in(path, n))
    score = -eps_of(network, x, t) / PROCESS.sigma(t)
    draw = jax.random.normal(jax.random.fold_in(corrector, 0), x.shape)
    size = 2 * 0.16**2 * jnp.sum(draw**2) / jnp.sum(score**2)
    x = x + size * score + jnp.sqrt(2 * size) * draw
    a, b, c, d = PROCESS.alpha(t), PROCESS.sigma(t), PROCESS.alpha(s), PROCESS.sigma(s)
    eps, decay = eps_of(network, x, t), a * d / (c * b)
    mean = c * (x - b * eps) / a + d * decay * eps
    draw = jax.random.normal(predictor, x.shape)
    return (mean + d * jnp.sqrt(1 - decay**2) * draw,), None


def plms(network, path, carry, row):
    """Adams-Bashforth of the noise, after one step of Heun's."""
    (x, *past), (t, s, _, (weights, warm)) = carry, row
    k, k_next = PROCESS.sigma(t) / PROCESS.alpha(t), PROCESS.sigma(s) / PROCESS.alpha(s)

    def move(eps):
        return PROCESS.alpha(s) * (x / PROCESS.alpha(t) + (k_next - k) * eps)

    first = eps_of(network, x, t)
    outputs = [first, *past]
    slope = jax.lax.cond(
        warm,
        lambda: (first + eps_of(network, move(first), s)) / 2,
        lambda: sum(w * e for w, e in zip(weights, outputs, strict=True)),
    )
    return (move(slope), *outputs[:3]), None


def bdia(network, path, carry, row):
    """DDIM's step, and what its step back misses the last state by."""
    (x, before, t_before), (t, s, n, _) = carry, row
    eps = eps_of(network, x, t)
    x0 = (x - PROCESS.sigma(t) * eps) / PROCESS.alpha(t)
    back = PROCESS.alpha(t_before) * x0 + PROCESS.sigma(t_before) * eps
    missed = jnp.where(n == 0, 0.0, before - back)
    return (PROCESS.alpha(s) * x0 + PROCESS.sigma(s) * eps + missed, x, t), None


def edict(network, path, carry, row):
    """Two latents that take turns, mixed with p = 0.93."""
    (x, y), (t, s, n, _) = carry, row
    scale = PROCESS.alpha(s) / PROCESS.alpha(t)
    gain = PROCESS.sigma(s) - scale * PROCESS.sigma(t)
    swapped = n % 2 == 1
    first, second = jnp.where(swapped, y, x), jnp.where(swapped, x, y)
    first = scale * first + gain * eps_of(network, second, t)
    second = scale * second + gain * eps_of(network, first, t)
    x, y = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
    x = 0.93 * x + 0.07 * y
    return (x, 0.93 * y + 0.07 * x), None


def heun(network, path, carry, row):
    """EDM's Heun steps in x / alpha; the last one, to zero, by Euler."""
    (x,), (t, s, _, _) = carry, row
    k, k_next = PROCESS.sigma(t) / PROCESS.alpha(t), PROCESS.sigma(s) / PROCESS.alpha(s)
    slope = eps_of(network, x, t)
    y = x / PROCESS.alpha(t)
    euler = y + (k_next - k) * slope

    def correct():
        end = eps_of(network, PROCESS.alpha(s) * euler, s)
        return y + (k_next - k) * (slope + end) / 2

    y = jax.lax.cond(k_next > 0, correct, lambda: euler)
    return (PROCESS.alpha(s) * y,), None


def multistep(output, order, noisy):
    """x_s = carry x + sum_j w_j f_j (+ noise)."""

    def step(network, path, carry, row):
        (x, *past), (t, _, n, (predictor, _)) = carry, row
        outputs = [output(network, x, t), *past]
        y = predictor.carry * x
        for j in range(order):
            y = y + predictor.outputs[j] * outputs[j]
        if noisy:
            y = y + predictor.noise * noise(path, n, x)
        return (y, *outputs[: order - 1]), None

    return step, lambda x: [jnp.zeros_like(x)] * (order - 1)


def corrected(order, noisy):
    """The same with a corrector, whose new output is the next step's."""

    def step(network, path, carry, row):
        (x, base, new, *past), (t, _, n, (predictor, corrector)) = carry, row
        outputs = [x0_of(network, x, t), *past]
        x = base + new * outputs[0]
        carried = predictor.carry * x
        if noisy:
            carried = carried + predictor.noise * noise(path, n, x)
        y, base = carried, carried
        for j in range(order):
            y = y + predictor.outputs[j] * outputs[j]
            base = base + corrector.outputs[j] * outputs[j]
        return (y, base, corrector.new, *outputs[: order - 1]), None

    return step, lambda x: [x, jnp.zeros(()), *[jnp.zeros_like(x)] * (order - 1)]


def staged(output, stages, noisy):
    """Single steps of several stages; the last step, to zero, returns x0_hat."""

    def step(network, path, carry, row):
        (x,), (t, s, n, (plan, _)) = carry, row
        first = output(network, x, t)
        draws = ()
        if noisy:
            keys = jax.random.split(jax.random.fold_in(path, n), stages)
            draws = [jax.random.normal(key, x.shape) for key in keys]

        def advance():
            outputs, y = [first], x
            for i, stage in enumerate(plan):
                if i > 0:
                    outputs.append(output(network, y, plan[i - 1].t))
                y = stage.carry * x
                for weight, value in zip(stage.outputs, outputs, strict=True):
                    y = y + weight * value
                for weight, draw in zip(stage.noises, draws, strict=False):
                    y = y + weight * draw
            return y

        def end():
            return first if output is x0_of else (x - PROCESS.sigma(t) * first) / PROCESS.alpha(t)

        return (jax.lax.cond(PROCESS.sigma(s) == 0, end, advance),), None

    return step


def stock_heun(network, path, carry, row):
    """Heun in the variables of the stock solvers, w = x / c."""
    (w,), (t, s, _, _) = carry, row

    def level(t):
        return PROCESS.sigma(t) / (PROCESS.alpha(t) + PROCESS.sigma(t))

    def slope(w, t):
        x = (PROCESS.alpha(t) + PROCESS.sigma(t)) * w
        eps = eps_of(network, x, t)
        return eps - (x - PROCESS.sigma(t) * eps) / PROCESS.alpha(t)

    h = level(s) - level(t)
    first = slope(w, t)
    return (w + h * (first + slope(w + h * first, s)) / 2,), None


def nothing(x):
    """No memory."""
    return ()


CASES = {
    "DDIM": (solvers.DDIM(), ddim, nothing),
    "DDIM, eta 0.5": (solvers.DDIM(0.5), churned, nothing),
    "Ancestral": (solvers.Ancestral(), ancestral, nothing),
    "EulerMaruyama": (solvers.EulerMaruyama(), euler_maruyama, nothing),
    "PredictorCorrector": (solvers.PredictorCorrector(), langevin, nothing),
    "PLMS": (solvers.PNDM(), plms, lambda x: [jnp.zeros_like(x)] * 3),
    "BDIA": (solvers.BDIA(), bdia, lambda x: [x, jnp.ones(())]),
    "EDICT": (solvers.EDICT(), edict, lambda x: [x]),
    "EDMHeun": (solvers.EDMHeun(), heun, nothing),
    "DPM-Solver-2": (solvers.DPMSolver(2), staged(eps_of, 2, False), nothing),
    "DPM-Solver++3S": (solvers.DPMSolver(3, X0()), staged(x0_of, 3, False), nothing),
    "SEEDS-2": (solvers.SEEDS(2), staged(x0_of, 2, True), nothing),
    "DPM-Solver++2M": (solvers.DPMSolverMultistep(2), *multistep(x0_of, 2, False)),
    "DPM-Solver++3M": (solvers.DPMSolverMultistep(3), *multistep(x0_of, 3, False)),
    "SDE-DPM-Solver++2M": (
        solvers.DPMSolverMultistep(2, eta=1.0),
        *multistep(x0_of, 2, True),
    ),
    "DEIS-3": (solvers.DEIS(3), *multistep(eps_of, 3, False)),
    "UniPC-3": (solvers.UniPC(3), *corrected(3, False)),
    "SA-Solver P3C4": (solvers.SASolver(), *corrected(3, True)),
}


def compare(name, network, shape, batch, times, rounds, note="") -> Record:
    """The ratio, after a check that both draw the same."""
    solver, step, start = CASES[name]
    denoiser, key = jaxdiff.NetworkDenoiser(network, PROCESS), jax.random.key(0)
    problem = solvers.Problem(denoiser, None, key, times, -1)
    tables, by_hand = solver.plan(problem), scanned(step, start, shape, batch)

    def ours():
        return jaxdiff.sample(key, denoiser, shape, batch, solver=solver, times=times).x

    def theirs():
        return by_hand(network, key, times, tables)

    difference = jnp.abs(ours() - theirs()).max() / jnp.abs(theirs()).max()
    assert difference < 1e-3, (name, difference)
    return paired(f"{name}, {note}{size_of(shape, batch)}", ours, theirs, rounds=rounds)


def size_of(shape, batch):
    """In words."""
    return f"{'x'.join(map(str, shape))}, batch {batch}"


def unet(size, channels, width):
    """A network that takes milliseconds, and whose output is not zero, as a fresh one's is."""
    network = networks.UNet(
        width,
        in_channels=channels,
        image_size=size,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        rngs=nnx.Rngs(0),
    )
    kernel = network.conv_out.kernel
    kernel[...] = 0.1 * jax.random.normal(jax.random.key(0), kernel.shape)
    return network


def stock(network, shape, batch, times, rounds) -> Record:
    """diffrax.Heun, which has no plan and ends at t_min."""
    denoiser, key = jaxdiff.NetworkDenoiser(network, PROCESS), jax.random.key(0)

    def scale(t):
        return PROCESS.alpha(t) + PROCESS.sigma(t)

    @jax.jit
    def by_hand(network, key, times):
        def one(i):
            prior, path = jax.random.split(jax.random.fold_in(key, i))
            w = PROCESS.sigma(times[0]) / scale(times[0]) * jax.random.normal(prior, shape)
            rows = times[:-1], times[1:], jnp.arange(len(times) - 1), None
            carry = jax.lax.scan(partial(stock_heun, network, path), (w,), rows)[0]
            return scale(times[-1]) * carry[0]

        return jax.vmap(one)(jnp.arange(batch))

    def ours():
        return jaxdiff.sample(key, denoiser, shape, batch, solver=diffrax.Heun(), times=times).x

    def theirs():
        return by_hand(network, key, times)

    difference = jnp.abs(ours() - theirs()).max() / jnp.abs(theirs()).max()
    assert difference < 1e-3, difference
    return paired(f"diffrax.Heun, {size_of(shape, batch)}", ours, theirs, rounds=rounds)


def reverse_mode() -> Record:
    """The gradient through 10 DDIM steps against a scan of checkpointed steps."""
    shape, batch, network = (8, 8, 1), 64, unet(8, 1, 8)
    times, key = PROCESS.times(10), jax.random.key(0)

    @jax.jit
    @jax.grad
    def ours(network):
        denoiser = jaxdiff.NetworkDenoiser(network, PROCESS)
        return jnp.mean(jaxdiff.sample(key, denoiser, shape, batch, times=times).x ** 2)

    @jax.jit
    @jax.grad
    def theirs(network):
        def one(i):
            prior, path = jax.random.split(jax.random.fold_in(key, i))
            x = PROCESS.sigma(times[0]) * jax.random.normal(prior, shape)
            rows = times[:-1], times[1:], jnp.arange(10), None
            step = jax.checkpoint(lambda carry, row: ddim(network, path, carry, row))
            return jax.lax.scan(step, (x,), rows)[0][0]

        return jnp.mean(jax.vmap(one)(jnp.arange(batch)) ** 2)

    def largest(tree):
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))

    difference = jax.tree.map(lambda a, b: a - b, ours(network), theirs(network))
    assert largest(difference) < 1e-3 * largest(theirs(network))
    name = "gradient through 10 DDIM steps / scan of jax.checkpoint"
    return paired(name, lambda: ours(network), lambda: theirs(network), rounds=9)


class Tiny(nnx.Module):
    """One convolution: what remains is the sampler's own cost."""

    def __init__(self):
        self.conv = nnx.Conv(1, 1, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x, t, cond=None, *, key=None):
        """The convolved image, a little shrunk."""
        return 0.5 * self.conv(x) * jnp.cos(t)


def solver_overhead() -> Iterator[Record]:
    """Every case at two sizes, and where the network costs next to nothing."""
    for name in ("DDIM", "Ancestral"):
        yield compare(name, Tiny(), (8, 8, 1), 64, PROCESS.times(20), 15, "one convolution, ")
    for size, channels, width, steps, rounds in ((8, 1, 32, 20, 9), (32, 3, 8, 6, 7)):
        network, shape = unet(size, channels, width), (size, size, channels)
        for name in CASES:
            yield compare(name, network, shape, 64, PROCESS.times(steps), rounds)
        yield stock(network, shape, 64, PROCESS.times(steps, PROCESS.t_min), rounds)
    yield reverse_mode()
