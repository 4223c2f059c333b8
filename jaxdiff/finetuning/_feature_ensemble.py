"""Several networks as one, their features mixed block by block: adaptive feature aggregation."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_network_cond
from jaxdiff._tree import traced_floats
from jaxdiff.networks._layers import timestep_embedding
from jaxdiff.taps import EditedNetwork, read_taps

_AXIS = "members"
_TIME_FEATURES = 32


class Gate(eqx.Module):
    """How much of each network's feature is taken, at every position: a softmax over networks.

    The logit of a network is linear in its own feature, scaled to unit mean square, and in an
    embedding of the noise level. It starts at 0: the mean of all.

    Attributes:
        features: `(members, channels)`.
        time: `(members, 32)`.
    """

    features: Array
    time: Array

    def __call__(self, value: Array, t: Array) -> Array:
        """The mixed feature `(*positions, channels)`; inside a map over members."""
        scale = jnp.sqrt(jnp.mean(value**2) + 1e-6)
        logit = value @ self.features / (scale * len(self.features) ** 0.5)
        logit = logit + timestep_embedding(t, _TIME_FEATURES) @ self.time
        weight = jnp.exp(logit - jax.lax.pmax(jax.lax.stop_gradient(logit), _AXIS))
        weight = weight / jax.lax.psum(weight, _AXIS)
        return jax.lax.psum(weight[..., None] * value, _AXIS)


class FeatureEnsemble(eqx.Module):
    """Networks of one architecture that go on with a mixture of their features after every block.

    Itself a network, whose output is the mean of theirs. The networks are frozen, and their gates
    learn on a denoising loss:

        Player(NetworkDenoiser(ensemble, process), loss, optimizer,
               trainable=lambda model: model.network.gates)

    Args:
        networks: one pytree, all arrays with a leading axis of members.
        gates: tap -> `Gate`.

    Reference: Wang, Tian, Guo, Wang, Li, Zhang, Jiang, "Ensembling Diffusion Models via Adaptive
    Feature Aggregation", 2024, arXiv 2405.17082, section 3. There the logits come from a small
    network of all features and the prompt; here from each one's own feature, which has seen
    the condition.
    """

    networks: Callable[..., Array] = eqx.field(metadata={"stacked": True})
    gates: dict[str, Gate]

    @classmethod
    def of(
        cls,
        networks: Sequence[Callable[..., Array]],
        taps: Sequence[str],
        x: Array,
        cond: PyTree = None,
    ) -> "FeatureEnsemble":
        """An ensemble that takes the mean at every tap.

        Args:
            networks: of one architecture.
            taps: after which features are mixed; their last axis are channels.
            x: an example, or its `jax.ShapeDtypeStruct`.
            cond: its condition.

        Raises:
            ValueError: for networks of different structures or shapes, or taps they do not have.
        """
        first = networks[0]
        forms = {
            (jax.tree.structure(n), tuple(jnp.shape(a) for a in jax.tree.leaves(n)))
            for n in networks
        }
        if len(forms) > 1:
            raise ValueError(
                f"`networks` must be of one architecture, got {len(forms)} different ones."
            )
        # Floats, such as the strengths of adapters, are as much a network's own as weights.
        networks = [traced_floats(network) for network in networks]
        arrays, others = zip(
            *(eqx.partition(network, eqx.is_array) for network in networks), strict=True
        )
        static = others[0]
        if any(jax.tree.leaves(other) != jax.tree.leaves(static) for other in others):
            raise ValueError(
                "`networks` must differ in arrays and floats alone, got other differences."
            )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
        shapes = eqx.filter_eval_shape(
            lambda x: read_taps(first, taps, x, jnp.zeros(()), cond)[1], x
        )
        count = len(networks)
        gates = {
            name: Gate(jnp.zeros((count, shape.shape[-1])), jnp.zeros((count, _TIME_FEATURES)))
            for name, shape in shapes.items()
        }
        return cls(eqx.combine(stacked, static), gates)

    def check_cond(self, cond: PyTree) -> None:
        """What the networks themselves check of their conditions."""
        check_network_cond(self.networks, cond)

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """The mean output."""
        arrays, static = eqx.partition(self.networks, eqx.is_array)

        def one(arrays, gates):
            # The noise level is bound to each gate: an edit sees the feature alone.
            edits = {name: _At(gate, t) for name, gate in gates.items()}
            return EditedNetwork(eqx.combine(arrays, static), edits)(x, t, cond, key=key)

        return jnp.mean(jax.vmap(one, axis_name=_AXIS)(arrays, self.gates), 0)


class _At(eqx.Module):
    gate: Gate
    t: Array

    def __call__(self, value: Array) -> Array:
        return self.gate(value, self.t)
