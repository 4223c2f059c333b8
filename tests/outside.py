"""What somebody else would write in one file: maps, wrappers, populations and solvers.

Each uses one or two of the contracts, in a short form of a published method.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

import jaxdiff
from jaxdiff import losses, solvers
from jaxdiff.conditions import null_where, take


class IndependentCondition(jaxdiff.Stepwise):
    """ICG (arXiv 2407.02687): a random label in place of none, drawn once a step."""

    base: jaxdiff.Denoiser
    num_classes: int = eqx.field(static=True, default=2)
    scale: jaxdiff.Number = jaxdiff.number(2.0)

    @property
    def evaluations(self):
        return 2 * self.base.evaluations

    def estimate(self, x, t, cond=None, *, key=None):
        label = jax.random.randint(self.step.key, (), 0, self.num_classes)
        other = self.base.estimate(x, t, null_where(True, cond, label), key=key)
        found = self.base.estimate(x, t, cond, key=key)
        return found.replace(x0=other.x0 + self.scale * (found.x0 - other.x0))


class NoisyCondition(jaxdiff.Stepwise):
    """CADS (arXiv 2310.17347), of a mean that the condition adds: noise on it at early steps."""

    base: jaxdiff.Denoiser
    size: jaxdiff.Number = jaxdiff.number(0.5)

    def estimate(self, x, t, cond=None, *, key=None):
        shift, rest = take(cond, "shift", by="NoisyCondition")
        shift = shift + self.size * self.step.t * jax.random.normal(self.step.key, x.shape, x.dtype)
        found = self.base.estimate(x, t, rest, key=key)
        return found.moved(self.process, t, found.x0 + shift)


class Latched(jaxdiff.Stepwise):
    """Adaptive guidance (arXiv 2312.12487): once the branches agree, the conditional one alone."""

    base: jaxdiff.Denoiser
    null_cond: int = eqx.field(static=True, default=2)
    scale: jaxdiff.Number = jaxdiff.number(3.0)
    agreement: jaxdiff.Number = jaxdiff.number(0.98)

    def init_memory(self, x):
        return jnp.zeros((), bool)

    @property
    def evaluations(self):
        if self.bound is None:
            return 2 * self.base.evaluations
        return jnp.where(self.bound.memory, 1, 2) * self.base.evaluations

    def estimate(self, x, t, cond=None, *, key=None):
        latched = self.step.memory
        found = self.base.estimate(x, t, cond, key=key)

        def guide():
            null = self.base.estimate(x, t, null_where(True, cond, self.null_cond), key=key).x0
            cosine = jnp.sum(found.x0 * null) / (jnp.linalg.norm(found.x0) * jnp.linalg.norm(null))
            return null + self.scale * (found.x0 - null), cosine > self.agreement

        x0, agree = jax.lax.cond(latched, lambda: (found.x0, latched), guide)
        return self.remember(found.replace(x0=x0), latched | agree)


class Momentum(jaxdiff.Stepwise):
    """SLD's momentum (arXiv 2211.05105): guidance plus a running mean of the guidance so far."""

    base: jaxdiff.Denoiser
    null_cond: int = eqx.field(static=True, default=2)
    scale: jaxdiff.Number = jaxdiff.number(1.5)
    rate: jaxdiff.Number = jaxdiff.number(0.4)
    decay: jaxdiff.Number = jaxdiff.number(0.7)

    @property
    def evaluations(self):
        return 2 * self.base.evaluations

    def init_memory(self, x):
        return jnp.zeros_like(x)

    def estimate(self, x, t, cond=None, *, key=None):
        found = self.base.estimate(x, t, cond, key=key)
        null = self.base.estimate(x, t, null_where(True, cond, self.null_cond), key=key).x0
        push = (self.scale * (found.x0 - null) + self.rate * self.step.memory).astype(x.dtype)
        mean = self.decay * self.step.memory + (1 - self.decay) * push
        moved = found.moved(self.process, t, null + push)
        return self.remember(moved, mean.astype(x.dtype))


