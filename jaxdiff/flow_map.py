"""Maps between two times: x_t -> x_s along the probability flow, in one call."""

from abc import abstractmethod
from typing import TYPE_CHECKING

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.processes import GaussianProcess


class FlowMap(eqx.Module):
    """A pure function of one noisy example that carries it from time t to time s.

    Consistency models, mean flows and other students of a denoiser are flow maps: where a
    denoiser knows E[x0 | x_t], a flow map at s = 0 returns a sample of p(x0), not a mean. It has
    solvers of its own, such as `FlowMapSteps`, and is no denoiser: losses, guidance and
    analysis that ask for one refuse it.
    """

    if TYPE_CHECKING:  # a field or a property

        @property
        def process(self) -> GaussianProcess:
            """The forward process."""
            ...

    else:
        process: eqx.AbstractVar[GaussianProcess]

    @property
    def evaluations(self) -> Array | int:
        """Network evaluations that one call costs."""
        return 1

    @property
    def one_step(self) -> bool:
        """Whether it starts from the first time of sampling alone: solvers then make one step."""
        return False

    def check_cond(self, cond: PyTree) -> None:
        """Reject conditions, of a batch or one example, whose values are known to be wrong.

        Raises:
            ValueError: for labels outside the classes.
        """
        del cond

    @abstractmethod
    def __call__(
        self,
        x: Array,
        t: Array,
        s: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """The state at time s of the trajectory that is at x at time t.

        Args:
            x: the noisy example, `(*event)`.
            t: scalar time of x.
            s: scalar target time; 0 for data. s = t returns x.
            cond: what the example is conditioned on, as of a denoiser.
            key: randomness of the network itself (dropout); None turns it off.

        Returns:
            x_s, `(*event)`.
        """
