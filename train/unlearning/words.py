"""Methods that make a model of captions forget a word: by edits, by learning, or at the door."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxdiff import guidance, losses, unlearning
from jaxdiff.data import PROMPT_WORDS, ArraySource, make_loader
from jaxdiff.denoiser import Denoiser, NetworkDenoiser
from jaxdiff.parallel import path_of
from jaxdiff.training import Player
from train.unlearning.recipe import learned

RADIUS = 0.3  # of the ball that is defended, in lengths of the word's own vector


def table_of(model: NetworkDenoiser) -> Array:
    """The vectors of all words, and of none, `(words + 1, size)`."""
    return model.network.embedding.words.embedding[...]  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model, and what becomes of captions before it sees them.

    Attributes:
        model: the denoiser.
        heard: of vectors `(n, size)` of one caption, as the model is given them.
        scaled: the guided model, at a scale; None for classifier-free guidance.
    """

    model: NetworkDenoiser
    heard: Callable[[Array], Array] = lambda vectors: vectors
    scaled: Callable[[float], Denoiser] | None = None

    @property
    def nothing(self) -> dict[str, Array]:
        """The condition that says nothing."""
        return {"tokens": table_of(self.model)[-1:]}

    def at(self, scale: float) -> Denoiser:
        """The guided model."""
        if self.scaled is not None:
            return self.scaled(scale)
        return guidance.ClassifierFree(self.model, self.nothing, scale)


class Parts:
    """What a method is built of.

    Attributes:
        base: the denoiser that is to forget.
        source: examples with captions.
        word: the index of the word.
        column: where in captions it stands.
        others: the words that stand there, too.
        steps: updates of those that learn.
        seed: of everything.
    """

    def __init__(
        self, base: NetworkDenoiser, source: ArraySource, word: str, steps: int, seed: int
    ):
        names = list(source.words or ())
        if source.words != PROMPT_WORDS:
            raise ValueError(f"`bases` must be runs on prompts, got one of the words {names}.")
        if word not in names:
            raise ValueError(f"`forget` must be a word of the captions, {names}, got {word!r}.")
        said = np.asarray(source.cond["tokens"])  # type: ignore[index]
        self.base, self.source, self.steps, self.seed = base, source, steps, seed
        self.word = names.index(word)
        columns = np.flatnonzero((said == self.word).any(0))
        self.none, self.column = len(names), int(columns[0])
        there = np.unique(said[:, self.column])
        self.others = [int(n) for n in there if n not in (self.word, self.none)]
        hit = said[:, self.column] == self.word
        self.kept = source.take(np.flatnonzero(~hit & (said[:, self.column] != self.none)))
        self.forget = source.take(np.flatnonzero(hit))
        self.length = said.shape[1]

    @property
    def null(self) -> dict[str, Array]:
        """No word at all."""
        return {"tokens": jnp.full(self.length, self.none, jnp.int32)}

    def alone(self, word: int) -> np.ndarray:
        """The caption of one word, `(length,)`."""
        said = np.full(self.length, self.none, np.int32)
        said[self.column] = word
        return said

    def vectors(self, *words: int) -> Array:
        """Of some words, `(n, size)`."""
        return table_of(self.base)[np.asarray(words)]

    @property
    def denoising(self) -> losses.DenoisingLoss:
        """Of what is kept, as in training."""
        return losses.DenoisingLoss(losses.Uniform(self.base.prediction), null_cond=self.null)

    @property
    def states(self) -> unlearning.States:
        """Of guided sampling in ten steps."""
        return unlearning.OnTrajectory(self.null, steps=10)

    def learned(self, loss: Any, *patterns: str, model: Any = None, vectors: bool = False) -> Any:
        """The model after its updates, of some weights alone.

        Args:
            loss: with examples to be forgotten, whose caption is the word alone.
            patterns: parts of the paths of weights that learn; none for all.
            model: that begins; None for the base.
            vectors: whether captions to be forgotten are given as vectors.
        """
        model = self.base if model is None else model
        said = jnp.asarray(self.alone(self.word))
        told = table_of(model)[said] if vectors else said
        mask = unlearning.parameter_mask(model.network, *patterns) if patterns else None
        kept, forget = (
            make_loader(source, 32, seed=self.seed, num_threads=0)
            for source in (self.kept, self.forget)
        )

        def beside(kept, forget):
            rows = jnp.broadcast_to(told, (len(forget["x"]), *told.shape))
            return {**kept, "forget": {"x": forget["x"], "cond": {"tokens": rows}}}

        batches = itertools.islice(map(beside, kept, forget), self.steps)
        player = Player(model, loss, optax.adam(2e-4), mask=mask)
        return learned(player, batches, self.seed, teacher=self.base)

    def edited(self, keep: bool, ridge: float = 0.01) -> NetworkDenoiser:
        """Keys and values of the word are those of the next that stands in its place."""
        erase, into = self.vectors(self.word), self.vectors(self.others[0])
        rest = [n for n in range(self.none + 1) if n != self.word]
        # Beside the square of the vector's own length.
        return unlearning.edit_cross_attention(
            self.base, erase, into, self.vectors(*rest) if keep else None,
            ridge=float(ridge * jnp.sum(erase**2)),
        )  # fmt: skip


