"""Attacks, defences against them, requests one after another, and where a meaning is kept."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from promises import denoiser as small_denoiser

import jaxdiff
from jaxdiff import finetuning, losses, oracles, predictions, processes, unlearning
from jaxdiff.denoiser import Denoiser, NetworkDenoiser
from jaxdiff.guidance import CFGPlusPlus, ClassifierFree, PosteriorOdds
from jaxdiff.training import Frozen, Player, init_train_state, make_train_step
from jaxdiff.unlearning._shared import Seen

KEY = jax.random.key(0)
COSINE = processes.Cosine()
MEANS = np.asarray([[-1.5, 0.0], [0.0, 1.0], [2.0, -0.5]])
SEEN = unlearning.NoisedExamples()


class Said(Denoiser):
    """D(x, t, c) = W c: linear in a vector, and in nothing else."""

    network: jax.Array
    process: processes.GaussianProcess = COSINE

    def __call__(self, x, t, cond=None, *, key=None):
        return self.network @ cond["tokens"]


def states(count=4):
    return Seen(jnp.zeros((count, 3)), jnp.full(count, 0.5), jnp.ones(count))


def test_an_attack_in_a_ball_finds_its_nearest_point(x64):
    """W(c + delta) nearest to W_0 c, of an orthogonal W: towards W^T W_0 c, as far as allowed."""
    draw = np.random.default_rng(0).standard_normal
    whole, old = jnp.asarray(np.linalg.qr(draw((3, 3)))[0]), jnp.asarray(draw((3, 3)))
    c = jnp.asarray(draw((4, 3)))
    away = c @ old.T @ whole - c
    far = jnp.linalg.norm(away, axis=1)
    for radius in (0.5 * float(far.min()), 2 * float(far.max())):
        loss = unlearning.AdversarialErasing(
            unlearning.ErasedConcepts({"tokens": jnp.zeros(3)}), radius=radius, steps=400
        )
        found = loss.attack(Said(whole), Said(old), KEY, states(), {"tokens": c})["tokens"] - c
        expected = away * jnp.minimum(1, radius / far)[:, None]
        assert_allclose(found, expected, atol=2e-3 * radius)
    # Without a bound it says the concept again, whatever was done to W.
    assert_allclose((c + found) @ whole.T, c @ old.T, atol=0.02)


def test_what_is_erased_in_a_ball_cannot_be_said_from_it(x64):
    """Beside one that is erased at its own name alone, both of a model local in its condition."""
    teacher = Said(jnp.asarray([[1.0, 0.0], [0.0, 1.0]]))

    class Curved(Denoiser):
        """W c beside bumps at points: it may differ in the ball from what it is at its centre."""

        network: jax.Array
        process: processes.GaussianProcess = COSINE

        def __call__(self, x, t, cond=None, *, key=None):
            c = cond["tokens"]
            near = jnp.exp(-jnp.sum((c - CENTRES) ** 2, -1) / 0.18)
            return c + near @ self.network

    CENTRES = jnp.asarray([[i, j] for i in np.linspace(-1, 1, 7) for j in np.linspace(0, 2, 7)])
    own = {"tokens": jnp.tile(jnp.asarray([0.0, 1.0]), (32, 1))}
    forget = {"x": jnp.zeros((32, 2)), "cond": own}
    erased = unlearning.ErasedConcepts({"tokens": jnp.zeros(2)}, states=SEEN)
    strongest = {}
    for name, loss in {
        "erased": erased,
        "defended": unlearning.AdversarialErasing(erased, radius=0.6, steps=10),
    }.items():
        players = {"model": Player(Curved(jnp.zeros((49, 2))), loss, optax.adam(0.03))}
        state, step = init_train_state(players, KEY), make_train_step(players)
        for _ in range(150):
            state, _ = step(state, {"x": forget["x"], "forget": forget}, {"teacher": teacher})
        model = state.players["model"].model
        judge = unlearning.AdversarialErasing(erased, radius=0.6, steps=100)
        seen = Seen(jnp.zeros((32, 2)), jnp.full(32, 0.5), jnp.ones(32))
        cond = judge.attack(model, teacher, KEY, seen, forget["cond"])
        said = jax.vmap(lambda c, model=model: model(c["tokens"], 0.5, c))(cond)
        strongest[name] = float(jnp.linalg.norm(said - jnp.asarray([0.0, 1.0]), axis=1).min())
        own = model(jnp.zeros(2), 0.5, {"tokens": jnp.asarray([0.0, 1.0])})
        assert own[1] < -0.9  # asked by its own name it says the opposite, by both
    # What an attack in the ball comes to, from the concept itself; the target is 2 away.
    assert strongest["erased"] < 1.5 < 1.9 < strongest["defended"]


class Soft(Denoiser):
    """A blend of classes by the first entries of what the tokens sum to."""

    classes: Denoiser
    process: processes.GaussianProcess = COSINE

    def __call__(self, x, t, cond=None, *, key=None):
        weights = jnp.sum(cond["tokens"], 0)
        said = jnp.stack([self.classes(x, t, jnp.int32(c)) for c in range(3)])
        return weights @ said


def classes():
    return oracles.gaussian_mixture(
        COSINE, jnp.asarray(MEANS), jnp.tile(0.16 * jnp.eye(2), (3, 1, 1)), labels=[0, 1, 2]
    )


def test_the_nearest_point_of_a_simplex(x64):
    """Against the conditions of the optimum, and a search over all supports."""
    v = jax.random.normal(KEY, (50, 4))
    found = np.asarray(unlearning.onto_simplex(v))
    assert_allclose(found.sum(-1), 1, rtol=1e-12)
    assert np.all(found >= 0)
    for row, point in zip(np.asarray(v), found, strict=True):
        tau = (row - point)[point > 0]
        assert_allclose(tau, tau[0], atol=1e-12)
        assert np.all(row[point == 0] <= tau[0] + 1e-12)
    assert_allclose(unlearning.onto_simplex(jnp.asarray(found)), found, atol=1e-12)


def test_an_attack_finds_the_class_that_is_hidden(x64):
    """The loss at what it finds is the Bayes error, that of the class's own denoiser."""
    model = Soft(classes())
    x = jnp.asarray(MEANS[0] + 0.4 * np.random.default_rng(0).standard_normal((256, 2)))
    batch = {"x": x, "cond": {"tokens": jnp.zeros((256, 1, 3))}}
    into = lambda v, cond: {"tokens": v[None]}
    options = {"steps": 400, "rate": 0.1, "decay": 0.0, "levels": 20}
    start = jnp.full(3, 1 / 3)
    for project in (None, unlearning.onto_simplex):
        v, values = unlearning.attack(KEY, model, batch, start, into, project=project, **options)
        assert_allclose(v, [1, 0, 0], atol=0.05)
        assert values.shape == (400,)
    same, _ = unlearning.attack(
        KEY, model, batch, jnp.asarray([1.0, 0, 0]), into, **{**options, "rate": 1e-9}
    )
    assert_allclose(same, [1, 0, 0], atol=1e-6)
    bayes = unlearning.attack(KEY, model, batch, same, into, **{**options, "rate": 1e-9})[1]
    assert_allclose(values[-50:].mean(), bayes[-50:].mean(), rtol=0.05)


