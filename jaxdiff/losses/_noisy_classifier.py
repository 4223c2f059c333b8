"""The loss of a classifier of noisy examples."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_kind
from jaxdiff.losses._batch import each_example, wide
from jaxdiff.losses._time_laws import TimeLaw, UniformTime


class NoisyClassifierLoss(eqx.Module):
    """mean_i -log p(y_i | x_t), x_t of example i noised to a time t_i of the law.

    The minimiser is the exact posterior of the class at every time that the law draws, and the
    least value the mean over times of the conditional entropy H(y | x_t). Times are stratified over
    the batch.

    Args:
        time_law: law of the training time. Guidance asks at all times: take one that covers them.

    Reference: Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv
    2105.05233.
    """

    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, classifier: Any, key: PRNGKeyArray, batch: dict, frozen: dict
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            classifier: what learns, such as a `guidance.NoisyClassifier`: its `process`, and
                `logits(x, t, *, key)` of one noisy example.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": classes (B,)}`.
            frozen: other models; not used.

        Returns:
            The scalar loss, and `{"accuracy": share of the examples whose class is the likeliest}`.

        Raises:
            ValueError: for conditions that are no classes.
        """
        labels = batch.get("cond")
        kinds = [(jnp.ndim(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(labels)]
        if len(kinds) != 1 or kinds[0][0] != 1 or not jnp.issubdtype(kinds[0][1], jnp.integer):
            found = [f"{dtype} of {ndim} axes" for ndim, dtype in kinds]
            raise ValueError(
                "`batch['cond']` must be the class of every example, integers (B,), got "
                f"{', '.join(found) or 'none'}."
            )

        def one(key, u, x0, y):
            t = self.time_law.quantile(classifier.process, u)
            noise_key, network_key = jax.random.split(key)
            x = classifier.process.noise(noise_key, x0, t)
            logits = wide(classifier.logits(x, t, key=network_key))
            return -jax.nn.log_softmax(logits)[y], jnp.argmax(logits) == y

        losses, hits = each_example(one, key, batch)
        return losses.mean(), {"accuracy": hits.mean()}
