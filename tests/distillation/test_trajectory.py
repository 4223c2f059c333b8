import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import GaussianJump, TwoTimesTable

import jaxdiff
from jaxdiff import distillation, losses, oracles, predictions, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


def gaussian(process):
    return oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))


def exact(process, mean=MEAN, std=STD):
    return distillation.Jump(GaussianJump.of(process, mean, std), until="until")


def test_the_exact_student_says_the_flow_map_and_the_denoiser(x64):
    """g* of N(0.3, 0.5^2) at t = 1.5: its slopes, and E[x0 | x_t] for a jump of no length."""
    process = processes.EDM()
    student, teacher = exact(process), gaussian(process)

    @jit
    def slope(s):
        t = jnp.asarray(1.5)
        clean = lambda x: student.clean(x, t, s)
        apart = clean(jnp.ones(1)) - clean(jnp.zeros(1)), teacher(jnp.ones(1), t)
        return apart[0][0], clean(jnp.ones(1))[0] - apart[1][0]

    for s, expected in [(0.0, 0.3162), (1.4, 0.10319), (1.499, 0.10003)]:
        np.testing.assert_allclose(slope(jnp.asarray(s))[0], expected, atol=6e-5)
    same, off = slope(jnp.asarray(1.5))
    np.testing.assert_allclose([same, off], [0.1, 0.0], atol=1e-12)


def test_a_table_learns_the_composed_steps_of_its_teacher(x64):
    """Between any two times of the grid; the loss is then 0."""
    process, grid, count, steps = processes.EDM(0.1, 5.0), losses.Karras(), 4, 450
    loss = distillation.ConsistencyTrajectory(
        grid=grid, steps=count, most=3, denoising=None, target="student"
    )
    student = distillation.Jump(TwoTimesTable.start(process, grid, count), until="until")
    rate = optax.cosine_decay_schedule(0.1, steps)
    ema = jaxdiff.training.ConstantEMA(0.9)
    players = {"student": Player(student, loss, optax.adam(rate), ema=ema)}
    state, step = init_train_state(players, KEY), make_train_step(players)
    teacher = gaussian(process)
    for n in range(steps):
        x = MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (64, 1))
        state, metrics = step(state, {"x": x}, {"teacher": teacher})
        assert metrics["cells"] in (1, 2, 3)
    assert metrics["loss"] < 1e-6
    learned, times = state.players["student"].model, student.base.times
    x = jnp.asarray([[-1.0], [0.5], [2.0]])
    jumped = jit(lambda learned, t, s: jax.vmap(lambda x: learned(x, t, s))(x))
    for n, k in [(4, 0), (4, 2), (3, 1), (2, 0)]:
        path = times[k : n + 1][::-1]
        composed = jaxdiff.denoise(KEY, teacher, x, solver=solvers.EDMHeun(), times=path).x
        np.testing.assert_allclose(jumped(learned, times[n], times[k]), composed, atol=3e-3)


def test_where_it_starts_goes_by_and_ends(x64):
    """t > u >= s of the grid, and i cells with a probability like i; u as the solver gets there."""
    process, grid = processes.EDM(), losses.Karras()
    loss = distillation.ConsistencyTrajectory(steps=12, most=4)
    student = exact(process)

    @jit
    def draw(seed):
        pairs, n, cells = loss.pairs(student, jax.random.key(seed), {"x": jnp.ones((16, 1))})
        return pairs.t, pairs.s, n, cells

    t, s, n, cells = jax.vmap(draw)(jnp.arange(4000))
    times = np.asarray(grid.quantile(process, jnp.linspace(0, 1, 13)))
    np.testing.assert_allclose(t, times[np.asarray(n, int)], rtol=1e-12)
    place = np.argmin(np.abs(np.log(s[..., None] / times)), -1)
    np.testing.assert_allclose(s, times[place], rtol=1e-9)
    assert np.all(place <= n - cells[:, None]) and np.all(n >= cells[:, None])
    assert n.max() == 12 and np.any(place == n - cells[:, None]) and place.min() == 0
    shares = np.bincount(np.asarray(cells, int), minlength=5)[1:] / 4000
    np.testing.assert_allclose(shares, np.arange(1, 5) / 10, atol=0.025)


