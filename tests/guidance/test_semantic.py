"""Semantic guidance: compositions, quantiles, momentum and warm-up in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Counting, mixture
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, processes
from jaxdiff.guidance import SemanticGuidance
from jaxdiff.stepwise import at_step, init_notes

KEY = jax.random.key(0)
WEIGHTS = np.array([0.3, -0.2])
PLAIN = {"quantile": 0.0, "momentum": 0.0, "warm_up": 0}


def edits_of(count):
    return {
        "label": jnp.arange(count) % 2,
        "edits": jnp.tile(jnp.arange(2), (count, 1)),
        "edit_weights": jnp.tile(jnp.asarray(WEIGHTS), (count, 1)),
    }


def test_edits_of_all_numbers_at_once_are_a_composition(x64):
    """Quantile, momentum and warm-up 0: Composable, of the condition and the edits."""
    laws = mixture(processes.VP())
    cond = edits_of(3)
    semantic = SemanticGuidance(laws, 2, 2, 1.5, edit_scale=2.0, **PLAIN)
    concepts = jnp.concatenate([cond["label"][:, None], cond["edits"]], 1)
    weights = jnp.tile(jnp.asarray([1.5, *2.0 * WEIGHTS]), (3, 1))
    composed = {"label": cond["label"], "concepts": concepts, "weights": weights}
    run = lambda d, cond: jaxdiff.sample(KEY, d, (2,), 3, cond=cond, times=6)
    found = run(semantic, cond)
    expected = run(guidance.Composable(laws, 2, 3), composed)
    assert_allclose(found.x, expected.x, rtol=1e-9)
    assert found.nfe.tolist() == expected.nfe.tolist() == [24] * 3


class Pictures(jaxdiff.Denoiser):
    """One picture for each class, whatever the state: of a size that eps does not see."""

    process: processes.VP
    pictures: jax.Array

    def __call__(self, x, t, cond=None, *, key=None):
        return self.pictures[cond] * self.process.sigma(t) / self.process.alpha(t)


def pictures(shape):
    drawn = np.random.default_rng(0).normal(size=(4, *shape))
    return Pictures(processes.VP(), jnp.asarray(drawn)), drawn


@pytest.mark.parametrize("shape", [(8, 8, 2), (40,)])
def test_an_edit_moves_its_largest_numbers_alone(x64, shape):
    """A share 1 - q of each channel, whatever the channel's size."""
    base, drawn = pictures(shape)
    loud = base.pictures.at[..., -1].mul(100.0) if len(shape) == 3 else base.pictures
    base = Pictures(base.process, loud)
    x, t = jnp.zeros(shape), jnp.asarray(0.5)
    cond = {"label": jnp.asarray(0), "edits": jnp.asarray([1]), "edit_weights": jnp.ones(1)}

    @jax.jit
    def moved(quantile):
        semantic = SemanticGuidance(base, 3, 1, 0.0, quantile=quantile, momentum=0.0, warm_up=0)
        step = jaxdiff.Step(t, t / 2, KEY, index=jnp.zeros((), int), notes=init_notes(semantic, x))
        return at_step(semantic, step)(x, t, cond) - base(x, t, 3)

    # The middle of two order statistics, so that rounding decides nothing.
    count = int(np.prod(shape[:2])) if len(shape) == 3 else shape[0]
    gap = np.asarray(loud[1] - loud[3]).reshape(count, -1)
    scale = 5.0 * base.process.sigma(t) / base.process.alpha(t)
    for left in (0, count // 2, count - 3):
        quantile = max(left - 0.5, 0) / (count - 1)
        found = np.asarray(moved(quantile)).reshape(count, -1)
        shares = (np.abs(found) > 1e-9).mean(0)
        assert_allclose(shares, 1 - left / count)
        for channel in range(gap.shape[1]):
            kept = np.argsort(np.abs(gap[:, channel]))[left:]
            assert_allclose(found[kept, channel], scale * gap[kept, channel], rtol=1e-9)


def test_momentum_and_warm_up_have_a_closed_form(x64):
    """Of edits that do not change, v_n = psi (1 - r^n) / (1 - m), r = b + (1 - b) m.

    Data that do not depend on x: the end is the last step's estimate.
    """
    base, drawn = pictures((3,))
    steps, m, b = 6, 0.3, 0.4
    process, t = base.process, jnp.linspace(1.0, 0.0, steps + 1)[-2]
    ratio = process.sigma(t) / process.alpha(t)
    cond = {
        "label": jnp.zeros(2, int),
        "edits": jnp.tile(jnp.asarray([1, 2]), (2, 1)),
        "edit_weights": jnp.tile(jnp.asarray(WEIGHTS), (2, 1)),
    }

    @jax.jit
    def end(m, warm_up):
        semantic = SemanticGuidance(
            base, 3, 2, 2.0, edit_scale=1.5, quantile=0.0, momentum=m, decay=b, warm_up=warm_up
        )
        return jaxdiff.sample(KEY, semantic, (3,), 2, cond=cond, times=steps).x[0]

    found = jax.vmap(end)(jnp.asarray([m, m, 0.0, m]), jnp.asarray([0.0, 5.0, 0.0, 6.0]))
    guided = drawn[3] + 2.0 * (drawn[0] - drawn[3])
    psi = 1.5 * WEIGHTS @ (drawn[1:3] - drawn[3])
    r = b + (1 - b) * m
    v = psi * (1 - r ** (steps - 1)) / (1 - m)
    for row, push in zip(found, (psi + m * v, psi + m * v, psi, 0 * psi), strict=True):
        assert_allclose(row, ratio * (guided + push), rtol=1e-9)


def test_edits_that_are_over_are_not_evaluated(x64):
    """From `cool_down` on it is classifier-free guidance."""
    laws = mixture(processes.VP())
    counting = Counting(laws)
    cond = jax.tree.map(lambda leaf: leaf[:1], edits_of(2))
    run = lambda d, cond: jaxdiff.sample(KEY, d, (2,), 1, cond=cond, times=5)
    out = run(SemanticGuidance(counting, 2, 2, 1.5, cool_down=2, **PLAIN), cond)
    jax.effects_barrier()
    assert out.nfe[0] == 2 * 4 + 3 * 2 and len(counting.calls) == 5
    none = run(SemanticGuidance(laws, 2, 2, 1.5, cool_down=0), cond)
    plain = run(guidance.ClassifierFree(laws, 2, 1.5), cond["label"])
    assert_allclose(none.x, plain.x, rtol=1e-12)
    assert none.nfe[0] == plain.nfe[0]


@pytest.mark.usefixtures("unchecked")
def test_errors():
    laws = mixture(processes.VP(), jnp.float32)
    run = lambda d, cond: jaxdiff.sample(KEY, d, (2,), 2, cond=cond, times=2)
    semantic = SemanticGuidance(laws, 2, 2)
    with pytest.raises(ValueError, match="the entries 'edits', 'edit_weights'"):
        run(semantic, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="leading axis of `count`, 3"):
        run(SemanticGuidance(laws, 2, 3), edits_of(2))
    with pytest.raises(ValueError, match=r"Labels must lie in \[0, 1\]"):
        run(semantic, edits_of(2) | {"edits": jnp.full((2, 2), 7)})
    with pytest.raises(ValueError, match="`quantile`"):
        SemanticGuidance(laws, 2, 2, quantile=1.5)
    with pytest.raises(ValueError, match="`cool_down` must be at least 0"):
        SemanticGuidance(laws, 2, 2, cool_down=-1)
