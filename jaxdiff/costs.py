"""What programs cost: floating-point operations, bytes moved, and what devices send each other.

The compiler's own `cost_analysis` counts the body of a loop once. These counts follow loops.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import PyTree

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker of an accelerator says of it.

    Attributes:
        flops: operations a second, in bfloat16 without sparsity.
        memory: bytes of its large memory.
        bandwidth: bytes a second between that memory and the chip.
        link: bytes a second that it sends along one axis of its network, in both directions
            together; 0 if it has none of its own.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0


CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 100e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 100e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 200e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 200e9),
    "NVIDIA A100": Chip(312e12, 80e9, 2039e9),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9),
}
"""By the beginning of `device.device_kind`; the longest that fits holds.

Reference: the makers' data sheets: Google Cloud, "TPU v5e" and "TPU v5p" and those of other
versions, whose bandwidth between chips, the sum over both directions of all links, is divided here
by the axes of the network; NVIDIA, "A100", "H100" and "H200 Tensor Core GPU", SXM versions.
"""


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device, or None."""
    names = [name for name in CHIPS if device.device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


def count_flops(fn: Callable[..., PyTree], *args: Any, trips: int = 1) -> int:
    """Floating-point operations of the products and convolutions in a function.

    2 for each multiplication with its addition, as the field counts; what else there is costs
    little beside it. A scan counts as often as it runs, a recomputed block as often as it is
    computed, and of branches the dearest counts.

    Args:
        fn: any function that JAX can trace; it is not run.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        trips: how often loops run whose number of steps is not part of the program, such as the
            loop of a sampler.

    Returns:
        The number of operations, of all devices together.
    """
    return flops_of(jax.make_jaxpr(fn)(*args), trips=trips)


def flops_of(jaxpr: ClosedJaxpr, *, trips: int = 1) -> int:
    """`count_flops` of what is traced already, such as `jax.jit(fn).trace(*args).jaxpr`.

    Args:
        jaxpr: the traced function.
        trips: as in `count_flops`.

    Returns:
        The number of operations, of all devices together.
    """
    return _flops(jaxpr.jaxpr, trips)


def _flops(jaxpr: Jaxpr, trips: int) -> int:
    total = 0
    eqns: Any = jaxpr.eqns
    for eqn in eqns:
        name, inner = eqn.primitive.name, [_flops(j, trips) for j in _inner(eqn.params)]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            length = math.prod(shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * length
        elif name in ("conv_general_dilated", "convolution"):
            total += _convolution(eqn)
        elif name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif name == "while":
            total += trips * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
        elif name in ("custom_vjp_call", "custom_jvp_call", "linear_call"):
            total += inner[0] if inner else 0
        else:
            total += sum(inner)
    return total


def _convolution(eqn: Any) -> int:
    """Every output with every entry of the filter that meets the input, and not its padding."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    x, kernel = (var.aval.shape for var in eqn.invars)
    out = eqn.outvars[0].aval.shape
    channels = kernel[numbers.rhs_spec[1]]
    total = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * channels
    places = zip(
        numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], params["window_strides"],
        params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True,
    )  # fmt: skip
    for at_x, at_kernel, at_out, stride, (low, _), spread, step in places:
        # Positions in the input, which holds an entry at every `spread`-th of them.
        position = (
            np.arange(out[at_out])[:, None] * stride - low + np.arange(kernel[at_kernel]) * step
        )
        inside = (position >= 0) & (position <= (x[at_x] - 1) * spread) & (position % spread == 0)
        total *= int(inside.sum())
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that devices send each other.

    Attributes:
        kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
        bytes: of its result on one device, of a reduce-scatter of its operand.
        times: how often it runs.
        in_loop: whether it stands in a loop.
        devices: how many take part.
    """

    kind: str
    bytes: int
    times: int
    in_loop: bool
    devices: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring, in all its runs."""
        n = self.devices
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.bytes * self.times * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program moves on one device.

    Attributes:
        collectives: what it sends to others, each once.
        bytes: read from and written to the device's memory, by its operations as they were fused;
            of what is sliced or updated in place, the part alone.
    """

    collectives: tuple[Collective, ...]
    bytes: int


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
# They name what is there, and move nothing.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota")
_CALLS = ("while", "conditional", "call", "async-start", "async-update", "async-done")


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    kind: str
    operands: list[str]
    text: str


def read_program(text: str, *, trips: int = 1) -> Program:
    """Collectives and bytes of a compiled program, from its text.

    A loop's body counts as often as its condition allows, from 0 in steps of 1 as JAX's scans
    and counted loops run.

    Args:
        text: `compiled.as_text()`, of any platform.
        trips: how often loops run that end on another condition, such as the loop of a sampler.

    Returns:
        A `Program`.

    Raises:
        ValueError: for a text that is no compiled program's.
    """
    entry, computations = _parsed(text)
    if not computations.get(entry):
        raise ValueError(
            "`text` must be that of a compiled program, got one without an ENTRY computation. Pass "
            "`jax.jit(f).lower(*args).compile().as_text()`."
        )
    times: dict[str, int] = {}
    loops: dict[str, bool] = {}

    def visit(name: str, count: int, in_loop: bool) -> None:
        if times.get(name, 0) >= count:
            return
        times[name], loops[name] = count, in_loop or loops.get(name, False)
        for instruction in computations.get(name, []):
            looped = instruction.kind == "while"
            often = _trips(instruction, computations, trips) if looped else 1
            for called in _called(instruction):
                visit(called, count * often, in_loop or looped)

    visit(entry, 1, False)
    collectives: dict[str, Collective] = {}
    moved = 0
    fused = {
        name
        for instructions in computations.values()
        for instruction in instructions
        if instruction.kind not in _CALLS
        for name in _called(instruction)
    }
    for name, count in times.items():
        shapes = {i.name: i.shape for i in computations.get(name, [])}
        for instruction in computations.get(name, []):
            kind = instruction.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                if name.startswith("all-reduce-scatter"):  # so TPUs write it
                    kind = "reduce-scatter"
                found = _collective(kind, instruction, shapes, count, loops[name])
                # One that runs beside others is written in each of their fusions, with one channel.
                channel = re.search(r"channel_id=(\d+)", instruction.text)
                label = f"{name}/{instruction.name}"
                if name in fused and channel:
                    label = f"{kind}/{channel.group(1)}/{found.bytes}"
                if label not in collectives or collectives[label].times < found.times:
                    collectives[label] = found
            if name not in fused and instruction.kind not in (*_FREE, *_CALLS):
                moved += count * _moved(instruction, shapes, computations)
    return Program(tuple(collectives.values()), moved)


def _parsed(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    entry, name = "", ""
    computations: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match.group(2)
            computations[name] = []
            entry = name if match.group(1) else entry
        elif name and (match := _INSTRUCTION.match(line)):
            _, own, shape, kind, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            computations[name].append(_Instruction(own, shape, kind, operands, rest))
    return entry, computations


def _called(instruction: _Instruction) -> list[str]:
    found = _CALLED.findall(instruction.text)
    for group in _BRANCHES.findall(instruction.text):
        found += [name.strip().removeprefix("%") for name in group.split(",")]
    return found


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]], other: int) -> int:
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.text):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    inside = {i.name: i for i in computations.get(condition.group(1), [])} if condition else {}
    last = list(inside.values())[-1] if inside else None
    if last is None or last.kind != "compare" or "direction=LT" not in last.text:
        return other
    limit = inside.get(last.operands[1])
    value = re.match(r"(\d+)\)", limit.text) if limit and limit.kind == "constant" else None
    return int(value.group(1)) if value else other


