"""Finding the channels of a network in its program."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from woodjax.door import checked
from woodjax.structured.axes import KEPT, ZERO, Axis, Place, Value
from woodjax.structured.channels import FIXED, ChannelGroup, ChannelGroups, ConvKernel, LeafChannels, Product, Role
from woodjax.structured.reading import Reading, Traced, read_program
from woodjax.structured.rules import parts_of
from woodjax.structured.walk import Walk
from woodjax.typing import ApplyFn, Batch, PyTree

Streams: TypeAlias = Literal["joint", "union"]
Unknown: TypeAlias = Literal["error", "barrier"]
Occurrence: TypeAlias = tuple[int, int, int]  # leaf, axis, factor


def check_options(streams: Streams, unknown: Unknown) -> None:
    """Raise unless the options are known.

    Args:
        streams: `"joint"` or `"union"`.
        unknown: `"error"` or `"barrier"`.

    Raises:
        ValueError: Another value.
    """
    if streams not in ("joint", "union"):
        raise ValueError(f"streams is {streams!r}: choose 'joint' or 'union'.")
    if unknown not in ("error", "barrier"):
        raise ValueError(f"unknown is {unknown!r}: choose 'error' or 'barrier'.")


@checked
def channel_groups(
    apply_fn: ApplyFn, variables: PyTree, inputs: Batch, *, streams: Streams = "joint", unknown: Unknown = "error"
) -> ChannelGroups:
    """Find which axes of which leaves must be pruned together, in the program of any network.

    The program is followed from the variables to the output. What stands at one index of an axis is tied to what it
    is added to, multiplied by or summed over with, through convolutions (depthwise and grouped), matrix products
    (attention heads come out as channels), residual sums, concatenations, reshapes, pads, slices, normalisation and
    `scan`. No layer of any framework and no name is looked at. Axes of the inputs and outputs are never prunable; nor
    is an axis whose sum would change, such as one over deviations from a mean that removed channels take part in.

    A network in which removed weights are zero gives the same output as the one that is really smaller: constants of
    the program stay as they are, so layer normalisation goes on dividing by the width it was written for.

    Args:
        apply_fn: `apply_fn(variables, inputs)`, a network in eval mode.
        variables: All arrays that shrink with the channels, batch statistics too; shapes are enough. What
            `woodjax.adapters.nnx.functional_variables` returns, or the variables of a Linen module.
        inputs: What the network takes; shapes are enough, and a batch of one. Costs are those of this batch.
        streams: `"joint"`: terms of a sum keep the same channels, a residual stream is pruned as one. `"union"`: each
            term keeps its own, and the sum what any of them keeps (HAP). Smaller networks, with a copy into place
            before each sum.
        unknown: What to do with a primitive that is not known: `"error"`, or `"barrier"` to keep all its channels.

    Returns:
        The groups. Every weight of a channel has one index in each axis of `group.places`.

    Raises:
        ValueError: A primitive that is not known, with the line of the source; no channel at all.

    Cost:
        A few traces of the network, and time in proportion to the equations of its program times the widths: under
        a second for a ResNet-20. Nothing runs on the device.

    References:
        Fang et al., DepGraph, 2023 (arXiv 2301.12900), for groups by dependency, there by a table of layers; Yu et
        al., HAP, 2021 (arXiv 2101.08940), for the union of streams.

    Example:
        >>> import jax.numpy as jnp, woodjax as wj
        >>> variables = {"hidden": jnp.ones((3, 4)), "bias": jnp.ones(4), "head": jnp.ones((4, 2))}
        >>> apply_fn = lambda v, x: jnp.tanh(x @ v["hidden"] + v["bias"]) @ v["head"]
        >>> groups = wj.channel_groups(apply_fn, variables, jnp.ones((1, 3)))
        >>> [(group.name, group.size) for group in groups.groups]
        [('hidden', 4)]
        >>> groups["hidden"].places
        (('bias', 0, 'each'), ('head', 0, 'in'), ('hidden', 1, 'out'))
    """
    check_options(streams, unknown)
    traced = Traced.of(apply_fn, variables, inputs)
    reading = read_program(traced, union=streams == "union", barriers=unknown == "barrier")
    found = _Products(reading, {}, {}, [])
    walk = Walk(reading.solver, barriers=unknown == "barrier", on_product=found.add)
    walk.program(traced.jaxpr, traced.consts, reading.items())
    groups = replace(_assembled(reading, found), streams=streams, unknown=unknown)
    if not groups.groups:
        raise ValueError(
            f"No channel can be removed from {[path for path, _ in traced.leaves]}: every axis is tied to an input, to "
            "an output or to arrays that apply_fn holds itself. Pass all variables, batch statistics too, as "
            "woodjax.adapters.nnx.functional_variables gives them."
        )
    return groups


class _Cost(NamedTuple):
    times: int
    written: Axis
    axes: tuple[Axis, ...]
    taps: int


class _Products(NamedTuple):
    """The products of a program: what leaves do in them, and what they cost."""

    reading: Reading
    roles: dict[Place, Role]
    kernels: dict[int, ConvKernel | None]
    costs: list[_Cost]

    def add(self, equation: Any, values: Sequence[Value], times: int) -> None:
        """Note a product that runs `times` times, or a look-up, which writes as a product with unit vectors does."""
        if equation.primitive.name == "gather":
            if values[1].example and not values[0].example:
                for place in (place for axis in values[0].axes for factor in axis for place in factor.places):
                    self.roles.setdefault(place, "out")
            return
        parts = parts_of(self.reading.solver, equation, values)
        for axes, role in ((parts.free, "out"), (parts.summed, "in")):
            for place in (place for axis in axes for factor in axis for place in factor.places):
                self.roles.setdefault(place, role)
        result = parts.spread.results[0].axes
        if equation.primitive.name == "dot_general":
            self.costs.append(_Cost(times, (), (*result, *parts.summed[: len(parts.summed) // 2]), 1))
            return
        numbers = equation.params["dimension_numbers"]
        at, kernel = numbers.out_spec[1], kernel_of(equation, values[1], self.reading.traced.leaves)
        taps = 1
        if kernel is not None:
            number, described = kernel
            known = self.kernels.setdefault(number, described)
            taps = parts.times if known == described else 1
        rest = tuple(axis for i, axis in enumerate(result) if i != at)
        self.costs.append(_Cost(times * parts.times, result[at], (*rest, *parts.summed), taps))


def kernel_of(
    equation: Any, kernel: Value, leaves: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[int, ConvKernel] | None:
    """The leaf that is the kernel of a convolution, if it is one, of several places and without groups.

    Args:
        equation: The convolution.
        kernel: What is known of its second operand.
        leaves: Paths and shapes of all leaves.

    Returns:
        Number and description of the leaf, or None.
    """
    outputs, inputs, *taps = equation.params["dimension_numbers"].rhs_spec
    shape = equation.invars[1].aval.shape
    if kernel.leaf is None or equation.params["feature_group_count"] != 1 or all(shape[i] == 1 for i in taps):
        return None
    return kernel.leaf, ConvKernel(leaves[kernel.leaf][0], outputs, inputs, tuple(taps))


def _assembled(reading: Reading, products: _Products) -> ChannelGroups:
    roles = products.roles
    solver, unions = reading.solver, reading.solver.unions()
    occurrences: dict[int, list[Occurrence]] = defaultdict(list)
    written: dict[int, list[Occurrence]] = defaultdict(list)
    for leaf, axes in enumerate(reading.leaves):
        for i, axis in enumerate(axes):
            for k, factor in enumerate(axis):
                for root in map(int, solver.roots(factor.units)):
                    if root != KEPT and root not in unions:
                        occurrences[root].append((leaf, i, k))
                        if roles.get((leaf, i)) == "out":
                            written[root].append((leaf, i, k))
    together: dict[tuple[Occurrence, ...], list[int]] = defaultdict(list)
    for root in sorted(written, key=lambda root: written[root][0]):
        together[tuple(occurrences[root])].append(root)
    groups, number, names = [], {}, dict[str, int]()
    for places, channels in together.items():
        base = reading.traced.leaves[written[channels[0]][0][0]][0]
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        found = {(leaf, axis): None for leaf, axis, _ in places}
        described = tuple((reading.traced.leaves[a][0], i, roles.get((a, i), "each")) for a, i in found)
        groups.append(ChannelGroup(name, len(number), len(channels), described))
        number |= {root: len(number) + i for i, root in enumerate(channels)}
    used: list[tuple[int, ...]] = []
    count = len(number)
    for root, ends in unions.items():
        if KEPT not in ends and all(end in number for end in ends) and ends:
            number[root] = count + len(used)
            used.append(tuple(sorted(number[end] for end in ends)))

    def numbered(factor_units: np.ndarray) -> np.ndarray:
        roots = solver.roots(factor_units)
        return np.array([number.get(int(root), FIXED) for root in roots], np.int64)

    leaves = tuple(
        LeafChannels(
            path,
            shape,
            tuple(tuple(numbered(factor.units) for factor in axis) for axis in axes),
            tuple(roles.get((i, axis), "each") for axis in range(len(axes))),
        )
        for i, ((path, shape), axes) in enumerate(zip(reading.traced.leaves, reading.leaves, strict=True))
    )
    costs = []
    for cost in products.costs:
        outputs, rest = (
            tuple(numbered(f.units[f.units != ZERO]) for f in factors)
            for factors in (cost.written, tuple(chain.from_iterable(cost.axes)))
        )
        costs.append(Product(cost.times, outputs, rest, cost.taps))
    kernels = tuple(kernel for _, kernel in sorted(products.kernels.items()) if kernel is not None)
    return ChannelGroups(tuple(groups), leaves, tuple(used), tuple(costs), kernels)
