import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import GaussianJump, TwoTimesTable

import jaxdiff
from jaxdiff import distillation, guidance, losses, oracles, predictions, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.training import Frozen, Player, PlayerState, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5
GRID = losses.UniformTime()


def gaussian(process, mean=MEAN):
    return oracles.gaussian(process, jnp.full(1, mean), STD**2 * jnp.eye(1))


def exact(process, mean=MEAN):
    return distillation.Jump(GaussianJump.of(process, mean, STD), until="until")


def data(n, count):
    return MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (count, 1))


def test_a_trajectory_is_a_run_of_the_solver(x64):
    """Visited step by step, from data at 6 of 8 down to 0, and then a new one begins."""
    process = processes.RectifiedFlow()
    batch = {"x": data(0, 4), "cond": jnp.asarray([0, 1, 0, 1])}
    classes = oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )
    teacher = guidance.ClassifierFree(classes, null_cond=2)
    bank = distillation.TrajectoryBank.empty(batch, slots=1)
    loss = distillation.SingleTrajectory(bank, steps=8, keep=1.0, gan=None, scales=(1, 5))
    student = distillation.Jump(_Deaf(classes), until="until")

    @jit
    def visit(bank, n):
        key = jax.random.fold_in(KEY, n)
        frozen = Frozen({"teacher": teacher}, state=bank)
        # Other conditions than those the trajectories began with.
        other = {"x": batch["x"], "cond": jnp.where(n == 0, batch["cond"], 1 - batch["cond"])}
        pairs = loss.visit(student, jax.random.split(key)[0], other, bank)[0]
        return pairs, *loss(student, key, other, frozen)

    seen, shares = [], []
    for n in range(7):
        pairs, _, metrics, bank = visit(bank, jnp.asarray(n))
        np.testing.assert_array_equal(bank.index[:, 0], 5 - n if n < 6 else 5)
        seen.append(pairs)
        shares.append(float(metrics["resumed"]))
    assert shares == [0, 1, 1, 1, 1, 1, 0]
    times = GRID.quantile(process, jnp.arange(9) / 8)
    first = seen[0]
    np.testing.assert_allclose(first.t, times[6])
    for n in range(6):
        np.testing.assert_array_equal(seen[n].scale, first.scale)
        np.testing.assert_array_equal(seen[n].cond, batch["cond"])
    for i in range(4):
        guided = dataclasses.replace(teacher, scale=first.scale[i])
        run = jaxdiff.denoise(
            KEY, guided, first.x[i : i + 1], cond=first.cond[i : i + 1],
            times=times[6::-1], saveat=diffrax.SaveAt(t0=True, steps=True),
        )  # fmt: skip
        states = np.asarray(run.trajectory.x)[0, :, 0]
        np.testing.assert_allclose([pairs.x[i, 0] for pairs in seen[:6]], states[:6], rtol=1e-12)
    assert np.all(seen[6].scale != first.scale)
    assert np.all((seen[0].s < seen[0].t) & (seen[0].s >= times[3]))


class _Deaf(jaxdiff.Denoiser):
    """A denoiser that does not hear where to, and what the scale is."""

    base: oracles.GaussianMixture

    @property
    def process(self):
        return self.base.process

    def __call__(self, x, t, cond=None, *, key=None):
        return self.base(x, t, cond["label"])