def test_words_before_a_caption_say_it_again(x64):
    """Of the words 1, 2, 0, none, the third is the class."""
    table = jnp.asarray([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0.0]])
    x = jnp.asarray(MEANS[0] + 0.4 * np.random.default_rng(0).standard_normal((64, 2)))
    batch = {"x": x, "cond": {"tokens": jnp.zeros((64, 2, 3))}}
    words, values = unlearning.attack_words(
        KEY, Soft(classes()), batch, table, count=1, steps=80, rate=0.05, decay=0.0
    )
    assert_array_equal(words, [2])
    assert values[-10:].mean() < values[:10].mean()


def test_guidance_the_other_way_is_the_concept_again(x64):
    """Concept arithmetic: what was taught minus a scale is said by minus w over that scale."""
    teacher = classes()
    for scale, w in ((1.0, 1.0), (2.0, 3.0)):
        erased = unlearning.ErasedConcepts(3, scale).target(teacher)

        class Erased(Denoiser):
            """The student that has learned its target, and none besides."""

            said: Denoiser
            plain: Denoiser
            process: processes.GaussianProcess = COSINE

            def __call__(self, x, t, cond=None, *, key=None):
                both = self.said(x, t, jnp.int32(0)), self.plain(x, t, jnp.int32(3))
                return jnp.where(cond == 0, *both)

        student, x, t = Erased(erased, teacher), jnp.asarray([0.3, -0.2]), jnp.float64(0.4)
        again = ClassifierFree(student, 3, -w / scale)(x, t, jnp.int32(0))
        assert_allclose(again, ClassifierFree(teacher, 3, w)(x, t, jnp.int32(0)), rtol=1e-10)


