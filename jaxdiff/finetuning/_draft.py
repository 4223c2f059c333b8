"""Reward fine-tuning through the sampler: DRaFT, DRaFT-K and DRaFT-LV."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_count
from jaxdiff.denoiser import Denoiser
from jaxdiff.finetuning._through_sampler import ThroughSampler
from jaxdiff.sampling import resolve_grid


class RewardLoss(ThroughSampler):
    """Minus the mean reward of samples, differentiated through the last steps of the sampler.

    All of them is DRaFT, `last_k=K` is DRaFT-K. With `copies`, DRaFT-LV: the last step alone, from
    the sample's own state and from so many others that the sample is noised to anew; their mean
    has less variance. A model soon finds what a reward does not know of: keep steps few, learn an
    adapter (`adapt`), whose strength can be lowered afterwards, and watch other rewards.

    Args:
        reward: `(x, cond) -> scalar` of one sample, differentiable.
        copies: of the last step; 0 for none. They ask for a deterministic last step to time 0, as
            `DDIM` makes it.
        solver: as of `ThroughSampler`.
        times: likewise.
        last_k: likewise.
        sampled: likewise.
        clip: likewise.
        micro_batch: likewise.

    Reference: Clark, Vicol, Swersky, Fleet, "Directly Fine-Tuning Diffusion Models on
    Differentiable Rewards", 2023, arXiv 2309.17400, algorithms 1 and 2.
    """

    reward: Callable[[Array, Any], Array] = eqx.field(kw_only=True)
    copies: int = eqx.field(static=True, default=0, kw_only=True)

    def __check_init__(self):
        check_callable("reward", self.reward, "lambda x, cond: -jnp.mean(x**2)")
        check_count("copies", self.copies, least=0)
        if self.copies and self.last_k not in (None, 1):
            raise ValueError(
                f"`last_k` must be 1 or left out with `copies`, which are of the last step, got "
                f"{self.last_k}."
            )

    def of_samples(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """See `ThroughSampler`. Metrics: "reward", the mean of the samples' own."""
        x, cond = batch["x"], batch.get("cond")
        count, shape = len(x), x.shape[1:]
        if not self.copies:
            rewards = self.draw(denoiser, key, shape, count, cond, look=self._reward)
            return -jnp.mean(rewards), {"reward": jnp.mean(rewards)}
        samples = self.draw(denoiser, key, shape, count, cond, last_k=1)
        rewards = jax.vmap(self._reward)(samples, cond)
        model = self.sampled(denoiser)
        last = resolve_grid(model, self.times, self.solver, count)[..., -2]

        def of_copies(i, x0, cond):
            def one(j):
                own = jax.random.fold_in(jax.random.fold_in(key, i), 2**30 + j)
                return self._reward(model(model.process.noise(own, x0, last), last, cond), cond)

            return jnp.mean(jax.vmap(one)(jnp.arange(self.copies)))

        x0 = jax.lax.stop_gradient(samples)
        others = jax.vmap(of_copies)(jnp.arange(count), x0, cond)
        loss = -jnp.mean(rewards + self.copies * others) / (1 + self.copies)
        return loss, {"reward": jnp.mean(rewards)}

    def _reward(self, x: Array, cond: Any) -> Array:
        value = self.reward(self.seen(x), cond)
        if jnp.shape(value) != ():
            raise ValueError(f"`reward` must return a scalar, got shape {jnp.shape(value)}.")
        return value
