"""Rules on conditions, on laws where every answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Counting, bimodal, gaussian, mixture
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, oracles, processes
from jaxdiff.predictions import V
from jaxdiff.stepwise import at_step, init_notes

KEY = jax.random.key(0)
MEANS = np.array([[1.0, 0.5], [-0.4, 1.2], [-1.0, -0.2]])  # the last is that of no class
FACTOR = np.array([[0.5, 0.0], [0.2, 0.3]])


class Shared(jaxdiff.Denoiser):
    """Classes that are Gaussians of one covariance; the last label is another such law."""

    process: processes.GaussianProcess
    means: jax.Array
    covariance: jax.Array

    @classmethod
    def make(cls, means=MEANS, factor=FACTOR, process=None):
        """In the dtype that is enabled."""
        factor = jnp.asarray(factor)
        return cls(process or processes.VP(), jnp.asarray(means), factor @ factor.T)

    def law(self, mean):
        """The denoiser of N(mean, covariance)."""
        return oracles.gaussian(self.process, mean, self.covariance)

    def __call__(self, x, t, cond=None, *, key=None):
        return self.law(self.means[cond])(x, t)


def point():
    """An example and a time, in the dtype that is enabled."""
    return jnp.asarray([0.3, -0.8]), jnp.asarray(0.4)


def at_first_step(denoiser, x, t):
    step = jaxdiff.Step(t, t / 2, KEY, index=jnp.zeros((), int), notes=init_notes(denoiser, x))
    return at_step(denoiser, step)


def line(mean_null=-1.0, mean=1.0, variance=0.25, process=None):
    """Two laws on the line: label 0, and 1 for none."""
    return Shared.make([[mean], [mean_null]], [[variance**0.5]], process)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, -1.0])
def test_gaussians_of_one_covariance_are_extrapolated(x64, scale):
    """Plain, negative and composed guidance sample N(m_u + sum w_i (m_i - m_u), C)."""
    x_, t_ = point()
    laws = Shared.make()
    moved = MEANS[2] + scale * (MEANS[0] - MEANS[2])
    plain = guidance.ClassifierFree(laws, null_cond=2, scale=scale)
    assert_allclose(plain(x_, t_, 0), laws.law(jnp.asarray(moved))(x_, t_), rtol=1e-12)
    negative = guidance.NegativePrompt(laws, scale)
    cond = {"label": jnp.asarray(0), "negative": jnp.asarray(2)}
    assert_allclose(negative(x_, t_, cond), plain(x_, t_, 0), rtol=1e-12)
    both = guidance.Composable(laws, null_cond=2, count=2, scale=scale)
    weights = jnp.asarray([0.7, -0.3])
    cond = {"concepts": jnp.asarray([0, 1]), "weights": weights}
    moved = MEANS[2] + scale * (weights @ (MEANS[:2] - MEANS[2]))
    found = both(x_, t_, cond)
    assert_allclose(found, laws.law(moved)(x_, t_), rtol=1e-12)
    turned = jax.tree.map(lambda leaf: leaf[::-1], cond)
    assert_allclose(both(x_, t_, turned), found, rtol=1e-12)


def test_schedules_have_the_mean_they_are_asked_for(x64):
    x_, t_ = point()
    t, process = jnp.linspace(0, 1, 1001), processes.VP()
    for schedule in (guidance.LinearScale(4.0), guidance.CosineScale(4.0)):
        values = jax.vmap(lambda t, s=schedule: s(process, t))(t)
        assert_allclose(jnp.trapezoid(values, t), 4.0, rtol=1e-6)
        assert_allclose(values[jnp.asarray([0, -1])], [7.0, 1.0])
        for other, own in (
            (processes.TrigFlow(), t * jnp.pi / 2), (processes.EDM(), jnp.tan(jnp.pi / 2 * t)),
        ):  # fmt: skip
            same = jax.vmap(lambda t, s=schedule, p=other: s(p, t))(own)
            assert_allclose(same, values, rtol=1e-12)
        guided = guidance.ClassifierFree(Shared.make(), null_cond=2, scale=schedule)
        same = guidance.ClassifierFree(Shared.make(), null_cond=2, scale=schedule(process, t_))
        assert_allclose(guided(x_, t_, 0), same(x_, t_, 0), rtol=1e-12)
    assert guidance.LinearScale(4.0, least=2.0)(process, jnp.asarray(1.0)) == 2.0


def test_rescaling_keeps_the_contrast_of_the_conditional_answer(x64):
    x_, t_ = point()
    laws = mixture(processes.VP())
    plain = guidance.ClassifierFree(laws, null_cond=2, scale=7.5)
    make = lambda mix: guidance.RescaledClassifierFree(laws, null_cond=2, scale=7.5, mix=mix)
    assert_allclose(make(0.0)(x_, t_, 1), plain(x_, t_, 1), rtol=1e-12)
    spread = lambda denoiser: jnp.std(denoiser.predict(V(), x_, t_, jnp.asarray(1)))
    assert_allclose(spread(make(1.0)), spread(laws), rtol=1e-12)
    expected = 0.7 * spread(laws) + 0.3 * spread(plain)
    assert_allclose(spread(make(0.7)), expected, rtol=1e-12)


def test_rescaling_has_a_gradient_where_nothing_is_to_be_rescaled(x64):
    """Of a single number there is no contrast: the answer, and its slope, are plain guidance's."""
    x_, t_ = jnp.asarray([0.4]), jnp.asarray(0.5)
    laws = bimodal(processes.VP())
    laws = dataclasses.replace(laws, labels=jnp.asarray([0, 1]))
    plain = guidance.ClassifierFree(laws, null_cond=2, scale=3.0)
    rescaled = guidance.RescaledClassifierFree(laws, null_cond=2, scale=3.0)
    slope = lambda denoiser: jax.grad(lambda x: denoiser(x, t_, jnp.asarray(0))[0])(x_)
    assert_allclose(slope(rescaled), slope(plain), rtol=1e-12)


