"""What would be wrong without a word: NaN that counts as 0, times beyond the last, stale rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from promises import denoiser, small

import jaxdiff
from jaxdiff import (
    distillation,
    guidance,
    losses,
    metrics,
    oracles,
    predictions,
    processes,
    solvers,
)
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.distillation._shared import told_scale
from jaxdiff.losses import TimeLaw
from jaxdiff.solvers import DDIM
from jaxdiff.training import Frozen

KEY = jax.random.key(0)
COSINE = processes.Cosine()
MEAN, STD = 0.3, 0.5


def teacher(process=COSINE):
    return oracles.gaussian(process, jnp.full(2, MEAN), STD**2 * jnp.eye(2))


@pytest.mark.parametrize(
    "distance", [distillation.PseudoHuber(0.0), distillation.PseudoHuber(), distillation.Squared()]
)
def test_a_distance_of_what_is_no_number_is_none(distance):
    assert jnp.isnan(distance(jnp.full(3, jnp.nan), jnp.zeros(3)))
    assert distance(jnp.zeros(3), jnp.zeros(3)) == 0


@pytest.mark.parametrize("kernel", [distillation.Laplace(), metrics.Energy()])
def test_a_kernel_of_what_is_no_number_is_none(kernel):
    x = jnp.asarray([[0.0, 1.0], [jnp.nan, 0.0]])
    found = np.isnan(kernel(x, jnp.zeros((1, 2))))
    assert found.tolist() == [[False], [True]]


class Ends(TimeLaw):
    """Half of the times are the first of the process."""

    def quantile(self, process, u):
        return jnp.where(u < 0.5, process.t_min, 0.5)

    def level(self, process, t):
        return t

    def density(self, process, t):
        return jnp.ones_like(t)


def test_particles_that_do_not_move_teach_nothing():
    """At t = t_min, where s is t, and in half precision."""
    student = distillation.Jump(denoiser(0, "end"), "end")
    loss = distillation.InductiveMomentMatching(2, time_law=Ends())
    batch = {"x": jax.random.normal(KEY, (8, 2))}

    def slope(batch):
        def total(network):
            base = dataclasses.replace(student.base, network=network)
            return loss(dataclasses.replace(student, base=base), KEY, batch, Frozen({}))[0]

        return jax.tree.leaves(jax.grad(total)(student.base.network))

    for dtype in (jnp.float32, jnp.bfloat16):
        found = slope({"x": batch["x"].astype(dtype)})
        assert all(np.isfinite(leaf).all() for leaf in found)
        assert any(np.any(leaf != 0) for leaf in found)


def test_a_round_begins_once_and_the_last_goes_on():
    for first, last, length, steps in ((32, 1, 166, 1000), (2, 1, 20, 100), (8, 8, 5, 30)):
        halving = distillation.HalvingSteps(first, last, length)
        begins = [n for n in range(steps) if halving.begins(jnp.asarray(n))]
        count = len(distillation.rounds(first, last))
        assert begins == [n * length for n in range(1, count)]
    for first, last in ((10, 1), (10, 3), (1, 8), (10.5, 10.5)):
        with pytest.raises((ValueError, TypeError), match="`first` must be"):
            distillation.HalvingSteps(first, last)
    with pytest.raises(ValueError, match="`steps` must be given"):
        distillation.ProgressiveDistillation(distillation.HalvingSteps()).times(COSINE)


@pytest.mark.parametrize("q", [2.0, 256.0])
def test_late_stages_of_easy_consistency_stay_finite(q):
    loss = distillation.EasyConsistencyTuning(q=q, doubling=1.0)
    student = distillation.Jump(teacher(processes.EDM()))
    batch = {"x": jax.random.normal(KEY, (16, 2))}
    for step in (0, 3, 30, 1000):
        value, _ = loss(student, KEY, batch, Frozen({}, jnp.asarray(step)))
        assert np.isfinite(value)
        t = jnp.asarray([0.01, 1.0, 70.0])
        r, length = loss.earlier(processes.EDM(), t, step)
        assert np.all(r < t) and np.all(length > 0)
    # Early ones are as before: k_t - k_r.
    r, length = loss.earlier(processes.EDM(), t, 0)
    assert_allclose(length, t - r, rtol=1e-4)


def test_times_of_half_precision_examples_stay_in_the_process():
    """0.9999 in bfloat16 is 1, where alpha is 0 and nothing is a number."""
    model = NetworkDenoiser(small(0), COSINE, predictions.Eps())
    generator, fake = distillation.Jump(model), NetworkDenoiser(small(1), COSINE)
    batch = {"x": jnp.ones((8, 2), jnp.bfloat16)}
    frozen = Frozen({"teacher": fake, "fake": fake, "generator": generator})
    for loss in (distillation.DMD(), distillation.SDS(), distillation.SiD()):
        assert np.isfinite(loss(generator, KEY, batch, frozen)[0])
    assert np.isfinite(distillation.FakeScoreLoss()(fake, KEY, batch, frozen)[0])


def test_pairs_are_the_same_for_all_losses(x64):
    """Unit noise and what it becomes: at the exact map both find nothing left to learn."""
    process = processes.EDM(0.002, 80.0)
    laws = teacher(process)
    exact = oracles.GaussianFlowMap(laws)
    pairs = distillation.reflow_pairs(KEY, laws, (2,), 32, solver=solvers.EDMHeun(), times=200)
    batch = {"x": pairs["x"], "noise": pairs["noise"], "pair": pairs["x"]}
    frozen = Frozen({"teacher": laws, "fake": laws, "generator": exact})
    regression = distillation.DMD(regression=0.25)(exact, KEY, batch, frozen)[1]["regression"]
    whole = distillation.PairRegression()(exact, KEY, pairs, frozen)[0]
    assert_allclose(regression, whole, rtol=1e-9)
    assert whole < 1e-4


def mixture():
    return oracles.gaussian_mixture(
        COSINE, jnp.asarray([[-1.0, 0], [1.0, 0]]), jnp.tile(0.1 * jnp.eye(2), (2, 1, 1)),
        labels=[0, 1],
    )  # fmt: skip


@pytest.mark.parametrize(
    "loss",
    [
        distillation.ProgressiveDistillation(), distillation.SDS(), distillation.SiD(),
        distillation.MeanFlow(teacher="teacher"), distillation.BOOT(),
        distillation.GuidedDistillation((0.1, 0.5)), distillation.MultistepMomentMatching(),
        distillation.Shortcut(teacher="teacher", steps=4),
    ],
    ids=lambda loss: type(loss).__name__,
)  # fmt: skip
def test_a_teacher_with_a_noise_of_its_own_is_refused(loss):
    """Its x0 alone is another sampler's; consistency distillation steps by the solver itself."""
    plus = guidance.CFGPlusPlus(mixture(), 2, 0.6)
    told = ("scale",) if isinstance(loss, distillation.GuidedDistillation) else ()
    model = denoiser(0, *told, process=COSINE)
    batch = {"x": jnp.ones((8, 2)), "cond": jnp.zeros(8, jnp.int32)}
    if isinstance(loss, distillation.BOOT):
        model = distillation.SignalMap(dataclasses.replace(model, prediction=predictions.X0()))
    elif isinstance(loss, (distillation.MeanFlow, distillation.Shortcut)):
        model = distillation.Jump(denoiser(0, "end", process=COSINE), "end")
    elif not told and not isinstance(loss, distillation.ProgressiveDistillation):
        model = distillation.Jump(model)
    frozen = Frozen({"teacher": plus, "fake": denoiser(1, process=COSINE), "generator": model})
    with pytest.raises(ValueError, match="`teacher` must have the noise that its x0 implies"):
        loss(model, KEY, batch, frozen)


