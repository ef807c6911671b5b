"""The program of a network, read until all its axes are cut where it needs them cut."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from woodjax.structured.axes import Axis, Place, Value, kept_axes
from woodjax.structured.solver import Solver
from woodjax.structured.walk import Item, Walk
from woodjax.tree import path_name
from woodjax.typing import Batch, PyTree


class Traced(NamedTuple):
    """A network as a program."""

    jaxpr: Any
    consts: Sequence[Any]
    carried: Sequence[Any]  # arrays that the function holds: the first inputs of the program
    leaves: tuple[tuple[str, tuple[int, ...]], ...]  # path and shape, the next inputs
    inputs: int  # how many of them are behind
    result: Any  # shapes of what it returns

    @classmethod
    def of(cls, apply_fn: Callable[[PyTree, Batch], Any], variables: PyTree, inputs: Batch) -> "Traced":
        """Trace a network.

        Args:
            apply_fn: `apply_fn(variables, inputs)`.
            variables: Of the whole network; shapes are enough.
            inputs: What it takes; shapes are enough.

        Returns:
            Its program.
        """
        carried = jax.tree.leaves(apply_fn) if isinstance(apply_fn, jax.tree_util.Partial) else []
        if carried:
            held = jax.tree.structure(apply_fn)

            def call(arrays: Sequence[Any], variables: PyTree, inputs: Batch) -> Any:
                return jax.tree.unflatten(held, arrays)(variables, inputs)

        else:

            def call(arrays: Sequence[Any], variables: PyTree, inputs: Batch) -> Any:
                return apply_fn(variables, inputs)

        program, result = jax.make_jaxpr(call, return_shape=True)(carried, variables, inputs)
        paths = jax.tree_util.tree_leaves_with_path(variables)
        leaves = tuple((path_name(path), tuple(np.shape(leaf))) for path, leaf in paths)
        number = len(jax.tree.leaves(inputs))
        return cls(program.jaxpr, program.consts, carried, leaves, number, result)


class Reading(NamedTuple):
    """A program whose channels are known."""

    traced: Traced
    solver: Solver
    leaves: tuple[tuple[Axis, ...], ...]
    walk: Walk

    def items(self, arrays: Sequence[Any] | None = None) -> list[Item]:
        """Inputs of the program.

        Args:
            arrays: What it runs on, if it runs: leaves, then inputs.

        Returns:
            Items for the walk.
        """
        return _items(self.traced, self.leaves, arrays)


def _items(traced: Traced, leaves: Sequence[tuple[Axis, ...]], arrays: Sequence[Any] | None) -> list[Item]:
    variables = traced.jaxpr.invars
    held = len(traced.carried)
    values = [Value(kept_axes(variable.aval.shape)) for variable in variables[:held]]
    values += [Value(axes, leaf=number) for number, axes in enumerate(leaves)]
    values += [Value(kept_axes(variable.aval.shape), example=True) for variable in variables[held + len(leaves) :]]
    given = [None] * len(values) if arrays is None else [*traced.carried, *arrays]
    return [Item(value, array) for value, array in zip(values, given, strict=True)]


def read_program(
    traced: Traced,
    *,
    union: bool,
    barriers: bool,
    cuts: Mapping[Place, frozenset[int]] | None = None,
    whole: int | None = None,
) -> Reading:
    """Find what goes together in a program.

    Args:
        traced: The program.
        union: Do sums keep what any of their terms keeps?
        barriers: Do primitives that are not known keep everything?
        cuts: Known cuts of the axes of leaves.
        whole: How many of the outputs keep all their indices, the first ones; None for all.

    Returns:
        The reading, after which no unit is tied any more.

    Raises:
        ValueError: A primitive that is not known.
    """
    known = dict(cuts or {})
    while True:
        solver = Solver(known, union=union)
        leaves = tuple(solver.leaf(i, shape) for i, (_, shape) in enumerate(traced.leaves))
        walk = Walk(solver, barriers=barriers)
        outputs = walk.program(traced.jaxpr, traced.consts, _items(traced, leaves, None))
        if not solver.asked:
            break
        known = {
            place: known.get(place, frozenset()) | frozenset(solver.asked.get(place, ()))
            for place in {*known, *solver.asked}
        }
    while True:  # a union is known by units that may have been tied since
        for item in outputs[:whole]:
            for axis in item.value.axes:
                solver.fix(axis)
        solver.settle()
        before = solver.size, solver.ties
        if not union:
            break
        outputs = walk.program(traced.jaxpr, traced.consts, _items(traced, leaves, None))
        solver.settle()
        if (solver.size, solver.ties) == before:
            break
    return Reading(traced, solver, leaves, walk)


def staying(solver: Solver, independent: Mapping[int, bool]) -> Bool[np.ndarray, " units"]:
    """Which roots stay.

    Args:
        solver: Of the units.
        independent: For roots that are no unions: do they stay? Those that are left out do.

    Returns:
        Bool for each unit number; that of roots counts.
    """
    unions = solver.unions()
    stays = np.ones(solver.size, bool)
    for root, stay in independent.items():
        stays[root] = stay
    for root, ends in unions.items():
        stays[root] = any(stays[end] for end in ends)
    return stays
