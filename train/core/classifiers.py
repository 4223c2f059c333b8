"""Classifiers that recipes train beside a run, once: they measure samples, and guide them."""

from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array
from tqdm import tqdm

from jaxdiff import networks, parallel
from jaxdiff.data import make_loader
from jaxdiff.training import (
    CheckpointStore,
    Hook,
    Player,
    TrainState,
    fit,
    init_train_state,
    make_train_step,
)
from train.core.config import RunConfig
from train.core.data import Source

# Of images; or of vectors, with a noise label that is 0 where nothing is noisy.
Classifier: TypeAlias = networks.ConvClassifier | networks.MLP


def logits_of(classifier: Classifier, x: Array) -> Array:
    """The logits of one clean example."""
    told = isinstance(classifier, networks.MLP)
    return classifier(x, jnp.zeros(())) if told else classifier(x)


def build_classifier(
    source: Source, seed: int, *, noise_label: bool = False, **sizes: int
) -> Classifier:
    """A small classifier of images or vectors.

    Args:
        source: the data and their classes.
        seed: of its weights.
        noise_label: whether it is for noisy examples.
        **sizes: of `ConvClassifier`.
    """
    shape, classes, rngs = source.event_shape, source.num_classes, nnx.Rngs(seed)
    if len(shape) == 1:
        return networks.MLP(shape[0], hidden=64, num_blocks=2, out_features=classes, rngs=rngs)
    return networks.ConvClassifier(
        image_size=shape[:2], in_channels=shape[2], num_classes=classes, noise_label=noise_label,
        rngs=rngs, **sizes,
    )  # fmt: skip


def classifier_loss(classifier, key, batch, frozen):
    """Cross entropy with label smoothing of 0.1, on images shifted by up to one pixel."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(batch["x"])))

    def logits(key, x):
        if x.ndim != 3:
            return logits_of(classifier, x)
        shift_key, dropout_key = jax.random.split(key)
        shift = jax.random.randint(shift_key, (2,), -1, 2)
        padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
        moved = jax.lax.dynamic_slice(padded, (*(shift + 1), 0), x.shape)
        return classifier(moved, key=dropout_key)

    values = jax.vmap(logits)(keys, batch["x"])
    targets = optax.smooth_labels(jax.nn.one_hot(batch["cond"], values.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(values, targets).mean(), {}


def whole(model: Any) -> Any:
    """All of a model, which learns."""
    return model


def load_classifier(
    config: RunConfig,
    source: Source,
    mesh: jax.sharding.Mesh | None = None,
    *,
    name: str = "classifier",
    seed: int | None = None,
    **sizes: int,
) -> Classifier:
    """The classifier that measures samples: trained on the real train split once, then cached.

    Cached as a checkpoint in the run directory, in a folder of its number of steps; another number
    is another classifier. Every process of the mesh trains the same one.

    Args:
        config: of the run.
        source: what it learns.
        mesh: the devices.
        name: of the folder, for others than the one that measures.
        seed: of its weights and data; None for the run's.
        **sizes: of `ConvClassifier`.
    """
    seed = config.seed if seed is None else seed
    steps = config.evaluation.classifier_steps
    classifier = build_classifier(source, seed, **sizes)
    player = Player(classifier, classifier_loss, optimizer_of(steps), trainable=whole)
    return trained(player, source, config.shared_dir / name, steps=steps, seed=seed, mesh=mesh)


def optimizer_of(steps: int) -> optax.GradientTransformation:
    """Adam, falling as a cosine."""
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


def trained(
    player: Player,
    source: Source,
    folder: Path,
    *,
    steps: int,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """A player's model after so many steps: trained once, then read; what was stopped goes on.

    Args:
        player: what learns, and how.
        source: from what.
        folder: where its checkpoint is, in a folder of its number of steps.
        steps: how many.
        seed: of data and noise.
        mesh: the devices, each of which has all of it; None for one.
    """
    mesh = parallel.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    state = init_train_state({"classifier": player}, jax.random.key(seed))
    state = parallel.replicate(state, mesh)
    store = CheckpointStore(folder / str(steps), keep=1)
    restored = store.restore_latest(state.unpack())
    if restored is not None:
        state = TrainState.pack(**restored[0])
    loader = make_loader(source, min(64, len(source)), seed=seed, process_index=0, process_count=1)
    done = int(state.step)
    if done < steps:
        hidden = not parallel.is_first()
        with tqdm(total=steps, initial=done, unit="step", desc=folder.name, disable=hidden) as bar:

            def progress(step, state, metrics):
                bar.update(step - bar.n)  # whose True would end the run

            state = fit(
                make_train_step({"classifier": player}),
                state,
                iter(loader),
                num_steps=steps,
                hooks=[Hook(20, progress)],
                store=store,
                checkpoint_every=steps,
                place=lambda batch: parallel.replicate(batch, mesh),
            )
    return jax.tree.map(jnp.asarray, parallel.fetch(state.players["classifier"].model))
