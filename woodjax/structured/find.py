"""Finding the channels of a network in its program."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import PyTree

from woodjax.structured.axes import FREE, KEPT, ZERO, Axis, Place, Value, size_of
from woodjax.structured.channels import FIXED, ChannelGroup, ChannelGroups, LeafChannels, Product, Role
from woodjax.structured.reading import Reading, Traced, read_program
from woodjax.structured.rules import parts_of
from woodjax.structured.walk import Walk
from woodjax.typing import ApplyFn, Batch

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


def channel_groups(
    apply_fn: ApplyFn, variables: PyTree, inputs: Batch, *, streams: Streams = "joint", unknown: Unknown = "error"
) -> ChannelGroups:
    """Find which axes of which leaves must be pruned together, in the program of any network."""
    check_options(streams, unknown)
    traced = Traced.of(apply_fn, variables, inputs)
    reading = read_program(traced, union=streams == "union", barriers=unknown == "barrier")
    products: list[tuple[int, list[Axis], tuple[int, ...]]] = []
    roles: dict[Place, Role] = {}

    def on_product(equation: Any, values: Sequence[Value], times: int) -> None:
        if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
            return
        parts = parts_of(reading.solver, equation, values)
        for axes, role in ((parts.free, "out"), (parts.summed, "in")):
            for place in (place for axis in axes for factor in axis for place in factor.places):
                roles.setdefault(place, role)
        half = parts.summed[: max(1, len(parts.summed) // 2)] if len(parts.summed) > 1 else parts.summed
        kernels = {place[0] for axis in (*parts.free, *parts.summed) for factor in axis for place in factor.places}
        products.append((times * parts.times, [*parts.spread.results[0].axes, *half], tuple(sorted(kernels))))

    walk = Walk(reading.solver, barriers=unknown == "barrier", on_product=on_product)
    walk.program(traced.jaxpr, traced.consts, reading.items())
    return replace(_assembled(reading, roles, products), streams=streams, unknown=unknown)


def _assembled(
    reading: Reading, roles: dict[Place, Role], products: Sequence[tuple[int, list[Axis], tuple[int, ...]]]
) -> ChannelGroups:
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
    for times, axes, kernels in products:
        factors = [numbered(f.units[f.units != ZERO]) for axis in axes for f in axis]
        costs.append(Product(times, tuple(factors), reading.traced.leaves[kernels[0]][0] if len(kernels) == 1 else None))
    return ChannelGroups(tuple(groups), leaves, tuple(used), tuple(costs))
