"""DomainStudio's loss and feature ensembles: identities, symmetries and closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import with_random_weights
from flax import nnx
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import finetuning, losses, networks, oracles, predictions, processes
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)


def unet(seed):
    return with_random_weights(
        lambda: networks.UNet(
            8,
            image_size=8,
            in_channels=1,
            channel_mults=(1,),
            num_res_blocks=1,
            attention_resolutions=(),
            rngs=nnx.Rngs(0),
        ),
        seed,
    )


def denoiser(seed):
    return jaxdiff.NetworkDenoiser(unet(seed), processes.Cosine())


def images(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 8, 8, 1)), jnp.float32)


def test_haar_details_are_three_orthonormal_bands(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 2)))
    details = finetuning.haar_details(x)
    low = (x[::2, ::2] + x[::2, 1::2] + x[1::2, ::2] + x[1::2, 1::2]) / 2
    assert details.shape == (3, 3, 2, 2)
    assert_allclose(jnp.sum(details**2) + jnp.sum(low**2), jnp.sum(x**2), rtol=1e-12)
    assert_allclose(finetuning.haar_details(jnp.ones((2, 2, 1))), 0)
    with pytest.raises(ValueError, match="even height and width"):
        finetuning.haar_details(x[:5])


def test_the_source_itself_keeps_all_distances():
    """Zero at the source; blind to order and to a common scale of the estimates; else positive."""
    loss = finetuning.DomainStudioLoss()
    batch, source = {"x": images(5)}, denoiser(0)

    @jax.jit
    def parts(model, batch):
        return loss(model, KEY, batch, {"source": source})[1]

    same = parts(source, batch)
    assert abs(same["relative"]) < 1e-6 and abs(same["relative_detail"]) < 1e-6
    assert same["detail"] > 0 and same["x0_mse"] > 0
    other = parts(denoiser(1), batch)
    assert other["relative"] > 1e-4 and other["relative_detail"] > 1e-4

    class Scaled(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def __call__(self, x, t, cond=None, *, key=None):
            return 3 * self.base(x, t, cond, key=key)

    assert abs(parts(Scaled(source), batch)["relative"]) < 1e-6
    with pytest.raises(ValueError, match="3 examples at least"):
        loss(source, KEY, {"x": images(2)}, {"source": source})


def test_the_relative_part_by_hand(x64):
    """mean_i KL(q_i || p_i) of softmaxes over the others."""

    class Fixed(jaxdiff.Denoiser):
        """Estimates that depend on the example's condition alone."""

        process: processes.GaussianProcess
        table: jax.Array

        def __call__(self, x, t, cond=None, *, key=None):
            return self.table[cond]

    tables = np.random.default_rng(0).normal(size=(2, 4, 2, 2, 1))
    ours, theirs = (Fixed(processes.VP(), jnp.asarray(table)) for table in tables)
    batch = {"x": jnp.zeros((4, 2, 2, 1)), "cond": jnp.arange(4)}
    weighting = losses.Uniform(predictions.X0())
    loss = finetuning.DomainStudioLoss(0.5, 0.25, 2.0, weighting)
    value, parts = loss(ours, KEY, batch, {"source": theirs})

    def shares(table):
        flat = table.reshape(4, -1)
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        weights = np.exp(flat @ flat.T) * (1 - np.eye(4))
        return weights / weights.sum(1, keepdims=True)

    def divergence(a, b):
        p, q, apart = shares(a), shares(b), ~np.eye(4, dtype=bool)
        return (q[apart] * np.log(q[apart] / p[apart])).sum() / 4

    details = [np.stack([finetuning.haar_details(jnp.asarray(x)) for x in t]) for t in tables]
    assert_allclose(parts["relative"], divergence(*tables), rtol=1e-10)
    assert_allclose(parts["relative_detail"], divergence(*details), rtol=1e-10)
    assert_allclose(parts["detail"], (details[0] ** 2).mean(), rtol=1e-10)
    total = parts["x0_mse"] + 0.5 * parts["relative"] + 0.25 * parts["relative_detail"]
    assert_allclose(value, total + 2 * parts["detail"], rtol=1e-10)


def test_it_trains_with_a_frozen_source():
    model, source = denoiser(0), denoiser(0)
    players = {"model": Player(model, finetuning.DomainStudioLoss(), optax.adam(1e-3))}
    step = make_train_step(players)
    state = init_train_state(players, KEY)
    found = []
    for _ in range(30):
        state, logged = step(state, {"x": images(4)}, {"source": source})
        found.append(float(logged["loss"]))
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])


TAPS = ("mid", "up.0.0")


def test_an_ensemble_of_one_network_is_that_network():
    net = unet(0)
    x, t = images(1)[0], jnp.asarray(300.0)
    taps = [
        name for name in networks.tap_names(net, x, t) if name.startswith(("down", "mid", "up"))
    ]
    taps = [name for name in taps if "attn" not in name]
    twice = finetuning.FeatureEnsemble.of([net, net, net], taps, x)
    assert len(twice.gates) > 2
    moved = jax.tree.map(lambda leaf: leaf + 0.3, twice.gates)
    plain = net(x, t)
    for ensemble in (twice, eqx.tree_at(lambda e: e.gates, twice, moved)):
        assert_allclose(ensemble(x, t), plain, rtol=2e-5, atol=1e-5)


