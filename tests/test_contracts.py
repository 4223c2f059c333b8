"""What a file outside the package may ask of a solver and its denoiser, against closed forms."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from cases import Counting, bimodal, gaussian, mixture, with_random_weights
from flax import nnx
from outside import Autoguidance, CFGPlusPlus, Ensemble, Interval, Latched, Measured, Momentum

import jaxdiff
from jaxdiff import conditions, guidance, networks, oracles, processes, solvers
from jaxdiff.stepwise import at_step

KEY = jax.random.key(3)
SAVE = diffrax.SaveAt(t1=True)


@pytest.fixture
def oracle(x64):
    return mixture(processes.VP())


def run(denoiser, solver=solvers.DDIM(), count=3, times=6, **options):
    options = {"cond": jnp.arange(count) % 2, **options}
    return jaxdiff.sample(KEY, denoiser, (2,), count, solver=solver, times=times, **options)


def starts(count, process, shape=(2,)):
    """The documented keys: of every example's start, and of its path."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(KEY, i)))(jnp.arange(count))
    draw = jax.vmap(lambda key: jax.random.normal(key, shape))
    return process.sigma(jnp.asarray(process.t_max)) * draw(keys[:, 0]), keys[:, 1]


# --- draws of a map's own


def test_a_map_draws_from_its_example_and_step_alone(oracle):
    """Independent condition guidance with DDIM and with two stages a step, by hand."""
    guided = outside.IndependentCondition(oracle, scale=3.0)
    process, times = oracle.process, oracle.process.times(6)
    x0s, keys = starts(3, process)

    def label(i, n):
        # The first map's key: the step's, folded with 2^31.
        key = jax.random.fold_in(jax.random.fold_in(keys[i], n), 2**31)
        return jax.random.randint(key, (), 0, 2)

    def x0_hat(x, t, i, n):
        other, found = oracle(x, t, label(i, n)), oracle(x, t, jnp.asarray(i % 2))
        return other + 3.0 * (found - other)

    def level(t):
        return process.sigma(t) / process.alpha(t)

    for solver in (solvers.DDIM(), solvers.EDMHeun()):
        out = run(guided, solver)
        for i in range(3):
            x = x0s[i]
            for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
                y, slope = x / process.alpha(t), None
                slope = (y - x0_hat(x, t, i, n)) / level(t)
                moved = y + (level(s) - level(t)) * slope
                if isinstance(solver, solvers.EDMHeun) and n < 5:
                    # The second stage sees the label of the first.
                    end = (moved - x0_hat(process.alpha(s) * moved, s, i, n)) / level(s)
                    moved = y + (level(s) - level(t)) * (slope + end) / 2
                x = process.alpha(s) * moved
            np.testing.assert_allclose(out.x[i], x, rtol=1e-9, atol=1e-9)


def test_noise_on_conditions_vanishes_with_its_size_and_spreads_samples(oracle):
    cond = {"label": jnp.zeros(400, int), "shift": jnp.zeros((400, 2))}
    runs = [
        run(outside.NoisyCondition(oracle, size), count=400, cond=cond).x for size in (0.0, 0.5)
    ]
    plain = run(oracle, count=400, cond=cond["label"]).x
    np.testing.assert_allclose(runs[0], plain, rtol=1e-9, atol=1e-9)
    assert np.all(runs[1].std(0) > 1.02 * plain.std(0))


def test_maps_that_draw_leave_dropout_off():
    class NoKey(jaxdiff.Denoiser):
        denoiser: jaxdiff.Denoiser

        @property
        def process(self):
            return self.denoiser.process

        def __call__(self, x, t, cond=None, *, key=None):
            assert key is None
            return self.denoiser(x, t, cond)

    oracle = mixture(processes.VP(), jnp.float32)
    for solver in (solvers.Ancestral(), solvers.PredictorCorrector(), solvers.SEEDS(3)):
        run(outside.IndependentCondition(NoKey(oracle)), solver)