class Quadratic(eqx.Module):
    """A critic of first and second moments, by the class and the time it is told."""

    network: jax.Array

    def __call__(self, x, t, cond):
        u = (x - MEANS[1]) / 0.15
        return jnp.sum(self.network * jnp.stack([u, u**2])) + 0 * t


def test_a_corrected_domain_is_one_that_no_critic_tells(x64):
    teacher = classes()

    class Tabled(Denoiser):
        """Under class 0 an affine map of what is said of class 1."""

        network: dict
        process: processes.GaussianProcess = COSINE

        def __call__(self, x, t, cond=None, *, key=None):
            plain = teacher(x, t, cond)
            other = teacher(x, t, jnp.int32(1)) * self.network["gain"] + self.network["shift"]
            return jnp.where(cond == 0, other, plain)

    level = losses.LogNormal(0.0, 1e-6)
    loss = unlearning.DomainCorrection(time_law=level)
    start = {"gain": jnp.full(2, 1.5), "shift": jnp.full(2, 0.7)}
    players = {
        "critic": Player(
            Quadratic(jnp.zeros((2, 2))), unlearning.DomainCritic(loss), optax.adam(0.1)
        ),
        "student": Player(Tabled(start), loss, optax.adam(optax.cosine_decay_schedule(0.02, 600))),
    }
    state, step = init_train_state(players, KEY), make_train_step(players)
    rng = np.random.default_rng(0)
    for _ in range(600):
        x = jnp.asarray(MEANS[1] + 0.4 * rng.standard_normal((256, 2)))
        forget = {"x": x, "cond": jnp.zeros(256, jnp.int32)}
        batch = {"x": x, "cond": jnp.ones(256, jnp.int32), "forget": forget}
        state, logged = step(state, batch, {"teacher": teacher})
    found = state.players["student"].model.network
    assert_allclose(found["shift"], [0, 0], atol=0.15)
    assert_allclose(np.abs(found["gain"]), [1, 1], atol=0.2)
    assert_allclose(logged["critic/loss"], 2 * np.log(2), atol=0.05)


def linear(*shape):
    return jax.random.normal(jax.random.fold_in(KEY, shape[0]), shape)


def requests():
    base = NetworkDenoiser(
        jaxdiff.networks.MLP(2, hidden=8, num_blocks=1, num_classes=3, rngs=flax_keys()), COSINE
    )
    adapters = [finetuning.make_adapter(base.network, key, rank=2) for key in jax.random.split(KEY)]
    moved = [jax.tree.map(lambda a: a + 0.3, adapter) for adapter in adapters]
    return base, moved


def flax_keys():
    from flax import nnx

    return nnx.Rngs(0)


def test_requests_change_their_own_class_and_no_other():
    base, adapters = requests()
    both = unlearning.Requests(base, tuple(adapters), ((0,), (2,)))
    x, t = jax.random.normal(KEY, (4, 2)), jnp.float32(0.4)
    run = jax.jit(lambda model: jax.vmap(lambda x, c: model(x, t, c))(x, jnp.asarray([0, 1, 2, 3])))
    found, plain = run(both), run(base)
    assert_array_equal(found[jnp.asarray([1, 3])], plain[jnp.asarray([1, 3])])
    for row, adapter in ((0, adapters[0]), (2, adapters[1])):
        own = run(finetuning.adapt(base, adapter))
        assert_allclose(found[row], own[row], rtol=1e-5)
        assert jnp.all(abs(found[row] - plain[row]) > 1e-3)
    assert both.evaluations == 1


def test_adapters_apart_see_nothing_of_one_anothers_inputs(x64):
    """A_1^T A_2 = 0: B_1 A_1 is 0 on the span of A_2, and on nothing else."""
    columns = jnp.linalg.qr(linear(6, 6))[0]
    low = lambda down: finetuning.Adapter(
        {"k": finetuning.LowRank(down, linear(2, 3), 1.0, False, False)}
    )
    first, second, third = (
        low(columns[:, :2]), low(columns[:, 2:4]), low(linear(6, 2)),
    )  # fmt: skip
    assert_allclose(unlearning.overlap(first, second), 0, atol=1e-20)
    expected = sum(
        jnp.sum((third.kernels["k"].down.T @ other.kernels["k"].down) ** 2)
        for other in (first, second)
    )
    assert_allclose(unlearning.overlap(third, first, second), expected, rtol=1e-12)
    change = lambda x: x @ first.kernels["k"].change(jnp.zeros((6, 3)))
    assert_allclose(change(columns[:, 2:4].T), 0, atol=1e-12)
    assert np.abs(change(linear(5, 6))).max() > 0.1


