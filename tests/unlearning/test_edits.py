"""Edits in closed form, searches of one step, and their guarantees."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdiff import networks, unlearning
from jaxdiff.training import Frozen, Player, init_train_state, make_train_step
from jaxdiff.unlearning._baselines import quadratic

KEY = jax.random.key(0)


class Model(eqx.Module):
    network: jax.Array


def rows(seed, count, size=6):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, size)))


def test_the_edit_is_the_minimum_and_exact_where_it_can_be(x64):
    kernel, erase, into, keep = rows(0, 6), rows(1, 2), rows(2, 2), rows(3, 3)

    def objective(w, ridge=0.5, scale=2.0):
        return (
            jnp.sum((erase @ w - into @ kernel) ** 2)
            + scale * jnp.sum((keep @ (w - kernel)) ** 2)
            + ridge * jnp.sum((w - kernel) ** 2)
        )

    new = unlearning.edited_kernel(kernel, erase, into, keep, keep_scale=2.0, ridge=0.5)
    np.testing.assert_allclose(jax.grad(objective)(new), 0, atol=1e-12)
    # With ridge to 0 and independent rows it says what it shall, exactly.
    exact = unlearning.edited_kernel(kernel, erase, into, ridge=1e-10)
    np.testing.assert_allclose(erase @ exact, into @ kernel, atol=1e-8)
    # What is orthogonal to the erased is said as before; and orthogonal concepts commute.
    basis = jnp.linalg.qr(rows(4, 6))[0]
    one, two, other = basis[:1], basis[1:2], basis[3:]
    edit = lambda w, a, b: unlearning.edited_kernel(w, a, b, ridge=0.1)
    np.testing.assert_allclose(other @ edit(kernel, one, other[:1]), other @ kernel, atol=1e-12)
    both = edit(edit(kernel, one, other[:1]), two, other[1:2])
    back = edit(edit(kernel, two, other[1:2]), one, other[:1])
    np.testing.assert_allclose(both, back, atol=1e-12)
    # One pair: a step of rank one, whose residual shrinks by ridge / (ridge + |k|^2).
    a, b = rows(5, 1), rows(6, 1)
    found = unlearning.edited_kernel(kernel, a, b, ridge=0.01)
    share = 0.01 / (0.01 + jnp.sum(a**2))
    np.testing.assert_allclose(a @ found - b @ kernel, share * (a - b) @ kernel, atol=1e-12)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_cross_attention_and_nothing_else_is_edited(network):
    kinds = {"num_words": 5, "token_size": 8, "rngs": nnx.Rngs(0)}
    if network == "dit":
        net = networks.DiT(
            hidden=16, depth=1, num_heads=2, patch_size=2, image_size=4, in_channels=1, **kinds
        )
    else:
        net = networks.UNet(
            8, in_channels=1, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(4,),
            image_size=4, **kinds,
        )  # fmt: skip
    words = net.embedding.words.embedding[...]
    new = unlearning.edit_cross_attention(net, words[:1], words[1:2], words[2:], ridge=0.1)
    changed = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(net)[0], jax.tree.leaves(new), strict=True
        )
        if not np.array_equal(a, b)
    ]
    assert changed and all("cross" in p and ("['k']" in p or "['v']" in p or ".k" in p or ".v" in p)
                           for p in changed), changed  # fmt: skip
    mask = unlearning.parameter_mask(net, "cross/k/", "cross/v/")
    assert sum(jax.tree.leaves(mask)) == 2 * len(changed)  # kernels and their biases


def test_a_class_is_renamed_and_nothing_forgotten():
    net = networks.MLP(2, hidden=8, num_blocks=1, num_classes=3, rngs=nnx.Rngs(0))
    net = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), net)
    new = unlearning.edit_classes(net, 0, 2)
    x, t = jnp.ones(2), jnp.float32(0.5)
    np.testing.assert_array_equal(new(x, t, 0), net(x, t, 2))
    for other in (1, 2, 3):
        np.testing.assert_array_equal(new(x, t, other), net(x, t, other))
    row = net.embedding.classes.embedding[...][0]
    np.testing.assert_array_equal(new(x, t, row), net(x, t, 0))  # it was only hidden


def test_tokens_without_what_is_unwanted(x64):
    tokens, unwanted = rows(0, 4), rows(1, 2)
    new = unlearning.decorrelate(tokens, unwanted, rank=2)
    np.testing.assert_allclose(new @ unwanted.T, 0, atol=1e-12)
    np.testing.assert_allclose(unlearning.decorrelate(new, unwanted, rank=2), new, atol=1e-12)
    half = unlearning.decorrelate(tokens, unwanted, rank=2, alpha=0.5)
    np.testing.assert_allclose(half, (tokens + new) / 2, atol=1e-12)
    u, s, v = np.linalg.svd(np.asarray(tokens), full_matrices=False)
    small = unlearning.damp(tokens, components=1)
    np.testing.assert_allclose(
        small, tokens + s[0] * (np.exp(-s[0]) - 1) * np.outer(u[:, 0], v[0]), atol=1e-12
    )


def test_triggers_are_what_a_prompt_needs_to_come_near(x64):
    """A token in the concept's span is moved out of it; others stay, bit for bit."""
    basis = jnp.eye(6)
    concept, plain = basis[:1], basis[2:5]
    tokens = jnp.concatenate([concept, plain])
    pooled = tokens.mean(0)
    masked = jnp.stack([(4 * pooled - token) / 3 for token in tokens])
    p = unlearning.projection(jnp.concatenate([concept, 2 * concept]))  # of rank one
    np.testing.assert_allclose(p, concept.T @ concept, atol=1e-12)
    np.testing.assert_allclose(p @ p, p, atol=1e-12)
    new, triggers = unlearning.safree(tokens, concept, masked)
    np.testing.assert_array_equal(triggers, [True, False, False, False])
    np.testing.assert_allclose(new[0], 0, atol=1e-12)
    np.testing.assert_array_equal(new[1:], tokens[1:])
    none, triggers = unlearning.safree(plain, concept, masked[1:] * 0 + plain)
    assert not np.any(triggers)
    np.testing.assert_array_equal(none, plain)
    # The farther the longer: nothing moved is 0 of ten steps, all of them 10.
    assert unlearning.safree_steps(tokens, tokens) == 0
    assert unlearning.safree_steps(tokens, -tokens) == 10


