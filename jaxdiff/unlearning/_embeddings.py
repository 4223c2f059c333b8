"""Conditions filtered before a network sees them: projections away from unwanted ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number


def decorrelate(tokens: Array, unwanted: Array, *, rank: int = 1, alpha: Number = 1.0) -> Array:
    """Tokens without what they share with unwanted ones: X - alpha X V V^T.

    V are the right singular vectors of the unwanted tokens with the largest singular values. At
    alpha 1 nothing of their span is left, and doing it again changes nothing; what is orthogonal to
    them stays.

    Args:
        tokens: X, `(n, size)`; those of words alone, or all.
        unwanted: `(m, size)`.
        rank: how many vectors, up to min(m, size).
        alpha: strength.

    Returns:
        `(n, size)`.

    Reference: Jang, Kim, Park, Kim, Lee, Jeong, "DECOR: Decomposition and Projection of Text
    Embeddings for Text-to-Image Customization", 2024, arXiv 2412.09169.
    """
    if check_count("rank", rank) > min(unwanted.shape):
        raise ValueError(f"`rank` must be at most {min(unwanted.shape)}, got {rank}.")
    check_number("alpha", alpha)
    basis = _directions(unwanted)[:rank]
    return tokens - alpha * (tokens @ basis.T) @ basis


def damp(tokens: Array, *, components: int = 1) -> Array:
    """Tokens of an unwanted concept, their largest components made small: s -> exp(-s) s.

    Args:
        tokens: `(n, size)`, the concept's, and the end of the text, which has it, too.
        components: how many singular values.

    Returns:
        `(n, size)`; others as they were.

    Reference: Li, van de Weijer, Hu, Khan, Hou, Wang, Yang, "Get What You Want, Not What You Don't:
    Image Content Suppression for Text-to-Image Diffusion Models", 2024, arXiv 2402.05375.
    """
    check_count("components", components)
    u, s, v = jnp.linalg.svd(tokens, full_matrices=False)
    small = jnp.where(jnp.arange(len(s)) < components, jnp.exp(-s) * s, s)
    return (u * small) @ v


def projection(rows: Array) -> Array:
    """The orthogonal projection on the span of rows `(k, size)`, `(size, size)`."""
    kept = _directions(rows)
    return kept.T @ kept


def _directions(rows: Array) -> Array:
    """Orthogonal vectors of a span, by their weight, and zeros in place of those there are not."""
    _, s, v = jnp.linalg.svd(rows, full_matrices=False)
    least = jnp.max(s) * max(rows.shape) * jnp.finfo(s.dtype).eps
    return jnp.where((s > least)[:, None], v, 0)


def safree(
    tokens: Array,
    concepts: Array,
    masked: Array,
    *,
    alpha: Number = 0.01,
) -> tuple[Array, Array]:
    """Tokens whose absence leaves a prompt farther from a concept, moved out of its span.

    With P_C the projection on the concepts and P_I that on the prompt's own pooled embeddings,
    token i is a trigger if |(I - P_C) p_i| >= (1 + alpha) times the mean of the others, p_i the
    prompt pooled without token i. Triggers become (I - P_C) P_I e_i, others stay.

    Args:
        tokens: e, `(n, size)`.
        concepts: pooled embeddings of the concept's words, `(k, size)`.
        masked: p, pooled embeddings of the prompt without each token, `(n, size)`.
        alpha: how far beyond the mean.

    Returns:
        The tokens `(n, size)`, and which were triggers, `(n,)`.

    Reference: Yoon, Yu, Patil, Yao, Bansal, "SAFREE: Training-Free and Adaptive Guard for Safe
    Text-to-Image And Video Generation", 2024, arXiv 2410.12761.
    """
    check_number("alpha", alpha)
    if masked.shape != tokens.shape or len(tokens) < 2:
        raise ValueError(
            "`masked` must be the prompt without each of its tokens, two or more, of the shape of "
            f"`tokens` {tokens.shape}, got {masked.shape}."
        )
    away = jnp.eye(tokens.shape[1], dtype=tokens.dtype) - projection(concepts)
    lengths = jnp.linalg.norm(masked @ away, axis=1)
    count = len(lengths)
    others = (lengths.sum() - lengths) / max(count - 1, 1)
    triggers = lengths >= (1 + alpha) * others
    moved = tokens @ projection(masked) @ away
    return jnp.where(triggers[:, None], moved, tokens), triggers


def safree_steps(before: Array, after: Array, *, steepness: Number = 2.5) -> Array:
    """For how many steps of sampling the filtered tokens are used: round(10 sigmoid(...)).

    The farther the filter moved the tokens the longer, by b = 1 - mean cosine of both:
    10 sigmoid(2 steepness (10 b - 5.333)).

    Args:
        before: tokens `(n, size)`.
        after: those of `safree`.
        steepness: the paper's 2.5; 5.5 for artists' styles.

    Returns:
        A whole number of 0 to 10, as a float scalar.

    Reference: Yoon, Yu, Patil, Yao, Bansal, "SAFREE", 2024, arXiv 2410.12761.
    """
    size = jnp.linalg.norm(before, axis=1) * jnp.linalg.norm(after, axis=1)
    cosine = jnp.sum(before * after, axis=1) / jnp.where(size > 0, size, 1)
    moved = 1 - cosine.mean()
    return jnp.round(10 * jax.nn.sigmoid(2 * steepness * (10 * moved - 5.333)))
