"""A run directory is all one needs: models written as classes and arguments, and read again."""

import json
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PROCESSES, with_random_weights
from flax import nnx

import jaxdiff
from jaxdiff import distillation, losses, networks, predictions
from jaxdiff.training import (
    CheckpointStore,
    Player,
    PowerEMA,
    init_train_state,
    load_run,
    save_model,
    sigma_rel_to_gamma,
)
from jaxdiff.training._run import from_json, to_json

NETWORKS = {
    "mlp": lambda: networks.MLP(
        2, hidden=8, num_blocks=1, num_classes=3, scalars=["s"], rngs=nnx.Rngs(0)
    ),
    "unet": lambda: networks.UNet(
        4,
        image_size=(4, 8),
        channel_mults=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[],
        dtype=jnp.bfloat16,
        token_size=3,
        rngs=nnx.Rngs(0),
    ),
    "dit": lambda: networks.DiT(
        image_size=4, hidden=8, depth=2, num_heads=2, stacked=True, remat=True, rngs=nnx.Rngs(0)
    ),
}


def player(name="mlp", ema=None, **options):
    model = jaxdiff.NetworkDenoiser(with_random_weights(NETWORKS[name]), **options)
    return Player(model, losses.DenoisingLoss(), optax.sgd(0.1), ema)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def saved(run_dir, players, step=3):
    save_model(run_dir, players, event_shape=(2,), class_names=["a", "b", "c"])
    state = init_train_state(players, jax.random.key(0)).unpack() | {"step": jnp.asarray(step)}
    CheckpointStore(run_dir / "checkpoints").save(state, step=step, config={"seed": 1})
    return state["players"]