def test_one_layer_is_moved_as_far_as_it_must(x64):
    model = {"a": {"w": rows(0, 2)}, "b": {"w": rows(1, 2), "c": rows(2, 1)}}
    forget = jax.tree.map(lambda w: 0.1 * w, model)
    forget["b"] = jax.tree.map(lambda w: 3 * w, model["b"])
    retain = {"a": model["a"], "b": jax.tree.map(lambda w: w.at[0].multiply(-1), model["b"])}
    scores = unlearning.score_layers(model, forget, retain)
    np.testing.assert_allclose(scores["a"].importance, 0.1, rtol=1e-6)
    np.testing.assert_allclose([scores["a"].alignment, scores["b"].importance], [1, 3], rtol=1e-6)
    assert unlearning.best_layers(scores) == ["b"]
    moved = unlearning.move_layer(model, forget, "b", 0.5)
    assert moved["a"]["w"] is model["a"]["w"] or np.array_equal(moved["a"]["w"], model["a"]["w"])
    np.testing.assert_allclose(moved["b"]["w"], 2.5 * model["b"]["w"])
    tried = []

    def left(step):
        tried.append(step)
        return max(0.0, 1 - step / 0.7)

    step = unlearning.search_step(left, 0.1, rounds=20)
    assert 0.7 <= step < 0.7 + 1e-6 and tried[:4] == [0.1, 0.2, 0.4, 0.8]
    assert unlearning.search_step(lambda step: 1.0, 0.1, growth=3) == 0.8  # it never is


