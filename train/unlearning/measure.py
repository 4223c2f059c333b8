"""What is left of forgotten classes, what became of the others, and how soon they are back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import guidance, losses, parallel
from jaxdiff.data import ArraySource, make_loader
from jaxdiff.denoiser import Denoiser, NetworkDenoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import Player, init_train_state, make_train_step
from train.core.classifiers import logits_of
from train.core.comparison import held_out_metrics, resampled_frechet
from train.core.config import RunConfig, SamplingConfig
from train.core.data import DataInfo, Source
from train.core.evaluation import measure, references
from train.core.sampling import draw
from train.unlearning.data import split

# Of guidance, at which what is hidden may show; the last undoes what negative guidance taught.
SCALES = (1.0, 3.0, 7.5, -1.0)
MOST_ATTACKED = 200  # samples of a look at an attack
EXAMPLES = 50  # of a forgotten class, that attacks are given
RELEARNED = (0, 1, 2, 5, 10, 20, 50, 100)  # updates after which an attack is looked at


@eqx.filter_jit
def _probabilities(classifier, x):
    return jax.nn.softmax(jax.vmap(lambda x: logits_of(classifier, x))(x), axis=-1)


class Judge:
    """The classifier, the reference and the noise that all models of a seed share.

    Args:
        config: of the base run.
        source: all of the data it was trained on.
        held_out: the data that samples are measured against.
        forget: classes.
        mesh: the devices.
        count: of samples of what is kept, of what is forgotten, and of no class.

    Attributes:
        law: samples of no class of a model that was trained without the forgotten, or None.
    """

    def __init__(
        self, config: RunConfig, source: Source, held_out: Source, forget: tuple[int, ...],
        mesh: jax.sharding.Mesh, count: int,
    ):  # fmt: skip
        self.config, self.mesh, self.count = config, mesh, count
        self.info, self.forget = DataInfo.of(source), np.asarray(forget, np.int32)
        self.chosen = held_out_metrics(config, source, mesh, ("frechet",))
        kept, forgotten = split(source, forget)
        self.forgotten = forgotten
        there, _ = split(held_out, forget)
        self.reference = there[references(len(there))]
        some = np.random.default_rng(0).permutation(len(kept))[: min(count, len(kept))]
        self.real = kept[np.sort(some)]
        self.kept = np.setdiff1d(self.info.classes, self.forget).astype(np.int32)
        self.key = jax.random.key(config.seed + 1)
        self.law: np.ndarray | None = None
        self.few = min(MOST_ATTACKED, count)
        # The kept class that a classifier is nearest to taking forgotten examples for.
        seen = self.probabilities(forgotten[np.arange(min(len(forgotten), 500))]["x"])
        self.neighbour = int(self.kept[np.argmax(seen[:, self.kept].mean(0))])

    def probabilities(self, x: Any) -> np.ndarray:
        """Of the classes, by the classifier that measures, `(n, classes)`."""
        classifier = self.chosen["accuracy"].classifier
        return np.asarray(_probabilities(classifier, jnp.asarray(x)))

    def samples(
        self, model: Denoiser | FlowMap, sampling: SamplingConfig, labels: np.ndarray
    ) -> np.ndarray:
        """Of these classes, from the same noise for every model."""
        out, _ = draw(
            sampling, model, self.info, self.mesh, self.key, jnp.asarray(labels), len(labels)
        )
        return np.asarray(parallel.fetch(out.x))

    def left(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What a classifier sees of forgotten classes in samples that were asked for them."""
        p = self.probabilities(x)
        own = p[np.arange(len(p)), labels]
        return {
            "forgotten": float(np.mean(p.argmax(1) == labels)),
            "posterior": float(own.mean()),
            "entropy": float(-(p * np.log(p + 1e-12)).sum(1).mean()),
        }

    def __call__(self, model: Denoiser | FlowMap, sampling: SamplingConfig) -> dict[str, Any]:
        """Every figure of a model but attacks.

        Args:
            model: the denoiser, or a generator.
            sampling: how it is sampled, without guidance.

        Returns:
            figure -> number: "forgotten" is the share of samples asked for a forgotten class that
            are of it, at scale 1 and at `SCALES`; "unasked" that among samples of no class, and
            "law" their Frechet distance from `law`, those of a model that was trained without it;
            "accuracy", "neighbour" and "frechet" are of what is kept.
        """
        asked = np.resize(self.forget, self.count)
        found: dict[str, Any] = dict(self.left(self.samples(model, sampling, asked), asked))
        labels = np.resize(self.kept, self.count)
        x = self.samples(model, sampling, labels)
        p = self.probabilities(x).argmax(1)
        hits = p == labels
        batch = {"x": x, "cond": labels}
        numbers = measure({"frechet": self.chosen["frechet"]}, batch, self.reference, self.real)
        found |= {
            "accuracy": float(hits.mean()),
            "neighbour": float(hits[labels == self.neighbour].mean()),
            **numbers,
            "frechet_resampled": resampled_frechet(self.chosen, batch, self.reference),
        }
        if isinstance(model, FlowMap):
            return found
        for scale in SCALES[1:]:
            guided = dataclasses.replace(sampling, guidance_scale=scale)
            some = self.samples(model, guided, asked[: self.few])
            left = self.left(some, asked[: self.few])
            found[f"forgotten at {scale:g}"] = left["forgotten"]
        free = self.unasked(model, sampling)
        seen = self.probabilities(free).argmax(1)
        found["unasked"] = float(np.isin(seen, self.forget).mean())
        if self.law is not None:
            distance = self.chosen["frechet"]({"x": free}, {"x": self.law})
            found["law"], found["law_standard_error"] = (float(v) for v in distance)
        return found

    def unasked(self, model: Denoiser, sampling: SamplingConfig) -> np.ndarray:
        """Samples of no class."""
        return self.samples(model, sampling, np.full(self.count, self.info.null_cond, np.int32))

    def examples(self, count: int = EXAMPLES) -> ArraySource:
        """Those of forgotten classes that attacks are given, the same for all models."""
        order = np.random.default_rng(self.config.seed + 3).permutation(len(self.forgotten))
        return self.forgotten.take(np.sort(order[:count]))

    def relearned(
        self, model: NetworkDenoiser, sampling: SamplingConfig, updates: int, *, rate: float = 2e-4
    ) -> dict[int, float]:
        """Updates on a few forgotten examples -> share of samples that are of their class again.

        A fresh Adam at a fixed rate, without averages. The class's own row begins as the mean of
        the kept ones in every model, so that the network is measured and not the row.
        """
        model = with_mean_row(model, self.forget, self.kept)
        loss = losses.DenoisingLoss(losses.Uniform(model.prediction))
        players = {"model": Player(model, loss, optax.adam(rate))}
        key = jax.random.key(self.config.seed + 4)
        state, step = init_train_state(players, key), make_train_step(players)
        source = self.examples()
        batches = iter(make_loader(source, min(32, len(source)), seed=0, num_threads=0))
        asked, found, done = np.resize(self.forget, self.few), {}, 0
        for n in [n for n in RELEARNED if n <= updates]:
            for _ in range(n - done):
                state, _ = step(state, next(batches), {})
            done = n
            x = self.samples(state.players["model"].model, sampling, asked)
            found[n] = self.left(x, asked)["forgotten"]
        return found

    def inverted(self, model: NetworkDenoiser, sampling: SamplingConfig, updates: int) -> float:
        """The share of samples of a forgotten class after its row alone was searched for.

        Concept inversion: the embedding that denoises a few examples best, the network frozen.
        Of one class; the best that a continuous attack on the condition does.
        """
        label = int(self.forget[0])
        model = with_mean_row(model, self.forget[:1], self.kept)
        loss = losses.DenoisingLoss(losses.Uniform(model.prediction))
        mask = row_mask(model.network, label)
        players = {"model": Player(model, loss, optax.adam(3e-2), mask=mask)}
        state = init_train_state(players, jax.random.key(self.config.seed + 5))
        step, source = make_train_step(players), self.examples()
        source = source.take(np.flatnonzero(source.labels == label))
        batches = iter(make_loader(source, min(32, len(source)), seed=0, num_threads=0))
        for _ in range(updates):
            state, _ = step(state, next(batches), {})
        asked = np.full(self.few, label, np.int32)
        x = self.samples(state.players["model"].model, sampling, asked)
        return self.left(x, asked)["forgotten"]

    def reintroduced(
        self, model: Denoiser, levels: tuple[float, ...] = (0.3, 1.0, 3.0)
    ) -> dict[float, float]:
        """Noise level -> share of forgotten images that are still of their class after an edit.

        Images are noised to the level and denoised under no condition, in ten steps: what is shown
        to a model in context. Even a model that never knew the class returns what has little
        noise.
        """
        batch = self.forgotten[np.arange(min(self.few, len(self.forgotten)))]
        labels = np.asarray(batch["cond"])
        none = jnp.full(len(labels), self.info.null_cond, jnp.int32)
        found = {}
        for level in levels:
            start = model.process.time(-2 * jnp.log(jnp.float32(level)))
            out = guidance.sdedit(
                self.key, model, jnp.asarray(batch["x"]), times=jnp.linspace(start, 0, 11),
                cond=none,
            )  # fmt: skip
            found[level] = self.left(np.asarray(out.x), labels)["forgotten"]
        return found


def _is_table(path: tuple) -> bool:
    return parallel.path_of(path).endswith("classes/embedding")


def with_mean_row(model: NetworkDenoiser, forget: np.ndarray, kept: np.ndarray) -> NetworkDenoiser:
    """The model, whose rows of forgotten classes are the mean of the kept ones."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: w.at[forget].set(w[kept].mean(0)) if _is_table(path) else w, model
    )


def row_mask(network: Any, label: int) -> Any:
    """A mask of one row of the table of classes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: (jnp.arange(len(w)) == label)[:, None] if _is_table(path) else False,
        eqx.filter(network, eqx.is_inexact_array),
    )


def steps_to_half(curve: Mapping[int, float]) -> float:
    """Updates until half of the samples are of the class, between those looked at, or infinity."""
    steps, shares = np.asarray(list(curve)), np.asarray(list(curve.values()))
    over = np.flatnonzero(shares >= 0.5)
    if not len(over):
        return float("inf")
    n = int(over[0])
    if n == 0:
        return 0.0
    low, high = np.log1p(steps[n - 1]), np.log1p(steps[n])
    part = (0.5 - shares[n - 1]) / (shares[n] - shares[n - 1])
    return float(np.expm1(low + part * (high - low)))
