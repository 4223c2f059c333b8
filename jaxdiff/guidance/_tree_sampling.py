"""Diffusion tree sampling: rollouts that share what they learn about rewards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_cond, check_count, check_key, check_number
from jaxdiff._tree import Number, as_number, jit
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance._training_free import check_scalar, or_worst
from jaxdiff.guidance._twisted import check_kernel, settled
from jaxdiff.sampling import resolve_grid
from jaxdiff.solvers import Ancestral, GaussianSolver
from jaxdiff.solvers._base import Problem
from jaxdiff.stepwise import Step, check_stepless


class Tree(eqx.Module):
    """A tree of states; node 0 is the root, above the states at the first time.

    Attributes:
        x: states, `(num_nodes, *event)`.
        mean: of the kernel from a state to the next, `(num_nodes, *event)`.
        std: of the kernel, `(num_nodes, *event)`.
        known: whether the kernel has been computed, `(num_nodes,)`.
        children: numbers of the nodes below, `(num_nodes, most)`; -1 where there is none.
        value: soft value, `(num_nodes,)`; the reward at the end.
        visits: rollouts that went through, `(num_nodes,)`.
        count: nodes that are there.
    """

    x: Array
    mean: Array
    std: Array
    known: Array
    children: Array
    value: Array
    visits: Array
    count: Array

    def below(self, node: Array) -> tuple[Array, Array]:
        """A node's children, and which of them are there, `(most,)` each."""
        found = self.children[node]
        return jnp.maximum(found, 0), found >= 0


class TreeSamples(eqx.Module):
    """What trees found.

    Attributes:
        x: samples, `(num_trees, num_samples, *event)`; with `search` the best, best first.
        reward: of them, `(num_trees, num_samples)`.
        value: of the root, `(num_trees,)`: temperature log E exp(r / temperature), estimated.
        nfe: network evaluations spent on each tree, `(num_trees,)`.
        tree: the trees themselves, with a leading axis.
    """

    x: Array
    reward: Array
    value: Array
    nfe: Array
    tree: Tree


class _Rules(eqx.Module):
    """How a tree grows; see `tree_sample`."""

    temperature: Number
    exploration: Number
    widening: float = eqx.field(static=True)
    exponent: float = eqx.field(static=True)
    search: bool = eqx.field(static=True)

    def allowed(self, visits: ArrayLike) -> Any:
        """How many children a node may have."""
        return jnp.maximum(self.widening * jnp.asarray(visits) ** self.exponent, 1)

    def most(self, rollouts: int) -> int:
        """The largest number of children."""
        return min(int(max(self.widening * rollouts**self.exponent, 1)) + 1, rollouts)


def _empty(process, shape, t, dtype, capacity: int, most: int) -> Tree:
    states = jnp.zeros((capacity, *shape), dtype)
    at_root = jnp.arange(capacity) == 0
    # The kernel of the root is the prior.
    std = jnp.where(jnp.reshape(at_root, (-1, *[1] * len(shape))), process.sigma(t), states)
    return Tree(
        x=states,
        mean=states,
        std=std.astype(dtype),
        known=at_root,
        children=jnp.full((capacity, most), -1, jnp.int32),
        value=jnp.zeros(capacity, jnp.promote_types(dtype, jnp.float32)),
        visits=jnp.zeros(capacity, jnp.int32),
        count=jnp.ones((), jnp.int32),
    )


def _choose(tree: Tree, node: Array, temperature: Number, key: PRNGKeyArray) -> Array:
    """A child, with weight exp(value / temperature)."""
    below, there = tree.below(node)
    odds = jnp.where(there, tree.value[below] / temperature, -jnp.inf)
    return below[jax.random.categorical(key, odds)]


def _promising(tree: Tree, node: Array, exploration: Number) -> Array:
    """The child of the largest value, and a bonus for those that have been seen rarely."""
    below, there = tree.below(node)
    seen = jnp.maximum(tree.visits[below], 1)
    bonus = jnp.sqrt(jnp.log(jnp.maximum(tree.visits[node], 1)) / seen)
    return below[jnp.argmax(jnp.where(there, tree.value[below] + exploration * bonus, -jnp.inf))]


