"""Weights of noise levels that are learned beside a student."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._shared import check_flow_map
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess


class LogWeight(eqx.Module):
    """w(t) = cap tanh(sum_k a_k cos(pi k q) / cap), q in [0, 1] the place of t in log-SNR.

    Args:
        numbers: a_k, `(K,)`; jnp.zeros(16) to start with.
        cap: bound of |w|. What learns w = -log(loss) would have no bound where a loss vanishes.
    """

    numbers: Array
    cap: Number = number(10.0)

    def __check_init__(self):
        check_number("cap", self.cap, above=0.0)

    def __call__(self, process: GaussianProcess, t: Array) -> Array:
        """w, a scalar; t scalar."""
        ends = (jnp.asarray(end, t.dtype) for end in (process.t_min, process.t_max))
        clean, noisy = (process.log_snr(end) for end in ends)
        place = (process.log_snr(t) - clean) / (noisy - clean)
        waves = jnp.cos(jnp.pi * place * jnp.arange(len(self.numbers)))
        return self.cap * jnp.tanh(self.numbers @ waves / self.cap)


class Weighted(FlowMap):
    """A student, and beside it the logarithm of a weight that is learned with it.

    The weight is in the part that learns, and in no sample: sample from `model` of this, as in
    `state.players["student"].averaged().model`. Of a loss l(t), exp(w) l - w has its least value
    where w = -log l(t), and there the student's gradient is that of the mean of log l(t): every
    level's improvement counts alike. Keep decay of weights away from w.

    Args:
        model: the student.
        weight: callable pytree `(process, t) -> w`, such as `LogWeight`.

    Reference: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, "Analyzing and Improving the
    Training Dynamics of Diffusion Models", 2023, arXiv 2312.02696, appendix B.2.
    """

    model: FlowMap
    weight: Callable[..., Array]

    def __check_init__(self):
        check_flow_map(self.model)
        check_callable("weight", self.weight, "distillation.LogWeight(jnp.zeros(16))")

    @property
    def process(self) -> GaussianProcess:
        """The student's."""
        return self.model.process

    @property
    def network(self) -> PyTree:
        """What learns: the student's network, and the weight."""
        return self.model.network, self.weight  # type: ignore[attr-defined]

    @property
    def evaluations(self) -> Array | int:
        """The student's."""
        return self.model.evaluations

    @property
    def one_step(self) -> bool:
        """The student's."""
        return self.model.one_step

    def check_cond(self, cond: PyTree) -> None:
        """See `FlowMap`: what the student checks."""
        self.model.check_cond(cond)

    def __call__(
        self,
        x: Array,
        t: Array,
        s: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """See `FlowMap`: the student's."""
        return self.model(x, t, s, cond, key=key)