def test_places_of_a_bank_fill_and_empty(x64):
    """Never more than there are, nothing lost, and a full row goes on with one of its own."""
    process = processes.RectifiedFlow()
    batch = {"x": data(0, 64)}
    bank = distillation.TrajectoryBank.empty(batch, slots=3)
    loss = distillation.SingleTrajectory(bank, steps=8, keep=0.5, gan=None)
    student, teacher = exact(process), gaussian(process)

    @jit
    def run(bank):
        def visit(bank, n):
            frozen = Frozen({"teacher": teacher}, state=bank)
            _, metrics, after = loss(student, jax.random.fold_in(KEY, n), batch, frozen)
            return after, (metrics["resumed"], bank.index, after.index)

        return jax.lax.scan(visit, bank, jnp.arange(60))[1]

    resumed, before, after = map(np.asarray, run(bank))
    changed = before != after
    assert np.all(changed.sum(-1) == 1)
    old, new = before[changed], after[changed]
    # One step on of what was there, or the first step of what was not.
    assert np.all(new == np.where(old > 0, old - 1, 5))
    fresh = (old == 0).reshape(60, 64)
    np.testing.assert_allclose(1 - fresh.mean(1), resumed)
    full, empty = (before > 0).all(-1), (before == 0).all(-1)
    assert not fresh[full].any() and fresh[empty].all() and full.any()
    np.testing.assert_allclose(fresh[~full & ~empty].mean(), 0.5, atol=0.05)


def test_a_table_learns_the_composed_steps_of_its_teacher(x64):
    """From its start down, over any length; the loss is then 0."""
    process, count, steps = processes.RectifiedFlow(0.01, 0.99), 4, 500
    teacher = gaussian(process)
    bank = distillation.TrajectoryBank.empty({"x": data(0, 64)}, slots=2)
    loss = distillation.SingleTrajectory(
        bank, distillation.Squared(), GRID, steps=count, strength=0.75, keep=0.8, reach=1.0,
        gan=None,
    )  # fmt: skip
    student = distillation.Jump(TwoTimesTable.start(process, GRID, count), until="until")
    rate = optax.cosine_decay_schedule(0.1, steps)
    players = {"student": Player(student, loss, optax.adam(rate))}
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(steps):
        state, metrics = step(state, {"x": data(n, 64)}, {"teacher": teacher})
    assert metrics["loss"] < 1e-6
    learned, times = state.players["student"].model, student.base.times
    x = jnp.asarray([[-0.5], [0.5], [1.0]])
    jumped = jit(lambda learned, t, s: jax.vmap(lambda x: learned(x, t, s))(x))
    for n, k in [(3, 0), (3, 1), (2, 0), (1, 0)]:
        path = times[k : n + 1][::-1]
        composed = jaxdiff.denoise(KEY, teacher, x, solver=solvers.DDIM(), times=path).x
        np.testing.assert_allclose(jumped(learned, times[n], times[k]), composed, atol=3e-3)


def test_less_noise_of_real_examples_is_a_bias_of_one_sign(x64):
    """A critic of the second moment, at an exact student: none of r = s, its own of r below."""
    process, count = processes.Cosine(), 20_000
    batch = {"x": data(0, count)}
    bank = distillation.TrajectoryBank.empty(batch, slots=1)
    loss = distillation.SingleTrajectory(bank, steps=8, gan=None)
    student = exact(process)

    @jit
    def found(least):
        critic_loss = distillation.SingleTrajectoryCritic(loss, least)
        state = PlayerState(student, None, [], loss_state=bank)
        frozen = Frozen({"student": student}, players={"student": state})
        model = jax.tree_util.Partial(lambda w, x, t, cond: w * jnp.sum(x**2), jnp.asarray(0.0))
        slope = jax.grad(lambda m: critic_loss(m, KEY, batch, frozen)[0])(model).args[0]
        pairs = loss.visit(student, jax.random.split(KEY)[0], batch, bank)[0]
        return slope, pairs.s

    def second(t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha * MEAN) ** 2 + (alpha * STD) ** 2 + sigma**2

    same, s = found(1.0)
    assert abs(same) < 0.02
    shares = (jnp.arange(100) + 0.5) / 100
    expected = np.mean(second(s)) - np.mean(second(s[:, None] * shares))
    np.testing.assert_allclose(found(0.0)[0], expected, atol=0.02)
    assert expected > 0.1
    # At s = 0.4 and r = 0.2 of data N(0, 0.5^2).
    variance = [float(second(jnp.asarray(t)) - (process.alpha(t) * MEAN) ** 2) for t in (0.4, 0.2)]
    np.testing.assert_allclose(variance, [0.509, 0.322], atol=1e-3)


