"""Counts of operations and bytes, against arithmetic and the compiler's where it is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff import networks, parallel
from jaxdiff.costs import Collective, chip_of, count_flops, read_program


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_and_loops_are_counted_as_often_as_they_run():
    matrix, vector = shape(8, 8), shape(8)

    def powers(a, x, times):
        return jax.lax.scan(lambda h, _: (a @ h, None), x, None, length=times)[0]

    def until(a, x):
        return jax.lax.while_loop(lambda h: h.sum() < 1e3, lambda h: a @ h, x)

    def dearest(a, x):
        return jax.lax.cond(x[0] > 0, lambda: a @ x, lambda: powers(a, x, 3))

    assert count_flops(lambda a, x: a @ x, matrix, vector) == 128
    assert count_flops(lambda a, x: powers(a, x, 5), matrix, vector) == 5 * 128
    assert count_flops(until, matrix, vector, trips=7) == 7 * 128
    assert count_flops(dearest, matrix, vector) == 3 * 128
    assert count_flops(jax.vmap(jax.jit(lambda x, y: x @ y)), matrix, matrix) == 8 * 16


@pytest.mark.parametrize(
    "stride, padding, spread", [(1, "SAME", 1), (2, "SAME", 1), (1, "VALID", 2)]
)
def test_convolutions_are_counted_without_their_padding(stride, padding, spread):
    """As the compiler counts them, and so are their gradients."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, rhs_dilation=(spread, spread),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def gradients(x, w):
        return jax.value_and_grad(lambda x, w: conv(x, w).sum(), (0, 1))(x, w)

    x, w = shape(2, 9, 7, 3), shape(3, 3, 3, 5)
    assert count_flops(conv, x, w) == jax.jit(conv).lower(x, w).cost_analysis()["flops"]
    # The sum adds one operation for each of its terms.
    terms = float(np.prod(jax.eval_shape(conv, x, w).shape))
    compiled = jax.jit(gradients).lower(x, w).cost_analysis()["flops"]
    assert count_flops(gradients, x, w) == pytest.approx(compiled, abs=4 * terms)


def dit(**options):
    return nnx.eval_shape(
        lambda: networks.DiT(
            image_size=8, patch_size=2, in_channels=1, hidden=128, depth=3, num_heads=4,
            rngs=nnx.Rngs(0), **options,
        )
    )  # fmt: skip


def gradient(network, x, t):
    return jax.value_and_grad(lambda n: jnp.mean(jax.vmap(n)(x, t) ** 2))(network)


def test_a_loop_of_blocks_costs_what_the_blocks_cost():
    """The unrolled program, which the compiler counts rightly, is the measure of the other."""
    x, t = shape(16, 8, 8, 1), shape(16)
    flops, compiled, moved = {}, {}, {}
    for stacked in (False, True):
        network = dit(stacked=stacked)
        program = jax.jit(gradient).lower(network, x, t).compile()
        compiled[stacked] = program.cost_analysis()
        flops[stacked] = count_flops(gradient, network, x, t)
        moved[stacked] = read_program(program.as_text()).bytes
    assert flops[True] == flops[False]
    # What is no product costs a little more.
    assert flops[False] < compiled[False]["flops"] < 1.05 * flops[False]
    assert compiled[True]["flops"] < 0.5 * flops[True]
    assert moved[False] == pytest.approx(compiled[False]["bytes accessed"], rel=1e-3)
    # Slices of the stacks come on top.
    assert moved[False] < moved[True] < 2.5 * moved[False]


def test_recomputation_is_work_and_no_use():
    x, t = shape(16, 8, 8, 1), shape(16)
    plain = count_flops(gradient, dit(), x, t)
    network = dit(remat=True)
    again = count_flops(gradient, network, x, t)
    forward = count_flops(lambda network, x, t: jax.vmap(network)(x, t), network, x, t)
    assert plain < again < plain + forward
    left = networks.without_remat({"a": network})["a"]
    assert count_flops(gradient, left, x, t) == plain
    assert network.remat and not left.remat and dict(left.arguments)["remat"] is False


def test_collectives_are_found_with_their_bytes_and_loops():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    split = parallel.batch_sharding(mesh)
    rows = jax.ShapeDtypeStruct((5, 64, 8), jnp.float32, sharding=split.update(spec=(None, "fsdp")))
    whole = split.update(spec=())

    def run(stack):
        def body(total, part):
            return total + jax.lax.with_sharding_constraint(part, whole), None

        return jax.lax.scan(body, jnp.zeros((64, 8)), stack)[0]

    program = read_program(jax.jit(run).lower(rows).compile().as_text())
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert gathers == [Collective("all-gather", 64 * 8 * 4, 5, True, 4)]
    assert gathers[0].sent == 5 * 64 * 8 * 4 * 3 / 4


TPU = """
%fused.1 (p.1: bf16[8,16]) -> (bf16[8,16], bf16[128,16]) {
  %p.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[128,16]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=3, replica_groups=mesh['a'=2,'b'=16], device_ids=([2,16]T(1,0)) {'b'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[8,16]{1,0}, bf16[128,16]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused.2 (p.2: bf16[8,16]) -> bf16[128,16] {
  %p.2 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[128,16]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=3, replica_groups=mesh['a'=2,'b'=16], device_ids=([2,16]T(1,0)) {'b'}, dimensions={0}
}

%all-reduce-scatter.1 (p.3: f32[64,16]) -> f32[4,16] {
  %p.3 = f32[64,16]{1,0} parameter(0)
  %all-reduce.1 = f32[64,16]{1,0} all-reduce(%p.3), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15},{16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,16]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={4,16}
}

%body.1 (state: (s32[], bf16[8,16], f32[64,16])) -> (s32[], bf16[8,16], f32[64,16]) {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  %mine = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %started = (bf16[8,16]{1,0}, bf16[128,16]{1,0}) fusion(%mine), kind=kCustom, calls=%fused.1
  %done = bf16[128,16]{1,0} fusion(%mine), kind=kCustom, calls=%fused.2
  %grads = f32[64,16]{1,0} get-tuple-element(%state), index=2
  %scattered = f32[4,16]{1,0} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[8,16]{1,0}, f32[64,16]{1,0}) tuple(%mine, %grads)
}

%condition.1 (state.1: (s32[], bf16[8,16], f32[64,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (arg: (s32[], bf16[8,16], f32[64,16])) -> (s32[], bf16[8,16], f32[64,16]) {
  %arg = (s32[]{:T(128)}, bf16[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, f32[64,16]{1,0}) while(%arg), condition=%condition.1, body=%body.1
}
"""  # noqa: E501


def test_programs_of_accelerators_are_read():
    """One gather in two fusions is one; a sum of which each keeps a part is a reduce-scatter."""
    gather, scatter = sorted(read_program(TPU).collectives, key=lambda c: c.kind)
    assert gather == Collective("all-gather", 128 * 16 * 2, 12, True, 16)
    assert scatter == Collective("reduce-scatter", 64 * 16 * 4, 12, True, 16)


def test_chips_are_known_by_the_longest_name_that_fits():
    class Device:
        device_kind = "TPU v5 lite"

    assert chip_of(Device()).flops == 197e12
    Device.device_kind = "NVIDIA H100 80GB HBM3"
    assert chip_of(Device()).flops == 989e12
    assert chip_of(jax.devices()[0]) is None


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="without an ENTRY computation"):
        read_program("")