def _grow(
    tree: Tree, problem: Problem, solver: Any, reward: Callable, rules: _Rules, key: PRNGKeyArray
) -> tuple[Tree, Array]:
    """One rollout from the root to a clean example, and its reward on the way back."""
    times, capacity = problem.times, len(tree.visits)
    shape, dtype = tree.x.shape[1:], tree.x.dtype

    def kernel(x, t, s, plan, index):
        step = Step(t, s, problem.key, plan, None, index)
        found = problem.estimate(x, t)
        mean, std = solver.transition(problem, *settled(problem, x, step, found))
        return mean.astype(dtype), jnp.broadcast_to(std, shape).astype(dtype)

    def descend(carry, row):
        (tree, node, nfe), (*place, level) = carry, row
        choose_key, noise_key = jax.random.split(jax.random.fold_in(key, level))
        there = jnp.sum(tree.children[node] >= 0)
        # A kernel without width makes the same child again.
        sharp = tree.known[node] & jnp.all(tree.std[node] == 0)
        expand = there < jnp.where(sharp, 1, rules.allowed(tree.visits[node]))
        if rules.search:
            selected = _promising(tree, node, rules.exploration)
        else:
            selected = _choose(tree, node, rules.temperature, choose_key)
        new = expand & ~tree.known[node]
        mean, std = jax.lax.cond(
            new,
            lambda: kernel(tree.x[node], *place),
            lambda: (tree.mean[node], tree.std[node]),
        )
        drawn = (mean + std * jax.random.normal(noise_key, shape, dtype)).astype(dtype)
        child = jnp.where(expand, tree.count, selected).astype(node.dtype)
        # Out of range where nothing is to be written.
        end = jnp.where(expand, tree.count, capacity)
        tree = dataclasses.replace(
            tree,
            x=tree.x.at[end].set(drawn, mode="drop"),
            mean=tree.mean.at[node].set(mean),
            std=tree.std.at[node].set(std),
            known=tree.known.at[node].set(tree.known[node] | expand),
            children=tree.children.at[node, jnp.where(expand, there, capacity)].set(
                child, mode="drop"
            ),
            count=tree.count + expand,
        )
        return (tree, child, nfe + jnp.where(new, problem.cost, 0)), child

    # From the root to the first time no step is made: its kernel is known, and the row unused.
    steps = jnp.maximum(jnp.arange(len(times)) - 1, 0)
    plan = jax.tree.map(lambda rows: rows[steps], problem.plan)
    rows = times[steps], times[steps + 1], plan, steps, jnp.arange(len(times))
    root = jnp.zeros((), jnp.int32)
    (tree, leaf, nfe), path = jax.lax.scan(descend, (tree, root, jnp.zeros((), jnp.int32)), rows)
    found = or_worst(check_scalar(reward(tree.x[leaf]), "reward")).astype(tree.value.dtype)

    def back(value, node):
        below, there = tree.below(node)
        odds = jnp.where(there, value[below] / rules.temperature, -jnp.inf)
        mean = jax.nn.logsumexp(odds) - jnp.log(jnp.sum(there))
        return value.at[node].set(rules.temperature * mean), None

    passed = jnp.concatenate([root[None], path])
    value = tree.value.at[leaf].set(found)
    value, _ = jax.lax.scan(back, value, passed[:-1], reverse=True)
    visits = tree.visits.at[passed].add(1)
    return dataclasses.replace(tree, value=value, visits=visits), nfe


def _walk(tree: Tree, depth: int, temperature: Number, key: PRNGKeyArray) -> Array:
    """The leaf at the end of a random way down."""

    def down(node, level):
        return _choose(tree, node, temperature, jax.random.fold_in(key, level)), None

    return jax.lax.scan(down, jnp.zeros((), jnp.int32), jnp.arange(depth))[0]


@jit
def _trees(
    key, cond, denoiser, solver, reward, times, rules, *, shape, dtype, num_trees, rollouts,
    num_samples,
):  # fmt: skip
    depth, most = len(times), rules.most(rollouts)
    plan = solver.plan(Problem(denoiser, None, None, times, -1))

    def one(index, cond):
        own = jax.random.fold_in(key, index)
        problem = Problem(denoiser, cond, own, times, -1, plan)
        tree = _empty(denoiser.process, shape, times[0], dtype, rollouts * depth + 1, most)

        def rollout(tree, k):
            return _grow(tree, problem, solver, reward, rules, jax.random.fold_in(own, k))

        tree, nfe = jax.lax.scan(rollout, tree, jnp.arange(rollouts))
        if rules.search:
            ends = (tree.children[:, 0] < 0) & (jnp.arange(len(tree.visits)) < tree.count)
            _, leaves = jax.lax.top_k(jnp.where(ends, tree.value, -jnp.inf), num_samples)
        else:
            keys = jax.random.split(jax.random.fold_in(own, rollouts), num_samples)
            leaves = jax.vmap(lambda key: _walk(tree, depth, rules.temperature, key))(keys)
        x, found = tree.x[leaves], tree.value[leaves]
        return TreeSamples(x, found, tree.value[0], jnp.sum(nfe), tree)

    return jax.vmap(one)(jnp.arange(num_trees), cond)