def test_gates_choose_among_networks():
    """The mean at the start; one of them where its logit is large; shares that are not the mean."""
    nets = [unet(0), unet(1)]
    x, t = images(1)[0], jnp.asarray(300.0)
    ensemble = finetuning.FeatureEnsemble.of(nets, ["mid"], x)
    mids = [networks.read_taps(net, ["mid"], x, t)[1]["mid"] for net in nets]

    def output(net, mid, t=t):
        return networks.EditedNetwork(net, {"mid": lambda _: mid})(x, t)

    mixed = (mids[0] + mids[1]) / 2
    expected = (output(nets[0], mixed) + output(nets[1], mixed)) / 2
    assert_allclose(ensemble(x, t), expected, rtol=1e-5, atol=1e-6)
    # At t = 0 the cosines of the embedding are 1 and the sines 0.
    start = jnp.zeros(())
    towards = jnp.zeros((2, 32)).at[0, 16:].set(100.0)
    first = eqx.tree_at(lambda e: e.gates["mid"].time, ensemble, towards)
    mid = networks.read_taps(nets[0], ["mid"], x, start)[1]["mid"]
    expected = (output(nets[0], mid, start) + output(nets[1], mid, start)) / 2
    assert_allclose(first(x, start), expected, rtol=1e-5, atol=1e-5)


def test_members_keep_numbers_of_their_own():
    net = unet(0)
    made = finetuning.make_adapter(net, KEY, rank=1, layers="mid")
    adapter = eqx.tree_at(
        lambda a: [low.up for low in a.kernels.values()],
        made,
        replace_fn=lambda up: up + 0.3,
    )
    members = [finetuning.AdaptedNetwork(net, (adapter.scaled(s),)) for s in (1.0, 0.5)]
    x, t = images(1)[0], jnp.asarray(300.0)
    ensemble = finetuning.FeatureEnsemble.of(members, [], x)
    expected = (members[0](x, t) + members[1](x, t)) / 2
    assert not np.allclose(members[0](x, t), members[1](x, t), rtol=1e-3)
    assert_allclose(ensemble(x, t), expected, rtol=1e-5, atol=1e-6)
    model = jaxdiff.NetworkDenoiser(ensemble, processes.VP())
    assert np.isfinite(jaxdiff.sample(KEY, model, x.shape, 2, times=2).x).all()


def test_gates_learn_and_networks_do_not():
    nets = [unet(0), unet(1)]
    ensemble = finetuning.FeatureEnsemble.of(nets, ["mid"], images(1)[0])
    model = jaxdiff.NetworkDenoiser(ensemble, processes.Cosine())
    player = Player(
        model, losses.DenoisingLoss(), optax.adam(1e-2),
        trainable=lambda model: model.network.gates,
    )  # fmt: skip
    step, state = make_train_step({"model": player}), init_train_state({"model": player}, KEY)
    state, _ = step(state, {"x": images(4)})
    trained = state.players["model"].model.network
    for a, b in zip(
        jax.tree.leaves(trained.networks), jax.tree.leaves(ensemble.networks), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert np.abs(trained.gates["mid"].features).max() > 1e-3


def test_averaged_noise_is_exact_for_equal_covariances_alone(x64):
    """The mean of estimates is the denoiser of the mean of means, and no other law's otherwise."""
    process, x, t = processes.VP(), jnp.array([0.3]), jnp.asarray(0.6)
    make = lambda mean, variance: oracles.gaussian(  # noqa: E731
        process, jnp.array([mean]), variance * jnp.eye(1)
    )
    mean = (make(-1.0, 0.5)(x, t) + make(2.0, 0.5)(x, t)) / 2
    assert_allclose(mean, make(0.5, 0.5)(x, t), rtol=1e-9)
    unequal = (make(-1.0, 0.5)(x, t) + make(2.0, 0.1)(x, t)) / 2
    assert not np.allclose(unequal, make(0.5, 0.3)(x, t), rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    other = networks.UNet(
        16,
        image_size=8,
        in_channels=1,
        channel_mults=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="one architecture, got 2 different"):
        finetuning.FeatureEnsemble.of([unet(0), other], ["mid"], images(1)[0])
    with pytest.raises(ValueError, match="taps that the network does not have"):
        finetuning.FeatureEnsemble.of([unet(0), unet(1)], ["nowhere"], images(1)[0])
    with pytest.raises(ValueError, match="`relative` must be at least 0"):
        finetuning.DomainStudioLoss(relative=-1.0)
    nets = [networks.MLP(2, hidden=8, num_classes=2, rngs=nnx.Rngs(i)) for i in (0, 1)]
    ensemble = finetuning.FeatureEnsemble.of(nets, [], jnp.zeros(2), jnp.asarray(0))
    model = jaxdiff.NetworkDenoiser(ensemble, processes.VP())
    with pytest.raises(ValueError, match="Labels must lie in"):
        jaxdiff.sample(KEY, model, (2,), 2, cond=jnp.array([0, 7]), times=2)