def test_a_request_learns_apart_from_earlier_ones():
    base, adapters = requests()
    earlier = (adapters[0],)
    rows = {"x": np.zeros((16, 2), np.float32), "cond": np.full(16, 2, np.int32)}
    batch = {**rows, "forget": rows}
    inner = unlearning.Relabelled(unlearning.Always(1))
    found = {}
    for weight in (0.0, 10.0):
        model = finetuning.adapt(base, finetuning.make_adapter(base.network, KEY, rank=2))
        players = {
            "model": Player(
                model, unlearning.Apart(inner, weight), optax.adam(0.02),
                trainable=finetuning.adapter_weights,
            )
        }  # fmt: skip
        state, step = init_train_state(players, KEY), make_train_step(players)
        for _ in range(60):
            state, logged = step(state, batch, {"earlier": earlier})
        found[weight] = float(logged["overlap"])
        same = state.players["model"].model.network.network
        jax.tree.map(assert_array_equal, *map(jax.tree.leaves, (same, base.network)))
    assert found[10.0] < 0.01 * found[0.0]


class Paths(eqx.Module):
    """x0 = sum_j B_j (A_j c), two ways side by side, and x does not matter."""

    first: jax.Array
    last: jax.Array

    def __call__(self, x, t, cond=None, *, key=None, tap=None):
        see = (lambda name, h: h) if tap is None else tap
        c = see("cond", cond["style"])
        parts = [self.last[j] @ see(f"way.{j}", self.first[j] @ c) for j in range(2)]
        return see("out", sum(parts)) + 0 * x


def test_effects_of_ways_side_by_side_add_up(x64):
    network = Paths(linear(2, 3, 3), linear(4, 2, 3)[:2])
    model = NetworkDenoiser(network, COSINE, predictions.X0())
    style = linear(5, 3)
    found = jax.jit(
        lambda key: unlearning.indirect_effects(
            key, model, (2,), lambda x: jnp.sum(x, -1), taps=("cond", "way.0", "way.1", "out"),
            cond={"style": style}, corrupted={"style": 0 * style},
            times=jnp.asarray([1.0, 0.6, 0.3, 0.0]),
        )
    )(KEY)  # fmt: skip
    total, part = found["total"], found["indirect"]
    assert_allclose(part["cond"], total, rtol=1e-9)
    assert_allclose(part["out"], total, rtol=1e-9)
    assert_allclose(part["way.0"] + part["way.1"], total, rtol=1e-9)
    ways = [
        jnp.mean(jnp.sum(style @ a.T @ b.T, -1))
        for a, b in zip(network.first, network.last, strict=True)
    ]
    assert_allclose([part["way.0"], part["way.1"]], ways, rtol=1e-9)
    assert_allclose(found["x"]["corrupted"], 0, atol=1e-12)