def _bytes(shape: str, everywhere: bool = True) -> int:
    """Bytes of an array or tuple; `everywhere` counts what lies in a TPU's vector memory, too."""
    total = 0.0
    for kind, bits, dims, layout in _ARRAY.findall(shape):
        if kind != "token" and (everywhere or "S(" not in layout):
            size = int(bits) / 8 if bits else 1  # a pred is a byte
            total += math.prod(int(d) for d in dims.split(",") if d) * size
    return int(total)


def _collective(
    kind: str, instruction: _Instruction, shapes: dict[str, str], times: int, in_loop: bool
) -> Collective:
    size = _bytes(instruction.shape)
    if kind == "reduce-scatter":
        size = sum(_bytes(shapes.get(name, "")) for name in instruction.operands)
    elif instruction.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        size -= sum(_bytes(shapes.get(name, "")) for name in instruction.operands)
    return Collective(kind, size, times, in_loop, _group_size(instruction.text))


def _group_size(text: str) -> int:
    """How many devices take part, from any of the forms in which groups are written."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(match.group(2))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match.group(1).split(","))
    return 2


def _moved(
    instruction: _Instruction,
    shapes: dict[str, str],
    computations: dict[str, list[_Instruction]],
) -> int:
    """Bytes that an operation reads and writes in the device's large memory."""
    kind = instruction.kind
    inputs = [_bytes(shapes.get(name, ""), False) for name in instruction.operands]
    output = _bytes(instruction.shape, False)
    if kind in ("dynamic-slice", "gather", "slice"):
        return 2 * output
    if kind == "dynamic-update-slice":
        return 2 * inputs[1]
    if kind.endswith("-start"):  # counted where it is done
        return 0
    if kind in ("copy-done", "slice-done"):
        return _bytes(instruction.shape) + output
    if kind != "fusion":
        return sum(inputs) + output
    (name,) = _called(instruction)
    inside = {i.name: i for i in computations[name]}
    used = [min(size, _read(name, place, computations)) for place, size in enumerate(inputs)]
    results = [list(inside.values())[-1]]
    if results[0].kind == "tuple":
        results = [inside[operand] for operand in results[0].operands]
    sizes = [_bytes(part.group(0), False) for part in _ARRAY.finditer(instruction.shape)]
    if len(sizes) != len(results):  # one operation that returns several arrays
        return int(sum(used) + output)
    written = [
        size if (part := _updated(result, inside, computations)) is None else part
        for result, size in zip(results, sizes, strict=True)
    ]
    return int(sum(used) + sum(written))