def test_terms_are_weighted_and_denoising_is_denoising(x64):
    """At the exact student the error is the oracle's own, at times of both laws."""
    process = processes.EDM()
    student, teacher = exact(process), gaussian(process)
    critic = lambda x, t, cond: 3.0 * jnp.sum(x) + t
    frozen = {"teacher": teacher, "critic": jax.tree_util.Partial(critic)}
    loss = distillation.ConsistencyTrajectory(steps=12, most=2, denoising=0.7, gan=0.2)
    batch = {"x": MEAN + STD * jax.random.normal(KEY, (2000, 1))}

    @jit
    def found(student, frozen):
        return loss(student, KEY, batch, frozen)

    value, terms = found(student, frozen)
    total = terms["consistency"] + 0.7 * terms["denoising"] + 0.2 * terms["adversarial"]
    np.testing.assert_allclose(value, total, rtol=1e-12)
    # Heun's own error, over one or two of twelve cells.
    assert terms["consistency"] < 1e-3
    # F of unit variance has, at the best, the error of x0 over that of data and noise.
    times = losses.LogNormal().quantile(process, (jnp.arange(500) + 0.5) / 500)
    times = jnp.concatenate(
        [times, losses.Karras().quantile(process, (jnp.arange(500) + 0.5) / 500)]
    )
    least = STD**2 * times**2 / (STD**2 + times**2)
    weight = (0.25 + times**2) / (0.5 * times) ** 2
    np.testing.assert_allclose(terms["denoising"], jnp.mean(weight * least), rtol=0.05)
    # The fake is what the target says at t_min: of N(0.3, .).
    np.testing.assert_allclose(terms["adversarial"], -3 * MEAN - process.t_min, atol=0.1)


def test_a_critic_learns_from_data_and_jumps(x64):
    """Of a student whose jumps end off the data; one that is right leaves nothing."""
    process = processes.EDM()
    loss = distillation.TrajectoryCritic(distillation.ConsistencyTrajectory(steps=12, most=1))
    batch = {"x": MEAN + STD * jax.random.normal(KEY, (4000, 1))}

    @jit
    def found(student):
        model = jax.tree_util.Partial(lambda w, x, t, cond: w * (x.sum() - MEAN), jnp.asarray(0.1))
        (value, means), slope = jax.value_and_grad(loss, has_aux=True)(
            model, KEY, batch, {"student": student}
        )
        return value, means, slope.args[0]

    value, means, slope = found(exact(process, mean=MEAN - 1))
    # What a jump from t makes of another mean, at all times of the grid alike.
    t = losses.Karras().quantile(process, jnp.arange(1, 13) / 12)
    off = np.mean(1 - np.sqrt((STD**2 + process.t_min**2) / (STD**2 + t**2)))
    np.testing.assert_allclose([means["real"], means["fake"]], [0, -0.1 * off], atol=5e-3)
    np.testing.assert_allclose([value, slope], [2 - 0.1 * off, -off], atol=0.05)
    value, means, slope = found(exact(process))
    np.testing.assert_allclose([value, slope], [2.0, 0.0], atol=0.05)


def test_passes_and_gradients(x64):
    process, sizes = processes.EDM(), []

    class Counted(eqx.Module):
        weight: jax.Array
        name: str = eqx.field(static=True)

        def __call__(self, x, t, cond, *, key=None):
            jax.debug.callback(lambda *_: sizes.append(self.name), x, *jax.tree.leaves(cond))
            return self.weight * x

    def network(name):
        made = Counted(jnp.asarray(0.3), name)
        return NetworkDenoiser(made, process, predictions.F())

    batch = {"x": jnp.ones((4, 1)), "cond": jnp.zeros(4, int)}
    critic = jax.tree_util.Partial(lambda w, x, t, cond: w * x.sum(), jnp.asarray(0.5))
    models = network("student"), network("teacher"), network("target"), critic
    loss = distillation.ConsistencyTrajectory(steps=4, most=1, gan=1.0, target="target")

    def value(models):
        student, teacher, target, critic = models
        frozen = {
            "teacher": teacher, "critic": critic, "target": distillation.Jump(target, "until"),
        }  # fmt: skip
        return loss(distillation.Jump(student, "until"), KEY, batch, frozen)[0]

    slopes = eqx.filter_jit(eqx.filter_grad(value))(models)
    jax.effects_barrier()
    # Student: from t, twice the batch, and from u; target: both to the end; Heun: two.
    expected = {"student": 12, "target": 8, "teacher": 8}
    assert {name: sizes.count(name) for name in set(sizes)} == expected
    assert slopes[0].network.weight != 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slopes[1:]))


def test_wrong_arguments():
    process, batch = processes.EDM(), {"x": jnp.ones((2, 1))}
    frozen = {"teacher": gaussian(process)}
    loss = distillation.ConsistencyTrajectory()
    with pytest.raises(ValueError, match="must be told where it jumps to"):
        loss(distillation.Jump(gaussian(process)), KEY, batch, frozen)
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        loss(exact(process), KEY, batch, {})
    with pytest.raises(ValueError, match="`frozen` must have a critic 'critic'"):
        distillation.ConsistencyTrajectory(gan=1.0)(exact(process), KEY, batch, frozen)
    with pytest.raises(ValueError, match="`most`"):
        distillation.ConsistencyTrajectory(steps=4, most=5)
    with pytest.raises(ValueError, match="`frozen` must have the student 'student'"):
        distillation.TrajectoryCritic(loss)(None, KEY, batch, {})