def test_what_is_not_reached_has_no_effect():
    base, _ = requests()
    found = unlearning.indirect_effects(
        KEY, base, (2,), lambda x: jnp.sum(x, -1), taps=("emb",), cond=jnp.asarray([0, 1]),
        corrupted=jnp.asarray([0, 1]), times=jnp.asarray([0.9, 0.5, 0.0]),
    )  # fmt: skip
    assert found["total"] == 0 and found["indirect"]["emb"] == 0


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments():
    model, teacher = small_denoiser(0), small_denoiser(1)
    erased = unlearning.ErasedConcepts(2, states=SEEN)
    rows = {"x": jnp.zeros((4, 2)), "cond": jnp.zeros(4, jnp.int32)}
    frozen = Frozen({"teacher": teacher, "critic": lambda x, t, c: t}, 0, None, {})
    with pytest.raises(ValueError, match="`entry` must name numbers of the condition"):
        unlearning.AdversarialErasing(erased)(model, KEY, {**rows, "forget": rows}, frozen)
    with pytest.raises(ValueError, match="`radius` must be"):
        unlearning.AdversarialErasing(erased, radius=0.0)
    with pytest.raises(ValueError, match="as many examples as there are to be forgotten"):
        other = {"x": jnp.zeros((3, 2)), "cond": jnp.zeros(3, jnp.int32)}
        unlearning.DomainCorrection()(model, KEY, {**rows, "forget": other}, frozen)
    with pytest.raises(ValueError, match="must have the student 'student'"):
        unlearning.DomainCritic()(model, KEY, {**rows, "forget": rows}, frozen)
    base, adapters = requests()
    with pytest.raises(ValueError, match="`classes` must be those of each adapter"):
        unlearning.Requests(base, tuple(adapters), ((0,), (0, 1)))
    both = unlearning.Requests(base, tuple(adapters), ((0,), (1,)))
    with pytest.raises(TypeError, match="`cond` must have a class"):
        both(jnp.zeros(2), jnp.float32(0.5))
    apart = unlearning.Apart(unlearning.Relabelled(unlearning.Always(1)))
    with pytest.raises(TypeError, match="`model` must have an adapter"):
        apart(base, KEY, {**rows, "forget": rows}, frozen)
    with pytest.raises(ValueError, match="must have the adapters of earlier requests"):
        apart(finetuning.adapt(base, adapters[0]), KEY, {**rows, "forget": rows}, frozen)
    with pytest.raises(ValueError, match="`count` must be"):
        unlearning.attack_words(KEY, base, rows, jnp.zeros((3, 2)), count=0)
    with pytest.raises(ValueError, match="`start` must be numbers that can be moved"):
        unlearning.attack(KEY, base, rows, jnp.zeros(2, int), lambda v, cond: cond)
    with pytest.raises(ValueError, match="`score` must return a number for each example"):
        unlearning.indirect_effects(
            KEY, base, (2,), jnp.sum, taps=("emb",), cond=jnp.zeros(2, int),
            corrupted=jnp.full(2, 3), times=jnp.asarray([0.9, 0.5]),
        )  # fmt: skip
    with pytest.raises(TypeError, match="`into` must be a function"):
        unlearning.attack(KEY, base, rows, jnp.zeros(2), 3)


class Fixed(eqx.Module):
    """Half the square of how far weights are from a point."""

    goal: jax.Array

    def __call__(self, model, key, batch, frozen):
        return jnp.sum((model["network"] - self.goal) ** 2) / 2, {}


def test_a_rule_for_gradients_is_for_what_learns(x64):
    """Under a mask forgetting still wins, and the entries that rest have no say in it."""
    forget, retain = Fixed(jnp.asarray([1.0, 3.0])), Fixed(jnp.asarray([-2.0, 3.5]))
    start = {"network": jnp.asarray([0.5, 30.0])}
    for mask in (None, jnp.asarray([True, False])):
        player = Player(
            start, unlearning.EraseDiff(forget, retain, 1.0, 0.1), optax.sgd(0.05), mask=mask,
            trainable=lambda m: m["network"],
        )  # fmt: skip
        state, step = init_train_state({"model": player}, KEY), make_train_step({"model": player})
        for _ in range(2000):
            state, _ = step(state, {"x": jnp.zeros((1, 1))}, {})
        found = state.players["model"].model["network"]
        assert abs(found[0] - 1.0) < 0.1
        assert (found[1] == 30.0) == (mask is not None)
    for around in (unlearning.OnForgotten, unlearning.Apart, unlearning.Repulsion):
        with pytest.raises(TypeError, match="EraseDiff combines gradients, and must be outermost"):
            around(unlearning.EraseDiff(forget, retain))


