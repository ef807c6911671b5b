"""Running an equation on what stays of its channels."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from woodjax.structured.axes import FREE, Axis, Value, plain
from woodjax.structured.implants import ImplantedKernel, convolve
from woodjax.structured.rules import Counts, Spread
from woodjax.structured.rules.rule import Wanted
from woodjax.structured.solver import Solver

UNCHANGED = ("convert_element_type", "copy", "copy_p", "stop_gradient")  # primitives that leave a leaf what it is

Watch: TypeAlias = Callable[[Any, Sequence[Value], Sequence[Array], Sequence[Array]], None]


class Running:
    """What stays of each axis, and how arrays are made to fit.

    Attributes:
        solver: Of the units.
        stays: Of each root: does it stay?
        watch: Called with each equation that ran, what is known of its operands, the operands and the results.
    """

    def __init__(self, solver: Solver, stays: Bool[np.ndarray, " units"], watch: Watch | None = None) -> None:
        """Hold what stays; see the attributes."""
        self.solver: Solver = solver
        self.stays: Bool[np.ndarray, " units"] = stays
        self.watch: Watch | None = watch

    def mask(self, axis: Axis) -> Bool[np.ndarray, " size"]:
        """Which indices of an axis are stored.

        Args:
            axis: Its factors.

        Returns:
            Bool for each index.
        """
        stored = np.ones(1, bool)
        for factor in axis:
            roots = self.solver.roots(factor.units)
            here = np.where(roots >= 0, self.stays[np.maximum(roots, 0)], roots == FREE)
            stored = np.logical_and.outer(stored, here).reshape(-1)
        return stored

    def counts(self, value: Value) -> tuple[int, ...]:
        """The shape of what is stored of a value.

        Args:
            value: What is known of it.

        Returns:
            Its shape.
        """
        return tuple(int(self.mask(axis).sum()) for axis in value.axes)

    def run(self, equation: Any, items: Sequence[Any], spread: Spread, params: Callable[..., Any]) -> Sequence[Any]:
        """Run an equation.

        Args:
            equation: Of the whole program.
            items: Its operands.
            spread: What its rule says.
            params: What differs in its parameters.

        Returns:
            What is stored of its results.
        """
        if any(isinstance(item.array, ImplantedKernel) for item in items):
            return self._run_implanted(equation, items, spread, params)
        operands = [self.fit(item.array, item.value, want) for item, want in zip(items, spread.wanted, strict=True)]
        counts = Counts(
            tuple(np.shape(operand) for operand in operands), tuple(self.counts(value) for value in spread.results)
        )
        results = equation.primitive.bind(*operands, **equation.params | params(equation, counts))
        results = results if equation.primitive.multiple_results else [results]
        if self.watch is not None:
            self.watch(equation, [item.value for item in items], operands, results)
        return results

    def _run_implanted(
        self, equation: Any, items: Sequence[Any], spread: Spread, params: Callable[..., Any]
    ) -> Sequence[Any]:
        name = equation.primitive.name
        if name == "conv_general_dilated" and equation.params["feature_group_count"] == 1:
            inputs, kernel = items
            if isinstance(kernel.array, ImplantedKernel) and kernel.array.fits(equation):
                given = self.fit(inputs.array, inputs.value, spread.wanted[0])
                reads = equation.params["dimension_numbers"].rhs_spec[1]
                wanted = tuple(
                    want if i == reads else (axis,)
                    for i, (axis, want) in enumerate(zip(kernel.value.axes, spread.wanted[1], strict=True))
                )
                read = kernel.array.map_outer(lambda part: self.fit(part, kernel.value, wanted))
                return [convolve(equation, given, read)]
        if name in UNCHANGED:
            return [jax.tree.map(lambda part: equation.primitive.bind(part, **equation.params), items[0].array)]
        dense = [item._replace(array=_dense(item.array)) for item in items]
        return self.run(equation, dense, spread, params)

    def fit(self, array: Array, value: Value, wanted: Wanted) -> Array:
        """Take from an array the indices that are wanted, and put zeros where it has none.

        Args:
            array: What is stored of a value.
            value: What is known of it.
            wanted: Axes for each of its axes.

        Returns:
            The array that is wanted.
        """
        for i, (axis, wants) in enumerate(zip(value.axes, wanted, strict=True)):
            if all(want is axis for want in wants):
                continue
            stored, asked = self.mask(axis), np.logical_and.reduce([self.mask(want) for want in wants])
            if (stored == asked).all():
                continue
            if len(axis) == 1 and plain(axis[0]) and axis[0].units[0] == FREE:
                array = lax.slice_in_dim(array, 0, int(asked.sum()), axis=i)
            else:
                array = _taken(array, stored, asked, i)
        return array

    def fitted(self, item: Any, value: Value) -> Array:
        """An array as another value has it.

        Args:
            item: What is known and stored of a value.
            value: What is known of the other.

        Returns:
            The array with the axes of the other.
        """
        return self.fit(_dense(item.array), item.value, tuple((axis,) for axis in value.axes))


def _dense(array: Any) -> Any:
    return array.dense() if isinstance(array, ImplantedKernel) else array


def _taken(array: Array, stored: Bool[np.ndarray, " n"], asked: Bool[np.ndarray, " n"], axis: int) -> Array:
    at = np.cumsum(stored) - 1
    have = stored[asked]
    found = at[asked & stored]
    if len(found) and len(found) == found[-1] - found[0] + 1:
        array = lax.slice_in_dim(array, int(found[0]), int(found[-1]) + 1, axis=axis)
    else:
        array = jnp.take(array, found, axis=axis)
    if have.all():
        return array
    filled_in = np.flatnonzero(have)
    if len(filled_in) and len(filled_in) == filled_in[-1] - filled_in[0] + 1:
        config = [(0, 0, 0)] * array.ndim
        config[axis] = (int(filled_in[0]), int(len(have) - 1 - filled_in[-1]), 0)
        return lax.pad(array, jnp.zeros((), array.dtype), config)
    shape = (*array.shape[:axis], len(have), *array.shape[axis + 1 :])
    where = (slice(None),) * axis + (filled_in,)
    return jnp.zeros(shape, array.dtype).at[where].set(array, unique_indices=True, indices_are_sorted=True)