def _erased(parts: Parts) -> unlearning.ErasedConcepts:
    weighting = losses.Uniform(parts.base.prediction)
    return unlearning.ErasedConcepts(parts.null, 1.0, states=parts.states, weighting=weighting)


def _defended(parts: Parts) -> Speaker:
    nothing = {"tokens": table_of(parts.base)[parts.null["tokens"]]}
    states = unlearning.OnTrajectory(nothing, steps=10)
    erased = dataclasses.replace(_erased(parts), null_cond=nothing, states=states)
    radius = RADIUS * float(jnp.linalg.norm(parts.vectors(parts.word)))
    loss = unlearning.AdversarialErasing(erased, radius=radius, steps=5)
    return Speaker(parts.learned(loss, "cross", vectors=True))


def _trce(parts: Parts) -> Speaker:
    safe = unlearning.Always({"tokens": jnp.asarray(parts.alone(parts.others[0]))})
    states = unlearning.OnTrajectory(parts.null, steps=10, most=0.5)
    weighting = losses.Uniform(parts.base.prediction)
    loss = unlearning.EarlySteering(
        parts.null, safe, 3.0, preserve=10.0, states=states, weighting=weighting
    )
    return Speaker(parts.learned(loss, "cross", model=parts.edited(True)))


def _relabelled(parts: Parts) -> Speaker:
    other = unlearning.Always({"tokens": jnp.asarray(parts.alone(parts.others[0]))})
    relabelled = unlearning.Relabelled(other, losses.Uniform(parts.base.prediction))
    return Speaker(parts.learned(unlearning.Both(relabelled, parts.denoising)))


def _renamed(parts: Parts) -> Speaker:
    def one(path, leaf):
        table = path_of(path).endswith("words/embedding")
        return leaf.at[parts.word].set(leaf[parts.others[0]]) if table else leaf

    return Speaker(jax.tree_util.tree_map_with_path(one, parts.base))


def _safree(parts: Parts) -> Speaker:
    concept = parts.vectors(parts.word)

    def heard(vectors):
        count = len(vectors)
        masked = (vectors.sum(0) - vectors) / (count - 1)
        return unlearning.safree(vectors, concept, masked)[0]

    return Speaker(parts.base, heard)


def _decorrelated(parts: Parts) -> Speaker:
    concept = parts.vectors(parts.word)
    return Speaker(parts.base, lambda vectors: unlearning.decorrelate(vectors, concept))


def _safe_latent(parts: Parts) -> Speaker:
    # One row stands in every place, however long a caption.
    none, unsafe = ({"tokens": parts.vectors(n)} for n in (parts.none, parts.word))

    def at(scale):
        return guidance.SafeLatent(
            parts.base, none, unsafe, scale, warmup=0, safety=100.0, threshold=0.03
        )

    return Speaker(parts.base, scaled=at)


METHODS: dict[str, Callable[[Parts], Speaker]] = {
    "renamed": _renamed,
    "UCE": lambda parts: Speaker(parts.edited(True)),
    "TIME": lambda parts: Speaker(parts.edited(False)),
    "TRCE": _trce,
    "ESD-x": lambda parts: Speaker(parts.learned(_erased(parts), "cross")),
    "ESD-x, defended": _defended,
    "relabelled": _relabelled,
    "SAFREE": _safree,
    "DECOR": _decorrelated,
    "safe latent": _safe_latent,
}