@pytest.mark.parametrize("process", PROCESSES)
def test_models_of_every_process_are_read_as_they_were(tmp_path, process):
    options = {"process": PROCESSES[process](), "prediction": predictions.F(0.7)}
    options["preconditioning"] = jaxdiff.LogNoiseLabel(0.7, factor=250.0)
    made = player(**options)
    state = saved(tmp_path, {"model": made})
    run = load_run(tmp_path)
    same(run.model.network, made.model.network)
    assert run.step == 3 and run.config == {"seed": 1}
    assert run.info == {"event_shape": [2], "class_names": ["a", "b", "c"]}
    x, t, cond = jnp.ones(2), jnp.asarray(0.4), {"label": jnp.asarray(1), "s": jnp.asarray(0.1)}
    answer = jax.jit(lambda model: model(x, t, cond))
    np.testing.assert_allclose(answer(run.model), answer(state["model"].model), rtol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_made_of_their_arguments(name):
    network = NETWORKS[name]()
    again = from_json(json.loads(json.dumps(to_json(network, name))))
    assert jax.tree.structure(again) == jax.tree.structure(network)
    shapes = [[(w.shape, w.dtype) for w in jax.tree.leaves(n)] for n in (again, network)]
    assert shapes[0] == shapes[1]
    if name == "dit":
        fused = networks.with_attention(network, "xla")
        again = from_json(to_json(fused, name))
        assert jax.tree.structure(again) == jax.tree.structure(fused)


def test_players_and_averages_are_chosen(tmp_path):
    players = {
        "student": player(ema=PowerEMA((0.05, 0.1)), process=jaxdiff.processes.VP()),
        "critic": player("dit", process=jaxdiff.processes.VP()),
    }
    save_model(tmp_path, players)
    state = init_train_state(players, jax.random.key(0)).unpack()
    averages = state["players"]["student"].averages
    averages[1] = jax.tree.map(lambda w: w + 1, averages[1])
    CheckpointStore(tmp_path / "checkpoints").save(state, step=1)
    student = players["student"].model.network
    same(load_run(tmp_path, player="student", average=None).model.network, student)
    same(load_run(tmp_path, player="student").model.network, student)
    moved = load_run(tmp_path, player="student", average=1).model.network
    same(moved, jax.tree.map(lambda w: w + 1, student))
    # Without averages, the weights as they are.
    same(load_run(tmp_path, player="critic").model.network, players["critic"].model.network)
    for options, message in (
        ({}, r"`player` must be one of \['critic', 'student'\], got None"),
        ({"player": "teacher"}, "got 'teacher'"),
        ({"player": "student", "average": 2}, "below 2, the number of averages of 'student'"),
        ({"player": "critic", "average": 1}, "below 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path, **options)


def test_an_average_of_another_width_is_made_of_all_checkpoints(tmp_path):
    """Weights that follow a curve; the width that was not kept, by the average of its own."""
    kept, wanted = (0.05, 0.1), 0.07
    made = player(ema=PowerEMA(kept), process=jaxdiff.processes.VP())
    save_model(tmp_path, {"model": made})
    state = init_train_state({"model": made}, jax.random.key(0)).unpack()
    network = eqx.filter(made.model.network, eqx.is_inexact_array)
    store, widths = CheckpointStore(tmp_path / "checkpoints", keep=8), (*kept, wanted)
    count = np.arange(1, 401)
    curve = np.sin(count / 60) + count / 400
    gammas = [sigma_rel_to_gamma(width) for width in widths]
    for last in range(50, 401, 50):
        profiles = [
            count[:last] ** (gamma + 1) - (count[:last] - 1) ** (gamma + 1) for gamma in gammas
        ]
        means = [np.average(curve[:last], weights=profile) for profile in profiles]
        state["players"]["model"] = eqx.tree_at(
            lambda p: p.averages,
            state["players"]["model"],
            [jax.tree.map(lambda w, m=m: w * m, network) for m in means[:2]],
        )
        store.save(state | {"step": jnp.asarray(last)}, step=last)
    early = load_run(tmp_path, step=100)
    expected = [
        np.average(curve[:100], weights=count[:100] ** (g + 1) - (count[:100] - 1) ** (g + 1))
        for g in gammas
    ]
    first = early.model.network.first.kernel[...] / network.first.kernel[...]
    np.testing.assert_allclose(first, expected[0], rtol=1e-5)
    assert early.step == 100
    with pytest.raises(ValueError, match="`step` must be one of .50, 100.*got 7"):
        load_run(tmp_path, step=7)
    run = load_run(tmp_path, sigma_rel=wanted)
    first = run.model.network.first.kernel[...] / network.first.kernel[...]
    np.testing.assert_allclose(first, means[2], rtol=2e-3)
    assert run.step == 400 and abs(means[2] - means[0]) > 0.05 < abs(means[2] - means[1])
    made = player(process=jaxdiff.processes.VP())
    saved(tmp_path / "without", {"model": made})
    with pytest.raises(ValueError, match="`sigma_rel` must be None for 'model'"):
        load_run(tmp_path / "without", sigma_rel=wanted)


def test_only_classes_of_jaxdiff_are_written_and_read(tmp_path):
    class Mine(nnx.Module):
        def __call__(self, x, t, cond=None, *, key=None):
            return x

    own = Player(jaxdiff.NetworkDenoiser(Mine(), jaxdiff.processes.VP()), losses.DenoisingLoss())
    with pytest.raises(TypeError, match=r"`model.network` must be of a class of jaxdiff.*Mine"):
        save_model(tmp_path, {"model": own})
    assert not (tmp_path / "model.json").exists()
    with pytest.raises(ValueError, match="has no model.json"):
        load_run(tmp_path)
    players = {"model": player(process=jaxdiff.processes.VP())}
    save_model(tmp_path, players)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_run(tmp_path)
    saved(tmp_path, players)
    path = tmp_path / "model.json"
    text = path.read_text()
    for name in ("os.system", "subprocess.Popen", "jaxdiff.sample", "jaxdiff.networks.nothing"):
        path.write_text(text.replace("jaxdiff.networks.MLP", name))
        with pytest.raises(ValueError, match=f"must name classes of jaxdiff, got '{name}'"):
            load_run(tmp_path)
    for damaged in ("{", "[]", '{"players": {}}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"model.json is damaged"):
            load_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"players": 3},
        {"info": 3},
        {"players": {"model": {}}},
        {"players": {"model": {"averages": 0, "model": 3}}},
        {"players": {"model": {"averages": "x", "model": {}}}},
    ],
)
def test_a_damaged_description_is_named(tmp_path, change):
    saved(tmp_path, {"model": player(process=jaxdiff.processes.VP())})
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"model.json is damaged"):
        load_run(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"model.json is damaged"):
        load_run(tmp_path)


def test_a_fresh_process_needs_the_directory_alone(tmp_path):
    """Without Grain, Pillow, matplotlib or tyro."""
    saved(tmp_path / "run", {"model": player(process=jaxdiff.processes.VP())})
    (tmp_path / "run").rename(tmp_path / "moved")
    program = f"""
import sys
for name in ("grain", "PIL", "matplotlib", "tyro", "sklearn", "train"):
    sys.modules[name] = None
import jax, jaxdiff
from jaxdiff.training import load_run
run = load_run({str(tmp_path / "moved")!r})
cond = {{"label": jax.numpy.zeros(3, int), "s": jax.numpy.zeros(3)}}
print(jaxdiff.sample(jax.random.key(0), run.model, (2,), 3, cond=cond, times=2).x.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(3, 2)", done.stderr


def test_the_player_that_is_sampled_is_loaded_and_a_jump_is_read_again(tmp_path):
    """Of several players, one of which is a map between two times."""
    student = distillation.Jump(player(process=jaxdiff.processes.VP()).model, "s")
    players = {
        "fake": player(process=jaxdiff.processes.VP()),
        "student": Player(student, losses.DenoisingLoss(), optax.sgd(0.1), PowerEMA((0.1,))),
    }
    state = saved(tmp_path, players)
    save_model(tmp_path, players, sampled="student")
    found = load_run(tmp_path).model
    assert type(found) is distillation.Jump and found.until == "s"
    same(found.network, state["student"].averaged().network)
    fake = load_run(tmp_path, player="fake").model
    same(fake.network, state["fake"].model.network)