def test_cfg_plus_plus_is_guidance_that_grows_with_the_grid(x64):
    """A step of DDIM with it is one of plain guidance at scale / (1 - e^-h)."""
    x_, t_ = point()
    laws, times = mixture(processes.VP()), jnp.asarray([0.8, 0.5])
    log_ratio = 0.5 * jax.vmap(laws.process.log_snr)(times)
    h = log_ratio[1] - log_ratio[0]
    run = lambda denoiser: (
        jaxdiff.denoise(KEY, denoiser, x_[None], cond=jnp.asarray([1]), times=times).x
    )
    found = run(guidance.CFGPlusPlus(laws, null_cond=2, scale=0.6))
    scale = 0.6 / (1 - jnp.exp(-h))
    assert_allclose(found, run(guidance.ClassifierFree(laws, 2, scale)), rtol=1e-9)


def test_projected_guidance(x64):
    x_, t_ = point()
    laws = mixture(processes.VP())
    given, none = laws(x_, t_, 1), laws(x_, t_)
    call = lambda **options: at_first_step(
        guidance.AdaptiveProjected(laws, 2, **{"momentum": 0.0, "scale": 4.0} | options), x_, t_
    )(x_, t_, 1)
    plain = none + 4.0 * (given - none)
    assert_allclose(call(parallel=1.0), plain, rtol=1e-12)
    z = given - none
    across = z - (z @ given) / (given @ given) * given
    assert_allclose(call() @ call(), given @ given + 9 * (across @ across), rtol=1e-12)
    short = call(parallel=1.0, radius=0.01) - given
    assert_allclose(jnp.linalg.norm(short), 3 * 0.01 * 2**0.5, rtol=1e-12)
    # Of one number everything is parallel.
    one = guidance.AdaptiveProjected(line(), null_cond=1, scale=9.0)
    x = jnp.asarray([0.3])
    assert_allclose(at_first_step(one, x, t_)(x, t_, 0), line()(x, t_, 0), rtol=1e-12)


@pytest.mark.parametrize(("momentum", "mean"), [(-0.5, 4.379), (-0.75, 3.773), (0.0, 6.981)])
def test_momentum_is_one_update_a_step(x64, momentum, mean):
    """The mean of samples after 20 steps of DDIM on the linear schedule, as computed apart."""
    process = processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    guided = guidance.AdaptiveProjected(
        line(process=process), 1, scale=4.0, momentum=momentum, parallel=1.0
    )
    grid = np.append((np.round(np.linspace(999, 0, 20)) + 1) / 1000, 0.0)
    # The sampler is affine: from noise of 0 comes the mean.
    out = jaxdiff.denoise(KEY, guided, jnp.zeros((1, 1)), cond=jnp.zeros(1, int), times=grid)
    assert_allclose(out.x[0, 0], mean, atol=6e-3)