def test_odds_are_part_of_the_derivative(x64):
    """So that densities of what guidance samples are those of the law without the class."""
    full = classes()
    kept = oracles.gaussian_mixture(
        COSINE, jnp.asarray(MEANS[:2]), jnp.tile(0.16 * jnp.eye(2), (2, 1, 1))
    )
    own = oracles.gaussian_mixture(COSINE, jnp.asarray(MEANS[2:]), 0.16 * jnp.eye(2)[None])
    odds = jax.tree_util.Partial(
        lambda a, b, x, t: a.log_prob(x, t) - b.log_prob(x, t) - jnp.log(2.0), own, kept
    )
    model, x, t = PosteriorOdds(full, 2, odds), jnp.asarray([0.6, 0.1]), jnp.float64(0.5)
    found, expected = (jax.jacfwd(lambda x, d=d: d(x, t, jnp.int32(3)))(x) for d in (model, kept))
    assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_what_would_be_wrong_in_silence_is_refused():
    base, adapters = requests()
    network = base.network
    for wrong in ((99, 0), (0, 99), (-1, 0), (1.0, 0), ([0, 0], [1, 2])):
        with pytest.raises(ValueError, match="must be"):
            unlearning.edit_classes(network, *wrong)
    hot, x = jnp.eye(3)[:2], jnp.zeros((2, 2))
    for override in (unlearning.NextClass(3), unlearning.AnyOf([0, 1])):
        with pytest.raises(ValueError, match="`cond` must have a class for every example"):
            override(KEY, hot, x)
    with pytest.raises(ValueError, match="`forget_cond` must be what is to be kept away from"):
        PosteriorOdds(base, None, jax.tree_util.Partial(jnp.sum))
    plural = PosteriorOdds(base, 0, jax.tree_util.Partial(lambda x, t: x))
    with pytest.raises(ValueError, match="`log_odds` must return a scalar"):
        plural(jnp.zeros(2), jnp.float32(0.5), jnp.int32(3))
    guided = ClassifierFree(base, 3, 2.0)
    options = {"taps": ("emb",), "cond": jnp.zeros(2, int), "corrupted": jnp.full(2, 3), "times": 2}
    with pytest.raises(TypeError, match="`denoiser` must evaluate its network once"):
        unlearning.indirect_effects(KEY, guided, (2,), jnp.sum, **options)
    with pytest.raises(TypeError, match="`solver` must evaluate once a step"):
        unlearning.indirect_effects(
            KEY, base, (2,), jnp.sum, solver=jaxdiff.solvers.EDMHeun(), **options
        )
    plus = CFGPlusPlus(base, 3, 0.6)
    rows = {"x": jnp.zeros((4, 2)), "cond": jnp.zeros(4, jnp.int32)}
    with pytest.raises(ValueError, match="`teacher` must have the noise that its x0 implies"):
        unlearning.ErasedConcepts(3, states=SEEN)(
            base, KEY, {"forget": rows}, Frozen({"teacher": plus}, 0, None, {})
        )
    with pytest.raises(ValueError, match="`rank` must be at most 1"):
        unlearning.decorrelate(jnp.ones((3, 4)), jnp.ones((1, 4)), rank=2)
    with pytest.raises(ValueError, match="`masked` must be the prompt without each"):
        unlearning.safree(jnp.ones((1, 4)), jnp.ones((1, 4)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="`rate` must be below 2 / decay"):
        unlearning.quadratic_divergence(2.0, 1.0, 1.0, 3.0, 5, jnp.ones(2))
    with pytest.raises(ValueError, match="`surrogate` must be in order"):
        unlearning.SelectiveAmnesia(surrogate=(1.0, -1.0))
    with pytest.raises(ValueError, match="`gradient` must be finite"):
        unlearning.saliency_mask({"w": jnp.asarray([1.0, jnp.nan])})
    mask = unlearning.saliency_mask({"w": jnp.asarray([1.0, 0, 0, 0, 2.0])}, 0.8)["w"]
    assert mask.tolist() == [True, False, False, False, True]  # nothing depends on the others
    # Directions there are not are not taken away.
    tokens = jax.random.normal(KEY, (3, 4))
    assert_allclose(unlearning.decorrelate(tokens, jnp.zeros((1, 4))), tokens)
    twice = jnp.tile(jnp.asarray([[1.0, 0, 0, 0]]), (2, 1))
    assert_allclose(unlearning.decorrelate(tokens, twice, rank=2)[:, 1:], tokens[:, 1:], rtol=1e-5)
    assert unlearning.search_step(lambda step: 1.0, 1.0, growth=2) == 4.0  # the last that was tried
    large = unlearning.onto_simplex(jnp.asarray([3e7, 2e7, 0.0]))
    assert_allclose(large, [1.0, 0.0, 0.0])
    half = unlearning.attack(
        KEY, small_denoiser(0, process=COSINE, prediction=predictions.Eps()),
        {"x": jnp.ones((8, 2), jnp.bfloat16), "cond": jnp.zeros(8, jnp.int32)}, jnp.zeros(2),
        lambda v, cond: cond, steps=3,
    )[1]  # fmt: skip
    assert np.isfinite(half).all()