def test_starts_are_times_and_not_levels():
    generator = distillation.Jump(teacher())
    batch, frozen = {"x": jnp.ones((4, 2))}, {"teacher": teacher(), "fake": teacher()}
    for loss in (distillation.SiD(start=2.5), distillation.DMD(start=np.array([2.5, 0.5]))):
        with pytest.raises(ValueError, match="`start` must be a time of the process, at most"):
            loss(generator, KEY, batch, Frozen(frozen))


def test_no_evaluation_of_a_map_is_idle():
    """From the least level to data a map has nothing to do, unlike a denoiser."""
    for process in (processes.EDM(), COSINE, processes.VP()):
        for count in (1, 2, 4):
            times = solvers.FlowMapSteps(1.0).default_times(process, count, 0.0)
            assert len(times) == count + 1 and times[-1] == 0
            assert_allclose(times[:-1], process.times(count, process.t_min)[:-1], rtol=1e-6)
    jump = distillation.Jump(mixture_of(processes.EDM()))
    spread = [
        float(
            jaxdiff.sample(KEY, jump, (1,), 2000, solver=solvers.FlowMapSteps(1.0), times=n).x.std()
        )
        for n in (1, 2)
    ]
    assert spread[0] < 0.1 and spread[1] > 0.3


def mixture_of(process):
    return oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.01)
    )


def test_idempotent_distillation_tells_the_scale():
    model = denoiser(0, "scale", process=COSINE)
    guided = guidance.ClassifierFree(denoiser(1, process=COSINE), 2)
    loss = distillation.ScoreIdempotent(distillation.SiD(scales=(1, 3)))
    batch = {"x": jnp.ones((8, 2)), "cond": jnp.zeros(8, jnp.int32)}
    fake = denoiser(2, "scale", process=COSINE)
    frozen = Frozen({"teacher": guided, "fake": fake, "generator": distillation.Jump(model)})
    assert np.isfinite(loss(distillation.Jump(model), KEY, batch, frozen)[0])
    assert told_scale(jnp.asarray(1), None) == 1


@pytest.mark.usefixtures("unchecked")
def test_messages_name_what_is_wrong():
    with pytest.raises(ValueError, match="`omega` is of guidance"):
        distillation.MeanFlow(omega=3.0)
    with pytest.raises(TypeError, match="`steps` must be"):
        distillation.Shortcut(steps="8")
    with pytest.raises(TypeError, match=r"`taps` must be names, \(\"mid\",\) say"):
        distillation.FeatureCritic(jax.tree_util.Partial(jnp.sum), "mid")
    assert distillation.SiD(scales=np.array([1.0, 3.0])).scales == (1.0, 3.0)
    jump = distillation.Jump(teacher())
    loss = distillation.ConsistencyDistillation(target="teacher", solver=DDIM())
    with pytest.raises(TypeError, match="`target` must be a map between two times"):
        loss(jump, KEY, {"x": jnp.ones((4, 2))}, Frozen({"teacher": teacher()}))
    assert isinstance(losses.UniformTime(), TimeLaw)