def _read(name: str, place: int, computations: dict[str, list[_Instruction]]) -> float:
    """Bytes that a fusion reads of an operand: of what it slices alone, the slices."""
    inside = computations[name]
    names = {i.name for i in inside if i.kind == "parameter" and i.text.startswith(f"{place})")}
    total = 0.0
    for user in inside:
        for at, operand in enumerate(user.operands):
            if operand not in names:
                continue
            if user.kind == "bitcast":
                names.add(user.name)
            elif user.kind == "dynamic-slice":
                total += _bytes(user.shape) if at == 0 else 0
            elif user.kind == "fusion":
                total += _read(_called(user)[0], at, computations)
            elif user.kind != "dynamic-update-slice" or at > 0:
                return math.inf
    return total


def _updated(
    result: _Instruction,
    inside: dict[str, _Instruction],
    computations: dict[str, list[_Instruction]],
) -> int | None:
    """Bytes of what a fusion replaces within an array; None if it writes all of its result."""
    if result.kind == "bitcast":
        return _updated(inside[result.operands[0]], inside, computations)
    if result.kind == "fusion":
        nested = {i.name: i for i in computations[_called(result)[0]]}
        last = list(nested.values())[-1]
        return None if last.kind == "tuple" else _updated(last, nested, computations)
    if result.kind == "dynamic-update-slice":
        return _bytes(inside[result.operands[1]].shape)
    return None