class Interval(jaxdiff.Stepwise):
    """Guidance in an interval of times (arXiv 2404.07724), decided by the step's time."""

    base: jaxdiff.Denoiser
    null_cond: int = eqx.field(static=True, default=2)
    scale: jaxdiff.Number = jaxdiff.number(3.0)
    t_low: jaxdiff.Number = jaxdiff.number(0.2)
    t_high: jaxdiff.Number = jaxdiff.number(0.7)

    def inside(self):
        return (self.step.t >= self.t_low) & (self.step.t <= self.t_high)

    @property
    def evaluations(self):
        return jnp.where(self.inside(), 2, 1) * self.base.evaluations

    def estimate(self, x, t, cond=None, *, key=None):
        found = self.base.estimate(x, t, cond, key=key)

        def guide():
            null = self.base.estimate(x, t, null_where(True, cond, self.null_cond), key=key).x0
            return null + self.scale * (found.x0 - null)

        return found.replace(x0=jax.lax.cond(self.inside(), guide, lambda: found.x0))


class CFGPlusPlus(jaxdiff.DenoiserMap):
    """CFG++ (arXiv 2406.08070): guided x0, and the noise of the unconditional branch."""

    base: jaxdiff.Denoiser
    null_cond: int = eqx.field(static=True, default=2)
    scale: jaxdiff.Number = jaxdiff.number(0.6)

    @property
    def evaluations(self):
        return 2 * self.base.evaluations

    def estimate(self, x, t, cond=None, *, key=None):
        found = self.base.estimate(x, t, cond, key=key)
        null = self.base.estimate(x, t, null_where(True, cond, self.null_cond), key=key).x0
        eps = (x - self.process.alpha(t) * null) / self.process.sigma(t)
        return found.replace(x0=null + self.scale * (found.x0 - null), eps=eps.astype(x.dtype))


class Measured(jaxdiff.DenoiserMap):
    """E[x0 | x_t, y] of unit normal data and a measurement y = mask x0 + std n of each example."""

    base: jaxdiff.Denoiser
    std: jaxdiff.Number = jaxdiff.number(0.3)

    def estimate(self, x, t, cond=None, *, key=None):
        y, mask, rest = take(cond, "y", "mask", by="Measured")
        found = self.base.estimate(x, t, rest, key=key)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = sigma**2 / (alpha**2 + sigma**2)
        gain = mask * variance / (variance + self.std**2)
        return found.moved(self.process, t, found.x0 + gain * (y - found.x0))


class Autoguidance(jaxdiff.DenoiserMap):
    """Away from a weaker network (arXiv 2406.02507)."""

    base: jaxdiff.Denoiser
    weak: jaxdiff.Denoiser
    scale: jaxdiff.Number = jaxdiff.number(2.0)

    def estimate(self, x, t, cond=None, *, key=None):
        found = self.base.estimate(x, t, cond, key=key)
        weak = self.weak.estimate(x, t, cond, key=key)
        notes = {**found.notes, **weak.notes}
        return found.replace(x0=weak.x0 + self.scale * (found.x0 - weak.x0), notes=notes)


class Ensemble(jaxdiff.DenoiserMap):
    """The mean of several denoisers; of x0 alone."""

    base: jaxdiff.Denoiser
    others: tuple[jaxdiff.Denoiser, ...]

    def __call__(self, x, t, cond=None, *, key=None):
        total = self.base(x, t, cond, key=key)
        for other in self.others:
            total = total + other(x, t, cond, key=key)
        return total / (1 + len(self.others))


