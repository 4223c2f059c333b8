"""The classifiers that guide: one that is told of the noise, and one of clean examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import guidance, losses, parallel
from jaxdiff._tree import jit
from jaxdiff.training import Player
from train.core import runner
from train.core.classifiers import (
    Classifier,
    build_classifier,
    load_classifier,
    logits_of,
    optimizer_of,
    trained,
)
from train.core.config import RunConfig
from train.core.data import DataInfo, Source

# Far from the seeds of those that measure, so that none of them guides.
SEED = 2000
SIZES = {"channels": 24, "features": 48}
FOLDER = "guides"


class Guides(NamedTuple):
    """Classifiers to guide with.

    Attributes:
        noisy: log p(y | x_t), of any time.
        clean: logits of clean examples.
    """

    noisy: guidance.NoisyClassifier
    clean: Classifier


def guidable(info: DataInfo) -> bool:
    """Whether the data are images or vectors whose condition is a class."""
    height, width = (*info.event_shape, 1, 1)[:2] if len(info.event_shape) == 3 else (0, 0)
    known = len(info.event_shape) in (1, 3) and not height % 2 and not width % 2
    return known and bool(info.classes) and not info.cond


def load_guides(config: RunConfig, denoiser, source: Source, mesh=None) -> Guides:
    """Both classifiers, trained once beside the run and then read.

    Args:
        config: of the run.
        denoiser: the run's, whose process and preconditioning the noisy one has.
        source: the data trained on.
        mesh: the devices.

    Raises:
        ValueError: for data whose condition is no class.
    """
    info = DataInfo.of(source)
    if not guidable(info):
        raise ValueError(
            "`run_dir` must be a run on data of classes, vectors or images of even height and "
            f"width, to train classifiers on, got {info.event_shape} with "
            f"{sorted(info.cond) or info.num_classes or 'no'} classes."
        )
    mesh = parallel.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    steps, seed = config.evaluation.classifier_steps, config.seed + SEED
    noisy = guidance.NoisyClassifier(
        build_classifier(source, seed, noise_label=True, **SIZES),
        denoiser.process,
        denoiser.preconditioning,
    )
    # By log-SNR, and not by time, whose unit is the process's own: all noise levels alike.
    loss = losses.NoisyClassifierLoss(losses.UniformLogSNR())
    player = Player(noisy, loss, optimizer_of(steps))
    folder = config.shared_dir / FOLDER / "noisy"
    others = sorted(int(path.name) for path in folder.glob("[0-9]*"))
    if others and steps not in others:
        runner.say(
            f"{folder.parent} has classifiers of {others} steps; those of {steps} are trained now. "
            "Pass another number of steps to have the others."
        )
    noisy = trained(player, source, folder, steps=steps, seed=seed, mesh=mesh)
    clean = load_classifier(config, source, mesh, name=f"{FOLDER}/clean", seed=seed + 1, **SIZES)
    return Guides(noisy, clean)


@jit
def _hits(guides: Guides, key, x, y, times):
    noisy, clean = guides

    def at(t):
        def one(key, x, y):
            return jnp.argmax(noisy.logits(noisy.process.noise(key, x, t), t)) == y

        return jax.vmap(one)(jax.random.split(key, len(x)), x, y).mean()

    right = jax.vmap(lambda x: jnp.argmax(logits_of(clean, x)))(x) == y
    return right.mean(), jax.vmap(at)(times)


def accuracies(guides: Guides, held_out: Source, seed: int) -> dict[str, float]:
    """On held-out examples: of the clean one, and of the noisy one at levels sigma / alpha."""
    batch = held_out[np.arange(min(len(held_out), 2000))]
    levels = (0.1, 0.3, 1.0, 3.0, 10.0)
    times = guides.noisy.process.time(-2 * jnp.log(jnp.asarray(levels)))
    key, cond = jax.random.key(seed), jnp.asarray(batch["cond"])
    clean, noisy = _hits(guides, key, jnp.asarray(batch["x"]), cond, times)
    names = [f"noisy, sigma / alpha = {level:g}" for level in levels]
    return {"clean": float(clean), **dict(zip(names, noisy.tolist(), strict=True))}