def tree_sample(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    reward: Callable[[Array], Array],
    *,
    rollouts: int,
    num_samples: int = 1,
    num_trees: int = 1,
    cond: PyTree = None,
    solver: GaussianSolver = Ancestral(),
    times: int | ArrayLike = 20,
    temperature: Number = 1.0,
    widening: float = 2.0,
    exponent: float = 0.5,
    search: bool = False,
    exploration: Number = 1.0,
    dtype: jnp.dtype | None = None,
) -> TreeSamples:
    """Samples of p(x0) exp(r(x0) / temperature), from trees of rollouts.

    A node is a state at a time of the grid, its children are draws of the solver's kernel from
    there. A rollout goes down by children drawn with weights exp(value / temperature), or makes a
    new child where there are fewer than widening visits^exponent; it ends in a clean example, whose
    reward goes back up the way:

        value = temperature log mean_children exp(value / temperature).

    As rollouts grow, a walk down the tree tends to the law of the discretised chain, tilted by the
    reward, whatever the reward; values of one state serve all rollouts through it. A kernel is
    computed once for each node: at most one evaluation a step of a rollout, and fewer where nodes
    have several children. What looks poor at first is seen rarely again, so that values are too
    low, by less and less with more rollouts, and more with more steps; with a large `widening` and
    exponent = 1 rollouts are independent, and errors fall as 1 / sqrt(rollouts). With `search`,
    ways down are greedy,

        argmax of value + exploration sqrt(log visits_parent / visits),

    and the best clean examples come back.

    Args:
        key: typed PRNG key; tree i draws from `fold_in(key, i)`.
        denoiser: any that knows its answer without a step.
        shape: of one example, `(*event)`.
        reward: `x0 -> r`, a scalar of one clean example; a pytree. No derivative is taken, and NaN
            counts as the worst.
        rollouts: of each tree.
        num_samples: walks down each tree, or the number of best examples.
        num_trees: trees, independent of each other.
        cond: pytree with a leading axis of `num_trees`, or None.
        solver: one that draws from a Gaussian kernel.
        times: as of `sample`, one grid for all.
        temperature: > 0, of the reward.
        widening: C of the number of children, C visits^exponent; > 0. It shapes the program.
        exponent: in [0, 1]; 0 fixes the number of children. It shapes the program.
        search: whether the best is wanted, and not the law.
        exploration: of `search`.
        dtype: of the samples; None for JAX's default float.

    Returns:
        A `TreeSamples`.

    Raises:
        TypeError: if `key` is not a typed key, or for a solver without a kernel.
        ValueError: for a solver that draws nothing, a reward that is no scalar, or fewer rollouts
            than samples in a search.

    Reference: Jain, Sareen, Pedramfar, Ravanbakhsh, "Diffusion Tree Sampling: Scalable
    Inference-Time Alignment of Diffusion Models", 2025, arXiv 2506.20701. Widening, and the bonus
    of a search, are those of Monte Carlo tree search.
    """
    check_key(key)
    check_denoiser(denoiser)
    check_stepless(denoiser, "`tree_sample`")
    check_callable("reward", reward, "jax.tree_util.Partial(function, weights)")
    check_kernel("`solver`", solver)
    for name, count in (
        ("rollouts", rollouts), ("num_samples", num_samples), ("num_trees", num_trees),
    ):  # fmt: skip
        check_count(name, count)
    if search and num_samples > rollouts:
        raise ValueError(
            f"`num_samples` must be at most `rollouts` = {rollouts} in a search, got {num_samples}."
        )
    check_number("temperature", temperature, above=0.0)
    check_number("widening", widening, above=0.0)
    check_number("exponent", exponent, least=0.0, most=1.0)
    check_number("exploration", exploration, least=0.0)
    check_cond(cond, num_trees)
    denoiser.check_cond(cond)
    times = resolve_grid(denoiser, times, solver, num_trees)
    if times.ndim != 1:
        raise ValueError(f"`times` must be one grid for all trees, got shape {times.shape}.")
    rules = _Rules(
        as_number(temperature), as_number(exploration), as_number(widening), as_number(exponent),
        search,
    )  # fmt: skip
    return _trees(
        key, cond, denoiser, solver, reward, times, rules, shape=tuple(shape),
        dtype=jnp.dtype(jnp.result_type(float) if dtype is None else dtype), num_trees=num_trees,
        rollouts=rollouts, num_samples=num_samples,
    )  # fmt: skip