def test_noisy_descent_and_what_it_guarantees(x64):
    """On quadratics the law after K steps is known, and nearer to that of learning anew."""
    decay, noise, rate, steps = 0.5, 0.3, 0.1, 20
    learned, left = jnp.asarray([1.0, -1.0]), jnp.asarray([0.5, 0.0])
    rho = 1 - rate * decay
    variance = noise**2 / (decay * (1 - rate * decay / 2))

    def run(key):
        start_key, key = jax.random.split(key)
        theta = learned + jnp.sqrt(variance) * jax.random.normal(start_key, (2,))
        descent = unlearning.noisy_descent(key, rate, noise)
        state = descent.init(theta)
        for _ in range(steps):
            updates, state = descent.update(decay * (theta - left), state, theta)
            theta = theta + updates
        return theta

    found = np.asarray(jax.vmap(run)(jax.random.split(KEY, 4000)))
    mean = left + rho**steps * (learned - left)
    np.testing.assert_allclose(found.mean(0), mean, atol=4 * (variance / 4000) ** 0.5)
    np.testing.assert_allclose(found.var(0), variance, rtol=0.1)
    order = 2.0
    divergence = unlearning.quadratic_divergence(order, decay, noise, rate, steps, learned - left)
    expected = order * np.sum((np.asarray(mean - left)) ** 2) / (2 * variance)
    np.testing.assert_allclose(divergence, expected)
    # The ridge of the transformation is the loss's.
    ridge = unlearning.noisy_descent(KEY, rate, 0.0, decay)
    updates, _ = ridge.update(jnp.zeros(2), ridge.init(learned), learned)
    np.testing.assert_allclose(updates, -rate * decay * learned)
    # The bound: n examples whose means move c by 2 / n, after as many steps as it asks for.
    count, lipschitz = 100, 1.0
    dp = unlearning.learning_divergence(order, lipschitz, decay, noise, count, rate, 1000)
    wanted = dp / 50
    least = unlearning.unlearning_steps(dp, wanted, decay, rate)
    np.testing.assert_allclose(least, np.ceil(2 / (decay * rate) * np.log(50)))
    assert unlearning.unlearning_steps(dp, 2 * dp, decay, rate) == 0
    apart = jnp.asarray([2 * lipschitz / (decay * count)])
    exact = unlearning.quadratic_divergence(order, decay, noise, rate, least, apart)
    assert exact <= wanted
    with pytest.raises(ValueError, match="`params` must be given"):
        ridge.update(jnp.zeros(2), ridge.init(learned))


def test_who_wins_between_forgetting_and_keeping(x64):
    """L_r = |th|^2 / 2 and L_f = (th - f)' diag(1, 2) (th - f) / 2: a sum meets in between.

    The rule forgets, up to a distance that falls with the rate of descent.
    """
    goal, curve = jnp.asarray([3.0, 1.0]), jnp.asarray([1.0, 2.0])
    forget = lambda model, *_: (jnp.sum(curve * (model["network"] - goal) ** 2) / 2, {})
    retain = lambda model, *_: (jnp.sum(model["network"] ** 2) / 2, {})
    ruled, both = (
        unlearning.EraseDiff(forget, retain, rate=0.1),
        unlearning.Both(retain, forget, 0.1),
    )

    def end(slope, rate):
        def step(_, model):
            return jax.tree.map(lambda w, g: w - rate * g, model, slope(model))

        return jax.lax.fori_loop(0, 20_000, step, {"network": jnp.zeros(2)})["network"]

    summed = end(lambda model: jax.grad(lambda m: both(m, KEY, {}, {})[0])(model), 0.1)
    np.testing.assert_allclose(summed, 0.1 * curve * goal / (1 + 0.1 * curve), atol=1e-9)
    slope = lambda model: ruled.gradient(model, KEY, {}, {})[1]
    far = [float(jnp.linalg.norm(end(slope, rate) - goal)) for rate in (0.1, 0.03, 0.01, 0.003)]
    np.testing.assert_allclose(far, [0.274, 0.086, 0.0287, 0.0087], rtol=0.02)
    model = {"network": jnp.asarray([1.0, 1.0])}
    g, g_f = slope(model)["network"], jax.grad(lambda m: forget(m)[0])(model)["network"]
    assert g @ g_f >= 0.1 * g_f @ g_f - 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_surgery_takes_off_what_opposes(x64, sign):
    """Of every array by itself, whatever the size of the gradient."""
    a, b = rows(0, 2), rows(1, 2)
    b = sign * jnp.sign(jnp.sum(a * b)) * b
    pull = lambda g: lambda model, *_: (jnp.sum(g * model["network"]), {})
    loss = unlearning.GradientSurgery(pull(a), pull(b))
    slope = loss.gradient({"network": jnp.zeros_like(a)}, KEY, {}, {})[1]["network"]
    rest = slope - b
    if sign > 0:
        np.testing.assert_allclose(rest, a)
    else:
        np.testing.assert_allclose(jnp.sum(rest * b), 0, atol=1e-12)
        assert jnp.sum(rest * a) > 0


