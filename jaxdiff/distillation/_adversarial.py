"""Adversarial losses: what a critic of real and made examples minimises, and what their maker."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._jump import check_told
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses._frozen import player_of, still


class Adversarial(eqx.Module):
    """Base: losses of a critic's logits, large where it takes an example for real.

    A critic is any callable pytree `(x, t, cond) -> logit`, of one example.

    Args:
        penalty: gamma of R1, gamma / 2 E |grad_x critic(x)|^2 over real examples, which holds a
            critic down where both laws agree; >= 0, and 0 costs nothing. A gradient of the critic
            more: Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually
            Converge?", 2018, arXiv 1801.04406.
    """

    penalty: Number = number(0.0)

    def __check_init__(self):
        check_number("penalty", self.penalty, least=0.0)

    @abstractmethod
    def critic(self, real: Array, fake: Array) -> Array:
        """What the critic minimises.

        Args:
            real: its logits of real examples, of any shape.
            fake: those of made ones.

        Returns:
            Losses, in the shape of the logits.
        """

    @abstractmethod
    def generator(self, fake: Array) -> Array:
        """What the maker of examples minimises.

        Args:
            fake: the critic's logits of made examples, of any shape.

        Returns:
            Losses, in the shape of the logits.
        """


class Hinge(Adversarial):
    """max(0, 1 - real) + max(0, 1 + fake), and -fake for the generator.

    **Fixed point**: the critic sign(p - q) of a real law p and a made law q, where its loss is
    2 - 2 TV(p, q).

    Args:
        penalty: as of `Adversarial`.

    Reference: Lim, Ye, "Geometric GAN", 2017, arXiv 1705.02894.
    """

    def critic(self, real: Array, fake: Array) -> Array:
        """See `Adversarial`."""
        return jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)

    def generator(self, fake: Array) -> Array:
        """See `Adversarial`."""
        return -fake


class NonSaturating(Adversarial):
    """log(1 + exp(-real)) + log(1 + exp(fake)), and log(1 + exp(-fake)) for the generator.

    **Fixed point**: the critic log p / q, where its loss is 2 log 2 - 2 JS(p, q).

    Args:
        penalty: as of `Adversarial`.

    Reference: Goodfellow et al., "Generative Adversarial Networks", 2014, arXiv 1406.2661, with
    the generator's non-saturating loss.
    """

    def critic(self, real: Array, fake: Array) -> Array:
        """See `Adversarial`."""
        return jax.nn.softplus(-real) + jax.nn.softplus(fake)

    def generator(self, fake: Array) -> Array:
        """See `Adversarial`."""
        return jax.nn.softplus(-fake)


def critic_of(frozen: Any, name: str = "critic") -> Any:
    """The critic among what a loss is given, all of it constant.

    Args:
        frozen: as a loss finds it.
        name: of the player, or of a constant.

    Raises:
        ValueError: if there is none.
        TypeError: if it cannot be called.
    """
    if name not in frozen:
        raise ValueError(
            f"`frozen` must have a critic {name!r}, (x, t, cond) -> logit, got {sorted(frozen)}. "
            f"Train a player {name!r} beside the student."
        )
    check_callable(name, frozen[name], "a callable pytree (x, t, cond) -> logit")
    return still(frozen[name])


def logits(critic: Any, x: Array, t: Array, cond: Any) -> Array:
    """A critic's logits of a batch, `(B,)`.

    Args:
        critic: of one example.
        x: `(B, *event)`.
        t: `(B,)`.
        cond: with leading axis B, or None.

    Raises:
        ValueError: for a critic that returns more than a number for an example.
    """
    found = jax.vmap(lambda x, t, cond: critic(x, t, cond))(x, t, cond)
    if jnp.shape(found) != t.shape:
        raise ValueError(
            "The critic must return a scalar logit for an example, got shape "
            f"{jnp.shape(found)[1:]}. Take the mean over patches or heads."
        )
    return found


def student_of(frozen: Any, name: str) -> FlowMap:
    """The student among what a critic's loss is given, all of it constant.

    Raises:
        ValueError: if there is none.
        TypeError: if it cannot jump where it is told to.
    """
    student = player_of(frozen, name)
    check_told(student)
    return student


def critic_loss(
    critic: PyTree,
    adversarial: Adversarial,
    t: Array,
    real: tuple[Array, PyTree],
    fake: tuple[Array, PyTree],
) -> tuple[Array, dict[str, Array]]:
    """A critic's mean loss, and its mean logits; one pass over real and fake examples together.

    Args:
        critic: `(x, t, cond) -> logit`, of one example.
        adversarial: the loss.
        t: what the critic is told of the time of both, `(B,)`.
        real: examples `(B, *event)` and their conditions; constants.
        fake: likewise.
    """
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), real, fake)
    x, cond = jax.lax.stop_gradient(both[0]), both[1]
    said = jnp.split(logits(critic, x, jnp.concatenate([t, t]), cond), 2)
    means = {"real": said[0].mean(), "fake": said[1].mean()}
    loss = adversarial.critic(*said).mean()
    if not (isinstance(adversarial.penalty, float) and adversarial.penalty == 0):
        slopes = jax.vmap(jax.grad(critic))(jax.lax.stop_gradient(real[0]), t, real[1])
        loss = loss + adversarial.penalty / 2 * jnp.sum(slopes**2) / len(slopes)
    return loss, jax.lax.stop_gradient(means)