def test_zero_star(x64):
    x_, t_ = point()
    laws = mixture(processes.RectifiedFlow())
    velocity = lambda x0: (x0 - x_) / t_  # (D - eps), alpha + sigma = 1
    given, none = velocity(laws(x_, t_, 1)), velocity(laws(x_, t_))
    call = lambda scale: velocity(
        at_first_step(guidance.CFGZeroStar(laws, 2, scale, zero_steps=0), x_, t_)(x_, t_, 1)
    )
    assert_allclose(call(1.0), given, rtol=1e-9)
    assert_allclose(call(5.0) @ none, given @ none, rtol=1e-9)
    assert not np.allclose(call(5.0), given)
    # Clipped, it goes on with the noise that the clipped x0 implies.
    inside = guidance.CFGZeroStar(laws, 2, 5.0, zero_steps=0)
    step = lambda denoiser: jaxdiff.denoise(
        KEY, denoiser, x_[None], cond=jnp.asarray([1]), times=jnp.stack([t_, t_ / 2])
    ).x[0]  # fmt: skip
    clipped = jnp.clip(x_ + t_ * call(5.0), -0.5, 0.5)
    assert not np.allclose(clipped, x_ + t_ * call(5.0))
    expected = (1 - t_ / 2) * clipped + t_ / 2 * (x_ - (1 - t_) * clipped) / t_
    assert_allclose(step(jaxdiff.Clipped(inside, -0.5, 0.5)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("zero", "mean", "std"), [(0, 2.0, 0.471), (1, 1.961, 0.491), (2, 1.918, 0.512)]
)
def test_zero_steps_of_a_flow_bias_it(x64, zero, mean, std):
    """N(2, 0.25) by 25 steps of Euler, as computed apart; and they cost nothing."""
    laws = line(mean=2.0, process=processes.RectifiedFlow())
    guided = guidance.CFGZeroStar(laws, null_cond=1, scale=3.0, zero_steps=zero)
    noise, cond = jnp.asarray([[0.0], [1.0]]), jnp.zeros(2, int)
    out = jaxdiff.denoise(KEY, guided, noise, cond=cond, times=jnp.linspace(1, 0, 26))
    assert_allclose([out.x[0, 0], out.x[1, 0] - out.x[0, 0]], [mean, std], atol=6e-4)
    assert out.nfe[0] == 2 * (25 - zero)


def test_independent_conditions_are_none_where_x_says_nothing(x64):
    """Their mean has prior weights: right in noise, and another law near the data."""
    laws = oracles.gaussian_mixture(
        processes.VP(), jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.04),
        labels=[0, 1],
    )  # fmt: skip
    other = guidance.IndependentCondition(laws, guidance.UniformLabel(2), scale=0.0)
    x = jnp.asarray([0.4])

    @jax.jit
    def mean(t):
        def one(key):
            step = jaxdiff.Step(t, t / 2, key)
            return at_step(other, step)(x, t, 0)

        return jax.vmap(one)(jax.random.split(KEY, 4000)).mean(0)

    noisy, clean = jnp.asarray(1.0), jnp.asarray(0.05)
    assert_allclose(mean(noisy), laws(x, noisy), atol=0.05)
    assert abs(mean(clean) - laws(x, clean)) > 0.3


def test_an_interval_is_decided_once_a_step_and_skips(x64):
    x_, t_ = point()
    counting = Counting(mixture(processes.EDM()))
    limited = guidance.LimitedInterval(counting, 2, scale=3.0, low=0.3, high=2.0)
    times = jnp.asarray([5.0, 2.0, 1.0, 0.4, 0.2, 0.0])
    cond = jnp.asarray([1])
    out = jaxdiff.sample(KEY, limited, (2,), 1, cond=cond, times=times)
    jax.effects_barrier()
    assert out.nfe[0] == 1 + 3 * 2 + 1
    t = jnp.asarray(1.0)
    plain = guidance.ClassifierFree(counting, 2, 3.0)
    assert_allclose(limited(x_, t, 1), plain(x_, t, 1), rtol=1e-12)
    assert_allclose(limited(x_, 3 * t, 1), counting(x_, 3 * t, 1), rtol=1e-12)