def test_passes_gradients_and_the_critic(x64):
    process, sizes = processes.RectifiedFlow(), []

    class Counted(eqx.Module):
        weight: jax.Array
        name: str = eqx.field(static=True)

        def __call__(self, x, t, cond, *, key=None):
            jax.debug.callback(lambda *_: sizes.append(self.name), x)
            return self.weight * x

    def network(name):
        made = Counted(jnp.asarray(0.3), name)
        return NetworkDenoiser(made, process, predictions.Velocity())

    batch = {"x": jnp.ones((4, 1))}
    critic = jax.tree_util.Partial(lambda w, x, t, cond: w * x.sum() + t, jnp.asarray(0.5))
    bank = distillation.TrajectoryBank.empty(batch)
    loss = distillation.SingleTrajectory(bank, steps=8, gan=0.25)

    def value(models):
        student, teacher, critic = models
        frozen = Frozen({"teacher": teacher, "critic": critic}, state=bank)
        student = distillation.Jump(student, "until")
        total, metrics, _ = loss(student, KEY, batch, frozen)
        pairs = loss.visit(student, jax.random.split(KEY)[0], batch, bank)[0]
        x_s = jax.vmap(student)(pairs.x, pairs.t, pairs.s)
        return total, (metrics, -jnp.mean(0.5 * x_s[:, 0] + pairs.s))

    models = network("student"), network("teacher"), critic
    (total, (metrics, generator)), slopes = eqx.filter_jit(
        eqx.filter_value_and_grad(value, has_aux=True)
    )(models)
    jax.effects_barrier()
    assert {name: sizes.count(name) for name in set(sizes)} == {"student": 12, "teacher": 4}
    np.testing.assert_allclose(metrics["adversarial"], generator, rtol=1e-12)
    expected = metrics["consistency"] + 0.25 * metrics["adversarial"]
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    assert slopes[0].network.weight != 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slopes[1:]))


def test_student_and_critic_train_together(x64):
    process = processes.RectifiedFlow()
    bank = distillation.TrajectoryBank.empty({"x": data(0, 8)})
    loss = distillation.SingleTrajectory(bank, steps=8)

    def critic(w, x, t, cond):
        return w[0] * x.sum() + w[1] * t

    players = {
        "student": Player(exact(process, 0.0), loss, optax.adam(1e-2)),
        "critic": Player(
            jax.tree_util.Partial(critic, jnp.zeros(2)),
            distillation.SingleTrajectoryCritic(loss), optax.adam(1e-2), trainable=lambda m: m.args,
        ),
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(3):
        state, metrics = step(state, {"x": data(n, 8)}, {"teacher": gaussian(process)})
    assert np.all(np.isfinite(list(jax.tree.leaves(metrics))))
    assert np.any(state.players["critic"].model.args[0] != 0)
    assert np.all(state.players["student"].loss_state.index.max(1) > 0)


def test_wrong_arguments():
    process, batch = processes.RectifiedFlow(), {"x": jnp.ones((2, 1))}
    bank = distillation.TrajectoryBank.empty(batch)
    loss = distillation.SingleTrajectory(bank)
    frozen = Frozen({"teacher": gaussian(process)}, state=bank)
    with pytest.raises(ValueError, match="must be told where it jumps to"):
        loss(distillation.Jump(gaussian(process)), KEY, batch, frozen)
    with pytest.raises(ValueError, match="`frozen` must have a critic 'critic'"):
        loss(exact(process), KEY, batch, frozen)
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        loss(exact(process), KEY, batch, Frozen(state=bank))
    with pytest.raises(ValueError, match="the size of the bank, 2 rows, got 3"):
        plain = distillation.SingleTrajectory(bank, gan=None)
        plain(exact(process), KEY, {"x": jnp.ones((3, 1))}, frozen)
    with pytest.raises(ValueError, match="`slots`"):
        distillation.TrajectoryBank.empty(batch, 0)
    with pytest.raises(ValueError, match="`frozen` must have the student 'student'"):
        distillation.SingleTrajectoryCritic(loss)(None, KEY, batch, Frozen())