class Recurrence(solvers.SolverWrapper):
    """Time travel (arXiv 2302.07121): back by noise, and the step again."""

    base: solvers.DiffusionSolver = solvers.DDIM()
    count: int = eqx.field(static=True, default=2)

    inserts_steps: ClassVar[bool] = True
    stochastic = True

    def update(self, problem, x, step):
        moved, nfe = self.move_base(problem, x, step), 0
        for k in range(self.count - 1):
            nfe = nfe + moved.nfe
            noise_key, key = jax.random.split(jax.random.fold_in(step.key, k))
            noise = jax.random.normal(noise_key, x.shape, x.dtype)
            x = problem.process.renoise(moved.x, noise, step.s, step.t).astype(x.dtype)
            again = eqx.tree_at(lambda s: (s.key, s.notes), step, (key, moved.notes))
            moved = self.repeat_base(problem, x, again)
        return moved._replace(nfe=moved.nfe + nfe)


class Projected(solvers.SolverWrapper):
    """Looks at x0_hat, moves it onto a line, and steps from there: one evaluation."""

    base: solvers.DiffusionSolver = solvers.DDIM()
    normal: jax.Array | None = None
    share: jaxdiff.Number = jaxdiff.number(1.0)

    def update(self, problem, x, step):
        found = problem.estimate(x, step.t)
        normal = jnp.ones_like(found.x0) if self.normal is None else self.normal
        off = jnp.sum(normal * found.x0) / jnp.sum(normal**2)
        changed = found.replace(x0=found.x0 - self.share * off * normal)
        return self.advance_base(problem, x, step, changed)


class ParticleGuidance(solvers.PopulationSolver):
    """Particle guidance (arXiv 2310.13102): x0_hat pushed away from those of the others."""

    base: solvers.DiffusionSolver = solvers.DDIM()
    size: int = eqx.field(static=True, default=4)
    strength: jaxdiff.Number = jaxdiff.number(0.3)

    def update(self, problem, x, step):
        found = self.estimate(problem, x, step)
        apart = found.x0[:, None] - found.x0[None]
        near = jnp.exp(-jnp.sum(apart.reshape(*apart.shape[:2], -1) ** 2, -1))
        push = self.strength * jnp.einsum("ij,ij...->i...", near, apart)
        return self.advance(problem, x, step, found.replace(x0=(found.x0 + push).astype(x.dtype)))


class Resampled(solvers.PopulationSolver):
    """A particle filter towards large values of x0's first entry: resampled at every step."""

    base: solvers.DiffusionSolver = solvers.Ancestral()
    size: int = eqx.field(static=True, default=4)
    strength: jaxdiff.Number = jaxdiff.number(0.5)

    def update(self, problem, x, step):
        moved = self.move_base(problem, x, step)
        reward = self.strength * moved.x.reshape(self.size, -1)[:, 0]
        chosen = jax.random.categorical(step.shared, reward, shape=(self.size,))
        # Without a reward nobody moves: each particle stays who it is.
        chosen = jnp.where(self.strength == 0, jnp.arange(self.size), chosen)
        kept = jax.tree.map(lambda a: a[chosen], (moved.x, moved.memory, moved.notes))
        return solvers.Moved(kept[0], kept[1], moved.nfe, kept[2])


class Balanced(eqx.Module):
    """A loss over its running mean: a state, returned third."""

    loss: losses.DenoisingLoss
    decay: jaxdiff.Number = jaxdiff.number(0.9)

    def init_state(self, model):
        return jnp.ones(())

    def __call__(self, model, key, batch, frozen):
        total, metrics = self.loss(model, key, batch, frozen)
        mean = self.decay * frozen.state + (1 - self.decay) * jax.lax.stop_gradient(total)
        return total / mean, {**metrics, "mean": mean}, mean


class TowardsAverage(eqx.Module):
    """Mean teacher (arXiv 1703.01780): the answer of the own average, at times that all share."""

    weight: jaxdiff.Number = jaxdiff.number(1.0)

    def __call__(self, model, key, batch, frozen):
        teacher = frozen.averaged("model")

        def one(key, u, x0, cond):
            x0 = x0.astype(jnp.float32)
            x = model.process.noise(key, x0, u)
            target = jax.lax.stop_gradient(teacher(x, u, cond))
            return jnp.mean((model(x, u, cond) - target) ** 2)

        return self.weight * losses.each_example(one, frozen.key, batch).mean(), {}