def test_ascent_ends_and_repulsion_points_away(x64):
    value = lambda model, key, batch, frozen: (jnp.sum(model["network"] ** 2), {})
    forget = {"forget": {"x": jnp.ones((1, 2)), "cond": jnp.zeros(1, jnp.int32)}}
    climb = unlearning.GradientAscent(value, bound=1.0)
    for w, expected in ((0.5, -1.0), (2.0, 0.0)):
        model = {"network": jnp.asarray([w])}
        slope = jax.grad(lambda m: climb(m, KEY, forget, {})[0])(model)["network"]
        np.testing.assert_allclose(slope, expected)

    away = unlearning.Repulsion(lambda *_: (jnp.zeros(()), {}), gamma=2.0, width=0.5)
    adapted, model = Model(jnp.asarray([1.0, 0.0])), Model(jnp.asarray([1.5, 1.0]))
    frozen = Frozen({"adapted": adapted})
    slope = jax.grad(lambda m: away(m, KEY, {}, frozen)[0])(model).network
    gap, v = model.network - adapted.network, 2 * 0.5**2
    u = jnp.sum(gap**2) / v
    np.testing.assert_allclose(slope, -2.0 * 2 / v * jnp.exp(-u) * gap)
    linear = unlearning.negate_task({"w": jnp.asarray([1.0])}, {"w": jnp.asarray([1.5])}, 2.0)
    np.testing.assert_allclose(linear["w"], 0.0)


def test_elastic_weights_of_quadratic_losses(x64):
    """The minimum is (H + 2 lam F)^-1 (H theta_0 + 2 lam F theta*)."""
    curve, least = jnp.asarray([1.0, 4.0]), jnp.asarray([1.0, -1.0])
    fisher, start = jnp.asarray([0.5, 2.0]), jnp.asarray([0.0, 3.0])

    def total(w):
        return jnp.sum(curve * (w - least) ** 2) / 2 + 10 * quadratic(w, start, fisher)

    slope, hessian = jax.grad(total)(start), jax.hessian(total)(start)
    found = start - jnp.linalg.solve(hessian, slope)
    expected = (curve * least + 20 * fisher * start) / (curve + 20 * fisher)
    np.testing.assert_allclose(found, expected)


def test_fisher_information_squares_the_sum_over_times(x64):
    """Of a loss that is a weight times a number of the example: F = E (times x)^2."""

    loss = lambda model, key, batch, frozen: (jnp.mean(model.network * batch["x"]), {})
    x = jnp.asarray([[1.0], [3.0]])
    found = unlearning.fisher_diagonal(KEY, Model(jnp.ones(1)), {"x": x}, loss, times=5)
    np.testing.assert_allclose(found, 25 * np.mean([1.0, 9.0]))


def test_saliency_is_global_over_arrays():
    slopes = {"a": jnp.asarray([0.1, -5.0]), "b": jnp.asarray([3.0, 0.2])}
    mask = unlearning.saliency_mask(slopes, 0.5)
    np.testing.assert_array_equal(mask["a"], [False, True])
    np.testing.assert_array_equal(mask["b"], [True, False])


def test_noisy_descent_trains_a_player():
    loss = lambda model, *_: (jnp.sum(model.network**2), {})
    descent = optax.chain(unlearning.noisy_descent(KEY, 0.1, 0.0))
    players = {"a": Player(Model(jnp.ones(2)), loss, descent)}
    state, step = init_train_state(players, KEY), make_train_step(players)
    state, _ = step(state, 0.0)
    np.testing.assert_allclose(state.players["a"].model.network, 0.8, rtol=1e-6)