def test_two_maps_draw_differently_and_the_solver_differently_again(x64):
    class Draw(jaxdiff.Stepwise):
        base: jaxdiff.Denoiser

        def estimate(self, x, t, cond=None, *, key=None):
            found = self.base.estimate(x, t, cond, key=key)
            return found.replace(x0=found.x0 + jax.random.normal(self.step.key, x.shape, x.dtype))

    class Nothing(jaxdiff.Denoiser):
        process: processes.GaussianProcess

        def __call__(self, x, t, cond=None, *, key=None):
            return jnp.zeros_like(x)

    nothing = Nothing(processes.VP())
    t = jnp.asarray(0.5)
    step = jaxdiff.Step(t, t / 2, KEY)
    x = jnp.zeros(2000)
    one, two = (at_step(d, step)(x, t) for d in (Draw(nothing), Draw(Draw(nothing))))
    other = two - one
    draws = np.stack([one, other, jax.random.normal(KEY, x.shape)])
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.1


# --- memory over steps, and decisions


def test_a_latch_counts_by_example_and_stays(oracle):
    latched = Latched(oracle, agreement=0.98)
    out = run(latched, count=16, times=12)
    assert len(set(np.asarray(out.nfe).tolist())) > 1
    assert np.all((out.nfe >= 13) & (out.nfe <= 24))
    # By hand, step by step.
    process, times = oracle.process, oracle.process.times(12)
    x0s, _ = starts(16, process)

    @jax.jit
    @jax.vmap
    def by_hand(x, label):
        latch, nfe = jnp.zeros((), bool), 0
        for t, s in zip(times[:-1], times[1:], strict=True):
            found, null = oracle(x, t, label), oracle(x, t)
            nfe = nfe + jnp.where(latch, 1, 2)
            x0 = jnp.where(latch, found, null + 3.0 * (found - null))
            cosine = jnp.dot(found, null) / (jnp.linalg.norm(found) * jnp.linalg.norm(null))
            latch = latch | (cosine > 0.98)
            eps = (x - process.alpha(t) * x0) / process.sigma(t)
            x = process.alpha(s) * x0 + process.sigma(s) * eps
        return x, nfe

    x, nfe = by_hand(x0s, jnp.arange(16) % 2)
    np.testing.assert_allclose(out.x, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(out.nfe, nfe)


@pytest.mark.parametrize("around", ["alone", "nested"])
def test_momentum_is_its_recursion_in_any_nest(oracle, around):
    """Two stages a step: what the first evaluation remembers counts."""
    denoiser = Momentum(oracle)
    if around == "nested":
        denoiser = jaxdiff.Clipped(Interval(denoiser, scale=1.0), -99.0, 99.0)
    out = run(denoiser, solvers.EDMHeun(), count=2)
    process, times = oracle.process, oracle.process.times(6)
    x0s, _ = starts(2, process)
    for i in range(2):
        x, mean = x0s[i], jnp.zeros(2)
        for t, s in zip(times[:-1], times[1:], strict=True):

            def guided(x, t, mean):
                null = oracle(x, t)
                push = 1.5 * (oracle(x, t, jnp.asarray(i)) - null) + 0.4 * mean  # noqa: B023
                return null + push, push

            k, target = (process.sigma(time) / process.alpha(time) for time in (t, s))
            y = x / process.alpha(t)
            x0, push = guided(x, t, mean)
            slope = (y - x0) / k
            moved = y + (target - k) * slope
            if target > 0:
                end = (moved - guided(process.alpha(s) * moved, s, mean)[0]) / target
                moved = y + (target - k) * (slope + end) / 2
            mean = 0.7 * mean + 0.3 * push
            x = process.alpha(s) * moved
        np.testing.assert_allclose(out.x[i], x, rtol=1e-9, atol=1e-9)


def test_what_a_map_remembers_cannot_be_lost(oracle):
    class Deaf(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def estimate(self, x, t, cond=None, *, key=None):
            return jaxdiff.Estimate(self.base.estimate(x, t, cond).x0)

    with pytest.raises(ValueError, match="What `Momentum` remembers was lost"):
        run(Deaf(Momentum(oracle)))
    with pytest.raises(ValueError, match="`Ensemble` defines `__call__` alone.*remember"):
        run(Ensemble(Momentum(oracle), ()))

    class Forgetful(solvers.DDIM):
        def update(self, problem, x, step):
            return super().update(problem, x, step)._replace(notes={})

    with pytest.raises(ValueError, match="remembers was lost on the way to Forgetful"):
        run(Momentum(oracle), Forgetful())


def test_a_skipped_evaluation_is_really_skipped():
    """The branch is in the program, under a sweep of the scale too, and in the count."""
    oracle = mixture(processes.VP(), jnp.float32)

    def swept(scales):
        return jax.vmap(lambda scale: run(Interval(oracle, scale=scale), count=5))(scales)

    program = jax.jit(swept).lower(jnp.asarray([1.0, 2.0, 4.0])).compile()
    text = program.as_text()
    assert "conditional" in text
    out = program(jnp.asarray([1.0, 2.0, 4.0]))
    # Steps start at 1, 5/6, 2/3, 1/2, 1/3 and 1/6: three are inside [0.2, 0.7].
    np.testing.assert_array_equal(out.nfe, 9)
    counting = Counting(oracle)
    alone = run(Interval(counting), count=1)
    jax.effects_barrier()
    assert len(counting.calls) == alone.nfe[0] == 9
    # Without an interval there is no branch to take.
    plain = jax.jit(lambda: run(oracle, count=5).x).lower().compile().as_text()
    assert "conditional" not in plain


def test_who_cannot_tell_the_step_refuses_by_name(oracle):
    x = jnp.ones((1, 2))
    cond = jnp.zeros(1, int)
    for call, by in (
        (lambda d: run(d, diffrax.Heun()), "stock diffrax solver such as Heun"),
        (lambda d: run(d, solvers.ReverseSDE(diffrax.ShARK())), "stock diffrax solver"),
        (lambda d: jaxdiff.invert(d, x, cond=cond), "`invert`"),
        (lambda d: jaxdiff.log_likelihood(d, x, cond=cond), "`log_likelihood`"),
    ):
        with pytest.raises(TypeError, match=f"`Interval` draws, remembers or decides.*{by}"):
            call(jaxdiff.Clipped(Interval(oracle)))
    with pytest.raises(TypeError, match="`Interval` .* was called outside of one"):
        Interval(oracle)(x[0], jnp.asarray(0.5), jnp.asarray(0))
    with pytest.raises(TypeError, match="`CFGPlusPlus` defines|`denoiser` CFGPlusPlus goes on"):
        run(CFGPlusPlus(oracle), diffrax.Heun())


def test_the_plain_program_stays_the_plain_program():
    """Maps that know their step cost a denoiser without them nothing, and one with them no more."""
    oracle = mixture(processes.VP(), jnp.float32)

    class Told(jaxdiff.Stepwise):
        base: jaxdiff.Denoiser

        def estimate(self, x, t, cond=None, *, key=None):
            return self.base.estimate(x, self.step.t, cond, key=key)

    programs = [
        jax.jit(lambda d: run(d, times=6).x).lower(d).compile() for d in (oracle, Told(oracle))
    ]
    flops = [program.cost_analysis()["flops"] for program in programs]
    assert flops[1] == flops[0]
    assert "conditional" not in programs[0].as_text()


# --- both outputs of one evaluation


def test_cfg_plus_plus_in_ddim_and_a_multistep_method(oracle):
    """DDIM from guided x0 and unconditional eps; DPM-Solver++(2M) with x moved by their difference.

    The second form is that of the paper's appendix: x - alpha (x0_null - x0_guided) is what decays.
    """
    guided, process, times = CFGPlusPlus(oracle), oracle.process, oracle.process.times(6)
    x0s, _ = starts(2, process)

    def both(x, t, i):
        null, found = oracle(x, t), oracle(x, t, jnp.asarray(i))
        return null, null + 0.6 * (found - null)

    outs = [run(guided, solver, count=2) for solver in (solvers.DDIM(), solvers.PNDM(2, "none"))]
    multi = run(guided, solvers.DPMSolverMultistep(2), count=2)
    np.testing.assert_array_equal(multi.nfe, 12)
    half = lambda t: process.log_snr(t) / 2
    for i in range(2):
        x = y = x0s[i]
        before, z, eps_before = None, x0s[i], None
        for t, s in zip(times[:-1], times[1:], strict=True):
            alpha, sigma = process.alpha(s), process.sigma(s)
            null, x0 = both(x, t, i)
            x = alpha * x0 + sigma * (x - process.alpha(t) * null) / process.sigma(t)

            null, x0 = both(y, t, i)
            moved = y + process.alpha(t) * (x0 - null)
            extrapolated = x0
            if before is not None and sigma > 0:
                h, old = half(s) - half(t), half(t) - half(before[1])
                extrapolated = x0 + h / (2 * old) * (x0 - before[0]) * (n_left(times, s) > 0)
            ratio = sigma / process.sigma(t)
            y = ratio * moved + (alpha - process.alpha(t) * ratio) * extrapolated
            before = x0, t

            null, x0 = both(z, t, i)
            eps = (z - process.alpha(t) * null) / process.sigma(t)
            settled = process.alpha(t) * x0 + process.sigma(t) * eps
            slope = eps if eps_before is None else 1.5 * eps - 0.5 * eps_before
            k = [process.sigma(time) / process.alpha(time) for time in (t, s)]
            z = alpha / process.alpha(t) * settled + alpha * (k[1] - k[0]) * slope
            eps_before = eps
        np.testing.assert_allclose(outs[0].x[i], x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(outs[1].x[i], z, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(multi.x[i], y, rtol=1e-9, atol=1e-9)


def n_left(times, s):
    """Steps after the one that ends at s; short grids end by a step of order one."""
    return int(np.sum(np.asarray(times) < float(s)))


def test_looking_at_the_estimate_spends_no_second_evaluation():
    """A solver that changes x0_hat before it steps costs what the plain one does."""
    network = with_random_weights(lambda: networks.MLP(2, hidden=32, rngs=nnx.Rngs(0)))
    denoiser = jaxdiff.NetworkDenoiser(network, processes.VP())
    flops = []
    for solver in (solvers.DDIM(), outside.Projected()):
        program = jax.jit(lambda d, s=solver: run(d, s, count=1, cond=None).x).lower(denoiser)
        flops.append(program.compile().cost_analysis()["flops"])
    assert flops[1] < 1.02 * flops[0]
    counting = Counting(denoiser)
    out = run(counting, outside.Projected(), count=1, cond=None)
    jax.effects_barrier()
    assert len(counting.calls) == out.nfe[0] == 6


def test_a_changed_estimate_ends_where_it_should(oracle):
    """Every x0_hat on a line: so is the sample, whatever the base."""
    for base in (solvers.DDIM(), solvers.DPMSolverMultistep(2), solvers.UniPC(2)):
        x = run(oracle, outside.Projected(base, jnp.asarray([1.0, -2.0]))).x
        np.testing.assert_allclose(x @ jnp.asarray([1.0, -2.0]), 0, atol=1e-9)
    with pytest.raises(TypeError, match="`base` of Projected must be an ExplicitSolver"):
        run(oracle, outside.Projected(solvers.BDIA()))


def test_learned_variances_pass_through_maps(x64):
    """Of the conditional branch; without one, the error names what is missing."""
    oracle = mixture(processes.Cosine())

    class Learned(eqx.Module):
        oracle: jaxdiff.Denoiser

        def __call__(self, x, t, cond=None, *, key=None):
            # 0.2 for class 0, 0.8 for class 1, 0.5 for none.
            variance = jnp.asarray([0.2, 0.8, 0.5])[cond]
            x0 = self.oracle(x, t, cond)
            return jnp.concatenate([x0, jnp.broadcast_to(2 * variance - 1, x.shape)])

    label = jaxdiff.TimeLabel(factor=1.0)
    learned = jaxdiff.LearnedVarianceDenoiser(
        Learned(oracle), oracle.process, jaxdiff.predictions.X0(), label
    )
    guided = guidance.ClassifierFree(jaxdiff.Clipped(learned, -9.0, 9.0), 2, 1.7)
    out = run(guided, solvers.LearnedAncestral(), count=2)
    plain = guidance.ClassifierFree(oracle, 2, 1.7)
    for i, variance in enumerate((0.2, 0.8)):
        expected = run(plain, solvers.Ancestral(variance), count=2)
        np.testing.assert_allclose(out.x[i], expected.x[i], rtol=1e-9)
    with pytest.raises(TypeError, match="needs a LearnedVarianceDenoiser.*ClassifierFree"):
        run(plain, solvers.LearnedAncestral())


# --- transition kernels


@pytest.mark.parametrize(
    "solver",
    [solvers.Ancestral(0.0), solvers.Ancestral(0.4), solvers.DDIM(0.7), solvers.EulerMaruyama(1.0)],
)
def test_kernels_are_public_and_are_what_is_drawn(oracle, solver):
    """Mean and standard deviation of many steps from one state."""
    t, s = jnp.asarray(0.6), jnp.asarray(0.5)
    problem = solvers.Problem(oracle, jnp.asarray(1), KEY, jnp.stack([t, s, s / 2]), -1)
    x = jnp.asarray([0.4, -0.7])
    step = solvers.Step(t, s, KEY)
    settled, found = problem.settle(x, t, problem.estimate(x, t))
    mean, std = solver.transition(problem, settled, step, found)

    def draw(key):
        return solver.take(problem, x, eqx.tree_at(lambda step: step.key, step, key)).x

    draws = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * std / np.sqrt(20_000))
    np.testing.assert_allclose(draws.std(0), std * np.ones(2), rtol=4 / np.sqrt(40_000))


@pytest.mark.parametrize("process", [processes.VP(), processes.EDM(), processes.RectifiedFlow()])
def test_posterior_is_bayes_rule_and_renoise_its_forward_step(x64, process):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0), Gaussians on the line."""
    t, s = (process.time(jnp.asarray(log_snr)) for log_snr in (-0.5, 0.8))
    x0, x = jnp.asarray(0.7), jnp.asarray(-0.4)
    ratio, added = process.alpha(t) / process.alpha(s), process.added_std(s, t)
    prior, likelihood = 1 / process.sigma(s) ** 2, (ratio / added) ** 2
    variance = 1 / (prior + likelihood)
    mean = variance * (prior * process.alpha(s) * x0 + ratio / added**2 * x)
    eps = (x - process.alpha(t) * x0) / process.sigma(t)
    found = process.posterior(x0, eps, t, s)
    np.testing.assert_allclose(found, (mean, jnp.sqrt(variance)), rtol=1e-10)
    # There and on: s from data, then t from s, is t from data.
    first, second = jax.random.normal(KEY, (2, 50_000))
    there = process.renoise(process.marginal(x0, first, s), second, s, t)
    np.testing.assert_allclose(there.mean(), process.alpha(t) * x0, atol=5 * process.sigma(t) / 220)
    np.testing.assert_allclose(there.std(), process.sigma(t), rtol=0.02)
    np.testing.assert_allclose(process.added_std(t, t), 0, atol=1e-7)


# --- data of the examples


def test_measurements_reach_their_map_and_their_example(x64):
    """A map of y is the exact denoiser of p(x0 | y), with another y and mask for every example."""
    prior = oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.eye(2))
    measured = Measured(prior, std=0.3)
    y, mask = jnp.asarray([[0.8, -0.5], [1.5, 0.2]]), jnp.asarray([[1.0, 1.0], [0.0, 1.0]])
    x, t = jnp.asarray([[0.3, 0.4], [-0.6, 1.0]]), jnp.asarray(0.4)
    for i in range(2):
        # A masked entry is measured with no precision.
        rows = jnp.eye(2)[mask[i] > 0]
        exact = prior.condition(rows, y[i][mask[i] > 0], 0.3)
        found = measured(x[i], t, {"y": y[i], "mask": mask[i]})
        np.testing.assert_allclose(found, exact(x[i], t), rtol=1e-9)
    # Through guidance, whose null replaces the label alone.
    two = mixture(processes.VP())
    guided = guidance.ClassifierFree(Measured(two, std=0.3), null_cond=2, scale=2.5)
    cond = {"label": jnp.asarray([0, 1]), "y": y, "mask": mask}
    out = run(guided, count=2, cond=cond)
    for i in range(2):
        row = jax.tree.map(lambda leaf: jnp.stack([leaf[i]] * 2), cond)  # noqa: B023
        np.testing.assert_allclose(run(guided, count=2, cond=row).x[i], out.x[i], rtol=1e-9)


def test_entries_that_are_missing_or_nobody_takes_are_named(oracle):
    y = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"entries 'y', 'mask' for Measured, got \['label', 'y'\]"):
        run(Measured(oracle), cond={"y": y, "label": jnp.zeros(3, int)})
    with pytest.raises(ValueError, match="an entry 'mask' that nobody takes"):
        run(oracle, cond={"mask": y, "label": jnp.zeros(3, int)})
    with pytest.raises(ValueError, match="`null_cond` replaces the entries"):
        run(guidance.ClassifierFree(oracle, null_cond=2, scale=2.0), cond=None)
    with pytest.raises(ValueError, match=r"`cond\['y'\]` must have a leading axis"):
        run(Measured(oracle), cond={"y": jnp.zeros(2), "mask": y})


def test_conditions_are_mappings_or_labels():
    take = conditions.take
    assert take({"y": 1, "label": 2}, "y", by="M") == (1, 2)
    assert take({"y": 1}, "y", by="M") == (1, None)
    assert take({"y": 1, "label": 2, "text": 3}, "y", by="M") == (1, {"label": 2, "text": 3})
    assert conditions.from_entries(conditions.as_entries(7)) == 7


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_labels_outside_the_classes_are_refused_or_none(oracle, label):
    cond = jnp.asarray([0, 1, label])
    with pytest.raises(ValueError, match=rf"Labels must lie in \[0, 1\], or be 2.*got {label}"):
        run(oracle, cond=cond)
    with pytest.raises(ValueError, match="Labels must lie"):
        jaxdiff.invert(oracle, jnp.ones((3, 2)), cond=cond)
    with pytest.raises(ValueError, match="Labels must lie"):
        oracle(jnp.ones(2), jnp.asarray(0.5), label)
    # Where nothing can be known, the sample is that of no label, and never NaN.
    traced = jax.jit(lambda cond: run(oracle, cond=cond).x)(cond)
    np.testing.assert_allclose(traced, run(oracle, cond=jnp.asarray([0, 1, 2])).x, rtol=1e-9)


# --- several children


def networks_of_two():
    make = lambda blocks: jaxdiff.NetworkDenoiser(
        networks.MLP(2, hidden=16, num_blocks=blocks, rngs=nnx.Rngs(blocks)), processes.VP()
    )
    return Autoguidance(make(2), make(1))


def test_every_network_is_counted_and_edits_reach_the_one_they_name(oracle):
    weak = gaussian(processes.VP(), 2)
    outs = {
        12: Autoguidance(oracle, weak),
        18: Ensemble(oracle, (weak, weak)),
        24: guidance.ClassifierFree(Autoguidance(oracle, oracle), null_cond=2, scale=2.0),
    }
    for expected, denoiser in outs.items():
        cond = None if expected < 24 else jnp.zeros(3, int)
        np.testing.assert_array_equal(run(denoiser, cond=cond).nfe, expected)
    both = networks_of_two()
    x, t = jnp.ones(2), jnp.asarray(0.5)
    drop = {"block.0": lambda h: 0 * h}
    first = jaxdiff.edit_taps(both, drop)
    second = jaxdiff.edit_taps(both, drop, where=lambda d: d.weak)
    all_of_them = jaxdiff.edit_taps(both, drop, where=lambda d: (d.base, d.weak))
    strong, weak = (jaxdiff.edit_taps(d, drop)(x, t) for d in (both.base, both.weak))
    for found, (good, bad) in (
        (first, (strong, both.weak(x, t))),
        (second, (both.base(x, t), weak)),
        (all_of_them, (strong, weak)),
    ):
        np.testing.assert_allclose(found(x, t), bad + 2.0 * (good - bad), rtol=1e-9)
    # A tap that only one of them has.
    jaxdiff.edit_taps(both, {"block.1": lambda h: 0 * h})(x, t)
    assert jaxdiff.find_network(both) is both.base
    assert jaxdiff.find_network(both, lambda d: d.weak) is both.weak


# --- maps between two times


def test_flow_maps_step_exactly_and_keep_the_marginals(x64):
    oracle = gaussian(processes.VP())
    flow = oracles.GaussianFlowMap(oracle)
    sample = lambda gamma, times, count=4: jaxdiff.sample(
        KEY, flow, (3,), count, solver=solvers.FlowMapSteps(gamma), times=times
    )
    # However many steps, the exact flow.
    one, many = sample(None, 1), sample(None, 7)
    np.testing.assert_allclose(many.x, one.x, rtol=1e-9)
    np.testing.assert_array_equal(many.nfe, 7)
    exact = jaxdiff.sample(KEY, oracle, (3,), 4, solver=solvers.EDMHeun(), times=2000).x
    np.testing.assert_allclose(one.x, exact, atol=1e-4)
    np.testing.assert_allclose(sample(0.0, 7).x, one.x, atol=1e-6)
    # With noise in between, the same law.
    start = jnp.asarray(processes.VP().t_max)
    mean, covariance = oracle.moments()
    for gamma in (0.5, 1.0):
        x = sample(gamma, 4, 40_000).x
        np.testing.assert_allclose(x.mean(0), mean, atol=0.03 + float(oracle.process.alpha(start)))
        np.testing.assert_allclose(jnp.cov(x.T), covariance, atol=0.03)


def test_denoisers_and_flow_maps_are_not_confused(x64):
    oracle = gaussian(processes.VP())
    flow = oracles.GaussianFlowMap(oracle)
    with pytest.raises(TypeError, match="FlowMapSteps steps by a map between two times.*DDIM"):
        jaxdiff.sample(KEY, oracle, (3,), 1, solver=solvers.FlowMapSteps())
    for call in (
        lambda: jaxdiff.sample(KEY, flow, (3,), 1),
        lambda: jaxdiff.sample(KEY, flow, (3,), 1, solver=diffrax.Heun()),
        lambda: jaxdiff.log_likelihood(flow, jnp.ones((1, 3))),
        lambda: jaxdiff.Clipped(flow),
        lambda: guidance.ClassifierFree(flow, 0),
    ):
        with pytest.raises(TypeError, match="must be a denoiser.*GaussianFlowMap.*FlowMapSteps"):
            call()
    with pytest.raises(TypeError, match="must be a denoiser.*MLP.*Wrap a network"):
        jaxdiff.sample(KEY, networks.MLP(2, rngs=nnx.Rngs(0)), (2,), 1)


# --- a run in pieces


@pytest.mark.parametrize("solver", [solvers.DDIM(1.0), solvers.SEEDS(2), solvers.AncestralNoise()])
def test_a_run_in_pieces_is_the_whole_run(oracle, solver):
    times = jnp.linspace(0.95, 0.05, 7)
    denoiser = Momentum(outside.IndependentCondition(oracle))
    whole = run(denoiser, solver, times=times)
    first = run(denoiser, solver, times=times[:3])

    @jax.jit
    def rest(step):
        return jaxdiff.denoise(
            KEY, denoiser, first.x, notes=first.notes, memory=first.memory, first_step=step,
            cond=jnp.arange(3) % 2, solver=solver, times=times[2:],
        )  # fmt: skip

    second = rest(2)
    np.testing.assert_allclose(second.x, whole.x, rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(first.nfe + second.nfe, whole.nfe)
    # Other noise for another place of the piece.
    assert not np.allclose(rest(0).x, whole.x, atol=1e-3)


def test_pieces_with_one_key_repeat_no_noise(x64):
    """The law of the pieces is that of the whole: a standard deviation of 0.66, not of 0.82."""
    process = processes.Cosine()
    gauss = oracles.gaussian(process, jnp.zeros(1), jnp.eye(1))
    grid = solvers.resolve_times(process, 4)
    options = dict(solver=solvers.Ancestral())
    whole = jaxdiff.sample(KEY, gauss, (1,), 20_000, times=grid, **options).x
    half = jaxdiff.sample(KEY, gauss, (1,), 20_000, times=grid[:3], **options).x
    rest = jaxdiff.denoise(KEY, gauss, half, times=grid[2:], **options).x
    np.testing.assert_allclose(rest.std(), whole.std(), rtol=0.03)
    # And from there once more, and by a thousand examples' grids of their own.
    grids = jnp.broadcast_to(grid[2:], (20_000, 3))
    own = jaxdiff.denoise(KEY, gauss, half, times=grids, **options).x
    np.testing.assert_allclose(own, rest, rtol=1e-9)


def test_micro_batches_may_be_mapped_over(oracle):
    whole = run(oracle, solvers.DDIM(1.0), count=8, cond=None).x
    pieces = jax.lax.map(
        lambda i: run(oracle, solvers.DDIM(1.0), count=4, cond=None, first_index=i).x,
        jnp.arange(0, 8, 4),
    )
    np.testing.assert_allclose(pieces.reshape(8, 2), whole, rtol=1e-9)


def test_one_number_of_examples_at_a_time_says_what_it_wants(oracle):
    for batch_size in (0, -2):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
            run(oracle, batch_size=batch_size)
    with pytest.raises(TypeError, match="`batch_size` must be a whole number"):
        run(oracle, batch_size=2.5)
    np.testing.assert_allclose(
        run(oracle, batch_size=np.int64(2)).x, run(oracle).x, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "solver", [solvers.EDMHeun(), solvers.PNDM(), solvers.DPMSolver(2), solvers.EulerMaruyama()]
)
def test_starts_of_solvers_in_the_noise_level_are_sane(x64, solver):
    """Few steps on the cosine schedule, where sigma / alpha is 6366 at t_max."""
    oracle = bimodal(processes.Cosine())
    default = solver.default_times(oracle.process, 8, 0.0)
    level = oracle.process.sigma(default[0]) / oracle.process.alpha(default[0])
    np.testing.assert_allclose(level, 80.0, rtol=1e-6)
    _, covariance = oracle.moments()

    def spread(times):
        x = jaxdiff.sample(KEY, oracle, (1,), 4000, solver=solver, times=times).x
        return float(x.std() / jnp.sqrt(covariance[0, 0]))

    assert abs(spread(8) - 1) < 0.3
    if not isinstance(solver, solvers.DPMSolver):  # whose error there is in other moments
        assert spread(oracle.process.times(8)) > 1.5
    # Inversion ends where sampling starts; and bounded starts stay as they are.
    up = jaxdiff.invert(oracle, jnp.ones((1, 1)), solver=solvers.EDMHeun(), times=8, saveat=SAVE)
    np.testing.assert_allclose(up.trajectory.t[0, -1], default[0], rtol=1e-9)
    for process in (processes.EDM(), processes.VE(), processes.VP(), processes.SubVP()):
        grids = [solver.default_times(process, 8, 0.0), process.times(8)]
        np.testing.assert_array_equal(*grids)
    for other in (solvers.DDIM(), solvers.DPMSolverMultistep(), solvers.UniPC()):
        grids = [other.default_times(oracle.process, 8, 0.0), oracle.process.times(8)]
        np.testing.assert_array_equal(*grids)
