"""What kernels read, found in the program of a network while it runs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from woodjax.programs import PRODUCTS, inner_programs
from woodjax.structured.axes import Value
from woodjax.structured.channels import ChannelGroups
from woodjax.structured.matching import match
from woodjax.structured.reading import Traced, read_program
from woodjax.structured.running import Running
from woodjax.structured.walk import Walk
from woodjax.typing import ApplyFn, Batch, Params

LOOPS = ("scan", "cond", "while")


class Reader(NamedTuple):
    """A kernel as a matrix from what it reads to what it writes."""

    axes: tuple[int, ...]  # that are summed over, in the order of the rows of the matrix

    def to_matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "f o"]:
        """The kernel as a matrix."""
        moved = jnp.moveaxis(kernel, self.axes, range(len(self.axes)))
        return moved.reshape(math.prod(moved.shape[: len(self.axes)]), -1)

    def to_leaf(self, matrix: Float[Array, "f o"], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
        """A matrix as a kernel of the shape and dtype of another."""
        moved = jnp.moveaxis(kernel, self.axes, range(len(self.axes)))
        return jnp.moveaxis(matrix.reshape(moved.shape), range(len(self.axes)), self.axes).astype(kernel.dtype)


def record_readers(
    groups: ChannelGroups, apply_fn: ApplyFn, params: Params, inputs: Batch
) -> dict[str, tuple[Reader, Float[Array, "r f"]]]:
    """Run a network and note what goes into each kernel that reads channels.

    Args:
        groups: From `channel_groups`.
        apply_fn: `apply_fn(params, inputs)`.
        params: The parameters, or all variables.
        inputs: What the network takes.

    Returns:
        By the path of the kernel: how it is a matrix, and its inputs, one row for each place it is moved to.
    """
    wanted = {
        path
        for leaf, path, _ in match(groups.leaves, params)
        if leaf is not None
        and any(
            role == "in" and any((f >= 0).any() for f in axis) for axis, role in zip(leaf.axes, leaf.roles, strict=True)
        )
    }
    traced = Traced.of(apply_fn, params, inputs)
    reading = read_program(traced, union=groups.streams == "union", barriers=groups.unknown == "barrier")
    arrays = [jnp.asarray(a) for a in (*jax.tree.leaves(params), *jax.tree.leaves(inputs))]
    paths = [path for path, _ in traced.leaves]
    same = {id(array): (path, array) for path, array in zip(paths, arrays, strict=False)}  # leaves, as they are or cast
    outside = frozenset(_products_outside_loops(traced.jaxpr))
    found: dict[str, tuple[Reader, Array] | None] = {}  # None: used twice, or in another way

    def watch(equation: Any, values: Sequence[Value], operands: Sequence[Array], results: Sequence[Array]) -> None:
        if equation.primitive.name == "convert_element_type" and id(operands[0]) in same:
            same[id(results[0])] = same[id(operands[0])][0], results[0]
        if equation.primitive.name not in PRODUCTS:
            return
        for operand, value in zip(operands, values, strict=True):
            for path in {paths[leaf] for axis in value.axes for factor in axis for leaf, _ in factor.places} & wanted:
                plain = operand is operands[1] and same.get(id(operand), ("",))[0] == path
                plain = plain and id(equation) in outside and path not in found
                found[path] = _rows(equation, operands[0]) if plain else None

    running = Running(reading.solver, np.ones(reading.solver.size, bool), watch)
    walk = Walk(reading.solver, barriers=groups.unknown == "barrier", running=running)
    walk.program(traced.jaxpr, traced.consts, reading.items(arrays))
    return {path: rows for path, rows in found.items() if rows is not None}


def _products_outside_loops(jaxpr: Any) -> list[int]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            found.append(id(equation))
        elif equation.primitive.name not in LOOPS:
            found += [number for inner in inner_programs(equation) for number in _products_outside_loops(inner)]
    return found


def _rows(equation: Any, inputs: Array) -> tuple[Reader, Array] | None:
    """What a kernel on the right reads, one row for each product."""
    if equation.primitive.name == "dot_general":
        (left, right), (batched, _) = equation.params["dimension_numbers"]
        if batched:
            return None
        axes, order = tuple(sorted(right)), [left[i] for i in np.argsort(right)]
        last = range(inputs.ndim - len(order), inputs.ndim)
        size = math.prod(inputs.shape[axis] for axis in order)
        return Reader(axes), jnp.moveaxis(inputs, order, last).reshape(-1, size)
    if equation.params["feature_group_count"] != 1 or equation.params["batch_group_count"] != 1:
        return None
    _, reads, *places = equation.params["dimension_numbers"].rhs_spec
    return Reader((*places, reads)), _patches(equation, inputs)


def _patches(equation: Any, inputs: Array) -> Float[Array, "r f"]:
    """What a convolution reads at each place: a row of all its taps, channels last."""
    params, numbers = equation.params, equation.params["dimension_numbers"]
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    batch, channels, *places = numbers.lhs_spec
    x = jnp.transpose(inputs, (batch, *places, channels))
    edges = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    ends = [result[axis] for axis in numbers.out_spec[2:]]
    strides, taps = params["window_strides"], []
    for tap in np.ndindex(*(kernel[axis] for axis in numbers.rhs_spec[2:])):
        starts = [t * dilation for t, dilation in zip(tap, params["rhs_dilation"], strict=True)]
        limits = [s + (n - 1) * stride + 1 for s, n, stride in zip(starts, ends, strides, strict=True)]
        taps.append(lax.slice(x, (0, *starts, 0), (x.shape[0], *limits, x.shape[-1]), (1, *strides, 1)))
    return jnp.stack(taps, axis=-2).reshape(-1, len(taps) * x.shape[-1])