def test_autoguidance_of_a_wider_law(x64):
    x_, t_ = point()
    good = gaussian(processes.VP())
    mean, covariance = good.moments()
    bad = oracles.gaussian(processes.VP(), mean, 1.5 * covariance)
    x = jnp.asarray([0.3, -0.2, 0.9])
    found = guidance.Autoguidance(good, bad, 2.0)(x, t_)
    assert_allclose(found, 2 * good(x, t_) - bad(x, t_), rtol=1e-12)
    assert guidance.Autoguidance(good, bad, 2.0).evaluations == 2


def test_adaptive_guidance_stops_for_good(x64):
    laws, cond = mixture(processes.VP()), jnp.asarray([0, 1, 1])
    run = lambda denoiser: jaxdiff.sample(KEY, denoiser, (2,), 3, cond=cond, times=6)
    make = lambda **options: guidance.AdaptiveGuidance(laws, 2, 3.0, **options)
    plain = run(guidance.ClassifierFree(laws, 2, 3.0))
    never = run(make(agreement=1.1))
    assert_allclose(never.x, plain.x, rtol=1e-9)
    np.testing.assert_array_equal(never.nfe, plain.nfe)
    at_once = run(make(agreement=-1.1))
    np.testing.assert_array_equal(at_once.nfe, 7)  # the first step tells, and is guided
    eps = lambda t: [
        (x - laws.process.alpha(t) * d) / laws.process.sigma(t) for d in (laws(x, t, 1), laws(x, t))
    ]
    x, t = point()
    cosine = jnp.vdot(*eps(t)) / jnp.linalg.norm(eps(t)[0]) / jnp.linalg.norm(eps(t)[1])
    for threshold, told in ((cosine - 1e-6, True), (cosine + 1e-6, False)):
        bound = at_first_step(make(agreement=threshold), x, t)
        (memory,) = bound.estimate(x, t, jnp.asarray(1)).notes.values()
        assert bool(memory) == told
    half = run(make(agreement=1.1, skip_after=2))
    np.testing.assert_array_equal(half.nfe, 2 * 2 + 4)


@pytest.mark.parametrize(
    ("variance", "shares"), [(1.0, (0.053, 0.288, 0.751)), (0.25, (0.025, 0.141, 0.478))]
)
def test_what_is_skipped_late_is_missed(x64, variance, shares):
    """Of the shift of the mean by guidance, what 5, 10 and 15 of 20 steps give; computed apart."""
    process = processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    grid = np.append((np.round(np.linspace(999, 0, 20)) + 1) / 1000, 0.0)

    def mean(steps, scale=4.0):
        guided = guidance.AdaptiveGuidance(
            line(variance=variance, process=process), 1, scale, 1.1, skip_after=steps
        )
        out = jaxdiff.denoise(KEY, guided, jnp.zeros((1, 1)), cond=jnp.zeros(1, int), times=grid)
        return out.x[0, 0]

    start, end = mean(0), mean(20)
    found = [(mean(steps) - start) / (end - start) for steps in (5, 10, 15)]
    assert_allclose(found, shares, atol=2e-3)


def test_skipped_branches_are_not_computed():
    counting = Counting(mixture(processes.VP(), jnp.float32))
    guided = guidance.AdaptiveGuidance(counting, 2, 3.0, agreement=1.1, skip_after=2)
    jaxdiff.sample(KEY, guided, (2,), 1, cond=jnp.asarray([1]), times=5)
    jax.effects_barrier()
    # The two branches of a guided step are one call of a batch of two.
    assert len(counting.calls) in (2 + 3, 2 * 2 + 3)


def low(x):
    return jnp.mean(x) * jnp.ones_like(x)


def high(x):
    return x - low(x)


def test_factors_that_are_independent_are_composed_exactly(x64):
    """Orthogonal projections, covariances that commute with them: each class gives its part."""
    x_, t_ = point()
    covariance = 0.3 * jnp.full((2, 2), 0.5) + 0.8 * (jnp.eye(2) - jnp.full((2, 2), 0.5))
    factor = jnp.linalg.cholesky(covariance)
    laws = Shared.make(MEANS, factor)
    parts = tuple(map(jax.tree_util.Partial, (low, high)))
    both = guidance.Factorized(laws, parts)
    mixed = jnp.asarray(low(MEANS[0]) + high(MEANS[1]))
    found = both(x_, t_, {"parts": jnp.asarray([0, 1])})
    assert_allclose(found, laws.law(mixed)(x_, t_), rtol=1e-12)
    fixed = guidance.FixedPart(laws, parts[0])
    y = jnp.asarray([[2.0, -1.0]])
    out = jaxdiff.sample(KEY, fixed, (2,), 1, cond={"label": jnp.asarray([1]), "known": y}, times=5)
    assert_allclose(low(out.x[0]), low(y[0]), rtol=1e-9)


def posterior(laws, x, t, y):
    return laws.class_log_posterior(x, t)[y]


@pytest.mark.parametrize("process", [processes.VP(), processes.EDM(), processes.RectifiedFlow()])
def test_an_exact_classifier_makes_the_conditional_law(x64, process):
    """Bayes' rule: scale 1 is the class's own denoiser, and scale w is guidance at w."""
    x_, t_ = point()
    laws = mixture(process)
    log_prob = jax.tree_util.Partial(posterior, laws)
    guided = guidance.ClassifierGuidance(laws, log_prob)
    y = {"y": jnp.asarray(1)}
    assert_allclose(guided(x_, t_, y), laws(x_, t_, 1), rtol=1e-10)
    more = guidance.ClassifierGuidance(laws, log_prob, 3.5)
    plain = guidance.ClassifierFree(laws, 2, 3.5)
    assert_allclose(more(x_, t_, y), plain(x_, t_, 1), rtol=1e-10)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d, x_, t_: guidance.ClassifierGuidance(
                d, jax.tree_util.Partial(lambda x, t, y: x)
            )(x_, t_, {"y": 0}),
            "`log_prob` must return a scalar of one example, got shape",
        ),
        (lambda d, x_, t_: guidance.AdaptiveGuidance(d, None), "`null_cond` must be the condition"),
        (lambda d, x_, t_: guidance.LimitedInterval(d, 2, low=-1.0), "`low` must be at least 0"),
        (
            lambda d, x_, t_: guidance.CFGZeroStar(d, 2, zero_steps=-1),
            "`zero_steps` must be at least 0",
        ),
        (lambda d, x_, t_: guidance.IndependentCondition(d, 3), "`draw`"),
        (lambda d, x_, t_: guidance.ClassifierFree(d, 2, scale="3"), "`scale`"),
        (lambda d, x_, t_: guidance.Factorized(d, ()), "`parts` must be a tuple"),
        (
            lambda d, x_, t_: guidance.Composable(d, 2, 2)(
                x_, t_, {"concepts": jnp.asarray([0]), "weights": jnp.ones(1)}
            ),
            "a leading axis of `count`, 2",
        ),
        (
            lambda d, x_, t_: guidance.NegativePrompt(d)(x_, t_, jnp.asarray(0)),
            "the entries 'negative'",
        ),
        (
            lambda d, x_, t_: guidance.FixedPart(d, jax.tree_util.Partial(low))(
                x_, t_, {"known": jnp.ones(3)}
            ),
            "`known` must be an example of shape",
        ),
        (lambda d, x_, t_: guidance.ClassifierFree(d, 2)(x_, t_), "got one without"),
    ],
)
def test_errors(call, message):
    """Before any work, and by name."""
    with pytest.raises((ValueError, TypeError), match=message):
        call(mixture(processes.VP(), jnp.float32), *point())


def test_only_steps_tell_what_a_map_draws():
    laws = mixture(processes.VP(), jnp.float32)
    guided = guidance.IndependentCondition(laws, guidance.UniformLabel(2))
    with pytest.raises(TypeError, match="was called outside of one"):
        guided(*point(), 0)
    assert dataclasses.replace(guided, scale=2.0).scale == 2.0
